// SPDX-License-Identifier: MIT
/// \file
/// Small models of all architectures that GGUF files have.
#pragma once

#include <algorithm>
#include <cstdint>
#include <filesystem>
#include <string>
#include <type_traits>
#include <utility>
#include <variant>
#include <vector>

#include <weir/attention/grouped_query.hpp>
#include <weir/core/random.hpp>
#include <weir/core/verbs.hpp>
#include <weir/io/gguf_families/gguf_rope.hpp>
#include <weir/io/gguf_metadata.hpp>
#include <weir/io/gguf_settings.hpp>
#include <weir/io/gguf_writer.hpp>
#include <weir/io/published_tensors.hpp>
#include <weir/io/tensor_layout.hpp>
#include <weir/io/weights.hpp>
#include <weir/ops/long_rope.hpp>
#include <weir/ops/yarn.hpp>
#include <weir/presets/dbrx.hpp>
#include <weir/presets/deepseek_v2.hpp>
#include <weir/presets/deepseek_v2_lite.hpp>
#include <weir/presets/deepseek_v3.hpp>
#include <weir/presets/dense.hpp>
#include <weir/presets/ernie_4_5.hpp>
#include <weir/presets/glm_4_5.hpp>
#include <weir/presets/gpt_oss_20b.hpp>
#include <weir/presets/granite_moe.hpp>
#include <weir/presets/grok_1.hpp>
#include <weir/presets/llama_4_scout.hpp>
#include <weir/presets/mixtral_8x7b.hpp>
#include <weir/presets/olmoe_1b_7b.hpp>
#include <weir/presets/phi_3_5_moe.hpp>
#include <weir/presets/qwen2_moe.hpp>
#include <weir/presets/qwen3_30b_a3b.hpp>
#include <weir/presets/scaled.hpp>

