// SPDX-License-Identifier: MIT
/// \file
/// What a report says in words about the load of layers.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <string>
#include <vector>

#include <weir/core/types.hpp>

#include "progress.hpp"

/// One sentence: "good", "bad" or "" for neither, and the text.
struct Saying {
  std::string kind, text;
};

/// How many experts a load is spread over: exp of its entropy; all of them if it is level.
inline double effective_experts(const std::vector<double>& load) {
  double sum = 0.0;
  double entropy = 0.0;
  for (const double l : load) sum += l;
  for (const double l : load) entropy -= l > 0.0 ? l / sum * std::log(l / sum) : 0.0;
  return sum > 0.0 ? std::exp(entropy) : 0.0;
}

/// A warning if a layer collapses, or is about to: if its tokens are worth less than half of the
/// experts that the load of a level layer is worth, or some experts get none at all.
/// \param load     The assignments or shares of each expert.
/// \param tokens   How many tokens they are of: a few leave some experts without one by chance.
inline std::vector<Saying> collapse_warnings(const std::string& layer,
                                             const std::vector<double>& load, double tokens) {
  std::vector<Saying> says;
  const auto experts = static_cast<double>(load.size());
  const double effective = effective_experts(load);
  double sum = 0.0;
  for (const double l : load) sum += l;
  if (sum == 0.0 || load.size() < 2) return says;
  if (effective < 0.5 * experts) {
    const auto largest = std::max_element(load.begin(), load.end());
    says.push_back({"bad", layer + " is collapsing: its tokens spread over about " +
                               fixed(effective, 1) + " of " + std::to_string(load.size()) +
                               " experts, and expert " + std::to_string(largest - load.begin()) +
                               " has " + fixed(100.0 * *largest / sum, 0) +
                               " % of them. A larger balancing loss or bias rate, or a lower "
                               "learning rate of the router, may help."});
  }
  std::string dead;
  weir::Index count = 0;
  for (std::size_t e = 0; e < load.size(); ++e) {
    if (load[e] > 0.0) continue;
    ++count;
    if (count <= 8) dead += (dead.empty() ? "" : ", ") + std::to_string(e);
  }
  // By chance an expert of E stays without a token of n with the probability (1 - 1 / E)^n.
  const double by_chance = experts * std::pow(1.0 - 1.0 / experts, tokens);
  if (count > 0 && by_chance < 0.05) {
    says.push_back({"bad", layer + ": " + std::to_string(count) + " of " +
                               std::to_string(load.size()) + " experts get no token: " + dead +
                               (count > 8 ? ", ..." : "")});
  }
  return says;
}
