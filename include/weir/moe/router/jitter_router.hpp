// SPDX-License-Identifier: MIT
/// \file
/// Input jitter: any router, fed with a slightly perturbed token during training.
#pragma once

#include <string_view>
#include <utility>

#include <weir/core/error.hpp>
#include <weir/moe/concepts.hpp>
#include <weir/moe/router/scaled_input_router.hpp>

namespace weir {

/// Settings of JitterRouter.
struct JitterRouterConfig {
  double epsilon = 0.01;
};

/// 1 + epsilon * (2 u - 1).
struct JitterFactor {
  static constexpr std::string_view kForward = "JitterRouter::forward";
  static constexpr std::string_view kBackward = "JitterRouter::backward";
  JitterRouterConfig config;

  bool is_one() const { return config.epsilon == 0.0; }
  double operator()(double u) const { return 1.0 + config.epsilon * (2.0 * u - 1.0); }
};

/// In training, the router sees
///
///     x_r = x * u,    u ~ U[1 - epsilon, 1 + epsilon], one draw per element
///
/// and the experts see x. Otherwise it is the inner router. (Fedus et al. 2021, arXiv:2101.03961,
/// section 2.4, epsilon = 0.01.) Needs `pass.rng` in training; the draws do not depend on the
/// number of threads.
template <Router Inner>
class JitterRouter : public ScaledInputRouter<Inner, JitterFactor> {
 public:
  /// \throws ConfigError  unless 0 <= epsilon < 1.
  explicit JitterRouter(Inner inner, JitterRouterConfig config = {})
      : ScaledInputRouter<Inner, JitterFactor>(std::move(inner), {config}) {
    expect_fraction("JitterRouter", "epsilon", config.epsilon);
  }
};

}  // namespace weir
