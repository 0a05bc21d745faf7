// SPDX-License-Identifier: MIT
/// \file
/// Every kind of selector by name.
#pragma once

#include <vector>

#include <weir/moe/selector/balanced_assignment.hpp>
#include <weir/moe/selector/expert_choice.hpp>
#include <weir/moe/selector/hierarchical_top_k.hpp>
#include <weir/moe/selector/relaxed_top_k.hpp>
#include <weir/moe/selector/sinkhorn.hpp>
#include <weir/moe/selector/sparse_mixer.hpp>
#include <weir/moe/selector/straight_through.hpp>

#include "support/stages.hpp"

namespace weir::test {

/// The selectors of `selectors`, and those that finite differences cannot check. None chooses more
/// than three experts of kExperts.
template <class T>
std::vector<Named<AnySelector<T>>> every_selector() {
  using S = AnySelector<T>;
  auto all = selectors<T>();
  const GroupLimit best_half{.count = 2, .allowed = 1, .summed = 1};
  all.push_back({"sinkhorn", [](Rng&) -> S { return Sinkhorn<T>({.k = 2}); }});
  all.push_back({"sparse_mixer", [](Rng&) -> S { return SparseMixer<T>(); }});
  all.push_back({"relaxed", [](Rng&) -> S { return RelaxedTopK<T>({.k = 2}); }});
  all.push_back({"straight_through in a group", [=](Rng&) -> S {
                   return StraightThrough<T>({.k = 1, .renormalise = true, .groups = best_half});
                 }});
  all.push_back({"softmax_top_k in a group", [=](Rng&) -> S {
                   return SoftmaxTopK<T>({.k = 1, .renormalise = true, .groups = best_half});
                 }});
  all.push_back({"sigmoid_top_k in a group", [=](Rng&) -> S {
                   return SigmoidTopK<T>(kExperts, {.k = 1, .groups = best_half});
                 }});
  all.push_back({"hierarchical_top_k", [](Rng&) -> S {
                   return HierarchicalTopK<T>({.groups = 2, .group_k = 1, .k = 1});
                 }});
  all.push_back({"batch: balanced_assignment", [](Rng&) -> S { return BalancedAssignment<T>(); }});
  all.push_back({"batch: expert_choice", [](Rng&) -> S { return ExpertChoice<T>({.factor = 1}); }});
  all.push_back({"batch: expert_choice over tokens", [](Rng&) -> S {
                   return ExpertChoice<T>({.factor = 1, .over = ScoresOver::kTokens});
                 }});
  return all;
}

}  // namespace weir::test
