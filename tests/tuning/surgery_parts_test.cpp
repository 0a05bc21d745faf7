// SPDX-License-Identifier: MIT
// Surgery on mixtures of other routers, and of banks within wrappers.
#include <string>
#include <vector>

#include <weir/core/verbs.hpp>
#include <weir/moe/capacity/dropless.hpp>
#include <weir/moe/expert_mask.hpp>
#include <weir/moe/experts/any_bank.hpp>
#include <weir/moe/experts/glu_bank.hpp>
#include <weir/moe/experts/input_weighted.hpp>
#include <weir/moe/experts/pass_dropped.hpp>
#include <weir/moe/moe_layer.hpp>
#include <weir/moe/router/cosine_router.hpp>
#include <weir/moe/router/hash_router.hpp>
#include <weir/moe/router/hash_tables.hpp>
#include <weir/moe/router/hierarchical_router.hpp>
#include <weir/moe/router/linear_router.hpp>
#include <weir/moe/router/noisy_router.hpp>
#include <weir/moe/selector/softmax_top_k.hpp>
#include <weir/moe/selector/top_k_softmax.hpp>
#include <weir/nn/linear.hpp>
#include <weir/optim/adamw.hpp>
#include <weir/tuning/expert_parts.hpp>
#include <weir/tuning/expert_scores.hpp>
#include <weir/tuning/surgery.hpp>

#include "support/catch.hpp"
#include "support/matrices.hpp"

