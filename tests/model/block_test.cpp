// SPDX-License-Identifier: MIT
#include <cstdint>
#include <limits>
#include <string>
#include <utility>
#include <vector>

#include <weir/attention/grouped_query.hpp>
#include <weir/model/block.hpp>
#include <weir/moe/balance/bias_balance.hpp>
#include <weir/moe/balance/switch_loss.hpp>
#include <weir/moe/balance/z_loss.hpp>
#include <weir/moe/capacity/dropless.hpp>
#include <weir/moe/experts/glu_bank.hpp>
#include <weir/moe/moe_layer.hpp>
#include <weir/moe/router/linear_router.hpp>
#include <weir/moe/selector/sigmoid_top_k.hpp>
#include <weir/moe/selector/softmax_top_k.hpp>
#include <weir/nn/glu.hpp>
#include <weir/nn/linear.hpp>
#include <weir/nn/rms_norm.hpp>

#include "support/allocations.hpp"
#include "support/caches.hpp"
#include "support/catch.hpp"
#include "support/gradient.hpp"

namespace weir::block_test {

namespace {

constexpr Index kModel = 4;

GroupedQueryAttention<double> attention(Rng& rng) {
  return {rng, {.d_model = kModel, .heads = 2, .kv_heads = 1}};
}

auto mixture(Rng& rng) {
  return MoELayer(LinearRouter<double>(kModel, 3, rng, {.init_scale = 1.0}),
                  SoftmaxTopK<double>({.k = 2}), Dropless(), GluBank<double>(kModel, 3, 5, rng),
                  SwitchLoss<double>({.coefficient = 0.3}), ZLoss<double>({.coefficient = 0.1}));
}

// Attention, a mixture, and a dense network behind it.
Block<double> three_branches(std::uint64_t seed) {
  Rng rng(seed);
  const RmsNorm<double> norm(kModel);
  return Block<double>({{"attention", norm, attention(rng)},
                        {"moe", norm, mixture(rng)},
                        {"mlp", norm, Glu<double>(kModel, 6, rng)}});
}

Block<double> of_linear(Linear<double> linear, const std::string& name = "linear") {
  return Block<double>({{name, RmsNorm<double>(kModel), std::move(linear)}});
}

// The identity, except that padding yields zero.
struct Masking {
  using Scalar = double;
  struct Cache {
    CacheState state;
    Matrix<double> y, dx;
  };

  const Matrix<double>& forward(MatrixIn<double> x, const Pass& pass, Cache& cache) const {
    cache.state.begin();
    cache.y = x;
    for (Index t = 0; t < x.rows(); ++t) {
      if (pass.is_padding(t)) cache.y.row(t).setZero();
    }
    return cache.state.finish(*this, pass, cache.y);
  }
  const Matrix<double>& backward(MatrixIn<double> dy, Cache& cache) {
    cache.state.begin_backward("Masking::backward", *this, dy);
    cache.dx = dy;
    return cache.dx;
  }

