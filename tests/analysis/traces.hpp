// SPDX-License-Identifier: MIT
/// \file
/// Traces made by hand.
#pragma once

#include <vector>

#include <weir/analysis/trace_recorder.hpp>
#include <weir/core/pass.hpp>
#include <weir/core/pass_record.hpp>
#include <weir/core/types.hpp>
#include <weir/moe/selector/softmax_top_k.hpp>

#include "support/routing.hpp"

namespace weir::test {

/// A routing of tokens that choose `experts[t]` in this order, of `count` experts.
inline Routing<double> routing_of(const std::vector<std::vector<Index>>& experts, Index count,
                                  const Pass& pass = {}) {
  const auto tokens = static_cast<Index>(experts.size());
  Matrix<double> logits = Matrix<double>::Constant(tokens, count, -20.0);
  for (Index t = 0; t < tokens; ++t) {
    const auto& own = experts[static_cast<std::size_t>(t)];
    for (std::size_t i = 0; i < own.size(); ++i) logits(t, own[i]) = 5.0 - static_cast<double>(i);
  }
  const auto k = static_cast<Index>(experts.empty() ? 1 : experts[0].size());
  return route(SoftmaxTopK<double>({.k = k}), logits, pass);
}

/// Shows a routing as that of the layer `layers.N.moe`.
inline void show(PassRecord& record, Index layer, const Routing<double>& routing,
                 const Pass& pass = {}) {
  const PassRecord::Scope scope(&record, "layers", layer);
  const PassRecord::Scope moe(&record, "moe");
  record.show(routing, pass);
}

}  // namespace weir::test
