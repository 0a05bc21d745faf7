// SPDX-License-Identifier: MIT
/// \file
/// What happens to the assignments beyond an expert's capacity; shared by the policies that have
/// one.
#pragma once

#include <algorithm>
#include <cstdint>
#include <numeric>

#include <weir/core/list.hpp>
#include <weir/core/pass.hpp>
#include <weir/core/random.hpp>
#include <weir/core/token_rows.hpp>
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

  /// The largest weights come first; among equal ones, the earlier token does. Not causal.
  /// (Megatron-Core's "probs".)
  kProbability,

  /// Batch-prioritised routing: as rank-major, but with the tokens in descending order of their
  /// largest probability max_e p_te, e among the token's experts; among equal ones, the earlier
  /// token comes first. Not causal, not even for k = 1. (Riquelme et al. 2021, arXiv:2106.05974,
  /// section 4.1.)
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

/// The working space of a capacity policy, and its cache if it keeps nothing else.
template <class T>
struct OverflowSpace {
  List<Index> count;   ///< One number for each expert, or each bin.
  List<Index> listed;  ///< Tokens or assignments in the order that matters.
  List<T> priority;    ///< One for each token or assignment; the larger comes first.
};

namespace detail {

/// The strict order of assignments or tokens by `value(i)`, the largest first; equal ones come in
/// their own order.
template <class Value>
auto larger_first(Value value) {
  return [value](Index i, Index j) {
    const auto value_i = value(i);
    const auto value_j = value(j);
    return value_i != value_j ? value_i > value_j : i < j;
  };
}

/// Sorts the kept assignments `first` to `last` into bins; the `capacity` of each bin that come
/// first in the strict total order `before` stay, and `drop(a)` is called for each other one.
/// `bin_of(expert)` is in [0, bins).
template <class T, class Bin, class Before, class Drop>
void drop_last(const Routing<T>& routing, Index first, Index last, Index bins, const Bin& bin_of,
               Index capacity, const Before& before, const Drop& drop, OverflowSpace<T>& space) {
  const auto for_each_kept = [&](auto&& body) {
    for (Index a = first; a < last; ++a) {
      if (routing.kept[a] != 0) body(a, bin_of(routing.expert[a]));
    }
  };
  // First where each bin begins in the list; once it is filled, where it ends.
  List<Index>& end_of = space.count;
  end_of.assign(bins + 1, 0);
  for_each_kept([&](Index, Index bin) { ++end_of[bin + 1]; });
  for (Index bin = 0; bin < bins; ++bin) end_of[bin + 1] += end_of[bin];
  space.listed.reserve(last - first);  // However many are kept, the next time needs no memory.
  space.listed.resize(end_of[bins]);
  Index* const listed = space.listed.data();
  for_each_kept([&](Index a, Index bin) { listed[end_of[bin]++] = a; });

  Index begin = 0;
  for (Index bin = 0; bin < bins; ++bin) {
    const Index end = end_of[bin];
    if (end - begin > capacity) {
      std::nth_element(listed + begin, listed + begin + capacity, listed + end, before);
      for (Index i = begin + capacity; i < end; ++i) drop(listed[i]);
    }
    begin = end;
  }
}

/// Keeps of the assignments `first` to `last` the `capacity` of each expert with the largest
/// `value(a)`, among equal ones the first, and clears `kept` of the others.
template <class T, class Value>
void keep_largest(Routing<T>& routing, Index first, Index last, Index capacity, const Value& value,
                  OverflowSpace<T>& space) {
  drop_last(
      routing, first, last, routing.experts(), [](Index expert) { return expert; }, capacity,
      larger_first(value), [&](Index a) { routing.kept[a] = 0; }, space);
}

/// Sets `priority[t]` of the tokens `begin` to `end` to the largest, or the sum, of the
/// probabilities of the token's experts.
template <class T>
void find_priorities(const Routing<T>& routing, Index begin, Index end, bool sum,
                     List<T>& priority) {
  priority.resize(routing.tokens());
  for (Index t = begin; t < end; ++t) {
    T of_token = T(0);
    for (const Index e : routing.experts_of(t)) {
      const T p = routing.probabilities(t, e);
      of_token = sum ? of_token + p : std::max(of_token, p);
    }
    priority[t] = of_token;
  }
}

/// Gives places to the kept assignments that it is told, one after the other, and clears `kept`
/// where an expert has no place left.
template <class T>
class Admission {
 public:
  /// \param count    For the number of taken places of each expert.
  Admission(Routing<T>& routing, Index capacity, List<Index>& count)
      : routing_(routing), capacity_(capacity), count_(count) {
    count_.assign(routing.experts(), 0);
  }

