// SPDX-License-Identifier: MIT
/// \file
/// The rows of moe_bench and peers_bench, as read from the JSON that Google Benchmark writes.
#pragma once

#include <algorithm>
#include <charconv>
#include <fstream>
#include <map>
#include <nlohmann/json.hpp>
#include <optional>
#include <stdexcept>
#include <string>
#include <string_view>
#include <system_error>
#include <tuple>
#include <utility>
#include <vector>

#include "support/clock.hpp"

namespace weir::bench {

/// What a row is about: FAMILY/SHAPE/STORAGE/MODE/tokens:N/DETAIL/threads:N.
struct RowKey {
  std::string family;   ///< "moe" or "peers".
  std::string shape;    ///< "A", ...
  std::string storage;  ///< "fp32", "bf16" or "fp32-trainable".
  std::string mode;     ///< "forward" or "training".
  long tokens = 0;
  std::string detail;  ///< Of moe how tokens spread, of peers whose they are.
  long threads = 0;

  auto operator<=>(const RowKey&) const = default;

  /// The numbers that are multiplied.
  std::string precision() const { return storage.substr(0, storage.find('-')); }
};

/// Figures by name. Of a row that was read more than once, the median of each counts.
class RowFigures {
 public:
  void add(const std::string& name, double value) { values_[name].push_back(value); }

  bool has(const std::string& name) const { return values_.contains(name); }

  /// \throws std::runtime_error   if there is none of that name.
  double operator[](const std::string& name) const {
    const auto found = values_.find(name);
    if (found == values_.end()) throw std::runtime_error("a row has no figure '" + name + "'");
    return median(found->second);
  }

 private:
  std::map<std::string, std::vector<double>> values_;
};

/// The rows of any number of files, in the order of the programs.
class Results {
 public:
  using Row = std::pair<RowKey, RowFigures>;

  /// \throws std::runtime_error   if `file` cannot be read or is something else.
  void read(const std::string& file) {
    std::ifstream stream(file);
    if (!stream) throw std::runtime_error(file + ": cannot be read");
    const auto json = nlohmann::json::parse(stream, nullptr, false);
    const auto is = [&](const char* member, auto check) {
      return json.is_object() && json.contains(member) && check(json[member]);
    };
    if (!is("context", [](const auto& context) { return context.is_object(); }) ||
        !is("benchmarks", [](const auto& rows) { return rows.is_array(); })) {
      throw std::runtime_error(file +
                               ": is not the JSON of Google Benchmark, which --benchmark_out=FILE "
                               "writes");
    }
    for (const auto& [key, value] : json["context"].items()) {
      if (value.is_string()) context_[key] = value;
    }
    for (const auto& row : json["benchmarks"]) add(file, row);
  }

  const std::vector<Row>& rows() const { return rows_; }

  /// What the last file that says anything about `key` says, or nothing.
  std::string context(const std::string& key) const {
    const auto found = context_.find(key);
    return found == context_.end() ? "" : found->second;
  }

  /// With its version, if the file says so.
  std::string name_of_peer(const std::string& peer) const {
    const std::string version = context("peers/" + peer);
    return version.empty() ? peer : version;
  }

 private:
  void add(const std::string& file, const nlohmann::json& row) {
    if (!row.is_object() || !row.contains("name") || !row["name"].is_string()) {
      throw std::runtime_error(file + ": has a row without a name");
    }
    const bool aggregate = row.value("run_type", "iteration") != "iteration";
    if (aggregate || row.value("error_occurred", false)) return;
    const std::optional<RowKey> key = parse(row["name"].get<std::string>());
    if (!key) return;
    auto found = std::find_if(rows_.begin(), rows_.end(),
                              [&](const Row& have) { return have.first == key; });
    if (found == rows_.end()) found = rows_.insert(rows_.end(), {*key, {}});
    for (const auto& [name, value] : row.items()) {
      if (value.is_number()) found->second.add(name, value);
    }
  }

