// SPDX-License-Identifier: MIT
/// \file
/// Changes the experts of a trained mixture: removes, clones, splits, merges, exchanges and adds
/// them.
#pragma once

#include <algorithm>
#include <cmath>
#include <numeric>
#include <span>
#include <string>
#include <type_traits>
#include <utility>
#include <vector>

#include <weir/core/error.hpp>
#include <weir/core/expert_map.hpp>
#include <weir/core/layer.hpp>
#include <weir/core/pass.hpp>
#include <weir/core/pass_record.hpp>
#include <weir/core/random.hpp>
#include <weir/core/types.hpp>
#include <weir/core/verbs.hpp>
#include <weir/moe/expert_mask.hpp>
#include <weir/tuning/expert_parts.hpp>
#include <weir/tuning/expert_scores.hpp>
#include <weir/tuning/move_states.hpp>

namespace weir {

/// How the output y of a layer has changed to y', on tokens at hand.
struct OutputChange {
  double relative = 0.0;  ///< ||y' - y|| / ||y||; 0 where nothing changed, also if y is zero.
  double largest = 0.0;   ///< The same of the token that changed most.
  double tokens = 0.0;    ///< The share of the tokens whose output changed at all.
};

template <class T>
OutputChange output_change(MatrixIn<T> before, MatrixIn<T> after) {
  expect_shape("output_change", "after", after, before.rows(), before.cols());
  const auto relative = [](double moved, double norm) { return norm > 0.0 ? moved / norm : moved; };
  OutputChange change;
  double moved = 0.0;
  double norm = 0.0;
  for (Index t = 0; t < before.rows(); ++t) {
    const auto of_token = static_cast<double>((after.row(t) - before.row(t)).squaredNorm());
    const auto length = static_cast<double>(before.row(t).squaredNorm());
    const double share = relative(std::sqrt(of_token), std::sqrt(length));
    if (share > change.largest || std::isnan(share)) change.largest = share;
    change.tokens += of_token != 0.0 ? 1.0 : 0.0;  // A NaN is a change.
    moved += of_token;
    norm += length;
  }
  if (before.rows() > 0) change.tokens /= static_cast<double>(before.rows());
  change.relative = relative(std::sqrt(moved), std::sqrt(norm));
  return change;
}

/// Stands for an optimizer where there is none.
struct NoOptimizer {};

/// Operations on the experts of one mixture. Each returns how the output of the layer changes on
/// given tokens, and lets the optimizer's memory follow (see `move_states`); what balancing rules
/// have counted since the last step is forgotten, so that operations belong between steps. A
/// checkpoint that is saved afterwards is loaded into a model of the new shape, and continues bit
/// for bit.
///
///     ExpertSurgery surgery(model.layers()[3].branches()[1].layer, x, optimizer, "layers.3.moe");
///     const OutputChange change = surgery.remove(5);
///
/// The layer is any that has one mixture in it, such as the AnyLayer of a block, whose router and
/// bank offer `remap_experts`: LinearRouter, NoisyRouter, CosineRouter, GluBank, MlpBank,
/// ClampedGluBank, AnyBank, also within wrappers. Those of other kinds, such as HierarchicalRouter,
/// whose groups are all of one size, are refused. An operation that throws has changed nothing.
/// Meanwhile the layer is in memory several times.
template <Layer L, class Optimizer = NoOptimizer>
class ExpertSurgery {
 public:
  using T = typename L::Scalar;

  /// \param tokens   What the layer is given, [tokens, d_model], to measure changes by.
  ExpertSurgery(L& layer, Matrix<T> tokens) : layer_(layer), tokens_(std::move(tokens)) {}

  /// \param name     Of the layer in the model that the optimizer steps.
  ExpertSurgery(L& layer, Matrix<T> tokens, Optimizer& optimizer, std::string name)
      : layer_(layer), tokens_(std::move(tokens)), optimizer_(&optimizer), name_(std::move(name)) {}

