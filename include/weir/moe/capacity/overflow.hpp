// SPDX-License-Identifier: MIT
/// \file
/// What happens to the assignments beyond an expert's capacity; shared by the policies that have
/// one.
#pragma once

#include <algorithm>
#include <cstdint>
#include <numeric>
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

  /// Batch-prioritised routing: as rank-major, but with the tokens in descending order of their
  /// largest probability max_e p_te, e among the token's experts; equal ones: the earlier token.
  /// Not causal, not even for k = 1. (Riquelme et al. 2021, arXiv:2106.05974, section 4.1.)
  kBatchPrioritised,

  /// The same by the sum of the probabilities of the token's experts, which the authors found to do
  /// as well. The probabilities are the router's, so that renormalised weights, whose sum is the
  /// same for every token, make no difference. Not causal.
  kBatchPrioritisedSum,

  /// In training, each assignment draws a number, and an expert keeps the assignments with the
  /// largest: every set of them is equally likely. Needs `pass.rng`; another pass draws anew. Not
  /// causal. In evaluation nothing is drawn, and the order is rank-major. (DeepSpeed's random token
  /// selection, Kim et al. 2021, arXiv:2109.10465, for k = 1; DeepSpeed draws in evaluation, too.)
  kRandom,
};

/// What an assignment yields whose expert is full.
enum class OnDrop {
  kZero,  ///< Nothing: the residual carries the token (Switch, GShard, Megatron-Core).
  kPass,  ///< weight * x, as if the expert were the identity (Hugging Face's Switch until 2025).
};

namespace detail {

/// Of the kept assignments `first` to `last`, the `capacity` of each bin that come first in the
/// strict total order `before` stay; calls `drop(a)` for each of the others. `bin_of(expert)` is in
/// [0, bins).
template <class T, class Bin, class Before, class Drop>
void drop_last(Routing<T>& routing, Index first, Index last, Index bins, const Bin& bin_of,
               Index capacity, const Before& before, const Drop& drop) {
  const auto for_each_kept = [&](auto&& body) {
    for (Index a = first; a < last; ++a) {
      const auto i = static_cast<std::size_t>(a);
      if (routing.kept[i] != 0) body(a, static_cast<std::size_t>(bin_of(routing.expert[i])));
    }
  };
  // The kept assignments bin by bin; before them, where those of each bin end.
  const auto count = static_cast<std::size_t>(bins);
  std::vector<Index>& work = routing.workspace;
  work.reserve(count + 1 + static_cast<std::size_t>(last - first));
  work.assign(count + 1, 0);
  for_each_kept([&](Index, std::size_t bin) { ++work[bin + 1]; });
  for (std::size_t bin = 0; bin < count; ++bin) work[bin + 1] += work[bin];
  work.resize(count + 1 + static_cast<std::size_t>(work[count]));
  Index* const lists = work.data() + count + 1;
  for_each_kept([&](Index a, std::size_t bin) { lists[work[bin]++] = a; });

  Index begin = 0;
  for (std::size_t bin = 0; bin < count; ++bin) {
    const Index end = work[bin];
    if (end - begin > capacity) {
      std::nth_element(lists + begin, lists + begin + capacity, lists + end, before);
      for (Index i = begin + capacity; i < end; ++i) drop(lists[i]);
    }
    begin = end;
  }
}

/// Clears `kept` of the assignments `first` to `last` but for the `capacity` of each expert with
/// the largest `value(a)`, of equal ones the first.
template <class T, class Value>
void keep_largest(Routing<T>& routing, Index first, Index last, Index capacity,
                  const Value& value) {
  const auto before = [&](Index a, Index b) {
    const auto value_a = value(a);
    const auto value_b = value(b);
    return value_a != value_b ? value_a > value_b : a < b;
  };
  drop_last(
      routing, first, last, routing.experts(), [](Index expert) { return expert; }, capacity,
      before, [&](Index a) { routing.kept[static_cast<std::size_t>(a)] = 0; });
}

/// Puts into `routing.per_token` the largest, or the sum, of the probabilities of each token's
/// experts.
template <class T>
void find_priorities(const Routing<T>& routing, Index begin, Index end, bool sum) {
  routing.per_token.resize(routing.tokens());
  for (Index t = begin; t < end; ++t) {
    T priority = T(0);
    for (Index a = routing.first(t); a < routing.last(t); ++a) {
      const T p = routing.probabilities(t, routing.expert[static_cast<std::size_t>(a)]);
      priority = sum ? priority + p : std::max(priority, p);
    }
    routing.per_token[t] = priority;
  }
}

}  // namespace detail

