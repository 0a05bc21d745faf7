// SPDX-License-Identifier: MIT
/// \file
/// Tokens whose routing is known by hand.
#pragma once

#include <string>
#include <vector>

#include <weir/analysis/traced_tokens.hpp>
#include <weir/core/random.hpp>
#include <weir/core/types.hpp>

namespace weir::test {

/// A token's id, and its experts in one layer.
struct HandToken {
  Index id = 0;
  std::vector<Index> experts;
};

struct HandSequence {
  Index domain = 0;
  std::vector<HandToken> tokens;
};

/// Sequences of tokens and one layer of so many experts.
inline TracedTokens traced(const std::vector<HandSequence>& sequences, Index experts,
                           const std::vector<std::string>& domains = {"a"}) {
  TracedTokens tokens;
  tokens.domains = domains;
  tokens.layers.push_back({.name = "moe", .experts = experts});
  for (const HandSequence& sequence : sequences) {
    const Index begin = tokens.tokens();
    for (const HandToken& token : sequence.tokens) {
      tokens.position.push_back(tokens.tokens() - begin);
      tokens.id.push_back(token.id);
      tokens.layers[0].add(token.experts);
    }
    tokens.sequences.push_back(
        {static_cast<Index>(tokens.sequences.size()), sequence.domain, begin, tokens.tokens()});
  }
  return tokens;
}

/// Sequences of tokens with k experts each at random, of one domain.
inline TracedTokens random_tokens(Index sequences, Index length, Index experts, Index k,
                                  std::uint64_t seed) {
  Rng rng(seed);
  std::vector<HandSequence> all;
  for (Index s = 0; s < sequences; ++s) {
    all.emplace_back();
    for (Index t = 0; t < length; ++t) {
      HandToken token{.id = rng.below(20), .experts = {}};
      while (static_cast<Index>(token.experts.size()) < k) {
        const Index e = rng.below(experts);
        if (std::find(token.experts.begin(), token.experts.end(), e) == token.experts.end()) {
          token.experts.push_back(e);
        }
      }
      all.back().tokens.push_back(token);
    }
  }
  return traced(all, experts);
}

}  // namespace weir::test
