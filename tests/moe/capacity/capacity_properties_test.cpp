// SPDX-License-Identifier: MIT
// What has to hold for every selector with every capacity policy, on thousands of random routings.
#include <algorithm>
#include <cstdint>
#include <numeric>
#include <utility>
#include <vector>

#include <weir/moe/capacity/adaptive_capacity.hpp>
#include <weir/moe/capacity/capacity_factor.hpp>
#include <weir/moe/capacity/device_capacity.hpp>
#include <weir/moe/capacity/dropless.hpp>
#include <weir/moe/capacity/dynamic_capacity.hpp>
#include <weir/moe/capacity/fixed_capacity.hpp>
#include <weir/moe/capacity/renormalise_kept.hpp>
#include <weir/moe/dispatch.hpp>
#include <weir/moe/selector/around/rank_policy.hpp>
#include <weir/moe/selector/sigmoid_top_k.hpp>
#include <weir/moe/selector/softmax_top_k.hpp>
#include <weir/moe/selector/top_k_softmax.hpp>

#include "support/allocations.hpp"
#include "support/catch.hpp"
#include "support/matrices.hpp"
#include "support/routing.hpp"

namespace weir::capacity_properties_test {

namespace {

constexpr int kDraws = 4000;

/// Random circumstances: sizes, padding, sequences, training or not.
struct Setting {
  explicit Setting(Rng& rng)
      : experts(1 + rng.below(7)),
        k(1 + rng.below(experts)),
        sequences({rng.below(9), rng.below(9), rng.below(9)}),
        draws(rng.bits()),
        training(rng.uniform() < 0.5) {
    logits = normal_init<double>(sequences.tokens(), experts, 1.5, rng);
    for (Index t = 0; t < tokens(); ++t) mask.push_back(rng.uniform() < 0.85 ? 1 : 0);
  }

  Index tokens() const { return sequences.tokens(); }
  Pass pass() {
    return {.training = training, .sequences = &sequences, .mask = mask, .rng = &draws};
  }

