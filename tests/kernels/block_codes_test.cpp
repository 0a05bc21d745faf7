// SPDX-License-Identifier: MIT
#include <algorithm>
#include <array>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <limits>
#include <vector>

#include <weir/core/types.hpp>
#include <weir/kernels/arranged_rows.hpp>
#include <weir/kernels/block_codes.hpp>
#include <weir/kernels/coded_block.hpp>
#include <weir/kernels/coded_column.hpp>
#include <weir/kernels/coded_values.hpp>
#include <weir/kernels/dot_block.hpp>
#include <weir/kernels/e4m3_lanes.hpp>

#include "support/catch.hpp"
#include "support/matrices.hpp"

namespace weir::block_codes_test {
using kernels::Code;
using kernels::CodedBlock;
using kernels::CodedLayout;

namespace {

/// The scales of the tiles [height, width] of a matrix.
Matrix<float> tile_scales(const Matrix<float>& x, Index height, Index width,
                          bool power_of_two = false) {
  Matrix<float> scales((x.rows() + height - 1) / height, (x.cols() + width - 1) / width);
  for (Index i = 0; i < scales.rows(); ++i) {
    for (Index j = 0; j < scales.cols(); ++j) {
      scales(i, j) = kernels::e4m3_tile_scale(&x(i * height, j * width), x.cols(),
                                              std::min(height, x.rows() - i * height),
                                              std::min(width, x.cols() - j * width), power_of_two);
    }
  }
  return scales;
}

constexpr Code kCodes[] = {Code::kInt8, Code::kInt4, Code::kMxFp4, Code::kFp8};
constexpr float kNan = std::numeric_limits<float>::quiet_NaN();

std::size_t at(Index i) {
  return static_cast<std::size_t>(i);
}

/// Blocks that are hard to round.
std::vector<std::vector<float>> hard_blocks() {
  const Matrix<float> normal = test::random_matrix<float>(8, 32, 1);
  std::vector<std::vector<float>> blocks;
  const auto add = [&](auto&& number_of) {
    std::vector<float> block;
    for (Index i = 0; i < 32; ++i) block.push_back(number_of(i));
    blocks.push_back(block);
  };
  add([&](Index i) { return normal(0, i); });
  add([&](Index i) { return i == 5 ? 1e4F : normal(1, i); });
  add([&](Index i) { return i == 5 ? -1e4F : normal(2, i); });
  add([&](Index i) { return 1e-3F * normal(3, i); });
  add([&](Index i) { return 1e-6F * normal(4, i); });   // Below the normal range of 16 bits.
  add([&](Index i) { return 1e-39F * normal(5, i); });  // Below that of 32 bits.
  add([&](Index i) { return i < 30 ? 0.0F : normal(6, i); });
  add([&](Index i) { return 3.0F + 0.01F * normal(7, i); });  // Far from zero.
  add([](Index) { return 0.0F; });
  add([](Index) { return -0.1F; });
  add([](Index) { return 1234.5F; });
  add([](Index i) { return i % 2 == 0 ? 7.0F : -7.0F; });
  return blocks;
}

/// The next larger number of 16 bits may be needed for a scale or a minimum.
double half_step(double x) {
  return std::max(std::abs(x) * 0x1p-10, 0x1p-24);
}

/// How far a number may be off.
double bound(Code code, const std::vector<float>& block, double x) {
  const auto [least, most] = std::minmax_element(block.begin(), block.end());
  const double largest = std::max<double>(std::abs(*least), std::abs(*most));
  const double range = static_cast<double>(*most) - *least;
  switch (code) {
    case Code::kInt8:
      return 0.5 * (largest / 127.0 + half_step(largest / 127.0));
    case Code::kInt4: {
      const double scale = (range + half_step(*least)) / 15.0;
      return 0.5 * (scale + half_step(scale)) + 1e-7 * largest;
    }
    case Code::kMxFp4: {
      // At most twice the error that the smaller of two scales gives the whole block.
      const double scale = std::exp2(std::max(std::floor(std::log2(largest)) - 2.0, -126.0));
      return largest == 0.0 ? 0.0 : std::max({scale, 0.34 * std::abs(x), 2.0 * scale});
    }
    case Code::kFp8:
      return std::max(std::abs(x) / 16.0, largest / 448.0 * 0x1p-10) + 0x1p-126;
  }
  return 0.0;
}

CodedBlock rounded(Code code, const std::vector<float>& x) {
  CodedBlock block;
  const auto count = static_cast<Index>(x.size());
  if (code == Code::kFp8) {
    float most = 0.0F;
    for (const float number : x) most = std::max(most, std::abs(number));
    kernels::round_to_e4m3(x.data(), count, kernels::e4m3_scale(most), block);
  } else {
    kernels::round_block(code, x.data(), count, block);
  }
  return block;
}

}  // namespace

TEST_CASE("Blocks are rounded within the bounds of their formats", "[kernels][formats]") {
  for (const Code code : kCodes) {
    for (const auto& x : hard_blocks()) {
      const CodedBlock block = rounded(code, x);
      int beyond = 0;
      for (Index i = 0; i < 32; ++i) {
        const double value = kernels::coded_value(code, block, i);
        // Written so that a NaN counts.
        beyond += std::abs(value - x[at(i)]) <= bound(code, x, x[at(i)]) ? 0 : 1;
      }
      INFO("code " << static_cast<int>(code) << ", block " << x[0] << ' ' << x[1]);
      CHECK(beyond == 0);
    }
  }
}

TEST_CASE("Numbers that a format holds stay as they are", "[kernels][formats]") {
  const auto stays = [](Code code, auto&& number_of) {
    std::vector<float> x;
    for (int i = 0; i < 32; ++i) x.push_back(number_of(i));
    const CodedBlock block = rounded(code, x);
    int wrong = 0;
    for (Index i = 0; i < 32; ++i) {
      const float off = std::abs(kernels::coded_value(code, block, i) - x[at(i)]);
      // Of the numbers themselves; 448 times a scale of 32 bits is rounded.
      wrong += off <= (code == Code::kFp8 ? 1e-7F * std::abs(x[at(i)]) : 0.0F) ? 0 : 1;
    }
    CHECK(wrong == 0);
  };
  // As GGUF's Q8_0 has them: a scale of 16 bits, and a code of 127.
  stays(Code::kInt8,
        [](int i) { return 0x1.554p-7F * static_cast<float>(i == 3 ? -127 : 5 * i - 60); });
  // As its Q4_0 where the codes are not all on one side.
  // At any magnitude that a scale of 16 bits has.
  for (const int power : {-12, -5, 0, 9}) {
    const float scale = std::ldexp(0x1.2p0F, power);
    stays(Code::kInt4, [=](int i) { return scale * static_cast<float>(i % 16 - 8); });
    stays(Code::kInt4, [=](int i) { return scale * static_cast<float>(i % 8 + 3); });
  }
  for (int largest = 1; largest < 8; ++largest) {
    stays(Code::kMxFp4, [=](int i) {
      return 0x1p-9F *
             kernels::E2M1::value(static_cast<std::uint8_t>(i % (largest + 1) + i / 16 * 8));
    });
  }
  stays(Code::kFp8, [](int i) {
    return 0.013F * kernels::E4M3::value(static_cast<std::uint8_t>(i == 7 ? 0x7E : 8 * i));
  });
}

TEST_CASE("Numbers beyond the scales of 16 bits become the largest", "[kernels][formats]") {
  const std::vector<float> x = {3e38F, -3e38F, 1e5F, 0.0F};
  const CodedBlock eight = rounded(Code::kInt8, x);
  CHECK(kernels::coded_value(Code::kInt8, eight, 0) == 127.0F * 65504.0F);
  CHECK(kernels::coded_value(Code::kInt8, eight, 1) == -127.0F * 65504.0F);
  const CodedBlock four = rounded(Code::kInt4, x);
  CHECK(kernels::coded_value(Code::kInt4, four, 0) == 14.0F * 65504.0F);
  CHECK(kernels::coded_value(Code::kInt4, four, 1) == -65504.0F);
  for (const Code code : {Code::kMxFp4, Code::kFp8}) {
    const CodedBlock block = rounded(code, x);
    CHECK(kernels::coded_value(code, block, 0) == Approx(3e38).epsilon(0.15));
    CHECK(kernels::coded_value(code, block, 1) == Approx(-3e38).epsilon(0.15));
  }
}

TEST_CASE("A block with a number that is not finite is NaN", "[kernels][formats]") {
  for (const Code code : kCodes) {
    for (const float bad : {kNan, HUGE_VALF, -HUGE_VALF}) {
      if (code == Code::kFp8 && !std::isnan(bad)) continue;  // Its scale comes from elsewhere.
      std::vector<float> x(32, 1.0F);
      x[9] = bad;
      const CodedBlock block = rounded(code, x);
      CHECK(std::isnan(kernels::coded_value(code, block, 9)));
    }
  }
}

TEST_CASE("E4M3 has a scale for each tile", "[kernels][formats]") {
  Matrix<float> x = test::random_matrix<float>(130, 300, 3);
  x(129, 1) = 1e4F;
  x.block(0, 256, 128, 44).setZero();
  const Matrix<float> weights = tile_scales(x, 128, 128);
  REQUIRE(weights.rows() == 2);
  REQUIRE(weights.cols() == 3);
  CHECK(weights(0, 0) == x.topLeftCorner(128, 128).cwiseAbs().maxCoeff() / 448.0F);
  CHECK(weights(1, 0) == 1e4F / 448.0F);
  CHECK(weights(0, 2) == 1.0F);

  const Matrix<float> activations = tile_scales(x, 1, 128);
  REQUIRE(activations.rows() == 130);
  CHECK(activations(7, 1) == x.row(7).segment(128, 128).cwiseAbs().maxCoeff() / 448.0F);
  CHECK(activations(129, 2) == x.row(129).segment(256, 44).cwiseAbs().maxCoeff() / 448.0F);

  const Matrix<float> powers = tile_scales(x, 1, 128, true);
  int wrong = 0;
  for (Index i = 0; i < powers.size(); ++i) {
    int exponent = 0;
    wrong += std::frexp(powers(i), &exponent) == 0.5F ? 0 : 1;
    wrong += powers(i) >= activations(i) && powers(i) < 2.0F * activations(i) ? 0 : 1;
  }
  CHECK(wrong == 0);
  CHECK(kernels::e4m3_scale(448.0F, true) == 1.0F);
  CHECK(kernels::e4m3_scale(449.0F, true) == 2.0F);
  x(3, 3) = kNan;
  CHECK(std::isnan(tile_scales(x, 128, 128)(0, 0)));
  CHECK_FALSE(std::isnan(tile_scales(x, 128, 128)(0, 1)));
}

TEST_CASE("Products of E4M3 tiles stay within the bound of the format", "[kernels][formats]") {
  // Tokens with a scale for 1 x 128, weights with one for 128 x 128; an outlier in either.
  Matrix<float> x = test::random_matrix<float>(3, 256, 1);
  Matrix<float> w = test::random_matrix<float>(130, 256, 2);
  x(1, 200) = 1e4F;
  w(5, 7) = -1e4F;
  x.row(2).setZero();
  const bool power_of_two = GENERATE(false, true);
  const Matrix<float> of_x = tile_scales(x, 1, 128, power_of_two);
  const Matrix<float> of_w = tile_scales(w, 128, 128, power_of_two);
  const auto rounded = [](const Matrix<float>& m, const Matrix<float>& scales, Index height) {
    Matrix<double> values(m.rows(), m.cols());
    CodedBlock block;
    for (Index i = 0; i < m.rows(); ++i) {
      for (Index j = 0; j < 2; ++j) {
        kernels::round_to_e4m3(&m(i, 128 * j), 128, scales(i / height, j), block);
        for (Index p = 0; p < 128; ++p) {
          values(i, 128 * j + p) = kernels::coded_value(Code::kFp8, block, p);
        }
      }
    }
    return values;
  };
  const Matrix<double> exact = x.cast<double>() * w.cast<double>().transpose();
  const Matrix<double> coded = rounded(x, of_x, 1) * rounded(w, of_w, 128).transpose();
  int beyond = 0;
  for (Index t = 0; t < 3; ++t) {
    for (Index o = 0; o < 130; ++o) {
      double bound = 1e-6;
      for (Index p = 0; p < 256; ++p) {
        // Half a unit of four bits of significand, or of the numbers below the normal range.
        const double dx = std::max(std::abs(x(t, p)) / 16.0, of_x(t, p / 128) * 0x1p-10);
        const double dw = std::max(std::abs(w(o, p)) / 16.0, of_w(o / 128, p / 128) * 0x1p-10);
        bound += std::abs(x(t, p)) * dw + std::abs(w(o, p)) * dx + dx * dw;
      }
      beyond += std::abs(coded(t, o) - exact(t, o)) <= bound ? 0 : 1;
    }
  }
  CHECK(beyond == 0);
}

namespace {

template <class Codes>
void check_panel() {
  constexpr CodedLayout kLayout = {Codes::kCode};
  constexpr Index kCols = CodedLayout::kCols;
  const int codes = 1 << kernels::code_bits(Codes::kCode);
  std::vector<std::byte> panel(at(kLayout.bytes()));
  std::vector<CodedBlock> blocks(at(kCols));
  for (Index column = 0; column < kCols; ++column) {
    CodedBlock& block = blocks[at(column)];
    block.scale = std::ldexp(1.0F, static_cast<int>(column % 20) - 12);
    block.minimum = Codes::kHasMinimum ? -1.5F * block.scale : 0.0F;
    for (Index i = 0; i < kLayout.block(); ++i) {
      block.codes[at(i)] = static_cast<std::uint8_t>((17 * i + 40 * column) % codes);
    }
    kernels::write_block(kLayout, block, column, panel.data());
  }
  std::vector<float> values(at(kLayout.block() * kCols));
  std::vector<float> scales(at(kCols));
  std::vector<float> minima(at(kCols));
  kernels::unpack_codes<Codes>(panel.data(), 1, {values.data(), scales.data(), minima.data(), 0});
  int wrong = 0;
  for (Index column = 0; column < kCols; ++column) {
    const CodedBlock& block = blocks[at(column)];
    const CodedBlock read = kernels::read_block(kLayout, column, panel.data());
    wrong += read.scale == block.scale ? 0 : 1;
    wrong += read.minimum == block.minimum && minima[at(column)] == block.minimum ? 0 : 1;
    for (Index i = 0; i < kLayout.block(); ++i) {
      wrong += read.codes[at(i)] == block.codes[at(i)] ? 0 : 1;
      const float expected = kernels::code_value(Codes::kCode, block.codes[at(i)]);
      if (std::isnan(expected)) continue;
      // Values and scales may share a power of two otherwise.
      const float value = values[at(i * kCols + column)] * scales[at(column)];
      wrong += value == expected * block.scale ? 0 : 1;
    }
  }
  CHECK(wrong == 0);
}

}  // namespace

TEST_CASE("Panels hold every code", "[kernels][formats]") {
  check_panel<kernels::Int8Codes>();
  check_panel<kernels::Int4Codes>();
  check_panel<kernels::MxFp4Codes>();
  check_panel<kernels::Fp8Codes>();
}

TEST_CASE("Scales of 16 and 8 bits are read as they are", "[kernels][formats]") {
  constexpr Index kLane = kLanes<float>;
  int wrong = 0;
  const auto same = [](float a, float b) { return a == b || (std::isnan(a) && std::isnan(b)); };
  std::array<std::byte, 2 * kLane> bytes{};
  for (Index first = 0; first < 65536; first += kLane) {
    for (Index i = 0; i < kLane; ++i) {
      kernels::detail::put(static_cast<std::uint16_t>(first + i), &bytes[at(2 * i)]);
    }
    const Lanes<float> values = kernels::detail::halves_at(bytes.data());
    for (Index i = 0; i < kLane; ++i) {
      const auto half = static_cast<std::uint16_t>(first + i);
      const auto expected = static_cast<float>(Eigen::numext::bit_cast<Eigen::half>(half));
      wrong += same(values[i], expected) ? 0 : 1;
    }
  }
  for (int code = 1; code < 256; ++code) {
    bytes.fill(static_cast<std::byte>(code));
    const float expected = kernels::e8m0_value(static_cast<std::uint8_t>(code));
    wrong += same(kernels::detail::powers_at(bytes.data())[1], expected) ? 0 : 1;
  }
  CHECK(wrong == 0);
}

TEST_CASE("Inputs are rounded to codes with a scale", "[kernels][formats]") {
  for (const auto& x : hard_blocks()) {
    const kernels::Int8Inputs inputs = kernels::round_inputs(x.data(), 32);
    float most = 0.0F;
    for (const float number : x) most = std::max(most, std::abs(number));
    std::int32_t sum = 0;
    int wrong = 0;
    for (Index i = 0; i < 32; ++i) {
      const std::int8_t code = inputs.codes[i];
      sum += code;
      const double off = static_cast<double>(inputs.scale) * code - x[at(i)];
      wrong += std::abs(off) <= 0.50001 * most / 127.0 + 1e-36 && code >= -127 ? 0 : 1;
    }
    CHECK(wrong == 0);
    CHECK(inputs.sum == sum);
  }
  const std::vector<float> few = {3.0F, -1.6F, 0.25F};
  const kernels::Int8Inputs inputs = kernels::round_inputs(few.data(), 3);
  CHECK(inputs.codes[0] == 127);
  CHECK(inputs.codes[1] == -68);
  CHECK(inputs.codes[2] == 11);
  CHECK(std::all_of(inputs.codes + 3, inputs.codes + 32, [](std::int8_t c) { return c == 0; }));
  for (const float bad : {kNan, HUGE_VALF}) {
    const std::vector<float> one = {1.0F, bad};
    CHECK(std::isnan(kernels::round_inputs(one.data(), 2).scale));
  }
}

TEST_CASE("Products of bytes are exact", "[kernels][formats]") {
  constexpr auto kLane = static_cast<int>(kLanes<float>);
  const int offset = kernels::Int8Bytes::kOffset;
  int wrong = 0;
  for (int a = -127; a <= 127; a += 2) {
    for (int lane = 0; lane < kLane; ++lane) {
      kernels::detail::Words x{};
      kernels::detail::Words y{};
      const int b[] = {127, -127, 7 * lane - 50, 3 - a};
      std::int32_t expected = 1000 - lane;
      std::uint32_t left = 0;
      std::uint32_t right = 0;
      for (int i = 0; i < 4; ++i) {
        const int factor = std::clamp(b[i], -127, 127);
        expected += (i == 2 ? -a : a) * factor;
        const int shifted = (i == 2 ? -a : a) + offset;
        left |= (static_cast<std::uint32_t>(shifted) & 0xFFU) << static_cast<unsigned>(8 * i);
        right |= (static_cast<std::uint32_t>(factor) & 0xFFU) << static_cast<unsigned>(8 * i);
        expected += offset * factor;
      }
      x[lane] = static_cast<std::int32_t>(left);
      y[lane] = static_cast<std::int32_t>(right);
      const kernels::detail::Words sum = kernels::detail::Words{} + (1000 - lane);
      wrong += kernels::detail::dot_of_bytes(sum, x, y)[lane] == expected ? 0 : 1;
    }
  }
  CHECK(wrong == 0);
}

}  // namespace weir::block_codes_test
