// SPDX-License-Identifier: MIT
/// \file
/// Communication balancing loss of DeepSeek-V2 (DeepSeek-AI 2024, arXiv:2405.04434, eq. 29-31).
#pragma once

#include <concepts>
#include <string_view>
#include <utility>

#include <weir/core/error.hpp>
#include <weir/moe/balance/expert_groups.hpp>
#include <weir/moe/balance/priced_probability.hpp>
#include <weir/moe/concepts.hpp>
#include <weir/moe/routing.hpp>

namespace weir {

/// Settings of CommunicationLoss.
struct CommunicationLossConfig {
  Index devices_per_token = 1;  ///< M; 3 of 8 in DeepSeek-V2.
  double coefficient = 0.02;
  Scope scope = Scope::kSequence;
};

/// Rewards a router for sending the same number of tokens to all devices:
///
///     loss = coefficient * sum_i f''_i P''_i
///     f''_i = D / (M T) * |{t : t is sent to device i}|,    P''_i = sum_{j in E_i} P_j
///
/// A token is sent once to a device, however many of its experts are there. D counts the devices, M
/// is the most devices a token is sent to, E_i are the experts of device i and P_j is the mean
/// probability of expert j. The loss is computed for each sequence, as in the paper, and averaged;
/// or over the batch. With M devices for each token and uniform load it is the coefficient. f''
/// counts assignments before any are dropped and is constant to the derivative. A device whose
/// experts the pass all switches off for all tokens is not among the D. Padding is not counted;
/// without real tokens the loss is zero.
template <std::floating_point T>
class CommunicationLoss : public BalancerBase {
 public:
  static constexpr std::string_view kName = "communication";
  struct Cache {
    PriceSpace<T> prices;
    RowVector<T> sent;  ///< [devices]
  };

  explicit CommunicationLoss(ExpertGroups devices, CommunicationLossConfig config = {})
      : devices_(std::move(devices)), config_(config) {
    check();
  }

  /// \throws ConfigError  if the coefficient is negative, or unless
  ///                      1 <= devices_per_token <= devices.
  void check() const {
    expect_at_least("CommunicationLoss", "coefficient", config_.coefficient, 0.0);
    if (config_.devices_per_token < 1 || config_.devices_per_token > devices_.count()) {
      throw_error<ConfigError>("CommunicationLoss: devices_per_token = ", config_.devices_per_token,
                               ", expected 1 <= devices_per_token <= devices = ", devices_.count());
    }
  }

  /// \return         The loss, already scaled by `coefficient`.
  /// \throws ConfigError  if `devices` has another number of experts than the routing.
  double forward(const Routing<T>& routing, Cache& cache) const {
    devices_.expect_experts("CommunicationLoss", routing.experts());
    return config_.coefficient *
           static_cast<double>(
               priced_probability(routing, config_.scope, traffic(routing, cache), cache.prices));
  }

  /// Adds `scale` times d(loss)/d(probabilities).
  void backward(const Routing<T>& routing, double scale, RoutingGradient<T>& gradient,
                Cache& cache) const {
    add_priced_probability_gradient(routing, config_.scope,
                                    static_cast<T>(scale * config_.coefficient),
                                    traffic(routing, cache), cache.prices, gradient);
  }

  const ExpertGroups& devices() const { return devices_; }
  const CommunicationLossConfig& config() const { return config_; }

 private:
  Index device_of(const Routing<T>& routing, Index assignment) const {
    return devices_.group_of(routing.expert[assignment]);
  }

  /// f'' of the device of each expert.
  auto traffic(const Routing<T>& routing, Cache& cache) const {
    return [&routing, &cache, this](Index begin, Index end, Index tokens, RowVector<T>& f) {
      RowVector<T>& sent = cache.sent;
      set_zero(sent, devices_.count());
      for (const Index e : routing.open) sent[devices_.group_of(e)] = T(1);
      const T devices = sent.sum();  // D
      set_zero(sent, devices_.count());
      for (Index t = begin; t < end; ++t) {
        for (Index a = routing.first(t); a < routing.last(t); ++a) {
          const Index device = device_of(routing, a);
          bool again = false;
          for (Index b = routing.first(t); b < a; ++b) {
            again = again || device_of(routing, b) == device;
          }
          if (!again) sent[device] += T(1);
        }
      }
      sent *= devices / static_cast<T>(config_.devices_per_token * tokens);
      set_zero(f, routing.experts());
      for (const Index e : routing.open) f[e] = sent[devices_.group_of(e)];
    };
  }

  ExpertGroups devices_;
  CommunicationLossConfig config_;
};

}  // namespace weir
