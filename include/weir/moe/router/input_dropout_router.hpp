// SPDX-License-Identifier: MIT
/// \file
/// Input dropout: any router, fed in training with a token some features of which are missing.
#pragma once

#include <cstdint>
#include <utility>

#include <weir/core/error.hpp>
#include <weir/core/layer.hpp>
#include <weir/core/parallel.hpp>
#include <weir/core/random.hpp>
#include <weir/core/types.hpp>
#include <weir/moe/concepts.hpp>
#include <weir/ops/lanes.hpp>

namespace weir {

/// In training, the router sees
///
///     x_r = x * m,    m = 0 with probability `rate`, else 1 / (1 - rate); one draw per element
///
/// and the experts see x. Otherwise it is the inner router. The policy "input_dropout" of Mesh
/// TensorFlow's mixture of experts (Shazeer et al. 2018, arXiv:1811.02084; one of those that Fedus
/// et al. 2021, arXiv:2101.03961, appendix C, compare). Needs `pass.rng` in training; the draws do
/// not depend on the number of threads.
template <Layer Inner>
class InputDropoutRouter {
 public:
  using Scalar = typename Inner::Scalar;
  using T = Scalar;

  struct Cache {
    typename Inner::Cache inner;
    Matrix<T> factor;  ///< m
    Matrix<T> x, dx;
    Matrix<T> logits;      ///< Where the inner router returns its own by value.
    bool dropped = false;  ///< The last pass drew m.
  };

  /// \throws ConfigError  unless 0 <= rate < 1.
  explicit InputDropoutRouter(Inner inner, double rate = 0.1)
      : inner_(std::move(inner)), rate_(rate) {
    if (!(rate >= 0.0 && rate < 1.0)) {
      fail<ConfigError>("InputDropoutRouter: rate = ", rate, ", expected 0 <= rate < 1");
    }
  }

  Matrix<T> forward(MatrixIn<T> x) const { return inner_.forward(x); }

  const Matrix<T>& forward(MatrixIn<T> x, Cache& cache) const { return forward(x, {}, cache); }

  /// \throws ConfigError  if pass.training without a pass.rng.
  const Matrix<T>& forward(MatrixIn<T> x, const Pass& pass, Cache& cache) const {
    cache.dropped = false;
    if (!pass.training || rate_ == 0.0) {
      return keep(cache.logits, apply(inner_, x, pass, cache.inner));
    }
    expect_columns("InputDropoutRouter::forward", "x", x, d_model());
    if (pass.rng == nullptr) {
      fail<ConfigError>(
          "InputDropoutRouter::forward: pass.rng = null, expected a generator in training");
    }
    const Rng draws = pass.rng->split();
    const T kept = static_cast<T>(1.0 / (1.0 - rate_));
    cache.factor.resize(x.rows(), x.cols());
    cache.x.resize(x.rows(), x.cols());
    parallel_rows(x.rows(), 16 * x.cols(), [&](Index begin, Index end) {
      for (Index t = begin; t < end; ++t) {
        for (Index i = 0; i < x.cols(); ++i) {
          const double u = unit_interval(draws.at(static_cast<std::uint64_t>(t * x.cols() + i)));
          cache.factor(t, i) = u < rate_ ? T(0) : kept;
          cache.x(t, i) = x(t, i) * cache.factor(t, i);
        }
      }
    });
    cache.dropped = true;
    return keep(cache.logits, apply(inner_, cache.x, pass, cache.inner));
  }

  const Matrix<T>& backward(MatrixIn<T> d_logits, Cache& cache) {
    const Matrix<T>& dx = keep(cache.dx, inner_.backward(d_logits, cache.inner));
    if (!cache.dropped) return dx;
    cache.dx.resize(dx.rows(), dx.cols());
    parallel_pieces(dx.rows(), dx.cols(), 1, [&](Index t, Index col, Index count) {
      const auto product = [](const Lanes<T>& a, const Lanes<T>& b) -> Lanes<T> { return a * b; };
      map_lanes<T>(count, product, &cache.dx(t, col), &dx(t, col), &cache.factor(t, col));
    });
    return cache.dx;
  }

  void annotate(const Cache& cache, Routing<T>& routing) const requires AnnotatingRouter<Inner> {
    inner_.annotate(cache.inner, routing);
  }
  void receive(const RoutingGradient<T>& gradient,
               Cache& cache) const requires AnnotatingRouter<Inner> {
    inner_.receive(gradient, cache.inner);
  }

  template <class Self, class Visit>
  static void visit(Self& self, Visit& visit) {
    Inner::visit(self.inner_, visit);
  }

  Index d_model() const { return inner_.d_model(); }
  Index experts() const { return inner_.experts(); }

 private:
  Inner inner_;
  double rate_;
};

}  // namespace weir
