// SPDX-License-Identifier: MIT
/// \file
/// Where the weights of experts come from that are not in memory all the time.
#pragma once

#include <span>
#include <vector>

#include <weir/core/types.hpp>
#include <weir/nn/packed_glu.hpp>

namespace weir {

/// The gated experts of one bank, whose packed weights are fetched when tokens come to them.
/// Several threads may use one source.
template <class T>
class ExpertSource {
 public:
  ExpertSource() = default;
  ExpertSource(const ExpertSource&) = delete;
  ExpertSource& operator=(const ExpertSource&) = delete;
  virtual ~ExpertSource() = default;

  /// Fetches the first experts of `wanted`, as many as may be in memory at once, at least one.
  /// \param to  Their weights in the same order. They stay in memory while somebody holds them.
  virtual void fetch(std::span<const Index> wanted, std::vector<PackedGlu<T>>& to) = 0;

  /// Learns which tokens x [tokens, d_model] the bank is given, before it fetches experts for them.
  virtual void announce(MatrixIn<T> /*x*/) {}
};

}  // namespace weir