  /// Changes the experts as `map` says.
  /// \throws ConfigError  if the layer has not one mixture whose experts can be changed, or the map
  ///                      does not fit it.
  /// \throws StateError   as the bank.
  OutputChange remap(const ExpertMap& map) {
    return remap(map, [](L& /*next*/) {});
  }

  /// Keeps the experts in `kept`, in that order, and removes the others. The selector chooses among
  /// those that are left and weighs them as it does.
  OutputChange keep(std::vector<Index> kept) {  // NOLINT(performance-unnecessary-value-param)
    return remap({.source = std::move(kept)});
  }

  /// Removes one expert.
  OutputChange remove(Index expert) {
    std::vector<Index> kept = all();
    expect_expert(expert);
    kept.erase(kept.begin() + expert);
    return keep(std::move(kept));
  }

  /// Exchanges the numbers of two experts, which changes nothing but the order of ties.
  OutputChange swap(Index a, Index b) {
    std::vector<Index> source = all();
    expect_expert(a);
    expect_expert(b);
    std::swap(source[at(a)], source[at(b)]);
    return keep(std::move(source));
  }

  /// Adds a copy of an expert behind the others. Its logits are those of the original, which comes
  /// first where both tie.
  OutputChange clone(Index expert) {
    std::vector<Index> source = all();
    expect_expert(expert);
    source.push_back(expert);
    return keep(std::move(source));
  }

  /// Clones an expert and moves the two apart, so that they share its tokens about evenly: with a
  /// random direction u of length |w|, the router's vectors become w + apart u and w - apart u.
  /// \throws ConfigError  unless apart > 0, and if the router has no vector for each expert, see
  ///                      `router_vectors`.
  OutputChange split(Index expert, Rng& rng, double apart = 0.05) {
    expect_positive("ExpertSurgery::split", "apart", apart);
    std::vector<Index> source = all();
    expect_expert(expert);
    source.push_back(expert);
    return remap({.source = std::move(source)}, [&](L& next) {
      Matrix<T>& vectors = router_vectors("ExpertSurgery::split", next).value;
      RowVector<T> away(vectors.cols());
      for (T& number : away) number = static_cast<T>(rng.normal());
      away *= static_cast<T>(apart) * vectors.row(expert).norm() / away.norm();
      vectors.row(expert) += away;
      vectors.row(vectors.rows() - 1) -= away;
    });
  }

  /// Adds a cold expert, see ExpertMap: its output is zero, and its logit is a constant, `margin`
  /// below the smallest that the others have on the tokens at hand. So no selector chooses it for
  /// them, and where weights are made of the chosen experts alone, their outputs do not change.
  /// Balancing brings it its first tokens.
  /// \throws ConfigError  unless margin > 0, and if the router is no LinearRouter: it takes a bias.
  OutputChange add_cold(Rng& rng, double margin = 1.0) {
    expect_positive("ExpertSurgery::add_cold", "margin", margin);
    std::vector<Index> source = all();
    source.push_back(ExpertMap::kCold);
    const Matrix<T> logits = router_logits("ExpertSurgery::add_cold", layer_, tokens_);
    const double least = logits.size() > 0 ? static_cast<double>(logits.minCoeff()) : 0.0;
    Rng drawn = rng;
    const OutputChange change =
        remap({.source = std::move(source), .cold_logit = least - margin, .rng = &drawn});
    rng = drawn;
    return change;
  }

  /// Makes the experts of a group one and the same, their average weighted by use:
  ///
  ///     E = sum_e a_e P_e E_e / sum_e a_e
  ///
  /// The first is the dominant one, to whose neurons those of the others are permuted by P_e, see
  /// `match_neurons`; the code of the paper aligns all experts of a layer to its first one. Each
  /// keeps its row of the router, so that tokens go where they went. `keep` with one of each group
  /// makes the layer smaller. The optimizer forgets what it knew of them.
  /// (M-SMoE: Li et al. 2023, arXiv:2310.01334, section 3.2.)
  /// \param use      a, for each expert of the layer: how often it was chosen.
  /// \throws ConfigError  if an expert is not there or twice in the group, or use is negative or
  ///                      zero for all of them.
  OutputChange merge(const std::vector<Index>& group, std::span<const double> use);

