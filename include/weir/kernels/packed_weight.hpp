// SPDX-License-Identifier: MIT
/// \file
/// Weights arranged once for all products they will be in.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <memory>
#include <optional>
#include <type_traits>

#include <weir/core/aligned.hpp>
#include <weir/core/parallel.hpp>
#include <weir/core/parameter.hpp>
#include <weir/core/storage.hpp>
#include <weir/core/types.hpp>
#include <weir/kernels/arranged_rows.hpp>
#include <weir/kernels/bfloat16.hpp>
#include <weir/kernels/coded_column.hpp>
#include <weir/kernels/coded_panel.hpp>
#include <weir/kernels/coded_values.hpp>
#include <weir/kernels/pack.hpp>
#include <weir/kernels/panel.hpp>
#include <weir/kernels/tile_product.hpp>
#include <weir/kernels/weight_rows.hpp>

namespace weir::kernels {

/// A weight [out, in], or two of them side by side, as the panels from which x W^T is computed. The
/// columns of a panel are kCols outputs, its rows are the inputs. Places beyond the weight are
/// zero.
template <class T>
class PackedWeight {
 public:
  static constexpr Index kCols = Block<T>::kCols;

  PackedWeight() = default;

  /// \param storage  Any but kTrainable.
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
    return PackedWeight(rows, cols, pair ? kCols / 2 : kCols, storage).memory_bytes();
  }

  bool empty() const { return steps_ == 0; }
  Index rows() const { return rows_; }  ///< Outputs, of one weight.
  Index cols() const { return cols_; }  ///< Inputs.
  Index panels() const { return (rows_ + width_ - 1) / width_; }

  /// Where the numbers begin, in whatever form.
  const void* data() const {
    return coded_    ? static_cast<const void*>(coded_.get())
           : halves_ ? static_cast<const void*>(halves_.get())
                     : static_cast<const void*>(exact_.get());
  }

  /// How many multiplications a row and a panel take.
  Index panel_cost() const { return steps_ * depth_ * kCols; }

  /// The form in which `multiply` takes rows.
  RowFormat<T> row_format() const {
    const bool in_tiles = is_coded() && uses_tiles();
    const RowKind kind = rounds_rows(storage_) && is_coded()         ? RowKind::kInt8
                         : in_tiles || (has_halves() && kRoundsRows) ? RowKind::kBfloat16
                                                                     : RowKind::kExact;
    const Index padded = steps_ * depth_;
    return {kind, cols_, kind == RowKind::kBfloat16 ? tile_row(padded / 2) : padded};
  }

  /// Pieces `begin` to `end` of the product of rows, one behind the other, with the weight. A row's
  /// result depends neither on the other rows nor on the pieces.
  void multiply(const Cut& cut, const std::byte* left, Index begin, Index end,
                Store<T> store) const {
    (this->*multiply_)(cut, left, begin, end, store);
  }

  /// Writes the weights as they were given, or rounded as they are stored. `second` is for a pair.
  void unpack(Matrix<T>& first, Matrix<T>* second = nullptr) const {
    set_shape(first, rows_, cols_);
    if (second != nullptr) second->resize(rows_, cols_);
    unpack(first.data(), second == nullptr ? nullptr : second->data());
  }
  void unpack(T* first, T* second) const { (this->*unpack_)(first, second); }

 private:
  /// How the numbers are multiplied in storage `kBfloat16`.
  using Rounded = std::conditional_t<std::is_same_v<T, float>, BFloat16Arithmetic, Native<T>>;
  static constexpr bool kRoundsRows = !std::is_same_v<typename Rounded::Left, T>;

  /// Whether the numbers are codes, or those of 16 bits. In double they are never.
  bool is_coded() const { return std::is_same_v<T, float> && code_of(storage_).has_value(); }
  bool has_halves() const { return std::is_same_v<T, float> && storage_ == Storage::kBfloat16; }

  /// Only where `is_coded`.
  CodedLayout layout() const { return {code_of(storage_).value_or(Code::kInt8)}; }

  /// Knows the sizes; `fill` sets the numbers.
  PackedWeight(Index rows, Index cols, Index width, Storage storage)
      : rows_(rows), cols_(cols), width_(width), storage_(storage) {
    if (has_halves()) depth_ = Rounded::kDepth;
    if (is_coded()) depth_ = layout().block();
    steps_ = (cols + depth_ - 1) / depth_;
    if (has_halves()) steps_ = (steps_ + kTileSteps - 1) / kTileSteps * kTileSteps;
  }

