// SPDX-License-Identifier: MIT
#include <cmath>
#include <string>
#include <variant>

#include <weir/presets/deepseek_v2.hpp>
#include <weir/presets/deepseek_v2_lite.hpp>
#include <weir/presets/deepseek_v3.hpp>
#include <weir/presets/gpt_oss_20b.hpp>
#include <weir/presets/grok_1.hpp>
#include <weir/presets/llama_4_scout.hpp>
#include <weir/presets/mixtral_8x7b.hpp>
#include <weir/presets/openmoe_8b.hpp>
#include <weir/presets/qwen3_30b_a3b.hpp>
#include <weir/presets/scaled.hpp>
#include <weir/presets/switch_base_8.hpp>

#include "support/catch.hpp"
#include "support/matrices.hpp"

namespace weir::scaled_test {
using namespace weir::presets;

namespace {

GroupedQueryConfig grouped_query(const ModelShape& shape) {
  return std::get<GroupedQueryConfig>(shape.attention);
}

template <class Config>
std::string message(const Config& config, const Scale& to) {
  return test::message_of<ConfigError>([&] { scaled(config, to); });
}

}  // namespace

TEST_CASE("The last layer of a stride has two names, which settling makes one", "[presets]") {
  ModelShape shape = scaled(switch_base_8()).shape;
  shape.interleave = {.stride = 2, .phase = 1};
  ModelShape same = shape;
  same.interleave.phase = -1;
  CHECK(settled(shape) == settled(same));
  same.interleave.phase = 0;
  CHECK(settled(shape) != settled(same));
}

TEST_CASE("Mixtral made small is Mixtral", "[presets]") {
  const ModelShape small = scaled(mixtral_8x7b()).shape;
  CHECK(small.layers == 2);
  CHECK(small.d_model == 32);
  CHECK(small.vocab == 256);
  CHECK(small.experts == 4);
  CHECK(small.k == 2);
  CHECK(small.d_hidden == 112);  // 3.5 times d_model.
  CHECK(grouped_query(small).heads == 8);
  CHECK(grouped_query(small).kv_heads == 2);
  CHECK(grouped_query(small).head_dim == 4);
  CHECK(grouped_query(small).rope_theta == 1e6);

  const ModelShape asked =
      scaled(mixtral_8x7b(), {.d_model = 64, .vocab = 100, .layers = 5, .experts = 8}).shape;
  CHECK(asked.layers == 5);
  CHECK(asked.d_model == 64);
  CHECK(asked.vocab == 100);
  CHECK(asked.experts == 8);
  CHECK(asked.d_hidden == 224);
  CHECK(grouped_query(asked).head_dim == 8);
}

TEST_CASE("A small model keeps what its layers alternate between", "[presets]") {
  CHECK(scaled(openmoe_8b()).shape.layers == 6);
  CHECK(scaled(openmoe_8b()).shape.interleave.count_sparse(6) == 1);
  CHECK(scaled(switch_base_8()).shape.layers == 2);
  CHECK(scaled(switch_base_8()).shape.encoder_layers == 2);
  CHECK(scaled(gpt_oss_20b()).shape.layers == 2);
  CHECK(scaled(llama_4_scout()).shape.layers == 4);
  CHECK(scaled(deepseek_v3()).shape.layers == 2);
  CHECK(scaled(deepseek_v3()).shape.interleave.first_dense == 1);
  CHECK(scaled(deepseek_v3()).shape.prediction_modules == 1);
}

TEST_CASE("A small model keeps the proportions of its attention", "[presets]") {
  const ModelShape qwen = scaled(qwen3_30b_a3b()).shape;
  CHECK(grouped_query(qwen).heads == 16);
  CHECK(grouped_query(qwen).kv_heads == 2);
  CHECK(grouped_query(qwen).heads * grouped_query(qwen).head_dim == 2 * qwen.d_model);
  CHECK(grouped_query(scaled(gpt_oss_20b()).shape).sinks);

  const auto latent = std::get<LatentConfig>(scaled(deepseek_v2()).shape.attention);
  CHECK(latent.heads == 2);
  CHECK(latent.q_rank == 12);
  CHECK(latent.kv_rank == 8);
  CHECK(latent.nope_dim == 8);
  CHECK(latent.rope_dim == 4);
  CHECK(latent.value_dim == 8);
  CHECK(std::get<LatentConfig>(scaled(deepseek_v2_lite()).shape.attention).q_rank == 0);
}

TEST_CASE("A small model has small windows and chunks in the same layers", "[presets]") {
  const auto of_layer = [](const ModelShape& shape, Index layer) {
    return std::get<GroupedQueryConfig>(shape.attention_of(layer));
  };
  const ModelShape oss = scaled(gpt_oss_20b(), {.window = 16}).shape;
  CHECK(of_layer(oss, 0).window == 16);
  CHECK(of_layer(oss, 1).window == 0);
  CHECK(of_layer(oss, 1).sinks);
  CHECK(of_layer(oss, 1).heads == of_layer(oss, 0).heads);

  const ModelShape llama = scaled(llama_4_scout()).shape;
  for (const Index layer : {0, 1, 2}) {
    CHECK(of_layer(llama, layer).chunk == 8);
    CHECK(of_layer(llama, layer).rope);
  }
  CHECK(of_layer(llama, 3).chunk == 0);
  CHECK(!of_layer(llama, 3).rope);
  CHECK(of_layer(llama, 3).temperature_floor == 8);
  CHECK(of_layer(scaled(mixtral_8x7b()).shape, 1).window == 0);
}

TEST_CASE("Grok's multiplier stays the root of d_model", "[presets]") {
  CHECK(grok_1().embedding_multiplier == Approx(std::sqrt(6144.0)).epsilon(1e-15));
  CHECK(scaled(grok_1(), {.d_model = 64}).embedding_multiplier == 8.0);
  CHECK(grok_1().logit_multiplier == Approx(1.0 / std::sqrt(3.0)).epsilon(1e-15));
}

TEST_CASE("A small model has experts for all its groups", "[presets]") {
  CHECK(scaled(deepseek_v2()).shape.experts == 16);
  CHECK(scaled(deepseek_v2_lite()).shape.experts == 12);
  CHECK(scaled(deepseek_v3()).shape.experts == 16);
  CHECK(scaled(deepseek_v3(), {.experts = 32}).shape.experts == 32);
  CHECK(scaled(llama_4_scout()).shape.experts == 4);
  CHECK(scaled(llama_4_scout()).shape.shared_hidden > 0);
}

TEST_CASE("A size that the structure does not fit is refused", "[presets]") {
  CHECK(message(openmoe_8b(), {.layers = 5}) == "scaled: layers = 5, expected >= 6");
  CHECK(message(mixtral_8x7b(), {.d_model = 0}) == "scaled: d_model = 0, expected >= 1");
  CHECK(message(mixtral_8x7b(), {.vocab = -1}) == "scaled: vocab = -1, expected >= 1");
  CHECK(message(llama_4_scout(), {.layers = 3}) == "scaled: layers = 3, expected >= 4");
  CHECK(message(llama_4_scout(), {.window = 0}) == "scaled: window = 0, expected >= 1");
  CHECK(message(mixtral_8x7b(), {.experts = 1}) ==
        "ModelShape: k = 2, expected 1 <= k <= experts = 1");
  CHECK(message(deepseek_v2(), {.experts = -8}) == "ModelShape: experts = -8, expected >= 0");
  MixtralConfig config = mixtral_8x7b();
  config.shape.attention = GroupedQueryConfig{.heads = 32, .kv_heads = 8};
  CHECK(grouped_query(scaled(config).shape).head_dim == 4);  // Of 4096 / 32.
  config.shape.attention = GroupedQueryConfig{};
  CHECK(message(config, {}) == "GroupedQueryAttention: heads = 0, expected >= 1");
}

TEST_CASE("scaled keeps the share of each head that is rotated", "[presets]") {
  ModelShape shape = mixtral_8x7b().shape;
  auto& attention = std::get<GroupedQueryConfig>(shape.attention);
  attention.rotary_dim = attention.head_dim / 4;
  const auto small = std::get<GroupedQueryConfig>(scaled(shape, {.d_model = 512}).attention);
  CHECK(small.head_dim >= 32);
  CHECK(small.rotary_dim == small.head_dim / 4);
  const auto tiny = std::get<GroupedQueryConfig>(scaled(shape, {.d_model = 16}).attention);
  CHECK(tiny.rotary_dim == 2);
}

}  // namespace weir::scaled_test
