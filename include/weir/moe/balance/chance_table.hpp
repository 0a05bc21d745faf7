// SPDX-License-Identifier: MIT
/// \file
/// The chances of the options of many noisy choices, and what they add up to.
#pragma once

#include <algorithm>
#include <concepts>
#include <span>

#include <weir/core/parallel.hpp>
#include <weir/core/types.hpp>
#include <weir/moe/balance/noisy_choice.hpp>
#include <weir/ops/lanes.hpp>

namespace weir {

/// The expected load of options by the chances that tokens chose them: workspace of LoadLoss and
/// HierarchicalLoadLoss. Each token has one choice of all options, or one in each group of them.
template <std::floating_point T>
struct ChanceTable {
  Matrix<T> chance;      ///< [tokens, options], -1 where the token made no choice of the option's.
  RowVector<T> load;     ///< [options], the sum of the chances of each option.
  RowVector<T> choices;  ///< [options], the number of tokens that made a choice of the option's.

  /// Sets the chances of the options of `choice`, which is one of token t. All have to be set,
  /// before `add_up`.
  void set(Index t, const NoisyChoice<T>& choice, std::span<const Index> chosen);

  /// Sets `load` and `choices`.
  void add_up();
};

template <std::floating_point T>
void ChanceTable<T>::set(Index t, const NoisyChoice<T>& choice, std::span<const Index> chosen) {
  const auto rivals = choice.rivals(chosen);
  for (Index e = choice.begin; e < choice.end; e += kLanes<double>) {
    const Index count = std::min(kLanes<double>, choice.end - e);
    const Lanes<double> none = Lanes<double>{} - 1.0;
    store_rounded<T>(
        rivals.none ? none : choice.chance(e, count, rivals.in, rivals.out).probability,
        &chance(t, e), count);
  }
}

template <std::floating_point T>
void ChanceTable<T>::add_up() {
  set_shape(load, chance.cols());
  set_shape(choices, chance.cols());
  parallel_for((chance.cols() + kLanes<double> - 1) / kLanes<double>, [&](Index block) {
    const Index e = block * kLanes<double>;
    const Index count = std::min(kLanes<double>, chance.cols() - e);
    const Lanes<double> zero{};
    Lanes<double> sum{}, tokens{};
    for (Index t = 0; t < chance.rows(); ++t) {
      const Lanes<double> of_token = load_as_double(&chance(t, e), count);
      sum += of_token < 0.0 ? zero : of_token;
      tokens += of_token < 0.0 ? zero : zero + 1.0;
    }
    store_rounded<T>(sum, load.data() + e, count);
    store_rounded<T>(tokens, choices.data() + e, count);
  });
}

}  // namespace weir

#ifdef WEIR_COMPILED
extern template struct weir::ChanceTable<float>;
extern template struct weir::ChanceTable<double>;
#endif
