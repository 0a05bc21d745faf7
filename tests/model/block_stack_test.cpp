// SPDX-License-Identifier: MIT
// How much memory the layers of a decoder need, and what they compute again for less of it.
#include <algorithm>
#include <cstdint>
#include <span>
#include <utility>
#include <vector>

#include <weir/attention/grouped_query.hpp>
#include <weir/attention/latent.hpp>
#include <weir/core/input_observer.hpp>
#include <weir/core/parallel.hpp>
#include <weir/model/decoder.hpp>
#include <weir/moe/balance/bias_balance.hpp>
#include <weir/moe/balance/switch_loss.hpp>
#include <weir/moe/capacity/adaptive_capacity.hpp>
#include <weir/moe/capacity/dropless.hpp>
#include <weir/moe/experts/glu_bank.hpp>
#include <weir/moe/moe_layer.hpp>
#include <weir/moe/router/jitter_router.hpp>
#include <weir/moe/router/linear_router.hpp>
#include <weir/moe/router/noisy_router.hpp>
#include <weir/moe/selector/biased_softmax_top_k.hpp>
#include <weir/moe/selector/top_k_softmax.hpp>
#include <weir/nn/dropout.hpp>
#include <weir/nn/glu.hpp>
#include <weir/nn/rms_norm.hpp>
#include <weir/optim/adamw.hpp>

#include "support/allocations.hpp"
#include "support/catch.hpp"
#include "support/matrices.hpp"
#include "support/texts.hpp"
#include "support/threads.hpp"

