// SPDX-License-Identifier: MIT
/// \file
/// Which parts of a model are trained: some experts, or more and more of it.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <numeric>
#include <span>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include <weir/core/error.hpp>
#include <weir/core/name_pattern.hpp>
#include <weir/core/report.hpp>
#include <weir/core/types.hpp>
#include <weir/core/verbs.hpp>

namespace weir {

/// How much a task uses each expert of one mixture, from samples of its text:
///
///     average gate score:  R_e = 1/N sum_j 1/L_j sum_t g_te
///     token ratio:         R_e = 1/N sum_j (assignments to e) / (all assignments of the sample)
///
/// over N samples of L_j tokens; the ratios sum to one. (ESFT: Wang et al. 2024, arXiv:2407.01906,
/// eq. 3, and eq. 4 where each token has k experts.)
class ExpertRelevance {
 public:
  /// Adds a sample that one pass saw, by the report of the mixture. A pass without tokens adds
  /// nothing.
  /// \throws ShapeError   if samples before it were of another number of experts.
  void add(const LayerReport& sample) {
    if (sample.tokens == 0) return;
    if (sample.weight.size() != sample.load.size()) {
      throw_error<ShapeError>("ExpertRelevance::add: the report has ", sample.weight.size(),
                              " weights, expected ", sample.load.size(), " (one per expert)");
    }
    start(sample.load.size());
    const auto tokens = static_cast<double>(sample.tokens);
    const auto assignments = static_cast<double>(std::max<Index>(1, sample.assignments));
    for (std::size_t e = 0; e < sample.load.size(); ++e) {
      ratio_[e] += static_cast<double>(sample.load[e]) / assignments;
      gate_[e] += sample.weight[e] / tokens;
    }
    ++samples_;
  }

  /// R by average gate scores, one for each expert; empty without samples.
  std::vector<double> gate_scores() const { return mean(gate_); }
  /// R by token ratios.
  std::vector<double> token_ratios() const { return mean(ratio_); }

 private:
  void start(std::size_t experts) {
    if (samples_ == 0) {
      gate_.assign(experts, 0.0);
      ratio_.assign(experts, 0.0);
    }
    if (ratio_.size() != experts) {
      throw_error<ShapeError>("ExpertRelevance::add: the report has ", experts,
                              " experts, expected ", ratio_.size(), " as those before");
    }
  }

  std::vector<double> mean(std::vector<double> sums) const {
    for (double& sum : sums) sum /= static_cast<double>(samples_);
    return sums;
  }

  std::vector<double> gate_, ratio_;
  Index samples_ = 0;
};

/// The fewest experts whose relevance makes up the share `share` of all relevance, in order of
/// their numbers: the most relevant first; of equal ones, the lower. (ESFT, eq. 5.)
/// \throws ConfigError  unless 0 < share <= 1, and relevance is finite, not negative and somewhere
///                      positive.
inline std::vector<Index> relevant_experts(std::span<const double> relevance, double share) {
  if (!(share > 0.0 && share <= 1.0)) {
    throw_error<ConfigError>("relevant_experts: share = ", share, ", expected 0 < share <= 1");
  }
  double total = 0.0;
  for (const double r : relevance) {
    expect_at_least("relevant_experts", "relevance", r, 0.0);
    total += r;
  }
  expect_positive("relevant_experts", "the sum of relevance", total);
  std::vector<Index> order(relevance.size());
  std::iota(order.begin(), order.end(), Index{0});
  const auto of = [&](Index e) { return relevance[static_cast<std::size_t>(e)]; };
  std::stable_sort(order.begin(), order.end(), [&](Index a, Index b) { return of(a) > of(b); });
  constexpr double kRounding = 1e-12;
  double sum = 0.0;
  std::size_t count = 0;
  while (count < order.size() && sum < share * total * (1.0 - kRounding)) sum += of(order[count++]);
  order.resize(count);
  std::sort(order.begin(), order.end());
  return order;
}

/// Parameters that are trained from a step on.
struct UnfreezeStage {
  std::string pattern;
  Index step = 0;
};

namespace detail {

/// Trains the parameters that a stage of up to `step` matches, and freezes the others.
/// \return              How many parameters are trained.
/// \throws ConfigError  if a stage, also a later one, matches no parameter. Nothing has changed
/// then.
template <class Layer>
Index train_stages(std::string_view who, Layer& layer, std::span<const UnfreezeStage> stages,
                   Index step) {
  const auto all = parameters(layer);
  for (const UnfreezeStage& stage : stages) {
    const bool any = std::any_of(all.begin(), all.end(), [&](const auto& p) {
      return matches_pattern(stage.pattern, p.name);
    });
    if (!any) {
      throw_error<ConfigError>(who, ": no parameter matches '", stage.pattern,
                               "', expected at least one");
    }
  }
  Index count = 0;
  for (const auto& found : all) {
    const auto trains = [&](const UnfreezeStage& stage) {
      return stage.step <= step && matches_pattern(stage.pattern, found.name);
    };
    found.parameter->frozen = std::none_of(stages.begin(), stages.end(), trains);
    count += found.parameter->frozen ? 0 : 1;
  }
  return count;
}

}  // namespace detail

/// Freezes everything but the parameters whose names match one of `patterns`.
///
///     train_only(model, {"layers.3.moe.experts.1.*", "layers.3.moe.experts.6.*"});
///
/// \return              How many parameters are trained.
/// \throws ConfigError  if a pattern matches none. Nothing has changed then.
template <class Layer>
Index train_only(Layer& layer, const std::vector<std::string>& patterns) {
  std::vector<UnfreezeStage> stages;
  stages.reserve(patterns.size());
  for (const std::string& pattern : patterns) stages.push_back({pattern, 0});
  return detail::train_stages("train_only", layer, stages, 0);
}

/// The patterns of all parameters of some experts, for `train_only`.
/// \param bank     The name of the bank, such as "layers.3.moe.experts".
inline std::vector<std::string> expert_patterns(const std::string& bank,
                                                std::span<const Index> experts) {
  std::vector<std::string> patterns;
  for (const Index e : experts) patterns.push_back(bank + "." + std::to_string(e) + ".*");
  return patterns;
}

/// Trains more and more of a model: each parameter is frozen until the first step of a stage whose
/// pattern matches its name; those that no stage matches are frozen throughout. The program calls
/// `apply` before each step, also the first after it was resumed, as what is frozen is no part of a
/// checkpoint.
///
///     const UnfreezeSchedule schedule({{"*.router.*", 0}, {"*.experts.*", 100}, {"*", 1000}});
///
/// warms up the routers of an upcycled model before its experts move. (Gradual unfreezing: Howard
/// and Ruder 2018, arXiv:1801.06146, section 3.3.)
class UnfreezeSchedule {
 public:
  /// \throws ConfigError  without stages, or if a step is negative.
  explicit UnfreezeSchedule(std::vector<UnfreezeStage> stages) : stages_(std::move(stages)) {
    expect_at_least<std::size_t>("UnfreezeSchedule", "stages", stages_.size(), 1);
    for (const UnfreezeStage& stage : stages_) {
      expect_at_least<Index>("UnfreezeSchedule", "step", stage.step, 0);
    }
  }

