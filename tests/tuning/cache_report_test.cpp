// SPDX-License-Identifier: MIT
// Models whose caches round what they hold.
#include <cmath>
#include <cstddef>
#include <iterator>
#include <optional>
#include <utility>
#include <vector>

#include <weir/attention/grouped_query.hpp>
#include <weir/attention/latent.hpp>
#include <weir/core/cache_storage.hpp>
#include <weir/core/sequences.hpp>
#include <weir/model/decoder.hpp>
#include <weir/model/generate.hpp>
#include <weir/model/multi_token.hpp>
#include <weir/model/speculative.hpp>
#include <weir/moe/capacity/dropless.hpp>
#include <weir/moe/depths/mixture_of_depths.hpp>
#include <weir/moe/experts/glu_bank.hpp>
#include <weir/moe/moe_layer.hpp>
#include <weir/moe/router/linear_router.hpp>
#include <weir/moe/selector/softmax_top_k.hpp>
#include <weir/nn/glu.hpp>
#include <weir/nn/rms_norm.hpp>
#include <weir/tuning/cache_report.hpp>

#include "support/catch.hpp"
#include "support/matrices.hpp"
#include "support/texts.hpp"

namespace weir::cache_report_test {

namespace {

using Ids = std::vector<Index>;

constexpr Index kVocab = 13;
constexpr CacheStorage kNarrow[] = {CacheStorage::kBfloat16, CacheStorage::kInt8,
                                    CacheStorage::kInt6};

AnyLayer<float> attention(bool latent, Rng& rng) {
  if (!latent) {
    return GroupedQueryAttention<float>(
        rng, {.d_model = 16, .heads = 4, .kv_heads = 2, .head_dim = 16, .init_scale = 3.0});
  }
  return LatentAttention<float>(rng, {.d_model = 16,
                                      .heads = 2,
                                      .kv_rank = 8,
                                      .nope_dim = 4,
                                      .rope_dim = 4,
                                      .value_dim = 4,
                                      .decoding = LatentDecoding::kAbsorbed,
                                      .init_scale = 3.0});
}

Block<float> make_block(bool latent, Rng& rng) {
  const RmsNorm<float> norm(16);
  return pre_norm_block<float>(
      norm, attention(latent, rng), norm,
      MoELayer(LinearRouter<float>(16, 3, rng, {.init_scale = 1.0}), SoftmaxTopK<float>({.k = 2}),
               Dropless(), GluBank<float>(16, 3, 8, rng)),
      "moe");
}

Decoder<float> make_decoder(bool latent) {
  Rng rng(1);
  std::vector<Block<float>> layers;
  for (int l = 0; l < 2; ++l) layers.push_back(make_block(latent, rng));
  return {Embedding<float>(kVocab, 16, rng, {.stddev = 0.5}), std::move(layers), RmsNorm<float>(16),
          Linear<float>(16, kVocab, rng)};
}

}  // namespace

TEST_CASE("cache_report tells how far a narrow cache moves logits", "[tuning][cache]") {
  const bool latent = GENERATE(false, true);
  const Decoder<float> model = make_decoder(latent);
  const Ids text = test::random_ids(300, kVocab, 2);
  const CacheReport none = cache_report(model, text, CacheStorage::kFull);
  CHECK(none.logit_error == 0.0);
  CHECK(none.divergence == 0.0);
  CHECK(none.agreement == 1.0);
  CHECK(none.bytes_per_token == none.full_bytes_per_token);
  CHECK(none.full_bytes_per_token == (latent ? 2 * 4 * 12 : 2 * 4 * 64));

  const CacheReport half = cache_report(model, text, CacheStorage::kBfloat16);
  const CacheReport eight = cache_report(model, text, CacheStorage::kInt8);
  const CacheReport six = cache_report(model, text, CacheStorage::kInt6);
  for (const CacheReport& report : {half, eight, six}) {
    INFO(name_of(report.storage));
    CHECK(report.logit_error > 0.0);
    CHECK(report.logit_error < 0.05);
    CHECK(report.divergence > 0.0);
    CHECK(report.divergence < 3e-3);
    CHECK(report.agreement > 0.95);
    CHECK(report.bytes_per_token < report.full_bytes_per_token);
  }
  CHECK(six.logit_error > 2.0 * eight.logit_error);
  CHECK(six.divergence > 4.0 * eight.divergence);

  // The logits themselves, all at once.
  Decoder<float>::Cache cache;
  Decoder<float>::State narrow(CacheStorage::kInt6), full;
  const Matrix<float> exact = decode(model, text, full, cache);
  const Matrix<float> rounded = decode(model, text, narrow, cache);
  CHECK(test::relative_error(exact, infer(model, text)) <= (latent ? 1e-5 : 0.0));
  CHECK(six.logit_error == Approx(test::relative_error(rounded, exact)).epsilon(1e-6));
  double divergence = 0.0;
  for (Index t = 0; t < exact.rows(); ++t) {
    const RowVector<double> p = exact.row(t).cast<double>().array().exp();
    const RowVector<double> q = rounded.row(t).cast<double>().array().exp();
    const auto ratio = (p.array() / p.sum()) / (q.array() / q.sum());
    divergence += (p.array() / p.sum() * ratio.log()).sum();
  }
  CHECK(six.divergence == Approx(divergence / 300).epsilon(1e-2));
}

TEST_CASE("cache_report wants a text", "[tuning][cache]") {
  const Decoder<float> model = make_decoder(false);
  CHECK(test::message_of<ConfigError>([&] { cache_report(model, Ids{}, CacheStorage::kInt8); }) ==
        "cache_report: text = 0, expected >= 1");
  CHECK(cache_report(model, Ids{3}, CacheStorage::kInt8).agreement == 1.0);
}

TEST_CASE("A model with narrow caches gives a token the same bits in every chunk and batch",
          "[model][cache][invariance]") {
  const bool latent = GENERATE(false, true);
  const CacheStorage storage = GENERATE(from_range(std::begin(kNarrow), std::end(kNarrow)));
  const Decoder<float> model = make_decoder(latent);
  const Ids text = test::random_ids(130, kVocab, 3);
  Decoder<float>::Cache cache;
  Decoder<float>::State whole(storage);
  CHECK(whole.storage() == storage);
  CHECK(whole.bytes_per_token() == 0);
  const Matrix<float> expected = decode(model, text, whole, cache);
  CHECK(expected != infer(model, text));

  Decoder<float>::State state(storage);
  Decoder<float>::State other;
  Decoder<float>::State* const states[] = {&other, &state};
  for (Index t = 0; t < 130;) {
    const Index count = t == 0 ? 90 : t < 100 ? 1 : 15;
    Ids ids = test::random_ids(2, kVocab, 4);  // Another sequence, with a full cache, beside it.
    ids.insert(ids.end(), text.begin() + t, text.begin() + t + count);
    const Sequences sequences({2, count});
    const Matrix<float> logits = model.decode(ids, {.sequences = &sequences}, states, cache);
    REQUIRE(logits.bottomRows(count) == expected.middleRows(t, count));
    t += count;
  }
  CHECK(state.bytes_per_token() == whole.bytes_per_token());
  state.truncate(60);
  const Ids rest(text.begin() + 60, text.end());
  CHECK(decode(model, rest, state, cache) == expected.bottomRows(70));
}

TEST_CASE("Speculative decoding with narrow caches yields the text of plain decoding with them",
          "[model][cache][speculative]") {
  const bool latent = GENERATE(false, true);
  const CacheStorage storage = GENERATE(from_range(std::begin(kNarrow), std::end(kNarrow)));
  const Decoder<float> model = make_decoder(latent);
  Rng rng(2);
  std::vector<MultiTokenModule<float>> parts;
  for (int k = 0; k < 2; ++k) {
    parts.push_back({RmsNorm<float>(16), RmsNorm<float>(16), Linear<float>(32, 16, rng),
                     make_block(latent, rng), RmsNorm<float>(16)});
  }
  const MultiToken<float> modules(std::move(parts));
  const Ids prompt = {1, 5, 2, 8};
  SpeculativeState<float> drafting(storage);
  Decoder<float>::State plain(storage);
  DraftReport report;
  Rng of_drafts(5), of_plain(5);
  for (int turn = 0; turn < 2; ++turn) {
    const Until until = {.count = 40};
    CHECK(speculate(model, modules, prompt, until, {}, of_drafts, drafting, report).tokens ==
          generate(model, prompt, 40, {}, of_plain, plain));
  }
  CHECK(drafting.main.bytes_per_token() == plain.bytes_per_token());
  CHECK(drafting.modules[1].storage == storage);
}

TEST_CASE("A state of a layer within another takes the storage over", "[model][cache]") {
  using Inner = GroupedQueryAttention<float>;
  using Depths = MixtureOfDepths<Inner>;
  const Depths::State state(CacheStorage::kInt8);
  CHECK(state.inner.storage() == CacheStorage::kInt8);
  using Dense = MixtureOfDepths<Glu<float>>;
  const Dense::State nothing(CacheStorage::kInt8);
  CHECK(nothing.length() == 0);
}

}  // namespace weir::cache_report_test
