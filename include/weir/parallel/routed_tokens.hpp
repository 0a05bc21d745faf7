// SPDX-License-Identifier: MIT
/// \file
/// Tokens, their experts, and the ranks that they belong to.
#pragma once

#include <span>
#include <string_view>
#include <vector>

#include <weir/analysis/traced_tokens.hpp>
#include <weir/core/error.hpp>
#include <weir/core/index_span.hpp>
#include <weir/core/list.hpp>
#include <weir/core/types.hpp>

namespace weir {

/// What one layer did with tokens of all ranks: what placements are judged by.
struct RoutedTokens {
  TracedLayer layer;
  List<Index> source;  ///< [tokens], the rank of each.

  Index tokens() const { return source.count(); }

  /// \throws ConfigError  unless each token has a rank, of `ranks` there are, and the layer has
  ///                      `experts` experts and no others.
  void check(std::string_view who, Index experts, Index ranks) const {
    if (layer.experts != experts) {
      throw_error<ConfigError>(who, ": the tokens are of ", layer.experts, " experts, expected ",
                               experts, ", those of the placement");
    }
    for (const Index e : layer.expert) {
      if (e >= 0 && e < experts) continue;
      throw_error<ConfigError>(who, ": a token has expert ", e, ", expected an expert < ", experts);
    }
    if (source.count() != layer.tokens()) {
      throw_error<ConfigError>(who, ": there are ", source.count(), " sources, expected ",
                               layer.tokens(), ", one for each token");
    }
    for (Index t = 0; t < tokens(); ++t) {
      if (source[t] >= 0 && source[t] < ranks) continue;
      throw_error<ConfigError>(who, ": the source of token ", t, " = ", source[t],
                               ", expected 0 <= source < ranks = ", ranks);
    }
  }
};

/// The tokens of some sequences of a trace, where whole sequences go to the ranks in turn: number i
/// of `sequences` to rank i mod ranks. Tokens that the layer did not see are left out.
/// \throws ConfigError  unless ranks >= 1.
inline RoutedTokens routed_tokens(const TracedTokens& tokens, const TracedLayer& layer,
                                  std::span<const Index> sequences, Index ranks) {
  expect_at_least<Index>("routed_tokens", "ranks", ranks, 1);
  RoutedTokens routed;
  routed.layer.name = layer.name;
  routed.layer.experts = layer.experts;
  TracedLayer& to = routed.layer;
  for (std::size_t i = 0; i < sequences.size(); ++i) {
    const auto& sequence = tokens.sequences[static_cast<std::size_t>(sequences[i])];
    for (Index t = sequence.begin; t < sequence.end; ++t) {
      if (layer.recorded[t] == 0) continue;
      for (Index c = layer.first(t); c < layer.last(t); ++c) {
        to.expert.push_back(layer.expert[c]);
        to.kept.push_back(layer.kept[c]);
        to.weight.push_back(layer.weight[c]);
      }
      to.offsets.push_back(to.expert.count());
      to.recorded.push_back(1);
      to.entropy.push_back(layer.entropy[t]);
      to.pass.push_back(layer.pass[t]);
      to.record.push_back(layer.record[t]);
      routed.source.push_back(static_cast<Index>(i) % ranks);
    }
  }
  return routed;
}

/// Sequences to search by, and others to judge what was found.
struct HeldOut {
  std::vector<Index> rest, held;
};

/// Holds out each `every`-th of `sequences` sequences, beginning with number every - 1.
/// \throws ConfigError  unless every >= 2.
inline HeldOut hold_out(Index sequences, Index every) {
  expect_at_least<Index>("hold_out", "every", every, 2);
  HeldOut parts;
  for (Index s = 0; s < sequences; ++s) {
    (s % every == every - 1 ? parts.held : parts.rest).push_back(s);
  }
  return parts;
}

}  // namespace weir