  /// Freezes and unfreezes the parameters of `layer` for `step`.
  /// \return              How many parameters are trained.
  /// \throws ConfigError  if a stage matches no parameter. Nothing has changed then.
  template <class Layer>
  Index apply(Layer& layer, Index step) const {
    return detail::train_stages("UnfreezeSchedule", layer, stages_, step);
  }

 private:
  std::vector<UnfreezeStage> stages_;
};

/// Pulls parameters towards the values that they have in a base model (L2-SP):
///
///     loss = strength / 2 sum_i |w_i - w_i(base)|^2,   dw_i += strength (w_i - w_i(base))
///
/// over those whose names match a pattern. (Li et al. 2018, arXiv:1802.01483, eq. 2.) The base's
/// values are kept here, not in checkpoints: a program that resumes makes it from the base again.
template <class T>
class TowardsBase {
 public:
  /// \throws ConfigError  if no parameter matches, or strength is negative.
  template <class Layer>
  TowardsBase(Layer& base, std::string_view pattern, double strength) : strength_(strength) {
    expect_at_least("TowardsBase", "strength", strength, 0.0);
    for (const auto& [name, parameter] : parameters(base)) {
      if (matches_pattern(pattern, name)) values_.emplace_back(name, parameter->value);
    }
    if (values_.empty()) {
      throw_error<ConfigError>("TowardsBase: no parameter matches '", pattern,
                               "', expected at least one");
    }
  }

  /// Adds to the gradients of those parameters that are trained and have one, before the
  /// optimizer's step.
  /// \param scale    As Pass::aux_scale, such as a loss scale.
  /// \return         scale times the loss.
  /// \throws ConfigError  if the model has lost a parameter.
  /// \throws ShapeError   if one has another shape than the base's. Nothing has changed in both
  ///                      cases.
  template <class Layer>
  double add_gradient(Layer& model, double scale = 1.0) const {
    const auto all = parameters(model);
    std::vector<Parameter<T>*> found;
    std::size_t next = 0;  // Where the search begins: names come in the same order.
    for (const auto& [name, value] : values_) {
      std::size_t tried = 0;
      while (tried < all.size() && all[(next + tried) % all.size()].name != name) ++tried;
      if (tried == all.size()) {
        throw_error<ConfigError>("TowardsBase: the model has no parameter ", name,
                                 ", expected those of the base");
      }
      next = (next + tried) % all.size();
      found.push_back(all[next].parameter);
      expect_shape("TowardsBase", name, found.back()->value, value.rows(), value.cols());
    }
    double loss = 0.0;
    const double factor = scale * strength_;
    for (std::size_t i = 0; i < found.size(); ++i) {
      const Matrix<T>& base = values_[i].second;
      loss += 0.5 * factor * static_cast<double>((found[i]->value - base).squaredNorm());
      if (!found[i]->learns()) continue;
      found[i]->gradient() += static_cast<T>(factor) * (found[i]->value - base);
    }
    return loss;
  }

 private:
  std::vector<std::pair<std::string, Matrix<T>>> values_;
  double strength_;
};

}  // namespace weir
