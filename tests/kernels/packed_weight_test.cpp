// SPDX-License-Identifier: MIT
#include <array>
#include <type_traits>
#include <vector>

#include <weir/kernels/matmul.hpp>
#include <weir/kernels/packed_product.hpp>
#include <weir/kernels/packed_weight.hpp>

#include "support/catch.hpp"
#include "support/matrices.hpp"
#include "support/threads.hpp"

using namespace weir;
using kernels::PackedWeight;

namespace {

/// Each number rounded to bfloat16.
template <class T>
Matrix<T> rounded(const Matrix<T>& x) {
  return x.unaryExpr([](T v) {
    return static_cast<T>(static_cast<float>(kernels::BFloat16(static_cast<float>(v))));
  });
}

template <class T>
Matrix<T> product(const Matrix<T>& x, const PackedWeight<T>& weight) {
  Matrix<T> out = Matrix<T>::Constant(x.rows(), weight.rows(), T(7));
  const kernels::PackedTo<T> to = {&weight, 0, x.rows(), out.data(), out.cols()};
  kernels::multiply_packed<T>(x, {&to, 1});
  return out;
}

/// What a product in storage `kBfloat16` is up to the rounding of sums: tokens are rounded where
/// the processor multiplies bfloat16 numbers.
template <class T>
Matrix<double> rounded_product(const Matrix<T>& x, const Matrix<T>& weight) {
  using Arithmetic = typename PackedWeight<T>::Rounded;
  const bool tokens_too = !std::is_same_v<typename Arithmetic::Left, T>;
  const Matrix<double> left = (tokens_too ? rounded<T>(x) : x).template cast<double>();
  return left * rounded<T>(weight).template cast<double>().transpose();
}

}  // namespace

TEMPLATE_TEST_CASE("A packed weight comes back as it was", "[kernels][packed]", float, double) {
  using T = TestType;
  const auto rows = GENERATE(as<Index>{}, 1, 31, 64, 130);
  const auto cols = GENERATE(as<Index>{}, 1, 16, 33);
  const test::Threads threads(2);
  const Matrix<T> first = test::random_matrix<T>(rows, cols, 1);
  const Matrix<T> second = test::random_matrix<T>(rows, cols, 2);
  Matrix<T> a, b;

  PackedWeight<T>(first, Storage::kPacked).unpack(a);
  CHECK(a == first);
  PackedWeight<T>(first, second, Storage::kPacked).unpack(a, &b);
  CHECK(a == first);
  CHECK(b == second);
  PackedWeight<T>(first, second, Storage::kBfloat16).unpack(a, &b);
  CHECK(a == rounded<T>(first));
  CHECK(b == rounded<T>(second));
}

TEMPLATE_TEST_CASE("Products with packed weights agree with Eigen's", "[kernels][packed]", float,
                   double) {
  using T = TestType;
  // Across the borders of register blocks, panels and slices, odd depths among them.
  const auto m = GENERATE(as<Index>{}, 0, 1, 2, 3, 7, 9, 100);
  const auto n = GENERATE(as<Index>{}, 1, 64, 193);
  const auto k = GENERATE(as<Index>{}, 1, 2, 31, 2051);
  INFO(m << " x " << n << " x " << k);
  const Matrix<T> x = test::random_matrix<T>(m, k, 1);
  const Matrix<T> w = test::random_matrix<T>(n, k, 2);

  const double tolerance = std::is_same_v<T, float> ? 2e-6 : 1e-14;
  const Matrix<double> exact = x.template cast<double>() * w.template cast<double>().transpose();
  CHECK(test::relative_error(
            product(x, PackedWeight<T>(w, Storage::kPacked)).template cast<double>(), exact) <=
        tolerance);
  CHECK(test::relative_error(
            product(x, PackedWeight<T>(w, Storage::kBfloat16)).template cast<double>(),
            rounded_product(x, w)) <= tolerance);
}

TEST_CASE("Packing a weight changes no bit of a product of many rows", "[kernels][packed]") {
  const Matrix<float> x = test::random_matrix<float>(70, 1100, 1);
  const Matrix<float> w = test::random_matrix<float>(150, 1100, 2);
  Matrix<float> plain(70, 150);
  multiply_nt<float>(x, w, plain);
  CHECK(product(x, PackedWeight<float>(w, Storage::kPacked)) == plain);
}

TEST_CASE("A row of a product with a packed weight does not depend on the others",
          "[kernels][packed]") {
  const auto storage = GENERATE(Storage::kPacked, Storage::kBfloat16);
  const Matrix<float> x = test::random_matrix<float>(600, 90, 1);
  const PackedWeight<float> w(test::random_matrix<float>(200, 90, 2), storage);
  const Matrix<float> all = product(x, w);
  for (const Index rows : {1, 2, 5, 8, 40}) {
    CHECK(product<float>(x.middleRows(77, rows), w) == all.middleRows(77, rows));
  }
}

TEST_CASE("Products with packed weights have the same bits for any number of threads",
          "[kernels][packed][parallel]") {
  const auto storage = GENERATE(Storage::kPacked, Storage::kBfloat16);
  const auto m = GENERATE(as<Index>{}, 1, 2, 3, 4, 700);
  const Matrix<float> x = test::random_matrix<float>(m, 500, 1);
  const PackedWeight<float> w(test::random_matrix<float>(1200, 500, 2), storage);
  const Matrix<float> one = product(x, w);
  for (const int count : {2, 3}) {
    const test::Threads team(count);
    CHECK(product(x, w) == one);
  }
}

TEST_CASE("Groups of rows are multiplied with a weight each", "[kernels][packed]") {
  const Matrix<double> x = test::random_matrix(20, 11, 1);
  const Matrix<double> a = test::random_matrix(37, 11, 2);
  const Matrix<double> b = test::random_matrix(37, 11, 3);
  const PackedWeight<double> packed_a(a, Storage::kPacked);
  const PackedWeight<double> packed_b(b, Storage::kPacked);
  Matrix<double> out = Matrix<double>::Constant(20, 37, 1.0);
  const std::array<kernels::PackedTo<double>, 3> products = {{
      {&packed_a, 0, 6, &out(0, 0), 37},
      {&packed_b, 6, 10, &out(6, 0), 37},
      {&packed_a, 16, 0, &out(16, 0), 37},
  }};
  kernels::multiply_packed<double>(x, products);

  Matrix<double> expected = Matrix<double>::Constant(20, 37, 1.0);
  expected.topRows(6) = x.topRows(6) * a.transpose();
  expected.middleRows(6, 10) = x.middleRows(6, 10) * b.transpose();
  CHECK(test::relative_error(out, expected) <= 1e-15);
}
