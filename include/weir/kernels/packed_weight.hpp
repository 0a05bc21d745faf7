// SPDX-License-Identifier: MIT
/// \file
/// Weights arranged once for all products they will be in.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <memory>
#include <type_traits>

#include <weir/core/aligned.hpp>
#include <weir/core/parallel.hpp>
#include <weir/core/parameter.hpp>
#include <weir/core/storage.hpp>
#include <weir/core/thread_space.hpp>
#include <weir/core/types.hpp>
#include <weir/kernels/bfloat16.hpp>
#include <weir/kernels/pack.hpp>
#include <weir/kernels/panel.hpp>

namespace weir::kernels {

/// A weight [out, in], or two of them side by side, as the panels from which x W^T is computed. The
/// columns of a panel are kCols outputs, its rows are the inputs. Places beyond the weight are
/// zero.
template <class T>
class PackedWeight {
 public:
  static constexpr Index kCols = Block<T>::kCols;

  /// How the numbers are multiplied in storage `kBfloat16`.
  using Rounded = std::conditional_t<std::is_same_v<T, float>, BFloat16Arithmetic, Native<T>>;

  PackedWeight() = default;

  /// \param storage  kPacked or kBfloat16.
  /// \param memory   Where the numbers go, with room for `bytes`. If null, they get memory of their
  ///                 own.
  PackedWeight(MatrixIn<T> weight, Storage storage, SharedMemory* memory = nullptr)
      : PackedWeight({weight}, {weight}, kCols, storage, memory) {}
  /// The value of `weight` may still be elsewhere: its rows are then fetched panel by panel.
  PackedWeight(const Parameter<T>& weight, Storage storage, SharedMemory* memory = nullptr)
      : PackedWeight({weight.value, weight.rows}, {weight.value}, kCols, storage, memory) {}

  /// Two weights of the same shape. Half of each panel belongs to `first`, half to `second`, so
  /// that outputs that belong together are in one panel.
  PackedWeight(MatrixIn<T> first, MatrixIn<T> second, Storage storage,
               SharedMemory* memory = nullptr)
      : PackedWeight({first}, {second}, kCols / 2, storage, memory) {}
  PackedWeight(const Parameter<T>& first, const Parameter<T>& second, Storage storage,
               SharedMemory* memory = nullptr)
      : PackedWeight({first.value, first.rows}, {second.value, second.rows}, kCols / 2, storage,
                     memory) {}

  /// How many bytes a weight [rows, cols], or a pair of them, takes.
  static std::size_t bytes(Index rows, Index cols, Storage storage, bool pair = false) {
    const std::size_t count = PackedWeight(rows, cols, pair ? kCols / 2 : kCols, storage).numbers();
    return stores_halves(storage) ? SharedMemory::bytes_of<BFloat16>(count)
                                  : SharedMemory::bytes_of<T>(count);
  }

  bool empty() const { return steps_ == 0; }
  Index rows() const { return rows_; }  ///< Outputs, of one weight.
  Index cols() const { return cols_; }  ///< Inputs.
  Index panels() const { return (rows_ + width_ - 1) / width_; }
  Index steps() const { return steps_; }

  /// Calls `body` with the arithmetic that the weight is stored for, an empty object.
  template <class Body>
  decltype(auto) with_arithmetic(Body&& body) const {
    return rounded_ ? body(Rounded{}) : body(Native<T>{});
  }

  /// Panel j; `followed` tells whether panel j + 1 will be multiplied after it.
  template <class Arithmetic>
  PackedPanel<Arithmetic> panel(Index j, bool followed) const {
    const typename Arithmetic::Right* all = nullptr;
    if constexpr (std::is_same_v<typename Arithmetic::Right, T>) {
      all = exact_.get();
    } else {
      all = halves_.get();
    }
    const Index size = steps_ * PackedPanel<Arithmetic>::kRow;
    const auto* const at = all + j * size;
    return {at, followed ? at + size : nullptr, steps_};
  }

  /// Writes the weights as they were given, or rounded as they are stored. `second` is for a pair.
  void unpack(Matrix<T>& first, Matrix<T>* second = nullptr) const;

 private:
  static bool stores_halves(Storage storage) {
    return storage == Storage::kBfloat16 && std::is_same_v<T, float>;
  }

  /// Knows the sizes; `fill` sets the numbers.
  PackedWeight(Index rows, Index cols, Index width, Storage storage)
      : rows_(rows),
        cols_(cols),
        width_(width),
        depth_(stores_halves(storage) ? Rounded::kDepth : 1),
        steps_((cols + depth_ - 1) / depth_),
        rounded_(storage == Storage::kBfloat16) {}

  /// A matrix, whose numbers may be elsewhere.
  struct From {
    MatrixIn<T> value;
    const RowReader<T>* rows = nullptr;
  };

  PackedWeight(const From& first, const From& second, Index width, Storage storage,
               SharedMemory* memory);

  Index panel_numbers() const { return steps_ * depth_ * kCols; }
  std::size_t numbers() const { return static_cast<std::size_t>(panels() * panel_numbers()); }

  void fill(const From& first, const From& second, SharedMemory& memory) {
    if constexpr (std::is_same_v<T, float>) {
      if (rounded_) {
        halves_ = packed<BFloat16>(first, second, memory);
        return;
      }
    }
    exact_ = packed<T>(first, second, memory);
  }

  /// A copy of all numbers in their places, rounded where the storage asks for it.
  template <class Number>
  std::shared_ptr<Number[]> packed(const From& first, const From& second,  // NOLINT: as below.
                                   SharedMemory& memory) const {
    auto to = memory.take<Number>(numbers());
    parallel_for(panels(), [&](Index j) {
      Number* const panel = to.get() + j * panel_numbers();
      pack_panel(first, j, panel);
      if (width_ != kCols) pack_panel(second, j, panel + width_ * depth_);
    });
    return to;
  }

