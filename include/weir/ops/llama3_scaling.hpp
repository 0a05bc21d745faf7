// SPDX-License-Identifier: MIT
/// \file
/// The rotary frequencies of Llama 3.1 and its successors, for a longer context than the first
/// training had (Llama Team 2024, arXiv:2407.21783).
#pragma once

#include <cmath>
#include <numbers>
#include <string_view>

#include <weir/core/error.hpp>
#include <weir/core/types.hpp>

namespace weir {

/// Slows down the pairs of a head that turn slowly, by their number of turns within the original
/// context, r_i = original_context * f_i / (2 pi). Pairs that turn more than `high_freq_factor`
/// times keep their frequency f_i, pairs that turn less than `low_freq_factor` times are slowed
/// down by `factor`, and those between are mixed:
///
///     frequency_i = (1 - s_i) f_i / factor + s_i f_i
///     s_i = clamp((r_i - low_freq_factor) / (high_freq_factor - low_freq_factor), 0, 1)
///
/// Where both bounds are equal, s_i is 1 from r_i = high_freq_factor on and 0 below it. Scores stay
/// as they are. (`apply_scaling` in Meta's llama-models, rope_type "llama3" in Hugging Face's.)
struct Llama3Scaling {
  double factor = 8.0;            ///< The divisor of the slow frequencies.
  double low_freq_factor = 1.0;   ///< Turns below which a frequency is divided.
  double high_freq_factor = 4.0;  ///< Turns from which on a frequency stays.
  Index original_context = 8192;  ///< Tokens the model was trained on first.

  bool operator==(const Llama3Scaling&) const = default;

  /// The radians per position of pair `pair` of `rotary_dim` rotated numbers.
  double frequency(Index pair, Index rotary_dim, double theta) const {
    const double plain =
        std::pow(theta, -2.0 * static_cast<double>(pair) / static_cast<double>(rotary_dim));
    const double turns = static_cast<double>(original_context) * plain / (2.0 * std::numbers::pi);
    if (turns >= high_freq_factor) return plain;
    if (turns <= low_freq_factor) return plain / factor;
    const double share = (turns - low_freq_factor) / (high_freq_factor - low_freq_factor);
    return (1.0 - share) * plain / factor + share * plain;
  }

  /// The factor of cosines and sines.
  double rotation_scale() const { return 1.0; }

  /// The factor of the product of query and key, beside 1 / sqrt(head_dim).
  double score_scale() const { return 1.0; }

  /// \throws ConfigError  unless factor and original_context are at least 1,
  ///                      0 < low_freq_factor <= high_freq_factor, and all are finite.
  void check(std::string_view where, Index /*rotary_dim*/, double /*theta*/) const {
    expect_at_least(where, "llama3.factor", factor, 1.0);
    expect_at_least<Index>(where, "llama3.original_context", original_context, 1);
    expect_positive(where, "llama3.low_freq_factor", low_freq_factor);
    expect_at_least(where, "llama3.high_freq_factor", high_freq_factor, low_freq_factor);
  }
};

}  // namespace weir
