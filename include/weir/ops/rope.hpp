// SPDX-License-Identifier: MIT
/// \file
/// Rotary position embedding (Su et al. 2021, arXiv:2104.09864, eq. 15).
#pragma once

#include <cmath>
#include <span>
#include <string_view>
#include <vector>

#include <weir/core/error.hpp>
#include <weir/core/parallel.hpp>
#include <weir/core/scratch.hpp>
#include <weir/core/types.hpp>

namespace weir {

/// Which two numbers of a head are rotated together. Checkpoints differ in it by a permutation of
/// the rows of the query and key projections.
enum class RopeLayout {
  kHalfSplit,    ///< i and i + head_dim / 2 (GPT-NeoX, Hugging Face).
  kInterleaved,  ///< 2i and 2i + 1 (the paper, Meta's and Mistral's own code, DeepSeek).
};

/// Turns pair i of each head by an angle that grows with the token's position:
///
///     angle = position * frequency_i,    frequency_i = theta^(-2i / head_dim)
///     (a, b) -> (a cos(angle) - b sin(angle), b cos(angle) + a sin(angle))
///
/// so that the product of a query and a key depends on the distance between them alone. Angles are
/// computed in double: in float, position 100000 would be off by 0.004 rad. The rotation is
/// orthogonal, so its derivative is the rotation back.
class Rope {
 public:
  /// \throws ConfigError  if head_dim is odd or below 2, or theta is not above zero.
  explicit Rope(Index head_dim, double theta = 1e4, RopeLayout layout = RopeLayout::kHalfSplit)
      : layout_(layout) {
    expect_at_least<Index>("Rope", "head_dim", head_dim, 2);
    if (head_dim % 2 != 0) {
      fail<ConfigError>("Rope: head_dim = ", head_dim, ", expected an even number");
    }
    expect_positive("Rope", "theta", theta);
    for (Index i = 0; i < head_dim / 2; ++i) {
      const double exponent = -2.0 * static_cast<double>(i) / static_cast<double>(head_dim);
      frequencies_.push_back(std::pow(theta, exponent));
    }
  }

  Index head_dim() const { return 2 * pairs(); }
  RopeLayout layout() const { return layout_; }

  /// Radians per position, one for each pair.
  const std::vector<double>& frequencies() const { return frequencies_; }

  /// Fills `table` with the cosines, then the sines, of every token's angles: what one forward and
  /// one backward pass share between queries, keys and their gradients.
  /// \param table      Becomes [tokens, head_dim].
  /// \param positions  One per token.
  template <class T>
  void tabulate(std::span<const Index> positions, Scratch<T>& table) const {
    constexpr Index kCostOfSine = 64;
    auto rows = table.reshape(static_cast<Index>(positions.size()), head_dim());
    parallel_rows(rows.rows(), kCostOfSine * head_dim(), [&](Index begin, Index end) {
      for (Index t = begin; t < end; ++t) {
        const auto position = static_cast<double>(positions[static_cast<std::size_t>(t)]);
        for (Index i = 0; i < pairs(); ++i) {
          const double angle = position * frequencies_[static_cast<std::size_t>(i)];
          rows(t, i) = static_cast<T>(std::cos(angle));
          rows(t, pairs() + i) = static_cast<T>(std::sin(angle));
        }
      }
    });
  }

  /// Rotates every head of `x` in place.
  /// \param x      [tokens, heads * head_dim], any number of heads.
  /// \param table  From `tabulate`, for the same number of tokens.
  /// \throws ShapeError   if x is not whole heads wide or table has another number of rows.
  template <class T>
  void rotate(MatrixOut<T> x, const Scratch<T>& table) const {
    turn<T>("Rope::rotate", x, table, T(1));
  }

  /// Undoes `rotate`; takes the gradient of its output to that of its input.
  template <class T>
  void rotate_back(MatrixOut<T> x, const Scratch<T>& table) const {
    turn<T>("Rope::rotate_back", x, table, T(-1));
  }

  /// Rotates every head of `x` in place, without a table to keep.
  /// \param positions  One per token.
  /// \throws ShapeError   if x is not whole heads wide or has another number of rows.
  template <class T>
  void rotate(MatrixOut<T> x, std::span<const Index> positions) const {
    Scratch<T> table;
    tabulate(positions, table);
    turn<T>("Rope::rotate", x, table, T(1));
  }

  /// Undoes `rotate` with the same positions.
  template <class T>
  void rotate_back(MatrixOut<T> x, std::span<const Index> positions) const {
    Scratch<T> table;
    tabulate(positions, table);
    turn<T>("Rope::rotate_back", x, table, T(-1));
  }

 private:
  Index pairs() const { return static_cast<Index>(frequencies_.size()); }

  /// \param direction  1 forward, -1 back.
  template <class T>
  void turn(std::string_view where, MatrixOut<T>& x, const Scratch<T>& table, T direction) const {
    if (x.cols() % head_dim() != 0) {
      fail<ShapeError>(where, ": x is ", shape_of(x),
                       ", expected a multiple of head_dim = ", head_dim(), " columns");
    }
    expect_shape(where, "table of angles", table, x.rows(), head_dim());
    const bool half_split = layout_ == RopeLayout::kHalfSplit;
    const Index step = half_split ? 1 : 2;           // from a pair to the next
    const Index partner = half_split ? pairs() : 1;  // from a pair's first number to its second
    parallel_rows(x.rows(), 4 * x.cols(), [&](Index begin, Index end) {
      for (Index t = begin; t < end; ++t) {
        const T* cosines = table.data() + t * head_dim();
        const T* sines = cosines + pairs();
        T* row = x.data() + t * x.outerStride();
        for (Index head = 0; head < x.cols(); head += head_dim()) {
          for (Index i = 0; i < pairs(); ++i) {
            T& first = row[head + i * step];
            T& second = row[head + i * step + partner];
            const T a = first;
            const T b = second;
            const T sine = direction * sines[i];
            first = a * cosines[i] - b * sine;
            second = b * cosines[i] + a * sine;
          }
        }
      }
    });
  }

  RopeLayout layout_;
  std::vector<double> frequencies_;
};

}  // namespace weir
