// SPDX-License-Identifier: MIT
// Products with rounded operands.
#include <algorithm>
#include <array>
#include <cmath>
#include <limits>
#include <vector>

#include <weir/core/parameter.hpp>
#include <weir/kernels/matmul.hpp>
#include <weir/kernels/rounded_product.hpp>

#include "support/allocations.hpp"
#include "support/catch.hpp"
#include "support/matrices.hpp"
#include "support/rounded_products.hpp"
#include "support/threads.hpp"

namespace weir::rounded_product_test {

namespace {

/// The three products with a weight.
struct Three {
  Matrix<float> y, dx, dw;
};

Three multiplied(Precision precision, const Matrix<float>& x, const Matrix<float>& w,
                 const Matrix<float>& dy) {
  Parameter<float> weight{w};
  weight.rounded = kernels::rounded_products(precision);
  Three to = {Matrix<float>(x.rows(), w.rows()), Matrix<float>(x.rows(), w.cols()), {}};
  const std::array products = {forward_product<float>(x, weight, to.y),
                               input_gradient_product<float>(dy, weight, to.dx),
                               weight_gradient_product<float>(dy, x, weight)};
  multiply<float>(products);
  to.dw = weight.grad;
  return to;
}

}  // namespace

TEST_CASE("Rounded products are those of the scheme, computed apart", "[kernels][precision]") {
  const Precision precision = GENERATE(Precision::kBfloat16, Precision::kFp8);
  struct Size {
    Index tokens, out, in;
  };
  for (const auto& [tokens, out, in] :
       {Size{1, 1, 1}, Size{1, 70, 130}, Size{3, 5, 1}, Size{5, 129, 64}, Size{17, 200, 300},
        Size{140, 33, 31}, Size{300, 65, 257}, Size{50, 3, 1100}}) {
    INFO("tokens " << tokens << ", out " << out << ", in " << in);
    const Matrix<float> x = test::random_matrix<float>(tokens, in, 1);
    const Matrix<float> w = test::random_matrix<float>(out, in, 2);
    const Matrix<float> dy = 1e-3F * test::random_matrix<float>(tokens, out, 3);
    const Three own = multiplied(precision, x, w, dy);
    const auto real = [](const Matrix<float>& m) { return test::Real(m.cast<double>()); };
    CHECK(test::relative_error(real(own.y), test::forward(precision, real(x), real(w))) < 1e-5);
    CHECK(test::relative_error(real(own.dx), test::input_gradient(precision, real(dy), real(w))) <
          1e-5);
    CHECK(test::relative_error(real(own.dw), test::weight_gradient(precision, real(dy), real(x))) <
          1e-5);
  }
}

TEST_CASE("Rounded products of hard numbers stay within the bounds of their formats",
          "[kernels][precision]") {
  const Precision precision = GENERATE(Precision::kBfloat16, Precision::kFp8);
  const bool fp8 = precision == Precision::kFp8;
  constexpr Index kTokens = 9;
  constexpr Index kIn = 300;
  constexpr Index kOut = 140;
  Matrix<float> x = test::random_matrix<float>(kTokens, kIn, 1);
  Matrix<float> w = test::random_matrix<float>(kOut, kIn, 2);
  x(1, 200) = 1e4F;
  w(5, 7) = -1e4F;
  x.row(2).setZero();
  x.row(3) *= 1e-39F;  // Below the normal range.
  x.row(4).setConstant(0.1F);
  x.row(5) *= 1e30F;
  x.row(6).head(128).setZero();
  x.row(7).setConstant(-448.0F);
  w.bottomRightCorner(12, 44).setZero();
  w.block(128, 0, 12, 128).setConstant(3.3F);
  const Matrix<float> dy = Matrix<float>::Zero(kTokens, kOut);
  const Matrix<float> y = multiplied(precision, x, w, dy).y;

  // Half a unit of the last place, or of the numbers below the normal range of the tile.
  const auto off = [&](const Matrix<float>& m, Index height, double slack) {
    Matrix<double> bound(m.rows(), m.cols());
    for (Index i = 0; i < m.rows(); ++i) {
      for (Index j = 0; j < m.cols(); ++j) {
        const Index row = i / height * height;
        const Index col = j / 128 * 128;
        const double most = m.block(row, col, std::min(height, m.rows() - row),
                                    std::min<Index>(128, m.cols() - col))
                                .cwiseAbs()
                                .maxCoeff();
        const double size = std::abs(static_cast<double>(m(i, j)));
        bound(i, j) = fp8 ? std::max(size / 16.0, slack * most / 448.0 * 0x1p-10) + 0x1p-126
                          : size / 256.0 + 0x1p-126;
      }
    }
    return bound;
  };
  const Matrix<double> dx = off(x, 1, 2.0);  // The scale may be twice as large as needed.
  const Matrix<double> dw = off(w, 128, 1.0);
  const Matrix<double> exact = x.cast<double>() * w.cast<double>().transpose();
  int beyond = 0;
  for (Index t = 0; t < kTokens; ++t) {
    for (Index o = 0; o < kOut; ++o) {
      double bound = 0.0;
      double sum = 0.0;
      for (Index p = 0; p < kIn; ++p) {
        const double a = std::abs(static_cast<double>(x(t, p)));
        const double b = std::abs(static_cast<double>(w(o, p)));
        bound += a * dw(o, p) + b * dx(t, p) + dx(t, p) * dw(o, p);
        sum += a * b;
      }
      bound += 1e-5 * sum + 0x1p-120;  // Sums are floats.
      // Written so that a NaN counts.
      beyond += std::abs(y(t, o) - exact(t, o)) <= bound ? 0 : 1;
    }
  }
  CHECK(beyond == 0);
  CHECK(y.row(2).isZero(0.0F));
}

TEST_CASE("Finite numbers of any size give no NaN in FP8", "[kernels][precision]") {
  constexpr float kMost = std::numeric_limits<float>::max();
  for (const float size : {kMost, 1e30F, 1e-30F, 1e-45F}) {
    Matrix<float> x = Matrix<float>::Constant(3, 130, size);
    Matrix<float> w = Matrix<float>::Zero(4, 130);
    w.row(1).setConstant(size);
    w(2, 1) = -size;
    const Matrix<float> dy = Matrix<float>::Constant(3, 4, size);
    const Three own = multiplied(Precision::kFp8, x, w, dy);
    for (const Matrix<float>* m : {&own.y, &own.dx, &own.dw}) CHECK_FALSE(m->hasNaN());
    CHECK(own.y.col(0).isZero(0.0F));
  }
}

TEST_CASE("A NaN or an infinity makes what it touches NaN", "[kernels][precision]") {
  const Precision precision = GENERATE(Precision::kBfloat16, Precision::kFp8);
  for (const float bad : {std::numeric_limits<float>::quiet_NaN(), HUGE_VALF}) {
    Matrix<float> x = Matrix<float>::Ones(3, 200);
    x(1, 150) = bad;
    const Matrix<float> w = Matrix<float>::Ones(4, 200);
    const Three own = multiplied(precision, x, w, Matrix<float>::Ones(3, 4));
    CHECK_FALSE(own.y.row(1).allFinite());
    CHECK(own.y.row(0).allFinite());
    CHECK(own.y.row(2).allFinite());
    CHECK(own.dx.allFinite());
    CHECK_FALSE(own.dw.col(150).allFinite());
    CHECK(own.dw.leftCols(150).allFinite());
  }
}

TEST_CASE("Rounded products have the same bits for any number of threads and any batch",
          "[kernels][precision]") {
  const Precision precision = GENERATE(Precision::kBfloat16, Precision::kFp8);
  const Matrix<float> x = test::random_matrix<float>(150, 270, 1);
  const Matrix<float> w = test::random_matrix<float>(210, 270, 2);
  const Matrix<float> dy = test::random_matrix<float>(150, 210, 3);
  const Three one = multiplied(precision, x, w, dy);
  for (const int threads : {2, 3}) {
    const test::Threads more(threads);
    const Three many = multiplied(precision, x, w, dy);
    CHECK(many.y == one.y);
    CHECK(many.dx == one.dx);
    CHECK(many.dw == one.dw);
  }
  for (const Index rows : {1, 2, 3, 5, 20}) {
    const Three few = multiplied(precision, x.middleRows(7, rows), w, dy.middleRows(7, rows));
    CHECK(few.y == one.y.middleRows(7, rows));
    CHECK(few.dx == one.dx.middleRows(7, rows));
  }
}

TEST_CASE("Rounded products add to gradients, and take no tokens", "[kernels][precision]") {
  const Precision precision = GENERATE(Precision::kBfloat16, Precision::kFp8);
  Parameter<float> weight{test::random_matrix<float>(70, 40, 1)};
  weight.rounded = kernels::rounded_products(precision);
  const Matrix<float> x = test::random_matrix<float>(20, 40, 2);
  const Matrix<float> dy = test::random_matrix<float>(20, 70, 3);
  multiply<float>(weight_gradient_product<float>(dy, x, weight));
  const Matrix<float> once = weight.grad;
  multiply<float>(weight_gradient_product<float>(dy, x, weight));
  CHECK(test::relative_error(weight.grad, 2.0F * once) < 1e-6);
  const Matrix<float> twice = weight.grad;
  multiply<float>(
      weight_gradient_product<float>(Matrix<float>(0, 70), Matrix<float>(0, 40), weight));
  CHECK(weight.grad == twice);
  Matrix<float> none(0, 70);
  multiply<float>(forward_product<float>(Matrix<float>(0, 40), weight, none));

  Parameter<float> empty{Matrix<float>(5, 0)};
  empty.rounded = kernels::rounded_products(precision);
  Matrix<float> y = Matrix<float>::Ones(3, 5);
  multiply<float>(forward_product<float>(Matrix<float>(3, 0), empty, y));
  CHECK(y.isZero(0.0F));
}

TEST_CASE("Products of several precisions go in one call", "[kernels][precision]") {
  const Matrix<float> x = test::random_matrix<float>(6, 50, 1);
  std::vector<Parameter<float>> weights;
  for (std::size_t i = 0; i < 6; ++i) {
    weights.push_back({test::random_matrix<float>(20, 50, 10 + i)});
    weights.back().rounded = kernels::rounded_products(static_cast<Precision>(i * i % 3));
  }
  std::vector<Matrix<float>> y(6, Matrix<float>(6, 20));
  std::vector<Product<float>> products;
  for (std::size_t i = 0; i < 6; ++i) {
    products.push_back(forward_product<float>(x, weights[i], y[i]));
  }
  multiply<float>(products);
  for (std::size_t i = 0; i < 6; ++i) {
    Matrix<float> alone(6, 20);
    multiply<float>(forward_product<float>(x, weights[i], alone));
    CHECK(y[i] == alone);
  }
}

TEST_CASE("Rounded products allocate nothing once warm", "[kernels][precision]") {
  const Precision precision = GENERATE(Precision::kBfloat16, Precision::kFp8);
  Parameter<float> weight{test::random_matrix<float>(70, 140, 1)};
  weight.rounded = kernels::rounded_products(precision);
  const Matrix<float> x = test::random_matrix<float>(20, 140, 2);
  Matrix<float> y(20, 70);
  const auto run = [&] {
    multiply<float>(forward_product<float>(x, weight, y));
    multiply<float>(weight_gradient_product<float>(y, x, weight));
  };
  run();
  CHECK(test::count_allocations(run) == 0);
}

}  // namespace weir::rounded_product_test
