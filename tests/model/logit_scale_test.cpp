// SPDX-License-Identifier: MIT
#include <cmath>
#include <limits>

#include <weir/model/logit_scale.hpp>

#include "support/catch.hpp"
#include "support/gradient.hpp"

namespace weir::logit_scale_test {

namespace {

template <class T>
Matrix<T> scaled(const LogitScale<T>& scale, const Matrix<T>& z) {
  Matrix<T> logits(z.rows(), z.cols());
  scale.forward(z, logits);
  return logits;
}

}  // namespace

TEST_CASE("LogitScale multiplies, and caps smoothly", "[model][logit_scale]") {
  Matrix<double> z(1, 4);
  z << 0.0, 1.0, -30.0, 1e6;
  CHECK(scaled<double>({.multiplier = 0.5}, z) == 0.5 * z);
  const Matrix<double> capped = scaled<double>({.multiplier = 2.0, .softcap = 30.0}, z);
  CHECK(capped(0, 0) == 0.0);
  CHECK(capped(0, 1) == Approx(30.0 * std::tanh(2.0 / 30.0)).epsilon(1e-14));
  CHECK(capped(0, 2) == Approx(30.0 * std::tanh(-2.0)).epsilon(1e-14));
  CHECK(capped(0, 3) == 30.0);
  CHECK(scaled<double>({.softcap = 0.05}, z)(0, 1) ==
        Approx(0.05 * std::tanh(20.0)).epsilon(1e-14));
  CHECK(LogitScale<double>{}.is_identity());
  CHECK_FALSE(LogitScale<double>{.softcap = 1.0}.is_identity());
  CHECK_FALSE(LogitScale<double>{.multiplier = 2.0}.is_identity());
}

TEST_CASE("LogitScale keeps the order of logits and their sign", "[model][logit_scale]") {
  const Matrix<float> z = test::random_matrix<float>(5, 67, 1);
  const Matrix<float> logits = scaled<float>({.multiplier = 3.0, .softcap = 2.0}, z);
  for (Index t = 0; t < z.rows(); ++t) {
    Index best = 0, capped_best = 0;
    z.row(t).maxCoeff(&best);
    logits.row(t).maxCoeff(&capped_best);
    CHECK(capped_best == best);
  }
  CHECK(logits.cwiseAbs().maxCoeff() <= 2.0F);
  CHECK((logits.array() * z.array() > 0.0F).all());
}

TEST_CASE("LogitScale's gradient agrees with finite differences",
          "[model][logit_scale][gradient]") {
  const auto scale =
      GENERATE(LogitScale<double>{.multiplier = 0.6}, LogitScale<double>{.softcap = 1.5},
               LogitScale<double>{.multiplier = 0.6, .softcap = 1.5},
               LogitScale<double>{.multiplier = 0.05, .softcap = 0.08});
  Matrix<double> z = test::random_matrix(3, 21, 2);
  const Matrix<double> weight = test::random_matrix(3, 21, 3);
  const auto objective = [&] { return scaled(scale, z).cwiseProduct(weight).sum(); };
  Matrix<double> dz = weight;
  scale.backward(scaled(scale, z), dz, dz);  // In place.
  CHECK(test::relative_error(dz, test::numeric_gradient(z, objective)) <= 1e-8);
}

TEST_CASE("LogitScale works in place, on nothing, and hands on NaN", "[model][logit_scale]") {
  const LogitScale<double> scale{.softcap = 30.0};
  Matrix<double> z = test::random_matrix(2, 5, 4);
  const Matrix<double> expected = scaled(scale, z);
  scale.forward(z, z);
  CHECK(z == expected);
  Matrix<double> none(0, 5);
  scale.forward(none, none);
  z(1, 2) = std::numeric_limits<double>::quiet_NaN();
  CHECK(std::isnan(scaled(scale, z)(1, 2)));
  CHECK(std::isfinite(scaled(scale, z)(1, 3)));
}

}  // namespace weir::logit_scale_test
