// SPDX-License-Identifier: MIT
/// \file
/// How the rows of a token matrix divide into sequences.
#pragma once

#include <vector>

#include <weir/core/error.hpp>
#include <weir/core/list.hpp>
#include <weir/core/types.hpp>

namespace weir {

/// Several sequences packed one after the other into one [tokens, features] matrix: sequence s owns
/// the rows `begin(s)` to `end(s)`. Lengths may differ, and a length may be zero.
class Sequences {
 public:
  Sequences() = default;

  /// \throws ConfigError  if a length is negative.
  explicit Sequences(const std::vector<Index>& lengths) {
    for (const Index length : lengths) append(length);
  }

  /// `count` sequences of the same length.
  static Sequences uniform(Index count, Index length) {
    return Sequences(List<Index>(count, length));
  }

  /// Adds one sequence behind the others.
  void append(Index length) {
    expect_at_least<Index>("Sequences", "length", length, 0);
    offsets_.push_back(offsets_.back() + length);
  }

  /// Removes all sequences. Keeps the memory.
  void clear() { offsets_.resize(1); }

  Index count() const { return offsets_.count() - 1; }
  Index tokens() const { return offsets_.back(); }
  Index begin(Index s) const { return offsets_[s]; }
  Index end(Index s) const { return offsets_[s + 1]; }
  Index length(Index s) const { return end(s) - begin(s); }

 private:
  List<Index> offsets_ = {0};
};

}  // namespace weir
