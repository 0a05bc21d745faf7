// SPDX-License-Identifier: MIT
/// \file
/// What a balancing loss counts as the load of an expert.
#pragma once

#include <algorithm>

#include <weir/core/index_span.hpp>
#include <weir/core/thread_space.hpp>
#include <weir/core/types.hpp>
#include <weir/moe/routing.hpp>
#include <weir/ops/top_k.hpp>

namespace weir {

/// Which experts of a token a balancing loss counts. The two differ where experts are not chosen by
/// their probabilities alone: with a selection bias, a group limit, noise, or an imposed choice.
enum class LoadCount {
  kAssignments,       ///< Those it was assigned to, dropped or not.
  kTopProbabilities,  ///< Those of the k largest probabilities, k being the number of its
                      ///< assignments; among equal ones those with the lowest index. (DeepSeek-V3,
                      ///< arXiv:2412.19437, eq. 18; Megatron-Core, moe_utils.py,
                      ///< `compute_routing_scores_for_aux_loss`.)
};

/// Adds to `load[e]` how often the tokens `begin` to `end` count for expert e.
/// \param load     [experts]
template <class T, class U>
void add_counted_load(LoadCount count, const Routing<T>& routing, Index begin, Index end,
                      RowVector<U>& load) {
  if (count == LoadCount::kAssignments) return routing.add_load(begin, end, load);
  const Index experts = routing.experts();
  auto& numbers = ThreadSpace<T, LoadCount>::of_this_thread();
  auto& indices = ThreadSpace<Index, LoadCount>::of_this_thread();
  numbers.reserve(experts);
  indices.reserve(experts);
  T* const p = numbers.take(experts);
  Index* const best = indices.take(experts);
  for (Index t = begin; t < end; ++t) {
    const Index k = std::min(routing.last(t) - routing.first(t), experts);
    if (k == 0) continue;
    for (Index e = 0; e < experts; ++e) {
      p[e] = routing.is_forbidden(t, e) ? T(-1) : routing.probabilities(t, e);
    }
    top_k<T>(span_of(p, experts), span_of(best, k));
    for (Index i = 0; i < k; ++i) load[best[i]] += U(1);
  }
}

}  // namespace weir
