// SPDX-License-Identifier: MIT
#include <cmath>
#include <limits>
#include <vector>

#include <weir/core/index_span.hpp>
#include <weir/ops/logsumexp.hpp>

#include "support/catch.hpp"
#include "support/matrices.hpp"

namespace weir::logsumexp_test {

namespace {

template <class T>
T of(const std::vector<T>& values) {
  return logsumexp<T>(values);
}

}  // namespace

TEST_CASE("logsumexp is the logarithm of the sum of exponentials", "[ops][logsumexp]") {
  const auto count = GENERATE(as<Index>{}, 1, 2, 8, 9, 33);
  const Matrix<double> x = test::random_matrix(1, count, 1);
  CHECK(logsumexp<double>(row_span(x, 0)) == Approx(std::log(x.array().exp().sum())));
  const Matrix<float> narrow = x.cast<float>();
  CHECK(logsumexp<float>(row_span(narrow, 0)) ==
        Approx(std::log(x.array().exp().sum())).epsilon(1e-5));
}

TEST_CASE("logsumexp matches values worked out by hand", "[ops][logsumexp]") {
  CHECK(of<double>({0.0, 0.0}) == Approx(std::log(2.0)));
  CHECK(of<double>({std::log(1.0), std::log(2.0), std::log(5.0)}) == Approx(std::log(8.0)));
  CHECK(of<double>({-2.5}) == -2.5);
}

TEMPLATE_TEST_CASE("logsumexp neither overflows nor underflows", "[ops][logsumexp]", float,
                   double) {
  using T = TestType;
  const T infinity = std::numeric_limits<T>::infinity();
  CHECK(of<T>({T(1e4), T(1e4)}) == Approx(1e4 + std::log(2.0)));
  CHECK(of<T>({T(-1e4), T(-1e4)}) == Approx(-1e4 + std::log(2.0)));
  CHECK(of<T>({-infinity, T(3), -infinity}) == T(3));
  CHECK(of<T>({}) == -infinity);
  CHECK(of<T>({-infinity, -infinity}) == -infinity);
}

TEST_CASE("logsumexp does not hide a NaN", "[ops][logsumexp]") {
  const float nan = std::nanf("");
  CHECK(std::isnan(of<float>({nan})));
  CHECK(std::isnan(of<float>({1.F, nan})));
  CHECK(std::isnan(of<float>({nan, 1.F})));
  CHECK(std::isnan(of<float>({-HUGE_VALF, nan})));
  std::vector<float> many(40, 1.F);
  many[7] = nan;
  CHECK(std::isnan(of(many)));
}

}  // namespace weir::logsumexp_test
