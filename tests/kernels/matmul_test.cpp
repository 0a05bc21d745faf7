// SPDX-License-Identifier: MIT
#include <array>
#include <vector>

#include <weir/kernels/matmul.hpp>

#include "support/catch.hpp"
#include "support/matrices.hpp"
#include "support/threads.hpp"

namespace weir::matmul_test {

namespace {

template <class T>
double tolerance() {
  return std::is_same_v<T, float> ? 2e-5 : 1e-13;
}

}  // namespace

TEMPLATE_TEST_CASE("Products agree with Eigen's in every transposition", "[kernels][matmul]", float,
                   double) {
  using T = TestType;
  // Across the borders of register blocks, tiles and depth blocks.
  const auto m = GENERATE(as<Index>{}, 0, 1, 4, 5, 13, 200);
  const auto n = GENERATE(as<Index>{}, 0, 1, 7, 65, 130);
  const auto k = GENERATE(as<Index>{}, 0, 1, 9, 257, 1030);
  const Matrix<T> a = test::random_matrix<T>(m, k, 1);
  const Matrix<T> b = test::random_matrix<T>(n, k, 2);
  const Matrix<T> start = test::random_matrix<T>(m, n, 3);
  const Matrix<T> a_t = a.transpose();
  const Matrix<T> b_t = b.transpose();
  Matrix<T> product = Matrix<T>::Zero(m, n);
  if (k > 0) product.noalias() += a * b_t;

  for (const bool accumulate : {false, true}) {
    INFO(m << " x " << n << " x " << k << (accumulate ? ", accumulated" : ""));
    const Matrix<T> expected = accumulate ? Matrix<T>(start + product) : product;
    Matrix<T> out = start;
    multiply_nt<T>(a, b, out, accumulate);
    CHECK(test::relative_error(out, expected) <= tolerance<T>());
    out = start;
    multiply_nn<T>(a, b_t, out, accumulate);
    CHECK(test::relative_error(out, expected) <= tolerance<T>());
    out = start;
    multiply_tn<T>(a_t, b_t, out, accumulate);
    CHECK(test::relative_error(out, expected) <= tolerance<T>());
  }
}

TEST_CASE("A product of large tiles agrees with Eigen's", "[kernels][matmul]") {
  const Matrix<float> a = test::random_matrix<float>(401, 520, 1);
  const Matrix<float> b = test::random_matrix<float>(1030, 520, 2);
  Matrix<float> out(401, 1030);
  multiply_nt<float>(a, b, out);
  CHECK(test::relative_error(out, a * b.transpose()) <= 2e-5);
}

TEST_CASE("Products read and write blocks of larger matrices", "[kernels][matmul]") {
  const Matrix<double> a = test::random_matrix(20, 40, 1);
  const Matrix<double> b = test::random_matrix(30, 50, 2);
  Matrix<double> out = Matrix<double>::Constant(30, 40, 7.0);
  multiply_nt<double>(a.block(2, 3, 9, 17), b.block(1, 5, 11, 17), out.block(4, 6, 9, 11));

  Matrix<double> expected = Matrix<double>::Constant(30, 40, 7.0);
  expected.block(4, 6, 9, 11) = a.block(2, 3, 9, 17) * b.block(1, 5, 11, 17).transpose();
  CHECK(test::relative_error(out, expected) <= 1e-14);

  multiply_tn<double>(a.block(2, 3, 17, 9), b.block(1, 5, 17, 11), out.block(4, 6, 9, 11));
  expected.block(4, 6, 9, 11) = a.block(2, 3, 17, 9).transpose() * b.block(1, 5, 17, 11);
  CHECK(test::relative_error(out, expected) <= 1e-14);
}

TEST_CASE("Many products at once give the bits of each by itself", "[kernels][matmul]") {
  const std::array<Index, 5> rows = {150, 0, 3, 260, 31};
  std::vector<Matrix<float>> a, b, together, alone;
  for (std::size_t i = 0; i < rows.size(); ++i) {
    a.push_back(test::random_matrix<float>(rows[i], 70, 2 * i));
    b.push_back(test::random_matrix<float>(90, 70, 2 * i + 1));
    together.push_back(Matrix<float>::Zero(rows[i], 90));
    alone.push_back(together.back());
  }
  std::vector<Product<float>> products;
  for (std::size_t i = 0; i < rows.size(); ++i) {
    products.push_back(product_nt<float>(a[i], b[i], together[i]));
    multiply_nt<float>(a[i], b[i], alone[i]);
  }
  multiply<float>(products);
  for (std::size_t i = 0; i < rows.size(); ++i) CHECK(together[i] == alone[i]);
}

TEST_CASE("Products have the same bits for any number of threads", "[kernels][matmul][parallel]") {
  const auto m = GENERATE(as<Index>{}, 1, 4, 500, 1100);
  const Matrix<float> a = test::random_matrix<float>(m, 600, 1);
  const Matrix<float> b = test::random_matrix<float>(700, 600, 2);
  const Matrix<float> a_t = a.transpose();
  const Matrix<float> b_t = b.transpose();
  Matrix<float> one(m, 700);
  multiply_nt<float>(a, b, one);
  Matrix<float> sum = one;
  multiply_tn<float>(a_t, b_t, sum, true);
  for (const int count : {2, 3}) {
    const test::Threads team(count);
    Matrix<float> many(m, 700);
    multiply_nt<float>(a, b, many);
    CHECK(many == one);
    multiply_tn<float>(a_t, b_t, many, true);
    CHECK(many == sum);
  }
}

TEST_CASE("A row of a product does not depend on the other rows of a tall matrix",
          "[kernels][matmul]") {
  const Matrix<float> a = test::random_matrix<float>(300, 100, 1);
  const Matrix<float> b = test::random_matrix<float>(80, 100, 2);
  Matrix<float> all(300, 80);
  Matrix<float> some(7, 80);
  multiply_nt<float>(a, b, all);
  multiply_nt<float>(a.middleRows(50, 7), b, some);
  CHECK(some == all.middleRows(50, 7));
}

TEMPLATE_TEST_CASE("A row of a product has the same bits alone and among any others",
                   "[kernels][matmul][invariance]", float, double) {
  using T = TestType;
  const auto n = GENERATE(as<Index>{}, 1, 8, 64, 131);
  const auto k = GENERATE(as<Index>{}, 1, 50, 64, 600);
  const Matrix<T> a = test::random_matrix<T>(13, k, 1);
  const Matrix<T> b = test::random_matrix<T>(n, k, 2);
  const Matrix<T> b_t = b.transpose();
  const Matrix<T> start = test::random_matrix<T>(13, n, 3);
  for (const bool accumulate : {false, true}) {
    Matrix<T> all = start;
    multiply_nt<T>(a, b, all, accumulate);
    for (const Index rows : {1, 2, 3, 4, 5, 7}) {
      INFO(rows << " of 13 x " << n << " x " << k << (accumulate ? ", accumulated" : ""));
      Matrix<T> some = start.middleRows(4, rows);
      multiply_nt<T>(a.middleRows(4, rows), b, some, accumulate);
      CHECK(some == all.middleRows(4, rows));
      some = start.middleRows(4, rows);
      multiply_nn<T>(a.middleRows(4, rows), b_t, some, accumulate);
      CHECK(some == all.middleRows(4, rows));
    }
  }
}

TEST_CASE("Products of shapes that do not fit are refused", "[kernels][matmul]") {
  const Matrix<float> a = Matrix<float>::Zero(2, 3);
  const Matrix<float> b = Matrix<float>::Zero(4, 5);
  Matrix<float> out(2, 4);
  CHECK(test::message_of<ShapeError>([&] { multiply_nt<float>(a, b, out); }) ==
        "multiply_nt: b is [4, 5], expected [4, 3]");
  CHECK(test::message_of<ShapeError>([&] { multiply_nn<float>(a, b, out); }) ==
        "multiply_nn: b is [4, 5], expected [3, 5]");
  CHECK(test::message_of<ShapeError>([&] { multiply_tn<float>(a, b, out); }) ==
        "multiply_tn: b is [4, 5], expected [2, 5]");
  CHECK(test::message_of<ShapeError>([&] { multiply_nt<float>(a, a, out); }) ==
        "multiply_nt: out is [2, 4], expected [2, 2]");
  const Matrix<float> thin = Matrix<float>::Zero(3, 5);
  CHECK(test::message_of<ShapeError>([&] { multiply_nn<float>(a, thin, out); }) ==
        "multiply_nn: out is [2, 4], expected [2, 5]");
  CHECK(test::message_of<ShapeError>([&] { multiply_tn<float>(thin, thin, out); }) ==
        "multiply_tn: out is [2, 4], expected [5, 5]");
}

}  // namespace weir::matmul_test
