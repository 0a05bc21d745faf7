// SPDX-License-Identifier: MIT
/// \file
/// What weir knows of a published family of models.
#pragma once

#include <span>
#include <string_view>

namespace weir::io {

/// How the models of a preset's config are published by Hugging Face. Each family specialises it:
///
///     static constexpr std::array kModelTypes = {"mixtral"};   // of config.json; writing: the
///     first static constexpr std::string_view kArchitecture = "MixtralForCausalLM"; static Config
///     read(ConfigFile& json); static void write(const Config& config, nlohmann::json& json);
///     static std::vector<presets::TensorName> names(const Config& config, const TensorSource*
///     source);
///
/// `read` uses each setting that it knows and leaves it to the caller to refuse the rest; `write`
/// throws ConfigError for what such a configuration cannot say. `names` looks at `source`, if there
/// is one, to see in which of several layouts a checkpoint was written.
template <class Config>
struct Family;

}  // namespace weir::io
