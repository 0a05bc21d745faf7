// SPDX-License-Identifier: MIT
/// \file
/// The settings of rotary positions in config.json.
#pragma once

#include <cmath>
#include <nlohmann/json.hpp>
#include <optional>
#include <string>
#include <type_traits>
#include <variant>
#include <vector>

#include <weir/core/types.hpp>
#include <weir/io/config_file.hpp>
#include <weir/ops/rope_scaling.hpp>

namespace weir::io {

/// Rotary positions as a configuration has them.
struct RopeSettings {
  double theta = 1e4;
  RopeScaling scaling = NoScaling{};
  double partial = 1.0;  ///< The share of a head that is rotated.
};

namespace detail {

/// \param scores   Whether the family multiplies scores by the square of sharpness(mscale_all_dim),
///                 as DeepSeek's code does; others know no such factor.
inline RopeScaling read_yarn(ConfigFile& json, Index context, bool scores) {
  Yarn yarn{.factor = json.number("factor"),
            .original_context = json.count("original_max_position_embeddings", context),
            .beta_fast = json.number("beta_fast", 32.0),
            .beta_slow = json.number("beta_slow", 1.0),
            .truncate = json.flag("truncate", true)};
  if (scores) {
    yarn.mscale = json.number("mscale", 1.0);
    yarn.mscale_all_dim = json.number("mscale_all_dim", 0.0);
  } else {
    if (json.has("mscale_all_dim")) json.bad("mscale_all_dim", "none in this family");
    if (!json.has("attention_factor") || yarn.factor == 1.0) return yarn;
    yarn.mscale = (json.number("attention_factor") - 1.0) / (0.1 * std::log(yarn.factor));
  }
  return yarn;
}

/// The context that the configuration says decides which factors are taken.
inline RopeScaling read_long_rope(ConfigFile& json, Index context) {
  const auto factors = [&](const char* key) {
    std::vector<double> all;
    const nlohmann::json& list = json.at(key);
    for (const nlohmann::json& value : list) {
      if (!list.is_array() || !value.is_number()) json.bad(key, "a list of numbers");
      all.push_back(value.get<double>());
    }
    return all;
  };
  return LongRopeScaling{.short_factors = factors("short_factor"),
                         .long_factors = factors("long_factor"),
                         .short_mscale = json.number("short_mscale"),
                         .long_mscale = json.number("long_mscale"),
                         .original_context = json.count("original_max_position_embeddings"),
                         .length = context};
}

inline RopeScaling read_scaling(ConfigFile& json, Index context, bool scores) {
  const std::string kind = json.text("rope_type", json.text("type", "default"));
  if (kind == "default") return NoScaling{};
  if (kind == "linear") return LinearScaling{.factor = json.number("factor")};
  if (kind == "dynamic") {
    return DynamicNtkScaling{
        .factor = json.number("factor"), .original_context = context, .length = context};
  }
  if (kind == "llama3") {
    return Llama3Scaling{.factor = json.number("factor"),
                         .low_freq_factor = json.number("low_freq_factor"),
                         .high_freq_factor = json.number("high_freq_factor"),
                         .original_context = json.count("original_max_position_embeddings")};
  }
  if (kind == "longrope") return read_long_rope(json, context);
  if (kind != "yarn") {
    json.bad(json.has("rope_type") ? "rope_type" : "type",
             "default, linear, dynamic, llama3, yarn or longrope");
  }
  return read_yarn(json, context, scores);
}

}  // namespace detail

/// Reads `rope_theta` and `rope_scaling`, or `rope_parameters` as newer configurations have it.
/// \param missing  theta where none is given.
/// \param scores   Whether a yarn multiplies scores too, as in DeepSeek's code.
/// \param partial  The share of a head that is rotated where none is given. Nothing stands for a
///                 family whose code rotates whole heads.
/// \throws FileError  if a setting is missing, of another kind, or not known.
inline RopeSettings read_rope(ConfigFile& json, double missing, bool scores = false,
                              std::optional<double> partial = {}) {
  const auto read_partial = [&](ConfigFile& from) {
    constexpr auto kKey = "partial_rotary_factor";
    if (partial) {
      const double share = from.number(kKey, *partial);
      if (!(share > 0.0 && share <= 1.0)) from.bad(kKey, "a number from 0 to 1, without 0");
      return share;
    }
    from.expect(kKey, 1.0);
    return 1.0;
  };
  RopeSettings rope{.theta = json.number("rope_theta", missing), .partial = read_partial(json)};
  const Index context = json.count("max_position_embeddings", 2048);
  for (const char* const key : {"rope_parameters", "rope_scaling"}) {
    if (!json.has(key)) continue;
    ConfigFile inner = json.object(key);
    rope.theta = inner.number("rope_theta", rope.theta);
    if (inner.has("partial_rotary_factor")) rope.partial = read_partial(inner);
    rope.scaling = detail::read_scaling(inner, context, scores);
    inner.finish();
    break;
  }
  return rope;
}

/// The opposite of `read_rope`.
inline void write_rope(const RopeSettings& rope, bool scores, nlohmann::json& json) {
  json["rope_theta"] = rope.theta;
  if (rope.partial != 1.0) json["partial_rotary_factor"] = rope.partial;
  nlohmann::json& scaling = json["rope_scaling"];
  std::visit(
      [&](const auto& kind) {
        using Kind = std::remove_cvref_t<decltype(kind)>;
        if constexpr (std::is_same_v<Kind, LinearScaling>) {
          scaling = {{"rope_type", "linear"}, {"factor", kind.factor}};
        } else if constexpr (std::is_same_v<Kind, DynamicNtkScaling>) {
          scaling = {{"rope_type", "dynamic"}, {"factor", kind.factor}};
          json["max_position_embeddings"] = kind.original_context;
        } else if constexpr (std::is_same_v<Kind, Llama3Scaling>) {
          scaling = {{"rope_type", "llama3"},
                     {"factor", kind.factor},
                     {"low_freq_factor", kind.low_freq_factor},
                     {"high_freq_factor", kind.high_freq_factor},
                     {"original_max_position_embeddings", kind.original_context}};
        } else if constexpr (std::is_same_v<Kind, LongRopeScaling>) {
          scaling = {{"type", "longrope"},
                     {"short_factor", kind.short_factors},
                     {"long_factor", kind.long_factors},
                     {"short_mscale", kind.short_mscale},
                     {"long_mscale", kind.long_mscale},
                     {"original_max_position_embeddings", kind.original_context}};
          json["max_position_embeddings"] = kind.length;
        } else if constexpr (std::is_same_v<Kind, Yarn>) {
          scaling = {{"rope_type", "yarn"},
                     {"factor", kind.factor},
                     {"original_max_position_embeddings", kind.original_context},
                     {"beta_fast", kind.beta_fast},
                     {"beta_slow", kind.beta_slow}};
          if (!kind.truncate) scaling["truncate"] = false;
          if (scores) {
            scaling["mscale"] = kind.mscale;
            scaling["mscale_all_dim"] = kind.mscale_all_dim;
          } else if (kind.rotation_scale() != kind.sharpness(1.0)) {
            scaling["attention_factor"] = kind.rotation_scale();
          }
        }
      },
      rope.scaling);
}

}  // namespace weir::io