namespace weir::block_stack_test {

namespace {

constexpr Index kVocab = 7;
constexpr Index kModel = 32;
constexpr Index kExperts = 4;
constexpr Index kTokens = 96;

GroupedQueryAttention<double> attention(Rng& rng) {
  return {rng, {.d_model = kModel, .heads = 2, .kv_heads = 1}};
}

Block<double> mixture(Rng& rng) {
  return pre_norm_block<double>(
      RmsNorm<double>(kModel), attention(rng), RmsNorm<double>(kModel),
      MoELayer(LinearRouter<double>(kModel, kExperts, rng), TopKSoftmax<double>({.k = 2}),
               Dropless(), GluBank<double>(kModel, kExperts, 64, rng), SwitchLoss<double>()),
      "moe");
}

Decoder<double> of_layers(std::vector<Block<double>> layers) {
  Rng rng(7);
  return {Embedding<double>(kVocab, kModel, rng, {.stddev = 0.5}), std::move(layers),
          RmsNorm<double>(kModel)};
}

// `count` layers of one kind.
Decoder<double> uniform(std::size_t count) {
  Rng rng(1);
  return of_layers(std::vector<Block<double>>(count, mixture(rng)));
}

// Layers that draw at random, learn from being used, and pass different numbers of branches.
Decoder<double> noisy() {
  Rng rng(2);
  std::vector<Block<double>> layers;
  for (int l = 0; l < 2; ++l) {
    layers.push_back(pre_norm_block<double>(
        RmsNorm<double>(kModel), WithDropout(attention(rng), {.rate = 0.2}),
        RmsNorm<double>(kModel),
        MoELayer(JitterRouter(LinearRouter<double>(kModel, kExperts, rng, {.init_scale = 1.0})),
                 BiasedSoftmaxTopK<double>(kExperts, {.k = 2}), AdaptiveCapacity<double>(),
                 GluBank<double>(kModel, kExperts, 9, rng, {.dropout = 0.3}),
                 SwitchLoss<double>({.coefficient = 0.5}), BiasBalance<double>()),
        "moe"));
    std::vector<Branch<double>> branches;
    branches.push_back({"attention", RmsNorm<double>(kModel),
                        LatentAttention<double>(rng, {.d_model = kModel,
                                                      .heads = 2,
                                                      .kv_rank = 8,
                                                      .nope_dim = 4,
                                                      .rope_dim = 2,
                                                      .value_dim = 3})});
    branches.push_back({"mlp", RmsNorm<double>(kModel), Glu<double>(kModel, 5, rng)});
    branches.push_back(
        {.name = "moe",
         .norm = RmsNorm<double>(kModel),
         .layer = MoELayer(NoisyRouter<double>(normal_init<double>(kExperts, kModel, 0.3, rng),
                                               normal_init<double>(kExperts, kModel, 0.3, rng)),
                           TopKSoftmax<double>({.k = 2}), Dropless(),
                           GluBank<double>(kModel, kExperts, 9, rng)),
         .parallel = true});
    layers.emplace_back(std::move(branches));
  }
  return of_layers(std::move(layers));
}

// The most memory that `steps` passes need in a cache of their own.
long memory(Decoder<double>& model, bool training) {
  const std::vector<Index> ids = test::random_ids(kTokens, kVocab, 3);
  const Matrix<double> d_logits = test::random_matrix(kTokens, kVocab, 4);
  const auto pass = [&] {
    Decoder<double>::Cache cache;
    for (int step = 0; step < 2; ++step) {
      model.forward(ids, {.training = training}, cache);
      if (training) model.backward(d_logits, cache);
    }
  };
  pass();  // Gradients are there from now on.
  return test::most_bytes_of(pass);
}

constexpr long kActivations = kTokens * kModel * static_cast<long>(sizeof(double));

}  // namespace

TEST_CASE("Inference takes the memory of one layer, whatever their number", "[model][memory]") {
  if (!test::allocations_are_counted()) return;
  Decoder<double> one = uniform(1);
  Decoder<double> eight = uniform(8);
  // Beside it there is the input of a layer, while its output is made.
  CHECK(memory(eight, false) <= memory(one, false) + kActivations + 4096);

  const std::vector<Index> ids = test::random_ids(kTokens, kVocab, 3);
  const auto decoding = [&](const Decoder<double>& model) {
    Decoder<double>::State state;
    const auto prompt = [&] {
      Decoder<double>::Cache cache;
      decode(model, ids, state, cache);
    };
    prompt();
    state.truncate(0);  // Its memory stays.
    return test::most_bytes_of(prompt);
  };
  CHECK(decoding(eight) <= decoding(one) + kActivations + 4096);
}

TEST_CASE("Training keeps of each layer what its backward pass needs, and no workspace",
          "[model][memory]") {
  if (!test::allocations_are_counted()) return;
  Decoder<double> two = uniform(2);
  Decoder<double> three = uniform(3);
  const long layer = memory(three, true) - memory(two, true);
  // Two slots a token, of two vectors of d_model and three of d_hidden = 2 d_model numbers; and no
  // more than 24 vectors of the token elsewhere. As many numbers of slots, and 7 vectors of
  // attention, are only needed while backward runs.
  const long slots = 2 * (2 + 3 * 2) * kActivations;
  CHECK(layer >= slots);
  CHECK(layer <= slots + 24 * kActivations);
}

TEST_CASE("Layers that are computed again keep their input alone", "[model][memory]") {
  if (!test::allocations_are_counted()) return;
  Decoder<double> two = uniform(2);
  Decoder<double> eight = uniform(8);
  const long kept = memory(eight, true);
  two.set_recompute(true);
  eight.set_recompute(true);
  CHECK(memory(eight, true) - memory(two, true) <= 6 * kActivations + 16384);
  CHECK(memory(eight, true) < kept / 3);
}

TEST_CASE("Layers that are computed again give gradients of the same bits", "[model][memory]") {
  const auto threads_count = GENERATE(1, 2);
  const test::Threads threads(threads_count);
  Decoder<double> kept = noisy();
  Decoder<double> again = kept;
  again.set_recompute(true);
  CHECK(again.recompute());
  const std::vector<Index> ids = test::random_ids(kTokens, kVocab, 5);
  const Matrix<double> d_logits = test::random_matrix(kTokens, kVocab, 6);
  const Sequences sequences({kTokens - 30, 30});
  std::vector<std::uint8_t> mask(static_cast<std::size_t>(kTokens), 1);
  mask[7] = 0;
  std::vector<std::uint8_t> allowed(static_cast<std::size_t>(kExperts), 1);
  allowed[2] = 0;

  Decoder<double>::Cache kept_cache, again_cache;
  AdamW<double> kept_optimizer, again_optimizer;
  Rng kept_rng(8), again_rng(8);
  for (int step = 0; step < 3; ++step) {
    const auto run = [&](Decoder<double>& model, Decoder<double>::Cache& cache, Rng& rng,
                         PassRecord& record) {
      // The pass ends here, and `backward` cannot look at it.
      const Sequences own_sequences = sequences;
      std::vector<std::uint8_t> own_mask = mask, own_allowed = allowed;
      Matrix<double> logits = model.forward(ids,
                                            {.training = true,
                                             .sequences = &own_sequences,
                                             .mask = own_mask,
                                             .allowed = own_allowed,
                                             .rng = &rng,
                                             .aux_scale = 0.5,
                                             .record = &record},
                                            cache);
      std::fill(own_mask.begin(), own_mask.end(), std::uint8_t{0});
      return logits;
    };
    PassRecord of_kept, of_again;
    const Matrix<double> logits = run(kept, kept_cache, kept_rng, of_kept);
    CHECK(run(again, again_cache, again_rng, of_again) == logits);
    CHECK(again.hidden(again_cache) == kept.hidden(kept_cache));
    kept.backward(d_logits, kept_cache);
    again.backward(d_logits, again_cache);
    CHECK(of_again.aux_loss() == of_kept.aux_loss());
    CHECK(again_rng.position() == kept_rng.position());

    const auto expected = parameters(kept);
    const auto found = parameters(again);
    for (std::size_t p = 0; p < expected.size(); ++p) {
      INFO("parameter " << expected[p].name);
      CHECK(found[p].parameter->grad == expected[p].parameter->grad);
    }
    kept_optimizer.step(kept);
    again_optimizer.step(again);
    const auto expected_buffers = buffers(kept);
    const auto found_buffers = buffers(again);
    for (std::size_t b = 0; b < expected_buffers.size(); ++b) {
      INFO("buffer " << expected_buffers[b].name);
      CHECK(found_buffers[b].buffer->value == expected_buffers[b].buffer->value);
    }
  }
}

TEST_CASE("Layers that are computed again show their inputs once", "[model][memory]") {
  // Counts the rows it sees; gone before the layers are computed again.
  struct Count final : InputObserver {
    void see(const Parameter<float>& /*weight*/, MatrixIn<float> /*x*/,
             std::span<const std::uint8_t> /*mask*/) override {}
    void see(const Parameter<double>& /*weight*/, MatrixIn<double> x,
             std::span<const std::uint8_t> /*mask*/) override {
      rows += x.rows();
    }
    Index rows = 0;
  };
  const std::vector<Index> ids = test::random_ids(kTokens, kVocab, 3);
  const Matrix<double> d_logits = test::random_matrix(kTokens, kVocab, 4);
  const auto seen = [&](bool recompute) {
    Decoder<double> model = uniform(3);
    model.set_recompute(recompute);
    Decoder<double>::Cache cache;
    Count count;
    model.forward(ids, {.training = true, .inputs = &count}, cache);
    model.backward(d_logits, cache);
    return count.rows;
  };
  CHECK(seen(false) > 0);
  CHECK(seen(true) == seen(false));
}

TEST_CASE("Layers that are computed again allocate nothing once they have run before",
          "[model][memory]") {
  Decoder<double> model = noisy();
  model.set_recompute(true);
  const std::vector<Index> ids = test::random_ids(kTokens, kVocab, 9);
  const Matrix<double> d_logits = test::random_matrix(kTokens, kVocab, 10);
  Decoder<double>::Cache cache;
  const auto step = [&] {
    Rng rng(11);
    model.forward(ids, {.training = true, .rng = &rng}, cache);
    model.backward(d_logits, cache);
  };
  step();
  CHECK(test::count_allocations(step) == 0);
}

TEST_CASE("One cache serves a decoder with and without layers that are computed again",
          "[model][memory]") {
  Decoder<double> model = uniform(3);
  const std::vector<Index> ids = test::random_ids(kTokens, kVocab, 12);
  const Matrix<double> d_logits = test::random_matrix(kTokens, kVocab, 13);
  const auto gradient = [&](Decoder<double>::Cache& cache) {
    zero_gradients(model);
    model.forward(ids, kTraining, cache);
    model.backward(d_logits, cache);
    return parameters(model)[0].parameter->grad;
  };
  Decoder<double>::Cache fresh, cache;
  const Matrix<double> expected = gradient(fresh);
  for (const bool recompute : {true, false, true}) {
    model.set_recompute(recompute);
    CHECK(gradient(cache) == expected);
    CHECK(model.forward(ids, Pass{}, cache) == infer(model, ids));
  }

  // Which way a pass went is its own matter, not that of the settings now.
  zero_gradients(model);
  model.forward(ids, kTraining, cache);
  model.set_recompute(false);
  model.backward(d_logits, cache);
  CHECK(parameters(model)[0].parameter->grad == expected);
}

TEST_CASE("Conversations that begin with one prompt hold it once", "[model][memory][decode]") {
  if (!test::allocations_are_counted()) return;
  const Decoder<double> model = uniform(2);
  const std::vector<Index> prompt = test::random_ids(1000, kVocab, 14);
  const std::vector<Index> first = test::random_ids(5, kVocab, 15);
  const std::vector<Index> second = test::random_ids(5, kVocab, 16);
  Decoder<double>::Cache cache;
  Decoder<double>::State prefix;
  decode(model, prompt, prefix, cache);
  const auto bytes_of_rows = [](Index rows) {
    return 2 * 2 * rows * kModel / 2 * static_cast<long>(sizeof(double));  // Two layers, one head.
  };

  std::vector<Decoder<double>::State> states;
  const long before = test::bytes_in_use();
  for (int copy = 0; copy < 10; ++copy) states.push_back(prefix);
  CHECK(test::bytes_in_use() - before <= bytes_of_rows(1000) / 4);
  const Matrix<double> of_first = decode(model, first, states[0], cache);
  const Matrix<double> of_second = decode(model, second, states[1], cache);
  CHECK(test::bytes_in_use() - before <= bytes_of_rows(2 * Pages::kRows) + bytes_of_rows(1000) / 3);

  // Each goes on as if it were alone, also after some tokens were taken back.
  std::vector<Index> whole = prompt;
  whole.insert(whole.end(), first.begin(), first.end());
  CHECK(of_first == infer(model, whole).bottomRows(5));
  CHECK(decode(model, first, prefix, cache) == of_first);
  states[1].truncate(1000);
  CHECK(decode(model, first, states[1], cache) == of_first);
  states[0].truncate(990);
  const std::vector<Index> again(prompt.begin() + 990, prompt.end());
  decode(model, again, states[0], cache);
  CHECK(decode(model, second, states[0], cache) == of_second);
  CHECK(decode(model, second, states[2], cache) == of_second);
}

}  // namespace weir::block_stack_test
