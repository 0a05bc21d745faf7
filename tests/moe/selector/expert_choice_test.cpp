// SPDX-License-Identifier: MIT
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>
#include <string>
#include <vector>

#include <weir/moe/capacity/dropless.hpp>
#include <weir/moe/concepts.hpp>
#include <weir/moe/experts/glu_bank.hpp>
#include <weir/moe/moe_layer.hpp>
#include <weir/moe/router/linear_router.hpp>
#include <weir/moe/selector/expert_choice.hpp>

#include "moe/selector/selected.hpp"
#include "support/allocations.hpp"
#include "support/catch.hpp"
#include "support/gradient.hpp"
#include "support/matrices.hpp"
#include "support/routing.hpp"
#include "support/threads.hpp"

namespace weir::expert_choice_test {
using test::route;

static_assert(Selector<ExpertChoice<float>, float>);

namespace {

std::vector<Index> experts_of(const Routing<double>& routing, Index t) {
  return {routing.expert.begin() + routing.first(t), routing.expert.begin() + routing.last(t)};
}

std::vector<Index> loads(const Routing<double>& routing, Index begin, Index end) {
  RowVector<double> load = RowVector<double>::Zero(routing.experts());
  routing.add_load(begin, end, load);
  std::vector<Index> result;
  for (const double l : load) result.push_back(static_cast<Index>(l));
  return result;
}

/// Softmax rows (.7 .2 .1), (.6 .1 .3), (.5 .3 .2).
Matrix<double> three_tokens() {
  Matrix<double> p(3, 3);
  p << 0.7, 0.2, 0.1, 0.6, 0.1, 0.3, 0.5, 0.3, 0.2;
  return p.array().log();
}

/// The same routing, as the definition has it: a stable sort of each column.
Routing<double> by_definition(const ExpertChoice<double>& selector, const Matrix<double>& logits,
                              const Pass& pass) {
  Routing<double> routing;
  routing.begin("by_definition", logits, pass);
  const Index tokens = logits.rows();
  const Index experts = logits.cols();
  Matrix<double> score = Matrix<double>::Zero(tokens, experts);
  std::vector<std::vector<Index>> chosen(static_cast<std::size_t>(tokens));
  routing.rows.for_each_group(selector.config().scope, [&](Index begin, Index end) {
    std::vector<Index> real;
    for (Index t = begin; t < end; ++t) {
      if (!pass.is_padding(t)) real.push_back(t);
    }
    for (const Index t : real) {
      for (Index e = 0; e < experts; ++e) {
        double sum = 0.0;
        if (selector.config().over == ScoresOver::kExperts) {
          for (Index j = 0; j < experts; ++j) sum += std::exp(logits(t, j));
        } else {
          for (const Index u : real) sum += std::exp(logits(u, e));
        }
        score(t, e) = std::exp(logits(t, e)) / sum;
      }
    }
    const Index count = selector.capacity(static_cast<Index>(real.size()), experts);
    for (Index e = 0; e < experts; ++e) {
      std::vector<Index> order = real;
      std::stable_sort(order.begin(), order.end(),
                       [&](Index a, Index b) { return score(a, e) > score(b, e); });
      for (Index i = 0; i < count; ++i) {
        chosen[static_cast<std::size_t>(order[static_cast<std::size_t>(i)])].push_back(e);
      }
    }
  });
  for (Index t = 0; t < tokens; ++t) {
    auto& list = chosen[static_cast<std::size_t>(t)];
    std::stable_sort(list.begin(), list.end(),
                     [&](Index a, Index b) { return score(t, a) > score(t, b); });
    for (const Index e : list) {
      routing.expert.push_back(e);
      routing.weight.push_back(score(t, e) /
                               (selector.config().divide ? static_cast<double>(list.size()) : 1.0));
    }
    routing.offsets[t + 1] = routing.assignments();
  }
  return routing;
}

}  // namespace

TEST_CASE("ExpertChoice matches a routing worked out by hand", "[moe][selector][expert_choice]") {
  // C = 1: expert 0 takes token 0 (.7), expert 1 token 2 (.3), expert 2 token 1 (.3).
  const Routing<double> one = route(ExpertChoice<double>({.factor = 1.0}), three_tokens());
  CHECK(one.offsets == std::vector<Index>{0, 1, 2, 3});
  CHECK(one.expert == std::vector<Index>{0, 2, 1});
  CHECK(one.weight[0] == Approx(0.7));
  CHECK(one.weight[1] == Approx(0.3));
  CHECK(one.weight[2] == Approx(0.3));

  // C = 2: expert 0 takes 0 and 1, expert 1 takes 2 and 0, expert 2 takes 1 and 2.
  const Routing<double> two = route(ExpertChoice<double>({.factor = 2.0}), three_tokens());
  CHECK(two.expert == std::vector<Index>{0, 1, 0, 2, 1, 2});
  CHECK(two.weight[5] == Approx(0.2));

  // Divided by two experts per token.
  const Routing<double> divided =
      route(ExpertChoice<double>({.factor = 2.0, .divide = true}), three_tokens());
  CHECK(divided.weight[0] == Approx(0.35));

  // Over the tokens the columns become (7 6 5) / 18, (2 1 3) / 6 and (1 3 2) / 6.
  const Routing<double> tokens =
      route(ExpertChoice<double>({.factor = 1.0, .over = ScoresOver::kTokens}), three_tokens());
  CHECK(tokens.expert == std::vector<Index>{0, 2, 1});
  CHECK(tokens.weight[0] == Approx(7.0 / 18.0));
  CHECK(tokens.weight[1] == Approx(0.5));
  CHECK(tokens.probabilities(0, 0) == Approx(0.7));
}

TEST_CASE("ExpertChoice rounds its capacity as it is told", "[moe][selector][expert_choice]") {
  const auto capacity = [](Rounding rounding, Index multiple, Index tokens) {
    return ExpertChoice<double>({.factor = 1.0, .rounding = rounding, .multiple = multiple})
        .capacity(tokens, 4);
  };
  CHECK(capacity(Rounding::kUp, 1, 13) == 4);
  CHECK(capacity(Rounding::kDown, 1, 13) == 3);
  CHECK(capacity(Rounding::kNearest, 1, 14) == 4);
  CHECK(capacity(Rounding::kDown, 8, 32) == 8);
  CHECK(capacity(Rounding::kDown, 8, 36) == 16);
  CHECK(capacity(Rounding::kDown, 8, 5) == 5);
  CHECK(capacity(Rounding::kDown, 1, 3) == 1);
  CHECK(capacity(Rounding::kUp, 1, 0) == 0);
  const Index huge = std::numeric_limits<Index>::max();
  CHECK(capacity(Rounding::kUp, huge, 9) == 9);
  CHECK(ExpertChoice<double>({.factor = 1e300}).capacity(9, 4) == 9);
}

TEST_CASE("ExpertChoice agrees with its definition, with padding and in sequences",
          "[moe][selector][expert_choice]") {
  for (std::uint64_t seed = 0; seed < 40; ++seed) {
    Rng rng(seed);
    const auto draw = [&](Index least, Index most) {
      return least + static_cast<Index>(rng.bits() % static_cast<std::uint64_t>(most - least + 1));
    };
    const Index experts = draw(1, 9);
    Sequences sequences;
    for (Index s = draw(1, 3); s > 0; --s) sequences.append(draw(1, 12));
    std::vector<std::uint8_t> mask;
    for (Index t = 0; t < sequences.tokens(); ++t) mask.push_back(draw(0, 3) > 0 ? 1 : 0);
    const Pass pass{.sequences = &sequences, .mask = mask};
    const ExpertChoice<double> selector(
        {.factor = 0.5 * static_cast<double>(draw(1, 6)),
         .over = draw(0, 1) == 0 ? ScoresOver::kExperts : ScoresOver::kTokens,
         .scope = draw(0, 1) == 0 ? Scope::kBatch : Scope::kSequence,
         .multiple = draw(1, 3),
         .divide = draw(0, 1) == 0});
    const Matrix<double> logits = test::random_matrix(sequences.tokens(), experts, seed + 100);

    INFO("seed " << seed);
    const Routing<double> routing = route(selector, logits, pass);
    const Routing<double> expected = by_definition(selector, logits, pass);
    REQUIRE(routing.offsets == expected.offsets);
    CHECK(routing.expert == expected.expert);
    CHECK(routing.kept == std::vector<std::uint8_t>(routing.expert.size(), 1));
    for (Index a = 0; a < routing.assignments(); ++a) {
      CHECK(routing.weight[a] == Approx(expected.weight[a]));
    }
    routing.rows.for_each_group(selector.config().scope, [&](Index begin, Index end) {
      const Index count = selector.capacity(routing.rows.real(begin, end), experts);
      CHECK(loads(routing, begin, end) ==
            std::vector<Index>(static_cast<std::size_t>(experts), count));
    });
    const test::Threads threads(3);
    const Routing<double> threaded = route(selector, logits, pass);
    CHECK(threaded.expert == routing.expert);
    CHECK(threaded.weight == routing.weight);
  }
}

TEST_CASE("ExpertChoice gives equal scores to the earlier token and the lower expert",
          "[moe][selector][expert_choice]") {
  const auto over = GENERATE(ScoresOver::kExperts, ScoresOver::kTokens);
  const Routing<double> routing =
      route(ExpertChoice<double>({.factor = 1.0, .over = over}), Matrix<double>::Zero(4, 2));
  CHECK(routing.offsets == std::vector<Index>{0, 2, 4, 4, 4});
  CHECK(experts_of(routing, 0) == std::vector<Index>{0, 1});
}

TEST_CASE("ExpertChoice is not causal: a later token takes an earlier one's place",
          "[moe][selector][expert_choice]") {
  const auto over = GENERATE(ScoresOver::kExperts, ScoresOver::kTokens);
  const ExpertChoice<double> selector({.factor = 1.0, .over = over});
  Matrix<double> logits = three_tokens();
  CHECK(experts_of(route(selector, logits), 0) == std::vector<Index>{0});
  logits(2, 0) = 5.0;
  CHECK(experts_of(route(selector, logits), 0) != std::vector<Index>{0});
}

TEST_CASE("ExpertChoice routes no tokens, one token, and one expert",
          "[moe][selector][expert_choice]") {
  const auto over = GENERATE(ScoresOver::kExperts, ScoresOver::kTokens);
  const ExpertChoice<double> selector({.factor = 1.0, .over = over});
  CHECK(route(selector, Matrix<double>(0, 3)).assignments() == 0);
  CHECK(route(selector, three_tokens().topRows(1)).expert == std::vector<Index>{0, 1, 2});
  CHECK(route(selector, Matrix<double>::Zero(5, 1)).assignments() == 5);
  const std::vector<std::uint8_t> none(3, 0);
  const Routing<double> padding = route(selector, three_tokens(), {.mask = none});
  CHECK(padding.assignments() == 0);
  CHECK(padding.probabilities.isZero());
}

TEST_CASE("ExpertChoice gradient agrees with finite differences",
          "[moe][selector][expert_choice][gradient]") {
  const auto over = GENERATE(ScoresOver::kExperts, ScoresOver::kTokens);
  const auto scope = GENERATE(Scope::kBatch, Scope::kSequence);
  const bool divide = GENERATE(false, true);
  const ExpertChoice<double> selector(
      {.factor = 1.5, .over = over, .scope = scope, .divide = divide});
  Sequences sequences;
  sequences.append(4);
  sequences.append(0);
  sequences.append(5);
  const std::vector<std::uint8_t> mask = {1, 1, 0, 1, 1, 1, 1, 1, 0};
  test::check_selector_gradient(selector, test::random_matrix(9, 4, 7),
                                {.training = true, .sequences = &sequences, .mask = mask});
}

TEST_CASE("A layer with ExpertChoice has the gradients of finite differences",
          "[moe][selector][expert_choice][gradient]") {
  const auto over = GENERATE(ScoresOver::kExperts, ScoresOver::kTokens);
  Rng rng(3);
  MoELayer moe(LinearRouter<double>(3, 4, rng), ExpertChoice<double>({.over = over}), Dropless(),
               GluBank<double>(3, 4, 2, rng));
  test::check_gradients(moe, test::random_matrix(7, 3, 4));
}

TEST_CASE("ExpertChoice says what is wrong with its settings", "[moe][selector][expert_choice]") {
  const auto message = [](const ExpertChoiceConfig& config) {
    return test::message_of<ConfigError>(
        [&] { route(ExpertChoice<double>(config), three_tokens()); });
  };
  CHECK(message({.factor = 0.0}) == "ExpertChoice: factor = 0, expected a finite number > 0");
  CHECK(message({.factor = std::nan("")}) ==
        "ExpertChoice: factor = nan, expected a finite number > 0");
  CHECK(message({.multiple = 0}) == "ExpertChoice: multiple = 0, expected >= 1");
  Matrix<double> logits = three_tokens();
  logits(1, 2) = std::nan("");
  CHECK(test::message_of<NonFiniteError>([&] { route(ExpertChoice<double>(), logits); }) ==
        "ExpertChoice: logits[1, 2] = nan, expected a finite number");
}

TEST_CASE("ExpertChoice allocates nothing the second time", "[moe][selector][expert_choice]") {
  if (!test::allocations_are_counted()) return;
  const auto over = GENERATE(ScoresOver::kExperts, ScoresOver::kTokens);
  const ExpertChoice<double> selector({.over = over});
  const Matrix<double> logits = test::random_matrix(37, 5, 31);
  CHECK(test::count_step_allocations(selector, logits) == 0);
}

}  // namespace weir::expert_choice_test
