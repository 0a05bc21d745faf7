// SPDX-License-Identifier: MIT
/// \file
/// Rows in the form in which products with packed weights read them.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <limits>
#include <type_traits>

#include <weir/core/function_ref.hpp>
#include <weir/core/parallel.hpp>
#include <weir/core/thread_space.hpp>
#include <weir/core/types.hpp>
#include <weir/kernels/bfloat16.hpp>
#include <weir/ops/lanes.hpp>

namespace weir::kernels {

/// What the numbers of a row become.
enum class RowKind : std::uint8_t {
  kExact,
  kBfloat16,
  kInt8,  ///< Blocks of codes with a scale each, see Int8Inputs.
};

/// 32 inputs rounded to scale * codes, codes from -127 to 127, and the sum of the codes.
struct Int8Inputs {
  static constexpr Index kCount = 32;

  std::int8_t codes[kCount];
  float scale;
  std::int32_t sum;
};

/// The scale is max |x| / 127, so that each number is off by at most half of that. Numbers of which
/// one is no number or infinite get the scale NaN.
/// \param count    Up to Int8Inputs::kCount; further inputs are zero.
inline Int8Inputs round_inputs(const float* x, Index count);

/// The form of rows for one weight.
template <class T>
struct RowFormat {
  RowKind kind = RowKind::kExact;
  Index cols = 0;
  Index padded = 0;  ///< `cols`, rounded up to whole steps; zeros fill the row up.

  /// Bytes of a row.
  Index bytes() const {
    constexpr auto kInputs = static_cast<Index>(sizeof(Int8Inputs));
    if (kind == RowKind::kInt8) return padded / Int8Inputs::kCount * kInputs;
    return padded * static_cast<Index>(kind == RowKind::kExact ? sizeof(T) : sizeof(BFloat16));
  }

  /// Writes the numbers [begin, begin + count) of a row, and the zeros behind them if they are the
  /// last. Not for kInt8, which needs whole rows.
  void write_part(const T* from, Index begin, Index count, std::byte* row) const;

  /// Writes a row.
  void write(const T* from, std::byte* row) const;
};

template <class T>
void RowFormat<T>::write_part(const T* from, Index begin, Index count, std::byte* row) const {
  const Index end = begin + count;
  const Index after = end == cols ? padded - cols : 0;
  if (kind == RowKind::kExact) {
    T* const to = reinterpret_cast<T*>(row) + begin;
    std::copy_n(from, count, to);
    std::fill_n(to + count, after, T(0));
    return;
  }
  if constexpr (std::is_same_v<T, float>) {
    auto* const to = reinterpret_cast<BFloat16*>(row) + begin;
    round_to_bfloat16(count, from, to);
    std::fill_n(to + count, after, BFloat16());
  }
}

template <class T>
void RowFormat<T>::write(const T* from, std::byte* row) const {
  if (kind != RowKind::kInt8) return write_part(from, 0, cols, row);
  if constexpr (std::is_same_v<T, float>) {
    for (Index done = 0; done < padded; done += Int8Inputs::kCount) {
      const Int8Inputs inputs =
          round_inputs(from + done, std::min(Int8Inputs::kCount, cols - done));
      std::memcpy(row, &inputs, sizeof inputs);
      row += sizeof inputs;
    }
  }
}

inline Int8Inputs round_inputs(const float* x, Index count) {
  constexpr Index kLane = kLanes<float>;
  constexpr Index kVectors = Int8Inputs::kCount / kLane;
  using Bits = LaneBits<float>;
  typedef std::int8_t Bytes __attribute__((vector_size(sizeof(Bits) / 4)));  // NOLINT
  Lanes<float> values[kVectors];
  Lanes<float> most{};
  Lanes<float> zero{};  // NaN for what is not finite.
  for (Index v = 0; v < kVectors; ++v) {
    const Index left = std::clamp<Index>(count - v * kLane, 0, kLane);
    values[v] = left == 0 ? Lanes<float>{} : load_lanes<float>(x + v * kLane, left);
    most = max_lanes<float>(most, max_lanes<float>(values[v], -values[v]));
    zero += values[v] * 0.0F;
  }
  const auto largest = max_of<float>(most);
  Int8Inputs to = {};
  if (sum_of<float>(zero) != 0.0F) {  // Or unordered.
    to.scale = std::numeric_limits<float>::quiet_NaN();
    return to;
  }
  const float inverse = 127.0F / largest;
  if (!std::isfinite(inverse)) return to;  // All but zero.
  to.scale = largest / 127.0F;
  constexpr float kShift = 12582912.0F;  // 1.5 * 2^23: its last bits take the nearest integer.
  Bits sum{};
  for (Index v = 0; v < kVectors; ++v) {
    const Lanes<float> shifted = values[v] * inverse + kShift;
    const Bits code = __builtin_convertvector(shifted - kShift, Bits);
    sum += code;
    const Bytes bytes = __builtin_convertvector(code, Bytes);
    std::memcpy(to.codes + v * kLane, &bytes, sizeof bytes);
  }
  to.sum = fold_lanes<float>(sum, [](const Bits& a, const Bits& b) -> Bits { return a + b; });
  return to;
}

/// Writes row i, the `format.cols` numbers at `row_of(i)`, to `to + i * format.bytes()`.
template <class T>
void arrange_rows(const RowFormat<T>& format, Index rows, FunctionRef<const T*(Index)> row_of,
                  std::byte* to) {
  parallel_rows(rows, format.cols, [&](Index begin, Index end) {
    for (Index i = begin; i < end; ++i) format.write(row_of(i), to + i * format.bytes());
  });
}

/// The rows of x as `arrange_rows` leaves them, in space of this thread that `User` has for itself.
template <class User, class T>
const std::byte* arranged_rows(const RowFormat<T>& format, MatrixIn<T> x) {
  const Index size = x.rows() * format.bytes();
  auto& space = ThreadSpace<std::byte, User>::of_this_thread();
  space.reserve(size);
  std::byte* const left = space.take(size);
  arrange_rows<T>(
      format, x.rows(), [&](Index i) { return x.data() + i * x.outerStride(); }, left);
  return left;
}

}  // namespace weir::kernels
