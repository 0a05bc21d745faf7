// SPDX-License-Identifier: MIT
/// \file
/// The kinds of numbers that files hold, and their conversion.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <optional>
#include <string_view>
#include <type_traits>

#include <weir/core/types.hpp>
#include <weir/kernels/small_float.hpp>
#include <weir/ops/lanes.hpp>

namespace weir::io {

/// The kinds of numbers of the safetensors format that weir reads.
enum class Dtype { kF64, kF32, kF16, kBF16, kF8E4M3, kF8E5M2, kI64, kI32, kI16, kI8, kU8, kBool };

namespace detail {

struct DtypeInfo {
  std::string_view name;
  std::size_t width;  // Bytes of a number.
  bool is_real;
};

inline constexpr std::array<DtypeInfo, 12> kDtypes = {{{"F64", 8, true},
                                                       {"F32", 4, true},
                                                       {"F16", 2, true},
                                                       {"BF16", 2, true},
                                                       {"F8_E4M3", 1, true},
                                                       {"F8_E5M2", 1, true},
                                                       {"I64", 8, false},
                                                       {"I32", 4, false},
                                                       {"I16", 2, false},
                                                       {"I8", 1, false},
                                                       {"U8", 1, false},
                                                       {"BOOL", 1, false}}};

inline constexpr const DtypeInfo& info(Dtype dtype) {
  return kDtypes[static_cast<std::size_t>(dtype)];
}

}  // namespace detail

/// The name that safetensors files use, such as "BF16".
constexpr std::string_view name_of(Dtype dtype) {
  return detail::info(dtype).name;
}

/// Bytes of one number.
constexpr std::size_t width_of(Dtype dtype) {
  return detail::info(dtype).width;
}

/// Whether it is one of the floating-point kinds.
constexpr bool is_real(Dtype dtype) {
  return detail::info(dtype).is_real;
}

/// The kind of that name; nothing if there is none.
inline std::optional<Dtype> dtype_named(std::string_view name) {
  for (std::size_t i = 0; i < detail::kDtypes.size(); ++i) {
    if (detail::kDtypes[i].name == name) return static_cast<Dtype>(i);
  }
  return std::nullopt;
}

/// The kind that holds a `T` exactly.
template <class T>
constexpr Dtype dtype_of() {
  static_assert(std::is_same_v<T, float> || std::is_same_v<T, double>);
  return std::is_same_v<T, double> ? Dtype::kF64 : Dtype::kF32;
}

namespace detail {

template <class Stored, class T>
void convert_as(const std::byte* from, Index count, T* to) {
  if constexpr (std::is_same_v<Stored, T>) {
    if (count > 0) std::memcpy(to, from, static_cast<std::size_t>(count) * sizeof(T));
  } else {
    for (Index i = 0; i < count; ++i) {
      Stored stored;
      std::memcpy(static_cast<void*>(&stored), from + static_cast<std::size_t>(i) * sizeof stored,
                  sizeof stored);
      to[i] = static_cast<T>(stored);  // NOLINT(bugprone-signed-char-misuse): it is a number
    }
  }
}

/// The bits of a bfloat16 are the upper half of those of a float.
inline void convert_bfloat16(const std::byte* from, Index count, float* to) {
  typedef std::uint32_t Bits __attribute__((vector_size(sizeof(Lanes<float>))));        // NOLINT
  typedef std::uint16_t Halves __attribute__((vector_size(sizeof(Lanes<float>) / 2)));  // NOLINT
  Index i = 0;
  for (; i + kLanes<float> <= count; i += kLanes<float>) {
    Halves halves;
    std::memcpy(&halves, from + 2 * static_cast<std::size_t>(i), sizeof halves);
    const Bits bits = __builtin_convertvector(halves, Bits) << 16U;
    std::memcpy(to + i, &bits, sizeof bits);
  }
  convert_as<Eigen::bfloat16>(from + 2 * static_cast<std::size_t>(i), count - i, to + i);
}

template <class Format, class T>
void convert_float8(const std::byte* from, Index count, T* to) {
  const auto& values = Format::values();
  for (Index i = 0; i < count; ++i) {
    to[i] = static_cast<T>(values[std::to_integer<std::size_t>(from[i])]);
  }
}

}  // namespace detail

/// Converts `count` numbers from the bytes of a file, which need not be aligned. Numbers that T
/// cannot hold are rounded to the nearest.
/// \tparam T  float, double or std::int64_t.
template <class T>
void convert(Dtype dtype, const std::byte* from, Index count, T* to) {
  static_assert(std::endian::native == std::endian::little, "files are little-endian");
  switch (dtype) {
    case Dtype::kF64:
      return detail::convert_as<double>(from, count, to);
    case Dtype::kF32:
      return detail::convert_as<float>(from, count, to);
    case Dtype::kF16:
      return detail::convert_as<Eigen::half>(from, count, to);
    case Dtype::kBF16:
      if constexpr (std::is_same_v<T, float>) return detail::convert_bfloat16(from, count, to);
      return detail::convert_as<Eigen::bfloat16>(from, count, to);
    case Dtype::kF8E4M3:
      return detail::convert_float8<kernels::E4M3>(from, count, to);
    case Dtype::kF8E5M2:
      return detail::convert_float8<kernels::E5M2>(from, count, to);
    case Dtype::kI64:
      return detail::convert_as<std::int64_t>(from, count, to);
    case Dtype::kI32:
      return detail::convert_as<std::int32_t>(from, count, to);
    case Dtype::kI16:
      return detail::convert_as<std::int16_t>(from, count, to);
    case Dtype::kI8:
      return detail::convert_as<std::int8_t>(from, count, to);
    case Dtype::kU8:
    case Dtype::kBool:
      return detail::convert_as<std::uint8_t>(from, count, to);
  }
}

/// Whether `store` writes numbers of this kind.
constexpr bool is_storable(Dtype dtype) {
  return dtype == Dtype::kF64 || dtype == Dtype::kF32 || dtype == Dtype::kF16 ||
         dtype == Dtype::kBF16;
}

/// The opposite of `convert`, for the kinds that `is_storable`; others are left out. Numbers are
/// rounded to the nearest, ties to even.
template <class T>
void store(Dtype dtype, const T* from, Index count, std::byte* to) {
  const auto each = [&](auto kind) {
    using Stored = decltype(kind);
    for (Index i = 0; i < count; ++i) {
      const auto stored = static_cast<Stored>(from[i]);
      std::memcpy(to + static_cast<std::size_t>(i) * sizeof stored, &stored, sizeof stored);
    }
  };
  switch (dtype) {
    // NOLINTNEXTLINE(bugprone-branch-clone): they only look alike before they are instantiated
    case Dtype::kF64:
      return each(double());
    case Dtype::kF32:
      return each(float());
    case Dtype::kF16:
      return each(Eigen::half());
    case Dtype::kBF16:
      return each(Eigen::bfloat16());
    default:
      return;
  }
}

}  // namespace weir::io