  /// A matrix, whose numbers may be elsewhere.
  struct From {
    MatrixIn<T> value;
    const RowReader<T>* rows = nullptr;
  };

  PackedWeight(const From& first, const From& second, Index width, Storage storage,
               SharedMemory* memory);

  std::size_t memory_bytes() const {
    const auto numbers = static_cast<std::size_t>(panels() * panel_cost());
    if (has_halves()) return SharedMemory::bytes_of<BFloat16>(numbers);
    const Index scales = WeightRows<T>::scale_count(rows_, cols_, storage_);
    const auto count = static_cast<std::size_t>(width_ == kCols ? scales : 2 * scales);
    return SharedMemory::bytes_of<float>(count) +
           (is_coded() ? SharedMemory::bytes_of<std::byte>(coded_bytes())
                       : SharedMemory::bytes_of<T>(numbers));
  }
  std::size_t coded_bytes() const {
    return static_cast<std::size_t>(panels() * steps_ * layout().bytes());
  }

  void fill(const From& first, const From& second, SharedMemory& memory);

  void unpack_stored(T* first, T* second) const;
  void multiply_stored(const Cut& cut, const std::byte* left, Index begin, Index end,
                       Store<T> store) const;

  /// Copies the rows of panel j to their columns.
  void pack_panel(const WeightRows<T>& from, Index j, bool of_second);

  /// Copies `count` rows to their columns of a panel of `width_` of them; further ones are zero.
  template <Index width>
  void pack_numbers(const WeightRows<T>& of, const T* from, Index stride, Index row, Index count,
                    T* to) const;
  void pack_codes(const WeightRows<T>& of, const T* from, Index stride, Index row, Index count,
                  Index column, std::byte* to) const;

  /// Writes the row that is in this column of panel j.
  void unpack_row(Index j, Index column, T* to) const;

  Index rows_ = 0, cols_ = 0;
  Index width_ = kCols;  ///< Outputs of one weight in a panel.
  Index depth_ = 1;      ///< Inputs of a step.
  Index steps_ = 0;
  Storage storage_ = Storage::kPacked;
  // Set where numbers are, so that the kernels of all storages are compiled only where something is
  // stored.
  void (PackedWeight::*multiply_)(const Cut&, const std::byte*, Index, Index,
                                  Store<T>) const = nullptr;
  void (PackedWeight::*unpack_)(T*, T*) const = nullptr;
  // Copies share the numbers, one of these.
  std::shared_ptr<T[]> exact_;          // NOLINT(modernize-avoid-c-arrays)
  std::shared_ptr<BFloat16[]> halves_;  // NOLINT(modernize-avoid-c-arrays)
  std::shared_ptr<std::byte[]> coded_;  // NOLINT(modernize-avoid-c-arrays)
};

template <class T>
void PackedWeight<T>::multiply_stored(const Cut& cut, const std::byte* left, Index begin, Index end,
                                      Store<T> store) const {
  const RowFormat<T> format = row_format();
  const auto multiply_as = [&]<class Arithmetic>(Arithmetic,
                                                 const typename Arithmetic::Right* numbers) {
    using Left = typename Arithmetic::Left;
    const Index row = format.bytes() / static_cast<Index>(sizeof(Left));
    const LeftRows<Arithmetic> rows = {reinterpret_cast<const Left*>(left), row,
                                       Arithmetic::kDepth};
    const Index size = steps_ * PackedPanel<Arithmetic>::kRow;
    multiply_pieces<Arithmetic>(
        cut, rows, steps_, begin, end,
        [&](Index j, bool followed) -> PackedPanel<Arithmetic> {
          const auto* const at = numbers + j * size;
          return {at, followed ? at + size : nullptr, steps_};
        },
        store);
  };
  if constexpr (std::is_same_v<T, float>) {
    if (is_coded()) {
      const CodedPanels all = {layout(), coded_.get(), steps_};
      return all.multiply(cut, format.kind, left, format.bytes(), begin, end, store);
    }
#if WEIR_TILES
    if (has_halves() && uses_tiles()) {
      const auto* const rows = reinterpret_cast<const BFloat16*>(left);
      return multiply_pieces_in_tiles(cut, {rows, format.padded, 2}, halves_.get(), steps_, begin,
                                      end, store);
    }
#endif
    if (has_halves()) return multiply_as(Rounded{}, halves_.get());
  }
  multiply_as(Native<T>{}, exact_.get());
}

