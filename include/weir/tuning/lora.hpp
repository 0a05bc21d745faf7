// SPDX-License-Identifier: MIT
/// \file
/// Adds low-rank adapters to the weights of a model, merges them and removes them.
#pragma once

#include <algorithm>
#include <cmath>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include <weir/core/error.hpp>
#include <weir/core/init.hpp>
#include <weir/core/low_rank.hpp>
#include <weir/core/random.hpp>
#include <weir/core/types.hpp>
#include <weir/core/verbs.hpp>
#include <weir/kernels/matmul.hpp>

namespace weir {

/// Settings of `add_lora`.
struct LoraConfig {
  std::string name = "default";  ///< Of the adapter, by which a pass chooses it.
  Index rank = 8;
  double alpha = 8.0;
  bool rank_stabilised = false;  ///< Whether the scale is alpha / sqrt(rank), not alpha / rank.
  double dropout = 0.0;          ///< Of what the adapter multiplies, in training.

  /// \throws ConfigError  if a setting is out of range. The message names `where`.
  void check(std::string_view where) const {
    expect_at_least<Index>(where, "rank", rank, 1);
    expect_positive(where, "alpha", alpha);
    expect_fraction(where, "dropout", dropout);
    check_adapter_name(where, name);
  }
};

namespace detail {

/// An adapter and the weight it belongs to.
template <class T>
struct FoundAdapter {
  std::string weight_name;
  LinearParameter<T>* weight;
  LowRank<T>* adapter;
};

/// All parts of the adapter `name`.
/// \throws ConfigError  if there are none.
template <class Layer>
auto adapters_named(std::string_view where, Layer& layer, std::string_view name) {
  using T = typename Layer::Scalar;
  std::vector<FoundAdapter<T>> all;
  for (const auto& [weight_name, weight] : linear_weights(layer)) {
    if (LowRank<T>* adapter = weight->find(name)) all.push_back({weight_name, weight, adapter});
  }
  if (all.empty()) {
    throw_error<ConfigError>(where, ": there is no adapter '", name, "', expected one of add_lora");
  }
  return all;
}

/// W += scale B A, or W -= scale B A, for all parts of the adapter `name`.
template <class Layer>
Index set_merged(std::string_view where, Layer& layer, std::string_view name, bool merged) {
  using T = typename Layer::Scalar;
  const auto all = adapters_named(where, layer, name);
  for (const auto& [weight_name, weight, adapter] : all) {
    if (!weight->has_value()) {
      throw_error<StateError>(where, ": ", weight_name,
                              " is stored for inference, expected Storage::kTrainable");
    }
    if (adapter->is_merged() == merged) {
      throw_error<StateError>(where, ": adapter '", name, "' of ", weight_name,
                              merged ? " is merged already, expected one that is not"
                                     : " is not merged, expected one that is");
    }
  }
  for (const auto& found : all) {
    const double scale = found.adapter->scale();
    const Matrix<T> scaled = found.adapter->b.value * static_cast<T>(merged ? scale : -scale);
    multiply_nn<T>(scaled, found.adapter->a.value, found.weight->value, true);
    found.adapter->merged.value(0, 0) = merged ? T(1) : T(0);
  }
  return static_cast<Index>(all.size());
}

}  // namespace detail

/// Gives a low-rank adapter, see LowRank, to the weight of each linear map whose name matches
/// `pattern`, in which '*' stands for any characters:
///
///     freeze(model, "*");
///     add_lora(model, "*.attention.*", rng, {.rank = 8, .alpha = 16});
///     add_lora(model, "*.experts.3.*", rng, {.rank = 4});         one expert of each layer
///     add_lora(model, "*.router.weight", rng, {.rank = 2});       and all routers
///
/// A starts uniform in +-1 / sqrt(inputs), as PEFT initialises it, and B at zero, so that nothing
/// changes at first. Weights may have several adapters under different names, whose changes add up
/// in a pass that chooses all of them. Further calls extend an adapter to other weights. The
/// numbers are drawn in the order of the model.
///
/// Adapters are parameters `name.lora_A.ADAPTER` and `name.lora_B.ADAPTER` beside the weight `name`
/// and are trained, frozen, clipped, saved and resumed as such. Weights stored for inference take
/// adapters too (with int4: QLoRA, Dettmers et al. 2023, arXiv:2305.14314); training them needs
/// Pass::through_stored. Weights of LatentAttention called key_up and value_up take none.
/// \return              How many weights got one.
/// \throws ConfigError  if a setting is out of range, no weight of a linear map matches, or one
///                      has an adapter of that name already. Nothing has changed then.
template <class Layer>
Index add_lora(Layer& layer, std::string_view pattern, Rng& rng, const LoraConfig& config = {}) {
  using T = typename Layer::Scalar;
  config.check("add_lora");
  const auto weights = linear_weights(layer, pattern);
  if (weights.empty()) {
    throw_error<ConfigError>("add_lora: no weight of a linear map matches '", pattern,
                             "', expected at least one");
  }
  for (const auto& [name, weight] : weights) {
    if (weight->find(config.name) == nullptr) continue;
    throw_error<ConfigError>("add_lora: ", name, " has an adapter '", config.name,
                             "' already, expected another name");
  }
  for (const auto& [name, weight] : weights) {
    const double bound = 1.0 / std::sqrt(static_cast<double>(weight->d_in()));
    LowRank<T> adapter{.name = config.name,
                       .a = {},
                       .b = {},
                       .alpha = config.alpha,
                       .rank_stabilised = config.rank_stabilised,
                       .dropout = config.dropout};
    adapter.a.value = detail::drawn<T>(config.rank, weight->d_in(), rng,
                                       [&] { return rng.uniform(-bound, bound); });
    set_zero(adapter.b.value, weight->d_out(), config.rank);
    set_zero(adapter.merged.value, 1, 1);
    weight->adapters.push_back(std::move(adapter));
  }
  return static_cast<Index>(weights.size());
}

/// Removes the adapter `name` from all weights. Where it is merged, its change stays.
/// \return              How many weights had it.
/// \throws ConfigError  if none has.
template <class Layer>
Index remove_lora(Layer& layer, std::string_view name) {
  const auto all = detail::adapters_named("remove_lora", layer, name);
  for (const auto& found : all) {
    std::erase_if(found.weight->adapters, [&](const auto& a) { return a.name == name; });
  }
  return static_cast<Index>(all.size());
}

/// Adds the change of the adapter `name` to its weights, W += scale B A, so that passes cost what
/// they cost without it. The adapter stays, to be unmerged, and takes no part in passes meanwhile.
/// \return              How many weights have it.
/// \throws ConfigError  if none has.
/// \throws StateError   if it is merged already, or a weight is stored for inference. Nothing has
///                      changed then.
template <class Layer>
Index merge_lora(Layer& layer, std::string_view name) {
  return detail::set_merged("merge_lora", layer, name, true);
}

/// The opposite of `merge_lora`: W -= scale B A. Weights are then what they were before, to
/// rounding.
/// \throws ConfigError  if no weight has the adapter.
/// \throws StateError   unless it is merged and weights are parameters. Nothing has changed then.
template <class Layer>
Index unmerge_lora(Layer& layer, std::string_view name) {
  return detail::set_merged("unmerge_lora", layer, name, false);
}

/// The names of all adapters of `layer`, each once, in the order of the model.
template <class Layer>
std::vector<std::string> adapter_names(Layer& layer) {
  std::vector<std::string> names;
  for (const auto& [weight_name, weight] : linear_weights(layer)) {
    for (const auto& adapter : weight->adapters) {
      if (std::find(names.begin(), names.end(), adapter.name) == names.end()) {
        names.push_back(adapter.name);
      }
    }
  }
  return names;
}

}  // namespace weir
