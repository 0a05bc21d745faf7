// SPDX-License-Identifier: MIT
/// \file
/// Communication balancing loss of DeepSeek-V2 (DeepSeek-AI 2024, arXiv:2405.04434, eq. 29-31).
#pragma once

#include <concepts>
#include <string_view>

#include <weir/moe/balance/expert_groups.hpp>
#include <weir/moe/balance/priced_probability.hpp>
#include <weir/moe/routing.hpp>

namespace weir {

/// Rewards a router for sending the same number of tokens to all devices:
///
///     loss = coefficient * sum_i f''_i P''_i
///     f''_i = D / (M T) * |{t : t is sent to device i}|,    P''_i = sum_{j in E_i} P_j
///
/// A token is sent once to a device, however many of its experts are there. D counts the devices, M
/// is the most devices a token is sent to, E_i are the experts of device i and P_j the mean
/// probability of expert j. It is reckoned for each sequence, as in the paper, and averaged; or
/// over the batch. With M devices for each token and uniform load the loss is the coefficient. f''
/// counts assignments before any are dropped and is constant to the derivative. Padding is not
/// counted; without real tokens the loss is zero.
template <std::floating_point T>
struct CommunicationLoss {
  static constexpr std::string_view kName = "communication";

  ExpertGroups devices;
  Index devices_per_token = 1;  ///< M; 3 of 8 in DeepSeek-V2.
  T coefficient = T(0.02);
  Scope scope = Scope::kSequence;

  /// \throws ConfigError  if the coefficient is negative, or unless
  ///                      1 <= devices_per_token <= devices.
  void check() const {
    expect_at_least("CommunicationLoss", "coefficient", coefficient, T(0));
    if (devices_per_token < 1 || devices_per_token > devices.count()) {
      fail<ConfigError>("CommunicationLoss: devices_per_token = ", devices_per_token,
                        ", expected 1 <= devices_per_token <= devices = ", devices.count());
    }
  }

  /// \return         The loss, already scaled by `coefficient`.
  /// \throws ConfigError  if `devices` has another number of experts than the routing.
  T loss(const Routing<T>& routing) const {
    devices.expect_experts("CommunicationLoss", routing.experts());
    return coefficient * priced_probability(routing, scope, traffic(routing));
  }

  /// Adds d(loss)/d(probabilities).
  void add_gradient(const Routing<T>& routing, RoutingGradient<T>& gradient) const {
    devices.expect_experts("CommunicationLoss", routing.experts());
    add_priced_probability_gradient(routing, scope, coefficient, traffic(routing), gradient);
  }

 private:
  Index device_of(const Routing<T>& routing, Index assignment) const {
    return devices.group_of(routing.expert[static_cast<std::size_t>(assignment)]);
  }

  /// f'' of the device of each expert.
  auto traffic(const Routing<T>& routing) const {
    return [&routing, this](Index begin, Index end, Index tokens, RowVector<T>& f) {
      RowVector<T>& sent = routing.scratch[2];
      sent.setZero(devices.count());
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
      sent *= static_cast<T>(devices.count()) / static_cast<T>(devices_per_token * tokens);
      f.resize(routing.experts());
      for (Index e = 0; e < routing.experts(); ++e) f[e] = sent[devices.group_of(e)];
    };
  }
};

}  // namespace weir