  /// Nothing for rows of other families.
  static std::optional<RowKey> parse(std::string_view name) {
    std::vector<std::string> parts;
    for (std::size_t end = 0; end != std::string_view::npos;) {
      end = name.find('/');
      parts.emplace_back(name.substr(0, end));
      name.remove_prefix(end == std::string_view::npos ? 0 : end + 1);
    }
    // Behind the threads, Google Benchmark says how it took the time.
    if (parts.size() < 7 || (parts[0] != "moe" && parts[0] != "peers")) return std::nullopt;
    const std::optional<long> tokens = number_of("tokens:", parts[4]);
    const std::optional<long> threads = number_of("threads:", parts[6]);
    if (!tokens || !threads) return std::nullopt;
    return RowKey{parts[0], parts[1], parts[2], parts[3], *tokens, parts[5], *threads};
  }

  static std::optional<long> number_of(std::string_view prefix, std::string_view text) {
    if (!text.starts_with(prefix)) return std::nullopt;
    text.remove_prefix(prefix.size());
    long number = 0;
    const auto [end, error] = std::from_chars(text.data(), text.data() + text.size(), number);
    if (error != std::errc() || end != text.data() + text.size()) return std::nullopt;
    return number;
  }

  std::map<std::string, std::string> context_;
  std::vector<Row> rows_;
};

/// A group of bars: the rows of a shape that differ in precision or in peer.
struct Group {
  std::string mode;
  long tokens = 0;

  bool operator==(const Group&) const = default;

  /// Forward passes first, then training; few tokens first.
  bool operator<(const Group& other) const {
    return std::pair(mode != "forward", tokens) < std::pair(other.mode != "forward", other.tokens);
  }

  std::string name() const {
    return std::to_string(tokens) + (mode == "training" ? ", training" : "");
  }
};

inline std::string in_words(const Group& group) {
  return std::to_string(group.tokens) + (group.tokens == 1 ? " token" : " tokens") +
         (group.mode == "training" ? ", training" : "");
}

template <class T>
void add_once(std::vector<T>& list, const T& value) {
  if (std::find(list.begin(), list.end(), value) == list.end()) list.push_back(value);
}

/// The rows of a family that are wanted, and what they are about.
struct Selection {
  std::vector<Results::Row> rows;
  std::vector<std::string> shapes, details;
  std::vector<Group> groups;  ///< Sorted.
  long threads = 0;

  bool empty() const { return rows.empty(); }

  /// The rows of a group of bars, in the order of the file, float first.
  std::vector<Results::Row> bars(const std::string& shape, const Group& group) const {
    std::vector<Results::Row> bars;
    for (const auto& row : rows) {
      if (row.first.shape == shape && Group{row.first.mode, row.first.tokens} == group) {
        bars.push_back(row);
      }
    }
    std::stable_sort(bars.begin(), bars.end(), [](const auto& a, const auto& b) {
      return a.first.precision() > b.first.precision();
    });
    return bars;
  }
};

/// \param shapes   The names of the wanted ones; empty: all.
inline Selection select(const Results& results, const std::string& family,
                        const std::vector<std::string>& shapes) {
  Selection selection;
  for (const auto& [key, figures] : results.rows()) {
    if (key.family == family) selection.threads = std::max(selection.threads, key.threads);
  }
  for (const auto& [key, figures] : results.rows()) {
    const bool wanted = shapes.empty() || std::count(shapes.begin(), shapes.end(), key.shape) > 0;
    // Forward passes of weights that are arranged anew each time are the training's business.
    const bool unusual = (key.family == "moe" && key.detail != "uniform") ||
                         (key.mode == "forward" && key.storage != key.precision());
    if (key.family != family || key.threads != selection.threads || unusual || !wanted) continue;
    selection.rows.emplace_back(key, figures);
    add_once(selection.shapes, key.shape);
    add_once(selection.details, key.detail);
    add_once(selection.groups, Group{key.mode, key.tokens});
  }
  std::sort(selection.groups.begin(), selection.groups.end());
  return selection;
}

/// Whether reading the weights takes longer, at the machine's limits, than multiplying them.
inline bool is_bound_by_memory(const RowFigures& figures) {
  return figures["bandwidth%"] > figures["peak%"];
}

}  // namespace weir::bench
