// SPDX-License-Identifier: MIT
/// \file
/// Where the tokens of an expert go in another layer.
#pragma once

#include <cstddef>
#include <span>
#include <vector>

#include <weir/analysis/bootstrap.hpp>
#include <weir/analysis/load_statistics.hpp>
#include <weir/analysis/traced_tokens.hpp>
#include <weir/core/types.hpp>

namespace weir {

/// Co-activation between layers: of the tokens whose first choice is e in one layer, the share
/// whose first choice is f in another one:
///
///     share_ef = n_ef / sum_f n_ef
///
/// n_ef being the tokens with both (`expert_flow`).
/// \return         [experts of `from` * experts of `to`], row e. By chance, the later choices being
///                 shuffled among the tokens: sum_e n_ef / sum_ef n_ef.
inline std::vector<Estimate> next_expert_share(const TracedTokens& tokens, const TracedLayer& from,
                                               const TracedLayer& to,
                                               const BootstrapConfig& config = {}) {
  const auto rows = static_cast<std::size_t>(from.experts);
  const auto columns = static_cast<std::size_t>(to.experts);
  std::vector<double> into;  // [experts of `to`], the tokens of each.
  double all = 0.0;
  const auto shares = [&](std::span<const Index> sequences) {
    std::vector<double> share(rows * columns);
    std::vector<double> out(rows);
    into.assign(columns, 0.0);
    all = 0.0;
    for_each_traced(tokens, from, sequences, [&](Index t, const auto&) {
      if (from.first_choice(t) < 0 || to.first_choice(t) < 0) return;
      const auto e = static_cast<std::size_t>(from.first_choice(t));
      const auto f = static_cast<std::size_t>(to.first_choice(t));
      share[e * columns + f] += 1.0;
      out[e] += 1.0;
      into[f] += 1.0;
      all += 1.0;
    });
    for (std::size_t i = 0; i < share.size(); ++i) {
      const double own = out[i / columns];
      share[i] = own > 0.0 ? share[i] / own : kUnknown;
    }
    return share;
  };
  std::vector<Estimate> estimates = estimate(tokens, shares, config, 0.0, 1.0);
  shares(tokens.all());
  for (std::size_t i = 0; i < estimates.size(); ++i) {
    estimates[i].chance = all > 0.0 ? into[i % columns] / all : kUnknown;
  }
  return estimates;
}

}  // namespace weir
