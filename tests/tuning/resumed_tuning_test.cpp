// SPDX-License-Identifier: MIT
// Runs of fine-tuning that are stopped and resumed are those that were not, bit for bit.
#include <cstdint>
#include <functional>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include <weir/core/verbs.hpp>
#include <weir/io/checkpoint.hpp>
#include <weir/model/any_layer.hpp>
#include <weir/model/decoder.hpp>
#include <weir/moe/balance/switch_loss.hpp>
#include <weir/moe/capacity/adaptive_capacity.hpp>
#include <weir/moe/experts/glu_bank.hpp>
#include <weir/moe/moe_layer.hpp>
#include <weir/moe/router/linear_router.hpp>
#include <weir/moe/selector/top_k_softmax.hpp>
#include <weir/nn/cross_entropy.hpp>
#include <weir/nn/glu.hpp>
#include <weir/nn/rms_norm.hpp>
#include <weir/optim/adamw.hpp>
#include <weir/tuning/lora.hpp>
#include <weir/tuning/training_parts.hpp>
#include <weir/tuning/upcycle.hpp>

#include "io/folder.hpp"
#include "support/catch.hpp"
#include "support/texts.hpp"

namespace weir::resumed_tuning_test {

namespace {

constexpr Index kModel = 8;
constexpr Index kVocab = 11;

AnyLayer<float> mixture(GluBank<float> bank, LinearRouter<float> router) {
  return MoELayer(std::move(router), TopKSoftmax<float>({.k = 2}), AdaptiveCapacity<float>(),
                  std::move(bank), SwitchLoss<float>({.coefficient = 0.1}));
}

Decoder<float> decoder_of(const AnyLayer<float>& network, const std::string& name,
                          std::uint64_t seed) {
  Rng rng(seed);
  const RmsNorm<float> norm(kModel);
  // A block without attention: a network behind a norm.
  std::vector<Block<float>> layers;
  for (int l = 0; l < 2; ++l) {
    layers.push_back(
        pre_norm_block<float>(norm, Linear<float>(kModel, kModel, rng), norm, network, name));
  }
  return {Embedding<float>(kVocab, kModel, rng), std::move(layers), norm,
          Linear<float>(kModel, kVocab, rng)};
}

/// A decoder with mixtures; those of different seeds are different.
Decoder<float> sparse(std::uint64_t seed = 1) {
  Rng rng(seed);
  GluBank<float> bank(kModel, 4, 6, rng);
  return decoder_of(mixture(std::move(bank), LinearRouter<float>(kModel, 4, rng)), "moe", seed);
}

Decoder<float> dense(std::uint64_t seed = 1) {
  Rng rng(seed);
  return decoder_of(Glu<float>(kModel, 6, rng), "mlp", seed);
}

using BeforeStep = std::function<void(Decoder<float>&, Index step)>;

/// Trains from one step to another. `begin` is called before the forward pass of each step, `end`
/// before the optimizer's step.
void train(Decoder<float>& model, AdamW<float>& optimizer, Rng& rng, Index from, Index to,
           const BeforeStep& begin, const BeforeStep& end) {
  Decoder<float>::Cache cache;
  CrossEntropy<float>::Cache loss_cache;
  const CrossEntropy<float> loss;
  for (Index step = from; step < to; ++step) {
    if (begin) begin(model, step);
    const std::vector<Index> ids = test::random_ids(13, kVocab, static_cast<std::uint64_t>(step));
    const std::vector<Index> next =
        test::random_ids(13, kVocab, 99 + static_cast<std::uint64_t>(step));
    const auto& logits = model.forward(ids, {.training = true, .rng = &rng}, cache);
    loss.forward(logits, next, loss_cache);
    model.backward(loss.backward(loss_cache), cache);
    if (end) end(model, step);
    optimizer.step(model);
  }
}

/// \param prepare  Makes the model of the run; the numbers of its weights come from the seed.
void check(const std::function<Decoder<float>(std::uint64_t seed)>& prepare,
           const BeforeStep& begin = {}, const BeforeStep& end = {}) {
  constexpr Index kSteps = 9;
  Decoder<float> whole = prepare(1);
  const Decoder<float> at_first = whole;
  AdamW<float> optimizer({.learning_rate = 0.02});
  Rng rng(5);
  train(whole, optimizer, rng, 0, kSteps, begin, end);
  for (const Index stop : {Index{3}, Index{5}}) {
    Decoder<float> first = prepare(1);
    AdamW<float> of_first({.learning_rate = 0.02});
    Rng draws(5);
    train(first, of_first, draws, 0, stop, begin, end);
    const test::Folder folder;
    io::save(folder.path(), first, of_first, {.rng = draws, .position = stop, .notes = {}});
    Decoder<float> second = prepare(2);
    AdamW<float> of_second({.learning_rate = 0.02});
    const io::TrainingState state = io::load(folder.path(), second, of_second);
    draws = state.rng;
    train(second, of_second, draws, state.position, kSteps, begin, end);
    const auto expected = parameters(whole);
    const auto resumed = parameters(second);
    REQUIRE(resumed.size() == expected.size());
    for (std::size_t i = 0; i < resumed.size(); ++i) {
      INFO(resumed[i].name << ", stopped before step " << stop);
      CHECK(resumed[i].name == expected[i].name);
      CHECK(resumed[i].parameter->value == expected[i].parameter->value);
    }
    const auto states = buffers(whole);
    const auto others = buffers(second);
    for (std::size_t i = 0; i < states.size(); ++i) {
      CHECK(others[i].buffer->value == states[i].buffer->value);
    }
  }
  // Something was learnt.
  Decoder<float> unchanged = at_first;
  Index moved = 0;
  const auto old = parameters(unchanged);
  const auto now = parameters(whole);
  for (std::size_t i = 0; i < now.size(); ++i) {
    moved += now[i].parameter->value == old[i].parameter->value ? 0 : 1;
  }
  CHECK(moved > 0);
}

}  // namespace

TEST_CASE("A run of adapters with dropout is resumed to the bit", "[tuning]") {
  const auto adapted = [](std::uint64_t seed) {
    Decoder<float> model = sparse(seed);
    Rng rng(seed);
    freeze(model, "*");
    add_lora(model, "layers.*", rng, {.rank = 2, .dropout = 0.3});
    add_lora(model, "*.router.weight", rng, {.name = "second", .rank = 1, .rank_stabilised = true});
    return model;
  };
  check(adapted);
}

TEST_CASE("A run that is unfrozen step by step is resumed to the bit", "[tuning]") {
  const UnfreezeSchedule schedule({{"*.router.*", 0}, {"*.experts.*", 4}, {"*", 6}});
  check([](std::uint64_t seed) { return sparse(seed); },
        [&](Decoder<float>& model, Index step) { schedule.apply(model, step); });
}

TEST_CASE("A run that is pulled to its base is resumed to the bit", "[tuning]") {
  Decoder<float> base = sparse(1);
  const TowardsBase<float> towards(base, "*", 0.3);
  check([](std::uint64_t seed) { return sparse(seed); }, {},
        [&](Decoder<float>& model, Index) { towards.add_gradient(model); });
}

TEST_CASE("A run of chosen experts is resumed to the bit", "[tuning]") {
  check([](std::uint64_t seed) {
    Decoder<float> model = sparse(seed);
    const std::vector<Index> experts = {0, 3};
    train_only(model, expert_patterns("layers.1.moe.experts", experts));
    return model;
  });
}

TEST_CASE("A run of an upcycled model is resumed to the bit", "[tuning]") {
  const UpcycleConfig config = {.copies = 2, .granularity = 2, .noise = 0.1, .drop = 0.5};
  const UnfreezeSchedule routers_first({{"*.router.*", 0}, {"*", 4}});
  check(
      [&](std::uint64_t seed) {
        Decoder<float> model = dense(seed);
        Rng rng(seed);
        upcycle_blocks(
            model.layers(), "mlp", "moe", [&](const AnyLayer<float>& network, Index /*layer*/) {
              return std::optional(mixture(upcycled_bank(*network.get<Glu<float>>(), config, rng),
                                           upcycled_router<float>(kModel, config, rng)));
            });
        return model;
      },
      [&](Decoder<float>& model, Index step) { routers_first.apply(model, step); });
}

TEST_CASE("A run that goes on from dense to upcycled takes the optimizer's memory along",
          "[tuning]") {
  // Parameters that the mixture has not touched keep their moments by their names, also across a
  // checkpoint.
  const UpcycleConfig config = {.copies = 2};
  const auto upcycle = [&](Decoder<float>& model) {
    Rng rng(3);
    upcycle_blocks(
        model.layers(), "mlp", "moe", [&](const AnyLayer<float>& network, Index /*layer*/) {
          return std::optional(mixture(upcycled_bank(*network.get<Glu<float>>(), config, rng),
                                       upcycled_router<float>(kModel, config, rng)));
        });
  };
  Decoder<float> whole = dense();
  AdamW<float> optimizer;
  Rng rng(5);
  train(whole, optimizer, rng, 0, 3, {}, {});
  upcycle(whole);
  const test::Folder folder;
  io::save(folder.path(), whole, optimizer, {.rng = rng, .position = 3, .notes = {}});
  Decoder<float> resumed = dense(2);
  upcycle(resumed);
  AdamW<float> again;
  Rng draws = io::load(folder.path(), resumed, again).rng;
  train(whole, optimizer, rng, 3, 7, {}, {});
  train(resumed, again, draws, 3, 7, {}, {});
  const auto expected = parameters(whole);
  const auto actual = parameters(resumed);
  REQUIRE(actual.size() == expected.size());
  for (std::size_t i = 0; i < actual.size(); ++i) {
    INFO(actual[i].name);
    CHECK(actual[i].parameter->value == expected[i].parameter->value);
  }
}

}  // namespace weir::resumed_tuning_test
