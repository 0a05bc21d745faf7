// SPDX-License-Identifier: MIT
/// \file
/// Independent scores, of sigmoids as a rule, with a selection bias: the gate of DeepSeek-V3.
#pragma once

#include <concepts>

#include <weir/core/parallel.hpp>
#include <weir/core/parameter.hpp>
#include <weir/moe/routing.hpp>
#include <weir/moe/selector/group_limit.hpp>
#include <weir/moe/selector/score_function.hpp>
#include <weir/moe/selector/selection_bias.hpp>
#include <weir/ops/lanes.hpp>
#include <weir/ops/vector_loops.hpp>

namespace weir {

/// Settings of SigmoidTopK.
struct SigmoidTopKConfig {
  Index k = 2;
  bool renormalise = true;
  double scale = 1.0;
  GroupLimit groups = {};  ///< By the biased scores.
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
class SigmoidTopK {
 public:
  using Scalar = T;
  static constexpr bool kImposable = true;  ///< See Replay.

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
    if (config_.k < 1 || config_.k > experts) {
      fail<ConfigError>("SigmoidTopK: k = ", config_.k, ", expected 1 <= k <= experts = ", experts);
    }
    expect_positive("SigmoidTopK", "scale", config_.scale);
    config_.groups.check("SigmoidTopK", experts, config_.k);
    expect_selection_bias("SigmoidTopK", bias_, experts);
  }

  /// \param logits   [tokens, experts]
  /// \throws NonFiniteError  if a logit of a real token is not finite.
  void select(MatrixIn<T> logits, const Pass& pass, Routing<T>& routing) const {
    check(logits.cols());
    routing.begin("SigmoidTopK", logits, pass, config_.k);
    routing.assign_each(config_.k);
    if (config_.score == ScoreFunction::kSqrtSoftplus) {
      select_by<detail::SqrtSoftplusScore>(routing);
    } else {
      select_by<detail::SigmoidScore>(routing);
    }
    routing.expect_allowed("SigmoidTopK");
  }

  void backward(const Routing<T>& routing, RoutingGradient<T>& gradient) const {
    if (config_.score == ScoreFunction::kSqrtSoftplus) {
      backward_by<detail::SqrtSoftplusScore>(routing, gradient);
    } else {
      backward_by<detail::SigmoidScore>(routing, gradient);
    }
  }

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

  template <class Score>
  void select_by(Routing<T>& routing) const {
    const Index experts = routing.experts();
    parallel_rows(routing.tokens(), 16 * experts, [&](Index begin, Index end) {
      for (Index t = begin; t < end; ++t) {
        T* p = routing.probabilities.row(t).data();
        if (routing.is_padding(t)) {
          routing.probabilities.row(t).setZero();
          continue;
        }
        const T* z = routing.logits.row(t).data();
        Index* chosen = routing.expert.data() + routing.first(t);
        T* weight = routing.weight.data() + routing.first(t);
        const auto biased_score = [](const Lanes<T>& x, const Lanes<T>& b) -> Lanes<T> {
          return Score::template value<T>(x) + b;
        };
        const auto score_of = [](const Lanes<T>& x) -> Lanes<T> {
          return Score::template value<T>(x);
        };
        map_lanes<T>(experts, biased_score, p, z, bias_.value.data());
        routing.forbid(t, p);
        const T* const among =
            routing.imposed != nullptr ? p : config_.groups.candidates(p, experts);
        routing.choose(t, among, config_.k, chosen);

        map_lanes<T>(experts, score_of, p, z);
        const T factor = static_cast<T>(config_.scale) / divisor(p, T(1), chosen);
        for (Index i = 0; i < config_.k; ++i) weight[i] = factor * p[chosen[i]];
        const T total = loops::sum<T>(experts, p) + kTiny;
        const auto share = [total](const Lanes<T>& score) -> Lanes<T> { return score / total; };
        map_lanes<T>(experts, share, p, p);
      }
    });
  }

  template <class Score>
  void backward_by(const Routing<T>& routing, RoutingGradient<T>& gradient) const {
    const Index k = config_.k;
    const Index experts = routing.experts();
    parallel_rows(routing.tokens(), 16 * experts, [&](Index begin, Index end) {
      for (Index t = begin; t < end; ++t) {
        if (routing.is_padding(t)) continue;
        const T* z = routing.logits.row(t).data();
        const T* p = routing.probabilities.row(t).data();
        T* ds = gradient.probabilities.row(t).data();  // First dL/dp, then dL/ds.
        const T total = total_score<Score>(z, experts);
        const T through_total = loops::dot<T>(experts, ds, p);
        const auto of_score = [&](const Lanes<T>& dp) -> Lanes<T> {
          return (dp - through_total) / total;
        };
        map_lanes<T>(experts, of_score, ds, ds);

        const Index* chosen = routing.expert.data() + routing.first(t);
        const T* weight = routing.weight.data() + routing.first(t);
        const T* d_weight = gradient.weights.data() + routing.first(t);
        const T divided_by = divisor(p, total, chosen);
        T inner = T(0);
        if (config_.renormalise) {
          for (Index i = 0; i < k; ++i) inner += d_weight[i] * weight[i];
        }
        for (Index i = 0; i < k; ++i) {
          ds[chosen[i]] += (static_cast<T>(config_.scale) * d_weight[i] - inner) / divided_by;
        }
        const auto add = [](const Lanes<T>& dz, const Lanes<T>& x, const Lanes<T>& d) -> Lanes<T> {
          return dz + d * Score::template slope<T>(x);
        };
        T* dz = gradient.logits.row(t).data();
        map_lanes<T>(experts, add, dz, dz, z, ds);
      }
    });
  }

  /// What the probabilities are divided by.
  template <class Score>
  static T total_score(const T* z, Index experts) {
    const auto score_of = [](const Lanes<T>& x) -> Lanes<T> { return Score::template value<T>(x); };
    return sum_lanes<T>(experts, score_of, z) + kTiny;
  }

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

}  // namespace weir
