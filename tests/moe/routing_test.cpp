// SPDX-License-Identifier: MIT
#include <cstdint>
#include <limits>
#include <utility>
#include <vector>

#include <weir/moe/routing.hpp>

#include "support/catch.hpp"
#include "support/matrices.hpp"

namespace weir::routing_test {

namespace {

using Groups = std::vector<std::pair<Index, Index>>;

Groups groups(const Routing<double>& routing, Scope scope) {
  Groups groups;
  routing.rows.for_each_group(scope,
                              [&](Index begin, Index end) { groups.emplace_back(begin, end); });
  return groups;
}

}  // namespace

TEST_CASE("Routing without a pass is of no tokens", "[moe][routing]") {
  const Routing<double> routing;
  CHECK(routing.tokens() == 0);
  CHECK(routing.experts() == 0);
  CHECK(routing.assignments() == 0);
  CHECK(routing.rows.real() == 0);
  RoutingGradient<double> gradient;
  gradient.reset(routing);
  CHECK(gradient.weights.size() == 0);
}

TEST_CASE("Routing gives each real token its assignments", "[moe][routing]") {
  const std::vector<std::uint8_t> mask = {1, 0, 1, 1};
  Pass pass;
  pass.mask = mask;
  Routing<double> routing;
  routing.begin("Test", test::random_matrix(4, 3, 1), pass);
  CHECK(routing.assignments() == 0);
  CHECK(routing.offsets == List<Index>{0, 0, 0, 0, 0});

  routing.assign_each(2);
  CHECK(routing.offsets == List<Index>{0, 2, 2, 4, 6});
  CHECK(routing.first(2) == 2);
  CHECK(routing.last(2) == 4);
  CHECK(routing.assignments() == 6);
  CHECK(routing.weight.size() == 6);
  CHECK(routing.kept == List<std::uint8_t>(6, 1));
}

TEST_CASE("Routing knows its padding", "[moe][routing]") {
  const std::vector<std::uint8_t> mask = {1, 0, 1, 0, 0};
  Pass pass;
  pass.mask = mask;
  Routing<double> routing;
  routing.begin("Test", test::random_matrix(5, 3, 2), pass);
  CHECK_FALSE(routing.rows.is_padding(0));
  CHECK(routing.rows.is_padding(4));
  CHECK(routing.rows.real() == 2);
  CHECK(routing.rows.real(1, 3) == 1);
  CHECK(routing.rows.real(3, 5) == 0);

  routing.begin("Test", test::random_matrix(5, 3, 2), {});
  CHECK_FALSE(routing.rows.is_padding(4));
  CHECK(routing.rows.real() == 5);
}

TEST_CASE("Routing groups tokens by batch or sequence", "[moe][routing]") {
  const Sequences lengths({2, 0, 3});
  Pass pass;
  pass.sequences = &lengths;
  Routing<double> routing;
  routing.begin("Test", test::random_matrix(5, 3, 3), pass);
  CHECK(groups(routing, Scope::kBatch) == Groups{{0, 5}});
  CHECK(groups(routing, Scope::kSequence) == Groups{{0, 2}, {2, 2}, {2, 5}});

  routing.begin("Test", test::random_matrix(4, 3, 3), {});  // One sequence if none is named.
  CHECK(groups(routing, Scope::kSequence) == Groups{{0, 4}});
}

TEST_CASE("Routing counts the load, dropped or not", "[moe][routing]") {
  Routing<double> routing;
  routing.begin("Test", test::random_matrix(3, 4, 4), {});
  routing.assign_each(2);
  routing.expert = {0, 3, 3, 1, 0, 3};
  routing.kept[1] = 0;
  RowVector<double> load = RowVector<double>::Constant(4, 10.0);
  routing.add_load(0, 3, load);
  RowVector<double> expected(4);
  expected << 12.0, 11.0, 10.0, 13.0;
  CHECK(load == expected);

  routing.add_load(1, 2, load);
  expected << 12.0, 12.0, 10.0, 14.0;
  CHECK(load == expected);
}

TEST_CASE("Routing may begin from its own logits", "[moe][routing]") {
  const Matrix<double> logits = test::random_matrix(4, 3, 5);
  Routing<double> routing;
  routing.begin("Test", logits, {});
  routing.begin("Test", routing.logits, {});
  CHECK(routing.logits == logits);
}

TEST_CASE("Routing refuses logits that are not finite, except in padding", "[moe][routing]") {
  Matrix<float> logits = test::random_matrix<float>(3, 4, 6);
  logits(1, 2) = std::numeric_limits<float>::infinity();
  Routing<float> routing;
  CHECK(test::message_of<NonFiniteError>([&] { routing.begin("Test", logits, {}); }) ==
        "Test: logits[1, 2] = inf, expected a finite number");

  const std::vector<std::uint8_t> mask = {1, 0, 1};
  Pass pass;
  pass.mask = mask;
  routing.begin("Test", logits, pass);
  CHECK(routing.tokens() == 3);
}

TEST_CASE("Routing refuses a pass that does not fit", "[moe][routing]") {
  const std::vector<std::uint8_t> mask = {1, 0};
  Pass pass;
  pass.mask = mask;
  Routing<double> routing;
  CHECK(test::message_of<ShapeError>([&] {
          routing.begin("Test", test::random_matrix(3, 4, 7), pass);
        }) == "Test: pass.mask has 2 entries, expected 3 (one per token)");
  CHECK(routing.tokens() == 0);
}

TEST_CASE("Routing applies the selector's weights unless a policy sets others", "[moe][routing]") {
  Routing<double> routing;
  routing.begin("Test", test::random_matrix(2, 3, 7), {});
  routing.assign_each(1);
  routing.weight = {0.5, 0.25};
  CHECK(routing.applied_weight(1) == 0.25);
  routing.applied = {1.0, 2.0};
  CHECK(routing.applied_weight(1) == 2.0);
  CHECK(routing.weight[1] == 0.25);

  routing.begin("Test", test::random_matrix(2, 3, 7), {});
  CHECK(routing.applied.empty());
}

TEST_CASE("Routing knows which experts the pass forbids", "[moe][routing]") {
  const std::vector<std::uint8_t> allowed = {1, 0, 1, 1, 1, 0};
  const Matrix<double> logits = test::random_matrix(2, 3, 7);
  Routing<double> routing;
  routing.begin("Test", logits, {.allowed = allowed});
  CHECK(routing.restricted);
  for (Index t = 0; t < 2; ++t) {
    for (Index e = 0; e < 3; ++e) {
      const bool forbidden = allowed[static_cast<std::size_t>(3 * t + e)] == 0;
      CHECK(routing.is_forbidden(t, e) == forbidden);
      if (!forbidden) CHECK(routing.logits(t, e) == logits(t, e));
    }
  }
  routing.begin("Test", logits, {});
  CHECK_FALSE(routing.restricted);
  CHECK_FALSE(routing.is_forbidden(0, 1));
}

TEST_CASE("Routing forgets the noise and the assignments of the pass before", "[moe][routing]") {
  const std::vector<NoiseLevel<double>> levels(2);
  Routing<double> routing;
  routing.begin("Test", test::random_matrix(2, 3, 7), {});
  routing.assign_each(2);
  routing.noise = levels;
  routing.begin("Test", test::random_matrix(4, 3, 7), {});
  CHECK(routing.noise.empty());
  CHECK(routing.tokens() == 4);
  CHECK(routing.assignments() == 0);
  CHECK(routing.weight.empty());
}

TEST_CASE("Assignments list the experts of a token, best first", "[moe][routing]") {
  Assignments assignments;
  assignments.expert_count = 4;
  assignments.offsets = {0, 2, 2, 3};
  assignments.expert = {3, 0, 1};
  const auto of = [&](Index t) {
    const auto experts = assignments.experts_of(t);
    return std::vector<Index>(experts.begin(), experts.end());
  };
  CHECK(assignments.tokens() == 3);
  CHECK(assignments.experts() == 4);
  CHECK(of(0) == std::vector<Index>{3, 0});
  CHECK(of(1).empty());
  CHECK(of(2) == std::vector<Index>{1});
}

TEST_CASE("RoutingGradient is reset to zeros of the routing's shapes", "[moe][routing]") {
  Routing<double> routing;
  routing.begin("Test", test::random_matrix(3, 4, 8), {});
  routing.assign_each(2);
  RoutingGradient<double> gradient;
  gradient.logits = test::random_matrix(3, 4, 9);
  gradient.reset(routing);
  CHECK(gradient.logits == Matrix<double>::Zero(3, 4));
  CHECK(gradient.probabilities == Matrix<double>::Zero(3, 4));
  CHECK(gradient.weights == RowVector<double>::Zero(6));

  std::vector<NoiseLevel<double>> noise(1);
  noise[0].clean = noise[0].deviation = test::random_matrix(3, 4, 10);
  routing.noise = noise;
  gradient.reset(routing);
  REQUIRE(gradient.noise.size() == 1);
  CHECK(gradient.noise[0].clean == Matrix<double>::Zero(3, 4));
  CHECK(gradient.noise[0].deviation == Matrix<double>::Zero(3, 4));
}

}  // namespace weir::routing_test
