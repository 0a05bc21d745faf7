// SPDX-License-Identifier: MIT
#include <cmath>
#include <stdexcept>

#include <weir/core/error.hpp>

#include "support/catch.hpp"
#include "support/matrices.hpp"

namespace weir::error_test {

TEST_CASE("Errors are of the standard kinds", "[core][error]") {
  CHECK_THROWS_AS(throw_error<ShapeError>("x"), std::invalid_argument);
  CHECK_THROWS_AS(throw_error<ConfigError>("x"), std::invalid_argument);
  CHECK_THROWS_AS(throw_error<NonFiniteError>("x"), std::domain_error);
  CHECK_THROWS_AS(throw_error<StateError>("x"), std::logic_error);
}

TEST_CASE("Messages name place, parameter, value and expectation", "[core][error]") {
  const Matrix<float> m(3, 5);
  CHECK(shape_of(m) == "[3, 5]");
  CHECK(test::message_of<ConfigError>([] { throw_error<ConfigError>("k = ", 3, ", ", 0.5); }) ==
        "k = 3, 0.5");
  CHECK(test::message_of<ShapeError>([&] { expect_columns("F", "x", m, 4); }) ==
        "F: x is [3, 5], expected [tokens, 4]");
  CHECK(test::message_of<ShapeError>([&] { expect_shape("F", "x", m, 3, 4); }) ==
        "F: x is [3, 5], expected [3, 4]");
  CHECK(test::message_of<ShapeError>([&] { expect_shape("F", "x", m, 2, 5); }) ==
        "F: x is [3, 5], expected [2, 5]");
  CHECK(test::message_of<ConfigError>([] { expect_at_least("F", "k", 0, 1); }) ==
        "F: k = 0, expected >= 1");
  CHECK(test::message_of<ConfigError>([] { expect_positive("F", "scale", -0.5); }) ==
        "F: scale = -0.5, expected a finite number > 0");
  CHECK(test::message_of<ConfigError>([] { expect_at_least("F", "scale", -0.5, 0.0); }) ==
        "F: scale = -0.5, expected a finite number >= 0");
  CHECK(test::message_of<ConfigError>([] { expect_finite("F", "scale", HUGE_VAL); }) ==
        "F: scale = inf, expected a finite number");
  CHECK(test::message_of<ConfigError>([] { expect_in("F", "share", 1.5, 0.0, 1.0); }) ==
        "F: share = 1.5, expected 0 <= share <= 1");
  CHECK(test::message_of<ConfigError>([] { expect_fraction("F", "beta", 1.0); }) ==
        "F: beta = 1, expected 0 <= beta < 1");
  expect_columns("F", "x", m, 5);
  expect_shape("F", "x", m, 3, 5);
  expect_at_least("F", "k", 1, 1);
  expect_positive("F", "scale", 0.5);
}

TEST_CASE("A NaN is neither positive nor at least anything", "[core][error]") {
  CHECK_THROWS_AS(expect_positive("F", "scale", std::nan("")), ConfigError);
  CHECK_THROWS_AS(expect_at_least("F", "scale", std::nan(""), 0.0), ConfigError);
  CHECK_THROWS_AS(expect_finite("F", "scale", std::nan("")), ConfigError);
  CHECK_THROWS_AS(expect_in("F", "scale", std::nan(""), 0.0, 1.0), ConfigError);
  CHECK_THROWS_AS(expect_fraction("F", "scale", std::nan("")), ConfigError);
}

TEST_CASE("An infinite setting is refused", "[core][error]") {
  CHECK_THROWS_AS(expect_positive("F", "scale", HUGE_VAL), ConfigError);
  CHECK_THROWS_AS(expect_at_least("F", "scale", HUGE_VALF, 0.0F), ConfigError);
}

}  // namespace weir::error_test
