// SPDX-License-Identifier: MIT
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <vector>

#include <weir/moe/capacity/device_capacity.hpp>
#include <weir/moe/concepts.hpp>
#include <weir/moe/experts/glu_bank.hpp>
#include <weir/moe/moe_layer.hpp>
#include <weir/moe/router/linear_router.hpp>
#include <weir/moe/selector/softmax_top_k.hpp>

#include "support/catch.hpp"
#include "support/gradient.hpp"
#include "support/routing.hpp"

namespace weir::device_capacity_test {

static_assert(CapacityPolicy<DeviceCapacity, float>);

namespace {

using Kept = std::vector<std::uint8_t>;

/// Four tokens with two of four experts each, two devices: the affinities on device 0 are 0.5, 0.3,
/// 0.6, 0.4 and 0.2, those on device 1 are 0.1, 0.35 and 0.25.
Routing<double> small_routing() {
  Routing<double> routing;
  routing.begin("Test", Matrix<double>::Zero(4, 4), {});
  routing.assign_each(2);
  routing.expert = {0, 1, 1, 2, 0, 3, 2, 1};
  routing.probabilities << 0.5, 0.3, 0.1, 0.1,  //
      0.0, 0.6, 0.1, 0.3,                       //
      0.4, 0.1, 0.15, 0.35,                     //
      0.3, 0.2, 0.25, 0.25;
  return routing;
}

Kept kept_of(const DeviceCapacityConfig& config, Routing<double> routing,
             const Pass& pass = kTraining) {
  test::limit(DeviceCapacity(config), routing, pass);
  return routing.kept;
}

constexpr DeviceCapacityConfig kTwo{.devices = 2, .protected_share = 0.0};

}  // namespace

TEST_CASE("DeviceCapacity drops the lowest affinities of a device over its budget",
          "[moe][capacity][device_capacity]") {
  // Eight assignments: four for each device. Device 0 has five.
  CHECK(kept_of(kTwo, small_routing()) == Kept{1, 1, 1, 1, 1, 1, 1, 0});
  DeviceCapacityConfig half = kTwo;
  half.factor = 0.5;
  CHECK(kept_of(half, small_routing()) == Kept{1, 0, 1, 0, 0, 1, 1, 0});
  half.factor = 0.6;  // 2.4 are 3.
  CHECK(kept_of(half, small_routing()) == Kept{1, 0, 1, 1, 1, 1, 1, 0});
  half.factor = 1e300;
  CHECK(kept_of(half, small_routing()) == Kept(8, 1));
  half.devices = 1;
  half.factor = 0.25;
  CHECK(kept_of(half, small_routing()) == Kept{1, 0, 1, 0, 0, 0, 0, 0});
}

TEST_CASE("DeviceCapacity prefers the earlier of equals, and counts what is kept",
          "[moe][capacity][device_capacity]") {
  Routing<double> routing = small_routing();
  routing.probabilities.setConstant(0.25);
  CHECK(kept_of(kTwo, routing) == Kept{1, 1, 1, 1, 1, 1, 1, 0});
  routing = small_routing();
  routing.kept[0] = routing.kept[3] = 0;  // Six: three for each, device 0 has four.
  CHECK(kept_of(kTwo, routing) == Kept{0, 1, 1, 0, 1, 1, 1, 0});
}

TEST_CASE("DeviceCapacity drops in evaluation only if told to",
          "[moe][capacity][device_capacity]") {
  const Routing<double> routing = small_routing();
  DeviceCapacityConfig policy = kTwo;
  CHECK(kept_of(policy, routing, {}) == Kept(8, 1));
  policy.protected_share = 0.1;  // Needs no generator either.
  CHECK(kept_of(policy, routing, {}) == Kept(8, 1));
  policy = kTwo;
  policy.evaluate = true;
  CHECK(kept_of(policy, routing, {}) == Kept{1, 1, 1, 1, 1, 1, 1, 0});
}

TEST_CASE("DeviceCapacity never drops of a protected sequence",
          "[moe][capacity][device_capacity]") {
  // 400 sequences of one token that all want device 0 of two.
  const Sequences sequences = Sequences::uniform(400, 1);
  Rng rng(1);
  Matrix<double> logits = test::random_matrix(400, 4, 2);
  logits.leftCols(2).array() += 20.0;
  const Pass pass{.training = true, .sequences = &sequences, .rng = &rng};
  const Routing<double> routing = test::route(SoftmaxTopK<double>({.k = 2}), logits, pass);
  const auto count = [](const Kept& kept) { return std::count(kept.begin(), kept.end(), 1); };

  DeviceCapacityConfig policy{.devices = 2, .factor = 0.1};
  policy.protected_share = 1.0;
  CHECK(count(kept_of(policy, routing, pass)) == 800);
  policy.protected_share = 0.1;
  const Kept kept = kept_of(policy, routing, pass);
  // 40 places, taken by about 40 protected sequences with two assignments each.
  Index whole = 0;
  for (std::size_t t = 0; t < 400; ++t) whole += kept[2 * t] + kept[2 * t + 1] == 2 ? 1 : 0;
  CHECK(std::abs(static_cast<double>(whole) - 40.0) < 24.0);  // Four standard deviations.
  CHECK(count(kept) == 2 * whole);
  CHECK(kept_of(policy, routing, pass) != kept);  // Other sequences in another pass.
  Rng same(1);
  Pass again = pass;
  again.rng = &same;
  (void)kept_of({.devices = 2, .protected_share = 1.0}, routing, again);
  CHECK(kept_of(policy, routing, again) == kept);

  // Where there is room, it goes to the best of the others.
  policy.factor = 0.5;
  CHECK(count(kept_of(policy, routing, pass)) == 200);
}

TEST_CASE("DeviceCapacity knows padding and no tokens", "[moe][capacity][device_capacity]") {
  const std::vector<std::uint8_t> mask = {0, 1};
  const SoftmaxTopK<double> selector({.k = 2});
  CHECK(kept_of(kTwo, test::route(selector, test::random_matrix(2, 4, 1),
                                  {.training = true, .mask = mask}))
            .size() == 2);
  CHECK(kept_of(kTwo, test::route(selector, Matrix<double>(0, 4), {.training = true})).empty());
}

TEST_CASE("DeviceCapacity never exceeds the budget without protection",
          "[moe][capacity][device_capacity]") {
  Rng rng(3);
  for (int trial = 0; trial < 200; ++trial) {
    const Index devices = 1 + rng.below(4);
    const Index experts = devices * (1 + rng.below(3));
    const Index k = 1 + rng.below(experts);
    const Index tokens = rng.below(30);
    const double factor = rng.uniform(0.2, 1.5);
    Routing<double> routing =
        test::route(SoftmaxTopK<double>({.k = k}), normal_init<double>(tokens, experts, 1.0, rng),
                    {.training = true});
    const auto on_device = [&](Index device) {
      Index count = 0;
      for (Index a = 0; a < routing.assignments(); ++a) {
        if (routing.expert[a] / (experts / devices) == device) count += routing.kept[a];
      }
      return count;
    };
    std::vector<Index> wanted;
    for (Index d = 0; d < devices; ++d) wanted.push_back(on_device(d));
    const DeviceCapacity policy({.devices = devices, .factor = factor, .protected_share = 0.0});
    test::limit(policy, routing, kTraining);
    const auto budget = static_cast<Index>(
        std::ceil(factor * static_cast<double>(tokens * k) / static_cast<double>(devices)));
    for (Index d = 0; d < devices; ++d) {
      REQUIRE(on_device(d) == std::min(wanted[static_cast<std::size_t>(d)], budget));
    }
  }
}

TEST_CASE("DeviceCapacity leaves the layer's gradients exact",
          "[moe][capacity][device_capacity][gradient]") {
  Rng rng(1);
  MoELayer layer(LinearRouter<double>(4, 4, rng, {.init_scale = 5.0}),
                 SoftmaxTopK<double>({.k = 2}),
                 DeviceCapacity({.devices = 2, .factor = 0.7, .protected_share = 0.0}),
                 GluBank<double>(4, 4, 3, rng));
  const Matrix<double> x = test::random_matrix(8, 4, 2);
  decltype(layer)::Cache cache;
  layer.forward(x, kTraining, cache);
  CHECK(layer.report(cache).dropped > 0);
  test::check_gradients(layer, x);
}

TEST_CASE("DeviceCapacity names the setting that is wrong", "[moe][capacity][device_capacity]") {
  Routing<double> routing = small_routing();
  const auto message = [&](const DeviceCapacityConfig& config) {
    return test::message_of<ConfigError>(
        [&] { test::limit(DeviceCapacity(config), routing, kTraining); });
  };
  CHECK(message({.devices = 0}) == "DeviceCapacity: devices = 0, expected >= 1");
  CHECK(message({.devices = 3}) ==
        "DeviceCapacity: devices = 3, expected a divisor of experts = 4");
  CHECK(message({.devices = 2, .factor = 0.0}) ==
        "DeviceCapacity: factor = 0, expected a finite number > 0");
  CHECK(message({.devices = 2, .protected_share = 1.5}) ==
        "DeviceCapacity: protected_share = 1.5, expected 0 <= protected_share <= 1");
  CHECK(message({.devices = 2}) ==
        "DeviceCapacity: pass.rng = null, expected a generator in training");
  CHECK(routing.kept == Kept(8, 1));
}

}  // namespace weir::device_capacity_test
