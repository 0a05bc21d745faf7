// SPDX-License-Identifier: MIT
/// \file
/// Router similarity loss of Race-DiT (Yuan et al. 2025, arXiv:2503.16057, eq. 9-11).
#pragma once

#include <concepts>
#include <string_view>

#include <Eigen/Core>

#include <weir/core/thread_space.hpp>
#include <weir/kernels/matmul.hpp>
#include <weir/moe/routing.hpp>
#include <weir/ops/rows.hpp>
#include <weir/ops/vector_loops.hpp>

namespace weir {

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
/// coefficient / experts where no token has two experts. Without assignments it is zero. As W is
/// one of the whole batch, the loss of a batch is not the mean of those of its parts.
template <std::floating_point T>
struct SimilarityLoss {
  static constexpr std::string_view kName = "similarity";

  T coefficient = T(1e-4);

  /// \throws ConfigError  if the coefficient is negative.
  void check() const { expect_at_least("SimilarityLoss", "coefficient", coefficient, T(0)); }

  /// \return         The loss, already scaled by `coefficient`.
  T loss(const Routing<T>& routing) const {
    if (routing.assignments() == 0) return T(0);
    const Map pw = product(routing);
    return factor(routing) * loops::dot<T>(pw.size(), routing.probabilities.data(), pw.data());
  }

  /// Adds d(loss)/d(probabilities).
  void add_gradient(const Routing<T>& routing, RoutingGradient<T>& gradient) const {
    if (routing.assignments() == 0) return;
    const Map pw = product(routing);
    const T twice = T(2) * factor(routing);
    parallel_pieces(pw.rows(), pw.cols(), 1, [&](Index t, Index col, Index count) {
      loops::add_scaled<T>(count, twice, &pw(t, col), &gradient.probabilities(t, col));
    });
  }

 private:
  using Map = Eigen::Map<Matrix<T>>;

  T factor(const Routing<T>& routing) const {
    return coefficient / static_cast<T>(routing.real_tokens());
  }

  /// P W, in this thread's workspace.
  static Map product(const Routing<T>& routing) {
    const Index experts = routing.experts();
    auto& space = ThreadSpace<T, SimilarityLoss>::of_this_thread();
    space.reserve(experts * experts + routing.tokens() * experts);
    Map w(space.take_zeros(experts * experts), experts, experts);
    Map pw(space.take(routing.tokens() * experts), routing.tokens(), experts);
    for (Index t = 0; t < routing.tokens(); ++t) {
      for (Index a = routing.first(t); a < routing.last(t); ++a) {
        for (Index b = routing.first(t); b < routing.last(t); ++b)
          w(e(routing, a), e(routing, b)) += T(1);
      }
    }
    const T alone = w.trace();
    const T together = w.sum() - alone;
    const auto n = static_cast<T>(experts);
    const T of_one = n / alone;
    const T of_two = together > T(0) ? (n * n - n) / together : T(0);
    for (Index i = 0; i < experts; ++i) {
      for (Index j = 0; j < experts; ++j) w(i, j) *= i == j ? of_one : of_two;
    }
    multiply_nn<T>(routing.probabilities, w, pw);
    return pw;
  }

  static Index e(const Routing<T>& routing, Index assignment) {
    return routing.expert[static_cast<std::size_t>(assignment)];
  }
};

}  // namespace weir
