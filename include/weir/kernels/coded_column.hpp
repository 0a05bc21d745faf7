// SPDX-License-Identifier: MIT
/// \file
/// Writes and reads the blocks of one output in a panel of codes.
#pragma once

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>

#include <weir/core/types.hpp>
#include <weir/kernels/block_codes.hpp>
#include <weir/kernels/coded_values.hpp>

namespace weir::kernels {

namespace detail {

template <class Number>
void put(const Number& number, std::byte* at) {
  std::memcpy(at, &number, sizeof number);
}

template <class Number>
Number get(const std::byte* at) {
  Number number;
  std::memcpy(static_cast<void*>(&number), at, sizeof number);
  return number;
}

inline void put_half(float value, std::byte* at) {
  put(static_cast<Eigen::half>(value), at);
}

}  // namespace detail

/// Writes a block of the output in column `column` of a panel.
/// \param block    Where the panel's block begins.
/// \param from     All its codes matter.
inline void write_block(CodedLayout layout, const CodedBlock& from, Index column,
                        std::byte* block) {
  constexpr Index kCols = CodedLayout::kCols;
  switch (layout.code) {
    case Code::kInt4:
      detail::put_half(from.minimum, block + 2 * (kCols + column));
      [[fallthrough]];
    case Code::kInt8:
      detail::put_half(from.scale, block + 2 * column);
      break;
    case Code::kMxFp4:
      block[column] = static_cast<std::byte>(
          std::isnan(from.scale) ? 255U : std::bit_cast<std::uint32_t>(from.scale) >> 23U);
      break;
    case Code::kFp8:
      detail::put(from.scale, block + 4 * column);
      break;
  }
  const auto bits = static_cast<int>(code_bits(layout.code));
  for (Index i = 0; i < layout.block(); i += layout.per_word()) {
    std::uint32_t word = 0;
    for (int n = 0; n < static_cast<int>(layout.per_word()); ++n) {
      const std::uint32_t code = from.codes[static_cast<std::size_t>(i + n)];
      word |= code << static_cast<unsigned>(code_shift(bits, n));
    }
    detail::put(word, block + layout.word(i, column));
  }
}

/// The opposite of `write_block`.
inline CodedBlock read_block(CodedLayout layout, Index column, const std::byte* block) {
  constexpr Index kCols = CodedLayout::kCols;
  CodedBlock to;
  switch (layout.code) {
    case Code::kInt4:
      to.minimum = static_cast<float>(detail::get<Eigen::half>(block + 2 * (kCols + column)));
      [[fallthrough]];
    case Code::kInt8:
      to.scale = static_cast<float>(detail::get<Eigen::half>(block + 2 * column));
      break;
    case Code::kMxFp4:
      to.scale = e8m0_value(std::to_integer<std::uint8_t>(block[column]));
      break;
    case Code::kFp8:
      to.scale = detail::get<float>(block + 4 * column);
      break;
  }
  const auto bits = static_cast<int>(code_bits(layout.code));
  const std::uint32_t mask = (1U << static_cast<unsigned>(bits)) - 1U;
  for (Index i = 0; i < layout.block(); i += layout.per_word()) {
    const auto word = detail::get<std::uint32_t>(block + layout.word(i, column));
    for (int n = 0; n < static_cast<int>(layout.per_word()); ++n) {
      to.codes[static_cast<std::size_t>(i + n)] =
          static_cast<std::uint8_t>((word >> static_cast<unsigned>(code_shift(bits, n))) & mask);
    }
  }
  return to;
}

}  // namespace weir::kernels
