// SPDX-License-Identifier: MIT
/// \file
/// The configurations of all families whose checkpoints weir reads and writes.
#pragma once

#include <algorithm>
#include <string>
#include <string_view>
#include <utility>
#include <variant>

#include <weir/io/config_file.hpp>
#include <weir/io/families/dbrx.hpp>
#include <weir/io/families/deepseek.hpp>
#include <weir/io/families/dense.hpp>
#include <weir/io/families/ernie.hpp>
#include <weir/io/families/family.hpp>
#include <weir/io/families/glm4_moe.hpp>
#include <weir/io/families/gpt_oss.hpp>
#include <weir/io/families/granite_moe.hpp>
#include <weir/io/families/grok.hpp>
#include <weir/io/families/llama4.hpp>
#include <weir/io/families/mixtral.hpp>
#include <weir/io/families/olmoe.hpp>
#include <weir/io/families/phi_moe.hpp>
#include <weir/io/families/qwen_moe.hpp>

namespace weir::io {

/// The config of a preset of any family that has published checkpoints.
using ModelConfig =
    std::variant<presets::DbrxConfig, presets::DeepSeekMoEConfig, presets::DeepSeekV2Config,
                 presets::DeepSeekV3Config, presets::DenseConfig, presets::ErnieMoeConfig,
                 presets::Glm4MoeConfig, presets::GptOssConfig, presets::GraniteMoeConfig,
                 presets::GrokConfig, presets::Llama4Config, presets::MixtralConfig,
                 presets::OlmoeConfig, presets::PhiMoeConfig, presets::Qwen2MoeConfig,
                 presets::Qwen3Config>;

namespace detail {

/// Calls `with(Config())` for the family whose model type is `type`.
/// \return         Whether there is one.
template <class With, class... Configs>
bool with_family(std::string_view type, std::variant<Configs...>* /*families*/, With&& with) {
  const auto is = [&]<class Config>(Config* /*family*/) {
    const auto& types = Family<Config>::kModelTypes;
    if (std::find(types.begin(), types.end(), type) == types.end()) return false;
    with.template operator()<Config>();
    return true;
  };
  return (is(static_cast<Configs*>(nullptr)) || ...);
}

}  // namespace detail

/// Reads the configuration of one of several families.
/// \throws FileError  if it is of another family, a setting is missing or of another kind, or a
///                    setting is there that weir does not know.
template <class... Configs>
std::variant<Configs...> parse_config_of(ConfigFile json) {
  using Read = std::variant<Configs...>;
  const std::string type = json.text("model_type");
  Read config;
  const auto read = [&]<class Config>() { config = Family<Config>::read(json); };
  if (!detail::with_family(type, static_cast<Read*>(nullptr), read)) {
    json.bad("model_type", sizeof...(Configs) > 1
                               ? "a family that weir knows, see io/model_config.hpp"
                               : "one of the family that was asked for");
  }
  json.finish();
  return config;
}

namespace detail {

template <class... Configs>
std::variant<Configs...> parse_config(ConfigFile json, std::variant<Configs...>* /*all*/) {
  return parse_config_of<Configs...>(std::move(json));
}

}  // namespace detail

/// Reads the configuration of any family, see `parse_config_of`.
inline ModelConfig parse_config(ConfigFile json) {
  return detail::parse_config(std::move(json), static_cast<ModelConfig*>(nullptr));
}

}  // namespace weir::io
