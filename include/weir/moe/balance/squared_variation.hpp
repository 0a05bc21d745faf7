// SPDX-License-Identifier: MIT
/// \file
/// The squared coefficient of variation, which says how uneven numbers are.
#pragma once

#include <numeric>

#include <weir/core/list.hpp>
#include <weir/core/types.hpp>

namespace weir {

/// Which variance a coefficient of variation is made of.
enum class Variance {
  kPopulation,  ///< Divided by n: tensor2tensor, the code of Shazeer et al.
  kSample,      ///< Divided by n - 1: PyTorch's habit, hence most ports. Zero for one value.
};

/// CV(v)^2 = Var(v) / (Mean(v)^2 + epsilon) of some of the numbers v [1, experts], and its
/// gradient. It is 0 where they are all 0. They are divided by their mean first: with epsilon = 0
/// their scale makes no difference. \param open     Whose numbers count: n of them,
/// `Routing::open`. The others have no gradient. \param gradient  [1, experts]; null: not wanted.
template <class T>
T squared_variation(const RowVector<T>& v, const List<Index>& open, Variance variance,
                    double epsilon = 0.0, RowVector<T>* gradient = nullptr) {
  const auto n = static_cast<T>(open.count());
  const T divisor = variance == Variance::kPopulation ? n : n - T(1);
  if (gradient != nullptr) set_zero(*gradient, v.size());
  if (!(divisor > T(0))) return T(0);
  T mean = T(0);
  for (const Index e : open) mean += v[e];
  mean /= n;
  if (mean == T(0)) return T(0);
  T var = T(0);  // Of v / mean.
  for (const Index e : open) var += (v[e] / mean - T(1)) * (v[e] / mean - T(1)) / divisor;
  // (Mean^2 + epsilon) / Mean^2
  const T excess = T(1) + static_cast<T>(epsilon) / mean / mean;
  if (gradient != nullptr) {
    // dVar/dv_e = 2 (v_e - mean) / divisor;  dMean/dv_e = 1 / n.
    for (const Index e : open) {
      (*gradient)[e] =
          T(2) / (mean * excess) * ((v[e] / mean - T(1)) / divisor - var / (n * excess));
    }
  }
  return var / excess;
}

/// The same of all numbers, with epsilon = 0.
template <class T>
T squared_variation(const RowVector<T>& v, Variance variance, RowVector<T>* gradient = nullptr) {
  List<Index> all(v.size());
  std::iota(all.begin(), all.end(), Index(0));
  return squared_variation<T>(v, all, variance, 0.0, gradient);
}

}  // namespace weir
