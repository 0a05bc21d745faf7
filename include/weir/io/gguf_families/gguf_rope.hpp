// SPDX-License-Identifier: MIT
/// \file
/// Rotary positions in the metadata of GGUF files.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <string>
#include <string_view>
#include <type_traits>
#include <variant>
#include <vector>

#include <weir/core/error.hpp>
#include <weir/core/types.hpp>
#include <weir/io/gguf.hpp>
#include <weir/io/gguf_settings.hpp>
#include <weir/ops/llama3_scaling.hpp>
#include <weir/ops/long_rope.hpp>
#include <weir/ops/rope_scaling.hpp>
#include <weir/ops/yarn.hpp>

namespace weir::io {

/// The tensor with the divisors of the frequencies of Llama 3.
inline constexpr auto kGgufRopeDivisors = "rope_freqs.weight";

/// The tensors with the factors of LongRoPE.
inline constexpr auto kGgufShortFactors = "rope_factors_short.weight";
inline constexpr auto kGgufLongFactors = "rope_factors_long.weight";

namespace detail {

/// Yarn as llama.cpp computes it, whatever else a file says: 32 and 1 turns, and a ramp between
/// whole numbers.
inline Yarn read_gguf_yarn(GgufSettings& settings, double factor) {
  settings.ignore("rope.scaling.yarn_ext_factor", "rope.scaling.yarn_attn_factor",
                  "rope.scaling.yarn_beta_fast", "rope.scaling.yarn_beta_slow");
  Yarn yarn{.factor = factor, .original_context = settings.count("context_length", 0)};
  yarn.original_context =
      settings.count("rope.scaling.original_context_length", yarn.original_context);
  const double more = settings.number("rope.scaling.attn_factor", 1.0);
  if (more == 1.0) return yarn;
  if (factor <= 1.0) settings.bad("rope.scaling.attn_factor", "1 without a longer context");
  yarn.mscale = (more * yarn.sharpness(1.0) - 1.0) / (0.1 * std::log(factor));
  return yarn;
}

}  // namespace detail

/// Reads how rotary frequencies are stretched.
/// \throws FileError  if a setting is of another kind or says what weir does not do.
inline RopeScaling read_gguf_scaling(GgufSettings& settings) {
  constexpr auto kType = "rope.scaling.type";
  const std::string type = settings.text(kType, "linear");
  double factor = settings.number("rope.scale_linear", 0.0);  // An older name.
  factor = settings.number("rope.scaling.factor", factor);
  if (factor == 0.0) factor = 1.0;
  if (type == "yarn") return detail::read_gguf_yarn(settings, factor);
  settings.ignore("rope.scaling.original_context_length");
  settings.expect_number("rope.scaling.attn_factor", 1.0);
  if (type == "none") return NoScaling{};
  if (type != "linear") settings.bad(kType, "none, linear or yarn");
  return factor == 1.0 ? RopeScaling(NoScaling{}) : LinearScaling{.factor = factor};
}

/// Reads how an architecture stretches frequencies that may have the factors of LongRoPE. The
/// context that the file gives decides which of them are taken.
/// \throws FileError  as `read_gguf_scaling`.
inline RopeScaling read_gguf_long_rope(GgufSettings& settings) {
  const Gguf& file = settings.file();
  if (!file.has_tensor(kGgufLongFactors)) return read_gguf_scaling(settings);
  constexpr auto kType = "rope.scaling.type";
  const std::string type = settings.text(kType, "longrope");
  if (type != "longrope" && type != "none") settings.bad(kType, "none or longrope");
  settings.expect_number("rope.scaling.factor", 1.0);
  const double scale = settings.number("rope.scaling.attn_factor", 1.0);
  const Index context = settings.count("context_length");
  return LongRopeScaling{
      .short_factors = file.numbers(kGgufShortFactors),
      .long_factors = file.numbers(kGgufLongFactors),
      .short_mscale = scale,
      .long_mscale = scale,
      .original_context = settings.count("rope.scaling.original_context_length", context),
      .length = context};
}

/// The opposite of `read_gguf_scaling`. Llama 3's scaling has no settings, see `rope_divisors`.
/// \throws ConfigError  if llama.cpp computes something else.
inline void write_gguf_scaling(const RopeScaling& scaling, GgufSettingsWriter& to) {
  const auto refuse = [](const char* setting, auto value, const char* expected) {
    throw_error<ConfigError>("save_gguf: rope_scaling.", setting, " = ", value, ", expected ",
                             expected, ", as llama.cpp has it");
  };
  if (const auto* const linear = std::get_if<LinearScaling>(&scaling)) {
    to.text("rope.scaling.type", "linear");
    to.number("rope.scaling.factor", linear->factor);
  } else if (std::holds_alternative<DynamicNtkScaling>(scaling)) {
    throw_error<ConfigError>(
        "save_gguf: rope_scaling is a DynamicNtkScaling, which GGUF files cannot say");
  } else if (std::holds_alternative<LongRopeScaling>(scaling)) {
    throw_error<ConfigError>(
        "save_gguf: rope_scaling is a LongRopeScaling, which files of this family cannot say");
  } else if (const auto* const yarn = std::get_if<Yarn>(&scaling)) {
    const Yarn usual;
    if (yarn->beta_fast != usual.beta_fast) refuse("beta_fast", yarn->beta_fast, "32");
    if (yarn->beta_slow != usual.beta_slow) refuse("beta_slow", yarn->beta_slow, "1");
    if (!yarn->truncate) refuse("truncate", "false", "true");
    to.text("rope.scaling.type", "yarn");
    to.number("rope.scaling.factor", yarn->factor);
    to.count("rope.scaling.original_context_length", yarn->original_context);
  }
}

/// By how much Llama 3's scaling divides the frequency of each pair of a head.
inline std::vector<float> rope_divisors(const Llama3Scaling& scaling, Index head_dim,
                                        double theta) {
  std::vector<float> divisors;
  for (Index pair = 0; pair < head_dim / 2; ++pair) {
    divisors.push_back(static_cast<float>(NoScaling{}.frequency(pair, head_dim, theta) /
                                          scaling.frequency(pair, head_dim, theta)));
  }
  return divisors;
}

namespace detail {

/// Whether both lists have the same numbers, to their rounding.
inline bool are_near(const std::vector<double>& own, const std::vector<float>& wanted) {
  constexpr double kRounding = 1e-5;
  for (std::size_t i = 0; i < wanted.size(); ++i) {
    const auto expected = static_cast<double>(wanted[i]);
    if (!(std::abs(own[i] - expected) <= kRounding * expected)) return false;
  }
  return true;
}

}  // namespace detail

/// Reads the scaling of Llama 3, of which a file has the divisors alone. Those of all published
/// models come from a factor, Llama3Scaling's other defaults or, in Llama 4, a high_freq_factor of
/// 1; others are refused.
/// \throws FileError  if the divisors are no such.
inline RopeScaling read_rope_divisors(const Gguf& file, Index head_dim, double theta) {
  if (head_dim >= 2 && file.tensor(kGgufRopeDivisors).size() == head_dim / 2 && theta > 0.0) {
    const std::vector<double> divisors = file.numbers(kGgufRopeDivisors);
    const double factor = *std::max_element(divisors.begin(), divisors.end());
    for (const double high : {Llama3Scaling{}.high_freq_factor, 1.0}) {
      const Llama3Scaling scaling{.factor = factor, .high_freq_factor = high};
      if (!(factor >= 1.0) || !std::isfinite(factor)) break;
      if (!detail::are_near(divisors, rope_divisors(scaling, head_dim, theta))) continue;
      return factor == 1.0 ? RopeScaling(NoScaling{}) : scaling;
    }
  }
  throw_error<FileError>(file.path(), ": tensor '", kGgufRopeDivisors,
                         "' does not hold the divisors of Llama 3 for ", head_dim / 2,
                         " pairs and theta = ", theta);
}

}  // namespace weir::io
