// SPDX-License-Identifier: MIT
/// \file
/// How much this rank has sent.
#pragma once

#include <utility>
#include <vector>

namespace weir::test {

struct SentSoFar {
  long bytes = 0, messages = 0;
};

/// Since the program started, to each rank.
const std::vector<SentSoFar>& sent_so_far();

/// How much `f()` sends, to the ranks for which `counts(rank)`.
template <class F, class Counts>
SentSoFar sent_by(F&& f, Counts&& counts) {
  const std::vector<SentSoFar> before = sent_so_far();
  std::forward<F>(f)();
  const std::vector<SentSoFar>& after = sent_so_far();
  SentSoFar sent;
  for (std::size_t r = 0; r < after.size(); ++r) {
    if (!counts(static_cast<int>(r))) continue;
    sent.bytes += after[r].bytes - (r < before.size() ? before[r].bytes : 0);
    sent.messages += after[r].messages - (r < before.size() ? before[r].messages : 0);
  }
  return sent;
}

/// How much `f()` sends.
template <class F>
SentSoFar sent_by(F&& f) {
  return sent_by(std::forward<F>(f), [](int) { return true; });
}

}  // namespace weir::test
