// SPDX-License-Identifier: MIT
/// \file
/// How the rows of tokens are written for the way between ranks.
#pragma once

#include <array>
#include <concepts>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <string_view>
#include <type_traits>

#include <weir/core/error.hpp>
#include <weir/core/parallel.hpp>
#include <weir/core/types.hpp>
#include <weir/kernels/bfloat16.hpp>
#include <weir/kernels/e4m3_lanes.hpp>

namespace weir {

/// What a number of a row becomes on its way from rank to rank.
enum class RowFormat {
  kFull,      ///< Itself, bit for bit.
  kBfloat16,  ///< The nearest number of 16 bits with the range of a float, ties to even.
  kFp8,       ///< E4M3, 1 x 128 of them with a power of two as their scale: what DeepSeek-V3 sends
              ///< to experts (arXiv:2412.19437, section 3.3.3).
};

/// The names of the formats, as programs take them, see `value_named`.
inline constexpr std::array<std::string_view, 3> kRowFormatNames = {"full", "bfloat16", "fp8"};

/// How many bytes a row of `cols` numbers takes on its way:
///
///     kFull      sizeof(T) cols
///     kBfloat16  2 cols
///     kFp8       4 ceil(cols / 128) + 4 ceil(cols / 4):   the scales, and the codes in whole words
template <std::floating_point T>
Index row_bytes(RowFormat format, Index cols) {
  if (format == RowFormat::kFull) return cols * static_cast<Index>(sizeof(T));
  if (format == RowFormat::kBfloat16) return 2 * cols;
  return 4 * ((cols + kernels::kTile - 1) / kernels::kTile) + 4 * ((cols + 3) / 4);
}

/// \throws ConfigError  unless rows of T can be written in `format`: those of doubles only in full.
template <std::floating_point T>
void expect_row_format(std::string_view who, std::string_view name, RowFormat format) {
  if (format == RowFormat::kFull || std::is_same_v<T, float>) return;
  throw_error<ConfigError>(who, ": ", name, " = ",
                           kRowFormatNames[static_cast<std::size_t>(format)],
                           ", expected full for numbers that are no floats");
}

namespace detail {

template <std::floating_point T>
void encode_row(RowFormat format, Index cols, const T* from, std::byte* to) {
  if constexpr (std::is_same_v<T, float>) {
    if (format == RowFormat::kBfloat16) {
      kernels::round_to_bfloat16(cols, from, reinterpret_cast<kernels::BFloat16*>(to));
      return;
    }
    if (format == RowFormat::kFp8) {
      auto* const scales = reinterpret_cast<float*>(to);
      const Index tiles = (cols + kernels::kTile - 1) / kernels::kTile;
      kernels::encode_e4m3_row(cols, from, reinterpret_cast<std::uint8_t*>(scales + tiles), scales);
      return;
    }
  }
  std::memcpy(to, from, static_cast<std::size_t>(cols) * sizeof(T));
}

template <std::floating_point T>
void decode_row(RowFormat format, Index cols, const std::byte* from, T* to) {
  if constexpr (std::is_same_v<T, float>) {
    if (format == RowFormat::kBfloat16) {
      const auto* const halves = reinterpret_cast<const kernels::BFloat16*>(from);
      for (Index j = 0; j < cols; ++j) to[j] = static_cast<float>(halves[j]);
      return;
    }
    if (format == RowFormat::kFp8) {
      const auto* const scales = reinterpret_cast<const float*>(from);
      const Index tiles = (cols + kernels::kTile - 1) / kernels::kTile;
      kernels::decode_e4m3_row(cols, reinterpret_cast<const std::uint8_t*>(scales + tiles), scales,
                               to);
      return;
    }
  }
  std::memcpy(to, from, static_cast<std::size_t>(cols) * sizeof(T));
}

}  // namespace detail

/// Writes `count` rows of `cols` numbers, of which `row(i)` points to the first of row i, to `to`,
/// one behind the other. `to` is aligned as a float is, or as T where that is wider.
template <std::floating_point T, class Row>
void encode_rows(RowFormat format, Index count, Index cols, Row&& row, std::byte* to) {
  const Index bytes = row_bytes<T>(format, cols);
  parallel_rows(count, cols, [&](Index begin, Index end) {
    for (Index i = begin; i < end; ++i) {
      detail::encode_row<T>(format, cols, row(i), to + i * bytes);
    }
  });
}

/// Reads what `encode_rows` wrote to the rows of `to` [count, cols].
template <std::floating_point T>
void decode_rows(RowFormat format, const std::byte* from, MatrixOut<T> to) {
  const Index bytes = row_bytes<T>(format, to.cols());
  parallel_rows(to.rows(), to.cols(), [&](Index begin, Index end) {
    for (Index i = begin; i < end; ++i) {
      detail::decode_row<T>(format, to.cols(), from + i * bytes, &to(i, 0));
    }
  });
}

}  // namespace weir
