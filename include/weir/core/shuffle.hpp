// SPDX-License-Identifier: MIT
/// \file
/// A random order of any number of things, in memory that does not grow with their number.
#pragma once

#include <algorithm>
#include <array>
#include <cstddef>
#include <cstdint>
#include <string_view>

#include <weir/core/error.hpp>
#include <weir/core/random.hpp>
#include <weir/core/types.hpp>

namespace weir {

/// A permutation of {0, ..., count - 1} that looks random and is computed place by place, the same
/// with every compiler: the swap-or-not shuffle. Round r pairs x with K_r - x and exchanges the
/// two, or not, as a random bit of the pair says:
///
///     x' = (K_r - x) mod count,   x <- x' if F_r(max(x, x')) = 1
///
/// K_r and F_r come from the key. It is not meant to keep secrets.
/// (Hoang, Morris & Rogaway 2012, arXiv:1208.1176, figure 1.)
class Shuffle {
 public:
  /// \throws ConfigError  unless count >= 1.
  Shuffle(Index count, std::uint64_t key) : count_(count) {
    expect_at_least<Index>("Shuffle", "count", count, 1);
    Rng rng(key);
    for (Round& round : rounds_) round = {rng.below(count), rng.split()};
  }

  Index count() const { return count_; }

  /// What stands at `place`.
  /// \throws ConfigError  unless 0 <= place < count.
  Index operator()(Index place) const {
    expect_in<Index>("Shuffle", "place", place, 0, count_ - 1);
    for (const Round& round : rounds_) {
      const Index partner = round.sum - place + (place > round.sum ? count_ : 0);
      const auto pair = static_cast<std::uint64_t>(std::max(place, partner));
      if ((round.bits.at(pair) & 1U) != 0) place = partner;
    }
    return place;
  }

 private:
  struct Round {
    Index sum = 0;  // K_r.
    Rng bits;       // F_r.
  };
  static constexpr std::size_t kRounds = 64;

  Index count_;
  std::array<Round, kRounds> rounds_;
};

}  // namespace weir
