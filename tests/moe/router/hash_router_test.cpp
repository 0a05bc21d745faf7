// SPDX-License-Identifier: MIT
#include <cstdint>
#include <vector>

#include <weir/model/decoder.hpp>
#include <weir/moe/capacity/dropless.hpp>
#include <weir/moe/concepts.hpp>
#include <weir/moe/experts/glu_bank.hpp>
#include <weir/moe/moe_layer.hpp>
#include <weir/moe/router/hash_router.hpp>
#include <weir/moe/selector/softmax_top_k.hpp>
#include <weir/moe/selector/top_k_softmax.hpp>
#include <weir/nn/rms_norm.hpp>

#include "support/allocations.hpp"
#include "support/catch.hpp"
#include "support/gradient.hpp"
#include "support/matrices.hpp"

namespace weir::hash_router_test {

static_assert(Router<HashRouter<float>>);

namespace {

const std::vector<Index> kTable = {2, 0, 1, 2, 0};

auto make_layer(std::uint64_t seed) {
  Rng rng(seed);
  return MoELayer(HashRouter<double>(4, 3, kTable), TopKSoftmax<double>({.k = 1}), Dropless(),
                  GluBank<double>(4, 3, 6, rng));
}

}  // namespace

TEST_CASE("HashRouter sends each id where its table says, with weight 1",
          "[moe][router][hash_router]") {
  const std::vector<Index> ids = {4, 0, 0, 2, 3, 1};
  const std::vector<Index> expected = {0, 2, 2, 1, 2, 0};
  const Matrix<double> x = test::random_matrix(6, 4, 1);
  const auto check = [&](const auto& selector) {
    Rng rng(2);
    MoELayer moe(HashRouter<double>(4, 3, kTable), selector, Dropless(),
                 GluBank<double>(4, 3, 6, rng));
    typename decltype(moe)::Cache cache;
    moe.forward(x, {.token_ids = ids}, cache);
    CHECK(cache.routing.expert == expected);
    for (const double weight : cache.routing.weight) CHECK(weight == 1.0);
  };
  check(TopKSoftmax<double>({.k = 1}));
  check(SoftmaxTopK<double>({.k = 1}));
}

TEST_CASE("HashRouter does not look at the token", "[moe][router][hash_router]") {
  HashRouter<double> router(4, 3, kTable);
  const std::vector<Index> ids = {1, 3};
  HashRouter<double>::Cache cache;
  const Matrix<double> logits =
      router.forward(test::random_matrix(2, 4, 3), {.token_ids = ids}, cache);
  const Pass training{.training = true, .token_ids = ids};
  CHECK(router.forward(test::random_matrix(2, 4, 4), training, cache) == logits);
  CHECK(router.backward(test::random_matrix(2, 3, 5), cache) == Matrix<double>::Zero(2, 4));
  CHECK(parameters(router).empty());
}

TEST_CASE("HashRouter gives padding no expert, and does not read its id",
          "[moe][router][hash_router]") {
  const auto moe = make_layer(8);
  const std::vector<Index> ids = {4, -1, 2};
  const std::vector<std::uint8_t> mask = {1, 0, 1};
  decltype(make_layer(0))::Cache cache;
  moe.forward(test::random_matrix(3, 4, 9), {.mask = mask, .token_ids = ids}, cache);
  CHECK(cache.routing.expert == std::vector<Index>{0, 1});
}

TEST_CASE("A hash layer has the gradients of finite differences",
          "[moe][router][hash_router][gradient]") {
  auto moe = make_layer(10);
  const std::vector<Index> ids = {4, 0, 0, 2, 3, 1};
  test::check_gradients(moe, test::random_matrix(6, 4, 11), {.token_ids = ids});
}

TEST_CASE("A decoder tells its layers the ids", "[moe][router][hash_router][model]") {
  Rng rng(12);
  std::vector<Block<double>> layers;
  layers.push_back(Block<double>({{"moe", RmsNorm<double>(4), make_layer(13)}}));
  const Decoder<double> decoder(Embedding<double>(5, 4, rng), std::move(layers),
                                RmsNorm<double>(4));
  const std::vector<Index> ids = {1, 0, 2, 2};
  Decoder<double>::Cache cache;
  PassRecord record(PassRecord::Collects::kLossesAndReports);
  decoder.forward(ids, {.record = &record}, cache);
  CHECK(record.reports()[0].report.load == std::vector<Index>{1, 2, 1});
  // Those of the pass come first.
  const std::vector<Index> others = {1, 1, 1, 4};
  record.clear();
  decoder.forward(ids, {.token_ids = others, .record = &record}, cache);
  CHECK(record.reports()[0].report.load == std::vector<Index>{4, 0, 0});
}

TEST_CASE("A hash layer allocates nothing in the steady state", "[moe][router][hash_router]") {
  auto moe = make_layer(14);
  const std::vector<Index> ids = {4, 0, 0, 2};
  const Matrix<double> x = test::random_matrix(4, 4, 15);
  decltype(moe)::Cache cache;
  const auto step = [&] {
    moe.forward(x, {.training = true, .token_ids = ids}, cache);
    moe.backward(x, cache);
  };
  step();
  step();
  CHECK(test::count_allocations(step) == 0);
}

TEST_CASE("HashRouter keeps its table in a checkpoint", "[moe][router][hash_router]") {
  HashRouter<float> router(4, 3, kTable);
  const auto named = buffers(router);
  REQUIRE(named.size() == 1);
  CHECK(named[0].name == "table");
  named[0].buffer->value(0, 1) = 2.0F;
  CHECK(router.expert_of(1) == 2);
  named[0].buffer->value(0, 1) = 3.0F;
  CHECK(test::message_of<ConfigError>([&] { router.expert_of(1); }) ==
        "HashRouter: table[1] = 3, expected 0 <= expert < experts = 3");
}

TEST_CASE("HashRouter says what does not fit", "[moe][router][hash_router]") {
  const auto config = [](const auto& action) { return test::message_of<ConfigError>(action); };
  CHECK(config([] { HashRouter<float>(0, 3, kTable); }) ==
        "HashRouter: d_model = 0, expected >= 1");
  CHECK(config([] { HashRouter<float>(4, 0, kTable); }) ==
        "HashRouter: experts = 0, expected >= 1");
  CHECK(config([] { HashRouter<float>(4, 2, kTable); }) ==
        "HashRouter: table[0] = 2, expected 0 <= expert < experts = 2");
  CHECK(config([] { HashRouter<float>(4, 2, {}); }) ==
        "HashRouter: the table is empty, expected one per id");

  HashRouter<double> router(4, 3, kTable);
  HashRouter<double>::Cache cache;
  const Matrix<double> x = Matrix<double>::Zero(2, 4);
  CHECK(test::message_of<StateError>([&] { router.backward(Matrix<double>::Zero(2, 3), cache); }) ==
        "HashRouter::backward: the cache is empty, expected a forward pass that succeeded");
  CHECK(config([&] { infer(router, x); }) ==
        "HashRouter::forward: pass.token_ids is empty, expected one id per token");
  CHECK(infer(router, Matrix<double>(0, 4)).cols() == 3);
  const std::vector<Index> three = {0, 1, 2};
  CHECK(test::message_of<ShapeError>([&] { router.forward(x, {.token_ids = three}, cache); }) ==
        "HashRouter::forward: pass.token_ids has 3 entries, expected 2 (one per token)");
  CHECK(test::message_of<ShapeError>([&] { infer(router, Matrix<double>(2, 3)); }) ==
        "HashRouter::forward: x is [2, 3], expected [tokens, 4]");
  const std::vector<Index> unknown = {0, 5};
  CHECK(config([&] { router.forward(x, {.token_ids = unknown}, cache); }) ==
        "HashRouter: token id 5, expected 0 <= id < vocab = 5");
  const std::vector<Index> negative = {0, -1};
  CHECK(config([&] { router.forward(x, {.token_ids = negative}, cache); }) ==
        "HashRouter: token id -1, expected 0 <= id < vocab = 5");
  const std::vector<Index> no_expert = {0, -1};
  CHECK(config([&] { HashRouter<float>(4, 3, no_expert); }) ==
        "HashRouter: table[1] = -1, expected 0 <= expert < experts = 3");
}

}  // namespace weir::hash_router_test
