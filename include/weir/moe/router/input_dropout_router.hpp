// SPDX-License-Identifier: MIT
/// \file
/// Input dropout: any router, fed in training with a token some features of which are missing.
#pragma once

#include <string_view>
#include <utility>

#include <weir/core/error.hpp>
#include <weir/moe/router/scaled_input_router.hpp>

namespace weir {

/// 0 with probability `rate`, else 1 / (1 - rate).
struct DropoutFactor {
  static constexpr std::string_view kForward = "InputDropoutRouter::forward";
  double rate;

  bool is_one() const { return rate == 0.0; }
  double operator()(double u) const { return u < rate ? 0.0 : 1.0 / (1.0 - rate); }
};

/// In training, the router sees
///
///     x_r = x * m,    m = 0 with probability `rate`, else 1 / (1 - rate); one draw per element
///
/// and the experts see x. Otherwise it is the inner router. The policy "input_dropout" of Mesh
/// TensorFlow's mixture of experts (Shazeer et al. 2018, arXiv:1811.02084; one of those that Fedus
/// et al. 2021, arXiv:2101.03961, appendix C, compare). Needs `pass.rng` in training; the draws do
/// not depend on the number of threads.
template <Layer Inner>
class InputDropoutRouter : public ScaledInputRouter<Inner, DropoutFactor> {
 public:
  /// \throws ConfigError  unless 0 <= rate < 1.
  explicit InputDropoutRouter(Inner inner, double rate = 0.1)
      : ScaledInputRouter<Inner, DropoutFactor>(std::move(inner), {rate}) {
    if (!(rate >= 0.0 && rate < 1.0)) {
      fail<ConfigError>("InputDropoutRouter: rate = ", rate, ", expected 0 <= rate < 1");
    }
  }
};

}  // namespace weir
