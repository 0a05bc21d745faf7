// SPDX-License-Identifier: MIT
/// \file
/// LongRoPE: a divisor for the frequency of each rotated pair, found by search
/// (Ding et al. 2024, arXiv:2402.13753).
#pragma once

#include <cmath>
#include <cstddef>
#include <string_view>
#include <vector>

#include <weir/core/error.hpp>
#include <weir/core/types.hpp>

namespace weir {

/// Divides the frequency of pair i by a factor of its own, and multiplies cosines and sines by an
/// mscale:
///
///     frequency_i = theta^(-2i / rotary_dim) / factor_i
///
/// There are two sets of them, one for sequences up to the original context and one for longer
/// ones. Published code chooses by the number of tokens so far, and when a text grows beyond the
/// original context, it forgets the keys that it has kept and computes the whole text anew. Here
/// `length` is a setting, as in DynamicNtkScaling: a text has the published results where both
/// numbers of tokens are on the same side of `original_context`. (`PhimoeRotaryEmbedding` and
/// `prepare_inputs_for_generation` of Hugging Face's transformers, rope_type "longrope"; llama.cpp
/// chooses by the context that it is started with.)
struct LongRopeScaling {
  std::vector<double> short_factors, long_factors;  ///< One for each pair.
  double short_mscale = 1.0, long_mscale = 1.0;
  Index original_context = 4096;  ///< Tokens the model was trained on.
  Index length = 0;  ///< Tokens of the longest sequence; up to original_context, it is short.

  bool operator==(const LongRopeScaling&) const = default;

  /// Whether sequences are longer than the original context.
  bool is_long() const { return length > original_context; }

  /// The radians per position of pair `pair`.
  double frequency(Index pair, Index rotary_dim, double theta) const {
    const std::vector<double>& factors = is_long() ? long_factors : short_factors;
    return std::pow(theta, -2.0 * static_cast<double>(pair) / static_cast<double>(rotary_dim)) /
           factors[static_cast<std::size_t>(pair)];
  }

  /// The factor of cosines and sines.
  double rotation_scale() const { return is_long() ? long_mscale : short_mscale; }

  double score_scale() const { return 1.0; }

  /// \throws ConfigError  unless there is a positive factor for each pair in both sets, mscales are
  ///                      positive, original_context is at least 1 and length at least 0.
  void check(std::string_view where, Index rotary_dim, double /*theta*/) const {
    check_factors(where, "long_rope.short_factors", short_factors, rotary_dim);
    check_factors(where, "long_rope.long_factors", long_factors, rotary_dim);
    expect_positive(where, "long_rope.short_mscale", short_mscale);
    expect_positive(where, "long_rope.long_mscale", long_mscale);
    expect_at_least<Index>(where, "long_rope.original_context", original_context, 1);
    expect_at_least<Index>(where, "long_rope.length", length, 0);
  }

 private:
  static void check_factors(std::string_view where, std::string_view name,
                            const std::vector<double>& factors, Index rotary_dim) {
    if (static_cast<Index>(factors.size()) != rotary_dim / 2) {
      throw_error<ConfigError>(where, ": ", name, " has ", factors.size(), " entries, expected ",
                               rotary_dim / 2, ", one for each pair");
    }
    for (const double factor : factors) expect_positive(where, name, factor);
  }
};

}  // namespace weir
