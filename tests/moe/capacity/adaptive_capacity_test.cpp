// SPDX-License-Identifier: MIT
#include <algorithm>
#include <cstdint>
#include <limits>
#include <string>
#include <vector>

#include <weir/moe/capacity/adaptive_capacity.hpp>
#include <weir/moe/capacity/renormalise_kept.hpp>
#include <weir/moe/concepts.hpp>
#include <weir/moe/experts/glu_bank.hpp>
#include <weir/moe/moe_layer.hpp>
#include <weir/moe/router/linear_router.hpp>
#include <weir/moe/selector/softmax_top_k.hpp>
#include <weir/moe/selector/top_k_softmax.hpp>

#include "support/catch.hpp"
#include "support/gradient.hpp"
#include "support/routing.hpp"

namespace weir::adaptive_capacity_test {

static_assert(CapacityPolicy<AdaptiveCapacity<float>, float>);

namespace {

/// A routing with k = 1 that gives expert e `load[e]` tokens.
Routing<double> with_load(const std::vector<Index>& load, const Sequences* sequences = nullptr) {
  Index tokens = 0;
  for (const Index l : load) tokens += l;
  Routing<double> routing;
  routing.begin("Test", Matrix<double>::Zero(tokens, static_cast<Index>(load.size())),
                {.sequences = sequences});
  routing.assign_each(1);
  Index t = 0;
  for (std::size_t e = 0; e < load.size(); ++e) {
    for (Index i = 0; i < load[e]; ++i) routing.expert[t++] = static_cast<Index>(e);
  }
  return routing;
}

/// The factor that `load` asks for, as one update at full rate shows it.
double needed(const std::vector<Index>& load, double tolerated) {
  AdaptiveCapacity<double> capacity(
      {.initial = 1.0, .least = 1e-6, .most = 1e6, .tolerated = tolerated, .rate = 1.0});
  capacity.observe(with_load(load));
  capacity.update_self();
  return capacity.factor();
}

}  // namespace

TEST_CASE("AdaptiveCapacity moves to the factor that the load needs",
          "[moe][capacity][adaptive_capacity]") {
  CHECK(needed({3, 3, 3, 3}, 0.0) == Approx(1.0));
  CHECK(needed({6, 2, 2, 2}, 0.0) == Approx(2.0));
  CHECK(needed({0, 12, 0, 0}, 0.0) == Approx(4.0));
  // A quarter of 12 may go: 6 is cut to 3. Of 5, 4, 3, 0 with 2 to go: 5 and 4 are cut to 3.5.
  CHECK(needed({6, 2, 2, 2}, 0.25) == Approx(1.0));
  CHECK(needed({4, 5, 0, 3}, 1.0 / 6.0) == Approx(3.5 / 3.0));
  CHECK(needed({4, 5, 0, 3}, 0.5) == Approx(2.0 / 3.0));
}

TEST_CASE("AdaptiveCapacity tolerates as much as it says", "[moe][capacity][adaptive_capacity]") {
  Rng rng(1);
  for (int trial = 0; trial < 200; ++trial) {
    std::vector<Index> load;
    for (Index e = 1 + rng.below(6); e > 0; --e) load.push_back(rng.below(20));
    load.push_back(1);
    double total = 0.0;
    for (const Index l : load) total += static_cast<double>(l);
    const double tolerated = rng.uniform(0.01, 0.9);
    const double level = needed(load, tolerated) * total / static_cast<double>(load.size());
    double dropped = 0.0;
    for (const Index l : load) dropped += std::max(0.0, static_cast<double>(l) - level);
    REQUIRE(dropped == Approx(tolerated * total));
  }
}

TEST_CASE("AdaptiveCapacity moves by its rate, within its bounds",
          "[moe][capacity][adaptive_capacity]") {
  AdaptiveCapacity<double> capacity(
      {.initial = 1.5, .least = 1.25, .most = 2.0, .tolerated = 0.0, .rate = 0.25});
  CHECK(capacity.factor() == 1.5);
  capacity.update_self();  // Nothing seen.
  CHECK(capacity.factor() == 1.5);
  capacity.observe(with_load({6, 2, 2, 2}));  // 2
  capacity.observe(with_load({4, 3, 3, 2}));  // 4/3
  capacity.update_self();
  CHECK(capacity.factor() == Approx(1.5 + 0.25 * (5.0 / 3.0 - 1.5)));
  capacity.update_self();
  CHECK(capacity.factor() == Approx(1.5 + 0.25 * (5.0 / 3.0 - 1.5)));
  for (int step = 0; step < 50; ++step) {
    capacity.observe(with_load({12, 0, 0, 0}));
    capacity.update_self();
  }
  CHECK(capacity.factor() == 2.0);
  for (int step = 0; step < 50; ++step) {
    capacity.observe(with_load({3, 3, 3, 3}));
    capacity.update_self();
  }
  CHECK(capacity.factor() == 1.25);
}

TEST_CASE("AdaptiveCapacity looks at groups, and at none without assignments",
          "[moe][capacity][adaptive_capacity]") {
  AdaptiveCapacityConfig config{.initial = 1.0, .least = 0.1, .tolerated = 0.0, .rate = 1.0};
  const Sequences sequences({2, 0, 2});
  const Routing<double> routing = with_load({2, 2}, &sequences);
  AdaptiveCapacity<double> batch(config);
  batch.observe(routing);
  batch.update_self();
  CHECK(batch.factor() == 1.0);
  config.scope = Scope::kSequence;
  AdaptiveCapacity<double> sequence(config);
  sequence.observe(with_load({0, 0}));
  sequence.update_self();
  CHECK(sequence.factor() == 1.0);
  sequence.observe(routing);
  sequence.update_self();
  CHECK(sequence.factor() == 2.0);
}

TEST_CASE("AdaptiveCapacity drops as a CapacityFactor of its factor does",
          "[moe][capacity][adaptive_capacity]") {
  const Matrix<double> logits = test::random_matrix(40, 5, 1);
  AdaptiveCapacity<double> capacity({.initial = 0.8, .least = 0.5, .minimum = 0});
  const CapacityFactor same({.train = 9.0, .evaluate = 0.8, .minimum = 0});
  Routing<double> ours = test::route(TopKSoftmax<double>({.k = 2}), logits);
  Routing<double> expected = ours;
  test::limit(capacity, ours);
  test::limit(same, expected);
  CHECK(ours.kept == expected.kept);
  CHECK(std::count(ours.kept.begin(), ours.kept.end(), std::uint8_t{0}) > 0);
}

TEST_CASE("AdaptiveCapacity learns inside a layer and is saved with it",
          "[moe][capacity][adaptive_capacity]") {
  Rng rng(1);
  MoELayer layer(
      LinearRouter<double>(4, 4, rng, {.init_scale = 5.0}), SoftmaxTopK<double>({.k = 2}),
      RenormaliseKept(
          AdaptiveCapacity<double>({.initial = 1.0, .tolerated = 0.0, .rate = 1.0, .minimum = 0})),
      GluBank<double>(4, 4, 3, rng));
  const Matrix<double> x = test::random_matrix(12, 4, 2);
  decltype(layer)::Cache cache;
  layer.forward(x, kTraining, cache);
  const LayerReport before = layer.report(cache);
  CHECK(before.dropped > 0);
  update(layer);  // No backward pass, nothing observed.
  CHECK(layer.capacity().inner().factor() == 1.0);
  layer.backward(test::random_matrix(12, 4, 3), cache);
  update(layer);
  CHECK(layer.capacity().inner().factor() == Approx(before.imbalance()));
  layer.forward(x, {}, cache);
  CHECK(layer.report(cache).dropped == 0);

  const auto named = buffers(layer);
  REQUIRE(named.size() == 1);
  CHECK(named[0].name == "capacity.factor");
  CHECK(named[0].buffer->value(0, 0) == layer.capacity().inner().factor());
}

TEST_CASE("AdaptiveCapacity names the setting that is wrong",
          "[moe][capacity][adaptive_capacity]") {
  const auto message = [](const AdaptiveCapacityConfig& config) {
    return test::message_of<ConfigError>([&] { AdaptiveCapacity<double>{config}; });
  };
  CHECK(message({.least = 0.0}) == "AdaptiveCapacity: least = 0, expected a finite number > 0");
  CHECK(message({.most = 0.5}) == "AdaptiveCapacity: most = 0.5, expected a finite number >= 1");
  CHECK(message({.most = std::numeric_limits<double>::infinity()}) ==
        "AdaptiveCapacity: most = inf, expected a finite number >= 1");
  CHECK(message({.initial = 5.0}) == "AdaptiveCapacity: factor = 5, expected 1 <= factor <= 4");
  CHECK(message({.tolerated = -0.1}) ==
        "AdaptiveCapacity: tolerated = -0.1, expected 0 <= tolerated <= 1");
  CHECK(message({.rate = 1.5}) == "AdaptiveCapacity: rate = 1.5, expected 0 <= rate <= 1");
  CHECK(message({.minimum = -1}) == "AdaptiveCapacity: minimum = -1, expected >= 0");

  AdaptiveCapacity<double> capacity;
  buffers(capacity)[0].buffer->value.setConstant(1, 1, 0.0);
  CHECK(test::message_of<ConfigError>([&] { capacity.check(); }) ==
        "AdaptiveCapacity: factor = 0, expected 1 <= factor <= 4");
  buffers(capacity)[0].buffer->value.setConstant(1, 2, 1.0);
  CHECK(test::message_of<ConfigError>([&] { capacity.check(); }) ==
        "AdaptiveCapacity: the factor is [1, 2], expected [1, 1]");
  Routing<double> routing = with_load({3, 3});
  CHECK(test::message_of<ConfigError>([&] { test::limit(capacity, routing); }) ==
        "AdaptiveCapacity: the factor is [1, 2], expected [1, 1]");
}

}  // namespace weir::adaptive_capacity_test
