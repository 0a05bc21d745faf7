// SPDX-License-Identifier: MIT
/// \file
/// Weights arranged once for all products they will be in.
#pragma once

#include <algorithm>
#include <type_traits>

#include <weir/core/aligned.hpp>
#include <weir/core/parallel.hpp>
#include <weir/core/storage.hpp>
#include <weir/core/types.hpp>
#include <weir/kernels/bfloat16.hpp>
#include <weir/kernels/panel.hpp>

namespace weir::kernels {

/// A weight [out, in], or two of them side by side, as the panels that x W^T is computed from: the
/// columns of a panel are kCols outputs, its rows the inputs; places beyond the weight are zero.
template <class T>
class PackedWeight {
 public:
  static constexpr Index kCols = Block<T>::kCols;

  /// How the numbers are multiplied in storage `kBfloat16`.
  using Rounded = std::conditional_t<std::is_same_v<T, float>, BFloat16Arithmetic, Native<T>>;

  PackedWeight() = default;

  /// \param storage  kPacked or kBfloat16.
  PackedWeight(MatrixIn<T> weight, Storage storage)
      : PackedWeight(weight, weight, kCols, storage) {}

  /// Two weights of the same shape; half of each panel is one's, half the other's, so that a
  /// product has what belongs together in one panel.
  PackedWeight(MatrixIn<T> first, MatrixIn<T> second, Storage storage)
      : PackedWeight(first, second, kCols / 2, storage) {}

  bool empty() const { return steps_ == 0; }
  Index rows() const { return rows_; }  ///< Outputs, of one weight.
  Index cols() const { return cols_; }  ///< Inputs.
  Index panels() const { return (rows_ + width_ - 1) / width_; }
  Index steps() const { return steps_; }
  bool is_rounded() const { return rounded_; }

  /// Calls `body` with the arithmetic the weight is stored for, an empty value of its type.
  template <class Body>
  decltype(auto) with_arithmetic(Body&& body) const {
    return rounded_ ? body(Rounded{}) : body(Native<T>{});
  }

  /// Panel j; `followed` tells whether panel j + 1 will be multiplied after it.
  template <class Arithmetic>
  PackedPanel<Arithmetic> panel(Index j, bool followed) const {
    const typename Arithmetic::Right* all;
    if constexpr (std::is_same_v<typename Arithmetic::Right, T>) {
      all = exact_.data();
    } else {
      all = halves_.data();
    }
    const Index size = steps_ * PackedPanel<Arithmetic>::kRow;
    const auto* const at = all + j * size;
    return {at, followed ? at + size : nullptr, steps_};
  }

  /// The weights as they were given, rounded if they were rounded. `second` is for a pair.
  void unpack(Matrix<T>& first, Matrix<T>* second = nullptr) const {
    first.resize(rows_, cols_);
    if (second != nullptr) second->resize(rows_, cols_);
    for_each_number([&](bool of_second, Index row, Index col, std::size_t place) {
      Matrix<T>& to = of_second ? *second : first;
      to(row, col) =
          exact_.empty() ? static_cast<T>(static_cast<float>(halves_[place])) : exact_[place];
    });
  }

 private:
  PackedWeight(MatrixIn<T> first, MatrixIn<T> second, Index width, Storage storage)
      : rows_(first.rows()),
        cols_(first.cols()),
        width_(width),
        rounded_(storage == Storage::kBfloat16) {
    const bool halves = rounded_ && std::is_same_v<T, float>;
    depth_ = halves ? Rounded::kDepth : 1;
    steps_ = (cols_ + depth_ - 1) / depth_;
    const auto size = static_cast<std::size_t>(panels() * steps_ * depth_ * kCols);
    if (halves) {
      halves_.resize(size);
    } else {
      exact_.resize(size);
    }
    for_each_number([&](bool of_second, Index row, Index col, std::size_t place) {
      const T value = of_second ? second(row, col) : first(row, col);
      if (halves) {
        halves_[place] = BFloat16(static_cast<float>(value));
      } else {
        exact_[place] =
            rounded_ ? static_cast<T>(static_cast<float>(BFloat16(static_cast<float>(value))))
                     : value;
      }
    });
  }

  /// Calls `body(of_second, row, col, place)` for each number of the weights, on all threads.
  template <class Body>
  void for_each_number(Body&& body) const {
    const bool pair = width_ != kCols;
    parallel_for(panels(), [&](Index j) {
      const Index first = j * width_;
      const Index count = std::min(width_, rows_ - first);
      for (int half = 0; half < (pair ? 2 : 1); ++half) {
        for (Index i = 0; i < count; ++i) {
          const Index column = half * width_ + i;
          for (Index p = 0; p < cols_; ++p) {
            const Index step = j * steps_ + p / depth_;
            body(half == 1, first + i, p,
                 static_cast<std::size_t>((step * kCols + column) * depth_ + p % depth_));
          }
        }
      }
    });
  }

  Index rows_ = 0, cols_ = 0;
  Index width_ = kCols;  ///< Outputs of one weight in a panel.
  Index depth_ = 1;      ///< Inputs of a step.
  Index steps_ = 0;
  bool rounded_ = false;
  AlignedVector<T> exact_;
  AlignedVector<BFloat16> halves_;
};

}  // namespace weir::kernels
