// SPDX-License-Identifier: MIT
/// \file
/// The k best probabilities after a selection bias, with weights of those without it: ERNIE 4.5.
#pragma once

#include <concepts>
#include <span>
#include <string_view>

#include <weir/core/types.hpp>
#include <weir/moe/selector/biased_choice.hpp>
#include <weir/ops/softmax.hpp>

namespace weir {

/// Settings of BiasedProbabilityTopK.
struct BiasedProbabilityTopKConfig {
  Index k = 2;
  bool renormalise = true;
  double scale = 1.0;
};

/// Chooses the k experts S of largest biased probability p_e + b_e, p = softmax(z), with weights
/// made of the probabilities as they are:
///
///     g_e = scale * p_e / sum_{j in S} p_j       renormalised
///     g_e = scale * p_e                          raw
///
/// Equal sums: the lowest index first. The bias b is a buffer: saved, not trained by gradient,
/// moved by BiasBalance. It enters the choice alone, which is constant to the derivative.
/// BiasedSoftmaxTopK adds its bias to the logits instead, SigmoidTopK to independent scores.
/// (Baidu 2025, "ERNIE 4.5 Technical Report"; `Ernie4_5_MoeSparseMoeBlock` of Hugging Face's
/// transformers, which keeps the sum from falling below 1e-12.)
template <std::floating_point T>
class BiasedProbabilityTopK
    : public BiasedChoice<T, BiasedProbabilityTopKConfig, BiasedProbabilityTopK<T>> {
 public:
  static constexpr std::string_view kName = "BiasedProbabilityTopK";
  static constexpr Index kCost = 32;

  using BiasedChoice<T, BiasedProbabilityTopKConfig, BiasedProbabilityTopK>::BiasedChoice;

  static void score(std::span<const T> z, std::span<T> s) { softmax_row<T>(z, s); }
};

}  // namespace weir

#ifdef WEIR_COMPILED
extern template class weir::BiasedProbabilityTopK<float>;
extern template class weir::BiasedProbabilityTopK<double>;
#endif
