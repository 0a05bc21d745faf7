// SPDX-License-Identifier: MIT
/// \file
/// Small models of all architectures that GGUF files have.
#pragma once

#include <cstdint>
#include <string>
#include <variant>
#include <vector>

#include <weir/attention/grouped_query.hpp>
#include <weir/core/random.hpp>
#include <weir/core/verbs.hpp>
#include <weir/ops/yarn.hpp>
#include <weir/presets/dbrx.hpp>
#include <weir/presets/deepseek_v2.hpp>
#include <weir/presets/deepseek_v2_lite.hpp>
#include <weir/presets/deepseek_v3.hpp>
#include <weir/presets/dense.hpp>
#include <weir/presets/gpt_oss_20b.hpp>
#include <weir/presets/grok_1.hpp>
#include <weir/presets/mixtral_8x7b.hpp>
#include <weir/presets/olmoe_1b_7b.hpp>
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
}

/// A model of which each number is random, norms and biases too, and as large as makes its choice
/// of the next token clear.
template <class Config>
Decoder<float> random_gguf_model(const Config& config, std::uint64_t seed = 7) {
  Rng rng(seed);
  Decoder<float> model = presets::make<float>(config, rng);
  const auto change = [&](auto& value, double by) {
    for (Index i = 0; i < value.size(); ++i) {
      value.data()[i] += static_cast<float>(by * rng.normal());
    }
  };
  for (auto& [name, parameter] : parameters(model)) {
    change(parameter->value, name == "head.weight" || name == "embedding.weight" ? 0.5 : 0.1);
  }
  for (auto& [name, buffer] : buffers(model)) change(buffer->value, 0.1);
  return model;
}

}  // namespace weir::test
