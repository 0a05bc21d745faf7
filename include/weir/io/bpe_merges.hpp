// SPDX-License-Identifier: MIT
/// \file
/// Byte-pair encoding: puts the small tokens of a word together to large ones.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <functional>
#include <queue>
#include <tuple>
#include <unordered_map>
#include <utility>
#include <vector>

#include <weir/core/types.hpp>

namespace weir::io {

/// Which pairs of neighbouring tokens become one, and which pair goes first.
///
/// In each step, of all pairs in the word that have a merge, the one of the lowest rank becomes one
/// token, the leftmost if there are several, until no pair has one. (Sennrich et al. 2016,
/// arXiv:1508.07909, section 3.2.)
class BpeMerges {
 public:
  /// Ids and ranks are from 0 to 2^31 - 1.
  /// \return         Whether the pair had no merge so far.
  bool add(Index left, Index right, Index rank, Index merged) {
    return merges_.emplace(key(left, right), Merge{rank, merged}).second;
  }

  /// Merges the tokens of a word, which are those from `first` on. Takes n log n steps for n.
  void apply(std::vector<Index>& ids, std::size_t first) const;

 private:
  struct Merge {
    Index rank;
    Index merged;
  };

  /// A token of the word, with the places of its neighbours.
  struct Symbol {
    Index id;  // kGone if its left neighbour has taken it in.
    std::size_t previous;
    std::size_t next;
  };

  /// A merge of the token at `place` with the next one, as it was when it was found. The earliest
  /// is what compares greatest.
  struct Candidate {
    Index rank;
    std::size_t place;
    bool operator<(const Candidate& other) const {
      return std::tie(other.rank, other.place) < std::tie(rank, place);
    }
  };

  static constexpr Index kGone = -1;
  static constexpr auto kNowhere = static_cast<std::size_t>(-1);

  static std::uint64_t key(Index left, Index right) {
    return static_cast<std::uint64_t>(left) << 32U | static_cast<std::uint64_t>(right);
  }

  /// The merge of a token with its next one, if there is one.
  const Merge* find(const std::vector<Symbol>& word, std::size_t place) const {
    if (place == kNowhere || word[place].id == kGone || word[place].next == kNowhere) {
      return nullptr;
    }
    const auto found = merges_.find(key(word[place].id, word[word[place].next].id));
    return found == merges_.end() ? nullptr : &found->second;
  }

  std::unordered_map<std::uint64_t, Merge> merges_;
};

inline void BpeMerges::apply(std::vector<Index>& ids, std::size_t first) const {
  const std::size_t count = ids.size() - first;
  if (count < 2) return;
  std::vector<Symbol> word;
  word.reserve(count);
  for (std::size_t i = 0; i < count; ++i) {
    word.push_back({ids[first + i], i == 0 ? kNowhere : i - 1, i + 1 < count ? i + 1 : kNowhere});
  }
  std::vector<Candidate> found;
  found.reserve(count);
  std::priority_queue<Candidate> queue({}, std::move(found));
  const auto consider = [&](std::size_t place) {
    if (const Merge* const merge = find(word, place)) queue.push({merge->rank, place});
  };
  for (std::size_t i = 0; i + 1 < count; ++i) consider(i);

  while (!queue.empty()) {
    const Candidate best = queue.top();
    queue.pop();
    const Merge* const merge = find(word, best.place);
    if (merge == nullptr || merge->rank != best.rank) continue;  // One of the two has changed.
    Symbol& left = word[best.place];
    Symbol& right = word[left.next];
    left.id = merge->merged;
    left.next = right.next;
    right.id = kGone;
    if (left.next != kNowhere) word[left.next].previous = best.place;
    consider(left.previous);
    consider(best.place);
  }

  ids.resize(first);
  for (std::size_t i = 0; i != kNowhere; i = word[i].next) ids.push_back(word[i].id);
}

}  // namespace weir::io
