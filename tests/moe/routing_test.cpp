// SPDX-License-Identifier: MIT
#include <cstdint>
#include <limits>
#include <utility>
#include <vector>

#include <weir/moe/routing.hpp>

#include "support/catch.hpp"
#include "support/matrices.hpp"

using namespace weir;

namespace {

using Groups = std::vector<std::pair<Index, Index>>;

Groups groups(const Routing<double>& routing, Scope scope) {
  Groups groups;
  routing.for_each_group(scope, [&](Index begin, Index end) { groups.emplace_back(begin, end); });
  return groups;
}

}  // namespace

TEST_CASE("Routing without a pass is of no tokens", "[moe][routing]") {
  const Routing<double> routing;
  CHECK(routing.tokens() == 0);
  CHECK(routing.experts() == 0);
  CHECK(routing.assignments() == 0);
  CHECK(routing.real_tokens() == 0);
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
  CHECK(routing.offsets == std::vector<Index>{0, 0, 0, 0, 0});

  routing.assign_each(2);
  CHECK(routing.offsets == std::vector<Index>{0, 2, 2, 4, 6});
  CHECK(routing.first(2) == 2);
  CHECK(routing.last(2) == 4);
  CHECK(routing.assignments() == 6);
  CHECK(routing.weight.size() == 6);
  CHECK(routing.kept == std::vector<std::uint8_t>(6, 1));
}

TEST_CASE("Routing knows its padding", "[moe][routing]") {
  const std::vector<std::uint8_t> mask = {1, 0, 1, 0, 0};
  Pass pass;
  pass.mask = mask;
  Routing<double> routing;
  routing.begin("Test", test::random_matrix(5, 3, 2), pass);
  CHECK_FALSE(routing.is_padding(0));
  CHECK(routing.is_padding(4));
  CHECK(routing.real_tokens() == 2);
  CHECK(routing.real_tokens(1, 3) == 1);
  CHECK(routing.real_tokens(3, 5) == 0);

  routing.begin("Test", test::random_matrix(5, 3, 2), {});
  CHECK_FALSE(routing.is_padding(4));
  CHECK(routing.real_tokens() == 5);
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

TEST_CASE("Routing hands on the generator of its pass", "[moe][routing]") {
  Rng rng(1);
  Routing<double> routing;
  routing.begin("Test", test::random_matrix(3, 4, 7), {.training = true, .rng = &rng});
  CHECK(&routing.generator("Someone") == &rng);
  routing.begin("Test", test::random_matrix(3, 4, 7), {.training = true});
  CHECK(test::message_of<ConfigError>([&] { routing.generator("Someone"); }) ==
        "Someone: pass.rng = null, expected a generator in training");
  routing.begin("Test", test::random_matrix(3, 4, 7), {});
  CHECK(test::message_of<ConfigError>([&] { routing.generator("Someone"); }) ==
        "Someone: pass.rng = null, expected a generator");
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
}