namespace weir::test {

/// A width at which all of them have the shapes that their architectures want.
inline constexpr presets::Scale kGgufScale{.d_model = 96, .vocab = 80};

/// gpt-oss as llama.cpp computes it.
inline presets::GptOssConfig gguf_gpt_oss() {
  presets::GptOssConfig config = presets::gpt_oss_20b();
  for (presets::AttentionShape* const shape :
       {&config.shape.attention, &*config.shape.other_attention}) {
    std::get<Yarn>(std::get<GroupedQueryConfig>(*shape).rope_scaling).truncate = true;
  }
  return config;
}

/// Grok-1 as llama.cpp computes it.
inline presets::GrokConfig gguf_grok() {
  presets::GrokConfig config = presets::grok_1();
  config.renormalise = true;
  return config;
}

/// DeepSeek-V2 with a choice of groups as llama.cpp computes it.
inline presets::DeepSeekV2Config gguf_deepseek_v2() {
  presets::DeepSeekV2Config config = presets::deepseek_v2();
  config.groups = {.count = 4, .allowed = 3, .summed = 2};
  return config;
}

/// DeepSeek-V3 with fewer groups, so that there are few experts.
inline presets::DeepSeekV3Config gguf_deepseek_v3() {
  presets::DeepSeekV3Config config = presets::deepseek_v3();
  config.shape.prediction_modules = 0;
  config.groups = {.count = 4, .allowed = 2, .summed = 2};
  return config;
}

/// A small GLM-4.5, without modules of prediction.
inline presets::Glm4MoeConfig gguf_glm(presets::Glm4MoeConfig config) {
  config.shape.prediction_modules = 0;
  return presets::scaled(config, kGgufScale);
}

/// A small Llama 4 with narrow experts, and the chunks that llama.cpp has in any.
/// \param experts   0: a few. With 128, as in Maverick, there are no norms of queries and keys, and
///                  every other layer is dense.
inline presets::Llama4Config gguf_llama4(Index experts = 0) {
  presets::Llama4Config config = presets::llama_4_scout();
  auto& own = std::get<GroupedQueryConfig>(config.shape.attention);
  if (experts == 128) {
    own.qk_norm = QkNorm::kNone;
    own.rope_scaling = NoScaling{};
    config.shape.experts = experts;
    config.shape.interleave.stride = 2;
    config.shape.dense_hidden = 16384;
  }
  presets::Scale scale = kGgufScale;
  scale.experts = experts;
  scale.window = own.chunk;
  config = presets::scaled(config, scale);
  config.shape.d_hidden = config.shape.shared_hidden = 8;
  return config;
}

/// Calls `f(name, config)` with a small model of each architecture, and of its variants.
template <class F>
void for_each_gguf_model(F&& f) {
  const auto small = [](auto config) { return presets::scaled(config, kGgufScale); };
  f("llama with experts", small(presets::mixtral_8x7b()));
  f("llama", small(presets::llama_3_1_8b()));
  f("qwen3", small(presets::qwen3_8b()));
  f("qwen3moe", small(presets::qwen3_30b_a3b()));
  f("qwen2moe", small(presets::qwen1_5_moe_a2_7b()));
  f("olmoe", small(presets::olmoe_1b_7b()));
  f("dbrx", small(presets::dbrx()));
  f("deepseek2 (V2)", small(gguf_deepseek_v2()));
  f("deepseek2 (V2-Lite)", small(presets::deepseek_v2_lite()));
  f("deepseek2 (V3)", small(gguf_deepseek_v3()));
  f("gpt-oss", small(gguf_gpt_oss()));
  f("grok", small(gguf_grok()));
  f("glm4moe (Air)", gguf_glm(presets::glm_4_5_air()));
  f("glm4moe", gguf_glm(presets::glm_4_5()));
  f("ernie4_5-moe", small(presets::ernie_4_5_21b_a3b()));
  f("granitemoe", small(presets::granite_3_1_1b_a400m()));
  f("llama4 (Scout)", gguf_llama4());
  f("llama4 (Maverick)", gguf_llama4(128));
}

/// A small Phi-3.5-MoE whose frequencies have LongRoPE's factors, the long ones for contexts above
/// `original`.
inline presets::PhiMoeConfig gguf_phi(Index original, Index length) {
  presets::PhiMoeConfig config = presets::scaled(presets::phi_3_5_moe(), kGgufScale);
  auto& attention = std::get<GroupedQueryConfig>(config.shape.attention);
  attention.window = 0;
  std::vector<double> near;
  std::vector<double> far;
  for (Index pair = 0; pair < attention.head_dim / 2; ++pair) {
    near.push_back(1.0 + 0.0625 * static_cast<double>(pair));
    far.push_back(1.0 + 0.75 * static_cast<double>(pair));
  }
  attention.rope_scaling = LongRopeScaling{.short_factors = near,
                                           .long_factors = far,
                                           .short_mscale = 1.1875,
                                           .long_mscale = 1.1875,
                                           .original_context = original,
                                           .length = length};
  return config;
}

/// Writes a Phi-3.5-MoE as llama.cpp's conversion does; `save_gguf` does not.
inline void write_gguf_phi(const std::filesystem::path& path, Decoder<float>& model,
                           const presets::PhiMoeConfig& config) {
  const presets::ModelShape& shape = config.shape;
  const auto& attention = std::get<GroupedQueryConfig>(shape.attention);
  const auto& scaling = std::get<LongRopeScaling>(attention.rope_scaling);
  io::GgufMetadata metadata;
  io::GgufSettingsWriter to(metadata, "phimoe");
  to.count("context_length", scaling.length);
  to.count("block_count", shape.layers);
  to.count("embedding_length", shape.d_model);
  to.count("vocab_size", shape.vocab);
  to.count("feed_forward_length", shape.d_hidden);
  to.count("attention.head_count", attention.heads);
  to.count("attention.head_count_kv", attention.kv_heads);
  to.count("rope.dimension_count", attention.head_dim);
  to.number("rope.freq_base", attention.rope_theta);
  to.number("rope.scaling.attn_factor", scaling.long_mscale);
  to.count("rope.scaling.original_context_length", scaling.original_context);
  to.number("attention.layer_norm_rms_epsilon", config.norm_epsilon);
  to.count("expert_count", shape.experts);
  to.count("expert_used_count", shape.k);
  metadata.add_text("tokenizer.ggml.model", "no_vocab");

  const auto tensors = io::tensors_of("test", model);
  const auto layout = io::published_layout(
      presets::join_names({presets::kPhiMoeGgufNames, presets::kGgufNames}), io::shapes_of(tensors),
      {.heads = attention.heads, .head_dim = attention.head_dim});
  std::vector<io::GgufSource<float>> sources;
  const auto add = [&](const std::string& name, const std::vector<Index>& own,
                       std::vector<float> numbers) {
    const Index cols = own.back();
    sources.push_back({name, own, io::GgufType::kF32,
                       [cols, all = std::move(numbers)](Index first, Index count, float* out) {
                         std::copy_n(all.data() + first * cols, count * cols, out);
                       }});
  };
  for (const auto& [name, factors] : {std::pair(io::kGgufShortFactors, &scaling.short_factors),
                                      std::pair(io::kGgufLongFactors, &scaling.long_factors)}) {
    add(name, {static_cast<Index>(factors->size())}, {factors->begin(), factors->end()});
  }
  for (const io::PublishedTensor& tensor : layout) {
    std::vector<float> numbers;
    io::gather_tensor(tensors, tensor, numbers);
    add(tensor.name, tensor.shape, std::move(numbers));
  }
  io::write_gguf<float>(path, metadata, sources);
}

/// Changes each number of a model, norms and biases too, by as much as makes its choice of the next
/// token clear.
inline void randomise(Decoder<float>& model, Rng& rng) {
  const auto change = [&](auto& value, double by) {
    for (Index i = 0; i < value.size(); ++i) {
      value.data()[i] += static_cast<float>(by * rng.normal());
    }
  };
  for (auto& [name, parameter] : parameters(model)) {
    change(parameter->value, name == "head.weight" || name == "embedding.weight" ? 0.5 : 0.1);
  }
  for (auto& [name, buffer] : buffers(model)) change(buffer->value, 0.1);
}

/// A model of which each number is random.
template <class Config>
Decoder<float> random_gguf_model(const Config& config, std::uint64_t seed = 7) {
  Rng rng(seed);
  Decoder<float> model = presets::make<float>(config, rng);
  randomise(model, rng);
  if constexpr (std::is_same_v<Config, presets::Llama4Config>) {  // Which has no such bias.
    for (auto& [name, buffer] : buffers(model)) buffer->value.setZero();
  }
  return model;
}

}  // namespace weir::test
