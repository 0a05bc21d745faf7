// SPDX-License-Identifier: MIT
/// \file
/// How much a token's group says about its expert.
#pragma once

#include <cmath>
#include <cstddef>
#include <limits>
#include <span>
#include <vector>

#include <weir/analysis/bootstrap.hpp>
#include <weir/analysis/load_statistics.hpp>
#include <weir/analysis/random_routing.hpp>
#include <weir/analysis/token_groups.hpp>
#include <weir/analysis/traced_tokens.hpp>
#include <weir/core/list.hpp>
#include <weir/core/types.hpp>

namespace weir {

/// I(row; column) in bits of a table of counts; NaN without any.
inline double mutual_information_of(const Matrix<double>& count) {
  double sum = 0.0;
  List<double> rows(count.rows()), columns(count.cols());
  for (Index r = 0; r < count.rows(); ++r) {
    for (Index c = 0; c < count.cols(); ++c) {
      sum += count(r, c);
      rows[r] += count(r, c);
      columns[c] += count(r, c);
    }
  }
  if (sum == 0.0) return kUnknown;
  double bits = 0.0;
  for (Index r = 0; r < count.rows(); ++r) {
    for (Index c = 0; c < count.cols(); ++c) {
      const double n = count(r, c);
      if (n > 0.0) bits += n / sum * std::log2(n * sum / (rows[r] * columns[c]));
    }
  }
  return bits;
}

/// The mutual information of a token's group and its first expert, in bits:
///
///     I = sum_ge p_ge log2(p_ge / (p_g p_e))
///
/// p being frequencies. It is at most log2 of the number of experts, and grows as tokens get fewer:
/// `chance` is its mean if the experts are shuffled among the tokens, which leaves the load as it
/// is, so that what a group says is the difference.
inline Estimate mutual_information(const TracedTokens& tokens, const TracedLayer& layer,
                                   const TokenGroups& groups, const BootstrapConfig& config = {}) {
  const auto count = [&](std::span<const Index> sequences) {
    Matrix<double> table = Matrix<double>::Zero(groups.count(), layer.experts);
    for_each_traced(tokens, layer, sequences, [&](Index t, const auto&) {
      if (groups.of[t] >= 0 && layer.choices(t) > 0) {
        table(groups.of[t], layer.first_choice(t)) += 1.0;
      }
    });
    return std::vector<double>{mutual_information_of(table)};
  };
  Estimate result =
      estimate(tokens, count, config, 0.0, std::numeric_limits<double>::infinity())[0];
  List<Index> group, expert;
  for (Index t = 0; t < tokens.tokens(); ++t) {
    if (groups.of[t] < 0 || layer.choices(t) == 0) continue;
    group.push_back(groups.of[t]);
    expert.push_back(layer.first_choice(t));
  }
  if (group.empty()) return result;
  result.chance = mean_over_random_routings(config, [&](Rng& rng) {
    shuffle(expert, rng);
    Matrix<double> table = Matrix<double>::Zero(groups.count(), layer.experts);
    for (Index i = 0; i < group.count(); ++i) table(group[i], expert[i]) += 1.0;
    return mutual_information_of(table);
  });
  return result;
}

}  // namespace weir
