// SPDX-License-Identifier: MIT
// Experts of one modality, shared by several or free: under every router and selector, tokens reach
// the experts that their modality may use and no others.
#include <cstdint>
#include <limits>
#include <string>
#include <vector>

#include <weir/moe/expert_mask.hpp>
#include <weir/moe/moe_layer.hpp>
#include <weir/moe/router/hash_router.hpp>

#include "support/catch.hpp"
#include "support/every_selector.hpp"
#include "support/matrices.hpp"
#include "support/stages.hpp"

namespace weir::modality_experts_test {

namespace {

using test::kExperts;
using test::kModel;

constexpr Index kRows = 11;

/// Two modalities with an expert each, 0 and 3, and two that they share.
const std::vector<std::uint8_t> kTable = {1, 1, 1, 0,  //
                                          0, 1, 1, 1};
const std::vector<Index> kModality = {0, 1, 1, 0, 0, 1, 0, 1, 0, 1, 1};
const std::vector<std::uint8_t> kReal = {1, 1, 1, 1, 0, 1, 1, 1, 1, 0, 1};
const std::vector<Index> kIds = {0, 1, 2, 3, 4, 5, 6, 7, 0, 3, 2};

/// The expert that the other modality has for itself.
Index forbidden_to(Index modality) {
  return modality == 0 ? 3 : 0;
}

using Moe = test::AnyMoe<double>;

/// Calls `body(name, layer)` for each pair of a router and a selector; capacities and banks come in
/// turn.
template <class Body>
void for_each_layer(Body&& body) {
  auto routers = test::routers<double>();
  routers.push_back({"hash", [](Rng& rng) -> test::AnyRouter<double> {
                       return HashRouter<double>(kModel, kExperts,
                                                 random_hash_table(8, kExperts, rng));
                     }});
  const auto capacities = test::capacities<double>();
  const auto banks = test::banks<double>();
  std::uint64_t number = 0;
  for (const auto& router : routers) {
    for (const auto& selector : test::every_selector<double>()) {
      const auto& capacity = capacities[number % capacities.size()];
      const auto& bank = banks[number % banks.size()];
      Rng rng(++number);
      test::AnyBalancers<double> balancers;
      balancers.add(SwitchLoss<double>({.coefficient = 0.5})).add(ZLoss<double>());
      body(
          router.name + ", " + selector.name + ", " + capacity.name + ", " + bank.name,
          Moe(router.make(rng), selector.make(rng), capacity.make(rng), bank.make(rng), balancers));
    }
  }
}

/// A pass over kRows tokens with the experts of their modalities.
struct Situation {
  std::vector<std::uint8_t> mask = kReal;
  std::vector<std::uint8_t> allowed = modality_mask(kModality, kTable, kExperts, kReal);
  Sequences sequences = Sequences({5, 6});
  Matrix<double> x = test::random_matrix(kRows, kModel, 3);

  Pass pass(bool training, Rng* rng, double aux_scale = 1.0) const {
    return {.training = training,
            .sequences = &sequences,
            .mask = mask,
            .token_ids = kIds,
            .allowed = allowed,
            .rng = rng,
            .aux_scale = aux_scale};
  }