  /// Copies the rows of panel j to their columns.
  template <class Number>
  void pack_panel(const From& from, Index j, Number* to) const {
    const Index row = j * width_;
    const Index count = std::min(width_, rows_ - row);
    if (from.rows == nullptr) {
      const Index stride = from.value.outerStride();
      return pack_rows(from.value.data() + row * stride, stride, count, to);
    }
    auto& space = ThreadSpace<T, PackedWeight>::of_this_thread();
    space.reserve(kCols * cols_);
    T* const rows = space.take(count * cols_);
    from.rows->read(row, count, rows);
    pack_rows(rows, cols_, count, to);
  }

  /// Copies `count` rows to their columns of a panel of `width_` of them; further ones are zero.
  template <class Number>
  void pack_rows(const T* from, Index stride, Index count, Number* to) const {
    if (width_ == kCols) {
      pack_columns<kCols>(from, stride, count, to);
    } else {
      pack_columns<kCols / 2>(from, stride, count, to);
    }
  }

  template <Index width>
  void pack_columns(const T* from, Index stride, Index count, T* to) const;
  template <Index width>
  void pack_columns(const T* from, Index stride, Index count, BFloat16* to) const;

  /// Calls `body(of_second, row, col, place)` for each number of the weights, on all threads.
  template <class Body>
  void for_each_number(Body&& body) const;

  Index rows_ = 0, cols_ = 0;
  Index width_ = kCols;  ///< Outputs of one weight in a panel.
  Index depth_ = 1;      ///< Inputs of a step.
  Index steps_ = 0;
  bool rounded_ = false;
  // Copies share the numbers.
  std::shared_ptr<const T[]> exact_;          // NOLINT(modernize-avoid-c-arrays)
  std::shared_ptr<const BFloat16[]> halves_;  // NOLINT(modernize-avoid-c-arrays)
};

template <class T>
template <Index width>
void PackedWeight<T>::pack_columns(const T* from, Index stride, Index count, T* to) const {
  if (!rounded_) return pack_strip<width>(from, stride, 1, count, cols_, to, kCols);
  constexpr Index kPart = 64;  // Rounded at a time, so that they stay in L1.
  T part[width * kPart];
  for (Index done = 0; done < cols_; done += kPart) {
    const Index length = std::min(kPart, cols_ - done);
    for (Index i = 0; i < count; ++i) {
      for (Index p = 0; p < length; ++p) {
        const BFloat16 rounded(static_cast<float>(from[i * stride + done + p]));
        part[i * kPart + p] = static_cast<T>(static_cast<float>(rounded));
      }
    }
    pack_strip<width>(part, kPart, 1, count, length, to + done * kCols, kCols);
  }
}

template <class T>
template <Index width>
void PackedWeight<T>::pack_columns(const T* from, Index stride, Index count, BFloat16* to) const {
  // Two numbers of a row lie side by side and are moved as one.
  constexpr Index kPart = 64;
  std::int32_t pairs[width * kPart];
  std::int32_t columns[width * kPart];
  BFloat16 row[2 * kPart];
  for (Index done = 0; done < steps_; done += kPart) {
    const Index steps = std::min(kPart, steps_ - done);
    const Index length = std::min(2 * steps, cols_ - 2 * done);
    for (Index i = 0; i < count; ++i) {
      round_to_bfloat16(length, from + i * stride + 2 * done, row);
      if (length < 2 * steps) row[length] = BFloat16();
      std::memcpy(pairs + i * kPart, row, static_cast<std::size_t>(steps) * sizeof *pairs);
    }
    pack_strip<width>(pairs, kPart, 1, count, steps, columns);
    for (Index s = 0; s < steps; ++s) {
      std::memcpy(static_cast<void*>(to + (done + s) * 2 * kCols), columns + s * width,
                  width * sizeof *columns);
    }
  }
}

template <class T>
template <class Body>
void PackedWeight<T>::for_each_number(Body&& body) const {
  const bool pair = width_ != kCols;
  parallel_for(panels(), [&](Index j) {
    const Index first = j * width_;
    const Index count = std::min(width_, rows_ - first);
    for (int half = 0; half < (pair ? 2 : 1); ++half) {
      for (Index i = 0; i < count; ++i) {
        const Index column = half * width_ + i;
        for (Index p = 0; p < cols_; ++p) {
          const Index step = j * steps_ + p / depth_;
          body(half == 1, first + i, p, (step * kCols + column) * depth_ + p % depth_);
        }
      }
    }
  });
}

template <class T>
void PackedWeight<T>::unpack(Matrix<T>& first, Matrix<T>* second) const {
  set_shape(first, rows_, cols_);
  if (second != nullptr) second->resize(rows_, cols_);
  for_each_number([&](bool of_second, Index row, Index col, Index place) {
    Matrix<T>& to = of_second ? *second : first;
    to(row, col) =
        exact_ == nullptr ? static_cast<T>(static_cast<float>(halves_[place])) : exact_[place];
  });
}

template <class T>
PackedWeight<T>::PackedWeight(const From& first, const From& second, Index width, Storage storage,
                              SharedMemory* memory)
    : PackedWeight(first.value.rows(), first.value.cols(), width, storage) {
  if (memory != nullptr) {
    fill(first, second, *memory);
  } else {
    SharedMemory own(bytes(rows_, cols_, storage, width != kCols));
    fill(first, second, own);
  }
}

}  // namespace weir::kernels

#ifdef WEIR_COMPILED
extern template class weir::kernels::PackedWeight<float>;
extern template class weir::kernels::PackedWeight<double>;
#endif
