// SPDX-License-Identifier: MIT
/// \file
/// Dropout (Srivastava et al. 2014).
#pragma once

#include <concepts>
#include <cstdint>
#include <span>
#include <string_view>
#include <utility>

#include <weir/core/cache_state.hpp>
#include <weir/core/decoding.hpp>
#include <weir/core/error.hpp>
#include <weir/core/layer.hpp>
#include <weir/core/parallel.hpp>
#include <weir/core/pass.hpp>
#include <weir/core/random.hpp>
#include <weir/core/scratch.hpp>
#include <weir/core/types.hpp>
#include <weir/ops/padding.hpp>
#include <weir/ops/rows.hpp>
#include <weir/ops/vector_loops.hpp>

namespace weir {

/// Draws `count` factors of dropout from a part of pass.rng that is split off for it, one draw per
/// factor in order: 0 with probability `rate`, else 1 / (1 - rate).
/// \throws ConfigError  without a pass.rng.
template <class T>
void draw_dropout(std::string_view who, double rate, const Pass& pass, Index count, T* factor) {
  constexpr Index kCost = 16;
  const Rng draws = pass.generator(who).split();
  const auto kept = static_cast<T>(1.0 / (1.0 - rate));
  parallel_rows(count, kCost, [&](Index begin, Index end) {
    for (Index i = begin; i < end; ++i) {
      factor[i] = unit_interval(draws.at(static_cast<std::uint64_t>(i))) < rate ? T(0) : kept;
    }
  });
}

/// Multiplies rows by the factors of dropout, if there are any: hidden numbers in the forward pass,
/// their gradient in the backward pass.
/// \param factor   Of the shape of `rows`, or empty.
template <class T>
void apply_dropout(const Scratch<T>& factor, MatrixOut<T> rows) {
  if (factor.rows() == 0) return;
  const auto factors = factor.view();
  parallel_pieces(rows.rows(), rows.cols(), 1, [&](Index t, Index col, Index count) {
    loops::multiply<T>(count, &rows(t, col), &factors.coeffRef(t, col), &rows(t, col));
  });
}

/// Dropout inside of a network: draws factors for the hidden numbers in training, and applies them.
/// Outside of training, or at a rate of 0, there are none.
/// \param factor   Becomes of the shape of `hidden`, or empty, for the backward pass.
/// \throws ConfigError  as `draw_dropout`.
template <class T>
void drop_hidden(std::string_view who, double rate, const Pass& pass, MatrixOut<T> hidden,
                 Scratch<T>& factor) {
  const bool drops = pass.training && rate > 0.0;
  auto factors = factor.reshape(drops ? hidden.rows() : 0, hidden.cols());
  if (drops) draw_dropout<T>(who, rate, pass, factors.size(), factors.data());
  apply_dropout<T>(factor, hidden);
}

/// Settings of `Dropout`.
struct DropoutConfig {
  double rate = 0.1;  ///< The probability with which a number becomes zero.
};

/// In training,
///
///     y = x * m,    m = 0 with probability `rate`, else 1 / (1 - rate); one draw per element
///
/// so that the expected value of y is x ("inverted"). Otherwise y = x. Needs `pass.rng` in
/// training, unless the rate is 0; the draws do not depend on the number of threads.
/// (Srivastava et al. 2014, JMLR 15.)
template <std::floating_point T>
class Dropout {
 public:
  using Scalar = T;

  struct Cache {
    CacheState state;
    PaddingRows padding;
    Matrix<T> factor;  ///< m, [tokens, d_model]; empty if the last pass dropped nothing.
    Matrix<T> y, dx;
  };

  /// \throws ConfigError  unless 0 <= rate < 1.
  explicit Dropout(DropoutConfig config = {}) : config_(config) {
    expect_fraction("Dropout", "rate", config_.rate);
  }

  /// \param x        [tokens, d_model]
  /// \return         [tokens, d_model]
  /// \throws ConfigError  in training, without a pass.rng.
  const Matrix<T>& forward(MatrixIn<T> x, const Pass& pass, Cache& cache) const;

  /// \param dy       [tokens, d_model], of the last forward pass.
  /// \return         dL/dx = dy * m, [tokens, d_model].
  /// \throws StateError   if the cache does not fit, see CacheState.
  /// \throws ShapeError   if dy does not have the shape of the result.
  const Matrix<T>& backward(MatrixIn<T> dy, Cache& cache);

