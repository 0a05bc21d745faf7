// SPDX-License-Identifier: MIT
/// \file
/// What happens to the assignments beyond an expert's capacity; shared by the policies that have
/// one.
#pragma once

#include <algorithm>
#include <vector>

#include <weir/moe/routing.hpp>

namespace weir {

/// Who is served first where an expert has more assignments than capacity.
enum class DropOrder {
  /// The first choices of all tokens, in token order, then the second choices, and so on. Whether a
  /// second choice is kept depends on later tokens' first choices: causal for k = 1 only.
  /// (GShard, arXiv:2006.16668, algorithm 1; Switch.)
  kRankMajor,

  /// Token by token, each with all its choices. An earlier token never depends on a later one:
  /// causal. (DeepSpeed.)
  kTokenMajor,

  /// The largest weights; equal ones: the earlier token. Not causal. (Megatron-Core's "probs".)
  kProbability,
};

/// What an assignment yields whose expert is full.
enum class OnDrop {
  kZero,  ///< Nothing: the residual carries the token (Switch, GShard, Megatron-Core).
  kPass,  ///< weight * x, as if the expert were the identity (Hugging Face's Switch until 2025).
};

/// Clears `kept` of the assignments of the tokens `begin` to `end` beyond the first `capacity` of
/// each expert, in the given order. Assignments that are not kept already take no place.
template <class T>
void drop_overflow(Routing<T>& routing, Index begin, Index end, Index capacity, DropOrder order) {
  std::vector<Index>& work = routing.workspace;
  const auto experts = static_cast<std::size_t>(routing.experts());
  const auto admit = [&](Index assignment) {
    const auto a = static_cast<std::size_t>(assignment);
    if (routing.kept[a] == 0) return;
    Index& count = work[static_cast<std::size_t>(routing.expert[a])];
    if (count < capacity) {
      ++count;
    } else {
      routing.kept[a] = 0;
    }
  };
  work.assign(experts, 0);

  switch (order) {
    case DropOrder::kRankMajor: {
      Index ranks = 0;
      for (Index t = begin; t < end; ++t) {
        ranks = std::max(ranks, routing.last(t) - routing.first(t));
      }
      for (Index r = 0; r < ranks; ++r) {
        for (Index t = begin; t < end; ++t) {
          if (r < routing.last(t) - routing.first(t)) admit(routing.first(t) + r);
        }
      }
      break;
    }
    case DropOrder::kTokenMajor: {
      const Index last = routing.offsets[static_cast<std::size_t>(end)];
      for (Index a = routing.first(begin); a < last; ++a) admit(a);
      break;
    }
    case DropOrder::kProbability: {
      const Index first = routing.first(begin);
      const Index last = routing.offsets[static_cast<std::size_t>(end)];
      for (Index a = first; a < last; ++a) work.push_back(a);
      std::sort(work.begin() + static_cast<Index>(experts), work.end(), [&](Index a, Index b) {
        const T weight_a = routing.weight[static_cast<std::size_t>(a)];
        const T weight_b = routing.weight[static_cast<std::size_t>(b)];
        return weight_a != weight_b ? weight_a > weight_b : a < b;
      });
      for (std::size_t i = experts; i < work.size(); ++i) admit(work[i]);
      break;
    }
  }
}

}  // namespace weir
