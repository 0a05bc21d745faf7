// SPDX-License-Identifier: MIT
#include <cmath>
#include <utility>
#include <vector>

#include <weir/attention/grouped_query.hpp>
#include <weir/model/block.hpp>
#include <weir/nn/dropout.hpp>
#include <weir/nn/mlp.hpp>
#include <weir/nn/rms_norm.hpp>

#include "support/allocations.hpp"
#include "support/catch.hpp"
#include "support/gradient.hpp"
#include "support/matrices.hpp"
#include "support/threads.hpp"

namespace weir::dropout_test {

static_assert(Layer<Dropout<float>>);
static_assert(!DecodingLayer<WithDropout<Mlp<float>>>);
static_assert(DecodingLayer<WithDropout<GroupedQueryAttention<float>>>);

TEST_CASE("Dropout drops as often as it says and keeps the mean", "[nn][dropout]") {
  const auto rate = GENERATE(0.1, 0.5, 0.9);
  const Dropout<double> dropout({.rate = rate});
  const Matrix<double> x = Matrix<double>::Constant(200, 100, 3.0);
  Rng rng(1);
  Dropout<double>::Cache cache;
  const Matrix<double> y = dropout.forward(x, {.training = true, .rng = &rng}, cache);
  Index dropped = 0;
  for (Index i = 0; i < y.size(); ++i) {
    if (y.data()[i] == 0.0) {
      ++dropped;
    } else {
      CHECK(y.data()[i] == Approx(3.0 / (1.0 - rate)).epsilon(1e-15));
    }
  }
  const double deviation = std::sqrt(rate * (1.0 - rate) * 20000.0);
  CHECK(std::abs(static_cast<double>(dropped) - rate * 20000.0) < 4.0 * deviation);
}

TEST_CASE("Dropout's draws are those of the generator, one per element in order",
          "[nn][dropout][golden]") {
  Rng rng(7);
  Rng same(7);
  const Rng draws = same.split();
  Matrix<double> expected(3, 4);
  for (Index i = 0; i < 12; ++i) {
    const double u = unit_interval(draws.at(static_cast<std::uint64_t>(i)));
    expected.data()[i] = u < 0.25 ? 0.0 : 4.0 / 3.0;
  }
  Dropout<double>::Cache cache;
  const Matrix<double> y =
      Dropout<double>({.rate = 0.25})
          .forward(Matrix<double>::Ones(3, 4), {.training = true, .rng = &rng}, cache);
  CHECK(y == expected);
  CHECK(rng.position() == same.position());
}

TEST_CASE("Dropout does nothing outside of training or at a rate of zero", "[nn][dropout]") {
  const Matrix<float> x = test::random_matrix<float>(4, 5, 1);
  CHECK(infer(Dropout<float>({.rate = 0.5}), x) == x);
  Dropout<float> none({.rate = 0.0});
  Dropout<float>::Cache cache;
  CHECK(none.forward(x, kTraining, cache) == x);  // Without a generator.
  CHECK(none.backward(x, cache) == x);
}

TEST_CASE("Dropout's gradient passes where its input passed", "[nn][dropout][gradient]") {
  Dropout<double> dropout({.rate = 0.4});
  const Matrix<double> x = test::random_matrix(5, 6, 2);
  const Matrix<double> dy = test::random_matrix(5, 6, 3);
  Rng rng(4);
  Dropout<double>::Cache cache;
  const Matrix<double> y = dropout.forward(x, {.training = true, .rng = &rng}, cache);
  const Matrix<double> dx = dropout.backward(dy, cache);
  for (Index i = 0; i < x.size(); ++i) {
    CHECK(dx.data()[i] == Approx(dy.data()[i] * (y.data()[i] / x.data()[i])).epsilon(1e-14));
  }
}

TEST_CASE("Dropout leaves zeros in padding, whatever stood there", "[nn][dropout][padding]") {
  Matrix<double> x = test::random_matrix(3, 4, 5);
  x.row(1).setConstant(std::nan(""));
  const std::vector<std::uint8_t> mask = {1, 0, 1};
  Dropout<double> dropout({.rate = 0.5});
  Rng rng(6);
  Dropout<double>::Cache cache;
  const Matrix<double> y = dropout.forward(x, {.training = true, .mask = mask, .rng = &rng}, cache);
  CHECK(y.row(1).isZero(0.0));
  CHECK(y.allFinite());
  const Matrix<double> dx = dropout.backward(x, cache);
  CHECK(dx.row(1).isZero(0.0));
  CHECK(dx.allFinite());
}

TEST_CASE("Dropout has the same bits on any number of threads and allocates nothing",
          "[nn][dropout]") {
  Dropout<float> dropout({.rate = 0.3});
  const Matrix<float> x = test::random_matrix<float>(300, 70, 7);
  Dropout<float>::Cache cache;
  const auto run = [&] {
    Rng rng(8);
    dropout.forward(x, {.training = true, .rng = &rng}, cache);
    dropout.backward(x, cache);
  };
  run();
  const Matrix<float> expected = cache.dx;
  CHECK(test::count_allocations(run) == 0);
  const test::Threads threads(2);
  run();
  CHECK(cache.dx == expected);
}

TEST_CASE("A block with dropout on its branches trains, infers and decodes", "[nn][dropout]") {
  Rng rng(9);
  const RmsNorm<double> norm(8);
  const GroupedQueryAttention<double> attention(rng, {.d_model = 8, .heads = 2, .kv_heads = 1});
  const Mlp<double> mlp(8, 6, rng);
  Block<double> plain = pre_norm_block<double>(norm, attention, norm, mlp, "mlp");
  Block<double> dropping = pre_norm_block<double>(norm, WithDropout(attention, {.rate = 0.5}), norm,
                                                  WithDropout(mlp, {.rate = 0.5}), "mlp");
  const Matrix<double> x = test::random_matrix(6, 8, 10);
  CHECK(infer(dropping, x) == infer(plain, x));
  REQUIRE(parameters(dropping).size() == parameters(plain).size());
  for (std::size_t i = 0; i < parameters(plain).size(); ++i) {
    CHECK(parameters(dropping)[i].name == parameters(plain)[i].name);
  }
  Block<double>::State state;
  Block<double>::Cache cache;
  CHECK(test::relative_error(Matrix<double>(decode(dropping, x, state, cache)), infer(plain, x)) <
        1e-13);

  // The same draws in each pass: the derivative is that of a fixed function.
  const Matrix<double> d = test::random_matrix(6, 8, 11);
  const auto objective = [&](const Matrix<double>& input) {
    Rng draws(12);
    Block<double>::Cache own;
    return dropping.forward(input, {.training = true, .rng = &draws}, own).cwiseProduct(d).sum();
  };
  Rng draws(12);
  dropping.forward(x, {.training = true, .rng = &draws}, cache);
  const Matrix<double> dx = dropping.backward(d, cache);
  Matrix<double> moved = x;
  for (Index i = 0; i < x.size(); i += 7) {
    constexpr double kStep = 1e-6;
    moved.data()[i] = x.data()[i] + kStep;
    const double up = objective(moved);
    moved.data()[i] = x.data()[i] - kStep;
    const double down = objective(moved);
    moved.data()[i] = x.data()[i];
    CHECK(dx.data()[i] == Approx((up - down) / (2.0 * kStep)).epsilon(1e-6).margin(1e-8));
  }
}

TEST_CASE("Dropout says what is wrong", "[nn][dropout]") {
  CHECK(test::message_of<ConfigError>([] { Dropout<float>({.rate = 1.0}); }) ==
        "Dropout: rate = 1, expected 0 <= rate < 1");
  Dropout<float> dropout;
  Dropout<float>::Cache cache;
  const Matrix<float> x = Matrix<float>::Ones(2, 3);
  CHECK(test::message_of<ConfigError>([&] { dropout.forward(x, kTraining, cache); }) ==
        "Dropout::forward: pass.rng = null, expected a generator in training");
  CHECK(test::message_of<StateError>([&] { dropout.backward(x, cache); }) != "no exception");
}

}  // namespace weir::dropout_test