template <class T>
void PackedWeight<T>::pack_panel(const WeightRows<T>& from, Index j, bool of_second) {
  const Index row = j * width_;
  const Index count = std::min(width_, rows_ - row);
  const Index column = of_second ? width_ : 0;
  const Index place = j * panel_cost() + column * depth_;
  from.read(row, count, [&](const T* rows, Index stride) {
    if (is_coded()) {
      std::byte* const panel = coded_.get() + j * steps_ * layout().bytes();
      return pack_codes(from, rows, stride, row, count, column, panel);
    }
    if constexpr (std::is_same_v<T, float>) {
      if (has_halves()) {
        BFloat16* const to = halves_.get() + place;
        return width_ == kCols
                   ? pack_halves<kCols>(rows, stride, count, cols_, steps_, to, kCols)
                   : pack_halves<kCols / 2>(rows, stride, count, cols_, steps_, to, kCols);
      }
    }
    T* const to = exact_.get() + place;
    return width_ == kCols ? pack_numbers<kCols>(from, rows, stride, row, count, to)
                           : pack_numbers<kCols / 2>(from, rows, stride, row, count, to);
  });
}

template <class T>
template <Index width>
void PackedWeight<T>::pack_numbers(const WeightRows<T>& of, const T* from, Index stride, Index row,
                                   Index count, T* to) const {
  if (storage_ == Storage::kPacked) {
    return pack_strip<width>(from, stride, 1, count, cols_, to, kCols);
  }
  constexpr Index kPart = WeightRows<T>::kTile;  // Rounded at a time, so that they stay in L1.
  T part[width * kPart];
  for (Index done = 0; done < cols_; done += kPart) {
    const Index length = std::min(kPart, cols_ - done);
    for (Index i = 0; i < count; ++i) {
      of.round(from + i * stride, row + i, done, length, part + i * kPart);
    }
    pack_strip<width>(part, kPart, 1, count, length, to + done * kCols, kCols);
  }
}

template <class T>
void PackedWeight<T>::fill(const From& first, const From& second, SharedMemory& memory) {
  multiply_ = &PackedWeight::multiply_stored;
  unpack_ = &PackedWeight::unpack_stored;
  const auto numbers = static_cast<std::size_t>(panels() * panel_cost());
  if (is_coded()) {
    coded_ = memory.take<std::byte>(coded_bytes());
  } else if (has_halves()) {
    halves_ = memory.take<BFloat16>(numbers);
  } else {
    exact_ = memory.take<T>(numbers);
  }
  const bool pair = width_ != kCols;
  WeightRows<T> one(first.value, first.rows, storage_);
  WeightRows<T> other(second.value, second.rows, storage_);
  const Index scales = WeightRows<T>::scale_count(rows_, cols_, storage_);
  const auto scale = memory.take<float>(static_cast<std::size_t>(pair ? 2 * scales : scales));
  one.find_scales(scale.get());
  if (pair) other.find_scales(scale.get() + scales);
  parallel_for(panels(), [&](Index j) {
    pack_panel(one, j, false);
    if (pair) pack_panel(other, j, true);
  });
}

template <class T>
void PackedWeight<T>::pack_codes(const WeightRows<T>& of, const T* from, Index stride, Index row,
                                 Index count, Index column, std::byte* to) const {
  const CodedLayout form = layout();
  for (Index i = 0; i < width_; ++i) {
    CodedBlock block;
    for (Index b = 0; b < steps_; ++b) {
      if (i < count) of.round_block(from + i * stride, row + i, b, block);
      write_block(form, block, column + i, to + b * form.bytes());
    }
  }
}

template <class T>
void PackedWeight<T>::unpack_row(Index j, Index column, T* to) const {
  if (is_coded()) {
    const CodedLayout of = layout();
    for (Index b = 0; b < steps_; ++b) {
      const CodedBlock block = read_block(of, column, coded_.get() + (j * steps_ + b) * of.bytes());
      const Index begin = b * of.block();
      for (Index p = begin; p < std::min(cols_, begin + of.block()); ++p) {
        to[p] = static_cast<T>(coded_value(of.code, block, p - begin));
      }
    }
    return;
  }
  for (Index p = 0; p < cols_; ++p) {
    const Index step = j * steps_ + p / depth_;
    const Index place = (step * kCols + column) * depth_ + p % depth_;
    to[p] = exact_ == nullptr ? static_cast<T>(static_cast<float>(halves_[place])) : exact_[place];
  }
}

template <class T>
void PackedWeight<T>::unpack_stored(T* first, T* second) const {
  parallel_for(panels(), [&](Index j) {
    for (Index column = 0; column < kCols; ++column) {
      const Index row = j * width_ + column % width_;
      if (row < rows_) unpack_row(j, column, (column < width_ ? first : second) + row * cols_);
    }
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
