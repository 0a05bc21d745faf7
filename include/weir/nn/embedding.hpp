// SPDX-License-Identifier: MIT
/// \file
/// The table of token vectors.
#pragma once

#include <algorithm>
#include <concepts>
#include <utility>

#include <weir/core/cache_state.hpp>
#include <weir/core/error.hpp>
#include <weir/core/init.hpp>
#include <weir/core/list.hpp>
#include <weir/core/parallel.hpp>
#include <weir/core/parameter.hpp>
#include <weir/core/pass.hpp>
#include <weir/core/token_ids.hpp>
#include <weir/core/types.hpp>
#include <weir/ops/padding.hpp>

namespace weir {

/// Settings of `Embedding`.
struct EmbeddingConfig {
  double stddev = 0.02;  ///< The standard deviation of the numbers at the start.
};

/// One row of the weight for each token: y[t] = weight[ids[t]]. Padding has an id like any other
/// token, but yields zero, see PaddingRows.
///
/// The first layer of a language model. It is no `Layer`, since ids are not a matrix and have no
/// derivative, but it has the same protocol, and `visit` walks it like one.
template <std::floating_point T>
class Embedding {
 public:
  using Scalar = T;

  struct Cache {
    CacheState state;
    List<Index> ids;  ///< Those of the last forward pass.
    PaddingRows padding;
    Matrix<T> y;
  };

  /// Rows drawn from N(0, stddev^2).
  /// \throws ConfigError  unless sizes are positive and stddev >= 0.
  Embedding(Index vocab, Index d_model, Rng& rng, EmbeddingConfig config = {}) {
    expect_positive("Embedding", "vocab", vocab);
    expect_positive("Embedding", "d_model", d_model);
    expect_at_least("Embedding", "stddev", config.stddev, 0.0);
    weight_.value = normal_init<T>(vocab, d_model, config.stddev, rng);
  }

  /// Takes over a table [vocab, d_model].
  explicit Embedding(Matrix<T> weight) : weight_{std::move(weight)} {}

  /// \param ids      One per token, each in [0, vocab).
  /// \return         [tokens, d_model].
  /// \throws ConfigError  if an id is out of range.
  /// \throws ShapeError   if pass.mask does not fit.
  const Matrix<T>& forward(TokenIds ids, const Pass& pass, Cache& cache) const;

  /// Adds each row of dy to the gradient of its token's row, tokens in their order.
  /// \param dy       [tokens, d_model], of the last forward pass.
  /// \throws StateError   if the cache does not fit, see CacheState.
  /// \throws ShapeError   if dy does not have the shape of the result.
  void backward(MatrixIn<T> dy, Cache& cache);

  Index vocab() const { return weight_.value.rows(); }
  Index d_model() const { return weight_.value.cols(); }

  const Parameter<T>& weight() const { return weight_; }
  Parameter<T>& weight() { return weight_; }

  template <class Self, class Visit>
  static void visit(Self& self, Visit& visit) {
    visit("weight", self.weight_);
  }

 private:
  void check(TokenIds ids) const;

  Parameter<T> weight_;
};

template <std::floating_point T>
const Matrix<T>& Embedding<T>::forward(TokenIds ids, const Pass& pass, Cache& cache) const {
  cache.state.begin();
  check(ids);
  cache.padding.set("Embedding::forward", pass, ids.count());
  ids.copy_to(cache.ids);
  set_shape(cache.y, ids.count(), d_model());
  parallel_rows(cache.y.rows(), d_model(), [&](Index begin, Index end) {
    for (Index t = begin; t < end; ++t) cache.y.row(t) = weight_.value.row(cache.ids[t]);
  });
  cache.padding.clear(cache.y);
  return cache.state.finish(*this, pass, cache.y);
}

template <std::floating_point T>
void Embedding<T>::backward(MatrixIn<T> dy, Cache& cache) {
  cache.state.begin_backward("Embedding::backward", *this, dy);
  constexpr Index kCols = 128;
  Matrix<T>& gradient = weight_.gradient();
  parallel_rows((d_model() + kCols - 1) / kCols, dy.rows() * kCols, [&](Index begin, Index end) {
    const Index first = begin * kCols;
    const Index count = std::min(d_model(), end * kCols) - first;
    for (Index t = 0; t < dy.rows(); ++t) {
      if (cache.padding.contains(t)) continue;
      gradient.row(cache.ids[t]).segment(first, count) += dy.row(t).segment(first, count);
    }
  });
}

template <std::floating_point T>
void Embedding<T>::check(TokenIds ids) const {
  for (Index t = 0; t < ids.count(); ++t) {
    if (ids[t] < 0 || ids[t] >= vocab()) {
      throw_error<ConfigError>("Embedding::forward: ids[", t, "] = ", ids[t],
                               ", expected 0 <= id < ", vocab());
    }
  }
}

}  // namespace weir

#ifdef WEIR_COMPILED
extern template class weir::Embedding<float>;
extern template class weir::Embedding<double>;
#endif
