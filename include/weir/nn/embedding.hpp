// SPDX-License-Identifier: MIT
/// \file
/// The table of token vectors.
#pragma once

#include <algorithm>
#include <concepts>
#include <span>
#include <utility>
#include <vector>

#include <weir/core/error.hpp>
#include <weir/core/init.hpp>
#include <weir/core/parallel.hpp>
#include <weir/core/parameter.hpp>
#include <weir/core/types.hpp>

namespace weir {

/// One row of the weight for each token: y[t] = weight[ids[t]].
///
/// The first layer of a language model. It is no `Layer`, since ids are not a matrix and have no
/// derivative, but it is walked by `visit` like one.
template <std::floating_point T>
class Embedding {
 public:
  using Scalar = T;

  struct Cache {
    std::vector<Index> ids;
    Matrix<T> y;
    bool filled = false;  ///< Whether `ids` are those of a forward pass.
  };

  /// Rows drawn from N(0, stddev^2).
  /// \throws ConfigError  unless sizes are positive and stddev >= 0.
  Embedding(Index vocab, Index d_model, Rng& rng, double stddev = 0.02) {
    expect_positive("Embedding", "vocab", vocab);
    expect_positive("Embedding", "d_model", d_model);
    expect_at_least("Embedding", "stddev", stddev, 0.0);
    weight_.value = normal_init<T>(vocab, d_model, stddev, rng);
  }

  /// Takes over a table [vocab, d_model].
  explicit Embedding(Matrix<T> weight) : weight_{std::move(weight)} {}

  /// \param ids      One per token, each in [0, vocab).
  /// \return         [tokens, d_model].
  /// \throws ConfigError  if an id is out of range.
  Matrix<T> forward(std::span<const Index> ids) const {
    check(ids);
    Matrix<T> y;
    look_up(ids, y);
    return y;
  }

  /// The same, keeping what `backward` needs.
  const Matrix<T>& forward(std::span<const Index> ids, Cache& cache) const {
    check(ids);
    cache.ids.assign(ids.begin(), ids.end());
    cache.filled = true;
    look_up(ids, cache.y);
    return cache.y;
  }

  /// Adds each row of dy to the gradient of its token's row, tokens in their order.
  /// \param dy       [tokens, d_model], of the last forward pass.
  /// \throws StateError   if the cache has seen no forward pass.
  /// \throws ShapeError   if dy does not have the shape of the result.
  void backward(MatrixIn<T> dy, Cache& cache) {
    if (!cache.filled) fail<StateError>("Embedding::backward: no forward pass before it");
    const auto tokens = static_cast<Index>(cache.ids.size());
    expect_shape("Embedding::backward", "dy", dy, tokens, d_model());
    constexpr Index kCols = 128;
    Matrix<T>& gradient = weight_.gradient();
    parallel_rows((d_model() + kCols - 1) / kCols, tokens * kCols, [&](Index begin, Index end) {
      const Index first = begin * kCols;
      const Index count = std::min(d_model(), end * kCols) - first;
      for (Index t = 0; t < tokens; ++t) {
        gradient.row(cache.ids[static_cast<std::size_t>(t)]).segment(first, count) +=
            dy.row(t).segment(first, count);
      }
    });
  }

  Index vocab() const { return weight_.value.rows(); }
  Index d_model() const { return weight_.value.cols(); }

  const Parameter<T>& weight() const { return weight_; }
  Parameter<T>& weight() { return weight_; }

  template <class Self, class Visit>
  static void visit(Self& self, Visit& visit) {
    visit("weight", self.weight_);
  }

 private:
  void check(std::span<const Index> ids) const {
    for (std::size_t t = 0; t < ids.size(); ++t) {
      if (ids[t] < 0 || ids[t] >= vocab()) {
        fail<ConfigError>("Embedding::forward: ids[", t, "] = ", ids[t], ", expected 0 <= id < ",
                          vocab());
      }
    }
  }

  void look_up(std::span<const Index> ids, Matrix<T>& y) const {
    y.resize(static_cast<Index>(ids.size()), d_model());
    parallel_rows(y.rows(), d_model(), [&](Index begin, Index end) {
      for (Index t = begin; t < end; ++t) {
        y.row(t) = weight_.value.row(ids[static_cast<std::size_t>(t)]);
      }
    });
  }

  Parameter<T> weight_;
};

}  // namespace weir
