// SPDX-License-Identifier: MIT
#include <cmath>
#include <vector>

#include <weir/nn/embedding.hpp>

#include "support/catch.hpp"
#include "support/gradient.hpp"
#include "support/matrices.hpp"

namespace weir::embedding_test {

TEST_CASE("Embedding looks up one row for each token", "[nn][embedding]") {
  Rng rng(1);
  const Embedding<float> layer(11, 300, rng);
  const std::vector<Index> ids = {3, 0, 10, 3};
  Embedding<float>::Cache cache;
  const Matrix<float> y = layer.forward(ids, kTraining, cache);

  REQUIRE(y.rows() == 4);
  for (Index t = 0; t < 4; ++t) {
    CHECK(y.row(t) == layer.weight().value.row(ids[static_cast<std::size_t>(t)]));
  }
  CHECK(layer.forward(ids, Pass{}, cache) == y);
  const std::vector<int> ints = {3, 0, 10, 3};
  CHECK(layer.forward(ints, Pass{}, cache) == y);
  CHECK(cache.ids == ids);
}

TEST_CASE("Embedding backward sums the rows of equal tokens", "[nn][embedding]") {
  // Tokens 0 and 2 are both id 1: its gradient is (1 + 5, 2 + 6).
  Embedding<double> layer(Matrix<double>::Zero(3, 2));
  Embedding<double>::Cache cache;
  const std::vector<Index> ids = {1, 0, 1};
  layer.forward(ids, kTraining, cache);
  Matrix<double> dy(3, 2);
  dy << 1, 2, 3, 4, 5, 6;
  layer.backward(dy, cache);
  Matrix<double> expected(3, 2);
  expected << 3, 4, 6, 8, 0, 0;
  CHECK(layer.weight().grad == expected);
  layer.forward(ids, kTraining, cache);
  layer.backward(dy, cache);
  CHECK(layer.weight().grad == 2 * expected);
}

TEST_CASE("Embedding gradient agrees with finite differences", "[nn][embedding][gradient]") {
  Rng rng(1);
  Embedding<double> layer(5, 3, rng);
  const std::vector<Index> ids = {4, 1, 4, 0};
  const Matrix<double> dy = test::random_matrix(4, 3, 2);
  Embedding<double>::Cache cache;
  layer.forward(ids, kTraining, cache);
  layer.backward(dy, cache);
  const Matrix<double> numeric = test::numeric_gradient(layer.weight().value, [&] {
    return layer.forward(ids, kTraining, cache).cwiseProduct(dy).sum();
  });
  CHECK(test::relative_error(layer.weight().grad, numeric) <= 1e-6);
}

TEST_CASE("Embedding starts with the asked-for spread", "[nn][embedding]") {
  const auto stddev_of = [](const Embedding<double>& layer) {
    return std::sqrt(layer.weight().value.squaredNorm() / 100000.0);
  };
  Rng rng(1);
  CHECK(stddev_of(Embedding<double>(1000, 100, rng)) == Approx(0.02).epsilon(0.02));
  CHECK(stddev_of(Embedding<double>(1000, 100, rng, {.stddev = 1.0})) == Approx(1.0).epsilon(0.02));
}

TEST_CASE("Embedding takes no tokens", "[nn][embedding]") {
  Rng rng(1);
  Embedding<double> layer(5, 3, rng);
  Embedding<double>::Cache cache;
  CHECK(layer.forward({}, kTraining, cache).cols() == 3);
  layer.backward(Matrix<double>(0, 3), cache);
  CHECK(layer.weight().gradient().isZero());
}

TEST_CASE("Embedding gives the same bits on one thread and on two", "[nn][embedding]") {
  if (hardware_threads() < 2) return;
  std::vector<Index> ids(700);
  Rng draw(5);
  for (Index& id : ids) id = draw.below(9);
  const auto run = [&](int threads) {
    set_threads(threads);
    Rng rng(1);
    Embedding<float> layer(9, 300, rng);
    Embedding<float>::Cache cache;
    layer.forward(ids, kTraining, cache);
    layer.backward(test::random_matrix<float>(700, 300, 2), cache);
    set_threads(1);
    return std::vector<Matrix<float>>{cache.y, layer.weight().grad};
  };
  CHECK(run(1) == run(2));
}

TEST_CASE("Embedding names its parameter", "[nn][embedding]") {
  Rng rng(1);
  Embedding<float> layer(5, 3, rng);
  const auto named = parameters(layer);
  REQUIRE(named.size() == 1);
  CHECK(named[0].name == "weight");
  CHECK(layer.vocab() == 5);
  CHECK(layer.d_model() == 3);
}

TEST_CASE("Embedding says what is wrong", "[nn][embedding]") {
  Rng rng(1);
  Embedding<float> layer(256, 4, rng);
  Embedding<float>::Cache cache;
  const Matrix<float> dy = Matrix<float>::Zero(2, 4);
  const auto refused = [&](const std::vector<Index>& ids) {
    return test::message_of<ConfigError>([&] { layer.forward(ids, kTraining, cache); });
  };
  CHECK(refused({0, 1, 2, 300}) == "Embedding::forward: ids[3] = 300, expected 0 <= id < 256");
  CHECK(refused({-1}) == "Embedding::forward: ids[0] = -1, expected 0 <= id < 256");
  const auto state = [&] {
    return test::message_of<StateError>([&] { layer.backward(dy, cache); });
  };
  const std::vector<int> ids = {1, 2};
  CHECK(state() ==
        "Embedding::backward: the cache is empty, expected a forward pass that succeeded");
  layer.forward(ids, Pass{}, cache);
  CHECK(state() ==
        "Embedding::backward: the forward pass did not train, expected one with pass.training = "
        "true");
  layer.forward(ids, kTraining, cache);
  CHECK(test::message_of<ShapeError>([&] { layer.backward(dy.topRows(1), cache); }) ==
        "Embedding::backward: dy is [1, 4], expected [2, 4]");
  layer.backward(dy, cache);
  CHECK(state() ==
        "Embedding::backward: the cache was used by a backward pass already, expected a forward "
        "pass between the two");
  CHECK(test::message_of<ConfigError>([&] { Embedding<float>(0, 4, rng); }) ==
        "Embedding: vocab = 0, expected > 0");
  CHECK(test::message_of<ConfigError>([&] { Embedding<float>(4, 0, rng); }) ==
        "Embedding: d_model = 0, expected > 0");
  CHECK(test::message_of<ConfigError>([&] { Embedding<float>(4, 4, rng, {.stddev = -1.0}); }) ==
        "Embedding: stddev = -1, expected a finite number >= 0");
}

}  // namespace weir::embedding_test
