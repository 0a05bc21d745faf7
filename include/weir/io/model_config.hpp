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
#include <weir/io/families/family.hpp>
#include <weir/io/families/mixtral.hpp>

namespace weir::io {

/// The config of a preset of any family that has published checkpoints.
using ModelConfig = std::variant<presets::MixtralConfig>;

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

/// Reads config.json.
/// \throws FileError  if there is no such file, it is of a family that weir does not know, a
///                    setting is missing or of another kind, or a setting is there that weir does
///                    not know.
inline ModelConfig read_config(const std::string& path) {
  ConfigFile json = ConfigFile::read(path);
  const std::string type = json.text("model_type");
  ModelConfig config;
  const auto read = [&]<class Config>() { config = Family<Config>::read(json); };
  if (!detail::with_family(type, static_cast<ModelConfig*>(nullptr), read)) {
    json.bad("model_type", "a family that weir knows, see io/model_config.hpp");
  }
  json.finish();
  return config;
}

}  // namespace weir::io
