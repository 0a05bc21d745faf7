// SPDX-License-Identifier: MIT
// FP8 numbers in registers, scales of tiles, and matrices that are kept in FP8.
#include <algorithm>
#include <bit>
#include <cmath>
#include <cstdint>
#include <limits>
#include <vector>

#if defined(__SSE2__)
#include <xmmintrin.h>
#endif

#include <weir/core/workspace.hpp>
#include <weir/kernels/bfloat16.hpp>
#include <weir/kernels/e4m3_lanes.hpp>
#include <weir/kernels/e4m3_rows.hpp>
#include <weir/kernels/small_float.hpp>

#include "support/allocations.hpp"
#include "support/catch.hpp"
#include "support/matrices.hpp"
#include "support/rounded_products.hpp"

namespace weir::e4m3_test {

namespace {

constexpr float kNan = std::numeric_limits<float>::quiet_NaN();

/// Every 9973rd float.
template <class Check>
int count_wrong(Check&& right) {
  int wrong = 0;
  for (std::uint64_t bits = 0; bits < (std::uint64_t{1} << 32U);
       bits += 9973 * static_cast<std::uint64_t>(kLanes<float>)) {
    Lanes<float> x{};
    for (int lane = 0; lane < static_cast<int>(kLanes<float>); ++lane) {
      x[lane] = std::bit_cast<float>(
          static_cast<std::uint32_t>(bits + 9973 * static_cast<std::uint64_t>(lane)));
    }
    wrong += right(x);
  }
  return wrong;
}

}  // namespace

TEST_CASE("Numbers in registers become the nearest E4M3 numbers", "[kernels][formats]") {
  CHECK(count_wrong([](const Lanes<float>& x) {
          const Lanes<float> rounded = kernels::nearest_e4m3(x);
          int wrong = 0;
          for (int lane = 0; lane < static_cast<int>(kLanes<float>); ++lane) {
            const float expected = kernels::E4M3::value(kernels::E4M3::from(x[lane]));
            const bool same =
                std::isnan(expected) ? std::isnan(rounded[lane]) : rounded[lane] == expected;
            wrong += same ? 0 : 1;
          }
          return wrong;
        }) == 0);
  for (int code = 0; code < 256; ++code) {
    const float value = kernels::E4M3::value(static_cast<std::uint8_t>(code));
    if (std::isnan(value)) continue;
    CHECK(kernels::nearest_e4m3(Lanes<float>{} + value)[0] == value);
    // All of them are bfloat16 numbers.
    CHECK(static_cast<float>(kernels::BFloat16(value)) == value);
  }
}

TEST_CASE("Numbers in registers become the nearest bfloat16 numbers", "[kernels][formats]") {
  CHECK(count_wrong([](const Lanes<float>& x) {
          const Lanes<float> rounded = kernels::nearest_bfloat16(x);
          int wrong = 0;
          for (int lane = 0; lane < static_cast<int>(kLanes<float>); ++lane) {
            const auto expected = static_cast<float>(kernels::BFloat16(x[lane]));
            const bool same =
                std::isnan(expected) ? std::isnan(rounded[lane]) : rounded[lane] == expected;
            wrong += same ? 0 : 1;
          }
          return wrong;
        }) == 0);
}

TEST_CASE("Scales in registers are those of single tiles", "[kernels][formats]") {
  const std::vector<float> sizes = {0.0F, 1e-45F, 1e-38F, 1e-3F, 447.0F, 448.0F, 449.0F, 1e38F};
  for (const bool power_of_two : {false, true}) {
    for (const float size : sizes) {
      const Lanes<float> x = Lanes<float>{} - size;
      const auto most = kernels::larger_magnitude(LaneBits<float>{}, x);
      const float scale = kernels::e4m3_scale(size, power_of_two);
      CHECK(kernels::e4m3_scales(most, power_of_two)[0] == scale);
      CHECK(size / scale <= 448.0F);
      if (!power_of_two) continue;
      int exponent = 0;
      CHECK(std::frexp(scale, &exponent) == 0.5F);
    }
    for (const float bad : {kNan, HUGE_VALF, -HUGE_VALF}) {
      const auto most = kernels::larger_magnitude(LaneBits<float>{}, Lanes<float>{} + bad);
      CHECK(std::isnan(kernels::e4m3_scales(most, power_of_two)[0]));
      const float tile[] = {1.0F, bad, 2.0F};
      CHECK(std::isnan(kernels::e4m3_tile_scale(tile, 0, 1, 3, power_of_two)));
    }
  }
}

TEST_CASE("A matrix kept in FP8 comes back rounded, and once rounded as it was",
          "[kernels][formats]") {
  Workspace workspace;
  Workspace::Frame frame(workspace);
  kernels::E4M3Rows<float> rows;
  CHECK_FALSE(rows.any());
  for (const Index cols : {1, 31, 128, 300}) {
    Matrix<float> x = test::random_matrix<float>(7, cols, 1);
    x.row(1) *= 1e-39F;
    x.row(2).setZero();
    x.row(3) *= 1e30F;
    x(4, cols / 2) = 1e4F;
    rows.set(x);
    REQUIRE(rows.any());
    const Matrix<float> once = rows.restored(frame);
    CHECK(once.cast<double>() == test::in_fp8(x.cast<double>(), 1, 128, true));
    rows.set(once);
    CHECK(rows.restored(frame) == once);
  }
  Matrix<float> bad = Matrix<float>::Ones(2, 200);
  bad(1, 150) = kNan;
  rows.set(bad);
  const Matrix<float> back = rows.restored(frame);
  CHECK(back.row(0) == bad.row(0));
  CHECK(back.row(1).head(128) == bad.row(1).head(128));
  CHECK(back.row(1).tail(72).array().isNaN().all());
  rows.set(Matrix<float>(0, 5));
  CHECK(rows.restored(frame).rows() == 0);
  rows.set(bad, false);
  CHECK_FALSE(rows.any());
}

TEST_CASE("Codes of FP8 numbers are theirs, one by one", "[kernels][formats]") {
  for (int code = 0; code < 256; ++code) {
    const auto bits = static_cast<std::uint8_t>(code);
    const float value = kernels::E4M3::value(bits);
    const Lanes<float> number = kernels::e4m3_numbers_of(kernels::E4M3Codes{} + bits);
    Lanes<float> values{};
    for (int lane = 0; lane < static_cast<int>(kLanes<float>); ++lane) values[lane] = value;
    const auto back = kernels::e4m3_codes_of(values);
    INFO("code " << code);
    for (int lane = 0; lane < static_cast<int>(kLanes<float>); ++lane) {
      CHECK((std::isnan(value) ? std::isnan(number[lane]) : number[lane] == value));
      CHECK((back[lane] & 0x7F) == (code & 0x7F));
      if (!std::isnan(value)) CHECK(back[lane] == bits);
    }
  }
}

#if defined(__SSE2__)
TEST_CASE("A matrix kept in FP8 is the same where small floats count as zero",
          "[kernels][formats]") {
  constexpr unsigned kFlush = 0x8040;  // Results and inputs below the normal range become zero.
  Workspace workspace;
  Workspace::Frame frame(workspace);
  Matrix<float> x = test::random_matrix<float>(3, 300, 1);
  for (Index j = 0; j < x.cols(); ++j) x(1, j) *= std::ldexp(1.0F, -static_cast<int>(j % 20));
  kernels::E4M3Rows<float> rows;
  rows.set(x);
  const Matrix<float> expected = rows.restored(frame);
  const unsigned before = _mm_getcsr();
  _mm_setcsr(before | kFlush);
  rows.set(x);
  const Matrix<float> flushed = rows.restored(frame);
  _mm_setcsr(before);
  CHECK(flushed == expected);
  CHECK((expected.array() != 0.0F && expected.array().abs() < 0x1p-6F).any());
}
#endif

TEST_CASE("A matrix kept in FP8 takes a quarter of the memory", "[kernels][formats]") {
  if (test::bytes_in_use() == 0) return;
  const Matrix<float> x = test::random_matrix<float>(200, 1024, 1);
  const long before = test::bytes_in_use();
  kernels::E4M3Rows<float> rows;
  rows.set(x);
  CHECK(test::bytes_in_use() - before < 200L * 1024 * 11 / 10);
  CHECK(test::count_allocations([&] { rows.set(x); }) == 0);
}

}  // namespace weir::e4m3_test
