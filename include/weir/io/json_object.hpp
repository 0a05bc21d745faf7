// SPDX-License-Identifier: MIT
/// \file
/// JSON files whose every member is checked when it is read.
#pragma once

#include <cstddef>
#include <cstdint>
#include <limits>
#include <nlohmann/json.hpp>
#include <set>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include <weir/core/error.hpp>
#include <weir/core/types.hpp>
#include <weir/io/file_error.hpp>
#include <weir/io/mapped_file.hpp>

namespace weir::io {

/// Parses a text that somebody else has written.
/// \param path         What messages call it.
/// \param most_bytes   How long it may be.
/// \throws FileError   unless it is JSON in UTF-8, nested at most 32 deep, in which no object has a
///                     name twice.
inline nlohmann::json parse_json(const std::string& path, std::string_view text,
                                 std::size_t most_bytes) {
  using Json = nlohmann::json;
  constexpr int kMostDepth = 32;
  if (text.size() > most_bytes) {
    throw_error<FileError>(path, ": has ", text.size(), " bytes, expected at most ", most_bytes);
  }
  std::vector<std::set<std::string>> names;  // Of the objects that are open.
  const auto inspect = [&](int depth, Json::parse_event_t event, const Json& value) {
    const auto level = static_cast<std::size_t>(depth);
    if (event == Json::parse_event_t::object_start || event == Json::parse_event_t::array_start) {
      if (depth >= kMostDepth) throw_error<FileError>(path, ": is nested too deeply");
      names.resize(level + 1);
      names[level].clear();
    } else if (event == Json::parse_event_t::key) {
      const auto& name = value.get_ref<const std::string&>();
      if (!names[level - 1].insert(name).second) {
        throw_error<FileError>(path, ": '", name, "' is there twice");
      }
    }
    return true;
  };
  try {
    return Json::parse(text.begin(), text.end(), inspect);
  } catch (const Json::exception& error) {
    throw_error<FileError>(path, ": is not valid JSON: ", error.what());
  }
}

/// An object of a JSON file. Members are read by name and kind; null counts as missing.
class JsonObject {
 public:
  using Json = nlohmann::json;

  /// \throws FileError  unless `path` is a file that `parse_json` takes and holds an object.
  static JsonObject read(const std::string& path, std::size_t most_bytes) {
    const MappedFile file(path);
    const auto* const text = reinterpret_cast<const char*>(file.bytes().data());
    return {path, parse_json(path, {text, file.bytes().size()}, most_bytes)};
  }

  /// \param path     What messages call it.
  /// \throws FileError  unless it is an object.
  JsonObject(std::string path, Json json) : path_(std::move(path)), json_(std::move(json)) {
    if (!json_.is_object()) throw_error<FileError>(path_, ": is not a JSON object");
  }

  const std::string& path() const { return path_; }
  const Json& json() const { return json_; }

  bool has(const std::string& key) const {
    const auto found = json_.find(key);
    return found != json_.end() && !found->is_null();
  }

  /// \throws FileError  if there is none, as all that follow, or if it is of another kind.
  const Json& at(const std::string& key) const {
    if (!has(key)) throw_error<FileError>(path_, ": has no '", key, "'");
    return json_.at(key);
  }

  std::uint64_t bits(const std::string& key) const {
    const Json& value = at(key);
    if (!value.is_number_unsigned()) bad(key, "a number >= 0");
    return value.get<std::uint64_t>();
  }

  /// A whole number that is not negative.
  Index count(const std::string& key) const {
    if (bits(key) > static_cast<std::uint64_t>(std::numeric_limits<Index>::max())) {
      bad(key, "a number >= 0");
    }
    return json_.at(key).get<Index>();
  }

  /// A finite number.
  double number(const std::string& key) const {
    const Json& value = at(key);
    if (!value.is_number()) bad(key, "a number");
    return value.get<double>();
  }

  bool flag(const std::string& key) const {
    const Json& value = at(key);
    if (!value.is_boolean()) bad(key, "true or false");
    return value.get<bool>();
  }

  std::string text(const std::string& key) const {
    const Json& value = at(key);
    if (!value.is_string()) bad(key, "a string");
    return value.get<std::string>();
  }

  std::vector<std::string> texts(const std::string& key) const {
    std::vector<std::string> all;
    const Json& list = at(key);
    if (!list.is_array()) bad(key, "a list of strings");
    for (const Json& value : list) {
      if (!value.is_string()) bad(key, "a list of strings");
      all.push_back(value.get<std::string>());
    }
    return all;
  }

  JsonObject object(const std::string& key) const {
    const Json& value = at(key);
    if (!value.is_object()) bad(key, "an object");
    return {path_ + ": " + key, value};
  }

  /// \throws FileError  that says what the member had to be.
  [[noreturn]] void bad(const std::string& key, std::string_view expected) const {
    throw_error<FileError>(
        path_, ": '", key, "' is ",
        json_.at(key).dump(-1, ' ', false, Json::error_handler_t::replace).substr(0, 100),
        ", expected ", expected);
  }

 private:
  std::string path_;
  Json json_;
};

}  // namespace weir::io