  void admit(Index a);

  /// The first choices of all tokens, then the second, and so on. `token(i)` is who is number i of
  /// `tokens`.
  template <class Token>
  void admit_by_rank(Index tokens, Token&& token) {
    const auto choices = [&](Index t) { return routing_.last(t) - routing_.first(t); };
    Index ranks = 0;
    for (Index i = 0; i < tokens; ++i) ranks = std::max(ranks, choices(token(i)));
    for (Index r = 0; r < ranks; ++r) {
      for (Index i = 0; i < tokens; ++i) {
        const Index t = token(i);
        if (r < choices(t)) admit(routing_.first(t) + r);
      }
    }
  }

 private:
  Routing<T>& routing_;
  Index capacity_;
  List<Index>& count_;
};

template <class T>
void Admission<T>::admit(Index a) {
  if (routing_.kept[a] == 0) return;
  Index& count = count_[routing_.expert[a]];
  if (count < capacity_) {
    ++count;
  } else {
    routing_.kept[a] = 0;
  }
}

}  // namespace detail

/// Calls `body(begin, end)` for the tokens of each group that shares a capacity: those that `scope`
/// makes, each cut into pieces of `group_size` rows unless that is 0. The last piece may be
/// shorter. Padding takes a row, as in Mesh TensorFlow (transformer/moe.py) and flaxformer
/// (moe_layers.py), which reshape all positions of the batch to [groups, group_size].
template <class Body>
void for_each_capacity_group(const TokenRows& rows, Scope scope, Index group_size, Body&& body) {
  rows.for_each_group(scope, [&](Index begin, Index end) {
    if (group_size == 0) return body(begin, end);
    for (Index piece = begin; piece < end;) {
      const Index last = piece + std::min(group_size, end - piece);
      body(piece, last);
      piece = last;
    }
  });
}

/// Clears `kept` of the assignments of the tokens `begin` to `end` beyond the first `capacity` of
/// each expert, in the given order. Assignments that are not kept already take no place. What is
/// kept stays where it is: no expert is padded to its capacity, as Mesh TensorFlow, Tutel and (on
/// demand) Megatron-Core pad it, with the same result.
/// \throws ConfigError  if a random order has no pass.rng in training.
template <class T>
void drop_overflow(const Pass& pass, Routing<T>& routing, Index begin, Index end, Index capacity,
                   DropOrder order, OverflowSpace<T>& space) {
  const Index first = routing.first(begin);
  const Index last = routing.offsets[end];
  const Index tokens = end - begin;
  if (order == DropOrder::kRandom && !pass.training) order = DropOrder::kRankMajor;
  switch (order) {
    case DropOrder::kRankMajor: {
      detail::Admission admission(routing, capacity, space.count);
      admission.admit_by_rank(tokens, [&](Index i) { return begin + i; });
      break;
    }
    case DropOrder::kTokenMajor: {
      detail::Admission admission(routing, capacity, space.count);
      for (Index a = first; a < last; ++a) admission.admit(a);
      break;
    }
    case DropOrder::kProbability: {
      const auto weight = [&](Index a) { return routing.weight[a]; };
      detail::keep_largest(routing, first, last, capacity, weight, space);
      break;
    }
    case DropOrder::kBatchPrioritised:
    case DropOrder::kBatchPrioritisedSum: {
      const bool sum = order == DropOrder::kBatchPrioritisedSum;
      detail::find_priorities(routing, begin, end, sum, space.priority);
      List<Index>& listed = space.listed;
      listed.resize(tokens);
      std::iota(listed.begin(), listed.end(), begin);
      const auto priority = [&](Index t) { return space.priority[t]; };
      std::sort(listed.begin(), listed.end(), detail::larger_first(priority));
      detail::Admission admission(routing, capacity, space.count);
      admission.admit_by_rank(tokens, [&](Index i) { return listed[i]; });
      break;
    }
    case DropOrder::kRandom: {
      const Rng draws = pass.generator("DropOrder::kRandom").split();
      const auto draw = [&](Index a) { return draws.at(static_cast<std::uint64_t>(a - first)); };
      detail::keep_largest(routing, first, last, capacity, draw, space);
      break;
    }
  }
}

}  // namespace weir

#ifdef WEIR_COMPILED
extern template class weir::detail::Admission<float>;
extern template class weir::detail::Admission<double>;
#endif
