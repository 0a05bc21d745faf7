// SPDX-License-Identifier: MIT
#include <algorithm>
#include <cmath>
#include <limits>
#include <vector>

#include <weir/optim/clip.hpp>

#include "support/catch.hpp"
#include "support/matrices.hpp"
#include "support/parameter_set.hpp"

namespace weir::clip_test {

namespace {

// A parameter whose gradient has every entry equal to `g`.
Parameter<double> with_gradient(Index rows, Index cols, double g) {
  return {Matrix<double>::Zero(rows, cols), Matrix<double>::Constant(rows, cols, g)};
}

}  // namespace

TEST_CASE("clip_global_norm scales all gradients alike", "[optim][clip][golden]") {
  // ||a||^2 = 4 * 9 = 36, ||b||^2 = 4 * 16 = 64: the norm is 10.
  Parameter<double> a = with_gradient(2, 2, 3.0);
  Parameter<double> b = with_gradient(1, 4, -4.0);
  test::ParameterSet<double> model{{"a", &a}, {"b", &b}};
  CHECK(global_norm(model) == 10.0);

  SECTION("when the norm is above the limit") {
    CHECK(clip_global_norm(model, 5.0) == 10.0);
    CHECK(a.grad == Matrix<double>::Constant(2, 2, 1.5));
    CHECK(b.grad == Matrix<double>::Constant(1, 4, -2.0));
    CHECK(global_norm(model) == 5.0);
  }
  SECTION("and leaves them as they are when it is not") {
    CHECK(clip_global_norm(model, 10.0) == 10.0);
    CHECK(clip_global_norm(model, 11.0) == 10.0);
    CHECK(a.grad == Matrix<double>::Constant(2, 2, 3.0));
    CHECK(b.grad == Matrix<double>::Constant(1, 4, -4.0));
  }
}

TEST_CASE("clip_global_norm passes by frozen and unused parameters", "[optim][clip]") {
  Parameter<double> frozen = with_gradient(2, 2, 100.0);
  frozen.frozen = true;
  Parameter<double> unused{Matrix<double>::Zero(3, 3)};
  Parameter<double> trained = with_gradient(2, 2, 1.0);
  test::ParameterSet<double> model{{"frozen", &frozen}, {"unused", &unused}, {"w", &trained}};
  CHECK(clip_global_norm(model, 1.0) == 2.0);
  CHECK(frozen.grad == Matrix<double>::Constant(2, 2, 100.0));
  CHECK(unused.grad.size() == 0);
  CHECK(trained.grad == Matrix<double>::Constant(2, 2, 0.5));
}

TEST_CASE("clip_global_norm covers every piece of every gradient", "[optim][clip]") {
  // Sizes around the share of a task, and many small ones.
  std::vector<Parameter<float>> weights;
  double squares = 0.0;
  for (const Index size : {5, 16384, 1, 16383, 40000, 17, 16, 15, 100000, 3}) {
    weights.push_back({Matrix<float>::Zero(1, size),
                       test::random_matrix<float>(1, size, static_cast<std::uint64_t>(size))});
    squares += weights.back().grad.cast<double>().squaredNorm();
  }
  std::vector<NamedParameter<float>> named;
  std::vector<Matrix<float>> before;
  for (Parameter<float>& w : weights) {
    named.push_back({"w", &w});
    before.push_back(w.grad);
  }
  test::ParameterSet<float> model(named);
  CHECK(global_norm(model) == Approx(std::sqrt(squares)).epsilon(1e-13));

  clip_global_norm(model, 0.5 * std::sqrt(squares));
  for (std::size_t i = 0; i < weights.size(); ++i) {
    CHECK(test::relative_error(weights[i].grad, 0.5F * before[i]) <= 1e-6);
  }
}

TEST_CASE("clip_global_norm sums in double", "[optim][clip]") {
  // In float, 2^24 + 1 = 2^24: a sum of ones would stop growing there.
  const float large = 1 << 12;
  Parameter<float> w{Matrix<float>::Zero(1, 17), Matrix<float>::Ones(1, 17)};
  w.grad(0, 0) = large;
  test::ParameterSet<float> model{{"w", &w}};
  CHECK(global_norm(model) == std::sqrt(double{1 << 24} + 16.0));
}

TEST_CASE("clip_global_norm gives the same bits for any number of threads", "[optim][clip]") {
  const auto clipped = [](int thread_count) {
    Parameter<float> a{Matrix<float>::Zero(300, 211), test::random_matrix<float>(300, 211, 1)};
    Parameter<float> b{Matrix<float>::Zero(1, 999), test::random_matrix<float>(1, 999, 2)};
    set_threads(thread_count);
    test::ParameterSet<float> model{{"a", &a}, {"b", &b}};
    const double norm = clip_global_norm(model, 0.3);
    set_threads(1);
    return std::make_pair(norm, std::make_pair(a.grad, b.grad));
  };
  CHECK((clipped(1) == clipped(std::min(2, hardware_threads()))));
}

TEST_CASE("clip_global_norm does not depend on the scale of the gradients", "[optim][clip]") {
  // 3, 3, 3, 3, -4, -4, -4, -4 times a power of two: norm 10.
  const auto exponent = GENERATE(-1070, -900, -500, -1, 500, 900, 1019);
  const double scale = std::ldexp(1.0, exponent);
  Parameter<double> a = with_gradient(2, 2, 3.0 * scale);
  Parameter<double> b = with_gradient(1, 4, -4.0 * scale);
  Parameter<double> small = with_gradient(1, 1, 0.0);
  test::ParameterSet<double> model{{"a", &a}, {"b", &b}, {"small", &small}};
  CHECK(global_norm(model) == 10.0 * scale);
  CHECK(clip_global_norm(model, 5.0 * scale) == 10.0 * scale);
  CHECK(a.grad == Matrix<double>::Constant(2, 2, 1.5 * scale));
  CHECK(b.grad == Matrix<double>::Constant(1, 4, -2.0 * scale));
  CHECK(clip_global_norm(model, 6.0 * scale) == 5.0 * scale);
  CHECK(a.grad == Matrix<double>::Constant(2, 2, 1.5 * scale));
}

TEST_CASE("clip_global_norm clips what is huge to what is usual", "[optim][clip]") {
  Parameter<double> w = with_gradient(1, 4, 1e200);
  w.grad(0, 0) = 1e-200;
  w.grad(0, 1) = 0.0;
  test::ParameterSet<double> model{{"w", &w}};
  CHECK(clip_global_norm(model, 1.0) == Approx(std::sqrt(2.0) * 1e200).epsilon(1e-15));
  CHECK(w.grad(0, 2) == Approx(std::sqrt(0.5)).epsilon(1e-15));
  CHECK(w.grad(0, 1) == 0.0);
  CHECK(global_norm(model) == Approx(1.0).epsilon(1e-15));
}

TEST_CASE("A norm beyond the largest double is an error", "[optim][clip]") {
  Parameter<double> a = with_gradient(1, 1, 1.0);
  Parameter<double> b = with_gradient(2, 2, 1.7e308);
  test::ParameterSet<double> model{{"a", &a}, {"b", &b}};
  CHECK(test::message_of<NonFiniteError>([&] { clip_global_norm(model, 1.0); }) ==
        "clip_global_norm: gradient of b has norm inf, expected finite");
  CHECK(b.grad.isZero(0.0));  // The step is given up.
}

TEST_CASE("clip_global_norm of nothing is zero", "[optim][clip]") {
  Parameter<double> zero = with_gradient(2, 3, 0.0);
  test::ParameterSet<double> none{};
  CHECK(global_norm(none) == 0.0);
  test::ParameterSet<double> model{{"zero", &zero}};
  CHECK(clip_global_norm(model, 1.0) == 0.0);
  CHECK(zero.grad.isZero(0.0));
}

TEST_CASE("clip_global_norm names the parameter that is not finite", "[optim][clip]") {
  Parameter<double> good = with_gradient(2, 2, 3.0);
  Parameter<double> bad = with_gradient(2, 2, 3.0);
  test::ParameterSet<double> model{{"good", &good}, {"experts.3.up", &bad}};

  bad.grad(1, 0) = std::numeric_limits<double>::quiet_NaN();
  CHECK(test::message_of<NonFiniteError>([&] { clip_global_norm(model, 1.0); }) ==
        "clip_global_norm: gradient of experts.3.up has norm nan, expected finite");
  CHECK(good.grad.isZero(0.0));  // The step is given up.
  CHECK(bad.grad.isZero(0.0));
  good.grad.setConstant(3.0);
  bad.grad.setConstant(3.0);
  bad.grad(1, 0) = -std::numeric_limits<double>::infinity();
  CHECK(test::message_of<NonFiniteError>([&] { global_norm(model); }) ==
        "global_norm: gradient of experts.3.up has norm inf, expected finite");
  CHECK(good.grad == Matrix<double>::Constant(2, 2, 3.0));
  good.grad(0, 0) = 1e200;  // Large, but finite.
  CHECK(test::message_of<NonFiniteError>([&] { global_norm(model); }) ==
        "global_norm: gradient of experts.3.up has norm inf, expected finite");
  good.grad(0, 0) = 3.0;

  bad.frozen = true;
  CHECK(global_norm(model) == 6.0);
}

TEST_CASE("clip_global_norm refuses a limit that is not positive", "[optim][clip]") {
  test::ParameterSet<float> none{};
  CHECK(test::message_of<ConfigError>([&] { clip_global_norm(none, 0.0); }) ==
        "clip_global_norm: max_norm = 0, expected a finite number > 0");
}

}  // namespace weir::clip_test
