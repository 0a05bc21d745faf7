// SPDX-License-Identifier: MIT
/// \file
/// As many experts as it takes to reach a probability: dynamic routing (Huang et al. 2024).
#pragma once

#include <concepts>

#include <weir/core/error.hpp>
#include <weir/core/index_span.hpp>
#include <weir/moe/concepts.hpp>
#include <weir/moe/routing.hpp>
#include <weir/moe/selector/variable_choice.hpp>
#include <weir/ops/softmax.hpp>
#include <weir/ops/top_k.hpp>

namespace weir {

/// Settings of TopP.
struct TopPConfig {
  double threshold = 0.4;
  Index most = 0;  ///< How many experts a token has at most; 0: any number.
};

/// Chooses the fewest experts S whose probabilities, p = softmax(logits) from the largest on, add
/// up to the threshold, with the weights
///
///     g_e = p_e,   S = the first n experts, n = min{n : p_1 + ... + p_n >= threshold}
///
/// or the first `most` if n is larger, so that no token costs more than a known number of experts.
/// A token has at least one expert, and more of them the less certain its router is. Equal
/// probabilities: the lowest index first. An expert whose probability is exactly zero, such as a
/// forbidden one, is never chosen; with threshold = 1 all others are, up to rounding. The choice is
/// constant to the derivative. EntropyLoss keeps the number of experts from growing in training.
/// (Huang et al. 2024, arXiv:2403.07652, eq. 3-5; without the bound.)
template <std::floating_point T>
class TopP : public SelectorBase<T> {
 public:
  using Cache = VariableChoice;

  explicit TopP(TopPConfig config = {}) : config_(config) {}

  /// \throws ConfigError  unless 0 < threshold <= 1, 0 <= most <= experts and experts >= 1.
  void check(Index experts) const {
    expect_at_least<Index>("TopP", "experts", experts, 1);
    expect_in<Index>("TopP", "most", config_.most, 0, experts);
    if (!(config_.threshold > 0.0 && config_.threshold <= 1.0)) {
      throw_error<ConfigError>("TopP: threshold = ", config_.threshold,
                               ", expected 0 < threshold <= 1");
    }
  }

  /// \param logits   [tokens, experts]
  /// \throws NonFiniteError  if a logit of a real token is not finite.
  void forward(MatrixIn<T> logits, const Pass& pass, Routing<T>& routing, Cache& cache) const;

  void backward(const Routing<T>& routing, RoutingGradient<T>& gradient, Cache& /*cache*/) const;

  const TopPConfig& config() const { return config_; }

 private:
  TopPConfig config_;
};

template <std::floating_point T>
void TopP<T>::forward(MatrixIn<T> logits, const Pass& pass, Routing<T>& routing,
                      Cache& cache) const {
  check(logits.cols());
  routing.begin("TopP", logits, pass);
  const Index experts = routing.experts();
  const Index most = config_.most > 0 ? config_.most : experts;
  const auto choose = [&](Index t, Index* chosen) {
    T* p = routing.probabilities.row(t).data();
    softmax_row<T>(row_span(routing.logits, t), span_of(p, experts));
    top_k<T>(span_of(p, experts), span_of(chosen, experts));
    T sum = p[chosen[0]];
    Index n = 1;
    for (; n < most && sum < static_cast<T>(config_.threshold) && p[chosen[n]] > T(0); ++n) {
      sum += p[chosen[n]];
    }
    return n;
  };
  assign_chosen(routing, experts, 32 * experts, cache, choose);
  routing.rows.for_each_real(experts, [&](Index t) {
    for (Index a = routing.first(t); a < routing.last(t); ++a) {
      routing.weight[a] = routing.probabilities(t, routing.expert[a]);
    }
  });
}

template <std::floating_point T>
void TopP<T>::backward(const Routing<T>& routing, RoutingGradient<T>& gradient,
                       Cache& /*cache*/) const {
  const Index experts = routing.experts();
  routing.rows.for_each_real(8 * experts, [&](Index t) {
    T* dp = gradient.probabilities.row(t).data();
    for (Index a = routing.first(t); a < routing.last(t); ++a) {
      dp[routing.expert[a]] += gradient.weights[a];
    }
    add_softmax_backward_row<T>(row_span(routing.probabilities, t), span_of(dp, experts),
                                row_span(gradient.logits, t));
  });
}

}  // namespace weir

#ifdef WEIR_COMPILED
extern template class weir::TopP<float>;
extern template class weir::TopP<double>;
#endif
