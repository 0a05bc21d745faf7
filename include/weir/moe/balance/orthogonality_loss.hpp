// SPDX-License-Identifier: MIT
/// \file
/// Orthogonality loss of a router's vectors (PaddleNLP, `_cal_orthogonal_loss` of its MoE gate;
/// ERNIE 4.5).
#pragma once

#include <concepts>
#include <string_view>

#include <weir/core/error.hpp>
#include <weir/core/parameter.hpp>
#include <weir/core/types.hpp>
#include <weir/kernels/matmul.hpp>
#include <weir/moe/concepts.hpp>
#include <weir/ops/unit_rows.hpp>
#include <weir/ops/vector_loops.hpp>

namespace weir {

/// Settings of OrthogonalityLoss.
struct OrthogonalityLossConfig {
  double coefficient = 0.01;
  Index groups = 1;  ///< How many groups of neighbouring experts there are; 1: all together.
};

/// Rewards a router for telling its experts apart by vectors at right angles:
///
///     G = V V^T - I,    v_e = w_e / |w_e|,    loss = coefficient / experts^2 * sum_ij G_ij^2
///     dloss/dV = 4 * coefficient / experts^2 * G V
///
/// w_e is the router's vector of expert e (`expert_vectors` of the router), V [experts, n] has the
/// v_e as its rows. With groups, there is one G for each of them, of `experts / groups` neighbours,
/// and the loss is coefficient times the mean of the squares of all their elements: vectors of
/// different groups may be alike. The angles alone count, not the lengths. No more than n vectors
/// can be at right angles; in general the least loss is coefficient * max(0, 1/n - groups/experts).
///
/// A zero vector has no direction: its own element of G is -1, the others are 0, and it has no
/// gradient. With one expert (to a group), whose vector is not zero, the loss is zero.
///
/// The loss looks at parameters, not at tokens: it is the same at uniform load as at any other, and
/// without tokens. Experts that a pass switches off are counted as the others, unlike in losses of
/// tokens: their vectors are still there, and have to be at right angles when they are on again.
/// (PaddleNLP, paddlenlp/transformers/moe_gate.py; the groups as in ERNIE's top2_gate.py.)
template <std::floating_point T>
class OrthogonalityLoss : public BalancerBase {
 public:
  static constexpr std::string_view kName = "orthogonality";

  struct Cache {
    Matrix<T> unit;      ///< V
    RowVector<T> norm;   ///< |w_e|; zero where the vector counts as zero.
    Matrix<T> products;  ///< [experts, experts / groups], the G of all groups one above the other.
    Matrix<T> d_unit;
  };

  explicit OrthogonalityLoss(OrthogonalityLossConfig config = {}) : config_(config) { check(); }

  /// \throws ConfigError  if the coefficient is negative or groups below 1.
  void check() const {
    expect_at_least("OrthogonalityLoss", "coefficient", config_.coefficient, 0.0);
    expect_at_least<Index>("OrthogonalityLoss", "groups", config_.groups, 1);
  }

  /// \throws ConfigError  if the router has no vectors of its experts, or unless `groups` divides
  ///                      the experts.
  template <class R>
  void check_router(const R& router) const {
    if (router.expert_vectors() == nullptr) {
      throw_error<ConfigError>(
          "OrthogonalityLoss: the router has no vectors of its experts, expected one such as "
          "LinearRouter");
    }
    if (router.experts() % config_.groups != 0) {
      throw_error<ConfigError>("OrthogonalityLoss: groups = ", config_.groups,
                               ", expected a divisor of experts = ", router.experts());
    }
  }

  /// \return         The loss, already scaled by `coefficient`.
  /// \throws ConfigError  as `check_router`.
  template <class R>
  requires std::same_as<typename R::Scalar, T>
  double forward(const R& router, Cache& cache) const {
    check_router(router);
    const Matrix<T>& w = router.expert_vectors()->value;
    const Index size = w.rows() / config_.groups;
    set_shape(cache.unit, w.rows(), w.cols());
    set_shape(cache.norm, w.rows());
    set_shape(cache.products, w.rows(), size);
    unit_rows<T>(w, cache.unit, cache.norm.data());
    for (Index first = 0; first < w.rows(); first += size) {
      const auto unit = cache.unit.middleRows(first, size);
      auto products = cache.products.middleRows(first, size);
      multiply_nt<T>(unit, unit, products);
      products.diagonal().array() -= T(1);
    }
    const T sum = loops::sum_of_squares<T>(cache.products.size(), cache.products.data());
    return factor(w.rows()) * static_cast<double>(sum);
  }

  /// Adds `scale` times d(loss)/d(vectors) to their gradient.
  template <class R>
  requires std::same_as<typename R::Scalar, T>
  void backward(R& router, double scale, Cache& cache) const {
    const Index experts = cache.products.rows();
    const Index size = cache.products.cols();
    set_shape(cache.d_unit, experts, cache.unit.cols());
    for (Index first = 0; first < experts; first += size) {
      multiply_nn<T>(cache.products.middleRows(first, size), cache.unit.middleRows(first, size),
                     cache.d_unit.middleRows(first, size));
    }
    cache.d_unit *= static_cast<T>(4.0 * scale * factor(experts));
    unit_rows_backward<T>(cache.unit, cache.norm.data(), cache.d_unit);
    router.expert_vectors()->gradient() += cache.d_unit;
  }

  const OrthogonalityLossConfig& config() const { return config_; }

 private:
  double factor(Index experts) const {
    return config_.coefficient * static_cast<double>(config_.groups) /
           static_cast<double>(experts * experts);
  }

  OrthogonalityLossConfig config_;
};

}  // namespace weir
