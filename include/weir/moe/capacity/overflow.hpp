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

namespace detail {

/// Keeps of the assignments `first` to `last` the `capacity` of each expert that weigh most, of
/// equal ones the first.
template <class T>
void keep_largest(Routing<T>& routing, Index first, Index last, Index capacity) {
  const auto experts = static_cast<std::size_t>(routing.experts());
  const auto for_each_kept = [&](auto&& body) {
    for (Index a = first; a < last; ++a) {
      const auto i = static_cast<std::size_t>(a);
      if (routing.kept[i] != 0) body(a, static_cast<std::size_t>(routing.expert[i]));
    }
  };
  // The kept assignments expert by expert; before them, where those of each expert end.
  std::vector<Index>& work = routing.workspace;
  work.assign(experts + 1, 0);
  for_each_kept([&](Index, std::size_t e) { ++work[e + 1]; });
  for (std::size_t e = 0; e < experts; ++e) work[e + 1] += work[e];
  work.resize(experts + 1 + static_cast<std::size_t>(work[experts]));
  Index* const lists = work.data() + experts + 1;
  for_each_kept([&](Index a, std::size_t e) { lists[work[e]++] = a; });

  const auto before = [&](Index a, Index b) {
    const T weight_a = routing.weight[static_cast<std::size_t>(a)];
    const T weight_b = routing.weight[static_cast<std::size_t>(b)];
    return weight_a != weight_b ? weight_a > weight_b : a < b;
  };
  Index begin = 0;
  for (std::size_t e = 0; e < experts; ++e) {
    const Index end = work[e];
    if (end - begin > capacity) {
      std::nth_element(lists + begin, lists + begin + capacity, lists + end, before);
      for (Index i = begin + capacity; i < end; ++i) {
        routing.kept[static_cast<std::size_t>(lists[i])] = 0;
      }
    }
    begin = end;
  }
}

}  // namespace detail

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
      detail::keep_largest(routing, routing.first(begin),
                           routing.offsets[static_cast<std::size_t>(end)], capacity);
      break;
    }
  }
}

}  // namespace weir
