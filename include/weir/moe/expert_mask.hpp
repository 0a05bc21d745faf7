// SPDX-License-Identifier: MIT
/// \file
/// Which experts tokens may go to: masks for `Pass::allowed`.
#pragma once

#include <cstdint>
#include <span>
#include <vector>

#include <weir/core/error.hpp>
#include <weir/core/list.hpp>
#include <weir/core/types.hpp>

namespace weir {

/// Allows all experts except those in `excluded`: [experts]. An expert may be named twice.
/// \throws ConfigError  unless experts >= 1 and 0 <= excluded[i] < experts.
inline std::vector<std::uint8_t> all_but(Index experts, std::span<const Index> excluded) {
  expect_at_least<Index>("all_but", "experts", experts, 1);
  List<std::uint8_t> allowed(experts, 1);
  for (std::size_t i = 0; i < excluded.size(); ++i) {
    if (excluded[i] < 0 || excluded[i] >= experts) {
      throw_error<ConfigError>("all_but: excluded[", i, "] = ", excluded[i],
                               ", expected 0 <= excluded < experts = ", experts);
    }
    allowed[excluded[i]] = 0;
  }
  return allowed;
}

/// Allows each token the experts that the table has for its modality, [tokens * experts]:
/// modality-aware routing. (Lin et al. 2024, arXiv:2407.21770, MoMa: a group of experts for each
/// modality; here groups may overlap.)
/// \param modality  The modality of each token.
/// \param table     [modalities * experts], modality by modality, 0 for a forbidden expert.
/// \param mask      As Pass::mask: padding may have any modality and is allowed nothing.
/// \throws ConfigError  unless experts >= 1 and the modalities of real tokens are in the table.
/// \throws ShapeError   if the table does not consist of whole rows, or the mask is not as long as
///                      `modality`.
inline std::vector<std::uint8_t> modality_mask(std::span<const Index> modality,
                                               std::span<const std::uint8_t> table, Index experts,
                                               std::span<const std::uint8_t> mask = {}) {
  expect_at_least<Index>("modality_mask", "experts", experts, 1);
  const auto each = static_cast<std::size_t>(experts);
  if (table.size() % each != 0) {
    throw_error<ShapeError>("modality_mask: the table has ", table.size(),
                            " entries, expected a multiple of experts = ", experts);
  }
  if (!mask.empty() && mask.size() != modality.size()) {
    throw_error<ShapeError>("modality_mask: mask has ", mask.size(), " entries, expected ",
                            modality.size(), " (one per token)");
  }
  const auto modalities = static_cast<Index>(table.size() / each);
  std::vector<std::uint8_t> allowed;
  allowed.reserve(modality.size() * each);
  for (std::size_t t = 0; t < modality.size(); ++t) {
    if (!mask.empty() && mask[t] == 0) {
      allowed.insert(allowed.end(), each, 0);
      continue;
    }
    if (modality[t] < 0 || modality[t] >= modalities) {
      throw_error<ConfigError>("modality_mask: modality[", t, "] = ", modality[t],
                               ", expected 0 <= modality < ", modalities,
                               ", the rows of the table");
    }
    const auto row = table.subspan(static_cast<std::size_t>(modality[t]) * each, each);
    allowed.insert(allowed.end(), row.begin(), row.end());
  }
  return allowed;
}

}  // namespace weir
