// SPDX-License-Identifier: MIT
#include <algorithm>
#include <cmath>
#include <numeric>
#include <string>
#include <vector>

#include <weir/analysis/bootstrap.hpp>
#include <weir/analysis/co_activation.hpp>
#include <weir/analysis/load_statistics.hpp>
#include <weir/analysis/mutual_information.hpp>
#include <weir/analysis/random_routing.hpp>
#include <weir/analysis/repeat_rate.hpp>
#include <weir/analysis/routing_overlap.hpp>
#include <weir/analysis/token_groups.hpp>
#include <weir/analysis/top_tokens.hpp>
#include <weir/analysis/trace_recorder.hpp>
#include <weir/analysis/traced_tokens.hpp>

#include "analysis/traced.hpp"
#include "analysis/traces.hpp"
#include "support/catch.hpp"
#include "support/matrices.hpp"

namespace weir::statistics_test {

namespace {

using test::traced;

const BootstrapConfig kNoIntervals = {.replicates = 0};

std::vector<double> values_of(const std::vector<Estimate>& estimates) {
  std::vector<double> values;
  for (const Estimate& e : estimates) values.push_back(e.value);
  return values;
}

/// Two domains; the first layer's experts by hand: k = 2 of 4.
TracedTokens by_hand() {
  return traced({{0, {{7, {0, 1}}, {8, {0, 2}}, {7, {1, 0}}}},
                 {1, {{9, {2, 3}}, {7, {3, 2}}}},
                 {0, {{8, {0, 3}}}}},
                4, {"code", "prose"});
}

}  // namespace

TEST_CASE("Tokens of a trace are in order, whatever that of its records", "[analysis]") {
  TraceRecorder recorder({.layout = {.choices = 2}});
  recorder.domain("code");
  const Index prose = recorder.domain("prose");
  const std::vector<Index> ids = {4, 5, 6};
  const Sequences sequences({2, 1});
  const Pass pass = {.sequences = &sequences, .token_ids = ids};
  recorder.begin({{.id = 9, .domain = prose}, {.id = 2, .position = 7}});
  recorder.see("b", test::routing_of({{0, 1}, {1, 2}, {2, 0}}, 3, pass), pass);
  recorder.see("a", test::routing_of({{3}, {2}, {0}}, 4, pass), pass);
  recorder.begin({{.id = 2, .position = 5}});
  const std::vector<Index> one = {1};
  recorder.see("a", test::routing_of({{1}}, 4), {.token_ids = one});

  const TracedTokens tokens(recorder.trace());
  REQUIRE(tokens.count() == 2);
  CHECK(tokens.sequences[0].id == 2);
  CHECK(tokens.sequences[0].domain == 0);
  CHECK(tokens.sequences[1].id == 9);
  CHECK(tokens.sequences[1].domain == 1);
  CHECK(tokens.sequences[1].begin == 2);
  CHECK(tokens.sequences[1].end == 4);
  CHECK(tokens.position == List<Index>{5, 7, 0, 1});
  CHECK(tokens.id == List<Index>{1, 6, 4, 5});
  CHECK_FALSE(tokens.is_followed(0, tokens.sequences[0]));  // Position 6 is missing.
  CHECK(tokens.is_followed(2, tokens.sequences[1]));
  CHECK_FALSE(tokens.is_followed(3, tokens.sequences[1]));
  const TracedLayer& b = tokens.layer("b");
  CHECK(b.recorded == List<std::uint8_t>{0, 1, 1, 1});
  CHECK(b.first_choice(0) == -1);
  CHECK(b.first_choice(1) == 2);
  CHECK(b.experts_of(3)[1] == 2);
  CHECK(tokens.layer("a").first_choice(0) == 1);
  CHECK(b.entropy[3] > 0.0F);
  CHECK(test::message_of<ConfigError>([&] { tokens.layer("c"); }) ==
        "TracedTokens: there is no layer 'c'");
  CHECK(TracedTokens(Trace()).tokens() == 0);

  recorder.begin({{.id = 2, .position = 5}});
  recorder.see("a", test::routing_of({{1}}, 4), {.token_ids = one});
  CHECK(test::message_of<ConfigError>([&] { TracedTokens(recorder.trace()); }) ==
        "TracedTokens: layer 'a' has two records of sequence 2, position 5, expected one");
  recorder.clear();
  recorder.begin({{.id = 2}});
  recorder.see("a", test::routing_of({{1}}, 4), {.token_ids = one});
  recorder.begin({{.id = 2, .position = 1, .domain = prose}});
  recorder.see("a", test::routing_of({{1}}, 4), {.token_ids = one});
  CHECK(test::message_of<ConfigError>([&] { TracedTokens(recorder.trace()); }) ==
        "TracedTokens: records of sequence 2, position 1 differ in the domain or the token");
}

TEST_CASE("Groups of tokens", "[analysis]") {
  const TracedTokens tokens = by_hand();
  CHECK(by_domain(tokens).of == List<Index>{0, 0, 0, 1, 1, 0});
  CHECK(by_domain(tokens).names == std::vector<std::string>{"code", "prose"});
  CHECK(by_position(tokens).of == List<Index>{0, 1, 2, 0, 1, 0});
  const TokenGroups pairs = by_position(tokens, 2);
  CHECK(pairs.of == List<Index>{0, 0, 1, 0, 0, 0});
  CHECK(pairs.names == std::vector<std::string>{"0", "2"});
  CHECK(by_token(tokens).key == List<Index>{7, 8, 9});
  CHECK(by_token(tokens, 2).of == List<Index>{0, 1, 0, -1, 0, 1});
  CHECK(all_tokens(tokens).count() == 1);
  CHECK(test::message_of<ConfigError>([&] { by_position(tokens, 0); }) ==
        "by_position: width = 0, expected >= 1");
}

TEST_CASE("The share of experts by hand", "[analysis]") {
  const TracedTokens tokens = by_hand();
  const auto share = expert_share(tokens, tokens.layers[0], by_domain(tokens), kNoIntervals);
  // Code: tokens {0 1} {0 2} {1 0} {0 3}; prose: {2 3} {3 2}.
  CHECK(values_of(share) ==
        std::vector<double>{4.0 / 8, 2.0 / 8, 1.0 / 8, 1.0 / 8, 0, 0, 2.0 / 4, 2.0 / 4});
  CHECK(share[0].chance == 0.25);
  CHECK(std::isnan(share[0].low));
  // Token 7: {0 1} {1 0} {3 2}.
  CHECK(values_of(expert_share(tokens, tokens.layers[0], by_token(tokens, 3), kNoIntervals)) ==
        std::vector<double>{2.0 / 6, 2.0 / 6, 1.0 / 6, 1.0 / 6});
}

TEST_CASE("The rate of repeated experts by hand", "[analysis]") {
  // First choices 0 0 1 | 2 3 | 0: one pair of three repeats. Never across sequences: with the last
  // two sequences together there would be one more pair.
  const TracedTokens tokens = by_hand();
  const TracedLayer& layer = tokens.layers[0];
  const auto first = repeat_rate(tokens, layer, all_tokens(tokens), Repeat::kFirst, kNoIntervals);
  CHECK(first[0].value == Approx(1.0 / 3.0));
  CHECK(first[0].chance == 0.25);
  // Any of two of four: {0 1} {0 2}, {0 2} {1 0} and {2 3} {3 2} share one.
  const auto any = repeat_rate(tokens, layer, all_tokens(tokens), Repeat::kAny, kNoIntervals);
  CHECK(any[0].value == 1.0);
  CHECK(any[0].chance == Approx(1.0 - 1.0 / 6.0));
  const auto domains = repeat_rate(tokens, layer, by_domain(tokens), Repeat::kFirst, kNoIntervals);
  CHECK(values_of(domains) == std::vector<double>{0.5, 0.0});

  // Mixtral's chances (section 5): 12.5 % and about 46 % for two of eight.
  CHECK(chance_of_shared_expert(8, 1, 1) == 0.125);
  CHECK(chance_of_shared_expert(8, 2, 2) == Approx(1.0 - 6.0 / 8.0 * 5.0 / 7.0));
  CHECK(chance_of_shared_expert(3, 2, 2) == 1.0);
  CHECK(chance_of_shared_expert(3, 0, 2) == 0.0);
  // Random loads: as many choices of a token as it made, all different, and no favourites.
  Rng rng(3);
  TracedLayer all{.name = "all", .experts = 3};
  for (int t = 0; t < 5; ++t) all.add({2, 0, 1});
  all.add({1});
  const List<double> of_all = random_load(all, rng);
  CHECK(std::accumulate(of_all.begin(), of_all.end(), 0.0) == 16.0);
  CHECK(*std::min_element(of_all.begin(), of_all.end()) == 5.0);
  CHECK(*std::max_element(of_all.begin(), of_all.end()) == 6.0);
  TracedLayer two{.name = "two", .experts = 6};
  for (int t = 0; t < 300; ++t) two.add({0, 1});
  for (const double load : random_load(two, rng)) {
    CHECK(load == Approx(100.0).margin(45.0));  // 5.5 deviations.
  }

  // A gap in the positions, and a token that the layer has not seen, part neighbours.
  TracedTokens gap = traced({{0, {{1, {0}}, {1, {0}}, {1, {0}}}}}, 2);
  gap.position[2] = 5;
  const auto rate = [&] {
    return repeat_rate(gap, gap.layers[0], by_position(gap), Repeat::kFirst, kNoIntervals);
  };
  CHECK(rate()[0].value == 1.0);
  CHECK(std::isnan(rate()[1].value));
}

TEST_CASE("The ratio of drops by hand", "[analysis]") {
  TracedTokens tokens = by_hand();
  TracedLayer& layer = tokens.layers[0];
  layer.kept[2] = layer.kept[4] = layer.kept[5] = 0;  // One of token 1, both of token 2.
  const auto drops = drop_ratio(tokens, layer, by_position(tokens), kNoIntervals);
  CHECK(values_of(drops) == std::vector<double>{0.0, 0.25, 1.0});
  // The first sequence has one place for each expert, token by token; the others tell nothing.
  CHECK(drops[0].chance == 0.0);
  CHECK(drops[1].chance == 0.5);
  CHECK(drops[2].chance == 0.75);
}

TEST_CASE("The spread by hand", "[analysis]") {
  // Id 1 always goes to expert 0 of 2, id 2 equally to both: (1/4 + 0) / 2 is the mean square.
  const TracedTokens tokens = traced({{0, {{1, {0}}, {2, {0}}, {2, {1}}, {1, {0}}}}}, 2);
  const Estimate spread = routing_spread(tokens, tokens.layers[0], by_token(tokens), kNoIntervals);
  CHECK(spread.value == Approx(std::sqrt(0.125)));
  CHECK(spread.chance == Approx(std::sqrt(0.5 * 0.5 / 2.0)));  // n = 2 in both groups.
  // Random routings have the spread that is expected by chance, in the mean of squares.
  double sum = 0.0;
  double chance = 0.0;
  for (std::uint64_t seed = 0; seed < 50; ++seed) {
    const TracedTokens random = test::random_tokens(4, 50, 6, 2, seed);
    const Estimate e = routing_spread(random, random.layers[0], by_token(random), kNoIntervals);
    sum += e.value * e.value;
    chance += e.chance * e.chance;
  }
  CHECK(sum == Approx(chance).epsilon(0.05));
}

TEST_CASE("Load, entropy and dead experts by hand", "[analysis]") {
  TracedTokens tokens = traced({{0, {{1, {0}}, {1, {0}}, {1, {1}}, {1, {0}}}}}, 4);
  tokens.layers[0].entropy = {0.5F, 1.0F, 0.0F, 0.5F};
  tokens.layers[0].kept[1] = 0;
  const LoadStatistics load = load_statistics(tokens, tokens.layers[0], kNoIntervals);
  // Loads 3 1 0 0 around the mean 1.
  CHECK(load.variation.value == Approx(std::sqrt((4.0 + 0.0 + 1.0 + 1.0) / 4.0)));
  CHECK(load.max_to_mean.value == 3.0);
  CHECK(load.entropy.value == 0.5);
  CHECK(load.load_entropy.value == Approx(-0.75 * std::log(0.75) - 0.25 * std::log(0.25)));
  CHECK(load.dropped.value == 0.25);
  CHECK(load.dead.value == 0.5);
  CHECK(load.variation.chance == Approx(std::sqrt(3.0 / 4.0)));  // (E - k) / (T k).
  CHECK(load.entropy.chance == Approx(std::log(4.0)));
  // Two places, in no order of tokens: 4 E[max(0, N - 2)] / 4 with N of Bin(4, 1/4).
  CHECK(load.dropped.chance == Approx((4.0 * 3.0 + 2.0) / 256.0));

  double squares = 0.0;
  double max = 0.0;
  for (std::uint64_t seed = 0; seed < 100; ++seed) {
    const TracedTokens random = test::random_tokens(2, 20, 5, 2, seed);
    const LoadStatistics l = load_statistics(random, random.layers[0], kNoIntervals);
    squares += l.variation.value * l.variation.value / 100.0;
    max += l.max_to_mean.value / 100.0;
  }
  CHECK(squares == Approx(3.0 / 80.0).epsilon(0.15));
  CHECK(load_statistics(test::random_tokens(2, 20, 5, 2, 1),
                        test::random_tokens(2, 20, 5, 2, 1).layers[0], {.random_routings = 200})
            .max_to_mean.chance == Approx(max).epsilon(0.03));

  const TracedTokens none = traced({}, 4);
  CHECK(std::isnan(load_statistics(none, none.layers[0]).variation.value));
}

TEST_CASE("The top tokens of experts by hand", "[analysis]") {
  const TracedTokens tokens =
      traced({{0, {{5, {0}}, {5, {0}}, {3, {0}}, {5, {1}}, {2, {0}}, {3, {1}}}}}, 3);
  const auto top = top_tokens(tokens, tokens.layers[0], 2);
  REQUIRE(top.size() == 3);
  REQUIRE(top[0].size() == 2);
  CHECK(top[0][0].id == 5);
  CHECK(top[0][0].count == 2);
  CHECK(top[0][0].share_of_expert.value == 0.5);
  CHECK(top[0][0].share_of_expert.chance == 0.5);  // 3 of 6 assignments are the token's.
  CHECK(top[0][0].share_of_token.value == Approx(2.0 / 3.0));
  CHECK(top[0][0].share_of_token.chance == Approx(1.0 / 3.0));
  CHECK(std::isnan(top[0][0].share_of_token.low));  // There is one sequence.
  CHECK(top[0][1].id == 2);                         // As often as 3, and lower.
  CHECK(top[1].size() == 2);
  CHECK(top[2].empty());
  CHECK(top_tokens(tokens, tokens.layers[0], 2, 2)[0][1].id == 3);

  const TracedTokens random = test::random_tokens(30, 40, 4, 2, 5);
  int covered = 0;
  for (const auto& own : top_tokens(random, random.layers[0])) {
    for (const TopToken& token : own) {
      CHECK(token.share_of_token.chance == 0.5);
      CHECK(token.share_of_token.low <= token.share_of_token.value);
      CHECK(token.share_of_token.value <= token.share_of_token.high);
      covered += token.share_of_token.low <= 0.5 ? 1 : 0;
    }
  }
  CHECK(covered >= 20);  // Of 40, which are the largest of their kind.
  CHECK(top_tokens(test::traced({}, 3), test::traced({}, 3).layers[0])[2].empty());
}

TEST_CASE("Co-activation by hand", "[analysis]") {
  // {0 1} {0 2} {1 0} {2 3} {3 2} {0 3} of four.
  const TracedTokens tokens = by_hand();
  const auto together = co_activation(tokens, tokens.layers[0], kNoIntervals);
  CHECK(values_of({together.begin(), together.begin() + 4}) ==
        std::vector<double>{1.0, 0.5, 0.25, 0.25});
  CHECK(together[4 + 0].value == 1.0);  // Both tokens of expert 1 have expert 0.
  CHECK(together[4 + 2].value == 0.0);
  CHECK(together[1].chance == Approx(1.0 / 3.0));
  CHECK(together[0].chance == 1.0);

  TracedTokens two = traced({{0, {{0, {0}}, {0, {0}}, {0, {1}}, {0, {1}}, {0, {1}}}}}, 2);
  TracedLayer next{.name = "next", .experts = 3};
  for (const Index e : {2, 2, 0, 1, 0}) next.add({e});
  two.layers.push_back(next);
  const Matrix<double> flow = expert_flow(two, two.layers[0], two.layers[1], two.all());
  CHECK(flow(0, 2) == 2.0);
  CHECK(flow(1, 0) == 2.0);
  CHECK(flow(1, 1) == 1.0);
  CHECK(flow.sum() == 5.0);
  const Predictability p = predictability(two, two.layers[0], two.layers[1], kNoIntervals);
  CHECK(p.known.value == 0.8);
  CHECK(p.unknown.value == 0.4);
  CHECK(p.unknown.chance == 0.4);
  CHECK(p.known.chance >= 0.4);
  CHECK(p.known.chance < 0.8);
}

TEST_CASE("Mutual information by hand", "[analysis]") {
  // The id decides: one bit. The position says nothing.
  const TracedTokens sure = traced({{0, {{1, {0}}, {2, {1}}}}, {0, {{2, {1}}, {1, {0}}}}}, 2);
  CHECK(mutual_information(sure, sure.layers[0], by_token(sure), kNoIntervals).value ==
        Approx(1.0));
  CHECK(mutual_information(sure, sure.layers[0], by_position(sure), kNoIntervals).value ==
        Approx(0.0).margin(1e-12));
  Matrix<double> count(2, 2);
  count << 3, 1, 1, 3;
  CHECK(mutual_information_of(count) == Approx(0.75 * std::log2(1.5) + 0.25 * std::log2(0.5)));
  CHECK(std::isnan(mutual_information_of(Matrix<double>::Zero(2, 2))));

  // Of few tokens, also random routing seems to know something: (rows - 1) (columns - 1) / (2 n ln
  // 2) bits, to first order (Miller 1955). What counts is the difference from `chance`.
  const TracedTokens random = test::random_tokens(40, 100, 4, 1, 3);
  const Estimate e = mutual_information(random, random.layers[0], by_token(random));
  CHECK(e.chance == Approx(19.0 * 3.0 / (2.0 * 4000.0 * std::log(2.0))).epsilon(0.15));
  CHECK(e.value == Approx(e.chance).epsilon(0.4));
  CHECK(e.low < 0.003);
}

TEST_CASE("The overlap of two routings by hand", "[analysis]") {
  const TracedTokens a = by_hand();
  TracedTokens b = a;
  b.layers[0] = {.name = "moe", .experts = 4};
  for (const std::vector<Index>& e :
       std::vector<std::vector<Index>>{{1, 0}, {0, 2}, {1, 3}, {0, 1}, {3, 2}, {0, 3}}) {
    b.layers[0].add(e);
  }
  const RoutingOverlap overlap = routing_overlap(a, b, "moe", kNoIntervals);
  CHECK(overlap.shared.value == Approx((1.0 + 1.0 + 0.5 + 0.0 + 1.0 + 1.0) / 6.0));
  CHECK(overlap.first.value == Approx(4.0 / 6.0));
  CHECK(overlap.shared.chance == Approx(0.5));
  CHECK(overlap.first.chance == Approx(0.25));
  CHECK(routing_overlap(a, a, "moe", kNoIntervals).shared.value == 1.0);

  TracedTokens other = b;
  other.id[0] = 1;
  CHECK(test::message_of<ConfigError>([&] { routing_overlap(a, other, "moe"); }) ==
        "routing_overlap: the traces have different tokens, expected the same");
  other = b;
  other.layers[0].experts = 5;
  CHECK(test::message_of<ConfigError>([&] { routing_overlap(a, other, "moe"); }) ==
        "routing_overlap: layer 'moe' has 4 experts and 'moe' 5, expected as many in both");

  // Layers of other names and another k: {1}, {0}, {1}, {0}, {3}, {0} of b against a's first k = 2.
  other = b;
  other.layers[0] = {.name = "layers.0.moe", .experts = 4};
  for (const Index e : {1, 0, 1, 0, 3, 0}) other.layers[0].add({e});
  const RoutingOverlap fewer =
      routing_overlap(a, a.layers[0], other, other.layers[0], kNoIntervals);
  CHECK(fewer.shared.value == Approx(5.0 / 6.0 / 2.0));
  CHECK(fewer.first.value == Approx(4.0 / 6.0));
  CHECK(fewer.shared.chance == Approx(0.25));
}

TEST_CASE("An interval covers the truth about as often as it says", "[analysis]") {
  // The share of expert 0 of 4 is 1/4.
  Index covered = 0;
  for (std::uint64_t seed = 0; seed < 100; ++seed) {
    const TracedTokens tokens = test::random_tokens(30, 10, 4, 1, 100 + seed);
    const Estimate e = expert_share(tokens, tokens.layers[0], all_tokens(tokens),
                                    {.replicates = 100, .level = 0.9})[0];
    CHECK(e.low <= e.value);
    CHECK(e.value <= e.high);
    covered += e.low <= 0.25 && 0.25 <= e.high ? 1 : 0;
  }
  CHECK(covered >= 78);
  CHECK(covered <= 98);
}

TEST_CASE("Intervals resample sequences, not tokens", "[analysis]") {
  // All tokens of a sequence go to one expert: 100 tokens of 10 sequences are worth 10.
  std::vector<test::HandSequence> same;
  for (Index s = 0; s < 10; ++s) {
    same.push_back({0, std::vector<test::HandToken>(10, {0, {s % 2}})});
  }
  const TracedTokens tokens = traced(same, 2);
  const Estimate e = expert_share(tokens, tokens.layers[0], all_tokens(tokens))[0];
  CHECK(e.value == 0.5);
  CHECK(e.high - e.low > 0.4);  // About 2 * 1.96 * sqrt(0.25 / 10) = 0.62.
  CHECK(e.high - e.low < 0.8);
  const Estimate again = expert_share(tokens, tokens.layers[0], all_tokens(tokens))[0];
  CHECK(again.low == e.low);

  const TracedTokens one = traced({same[0]}, 2);
  CHECK(std::isnan(expert_share(one, one.layers[0], all_tokens(one))[0].low));
  CHECK(test::message_of<ConfigError>([&] {
          expert_share(one, one.layers[0], all_tokens(one), {.level = 1.0});
        }) == "BootstrapConfig: level = 1, expected 0 <= level < 1");
  CHECK(test::message_of<ConfigError>([&] {
          expert_share(one, one.layers[0], all_tokens(one), {.replicates = -1});
        }) == "BootstrapConfig: replicates = -1, expected >= 0");
  CHECK(test::message_of<ConfigError>([&] {
          mutual_information(one, one.layers[0], all_tokens(one), {.random_routings = 0});
        }) == "BootstrapConfig: random_routings = 0, expected >= 1");
}

}  // namespace weir::statistics_test
