// SPDX-License-Identifier: MIT
/// \file
/// Input dropout: any router, fed in training with a token some features of which are missing.
#pragma once

#include <string_view>
#include <utility>

#include <weir/core/error.hpp>
#include <weir/moe/concepts.hpp>
#include <weir/moe/router/scaled_input_router.hpp>

namespace weir {

/// Settings of InputDropoutRouter.
struct InputDropoutRouterConfig {
  double rate = 0.1;  ///< The probability with which a feature is missing.
};

/// 0 with probability `rate`, else 1 / (1 - rate).
struct DropoutFactor {
  static constexpr std::string_view kForward = "InputDropoutRouter::forward";
  static constexpr std::string_view kBackward = "InputDropoutRouter::backward";
  InputDropoutRouterConfig config;

  bool is_one() const { return config.rate == 0.0; }
  double operator()(double u) const { return u < config.rate ? 0.0 : 1.0 / (1.0 - config.rate); }
};

/// In training, the router sees
///
///     x_r = x * m,    m = 0 with probability `rate`, else 1 / (1 - rate); one draw per element
///
/// and the experts see x. Otherwise it is the inner router. It is the policy "input_dropout" of
/// Mesh TensorFlow's mixture of experts (Shazeer et al. 2018, arXiv:1811.02084), one of those that
/// Fedus et al. 2021, arXiv:2101.03961, appendix C, compare. Needs `pass.rng` in training; the
/// draws do not depend on the number of threads.
template <Router Inner>
class InputDropoutRouter : public ScaledInputRouter<Inner, DropoutFactor> {
 public:
  /// \throws ConfigError  unless 0 <= rate < 1.
  explicit InputDropoutRouter(Inner inner, InputDropoutRouterConfig config = {})
      : ScaledInputRouter<Inner, DropoutFactor>(std::move(inner), {config}) {
    expect_fraction("InputDropoutRouter", "rate", config.rate);
  }
};

}  // namespace weir
