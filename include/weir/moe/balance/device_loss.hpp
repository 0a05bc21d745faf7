// SPDX-License-Identifier: MIT
/// \file
/// Device-level balancing loss of DeepSeek-V2 (DeepSeek-AI 2024, arXiv:2405.04434, eq. 26-28).
#pragma once

#include <algorithm>
#include <concepts>
#include <string_view>
#include <utility>

#include <weir/core/error.hpp>
#include <weir/moe/balance/expert_groups.hpp>
#include <weir/moe/balance/priced_probability.hpp>
#include <weir/moe/concepts.hpp>
#include <weir/moe/routing.hpp>

namespace weir {

/// Settings of DeviceLoss.
struct DeviceLossConfig {
  double coefficient = 0.05;
  Scope scope = Scope::kSequence;
};

/// Rewards a router for giving the same amount of work to all devices:
///
///     loss = coefficient * sum_i f'_i P'_i
///     f'_i = 1 / |E_i| * sum_{j in E_i} f_j,    P'_i = sum_{j in E_i} P_j
///
/// E_i are the experts of device i, f_j = experts / (k T) * c_j with c_j the assignments to expert
/// j before any are dropped, and P_j the mean probability of expert j. The loss is computed for
/// each sequence, as in the paper, and averaged; or over the batch. At uniform load it is the
/// coefficient. Experts that the pass switches off for all tokens are in no E_i and do not count
/// among `experts`; one that is forbidden to some tokens counts. f' is constant to the derivative.
/// Padding is not counted; without real tokens the loss is zero.
template <std::floating_point T>
class DeviceLoss : public BalancerBase {
 public:
  static constexpr std::string_view kName = "device";
  struct Cache {
    PriceSpace<T> prices;
    RowVector<T> of_device;  ///< [devices], the load.
    RowVector<T> size;       ///< [devices], |E_i|.
  };

  explicit DeviceLoss(ExpertGroups devices, DeviceLossConfig config = {})
      : devices_(std::move(devices)), config_(config) {
    check();
  }

  /// \throws ConfigError  if the coefficient is negative.
  void check() const { expect_at_least("DeviceLoss", "coefficient", config_.coefficient, 0.0); }

  /// \return         The loss, already scaled by `coefficient`.
  /// \throws ConfigError  if `devices` has another number of experts than the routing.
  double forward(const Routing<T>& routing, Cache& cache) const {
    devices_.expect_experts("DeviceLoss", routing.experts());
    return config_.coefficient * static_cast<double>(priced_probability(
                                     routing, config_.scope, work(routing, cache), cache.prices));
  }

  /// Adds `scale` times d(loss)/d(probabilities).
  void backward(const Routing<T>& routing, double scale, RoutingGradient<T>& gradient,
                Cache& cache) const {
    add_priced_probability_gradient(routing, config_.scope,
                                    static_cast<T>(scale * config_.coefficient),
                                    work(routing, cache), cache.prices, gradient);
  }

  const ExpertGroups& devices() const { return devices_; }
  const DeviceLossConfig& config() const { return config_; }

 private:
  /// f' of the device of each expert.
  auto work(const Routing<T>& routing, Cache& cache) const {
    return [&routing, &cache, this](Index begin, Index end, Index /*tokens*/, RowVector<T>& f) {
      set_zero(f, routing.experts());
      routing.add_load(begin, end, f);
      f *= static_cast<T>(routing.open_experts()) / std::max(f.sum(), T(1));
      RowVector<T>& of_device = cache.of_device;
      set_zero(of_device, devices_.count());
      set_zero(cache.size, devices_.count());
      for (const Index e : routing.open) {
        of_device[devices_.group_of(e)] += f[e];
        cache.size[devices_.group_of(e)] += T(1);
      }
      for (const Index e : routing.open) {
        const Index device = devices_.group_of(e);
        f[e] = of_device[device] / cache.size[device];
      }
    };
  }

  ExpertGroups devices_;
  DeviceLossConfig config_;
};

}  // namespace weir
