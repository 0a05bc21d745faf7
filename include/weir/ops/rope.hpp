// SPDX-License-Identifier: MIT
/// \file
/// Rotary position embedding (Su et al. 2021, arXiv:2104.09864, eq. 15).
#pragma once

#include <algorithm>
#include <cmath>
#include <span>
#include <string_view>
#include <variant>

#include <weir/core/error.hpp>
#include <weir/core/index_span.hpp>
#include <weir/core/list.hpp>
#include <weir/core/parallel.hpp>
#include <weir/core/scratch.hpp>
#include <weir/core/types.hpp>
#include <weir/ops/lanes.hpp>
#include <weir/ops/rope_scaling.hpp>
#include <weir/ops/trigonometry.hpp>

namespace weir {

/// Which two numbers of a head are rotated together. Checkpoints differ in it by a permutation of
/// the rows of the query and key projections.
enum class RopeLayout {
  kHalfSplit,    ///< i and i + head_dim / 2 (GPT-NeoX, Hugging Face).
  kInterleaved,  ///< 2i and 2i + 1 (the paper, Meta's and Mistral's own code, DeepSeek).
};

/// Settings of `Rope`.
struct RopeConfig {
  double theta = 1e4;  ///< Base of the frequencies.
  RopeLayout layout = RopeLayout::kHalfSplit;
  RopeScaling scaling = NoScaling{};  ///< Changes the frequencies for longer contexts.
};

/// Turns pair i of each head by an angle that grows with the token's position:
///
///     angle = position * frequency_i,    frequency_i = theta^(-2i / head_dim)
///     (a, b) -> (a cos(angle) - b sin(angle), b cos(angle) + a sin(angle))
///
/// so that the product of a query and a key depends only on the distance between them. Angles are
/// computed in double: in float, position 100000 would be off by 0.004 rad. The rotation is
/// orthogonal, so its derivative is the rotation back.
///
/// A `RopeScaling` gives other frequencies, and a factor of cosines and sines. Its `score_scale()`
/// is for the code that multiplies queries with keys.
class Rope {
 public:
  /// \throws ConfigError  if head_dim is odd or below 2, theta is not above zero (above one, with a
  ///                      Yarn), or the scaling is not sound.
  explicit Rope(Index head_dim, const RopeConfig& config = {}) : config_(config) {
    expect_at_least<Index>("Rope", "head_dim", head_dim, 2);
    if (head_dim % 2 != 0) {
      throw_error<ConfigError>("Rope: head_dim = ", head_dim, ", expected an even number");
    }
    expect_positive("Rope", "theta", config.theta);
    check_scaling(config.scaling, "Rope", head_dim, config.theta);
    const auto set = [&](const auto& scaling) {
      for (Index i = 0; i < head_dim / 2; ++i) {
        frequencies_.push_back(scaling.frequency(i, head_dim, config.theta));
      }
      scale_ = scaling.rotation_scale();
    };
    std::visit(set, config.scaling);
  }

  Index head_dim() const { return 2 * pairs(); }
  const RopeConfig& config() const { return config_; }

  /// The radians per position of each pair.
  const List<double>& frequencies() const { return frequencies_; }

  /// The factor of cosines and sines: 1 except with a Yarn.
  double scale() const { return scale_; }