  /// Makes all tokens of a modality padding.
  void remove(Index modality) {
    for (std::size_t t = 0; t < mask.size(); ++t) {
      if (kModality[t] == modality) mask[t] = 0;
    }
  }
};

/// Whether a parameter of that name belongs to an expert.
bool is_of_expert(const std::string& name, Index expert) {
  return name.starts_with("experts." + std::to_string(expert) + ".");
}

Matrix<double> forward(const Moe& moe, const Situation& s, bool training) {
  Rng rng(5);
  Moe::Cache cache;
  return moe.forward(s.x, s.pass(training, &rng), cache);
}

}  // namespace

TEST_CASE("Tokens are routed to experts of their modality alone", "[moe][modality]") {
  const Situation s;
  Index layers = 0;
  Index own = 0;
  for_each_layer([&](const std::string& name, const Moe& moe) {
    INFO(name);
    ++layers;
    for (const bool training : {false, true}) {
      Rng rng(5);
      Moe::Cache cache;
      moe.forward(s.x, s.pass(training, &rng), cache);
      const Routing<double>& routing = cache.routing;
      Index strayed = 0;
      for (Index t = 0; t < kRows; ++t) {
        const Index modality = kModality[static_cast<std::size_t>(t)];
        for (const Index expert : routing.experts_of(t)) {
          strayed += kTable[static_cast<std::size_t>(modality * kExperts + expert)] == 0 ? 1 : 0;
          own += expert == 0 || expert == 3 ? 1 : 0;
        }
      }
      CHECK(strayed == 0);
      for (Index t = 0; t < kRows; ++t) {
        if (s.mask[static_cast<std::size_t>(t)] == 0) continue;
        const Index modality = kModality[static_cast<std::size_t>(t)];
        CHECK(routing.probabilities(t, forbidden_to(modality)) == 0.0);
      }
    }
  });
  CHECK(layers > 400);
  CHECK(own > 10 * layers);  // The experts of one modality are used, too.
}

TEST_CASE("What an expert of another modality computes does not reach a token", "[moe][modality]") {
  const Situation s;
  Index changed_others = 0;
  for_each_layer([&](const std::string& name, const Moe& moe) {
    for (const bool training : {false, true}) {
      const Matrix<double> y = forward(moe, s, training);
      for (const Index modality : {0, 1}) {
        INFO(name << ", modality " << modality << (training ? ", training" : ""));
        Moe other = moe;
        for (const auto& [path, parameter] : parameters(other)) {
          if (!is_of_expert(path, forbidden_to(modality))) continue;
          parameter->value = (-3.0 * parameter->value.array() + 0.5).matrix();
        }
        const Matrix<double> z = forward(other, s, training);
        bool same = true;
        for (Index t = 0; t < kRows; ++t) {
          if (kModality[static_cast<std::size_t>(t)] == modality) {
            same = same && y.row(t) == z.row(t);
          } else if (y.row(t) != z.row(t)) {
            ++changed_others;
          }
        }
        CHECK(same);
      }
    }
  });
  CHECK(changed_others > 1000);  // Those whose expert it is notice.
}

TEST_CASE("No gradient of a token reaches an expert of another modality", "[moe][modality]") {
  const Situation s;
  Index reached = 0;
  for_each_layer([&](const std::string& name, const Moe& initial) {
    for (const Index modality : {0, 1}) {
      INFO(name << ", modality " << modality);
      Moe moe = initial;
      Matrix<double> dy = test::random_matrix(kRows, kModel, 4);
      for (Index t = 0; t < kRows; ++t) {
        if (kModality[static_cast<std::size_t>(t)] != modality) dy.row(t).setZero();
      }
      Rng rng(5);
      Moe::Cache cache;
      moe.forward(s.x, s.pass(true, &rng, 0.0), cache);
      moe.backward(dy, cache);
      bool leaked = false;
      for (const auto& [path, parameter] : parameters(moe)) {
        if (is_of_expert(path, forbidden_to(modality))) {
          leaked = leaked || !parameter->gradient().isZero(0.0);
        } else if (is_of_expert(path, 3 - forbidden_to(modality))) {
          reached += parameter->gradient().isZero(0.0) ? 0 : 1;
        }
      }
      CHECK_FALSE(leaked);
    }
  });
  CHECK(reached > 1000);
}

TEST_CASE("A pass of one modality leaves the experts of the other as they were",
          "[moe][modality]") {
  for_each_layer([&](const std::string& name, const Moe& initial) {
    for (const Index modality : {0, 1}) {
      INFO(name << ", modality " << modality);
      Moe moe = initial;
      Situation s;
      s.remove(1 - modality);
      // Not even what such an expert would make of them may be looked at.
      for (const auto& [path, parameter] : parameters(moe)) {
        if (!is_of_expert(path, forbidden_to(modality))) continue;
        parameter->value.setConstant(std::numeric_limits<double>::quiet_NaN());
      }
      Rng rng(5);
      Moe::Cache cache;
      const Matrix<double> y = moe.forward(s.x, s.pass(true, &rng), cache);
      CHECK(y.allFinite());
      const Matrix<double> dx = moe.backward(test::random_matrix(kRows, kModel, 4), cache);
      CHECK(dx.allFinite());
      for (const auto& [path, parameter] : parameters(moe)) {
        INFO(path);
        if (is_of_expert(path, forbidden_to(modality))) {
          CHECK(parameter->gradient().isZero(0.0));
        } else {
          CHECK(parameter->gradient().allFinite());
        }
      }
      if (Parameter<double>* const vectors = moe.router().expert_vectors()) {
        if (vectors->gradient().rows() == kExperts) {
          CHECK(vectors->gradient().row(forbidden_to(modality)).isZero(0.0));
        }
      }
    }
  });
}

}  // namespace weir::modality_experts_test
