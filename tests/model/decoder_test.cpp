// SPDX-License-Identifier: MIT
#include <array>
#include <cmath>
#include <cstdint>
#include <limits>
#include <optional>
#include <span>
#include <string>
#include <type_traits>
#include <utility>
#include <vector>

#include <weir/attention/grouped_query.hpp>
#include <weir/core/parallel.hpp>
#include <weir/model/decoder.hpp>
#include <weir/moe/balance/bias_balance.hpp>
#include <weir/moe/balance/switch_loss.hpp>
#include <weir/moe/balance/z_loss.hpp>
#include <weir/moe/capacity/dropless.hpp>
#include <weir/moe/experts/glu_bank.hpp>
#include <weir/moe/moe_layer.hpp>
#include <weir/moe/router/jitter_router.hpp>
#include <weir/moe/router/linear_router.hpp>
#include <weir/moe/selector/sigmoid_top_k.hpp>
#include <weir/moe/selector/softmax_top_k.hpp>
#include <weir/nn/cross_entropy.hpp>
#include <weir/nn/glu.hpp>
#include <weir/nn/rms_norm.hpp>
#include <weir/optim/adamw.hpp>
#include <weir/optim/clip.hpp>

#include "support/allocations.hpp"
#include "support/catch.hpp"
#include "support/gradient.hpp"
#include "support/texts.hpp"

namespace weir::decoder_test {

namespace {

struct Sizes {
  bool tied = false;
  Index vocab = 7;
  Index d_model = 8;
  Index d_hidden = 6;
  Index experts = 3;
};

// Two layers: a dense one, then a mixture of experts. Weights are large, so that nothing is nearly
// linear, and the auxiliary losses count.
template <class T>
Decoder<T> make_decoder(const Sizes& sizes, std::uint64_t seed = 1) {
  Rng rng(seed);
  const Index d = sizes.d_model;
  const auto attention = [&] {
    return GroupedQueryAttention<T>(rng, {.d_model = d, .heads = 2, .kv_heads = 1});
  };
  const auto norm = [&] {
    RmsNorm<T> rms(d);
    rms.weight().value += normal_init<T>(1, d, 0.1, rng);
    return rms;
  };
  std::vector<Block<T>> layers;
  layers.push_back(
      pre_norm_block<T>(norm(), attention(), norm(), Glu<T>(d, sizes.d_hidden, rng), "mlp"));
  layers.push_back(
      pre_norm_block<T>(norm(), attention(), norm(),
                        MoELayer(LinearRouter<T>(d, sizes.experts, rng, {.init_scale = 1.0}),
                                 SoftmaxTopK<T>({.k = 2}), Dropless(),
                                 GluBank<T>(d, sizes.experts, sizes.d_hidden, rng),
                                 SwitchLoss<T>({.coefficient = 0.1, .scope = Scope::kSequence}),
                                 ZLoss<T>({.coefficient = 0.01})),
                        "moe"));
  std::optional<Linear<T>> head;
  if (!sizes.tied) head.emplace(d, sizes.vocab, rng);
  return {Embedding<T>(sizes.vocab, d, rng, {.stddev = 0.5}), std::move(layers), norm(),
          std::move(head)};
}

// What a training step needs beside the model, and keeps.
template <class T>
struct Training {
  CrossEntropy<T> loss{};
  typename Decoder<T>::Cache cache = {};
  typename CrossEntropy<T>::Cache loss_cache = {};
  PassRecord record = {};  // Of the last pass.

  // Accumulates the gradients; returns the objective, auxiliary losses included.
  T accumulate(Decoder<T>& model, TokenIds ids, TokenIds targets, const Pass& pass = {},
               Index tokens = 0) {
    const T objective = evaluate(model, ids, targets, pass, tokens);
    model.backward(loss.backward(loss_cache), cache);
    return objective;
  }

