// SPDX-License-Identifier: MIT
/// \file
/// Which experts work together, in one layer and from one layer to another.
#pragma once

#include <algorithm>
#include <cstddef>
#include <span>
#include <string_view>
#include <vector>

#include <weir/analysis/bootstrap.hpp>
#include <weir/analysis/load_statistics.hpp>
#include <weir/analysis/random_routing.hpp>
#include <weir/analysis/traced_tokens.hpp>
#include <weir/core/error.hpp>
#include <weir/core/list.hpp>
#include <weir/core/types.hpp>

namespace weir {

/// Of the tokens of expert e, the share that expert f has as well:
///
///     together_ef = tokens with e and f / tokens with e
///
/// \return         [experts * experts], row e; 1 on the diagonal. By chance, elsewhere:
///                 (k - 1) / (experts - 1), k being the mean number of experts of e's tokens.
inline std::vector<Estimate> co_activation(const TracedTokens& tokens, const TracedLayer& layer,
                                           const BootstrapConfig& config = {}) {
  const Index experts = layer.experts;
  List<double> choices;  // [experts], the mean number of experts of the tokens of each.
  const auto together = [&](std::span<const Index> sequences) {
    std::vector<double> pairs(static_cast<std::size_t>(experts * experts));
    const auto at = [&](Index e, Index f) -> double& {
      return pairs[static_cast<std::size_t>(e * experts + f)];
    };
    choices.assign(experts, 0.0);
    for_each_traced(tokens, layer, sequences, [&](Index t, const auto&) {
      for (const Index e : layer.experts_of(t)) {
        for (const Index f : layer.experts_of(t)) at(e, f) += 1.0;
        choices[e] += static_cast<double>(layer.choices(t));
      }
    });
    for (Index e = 0; e < experts; ++e) {
      const double own = at(e, e);
      choices[e] /= own;
      for (Index f = 0; f < experts; ++f) at(e, f) = own > 0.0 ? at(e, f) / own : kUnknown;
    }
    return pairs;
  };
  std::vector<Estimate> estimates = estimate(tokens, together, config, 0.0, 1.0);
  together(tokens.all());
  for (Index e = 0; e < experts; ++e) {
    for (Index f = 0; f < experts; ++f) {
      double& chance = estimates[static_cast<std::size_t>(e * experts + f)].chance;
      chance = e == f ? 1.0 : (choices[e] - 1.0) / static_cast<double>(experts - 1);
    }
  }
  return estimates;
}

/// How many tokens went from each expert of one layer to each of another, by first choices:
/// [experts of `from`, experts of `to`].
inline Matrix<double> expert_flow(const TracedTokens& tokens, const TracedLayer& from,
                                  const TracedLayer& to, std::span<const Index> sequences) {
  Matrix<double> flow = Matrix<double>::Zero(from.experts, to.experts);
  for_each_traced(tokens, from, sequences, [&](Index t, const auto&) {
    const Index e = from.first_choice(t);
    const Index f = to.first_choice(t);
    if (e >= 0 && f >= 0) flow(e, f) += 1.0;
  });
  return flow;
}

/// How well the first choice of one layer predicts that of another.
struct Predictability {
  /// The share of tokens whose expert is guessed right by whoever knows their expert in the earlier
  /// layer and guesses the most frequent one: sum_e max_f n_ef / sum_ef n_ef. By chance: the same
  /// if the later layer's choices are shuffled among the tokens.
  Estimate known;
  /// The same for whoever knows nothing of the token: max_f sum_e n_ef / sum_ef n_ef.
  Estimate unknown;
};

inline Predictability predictability(const TracedTokens& tokens, const TracedLayer& from,
                                     const TracedLayer& to, const BootstrapConfig& config = {}) {
  const auto guessed = [](const Matrix<double>& flow) {
    double sum = 0.0, of_rows = 0.0;
    List<double> columns(flow.cols());
    for (Index e = 0; e < flow.rows(); ++e) {
      double most = 0.0;
      for (Index f = 0; f < flow.cols(); ++f) {
        most = std::max(most, flow(e, f));
        columns[f] += flow(e, f);
        sum += flow(e, f);
      }
      of_rows += most;
    }
    if (sum == 0.0) return std::vector<double>{kUnknown, kUnknown};
    return std::vector<double>{of_rows / sum,
                               *std::max_element(columns.begin(), columns.end()) / sum};
  };
  const std::vector<Estimate> e = estimate(
      tokens,
      [&](std::span<const Index> sequences) {
        return guessed(expert_flow(tokens, from, to, sequences));
      },
      config, 0.0, 1.0);
  Predictability result = {e[0], e[1]};
  List<Index> before, behind;
  for (Index t = 0; t < tokens.tokens(); ++t) {
    if (from.first_choice(t) < 0 || to.first_choice(t) < 0) continue;
    before.push_back(from.first_choice(t));
    behind.push_back(to.first_choice(t));
  }
  if (before.empty()) return result;
  result.unknown.chance = result.unknown.value;
  result.known.chance = mean_over_random_routings(config, [&](Rng& rng) {
    shuffle(behind, rng);
    Matrix<double> flow = Matrix<double>::Zero(from.experts, to.experts);
    for (Index i = 0; i < before.count(); ++i) flow(before[i], behind[i]) += 1.0;
    return guessed(flow)[0];
  });
  return result;
}

}  // namespace weir
