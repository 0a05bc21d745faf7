// SPDX-License-Identifier: MIT
/// \file
/// Input jitter: any router, fed with a slightly perturbed token during training.
#pragma once

#include <cstdint>
#include <utility>

#include <weir/core/layer.hpp>
#include <weir/core/parallel.hpp>
#include <weir/moe/concepts.hpp>
#include <weir/ops/lanes.hpp>

namespace weir {

/// In training, the router sees
///
///     x_r = x * u,    u ~ U[1 - epsilon, 1 + epsilon], one draw per element
///
/// and the experts see x. Otherwise it is the inner router. (Fedus et al. 2021, arXiv:2101.03961,
/// section 2.4, epsilon = 0.01.) Needs `pass.rng` in training; the draws do not depend on the
/// number of threads.
template <Layer Inner>
class JitterRouter {
 public:
  using Scalar = typename Inner::Scalar;
  using T = Scalar;

  struct Cache {
    typename Inner::Cache inner;
    Matrix<T> jitter;  ///< u; empty if the last pass drew none.
    Matrix<T> x, dx;
    Matrix<T> logits;  ///< Where the inner router returns its own by value.
  };

  /// \throws ConfigError  unless 0 <= epsilon < 1.
  explicit JitterRouter(Inner inner, double epsilon = 0.01)
      : inner_(std::move(inner)), epsilon_(epsilon) {
    if (!(epsilon >= 0.0 && epsilon < 1.0)) {
      fail<ConfigError>("JitterRouter: epsilon = ", epsilon, ", expected 0 <= epsilon < 1");
    }
  }

  Matrix<T> forward(MatrixIn<T> x) const { return inner_.forward(x); }

  const Matrix<T>& forward(MatrixIn<T> x, Cache& cache) const { return forward(x, {}, cache); }

  /// \throws ConfigError  if pass.training without a pass.rng.
  const Matrix<T>& forward(MatrixIn<T> x, const Pass& pass, Cache& cache) const {
    if (!pass.training || epsilon_ == 0.0) {
      cache.jitter.resize(0, 0);
      return keep(cache.logits, apply(inner_, x, pass, cache.inner));
    }
    expect_columns("JitterRouter::forward", "x", x, d_model());
    if (pass.rng == nullptr) {
      fail<ConfigError>("JitterRouter::forward: pass.rng = null, expected a generator in training");
    }
    const Rng draws = pass.rng->split();
    cache.jitter.resize(x.rows(), x.cols());
    cache.x.resize(x.rows(), x.cols());
    parallel_rows(x.rows(), 16 * x.cols(), [&](Index begin, Index end) {
      for (Index t = begin; t < end; ++t) {
        for (Index i = 0; i < x.cols(); ++i) {
          const double u = unit_interval(draws.at(static_cast<std::uint64_t>(t * x.cols() + i)));
          cache.jitter(t, i) = static_cast<T>(1.0 + epsilon_ * (2.0 * u - 1.0));
          cache.x(t, i) = x(t, i) * cache.jitter(t, i);
        }
      }
    });
    return keep(cache.logits, apply(inner_, cache.x, pass, cache.inner));
  }

  const Matrix<T>& backward(MatrixIn<T> d_logits, Cache& cache) {
    const Matrix<T>& dx = keep(cache.dx, inner_.backward(d_logits, cache.inner));
    if (cache.jitter.size() == 0) return dx;
    cache.dx.resize(dx.rows(), dx.cols());
    parallel_pieces(dx.rows(), dx.cols(), 1, [&](Index t, Index col, Index count) {
      const auto product = [](const Lanes<T>& a, const Lanes<T>& b) -> Lanes<T> { return a * b; };
      map_lanes<T>(count, product, &cache.dx(t, col), &dx(t, col), &cache.jitter(t, col));
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
  double epsilon_;
};

}  // namespace weir
