// SPDX-License-Identifier: MIT
#include <utility>

#include <weir/model/any_layer.hpp>
#include <weir/moe/balance/switch_loss.hpp>
#include <weir/moe/capacity/dropless.hpp>
#include <weir/moe/concepts.hpp>
#include <weir/moe/experts/glu_bank.hpp>
#include <weir/moe/moe_layer.hpp>
#include <weir/moe/router/jitter_router.hpp>
#include <weir/moe/router/layer_router.hpp>
#include <weir/moe/router/linear_router.hpp>
#include <weir/moe/selector/softmax_top_k.hpp>
#include <weir/nn/linear.hpp>

#include "support/allocations.hpp"
#include "support/catch.hpp"
#include "support/gradient.hpp"
#include "support/matrices.hpp"

namespace weir::layer_router_test {

namespace {

/// As a user would write it: tanh between two projections.
struct Network {
  using Scalar = double;
  struct Cache {
    Linear<double>::Cache in, out;
    Matrix<double> hidden, d_hidden;
  };

  Network(Index d_model, Index width, Index experts, Rng& rng)
      : in(d_model, width, rng), out(width, experts, rng) {}

  const Matrix<double>& forward(MatrixIn<double> x, const Pass& pass, Cache& cache) const {
    cache.hidden = in.forward(x, pass, cache.in).array().tanh();
    return out.forward(cache.hidden, pass, cache.out);
  }
  const Matrix<double>& backward(MatrixIn<double> dz, Cache& cache) {
    cache.d_hidden = out.backward(dz, cache.out);
    cache.d_hidden.array() *= 1.0 - cache.hidden.array().square();
    return in.backward(cache.d_hidden, cache.in);
  }
  template <class Self, class Visit>
  static void visit(Self& self, Visit& visit) {
    visit("in", self.in);
    visit("out", self.out);
  }

  Linear<double> in, out;
};

LayerRouter<Network> make(Rng& rng) {
  return {Network(5, 7, 4, rng), 5, 4};
}

}  // namespace

static_assert(Router<LayerRouter<Network>>);
static_assert(Router<JitterRouter<LayerRouter<Network>>>);
static_assert(Router<LayerRouter<AnyLayer<double>>>);

TEST_CASE("A LayerRouter of a projection is a LinearRouter", "[moe][router][layer_router]") {
  const Matrix<double> weight = test::random_matrix(4, 5, 1);
  const Matrix<double> x = test::random_matrix(6, 5, 2);
  const LayerRouter router(Linear<double>(weight), 5, 4);
  CHECK(test::relative_error(infer(router, x), infer(LinearRouter<double>(weight), x)) <= 1e-15);
  CHECK(router.groups() == 0);
  CHECK(router.expert_vectors() == nullptr);
}

TEST_CASE("A LayerRouter gives the logits of its layer, and has its parameters",
          "[moe][router][layer_router]") {
  Rng rng(1);
  LayerRouter<Network> router = make(rng);
  const Matrix<double> x = test::random_matrix(6, 5, 2);
  CHECK(infer(router, x) == infer(router.layer(), x));
  const auto all = parameters(router);
  REQUIRE(all.size() == 2);
  CHECK(all[0].name == "in.weight");
  CHECK(all[1].name == "out.weight");
}

TEST_CASE("LayerRouter gradients agree with finite differences, alone and in a layer",
          "[moe][router][layer_router][gradient]") {
  Rng rng(3);
  LayerRouter<Network> router = make(rng);
  test::check_gradients(router, test::random_matrix(6, 5, 4));
  MoELayer moe(std::move(router), SoftmaxTopK<double>({.k = 2}), Dropless(),
               GluBank<double>(5, 4, 6, rng), SwitchLoss<double>({.coefficient = 0.5}));
  test::check_gradients(moe, test::random_matrix(6, 5, 10));
}

TEST_CASE("A LayerRouter of an AnyLayer, in a layer behind an AnyLayer, has the exact gradient",
          "[moe][router][layer_router][gradient]") {
  Rng rng(8);
  const Network network(5, 7, 4, rng);
  const auto layer = [&](auto inner) {
    Rng same(9);
    return MoELayer(LayerRouter(std::move(inner), 5, 4), SoftmaxTopK<double>({.k = 2}), Dropless(),
                    GluBank<double>(5, 4, 6, same), SwitchLoss<double>({.coefficient = 0.5}));
  };
  AnyLayer<double> any(layer(AnyLayer<double>(network)));
  const Matrix<double> x = test::random_matrix(6, 5, 10);
  CHECK(infer(any, x) == infer(layer(network), x));
  test::check_gradients(any, x);
  AnyLayer<double> copy = any;
  REQUIRE(parameters(copy).size() == 14);
  CHECK(parameters(copy)[0].name == "router.in.weight");
}

TEST_CASE("A LayerRouter allocates no more than its layer, and takes no tokens",
          "[moe][router][layer_router]") {
  Rng rng(5);
  LayerRouter router(Linear<double>(5, 4, rng), 5, 4);
  const Matrix<double> x = test::random_matrix(6, 5, 1);
  const Matrix<double> d = test::random_matrix(6, 4, 2);
  decltype(router)::Cache cache;
  const auto step = [&] {
    router.forward(x, kTraining, cache);
    router.backward(d, cache);
  };
  step();
  CHECK(test::count_allocations(step) == 0);
  CHECK(router.forward(Matrix<double>(0, 5), {}, cache).cols() == 4);
}

TEST_CASE("A LayerRouter says what does not fit", "[moe][router][layer_router]") {
  Rng rng(7);
  const auto message = [&](Index d_model, Index experts) {
    return test::message_of<ConfigError>(
        [&] { LayerRouter(Linear<double>(5, 4, rng), d_model, experts); });
  };
  CHECK(message(0, 4) == "LayerRouter: d_model = 0, expected >= 1");
  CHECK(message(5, 0) == "LayerRouter: experts = 0, expected >= 1");
  const LayerRouter narrow(Linear<double>(5, 3, rng), 5, 4);
  CHECK(test::message_of<ShapeError>([&] { infer(narrow, test::random_matrix(2, 5, 1)); }) ==
        "LayerRouter::forward: the layer's output is [2, 3], expected [2, 4]");
  CHECK(test::message_of<ShapeError>([&] { infer(narrow, test::random_matrix(2, 6, 1)); }) ==
        "LayerRouter::forward: x is [2, 6], expected [tokens, 5]");
}

}  // namespace weir::layer_router_test