  /// Fills `table` with the cosines, then the sines, of every token's angles, times `scale()`.
  /// Queries, keys and their gradients share it.
  /// \param table      Becomes [tokens, head_dim].
  /// \param positions  One per token.
  template <class T>
  void tabulate(std::span<const Index> positions, Scratch<T>& table) const {
    constexpr Index kCostOfSine = 8;
    auto rows = table.reshape(static_cast<Index>(positions.size()), head_dim());
    parallel_rows(rows.rows(), kCostOfSine * head_dim(), [&](Index begin, Index end) {
      for (Index t = begin; t < end; ++t) {
        const auto position = static_cast<double>(element(positions, t));
        T* const cosines = &rows(t, 0);
        T* const sines = cosines + pairs();
        for (Index i = 0; i < pairs(); i += kLanes<double>) {
          const Index count = std::min(kLanes<double>, pairs() - i);
          const SineCosine of_angle =
              sine_cosine_lanes(position * load_lanes<double>(frequencies_.data() + i, count));
          store_rounded<T>(scale_ * of_angle.cosine, cosines + i, count);
          store_rounded<T>(scale_ * of_angle.sine, sines + i, count);
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
    turn<T>("Rope::rotate", x, table, whole_heads(), T(1));
  }

  /// The transpose of `rotate`: turns the gradient of its output into that of its input. Where
  /// `scale()` is 1, it undoes `rotate`.
  template <class T>
  void rotate_back(MatrixOut<T> x, const Scratch<T>& table) const {
    turn<T>("Rope::rotate_back", x, table, whole_heads(), T(-1));
  }

  /// The columns to rotate if only a part of each head is rotated: in every `width` columns, the
  /// head_dim from `first` on.
  struct Part {
    Index width, first;
  };

  /// Rotates a part of every head of `x` in place.
  /// \param x      [tokens, heads * part.width], any number of heads.
  /// \throws ShapeError   if x is not whole heads wide, part.width has no room for the part, or
  ///                      table has another number of rows.
  template <class T>
  void rotate(MatrixOut<T> x, const Scratch<T>& table, const Part& part) const {
    turn<T>("Rope::rotate", x, table, part, T(1));
  }

  /// The transpose of `rotate` of the same part.
  template <class T>
  void rotate_back(MatrixOut<T> x, const Scratch<T>& table, const Part& part) const {
    turn<T>("Rope::rotate_back", x, table, part, T(-1));
  }

  /// Rotates every head of `x` in place, without a table to keep.
  /// \param positions  One per token.
  /// \throws ShapeError   if x is not whole heads wide or has another number of rows.
  template <class T>
  void rotate(MatrixOut<T> x, std::span<const Index> positions) const {
    Scratch<T> table;
    tabulate(positions, table);
    turn<T>("Rope::rotate", x, table, whole_heads(), T(1));
  }

  /// The transpose of `rotate` with the same positions.
  template <class T>
  void rotate_back(MatrixOut<T> x, std::span<const Index> positions) const {
    Scratch<T> table;
    tabulate(positions, table);
    turn<T>("Rope::rotate_back", x, table, whole_heads(), T(-1));
  }

 private:
  Index pairs() const { return frequencies_.count(); }

  Part whole_heads() const { return {head_dim(), 0}; }

  /// \param direction  1 rotates forward, -1 back.
  template <class T>
  void turn(std::string_view where, MatrixOut<T>& x, const Scratch<T>& table, const Part& part,
            T direction) const {
    if (part.first < 0 || part.first + head_dim() > part.width) {
      throw_error<ShapeError>(where, ": the part begins at ", part.first, " of ", part.width,
                              " columns, expected room for head_dim = ", head_dim());
    }
    if (x.cols() % part.width != 0) {
      throw_error<ShapeError>(where, ": x is ", shape_of(x), ", expected a multiple of ",
                              part.width == head_dim() ? "head_dim" : "part.width", " = ",
                              part.width, " columns");
    }
    expect_shape(where, "table of angles", table, x.rows(), head_dim());
    const Index heads = x.cols() / part.width;
    parallel_rows(x.rows(), 4 * heads * head_dim(), [&](Index begin, Index end) {
      for (Index t = begin; t < end; ++t) {
        const T* cosines = table.data() + t * head_dim();
        for (Index head = 0; head < heads; ++head) {
          turn_head(&x(t, head * part.width + part.first), cosines, cosines + pairs(), direction);
        }
      }
    });
  }

  template <class T>
  void turn_head(T* head, const T* cosines, const T* sines, T direction) const {
    for (Index i = 0; i < pairs(); i += kLanes<T>) {
      const Index count = std::min(kLanes<T>, pairs() - i);
      const Lanes<T> cosine = load_lanes<T>(cosines + i, count);
      const Lanes<T> sine = direction * load_lanes<T>(sines + i, count);
      if (config_.layout == RopeLayout::kHalfSplit) {
        const Lanes<T> a = load_lanes<T>(head + i, count);
        const Lanes<T> b = load_lanes<T>(head + pairs() + i, count);
        store_lanes<T>(a * cosine - b * sine, head + i, count);
        store_lanes<T>(b * cosine + a * sine, head + pairs() + i, count);
      } else {
        T* const lower = head + 2 * i;
        const Index in_lower = std::min(kLanes<T>, 2 * count);
        T* const upper = lower + in_lower;
        const Index in_upper = 2 * count - in_lower;
        const auto [a, b] =
            unzip_lanes<T>(load_lanes<T>(lower, in_lower), load_lanes<T>(upper, in_upper));
        const auto [first, second] = zip_lanes<T>(a * cosine - b * sine, b * cosine + a * sine);
        store_lanes<T>(first, lower, in_lower);
        store_lanes<T>(second, upper, in_upper);
      }
    }
  }

  RopeConfig config_;
  List<double> frequencies_;
  double scale_ = 1.0;
};

}  // namespace weir