/// Calls `body(begin, end)` for the tokens of each group that shares a capacity: those that `scope`
/// makes, each cut into pieces of `group_size` rows unless that is 0. The last piece may be
/// shorter. Padding takes a row, as it does in Mesh TensorFlow.
template <class T, class Body>
void for_each_capacity_group(const Routing<T>& routing, Scope scope, Index group_size,
                             Body&& body) {
  routing.for_each_group(scope, [&](Index begin, Index end) {
    if (group_size == 0) return body(begin, end);
    for (Index piece = begin; piece < end; piece += group_size) {
      body(piece, std::min(piece + group_size, end));
    }
  });
}

/// Clears `kept` of the assignments of the tokens `begin` to `end` beyond the first `capacity` of
/// each expert, in the given order. Assignments that are not kept already take no place. What is
/// kept stays where it is: no expert is padded to its capacity, as Mesh TensorFlow, Tutel and (on
/// demand) Megatron-Core pad it, with the same result.
/// \throws ConfigError  if a random order has no pass.rng in training.
template <class T>
void drop_overflow(Routing<T>& routing, Index begin, Index end, Index capacity, DropOrder order) {
  std::vector<Index>& work = routing.workspace;
  const auto experts = static_cast<std::size_t>(routing.experts());
  const Index first = routing.first(begin);
  const Index last = routing.offsets[static_cast<std::size_t>(end)];
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
  // `token(i)`: who is number i, 0 <= i < end - begin.
  const auto admit_by_rank = [&](auto&& token) {
    Index ranks = 0;
    for (Index t = begin; t < end; ++t) ranks = std::max(ranks, routing.last(t) - routing.first(t));
    for (Index r = 0; r < ranks; ++r) {
      for (Index i = 0; i < end - begin; ++i) {
        const Index t = token(i);
        if (r < routing.last(t) - routing.first(t)) admit(routing.first(t) + r);
      }
    }
  };

  if (order == DropOrder::kRandom && !routing.training) order = DropOrder::kRankMajor;
  switch (order) {
    case DropOrder::kRankMajor: {
      work.assign(experts, 0);
      admit_by_rank([&](Index i) { return begin + i; });
      break;
    }
    case DropOrder::kTokenMajor: {
      work.assign(experts, 0);
      for (Index a = first; a < last; ++a) admit(a);
      break;
    }
    case DropOrder::kProbability: {
      detail::keep_largest(routing, first, last, capacity,
                           [&](Index a) { return routing.weight[static_cast<std::size_t>(a)]; });
      break;
    }
    case DropOrder::kBatchPrioritised:
    case DropOrder::kBatchPrioritisedSum: {
      detail::find_priorities(routing, begin, end, order == DropOrder::kBatchPrioritisedSum);
      work.assign(experts + static_cast<std::size_t>(end - begin), 0);
      Index* const tokens = work.data() + experts;
      std::iota(tokens, tokens + (end - begin), begin);
      std::sort(tokens, tokens + (end - begin), [&](Index a, Index b) {
        const T priority_a = routing.per_token[a];
        const T priority_b = routing.per_token[b];
        return priority_a != priority_b ? priority_a > priority_b : a < b;
      });
      admit_by_rank([&](Index i) { return tokens[i]; });
      break;
    }
    case DropOrder::kRandom: {
      const Rng draws = routing.generator("DropOrder::kRandom").split();
      detail::keep_largest(routing, first, last, capacity, [&](Index a) {
        return draws.at(static_cast<std::uint64_t>(a - first));
      });
      break;
    }
  }
}

}  // namespace weir
