// SPDX-License-Identifier: MIT
/// \file
/// Independent scores, by default sigmoids, with a selection bias: the gate of DeepSeek-V3.
#pragma once

#include <concepts>

#include <weir/core/error.hpp>
#include <weir/core/expert_map.hpp>
#include <weir/core/index_span.hpp>
#include <weir/core/parameter.hpp>
#include <weir/moe/concepts.hpp>
#include <weir/moe/routing.hpp>
#include <weir/moe/selector/group_limit.hpp>
#include <weir/moe/selector/k_best.hpp>
#include <weir/moe/selector/score_function.hpp>
#include <weir/moe/selector/selection_bias.hpp>
#include <weir/ops/lanes.hpp>
#include <weir/ops/softmax.hpp>
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
///     g_e = scale * s_e / sum_{j in S} s_j     renormalised
///     g_e = scale * s_e                        raw
///
/// Equal biased scores: the lowest index first. The bias b is a buffer: saved, not trained by
/// gradient, moved by BiasBalance. The choice is constant to the derivative. The probabilities that
/// balancers see are s_e / sum_{all j} s_j. DeepSeek's code adds 1e-20 to both sums, so that they
/// are not zero; here the quotients of scores that small are those of their logarithms, and sum to
/// `scale` and to 1 as all others do. With k = 1 and renormalisation the weight is constant, so
/// that the task's loss does not reach the router; Megatron-Core does not renormalise then.
/// (DeepSeek-AI 2024, arXiv:2412.19437, eq. 12-16; the bias: Wang et al. 2024, arXiv:2408.15664.)
template <std::floating_point T>
class SigmoidTopK : public SelectorBase<T> {
 public:
  using typename SelectorBase<T>::Cache;

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
  void forward(MatrixIn<T> logits, const Pass& pass, Routing<T>& routing, Cache& /*cache*/) const {
    route(logits, pass, nullptr, routing);
  }

  /// `forward` with an imposed choice, see Replay.
  void forward_imposed(MatrixIn<T> logits, const Pass& pass, const RoutingTrace& imposed,
                       Routing<T>& routing, Cache& /*cache*/) const {
    route(logits, pass, &imposed, routing);
  }

  void backward(const Routing<T>& routing, RoutingGradient<T>& gradient, Cache& /*cache*/) const;

  /// The bias of a cold expert is zero.
  /// \throws ConfigError  if the map does not fit.
  void remap_experts(const ExpertMap& map) {
    map.check("SigmoidTopK::remap_experts", bias_.value.cols());
    bias_.value = map.columns(bias_.value, T(0));
  }

  /// Buffer `bias`.
  template <class Self, class Visit>
  static void visit(Self& self, Visit& visit) {
    visit("bias", self.bias_);
  }

  const SigmoidTopKConfig& config() const { return config_; }

  /// How many experts each token has from the next pass on. `check` tells whether it fits.
  void set_k(Index k) { config_.k = k; }

  /// [1, experts], added to the scores for the choice alone.
  Buffer<T>& selection_bias() { return bias_; }
  const Buffer<T>& selection_bias() const { return bias_; }

 private:
  /// Sums below it are made of logarithms: their scores may have lost bits to underflow.
  static constexpr T kTiny = T(1e-20);

  void route(MatrixIn<T> logits, const Pass& pass, const RoutingTrace* imposed,
             Routing<T>& routing) const;

  /// Divides the scores [count] by their sum, the logit of number i being `logit(i)`.
  template <class Logit>
  void normalise(Index count, const Logit& logit, T* score) const {
    const T sum = loops::sum<T>(count, score);
    if (sum > kTiny) return loops::scale(count, T(1) / sum, score, score);
    for (Index i = 0; i < count; ++i) score[i] = log_score(config_.score, logit(i));
    softmax_row<T>(span_of(score, count), span_of(score, count));
  }

  SigmoidTopKConfig config_;
  Buffer<T> bias_;
};

template <std::floating_point T>
void SigmoidTopK<T>::backward(const Routing<T>& routing, RoutingGradient<T>& gradient,
                              Cache& /*cache*/) const {
  const Index k = config_.k;
  const Index experts = routing.experts();
  routing.rows.for_each_real(16 * experts, [&](Index t) {
    const T* p = routing.probabilities.row(t).data();
    // First dL/dp, then dL / d log s: with p a softmax of log s, p_e (dp_e - sum_j p_j dp_j).
    T* d_log = gradient.probabilities.row(t).data();
    const T mean = loops::dot<T>(experts, d_log, p);
    const auto of_log = [=](const Lanes<T>& dp, const Lanes<T>& share) -> Lanes<T> {
      return share * (dp - mean);
    };
    map_lanes<T>(experts, of_log, d_log, d_log, p);

    const Index* chosen = routing.expert.data() + routing.first(t);
    const T* weight = routing.weight.data() + routing.first(t);
    const T* d_weight = gradient.weights.data() + routing.first(t);
    T inner = T(0);
    for (Index i = 0; config_.renormalise && i < k; ++i) inner += d_weight[i] * weight[i];
    inner /= static_cast<T>(config_.scale);
    for (Index i = 0; i < k; ++i) d_log[chosen[i]] += weight[i] * (d_weight[i] - inner);
    add_log_score_backward_row(config_.score, experts, routing.logits.row(t).data(), d_log,
                               gradient.logits.row(t).data());
  });
}

template <std::floating_point T>
void SigmoidTopK<T>::route(MatrixIn<T> logits, const Pass& pass, const RoutingTrace* imposed,
                           Routing<T>& routing) const {
  check(logits.cols());
  const Index experts = logits.cols();
  route_k_best(
      {"SigmoidTopK", config_.k, config_.groups, imposed}, logits, pass, routing,
      [&](Index t, T* p) -> const T* {
        score_row(config_.score, experts, routing.logits.row(t).data(), p);
        loops::add<T>(experts, p, bias_.value.data(), p);
        return p;
      },
      [&](Index t, const Index* chosen, T* weight, T* p) {
        score_row(config_.score, experts, routing.logits.row(t).data(), p);
        const T* const z = routing.logits.row(t).data();
        for (Index i = 0; i < config_.k; ++i) weight[i] = p[chosen[i]];
        if (config_.renormalise) {
          normalise(
              config_.k, [=](Index i) { return z[chosen[i]]; }, weight);
        }
        loops::scale(config_.k, static_cast<T>(config_.scale), weight, weight);
        normalise(
            experts, [=](Index e) { return z[e]; }, p);
      });
}

}  // namespace weir

#ifdef WEIR_COMPILED
extern template class weir::SigmoidTopK<float>;
extern template class weir::SigmoidTopK<double>;
#endif
