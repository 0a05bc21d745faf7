// SPDX-License-Identifier: MIT
#include <cmath>
#include <cstdint>
#include <vector>

#include <weir/moe/depths/choice_loss.hpp>
#include <weir/moe/depths/token_predictor.hpp>

#include "support/allocations.hpp"
#include "support/catch.hpp"
#include "support/gradient.hpp"
#include "support/threads.hpp"

namespace weir::token_predictor_test {

static_assert(Layer<TokenPredictor<float>>);

namespace {

using Bytes = std::vector<std::uint8_t>;

TokenRows rows_of(const Bytes& real) {
  TokenRows rows;
  rows.set("here", {.mask = real}, static_cast<Index>(real.size()));
  return rows;
}

double loss_of(const Matrix<double>& logits, const Bytes& chosen, const Bytes& real) {
  return choice_loss<double>(logits, chosen, rows_of(real));
}

Matrix<double> column(const std::vector<double>& values) {
  return Eigen::Map<const Matrix<double>>(values.data(), static_cast<Index>(values.size()), 1);
}

}  // namespace

TEST_CASE("The choice loss is the mean cross entropy of real tokens", "[moe][token_predictor]") {
  const double r = std::log(3.0);  // sigmoid 3/4
  const double quarter = std::log(4.0);
  const double three_quarters = std::log(4.0 / 3.0);
  CHECK(loss_of(column({r}), {1}, {1}) == Approx(three_quarters));
  CHECK(loss_of(column({r}), {0}, {1}) == Approx(quarter));
  CHECK(loss_of(column({-r}), {1}, {1}) == Approx(quarter));
  CHECK(loss_of(column({r, -r, 7.0, r}), {1, 1, 1, 0}, {1, 1, 0, 1}) ==
        Approx((three_quarters + 2.0 * quarter) / 3.0));
  CHECK(loss_of(column({0.0, 0.0}), {1, 0}, {1, 1}) == Approx(std::log(2.0)));
  CHECK(loss_of(column({5.0}), {0}, {0}) == 0.0);
  CHECK(loss_of(Matrix<double>(0, 1), {}, {}) == 0.0);
}

TEST_CASE("The choice loss is finite for extreme logits", "[moe][token_predictor]") {
  const Matrix<double> logits = column({1e300, -1e300, 800.0, -800.0});
  const Bytes real(4, 1);
  CHECK(loss_of(logits, {1, 0, 1, 0}, real) == 0.0);
  CHECK(loss_of(logits, {1, 0, 0, 1}, real) == Approx(400.0));
  Matrix<double> d(4, 1);
  choice_loss_backward<double>(logits, Bytes{1, 0, 0, 1}, rows_of(real), 1.0, d);
  CHECK(test::relative_error(d, column({0.0, 0.0, 0.25, -0.25})) <= 1e-15);
}

TEST_CASE("The choice loss has the gradient of finite differences",
          "[moe][token_predictor][gradient]") {
  Matrix<double> logits = 3.0 * test::random_matrix(6, 1, 1);
  const Bytes chosen = {1, 0, 0, 1, 1, 0};
  const Bytes real = {1, 1, 0, 1, 0, 1};
  Matrix<double> d = Matrix<double>::Ones(6, 1);
  choice_loss_backward<double>(logits, chosen, rows_of(real), 0.3, d);
  const Matrix<double> numeric =
      test::numeric_gradient(logits, [&] { return 0.3 * loss_of(logits, chosen, real); });
  CHECK(test::relative_error(d, numeric) <= 1e-8);
  CHECK(d(2, 0) == 0.0);
  CHECK(d(4, 0) == 0.0);
}

TEST_CASE("TokenPredictor matches a network worked out by hand", "[moe][token_predictor]") {
  // Hidden (1 + 2, 1 - 2 -> 0) and (0.5, 1.5): 2 * 3 + 0 + 1 and 2 * 0.5 - 1.5 + 1.
  Matrix<double> in(2, 2);
  in << 1.0, 1.0, 1.0, -1.0;
  Matrix<double> out(1, 2);
  out << 2.0, -1.0;
  const TokenPredictor<double> predictor(Linear<double>{in},
                                         Linear<double>{out, Matrix<double>::Ones(1, 1)});
  Matrix<double> x(2, 2);
  x << 1.0, 2.0, 1.0, -0.5;
  CHECK(infer(predictor, x) == column({7.0, 0.5}));
  CHECK(infer(predictor, Matrix<double>(0, 2)).rows() == 0);
}

TEST_CASE("TokenPredictor gradients agree with finite differences",
          "[moe][token_predictor][gradient]") {
  Rng rng(2);
  TokenPredictor<double> predictor(4, 6, rng, {.bias = true, .init_scale = 4.0});
  TokenPredictor<double, Silu> smooth(4, 6, rng, {.init_scale = 4.0});
  test::check_gradients(predictor, test::random_matrix(5, 4, 3));
  test::check_gradients(smooth, test::random_matrix(5, 4, 3));
  REQUIRE(parameters(predictor).size() == 4);
  CHECK(parameters(predictor)[0].name == "in.weight");
  CHECK(parameters(predictor)[3].name == "out.bias");
  CHECK(parameters(smooth).size() == 2);
}

TEST_CASE("TokenPredictor gives the same bits for any number of threads and allocates nothing",
          "[moe][token_predictor]") {
  Rng rng(3);
  TokenPredictor<double> predictor(16, 24, rng);
  const Matrix<double> x = test::random_matrix(900, 16, 1);
  const Matrix<double> dy = test::random_matrix(900, 1, 2);
  TokenPredictor<double>::Cache cache;
  const auto step = [&] {
    predictor.forward(x, kTraining, cache);
    predictor.backward(dy, cache);
  };
  step();
  CHECK(test::count_allocations(step) == 0);
  const Matrix<double> y = cache.out.y;
  const Matrix<double> dx = cache.in.dx;
  const test::Threads threads(3);
  step();
  CHECK(cache.out.y == y);
  CHECK(cache.in.dx == dx);
}

TEST_CASE("TokenPredictor says what does not fit", "[moe][token_predictor]") {
  Rng rng(4);
  CHECK(test::message_of<ConfigError>([&] {
          TokenPredictor<double>(Linear<double>(3, 5, rng), Linear<double>(4, 1, rng));
        }) == "TokenPredictor: out is [1, 4], expected [1, 5]");
  CHECK(test::message_of<ConfigError>([&] {
          TokenPredictor<double>(Linear<double>(3, 5, rng), Linear<double>(5, 2, rng));
        }) == "TokenPredictor: out is [2, 5], expected [1, 5]");
}

}  // namespace weir::token_predictor_test
