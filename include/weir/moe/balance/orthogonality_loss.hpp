// SPDX-License-Identifier: MIT
/// \file
/// Orthogonality loss of a router's vectors (PaddleNLP, `_cal_orthogonal_loss` of its MoE gate;
/// ERNIE 4.5).
#pragma once

#include <concepts>
#include <string_view>

#include <Eigen/Core>

#include <weir/core/error.hpp>
#include <weir/core/thread_space.hpp>
#include <weir/core/types.hpp>
#include <weir/kernels/matmul.hpp>
#include <weir/moe/router/expert_vectors.hpp>
#include <weir/ops/unit_rows.hpp>
#include <weir/ops/vector_loops.hpp>

namespace weir {

/// Rewards a router for telling its experts apart by vectors at right angles:
///
///     G = V V^T - I,    v_e = w_e / |w_e|,    loss = coefficient / experts^2 * sum_ij G_ij^2
///     dloss/dV = 4 * coefficient / experts^2 * G V
///
/// w_e is the router's vector of expert e (see `expert_vectors`), V [experts, n] has the v_e as its
/// rows. With groups, there is one G for each of them, of `experts / groups` neighbours, and the
/// loss is coefficient times the mean of the squares of all their elements: vectors of different
/// groups may be alike. The angles alone count, not the lengths. No more than n vectors can be at
/// right angles; in general the least loss is coefficient * max(0, 1/n - groups/experts).
///
/// A vector of norm below 1e-12 counts as zero: its own element of G is -1, the others are 0, and
/// it has no gradient. With one expert (to a group), whose vector is not zero, the loss is zero.
///
/// The loss looks at parameters, not at tokens: it is the same at uniform load as at any other, and
/// without tokens. (PaddleNLP, paddlenlp/transformers/moe_gate.py; the groups as
/// in ERNIE's top2_gate.py.)
template <std::floating_point T>
struct OrthogonalityLoss {
  static constexpr std::string_view kName = "orthogonality";

  T coefficient = T(0.01);
  Index groups = 1;  ///< Of neighbouring experts; 1: all together.

  /// \throws ConfigError  if the coefficient is negative or groups below 1.
  void check() const {
    expect_at_least("OrthogonalityLoss", "coefficient", coefficient, T(0));
    expect_at_least<Index>("OrthogonalityLoss", "groups", groups, 1);
  }

  /// \throws ConfigError  as `check`; if the router has no vectors of its experts, or unless
  ///                      `groups` divides the experts.
  template <class R>
  void check_router(const R& router) const {
    check();
    if (expert_vectors(router) == nullptr) {
      fail<ConfigError>(
          "OrthogonalityLoss: the router has no vectors of its experts, expected a parameter "
          "'weight' or 'embedding' of ",
          router.experts(), " rows");
    }
    if (router.experts() % groups != 0) {
      fail<ConfigError>("OrthogonalityLoss: groups = ", groups,
                        ", expected a divisor of experts = ", router.experts());
    }
  }

  /// \return         The loss, already scaled by `coefficient`.
  /// \throws ConfigError  as `check_router`.
  template <class R>
  requires std::same_as<typename R::Scalar, T> T router_loss(const R& router)
  const {
    check_router(router);
    const Matrix<T>& w = expert_vectors(router)->value;
    const Space space(w.rows(), w.cols(), groups);
    T sum = T(0);
    space.for_each_group(w, [&](Index, Map, Map gram) {
      sum += loops::sum_of_squares<T>(gram.size(), gram.data());
    });
    return factor(w.rows()) * sum;
  }

  /// Adds `scale` times d(loss)/d(vectors) to their gradient.
  /// \throws ConfigError  as `check_router`.
  template <class R>
  requires std::same_as<typename R::Scalar, T>
  void add_router_gradient(R& router, T scale) const {
    check_router(router);
    Parameter<T>& vectors = *expert_vectors(router);
    const Matrix<T>& w = vectors.value;
    const Space space(w.rows(), w.cols(), groups);
    space.for_each_group(w, [&](Index first, Map unit, Map gram) {
      multiply_nn<T>(gram, unit, space.d_unit(first, unit.rows()));
    });
    Map d = space.d_unit(0, w.rows());
    d *= T(4) * scale * factor(w.rows());
    unit_rows_backward<T>(space.unit(0, w.rows()), space.norm, d);
    vectors.gradient() += d;
  }

 private:
  using Map = Eigen::Map<Matrix<T>>;

  T factor(Index experts) const {
    return coefficient * static_cast<T>(groups) / static_cast<T>(experts * experts);
  }

  /// This thread's workspace.
  struct Space {
    Space(Index experts, Index d, Index groups) : cols(d), size(experts / groups) {
      auto& space = ThreadSpace<T, OrthogonalityLoss>::of_this_thread();
      space.reserve(2 * experts * d + size * size + experts);
      units = space.take(experts * d);
      d_units = space.take(experts * d);
      gram = space.take(size * size);
      norm = space.take(experts);
    }

    Map unit(Index first, Index rows) const { return Map(units + first * cols, rows, cols); }
    Map d_unit(Index first, Index rows) const { return Map(d_units + first * cols, rows, cols); }

    /// Makes the unit vectors, then calls `body(first, V, G)` for each group, `first` being its
    /// first expert.
    template <class Body>
    void for_each_group(const Matrix<T>& w, Body&& body) const {
      unit_rows<T>(w, unit(0, w.rows()), norm);
      Map g(gram, size, size);
      for (Index first = 0; first < w.rows(); first += size) {
        multiply_nt<T>(unit(first, size), unit(first, size), g);
        g.diagonal().array() -= T(1);
        body(first, unit(first, size), g);
      }
    }

    Index cols, size;
    T *units, *d_units, *gram, *norm;
  };
};

}  // namespace weir
