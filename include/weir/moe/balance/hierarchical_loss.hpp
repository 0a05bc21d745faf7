// SPDX-License-Identifier: MIT
/// \file
/// A balancing loss at each of two levels: Mesh TensorFlow's hierarchical mixture of experts
/// (mesh_tensorflow/transformer/moe.py, `transformer_moe_layer_v2`).
#pragma once

#include <algorithm>
#include <concepts>
#include <string_view>

#include <weir/core/error.hpp>
#include <weir/moe/balance/conditional_price.hpp>
#include <weir/moe/balance/first_choice.hpp>
#include <weir/moe/balance/priced_probability.hpp>
#include <weir/moe/concepts.hpp>
#include <weir/moe/router/group_count.hpp>
#include <weir/moe/routing.hpp>

namespace weir {

/// Settings of HierarchicalLoss.
struct HierarchicalLossConfig {
  Index groups = 2;
  double coefficient = 0.01;
  Scope scope = Scope::kBatch;
};

/// GShard's loss of the groups of experts, plus that of the experts within each group, on the
/// tokens whose first choice is in the group:
///
///     loss = coefficient * (outer + inner)
///     outer = groups / T^2 * sum_g n_g sum_t P_tg,                 P_tg = sum_{e in g} p_te
///     inner = groups / T^2 * sum_g |g| sum_{e in g} c_e sum_{t: g} q_te,    q_te = p_te / P_tg
///
/// n_g counts the tokens whose first choice is in group g, c_e those whose first choice is expert
/// e, dropped or not; |g| counts the experts of group g, the inner sum over t is over the tokens of
/// n_g, and T counts the real tokens.
/// Inner is the mean over the groups of what GShardLoss would be for T / groups tokens to each: at
/// uniform load both are 1, the loss is twice the coefficient, and a group with twice as many
/// tokens has four times the weight. The groups are neighbours, all of the same size. Experts that
/// the pass switches off for all tokens are not in |g|, and a group without others is not among the
/// `groups`; an expert that is forbidden to some tokens counts. Over the sequences, if that is the
/// scope, the mean is taken.
///
/// n_g and c_e are constant to the derivative. Padding, and choices of tokens without any expert,
/// are not counted. Mesh TensorFlow divides the inner sums by the length of the groups' buffers,
/// capacity factor * T / groups, and counts what is in a buffer; its inner loss is this one divided
/// by the square of that factor.
template <std::floating_point T>
class HierarchicalLoss : public BalancerBase {
 public:
  static constexpr std::string_view kName = "hierarchical";
  struct Cache {
    PriceSpace<T> outer;
    RowVector<T> price;  ///< [experts], groups / T^2 * |g| * c_e of one sequence, or of the batch.
    RowVector<T> size;   ///< [groups], |g|.
    Index parts = 0;     ///< How many sequences, or batches, have real tokens.
  };

  explicit HierarchicalLoss(HierarchicalLossConfig config = {}) : config_(config) { check(); }

  /// \throws ConfigError  if groups is below 1 or the coefficient negative.
  void check() const {
    expect_at_least<Index>("HierarchicalLoss", "groups", config_.groups, 1);
    expect_at_least("HierarchicalLoss", "coefficient", config_.coefficient, 0.0);
  }

  /// \throws ConfigError  if the router has groups, and another number of them.
  template <class R>
  void check_router(const R& router) const {
    expect_groups_of(router, "HierarchicalLoss", config_.groups);
  }

  /// \return         The loss, already scaled by `coefficient`.
  /// \throws ConfigError  unless `groups` divides the experts.
  double forward(const Routing<T>& routing, Cache& cache) const;

  /// Adds `scale` times d(loss)/d(probabilities).
  void backward(const Routing<T>& routing, double scale, RoutingGradient<T>& gradient,
                Cache& cache) const;

  const HierarchicalLossConfig& config() const { return config_; }

 private:
  /// How many neighbours a group has.
  Index size(const Routing<T>& routing) const { return routing.experts() / config_.groups; }

