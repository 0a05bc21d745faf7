// SPDX-License-Identifier: MIT
/// \file
/// What says how much the experts of a mixture matter, and which are alike.
#pragma once

#include <algorithm>
#include <cmath>
#include <numeric>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include <weir/core/error.hpp>
#include <weir/core/low_rank.hpp>
#include <weir/core/parameter.hpp>
#include <weir/core/types.hpp>
#include <weir/core/verbs.hpp>
#include <weir/kernels/matmul.hpp>

namespace weir {

/// The weight of the router of a layer with one mixture, [experts, d_model].
/// \throws ConfigError  unless the layer has exactly one parameter `router.weight`.
template <class Layer>
LinearParameter<typename Layer::Scalar>& router_weight(std::string_view where, Layer& layer) {
  LinearParameter<typename Layer::Scalar>* weight = nullptr;
  Index count = 0;
  for (const auto& found : linear_weights(layer)) {
    if (found.name != "router.weight" && !found.name.ends_with(".router.weight")) continue;
    weight = found.weight;
    ++count;
  }
  if (count != 1) {
    throw_error<ConfigError>(where, ": the layer has ", count,
                             " weights of linear routers, expected 1");
  }
  return *weight;
}

/// The logits of that router for x, [tokens, experts], without adapters and noise.
/// \param x        What the layer is given, [tokens, d_model].
template <class Layer>
Matrix<typename Layer::Scalar> router_logits(std::string_view where, Layer& layer,
                                             MatrixIn<typename Layer::Scalar> x) {
  using T = typename Layer::Scalar;
  const Matrix<T>& weight = router_weight(where, layer).value;
  expect_columns(where, "x", x, weight.cols());
  Matrix<T> logits(x.rows(), weight.rows());
  multiply_nt<T>(x, weight, logits);
  for (const auto& [name, parameter] : parameters(layer)) {
    if (name != "router.bias" && !name.ends_with(".router.bias")) continue;
    logits.rowwise() += parameter->value.row(0);
  }
  return logits;
}

/// What the router of a layer with one mixture compares a token with, a row for each expert: the
/// weight of a LinearRouter or NoisyRouter, the embedding of a CosineRouter.
/// \throws ConfigError  unless the layer has exactly one such parameter.
template <class Layer>
Parameter<typename Layer::Scalar>& router_vectors(std::string_view where, Layer& layer) {
  Parameter<typename Layer::Scalar>* vectors = nullptr;
  Index count = 0;
  for (const auto& [name, parameter] : parameters(layer)) {
    const std::string from_root = "." + name;
    if (!from_root.ends_with(".router.weight") && !from_root.ends_with(".router.embedding")) {
      continue;
    }
    vectors = parameter;
    ++count;
  }
  if (count != 1) {
    throw_error<ConfigError>(where, ": the layer has ", count,
                             " routers with a vector for each expert, expected 1");
  }
  return *vectors;
}

/// The length of each expert's vector of the router.
template <class Layer>
std::vector<double> router_norms(Layer& layer) {
  const auto& weight = router_vectors("router_norms", layer).value;
  std::vector<double> norms;
  for (Index e = 0; e < weight.rows(); ++e) {
    norms.push_back(static_cast<double>(weight.row(e).norm()));
  }
  return norms;
}

/// The `count` experts of largest score, in order of their numbers; of equal ones, the lower.
/// \throws ConfigError     unless 1 <= count <= the number of scores.
/// \throws NonFiniteError  if a score is NaN.
inline std::vector<Index> most_important(std::span<const double> score, Index count) {
  const auto experts = static_cast<Index>(score.size());
  if (count < 1 || count > experts) {
    throw_error<ConfigError>("most_important: count = ", count,
                             ", expected 1 <= count <= ", experts);
  }
  for (std::size_t e = 0; e < score.size(); ++e) {
    if (std::isnan(score[e])) {
      throw_error<NonFiniteError>("most_important: score[", e, "] is NaN, expected a number");
    }
  }
  std::vector<Index> order(score.size());
  std::iota(order.begin(), order.end(), Index{0});
  std::stable_sort(order.begin(), order.end(), [&](Index a, Index b) {
    return score[static_cast<std::size_t>(a)] > score[static_cast<std::size_t>(b)];
  });
  order.resize(static_cast<std::size_t>(count));
  std::sort(order.begin(), order.end());
  return order;
}

/// Groups of experts whose logits rise and fall together: the `groups` experts that are used most
/// are dominant, and each other one joins the dominant one whose logits over the tokens have the
/// largest cosine with its own; of equal ones, the first. How many groups a layer has is up to the
/// caller; the paper's code sets a threshold on the use of experts in all layers.
/// (M-SMoE: Li et al. 2023, arXiv:2310.01334, section 3.2; github.com/UNITES-Lab/MC-SMoE,
/// mcsmoe/merging/grouping.py.)
/// \param logits   [tokens, experts], see `router_logits`.
/// \param use      How often each expert was chosen.
/// \return         The groups, each with its dominant expert first.
/// \throws ShapeError   unless there is one `use` for each expert.
/// \throws ConfigError  unless 1 <= groups <= experts.
template <class T>
std::vector<std::vector<Index>> group_by_router(MatrixIn<T> logits, std::span<const double> use,
                                                Index groups) {
  if (static_cast<Index>(use.size()) != logits.cols()) {
    throw_error<ShapeError>("group_by_router: use has ", use.size(), " numbers, expected ",
                            logits.cols(), " (one per expert)");
  }
  const std::vector<Index> dominant = most_important(use, groups);
  std::vector<std::vector<Index>> all;
  all.reserve(dominant.size());
  for (const Index e : dominant) all.push_back({e});
  const auto cosine = [&](Index a, Index b) {
    const double norms =
        static_cast<double>(logits.col(a).norm()) * static_cast<double>(logits.col(b).norm());
    return norms > 0.0 ? static_cast<double>(logits.col(a).dot(logits.col(b))) / norms : 0.0;
  };
  for (Index e = 0; e < logits.cols(); ++e) {
    if (std::find(dominant.begin(), dominant.end(), e) != dominant.end()) continue;
    std::size_t best = 0;
    for (std::size_t g = 1; g < all.size(); ++g) {
      if (cosine(e, all[g][0]) > cosine(e, all[best][0])) best = g;
    }
    all[best].push_back(e);
  }
  return all;
}

}  // namespace weir
