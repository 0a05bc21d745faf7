// SPDX-License-Identifier: MIT
#include <algorithm>
#include <bit>
#include <cmath>
#include <cstdint>
#include <limits>
#include <vector>

#include <weir/core/types.hpp>
#include <weir/kernels/small_float.hpp>

#include "support/catch.hpp"

namespace weir::small_float_test {
using kernels::E2M1;
using kernels::E4M3;
using kernels::E5M2;

namespace {

constexpr float kInfinity = std::numeric_limits<float>::infinity();

/// IEEE's half precision, with the functions of the smaller kinds.
struct Half {
  static float value(std::uint16_t code) {
    return static_cast<float>(Eigen::numext::bit_cast<Eigen::half>(code));
  }
  static std::uint16_t from(float x) {
    return Eigen::numext::bit_cast<std::uint16_t>(static_cast<Eigen::half>(x));
  }
};

/// Every code from 0 to `largest`, its opposite, and every midpoint between neighbours.
template <class Format, class Code>
void check_codes(int largest, int sign) {
  int wrong = 0;
  const auto check = [&](float x, int expected) {
    wrong += Format::from(x) != static_cast<Code>(expected) ? 1 : 0;
    wrong += Format::from(-x) != static_cast<Code>(expected | sign) ? 1 : 0;
  };
  for (int code = 0; code <= largest; ++code) {
    const float x = Format::value(static_cast<Code>(code));
    check(x, code);
    wrong += Format::value(static_cast<Code>(code | sign)) != -x ? 1 : 0;
    wrong += std::signbit(Format::value(static_cast<Code>(code | sign))) ? 0 : 1;
    if (code == largest) break;
    const float next = Format::value(static_cast<Code>(code + 1));
    wrong += x < next ? 0 : 1;
    const float middle = x + (next - x) / 2.0F;  // Exact: floats have more bits.
    check(middle, code % 2 == 0 ? code : code + 1);
    check(std::nextafter(middle, 0.0F), code);
    check(std::nextafter(middle, kInfinity), code + 1);
  }
  CHECK(wrong == 0);
}

}  // namespace

TEST_CASE("Small floating-point numbers round to the nearest, ties to even", "[kernels][formats]") {
  check_codes<E4M3, std::uint8_t>(0x7E, 0x80);
  check_codes<E5M2, std::uint8_t>(0x7B, 0x80);
  check_codes<E2M1, std::uint8_t>(7, 8);
  check_codes<Half, std::uint16_t>(0x7BFF, 0x8000);
}

TEST_CASE("Small floating-point numbers saturate", "[kernels][formats]") {
  const auto check = [](auto format, int largest) {
    using Format = decltype(format);
    const float most = Format::most();
    for (const float x : {most, std::nextafter(most, kInfinity), 1.3F * most, 1e30F,
                          std::numeric_limits<float>::max(), kInfinity}) {
      CHECK(Format::from(x) == largest);
      CHECK(Format::from(-x) == (largest | Format::kSign));
    }
    const float least = Format::value(1);
    CHECK(Format::from(std::nextafter(least / 2.0F, 1.0F)) == 1);
    CHECK(Format::from(least / 2.0F) == 0);
    CHECK(Format::from(-1e-40F) == Format::kSign);
    CHECK(Format::from(-0.0F) == Format::kSign);
  };
  check(E4M3(), 0x7E);
  check(E5M2(), 0x7B);
  check(E2M1(), 7);
  CHECK(E4M3::most() == 448.0F);
  CHECK(E5M2::most() == 57344.0F);
  CHECK(E2M1::most() == 6.0F);
}

TEST_CASE("Small floating-point numbers know what is no number", "[kernels][formats]") {
  const float nan = std::numeric_limits<float>::quiet_NaN();
  for (const float x : {nan, -nan, std::bit_cast<float>(0x7F800001U)}) {
    CHECK(std::isnan(E4M3::value(E4M3::from(x))));
    CHECK(std::isnan(E5M2::value(E5M2::from(x))));
    CHECK(std::abs(E2M1::value(E2M1::from(x))) == 6.0F);
  }
  const auto count = [](const auto& values, auto&& what) {
    return std::count_if(values.begin(), values.end(), what);
  };
  const auto is_nan = [](float x) { return std::isnan(x); };
  const auto is_infinite = [](float x) { return std::isinf(x); };
  CHECK(count(E4M3::values(), is_nan) == 2);
  CHECK(count(E4M3::values(), is_infinite) == 0);
  CHECK(count(E5M2::values(), is_nan) == 6);
  CHECK(count(E5M2::values(), is_infinite) == 2);
  CHECK(count(E2M1::values(), is_nan) == 0);
}

TEST_CASE("The codes of small floating-point numbers are those of their tables",
          "[kernels][formats][golden]") {
  // OCP Microscaling Formats (MX), version 1.0, table 5.
  const std::vector<float> table = {0.0F, 0.5F, 1.0F, 1.5F, 2.0F, 3.0F, 4.0F, 6.0F};
  for (std::uint8_t code = 0; code < 8; ++code) CHECK(E2M1::value(code) == table[code]);
  CHECK(E4M3::value(0x38) == 1.0F);
  CHECK(E4M3::value(0x01) == 0x1p-9F);
  CHECK(E5M2::value(0x3C) == 1.0F);
  CHECK(E5M2::value(0x01) == 0x1p-16F);
}

TEST_CASE("E8M0 scales are powers of two", "[kernels][formats]") {
  for (int code = 0; code < 255; ++code) {
    CHECK(kernels::e8m0_value(static_cast<std::uint8_t>(code)) == std::ldexp(1.0F, code - 127));
  }
  CHECK(std::isnan(kernels::e8m0_value(255)));
}

}  // namespace weir::small_float_test
