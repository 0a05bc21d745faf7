// SPDX-License-Identifier: MIT
/// \file
/// Routings together with what their selectors remember of them, and gradients through them.
#pragma once

#include <algorithm>
#include <cstdint>

#include <weir/core/pass.hpp>
#include <weir/core/types.hpp>
#include <weir/moe/routing.hpp>

#include "support/allocations.hpp"
#include "support/catch.hpp"
#include "support/gradient.hpp"
#include "support/matrices.hpp"
#include "support/routing.hpp"

namespace weir::test {

/// What a selector made of logits.
template <class S>
struct Selected {
  Routing<typename S::Scalar> routing;
  typename S::Cache cache;
};

template <class S>
Selected<S> select(const S& selector, MatrixIn<typename S::Scalar> logits,
                   const Pass& pass = kTraining) {
  Selected<S> selected;
  selector.forward(logits, pass, selected.routing, selected.cache);
  return selected;
}

/// A linear objective of a routing:
///
///     sum_a c_a weight_a + sum_te d_te probability_te
template <class T>
struct RoutingObjective {
  RowVector<T> c;  ///< [assignments]
  Matrix<T> d;     ///< [tokens, experts]

  /// Random coefficients.
  static RoutingObjective random(const Routing<T>& routing, std::uint64_t seed) {
    return {random_matrix<T>(1, routing.assignments(), seed),
            random_matrix<T>(routing.tokens(), routing.experts(), seed + 1)};
  }

  RoutingObjective of_weights() const { return {c, Matrix<T>::Zero(d.rows(), d.cols())}; }

  T value(const Routing<T>& routing) const {
    T sum = routing.probabilities.cwiseProduct(d).sum();
    for (Index a = 0; a < routing.assignments(); ++a) sum += c[a] * routing.weight[a];
    return sum;
  }

  /// What a selector's `backward` is given.
  RoutingGradient<T> gradient(const Routing<T>& routing) const {
    RoutingGradient<T> gradient;
    gradient.reset(routing);
    gradient.weights = c;
    gradient.probabilities = d;
    return gradient;
  }

  /// The gradient with respect to the logits.
  template <class S>
  Matrix<T> logit_gradient(const S& selector, Selected<S>& selected) const {
    RoutingGradient<T> of_routing = gradient(selected.routing);
    selector.backward(selected.routing, of_routing, selected.cache);
    return of_routing.logits;
  }
};

/// Compares the gradient with respect to the logits of random objectives with finite differences:
/// one of weights and probabilities, and one of the weights alone, which the probabilities could
/// drown. The latter is zero up to rounding where weights are constant.
template <class S>
void check_selector_gradient(const S& selector, Matrix<double> logits, const Pass& pass = kTraining,
                             double tolerance = 1e-7) {
  Selected<S> selected = select(selector, logits, pass);
  const auto both = RoutingObjective<double>::random(selected.routing, 4711);
  for (const RoutingObjective<double>& objective : {both, both.of_weights()}) {
    const Matrix<double> analytic = objective.logit_gradient(selector, selected);
    const Matrix<double> numeric = numeric_gradient(logits, [&] {
      const Routing<double> moved = route(selector, logits, pass);
      REQUIRE(moved.expert == selected.routing.expert);  // Else the logits are close to a tie.
      return objective.value(moved);
    });
    CHECK((analytic - numeric).norm() <= tolerance * std::max(numeric.norm(), 1e-2));
  }
}

/// How many blocks of memory a training step asks for that is not the first one.
template <class S>
long count_step_allocations(const S& selector, MatrixIn<typename S::Scalar> logits,
                            const Pass& pass = kTraining) {
  Selected<S> selected;
  RoutingGradient<typename S::Scalar> gradient;
  const auto step = [&] {
    selector.forward(logits, pass, selected.routing, selected.cache);
    gradient.reset(selected.routing);
    selector.backward(selected.routing, gradient, selected.cache);
  };
  step();
  return count_allocations(step);
}

}  // namespace weir::test
