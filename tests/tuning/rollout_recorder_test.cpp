// SPDX-License-Identifier: MIT
// Routing replay from rollout to training.
#include <algorithm>
#include <array>
#include <cstddef>
#include <cstdint>
#include <limits>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include <weir/attention/grouped_query.hpp>
#include <weir/model/generate.hpp>
#include <weir/moe/beside/shared_experts.hpp>
#include <weir/moe/capacity/dropless.hpp>
#include <weir/moe/experts/glu_bank.hpp>
#include <weir/moe/imposed_routing.hpp>
#include <weir/moe/moe_layer.hpp>
#include <weir/moe/router/linear_router.hpp>
#include <weir/moe/selector/around/replay.hpp>
#include <weir/moe/selector/sigmoid_top_k.hpp>
#include <weir/moe/selector/top_k_softmax.hpp>
#include <weir/nn/glu.hpp>
#include <weir/nn/rms_norm.hpp>
#include <weir/tuning/policy_optimisation.hpp>
#include <weir/tuning/rollout_recorder.hpp>

#include "support/catch.hpp"
#include "support/gradient.hpp"
#include "support/matrices.hpp"

namespace weir::rollout_recorder_test {

namespace {

using Ids = std::vector<Index>;
using Model = Decoder<double>;

constexpr Index kVocab = 11;
constexpr Index kWidth = 6;
constexpr Index kExperts = 5;

// Two mixtures, one with shared experts, and a dense layer between them.
Model make_decoder(std::uint64_t seed, bool recompute = false, bool replays = true) {
  Rng rng(seed);
  const auto attention = [&] {
    return GroupedQueryAttention<double>(rng, {.d_model = kWidth, .heads = 1, .kv_heads = 1});
  };
  const auto router = [&] {
    return LinearRouter<double>(kWidth, kExperts, rng, {.init_scale = 1.0});
  };
  const auto bank = [&] { return GluBank<double>(kWidth, kExperts, 4, rng); };
  const RmsNorm<double> norm(kWidth);
  std::vector<Block<double>> layers;
  const auto add = [&](AnyLayer<double> layer, const char* name) {
    layers.push_back(pre_norm_block<double>(norm, attention(), norm, std::move(layer), name));
  };
  const TopKSoftmax<double> top({.k = 2});
  if (replays) {
    add(MoELayer(router(), Replay(top), Dropless(), bank()), "moe");
  } else {
    add(MoELayer(router(), top, Dropless(), bank()), "moe");
  }
  add(Glu<double>(kWidth, 5, rng), "mlp");
  add(SharedExperts(
          MoELayer(router(), Replay(SigmoidTopK<double>(kExperts, {.k = 2})), Dropless(), bank()),
          Glu<double>(kWidth, 4, rng)),
      "experts");
  DecoderConfig config;
  config.recompute = recompute;
  return {Embedding<double>(kVocab, kWidth, rng, {.stddev = 1.0}), std::move(layers), norm,
          Linear<double>(kWidth, kVocab, rng), config};
}

// Four conversations of different lengths, which leave one by one.
std::vector<Conversation<double>> conversations() {
  const std::vector<Ids> prompts = {{4}, {0, 9, 3, 3, 7}, {5, 5}, {10, 2, 1}};
  const Ids counts = {7, 3, 1, 12};
  std::vector<Conversation<double>> all;
  for (std::size_t i = 0; i < prompts.size(); ++i) {
    all.push_back({.prompt = prompts[i], .until = {.count = counts[i]}, .rng = Rng(i)});
  }
  return all;
}

struct Rollout {
  RolloutRecorder<double> recorder;
  PolicyBatch<double> batch;
  std::vector<LayerTrace> traces;

