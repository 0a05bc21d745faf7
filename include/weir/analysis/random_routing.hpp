// SPDX-License-Identifier: MIT
/// \file
/// Routing by chance, with which what routers do is compared.
#pragma once

#include <algorithm>
#include <numeric>

#include <weir/analysis/traced_tokens.hpp>
#include <weir/core/list.hpp>
#include <weir/core/random.hpp>
#include <weir/core/types.hpp>

namespace weir {

/// The probability that two tokens share an expert if each is given `first` and `second` different
/// ones of `experts` at random:
///
///     1 - C(experts - first, second) / C(experts, second)
///
/// With one each, it is 1 / experts.
inline double chance_of_shared_expert(Index experts, Index first, Index second) {
  double none = 1.0;
  for (Index i = 0; i < second; ++i) {
    none *=
        std::max(0.0, static_cast<double>(experts - first - i)) / static_cast<double>(experts - i);
  }
  return 1.0 - none;
}

/// The load of the layer's experts if each token chose as many as it did, all different, at random.
inline List<double> random_load(const TracedLayer& layer, Rng& rng) {
  List<double> load(layer.experts);
  List<Index> pool(layer.experts);
  std::iota(pool.begin(), pool.end(), Index(0));
  for (Index t = 0; t < layer.tokens(); ++t) {
    const Index choices = layer.choices(t);
    draw_to_back(pool, choices, rng);
    for (Index c = 0; c < choices; ++c) load[pool[layer.experts - 1 - c]] += 1.0;
  }
  return load;
}

}  // namespace weir
