// SPDX-License-Identifier: MIT
/// \file
/// The squared coefficient of variation, which says how uneven numbers are.
#pragma once

#include <weir/core/types.hpp>

namespace weir {

/// Which variance a coefficient of variation is made of.
enum class Variance {
  kPopulation,  ///< Divided by n: tensor2tensor, the code of Shazeer et al.
  kSample,      ///< Divided by n - 1: PyTorch's habit, hence most ports. Zero for one value.
};

/// CV(v)^2 = Var(v) / (Mean(v)^2 + 1e-10), and its gradient.
/// \param gradient  [1, n]; null: not wanted.
template <class T>
T squared_variation(const RowVector<T>& v, Variance variance, RowVector<T>* gradient = nullptr) {
  constexpr T kEpsilon = T(1e-10);
  const auto n = static_cast<T>(v.size());
  const T divisor = variance == Variance::kPopulation ? n : n - T(1);
  if (gradient != nullptr) gradient->setZero(v.size());
  if (!(divisor > T(0))) return T(0);
  const T mean = v.sum() / n;
  const T var = (v.array() - mean).square().sum() / divisor;
  const T scale = mean * mean + kEpsilon;
  if (gradient != nullptr) {
    // dVar/dv_e = 2 (v_e - mean) / divisor;  dMean/dv_e = 1 / n.
    *gradient =
        (T(2) / (divisor * scale)) * (v.array() - mean) - T(2) * mean * var / (n * scale * scale);
  }
  return var / scale;
}

}  // namespace weir
