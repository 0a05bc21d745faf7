// SPDX-License-Identifier: MIT
#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <limits>
#include <vector>

#include <weir/attention/cache_codes.hpp>
#include <weir/core/cache_storage.hpp>

#include "support/catch.hpp"
#include "support/matrices.hpp"

namespace weir::cache_codes_test {

namespace {

// Numbers as a row of codes with one scale, and read again.
template <class T>
Matrix<T> rounded(CacheStorage storage, const Matrix<T>& x, T* scale_of_row = nullptr) {
  const CodeMatrix<T> codes{storage, CodeMatrix<T>::padded(x.cols())};
  std::vector<std::byte> bytes(static_cast<std::size_t>(x.rows() * codes.row_bytes()));
  Matrix<T> result(x.rows(), x.cols());
  Matrix<T> unpacked(x.rows(), codes.cols);
  std::vector<T> scales;
  for (Index i = 0; i < x.rows(); ++i) {
    scales.push_back(codes.scale_of(x.data() + i * x.cols(), x.cols()));
    codes.put_row(bytes.data(), i, 0, x.data() + i * x.cols(), x.cols(), scales.back());
  }
  codes.unpack(bytes.data(), x.rows(), unpacked.data());
  for (Index i = 0; i < x.rows(); ++i) {
    const T scale = scales[static_cast<std::size_t>(i)];
    for (Index j = 0; j < x.cols(); ++j) {
      result(i, j) = codes.value(bytes.data(), i, j, scale);
      const T again = codes.has_scales() ? scale * unpacked(i, j) : unpacked(i, j);
      const bool same = result(i, j) == again || (std::isnan(again) && std::isnan(result(i, j)));
      CHECK(same);
    }
    if (scale_of_row != nullptr) *scale_of_row = scale;
  }
  return result;
}

}  // namespace

TEST_CASE("Storages of a cache have names", "[attention][cache]") {
  for (const std::string_view name : kCacheStorageNames) {
    REQUIRE(cache_storage_named(name).has_value());
    CHECK(name_of(*cache_storage_named(name)) == name);
  }
  CHECK(!cache_storage_named("int7").has_value());
}

TEMPLATE_TEST_CASE("Numbers of a cache are off by no more than their storage says",
                   "[attention][cache]", float, double) {
  using T = TestType;
  Matrix<T> x = test::random_matrix<T>(6, 37, 1);
  x.row(1) *= T(1e20);
  x.row(2) *= T(1e-20);
  x(3, 5) = T(1e4);  // An outlier.
  x.row(4).setZero();
  x.row(5).setConstant(T(-0.75));
  CHECK(rounded<T>(CacheStorage::kFull, x) == x);
  const Matrix<T> bfloat16 = rounded<T>(CacheStorage::kBfloat16, x);
  CHECK(((bfloat16 - x).array().abs() <= x.array().abs() / T(256)).all());
  CHECK(bfloat16 != x);
  for (const auto& [storage, most] :
       {std::pair(CacheStorage::kInt8, T(127)), std::pair(CacheStorage::kInt6, T(31))}) {
    const Matrix<T> y = rounded<T>(storage, x);
    for (Index i = 0; i < x.rows(); ++i) {
      const T largest = x.row(i).cwiseAbs().maxCoeff();
      const T bound = largest / (2 * most) * T(1.00001);
      CHECK((y.row(i) - x.row(i)).cwiseAbs().maxCoeff() <= bound);
      CHECK(y.row(i).cwiseAbs().maxCoeff() == Approx(static_cast<double>(largest)));
    }
    CHECK(y.row(4).isZero(T(0)));
    CHECK(test::relative_error(y.row(0), x.row(0)) > 1e-3);
  }
}

TEST_CASE("Codes of eight and six bits, worked by hand", "[attention][cache]") {
  // The scale is 2; 1 and 3 are ties, which go to the even codes 0 and 2.
  Matrix<double> x(1, 5);
  x << 254.0, 1.0, 3.0, -5.1, -254.0;
  double scale = 0.0;
  Matrix<double> expected(1, 5);
  expected << 254.0, 0.0, 4.0, -6.0, -254.0;
  CHECK(rounded<double>(CacheStorage::kInt8, x, &scale) == expected);
  CHECK(scale == 2.0);
  x << 62.0, 1.0, 3.0, -5.1, -62.0;
  expected << 62.0, 0.0, 4.0, -6.0, -62.0;
  CHECK(rounded<double>(CacheStorage::kInt6, x, &scale) == expected);
  CHECK(scale == 2.0);
}

TEST_CASE("All codes of six bits are told apart in every place", "[attention][cache]") {
  constexpr Index kCols = 64;
  const CodeMatrix<float> codes{CacheStorage::kInt6, kCols};
  CHECK(codes.row_bytes() == 48);
  std::vector<std::byte> bytes(48);
  Matrix<float> row(1, kCols);
  for (Index shift = 0; shift < 63; ++shift) {
    for (Index i = 0; i < kCols; ++i) row(0, i) = static_cast<float>((i + shift) % 63 - 31);
    // In an order that touches each byte several times.
    for (Index i = 0; i < kCols; ++i) {
      const Index j = i * 37 % kCols;
      codes.put_row(bytes.data(), 0, j, &row(0, j), 1, 1.0F);
    }
    Matrix<float> out(1, kCols);
    codes.unpack(bytes.data(), 1, out.data());
    REQUIRE(out == row);
  }
}

TEMPLATE_TEST_CASE("Finite numbers of any size stay finite, and NaN stays NaN",
                   "[attention][cache]", float, double) {
  using T = TestType;
  constexpr T kMost = std::numeric_limits<T>::max();
  constexpr T kDenormal = std::numeric_limits<T>::denorm_min();
  Matrix<T> x(2, 4);
  x << kMost, -kMost, T(1), T(0),  //
      kDenormal, -kDenormal, T(0), T(0);
  for (const CacheStorage storage : {CacheStorage::kInt8, CacheStorage::kInt6}) {
    const Matrix<T> y = rounded<T>(storage, x);
    CHECK(y.allFinite());
    CHECK(y(0, 0) >= kMost * T(0.999));
    CHECK(y(0, 1) == -y(0, 0));
    CHECK(y.row(1).isZero(T(0)));
    for (const T bad : {std::numeric_limits<T>::quiet_NaN(), std::numeric_limits<T>::infinity()}) {
      Matrix<T> broken = Matrix<T>::Ones(1, 4);
      broken(0, 2) = bad;
      CHECK(rounded<T>(storage, broken).array().isNaN().all());  // They share the scale.
    }
  }
  Matrix<T> broken = Matrix<T>::Ones(1, 4);
  broken(0, 2) = std::numeric_limits<T>::quiet_NaN();
  const Matrix<T> y = rounded<T>(CacheStorage::kBfloat16, broken);
  CHECK(std::isnan(y(0, 2)));
  CHECK(y(0, 1) == T(1));
}

}  // namespace weir::cache_codes_test
