// SPDX-License-Identifier: MIT
/// \file
/// What experts that are spread over ranks talk through, and how.
#pragma once

#include <weir/core/types.hpp>
#include <weir/parallel/mpi/communicator.hpp>
#include <weir/parallel/mpi/exchange.hpp>
#include <weir/parallel/row_format.hpp>
#include <weir/parallel/timeline.hpp>

namespace weir {

/// What the layers of a model talk through, one after the other. Shared by all of them.
struct ExpertChannels {
  explicit ExpertChannels(const Communicator& ranks)
      : counts(ranks),
        dispatch(ranks),
        combine(ranks),
        dispatch_across(ranks),
        combine_across(ranks),
        dispatch_on(ranks) {}

  Channel counts, dispatch, combine;
  Channel dispatch_across, combine_across;  ///< Between nodes, where rows go in two levels.
  Channel dispatch_on;  ///< Where rows cross to a node once: from the rank that got them on.

  /// Where spans of time go, if anywhere: "experts"; "meanwhile", what is computed while tokens
  /// travel, such as shared experts; and for each chunk "dispatch 0", "combine 0", from the moment
  /// its messages set out until they were found to be here. They are looked for between the chunks,
  /// and while a rank waits.
  Timeline* timeline = nullptr;
};

/// Settings of ExpertParallel; the same on all ranks.
struct ExpertParallelConfig {
  /// In how many parts the rows travel. While the experts of one part compute, the rows of the next
  /// parts and the results of those before travel. More than a rank has experts do not help.
  Index chunks = 2;
  /// What rows are written as on the way to the experts: tokens, and in `backward` gradients.
  RowFormat dispatch_format = RowFormat::kFull;
  /// The same of the way back. DeepSeek-V3: kFp8 out, kBfloat16 back.
  RowFormat combine_format = RowFormat::kFull;
  /// Whether rows go inside their node first, then across, see RowExchange: for nodes of many
  /// ranks, all of the same number.
  bool two_level = false;
  /// Whether a token goes to each node once, to the rank there that has the place of its own, and
  /// from there on to the ranks with its experts, once to each, as DeepSeek-V3 does (section
  /// 3.2.2), instead of once to each expert: see RowsSent::kPerNode. That is so of tokens in
  /// `forward`; what experts make of them, and all that travels in `backward`, are rows of their
  /// own for each expert, whose bits do not depend on this setting, and go in two levels. For nodes
  /// that all have the same number of ranks.
  bool once_per_node = false;
};

}  // namespace weir