namespace weir::surgery_parts_test {

namespace {

constexpr Index kModel = 6;
constexpr Index kExperts = 4;

Matrix<double> tokens() {
  return test::random_matrix(60, kModel, 8);
}

template <class Router, class Bank>
auto mixture(Router router, Bank bank) {
  return MoELayer(std::move(router), TopKSoftmax<double>({.k = 2}), Dropless(), std::move(bank));
}

GluBank<double> bank() {
  Rng rng(4);
  return GluBank<double>(kModel, kExperts, 5, rng);
}

auto noisy() {
  return mixture(NoisyRouter<double>(test::random_matrix(kExperts, kModel, 1),
                                     test::random_matrix(kExperts, kModel, 2)),
                 bank());
}

auto cosine() {
  Rng rng(3);
  return mixture(CosineRouter<double>(kModel, kExperts, rng, {.d_projection = 5}), bank());
}

template <class L>
const Matrix<double>& value_of(L& layer, const std::string& name) {
  for (const auto& [own, parameter] : parameters(layer)) {
    if (own == name) return parameter->value;
  }
  throw std::runtime_error("no parameter " + name);
}

/// Removing, exchanging, cloning and splitting do to the output what they say.
template <class L>
void check(L layer) {
  const Matrix<double> x = tokens();
  L removed = layer;
  const std::vector<Index> excluded = {2};
  const Matrix<double> masked = infer(removed, x, {.allowed = all_but(kExperts, excluded)});
  ExpertSurgery(removed, x).remove(2);
  CHECK(test::relative_error(infer(removed, x), masked) < 1e-12);

  L swapped = layer;
  CHECK(ExpertSurgery(swapped, x).swap(0, 3).relative < 1e-14);

  L one = layer;
  ExpertSurgery of_one(one, x);
  const OutputChange cloned = of_one.clone(1);
  CHECK(of_one.experts() == kExperts + 1);
  CHECK(cloned.tokens < 1.0);
  CHECK(cloned.tokens > 0.0);
}

}  // namespace

TEST_CASE("Experts of other routers are changed like those of a LinearRouter", "[tuning]") {
  SECTION("NoisyRouter") {
    check(noisy());
    auto layer = noisy();
    const auto before = layer;
    ExpertSurgery(layer, tokens()).keep({3, 1, 1});
    for (const char* const name : {"router.weight", "router.noise_weight"}) {
      auto copy = before;
      const Matrix<double>& old = value_of(copy, name);
      REQUIRE(value_of(layer, name).rows() == 3);
      CHECK(value_of(layer, name).row(0) == old.row(3));
      CHECK(value_of(layer, name).row(2) == old.row(1));
    }
  }
  SECTION("CosineRouter") {
    check(cosine());
  }
  SECTION("a bank that weighs its input") {
    Rng rng(1);
    check(mixture(LinearRouter<double>(kModel, kExperts, rng, {.init_scale = 4.0}),
                  InputWeighted(bank())));
  }
  SECTION("a bank that passes on what was dropped") {
    Rng rng(1);
    check(mixture(LinearRouter<double>(kModel, kExperts, rng, {.init_scale = 4.0}),
                  PassDropped(bank())));
  }
}

TEST_CASE("Halves of a split expert move apart in the vectors of any router", "[tuning]") {
  const auto halves = [](auto layer) {
    const Matrix<double> before = router_vectors("test", layer).value;
    Rng rng(6);
    ExpertSurgery(layer, tokens()).split(1, rng, 0.1);
    const Matrix<double>& after = router_vectors("test", layer).value;
    REQUIRE(after.rows() == kExperts + 1);
    CHECK((after.row(1) - before.row(1)).norm() == Approx(0.1 * before.row(1).norm()));
    CHECK((after.row(1) + after.row(4) - 2.0 * before.row(1)).norm() < 1e-12);
    CHECK(after.row(0) == before.row(0));
  };
  halves(noisy());
  halves(cosine());
}

TEST_CASE("An optimizer's memory follows the experts of a NoisyRouter", "[tuning]") {
  auto layer = noisy();
  AdamW<double> optimizer;
  Rng rng(2);
  typename decltype(layer)::Cache cache;
  const Matrix<double> y = layer.forward(tokens(), {.training = true, .rng = &rng}, cache);
  layer.backward(y, cache);
  optimizer.step(layer);
  const auto moment = [&](const std::string& name) {
    for (const auto& saved : optimizer.saved_states()) {
      if (saved.parameter == name) return *saved.matrices[0].second;
    }
    return Matrix<double>();
  };
  const Matrix<double> weight = moment("router.weight");
  const Matrix<double> noise = moment("router.noise_weight");
  ExpertSurgery(layer, tokens(), optimizer, "").keep({2, 0, 3});
  const std::vector<Index> kept = {2, 0, 3};
  for (Index e = 0; e < 3; ++e) {
    const Index from = kept[static_cast<std::size_t>(e)];
    CHECK(moment("router.weight").row(e) == weight.row(from));
    CHECK(moment("router.noise_weight").row(e) == noise.row(from));
  }
}

TEST_CASE("What a router cannot do is refused, and nothing changes", "[tuning]") {
  Rng rng(1);
  const auto message = [&](auto& layer, auto&& operate) {
    const Matrix<double> y = infer(layer, tokens());
    ExpertSurgery surgery(layer, tokens());
    const std::string text = test::message_of<ConfigError>([&] { operate(surgery); });
    CHECK(infer(layer, tokens()) == y);
    return text;
  };
  auto of_noisy = noisy();
  auto of_cosine = cosine();
  const auto add_cold = [&](auto& surgery) { surgery.add_cold(rng); };
  CHECK(message(of_noisy, add_cold) ==
        "ExpertSurgery::add_cold: the layer has 0 weights of linear routers, expected 1");
  CHECK(message(of_cosine, add_cold) ==
        "ExpertSurgery::add_cold: the layer has 0 weights of linear routers, expected 1");
  const auto cold = [&](double logit) {
    return [&rng, logit](auto& surgery) {
      surgery.remap({.source = {0, 1, 2, 3, -1}, .cold_logit = logit, .rng = &rng});
    };
  };
  CHECK(message(of_noisy, cold(-3.0)) ==
        "NoisyRouter::remap_experts: cold_logit = -3, expected 0: the router has no biases");
  CHECK(message(of_cosine, cold(0.0)) ==
        "CosineRouter::remap_experts: the map has a cold expert, expected none: no embedding has a "
        "constant cosine");
  // With a logit of zero, noise brings a cold expert its first tokens.
  CHECK(message(of_noisy, [](auto&) {}) == "no exception");
  ExpertSurgery(of_noisy, tokens()).remap({.source = {0, 1, 2, 3, -1}, .rng = &rng});
  CHECK(value_of(of_noisy, "router.noise_weight").row(4).isZero(0.0));

  const auto remove = [](auto& surgery) { surgery.remove(0); };
  const std::string none =
      "ExpertSurgery: the layer has 0 mixtures whose experts can be changed, expected 1";
  auto two_levels = mixture(HierarchicalRouter(LinearRouter<double>(kModel, 2, rng),
                                               LinearRouter<double>(kModel, kExperts, rng)),
                            bank());
  CHECK(message(two_levels, remove) == none);
  MoELayer hashed(HashRouter<double>(kModel, kExperts, modulo_hash_table(9, kExperts)),
                  SoftmaxTopK<double>({.k = 1}), Dropless(), bank());
  ExpertSurgery of_hashed(hashed, Matrix<double>(0, kModel));
  CHECK(test::message_of<ConfigError>([&] { of_hashed.remap({.source = {0, 1}}); }) == none);

  // A bank of any layers, which have no experts that are known, and of which none can be cold.
  std::vector<Linear<double>> experts;
  for (int e = 0; e < 3; ++e) experts.emplace_back(kModel, kModel, rng);
  auto any = MoELayer(LinearRouter<double>(kModel, 3, rng), SoftmaxTopK<double>({.k = 1}),
                      Dropless(), AnyBank(experts, kModel, kModel));
  CHECK(test::message_of<ConfigError>([&] { expert_parts("test", any, 0); }) ==
        "test: expert 0 has a parameter 'weight', expected one of GluBank, MlpBank or "
        "ClampedGluBank");
  CHECK(message(any,
                [&](auto& surgery) {
                  surgery.remap({.source = {0, -1}, .rng = &rng});
                }) ==
        "AnyBank::remap_experts: the map has a cold expert, expected only experts that are there");
  ExpertSurgery(any, tokens()).remap({.source = {2, 0}});
  CHECK(any.bank().experts() == 2);
  CHECK(any.bank().expert(0).weight().value == experts[2].weight().value);
  CHECK(any.bank().expert(1).weight().value == experts[0].weight().value);
  Linear<double> no_mixture(kModel, kModel, rng);
  ExpertSurgery of_none(no_mixture, tokens());
  CHECK(test::message_of<ConfigError>([&] { of_none.experts(); }) ==
        "ExpertSurgery: the layer has no mixture, expected one");
}

}  // namespace weir::surgery_parts_test
