// SPDX-License-Identifier: MIT
#include <algorithm>
#include <cstdint>
#include <functional>
#include <string>
#include <string_view>
#include <variant>
#include <vector>

#include <weir/io/gguf_families.hpp>
#include <weir/io/gguf_model_writer.hpp>

#include "io/gguf_models.hpp"
#include "support/catch.hpp"
#include "support/matrices.hpp"

namespace weir::io::gguf_settings_test {
namespace {

using test::message_of;
using Change = std::function<void(GgufMetadata&)>;

/// A file of these settings and an embedding of 8 tokens.
Gguf file_of(const GgufMetadata& metadata, const std::vector<float>& divisors = {}) {
  const Matrix<float> table = Matrix<float>::Zero(8, 1);
  std::vector<GgufSource<float>> sources = {
      gguf_source("token_embd.weight", table, GgufType::kF32, {8, 1})};
  std::string data(32, '\0');
  if (!divisors.empty()) {
    sources.push_back(detail::vector_source<float>(kGgufRopeDivisors, divisors));
    data.append(reinterpret_cast<const char*>(divisors.data()), divisors.size() * sizeof(float));
  }
  return {"f", detail::gguf_start(metadata, sources) + data};
}

/// What a model of `config` says, without the entry `key` and after `change`.
template <class Config>
Gguf changed_file(const Config& config, std::string_view key, const Change& change) {
  const Gguf original = file_of(gguf_metadata(config, {}));
  GgufMetadata changed;
  for (const auto& [name, value] : original.metadata()) {
    if (name != key) changed.add_copy(name, value);
  }
  if (change) change(changed);
  return file_of(changed);
}

/// What reading it says.
template <class Config>
std::string fault(const Config& config, std::string_view key, const Change& change = {}) {
  const Gguf file = changed_file(config, key, change);
  return message_of<FileError>([&] { detail::read_gguf_config<Config>(file); });
}

/// What saving says.
template <class Config>
std::string refusal(const Config& config, const SaveGgufConfig& how = {}) {
  return message_of<ConfigError>([&] { gguf_metadata(config, how); });
}

template <class Config>
Config small(const Config& config) {
  return presets::scaled(config, test::kGgufScale);
}

GroupedQueryConfig& attention_of(presets::ModelShape& shape) {
  return std::get<GroupedQueryConfig>(shape.attention);
}

TEST_CASE("Settings that change the result are read or refused by name", "[io][gguf]") {
  const auto config = small(presets::mixtral_8x7b());
  CHECK(fault(config, "") == "no exception");
  CHECK(fault(config, "llama.block_count") == "f: key 'llama.block_count' is missing");
  CHECK(fault(config, "llama.block_count", [](auto& m) { m.add_i32("llama.block_count", -1); }) ==
        "f: key 'llama.block_count' is -1, expected 0 to 2147483647");
  CHECK(fault(config, "llama.block_count", [](auto& m) { m.add_text("llama.block_count", "2"); }) ==
        "f: key 'llama.block_count' is STRING, expected an integer kind");
  constexpr auto kHeads = "llama.attention.head_count";
  const auto with_heads = [&](const std::vector<std::uint32_t>& heads) {
    return fault(config, kHeads, [&](auto& m) { m.add_u32s(kHeads, heads); });
  };
  CHECK(with_heads({8, 8}) == "no exception");
  CHECK(with_heads({8, 4}) ==
        "f: key 'llama.attention.head_count' is an array of 2 U32, expected the same number for "
        "all layers");
  CHECK(with_heads({}) ==
        "f: key 'llama.attention.head_count' is an array of 0 U32, expected a number");
  CHECK(with_heads({0, 0}) ==
        "f: key 'llama.attention.head_count' is an array of 2 U32, expected at least 1");
  CHECK(fault(config, "llama.attention.value_length", [](auto& m) {
          m.add_u32("llama.attention.value_length", 5);
        }) == "f: key 'llama.attention.value_length' is 5, expected 12");
  CHECK(fault(config, "llama.rope.dimension_count", [](auto& m) {
          m.add_u32("llama.rope.dimension_count", 6);
        }) == "f: key 'llama.rope.dimension_count' is 6, expected 12");
  CHECK(fault(config, "", [](auto& m) { m.add_text("llama.rope.scaling.type", "longrope"); }) ==
        "f: key 'llama.rope.scaling.type' is 'longrope', expected none, linear or yarn");
  CHECK(fault(config, "", [](auto& m) { m.add_f32("llama.rope.scaling.attn_factor", 1.5F); }) ==
        "f: key 'llama.rope.scaling.attn_factor' is 1.5, expected 1");
  CHECK(fault(config, "", [](auto& m) { m.add_bool("llama.attention.causal", false); }) ==
        "f: key 'llama.attention.causal' is false, expected true");
  CHECK(fault(config, "", [](auto& m) { m.add_u32("llama.expert_group_count", 2); }) ==
        "f: key 'llama.expert_group_count' is 2, expected at most 1");
  CHECK(fault(config, "", [](auto& m) { m.add_u32("llama.attention.sliding_window", 4); }) ==
        "f: key 'llama.attention.sliding_window' is 4, expected it not to be there: weir does not "
        "know what it changes");
  CHECK(fault(config, "", [](auto& m) { m.add_u32("split.count", 2); }) ==
        "f: is one of 2 parts of a model, expected a whole one");
  CHECK(fault(config, "", [](auto& m) { m.add_text("general.name", "any"); }) == "no exception");
  CHECK(fault(config, "llama.attention.layer_norm_rms_epsilon") ==
        "f: key 'llama.attention.layer_norm_rms_epsilon' is missing");
}

TEST_CASE("Frequencies are stretched as llama.cpp does it", "[io][gguf]") {
  const auto config = small(presets::mixtral_8x7b());
  const auto scaling_with = [&](const Change& change) {
    const Gguf file = changed_file(config, "", change);
    auto read = detail::read_gguf_config<presets::MixtralConfig>(file);
    return attention_of(read.shape).rope_scaling;
  };
  CHECK(scaling_with({}) == RopeScaling(NoScaling{}));
  CHECK(scaling_with([](auto& m) { m.add_f32("llama.rope.scaling.factor", 4.0F); }) ==
        RopeScaling(LinearScaling{.factor = 4.0}));
  CHECK(scaling_with([](auto& m) { m.add_f32("llama.rope.scale_linear", 2.5F); }) ==
        RopeScaling(LinearScaling{.factor = 2.5}));
  CHECK(scaling_with([](auto& m) {
          m.add_text("llama.rope.scaling.type", "none");
          m.add_f32("llama.rope.scaling.factor", 4.0F);
        }) == RopeScaling(NoScaling{}));
  // Whatever the file says of turns, llama.cpp takes 32 and 1.
  CHECK(scaling_with([](auto& m) {
          m.add_text("llama.rope.scaling.type", "yarn");
          m.add_f32("llama.rope.scaling.factor", 4.0F);
          m.add_f32("llama.rope.scaling.yarn_beta_fast", 16.0F);
        }) == RopeScaling(Yarn{.factor = 4.0, .original_context = 4096}));
  // 1.5 (0.1 ln 4 + 1) = 0.1 m ln 4 + 1
  const RopeScaling sharper = scaling_with([](auto& m) {
    m.add_text("llama.rope.scaling.type", "yarn");
    m.add_f32("llama.rope.scaling.factor", 4.0F);
    m.add_u32("llama.rope.scaling.original_context_length", 512);
    m.add_f32("llama.rope.scaling.attn_factor", 1.5F);
  });
  CHECK(std::get<Yarn>(sharper).original_context == 512);
  CHECK(std::get<Yarn>(sharper).mscale == Approx(5.106737602));
}

TEST_CASE("The divisors of Llama 3 are known by their values", "[io][gguf]") {
  const auto config = small(presets::llama_3_1_8b());
  const Gguf original = file_of(gguf_metadata(config, {}));
  GgufMetadata metadata;
  for (const auto& [name, value] : original.metadata()) metadata.add_copy(name, value);
  const auto read = [&](const std::vector<float>& divisors) {
    return detail::read_gguf_config<presets::DenseConfig>(file_of(metadata, divisors));
  };
  std::vector<float> divisors = rope_divisors_of(config.shape);
  REQUIRE(divisors.size() == 6);
  CHECK(divisors.front() == 1.0F);
  CHECK(divisors.back() == 8.0F);
  CHECK(detail::are_same(
      [&] {
        auto own = read(divisors).shape;
        own.vocab = config.shape.vocab;
        own.tied = config.shape.tied;
        return own;
      }(),
      config.shape));
  divisors[1] = 1.5F;
  const std::string expected =
      "f: tensor 'rope_freqs.weight' does not hold the divisors of Llama 3 for 6 pairs and theta = "
      "500000";
  CHECK(message_of<FileError>([&] { read(divisors); }) == expected);
  CHECK(message_of<FileError>([&] { read({1.0F, 8.0F}); }) == expected);
  CHECK(message_of<FileError>([&] { read(std::vector<float>(6, 0.5F)); }) == expected);
}

TEST_CASE("The divisors of Llama 4 have no pairs between", "[io][gguf]") {
  presets::Llama4Config config = test::gguf_llama4();
  GroupedQueryConfig& own = attention_of(config.shape);
  own.head_dim = std::get<GroupedQueryConfig>(*config.shape.other_attention).head_dim = 32;
  const std::vector<float> divisors = rope_divisors_of(config.shape);
  // Of 16 pairs with theta = 500000, those up to the eighth turn more than once in 8192 tokens.
  REQUIRE(divisors.size() == 16);
  CHECK(std::count(divisors.begin(), divisors.end(), 1.0F) == 9);
  CHECK(std::count(divisors.begin(), divisors.end(), 16.0F) == 7);
  const Gguf file = file_of(gguf_metadata(config, {}), divisors);
  auto read = detail::read_gguf_config<presets::Llama4Config>(file);
  CHECK(attention_of(read.shape).rope_scaling == own.rope_scaling);
}

TEST_CASE("Each architecture refuses what llama.cpp does not compute", "[io][gguf]") {
  const auto olmoe = small(presets::olmoe_1b_7b());
  CHECK(fault(olmoe, "olmoe.attention.head_count_kv",
              [](auto& m) { m.add_u32("olmoe.attention.head_count_kv", 1); }) ==
        "f: key 'olmoe.attention.head_count_kv' is 1, expected as many as attention.head_count");
  const auto v2 = small(presets::deepseek_v2_lite());
  CHECK(fault(v2, "deepseek2.expert_weights_norm", [](auto& m) {
          m.add_bool("deepseek2.expert_weights_norm", true);
        }) == "f: key 'deepseek2.expert_weights_norm' is true, expected false");
  CHECK(fault(v2, "deepseek2.expert_gating_func", [](auto& m) {
          m.add_u32("deepseek2.expert_gating_func", 3);
        }) == "f: key 'deepseek2.expert_gating_func' is 3, expected 1");
  CHECK(fault(v2, "deepseek2.rope.scaling.yarn_log_multiplier") ==
        "f: key 'deepseek2.rope.scaling.yarn_log_multiplier' is missing");
  CHECK(fault(v2, "deepseek2.rope.scaling.type",
              [](auto& m) { m.add_text("deepseek2.rope.scaling.type", "linear"); }) ==
        "f: key 'deepseek2.rope.scaling.factor' is 40, expected 1 without a yarn in this "
        "architecture");
  CHECK(fault(v2, "", [](auto& m) { m.add_u32("deepseek2.nextn_predict_layers", 1); }) ==
        "f: key 'deepseek2.nextn_predict_layers' is 1, expected 0");
  const auto oss = small(test::gguf_gpt_oss());
  const auto with_pattern = [&](const std::vector<std::uint32_t>& pattern) {
    return fault(oss, "",
                 [&](auto& m) { m.add_u32s("gpt-oss.attention.sliding_window_pattern", pattern); });
  };
  CHECK(with_pattern({1, 0}) == "no exception");
  CHECK(with_pattern({0, 1}) ==
        "f: key 'gpt-oss.attention.sliding_window_pattern' is an array of 2 U32, expected one "
        "layer without a window after equally many with one");
  CHECK(fault(oss, "", [](auto& m) { m.add_u32("gpt-oss.attention.sliding_window_pattern", 1); }) ==
        "f: key 'gpt-oss.attention.sliding_window_pattern' is 1, expected at least 2");
  CHECK(fault(oss, "gpt-oss.attention.sliding_window") ==
        "f: key 'gpt-oss.attention.sliding_window' is missing");
  CHECK(fault(oss, "", [](auto& m) { m.add_f32("gpt-oss.rope.freq_base_swa", 1e4F); }) ==
        "f: key 'gpt-oss.rope.freq_base_swa' is 10000, expected 150000");
  const auto grok = small(test::gguf_grok());
  CHECK(fault(grok, "", [](auto& m) { m.add_f32("grok.final_logit_softcapping", 30.0F); }) ==
        "f: key 'grok.final_logit_softcapping' is 30, expected 0");
}

TEST_CASE("The architectures of younger models refuse what they do not know", "[io][gguf]") {
  const auto with = [](const auto& config, const std::string& key, std::uint32_t value) {
    return fault(config, key, [&](auto& m) { m.add_u32(key, value); });
  };
  const auto glm = test::gguf_glm(presets::glm_4_5_air());
  CHECK(fault(glm, "") == "no exception");
  CHECK(with(glm, "glm4moe.expert_gating_func", 1) ==
        "f: key 'glm4moe.expert_gating_func' is 1, expected 2");
  CHECK(with(glm, "glm4moe.nextn_predict_layers", 2) ==
        "f: key 'glm4moe.nextn_predict_layers' is 2, expected less than block_count = 2");
  CHECK(with(glm, "glm4moe.rope.dimension_count", 0) ==
        "f: key 'glm4moe.rope.dimension_count' is 0, expected at least 2");
  const auto ernie = small(presets::ernie_4_5_21b_a3b());
  CHECK(fault(ernie, "") == "no exception");
  CHECK(with(ernie, "ernie4_5-moe.interleave_moe_layer_step", 0) ==
        "f: key 'ernie4_5-moe.interleave_moe_layer_step' is 0, expected at least 1");
  const auto granite = small(presets::granite_3_1_1b_a400m());
  CHECK(fault(granite, "") == "no exception");
  CHECK(fault(granite, "", [](auto& m) {
          m.add_bool("granitemoe.rope.scaling.finetuned", false);
        }) == "f: key 'granitemoe.rope.scaling.finetuned' is false, expected true");
  CHECK(with(granite, "granitemoe.expert_shared_feed_forward_length", 8) ==
        "f: key 'granitemoe.expert_shared_feed_forward_length' is 8, expected 0");
  const auto llama = test::gguf_llama4(128);
  CHECK(fault(llama, "") == "no exception");
  CHECK(with(llama, "llama4.attention.sliding_window", 0) ==
        "f: key 'llama4.attention.sliding_window' is 0, expected above 0");
  CHECK(with(llama, "llama4.attention.sliding_window", 8192) == "no exception");
  CHECK(with(llama, "llama4.attention.sliding_window_pattern", 2) ==
        "f: key 'llama4.attention.sliding_window_pattern' is 2, expected 4");
  CHECK(with(llama, "llama4.interleave_moe_layer_step", 0) ==
        "f: key 'llama4.interleave_moe_layer_step' is 0, expected at least 1");
}

TEST_CASE("Multipliers of Granite that a file does not have are 1", "[io][gguf]") {
  const auto granite = small(presets::granite_3_1_1b_a400m());
  const auto read = [&](std::string_view without) {
    return detail::read_gguf_config<presets::GraniteMoeConfig>(changed_file(granite, without, {}));
  };
  CHECK(read("").embedding_multiplier == 12.0);
  CHECK(read("").residual_multiplier == 0.22);
  CHECK(read("").logits_scaling == 6.0);
  CHECK(read("granitemoe.embedding_scale").embedding_multiplier == 1.0);
  CHECK(read("granitemoe.residual_scale").residual_multiplier == 1.0);
  const auto without_scale = read("granitemoe.attention.scale");
  CHECK(std::get<GroupedQueryConfig>(without_scale.shape.attention).scale == 0.0);
  CHECK(fault(granite, "granitemoe.logit_scale") == "f: key 'granitemoe.logit_scale' is missing");
}

TEST_CASE("A share of each head is rotated in GLM-4.5", "[io][gguf]") {
  const auto glm = test::gguf_glm(presets::glm_4_5_air());
  const Index own = std::get<GroupedQueryConfig>(glm.shape.attention).rotary_dim;
  REQUIRE(own > 0);
  const auto rotated = [&](std::string_view without) {
    auto read = detail::read_gguf_config<presets::Glm4MoeConfig>(changed_file(glm, without, {}));
    return attention_of(read.shape).rotary_dim;
  };
  CHECK(rotated("") == own);
  CHECK(rotated("glm4moe.rope.dimension_count") ==
        std::get<GroupedQueryConfig>(glm.shape.attention).head_dim);
}

TEST_CASE("A file without a head has a tied model, where llama.cpp lets it", "[io][gguf]") {
  const std::vector<std::string> never = {"qwen2moe", "olmoe", "dbrx", "gpt-oss"};
  test::for_each_gguf_model([&]<class Config>(const std::string& name, Config config) {
    INFO(name);
    const bool may_be = std::ranges::find(never, name) == never.end();
    config.shape.tied = true;
    CHECK(refusal(config) ==
          (may_be ? "no exception"
                  : "save_gguf: tied = true, expected false, as llama.cpp has it in this family"));
    config.shape.tied = false;
    const Gguf file = file_of(gguf_metadata(config, {}));
    CHECK(detail::read_gguf_config<Config>(file).shape.tied == may_be);
  });
}

TEST_CASE("Parts that an architecture does not have are not saved", "[io][gguf]") {
  auto mixtral = small(presets::mixtral_8x7b());
  mixtral.shape.attention =
      std::get<LatentConfig>(small(presets::deepseek_v2_lite()).shape.attention);
  CHECK(refusal(mixtral) ==
        "save_gguf: attention is a LatentConfig, expected a GroupedQueryConfig in this family");
  auto lite = small(presets::deepseek_v2_lite());
  lite.shape.attention = small(presets::mixtral_8x7b()).shape.attention;
  CHECK(refusal(lite) ==
        "save_gguf: attention is a GroupedQueryConfig, expected a LatentConfig in this family");
  auto olmoe = small(presets::olmoe_1b_7b());
  attention_of(olmoe.shape).kv_heads = 1;
  CHECK(refusal(olmoe).starts_with("save_gguf: kv_heads = 1, expected heads = "));
  olmoe = small(presets::olmoe_1b_7b());
  olmoe.shape.interleave.first_dense = 1;
  CHECK(refusal(olmoe) == "save_gguf: 1 layers are dense, expected none in this family");
  olmoe = small(presets::olmoe_1b_7b());
  attention_of(olmoe.shape).head_dim = 2;
  CHECK(refusal(olmoe).starts_with("save_gguf: heads * head_dim = "));
  olmoe = small(presets::olmoe_1b_7b());
  olmoe.renormalise = true;
  CHECK(refusal(olmoe) ==
        "save_gguf: renormalise = true, expected false, as llama.cpp has it in this family");
  lite = small(presets::deepseek_v2_lite());
  lite.shape.shared_hidden = 0;
  CHECK(refusal(lite).starts_with("save_gguf: shared_hidden = 0, expected a multiple of "));
  mixtral = small(presets::mixtral_8x7b());
  mixtral.shape.vocab = -1;
  CHECK(refusal(mixtral) == "save_gguf: llama.vocab_size = -1, expected 0 to 4294967295");
}

TEST_CASE("What GGUF files cannot say is not saved", "[io][gguf]") {
  auto mixtral = small(presets::mixtral_8x7b());
  CHECK(refusal(mixtral) == "no exception");
  CHECK(refusal(mixtral, {.dtype = GgufType::kQ4K}) ==
        "save_gguf: dtype = Q4_K, expected F32, F16, BF16 or Q8_0");
  CHECK(refusal(mixtral, {.context_length = 0}) == "save_gguf: context_length = 0, expected >= 1");
  attention_of(mixtral.shape).rotary_dim = 6;
  CHECK(refusal(mixtral) ==
        "save_gguf: the model has sizes or options that the architecture 'llama' does not have");
  mixtral = small(presets::mixtral_8x7b());
  attention_of(mixtral.shape).window = 8;
  CHECK(refusal(mixtral) ==
        "save_gguf: window = 8, expected 0: files of this family cannot say it");
  attention_of(mixtral.shape).window = 0;
  attention_of(mixtral.shape).rope_scaling = DynamicNtkScaling{.factor = 2.0};
  CHECK(refusal(mixtral) ==
        "save_gguf: rope_scaling is a DynamicNtkScaling, which GGUF files cannot say");
  attention_of(mixtral.shape).rope_scaling = Yarn{.factor = 2.0, .beta_fast = 16.0};
  CHECK(refusal(mixtral) ==
        "save_gguf: rope_scaling.beta_fast = 16, expected 32, as llama.cpp has it");
  CHECK(refusal(small(presets::gpt_oss_20b())) ==
        "save_gguf: rope_scaling.truncate = false, expected true, as llama.cpp has it");
  auto qwen = small(presets::qwen3_30b_a3b());
  qwen.renormalise = false;
  CHECK(refusal(qwen) ==
        "save_gguf: renormalise = false, expected true, as llama.cpp has it in this family");
  auto olmoe = small(presets::olmoe_1b_7b());
  olmoe.shape.tied = true;
  CHECK(refusal(olmoe) ==
        "save_gguf: tied = true, expected false, as llama.cpp has it in this family");
  olmoe.shape.tied = false;
  attention_of(olmoe.shape).clip_qkv = 8.0;
  CHECK(refusal(olmoe) ==
        "save_gguf: clip_qkv = 8, expected 0, as llama.cpp has it in this family");
  auto dbrx = small(presets::dbrx());
  dbrx.weight_norm = 2.0;
  CHECK(refusal(dbrx) ==
        "save_gguf: weight_norm = 2, expected 1, as llama.cpp has it in this family");
  CHECK(refusal(small(presets::deepseek_v2())) ==
        "save_gguf: groups.summed = 1, expected 2, as llama.cpp has it in this family");
  auto v3 = small(test::gguf_deepseek_v3());
  v3.norm_epsilon = 1e-5;
  CHECK(refusal(v3) ==
        "save_gguf: attention.norm_epsilon = 1e-06, expected norm_epsilon = 1e-05, as llama.cpp "
        "has it in this family");
  v3 = small(test::gguf_deepseek_v3());
  ++v3.shape.shared_hidden;
  CHECK(refusal(v3).starts_with("save_gguf: shared_hidden = "));
  v3 = small(test::gguf_deepseek_v3());
  v3.shape.layers = 27;
  CHECK(
      refusal(v3).ends_with("expected 0 with 27 layers, which llama.cpp takes for "
                            "DeepSeek-V2-Lite"));
  CHECK(refusal(small(presets::grok_1())) ==
        "save_gguf: renormalise = false, expected true, as llama.cpp has it in this family");
  auto glm = test::gguf_glm(presets::glm_4_5());
  CHECK(refusal(glm) == "no exception");
  glm.groups = {.count = 4, .allowed = 2, .summed = 2};
  CHECK(refusal(glm) ==
        "save_gguf: groups.allowed = 2 of groups.count = 4, expected all, as llama.cpp has it in "
        "this family");
  // With chunks of another size.
  CHECK(refusal(small(presets::llama_4_scout())) ==
        "save_gguf: the model has sizes or options that the architecture 'llama4' does not have");
  auto llama = test::gguf_llama4();
  CHECK(refusal(llama) == "no exception");
  llama.shape.shared_hidden = 2 * llama.shape.d_hidden;
  CHECK(refusal(llama).starts_with("save_gguf: shared_hidden = "));
  llama = test::gguf_llama4(128);  // Which has no such norms.
  attention_of(llama.shape).qk_norm = QkNorm::kL2;
  CHECK(refusal(llama) ==
        "save_gguf: the model has sizes or options that the architecture 'llama4' does not have");
  CHECK(refusal(small(presets::phi_3_5_moe())) ==
        "save_gguf: llama.cpp has neither the layer norms nor the SparseMixer of this family");
  mixtral = small(presets::mixtral_8x7b());
  attention_of(mixtral.shape).rope_scaling = LongRopeScaling{
      .short_factors = std::vector<double>(6, 1.0), .long_factors = std::vector<double>(6, 2.0)};
  CHECK(refusal(mixtral) ==
        "save_gguf: rope_scaling is a LongRopeScaling, which files of this family cannot say");
}

}  // namespace
}  // namespace weir::io::gguf_settings_test