  /// There is nothing to visit.
  template <class Self, class Visit>
  static void visit(Self& /*self*/, Visit& /*visit*/) {}

  const DropoutConfig& config() const { return config_; }

 private:
  /// to = from * m, with zeros in padding.
  static void apply(MatrixIn<T> from, const Cache& cache, Matrix<T>& to) {
    if (cache.factor.size() == 0) {
      copy_rows<T>(from, to);
    } else {
      multiply_rows<T>(from, cache.factor, to);
    }
    cache.padding.clear(to);
  }

  DropoutConfig config_;
};

template <std::floating_point T>
const Matrix<T>& Dropout<T>::forward(MatrixIn<T> x, const Pass& pass, Cache& cache) const {
  cache.state.begin();
  cache.padding.set("Dropout::forward", pass, x.rows());
  const bool drops = pass.training && config_.rate > 0.0;
  set_shape(cache.factor, drops ? x.rows() : 0, x.cols());
  if (drops) {
    draw_dropout<T>("Dropout::forward", config_.rate, pass, x.size(), cache.factor.data());
  }
  apply(x, cache, cache.y);
  return cache.state.finish(*this, pass, cache.y);
}

template <std::floating_point T>
const Matrix<T>& Dropout<T>::backward(MatrixIn<T> dy, Cache& cache) {
  cache.state.begin_backward("Dropout::backward", *this, dy);
  apply(dy, cache, cache.dx);
  return cache.dx;
}

namespace detail {

/// The state of a layer, if it has one.
template <class L>
struct HasStateOf {};
template <DecodingLayer L>
struct HasStateOf<L> {
  using State = typename L::State;
};

}  // namespace detail

/// A layer whose output goes through Dropout, as residual branches have it:
///
///     y = Dropout(Inner(x))
///
/// A DecodingLayer stays one. Parameters are those of the inner layer, under its own names.
template <Layer Inner>
class WithDropout : public detail::HasStateOf<Inner> {
 public:
  using Scalar = typename Inner::Scalar;
  using T = Scalar;

  struct Cache {
    CacheState state;
    typename Inner::Cache inner;
    typename Dropout<T>::Cache dropout;
  };

  /// \throws ConfigError  unless 0 <= rate < 1.
  explicit WithDropout(Inner inner, DropoutConfig config = {})
      : inner_(std::move(inner)), dropout_(config) {}

  /// \param x        What the inner layer takes.
  /// \throws ConfigError  in training, without a pass.rng.
  const Matrix<T>& forward(MatrixIn<T> x, const Pass& pass, Cache& cache) const {
    cache.state.begin();
    const Matrix<T>& y = inner_.forward(x, pass, cache.inner);
    return cache.state.finish(*this, pass, dropout_.forward(y, pass, cache.dropout));
  }

  /// \throws StateError   if the cache does not fit, see CacheState.
  /// \throws ShapeError   if dy does not have the shape of the result.
  const Matrix<T>& backward(MatrixIn<T> dy, Cache& cache) {
    cache.state.begin_backward("WithDropout::backward", *this, dy);
    return inner_.backward(dropout_.backward(dy, cache.dropout), cache.inner);
  }

  /// The inner layer's own `decode`; nothing is dropped.
  template <DecodingLayer L = Inner>
  const Matrix<T>& decode(MatrixIn<T> x, const Pass& pass,
                          std::span<typename L::State* const> states, Cache& cache) const {
    cache.state.begin();
    return inner_.decode(x, pass, states, cache.inner);
  }

  template <class Self, class Visit>
  static void visit(Self& self, Visit& visit) {
    visit("", self.inner_);
  }

  Index experts() const requires requires(const Inner& inner) { inner.experts(); }
  { return inner_.experts(); }

  Inner& inner() { return inner_; }
  const Inner& inner() const { return inner_; }
  const DropoutConfig& config() const { return dropout_.config(); }

 private:
  Inner inner_;
  Dropout<T> dropout_;
};

}  // namespace weir

#ifdef WEIR_COMPILED
extern template class weir::Dropout<float>;
extern template class weir::Dropout<double>;
#endif
