// SPDX-License-Identifier: MIT
/// \file
/// Finite differences of balancing losses through selectors.
#pragma once

#include <weir/core/pass.hpp>
#include <weir/core/types.hpp>

#include "support/catch.hpp"
#include "support/gradient.hpp"
#include "support/matrices.hpp"
#include "support/routing.hpp"

namespace weir::test {

/// Compares the gradient of a balancer's loss with respect to the logits, through `selector`, with
/// finite differences. `tolerance` is relative to the norm of the gradient.
template <class Selector, class Balancer>
void check_logit_gradient(const Selector& selector, const Balancer& balancer, Matrix<double> logits,
                          const Pass& pass = {}, double tolerance = 1e-6) {
  const Matrix<double> analytic = logit_gradient(selector, balancer, logits, pass);
  const Matrix<double> numeric =
      numeric_gradient(logits, [&] { return loss_of(balancer, route(selector, logits, pass)); });
  CHECK(relative_error(analytic, numeric) <= tolerance);
}

}  // namespace weir::test
