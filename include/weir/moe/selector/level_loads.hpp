// SPDX-License-Identifier: MIT
/// \file
/// One expert for each token, as level as forbidden experts allow.
#pragma once

#include <algorithm>

#include <weir/core/list.hpp>
#include <weir/core/types.hpp>
#include <weir/moe/routing.hpp>

namespace weir {

/// Gives each real token one of the experts that it is allowed, so that the loads n_e are as level
/// as they can be: sum_e n_e^2 is the smallest there is, and with it the largest load, the sum of
/// the two largest, and so on. Where each group of tokens has experts of its own, each group is
/// level.
///
/// Each token first goes to the least loaded of its experts, the one of the largest logit among
/// equal ones. Then, as long as there is a chain of experts e, ..., f in which a token of each one
/// is allowed the next one, and n_f <= n_e - 2, a token moves on at each link.
///
/// (Harvey, Ladner, Lovász & Tamir 2006, "Semi-matchings for bipartite graphs and load balancing":
/// the assignment is optimal if and only if there is no such chain.)
class LevelLoads {
 public:
  /// \param routing  Begun, with its logits: -infinity where an expert is forbidden.
  template <class T>
  void level(const Routing<T>& routing) {
    load_.assign(routing.experts(), 0);
    expert_.assign(routing.tokens(), kNone);
    for (Index t = 0; t < routing.tokens(); ++t) {
      if (routing.rows.is_padding(t)) continue;
      Index best = kNone;
      for (const Index e : routing.open) {
        if (routing.is_forbidden(t, e)) continue;
        const bool better =
            best == kNone || load_[e] < load_[best] ||
            (load_[e] == load_[best] && routing.logits(t, e) > routing.logits(t, best));
        if (better) best = e;
      }
      expert_[t] = best;
      ++load_[best];
    }
    for (bool moved = true; moved;) {
      moved = false;
      for (const Index e : routing.open) {
        while (shift_from(e, routing)) moved = true;
      }
    }
  }

  /// The tokens of each expert, [experts].
  const List<Index>& load() const { return load_; }
  /// The expert of a token; -1 for padding.
  Index expert_of(Index token) const { return expert_[token]; }

 private:
  static constexpr Index kNone = -1;

  /// Moves tokens along the shortest chain from `from` to an expert with at least two tokens fewer.
  /// \return         Whether there was one.
  template <class T>
  bool shift_from(Index from, const Routing<T>& routing) {
    Index least = load_[from];
    for (const Index e : routing.open) least = std::min(least, load_[e]);
    if (least > load_[from] - 2) return false;
    mover_.assign(routing.experts(), kNone);
    queue_.assign(1, from);
    for (Index next = 0; next < queue_.count(); ++next) {
      const Index e = queue_[next];
      for (Index t = 0; t < routing.tokens(); ++t) {
        if (expert_[t] != e) continue;
        for (const Index f : routing.open) {
          if (f == from || mover_[f] != kNone || routing.is_forbidden(t, f)) continue;
          mover_[f] = t;
          if (load_[f] <= load_[from] - 2) {
            shift(from, f);
            return true;
          }
          queue_.push_back(f);
        }
      }
    }
    return false;
  }

  /// Moves the tokens that led from `from` to `to`.
  void shift(Index from, Index to) {
    --load_[from];
    ++load_[to];
    while (to != from) {
      const Index token = mover_[to];
      const Index before = expert_[token];
      expert_[token] = to;
      to = before;
    }
  }

  List<Index> load_;    // [experts]
  List<Index> expert_;  // [tokens]
  List<Index> mover_;   // [experts], the token by which the search came to each, or kNone.
  List<Index> queue_;   // Of experts that the search has come to.
};

}  // namespace weir
