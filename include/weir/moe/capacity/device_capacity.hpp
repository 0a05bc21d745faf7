// SPDX-License-Identifier: MIT
/// \file
/// A budget for each group of experts: the device-level token dropping of DeepSeek-V2.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>

#include <weir/core/error.hpp>
#include <weir/moe/capacity/overflow.hpp>
#include <weir/moe/routing.hpp>

namespace weir {

/// The experts are cut into `devices` contiguous groups of the same size. In training, the experts
/// of one device together take at most
///
///     B = ceil(factor * A / devices)
///
/// assignments of the pass, A being the number of all assignments. Beyond it, those with the lowest
/// affinity are dropped: the lowest probability p_te, of equal ones the later. A sequence is
/// protected with the chance `protected_share`, drawn for each sequence of each pass: what it was
/// assigned is never dropped, but does use up the budget, so that a device can exceed it. In
/// evaluation nothing is dropped, unless `evaluate` is set.
///
/// (DeepSeek-AI 2024, arXiv:2405.04434, section 2.2.4, with factor 1 and about 10 % of the
/// sequences. The paper drops "tokens" and leaves open what is dropped of a token with several
/// experts on a device: here, each of its assignments is judged for itself. The code has not been
/// released.)
///
/// Not causal. Assignments that are not kept already use up nothing, and are not in A.
struct DeviceCapacity {
  Index devices = 8;
  double factor = 1.0;
  double protected_share = 0.1;  ///< 0: no sequence, and no `pass.rng` is needed.
  bool evaluate = false;         ///< Drop in evaluation, too.
  OnDrop on_drop = OnDrop::kZero;

  /// \throws ConfigError  unless devices >= 1, factor is finite and > 0, and protected_share is in
  ///                      [0, 1].
  void check() const {
    expect_at_least<Index>("DeviceCapacity", "devices", devices, 1);
    if (!(factor > 0.0 && std::isfinite(factor))) {
      fail<ConfigError>("DeviceCapacity: factor = ", factor, ", expected a finite number > 0");
    }
    if (!(protected_share >= 0.0 && protected_share <= 1.0)) {
      fail<ConfigError>("DeviceCapacity: protected_share = ", protected_share,
                        ", expected 0 <= protected_share <= 1");
    }
  }

  /// \throws ConfigError  as `check`; unless the experts divide among the devices; if sequences are
  ///                      to be protected without pass.rng.
  template <class T>
  void apply(Routing<T>& routing) const {
    check();
    const Index experts = routing.experts();
    if (experts % devices != 0) {
      fail<ConfigError>("DeviceCapacity: devices = ", devices,
                        ", expected a divisor of experts = ", experts);
    }
    const bool drops = routing.training || evaluate;
    if (drops) find_affinities(routing);
    routing.pass_dropped = on_drop == OnDrop::kPass;
    if (!drops) return;

    Index assignments = 0;
    for (const std::uint8_t kept : routing.kept) assignments += kept;
    const double exact = factor * static_cast<double>(assignments) / static_cast<double>(devices);
    const auto budget =
        static_cast<Index>(std::min(std::ceil(exact), static_cast<double>(assignments)));
    const Index per_device = experts / devices;
    const auto before = [&](Index a, Index b) {
      const T affinity_a = routing.per_assignment[a];
      const T affinity_b = routing.per_assignment[b];
      return affinity_a != affinity_b ? affinity_a > affinity_b : a < b;
    };
    detail::drop_last(
        routing, 0, routing.assignments(), devices,
        [&](Index expert) { return expert / per_device; }, budget, before,
        [&](Index a) {
          if (routing.per_assignment[a] < kProtected<T>) {
            routing.kept[static_cast<std::size_t>(a)] = 0;
          }
        });
  }

 private:
  /// The affinity of what is protected: no probability reaches it.
  template <class T>
  static constexpr T kProtected = T(2);

  template <class T>
  void find_affinities(Routing<T>& routing) const {
    Rng* const rng = protected_share > 0.0 ? &routing.generator("DeviceCapacity") : nullptr;
    routing.per_assignment.resize(routing.assignments());
    for (Index s = 0; s < routing.sequences.count(); ++s) {
      const bool is_protected = rng != nullptr && rng->uniform() < protected_share;
      for (Index t = routing.sequences.begin(s); t < routing.sequences.end(s); ++t) {
        for (Index a = routing.first(t); a < routing.last(t); ++a) {
          routing.per_assignment[a] =
              is_protected ? kProtected<T>
                           : routing.probabilities(t, routing.expert[static_cast<std::size_t>(a)]);
        }
      }
    }
  }
};

}  // namespace weir