  T evaluate(const Decoder<T>& model, TokenIds ids, TokenIds targets, const Pass& pass = {},
             Index tokens = 0) {
    record.clear();
    const Matrix<T>& logits = model.forward(ids, test::recorded(pass, record), cache);
    return loss.forward(logits, targets, loss_cache, tokens) + static_cast<T>(record.aux_loss());
  }
};

std::vector<std::string> names_of(Decoder<double> model) {
  std::vector<std::string> names;
  for (const auto& [name, parameter] : parameters(model)) names.push_back(name);
  return names;
}

}  // namespace

TEST_CASE("Decoder is embedding, blocks, norm and head", "[model][decoder]") {
  const auto tied = GENERATE(false, true);
  Rng rng(2);
  const Embedding<double> embedding(7, 8, rng, {.stddev = 1.0});
  const Block<double> first({{"mlp", RmsNorm<double>(8), Glu<double>(8, 6, rng)}});
  const Block<double> second({{"mlp", RmsNorm<double>(8), Glu<double>(8, 5, rng)}});
  RmsNorm<double> norm(8);
  norm.weight().value *= 2.0;
  const Linear<double> head(8, 7, rng);
  const Decoder<double> model(embedding, {first, second}, norm,
                              tied ? std::nullopt : std::optional(head));
  const std::vector<Index> ids = {3, 0, 6, 3};

  Embedding<double>::Cache embedded;
  const Matrix<double> hidden =
      infer(norm, infer(second, infer(first, embedding.forward(ids, Pass{}, embedded))));
  const Matrix<double> expected =
      tied ? hidden * embedding.weight().value.transpose() : infer(head, hidden);
  CHECK(test::relative_error(infer(model, ids), expected) <= 1e-14);
  CHECK(model.tied() == tied);
  CHECK(model.vocab() == 7);
  CHECK(model.d_model() == 8);
}

TEST_CASE("Decoder's gradients agree with finite differences", "[model][decoder][gradient]") {
  const auto tied = GENERATE(false, true);
  Decoder<double> model = make_decoder<double>({.tied = tied});
  const std::vector<Index> ids = {3, 0, 6, 3, 1, 5, 2, 2, 4};
  const std::vector<Index> targets = {0, 6, 3, 1, -100, 2, 2, -100, 0};
  const Sequences sequences({5, 4});
  const std::vector<std::uint8_t> mask = {1, 1, 1, 1, 1, 1, 1, 0, 1};
  const Pass pass{.sequences = &sequences, .mask = mask, .aux_scale = 0.8};

  Training<double> training;
  training.accumulate(model, ids, targets, pass);
  CHECK(training.record.aux_loss() > 0.01);
  for (auto& [name, parameter] : parameters(model)) {
    INFO("parameter " << name);
    const Matrix<double> analytic = parameter->gradient();
    const Matrix<double> numeric = test::numeric_gradient(
        parameter->value, [&] { return Training<double>().evaluate(model, ids, targets, pass); });
    CHECK(numeric.norm() > 1e-6);
    CHECK(test::relative_error(analytic, numeric) <= 1e-6);
  }
}

TEST_CASE("Decoder names its parameters", "[model][decoder]") {
  std::vector<std::string> expected = {
      "embedding.weight",
      "layers.0.attention_norm.weight",
      "layers.0.attention.query",
      "layers.0.attention.key",
      "layers.0.attention.value",
      "layers.0.attention.output",
      "layers.0.mlp_norm.weight",
      "layers.0.mlp.gate",
      "layers.0.mlp.up",
      "layers.0.mlp.down",
      "layers.1.attention_norm.weight",
      "layers.1.attention.query",
      "layers.1.attention.key",
      "layers.1.attention.value",
      "layers.1.attention.output",
      "layers.1.moe_norm.weight",
      "layers.1.moe.router.weight",
      "layers.1.moe.experts.0.gate",
      "layers.1.moe.experts.0.up",
      "layers.1.moe.experts.0.down",
      "layers.1.moe.experts.1.gate",
      "layers.1.moe.experts.1.up",
      "layers.1.moe.experts.1.down",
      "norm.weight",
  };
  CHECK(names_of(make_decoder<double>({.tied = true, .experts = 2})) == expected);
  expected.emplace_back("head.weight");
  CHECK(names_of(make_decoder<double>({.tied = false, .experts = 2})) == expected);
}

TEMPLATE_TEST_CASE("Decoder decodes in pieces what it computes at once", "[model][decoder]", double,
                   float) {
  using T = TestType;
  const double tolerance = std::is_same_v<T, double> ? 1e-12 : 1e-5;
  const auto tied = GENERATE(false, true);
  const auto pieces = GENERATE(std::vector<Index>{12},                 // prefill
                               std::vector<Index>(12, 1),              // token by token
                               std::vector<Index>{5, 1, 1, 4, 1},      // in chunks
                               std::vector<Index>{0, 7, 0, 0, 1, 4});  // some of them empty
  const Decoder<T> model = make_decoder<T>({.tied = tied});
  const std::vector<Index> ids = test::random_ids(12, 7, 3);
  const Matrix<T> expected = infer(model, ids);

  typename Decoder<T>::State state;
  typename Decoder<T>::State last_state;
  typename Decoder<T>::Cache cache;
  std::span<const Index> rest = ids;
  for (const Index piece : pieces) {
    const auto next = rest.first(static_cast<std::size_t>(piece));
    rest = rest.subspan(next.size());
    const Matrix<T> logits = decode(model, next, state, cache);
    CHECK(test::relative_error(logits, expected.middleRows(state.length - piece, piece)) <=
          tolerance);
    const Matrix<T> last = decode(model, next, last_state, cache, true);
    REQUIRE(last.rows() == (piece > 0 ? 1 : 0));
    CHECK(test::relative_error(last, logits.bottomRows(last.rows())) <= tolerance);
  }
  CHECK(state.length == 12);
  CHECK(last_state.length == 12);
}

TEST_CASE("Decoder sees nothing of later tokens or other sequences", "[model][decoder]") {
  const Decoder<double> model = make_decoder<double>({});
  const std::vector<Index> ids = test::random_ids(9, 7, 4);
  const Sequences sequences({4, 5});
  const Matrix<double> packed = infer(model, ids, {.sequences = &sequences});
  const std::span<const Index> all = ids;
  CHECK(test::relative_error(packed.topRows(4), infer(model, all.first(4))) <= 1e-12);
  CHECK(test::relative_error(packed.bottomRows(5), infer(model, all.last(5))) <= 1e-12);
  CHECK(test::relative_error(packed.topRows(2), infer(model, all.first(2))) <= 1e-12);
}

TEST_CASE("Decoding never trains, whatever its pass says", "[model][decoder]") {
  Rng rng(1);
  std::vector<Block<double>> layers;
  layers.push_back(pre_norm_block<double>(
      RmsNorm<double>(4),
      GroupedQueryAttention<double>(rng, {.d_model = 4, .heads = 1, .kv_heads = 1}),
      RmsNorm<double>(4),
      MoELayer(JitterRouter(LinearRouter<double>(4, 3, rng, {.init_scale = 1.0})),
               SoftmaxTopK<double>({.k = 2}), Dropless(), GluBank<double>(4, 3, 5, rng)),
      "moe"));
  const Decoder<double> model(Embedding<double>(7, 4, rng), std::move(layers), RmsNorm<double>(4));
  const std::vector<Index> ids = {1, 5, 3};
  Decoder<double>::Cache cache;
  Decoder<double>::State state;
  const Matrix<double> quiet = decode(model, TokenIds(ids), state, cache);
  Decoder<double>::State other;
  Decoder<double>::State* const states[] = {&other};
  // Jitter in training would need a generator, which this pass does not have.
  CHECK(model.decode(ids, kTraining, states, cache) == quiet);
}

TEST_CASE("Padding changes nothing for the tokens before it", "[model][decoder]") {
  Decoder<double> model = make_decoder<double>({});
  const std::vector<Index> ids = test::random_ids(5, 7, 5);
  const std::vector<Index> targets = test::random_ids(5, 7, 6);
  Training<double> training;
  const double objective = training.accumulate(model, ids, targets);
  std::vector<Matrix<double>> expected;
  for (auto& [name, parameter] : parameters(model)) expected.push_back(parameter->gradient());

  std::vector<Index> padded = ids;
  padded.insert(padded.end(), {6, 6, 6});
  std::vector<Index> padded_targets = targets;
  padded_targets.insert(padded_targets.end(), 3, -100);
  const std::vector<std::uint8_t> mask = {1, 1, 1, 1, 1, 0, 0, 0};
  zero_gradients(model);
  CHECK(training.accumulate(model, padded, padded_targets, {.mask = mask}) == Approx(objective));
  std::size_t i = 0;
  for (auto& [name, parameter] : parameters(model)) {
    INFO("parameter " << name);
    CHECK(test::relative_error(parameter->gradient(), expected[i++]) <= 1e-12);
  }
}

TEST_CASE("A copy of a decoder's state continues on its own", "[model][decoder]") {
  const Decoder<double> model = make_decoder<double>({});
  const std::vector<Index> prompt = test::random_ids(5, 7, 7);
  const auto continued = [&](std::vector<Index> with) {
    with.insert(with.begin(), prompt.begin(), prompt.end());
    return Matrix<double>(infer(model, with).bottomRows(1));
  };
  Decoder<double>::State state;
  Decoder<double>::Cache cache;
  decode(model, prompt, state, cache);
  Decoder<double>::State copy = state;

  const std::vector<Index> one = {3};
  const std::vector<Index> other = {5};
  CHECK(test::relative_error(decode(model, one, state, cache), continued({3})) <= 1e-12);
  CHECK(test::relative_error(decode(model, other, copy, cache), continued({5})) <= 1e-12);
  CHECK(test::relative_error(decode(model, other, state, cache), continued({3, 5})) <= 1e-12);
  CHECK(test::relative_error(decode(model, one, copy, cache), continued({5, 3})) <= 1e-12);
  CHECK(copy.length == 7);
}

TEST_CASE("A copy of a decoder is trained on its own", "[model][decoder]") {
  const Decoder<double> model = make_decoder<double>({});
  const std::vector<Index> ids = test::random_ids(6, 7, 8);
  const Matrix<double> logits = infer(model, ids);
  Decoder<double> copy = model;
  CHECK(infer(copy, ids) == logits);
  for (auto& [name, parameter] : parameters(copy)) parameter->value *= 1.5;
  CHECK(infer(copy, ids) != logits);
  CHECK(infer(model, ids) == logits);
}

TEST_CASE("Micro-batches add up to the batch, auxiliary losses included", "[model][decoder]") {
  const auto tied = GENERATE(false, true);
  Decoder<double> model = make_decoder<double>({.tied = tied});
  const std::vector<Index> ids = test::random_ids(12, 7, 9);
  std::vector<Index> targets = test::random_ids(12, 7, 10);
  targets[1] = targets[2] = targets[9] = -100;  // Not in proportion to the sequences.
  const Sequences all({4, 4, 4});
  Training<double> training;
  const double objective = training.accumulate(model, ids, targets, {.sequences = &all});
  const double aux_loss = training.record.aux_loss();
  std::vector<Matrix<double>> expected;
  for (auto& [name, parameter] : parameters(model)) expected.push_back(parameter->gradient());

  zero_gradients(model);
  double sum = 0.0;
  double aux_sum = 0.0;
  const auto add_micro_batch = [&](std::size_t begin, const Sequences& sequences) {
    const auto count = static_cast<std::size_t>(sequences.tokens());
    const Pass pass{.sequences = &sequences,
                    .aux_scale = static_cast<double>(sequences.count()) / 3.0};
    sum += training.accumulate(model, std::span(ids).subspan(begin, count),
                               std::span(targets).subspan(begin, count), pass, 9);
    aux_sum += training.record.aux_loss();
  };
  add_micro_batch(0, Sequences({4}));
  add_micro_batch(4, Sequences({4, 4}));
  CHECK(sum == Approx(objective).epsilon(1e-12));
  CHECK(aux_sum == Approx(aux_loss).epsilon(1e-12));
  std::size_t i = 0;
  for (auto& [name, parameter] : parameters(model)) {
    INFO("parameter " << name);
    CHECK(test::relative_error(parameter->gradient(), expected[i++]) <= 1e-12);
  }
}

TEST_CASE("Ten steps of training are the same to the bit on one thread and on two",
          "[model][decoder]") {
  const Sizes sizes{.tied = true, .vocab = 96, .d_model = 64, .d_hidden = 48, .experts = 4};
  const std::vector<Index> ids = test::random_ids(160, 96, 11);
  const std::vector<Index> targets = test::random_ids(160, 96, 12);
  const Sequences sequences({100, 60});
  const auto train = [&] {
    Decoder<float> model = make_decoder<float>(sizes);
    AdamW<float> optimizer;
    Training<float> training;
    for (int step = 0; step < 10; ++step) {
      training.accumulate(model, ids, targets, {.sequences = &sequences});
      clip_global_norm(model, 1.0);
      optimizer.step(model);
    }
    return model;
  };
  Decoder<float> one = train();
  set_threads(2);
  Decoder<float> two = train();
  const Matrix<float> logits = infer(two, ids);
  set_threads(1);

  const auto expected = parameters(one);
  const auto actual = parameters(two);
  REQUIRE(actual.size() == expected.size());
  for (std::size_t i = 0; i < actual.size(); ++i) {
    INFO("parameter " << actual[i].name);
    CHECK(actual[i].parameter->value == expected[i].parameter->value);
  }
  CHECK(logits == infer(one, ids));
}

TEST_CASE("A training step allocates nothing once it has run before", "[model][decoder]") {
  const auto tied = GENERATE(false, true);
  Decoder<float> model = make_decoder<float>({.tied = tied});
  const std::vector<Index> ids = test::random_ids(18, 7, 18);
  const std::vector<Index> targets = test::random_ids(18, 7, 19);
  const Sequences sequences({10, 8});
  const std::vector<std::uint8_t> mask = {1, 1, 1, 1, 1, 1, 1, 1, 1, 0, 1, 1, 1, 1, 1, 1, 1, 1};
  for (const auto& [name, parameter] : parameters(model)) parameter->gradient();
  AdamW<float> optimizer({.learning_rate = 1e-5});
  Training<float> training;
  const auto step = [&] {
    training.accumulate(model, ids, targets, {.sequences = &sequences, .mask = mask});
    optimizer.step(model);
  };
  CHECK((test::count_allocations(step) > 0 || !test::allocations_are_counted()));
  step();
  CHECK(test::count_allocations(step) == 0);
}

TEST_CASE("Training a decoder lowers the loss", "[model][decoder]") {
  const auto tied = GENERATE(false, true);
  Decoder<float> model = make_decoder<float>({.tied = tied});
  // Each token follows from the one before it.
  std::vector<Index> ids;
  for (Index t = 0; t < 33; ++t) ids.push_back(t * t % 7);
  const std::span<const Index> inputs = std::span(ids).first(32);
  const std::span<const Index> targets = std::span(ids).last(32);
  AdamW<float> optimizer({.learning_rate = 1e-2});
  Training<float> training;
  const float before = training.evaluate(model, inputs, targets);
  for (int step = 0; step < 10; ++step) {
    training.accumulate(model, inputs, targets);
    clip_global_norm(model, 1.0);
    optimizer.step(model);
  }
  CHECK(training.evaluate(model, inputs, targets) < 0.7F * before);
}

TEST_CASE("Decoder lets balancing rules act", "[model][decoder]") {
  Rng rng(13);
  std::vector<Block<double>> layers;
  layers.push_back(Block<double>(
      {{"moe", RmsNorm<double>(8),
        MoELayer(LinearRouter<double>(8, 3, rng), SigmoidTopK<double>(3, {.k = 1}), Dropless(),
                 GluBank<double>(8, 3, 5, rng), BiasBalance<double>({.rate = 0.5}))}}));
  Decoder<double> model(Embedding<double>(7, 8, rng), std::move(layers), RmsNorm<double>(8));
  const auto kept = buffers(model);
  REQUIRE(kept.size() == 1);
  CHECK(kept[0].name == "layers.0.moe.selector.bias");
  Decoder<double>::Cache cache;
  const std::vector<Index> ids = {4};
  const Matrix<double> d_logits = model.forward(ids, kTraining, cache);
  model.backward(d_logits, cache);
  update(model);
  CHECK(kept[0].buffer->value.cwiseAbs() == Matrix<double>::Constant(1, 3, 0.5));
}

TEST_CASE("Decoder tells a record losses and reports of its mixtures by name", "[model][decoder]") {
  const Decoder<double> model = make_decoder<double>({});
  Decoder<double>::Cache cache;
  PassRecord record(PassRecord::Collects::kLossesAndReports);
  const std::vector<Index> ids = test::random_ids(6, 7, 14);
  const std::vector<std::uint8_t> mask = {1, 1, 1, 1, 0, 0};
  model.forward(ids, {.training = true, .mask = mask, .aux_scale = 0.5, .record = &record}, cache);
  REQUIRE(record.losses().size() == 2);
  CHECK(record.losses()[0].name == "layers.1.moe.switch");
  CHECK(record.losses()[1].name == "layers.1.moe.z");
  CHECK(record.aux_loss("switch") == record.losses()[0].value);
  REQUIRE(record.reports().size() == 1);
  CHECK(record.reports()[0].name == "layers.1.moe");
  const LayerReport& report = record.reports()[0].report;
  CHECK(report.tokens == 4);
  CHECK(report.assignments == 8);
  CHECK(report.dropped == 0);
  REQUIRE(report.losses.size() == 2);
  CHECK(report.losses[0].first == "switch");
  CHECK(report.losses[1].first == "z");
  CHECK(report.losses[0].second + report.losses[1].second == Approx(record.aux_loss()));

  // Losses are computed for a record also without training, and for nobody otherwise.
  PassRecord inferred;
  model.forward(ids, {.mask = mask, .aux_scale = 0.5, .record = &inferred}, cache);
  CHECK(inferred.aux_loss() == record.aux_loss());
  CHECK(inferred.reports().empty());
}

TEST_CASE("An inference pass needs one workspace, whatever the number of layers",
          "[model][decoder]") {
  const auto tied = GENERATE(false, true);
  Decoder<double> shallow = make_decoder<double>({.tied = tied});
  Decoder<double> deep = shallow;
  for (int copies = 0; copies < 3; ++copies) {
    for (const Block<double>& layer : shallow.layers()) deep.layers().push_back(layer);
  }
  const std::vector<Index> ids = test::random_ids(9, 7, 20);
  const Sequences sequences({5, 4});
  const auto allocations_of = [&](const Decoder<double>& model) {
    Decoder<double>::Cache cache;
    const Pass pass{.sequences = &sequences};
    model.forward(ids, pass, cache);
    const long allocations = test::count_allocations([&] {
      Decoder<double>::Cache fresh;
      model.forward(ids, pass, fresh);
    });
    CHECK(cache.layers.layers.empty());
    CHECK(test::count_allocations([&] { model.forward(ids, pass, cache); }) == 0);

    Decoder<double>::Cache training;
    const Matrix<double> logits =
        model.forward(ids, {.training = true, .sequences = &sequences}, training);
    CHECK(training.layers.layers.size() == model.layers().size());
    CHECK(model.forward(ids, pass, cache) == logits);
    CHECK(model.hidden(cache) == model.hidden(training));
    return allocations;
  };
  const long of_two_layers = allocations_of(shallow);
  CHECK(allocations_of(deep) == of_two_layers);
}

TEST_CASE("One cache serves training and inference in turn", "[model][decoder]") {
  Decoder<double> model = make_decoder<double>({.tied = true});
  const std::vector<Index> ids = test::random_ids(6, 7, 21);
  const std::vector<Index> targets = test::random_ids(6, 7, 22);
  Training<double> training;
  training.accumulate(model, ids, targets);
  const Matrix<double> gradient = parameters(model)[0].parameter->gradient();
  zero_gradients(model);
  model.forward(ids, Pass{}, training.cache);
  training.accumulate(model, ids, targets);
  CHECK(parameters(model)[0].parameter->gradient() == gradient);
}

TEST_CASE("Token ids may be int", "[model][decoder]") {
  const Decoder<double> model = make_decoder<double>({});
  const std::vector<int> ints = {3, 0, 6, 3};
  const std::vector<Index> ids(ints.begin(), ints.end());
  CHECK(infer(model, ints) == infer(model, ids));
  CHECK(infer(model, std::array{3, 0, 6, 3}) == infer(model, ids));
  Decoder<double>::State state, other;
  Decoder<double>::Cache cache, other_cache;
  CHECK(decode(model, ints, state, cache) == decode(model, ids, other, other_cache));
}

TEST_CASE("Routers of a decoder are frozen by name", "[model][decoder]") {
  Decoder<double> model = make_decoder<double>({.tied = true});
  CHECK(freeze(model, "*.router.*") == 1);
  const std::vector<Index> ids = test::random_ids(6, 7, 23);
  const std::vector<Index> targets = test::random_ids(6, 7, 24);
  Decoder<double> before = model;
  Training<double> training;
  AdamW<double> optimizer({.learning_rate = 1e-2});
  training.accumulate(model, ids, targets);
  optimizer.step(model);
  const auto old = parameters(before);
  const auto now = parameters(model);
  for (std::size_t i = 0; i < now.size(); ++i) {
    INFO("parameter " << now[i].name);
    const bool router = now[i].name == "layers.1.moe.router.weight";
    if (router) CHECK(now[i].parameter->frozen);
    const bool expert = now[i].name.find("experts") != std::string::npos;  // It may have no token.
    if (!expert) CHECK((now[i].parameter->value == old[i].parameter->value) == router);
  }
  CHECK(test::message_of<ConfigError>([&] { freeze(model, "*.gate_network.*"); }) ==
        "freeze: no parameter matches '*.gate_network.*', expected at least one");
}

TEST_CASE("Decoder works on zero tokens and on one", "[model][decoder]") {
  const auto tied = GENERATE(false, true);
  const auto tokens = GENERATE(as<Index>{}, 0, 1);
  Decoder<double> model = make_decoder<double>({.tied = tied});
  const std::vector<Index> ids = test::random_ids(tokens, 7, 15);
  Training<double> training;
  CHECK(std::isfinite(training.accumulate(model, ids, ids)));
  CHECK(model.hidden(training.cache).rows() == tokens);
  const Matrix<double> logits = infer(model, ids);
  CHECK(logits.rows() == tokens);
  CHECK(logits.cols() == 7);
  for (auto& [name, parameter] : parameters(model)) {
    INFO("parameter " << name);
    CHECK(parameter->gradient().allFinite());
    if (tokens == 0) CHECK(parameter->gradient().isZero(0.0));
  }
}

TEST_CASE("Decoder without layers is a bigram model", "[model][decoder]") {
  Rng rng(16);
  const Decoder<double> model(Embedding<double>(7, 8, rng, {.stddev = 1.0}), {},
                              RmsNorm<double>(8));
  const Matrix<double> logits = infer(model, std::vector<Index>{2, 5, 2});
  CHECK(logits.row(0) == logits.row(2));
}

TEST_CASE("Decoder says what does not fit", "[model][decoder]") {
  Rng rng(17);
  const auto with_head = [&](Index d_in, Index d_out) {
    return test::message_of<ConfigError>([&] {
      Decoder<double>(Embedding<double>(7, 8, rng), {}, RmsNorm<double>(8),
                      Linear<double>(d_in, d_out, rng));
    });
  };
  CHECK(with_head(8, 6) == "Decoder: the head is [6, 8], expected [7, 8] as the embedding");
  CHECK(with_head(5, 7) == "Decoder: the head is [7, 5], expected [7, 8] as the embedding");

  const Decoder<double> model = make_decoder<double>({});
  const std::vector<Index> ids = {1, 2, 3};
  const std::vector<std::uint8_t> mask = {1, 1};
  const Sequences sequences({2, 2});
  CHECK(test::message_of<ShapeError>([&] { infer(model, ids, {.mask = mask}); }) ==
        "Decoder::forward: pass.mask has 2 entries, expected 3 (one per token)");
  CHECK(test::message_of<ShapeError>([&] { infer(model, ids, {.sequences = &sequences}); }) ==
        "Decoder::forward: pass.sequences cover 4 tokens, expected 3");
}

TEST_CASE("Decoder refuses caches that do not fit, and gradients of another shape",
          "[model][decoder]") {
  const auto tied = GENERATE(false, true);
  Decoder<double> model = make_decoder<double>({.tied = tied});
  Decoder<double>::Cache cache;
  Decoder<double>::State state;
  const std::vector<Index> ids = {1, 2, 3};
  const auto backward = [&](Index rows, Index cols) {
    return
        [&model, &cache, rows, cols] { model.backward(Matrix<double>::Zero(rows, cols), cache); };
  };
  constexpr auto kEmpty =
      "Decoder::backward: the cache is empty, expected a forward pass that succeeded";
  CHECK(test::message_of<StateError>(backward(3, 7)) == kEmpty);
  model.forward(ids, Pass{}, cache);
  CHECK(test::message_of<StateError>(backward(3, 7)) ==
        "Decoder::backward: the forward pass did not train, expected one with pass.training = "
        "true");
  make_decoder<double>({.tied = tied}).forward(ids, kTraining, cache);
  CHECK(test::message_of<StateError>(backward(3, 7)) ==
        "Decoder::backward: the cache was filled by another layer, expected a forward pass of this "
        "one");
  model.forward(ids, kTraining, cache);
  CHECK(test::message_of<ShapeError>(backward(2, 7)) ==
        "Decoder::backward: d_logits is [2, 7], expected [3, 7]");
  CHECK(test::message_of<ShapeError>(backward(3, 8)) ==
        "Decoder::backward: d_logits is [3, 8], expected [3, 7]");
  for (const auto& [name, parameter] : parameters(model)) CHECK(parameter->grad.size() == 0);
  CHECK(test::message_of<StateError>(backward(3, 7)) == "no exception");
  CHECK(test::message_of<StateError>(backward(3, 7)) ==
        "Decoder::backward: the cache was used by a backward pass already, expected a forward pass "
        "between the two");
  model.forward(ids, kTraining, cache);
  decode(model, ids, state, cache);
  CHECK(test::message_of<StateError>(backward(3, 7)) == kEmpty);
}

TEST_CASE("A cache may be moved or copied between forward and backward", "[model][decoder]") {
  Decoder<double> model = make_decoder<double>({.tied = true});
  const std::vector<Index> ids = test::random_ids(6, 7, 25);
  const Matrix<double> d_logits = test::random_matrix(6, 7, 26);
  const auto gradients = [&](Decoder<double>::Cache& cache) {
    zero_gradients(model);
    model.backward(d_logits, cache);
    std::vector<Matrix<double>> all;
    for (auto& [name, parameter] : parameters(model)) all.push_back(parameter->gradient());
    return all;
  };
  Decoder<double>::Cache cache;
  model.forward(ids, kTraining, cache);
  Decoder<double>::Cache copied = cache;
  const std::vector<Matrix<double>> expected = gradients(cache);
  Decoder<double>::Cache moved = std::move(copied);
  CHECK(gradients(moved) == expected);

  // A moved model is another one.
  model.forward(ids, kTraining, moved);
  Decoder<double> other = std::move(model);
  CHECK_THROWS_AS(other.backward(d_logits, moved), StateError);
}

TEST_CASE("A failed pass leaves model, state and cache usable", "[model][decoder]") {
  Decoder<double> model = make_decoder<double>({});
  Decoder<double>::Cache cache;
  Decoder<double>::State state;
  const std::vector<Index> ids = {1, 2, 3};
  const std::vector<Index> bad = {1, 7};
  const Matrix<double> logits = model.forward(ids, kTraining, cache);
  constexpr auto kMessage = "Embedding::forward: ids[1] = 7, expected 0 <= id < 7";

  CHECK(test::message_of<ConfigError>([&] { model.forward(bad, kTraining, cache); }) == kMessage);
  CHECK_THROWS_AS(model.backward(logits, cache), StateError);
  CHECK(model.forward(ids, kTraining, cache) == logits);
  model.backward(logits, cache);

  decode(model, ids, state, cache);
  CHECK(test::message_of<ConfigError>([&] { decode(model, bad, state, cache); }) == kMessage);
  CHECK(state.length == 3);
  const std::vector<Index> next = {4};
  const std::vector<Index> all = {1, 2, 3, 4};
  CHECK(test::relative_error(decode(model, next, state, cache), infer(model, all).bottomRows(1)) <=
        1e-12);

  // NaN in a weight: the router notices.
  Parameter<double>& weight = *parameters(model)[0].parameter;
  const double saved = weight.value(2, 0);
  weight.value(2, 0) = std::numeric_limits<double>::quiet_NaN();
  CHECK_THROWS_AS(model.forward(ids, kTraining, cache), NonFiniteError);
  CHECK_THROWS_AS(model.backward(logits, cache), StateError);
  weight.value(2, 0) = saved;
  CHECK(model.forward(ids, kTraining, cache) == logits);
}

}  // namespace weir::decoder_test
