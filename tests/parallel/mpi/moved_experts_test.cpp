// SPDX-License-Identifier: MIT
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include <weir/core/random.hpp>
#include <weir/moe/capacity/dropless.hpp>
#include <weir/moe/experts/glu_bank.hpp>
#include <weir/moe/moe_layer.hpp>
#include <weir/moe/router/linear_router.hpp>
#include <weir/moe/selector/softmax_top_k.hpp>
#include <weir/optim/adamw.hpp>
#include <weir/parallel/mpi/data_parallel.hpp>
#include <weir/parallel/mpi/expert_parallel.hpp>

#include "parallel/mpi/ranks.hpp"
#include "support/catch.hpp"
#include "support/matrices.hpp"

namespace weir::moved_experts_test {

namespace {

constexpr Index kModel = 10, kExperts = 6, kTokens = 40;

RankNodes nodes() {
  return RankNodes::single(test::ranks().size());
}

auto mixture(const Placement& placement) {
  Rng rng(2);
  const GluBank<double> bank(kModel, kExperts, 8, rng);
  return MoELayer(LinearRouter<double>(kModel, kExperts, rng), SoftmaxTopK<double>({.k = 2}),
                  Dropless(),
                  ExpertParallel<GluBank<double>>(bank, placement,
                                                  std::make_shared<ExpertChannels>(test::ranks())));
}
using Mixture = decltype(mixture(std::declval<Placement>()));

void train(Mixture& moe, DataParallel<double>& together, AdamW<double>& optimizer, Index step) {
  Mixture::Cache cache;
  const Matrix<double> x =
      test::own_rows(test::random_matrix(kTokens, kModel, 10 + static_cast<std::uint64_t>(step)));
  const Matrix<double> error = moe.forward(x, kTraining, cache) - x;
  moe.backward(error, cache);
  together.reduce(moe);
  together.step(optimizer, moe);
}

/// The norm of a parameter, as all ranks know it.
double norm(DataParallel<double>& together, const std::string& name) {
  double own = 0.0;
  for (const auto& entry : together.parameters().all()) {
    if (entry.name != name || entry.owner != together.rank()) continue;
    own = entry.parameter->value.norm();
  }
  return together.sum(own);
}

}  // namespace

TEST_CASE("Experts that move between steps go on as if they had not", "[parallel][mpi]") {
  const bool shards = GENERATE(true, false);
  const Placement first = Placement::contiguous(kExperts, nodes());
  // All on rank 0, spread in another way, and with replicas.
  std::vector<Placement> others = {Placement::from_map({0, 0, 0, 0, 0, 0}, nodes()),
                                   Placement::round_robin(kExperts, nodes())};
  others.push_back(others.back());
  for (Index r = 0; r < nodes().ranks(); ++r) {
    if (!others.back().holds(r, 4)) others.back() = others.back().with_replica(4, r);
  }
  Mixture stays = mixture(first), moves = mixture(first);
  DataParallel<double> of_stays(test::ranks(), {.shards_states = shards});
  DataParallel<double> of_moves(test::ranks(), {.shards_states = shards});
  AdamW<double> optimizer_of_stays, optimizer;
  of_stays.agree(stays);
  of_moves.agree(moves);
  Index step = 0;
  for (const Placement& next : others) {
    for (int i = 0; i < 2; ++i, ++step) {
      train(stays, of_stays, optimizer_of_stays, step);
      train(moves, of_moves, optimizer, step);
    }
    moves.bank().move_experts(next);
    of_moves.agree(moves, optimizer);
    CHECK(moves.bank().placement() == next);
    for (const auto& [name, parameter] : parameters(moves)) {
      if (!name.starts_with("experts.")) continue;
      const Index e = std::stoll(name.substr(8));
      CHECK(next.holds(test::ranks().rank(), e));
      CHECK(parameter->grad.size() > 0);
    }
  }
  for (int i = 0; i < 2; ++i, ++step) {
    train(stays, of_stays, optimizer_of_stays, step);
    train(moves, of_moves, optimizer, step);
  }
  CHECK(of_moves.parameters().all().count() == of_stays.parameters().all().count());
  for (const auto& [name, parameter] : parameters(stays)) {
    if (!name.starts_with("router.")) continue;
    CHECK(norm(of_moves, name) == Approx(norm(of_stays, name)).epsilon(1e-11));
  }
  for (Index e = 0; e < kExperts; ++e) {
    for (const char* const of : {".gate", ".up", ".down"}) {
      const std::string name = "experts." + std::to_string(e) + of;
      INFO(name);
      CHECK(norm(of_moves, name) > 0.0);
      CHECK(norm(of_moves, name) == Approx(norm(of_stays, name)).epsilon(1e-11));
    }
  }
}

TEST_CASE("Experts cannot move to a placement that does not fit", "[parallel][mpi]") {
  Mixture moe = mixture(Placement::contiguous(kExperts, nodes()));
  CHECK(test::message_of<ConfigError>([&] {
          moe.bank().move_experts(Placement::contiguous(5, nodes()));
        }) == "ExpertParallel::move_experts: the placement has 5 experts, expected 6 as routed to");
  CHECK(test::message_of<ConfigError>([&] {
          moe.bank().move_experts(Placement::contiguous(kExperts, RankNodes::single(9)));
        }) == "ExpertParallel::move_experts: the placement is one of 9 ranks, expected " +
                  std::to_string(nodes().ranks()));
}

}  // namespace weir::moved_experts_test
