// SPDX-License-Identifier: MIT
/// \file
/// How many experts a token has, layer by layer and over time.
#pragma once

#include <cmath>
#include <string_view>

#include <weir/core/error.hpp>
#include <weir/core/name_pattern.hpp>
#include <weir/core/types.hpp>
#include <weir/core/walk.hpp>

namespace weir {

namespace detail {

template <class T>
struct SetActiveExperts final : StorageWalk<T> {
  SetActiveExperts(std::string_view names, Index experts) : pattern(names), k(experts) {}
  bool only_stored() const override { return false; }
  bool at_node(const Node& node) override {
    std::string_view name = this->path();
    if (!name.empty()) name.remove_suffix(1);  // The dot.
    const bool changed = matches_pattern(pattern, name) && node.set_active_experts(k);
    count += changed ? 1 : 0;
    return !changed;
  }
  std::string_view pattern;
  Index k;
  Index count = 0;
};

}  // namespace detail

/// Lets the tokens of each mixture in `layer` whose name matches `pattern` have k experts from the
/// next pass on: fewer of them at inference, other numbers in other layers or for other tasks, or a
/// number that changes during training.
///
///     set_active_experts(model, "*", 1);
///     set_active_experts(model, "layers.0.moe", 4);
///
/// The number is no part of a checkpoint, as learning rates are not: a program sets it from the
/// step, see AnnealedExperts. Selectors of a fixed k have it: TopKSoftmax, SoftmaxTopK,
/// SigmoidTopK, BiasedSoftmaxTopK and BiasedProbabilityTopK, also within wrappers.
/// \return              How many mixtures matched.
/// \throws ConfigError  if none does, or k is more than one of them can serve; mixtures before that
///                      one then have k experts already.
template <class Layer>
Index set_active_experts(Layer& layer, std::string_view pattern, Index k) {
  expect_at_least<Index>("set_active_experts", "k", k, 1);
  detail::SetActiveExperts<typename Layer::Scalar> walk(pattern, k);
  walk("", layer);
  if (walk.count == 0) {
    throw_error<ConfigError>("set_active_experts: no mixture matches '", pattern,
                             "', expected at least one");
  }
  return walk.count;
}

/// How many experts a token has while training goes from dense to sparse: `first` at step 0, `last`
/// from step `steps` on, and between them
///
///     k(t) = round(last + (first - last) (1 - t / steps))
///
/// With first = experts the mixture begins dense, so that all experts learn from all tokens.
/// (Dense-to-sparse gates: Nie et al. 2021, arXiv:2112.14397, which anneal a temperature; here the
/// number itself falls.)
struct AnnealedExperts {
  Index first = 8;
  Index last = 2;
  Index steps = 1000;

  /// \throws ConfigError  unless first, last >= 1 and steps >= 0, or if t is negative.
  Index operator()(Index t) const {
    expect_at_least<Index>("AnnealedExperts", "first", first, 1);
    expect_at_least<Index>("AnnealedExperts", "last", last, 1);
    expect_at_least<Index>("AnnealedExperts", "steps", steps, 0);
    expect_at_least<Index>("AnnealedExperts", "t", t, 0);
    if (t >= steps) return last;
    const double left = 1.0 - static_cast<double>(t) / static_cast<double>(steps);
    return static_cast<Index>(
        std::lround(static_cast<double>(last) + static_cast<double>(first - last) * left));
  }
};

}  // namespace weir
