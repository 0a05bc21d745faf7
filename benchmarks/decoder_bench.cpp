// SPDX-License-Identifier: MIT
// A small decoder with mixtures of experts beside the dense decoder of the same active parameters,
// both over bytes, each round of both:
//
//     decoder/training/threads:N          a step: forward, loss, backward, AdamW
//     decoder/prefill/STORAGE/threads:N   a prompt, up to the logits of its last byte
//     decoder/decode/STORAGE/threads:N    one byte at a time behind a prompt
//
//     attention/context:4096/CACHE/threads:N   one token over a cache of so many, of 32 heads in 8
//                                              groups, each with 128 numbers; in layers that take
//                                              more memory than the processor's own
//
//     tokens/s         of the sparse decoder; the row's time is that of one of its rounds
//     dense tokens/s   of the dense decoder
//     sparse:dense     how many times as long the sparse decoder takes
#include <cstddef>
#include <span>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include <benchmark/benchmark.h>

#include <weir/attention/causal.hpp>
#include <weir/attention/grouped_query.hpp>
#include <weir/attention/kv_cache.hpp>
#include <weir/attention/operands.hpp>
#include <weir/core/cache_storage.hpp>
#include <weir/core/init.hpp>
#include <weir/core/pass.hpp>
#include <weir/core/random.hpp>
#include <weir/core/sequences.hpp>
#include <weir/core/storage.hpp>
#include <weir/core/types.hpp>
#include <weir/model/block.hpp>
#include <weir/model/decoder.hpp>
#include <weir/moe/balance/switch_loss.hpp>
#include <weir/moe/balance/z_loss.hpp>
#include <weir/moe/capacity/dropless.hpp>
#include <weir/moe/experts/glu_bank.hpp>
#include <weir/moe/moe_layer.hpp>
#include <weir/moe/router/linear_router.hpp>
#include <weir/moe/selector/top_k_softmax.hpp>
#include <weir/nn/cross_entropy.hpp>
#include <weir/nn/embedding.hpp>
#include <weir/nn/glu.hpp>
#include <weir/nn/linear.hpp>
#include <weir/nn/rms_norm.hpp>
#include <weir/optim/adamw.hpp>

#include "support/clock.hpp"
#include "support/mixture.hpp"
#include "support/program.hpp"
#include "support/rows.hpp"

namespace {

namespace bench = weir::bench;
using Decoder = weir::Decoder<float>;
using weir::Index;
using weir::Matrix;
using weir::Storage;

constexpr Index kBytes = 256;
constexpr Index kLayers = 4;
constexpr Index kWidth = 512;
constexpr Index kHidden = 1024;  // Of one expert.
constexpr Index kExperts = 8;
constexpr Index kActive = 2;

constexpr Index kSequences = 4;  // Of a training step.
constexpr Index kContext = 256;
constexpr Index kPrompt = 512;  // Of prefill; decoding has a quarter of it.
constexpr Index kContinuation = 32;

/// 50 M parameters in the experts, of which a token meets a quarter.
weir::AnyLayer<float> make_mixture(weir::Rng& rng) {
  bench::MixtureWeights weights = bench::make_weights({"", kWidth, kHidden, kExperts, kActive});
  return weir::MoELayer(
      weir::LinearRouter<float>(kWidth, kExperts, rng), weir::TopKSoftmax<float>({.k = kActive}),
      weir::Dropless(),
      weir::GluBank<float>(std::move(weights.gate), std::move(weights.up), std::move(weights.down)),
      weir::SwitchLoss<float>(), weir::ZLoss<float>());
}

/// As wide as the experts that a token meets.
weir::AnyLayer<float> make_dense() {
  bench::MixtureWeights weights = bench::make_weights({"", kWidth, kActive * kHidden, 1, 1});
  return weir::Glu<float>(std::move(weights.gate[0]), std::move(weights.up[0]),
                          std::move(weights.down[0]));
}

Decoder make_decoder(bool sparse) {
  weir::Rng rng(1);
  weir::Embedding<float> embedding(kBytes, kWidth, rng);
  std::vector<weir::Block<float>> layers;
  for (Index l = 0; l < kLayers; ++l) {
    weir::GroupedQueryAttention<float> attention(rng,
                                                 {.d_model = kWidth, .heads = 8, .kv_heads = 2});
    layers.push_back(weir::pre_norm_block<float>(
        weir::RmsNorm<float>(kWidth), std::move(attention), weir::RmsNorm<float>(kWidth),
        sparse ? make_mixture(rng) : make_dense(), sparse ? "moe" : "mlp"));
  }
  return {std::move(embedding), std::move(layers), weir::RmsNorm<float>(kWidth),
          weir::Linear<float>(kWidth, kBytes, rng)};
}

std::vector<Index> random_bytes(Index count) {
  weir::Rng rng(2);
  std::vector<Index> ids(static_cast<std::size_t>(count));
  for (Index& id : ids) id = rng.below(kBytes);
  return ids;
}

/// Training steps on one batch.
class Training {
 public:
  static constexpr Index kTokens = kSequences * kContext;

  Training(Decoder& decoder, Storage /*storage*/) : decoder_(decoder) {}

  double run_round() {
    const weir::Pass pass{.training = true, .sequences = &sequences_};
    return bench::seconds_of([&] {
      const Matrix<float>& logits = decoder_.forward(ids_, pass, cache_);
      loss_.forward(logits, targets_, loss_cache_);
      decoder_.backward(loss_.backward(loss_cache_), cache_);
      optimizer_.step(decoder_);
    });
  }

