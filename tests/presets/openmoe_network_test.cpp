// SPDX-License-Identifier: MIT
#include <cmath>

#include <weir/core/layer.hpp>
#include <weir/core/parameter.hpp>
#include <weir/core/storage.hpp>
#include <weir/presets/openmoe_network.hpp>

#include "support/allocations.hpp"
#include "support/caches.hpp"
#include "support/catch.hpp"
#include "support/gradient.hpp"
#include "support/matrices.hpp"

namespace weir::openmoe_network_test {
using weir::presets::OpenMoENetwork;

static_assert(Layer<OpenMoENetwork<float>> && Layer<OpenMoENetwork<double>>);

TEST_CASE("OpenMoE's network is a gated network with one more factor", "[presets]") {
  Rng rng(1);
  OpenMoENetwork<double> network(1, 1, rng);
  const double weights[] = {2.0, 3.0, 5.0, 7.0};
  std::size_t i = 0;
  for (auto& [name, parameter] : parameters(network)) parameter->value(0, 0) = weights[i++];
  const Matrix<double> x = Matrix<double>::Constant(1, 1, 0.5);
  // silu(1) * 1.5 * 2.5 * 7.
  const double expected = 1.0 / (1.0 + std::exp(-1.0)) * 1.5 * 2.5 * 7.0;
  CHECK(infer(network, x)(0, 0) == Approx(expected).epsilon(1e-14));
}

TEST_CASE("The gradients of OpenMoE's network agree with finite differences",
          "[presets][gradient]") {
  Rng rng(2);
  OpenMoENetwork<double> network(5, 9, rng);
  test::check_gradients(network, test::random_matrix(4, 5, 3));
}

TEST_CASE("OpenMoE's network takes no tokens, and stores its weights", "[presets]") {
  Rng rng(3);
  OpenMoENetwork<float> network(8, 12, rng);
  OpenMoENetwork<float>::Cache cache;
  CHECK(network.forward(Matrix<float>(0, 8), kTraining, cache).rows() == 0);
  CHECK(network.backward(Matrix<float>(0, 8), cache).rows() == 0);

  const Matrix<float> x = test::random_matrix(5, 8, 4).cast<float>();
  const Matrix<float> y = infer(network, x);
  network.forward(x, kTraining, cache);
  set_storage(network, Storage::kPacked);
  CHECK(test::message_of<StateError>([&] { network.backward(y, cache); }) ==
        "Linear::backward: the weights are stored for inference, expected Storage::kTrainable");
  CHECK(parameters(network).empty());
  CHECK(test::relative_error(infer(network, x), y) <= 1e-6);
}

TEST_CASE("OpenMoE's network allocates nothing in the steady state", "[presets]") {
  Rng rng(4);
  OpenMoENetwork<float> network(8, 12, rng);
  OpenMoENetwork<float>::Cache cache;
  const Matrix<float> x = test::random_matrix(5, 8, 5).cast<float>();
  const auto step = [&] {
    network.forward(x, kTraining, cache);
    network.backward(x, cache);
  };
  step();
  CHECK(test::count_allocations(step) == 0);
}

TEST_CASE("OpenMoE's network says what is wrong", "[presets]") {
  Rng rng(5);
  OpenMoENetwork<double> network(3, 4, rng);
  CHECK(test::message_of<ShapeError>([&] { infer(network, Matrix<double>(2, 4)); }) ==
        "OpenMoENetwork::forward: x is [2, 4], expected [tokens, 3]");
  test::check_refused_caches(network, test::random_matrix(2, 3, 1), "OpenMoENetwork::backward");
  CHECK(test::message_of<ConfigError>([&] { OpenMoENetwork<double>(0, 4, rng); }) ==
        "Linear: d_in = 0, expected > 0");
}

}  // namespace weir::openmoe_network_test
