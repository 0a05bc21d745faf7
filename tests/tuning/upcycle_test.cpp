// SPDX-License-Identifier: MIT
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include <weir/core/verbs.hpp>
#include <weir/model/decoder.hpp>
#include <weir/moe/capacity/dropless.hpp>
#include <weir/moe/moe_layer.hpp>
#include <weir/moe/selector/sigmoid_top_k.hpp>
#include <weir/moe/selector/softmax_top_k.hpp>
#include <weir/moe/selector/top_k_softmax.hpp>
#include <weir/moe/selector/top_p.hpp>
#include <weir/nn/rms_norm.hpp>
#include <weir/tuning/upcycle.hpp>

#include "support/catch.hpp"
#include "support/gradient.hpp"
#include "support/matrices.hpp"

namespace weir::upcycle_test {

namespace {

constexpr Index kModel = 8;
constexpr Index kHidden = 12;

Glu<double> dense_glu(std::uint64_t seed = 1) {
  Rng rng(seed);
  return Glu<double>(kModel, kHidden, rng);
}

template <class Dense, class Selector>
auto upcycled(const Dense& dense, Selector selector, const UpcycleConfig& config) {
  Rng rng(5);
  auto router = upcycled_router<double>(kModel, config, rng);
  return MoELayer(std::move(router), std::move(selector), Dropless(),
                  upcycled_bank(dense, config, rng));
}

Matrix<double> x() {
  return test::random_matrix<double>(30, kModel, 4);
}

Matrix<double> value_of(auto& layer, const std::string& name) {
  for (const auto& [own, parameter] : parameters(layer)) {
    if (own == name) return parameter->value;
  }
  return {};
}

}  // namespace

TEST_CASE("An upcycled network is the dense one at step 0, for weights that sum to one",
          "[tuning]") {
  const auto granularity = GENERATE(as<Index>{}, 1, 2, 3);
  const UpcycleConfig config = {.copies = 4, .granularity = granularity, .router_scale = 4.0};
  const Index k = 2 * granularity;
  const Index experts = config.experts();
  const Glu<double> dense = dense_glu();
  const Matrix<double> y = infer(dense, x());
  const auto check = [&](auto selector) {
    auto moe = upcycled(dense, selector, config);
    CHECK(test::relative_error(infer(moe, x()), y) < 1e-13);
  };
  check(TopKSoftmax<double>({.k = k}));
  check(SoftmaxTopK<double>({.k = k, .renormalise = true}));
  check(SigmoidTopK<double>(experts, {.k = k}));

  Rng rng(2);
  const Mlp<double, Silu> mlp(kModel, kHidden, rng, {.bias = true});
  Mlp<double, Silu> biased = mlp;
  biased.in_bias().value = test::random_matrix<double>(1, kHidden, 7);
  biased.out_bias().value = test::random_matrix<double>(1, kModel, 8);
  auto moe = upcycled(biased, TopKSoftmax<double>({.k = k}), config);
  CHECK(test::relative_error(infer(moe, x()), infer(biased, x())) < 1e-13);
}

TEST_CASE("Experts of a virtual group are chosen together", "[tuning]") {
  const UpcycleConfig config = {.copies = 4, .granularity = 3, .router_scale = 4.0};
  auto moe = upcycled(dense_glu(), TopKSoftmax<double>({.k = 6}), config);
  decltype(moe)::Cache cache;
  moe.forward(x(), {}, cache);
  std::vector<Index> groups(4);
  for (Index t = 0; t < 30; ++t) {
    std::vector<Index> count(4);
    for (Index a = cache.routing.first(t); a < cache.routing.last(t); ++a) {
      ++count[static_cast<std::size_t>(cache.routing.expert[a] / 3)];
    }
    for (std::size_t g = 0; g < 4; ++g) {
      CHECK((count[g] == 0 || count[g] == 3));
      groups[g] += count[g];
    }
  }
  CHECK(std::count(groups.begin(), groups.end(), 0) < 3);  // Not the same for all tokens.
}

TEST_CASE("With raw probabilities the output is that of the dense network if the router is level",
          "[tuning]") {
  UpcycleConfig config = {.copies = 4, .granularity = 2, .raw_k = 4};
  const Glu<double> dense = dense_glu();
  auto moe = upcycled(dense, SoftmaxTopK<double>({.k = 4, .renormalise = false}), config);
  moe.router().weight().value.setZero();
  CHECK(config.output_factor() == 4.0);
  CHECK(test::relative_error(infer(moe, x()), infer(dense, x())) < 1e-13);
}

TEST_CASE("The published scale is the cube root on all three maps, cut in Megatron-Core's order",
          "[tuning][golden]") {
  // upcycling_utils.py: fc1 and fc2 times granularity^(1/3), part i of the hidden numbers in each
  // expert that is i modulo granularity; router rows repeated granularity times.
  const Glu<double> dense = dense_glu();
  const UpcycleConfig config = {.copies = 2, .granularity = 3, .scale = UpcycleScale::kEven};
  auto moe = upcycled(dense, TopKSoftmax<double>({.k = 3}), config);
  const double root = std::pow(3.0, 1.0 / 3.0);
  for (Index e = 0; e < 6; ++e) {
    const Index first = e % 3 * 4;
    const std::string expert = "experts." + std::to_string(e) + ".";
    CHECK(test::relative_error(value_of(moe, expert + "gate"),
                               Matrix<double>(root * dense.gate().value.middleRows(first, 4))) <
          1e-15);
    CHECK(test::relative_error(value_of(moe, expert + "up"),
                               Matrix<double>(root * dense.up().value.middleRows(first, 4))) <
          1e-15);
    CHECK(test::relative_error(value_of(moe, expert + "down"),
                               Matrix<double>(root * dense.down().value.middleCols(first, 4))) <
          1e-15);
    CHECK(value_of(moe, "router.weight").row(e) == value_of(moe, "router.weight").row(e / 3 * 3));
  }
  CHECK(value_of(moe, "router.weight").row(0) != value_of(moe, "router.weight").row(3));

  // Exact where the activation is homogeneous.
  Rng rng(1);
  const Mlp<double, Relu> mlp(kModel, kHidden, rng);
  auto relu = upcycled(mlp, TopKSoftmax<double>({.k = 3}), config);
  CHECK(test::relative_error(infer(relu, x()), infer(mlp, x())) < 1e-13);
  const Mlp<double, SquaredRelu> square(kModel, kHidden, rng);  // Both maps by the cube root.
  auto squared = upcycled(square, TopKSoftmax<double>({.k = 3}), config);
  CHECK(test::relative_error(infer(squared, x()), infer(square, x())) < 1e-13);
}

TEST_CASE("Drop-Upcycling draws a share of the neurons of each expert anew, the same in all maps",
          "[tuning]") {
  Rng rng(1);
  const Glu<double> dense(64, 200, rng);
  const UpcycleConfig config = {.copies = 3, .drop = 0.3};
  auto bank = upcycled_bank(dense, config, rng);
  std::vector<std::vector<bool>> dropped;
  for (Index e = 0; e < 3; ++e) {
    const std::string expert = std::to_string(e) + ".";
    const Matrix<double> gate = value_of(bank, expert + "gate");
    const Matrix<double> up = value_of(bank, expert + "up");
    const Matrix<double> down = value_of(bank, expert + "down");
    std::vector<bool> of_expert;
    Matrix<double> drawn(60, 64);
    Matrix<double> original(60, 64);
    Index count = 0;
    for (Index i = 0; i < 200; ++i) {
      const bool is = gate.row(i) != dense.gate().value.row(i);
      CHECK((up.row(i) != dense.up().value.row(i)) == is);
      CHECK((down.col(i) != dense.down().value.col(i)) == is);
      of_expert.push_back(is);
      if (is && count < 60) {
        drawn.row(count) = gate.row(i);
        original.row(count) = dense.gate().value.row(i);
      }
      count += is ? 1 : 0;
    }
    CHECK(count == 60);
    CHECK(drawn.norm() / original.norm() == Approx(1.0).epsilon(0.05));
    CHECK(std::abs(drawn.mean() - original.mean()) <
          4.0 * original.norm() / std::sqrt(60.0 * 64.0) / std::sqrt(60.0 * 64.0));
    dropped.push_back(std::move(of_expert));
  }
  CHECK(dropped[0] != dropped[1]);
  CHECK(dropped[1] != dropped[2]);
}

TEST_CASE("Noise is relative to the deviation of each weight", "[tuning]") {
  Rng rng(1);
  const Glu<double> dense(64, 100, rng);
  auto bank = upcycled_bank(dense, {.copies = 2, .noise = 0.1}, rng);
  for (const char* const name : {"0.gate", "1.gate"}) {
    const Matrix<double> noise = value_of(bank, name) - dense.gate().value;
    CHECK(noise.norm() / dense.gate().value.norm() == Approx(0.1).epsilon(0.05));
  }
  CHECK(value_of(bank, "0.gate") != value_of(bank, "1.gate"));
}

TEST_CASE("Blocks of a decoder are upcycled, and their gradients agree with differences",
          "[tuning][gradient]") {
  Rng rng(3);
  std::vector<Block<double>> blocks;
  for (int l = 0; l < 2; ++l) {
    std::vector<Branch<double>> branches;
    branches.push_back({"mlp", RmsNorm<double>(kModel), dense_glu(static_cast<std::uint64_t>(l))});
    blocks.emplace_back(std::move(branches));
  }
  Decoder<double> model(Embedding<double>(7, kModel, rng), std::move(blocks),
                        RmsNorm<double>(kModel));
  const std::vector<Index> ids = {1, 5, 2, 6, 6};
  const Matrix<double> logits = infer(model, ids);
  const UpcycleConfig config = {.copies = 3, .granularity = 2, .router_scale = 4.0};
  const auto make = [&](const AnyLayer<double>& dense, Index layer) {
    if (layer == 0) return std::optional<AnyLayer<double>>();
    return std::optional<AnyLayer<double>>(
        upcycled(*dense.get<Glu<double>>(), TopKSoftmax<double>({.k = 2}), config));
  };
  CHECK(upcycle_blocks(model.layers(), "mlp", "moe", make) == 1);
  CHECK(test::relative_error(infer(model, ids), logits) < 1e-13);
  CHECK(value_of(model, "layers.1.moe.router.weight").rows() == 6);
  CHECK(value_of(model, "layers.0.mlp.gate").rows() == kHidden);
  test::check_gradients(model.layers()[1], test::random_matrix<double>(4, kModel, 3));
  CHECK(test::message_of<ConfigError>([&] {
          upcycle_blocks(model.layers(), "ffn", "moe", make);
        }) == "upcycle_blocks: no block has a branch 'ffn', expected at least one");
}

TEST_CASE("Upcycling refuses settings out of range", "[tuning]") {
  Rng rng(1);
  Glu<double> dense = dense_glu();
  const auto message = [&](const UpcycleConfig& config) {
    return test::message_of<ConfigError>([&] { upcycled_bank(dense, config, rng); });
  };
  CHECK(message({.copies = 0}) == "upcycle: copies = 0, expected >= 1");
  CHECK(message({.granularity = 5}) ==
        "upcycle: granularity = 5, expected a divisor of d_hidden = 12");
  CHECK(message({.drop = 1.5}) == "upcycle: drop = 1.5, expected 0 <= drop <= 1");
  CHECK(message({.noise = -1.0}) == "upcycle: noise = -1, expected a finite number >= 0");
  CHECK(message({.raw_k = -1}) == "upcycle: raw_k = -1, expected >= 0");
  CHECK(test::message_of<ConfigError>([&] { upcycled_router<double>(0, {}, rng); }) ==
        "upcycled_router: d_model = 0, expected >= 1");
  const Mlp<double> mlp(kModel, kHidden, rng, {.bias = true});
  CHECK(test::message_of<ConfigError>([&] {
          upcycled_bank(mlp, {.scale = UpcycleScale::kEven}, rng);
        }) == "upcycled_bank: scale = kEven with biases, expected kOutput");
  dense.set_storage(Storage::kPacked);
  CHECK(test::message_of<StateError>([&] { upcycled_bank(dense, {}, rng); }) ==
        "upcycled_bank: the weights are stored for inference, expected Storage::kTrainable");
}

}  // namespace weir::upcycle_test
