// SPDX-License-Identifier: MIT
// A token has the same bits alone and in any batch, decoded step by step or in any chunk.
#include <algorithm>
#include <optional>
#include <span>
#include <utility>
#include <vector>

#include <weir/attention/grouped_query.hpp>
#include <weir/attention/latent.hpp>
#include <weir/model/decoder.hpp>
#include <weir/moe/beside/shared_experts.hpp>
#include <weir/moe/capacity/dropless.hpp>
#include <weir/moe/experts/glu_bank.hpp>
#include <weir/moe/moe_layer.hpp>
#include <weir/moe/router/linear_router.hpp>
#include <weir/moe/selector/softmax_top_k.hpp>
#include <weir/nn/glu.hpp>
#include <weir/nn/rms_norm.hpp>

#include "support/catch.hpp"
#include "support/matrices.hpp"
#include "support/texts.hpp"

namespace weir::invariance_test {

namespace {

using T = float;

constexpr Index kVocab = 50;
constexpr Index kModel = 48;

enum class Attention { kGrouped, kWindow, kAbsorbed, kExpanded };

AnyLayer<T> attention(Attention kind, Rng& rng) {
  if (kind == Attention::kGrouped || kind == Attention::kWindow) {
    GroupedQueryConfig config = {.d_model = kModel, .heads = 4, .kv_heads = 2, .head_dim = 20};
    config.window = kind == Attention::kWindow ? 30 : 0;
    config.qkv_bias = true;
    config.qk_norm = QkNorm::kPerHead;
    return GroupedQueryAttention<T>(rng, config);
  }
  LatentConfig config = {.d_model = kModel,
                         .heads = 4,
                         .q_rank = 24,
                         .kv_rank = 20,
                         .nope_dim = 12,
                         .rope_dim = 8,
                         .value_dim = 16};
  config.decoding =
      kind == Attention::kAbsorbed ? LatentDecoding::kAbsorbed : LatentDecoding::kExpanded;
  return LatentAttention<T>(rng, config);
}

// A dense layer and two mixtures.
Decoder<T> make_decoder(Attention kind) {
  Rng rng(1);
  std::vector<Block<T>> layers;
  layers.push_back(pre_norm_block<T>(RmsNorm<T>(kModel), attention(kind, rng), RmsNorm<T>(kModel),
                                     Glu<T>(kModel, 70, rng), "mlp"));
  for (int l = 0; l < 2; ++l) {
    layers.push_back(pre_norm_block<T>(
        RmsNorm<T>(kModel), attention(kind, rng), RmsNorm<T>(kModel),
        MoELayer(LinearRouter<T>(kModel, 6, rng, {.init_scale = 1.0}), SoftmaxTopK<T>({.k = 2}),
                 Dropless(), GluBank<T>(kModel, 6, 40, rng)),
        "moe"));
  }
  return {Embedding<T>(kVocab, kModel, rng, {.stddev = 1.0}), std::move(layers), RmsNorm<T>(kModel),
          Linear<T>(kModel, kVocab, rng)};
}

// The logits of a text that is decoded in pieces of these sizes.
Matrix<T> in_pieces(const Decoder<T>& model, const std::vector<Index>& text,
                    const std::vector<Index>& sizes) {
  Decoder<T>::State state;
  Decoder<T>::Cache cache;
  const auto count = static_cast<Index>(text.size());
  Matrix<T> logits(count, kVocab);
  Index at = 0;
  for (std::size_t i = 0; at < count; ++i) {
    const Index size = std::min(sizes[i % sizes.size()], count - at);
    logits.middleRows(at, size) = decode(
        model,
        std::span(text).subspan(static_cast<std::size_t>(at), static_cast<std::size_t>(size)),
        state, cache);
    at += size;
  }
  return logits;
}

}  // namespace

TEST_CASE("A token has the same bits alone and in any batch, in any chunk",
          "[model][decode][invariance]") {
  const auto kind =
      GENERATE(Attention::kGrouped, Attention::kWindow, Attention::kAbsorbed, Attention::kExpanded);
  const auto storage = GENERATE(Storage::kTrainable, Storage::kPacked, Storage::kBfloat16);
  Decoder<T> model = make_decoder(kind);
  set_storage(model, storage);
  const std::vector<Index> text = test::random_ids(150, kVocab, 2);
  const Matrix<T> whole = in_pieces(model, text, {150});
  CHECK(whole.allFinite());
  CHECK(in_pieces(model, text, {1}) == whole);
  CHECK(in_pieces(model, text, {100, 1, 2, 3, 20}) == whole);
  CHECK(in_pieces(model, text, {7, 64}) == whole);
  if (kind != Attention::kAbsorbed) CHECK(infer(model, text) == whole);

  // Beside other conversations, of which one has a long prompt and the others a token each.
  std::vector<Decoder<T>::State> states(5);
  std::vector<Decoder<T>::State*> pointers;
  for (auto& state : states) pointers.push_back(&state);
  Decoder<T>::Cache cache;
  Index at = 0;
  for (const Index size : {20, 1, 1, 5, 40, 1}) {
    const Sequences sequences({3, 1, size, 30, 1});
    std::vector<Index> ids = test::random_ids(sequences.tokens(), kVocab, 3);
    std::copy_n(text.begin() + at, size, ids.begin() + 4);
    const Matrix<T>& logits = model.decode(ids, {.sequences = &sequences}, pointers, cache);
    CHECK(logits.middleRows(4, size) == whole.middleRows(at, size));
    at += size;
  }
}

TEST_CASE("A token of a mixture has the same bits alone and in any batch",
          "[model][moe][invariance]") {
  const auto storage = GENERATE(Storage::kTrainable, Storage::kPacked, Storage::kBfloat16);
  Rng rng(4);
  Block<T> layer = pre_norm_block<T>(
      RmsNorm<T>(kModel), attention(Attention::kGrouped, rng), RmsNorm<T>(kModel),
      SharedExperts(MoELayer(LinearRouter<T>(kModel, 6, rng, {.init_scale = 1.0}),
                             SoftmaxTopK<T>({.k = 3}), Dropless(), GluBank<T>(kModel, 6, 40, rng)),
                    Glu<T>(kModel, 20, rng)),
      "moe");
  set_storage(layer, storage);
  const Matrix<T> x = test::random_matrix<T>(60, kModel, 5);
  const Sequences apart = Sequences::uniform(60, 1);
  const Matrix<T> whole = infer(layer, x, Pass{.sequences = &apart});
  for (const Index count : {1, 2, 3, 5, 17}) {
    for (Index t = 0; t + count <= 60; t += 11) {
      const Sequences some = Sequences::uniform(count, 1);
      CHECK(infer(layer, Matrix<T>(x.middleRows(t, count)), Pass{.sequences = &some}) ==
            whole.middleRows(t, count));
    }
  }
}

}  // namespace weir::invariance_test