 private:
  Decoder& decoder_;
  weir::AdamW<float> optimizer_;
  weir::Sequences sequences_ = weir::Sequences::uniform(kSequences, kContext);
  std::vector<Index> ids_ = random_bytes(kTokens);
  std::vector<Index> targets_ = ids_;
  weir::CrossEntropy<float> loss_;
  Decoder::Cache cache_;
  weir::CrossEntropy<float>::Cache loss_cache_;
};

/// Prompts, one after the other.
class Prefill {
 public:
  static constexpr Index kTokens = kPrompt;

  Prefill(Decoder& decoder, Storage storage) : decoder_(decoder) {
    weir::set_storage(decoder, storage);
  }

  double run_round() {
    Decoder::State state;
    return bench::seconds_of([&] { weir::decode(decoder_, ids_, state, cache_, true); });
  }

 private:
  Decoder& decoder_;
  std::vector<Index> ids_ = random_bytes(kTokens);
  Decoder::Cache cache_;
};

/// Continuations of one prompt.
class Decode {
 public:
  static constexpr Index kTokens = kContinuation;

  Decode(Decoder& decoder, Storage storage) : decoder_(decoder) {
    weir::set_storage(decoder, storage);
    weir::decode(decoder, random_bytes(kPrompt / 4), prompt_, cache_, true);
  }

  double run_round() {
    Decoder::State state = prompt_;
    return bench::seconds_of([&] {
      for (const Index id : ids_) weir::decode(decoder_, std::span(&id, 1), state, cache_);
    });
  }

 private:
  Decoder& decoder_;
  std::vector<Index> ids_ = random_bytes(kTokens);
  Decoder::State prompt_;
  Decoder::Cache cache_;
};

/// Both decoders, rounds of `Work` in turns.
template <class Work>
double measure(benchmark::State& state, Storage storage) {
  Decoder sparse = make_decoder(true);
  Decoder dense = make_decoder(false);
  Work sparse_work(sparse, storage);
  Work dense_work(dense, storage);
  sparse_work.run_round();  // Caches grow.
  dense_work.run_round();

  bench::Figures figures;
  std::vector<double> times;
  bench::repeat_rounds([&] {
    times.push_back(sparse_work.run_round());
    const double dense_time = dense_work.run_round();
    figures.add("tokens/s", Work::kTokens / times.back());
    figures.add("dense tokens/s", Work::kTokens / dense_time);
    figures.add("sparse:dense", times.back() / dense_time);
  });
  figures.report(state);
  return bench::median(times);
}

/// The attention of one token over the caches of several layers.
class CachedAttention {
 public:
  explicit CachedAttention(weir::CacheStorage storage) {
    weir::Rng rng(3);
    const Matrix<float> rows = weir::normal_init<float>(kTokens, kGroups * kDim, 1.0, rng);
    q_ = weir::normal_init<float>(1, kHeads * kDim, 1.0, rng);
    out_.resize(1, kHeads * kDim);
    while (layers_.size() < kLayers) layers_.emplace_back(storage).append(rows, rows, kGroups);
  }

  double run_round(bench::Cost& cost) {
    constexpr double kProducts = 2.0;  // With the keys and with the values.
    for (const weir::KvCache<float>& kv : layers_) {
      cost.flops += kProducts * 2.0 * kTokens * kHeads * kDim;
      cost.bytes += static_cast<double>(kTokens * kv.bytes_per_token());
    }
    cost.tokens = 1;
    return bench::seconds_of([&] {
      for (const weir::KvCache<float>& kv : layers_) {
        const auto rows = weir::KeyValueRows<float>::of(kv);
        weir::CausalAttention<float>(kShape, {&kSpan, 1}, q_, {&rows, 1}).forward(out_, cache_);
      }
    });
  }

  static constexpr Index kTokens = 4096;

 private:
  static constexpr std::size_t kLayers = 16;
  static constexpr Index kHeads = 32;
  static constexpr Index kGroups = 8;
  static constexpr Index kDim = 128;
  static constexpr weir::AttentionHeads kShape = {kHeads, kGroups, kDim, kDim, 0.09};
  static constexpr weir::AttentionSpan kSpan = {0, 1, 0, kTokens};

  std::vector<weir::KvCache<float>> layers_;
  Matrix<float> q_, out_;
  weir::CausalAttention<float>::Cache cache_;
};

void add_attention_row(weir::CacheStorage storage, int threads) {
  const std::string name = "attention/context:" + std::to_string(CachedAttention::kTokens) + "/" +
                           std::string(weir::name_of(storage));
  bench::add_row(name, threads, [=](benchmark::State& state) {
    CachedAttention attention(storage);
    return bench::measure_against_limits(state, bench::Precision::kFloat32, [&](bench::Cost& cost) {
      return attention.run_round(cost);
    });
  });
}

template <class Work>
void add_decoder_row(const std::string& name, Storage storage, int threads) {
  bench::add_row("decoder/" + name, threads,
                 [=](benchmark::State& state) { return measure<Work>(state, storage); });
}

}  // namespace

int main(int argc, char** argv) {
  for (const int threads : bench::thread_counts()) {
    add_decoder_row<Training>("training", Storage::kTrainable, threads);
    add_decoder_row<Prefill>("prefill/fp32", Storage::kPacked, threads);
    add_decoder_row<Prefill>("prefill/bf16", Storage::kBfloat16, threads);
    add_decoder_row<Decode>("decode/fp32", Storage::kPacked, threads);
    add_decoder_row<Decode>("decode/bf16", Storage::kBfloat16, threads);
    add_attention_row(weir::CacheStorage::kFull, threads);
    add_attention_row(weir::CacheStorage::kBfloat16, threads);
    add_attention_row(weir::CacheStorage::kInt8, threads);
    add_attention_row(weir::CacheStorage::kInt6, threads);
  }
  return bench::run_rows(argc, argv);
}
