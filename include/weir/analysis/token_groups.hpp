// SPDX-License-Identifier: MIT
/// \file
/// Tokens that have something in common.
#pragma once

#include <map>
#include <string>
#include <vector>

#include <weir/analysis/traced_tokens.hpp>
#include <weir/core/error.hpp>
#include <weir/core/list.hpp>
#include <weir/core/types.hpp>

namespace weir {

/// A division of tokens into groups, by which statistics are broken down.
struct TokenGroups {
  std::vector<std::string> names;  ///< Of the groups: a domain's, the first position, or an id.
  List<Index> key;                 ///< [groups]: the domain, the first position, or the id.
  List<Index> of;                  ///< [tokens]: the group of each, -1 if it is in none.

  Index count() const { return key.count(); }
};

/// All tokens in one group.
inline TokenGroups all_tokens(const TracedTokens& tokens) {
  return {.names = {"all"}, .key = {0}, .of = List<Index>(tokens.tokens(), 0)};
}

/// A group for each domain.
inline TokenGroups by_domain(const TracedTokens& tokens) {
  TokenGroups groups;
  groups.names = tokens.domains;
  for (Index d = 0; d < static_cast<Index>(tokens.domains.size()); ++d) groups.key.push_back(d);
  groups.of.resize(tokens.tokens());
  for (const TracedTokens::Sequence& s : tokens.sequences) {
    for (Index t = s.begin; t < s.end; ++t) groups.of[t] = s.domain;
  }
  return groups;
}

namespace detail {

/// Groups by a number of each token, in ascending order of the number; those with too few tokens
/// are left out.
inline TokenGroups by_number(const List<Index>& number, Index least_count) {
  std::map<Index, Index> count;
  for (const Index n : number) {
    if (n >= 0) ++count[n];
  }
  TokenGroups groups;
  std::map<Index, Index> group_of;
  for (const auto& [n, tokens] : count) {
    if (tokens < least_count) continue;
    group_of[n] = groups.count();
    groups.key.push_back(n);
    groups.names.push_back(std::to_string(n));
  }
  for (const Index n : number) {
    const auto found = group_of.find(n);
    groups.of.push_back(found == group_of.end() ? Index(-1) : found->second);
  }
  return groups;
}

}  // namespace detail

/// A group for every `width` positions, from 0 on.
/// \param least_count  Groups of fewer tokens are left out.
/// \throws ConfigError  if width < 1.
inline TokenGroups by_position(const TracedTokens& tokens, Index width = 1, Index least_count = 1) {
  expect_at_least<Index>("by_position", "width", width, 1);
  List<Index> begin;
  for (const Index position : tokens.position) begin.push_back(position / width * width);
  return detail::by_number(begin, least_count);
}

/// A group for each token id that is known.
inline TokenGroups by_token(const TracedTokens& tokens, Index least_count = 1) {
  return detail::by_number(tokens.id, least_count);
}

}  // namespace weir
