// SPDX-License-Identifier: MIT
/// \file
/// The architectures of GGUF files that weir reads and writes.
#pragma once

#include <variant>

#include <weir/io/gguf_families/dbrx.hpp>
#include <weir/io/gguf_families/deepseek.hpp>
#include <weir/io/gguf_families/gguf_family.hpp>
#include <weir/io/gguf_families/gpt_oss.hpp>
#include <weir/io/gguf_families/grok.hpp>
#include <weir/io/gguf_families/llama.hpp>
#include <weir/io/gguf_families/olmoe.hpp>
#include <weir/io/gguf_families/qwen_moe.hpp>

namespace weir::io {

/// The configs of all families that have an architecture in GGUF files: dbrx, deepseek2, gpt-oss,
/// grok, llama (with experts and without), olmoe, qwen2moe, qwen3 and qwen3moe.
using GgufConfig =
    std::variant<presets::DbrxConfig, presets::DeepSeekV2Config, presets::DeepSeekV3Config,
                 presets::DenseConfig, presets::GptOssConfig, presets::GrokConfig,
                 presets::MixtralConfig, presets::OlmoeConfig, presets::Qwen2MoeConfig,
                 presets::Qwen3Config>;

}  // namespace weir::io
