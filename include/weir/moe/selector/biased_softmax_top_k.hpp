// SPDX-License-Identifier: MIT
/// \file
/// The k best logits after a selection bias, with weights of the softmax of those without it.
#pragma once

#include <algorithm>
#include <concepts>
#include <span>
#include <string_view>

#include <weir/core/types.hpp>
#include <weir/moe/selector/biased_choice.hpp>

namespace weir {

/// Settings of BiasedSoftmaxTopK.
struct BiasedSoftmaxTopKConfig {
  Index k = 2;
  bool renormalise = false;  ///< Whether the weights are a softmax of the chosen experts alone, as
                             ///< in Megatron-Core without `moe_router_pre_softmax`.
  double scale = 1.0;
};

/// Chooses the k experts S of largest biased logit z_e + b_e, with weights made of the logits as
/// they are, p = softmax(z):
///
///     g_e = scale * p_e                          raw
///     g_e = scale * p_e / sum_{j in S} p_j       renormalised
///
/// Equal biased logits: the lowest index first. The bias b is a buffer: saved, not trained
/// by gradient, moved by a balancer, QuantileBalance or BiasBalance. It enters the choice alone,
/// which is constant to the derivative. (Megatron-Core's quantile balancing, with b = -beta:
/// router.py, `quantile_balancing`, with the score function "softmax".)
template <std::floating_point T>
class BiasedSoftmaxTopK : public BiasedChoice<T, BiasedSoftmaxTopKConfig, BiasedSoftmaxTopK<T>> {
 public:
  static constexpr std::string_view kName = "BiasedSoftmaxTopK";
  static constexpr Index kCost = 16;
  static constexpr bool kBiasesLogits = true;

  using BiasedChoice<T, BiasedSoftmaxTopKConfig, BiasedSoftmaxTopK>::BiasedChoice;

  static void score(std::span<const T> z, std::span<T> s) {
    std::copy(z.begin(), z.end(), s.begin());
  }
};

}  // namespace weir

#ifdef WEIR_COMPILED
extern template class weir::BiasedSoftmaxTopK<float>;
extern template class weir::BiasedSoftmaxTopK<double>;
#endif
