// SPDX-License-Identifier: MIT
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>
#include <vector>

#include <weir/moe/capacity/capacity_factor.hpp>
#include <weir/moe/concepts.hpp>
#include <weir/moe/selector/sigmoid_top_k.hpp>
#include <weir/moe/selector/top_k_softmax.hpp>

#include "support/catch.hpp"
#include "support/matrices.hpp"
#include "support/routing.hpp"

namespace weir::capacity_factor_test {

static_assert(CapacityPolicy<CapacityFactor, float>);

namespace {

using Kept = std::vector<std::uint8_t>;

Routing<double> select(const Matrix<double>& logits, Index k, const Pass& pass = {}) {
  return test::route(TopKSoftmax<double>({.k = k}), logits, pass);
}

/// `tokens` tokens that all choose experts 0, 1, ... in this order.
Matrix<double> crowd(Index tokens, Index experts) {
  return RowVector<double>::LinSpaced(experts, 1.0, 0.0).replicate(tokens, 1);
}

/// How many assignments the most loaded expert keeps.
Index most_kept(const CapacityFactorConfig& config, Routing<double> routing,
                const Pass& pass = {}) {
  test::limit(CapacityFactor(config), routing, pass);
  List<Index> load(routing.experts());
  for (Index a = 0; a < routing.assignments(); ++a) {
    if (routing.kept[a] != 0) ++load[routing.expert[a]];
  }
  return *std::max_element(load.begin(), load.end());
}

Kept kept_of(const CapacityFactorConfig& config, Routing<double> routing) {
  test::limit(CapacityFactor(config), routing);
  return routing.kept;
}

}  // namespace

TEST_CASE("CapacityFactor rounds as it says", "[moe][capacity_factor]") {
  const auto capacity = [](Rounding rounding, double factor, Index count, Index experts) {
    const CapacityFactor policy({.train = factor, .rounding = rounding, .minimum = 0});
    return policy.capacity(count, experts, true);
  };
  CHECK(capacity(Rounding::kDown, 1.25, 10, 4) == 3);  // 3.125
  CHECK(capacity(Rounding::kNearest, 1.25, 10, 4) == 3);
  CHECK(capacity(Rounding::kUp, 1.25, 10, 4) == 4);
  CHECK(capacity(Rounding::kDown, 1.25, 12, 4) == 3);  // 3.75
  CHECK(capacity(Rounding::kNearest, 1.25, 12, 4) == 4);
  CHECK(capacity(Rounding::kUp, 1.25, 12, 4) == 4);
  CHECK(capacity(Rounding::kNearest, 1.0, 10, 4) == 2);  // 2.5: the even neighbour
  CHECK(capacity(Rounding::kNearest, 1.0, 14, 4) == 4);  // 3.5
  for (const Rounding rounding : {Rounding::kDown, Rounding::kNearest, Rounding::kUp}) {
    CHECK(capacity(rounding, 1.0, 12, 4) == 3);
    CHECK(capacity(rounding, 1.0, 0, 4) == 0);
    CHECK(capacity(rounding, 100.0, 12, 4) == 12);  // No expert can get more.
    CHECK(capacity(rounding, std::numeric_limits<double>::max(), 12, 4) == 12);
  }
}

TEST_CASE("CapacityFactor multiplies in the order of its sources", "[moe][capacity_factor]") {
  // (80 / 6) * 1.05 = 14.000000000000002 in double, and 1.05 * 80 / 6 = 14.
  const CapacityFactor of_assignments({.train = 1.05, .minimum = 0});
  CHECK(of_assignments.capacity(80, 6, true) == 15);
  const CapacityFactor of_tokens({.train = 1.05, .count_k = false, .minimum = 0});
  CHECK(of_tokens.capacity(80, 6, true) == 14);
  // (10 / 3) * 0.3 = 1 and 0.3 * 10 / 3 = 1: most often it makes no difference.
  CHECK(CapacityFactor({.train = 0.3, .minimum = 0}).capacity(10, 3, true) == 1);
  const Routing<double> routing = select(crowd(80, 6), 1);
  CHECK(most_kept({.train = 1.0, .evaluate = 1.05, .minimum = 0}, routing) == 15);
}

TEST_CASE("CapacityFactor has a minimum", "[moe][capacity_factor]") {
  // Mesh TensorFlow, 2048 experts: int(4096 * 1.25 / 2048) = 2, raised to 4.
  const CapacityFactor mesh({.count_k = false, .rounding = Rounding::kDown});
  CHECK(mesh.capacity(4096, 2048, true) == 4);
  CHECK(mesh.capacity(16384, 2048, true) == 10);
  CHECK(mesh.capacity(1, 2048, true) == 4);
  CHECK(most_kept({.train = 0.01, .evaluate = 0.01}, select(crowd(100, 8), 1)) == 4);
  CHECK(most_kept({.train = 0.01, .evaluate = 0.01, .minimum = 7}, select(crowd(100, 8), 1)) == 7);
  CHECK(most_kept({.evaluate = 0.01, .rounding = Rounding::kDown, .minimum = 0},
                  select(crowd(100, 8), 1)) == 0);
}

TEST_CASE("CapacityFactor has one factor for training and one for the rest",
          "[moe][capacity_factor]") {
  // 100 tokens, 10 experts: 12.5 and 20.
  CHECK(most_kept({}, select(crowd(100, 10), 1, kTraining), kTraining) == 13);
  CHECK(most_kept({}, select(crowd(100, 10), 1)) == 20);
}

TEST_CASE("CapacityFactor counts assignments or tokens", "[moe][capacity_factor]") {
  // 100 tokens, k = 2, 10 experts.
  CHECK(most_kept({.evaluate = 1.0}, select(crowd(100, 10), 2)) == 20);
  CHECK(most_kept({.evaluate = 1.0, .count_k = false}, select(crowd(100, 10), 2)) == 10);
}

TEST_CASE("CapacityFactor does not count padding", "[moe][capacity_factor]") {
  std::vector<std::uint8_t> mask(100, 1);
  std::fill(mask.begin() + 20, mask.begin() + 80, std::uint8_t{0});
  Pass pass;
  pass.mask = mask;
  const Routing<double> routing = select(crowd(100, 4), 2, pass);  // 40 tokens
  CHECK(most_kept({.evaluate = 1.0}, routing) == 20);
  CHECK(most_kept({.evaluate = 1.0, .count_k = false}, routing) == 10);
}

TEST_CASE("CapacityFactor counts per batch or per sequence", "[moe][capacity_factor]") {
  const Sequences lengths({4, 0, 8});
  Pass pass;
  pass.sequences = &lengths;
  const Routing<double> routing = select(crowd(12, 4), 1, pass);
  CapacityFactorConfig policy{.evaluate = 1.0, .minimum = 0};
  CHECK(kept_of(policy, routing) == Kept{1, 1, 1, 0, 0, 0, 0, 0, 0, 0, 0, 0});
  policy.scope = Scope::kSequence;
  CHECK(kept_of(policy, routing) == Kept{1, 0, 0, 0, 1, 1, 0, 0, 0, 0, 0, 0});
}

TEST_CASE("CapacityFactor cuts groups by rows, padding included, and counts their real tokens",
          "[moe][capacity_factor]") {
  // Groups of 4, 4 and 2 rows with 3, 4 and 2 real tokens: C = 1, 2 and 1.
  const std::vector<std::uint8_t> mask = {1, 0, 1, 1, 1, 1, 1, 1, 1, 1};
  Pass pass;
  pass.mask = mask;
  const Routing<double> routing = select(crowd(10, 2), 1, pass);
  const CapacityFactorConfig policy{
      .evaluate = 1.0, .rounding = Rounding::kDown, .minimum = 0, .group_size = 4};
  CHECK(kept_of(policy, routing) == Kept{1, 0, 0, 1, 1, 0, 0, 1, 0});
  // Without the padding, groups of 4, 4 and 1 rows: C = 2, 2 and 0.
  CHECK(kept_of(policy, select(crowd(9, 2), 1)) == Kept{1, 1, 0, 0, 1, 1, 0, 0, 0});
}

TEST_CASE("CapacityFactor follows its order", "[moe][capacity_factor]") {
  // Experts (1, 0), (0, 1), (0, 2), (2, 0) with C = 2: expert 0 is wanted four times.
  Matrix<double> logits(4, 3);
  logits << 0.0, 0.5, -9.0,  // weights 0.62 and 0.38
      4.0, 0.0, -9.0,        // 0.98 and 0.02
      0.1, -9.0, 0.0,        // 0.52 and 0.48
      0.0, -9.0, 0.2;        // 0.55 and 0.45
  const Routing<double> routing = select(logits, 2);
  REQUIRE(routing.expert == List<Index>{1, 0, 0, 1, 0, 2, 2, 0});
  CapacityFactorConfig policy{.evaluate = 0.75, .minimum = 0};  // C = 0.75 * 8 / 3 = 2
  CHECK(kept_of(policy, routing) == Kept{1, 0, 1, 1, 1, 1, 1, 0});
  policy.order = DropOrder::kTokenMajor;
  CHECK(kept_of(policy, routing) == Kept{1, 1, 1, 1, 0, 1, 1, 0});
  policy.order = DropOrder::kProbability;
  CHECK(kept_of(policy, routing) == Kept{1, 0, 1, 1, 1, 1, 1, 0});
  policy.evaluate = 0.375;  // C = 1
  CHECK(kept_of(policy, routing) == Kept{1, 0, 1, 0, 0, 0, 1, 0});
}

TEST_CASE("CapacityFactor drops nothing of a balanced dense routing", "[moe][capacity_factor]") {
  const Matrix<double> logits = test::random_matrix(7, 5, 1);
  const CapacityFactorConfig policy{.evaluate = 1.0, .minimum = 0};
  CHECK(kept_of(policy, select(logits, 5)) == Kept(35, 1));  // C = 7 * 5 / 5
  CHECK(kept_of(policy, select(Matrix<double>(0, 5), 5)).empty());
  CHECK(kept_of(policy, select(logits.topRows(1), 1)) == Kept{1});
}

TEST_CASE("CapacityFactor never exceeds C and never drops without need", "[moe][capacity_factor]") {
  Rng rng(2);
  for (int trial = 0; trial < 300; ++trial) {
    const Index experts = 1 + rng.below(6);
    const Index k = 1 + rng.below(experts);
    const Sequences lengths({rng.below(20), rng.below(20), rng.below(20)});
    const Index tokens = lengths.tokens();
    std::vector<std::uint8_t> mask;
    for (Index t = 0; t < tokens; ++t) mask.push_back(rng.uniform() < 0.8 ? 1 : 0);
    Pass pass;
    pass.sequences = &lengths;
    pass.mask = mask;
    pass.training = rng.uniform() < 0.5;
    pass.rng = &rng;
    const SigmoidTopK<float> selector(experts, {.k = k});
    Routing<float> routing;
    SigmoidTopK<float>::Cache cache;
    selector.forward(normal_init<float>(tokens, experts, 1.0, rng), pass, routing, cache);

    const CapacityFactorConfig policy{.train = rng.uniform(0.2, 1.5),
                                      .evaluate = rng.uniform(0.2, 1.5),
                                      .count_k = rng.uniform() < 0.5,
                                      .rounding = static_cast<Rounding>(rng.below(3)),
                                      .minimum = rng.below(3),
                                      .order = static_cast<DropOrder>(rng.below(6)),
                                      .scope = static_cast<Scope>(rng.below(2))};
    const Routing<float> chosen = routing;
    test::limit(CapacityFactor(policy), routing, pass);
    REQUIRE(routing.weight == chosen.weight);  // Not given to the token's other experts.
    REQUIRE(routing.applied.empty());
    routing.rows.for_each_group(policy.scope, [&](Index begin, Index end) {
      Index real = 0;
      for (Index t = begin; t < end; ++t) real += mask[static_cast<std::size_t>(t)];
      const double share = (pass.training ? policy.train : policy.evaluate) *
                           static_cast<double>(policy.count_k ? real * k : real) /
                           static_cast<double>(experts);
      const double rounded = policy.rounding == Rounding::kDown ? std::floor(share)
                             : policy.rounding == Rounding::kUp ? std::ceil(share)
                                                                : std::rint(share);
      const Index capacity = std::max(policy.minimum, static_cast<Index>(rounded));
      List<Index> wanted(experts);
      List<Index> taken(experts);
      for (Index a = routing.first(begin); a < routing.offsets[end]; ++a) {
        ++wanted[routing.expert[a]];
        taken[routing.expert[a]] += routing.kept[a];
      }
      for (Index e = 0; e < experts; ++e) {
        REQUIRE(taken[e] == std::min(wanted[e], capacity));
      }
    });
  }
}

TEST_CASE("CapacityFactor lets the number of tokens decide about earlier ones",
          "[moe][capacity_factor]") {
  // Each order, and k = 1: two tokens more make room for token 1.
  for (const DropOrder order :
       {DropOrder::kRankMajor, DropOrder::kTokenMajor, DropOrder::kProbability}) {
    const CapacityFactorConfig policy{.evaluate = 1.0, .minimum = 0, .order = order};
    CHECK(kept_of(policy, select(crowd(2, 2), 1)) == Kept{1, 0});
    CHECK(kept_of(policy, select(crowd(4, 2), 1)) == Kept{1, 1, 0, 0});
  }
}

TEST_CASE("CapacityFactor names the setting that is out of range", "[moe][capacity_factor]") {
  const auto message = [](const CapacityFactorConfig& config) {
    return test::message_of<ConfigError>([&] { CapacityFactor{config}; });
  };
  const double nan = std::numeric_limits<double>::quiet_NaN();
  const double inf = std::numeric_limits<double>::infinity();
  CHECK(message({.train = 0.0}) == "CapacityFactor: train = 0, expected a finite number > 0");
  CHECK(message({.train = nan}) == "CapacityFactor: train = nan, expected a finite number > 0");
  CHECK(message({.evaluate = inf}) ==
        "CapacityFactor: evaluate = inf, expected a finite number > 0");
  CHECK(message({.evaluate = -1.5}) ==
        "CapacityFactor: evaluate = -1.5, expected a finite number > 0");
  CHECK(message({.minimum = -1}) == "CapacityFactor: minimum = -1, expected >= 0");
  CHECK(message({.group_size = -4}) == "CapacityFactor: group_size = -4, expected >= 0");
  CHECK(message({.minimum = 0}) == "no exception");
  CHECK(CapacityFactor({.minimum = 3}).config().minimum == 3);
}

}  // namespace weir::capacity_factor_test
