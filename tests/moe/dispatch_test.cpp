// SPDX-License-Identifier: MIT
#include <cstdint>
#include <functional>
#include <limits>
#include <span>
#include <utility>
#include <vector>

#include <weir/core/parallel.hpp>
#include <weir/moe/dispatch.hpp>

#include "support/catch.hpp"
#include "support/gradient.hpp"
#include "support/matrices.hpp"

namespace weir::dispatch_test {

namespace {

/// Four tokens, three experts, k = 2; the first choice of token 2 is dropped.
Routing<double> small_routing() {
  Routing<double> routing;
  routing.begin("Test", Matrix<double>::Zero(4, 3), {});
  routing.assign_each(2);
  routing.expert = {2, 0, 0, 1, 2, 1, 0, 2};
  routing.weight = {0.5, 0.25, 1.0, 2.0, 3.0, 4.0, 0.125, 8.0};
  routing.kept[4] = 0;
  return routing;
}

/// Up to `experts` different experts per token and some dropped assignments, all at random; some
/// tokens have none.
template <class T>
Routing<T> random_routing(Index tokens, Index experts, std::uint64_t seed) {
  Rng rng(seed);
  Routing<T> routing;
  routing.begin("Test", Matrix<T>::Zero(tokens, experts), {});
  for (Index t = 0; t < tokens; ++t) {
    for (Index e = 0; e < experts; ++e) {
      if (rng.uniform() < 0.5) continue;
      routing.expert.push_back((e + t) % experts);
      routing.weight.push_back(static_cast<T>(rng.normal()));
      routing.kept.push_back(rng.uniform() < 0.8 ? 1 : 0);
    }
    routing.offsets[t + 1] = routing.assignments();
  }
  return routing;
}

template <class T>
Dispatch<T> dispatch_of(const Routing<T>& routing) {
  Dispatch<T> dispatch;
  dispatch.build(routing);
  return dispatch;
}

std::vector<Index> slots_of(const Dispatch<double>& dispatch, Index token) {
  const std::span<const Index> slots = dispatch.slots_of(token);
  return {slots.begin(), slots.end()};
}

}  // namespace

TEST_CASE("Dispatch matches a sort worked out by hand", "[moe][dispatch]") {
  const Dispatch<double> dispatch = dispatch_of(small_routing());
  REQUIRE(dispatch.experts() == 3);
  REQUIRE(dispatch.tokens() == 4);
  REQUIRE(dispatch.slots() == 7);
  CHECK(dispatch.assignments() == 8);

  // Expert 0: tokens 0, 1, 3.  Expert 1: tokens 1, 2.  Expert 2: tokens 0, 3 (2 is dropped).
  CHECK(dispatch.begin(0) == 0);
  CHECK(dispatch.begin(1) == 3);
  CHECK(dispatch.begin(2) == 5);
  CHECK(dispatch.end(2) == 7);
  CHECK(dispatch.rows(0) == 3);
  std::vector<Index> tokens;
  std::vector<Index> assignments;
  std::vector<double> weights;
  for (Index s = 0; s < 7; ++s) {
    tokens.push_back(dispatch.token(s));
    assignments.push_back(dispatch.assignment(s));
    weights.push_back(dispatch.weight(s));
  }
  CHECK(tokens == std::vector<Index>{0, 1, 3, 1, 2, 0, 3});
  CHECK(assignments == std::vector<Index>{1, 2, 6, 3, 5, 0, 7});
  CHECK(weights == std::vector<double>{0.25, 1.0, 0.125, 2.0, 4.0, 0.5, 8.0});

  // And back, the best choice first.
  CHECK(slots_of(dispatch, 0) == std::vector<Index>{5, 0});
  CHECK(slots_of(dispatch, 1) == std::vector<Index>{1, 3});
  CHECK(slots_of(dispatch, 2) == std::vector<Index>{4});
  CHECK(slots_of(dispatch, 3) == std::vector<Index>{2, 6});
}

TEST_CASE("Dispatch is stable and inverts itself", "[moe][dispatch]") {
  const auto seed = GENERATE(range(0, 20));
  const Routing<double> routing =
      random_routing<double>(1 + seed, 1 + seed % 7, static_cast<std::uint64_t>(seed));
  const Dispatch<double> dispatch = dispatch_of(routing);

  Index kept = 0;
  for (const std::uint8_t keep : routing.kept) kept += keep;
  REQUIRE(dispatch.slots() == kept);
  CHECK(dispatch.begin(0) == 0);
  CHECK(dispatch.end(dispatch.experts() - 1) == kept);
  for (Index e = 0; e < dispatch.experts(); ++e) {
    for (Index s = dispatch.begin(e); s < dispatch.end(e); ++s) {
      const Index a = dispatch.assignment(s);
      CHECK(routing.kept[a] == 1);
      CHECK(routing.expert[a] == e);
      CHECK(routing.weight[a] == dispatch.weight(s));
      CHECK(routing.first(dispatch.token(s)) <= a);
      CHECK(a < routing.last(dispatch.token(s)));
      if (s > dispatch.begin(e)) CHECK(dispatch.assignment(s - 1) < a);
    }
  }
  Index seen = 0;
  for (Index t = 0; t < dispatch.tokens(); ++t) {
    Index before = -1;
    for (const Index s : dispatch.slots_of(t)) {
      CHECK(dispatch.token(s) == t);
      CHECK(before < dispatch.assignment(s));
      before = dispatch.assignment(s);
      ++seen;
    }
  }
  CHECK(seen == kept);
}

TEST_CASE("Dispatch names only the experts that have work", "[moe][dispatch]") {
  Routing<double> routing = small_routing();
  routing.kept[3] = routing.kept[5] = 0;  // All that expert 1 had.
  std::vector<Index> calls;
  dispatch_of(routing).for_each_expert([&](std::size_t e, Index begin, Index rows) {
    calls.insert(calls.end(), {static_cast<Index>(e), begin, rows});
  });
  CHECK(calls == std::vector<Index>{0, 0, 3, 2, 3, 2});
}

TEST_CASE("Dispatch keeps nothing of the routing before", "[moe][dispatch]") {
  Dispatch<double> dispatch = dispatch_of(random_routing<double>(40, 9, 1));
  dispatch.build(small_routing());
  CHECK(dispatch.slots() == 7);
  CHECK(dispatch.experts() == 3);
  CHECK(slots_of(dispatch, 3) == std::vector<Index>{2, 6});
}

TEST_CASE("Dispatch lists what was dropped", "[moe][dispatch]") {
  Routing<double> routing = small_routing();
  routing.kept[6] = 0;
  Dispatch<double> dispatch = dispatch_of(routing);
  REQUIRE(dispatch.dropped().size() == 2);
  CHECK(dispatch.dropped()[0].token == 2);
  CHECK(dispatch.dropped()[0].assignment == 4);
  CHECK(dispatch.dropped()[0].weight == 3.0);
  CHECK(dispatch.dropped()[1].token == 3);
  CHECK(dispatch.dropped()[1].assignment == 6);
  CHECK(dispatch.dropped()[1].weight == 0.125);
  routing.kept.assign(8, 1);
  dispatch.build(routing);
  CHECK(dispatch.dropped().empty());
}

TEST_CASE("Dispatch has the weights that are applied, or those it is given", "[moe][dispatch]") {
  Routing<double> routing = small_routing();
  routing.applied = {1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0, 8.0};
  Dispatch<double> dispatch = dispatch_of(routing);
  for (Index s = 0; s < 7; ++s) {
    CHECK(dispatch.weight(s) == static_cast<double>(dispatch.assignment(s) + 1));
  }
  CHECK(dispatch.dropped()[0].weight == 5.0);

  const Assignments assignments = routing;
  const std::vector<double> weight(8, 0.5);
  dispatch.build(assignments, weight);
  CHECK(dispatch.slots() == 7);
  for (Index s = 0; s < 7; ++s) CHECK(dispatch.weight(s) == 0.5);
  CHECK(slots_of(dispatch, 3) == std::vector<Index>{2, 6});
}

TEST_CASE("A part of a dispatch has some of its slots", "[moe][dispatch]") {
  const Dispatch<double> whole = dispatch_of(small_routing());
  Dispatch<double> part;
  std::vector<std::pair<Index, Index>> asked;
  part.build_part(whole, 2, [&](Index e, Index s) {
    asked.emplace_back(e, s);
    return s != 1;
  });
  CHECK(asked == std::vector<std::pair<Index, Index>>{{0, 0}, {0, 1}, {0, 2}, {1, 3}, {1, 4}});
  CHECK(part.experts() == 2);
  CHECK(part.tokens() == 4);
  CHECK(part.assignments() == 8);
  CHECK(part.dropped().empty());
  REQUIRE(part.slots() == 4);
  CHECK(part.begin(1) == 2);
  CHECK(part.end(1) == 4);
  std::vector<Index> assignments;
  for (Index s = 0; s < 4; ++s) {
    const Index of_whole = s == 0 ? 0 : s + 1;
    CHECK(part.token(s) == whole.token(of_whole));
    CHECK(part.weight(s) == whole.weight(of_whole));
    assignments.push_back(part.assignment(s));
  }
  CHECK(assignments == std::vector<Index>{1, 6, 3, 5});
  CHECK(slots_of(part, 0) == std::vector<Index>{0});
  CHECK(slots_of(part, 1) == std::vector<Index>{2});
  CHECK(slots_of(part, 2) == std::vector<Index>{3});
  CHECK(slots_of(part, 3) == std::vector<Index>{1});

  part.build_part(whole, 3, [](Index, Index) { return true; });  // And nothing of before.
  for (Index at = 0; at < part.slots(); ++at) CHECK(part.weight(at) == whole.weight(at));
  CHECK(part.slots() == 7);
  for (Index t = 0; t < 4; ++t) CHECK(slots_of(part, t) == slots_of(whole, t));
}

TEST_CASE("Dispatch takes no tokens, and tokens without assignments", "[moe][dispatch]") {
  const auto tokens = GENERATE(as<Index>{}, 0, 1, 3);
  Routing<double> routing;
  routing.begin("Test", Matrix<double>::Zero(tokens, 2), {});
  const Dispatch<double> dispatch = dispatch_of(routing);
  CHECK(dispatch.tokens() == tokens);
  CHECK(dispatch.slots() == 0);
  CHECK(dispatch.rows(1) == 0);

  Matrix<double> packed(0, 5);
  gather<double>(test::random_matrix(tokens, 5, 2), dispatch, packed);
  Matrix<double> y = Matrix<double>::Ones(tokens, 5);
  combine<double>(packed, dispatch, y);
  CHECK(y.isZero(0.0));
  combine_backward<double>(y, packed, dispatch, packed, {});
  Matrix<double> dx = Matrix<double>::Ones(tokens, 5);
  gather_backward<double>(packed, dispatch, dx);
  CHECK(dx.isZero(0.0));

  const Routing<double> none;
  CHECK(dispatch_of(none).tokens() == 0);
  CHECK(dispatch_of(none).experts() == 0);
}

TEST_CASE("gather and combine match numbers worked out by hand", "[moe][dispatch]") {
  const Dispatch<double> dispatch = dispatch_of(small_routing());
  Matrix<double> x(4, 1);
  x << 10.0, 20.0, 30.0, 40.0;
  Matrix<double> packed(7, 1);
  gather<double>(x, dispatch, packed);
  Matrix<double> gathered(7, 1);
  gathered << 10.0, 20.0, 40.0, 20.0, 30.0, 10.0, 40.0;
  CHECK(packed == gathered);

  packed << 1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0;
  Matrix<double> y(4, 1);
  combine<double>(packed, dispatch, y);
  Matrix<double> combined(4, 1);
  combined << 0.5 * 6.0 + 0.25 * 1.0, 1.0 * 2.0 + 2.0 * 4.0, 4.0 * 5.0, 0.125 * 3.0 + 8.0 * 7.0;
  CHECK(y == combined);
}

TEST_CASE("combine does not touch what was dropped", "[moe][dispatch]") {
  Routing<double> routing = small_routing();
  routing.weight[4] = std::numeric_limits<double>::quiet_NaN();
  const Dispatch<double> dispatch = dispatch_of(routing);
  const Matrix<double> packed = test::random_matrix(7, 3, 3);
  Matrix<double> y(4, 3);
  combine<double>(packed, dispatch, y);
  CHECK(y.allFinite());

  std::vector<double> d_weight(8, 0.75);
  Matrix<double> d_packed(7, 3);
  combine_backward<double>(y, packed, dispatch, d_packed, d_weight);
  CHECK(d_weight[4] == 0.75);
  CHECK(d_weight[5] == Approx(y.row(2).dot(packed.row(4))));
}

TEST_CASE("gather_backward is the transpose of gather", "[moe][dispatch]") {
  const Dispatch<double> dispatch = dispatch_of(random_routing<double>(30, 6, 4));
  const Matrix<double> x = test::random_matrix(30, 5, 5);
  const Matrix<double> c = test::random_matrix(dispatch.slots(), 5, 6);
  Matrix<double> packed(dispatch.slots(), 5);
  gather<double>(x, dispatch, packed);
  Matrix<double> dx(30, 5);
  gather_backward<double>(c, dispatch, dx);
  CHECK(packed.cwiseProduct(c).sum() == Approx(x.cwiseProduct(dx).sum()).epsilon(1e-13));
}

TEST_CASE("combine_backward agrees with finite differences", "[moe][dispatch][gradient]") {
  Routing<double> routing = random_routing<double>(9, 4, 7);
  Dispatch<double> dispatch = dispatch_of(routing);
  Matrix<double> packed = test::random_matrix(dispatch.slots(), 3, 8);
  const Matrix<double> dy = test::random_matrix(9, 3, 9);
  const auto objective = [&] {
    dispatch.build(routing);
    Matrix<double> y(9, 3);
    combine<double>(packed, dispatch, y);
    return y.cwiseProduct(dy).sum();
  };

  Matrix<double> d_packed(dispatch.slots(), 3);
  std::vector<double> d_weight(routing.weight.size(), 0.0);
  combine_backward<double>(dy, packed, dispatch, d_packed, d_weight);
  CHECK(test::relative_error(d_packed, test::numeric_gradient(packed, objective)) <= 1e-8);

  const Index count = routing.assignments();
  Matrix<double> weight = Eigen::Map<RowVector<double>>(routing.weight.data(), count);
  const Matrix<double> numeric = test::numeric_gradient(weight, [&] {
    routing.weight.assign(weight.data(), weight.data() + count);
    return objective();
  });
  CHECK(test::relative_error(Eigen::Map<RowVector<double>>(d_weight.data(), count), numeric) <=
        1e-8);
}

TEST_CASE("combine and its derivative give a token the same bits wherever it stands",
          "[moe][dispatch]") {
  const auto d = GENERATE(as<Index>{}, 5, 37);
  const Index tokens = 12;
  Routing<float> routing;  // Every token sees both experts.
  routing.begin("Test", Matrix<float>::Zero(tokens, 2), {});
  routing.assign_each(2);
  for (Index a = 0; a < routing.assignments(); ++a) {
    routing.expert[a] = a % 2;
    routing.weight[a] = a % 2 == 0 ? 0.7F : 0.3F;
  }
  const Dispatch<float> dispatch = dispatch_of(routing);
  // The same row for every token, at every alignment.
  const Matrix<float> packed = test::random_matrix<float>(1, d, 10).replicate(2 * tokens, 1);
  const Matrix<float> dy = test::random_matrix<float>(1, d, 11).replicate(tokens, 1);

  Matrix<float> y(tokens, d);
  combine<float>(packed, dispatch, y);
  Matrix<float> d_packed(2 * tokens, d);
  std::vector<float> d_weight(routing.expert.size());
  combine_backward<float>(dy, packed, dispatch, d_packed, d_weight);
  Matrix<float> dx(tokens, d);
  gather_backward<float>(d_packed, dispatch, dx);
  for (Index t = 1; t < tokens; ++t) {
    CHECK(y.row(t) == y.row(0));
    CHECK(d_packed.row(t) == d_packed.row(0));
    CHECK(d_weight[static_cast<std::size_t>(2 * t)] == d_weight[0]);
    CHECK(dx.row(t) == dx.row(0));
  }
}

TEST_CASE("gather, combine and their derivatives give the same bits on any number of threads",
          "[moe][dispatch]") {
  const Dispatch<float> dispatch = dispatch_of(random_routing<float>(600, 8, 12));
  const Matrix<float> x = test::random_matrix<float>(600, 67, 13);
  const auto run = [&](int count) {
    set_threads(count);
    Matrix<float> packed(dispatch.slots(), 67);
    gather<float>(x, dispatch, packed);
    Matrix<float> y(600, 67);
    combine<float>(packed, dispatch, y);
    Matrix<float> d_packed(dispatch.slots(), 67);
    std::vector<float> d_weight(static_cast<std::size_t>(dispatch.assignments()), 0.0F);
    combine_backward<float>(x, packed, dispatch, d_packed, d_weight);
    Matrix<float> dx(600, 67);
    gather_backward<float>(d_packed, dispatch, dx);
    set_threads(1);
    return std::pair(std::vector<Matrix<float>>{packed, y, d_packed, dx}, d_weight);
  };
  CHECK(run(1) == run(2));
}

TEST_CASE("gather, combine and their derivatives refuse matrices that do not fit",
          "[moe][dispatch]") {
  const Dispatch<double> dispatch = dispatch_of(small_routing());  // 4 tokens, 7 slots
  Matrix<double> of_tokens = Matrix<double>::Zero(4, 3);
  Matrix<double> of_slots = Matrix<double>::Zero(7, 3);
  Matrix<double> wrong = Matrix<double>::Zero(5, 2);
  std::vector<double> d_weight(8);
  const auto message = [](const std::function<void()>& action) {
    return test::message_of<ShapeError>(action);
  };
  CHECK(message([&] { gather<double>(wrong, dispatch, of_slots); }) ==
        "gather: x is [5, 2], expected [4, 2]");
  CHECK(message([&] { gather<double>(of_tokens, dispatch, wrong); }) ==
        "gather: packed is [5, 2], expected [7, 3]");
  CHECK(message([&] { combine<double>(of_slots, dispatch, wrong); }) ==
        "combine: y is [5, 2], expected [4, 3]");
  CHECK(message([&] { combine<double>(wrong, dispatch, of_tokens); }) ==
        "combine: packed is [5, 2], expected [7, 2]");
  CHECK(message([&] { combine_backward<double>(wrong, of_slots, dispatch, of_slots, d_weight); }) ==
        "combine_backward: dy is [5, 2], expected [4, 3]");
  CHECK(message([&] {
          combine_backward<double>(of_tokens, wrong, dispatch, of_slots, d_weight);
        }) == "combine_backward: packed is [5, 2], expected [7, 2]");
  CHECK(message([&] {
          combine_backward<double>(of_tokens, of_slots, dispatch, wrong, d_weight);
        }) == "combine_backward: d_packed is [5, 2], expected [7, 3]");
  CHECK(message([&] {
          combine_backward<double>(of_tokens, of_slots, dispatch, of_slots,
                                   std::span(d_weight).first(7));
        }) == "combine_backward: d_weight has 7 entries, expected 8 (one per assignment)");
  CHECK(message([&] { gather_backward<double>(of_slots, dispatch, wrong); }) ==
        "gather_backward: dx is [5, 2], expected [4, 3]");
  CHECK(message([&] { gather_backward<double>(wrong, dispatch, of_tokens); }) ==
        "gather_backward: d_packed is [5, 2], expected [7, 2]");
}

}  // namespace weir::dispatch_test