  /// The weights of an expert, by their names within it; for `replace`, and for
  /// `io::save_matrices`.
  std::vector<std::pair<std::string, Matrix<T>>> values(Index expert) const {
    std::vector<std::pair<std::string, Matrix<T>>> all;
    for (const auto& part : expert_parts("ExpertSurgery::values", layer_, expert)) {
      all.emplace_back(part.name, part.parameter->value);
    }
    return all;
  }

  /// Replaces the weights of an expert, for instance by those of a file, see `io::load_matrices`.
  /// \param values   By their names within the expert, such as "gate".
  /// \throws ConfigError  if a name is missing or unknown.
  /// \throws ShapeError   if a shape is not that of the expert.
  OutputChange replace(Index expert, const std::vector<std::pair<std::string, Matrix<T>>>& values);

  /// How the output changes where these experts are switched off at run time, by a pass whose
  /// `allowed` is `all_but(experts, excluded)`. The layer stays as it is.
  OutputChange without(std::span<const Index> excluded) const {
    const auto allowed = all_but(experts(), excluded);
    return output_change<T>(infer(layer_, tokens_), infer(layer_, tokens_, {.allowed = allowed}));
  }

  /// How the output changes where this expert yields zero, while the weights of the others stay
  /// what they are: without renormalising. The layer stays as it is.
  OutputChange without_output(Index expert) const {
    L silent = layer_;
    for (auto& part : expert_parts("ExpertSurgery::without_output", silent, expert)) {
      if (part.is_output) part.parameter->value.setZero();
    }
    return output_change<T>(infer(layer_, tokens_), infer(silent, tokens_));
  }

  /// How often each expert is chosen for the tokens at hand.
  std::vector<double> use() const { return use_by(tokens_); }

  /// What the layer yields for the tokens at hand.
  Matrix<T> output() const { return infer(layer_, tokens_); }

  Index experts() const { return static_cast<Index>(use_by(tokens_.topRows(0)).size()); }

 private:
  static constexpr bool kHasOptimizer = !std::is_same_v<Optimizer, NoOptimizer>;

  static std::size_t at(Index i) { return static_cast<std::size_t>(i); }

  std::vector<double> use_by(MatrixIn<T> x) const {
    PassRecord record(PassRecord::Collects::kLossesAndReports);
    infer(layer_, x, {.record = &record});
    if (record.reports().empty()) {
      throw_error<ConfigError>("ExpertSurgery: the layer has no mixture, expected one");
    }
    const auto& load = record.reports().back().report.load;
    return {load.begin(), load.end()};
  }

  std::vector<Index> all() const {
    std::vector<Index> numbers(at(experts()));
    std::iota(numbers.begin(), numbers.end(), Index{0});
    return numbers;
  }

  void expect_expert(Index expert) const {
    if (expert >= 0 && expert < experts()) return;
    throw_error<ConfigError>("ExpertSurgery: expert = ", expert, ", expected 0 <= expert < ",
                             experts());
  }

  /// Changes the experts as `map` says, and what `adjust` adds.
  template <class Adjust>
  OutputChange remap(const ExpertMap& map, Adjust&& adjust) {
    L next = layer_;
    detail::remap_mixture("ExpertSurgery", next, map);
    adjust(next);
    return exchange(std::move(next), [&](const L& before) {
      if constexpr (kHasOptimizer) move_states(*optimizer_, name_, before, map);
    });
  }