  /// The number of groups that have an open expert.
  Index open_groups(const Routing<T>& routing) const {
    Index count = 0;
    Index last = -1;
    for (const Index e : routing.open) {  // In ascending order.
      if (e / size(routing) != last) ++count;
      last = e / size(routing);
    }
    return count;
  }

  /// groups / T * n_g for each expert of g.
  auto group_prices(const Routing<T>& routing) const {
    return [&routing, this](Index begin, Index end, Index tokens, RowVector<T>& u) {
      set_zero(u, routing.experts());
      const Index width = size(routing);
      for_each_first_choice(routing, begin, end, [&](Index /*t*/, Index first) {
        u.segment(first / width * width, width).array() += T(1);
      });
      u *= static_cast<T>(open_groups(routing)) / static_cast<T>(tokens);
    };
  }

  /// Calls `body(t, first)` for each token with a choice, the prices in the cache being those of
  /// its sequence, or of the batch. Counts those.
  template <class Body>
  void for_each_choice(const Routing<T>& routing, Cache& cache, Body&& body) const {
    cache.parts = 0;
    set_zero(cache.size, config_.groups);
    for (const Index e : routing.open) cache.size[e / size(routing)] += T(1);
    routing.rows.for_each_group(config_.scope, [&](Index begin, Index end) {
      const auto tokens = static_cast<T>(routing.rows.real(begin, end));
      if (tokens == T(0)) return;
      ++cache.parts;
      set_zero(cache.price, routing.experts());
      for_each_first_choice(routing, begin, end,
                            [&](Index /*t*/, Index first) { cache.price[first] += T(1); });
      const T factor = static_cast<T>(open_groups(routing)) / (tokens * tokens);
      for (const Index e : routing.open) {
        cache.price[e] *= factor * cache.size[e / size(routing)];
      }
      for_each_first_choice(routing, begin, end, body);
    });
  }

  /// The sum of the prices times q_te in the group of the first choice.
  auto in_group(const Routing<T>& routing, Index t, Index first, const Cache& cache) const {
    const auto is_in = [](Index /*e*/) { return true; };
    const Index width = size(routing);
    const Index begin = first / width * width;
    return ConditionalPrice<T, decltype(is_in)>{.p = &routing.probabilities(t, 0),
                                                .u = cache.price.data(),
                                                .begin = begin,
                                                .end = begin + width,
                                                .is_in = is_in,
                                                .epsilon = T(0)};
  }

  void expect_groups_fit(const Routing<T>& routing) const {
    if (routing.experts() % config_.groups != 0) {
      throw_error<ConfigError>("HierarchicalLoss: groups = ", config_.groups,
                               ", expected a divisor of experts = ", routing.experts());
    }
  }

  HierarchicalLossConfig config_;
};

template <std::floating_point T>
double HierarchicalLoss<T>::forward(const Routing<T>& routing, Cache& cache) const {
  expect_groups_fit(routing);
  const T outer = priced_probability(routing, config_.scope, group_prices(routing), cache.outer);
  T inner = T(0);
  for_each_choice(routing, cache, [&](Index t, Index first) {
    inner += in_group(routing, t, first, cache).value();
  });
  if (cache.parts > 0) inner /= static_cast<T>(cache.parts);
  return config_.coefficient * static_cast<double>(outer + inner);
}

template <std::floating_point T>
void HierarchicalLoss<T>::backward(const Routing<T>& routing, double scale,
                                   RoutingGradient<T>& gradient, Cache& cache) const {
  const auto factor = static_cast<T>(scale * config_.coefficient);
  add_priced_probability_gradient(routing, config_.scope, factor, group_prices(routing),
                                  cache.outer, gradient);
  const T per_part = factor / static_cast<T>(std::max(cache.parts, Index(1)));
  for_each_choice(routing, cache, [&](Index t, Index first) {
    in_group(routing, t, first, cache).add_gradient(per_part, &gradient.probabilities(t, 0));
  });
}

}  // namespace weir

#ifdef WEIR_COMPILED
extern template class weir::HierarchicalLoss<float>;
extern template class weir::HierarchicalLoss<double>;
#endif
