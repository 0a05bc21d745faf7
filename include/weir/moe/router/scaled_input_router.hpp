// SPDX-License-Identifier: MIT
/// \file
/// Routers that see a token times random factors in training: the frame of input jitter and input
/// dropout.
#pragma once

#include <cstdint>
#include <utility>

#include <weir/core/error.hpp>
#include <weir/core/layer.hpp>
#include <weir/core/parallel.hpp>
#include <weir/core/random.hpp>
#include <weir/core/types.hpp>
#include <weir/moe/concepts.hpp>
#include <weir/moe/router/group_count.hpp>
#include <weir/ops/rows.hpp>

namespace weir {

/// In training, the inner router sees x * factor, one draw of `Factor` per element, and the experts
/// see x. Otherwise it is the inner router. The draws do not depend on the number of threads.
///
///     Factor::kForward                 name of the function in messages
///     bool is_one() const              nothing has to be drawn
///     double operator()(double u)      the factor for u in [0, 1)
template <Layer Inner, class Factor>
class ScaledInputRouter {
 public:
  using Scalar = typename Inner::Scalar;
  using T = Scalar;

  struct Cache {
    typename Inner::Cache inner;
    Matrix<T> factor;
    Matrix<T> x, dx;
    Matrix<T> logits;     ///< Where the inner router returns its own by value.
    bool scaled = false;  ///< The last pass drew factors.
  };

  ScaledInputRouter(Inner inner, Factor factor)
      : inner_(std::move(inner)), factor_(std::move(factor)) {}

  Matrix<T> forward(MatrixIn<T> x) const { return inner_.forward(x); }

  const Matrix<T>& forward(MatrixIn<T> x, Cache& cache) const { return forward(x, {}, cache); }

  /// \throws ConfigError  if pass.training without a pass.rng.
  const Matrix<T>& forward(MatrixIn<T> x, const Pass& pass, Cache& cache) const {
    cache.scaled = false;
    if (!pass.training || factor_.is_one()) {
      return keep(cache.logits, apply(inner_, x, pass, cache.inner));
    }
    expect_columns(Factor::kForward, "x", x, d_model());
    if (pass.rng == nullptr) {
      fail<ConfigError>(Factor::kForward, ": pass.rng = null, expected a generator in training");
    }
    const Rng draws = pass.rng->split();
    cache.factor.resize(x.rows(), x.cols());
    cache.x.resize(x.rows(), x.cols());
    parallel_rows(x.rows(), 16 * x.cols(), [&](Index begin, Index end) {
      for (Index t = begin; t < end; ++t) {
        for (Index i = 0; i < x.cols(); ++i) {
          const double u = unit_interval(draws.at(static_cast<std::uint64_t>(t * x.cols() + i)));
          cache.factor(t, i) = static_cast<T>(factor_(u));
          cache.x(t, i) = x(t, i) * cache.factor(t, i);
        }
      }
    });
    cache.scaled = true;
    return keep(cache.logits, apply(inner_, cache.x, pass, cache.inner));
  }

  const Matrix<T>& backward(MatrixIn<T> d_logits, Cache& cache) {
    const Matrix<T>& dx = keep(cache.dx, inner_.backward(d_logits, cache.inner));
    if (!cache.scaled) return dx;
    multiply_rows<T>(dx, cache.factor, cache.dx);
    return cache.dx;
  }

  void annotate(const Cache& cache, Routing<T>& routing) const requires AnnotatingRouter<Inner> {
    inner_.annotate(cache.inner, routing);
  }
  void receive(const RoutingGradient<T>& gradient,
               Cache& cache) const requires AnnotatingRouter<Inner> {
    inner_.receive(gradient, cache.inner);
  }

  /// The members of the inner router, under its own names.
  template <class Self, class Visit>
  static void visit(Self& self, Visit& visit) {
    Inner::visit(self.inner_, visit);
  }

  Index d_model() const { return inner_.d_model(); }
  Index experts() const { return inner_.experts(); }
  Index groups() const requires GroupedRouter<Inner> { return inner_.groups(); }

 private:
  Inner inner_;
  Factor factor_;
};

}  // namespace weir
