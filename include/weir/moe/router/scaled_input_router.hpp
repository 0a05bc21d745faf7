// SPDX-License-Identifier: MIT
/// \file
/// Routers that see a token times random factors in training: the frame of input jitter and input
/// dropout.
#pragma once

#include <cstdint>
#include <utility>

#include <weir/core/error.hpp>
#include <weir/core/pass.hpp>
#include <weir/core/random.hpp>
#include <weir/core/types.hpp>
#include <weir/moe/concepts.hpp>
#include <weir/moe/router/noise.hpp>
#include <weir/moe/router/router_wrapper.hpp>
#include <weir/ops/rows.hpp>

namespace weir {

/// In training, the inner router sees x * factor, one draw of `Factor` per element, and the experts
/// see x. Otherwise it is the inner router. The draws do not depend on the number of threads.
///
///     Factor::kForward                 names of functions in messages
///     Factor::kBackward
///     config                           the settings
///     bool is_one() const              nothing has to be drawn
///     double operator()(double u)      the factor for u in [0, 1)
template <Router Inner, class Factor>
class ScaledInputRouter : public RouterWrapper<Inner> {
 public:
  using T = typename Inner::Scalar;

  struct Cache : RouterWrapper<Inner>::Cache {
    Matrix<T> factor;
    Matrix<T> x, dx;
    bool scaled = false;  ///< The last pass drew factors.
  };

  ScaledInputRouter(Inner inner, Factor factor)
      : RouterWrapper<Inner>(std::move(inner)), factor_(std::move(factor)) {}

  /// \param x        [tokens, d_model]
  /// \return         [tokens, experts]
  /// \throws ShapeError   if x does not have d_model columns.
  /// \throws ConfigError  if pass.training without a pass.rng.
  const Matrix<T>& forward(MatrixIn<T> x, const Pass& pass, Cache& cache) const {
    cache.state.begin();
    expect_columns(Factor::kForward, "x", x, this->d_model());
    cache.scaled = pass.training && !factor_.is_one();
    if (!cache.scaled) {
      return cache.state.finish(*this, pass, this->inner_.forward(x, pass, cache.inner));
    }
    const Rng draws = pass.generator(Factor::kForward).split();
    set_shape(cache.factor, x.rows(), x.cols());
    fill_elements<T>(cache.factor,
                     [&](std::uint64_t n) { return factor_(unit_interval(draws.at(n))); });
    multiply_rows<T>(x, cache.factor, cache.x);
    return cache.state.finish(*this, pass, this->inner_.forward(cache.x, pass, cache.inner));
  }

  /// \param d_logits  [tokens, experts], of the last forward pass.
  /// \throws StateError   if the cache does not fit, see CacheState.
  /// \throws ShapeError   if d_logits does not have the shape of the logits.
  const Matrix<T>& backward(MatrixIn<T> d_logits, Cache& cache) {
    cache.state.begin_backward(Factor::kBackward, *this, d_logits);
    const Matrix<T>& dx = this->inner_.backward(d_logits, cache.inner);
    if (!cache.scaled) return dx;
    multiply_rows<T>(dx, cache.factor, cache.dx);
    return cache.dx;
  }

  const auto& config() const { return factor_.config; }

 private:
  Factor factor_;
};

}  // namespace weir
