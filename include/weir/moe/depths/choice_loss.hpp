// SPDX-License-Identifier: MIT
/// \file
/// How well logits foretell which tokens are chosen: binary cross entropy, for MixtureOfDepths.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <span>

#include <weir/core/token_rows.hpp>
#include <weir/core/types.hpp>

namespace weir {

/// The mean over real tokens of the binary cross entropy of their logits r,
///
///     BCE(r_t, c_t) = -c_t log sigmoid(r_t) - (1 - c_t) log(1 - sigmoid(r_t))
///
/// Zero without real tokens. Finite for any finite logit.
/// \param logits   [tokens, 1]
/// \param chosen   [tokens], c: 1 for what was chosen, else 0.
/// \param rows     Which tokens are padding, which is not counted.
template <class T>
double choice_loss(MatrixIn<T> logits, std::span<const std::uint8_t> chosen,
                   const TokenRows& rows) {
  double sum = 0.0;
  for (Index t = 0; t < rows.count(); ++t) {
    if (rows.is_padding(t)) continue;
    const auto r = static_cast<double>(logits(t, 0));
    const double c = chosen[static_cast<std::size_t>(t)];
    sum += std::max(r, 0.0) - r * c + std::log1p(std::exp(-std::abs(r)));
  }
  return sum / static_cast<double>(std::max<Index>(1, rows.real()));
}

/// d_logits = factor * d(choice_loss)/d(logits) = factor * (sigmoid(r) - c) / (real tokens), and
/// zero for padding; [tokens, 1], of the size of `logits`.
template <class T>
void choice_loss_backward(MatrixIn<T> logits, std::span<const std::uint8_t> chosen,
                          const TokenRows& rows, T factor, MatrixOut<T> d_logits) {
  const auto count = static_cast<T>(rows.real());
  for (Index t = 0; t < rows.count(); ++t) {
    const T probability = T(1) / (T(1) + std::exp(-logits(t, 0)));
    const T c = static_cast<T>(chosen[static_cast<std::size_t>(t)]);
    d_logits(t, 0) = rows.is_padding(t) ? T(0) : factor * (probability - c) / count;
  }
}

}  // namespace weir
