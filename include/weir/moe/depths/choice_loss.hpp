// SPDX-License-Identifier: MIT
/// \file
/// How well logits foretell which tokens are chosen: binary cross entropy, for MixtureOfDepths.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <span>

#include <weir/core/types.hpp>

namespace weir {

/// The mean over real tokens of the binary cross entropy of their logits r,
///
///     BCE(r_t, c_t) = -c_t log sigmoid(r_t) - (1 - c_t) log(1 - sigmoid(r_t))
///
/// Zero without real tokens. Finite for any finite logit.
/// \param logits   [tokens, 1]
/// \param chosen   [tokens], c: 1 for what was chosen, else 0.
/// \param real     [tokens], 0 for padding, which is not counted.
template <class T>
double choice_loss(MatrixIn<T> logits, std::span<const std::uint8_t> chosen,
                   std::span<const std::uint8_t> real) {
  double sum = 0.0;
  Index count = 0;
  for (std::size_t t = 0; t < real.size(); ++t) {
    if (real[t] == 0) continue;
    const auto r = static_cast<double>(logits(static_cast<Index>(t), 0));
    sum += std::max(r, 0.0) - r * chosen[t] + std::log1p(std::exp(-std::abs(r)));
    ++count;
  }
  return count > 0 ? sum / static_cast<double>(count) : 0.0;
}

/// d_logits = factor * d(choice_loss)/d(logits) = factor * (sigmoid(r) - c) / (real tokens), and
/// zero for padding; [tokens, 1], of the size of `logits`.
template <class T>
void choice_loss_backward(MatrixIn<T> logits, std::span<const std::uint8_t> chosen,
                          std::span<const std::uint8_t> real, T factor, MatrixOut<T> d_logits) {
  const auto padding = std::count(real.begin(), real.end(), std::uint8_t{0});
  const auto count = static_cast<T>(static_cast<Index>(real.size()) - padding);
  for (std::size_t t = 0; t < real.size(); ++t) {
    const auto row = static_cast<Index>(t);
    const T probability = T(1) / (T(1) + std::exp(-logits(row, 0)));
    d_logits(row, 0) =
        real[t] == 0 ? T(0) : factor * (probability - static_cast<T>(chosen[t])) / count;
  }
}

}  // namespace weir
