// SPDX-License-Identifier: MIT
/// \file
/// The precision in which the parts of a model are trained, chosen by their names.
#pragma once

#include <cstddef>
#include <string>
#include <string_view>
#include <type_traits>
#include <vector>

#include <weir/core/error.hpp>
#include <weir/core/name_pattern.hpp>
#include <weir/core/parameter.hpp>
#include <weir/core/precision.hpp>
#include <weir/core/storage.hpp>
#include <weir/core/walk.hpp>
#include <weir/kernels/rounded_product.hpp>

namespace weir {

/// The parts whose names match `pattern` are trained in `precision`. Parts are those of
/// StorageRule, such as "layers.3.attention" and "layers.3.moe.experts", apart from the head.
struct PrecisionRule {
  std::string pattern;
  Precision precision = Precision::kFull;
};

/// The first rule that matches a part decides.
using PrecisionRules = std::vector<PrecisionRule>;

namespace detail {

/// Calls `at_part` for each part, and `at_weight` for each parameter of a part that a rule matches.
template <class T>
struct WalkTrainedParts : Walk<T> {
  explicit WalkTrainedParts(const PrecisionRules& all) : rules(all) {}
  bool only_stored() const final { return true; }
  bool at_node(const Node& node) final {
    if (inside && this->path().starts_with(part)) return true;
    inside = node.stores_itself() && !node.trains_in_full();
    if (!inside) return !node.set_storage_exists();
    part = this->path();
    std::string_view name = part;
    if (!name.empty()) name.remove_suffix(1);  // The dot.
    rule = nullptr;
    for (const PrecisionRule& candidate : rules) {
      if (rule == nullptr && matches_pattern(candidate.pattern, name)) rule = &candidate;
    }
    at_part(name, node);
    return true;
  }
  void at_parameter(std::string_view name, Parameter<T>& parameter) final {
    if (inside && rule != nullptr && name.starts_with(part)) at_weight(parameter);
  }
  virtual void at_part(std::string_view /*name*/, const Node& /*node*/) {}
  virtual void at_weight(Parameter<T>& /*weight*/) {}

  const PrecisionRules& rules;
  bool inside = false;                  // Of a part that stores its weights as a whole,
  std::string part;                     // whose path this is.
  const PrecisionRule* rule = nullptr;  // The one that decides about it.
};

template <class T>
struct CheckPrecision final : WalkTrainedParts<T> {
  explicit CheckPrecision(const PrecisionRules& all)
      : WalkTrainedParts<T>(all), matches(all.size()) {}
  void at_part(std::string_view name, const Node& node) override {
    for (std::size_t i = 0; i < matches.size(); ++i) {
      matches[i] = matches[i] || matches_pattern(this->rules[i].pattern, name);
    }
    if (this->rule != nullptr && !node.is_trainable()) {
      throw_error<StateError>("set_precision: part '", name,
                              "' is stored for inference, expected Storage::kTrainable");
    }
  }
  std::vector<bool> matches;
};

template <class T>
struct SetPrecision final : WalkTrainedParts<T> {
  using WalkTrainedParts<T>::WalkTrainedParts;
  void at_weight(Parameter<T>& weight) override {
    weight.rounded = kernels::rounded_products(this->rule->precision);
  }
};

}  // namespace detail

/// Trains each part of `layer` in the precision of the first rule that matches its name:
///
///     set_precision(decoder, {{"*.experts", Precision::kFp8}, {"*", Precision::kBfloat16}});
///
/// Parts that no rule matches stay as they are. Routers, gates, norms, the embedding and the head
/// are trained in full whatever the rules, as those of DeepSeek-V3 (arXiv:2412.19437, section
/// 3.3.1), and so is a softmax. The precision is a setting of the parameters, as `freeze` makes
/// one: checkpoints do not have it, and storing weights for inference forgets it.
/// \throws ConfigError  if a rule matches no part, or asks for less than kFull in a layer of
///                      doubles, which is there for checking.
/// \throws StateError   if a part that a rule matches is stored for inference. In both cases
///                      nothing has changed.
template <class Layer>
void set_precision(Layer& layer, const PrecisionRules& rules) {
  using T = typename Layer::Scalar;
  for (const PrecisionRule& rule : rules) {
    if (std::is_same_v<T, float> || rule.precision == Precision::kFull) continue;
    throw_error<ConfigError>("set_precision: precision = ", name_of(rule.precision),
                             " for a layer of doubles, expected Precision::kFull");
  }
  detail::CheckPrecision<T> check(rules);
  check("", layer);
  for (std::size_t i = 0; i < rules.size(); ++i) {
    if (check.matches[i]) continue;
    throw_error<ConfigError>("set_precision: no part matches '", rules[i].pattern,
                             "', expected at least one");
  }
  detail::SetPrecision<T> set(rules);
  set("", layer);
}

/// Trains all parts of `layer` in `precision`.
template <class Layer>
void set_precision(Layer& layer, Precision precision) {
  set_precision(layer, PrecisionRules{{"*", precision}});
}

}  // namespace weir
