// SPDX-License-Identifier: MIT
#include <cmath>
#include <cstdint>
#include <limits>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include <weir/core/verbs.hpp>
#include <weir/moe/beside/shared_experts.hpp>
#include <weir/moe/capacity/dropless.hpp>
#include <weir/moe/expert_mask.hpp>
#include <weir/moe/experts/glu_bank.hpp>
#include <weir/moe/moe_layer.hpp>
#include <weir/moe/router/linear_router.hpp>
#include <weir/moe/selector/top_k_softmax.hpp>
#include <weir/nn/glu.hpp>
#include <weir/tuning/expert_health.hpp>

#include "support/catch.hpp"
#include "support/matrices.hpp"

namespace weir::expert_health_test {

namespace {

template <class T = double>
auto mixture() {
  Rng rng(3);
  return MoELayer(LinearRouter<T>(6, 5, rng, {.init_scale = 4.0}), TopKSoftmax<T>({.k = 2}),
                  Dropless(), GluBank<T>(6, 5, 4, rng));
}

Matrix<double> x() {
  return test::random_matrix<double>(20, 6, 1);
}

Matrix<double>& weight(auto& layer, const std::string& name) {
  for (auto& [own, parameter] : parameters(layer)) {
    if (own == name || own.ends_with("." + name)) return parameter->value;
  }
  throw std::runtime_error("no weight " + name);
}

}  // namespace

TEST_CASE("Sound experts are sound, and each kind of damage is found", "[tuning]") {
  const auto check = [](auto layer) {
    const auto before = expert_health(layer, 5, x());
    CHECK(damaged_experts(before).empty());
    const auto checksums = checksums_of(before);

    weight(layer, "experts.1.up")(2, 3) = std::numeric_limits<double>::quiet_NaN();
    weight(layer, "experts.2.down") *= 1000.0;
    weight(layer, "experts.3.down").setZero();
    const auto damaged = expert_health(layer, 5, x());
    CHECK(damaged[0].condition == ExpertCondition::kSound);
    CHECK(damaged[1].condition == ExpertCondition::kNonFinite);
    CHECK(damaged[2].condition == ExpertCondition::kExploding);
    CHECK(damaged[3].condition == ExpertCondition::kDead);
    CHECK(damaged[3].output == Approx(0.0).margin(1e-12));
    CHECK(damaged_experts(damaged) == std::vector<Index>{1, 2, 3});

    // One bit of one weight shows in checksums alone.
    double& number = weight(layer, "experts.4.gate")(0, 0);
    number = std::nextafter(number, 2.0);
    const auto changed = expert_health(layer, 5, x(), {.checksums = checksums});
    CHECK(changed[4].condition == ExpertCondition::kChanged);
    CHECK(changed[0].condition == ExpertCondition::kSound);
    CHECK(changed[0].checksum == checksums[0]);
  };
  SECTION("a mixture") {
    check(mixture());
  }
  SECTION("beside shared experts, whose output counts for none") {
    Rng rng(9);
    Glu<double> shared(6, 4, rng);
    shared.down().value *= 50.0;
    check(SharedExperts(mixture(), std::move(shared)));
  }
}

TEST_CASE("An expert is damaged above ten medians, and below a hundredth of one", "[tuning]") {
  auto layer = mixture();
  // Copies of one expert, whose outputs are these times the median.
  const std::vector<double> outputs = {1.0, 9.95, 10.05, 0.0101, 0.0099};
  for (std::size_t e = 1; e < outputs.size(); ++e) {
    const std::string name = "experts." + std::to_string(e) + ".";
    for (const char* const part : {"gate", "up", "down"}) {
      weight(layer, name + part) = weight(layer, std::string("experts.0.") + part);
    }
    weight(layer, name + "down") *= outputs[e];
  }
  const auto damaged = [&](const HealthConfig& config) {
    return damaged_experts(expert_health(layer, 5, x(), config));
  };
  const auto health = expert_health(layer, 5, x());
  CHECK(health[2].condition == ExpertCondition::kExploding);
  CHECK(health[2].output == Approx(10.05));
  CHECK(health[4].condition == ExpertCondition::kDead);
  CHECK(damaged({}) == std::vector<Index>{2, 4});
  CHECK(damaged({.exploding = 9.9}) == std::vector<Index>{1, 2, 4});
  CHECK(damaged({.exploding = 11.0, .dead = 0.0}).empty());
  CHECK(damaged({.dead = 0.0105}) == std::vector<Index>{2, 3, 4});
}

TEST_CASE("The output is that of the expert alone", "[tuning][golden]") {
  auto layer = mixture();
  const auto health = expert_health(layer, 5, x());
  std::vector<double> outputs;
  for (Index e = 0; e < 5; ++e) {
    const std::string name = "experts." + std::to_string(e) + ".";
    const Matrix<double> gate = x() * weight(layer, name + "gate").transpose();
    const Matrix<double> up = x() * weight(layer, name + "up").transpose();
    const Matrix<double> hidden = gate.array() / (1.0 + (-gate.array()).exp()) * up.array();
    outputs.push_back((hidden * weight(layer, name + "down").transpose()).norm());
  }
  for (std::size_t e = 0; e < 5; ++e) {
    CHECK(health[e].output / health[0].output == Approx(outputs[e] / outputs[0]));
  }
}

TEST_CASE("Tokens of masked experts go to others, and the output is finite again", "[tuning]") {
  auto layer = mixture();
  weight(layer, "experts.1.down").setConstant(std::numeric_limits<double>::infinity());
  CHECK_FALSE(infer(layer, x()).allFinite());
  const auto damaged = damaged_experts(expert_health(layer, 5, x()));
  CHECK(damaged == std::vector<Index>{1});
  CHECK(infer(layer, x(), {.allowed = all_but(5, damaged)}).allFinite());
}

TEST_CASE("Where no expert is finite, all are damaged", "[tuning]") {
  auto layer = mixture();
  for (auto& [name, parameter] : parameters(layer)) {
    if (matches_pattern("experts.*", name)) parameter->value.setConstant(NAN);
  }
  CHECK(damaged_experts(expert_health(layer, 5, x())).size() == 5);
}

TEST_CASE("Knowledge that experts keep for themselves goes when they are masked", "[tuning]") {
  // Two domains apart in space, each routed to its own pair of experts.
  Rng rng(3);
  Matrix<double> router = Matrix<double>::Zero(4, 6);
  router(0, 0) = router(1, 0) = 5.0;
  router(2, 0) = router(3, 0) = -5.0;
  MoELayer layer(LinearRouter<double>(router), TopKSoftmax<double>({.k = 2}), Dropless(),
                 GluBank<double>(6, 4, 5, rng));
  Matrix<double> first = test::random_matrix<double>(10, 6, 1);
  Matrix<double> second = first;
  first.col(0).setOnes();
  second.col(0).setConstant(-1.0);
  const std::vector<Index> of_second = {2, 3};
  const auto allowed = all_but(4, of_second);
  CHECK(infer(layer, first, {.allowed = allowed}) == infer(layer, first));
  CHECK(test::relative_error(infer(layer, second, {.allowed = allowed}), infer(layer, second)) >
        0.5);
}

TEST_CASE("A check refuses what it cannot check", "[tuning]") {
  auto layer = mixture();
  const auto message = [&](Index experts, const Matrix<double>& tokens,
                           const HealthConfig& config = {}) {
    return test::message_of<ConfigError>([&] { expert_health(layer, experts, tokens, config); });
  };
  CHECK(message(5, Matrix<double>(0, 6)) == "expert_health: tokens = 0, expected >= 1");
  CHECK(message(6, x()) == "expert_health: expert = 5, expected one that the layer has");
  const std::vector<std::uint64_t> two = {1, 2};
  CHECK(message(5, x(), {.checksums = two}) ==
        "expert_health: 2 checksums, expected 5 (one per expert)");
  set_storage(layer, Storage::kPacked);
  CHECK(test::message_of<StateError>([&] { expert_health(layer, 5, x()); }) ==
        "expert_health: weights are stored for inference, expected Storage::kTrainable");
}

}  // namespace weir::expert_health_test