  Index experts, k;
  Sequences sequences;
  Rng draws;
  bool training;
  Matrix<double> logits;
  std::vector<std::uint8_t> mask;
};

/// Routes with a selector drawn from `rng`. Its weights sum to the second result for each token, or
/// to anything where that is 0.
std::pair<Routing<double>, double> random_routing(Setting& s, Rng& rng) {
  const double scale = rng.uniform(0.5, 3.0);
  switch (rng.below(5)) {
    case 0:
      return {test::route(SoftmaxTopK<double>({.k = s.k, .scale = scale}), s.logits, s.pass()),
              0.0};
    case 1: {
      const SoftmaxTopK<double> selector({.k = s.k, .renormalise = true, .scale = scale});
      return {test::route(selector, s.logits, s.pass()), scale};
    }
    case 2:
      return {test::route(TopKSoftmax<double>({.k = s.k, .scale = scale}), s.logits, s.pass()),
              scale};
    case 3: {
      const SigmoidTopK<double> selector(s.experts, {.k = s.k, .scale = scale});
      return {test::route(selector, s.logits, s.pass()), scale};
    }
    default: {
      const auto rule = [&] { return static_cast<RankRule>(rng.below(4)); };
      const RankPolicy selector(TopKSoftmax<double>({.k = s.k, .scale = scale}), {rule(), rule()});
      return {test::route(selector, s.logits, s.pass()), scale};
    }
  }
}

DropOrder any_order(Rng& rng) {
  return static_cast<DropOrder>(rng.below(6));
}

/// Over the tokens `begin` to `end`, how many assignments each expert keeps.
List<Index> kept_load(const Routing<double>& routing, Index begin, Index end) {
  List<Index> load(routing.experts());
  for (Index a = routing.first(begin); a < routing.offsets[end]; ++a) {
    load[routing.expert[a]] += routing.kept[a];
  }
  return load;
}

/// Applies `policy`. Each expert has to keep min(what it had, capacity(begin, end)) of each group,
/// and nothing else may change.
template <class Policy, class Capacity>
void require_exactly(const Policy& policy, const Pass& pass, Routing<double>& routing, Scope scope,
                     Index group_size, Capacity&& capacity) {
  std::vector<Index> expected;
  for_each_capacity_group(routing.rows, scope, group_size, [&](Index begin, Index end) {
    for (const Index load : kept_load(routing, begin, end)) {
      expected.push_back(std::min(load, capacity(begin, end)));
    }
  });
  const Routing<double> before = routing;
  test::limit(policy, routing, pass);
  std::vector<Index> taken;
  for_each_capacity_group(routing.rows, scope, group_size, [&](Index begin, Index end) {
    for (const Index load : kept_load(routing, begin, end)) taken.push_back(load);
  });
  REQUIRE(taken == expected);
  REQUIRE(routing.expert == before.expert);
  REQUIRE(routing.offsets == before.offsets);
  REQUIRE(routing.weight == before.weight);
  REQUIRE(routing.applied.empty());
  REQUIRE(std::equal(routing.kept.begin(), routing.kept.end(), before.kept.begin(),
                     [](std::uint8_t now, std::uint8_t then) { return now <= then; }));
}

/// The rows of `m` in the order `order`.
Matrix<double> permuted(const Matrix<double>& m, const std::vector<Index>& order) {
  Matrix<double> rows(m.rows(), m.cols());
  for (Index t = 0; t < m.rows(); ++t) rows.row(t) = m.row(order[static_cast<std::size_t>(t)]);
  return rows;
}

std::vector<Index> random_order(Index count, Rng& rng) {
  std::vector<Index> order(static_cast<std::size_t>(count));
  std::iota(order.begin(), order.end(), Index(0));
  shuffle(order, rng);
  return order;
}

/// The weight with which each token uses each expert, [tokens, experts].
Matrix<double> used_weights(const Routing<double>& routing) {
  Matrix<double> dense = Matrix<double>::Zero(routing.tokens(), routing.experts());
  for (Index t = 0; t < routing.tokens(); ++t) {
    for (Index a = routing.first(t); a < routing.last(t); ++a) {
      if (routing.kept[a] != 0) dense(t, routing.expert[a]) = routing.applied_weight(a);
    }
  }
  return dense;
}

}  // namespace

TEST_CASE("No expert keeps more than its capacity, or less than it could",
          "[moe][capacity][properties]") {
  Rng rng(1);
  for (int draw = 0; draw < kDraws; ++draw) {
    Setting s(rng);
    Routing<double> routing = random_routing(s, rng).first;
    const Pass pass = s.pass();
    const auto scope = static_cast<Scope>(rng.below(2));
    const Index group_size = rng.below(7);
    switch (rng.below(4)) {
      case 0: {
        const FixedCapacity policy({.capacity = 1 + rng.below(5),
                                    .order = any_order(rng),
                                    .scope = scope,
                                    .group_size = group_size});
        require_exactly(policy, pass, routing, scope, group_size,
                        [&](Index, Index) { return policy.config().capacity; });
        break;
      }
      case 1: {
        const CapacityFactor policy({.train = rng.uniform(0.1, 2.0),
                                     .evaluate = rng.uniform(0.1, 2.0),
                                     .count_k = rng.uniform() < 0.5,
                                     .rounding = static_cast<Rounding>(rng.below(3)),
                                     .minimum = rng.below(3),
                                     .order = any_order(rng),
                                     .scope = scope,
                                     .group_size = group_size});
        require_exactly(policy, pass, routing, scope, group_size, [&](Index begin, Index end) {
          const Index real = routing.rows.real(begin, end);
          return policy.capacity(policy.config().count_k ? real * s.k : real, s.experts,
                                 s.training);
        });
        break;
      }
      case 2: {
        const DynamicCapacity policy({.factor = rng.uniform(-2.0, 2.0),
                                      .alignment = 1 + rng.below(4),
                                      .order = any_order(rng),
                                      .scope = scope});
        const Routing<double> copy = routing;
        OverflowSpace<double> space;
        require_exactly(policy, pass, routing, scope, 0, [&](Index begin, Index end) {
          return policy.capacity(copy, begin, end, space);
        });
        break;
      }
      default: {
        const AdaptiveCapacity<double> policy({.initial = rng.uniform(0.2, 2.0),
                                               .least = 0.1,
                                               .minimum = rng.below(3),
                                               .order = any_order(rng),
                                               .scope = scope});
        require_exactly(policy, pass, routing, scope, 0, [&](Index begin, Index end) {
          const CapacityFactor same({.train = policy.factor(), .minimum = policy.config().minimum});
          return same.capacity(routing.rows.real(begin, end) * s.k, s.experts, true);
        });
      }
    }
  }
}

TEST_CASE("A capacity policy that has seen a routing of this size allocates nothing",
          "[moe][capacity][properties]") {
  if (!test::allocations_are_counted()) return;
  const Matrix<double> logits = test::random_matrix(60, 6, 4);
  const Sequences sequences = Sequences::uniform(3, 20);
  Rng rng(5);
  const Pass pass{.training = true, .sequences = &sequences, .rng = &rng};
  const RankPolicy selector(SoftmaxTopK<double>({.k = 3}));
  RankPolicy<SoftmaxTopK<double>>::Cache selector_cache;
  Routing<double> routing;
  const auto check = [&](auto policy) {
    typename decltype(policy)::template Cache<double> cache;
    const auto run = [&] {
      selector.forward(logits, pass, routing, selector_cache);
      policy.forward(pass, routing, cache);
      policy.observe(routing);
    };
    run();
    for (int again = 0; again < 4; ++again) CHECK(test::count_allocations(run) == 0);
  };
  for (int order = 0; order < 6; ++order) {
    check(CapacityFactor(
        {.train = 0.7, .order = static_cast<DropOrder>(order), .scope = Scope::kSequence}));
    check(FixedCapacity({.capacity = 3, .order = static_cast<DropOrder>(order), .group_size = 7}));
  }
  check(DynamicCapacity({.factor = -0.5}));
  check(AdaptiveCapacity<double>());
  check(RenormaliseKept(DeviceCapacity({.devices = 3, .factor = 0.7})));
}

TEST_CASE("Weights sum to what the convention says, before and after a drop",
          "[moe][capacity][properties]") {
  Rng rng(2);
  for (int draw = 0; draw < kDraws; ++draw) {
    Setting s(rng);
    auto [routing, convention] = random_routing(s, rng);
    const double scale = rng.uniform(0.5, 3.0);
    const FixedCapacity capacity({.capacity = 1 + rng.below(4), .order = any_order(rng)});
    const bool renormalised = rng.uniform() < 0.5;
    if (renormalised) {
      test::limit(RenormaliseKept(capacity, {.scale = scale}), routing, s.pass());
    } else {
      test::limit(capacity, routing, s.pass());
    }
    for (Index t = 0; t < s.tokens(); ++t) {
      double all = 0.0;
      double kept = 0.0;
      bool any = false;
      for (Index a = routing.first(t); a < routing.last(t); ++a) {
        all += routing.weight[a];
        if (routing.kept[a] == 0) continue;
        any = true;
        kept += routing.applied_weight(a);
      }
      if (routing.rows.is_padding(t)) {
        REQUIRE(routing.first(t) == routing.last(t));
        continue;
      }
      if (convention > 0.0) REQUIRE(all == Approx(convention));
      if (renormalised) {
        REQUIRE(kept == Approx(any ? scale : 0.0));
      } else {
        REQUIRE(kept <= all * (1.0 + 1e-12));
      }
    }
    Dispatch<double> dispatch;
    dispatch.build(routing);
    const List<Index> load = kept_load(routing, 0, s.tokens());
    for (Index e = 0; e < s.experts; ++e) REQUIRE(dispatch.rows(e) == load[e]);
  }
}

TEST_CASE("Permuting tokens permutes the routing, unless positions matter",
          "[moe][capacity][properties]") {
  Rng rng(3);
  for (int draw = 0; draw < kDraws; ++draw) {
    const Index experts = 2 * (1 + rng.below(3));
    const Index k = 1 + rng.below(experts);
    const Index tokens = rng.below(24);
    const Matrix<double> logits = normal_init<double>(tokens, experts, 1.5, rng);
    const std::vector<Index> order = random_order(tokens, rng);
    // With k = 1, renormalised weights are all equal, and ties go by position.
    const bool renormalise = k > 1 && rng.uniform() < 0.5;
    const RankPolicy selector(SoftmaxTopK<double>({.k = k, .renormalise = renormalise}),
                              {RankRule::kThreshold, RankRule::kAll});
    const Pass pass{.training = rng.uniform() < 0.5};
    Routing<double> plain = test::route(selector, logits, pass);
    Routing<double> moved = test::route(selector, permuted(logits, order), pass);
    REQUIRE(used_weights(moved) == permuted(used_weights(plain), order));

    const auto apply = [&](const auto& policy) {
      test::limit(policy, plain, pass);
      test::limit(policy, moved, pass);
    };
    constexpr DropOrder kByToken[] = {DropOrder::kProbability, DropOrder::kBatchPrioritised,
                                      DropOrder::kBatchPrioritisedSum};
    constexpr DropOrder kByPosition[] = {DropOrder::kRankMajor, DropOrder::kTokenMajor};
    // The probabilities of all experts sum to one for each token: ties again.
    const DropOrder by_token = kByToken[rng.below(k == experts ? 2 : 3)];
    const double factor = rng.uniform(0.2, 1.2);
    const CapacityFactor positional(
        {.train = factor, .evaluate = factor, .minimum = 0, .order = kByPosition[rng.below(2)]});
    switch (rng.below(5)) {
      case 0:
        apply(Dropless());
        break;
      case 1:
        apply(FixedCapacity({.capacity = 1 + rng.below(5), .order = by_token}));
        break;
      case 2:
        apply(DynamicCapacity({.factor = factor, .order = by_token}));
        break;
      case 3: {
        apply(RenormaliseKept(DeviceCapacity(
            {.devices = 2, .factor = factor, .protected_share = 0.0, .evaluate = true})));
        break;
      }
      default: {
        apply(positional);  // As many as before, but others.
        REQUIRE(kept_load(moved, 0, tokens) == kept_load(plain, 0, tokens));
        continue;
      }
    }
    REQUIRE(used_weights(moved) == permuted(used_weights(plain), order));
  }
}

}  // namespace weir::capacity_properties_test
