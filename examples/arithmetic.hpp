// SPDX-License-Identifier: MIT
/// \file
/// Sums as text: questions whose answers can be checked.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include <weir/core/random.hpp>
#include <weir/core/types.hpp>

#include "bytes.hpp"

/// "27+85=", to be answered by "112" and the end of the line.
struct Sum {
  weir::Index a = 0, b = 0;

  std::vector<weir::Index> question() const {
    return to_ids(std::to_string(a) + "+" + std::to_string(b) + "=");
  }
  std::vector<weir::Index> answer() const { return to_ids(std::to_string(a + b) + "\n"); }

  /// One question in ten, at random, is set aside: nobody learns from it.
  bool is_set_aside() const {
    return weir::mix_bits(static_cast<std::uint64_t>(100 * a + b)) % 10 == 0;
  }

  /// A question about numbers of two digits, of those that are set aside or of the others.
  static Sum random(weir::Rng& rng, bool set_aside) {
    constexpr weir::Index kLeast = 10;
    constexpr weir::Index kCount = 90;
    Sum sum;
    do {
      sum.a = kLeast + rng.below(kCount);
      sum.b = kLeast + rng.below(kCount);
    } while (sum.is_set_aside() != set_aside);
    return sum;
  }
};
