// SPDX-License-Identifier: MIT
/// \file
/// What mixtures of experts compute, slowly, from the tensors of a made case.
#pragma once

#include <algorithm>
#include <cmath>
#include <functional>
#include <limits>
#include <string>
#include <vector>

#include <weir/core/types.hpp>

#include "golden/made_case.hpp"

namespace weir::golden::slow {

using Real = Matrix<double>;
using Function = std::function<double(double)>;
using Experts = std::vector<Index>;

inline double sigmoid(double z) {
  return 1.0 / (1.0 + std::exp(-z));
}
inline double silu(double z) {
  return z * sigmoid(z);
}
inline double relu(double z) {
  return std::max(z, 0.0);
}
inline double gelu(double z) {
  return 0.5 * z * (1.0 + std::erf(z / std::sqrt(2.0)));
}

inline Function activation(const std::string& name) {
  return name == "gelu" ? gelu : name == "relu" ? relu : silu;
}

/// The softmax of each row.
inline Real softmax(const Real& z) {
  Real p = z.array().exp();
  for (Index t = 0; t < p.rows(); ++t) p.row(t) /= p.row(t).sum();
  return p;
}

/// The k largest of a row, the largest first; among equal ones the last, unlike weir.
inline Experts best(const Real& scores, Index t, Index k) {
  Experts order;
  for (Index e = scores.cols() - 1; e >= 0; --e) order.push_back(e);
  std::stable_sort(order.begin(), order.end(),
                   [&](Index a, Index b) { return scores(t, a) > scores(t, b); });
  order.resize(static_cast<std::size_t>(k));
  return order;
}

/// Scores with -infinity in all groups but the `allowed` best, by the sum of the `summed` best.
inline Real limited(Real scores, Index count, Index allowed, Index summed) {
  const Index size = scores.cols() / count;
  for (Index t = 0; t < scores.rows(); ++t) {
    Real of_group = Real::Zero(1, count);
    for (Index g = 0; g < count; ++g) {
      const Real group = scores.row(t).segment(g * size, size);
      for (const Index e : best(group, 0, summed)) of_group(0, g) += group(0, e);
    }
    const Experts kept = best(of_group, 0, allowed);
    for (Index g = 0; g < count; ++g) {
      if (std::find(kept.begin(), kept.end(), g) != kept.end()) continue;
      scores.row(t).segment(g * size, size).setConstant(-std::numeric_limits<double>::infinity());
    }
  }
  return scores;
}

/// A choice, and the weights of all experts for each token.
struct Routing {
  std::vector<Experts> chosen;
  Real weights;
};

/// The k best by `choose_by`, weighted by `scores`, over their sum or as they are.
inline Routing route(const Real& choose_by, const Real& scores, Index k, bool renormalise,
                     double scale = 1.0) {
  Routing routing{{}, Real::Zero(scores.rows(), scores.cols())};
  for (Index t = 0; t < scores.rows(); ++t) {
    routing.chosen.push_back(best(choose_by, t, k));
    double sum = 0.0;
    for (const Index e : routing.chosen.back()) sum += scores(t, e);
    for (const Index e : routing.chosen.back()) {
      routing.weights(t, e) = scale * scores(t, e) / (renormalise ? sum : 1.0);
    }
  }
  return routing;
}

/// Row by row, (act(x gate^T) * (x up^T)) down^T.
inline Real glu(const Real& x, const Real& gate, const Real& up, const Real& down,
                const Function& act) {
  const Real inner = (x * gate.transpose()).unaryExpr(act).cwiseProduct(x * up.transpose());
  return inner * down.transpose();
}

/// The sum of `expert(e)` [tokens, .] weighted for each token.
template <class Expert>
Real mix(const Real& weights, const Expert& expert) {
  Real y;
  for (Index e = 0; e < weights.cols(); ++e) {
    const Real out = weights.col(e).asDiagonal() * expert(e);
    y = e == 0 ? out : Real(y + out);
  }
  return y;
}

/// experts * sum_e f_e P_e over the tokens `begin` to `end`; f_e sums to k, or to 1.
inline double switch_loss(const Routing& routing, const Real& p, bool of_tokens, Index begin,
                          Index end) {
  Real count = Real::Zero(1, p.cols());
  double assignments = 0.0;
  for (Index t = begin; t < end; ++t) {
    for (const Index e : routing.chosen[static_cast<std::size_t>(t)]) {
      count(0, e) += 1.0;
      assignments += 1.0;
    }
  }
  const auto tokens = static_cast<double>(end - begin);
  const Real mean = p.middleRows(begin, end - begin).colwise().sum() / tokens;
  return static_cast<double>(p.cols()) * count.cwiseProduct(mean).sum() /
         (of_tokens ? tokens : assignments);
}

/// out.topk_idx as a file has it.
inline MadeCase::Integers listed(const Routing& routing) {
  MadeCase::Integers all;
  for (const Experts& of_token : routing.chosen)
    all.insert(all.end(), of_token.begin(), of_token.end());
  return all;
}

}  // namespace weir::golden::slow
