// SPDX-License-Identifier: MIT
/// \file
/// Where the weights of experts come from that are not in memory all the time.
#pragma once

#include <cstddef>
#include <span>
#include <vector>

#include <weir/core/types.hpp>
#include <weir/moe/dispatch.hpp>
#include <weir/nn/packed_glu.hpp>
#include <weir/ops/activation.hpp>

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

/// Workspace of gated experts that are stored for inference.
template <class T>
struct FetchedGluCache {
  PackedGluCache<T> packed;
  std::vector<PackedGluGroup<T>> groups;
  std::vector<Index> wanted;          ///< Experts with tokens, where they are fetched.
  std::vector<PackedGlu<T>> fetched;  ///< Those that are computed with at the moment.
};

/// Sets the rows of `out` [slots, d_out] to what the experts make of their tokens, some experts
/// after the other where the source has no room for all of them at once.
/// \param x        [tokens, d_in]
template <Activation Act, class T>
void fetched_glu_forward(ExpertSource<T>& source, MatrixIn<T> x, const Dispatch<T>& dispatch,
                         FetchedGluCache<T>& cache, MatrixOut<T> out) {
  source.announce(x);
  cache.wanted.clear();
  dispatch.for_each_expert(
      [&](std::size_t e, Index, Index) { cache.wanted.push_back(static_cast<Index>(e)); });
  std::span<const Index> wanted = cache.wanted;
  while (!wanted.empty()) {
    cache.fetched.clear();
    source.fetch(wanted, cache.fetched);
    const auto now = wanted.first(cache.fetched.size());
    const Index first = dispatch.begin(now.front());  // Their slots follow one another.
    const Index slots = dispatch.end(now.back()) - first;
    cache.groups.clear();
    for (std::size_t i = 0; i < now.size(); ++i) {
      cache.groups.push_back(
          {&cache.fetched[i], dispatch.begin(now[i]) - first, dispatch.rows(now[i])});
    }
    packed_glu_forward<Act, T>(
        slots, [&](Index s) { return &x.coeffRef(dispatch.token(first + s), 0); }, cache.groups,
        cache.packed, out.middleRows(first, slots));
    wanted = wanted.subspan(now.size());
  }
  cache.fetched.clear();
}

}  // namespace weir
