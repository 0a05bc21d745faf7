// SPDX-License-Identifier: MIT
#include <cmath>
#include <vector>

#include <weir/core/layer.hpp>
#include <weir/nn/glu.hpp>

#include "support/caches.hpp"
#include "support/catch.hpp"
#include "support/gradient.hpp"
#include "support/matrices.hpp"

namespace weir::glu_test {

static_assert(Layer<Glu<float>> && Layer<Glu<double, GeluTanh>>);

TEST_CASE("Glu is its formula", "[nn][glu]") {
  Rng rng(1);
  const Glu<double> layer(6, 10, rng);
  const Matrix<double> x = test::random_matrix(5, 6, 2);
  const Matrix<double> gate = x * layer.gate().value.transpose();
  const Matrix<double> up = x * layer.up().value.transpose();
  const Matrix<double> h = gate.array() / (1.0 + (-gate.array()).exp()) * up.array();
  CHECK(test::relative_error(infer(layer, x), h * layer.down().value.transpose()) <= 1e-13);
}

TEST_CASE("Glu matches a token worked out by hand", "[nn][glu]") {
  // Relu gates 1 and -1 give 1 and 0; up gives 2 and 3; h = (2, 0); y = 5 * 2 + 7 * 0.
  Matrix<double> gate(2, 1);
  gate << 1, -1;
  Matrix<double> up(2, 1);
  up << 2, 3;
  Matrix<double> down(1, 2);
  down << 5, 7;
  const Glu<double, Relu> layer(gate, up, down);
  CHECK(infer(layer, Matrix<double>::Ones(1, 1))(0, 0) == 10.0);
}

TEMPLATE_TEST_CASE("Glu gradients agree with finite differences", "[nn][glu][gradient]", Silu, Gelu,
                   GeluTanh, Relu) {
  Rng rng(1);
  Glu<double, TestType> layer(5, 9, rng);
  test::check_gradients(layer, test::random_matrix(4, 5, 2));
}

TEST_CASE("The elementwise part of Glu agrees with finite differences", "[nn][glu][gradient]") {
  const auto cols = GENERATE(as<Index>{}, 1, 19, 1030);
  Matrix<double> gate = test::random_matrix(2, cols, 1);
  Matrix<double> up = test::random_matrix(2, cols, 2);
  const Matrix<double> dh = test::random_matrix(2, cols, 3);
  Matrix<double> h(2, cols), d_gate(2, cols), d_up(2, cols);
  glu_forward<Silu, double>(gate, up, h);
  glu_backward<Silu, double>(gate, up, dh, d_gate, d_up);

  // Elements are independent of each other, so all are moved at once.
  const double step = 1e-6;
  const auto slope = [&](Matrix<double>& moved) {
    const Matrix<double> saved = moved;
    Matrix<double> above(2, cols), below(2, cols);
    moved = saved.array() + step;
    glu_forward<Silu, double>(gate, up, above);
    moved = saved.array() - step;
    glu_forward<Silu, double>(gate, up, below);
    moved = saved;
    return Matrix<double>((above - below).cwiseProduct(dh) / (2 * step));
  };
  CHECK(test::relative_error(d_gate, slope(gate)) <= 1e-8);
  CHECK(test::relative_error(d_up, slope(up)) <= 1e-8);

  glu_forward<Silu, double>(gate, up, gate);
  CHECK(gate == h);
}

TEST_CASE("Glu forward is the same in training and in inference, and for no tokens", "[nn][glu]") {
  Rng rng(1);
  Glu<float> layer(8, 33, rng);
  Glu<float>::Cache cache;
  for (const Index tokens : {5, 1, 0}) {
    const Matrix<float> x = test::random_matrix<float>(tokens, 8, 2);
    CHECK(layer.forward(x, kTraining, cache) == infer(layer, x));
    CHECK(layer.backward(x, cache).rows() == tokens);
  }
}

TEST_CASE("Glu keeps nothing for backward in a pass that does not train", "[nn][glu]") {
  Rng rng(1);
  const Glu<float> layer(8, 33, rng);
  Glu<float>::Cache cache;
  layer.forward(test::random_matrix<float>(5, 8, 2), Pass{}, cache);
  CHECK(cache.kept.exact_rows() == 0);
}

TEST_CASE("Glu stored for inference has nothing for backward, even in a pass that trains",
          "[nn][glu]") {
  Rng rng(1);
  Glu<float> layer(8, 33, rng);
  const Matrix<float> x = test::random_matrix<float>(5, 8, 2);
  Glu<float>::Cache cache;
  layer.set_storage(Storage::kPacked);
  layer.forward(x, kTraining, cache);
  CHECK_THROWS_AS(layer.backward(x, cache), StateError);
  layer.set_storage(Storage::kTrainable);
  CHECK(test::message_of<StateError>([&] { layer.backward(x, cache); }) ==
        "Glu::backward: the forward pass did not train, expected one with pass.training = true");
}

TEST_CASE("Glu gives the same bits on one thread and on two", "[nn][glu]") {
  if (hardware_threads() < 2) return;
  const auto run = [](int threads) {
    set_threads(threads);
    Rng rng(1);
    Glu<float> layer(40, 130, rng);
    Glu<float>::Cache cache;
    layer.forward(test::random_matrix<float>(200, 40, 2), kTraining, cache);
    layer.backward(test::random_matrix<float>(200, 40, 3), cache);
    set_threads(1);
    return std::vector<Matrix<float>>{cache.y, cache.dx, layer.gate().grad, layer.up().grad,
                                      layer.down().grad};
  };
  CHECK(run(1) == run(2));
}

TEST_CASE("Glu names and initialises its parameters", "[nn][glu]") {
  Rng rng(1);
  Glu<double> layer(100, 400, rng, {.init_scale = 0.1});
  const auto named = parameters(layer);
  REQUIRE(named.size() == 3);
  CHECK(named[0].name == "gate");
  CHECK(named[1].name == "up");
  CHECK(named[2].name == "down");
  // Cut at two standard deviations, a normal keeps 0.8796 of its spread.
  const auto spread = [](const Matrix<double>& m) {
    return std::sqrt(m.squaredNorm() / static_cast<double>(m.size()));
  };
  CHECK(spread(layer.gate().value) == Approx(0.8796 * std::sqrt(0.1 / 100)).epsilon(0.02));
  CHECK(spread(layer.down().value) == Approx(0.8796 * std::sqrt(0.1 / 400)).epsilon(0.02));
  CHECK(layer.d_model() == 100);
  CHECK(layer.d_hidden() == 400);
}

TEST_CASE("Glu says what is wrong", "[nn][glu]") {
  Rng rng(1);
  Glu<double> layer(4, 6, rng);
  CHECK(test::message_of<ShapeError>([&] { infer(layer, Matrix<double>(3, 5)); }) ==
        "Glu::forward: x is [3, 5], expected [tokens, 4]");
  test::check_refused_caches(layer, test::random_matrix(2, 4, 1), "Glu::backward");
  CHECK(test::message_of<ConfigError>([&] { Glu<double>(4, 0, rng); }) ==
        "Glu: d_hidden = 0, expected > 0");
  CHECK(test::message_of<ConfigError>([&] { Glu<double>(0, 4, rng); }) ==
        "Glu: d_model = 0, expected > 0");
  CHECK(test::message_of<ConfigError>([&] { Glu<double>(4, 4, rng, {.init_scale = 0.0}); }) ==
        "switch_init: scale = 0, expected a finite number > 0");
  const Matrix<double> m = Matrix<double>::Ones(6, 4);
  CHECK(test::message_of<ShapeError>([&] { Glu<double>(m, m, m); }) ==
        "Glu: down is [6, 4], expected [4, 6]");
  CHECK(test::message_of<ShapeError>([&] { Glu<double>(m, m.transpose(), m.transpose()); }) ==
        "Glu: up is [4, 6], expected [6, 4]");
}

}  // namespace weir::glu_test
