// SPDX-License-Identifier: MIT
/// \file
/// How the parts of a model are stored, chosen by their names.
#pragma once

#include <cstddef>
#include <string>
#include <string_view>
#include <vector>

#include <weir/core/error.hpp>
#include <weir/core/name_pattern.hpp>
#include <weir/core/storage.hpp>
#include <weir/core/walk.hpp>

namespace weir {

/// The parts whose names match `pattern`, see `matches_pattern`, are stored as `storage` says. A
/// part is a layer that stores its weights as a whole: attention ("layers.3.attention"), the
/// experts of a mixture ("layers.3.moe.experts"), a feed-forward network or the head ("head").
struct StorageRule {
  std::string pattern;
  Storage storage = Storage::kPacked;
};

/// The first rule that matches a part decides.
using StorageRules = std::vector<StorageRule>;

/// The storage that the rules choose for a part; null if none does.
inline const Storage* storage_of(const StorageRules& rules, std::string_view part) {
  for (const StorageRule& rule : rules) {
    if (matches_pattern(rule.pattern, part)) return &rule.storage;
  }
  return nullptr;
}

namespace detail {

/// Calls `part(name, node)` for each part.
template <class T, bool stores = false>
struct WalkParts : Walk<T, stores> {
  bool only_stored() const final { return true; }
  bool at_node(const Node& node) final {
    if (!node.stores_itself()) return !node.set_storage_exists();
    std::string_view name = this->path();
    if (!name.empty()) name.remove_suffix(1);  // The dot.
    at_part(name, node);
    return false;
  }
  virtual void at_part(std::string_view name, const Node& node) = 0;
};

template <class T>
struct CheckRules final : WalkParts<T> {
  explicit CheckRules(const StorageRules& all) : rules(all), matches(all.size()) {}
  void at_part(std::string_view name, const Node& node) override {
    for (std::size_t i = 0; i < rules.size(); ++i) {
      matches[i] = matches[i] || matches_pattern(rules[i].pattern, name);
    }
    if (const Storage* storage = storage_of(rules, name)) node.expect_storable(*storage);
  }
  const StorageRules& rules;
  std::vector<bool> matches;
};

/// \throws ConfigError  if a rule matches no part; `who` is the function that needs that.
/// \throws StateError   as `expect_storable`.
template <class Layer>
void expect_matches(std::string_view who, Layer& layer, const StorageRules& rules) {
  CheckRules<typename Layer::Scalar> check(rules);
  check("", layer);
  for (std::size_t i = 0; i < rules.size(); ++i) {
    if (check.matches[i]) continue;
    throw_error<ConfigError>(who, ": no part matches '", rules[i].pattern,
                             "', expected at least one");
  }
}

template <class T>
struct StoreByRules final : WalkParts<T, true> {
  explicit StoreByRules(const StorageRules& all) : rules(all) {}
  void at_part(std::string_view name, const Node& node) override {
    if (const Storage* storage = storage_of(rules, name)) node.set_storage(*storage);
  }
  const StorageRules& rules;
};

template <class T>
struct ListParts final : WalkParts<T> {
  void at_part(std::string_view name, const Node& node) override {
    parts.push_back({std::string(name), node.storage()});
  }
  struct Part {
    std::string name;
    Storage storage = Storage::kTrainable;
  };
  std::vector<Part> parts;
};

}  // namespace detail

/// Stores each part of `layer` as the first rule says that matches its name. Parts that no rule
/// matches stay as they are, and so do routers, gates and norms whatever their names.
///
///     set_storage(decoder, {{"*.experts", Storage::kInt4},
///                           {"*.attention", Storage::kInt8},
///                           {"head", Storage::kBfloat16},
///                           {"*", Storage::kPacked}});
///
/// For everything else, see `set_storage` with one storage for all.
/// \throws ConfigError  if a rule matches no part.
/// \throws StateError   as `expect_storable`. In both cases nothing has changed.
template <class Layer>
void set_storage(Layer& layer, const StorageRules& rules) {
  using T = typename Layer::Scalar;
  detail::expect_matches("set_storage", layer, rules);
  detail::StoreByRules<T> store(rules);
  store("", layer);
}

/// The names of the parts of `layer` that are stored as a whole, with how they are stored now.
template <class Layer>
auto stored_parts(Layer& layer) {
  detail::ListParts<typename Layer::Scalar> list;
  list("", layer);
  return std::move(list.parts);
}

}  // namespace weir
