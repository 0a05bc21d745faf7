// SPDX-License-Identifier: MIT
#include <algorithm>
#include <cmath>
#include <cstddef>
#include <limits>
#include <vector>

#include <weir/core/enum_names.hpp>
#include <weir/core/types.hpp>
#include <weir/parallel/row_format.hpp>

#include "support/catch.hpp"
#include "support/matrices.hpp"

namespace weir::row_format_test {

namespace {

/// The rows of x after they were written and read.
template <class T>
Matrix<T> sent(RowFormat format, const Matrix<T>& x) {
  std::vector<float> memory(
      static_cast<std::size_t>(x.rows() * row_bytes<T>(format, x.cols())) / sizeof(float) + 1);
  auto* const bytes = reinterpret_cast<std::byte*>(memory.data());
  encode_rows<T>(
      format, x.rows(), x.cols(), [&](Index i) { return &x(i, 0); }, bytes);
  Matrix<T> read(x.rows(), x.cols());
  decode_rows<T>(format, bytes, read);
  return read;
}

}  // namespace

TEST_CASE("A row in full is sent bit for bit", "[parallel]") {
  const Matrix<float> x = test::random_matrix<float>(3, 131, 1);
  CHECK(sent(RowFormat::kFull, x) == x);
  CHECK(sent(RowFormat::kFull, Matrix<float>(0, 5)).rows() == 0);
  CHECK(row_bytes<double>(RowFormat::kFull, 7) == 56);
}

TEST_CASE("A row in bfloat16 is rounded to the nearest", "[parallel]") {
  const Matrix<float> x = test::random_matrix<float>(3, 131, 1);
  const Matrix<float> y = sent(RowFormat::kBfloat16, x);
  for (Index i = 0; i < x.size(); ++i) {
    CHECK(y.data()[i] == static_cast<float>(Eigen::bfloat16(x.data()[i])));
  }
  CHECK(row_bytes<float>(RowFormat::kBfloat16, 131) == 262);
}

TEST_CASE("A row in FP8 has a power of two for each 128 numbers", "[parallel]") {
  Matrix<float> x = test::random_matrix<float>(3, 131, 1);
  x.rightCols(3) *= 1e-3F;  // The second tile, small by itself.
  const Matrix<float> y = sent(RowFormat::kFp8, x);
  for (Index i = 0; i < x.rows(); ++i) {
    for (Index tile = 0; tile < 2; ++tile) {
      const auto of = [&](const Matrix<float>& m) {
        return m.row(i).segment(128 * tile, tile == 0 ? 128 : 3);
      };
      const float largest = of(x).cwiseAbs().maxCoeff();
      const float scale = std::exp2(std::ceil(std::log2(largest / 448.0F)));
      for (Index j = 0; j < of(x).size(); ++j) {
        // Four bits of significand, and at the low end a fixed step of 2^-9.
        const float step = std::max(std::abs(of(x)[j]) / 16.0F, scale / 1024.0F);
        CHECK(std::abs(of(y)[j] - of(x)[j]) <= step);
        const float code = of(y)[j] / scale * 512.0F;
        CHECK(code == std::round(code));
      }
    }
  }
  CHECK(sent(RowFormat::kFp8, y) == y);  // Once rounded, numbers stay.
  CHECK(row_bytes<float>(RowFormat::kFp8, 131) == 2 * 4 + 132);
  x(1, 5) = std::numeric_limits<float>::quiet_NaN();
  CHECK(std::isnan(sent(RowFormat::kFp8, x)(1, 0)));  // Its whole tile.
  CHECK_FALSE(std::isnan(sent(RowFormat::kFp8, x)(0, 0)));
}

TEST_CASE("Formats have names, and those that round are for floats", "[parallel]") {
  CHECK(value_named<RowFormat>(kRowFormatNames, "fp8") == RowFormat::kFp8);
  CHECK_FALSE(value_named<RowFormat>(kRowFormatNames, "fp4").has_value());
  CHECK(test::message_of<ConfigError>([] {
          expect_row_format<double>("Somebody", "format", RowFormat::kBfloat16);
        }) == "Somebody: format = bfloat16, expected full for numbers that are no floats");
}

}  // namespace weir::row_format_test
