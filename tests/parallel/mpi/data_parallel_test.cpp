// SPDX-License-Identifier: MIT
#include <limits>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include <weir/core/random.hpp>
#include <weir/moe/balance/bias_balance.hpp>
#include <weir/moe/capacity/dropless.hpp>
#include <weir/moe/experts/glu_bank.hpp>
#include <weir/moe/moe_layer.hpp>
#include <weir/moe/router/linear_router.hpp>
#include <weir/moe/selector/sigmoid_top_k.hpp>
#include <weir/optim/adamw.hpp>
#include <weir/optim/clip.hpp>
#include <weir/parallel/mpi/data_parallel.hpp>
#include <weir/parallel/mpi/expert_parallel.hpp>

#include "parallel/mpi/ranks.hpp"
#include "support/catch.hpp"
#include "support/matrices.hpp"

namespace weir::data_parallel_test {

namespace {

constexpr Index kModel = 12, kExperts = 5, kHidden = 8, kTokens = 53;

Index ranks() {
  return test::ranks().size();
}

GluBank<double> whole_bank() {
  Rng rng(3);
  return {kModel, kExperts, kHidden, rng};
}

template <class B>
auto mixture(B bank) {
  Rng rng(4);
  return MoELayer(LinearRouter<double>(kModel, kExperts, rng),
                  SigmoidTopK<double>(kExperts, {.k = 2}), Dropless(), std::move(bank),
                  BiasBalance<double>({.rate = 0.01}));
}
using Parallel = ExpertParallel<GluBank<double>>;
using Mixture = decltype(mixture(std::declval<Parallel>()));
using Whole = decltype(mixture(whole_bank()));

/// Expert 2 is on all ranks, the others on one each.
Mixture spread() {
  Placement placement = Placement::round_robin(kExperts, RankNodes::single(ranks()));
  for (Index r = 0; r < ranks(); ++r) {
    if (!placement.holds(r, 2)) placement = placement.with_replica(2, r);
  }
  return mixture(Parallel(whole_bank(), std::move(placement),
                          std::make_shared<ExpertChannels>(test::ranks())));
}

/// Step `s` of fitting the identity with noise: forward and backward for some of the tokens.
template <class Moe>
double backward(Moe& moe, const Matrix<double>& x, typename Moe::Cache& cache) {
  const Matrix<double> error = moe.forward(x, kTraining, cache) - x;
  moe.backward(2.0 / kTokens * error, cache);
  return error.squaredNorm() / kTokens;
}

Matrix<double> batch(Index step) {
  return test::random_matrix(kTokens, kModel, 100 + static_cast<std::uint64_t>(step));
}

constexpr double kTolerance = 1e-12;

void check_parameters(Mixture& moe, Whole& whole) {
  std::vector<NamedParameter<double>> all = parameters(whole);
  for (const auto& [name, parameter] : parameters(moe)) {
    INFO(name << " on rank " << test::ranks().rank() << " of " << ranks());
    const auto same = std::ranges::find(all, name, &NamedParameter<double>::name);
    REQUIRE(same != all.end());
    CHECK(test::relative_error(parameter->value, same->parameter->value) < kTolerance);
  }
}

}  // namespace

TEST_CASE("Ranks that train together train the model of one process", "[parallel][mpi]") {
  const bool shards = GENERATE(true, false);
  const Index bucket_size = GENERATE(as<Index>{}, 1 << 20, 50);
  Whole whole = mixture(whole_bank());
  Mixture moe = spread();
  AdamW<double> of_whole, of_ranks;
  Whole::Cache whole_cache;
  Mixture::Cache cache;
  DataParallel<double> together(test::ranks(), {bucket_size, shards});
  together.agree(moe);
  for (Index step = 0; step < 4; ++step) {
    const double loss = backward(whole, batch(step), whole_cache);
    const double norm = clip_global_norm(whole, 0.05);
    of_whole.step(whole);

    const double own = backward(moe, test::own_rows(batch(step)), cache);
    together.reduce(moe);
    CHECK(together.clip_global_norm(moe, 0.05) == Approx(norm).epsilon(kTolerance));
    CHECK(norm > 0.05);  // So that it is clipped.
    together.step(of_ranks, moe);
    CHECK(together.sum(own) == Approx(loss).epsilon(kTolerance));
    check_parameters(moe, whole);
    CHECK(moe.selector().selection_bias().value == whole.selector().selection_bias().value);
  }
  CHECK(whole.selector().selection_bias().value.norm() > 0.0);

  Index numbers = 0, owned = 0, kept = 0;
  for (const auto& entry : together.parameters().all()) {
    numbers += entry.size();
    if (entry.owner == together.rank()) owned += entry.size();
  }
  for (const auto& saved : of_ranks.saved_states()) kept += saved.matrices.front().second->size();
  if (shards) CHECK(kept == owned);
  CHECK(together.sum(static_cast<double>(owned)) == static_cast<double>(numbers));
}

TEST_CASE(
    "A sum of gradients has the same bits on all ranks, and experts that no rank reached have "
    "none",
    "[parallel][mpi]") {
  Mixture moe = spread();
  Mixture::Cache cache;
  DataParallel<double> together(test::ranks(), {.shards_states = false});
  together.agree(moe);
  const bool first = test::ranks().rank() == 0;  // The others have no tokens.
  const Matrix<double> x = batch(0).topRows(first ? 1 : 0);
  backward(moe, x, cache);
  Index reached = 0;
  together.reduce(moe);
  for (const auto& entry : together.parameters().all()) {
    if (entry.parameter == nullptr || !entry.is_shared()) continue;
    INFO(entry.name);
    const Matrix<double>& grad = entry.parameter->grad;
    Exchange exchange;
    Channel channel(test::ranks());
    List<double> all;
    const double mark = static_cast<double>(grad.size()) + (entry.parameter->reached ? 0.5 : 0.0);
    all_gather<double>(channel, exchange, "test", std::span(&mark, 1), all);
    for (const double of_rank : all) CHECK(of_rank == mark);
    reached += grad.size() > 0 ? 1 : 0;
    if (grad.size() == 0) continue;
    all_gather<double>(channel, exchange, "test",
                       std::span(grad.data(), static_cast<std::size_t>(grad.size())), all);
    for (Index i = 0; i < all.count(); ++i) CHECK(all[i] == grad.data()[i % grad.size()]);
  }
  if (ranks() > 1) CHECK(reached >= 1);
}

TEST_CASE("A gradient that is not finite on one rank ends the step on all", "[parallel][mpi]") {
  Mixture moe = spread();
  Mixture::Cache cache;
  DataParallel<double> together(test::ranks());
  together.agree(moe);
  backward(moe, test::own_rows(batch(0)), cache);
  const int last = test::ranks().size() - 1;
  if (test::ranks().rank() == last) {
    moe.router().expert_vectors()->gradient()(0, 0) = std::numeric_limits<double>::quiet_NaN();
  }
  together.reduce(moe);
  const std::string message =
      test::message_of<NonFiniteError>([&] { together.clip_global_norm(moe, 1.0); });
  Index owner = -1;
  for (const auto& entry : together.parameters().all()) {
    if (entry.name == "router.weight") owner = entry.owner;
  }
  CHECK(message == "clip_global_norm: gradient of router.weight on rank " + std::to_string(owner) +
                       " has norm nan, expected finite");
  for (const auto& [name, parameter] : parameters(moe)) CHECK(parameter->grad.size() == 0);
  CHECK((moe.balancer<0>().load().array() == 0.0).all());
}

TEST_CASE("DataParallel makes the values of all ranks those of the owners", "[parallel][mpi]") {
  Mixture moe = spread();
  DataParallel<double> together(test::ranks());
  together.agree(moe);
  std::vector<Matrix<double>> before;
  for (const auto& entry : together.parameters().all()) {
    if (entry.parameter == nullptr) continue;
    before.push_back(entry.parameter->value);
    if (entry.owner != together.rank()) entry.parameter->value.setConstant(7.0);
  }
  together.share_values(moe);
  std::size_t i = 0;
  for (const auto& entry : together.parameters().all()) {
    if (entry.parameter != nullptr) CHECK(entry.parameter->value == before[i++]);
  }
}

TEST_CASE("DataParallel says what is wrong", "[parallel][mpi]") {
  CHECK(test::message_of<ConfigError>([] {
          const DataParallel<float> none(test::ranks(), {.bucket_size = 0});
        }) == "DataParallel: bucket_size = 0, expected >= 1");
  Mixture moe = spread();
  DataParallel<double> together(test::ranks());
  together.agree(moe);
  freeze(moe, "router.*");
  CHECK(test::message_of<StateError>([&] { together.reduce(moe); }) ==
        "DataParallel::reduce: the model has other parameters than before, expected agree() on all "
        "ranks after a change");
  if (ranks() == 1) return;
  if (test::ranks().rank() == 0) unfreeze(moe, "router.*");
  CHECK(
      test::message_of<RankError>([&] { together.agree(moe); })
          .starts_with("names of parameters: router.weight of rank 1 is [5, 12], frozen, expected "
                       "[5, 12] as on rank 0"));
}

}  // namespace weir::data_parallel_test