  // The batch has the conversations in another order.
  explicit Rollout(const Model& model) {
    auto all = conversations();
    const auto answers = generate(model, all, &recorder);
    const Ids order = {2, 0, 3, 1};
    for (const Index c : order) {
      const auto at = static_cast<std::size_t>(c);
      batch.add(all[at].prompt, answers[at].tokens, 1.0 - static_cast<double>(c),
                recorder.log_probabilities(c));
    }
    traces = recorder.traces(order, batch.sequences);
  }
};

// The routing of a pass over the batch.
std::vector<LayerTrace> routing_of(const Model& model, const PolicyBatch<double>& batch) {
  PassTracer tracer;
  PassRecord record;
  record.show_routings_to(&tracer);
  Model::Cache cache;
  Pass pass = batch.evaluation();
  pass.record = &record;
  model.forward(batch.ids, pass, cache);
  return tracer.traces();
}

}  // namespace

TEST_CASE("A rollout through caches is recorded as the pass over whole sequences",
          "[tuning][replay]") {
  const Model model = make_decoder(1);
  const Rollout rollout(model);
  REQUIRE(rollout.traces.size() == 2);
  CHECK(rollout.traces[0].layer == "layers.0.moe");
  CHECK(rollout.traces[1].layer == "layers.2.experts");
  const auto own = routing_of(model, rollout.batch);
  for (std::size_t l = 0; l < 2; ++l) {
    CHECK(own[l].layer == rollout.traces[l].layer);
    CHECK(own[l].trace == rollout.traces[l].trace);
  }
  CHECK(differently_routed(own, rollout.traces) == 0);

  PolicyBatch<double> batch = rollout.batch;
  batch.set_old(infer(model, batch.ids, batch.evaluation()));
  for (Index t = 0; t < batch.old.count(); ++t) {
    CHECK(batch.old[t] == Approx(rollout.batch.old[t]).margin(1e-12));
  }
}

TEST_CASE("Another model takes the experts of the rollout in all layers, and then its own again",
          "[tuning][replay]") {
  const Rollout rollout(make_decoder(1));
  Model model = make_decoder(2);
  const auto own = routing_of(model, rollout.batch);
  CHECK(differently_routed(own, rollout.traces) > rollout.batch.sequences.tokens() / 2);

  impose_routing(model, rollout.traces);
  CHECK(differently_routed(routing_of(model, rollout.batch), rollout.traces) == 0);
  const Model copy = model;  // A copy is imposed on, too.
  CHECK(differently_routed(routing_of(copy, rollout.batch), rollout.traces) == 0);
  release_routing(model);
  CHECK(differently_routed(routing_of(model, rollout.batch), own) == 0);
}

TEST_CASE("Training on a replayed rollout has the gradient of finite differences",
          "[tuning][replay][gradient]") {
  const Rollout rollout(make_decoder(1));
  PolicyBatch<double> batch = rollout.batch;
  const auto recompute = GENERATE(false, true);
  Model model = make_decoder(2, recompute);
  batch.set_reference(infer(model, batch.ids, batch.evaluation()));  // With its own experts.
  impose_routing(model, rollout.traces);
  batch.set_old(infer(model, batch.ids, batch.evaluation()));
  batch.old[4] += 0.7;  // A ratio that is clipped.
  const PolicyLoss<double> loss({.kl = 0.3});
  PolicyLoss<double>::Cache loss_cache;
  Model::Cache cache;
  const auto objective = [&] {
    return loss.forward(model.forward(batch.ids, batch.training(), cache), batch, loss_cache);
  };
  objective();
  model.backward(loss.backward(loss_cache), cache);
  for (auto& [name, parameter] : parameters(model)) {
    if (recompute && name != "layers.0.moe.router.weight") continue;
    INFO(name);
    const Matrix<double> analytic = parameter->gradient();
    const Matrix<double> numeric = test::numeric_gradient(parameter->value, objective);
    CHECK(test::relative_error(analytic, numeric) <= 1e-6);
  }
}

TEST_CASE("A recorder that is cleared records anew", "[tuning][replay]") {
  const Model model = make_decoder(1);
  Rollout rollout(model);
  auto all = conversations();
  rollout.recorder.clear();
  CHECK(rollout.recorder.log_probabilities(3).empty());
  const auto answers = generate(model, all, &rollout.recorder);
  CHECK(rollout.recorder.log_probabilities(3).size() == answers[3].tokens.size());
  const Ids order = {2, 0, 3, 1};
  const auto again = rollout.recorder.traces(order, rollout.batch.sequences);
  CHECK(again[1].trace == rollout.traces[1].trace);
  // Also of less than a whole conversation, or of nothing.
  const std::array<Index, 1> last = {3};
  const auto begin = rollout.recorder.traces(last, Sequences(std::vector<Index>{2}));
  CHECK(begin[0].trace.tokens() == 2);
  CHECK(rollout.recorder.traces({}, {})[0].trace.tokens() == 0);
}

TEST_CASE("Routing replay says what does not fit", "[tuning][replay]") {
  Model model = make_decoder(1);
  const Rollout rollout(model);
  const auto message = [](const auto& action) {
    return test::message_of<std::logic_error>(action);
  };
  const auto traces = [&](const Ids& order, const std::vector<Index>& lengths) {
    return message([&] { rollout.recorder.traces(order, Sequences(lengths)); });
  };
  CHECK(traces({0}, {1, 1}) ==
        "RolloutRecorder::traces: order has 1 entries, expected 2 (one per sequence)");
  CHECK(traces({4}, {1}) == "RolloutRecorder: conversation = 4, expected 0 <= conversation < 4");
  CHECK(traces({-1}, {1}) == "RolloutRecorder: conversation = -1, expected 0 <= conversation < 4");
  CHECK(traces({2}, {4}) ==
        "RolloutRecorder::traces: conversation 2 has 3 recorded tokens, expected at least 4 as "
        "sequence 0");
  CHECK(message([&] { rollout.recorder.log_probabilities(9); }) ==
        "RolloutRecorder: conversation = 9, expected 0 <= conversation < 4");
  RolloutRecorder<double> recorder;
  Matrix<double> unknown = Matrix<double>::Zero(1, 3);
  unknown(0, 1) = std::numeric_limits<double>::quiet_NaN();
  CHECK(test::message_of<NonFiniteError>([&] { recorder.drawn(0, unknown, 2); }) ==
        "RolloutRecorder: token 2 of conversation 0 has the log-probability nan, expected finite");

  const auto impose = [&](Model& to, const std::vector<LayerTrace>& imposed) {
    return message([&] { impose_routing(to, imposed); });
  };
  std::vector<LayerTrace> few = {rollout.traces[0]};
  CHECK(impose(model, few) ==
        "impose_routing: there is no trace of 'layers.2.experts', expected one for each mixture");
  few[0].layer = "layers.7.moe";
  few.push_back(rollout.traces[0]);
  few.push_back(rollout.traces[1]);
  CHECK(impose(model, few) ==
        "impose_routing: the model has no mixture 'layers.7.moe' whose selector is a Replay");
  CHECK(differently_routed(routing_of(model, rollout.batch), rollout.traces) == 0);
  Model without = make_decoder(1, false, false);
  CHECK(impose(without, rollout.traces) ==
        "impose_routing: the model has no mixture 'layers.0.moe' whose selector is a Replay");
  impose_routing(model, rollout.traces);
  CHECK(message([&] { infer(model, Ids{1, 2}); }) == "Replay: the trace has 30 tokens, expected 2");

  const auto differ = [&](const std::vector<LayerTrace>& a, const std::vector<LayerTrace>& b) {
    return message([&] { differently_routed(a, b); });
  };
  CHECK(differ(rollout.traces, {}) == "differently_routed: b has 0 layers, expected 2 layers as a");
  std::vector<LayerTrace> other = rollout.traces;
  std::swap(other[0], other[1]);
  CHECK(differ(rollout.traces, other) ==
        "differently_routed: b has 'layers.2.experts', expected 'layers.0.moe' as a");
  other = rollout.traces;
  other[1].trace = RoutingTrace(5, {0, 1}, {2});
  CHECK(differ(rollout.traces, other) ==
        "differently_routed: b has 1 tokens, expected 30 tokens as a");
}

}  // namespace weir::rollout_recorder_test
