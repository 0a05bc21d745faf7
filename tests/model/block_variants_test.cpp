// SPDX-License-Identifier: MIT
// Blocks with norms behind their layers, with parallel branches, and with a dense network beside or
// behind the mixture.
#include <cstdint>
#include <string>
#include <utility>
#include <vector>

#include <weir/attention/grouped_query.hpp>
#include <weir/model/block.hpp>
#include <weir/moe/balance/switch_loss.hpp>
#include <weir/moe/capacity/dropless.hpp>
#include <weir/moe/experts/glu_bank.hpp>
#include <weir/moe/moe_layer.hpp>
#include <weir/moe/router/linear_router.hpp>
#include <weir/moe/selector/softmax_top_k.hpp>
#include <weir/nn/glu.hpp>
#include <weir/nn/linear.hpp>
#include <weir/nn/rms_norm.hpp>

#include "support/allocations.hpp"
#include "support/catch.hpp"
#include "support/gradient.hpp"

namespace weir::block_variants_test {

namespace {

constexpr Index kModel = 4;

RmsNorm<double> norm(Rng& rng) {
  RmsNorm<double> rms(kModel);
  rms.weight().value += normal_init<double>(1, kModel, 0.3, rng);
  return rms;
}

GroupedQueryAttention<double> attention(Rng& rng) {
  return {rng, {.d_model = kModel, .heads = 2, .kv_heads = 1}};
}

auto mixture(Rng& rng) {
  return MoELayer(LinearRouter<double>(kModel, 3, rng, {.init_scale = 1.0}),
                  SoftmaxTopK<double>({.k = 2}), Dropless(), GluBank<double>(kModel, 3, 5, rng),
                  SwitchLoss<double>({.coefficient = 0.3}));
}

Glu<double> dense(Rng& rng) {
  return {kModel, 6, rng, {.init_scale = 1.0}};
}

// Norms before and behind each layer, as in Grok-1.
Block<double> sandwich(std::uint64_t seed) {
  Rng rng(seed);
  return Block<double>({{"attention", norm(rng), attention(rng), norm(rng)},
                        {"moe", norm(rng), mixture(rng), norm(rng)}});
}

// A mixture and a dense network side by side behind the attention, as in OpenMoE's equation.
Block<double> dense_beside(std::uint64_t seed) {
  Rng rng(seed);
  return Block<double>({{"attention", norm(rng), attention(rng)},
                        {"moe", norm(rng), mixture(rng)},
                        {.name = "mlp", .norm = norm(rng), .layer = dense(rng), .parallel = true}});
}

// As in OpenMoE's code.
Block<double> dense_behind(std::uint64_t seed) {
  Rng rng(seed);
  return Block<double>({{"attention", norm(rng), attention(rng)},
                        {"moe", norm(rng), mixture(rng)},
                        {"mlp", norm(rng), dense(rng)}});
}

// Two groups: three branches side by side, one of them with a norm behind, then two.
Block<double> two_groups(std::uint64_t seed) {
  Rng rng(seed);
  return Block<double>(
      {{"attention", norm(rng), attention(rng)},
       {"mlp", norm(rng), dense(rng), norm(rng), true},
       {.name = "moe", .norm = norm(rng), .layer = mixture(rng), .parallel = true},
       {"second_moe", norm(rng), mixture(rng)},
       {.name = "second_mlp", .norm = norm(rng), .layer = dense(rng), .parallel = true}});
}

using MakeBlock = Block<double>(std::uint64_t seed);

}  // namespace

TEST_CASE("A norm behind a layer applies to the branch alone", "[model][block]") {
  Rng rng(1);
  const RmsNorm<double> before = norm(rng);
  const RmsNorm<double> behind = norm(rng);
  const Linear<double> layer(kModel, kModel, rng);
  const Block<double> block({{"layer", before, layer, behind}});
  const Matrix<double> x = test::random_matrix(5, kModel, 2);
  CHECK(infer(block, x) == x + infer(behind, infer(layer, infer(before, x))));
}

TEST_CASE("Parallel branches read the same x", "[model][block]") {
  Rng rng(3);
  const RmsNorm<double> norms[] = {norm(rng), norm(rng), norm(rng)};
  const Linear<double> a(kModel, kModel, rng);
  const Linear<double> b(kModel, kModel, rng);
  const Linear<double> c(kModel, kModel, rng);
  const Block<double> block({{"a", norms[0], a},
                             {.name = "b", .norm = norms[1], .layer = b, .parallel = true},
                             {"c", norms[2], c}});
  const Matrix<double> x = test::random_matrix(5, kModel, 4);
  const Matrix<double> between = x + infer(a, infer(norms[0], x)) + infer(b, infer(norms[1], x));
  CHECK(test::relative_error(infer(block, x), between + infer(c, infer(norms[2], between))) <=
        1e-15);
}

TEST_CASE("A dense network beside the mixture is not one behind it", "[model][block]") {
  const Matrix<double> x = test::random_matrix(5, kModel, 5);
  const Matrix<double> beside = infer(dense_beside(6), x);
  const Matrix<double> behind = infer(dense_behind(6), x);
  CHECK(test::relative_error(beside, behind) > 1e-3);
}

TEST_CASE("All kinds of blocks have the gradients of finite differences",
          "[model][block][gradient]") {
  const auto make = GENERATE(as<MakeBlock*>{}, sandwich, dense_beside, dense_behind, two_groups);
  Block<double> block = make(7);
  const std::vector<std::uint8_t> mask = {1, 1, 0, 1, 1};
  const Sequences sequences({3, 2});
  const Pass pass{.sequences = &sequences, .mask = mask, .aux_scale = 0.7};
  test::check_gradients(block, test::random_matrix(5, kModel, 8), pass);
}

TEST_CASE("All kinds of blocks decode in pieces, together, what they compute at once",
          "[model][block]") {
  const auto make = GENERATE(as<MakeBlock*>{}, sandwich, dense_beside, dense_behind, two_groups);
  const Block<double> block = make(9);
  const Matrix<double> a = test::random_matrix(6, kModel, 10);
  const Matrix<double> b = test::random_matrix(4, kModel, 11);
  const Matrix<double> expected_a = infer(block, a);
  const Matrix<double> expected_b = infer(block, b);
  Block<double>::State state_a, state_b;
  Block<double>::State* const states[] = {&state_a, &state_b};
  Block<double>::Cache cache;
  const Sequences sequences({3, 2});
  const Pass pass{.sequences = &sequences};
  const auto decode = [&](Index at_a, Index at_b) {
    Matrix<double> x(5, kModel);
    x << a.middleRows(at_a, 3), b.middleRows(at_b, 2);
    Matrix<double> expected(5, kModel);
    expected << expected_a.middleRows(at_a, 3), expected_b.middleRows(at_b, 2);
    return test::relative_error(block.decode(x, pass, states, cache), expected);
  };
  CHECK(decode(0, 0) <= 1e-12);
  CHECK(decode(3, 2) <= 1e-12);
  state_a.truncate(3);
  state_b.truncate(2);
  CHECK(decode(3, 2) <= 1e-12);
  state_a.truncate(0);
  state_b.truncate(0);
  CHECK(decode(0, 0) <= 1e-12);
}

TEST_CASE("Block names the parameters of a norm behind a layer", "[model][block]") {
  Rng rng(12);
  const RmsNorm<double> rms(kModel);
  Block<double> block({{"a", rms, Linear<double>(kModel, kModel, rng), rms},
                       {"b", rms, Linear<double>(kModel, kModel, rng)}});
  std::vector<std::string> names;
  for (const auto& [name, parameter] : parameters(block)) names.push_back(name);
  CHECK(names == std::vector<std::string>{"a_norm.weight", "a.weight", "a_post_norm.weight",
                                          "b_norm.weight", "b.weight"});
}

TEST_CASE("All kinds of blocks allocate nothing once they have run before", "[model][block]") {
  const auto make = GENERATE(as<MakeBlock*>{}, sandwich, two_groups);
  Block<double> block = make(13);
  const Matrix<double> x = test::random_matrix(6, kModel, 14);
  Block<double>::Cache cache;
  const auto step = [&] { block.backward(block.forward(x, kTraining, cache), cache); };
  step();
  step();
  CHECK(test::count_allocations(step) == 0);
}

TEST_CASE("The first branch of a block is parallel to nothing", "[model][block]") {
  Rng rng(15);
  const Branch<double> branch{.name = "mlp",
                              .norm = RmsNorm<double>(kModel),
                              .layer = Linear<double>(kModel, kModel, rng),
                              .parallel = true};
  CHECK(test::message_of<ConfigError>([&] { Block<double>({branch}); }) ==
        "Block: branch 0, 'mlp', is parallel, expected a branch before it");
  const Branch<double> narrow{"narrow", RmsNorm<double>(kModel), Linear<double>(kModel, 3, rng),
                              RmsNorm<double>(3)};
  CHECK(test::message_of<ShapeError>([&] {
          infer(Block<double>({narrow}), test::random_matrix(2, kModel, 16));
        }) == "Block::forward: narrow is [2, 3], expected [2, 4]");
}

}  // namespace weir::block_variants_test
