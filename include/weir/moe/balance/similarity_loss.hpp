// SPDX-License-Identifier: MIT
/// \file
/// Router similarity loss of Race-DiT (Yuan et al. 2025, arXiv:2503.16057, eq. 9-11).
#pragma once

#include <concepts>
#include <string_view>

#include <weir/core/error.hpp>
#include <weir/kernels/matmul.hpp>
#include <weir/moe/concepts.hpp>
#include <weir/moe/routing.hpp>
#include <weir/ops/rows.hpp>
#include <weir/ops/vector_loops.hpp>

namespace weir {

/// Settings of SimilarityLoss.
struct SimilarityLossConfig {
  double coefficient = 1e-4;
};

/// Rewards a router for giving the same experts, and the same pairs of experts, to few tokens:
///
///     loss = coefficient / T * sum_ij W_ij (P^T P)_ij,    M' = M^T M
///     W_ii = experts * M'_ii / sum_l M'_ll
///     W_ij = (experts^2 - experts) * M'_ij / sum_{l != m} M'_lm,    i != j
///
/// P [T, experts] are the probabilities of the T real tokens, M_te is 1 where token t was assigned
/// to expert e, dropped or not, else 0. (P^T P)_ij says how alike the experts i and j are to the
/// router, W_ij how often they were chosen, for i != j together. Where no token has two experts,
/// W_ij = 0 for i != j. W is constant to the derivative,
///
///     dloss/dP = 2 * coefficient / T * P W
///
/// With uniform probabilities the loss is the coefficient at any load, also at uniform load, and
/// coefficient / experts where no token has two experts. `experts` are those that the pass allows
/// to some token. Without assignments it is zero. As W is one of the whole batch, the loss of a
/// batch is not the mean of those of its parts.
template <std::floating_point T>
class SimilarityLoss : public BalancerBase {
 public:
  static constexpr std::string_view kName = "similarity";
  struct Cache {
    Matrix<T> w;   ///< W
    Matrix<T> pw;  ///< P W, with rows for padding.
  };

  explicit SimilarityLoss(SimilarityLossConfig config = {}) : config_(config) { check(); }

  /// \throws ConfigError  if the coefficient is negative.
  void check() const { expect_at_least("SimilarityLoss", "coefficient", config_.coefficient, 0.0); }

  /// \return         The loss, already scaled by `coefficient`.
  double forward(const Routing<T>& routing, Cache& cache) const;

  /// Adds `scale` times d(loss)/d(probabilities).
  void backward(const Routing<T>& routing, double scale, RoutingGradient<T>& gradient,
                Cache& cache) const;

  const SimilarityLossConfig& config() const { return config_; }

 private:
  double factor(const Routing<T>& routing) const {
    return config_.coefficient / static_cast<double>(routing.rows.real());
  }

  static void set_similarity(const Routing<T>& routing, Matrix<T>& w);

  SimilarityLossConfig config_;
};

template <std::floating_point T>
double SimilarityLoss<T>::forward(const Routing<T>& routing, Cache& cache) const {
  if (routing.assignments() == 0) return 0.0;
  set_similarity(routing, cache.w);
  set_shape(cache.pw, routing.tokens(), routing.experts());
  multiply_nn<T>(routing.probabilities, cache.w, cache.pw);
  const T sum = loops::dot<T>(cache.pw.size(), routing.probabilities.data(), cache.pw.data());
  return factor(routing) * static_cast<double>(sum);
}

template <std::floating_point T>
void SimilarityLoss<T>::backward(const Routing<T>& routing, double scale,
                                 RoutingGradient<T>& gradient, Cache& cache) const {
  if (routing.assignments() == 0) return;
  const Matrix<T>& pw = cache.pw;
  const auto twice = static_cast<T>(2.0 * scale * factor(routing));
  parallel_pieces(pw.rows(), pw.cols(), 1, [&](Index t, Index col, Index count) {
    loops::add_scaled<T>(count, twice, &pw(t, col), &gradient.probabilities(t, col));
  });
}

template <std::floating_point T>
void SimilarityLoss<T>::set_similarity(const Routing<T>& routing, Matrix<T>& w) {
  const Index experts = routing.experts();
  set_zero(w, experts, experts);
  for (Index t = 0; t < routing.tokens(); ++t) {
    for (const Index i : routing.experts_of(t)) {
      for (const Index j : routing.experts_of(t)) w(i, j) += T(1);
    }
  }
  const T alone = w.trace();
  const T together = w.sum() - alone;
  const auto n = static_cast<T>(routing.open_experts());
  const T of_one = n / alone;
  const T of_two = together > T(0) ? (n * n - n) / together : T(0);
  for (Index i = 0; i < experts; ++i) {
    for (Index j = 0; j < experts; ++j) w(i, j) *= i == j ? of_one : of_two;
  }
}

}  // namespace weir

#ifdef WEIR_COMPILED
extern template class weir::SimilarityLoss<float>;
extern template class weir::SimilarityLoss<double>;
#endif
