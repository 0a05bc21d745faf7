// SPDX-License-Identifier: MIT
/// \file
/// Settings of multi-head latent attention (DeepSeek-AI 2024, arXiv:2405.04434, section 2.1).
#pragma once

#include <cmath>
#include <string_view>

#include <weir/core/error.hpp>
#include <weir/core/types.hpp>
#include <weir/ops/rope_scaling.hpp>

namespace weir {

/// How `LatentAttention::decode` goes from latents to outputs. Results differ in rounding only.
/// With the first two, those of a token have the same bits in whatever chunks a sequence is
/// decoded, with kExpanded also those of `forward`; with kCheaper, the size of a chunk decides
/// between the two.
enum class LatentDecoding {
  kAbsorbed,  ///< Queries go down to the latents: no key or value is ever computed.
  kExpanded,  ///< Keys and values of all tokens so far are computed, and forgotten again.
  kCheaper,   ///< Each sequence takes the way with fewer multiplications: expanded for a prompt,
              ///< absorbed after it.
};

/// Settings of `LatentAttention`.
struct LatentConfig {
  Index d_model = 0;
  Index heads = 0;
  Index q_rank = 0;     ///< Numbers in a query's latent. With 0, queries come from x directly.
  Index kv_rank = 0;    ///< Numbers in the latent of keys and values.
  Index nope_dim = 0;   ///< Numbers of a head's queries and keys that are not rotated.
  Index rope_dim = 0;   ///< Numbers that are rotated to the position; even.
  Index value_dim = 0;  ///< Numbers of a head's values.
  double rope_theta = 1e4;
  RopeScaling rope_scaling = NoScaling{};  ///< Stretches the rotation; a Yarn scales scores too.
  double norm_epsilon = 1e-6;
  LatentDecoding decoding = LatentDecoding::kCheaper;
  double init_scale = 1.0;  ///< `scale` of `switch_init`.

  bool operator==(const LatentConfig&) const = default;

  /// Numbers of a head's queries and keys.
  Index query_dim() const { return nope_dim + rope_dim; }

  /// The factor of the product of a query and a key.
  double scale() const {
    return score_scale(rope_scaling) / std::sqrt(static_cast<double>(query_dim()));
  }

  /// Whether the last `queries` of `keys` tokens are decoded the absorbed way. Both ways are
  /// counted in multiply-adds of one head: queries go down to the latents and come up again, or all
  /// keys go up.
  bool is_absorbed(Index queries, Index keys) const {
    if (decoding != LatentDecoding::kCheaper) return decoding == LatentDecoding::kAbsorbed;
    const Index up = (nope_dim + value_dim) * kv_rank;
    const Index pairs = queries * (keys - queries) + queries * (queries + 1) / 2;
    const Index absorbed = queries * up + pairs * (2 * kv_rank + rope_dim);
    const Index expanded = keys * up + pairs * (query_dim() + value_dim);
    return absorbed <= expanded;
  }

  /// \throws ConfigError  if a size is below 1 (q_rank: 0), rope_dim is odd, rope_theta or
  ///                      norm_epsilon is not above zero, or the scaling is not sound.
  void check(std::string_view where) const {
    expect_at_least<Index>(where, "d_model", d_model, 1);
    expect_at_least<Index>(where, "heads", heads, 1);
    expect_at_least<Index>(where, "q_rank", q_rank, 0);
    expect_at_least<Index>(where, "kv_rank", kv_rank, 1);
    expect_at_least<Index>(where, "nope_dim", nope_dim, 1);
    expect_at_least<Index>(where, "rope_dim", rope_dim, 2);
    if (rope_dim % 2 != 0) {
      throw_error<ConfigError>(where, ": rope_dim = ", rope_dim, ", expected an even number");
    }
    expect_at_least<Index>(where, "value_dim", value_dim, 1);
    expect_positive(where, "rope_theta", rope_theta);
    expect_positive(where, "norm_epsilon", norm_epsilon);
    check_scaling(rope_scaling, where, rope_dim, rope_theta);
  }
};

}  // namespace weir
