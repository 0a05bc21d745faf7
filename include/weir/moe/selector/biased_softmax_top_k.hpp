// SPDX-License-Identifier: MIT
/// \file
/// Softmax over all experts, then the k best after a selection bias.
#pragma once

#include <concepts>

#include <weir/core/error.hpp>
#include <weir/core/parallel.hpp>
#include <weir/core/parameter.hpp>
#include <weir/moe/routing.hpp>
#include <weir/moe/selector/selection_bias.hpp>
#include <weir/moe/selector/softmax_top_k.hpp>
#include <weir/ops/softmax.hpp>
#include <weir/ops/vector_loops.hpp>

namespace weir {

/// Settings of BiasedSoftmaxTopK.
struct BiasedSoftmaxTopKConfig {
  Index k = 2;
  double scale = 1.0;
};

/// Chooses the k experts S of largest p_e + b_e, p = softmax(logits), with the weights
///
///     g_e = scale * p_e
///
/// Equal biased probabilities: the lowest index first. The bias b is a buffer: saved, not trained
/// by gradient, moved by a balancer, QuantileBalance or BiasBalance. It enters the choice alone,
/// which is constant to the derivative. (Megatron-Core's quantile balancing, with b = -beta.)
template <std::floating_point T>
class BiasedSoftmaxTopK {
 public:
  using Scalar = T;
  static constexpr bool kImposable = true;            ///< See Replay.
  static constexpr bool kBiasesProbabilities = true;  ///< What the bias is added to.

  /// A bias of zeros.
  /// \throws ConfigError  unless 1 <= k <= experts and scale > 0.
  explicit BiasedSoftmaxTopK(Index experts, BiasedSoftmaxTopKConfig config = {}) : config_(config) {
    expect_at_least<Index>("BiasedSoftmaxTopK", "experts", experts, 1);
    bias_.value.setZero(1, experts);
    check(experts);
  }

  /// \throws ConfigError     unless 1 <= k <= experts, scale > 0 and the bias is [1, experts].
  /// \throws NonFiniteError  if the bias is not finite.
  void check(Index experts) const {
    if (config_.k < 1 || config_.k > experts) {
      fail<ConfigError>("BiasedSoftmaxTopK: k = ", config_.k,
                        ", expected 1 <= k <= experts = ", experts);
    }
    expect_positive("BiasedSoftmaxTopK", "scale", config_.scale);
    expect_selection_bias("BiasedSoftmaxTopK", bias_, experts);
  }

  /// \param logits   [tokens, experts]
  /// \throws NonFiniteError  if a logit of a real token, or the bias, is not finite.
  void select(MatrixIn<T> logits, const Pass& pass, Routing<T>& routing) const {
    check(logits.cols());
    routing.begin("BiasedSoftmaxTopK", logits, pass, config_.k);
    routing.assign_each(config_.k);
    const Index experts = routing.experts();
    parallel_rows(routing.tokens(), 16 * experts, [&](Index begin, Index end) {
      for (Index t = begin; t < end; ++t) {
        T* const p = routing.probabilities.row(t).data();
        if (routing.is_padding(t)) {
          routing.probabilities.row(t).setZero();
          continue;
        }
        const T* const z = routing.logits.row(t).data();
        Index* const chosen = routing.expert.data() + routing.first(t);
        softmax_row(z, experts, p);
        loops::add<T>(experts, p, bias_.value.data(), p);
        routing.forbid(t, p);
        routing.choose(t, p, config_.k, chosen);
        softmax_row(z, experts, p);
        T* const weight = routing.weight.data() + routing.first(t);
        for (Index i = 0; i < config_.k; ++i) {
          weight[i] = static_cast<T>(config_.scale) * p[chosen[i]];
        }
      }
    });
  }

  void backward(const Routing<T>& routing, RoutingGradient<T>& gradient) const {
    SoftmaxTopK<T>{.k = config_.k, .scale = config_.scale}.backward(routing, gradient);
  }

  /// Buffer `bias`.
  template <class Self, class Visit>
  static void visit(Self& self, Visit& visit) {
    visit("bias", self.bias_);
  }

  /// b, [1, experts].
  Buffer<T>& selection_bias() { return bias_; }
  const Buffer<T>& selection_bias() const { return bias_; }
  const BiasedSoftmaxTopKConfig& config() const { return config_; }

 private:
  BiasedSoftmaxTopKConfig config_;
  Buffer<T> bias_;
};

}  // namespace weir
