// SPDX-License-Identifier: MIT
/// \file
/// The architectures of GGUF files that weir reads and writes.
#pragma once

#include <variant>

#include <weir/io/gguf_families/dbrx.hpp>
#include <weir/io/gguf_families/deepseek.hpp>
#include <weir/io/gguf_families/ernie.hpp>
#include <weir/io/gguf_families/gguf_family.hpp>
#include <weir/io/gguf_families/glm4_moe.hpp>
#include <weir/io/gguf_families/gpt_oss.hpp>
#include <weir/io/gguf_families/granite_moe.hpp>
#include <weir/io/gguf_families/grok.hpp>
#include <weir/io/gguf_families/llama.hpp>
#include <weir/io/gguf_families/llama4.hpp>
#include <weir/io/gguf_families/olmoe.hpp>
#include <weir/io/gguf_families/phi_moe.hpp>
#include <weir/io/gguf_families/qwen_moe.hpp>

namespace weir::io {

/// The configs of all families that have an architecture in GGUF files: dbrx, deepseek2,
/// ernie4_5-moe, glm4moe, gpt-oss, granitemoe, grok, llama (with experts and without), llama4,
/// olmoe, phimoe (which is only read), qwen2moe, qwen3 and qwen3moe.
using GgufConfig =
    std::variant<presets::DbrxConfig, presets::DeepSeekV2Config, presets::DeepSeekV3Config,
                 presets::DenseConfig, presets::ErnieMoeConfig, presets::Glm4MoeConfig,
                 presets::GptOssConfig, presets::GraniteMoeConfig, presets::GrokConfig,
                 presets::Llama4Config, presets::MixtralConfig, presets::OlmoeConfig,
                 presets::PhiMoeConfig, presets::Qwen2MoeConfig, presets::Qwen3Config>;

}  // namespace weir::io
