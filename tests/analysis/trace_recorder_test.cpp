// SPDX-License-Identifier: MIT
#include <cmath>
#include <cstdint>
#include <string>
#include <tuple>
#include <vector>

#include <weir/analysis/trace.hpp>
#include <weir/analysis/trace_recorder.hpp>
#include <weir/core/storage.hpp>
#include <weir/core/verbs.hpp>
#include <weir/model/decoder.hpp>
#include <weir/model/generate.hpp>
#include <weir/moe/capacity/dropless.hpp>
#include <weir/moe/capacity/fixed_capacity.hpp>
#include <weir/moe/depths/mixture_of_depths.hpp>
#include <weir/moe/experts/glu_bank.hpp>
#include <weir/moe/moe_layer.hpp>
#include <weir/moe/router/linear_router.hpp>
#include <weir/nn/cross_entropy.hpp>
#include <weir/presets/mixtral_8x7b.hpp>
#include <weir/presets/scaled.hpp>

#include "analysis/traces.hpp"
#include "support/allocations.hpp"
#include "support/catch.hpp"
#include "support/matrices.hpp"
#include "support/texts.hpp"

namespace weir::trace_recorder_test {

namespace {

Decoder<float> small_mixtral() {
  const auto config = presets::scaled(presets::mixtral_8x7b(), {.d_model = 16, .vocab = 40});
  Rng rng(3);
  return presets::make<float>(config, rng);
}

/// What a record says of where its token went, apart from how it came there.
using Choice = std::tuple<Index, std::int64_t, std::int64_t, int, std::vector<Index>>;
std::vector<Choice> choices_of(const Trace& trace) {
  std::vector<Choice> all;
  for (Index i = 0; i < trace.records(); ++i) {
    const TraceRecord record = trace.record(i);
    std::vector<Index> experts;
    for (Index c = 0; c < record.choices(); ++c) experts.push_back(record.choice(c).expert);
    const TraceHead& head = record.head();
    all.emplace_back(head.layer, head.sequence, head.position, head.token, experts);
  }
  std::sort(all.begin(), all.end());
  return all;
}

}  // namespace

TEST_CASE("A recorder writes down what a routing says", "[analysis][trace]") {
  // Two sequences, the second with padding in front; each expert has one place.
  const Sequences sequences({2, 3});
  const std::vector<std::uint8_t> mask = {1, 1, 0, 1, 1};
  const std::vector<Index> ids = {7, 8, 0, 9, 7};
  const Pass pass = {.training = true, .sequences = &sequences, .mask = mask, .token_ids = ids};
  Routing<double> routing = test::routing_of({{2, 0}, {2, 1}, {0, 1}, {0, 1}, {1, 2}}, 3, pass);
  test::limit(FixedCapacity({.capacity = 1}), routing, pass);

  TraceRecorder recorder({.layout = {.choices = 2, .logits = 4}});
  const Index code = recorder.domain("code");
  const Index prose = recorder.domain("prose");
  CHECK(recorder.domain("code") == code);
  PassRecord record;
  record.show_routings_to(&recorder);
  recorder.begin({{.id = 5, .position = 10, .domain = prose}, {.id = 6, .domain = code}});
  test::show(record, 3, routing, pass);

  const Trace trace = recorder.trace();
  REQUIRE(trace.records() == 4);
  REQUIRE(trace.layers().size() == 1);
  CHECK(trace.layers()[0].name == "layers.3.moe");
  CHECK(trace.layers()[0].experts == 3);
  CHECK(trace.domains() == std::vector<std::string>{"code", "prose"});
  const TraceRecord second = trace.record(1);
  CHECK(second.head().sequence == 5);
  CHECK(second.head().position == 11);
  CHECK(second.head().token == 8);
  CHECK(second.head().domain == 1);
  CHECK(second.head().phase == TracePhase::kTrain);
  CHECK(second.head().pass == 0);
  REQUIRE(second.choices() == 2);
  CHECK(second.choice(0).expert == 2);
  CHECK(second.choice(0).kept == 0);  // The first token has its place.
  CHECK(second.choice(1).expert == 1);
  CHECK(second.choice(1).kept == 1);
  CHECK(second.choice(0).weight == static_cast<float>(routing.weight[2]));
  CHECK(second.logits() == 4);
  CHECK(second.logit(0) == -20.0F);
  CHECK(second.logit(2) == 5.0F);
  CHECK(second.logit(3) == 0.0F);  // There is no expert 3.
  double entropy = 0.0;
  for (const double p : routing.probabilities.row(1)) entropy -= p * std::log(p);
  CHECK(second.head().entropy == Approx(entropy));
  CHECK(trace.record(2).head().sequence == 6);
  CHECK(trace.record(2).head().position == 1);  // Behind the padding.

  record.show_routings_to(nullptr);
  test::show(record, 3, routing, pass);
  CHECK(recorder.records() == 4);
}

TEST_CASE("Of more experts than there is room for, the first are kept", "[analysis][trace]") {
  TraceRecorder recorder({.layout = {.choices = 2}});
  recorder.begin({{}});
  recorder.see("moe", test::routing_of({{4, 1, 3}}, 5), {});
  const Trace trace = recorder.trace();
  REQUIRE(trace.records() == 1);
  CHECK(trace.record(0).head().assigned == 3);
  CHECK(trace.record(0).choices() == 2);
  CHECK(trace.record(0).choice(1).expert == 1);
  CHECK(trace.domains() == std::vector<std::string>{""});
}

TEST_CASE("A recorder that is cleared has room again, and knows its layers", "[analysis][trace]") {
  TraceRecorder recorder({.most_records = 2});
  const auto see = [&](Index expert) {
    recorder.begin({{}});
    recorder.see("moe", test::routing_of({{expert}}, 3), {});
  };
  for (const Index expert : {0, 1, 2}) see(expert);
  CHECK(recorder.records() == 2);
  CHECK(recorder.left_out() == 1);
  recorder.clear();
  CHECK(recorder.records() == 0);
  CHECK(recorder.left_out() == 0);
  CHECK(recorder.trace().records() == 0);
  CHECK(recorder.layers().size() == 1);
  see(2);
  REQUIRE(recorder.trace().records() == 1);
  CHECK(recorder.trace().record(0).choice(0).expert == 2);
  CHECK(recorder.left_out() == 0);
}

TEST_CASE("A single token behind others is decoded", "[analysis][trace]") {
  const auto phase = [](Index position, const std::vector<std::vector<Index>>& experts,
                        bool training = false) {
    TraceRecorder recorder;
    recorder.begin({{.position = position}});
    recorder.see("moe", test::routing_of(experts, 2), {.training = training});
    return recorder.trace().record(0).head().phase;
  };
  CHECK(phase(0, {{1}}) == TracePhase::kPrefill);
  CHECK(phase(1, {{1}}) == TracePhase::kDecoding);
  CHECK(phase(1, {{1}, {0}}) == TracePhase::kPrefill);
  CHECK(phase(1, {{1}}, true) == TracePhase::kTrain);
}

TEST_CASE("Prefill, decoding and training record the same choices", "[analysis][trace]") {
  Decoder<float> model = small_mixtral();
  const std::vector<Index> a = test::random_ids(9, 40, 1);
  const std::vector<Index> b = test::random_ids(6, 40, 2);
  const std::vector<Index> ids = test::joined(a, b);
  const Sequences sequences({9, 6});
  const auto traced = [&](auto&& run) {
    TraceRecorder recorder({.layout = {.choices = 2}});
    PassRecord record;
    record.show_routings_to(&recorder);
    run(recorder, record);
    const Trace trace = recorder.trace();
    return std::pair(choices_of(trace), trace.record(trace.records() - 1).head().phase);
  };
  const auto forward = [&](bool training) {
    return traced([&](TraceRecorder& recorder, PassRecord& record) {
      recorder.begin({{.id = 1}, {.id = 2}});
      Decoder<float>::Cache cache;
      const Matrix<float> logits = model.forward(
          ids, {.training = training, .sequences = &sequences, .record = &record}, cache);
      if (training) model.backward(logits, cache);
    });
  };
  const auto decode = [&](Index at_once) {
    return traced([&](TraceRecorder& recorder, PassRecord& record) {
      Decoder<float>::Cache cache;
      Decoder<float>::State first, second;
      Decoder<float>::State* const states[] = {&first, &second};
      for (Index begin = 0; begin < 9; begin += at_once) {
        const auto part = [&](const std::vector<Index>& text) {
          const auto size = static_cast<Index>(text.size());
          const Index from = std::min(begin, size);
          return std::vector<Index>(text.begin() + from,
                                    text.begin() + std::min(size, begin + at_once));
        };
        const Sequences now(
            {static_cast<Index>(part(a).size()), static_cast<Index>(part(b).size())});
        recorder.begin({{.id = 1, .position = first.length}, {.id = 2, .position = second.length}});
        model.decode(test::joined(part(a), part(b)), {.sequences = &now, .record = &record}, states,
                     cache);
      }
    });
  };
  const auto prefill = forward(false);
  CHECK(prefill.first.size() == 15 * model.layers().size());
  CHECK(prefill.second == TracePhase::kPrefill);
  CHECK(decode(9) == prefill);
  const auto one_by_one = decode(1);
  CHECK(one_by_one.first == prefill.first);
  CHECK(one_by_one.second == TracePhase::kDecoding);
  const auto training = forward(true);
  CHECK(training.first == prefill.first);
  CHECK(training.second == TracePhase::kTrain);
  model.set_recompute(true);  // What is computed again is not seen again.
  CHECK(forward(true).first == prefill.first);

  set_storage(model, Storage::kPacked);
  CHECK(forward(false) == prefill);
  CHECK(decode(9) == prefill);
  CHECK(decode(1) == one_by_one);
  for (const Storage storage : {Storage::kBfloat16, Storage::kInt8}) {
    set_storage(model, storage);
    const auto stored = forward(false);
    CHECK(stored.first.size() == prefill.first.size());
    CHECK(decode(1).first.size() == prefill.first.size());
    CHECK(decode(1).second == TracePhase::kDecoding);
  }
}

TEST_CASE("A generation is traced: its prompt as prefill, its tokens as decoding",
          "[analysis][trace]") {
  Decoder<float> model = small_mixtral();
  if (GENERATE(false, true)) set_storage(model, Storage::kPacked);
  std::vector<Conversation<float>> conversations = {
      {.prompt = {1, 2, 3}, .until = {.count = 4}, .sampling = {.temperature = 0.0}},
      {.prompt = {4, 5}, .until = {.count = 2}, .sampling = {.temperature = 0.0}}};
  TraceRecorder recorder({.layout = {.choices = 2}});
  PassRecord record;
  record.show_routings_to(&recorder);
  struct Traced final : GenerationObserver<float> {
    Traced(TraceRecorder& to, PassRecord& of_pass, std::vector<Conversation<float>>& all)
        : recorder(to), record(of_pass), conversations(all) {}
    PassRecord* begin(std::span<const Index> numbers) override {
      std::vector<TracedSequence> traced;
      for (const Index n : numbers) {
        traced.push_back(
            {.id = n, .position = conversations[static_cast<std::size_t>(n)].state.length});
      }
      recorder.begin(traced);
      return &record;
    }
    void drawn(Index /*conversation*/, MatrixIn<float> /*logits*/, Index /*token*/) override {}

    TraceRecorder& recorder;
    PassRecord& record;
    std::vector<Conversation<float>>& conversations;
  } observer(recorder, record, conversations);
  const auto results = generate(model, conversations, &observer);
  const Trace generated = recorder.trace();
  for (Index i = 0; i < generated.records(); ++i) {
    const TraceHead& head = generated.record(i).head();
    const Index prompt = head.sequence == 0 ? 3 : 2;
    CHECK(head.phase == (head.position < prompt ? TracePhase::kPrefill : TracePhase::kDecoding));
  }

  // The same choices as those of the whole texts at once.
  const std::vector<Index> a = test::joined(std::vector<Index>{1, 2, 3}, results[0].tokens);
  const std::vector<Index> b = test::joined(std::vector<Index>{4, 5}, results[1].tokens);
  const Sequences sequences({7, 4});
  TraceRecorder whole({.layout = {.choices = 2}});
  PassRecord of_whole;
  of_whole.show_routings_to(&whole);
  whole.begin({{.id = 0}, {.id = 1}});
  infer(model, test::joined(a, b), {.sequences = &sequences, .record = &of_whole});
  CHECK(choices_of(whole.trace()) == choices_of(generated));
}

TEST_CASE("A mixture in a mixture of depths is seen at its tokens' places", "[analysis][trace]") {
  Rng rng(5);
  MoELayer moe(LinearRouter<double>(4, 3, rng), SoftmaxTopK<double>({.k = 1}), Dropless(),
               GluBank<double>(4, 3, 2, rng));
  Matrix<double> weight = Matrix<double>::Zero(1, 4);
  weight(0, 0) = 1.0;  // The score is the first number.
  MixtureOfDepths depths(std::move(moe), weight,
                         {.capacity = 0.5, .predictor_loss = 0.0, .causal_evaluation = false});
  Matrix<double> x = test::random_matrix(6, 4, 1);
  x.col(0) << 1, 5, 4, 3, -1, 6;  // Of two sequences: the second, and the fourth and the last.
  const Sequences sequences({2, 4});
  TraceRecorder recorder({.layout = {.choices = 1}});
  recorder.begin({{.id = 0, .position = 100}, {.id = 1}});
  PassRecord record;
  record.show_routings_to(&recorder);
  typename decltype(depths)::Cache cache;
  x(2, 0) = 2;
  const std::vector<Index> ids = {10, 11, 12, 13, 14, 15};
  depths.forward(x, {.sequences = &sequences, .token_ids = ids, .record = &record}, cache);
  const Trace trace = recorder.trace();
  REQUIRE(trace.records() == 3);
  CHECK(trace.layers()[0].name == "inner");
  CHECK(trace.record(0).head().position == 101);
  CHECK(trace.record(0).head().token == 11);
  CHECK(trace.record(1).head().position == 1);
  CHECK(trace.record(2).head().position == 3);
  CHECK(trace.record(2).head().token == 15);
}

TEST_CASE("Sampling takes whole sequences, about as many as it should", "[analysis][trace]") {
  const auto sampled = [](std::uint64_t seed, double share) {
    TraceRecorder recorder({.layout = {.choices = 1}, .share = share, .seed = seed});
    std::vector<Index> per_sequence(1000);
    for (Index s = 0; s < 1000; ++s) {
      const Index before = recorder.records();
      for (Index t = 0; t < 3; ++t) {
        recorder.begin({{.id = s, .position = t}});
        recorder.see("moe", test::routing_of({{0}}, 2), {});
      }
      per_sequence[static_cast<std::size_t>(s)] = recorder.records() - before;
      CHECK((recorder.records() - before) % 3 == 0);
    }
    return per_sequence;
  };
  const auto taken = sampled(1, 0.3);
  const auto count = std::count(taken.begin(), taken.end(), 3);
  CHECK(count > 250);
  CHECK(count < 350);
  CHECK(sampled(1, 0.3) == taken);
  CHECK(sampled(2, 0.3) != taken);
  CHECK(sampled(1, 0.0) == std::vector<Index>(1000, 0));
  CHECK(sampled(1, 1.0) == std::vector<Index>(1000, 3));
}

TEST_CASE("Memory is bounded, and what has no room is counted", "[analysis][trace]") {
  TraceRecorder recorder({.layout = {.choices = 1}, .most_records = 4});
  recorder.begin({{}});
  recorder.see("a", test::routing_of({{0}, {1}, {0}}, 2), {});
  recorder.see("b", test::routing_of({{0}, {1}, {0}}, 2), {});
  CHECK(recorder.records() == 4);
  CHECK(recorder.left_out() == 2);
  CHECK(recorder.trace().left_out() == 2);
  CHECK(recorder.trace().records() == 4);
  recorder.clear();
  CHECK(recorder.trace().records() == 0);
  CHECK(recorder.left_out() == 0);

  struct Sink final : TraceSink {
    std::size_t largest = 0, bytes = 0;
    void write(std::span<const std::byte> records) override {
      largest = std::max(largest, records.size());
      bytes += records.size();
    }
  } sink;
  TraceRecorder streamed(sink, {.layout = {.choices = 1}, .buffer_records = 2});
  const auto pass = [&, routing = test::routing_of({{0}, {1}, {0}}, 2)] {
    static const std::vector<TracedSequence> kOne = {{}};
    streamed.begin(kOne);
    streamed.see("a", routing, {});
  };
  pass();
  if (test::allocations_are_counted()) CHECK(test::count_allocations(pass) == 0);
  streamed.flush();
  CHECK(sink.bytes == static_cast<std::size_t>(streamed.records()) * 48);
  CHECK(sink.largest == 2 * 48);
}

TEST_CASE("A trace that is put together says what does not fit", "[analysis][trace]") {
  const TraceLayout layout{.choices = 1};
  const auto message = [&](const std::vector<TraceLayer>& layers, std::size_t bytes) {
    const std::vector<std::byte> memory(bytes);
    return test::message_of<ConfigError>([&] { Trace(layout, layers, {""}, memory); });
  };
  const std::size_t size = layout.record_bytes();
  CHECK(message({{"moe", 4}}, 0) == "no exception");
  CHECK(message({{"moe", 4}}, size + 1) == "Trace: there are " + std::to_string(size + 1) +
                                               " bytes, expected a multiple of " +
                                               std::to_string(size));
  CHECK(message({{"moe", 0}}, 0) == "Trace: experts = 0, expected 1 <= experts <= 65535");
  CHECK(message({{"moe", 65536}}, 0) == "Trace: experts = 65536, expected 1 <= experts <= 65535");
  CHECK(message(std::vector<TraceLayer>(65536, {"moe", 4}), 0) ==
        "Trace: layers = 65536, expected 0 <= layers <= 65535");
}

TEST_CASE("A recorder says what is wrong", "[analysis][trace]") {
  const auto config_error = [](auto&& action) { return test::message_of<ConfigError>(action); };
  CHECK(config_error([] { TraceRecorder({.layout = {.choices = 0}}); }) ==
        "TraceLayout: choices = 0, expected 1 <= choices <= 65535");
  CHECK(config_error([] { TraceRecorder({.layout = {.choices = 65536}}); }) ==
        "TraceLayout: choices = 65536, expected 1 <= choices <= 65535");
  CHECK(config_error([] { TraceRecorder({.layout = {.logits = -1}}); }) ==
        "TraceLayout: logits = -1, expected 0 <= logits <= 65535");
  CHECK(config_error([] { TraceRecorder({.most_records = -1}); }) ==
        "TraceRecorder: most_records = -1, expected >= 0");
  CHECK(config_error([] { TraceRecorder({.share = NAN}); }) ==
        "TraceRecorder: share = nan, expected 0 <= share <= 1");
  CHECK(config_error([] { TraceRecorder({.buffer_records = 0}); }) ==
        "TraceRecorder: buffer_records = 0, expected >= 1");
  TraceRecorder recorder;
  CHECK(config_error([&] { recorder.begin({{.domain = 1}}); }) ==
        "TraceRecorder::begin: domain = 1, expected 0 <= domain <= 0");
  CHECK(config_error([&] { recorder.begin({{.id = -1}}); }) ==
        "TraceRecorder::begin: id = -1, expected >= 0");
  CHECK(config_error([&] { recorder.begin({{.position = -1}}); }) ==
        "TraceRecorder::begin: position = -1, expected >= 0");
  const Routing<double> routing = test::routing_of({{0}}, 2);
  CHECK(test::message_of<StateError>([&] { recorder.see("moe", routing, {}); }) ==
        "TraceRecorder: layer 'moe' has a pass of 1 sequences, expected 0 as begin was told");
  recorder.begin({{}});
  recorder.see("moe", routing, {});
  CHECK(test::message_of<StateError>([&] { recorder.see("moe", routing, {}); }) ==
        "TraceRecorder: layer 'moe' was seen twice, expected a call of begin before each pass");
  recorder.begin({{}});
  CHECK(config_error([&] { recorder.see("moe", test::routing_of({{0}}, 3), {}); }) ==
        "TraceRecorder: layer 'moe' has 3 experts, expected 2 as before");
  CHECK(config_error([&] { recorder.see("wide", test::routing_of({{0}}, 65536), {}); }) ==
        "TraceRecorder: experts = 65536, expected 1 <= experts <= 65535");

  struct Sink final : TraceSink {
    void write(std::span<const std::byte> /*records*/) override {}
  } sink;
  CHECK(test::message_of<StateError>([&] { TraceRecorder(sink).trace(); }) ==
        "TraceRecorder::trace: there is a sink, expected none: it has the records");
}

}  // namespace weir::trace_recorder_test
