// SPDX-License-Identifier: MIT
/// \file
/// The bias that enters the choice of experts and nothing else.
#pragma once

#include <cmath>
#include <concepts>
#include <string_view>

#include <weir/core/error.hpp>
#include <weir/core/parameter.hpp>
#include <weir/core/types.hpp>

namespace weir {

/// A selector with a bias that enters the choice of experts and nothing else.
template <class S>
concept BiasedSelector = requires(S& selector) {
  { selector.selection_bias() } -> std::same_as<Buffer<typename S::Scalar>&>;
};

/// \throws ConfigError     unless the bias is [1, experts].
/// \throws NonFiniteError  if it is not finite.
template <class T>
void expect_selection_bias(std::string_view who, const Buffer<T>& bias, Index experts) {
  if (bias.value.rows() != 1 || bias.value.cols() != experts) {
    throw_error<ConfigError>(who, ": the bias is ", shape_of(bias.value), ", expected [1, ",
                             experts, "]");
  }
  for (Index e = 0; e < experts; ++e) {
    if (!std::isfinite(bias.value(0, e))) {
      throw_error<NonFiniteError>(who, ": bias[", e, "] = ", bias.value(0, e),
                                  ", expected a finite number");
    }
  }
}

}  // namespace weir
