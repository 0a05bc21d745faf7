// SPDX-License-Identifier: MIT
#include <vector>

#include <weir/core/layer.hpp>
#include <weir/nn/mlp.hpp>

#include "support/caches.hpp"
#include "support/catch.hpp"
#include "support/gradient.hpp"
#include "support/matrices.hpp"

namespace weir::mlp_test {

static_assert(Layer<Mlp<float>> && Layer<Mlp<double, SquaredRelu>>);

TEST_CASE("Mlp matches a token worked out by hand", "[nn][mlp]") {
  Matrix<double> in(2, 1);
  in << 1, -1;
  Matrix<double> out(1, 2);
  out << 5, 7;
  Matrix<double> in_bias(1, 2);
  in_bias << 1, 4;
  Matrix<double> out_bias(1, 1);
  out_bias << 100;
  const Matrix<double> x = Matrix<double>::Constant(1, 1, 2.0);

  // z = (2, -2), h = (2, 0), y = 10.
  CHECK(infer(Mlp<double>(in, out), x)(0, 0) == 10.0);
  // z = (3, 2), y = 15 + 14 + 100.
  CHECK(infer(Mlp<double>(in, out, in_bias, out_bias), x)(0, 0) == 129.0);
  // One bias without the other: z = (2, -2) again, y = 10 + 100.
  CHECK(infer(Mlp<double>(in, out, {}, out_bias), x)(0, 0) == 110.0);
}

TEMPLATE_TEST_CASE("Mlp gradients agree with finite differences", "[nn][mlp][gradient]", Relu,
                   SquaredRelu, Silu, Gelu, GeluTanh) {
  const auto bias = GENERATE(false, true);
  Rng rng(1);
  Mlp<double, TestType> layer(5, 9, rng, {.bias = bias});
  if (bias) layer.in_bias().value = test::random_matrix(1, 9, 3);
  test::check_gradients(layer, test::random_matrix(4, 5, 2));
}

TEST_CASE("The elementwise part of Mlp works in place", "[nn][mlp]") {
  const Matrix<double> z = test::random_matrix(3, 1030, 1);
  const Matrix<double> da = test::random_matrix(3, 1030, 2);
  Matrix<double> a = z;
  activation_forward<Silu, double>(a, a);
  const Matrix<double> sigmoid = (1.0 + (-z.array()).exp()).inverse();
  CHECK(test::relative_error(a, z.cwiseProduct(sigmoid)) <= 1e-14);

  Matrix<double> dz = z;
  activation_backward<Silu, double>(dz, da, dz);
  const Matrix<double> expected =
      da.array() * sigmoid.array() * (1.0 + z.array() * (1.0 - sigmoid.array()));
  CHECK(test::relative_error(dz, expected) <= 1e-14);
}

TEST_CASE("Mlp forward is the same in training and in inference, and for no tokens", "[nn][mlp]") {
  Rng rng(1);
  Mlp<float> layer(8, 33, rng, {.bias = true});
  Mlp<float>::Cache cache;
  for (const Index tokens : {5, 1, 0}) {
    const Matrix<float> x = test::random_matrix<float>(tokens, 8, 2);
    CHECK(layer.forward(x, kTraining, cache) == infer(layer, x));
    CHECK(layer.backward(x, cache).rows() == tokens);
  }
}

TEST_CASE("Mlp keeps nothing for backward in a pass that does not train", "[nn][mlp]") {
  Rng rng(1);
  const Mlp<float> layer(8, 33, rng);
  Mlp<float>::Cache cache;
  layer.forward(test::random_matrix<float>(5, 8, 2), Pass{}, cache);
  CHECK(cache.x.size() == 0);
  CHECK(cache.z.size() == 0);
}

TEST_CASE("Mlp gives the same bits on one thread and on two", "[nn][mlp]") {
  if (hardware_threads() < 2) return;
  const auto run = [](int threads) {
    set_threads(threads);
    Rng rng(1);
    Mlp<float, GeluTanh> layer(40, 130, rng, {.bias = true});
    Mlp<float, GeluTanh>::Cache cache;
    layer.forward(test::random_matrix<float>(200, 40, 2), kTraining, cache);
    layer.backward(test::random_matrix<float>(200, 40, 3), cache);
    set_threads(1);
    return std::vector<Matrix<float>>{cache.y,          cache.dx,
                                      layer.in().grad,  layer.in_bias().grad,
                                      layer.out().grad, layer.out_bias().grad};
  };
  CHECK(run(1) == run(2));
}

TEST_CASE("Mlp names its parameters", "[nn][mlp]") {
  Rng rng(1);
  Mlp<float> layer(3, 4, rng, {.bias = true});
  const auto named = parameters(layer);
  REQUIRE(named.size() == 4);
  CHECK(named[0].name == "in");
  CHECK(named[1].name == "in_bias");
  CHECK(named[2].name == "out");
  CHECK(named[3].name == "out_bias");
  Mlp<float> plain(3, 4, rng);
  CHECK(parameters(plain).size() == 2);
}

TEST_CASE("Mlp says what is wrong", "[nn][mlp]") {
  Rng rng(1);
  Mlp<double> layer(4, 6, rng);
  CHECK(test::message_of<ShapeError>([&] { infer(layer, Matrix<double>(3, 5)); }) ==
        "Mlp::forward: x is [3, 5], expected [tokens, 4]");
  test::check_refused_caches(layer, test::random_matrix(2, 4, 1), "Mlp::backward");
  CHECK(test::message_of<ConfigError>([&] { Mlp<double>(0, 4, rng); }) ==
        "Mlp: d_model = 0, expected > 0");
  CHECK(test::message_of<ConfigError>([&] { Mlp<double>(4, 0, rng); }) ==
        "Mlp: d_hidden = 0, expected > 0");
  const Matrix<double> m = Matrix<double>::Ones(6, 4);
  CHECK(test::message_of<ShapeError>([&] { Mlp<double>(m, m); }) ==
        "Mlp: out is [6, 4], expected [4, 6]");
  CHECK(test::message_of<ShapeError>([&] {
          Mlp<double>(m, m.transpose(), Matrix<double>::Ones(1, 4));
        }) == "Mlp: in_bias is [1, 4], expected [1, 6]");
  CHECK(test::message_of<ShapeError>([&] {
          Mlp<double>(m, m.transpose(), Matrix<double>::Ones(1, 6), Matrix<double>::Ones(1, 6));
        }) == "Mlp: out_bias is [1, 6], expected [1, 4]");
}

}  // namespace weir::mlp_test
