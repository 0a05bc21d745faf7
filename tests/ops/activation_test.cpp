// SPDX-License-Identifier: MIT
#include <algorithm>
#include <cmath>
#include <string_view>
#include <vector>

#include <weir/ops/activation.hpp>

#include "support/catch.hpp"
#include "support/gradient.hpp"
#include "support/matrices.hpp"

namespace weir::activation_test {

namespace {

template <class Act, class T>
T value(T z) {
  Act::value(1, &z, &z);
  return z;
}

template <class Act, class T>
T derivative(T z) {
  Act::derivative(1, &z, &z);
  return z;
}

/// One of a user's own.
struct Identity {
  static constexpr std::string_view kName = "identity";
  template <class T>
  static void value(Index count, const T* z, T* a) {
    std::copy_n(z, count, a);
  }
  template <class T>
  static void derivative(Index count, const T*, T* da) {
    std::fill_n(da, count, T(1));
  }
};
static_assert(Activation<Identity>);
static_assert(!Activation<int>);

}  // namespace

TEMPLATE_TEST_CASE("An activation's derivative agrees with finite differences",
                   "[ops][activation][gradient]", Relu, SquaredRelu, Silu, Gelu, GeluTanh) {
  const auto count = GENERATE(as<Index>{}, 1, 7, 8, 9, 29);
  Matrix<double> z = 3.0 * test::random_matrix(1, count, 1);
  Matrix<double> a(1, count);
  const Matrix<double> numeric = test::numeric_gradient(z, [&] {
    TestType::value(count, z.data(), a.data());
    return a.sum();
  });
  Matrix<double> da(1, count);
  TestType::derivative(count, z.data(), da.data());
  CHECK(test::relative_error(da, numeric) <= 1e-8);
}

TEMPLATE_TEST_CASE("An activation in float is that in double, in place as well",
                   "[ops][activation]", Relu, SquaredRelu, Silu, Gelu, GeluTanh) {
  const Matrix<float> z = 4.F * test::random_matrix<float>(1, 301, 2);
  const Matrix<double> z64 = z.cast<double>();
  Matrix<float> out = z;
  Matrix<double> out64(1, 301);
  TestType::value(301, out.data(), out.data());
  TestType::value(301, z64.data(), out64.data());
  CHECK(test::relative_error(out.cast<double>(), out64) <= 1e-6);

  out = z;
  TestType::derivative(301, out.data(), out.data());
  TestType::derivative(301, z64.data(), out64.data());
  CHECK(test::relative_error(out.cast<double>(), out64) <= 1e-6);
}

TEMPLATE_TEST_CASE("An activation is f(0) = 0 and stable far out", "[ops][activation]", Silu, Gelu,
                   GeluTanh, Relu) {
  CHECK(value<TestType>(0.F) == 0.F);
  CHECK(value<TestType>(1e4F) == 1e4F);
  CHECK(std::abs(value<TestType>(-1e4F)) <= 1e-30F);
  CHECK(derivative<TestType>(1e4F) == 1.F);
  CHECK(std::abs(derivative<TestType>(-1e4F)) <= 1e-20F);
  CHECK(value<TestType>(1e4) == 1e4);
  CHECK(std::abs(value<TestType>(-1e4)) <= 1e-30);
  CHECK(derivative<TestType>(1e4) == 1.0);
  CHECK(std::abs(derivative<TestType>(-1e4)) <= 1e-30);
}

TEMPLATE_TEST_CASE("An activation does not hide a NaN", "[ops][activation]", Relu, SquaredRelu,
                   Silu, Gelu, GeluTanh) {
  CHECK(std::isnan(value<TestType>(std::nanf(""))));
  CHECK(std::isnan(derivative<TestType>(std::nanf(""))));
  std::vector<double> z(16, std::nan(""));
  TestType::value(16, z.data(), z.data());
  for (const double a : z) CHECK(std::isnan(a));
}

TEST_CASE("Activations have the values of their definitions", "[ops][activation]") {
  CHECK(value<Relu>(-2.0) == 0.0);
  CHECK(value<Relu>(2.0) == 2.0);
  CHECK(derivative<Relu>(0.0) == 0.0);
  CHECK(derivative<Relu>(1e-300) == 1.0);
  CHECK(value<SquaredRelu>(3.0) == 9.0);
  CHECK(value<SquaredRelu>(-3.0) == 0.0);
  CHECK(derivative<SquaredRelu>(3.0) == 6.0);
  CHECK(value<SquaredRelu>(1e4F) == 1e8F);
  // z / (1 + e^-z) at z = log 3: log 3 / (4/3); its derivative there: 3/4 (1 + log 3 / 4).
  CHECK(value<Silu>(std::log(3.0)) == Approx(0.75 * std::log(3.0)));
  CHECK(derivative<Silu>(std::log(3.0)) == Approx(0.75 * (1 + std::log(3.0) / 4)));
  // Phi(1) = 0.8413447461, the density at 1 is 0.2419707245 (tables of the normal distribution).
  CHECK(value<Gelu>(1.0) == Approx(0.8413447461));
  CHECK(value<Gelu>(-1.0) == Approx(-0.1586552539));
  CHECK(derivative<Gelu>(1.0) == Approx(0.8413447461 + 0.2419707245));
  // The definition with tanh.
  const double u = std::sqrt(2.0 / std::acos(-1.0)) * (-0.7 - 0.044715 * 0.343);
  CHECK(value<GeluTanh>(-0.7) == Approx(-0.35 * (1.0 + std::tanh(u))));
}

TEST_CASE("GeluTanh stays within 5e-4 of Gelu", "[ops][activation]") {
  for (double z = -6.0; z <= 6.0; z += 0.01) {
    CHECK(std::abs(value<GeluTanh>(z) - value<Gelu>(z)) <= 5e-4);
  }
}

TEST_CASE("Activations have names", "[ops][activation]") {
  CHECK(Relu::kName == "relu");
  CHECK(SquaredRelu::kName == "relu2");
  CHECK(Silu::kName == "silu");
  CHECK(Gelu::kName == "gelu");
  CHECK(GeluTanh::kName == "gelu_tanh");
}

}  // namespace weir::activation_test
