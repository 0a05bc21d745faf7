// SPDX-License-Identifier: MIT
/// \file
/// The rows of a weight on their way into a storage.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <optional>

#include <weir/core/parallel.hpp>
#include <weir/core/parameter.hpp>
#include <weir/core/storage.hpp>
#include <weir/core/thread_space.hpp>
#include <weir/core/types.hpp>
#include <weir/kernels/bfloat16.hpp>
#include <weir/kernels/block_codes.hpp>
#include <weir/kernels/e4m3_lanes.hpp>

namespace weir::kernels {

/// The kind of codes of a storage; nothing if it has none.
constexpr std::optional<Code> code_of(Storage storage) {
  switch (storage) {
    case Storage::kInt8:
    case Storage::kInt8Dot:
      return Code::kInt8;
    case Storage::kInt4:
    case Storage::kInt4Dot:
      return Code::kInt4;
    case Storage::kFp8:
      return Code::kFp8;
    case Storage::kMxFp4:
      return Code::kMxFp4;
    default:
      return std::nullopt;
  }
}

/// Whether tokens become codes on their way into a product.
constexpr bool rounds_rows(Storage storage) {
  return storage == Storage::kInt8Dot || storage == Storage::kInt4Dot;
}

/// A weight [rows, cols] whose numbers may be elsewhere, and what they are rounded to. Nothing here
/// takes memory, but for a thread's space where numbers are elsewhere.
template <class T>
class WeightRows {
 public:
  static constexpr Index kTile = kernels::kTile;

  WeightRows(MatrixIn<T> value, const RowReader<T>* reader, Storage storage)
      : value_(value), reader_(reader), storage_(storage) {}

  /// How many scales a weight has that belong to many rows.
  static Index scale_count(Index rows, Index cols, Storage storage) {
    const auto tiles = [](Index length) { return (length + kTile - 1) / kTile; };
    return code_of(storage) == Code::kFp8 ? tiles(rows) * tiles(cols) : 0;
  }

  /// Finds these scales. To be called before numbers are rounded.
  /// \param scales   Where they go, `scale_count` of them.
  void find_scales(float* scales);

  /// Calls `body(rows, stride)` with the rows [first, first + count) as they were given.
  template <class Body>
  void read(Index first, Index count, Body&& body) const;

  /// Rounds block `b` of a row that becomes codes. Codes beyond the row are zero.
  /// \param from     Row number `row`.
  void round_block(const T* from, Index row, Index b, CodedBlock& to) const;

  /// Writes what up to kTile numbers of a row are rounded to, which need not be floats.
  /// \param begin    A multiple of kTile.
  void round(const T* from, Index row, Index begin, Index count, T* to) const;

 private:
  Index tiles_across() const { return (value_.cols() + kTile - 1) / kTile; }

  MatrixIn<T> value_;
  const RowReader<T>* reader_;
  Storage storage_;
  const float* scales_ = nullptr;  // [tiles, tiles across], for kFp8.
};

template <class T>
template <class Body>
void WeightRows<T>::read(Index first, Index count, Body&& body) const {
  if (reader_ == nullptr) {
    const Index stride = value_.outerStride();
    return body(value_.data() + first * stride, stride);
  }
  auto& space = ThreadSpace<T, WeightRows>::of_this_thread();
  space.reserve(count * value_.cols());
  T* const rows = space.take(count * value_.cols());
  reader_->read(first, count, rows);
  body(rows, value_.cols());
}

template <class T>
void WeightRows<T>::find_scales(float* scales) {  // NOLINT(readability-non-const-parameter)
  scales_ = scales;
  if (code_of(storage_) != Code::kFp8) return;
  parallel_for((value_.rows() + kTile - 1) / kTile, [&](Index i) {
    const Index height = std::min(kTile, value_.rows() - i * kTile);
    read(i * kTile, height, [&](const T* rows, Index stride) {
      for (Index j = 0; j < tiles_across(); ++j) {
        const Index width = std::min(kTile, value_.cols() - j * kTile);
        scales[i * tiles_across() + j] = e4m3_tile_scale(rows + j * kTile, stride, height, width);
      }
    });
  });
}

template <class T>
void WeightRows<T>::round_block(const T* from, Index row, Index b, CodedBlock& to) const {
  const Code code = code_of(storage_).value_or(Code::kInt8);
  const Index begin = b * block_length(code);
  const Index count = std::min(block_length(code), value_.cols() - begin);
  float numbers[kMostBlock] = {};  // Or GCC warns at -O3.
  for (Index i = 0; i < count; ++i) numbers[i] = static_cast<float>(from[begin + i]);
  if (code == Code::kFp8) {
    round_to_e4m3(numbers, count, scales_[row / kTile * tiles_across() + b], to);
  } else {
    kernels::round_block(code, numbers, count, to);
  }
  std::fill(to.codes.begin() + count, to.codes.end(), std::uint8_t(0));
}

template <class T>
void WeightRows<T>::round(const T* from, Index row, Index begin, Index count, T* to) const {
  const std::optional<Code> code = code_of(storage_);
  if (!code) {
    for (Index p = 0; p < count; ++p) {
      to[p] = static_cast<T>(static_cast<float>(BFloat16(static_cast<float>(from[begin + p]))));
    }
    return;
  }
  const Index length = block_length(*code);
  CodedBlock block;
  for (Index done = 0; done < count; done += length) {
    round_block(from, row, (begin + done) / length, block);
    for (Index i = 0; i < std::min(length, count - done); ++i) {
      const float number = code_value(*code, block.codes[static_cast<std::size_t>(i)]);
      to[done + i] =
          static_cast<T>(block.scale) * static_cast<T>(number) + static_cast<T>(block.minimum);
    }
  }
}

}  // namespace weir::kernels
