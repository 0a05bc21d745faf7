// SPDX-License-Identifier: MIT
/// \file
/// A budget for each group of experts: the device-level token dropping of DeepSeek-V2.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>

#include <weir/core/error.hpp>
#include <weir/core/pass.hpp>
#include <weir/moe/capacity/overflow.hpp>
#include <weir/moe/concepts.hpp>
#include <weir/moe/routing.hpp>

namespace weir {

/// Settings of DeviceCapacity.
struct DeviceCapacityConfig {
  Index devices = 8;
  double factor = 1.0;
  double protected_share = 0.1;  ///< With 0, no sequence is protected, and no `pass.rng` is needed.
  bool evaluate = false;         ///< Whether evaluation drops, too.
};

/// The experts are cut into `devices` contiguous groups of the same size. In training, the experts
/// of one device together take at most
///
///     B = ceil((A / devices) * factor)
///
/// assignments of the pass, A being the number of all assignments; a device whose experts
/// the pass all switches off for all tokens does not count. Beyond it, those with the lowest
/// affinity are dropped: the lowest probability p_te; among equal ones, the later. A sequence is
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
class DeviceCapacity : public CapacityBase {
 public:
  template <class T>
  using Cache = OverflowSpace<T>;

  /// \throws ConfigError  as `check`.
  explicit DeviceCapacity(DeviceCapacityConfig config = {}) : config_(config) { check(); }

  /// \throws ConfigError  unless devices >= 1, factor is finite and > 0, and protected_share is in
  ///                      [0, 1].
  void check() const {
    expect_at_least<Index>("DeviceCapacity", "devices", config_.devices, 1);
    expect_positive("DeviceCapacity", "factor", config_.factor);
    expect_in("DeviceCapacity", "protected_share", config_.protected_share, 0.0, 1.0);
  }

  /// \throws ConfigError  unless the experts divide among the devices; if sequences are to be
  ///                      protected without pass.rng.
  template <class T>
  void forward(const Pass& pass, Routing<T>& routing, Cache<T>& cache) const {
    const Index experts = routing.experts();
    if (experts % config_.devices != 0) {
      throw_error<ConfigError>("DeviceCapacity: devices = ", config_.devices,
                               ", expected a divisor of experts = ", experts);
    }
    if (!pass.training && !config_.evaluate) return;
    List<T>& affinity = cache.priority;
    find_affinities(pass, routing, affinity);

    Index assignments = 0;
    for (const std::uint8_t kept : routing.kept) assignments += kept;
    const Index per_device = experts / config_.devices;
    Index devices = 0;
    Index last = -1;
    for (const Index e : routing.open) {  // In ascending order.
      if (e / per_device != last) ++devices;
      last = e / per_device;
    }
    if (devices == 0) return;
    const double exact =
        static_cast<double>(assignments) / static_cast<double>(devices) * config_.factor;
    const auto budget =
        static_cast<Index>(std::min(std::ceil(exact), static_cast<double>(assignments)));
    detail::drop_last(
        routing, 0, routing.assignments(), config_.devices,
        [&](Index expert) { return expert / per_device; }, budget,
        detail::larger_first([&](Index a) { return affinity[a]; }),
        [&](Index a) {
          if (affinity[a] < kProtected<T>) routing.kept[a] = 0;
        },
        cache);
  }

  const DeviceCapacityConfig& config() const { return config_; }

 private:
  /// The affinity of what is protected: no probability reaches it.
  template <class T>
  static constexpr T kProtected = T(2);

  /// \param affinity  The result, one per assignment.
  template <class T>
  void find_affinities(const Pass& pass, const Routing<T>& routing, List<T>& affinity) const {
    Rng* const rng = config_.protected_share > 0.0 ? &pass.generator("DeviceCapacity") : nullptr;
    affinity.resize(routing.assignments());
    routing.rows.for_each_group(Scope::kSequence, [&](Index begin, Index end) {
      const bool is_protected = rng != nullptr && rng->uniform() < config_.protected_share;
      for (Index t = begin; t < end; ++t) {
        for (Index a = routing.first(t); a < routing.last(t); ++a) {
          affinity[a] = is_protected ? kProtected<T> : routing.probabilities(t, routing.expert[a]);
        }
      }
    });
  }

  DeviceCapacityConfig config_;
};

}  // namespace weir