  /// Puts `next` into the place of the layer.
  template <class Moved>
  OutputChange exchange(L next, Moved&& moved) {
    const OutputChange change = output_change<T>(infer(layer_, tokens_), infer(next, tokens_));
    moved(layer_);
    layer_ = std::move(next);
    return change;
  }

  void forget(const std::vector<std::string>& parameter_names) {
    if constexpr (kHasOptimizer) {
      for (const std::string& own : parameter_names) {
        optimizer_->forget(detail::in_model(name_, own));
      }
    }
  }

  L& layer_;
  Matrix<T> tokens_;
  Optimizer* optimizer_ = nullptr;
  std::string name_;
};

template <Layer L, class Optimizer>
OutputChange ExpertSurgery<L, Optimizer>::merge(const std::vector<Index>& group,
                                                std::span<const double> use) {
  constexpr auto kWhere = "ExpertSurgery::merge";
  expect_at_least<std::size_t>(kWhere, "group", group.size(), 1);
  if (static_cast<Index>(use.size()) != experts()) {
    throw_error<ConfigError>(kWhere, ": use has ", use.size(), " numbers, expected ", experts(),
                             " (one per expert)");
  }
  double total = 0.0;
  for (std::size_t i = 0; i < group.size(); ++i) {
    expect_expert(group[i]);
    if (std::find(group.begin(), group.begin() + static_cast<Index>(i), group[i]) !=
        group.begin() + static_cast<Index>(i)) {
      throw_error<ConfigError>(kWhere, ": expert ", group[i], " is in the group twice");
    }
    expect_at_least(kWhere, "use", use[at(group[i])], 0.0);
    total += use[at(group[i])];
  }
  expect_positive(kWhere, "the sum of use", total);
  L next = layer_;
  std::vector<std::vector<ExpertPart<T>>> parts;
  for (const Index e : group) parts.push_back(expert_parts(kWhere, next, e));
  std::vector<Matrix<T>> merged;
  const auto share = [&](std::size_t i) { return static_cast<T>(use[at(group[i])] / total); };
  for (const auto& part : parts[0]) merged.push_back(share(0) * part.parameter->value);
  for (std::size_t i = 1; i < group.size(); ++i) {
    const auto order = match_neurons(parts[0], parts[i]);
    for (std::size_t p = 0; p < parts[i].size(); ++p) {
      merged[p] += share(i) * with_neurons(parts[i][p].parameter->value, parts[i][p].axis, order);
    }
  }
  std::vector<std::string> names;
  for (auto& of_expert : parts) {
    for (std::size_t p = 0; p < of_expert.size(); ++p) {
      of_expert[p].parameter->value = merged[p];
      names.push_back(of_expert[p].full_name);
    }
  }
  return exchange(std::move(next), [&](const L&) { forget(names); });
}

template <Layer L, class Optimizer>
OutputChange ExpertSurgery<L, Optimizer>::replace(
    Index expert, const std::vector<std::pair<std::string, Matrix<T>>>& values) {
  constexpr auto kWhere = "ExpertSurgery::replace";
  L next = layer_;
  auto parts = expert_parts(kWhere, next, expert);
  std::vector<std::string> names;
  for (auto& part : parts) {
    const auto found = std::find_if(values.begin(), values.end(),
                                    [&](const auto& v) { return v.first == part.name; });
    if (found == values.end()) {
      throw_error<ConfigError>(kWhere, ": there is no '", part.name, "', expected one for ",
                               part.full_name);
    }
    Matrix<T>& value = part.parameter->value;
    expect_shape(kWhere, part.full_name, found->second, value.rows(), value.cols());
    value = found->second;
    names.push_back(part.full_name);
  }
  if (values.size() != parts.size()) {
    throw_error<ConfigError>(kWhere, ": there are ", values.size(), " weights, expected ",
                             parts.size(), " of expert ", expert);
  }
  return exchange(std::move(next), [&](const L&) { forget(names); });
}

}  // namespace weir
