// SPDX-License-Identifier: MIT
/// \file
/// Independent scores, by default sigmoids, with a selection bias: the gate of DeepSeek-V3.
#pragma once

#include <concepts>

#include <weir/core/error.hpp>
#include <weir/core/parameter.hpp>
#include <weir/moe/concepts.hpp>
#include <weir/moe/routing.hpp>
#include <weir/moe/selector/group_limit.hpp>
#include <weir/moe/selector/k_best.hpp>
#include <weir/moe/selector/score_function.hpp>
#include <weir/moe/selector/selection_bias.hpp>
#include <weir/ops/lanes.hpp>
#include <weir/ops/vector_loops.hpp>

namespace weir {

/// Settings of SigmoidTopK.
struct SigmoidTopKConfig {
  Index k = 2;
  bool renormalise = true;  ///< On by default, as in DeepSeek-V3: independent scores do not sum to
                            ///< anything.
  double scale = 1.0;
  GroupLimit groups = {};  ///< Limits the choice by the biased scores.
  ScoreFunction score = ScoreFunction::kSigmoid;
};

/// Chooses the k experts S of largest biased score s_e + b_e, s = sigmoid(logits) or another
/// ScoreFunction, with weights made of the unbiased scores:
///
///     g_e = scale * s_e / (sum_{j in S} s_j + 1e-20)     renormalised
///     g_e = scale * s_e                                  raw
///
/// Equal biased scores: the lowest index first. The bias b is a buffer: saved, not trained by
/// gradient, moved by BiasBalance. The choice is constant to the derivative. The probabilities that
/// balancers see are s_e / (sum_{all j} s_j + 1e-20).
/// With k = 1 and renormalisation the weight is constant, so that the task's loss does not reach
/// the router; Megatron-Core does not renormalise then.
/// (DeepSeek-AI 2024, arXiv:2412.19437, eq. 12-16; the bias: Wang et al. 2024, arXiv:2408.15664.)
template <std::floating_point T>
class SigmoidTopK : public SelectorBase<T> {
 public:
  struct Cache {
    RowVector<T> total;  ///< [tokens], what the scores of a token are divided by to become its
                         ///< probabilities.
  };

  /// A bias of zeros.
  /// \throws ConfigError  unless experts >= 1, 1 <= k <= experts, scale > 0 and the groups fit.
  explicit SigmoidTopK(Index experts, SigmoidTopKConfig config = {}) : config_(config) {
    expect_at_least<Index>("SigmoidTopK", "experts", experts, 1);
    bias_.value.setZero(1, experts);
    check(experts);
  }

  /// \throws ConfigError     unless 1 <= k <= experts, scale > 0, the groups fit and the bias is
  ///                         [1, experts].
  /// \throws NonFiniteError  if the bias is not finite.
  void check(Index experts) const {
    expect_k("SigmoidTopK", config_.k, experts);
    expect_positive("SigmoidTopK", "scale", config_.scale);
    config_.groups.check("SigmoidTopK", experts, config_.k);
    expect_selection_bias("SigmoidTopK", bias_, experts);
  }

  /// \param logits   [tokens, experts]
  /// \throws NonFiniteError  if a logit of a real token is not finite.
  void forward(MatrixIn<T> logits, const Pass& pass, Routing<T>& routing, Cache& cache) const {
    route(logits, pass, nullptr, routing, cache);
  }

  /// `forward` with an imposed choice, see Replay.
  void forward_imposed(MatrixIn<T> logits, const Pass& pass, const RoutingTrace& imposed,
                       Routing<T>& routing, Cache& cache) const {
    route(logits, pass, &imposed, routing, cache);
  }

  void backward(const Routing<T>& routing, RoutingGradient<T>& gradient, Cache& cache) const;

  /// Buffer `bias`.
  template <class Self, class Visit>
  static void visit(Self& self, Visit& visit) {
    visit("bias", self.bias_);
  }

  const SigmoidTopKConfig& config() const { return config_; }

  /// [1, experts], added to the scores for the choice alone.
  Buffer<T>& selection_bias() { return bias_; }
  const Buffer<T>& selection_bias() const { return bias_; }

 private:
  static constexpr T kTiny = T(1e-20);

  void route(MatrixIn<T> logits, const Pass& pass, const RoutingTrace* imposed, Routing<T>& routing,
             Cache& cache) const;

  /// What the chosen scores are divided by; `shares` times `total` are the scores.
  T divisor(const T* shares, T total, const Index* chosen) const {
    if (!config_.renormalise) return T(1);
    T sum = T(0);
    for (Index i = 0; i < config_.k; ++i) sum += shares[chosen[i]];
    return sum * total + kTiny;
  }

  SigmoidTopKConfig config_;
  Buffer<T> bias_;
};

template <std::floating_point T>
void SigmoidTopK<T>::backward(const Routing<T>& routing, RoutingGradient<T>& gradient,
                              Cache& cache) const {
  const Index k = config_.k;
  const Index experts = routing.experts();
  routing.rows.for_each_real(16 * experts, [&](Index t) {
    const T* p = routing.probabilities.row(t).data();
    T* ds = gradient.probabilities.row(t).data();  // First dL/dp, then dL/ds.
    const T total = cache.total[t];
    const T through_total = loops::dot<T>(experts, ds, p);
    const auto of_score = [=](const Lanes<T>& dp) -> Lanes<T> {
      return (dp - through_total) / total;
    };
    map_lanes<T>(experts, of_score, ds, ds);

    const Index* chosen = routing.expert.data() + routing.first(t);
    const T* weight = routing.weight.data() + routing.first(t);
    const T* d_weight = gradient.weights.data() + routing.first(t);
    const T divided_by = divisor(p, total, chosen);
    T inner = T(0);
    for (Index i = 0; config_.renormalise && i < k; ++i) inner += d_weight[i] * weight[i];
    for (Index i = 0; i < k; ++i) {
      ds[chosen[i]] += (static_cast<T>(config_.scale) * d_weight[i] - inner) / divided_by;
    }
    add_score_backward_row(config_.score, experts, routing.logits.row(t).data(), ds,
                           gradient.logits.row(t).data());
  });
}

template <std::floating_point T>
void SigmoidTopK<T>::route(MatrixIn<T> logits, const Pass& pass, const RoutingTrace* imposed,
                           Routing<T>& routing, Cache& cache) const {
  check(logits.cols());
  const Index experts = logits.cols();
  set_shape(cache.total, logits.rows());
  route_k_best(
      {"SigmoidTopK", config_.k, config_.groups, imposed}, logits, pass, routing,
      [&](Index t, T* p) -> const T* {
        score_row(config_.score, experts, routing.logits.row(t).data(), p);
        loops::add<T>(experts, p, bias_.value.data(), p);
        return p;
      },
      [&](Index t, const Index* chosen, T* weight, T* p) {
        score_row(config_.score, experts, routing.logits.row(t).data(), p);
        const T factor = static_cast<T>(config_.scale) / divisor(p, T(1), chosen);
        for (Index i = 0; i < config_.k; ++i) weight[i] = factor * p[chosen[i]];
        cache.total[t] = loops::sum<T>(experts, p) + kTiny;
        loops::scale(experts, T(1) / cache.total[t], p, p);
      });
}

}  // namespace weir

#ifdef WEIR_COMPILED
extern template class weir::SigmoidTopK<float>;
extern template class weir::SigmoidTopK<double>;
#endif
