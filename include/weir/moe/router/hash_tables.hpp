// SPDX-License-Identifier: MIT
/// \file
/// Tables that give each token id an expert, for hash layers (Roller et al. 2021,
/// arXiv:2106.04426).
#pragma once

#include <algorithm>
#include <numeric>
#include <span>
#include <vector>

#include <weir/core/error.hpp>
#include <weir/core/random.hpp>
#include <weir/core/types.hpp>

namespace weir {

/// The table id % experts.
/// \throws ConfigError  if a size is below 1.
inline std::vector<Index> modulo_hash_table(Index vocab, Index experts) {
  expect_at_least<Index>("modulo_hash_table", "vocab", vocab, 1);
  expect_at_least<Index>("modulo_hash_table", "experts", experts, 1);
  std::vector<Index> table(static_cast<std::size_t>(vocab));
  for (Index id = 0; id < vocab; ++id) table[static_cast<std::size_t>(id)] = id % experts;
  return table;
}

/// A random table of `vocab` experts in which each expert occurs equally often, to within one: the
/// random hash of section 3.2.
/// \throws ConfigError  if a size is below 1.
inline std::vector<Index> random_hash_table(Index vocab, Index experts, Rng& rng) {
  expect_at_least<Index>("random_hash_table", "vocab", vocab, 1);
  expect_at_least<Index>("random_hash_table", "experts", experts, 1);
  std::vector<Index> table = modulo_hash_table(vocab, experts);
  shuffle(table, rng);
  return table;
}

/// The balanced assignment of section 3.2: ids from the most frequent to the rarest, each to the
/// expert with the least so far. Of equal frequencies the lowest id comes first, of equal experts
/// the lowest.
/// \param frequency  One per id, such as how often the training text has it.
/// \throws ConfigError  if there are no ids or no experts, or if a frequency is negative or NaN.
inline std::vector<Index> balanced_hash_table(std::span<const double> frequency, Index experts) {
  expect_at_least("balanced_hash_table", "vocab", static_cast<Index>(frequency.size()), Index(1));
  expect_at_least<Index>("balanced_hash_table", "experts", experts, 1);
  for (const double f : frequency) expect_at_least("balanced_hash_table", "frequency", f, 0.0);
  std::vector<std::size_t> order(frequency.size());
  std::iota(order.begin(), order.end(), std::size_t(0));
  std::stable_sort(order.begin(), order.end(),
                   [&](std::size_t a, std::size_t b) { return frequency[a] > frequency[b]; });
  std::vector<double> load(static_cast<std::size_t>(experts), 0.0);
  std::vector<Index> table(frequency.size());
  for (const std::size_t id : order) {
    const auto least = std::min_element(load.begin(), load.end());
    *least += frequency[id];
    table[id] = least - load.begin();
  }
  return table;
}

}  // namespace weir
