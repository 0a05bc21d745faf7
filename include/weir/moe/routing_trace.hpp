// SPDX-License-Identifier: MIT
/// \file
/// The choice of experts of one pass, kept for inspection or replay.
#pragma once

#include <algorithm>
#include <cstdint>
#include <utility>

#include <weir/core/error.hpp>
#include <weir/core/list.hpp>
#include <weir/core/types.hpp>

namespace weir {

template <class T>
struct Routing;

/// Which experts each token of a pass chose, and which of them were kept: a Routing without its
/// numbers, whatever their type. Recorded from a layer's cache, or made from what another program
/// recorded; see Replay.
class RoutingTrace {
 public:
  /// A trace of no tokens and no experts.
  RoutingTrace() = default;

  /// \param offsets  [tokens + 1]; token t has the entries offsets[t] to offsets[t + 1] of the
  ///                 others.
  /// \param expert   One per assignment.
  /// \param kept     One per assignment, 0 if it was dropped. If empty, all are kept.
  /// \throws ConfigError  unless experts >= 1, the offsets ascend from 0 to the number of
  ///                      assignments, and each token's experts differ and are in range.
  RoutingTrace(Index experts, List<Index> offsets, List<Index> expert, List<std::uint8_t> kept = {})
      : experts_(experts),
        offsets_(std::move(offsets)),
        expert_(std::move(expert)),
        kept_(std::move(kept)) {
    if (kept_.empty()) kept_.assign(expert_.count(), 1);
    check();
  }

  /// Copies the choice of a routing, with the drops at the time of the call. Allocates only if
  /// there are more assignments than ever before.
  template <class T>
  void record(const Routing<T>& routing) {
    experts_ = routing.experts();
    offsets_.assign(routing.offsets.begin(), routing.offsets.end());
    expert_.assign(routing.expert.begin(), routing.expert.end());
    kept_.assign(routing.kept.begin(), routing.kept.end());
  }

  Index tokens() const { return offsets_.count() - 1; }
  Index experts() const { return experts_; }
  Index assignments() const { return expert_.count(); }
  Index first(Index token) const { return offsets_[token]; }
  Index last(Index token) const { return offsets_[token + 1]; }
  Index expert(Index assignment) const { return expert_[assignment]; }
  bool kept(Index assignment) const { return kept_[assignment] != 0; }

  const List<Index>& offsets() const { return offsets_; }
  const List<Index>& experts_chosen() const { return expert_; }
  const List<std::uint8_t>& all_kept() const { return kept_; }

  bool operator==(const RoutingTrace&) const = default;

 private:
  void check() const {
    expect_at_least<Index>("RoutingTrace", "experts", experts_, 1);
    if (offsets_.empty() || offsets_.front() != 0 || offsets_.back() != assignments() ||
        !std::is_sorted(offsets_.begin(), offsets_.end())) {
      throw_error<ConfigError>("RoutingTrace: the offsets do not ascend from 0 to the ",
                               assignments(), " assignments");
    }
    if (kept_.size() != expert_.size()) {
      throw_error<ConfigError>("RoutingTrace: kept has ", kept_.size(), " entries, expected ",
                               assignments(), " (one per assignment)");
    }
    for (Index t = 0; t < tokens(); ++t) {
      for (Index a = first(t); a < last(t); ++a) {
        if (expert(a) < 0 || expert(a) >= experts_) {
          throw_error<ConfigError>("RoutingTrace: token ", t, " has expert ", expert(a),
                                   ", expected 0 <= expert < experts = ", experts_);
        }
        const auto begin = expert_.begin() + first(t);
        if (std::find(begin, expert_.begin() + a, expert(a)) != expert_.begin() + a) {
          throw_error<ConfigError>("RoutingTrace: token ", t, " has expert ", expert(a),
                                   " twice, expected it once");
        }
      }
    }
  }

  Index experts_ = 0;
  List<Index> offsets_ = {0};
  List<Index> expert_;
  List<std::uint8_t> kept_;
};

}  // namespace weir
