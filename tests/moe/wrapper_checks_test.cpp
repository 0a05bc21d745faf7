// SPDX-License-Identifier: MIT
// What stands around another stage checks that one as a layer does: when it is made, and in each
// pass.
#include <string>
#include <utility>

#include <weir/moe/capacity/dropless.hpp>
#include <weir/moe/capacity/fixed_capacity.hpp>
#include <weir/moe/capacity/renormalise_kept.hpp>
#include <weir/moe/experts/glu_bank.hpp>
#include <weir/moe/experts/input_weighted.hpp>
#include <weir/moe/experts/output_masking.hpp>
#include <weir/moe/experts/pass_dropped.hpp>
#include <weir/moe/moe_layer.hpp>
#include <weir/moe/router/hierarchical_router.hpp>
#include <weir/moe/router/jitter_router.hpp>
#include <weir/moe/router/linear_router.hpp>
#include <weir/moe/selector/around/rank_policy.hpp>
#include <weir/moe/selector/around/replay.hpp>
#include <weir/moe/selector/around/sampled_choice.hpp>
#include <weir/moe/selector/hierarchical_top_k.hpp>
#include <weir/moe/selector/sigmoid_top_k.hpp>
#include <weir/moe/selector/softmax_top_k.hpp>

#include "support/catch.hpp"
#include "support/matrices.hpp"

namespace weir::wrapper_checks_test {

namespace {

const LinearRouter<double> kRouter(test::random_matrix(4, 3, 1));

GluBank<double> bank(Index experts = 4) {
  Rng rng(2);
  return {3, experts, 2, rng};
}

/// What a layer of four experts with these stages says, made by itself.
template <class S, class C = Dropless>
std::string refused(const S& selector, const C& capacity = {}) {
  return test::message_of<ConfigError>([&] { MoELayer(kRouter, selector, capacity, bank()); });
}

/// A capacity of a user's own, whose setting may be changed later.
struct Strict : CapacityBase {
  Index most = 1;

  void check() const { expect_at_least<Index>("Strict", "most", most, 1); }

  template <class T>
  void forward(const Pass& /*pass*/, Routing<T>& /*routing*/, Cache<T>& /*cache*/) const {}
};

}  // namespace

TEST_CASE("Selectors around another one refuse what it refuses", "[moe][selector][wrapper]") {
  const SoftmaxTopK<double> five({.k = 5});
  const std::string expected = "SoftmaxTopK: k = 5, expected 1 <= k <= experts = 4";
  CHECK(refused(five) == expected);
  CHECK(refused(RankPolicy(five)) == expected);
  CHECK(refused(SampledChoice(five)) == expected);
  CHECK(refused(Replay(five)) == expected);
  CHECK(refused(RankPolicy(Replay(five))) == expected);
  CHECK(refused(RankPolicy(SoftmaxTopK<double>({.k = 4}))) == "no exception");
}

TEST_CASE("Selectors around another one refuse the routers that it refuses",
          "[moe][selector][wrapper]") {
  // Two groups of six, and a selector of three groups.
  const HierarchicalRouter router(LinearRouter<double>(test::random_matrix(2, 3, 3)),
                                  LinearRouter<double>(test::random_matrix(12, 3, 4)));
  const HierarchicalTopK<double> selector({.groups = 3});
  const auto message = [&](const auto& around, const auto& of) {
    return test::message_of<ConfigError>([&] { MoELayer(of, around, Dropless(), bank(12)); });
  };
  const std::string expected = "HierarchicalTopK: groups = 3, expected 2 as the router";
  CHECK(message(selector, router) == expected);
  CHECK(message(RankPolicy(selector), router) == expected);
  CHECK(message(RankPolicy(selector), JitterRouter(router)) == expected);
}

TEST_CASE("A selector that is changed inside of another one is refused in the next pass",
          "[moe][selector][wrapper]") {
  MoELayer layer(kRouter, RankPolicy(SigmoidTopK<double>(4)), Dropless(), bank());
  decltype(layer)::Cache cache;
  const Matrix<double> x = test::random_matrix(5, 3, 4);
  layer.forward(x, {}, cache);
  layer.selector().inner().selection_bias().value.resize(1, 3);
  CHECK(test::message_of<ConfigError>([&] {
          layer.forward(x, {}, cache);
        }).starts_with("SigmoidTopK: "));
}

TEST_CASE("A capacity around another one refuses what it refuses", "[moe][capacity][wrapper]") {
  Strict strict;
  strict.most = 0;
  const std::string expected = "Strict: most = 0, expected >= 1";
  CHECK(refused(SoftmaxTopK<double>(), strict) == expected);
  CHECK(refused(SoftmaxTopK<double>(), RenormaliseKept(strict)) == expected);
  CHECK(refused(SoftmaxTopK<double>(), RenormaliseKept(RenormaliseKept(strict))) == expected);
  CHECK(test::message_of<ConfigError>([&] { RenormaliseKept(strict).check(); }) == expected);

  MoELayer layer(kRouter, SoftmaxTopK<double>(), RenormaliseKept(Strict()), bank());
  decltype(layer)::Cache cache;
  const Matrix<double> x = test::random_matrix(5, 3, 4);
  layer.forward(x, {}, cache);
  layer.capacity().inner().most = 0;
  CHECK(test::message_of<ConfigError>([&] { layer.forward(x, {}, cache); }) == expected);
}

TEST_CASE("Banks and routers around another one have its sizes, which a layer checks",
          "[moe][experts][router][wrapper]") {
  Rng rng(5);
  const auto message = [&](const auto& router, const auto& experts) {
    return test::message_of<ConfigError>(
        [&] { MoELayer(router, SoftmaxTopK<double>(), Dropless(), experts); });
  };
  const GluBank<double> five(3, 5, 2, rng);
  const std::string expected = message(kRouter, five);
  CHECK(expected.find("5") != std::string::npos);
  CHECK(message(kRouter, PassDropped(five)) == expected);
  CHECK(message(kRouter, InputWeighted(five)) == expected);
  CHECK(message(kRouter, OutputMasking(five)) == expected);
  CHECK(message(JitterRouter(kRouter), five) == expected);
  const GluBank<double> wide(7, 4, 2, rng);
  CHECK(message(kRouter, wide).find("7") != std::string::npos);
  CHECK(message(kRouter, InputWeighted(wide)) == message(kRouter, wide));
  CHECK(message(JitterRouter(kRouter), wide) == message(kRouter, wide));
}

}  // namespace weir::wrapper_checks_test