  template <class Self, class Visit>
  static void visit(Self& /*self*/, Visit& /*visit*/) {}
};

}  // namespace

static_assert(Layer<Block<double>>);
static_assert(DecodingLayer<Block<double>>);

TEST_CASE("Block adds one branch after the other to its input", "[model][block]") {
  Rng rng(1);
  RmsNorm<double> norm_a(kModel);
  RmsNorm<double> norm_b(kModel);
  norm_b.weight().value *= 3.0;
  const Linear<double> a(kModel, kModel, rng);
  const Linear<double> b(kModel, kModel, rng);
  const Block<double> block({{"a", norm_a, a}, {"b", norm_b, b}});
  const Matrix<double> x = test::random_matrix(5, kModel, 2);

  const Matrix<double> between = x + infer(a, infer(norm_a, x));
  const Matrix<double> expected = between + infer(b, infer(norm_b, between));
  CHECK(infer(block, x) == expected);
  PassRecord record;
  CHECK(infer(block, x, {.training = true, .record = &record}) == expected);
  CHECK(record.losses().empty());
}

TEST_CASE("Block hands the pass to norms and layers", "[model][block]") {
  Rng rng(21);
  const Linear<double> linear(kModel, kModel, rng);
  const std::vector<std::uint8_t> mask = {1, 0, 1};
  const Matrix<double> x = test::random_matrix(3, kModel, 22);
  const Block<double> blocks[] = {Block<double>({{"norm", Masking(), linear}}),
                                  Block<double>({{"layer", linear, Masking()}})};
  for (const Block<double>& block : blocks) {
    Block<double>::Cache cache;
    const Matrix<double> y = block.forward(x, {.mask = mask}, cache);
    CHECK(y.row(1) == x.row(1));
    CHECK(y.row(0) == (x + infer(linear, x)).row(0));
  }
}

TEST_CASE("Block's gradients agree with finite differences", "[model][block][gradient]") {
  Block<double> block = three_branches(3);
  const std::vector<std::uint8_t> mask = {1, 1, 1, 0, 1, 1, 1};
  const Sequences sequences({4, 3});
  const Pass pass{.sequences = &sequences, .mask = mask, .aux_scale = 0.7};
  test::check_gradients(block, test::random_matrix(7, kModel, 4), pass);
}

TEST_CASE("Block multiplies what a branch adds", "[model][block]") {
  Rng rng(31);
  RmsNorm<double> norm(kModel);
  const Linear<double> a(kModel, kModel, rng);
  const Linear<double> b(kModel, kModel, rng);
  std::vector<Branch<double>> branches = {{"a", norm, a}, {"b", norm, b}};
  branches[0].multiplier = 0.25;
  branches[1].multiplier = -2.0;
  branches[1].post_norm = norm;
  const Matrix<double> x = test::random_matrix(5, kModel, 32);
  const Matrix<double> between = x + 0.25 * infer(a, infer(norm, x));
  const Matrix<double> expected = between - 2.0 * infer(norm, infer(b, infer(norm, between)));
  CHECK(infer(Block<double>(branches), x).isApprox(expected, 1e-15));

  branches[1].parallel = true;
  const Matrix<double> beside = between - 2.0 * infer(norm, infer(b, infer(norm, x)));
  CHECK(infer(Block<double>(branches), x).isApprox(beside, 1e-15));
  branches[0].multiplier = branches[1].multiplier = 0.0;
  CHECK(infer(Block<double>(branches), x) == x);
  branches[0].multiplier = std::numeric_limits<double>::infinity();
  CHECK(test::message_of<ConfigError>([&] { Block<double> block(branches); }) ==
        "Block: multiplier = inf, expected a finite number");
}

TEST_CASE("Block's gradients with multipliers agree with finite differences",
          "[model][block][gradient]") {
  Block<double> block = three_branches(33);
  block.branches()[0].multiplier = 0.3;
  block.branches()[1].multiplier = -1.7;
  block.branches()[2].parallel = true;
  block.branches()[1].post_norm = RmsNorm<double>(kModel);
  test::check_gradients(block, test::random_matrix(7, kModel, 34), {});
}

TEST_CASE("Block's auxiliary losses are recorded by branch", "[model][block]") {
  Rng rng(5);
  const RmsNorm<double> norm(kModel);
  const Block<double> block({{"first", norm, mixture(rng)}, {"second", norm, mixture(rng)}});
  PassRecord record;
  Block<double>::Cache cache;
  const Pass pass{.training = true, .record = &record};
  block.forward(test::random_matrix(6, kModel, 6), pass, cache);
  const std::vector<std::string> names = {"first.switch", "first.z", "second.switch", "second.z"};
  REQUIRE(record.losses().size() == 4);
  double sum = 0.0;
  for (std::size_t i = 0; i < 4; ++i) {
    CHECK(record.losses()[i].name == names[i]);
    CHECK(record.losses()[i].value > 0.0);
    sum += record.losses()[i].value;
  }
  CHECK(record.aux_loss() == sum);
  block.forward(test::random_matrix(6, kModel, 6), pass, cache);
  CHECK(record.aux_loss() == Approx(2.0 * sum));  // Passes add up.
}

TEST_CASE("Block names its parameters by branch", "[model][block]") {
  Block<double> block = three_branches(7);
  std::vector<std::string> names;
  for (const auto& [name, parameter] : parameters(block)) names.push_back(name);
  const std::vector<std::string> expected = {"attention_norm.weight",
                                             "attention.query",
                                             "attention.key",
                                             "attention.value",
                                             "attention.output",
                                             "moe_norm.weight",
                                             "moe.router.weight",
                                             "moe.experts.0.gate",
                                             "moe.experts.0.up",
                                             "moe.experts.0.down",
                                             "moe.experts.1.gate",
                                             "moe.experts.1.up",
                                             "moe.experts.1.down",
                                             "moe.experts.2.gate",
                                             "moe.experts.2.up",
                                             "moe.experts.2.down",
                                             "mlp_norm.weight",
                                             "mlp.gate",
                                             "mlp.up",
                                             "mlp.down"};
  CHECK(names == expected);
}

TEST_CASE("pre_norm_block is attention and a feed-forward network", "[model][block]") {
  Rng rng(8);
  const RmsNorm<double> norm(kModel);
  const GroupedQueryAttention<double> attend = attention(rng);
  const Glu<double> glu(kModel, 6, rng);
  const Block<double> block = pre_norm_block<double>(norm, attend, norm, glu, "mlp");
  const Block<double> expected({{"attention", norm, attend}, {"mlp", norm, glu}});
  REQUIRE(block.branches().size() == 2);
  CHECK(block.branches()[0].name == "attention");
  CHECK(block.branches()[1].name == "mlp");
  const Matrix<double> x = test::random_matrix(5, kModel, 9);
  CHECK(infer(block, x) == infer(expected, x));
}

TEST_CASE("Block decodes in pieces what it computes at once", "[model][block]") {
  const Block<double> block = three_branches(10);
  const Matrix<double> x = test::random_matrix(6, kModel, 11);
  const Matrix<double> expected = infer(block, x);
  const auto piece = GENERATE(as<Index>{}, 1, 2, 6);
  Block<double>::State state;
  Block<double>::Cache cache;
  for (Index t = 0; t < 6; t += piece) {
    const Matrix<double> y = decode(block, x.middleRows(t, piece), state, cache);
    CHECK(test::relative_error(y, expected.middleRows(t, piece)) <= 1e-12);
  }
}

TEST_CASE("Block lets the balancing rules of its branches act", "[model][block]") {
  Rng rng(12);
  Block<double> block(
      {{"moe", RmsNorm<double>(kModel),
        MoELayer(LinearRouter<double>(kModel, 3, rng), SigmoidTopK<double>(3, {.k = 1}), Dropless(),
                 GluBank<double>(kModel, 3, 5, rng), BiasBalance<double>({.rate = 0.5}))}});
  const auto kept = buffers(block);
  REQUIRE(kept.size() == 1);
  CHECK(kept[0].name == "moe.selector.bias");
  Block<double>::Cache cache;
  block.forward(test::random_matrix(1, kModel, 13), kTraining, cache);
  block.backward(Matrix<double>::Ones(1, kModel), cache);
  update(block);
  CHECK(kept[0].buffer->value.cwiseAbs() == Matrix<double>::Constant(1, 3, 0.5));
}

TEST_CASE("Block takes zero tokens and one", "[model][block]") {
  Block<double> block = three_branches(14);
  const auto tokens = GENERATE(as<Index>{}, 0, 1);
  const Matrix<double> x = test::random_matrix(tokens, kModel, 15);
  Block<double>::Cache cache;
  Block<double>::State state;
  CHECK(infer(block, x).rows() == tokens);
  CHECK(decode(block, x, state, cache).rows() == tokens);
  const Matrix<double>& y = block.forward(x, kTraining, cache);
  CHECK(y.rows() == tokens);
  CHECK(y.cols() == kModel);
  const Matrix<double>& dx = block.backward(x, cache);
  CHECK(dx.rows() == tokens);
  CHECK(dx.cols() == kModel);
}

TEST_CASE("Block wants branches of different names", "[model][block]") {
  CHECK(test::message_of<ConfigError>([] { Block<double>(std::vector<Branch<double>>{}); }) ==
        "Block: branches = 0, expected >= 1");
  Rng rng(16);
  const RmsNorm<double> norm(kModel);
  const Linear<double> linear(kModel, kModel, rng);
  CHECK(test::message_of<ConfigError>([&] {
          Block<double>({{"a", norm, linear}, {"mlp", norm, linear}, {"mlp", norm, linear}});
        }) == "Block: branches 1 and 2 are both named 'mlp', expected different names");
}

TEST_CASE("Block says what is wrong with shapes and order", "[model][block]") {
  Rng rng(17);
  Block<double> block = of_linear(Linear<double>(kModel, kModel, rng));
  Block<double>::Cache cache;
  const Matrix<double> x = test::random_matrix(3, kModel, 18);
  test::check_refused_caches(block, x, "Block::backward");
  const auto backward = [&](const Matrix<double>& dy) {
    return [&block, &cache, dy] { block.backward(dy, cache); };
  };
  zero_gradients(block);
  block.forward(x, kTraining, cache);
  CHECK(test::message_of<ShapeError>(backward(x.leftCols(2))) ==
        "Block::backward: dy is [3, 2], expected [3, 4]");
  CHECK(parameters(block)[1].parameter->grad.isZero(0.0));

  Block<double>::State state;
  decode(block, x, state, cache);
  CHECK(test::message_of<StateError>(backward(x)) ==
        "Block::backward: the cache is empty, expected a forward pass that succeeded");

  const Block<double> narrow = of_linear(Linear<double>(kModel, 3, rng), "narrow");
  CHECK(test::message_of<ShapeError>([&] { infer(narrow, x); }) ==
        "Block::forward: narrow is [3, 3], expected [3, 4]");
  CHECK(test::message_of<ShapeError>([&] { decode(narrow, x, state, cache); }) ==
        "Block::decode: narrow is [3, 3], expected [3, 4]");
}

TEST_CASE("A failed forward pass of a block is no base for backward", "[model][block]") {
  Block<double> block = three_branches(19);
  Block<double>::Cache cache;
  const Matrix<double> x = test::random_matrix(3, kModel, 20);
  block.forward(x, kTraining, cache);
  Matrix<double> bad = x;
  bad(1, 1) = std::numeric_limits<double>::quiet_NaN();
  CHECK_THROWS_AS(block.forward(bad, kTraining, cache), NonFiniteError);
  CHECK(test::message_of<StateError>([&] { block.backward(x, cache); }) ==
        "Block::backward: the cache is empty, expected a forward pass that succeeded");
  CHECK(block.forward(x, kTraining, cache) == infer(block, x));
  CHECK(block.backward(x, cache).allFinite());
}

TEST_CASE("Blocks of several kinds take turns with one cache", "[model][block]") {
  Rng rng(23);
  const Block<double> blocks[] = {three_branches(24), of_linear(Linear<double>(kModel, 4, rng)),
                                  three_branches(25)};
  const Matrix<double> x = test::random_matrix(6, kModel, 26);
  Block<double>::Cache cache;
  for (int round = 0; round < 2; ++round) {
    for (const Block<double>& block : blocks) {
      CHECK(block.forward(x, Pass{}, cache) == infer(block, x));
    }
  }
  const auto run = [&] {
    for (const Block<double>& block : blocks) block.forward(x, Pass{}, cache);
  };
  run();
  CHECK(test::count_allocations(run) == 0);
}

}  // namespace weir::block_test
