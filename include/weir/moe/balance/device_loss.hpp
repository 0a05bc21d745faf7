// SPDX-License-Identifier: MIT
/// \file
/// Device-level balancing loss of DeepSeek-V2 (DeepSeek-AI 2024, arXiv:2405.04434, eq. 26-28).
#pragma once

#include <algorithm>
#include <concepts>
#include <string_view>

#include <weir/moe/balance/expert_groups.hpp>
#include <weir/moe/balance/priced_probability.hpp>
#include <weir/moe/routing.hpp>

namespace weir {

/// Rewards a router for giving the same amount of work to all devices:
///
///     loss = coefficient * sum_i f'_i P'_i
///     f'_i = 1 / |E_i| * sum_{j in E_i} f_j,    P'_i = sum_{j in E_i} P_j
///
/// E_i are the experts of device i, f_j = experts / (k T) * c_j with c_j the assignments to expert
/// j before any are dropped, and P_j the mean probability of expert j. It is reckoned for each
/// sequence, as in the paper, and averaged; or over the batch. At uniform load the loss is the
/// coefficient. f' is constant to the derivative. Padding is not counted; without real tokens the
/// loss is zero.
template <std::floating_point T>
struct DeviceLoss {
  static constexpr std::string_view kName = "device";

  ExpertGroups devices;
  T coefficient = T(0.05);
  Scope scope = Scope::kSequence;

  /// \throws ConfigError  if the coefficient is negative.
  void check() const { expect_at_least("DeviceLoss", "coefficient", coefficient, T(0)); }

  /// \return         The loss, already scaled by `coefficient`.
  /// \throws ConfigError  if `devices` has another number of experts than the routing.
  T loss(const Routing<T>& routing) const {
    devices.expect_experts("DeviceLoss", routing.experts());
    return coefficient * priced_probability(routing, scope, work(routing));
  }

  /// Adds d(loss)/d(probabilities).
  void add_gradient(const Routing<T>& routing, RoutingGradient<T>& gradient) const {
    devices.expect_experts("DeviceLoss", routing.experts());
    add_priced_probability_gradient(routing, scope, coefficient, work(routing), gradient);
  }

 private:
  /// f' of the device of each expert.
  auto work(const Routing<T>& routing) const {
    return [&routing, this](Index begin, Index end, Index /*tokens*/, RowVector<T>& f) {
      f.setZero(routing.experts());
      routing.add_load(begin, end, f);
      f *= static_cast<T>(routing.experts()) / std::max(f.sum(), T(1));
      RowVector<T>& of_device = routing.scratch[2];
      of_device.setZero(devices.count());
      for (Index e = 0; e < routing.experts(); ++e) of_device[devices.group_of(e)] += f[e];
      for (Index e = 0; e < routing.experts(); ++e) {
        const Index device = devices.group_of(e);
        f[e] = of_device[device] / static_cast<T>(devices.size(device));
      }
    };
  }
};

}  // namespace weir
