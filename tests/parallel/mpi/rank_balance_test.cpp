// SPDX-License-Identifier: MIT
#include <cstdint>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include <weir/core/random.hpp>
#include <weir/moe/balance/global_batch_loss.hpp>
#include <weir/moe/balance/quantile_balance.hpp>
#include <weir/moe/capacity/dropless.hpp>
#include <weir/moe/experts/glu_bank.hpp>
#include <weir/moe/moe_layer.hpp>
#include <weir/moe/router/linear_router.hpp>
#include <weir/moe/selector/biased_softmax_top_k.hpp>
#include <weir/optim/adamw.hpp>
#include <weir/parallel/mpi/data_parallel.hpp>
#include <weir/parallel/mpi/expert_parallel.hpp>
#include <weir/parallel/mpi/rank_batch_loss.hpp>

#include "parallel/mpi/ranks.hpp"
#include "support/catch.hpp"
#include "support/matrices.hpp"

namespace weir::rank_balance_test {

namespace {

constexpr Index kModel = 10, kExperts = 5, kTokens = 37;

static_assert(Balancer<RankBatchLoss<float>, LinearRouter<float>>);

template <class Bank, class... Balancers>
auto mixture(Bank bank, Balancers... balancers) {
  Rng rng(2);
  return MoELayer(LinearRouter<double>(kModel, kExperts, rng),
                  BiasedSoftmaxTopK<double>(kExperts, {.k = 2}), Dropless(), std::move(bank),
                  std::move(balancers)...);
}

GluBank<double> whole() {
  Rng rng(3);
  return {kModel, kExperts, 6, rng};
}
ExpertParallel<GluBank<double>> spread() {
  return {whole(), Placement::contiguous(kExperts, RankNodes::single(test::ranks().size())),
          std::make_shared<ExpertChannels>(test::ranks())};
}

}  // namespace

TEST_CASE("Losses over the batch of all ranks add up to that of one process, as do gradients",
          "[parallel][mpi]") {
  const GlobalBatchLossConfig config{.coefficient = 0.3};
  auto one = mixture(whole(), GlobalBatchLoss<double>(config));
  auto moe =
      mixture(spread(), RankBatchLoss<double>(config, std::make_shared<Channel>(test::ranks())));
  DataParallel<double> together(test::ranks(), {.shards_states = false});
  together.agree(moe);
  AdamW<double> optimizer, of_one;
  for (Index step = 0; step < 2; ++step) {
    for (Index micro = 0; micro < 2; ++micro) {
      const Matrix<double> all =
          test::random_matrix(kTokens, kModel, 20 + static_cast<std::uint64_t>(2 * step + micro));
      const Matrix<double> zero = Matrix<double>::Zero(kTokens, kModel);
      PassRecord record;
      Pass pass = kTraining;
      pass.record = &record;
      typename decltype(one)::Cache cache_of_one;
      one.forward(all, pass, cache_of_one);
      const double expected = record.aux_loss();
      one.backward(zero, cache_of_one);

      record.clear();
      const Matrix<double> x = test::own_rows(all);
      pass.aux_scale = static_cast<double>(x.rows()) / static_cast<double>(kTokens);
      typename decltype(moe)::Cache cache;
      moe.forward(x, pass, cache);
      CHECK(together.sum(record.aux_loss()) == Approx(expected).epsilon(1e-12));
      moe.backward(test::own_rows(zero), cache);
      CHECK(moe.balancer<0>().load() == one.balancer<0>().load());
    }
    together.reduce(moe);
    const Matrix<double>& gradient = moe.router().expert_vectors()->gradient();
    const Matrix<double>& expected = one.router().expert_vectors()->gradient();
    CHECK(expected.norm() > 0.0);
    CHECK(test::relative_error(gradient, expected) < 1e-11);
    together.step(optimizer, moe);
    of_one.step(one);
  }
}

TEST_CASE("A loss over the global batch that counts one rank alone is refused", "[parallel][mpi]") {
  auto moe = mixture(spread(), GlobalBatchLoss<double>({.coefficient = 0.3}));
  auto without = mixture(spread(), GlobalBatchLoss<double>({.coefficient = 0.0}));
  DataParallel<double> together(test::ranks());
  together.agree(without);
  const std::string message = test::message_of<ConfigError>([&] { together.agree(moe); });
  CHECK(message ==
        (test::ranks().size() == 1
             ? "no exception"
             : "DataParallel::agree: 'balancers.0' is a GlobalBatchLoss, which would "
               "count the tokens of each of " +
                   std::to_string(test::ranks().size()) + " ranks alone, expected RankBatchLoss"));
}

TEST_CASE("Quantiles are those of the tokens of all ranks", "[parallel][mpi]") {
  const Index most = GENERATE(as<Index>{}, 65536, 20);
  auto one = mixture(whole(), QuantileBalance<double>({.most_tokens = most}));
  auto moe = mixture(spread(), QuantileBalance<double>({.most_tokens = most}));
  DataParallel<double> together(test::ranks());
  together.agree(moe);
  AdamW<double> optimizer({.learning_rate = 0.0}), of_one({.learning_rate = 0.0});
  for (Index step = 0; step < 3; ++step) {
    const Matrix<double> all =
        test::random_matrix(kTokens, kModel, 40 + static_cast<std::uint64_t>(step));
    typename decltype(one)::Cache cache_of_one;
    one.forward(all, kTraining, cache_of_one);
    one.backward(all, cache_of_one);
    of_one.step(one);
    typename decltype(moe)::Cache cache;
    moe.forward(test::own_rows(all), kTraining, cache);
    moe.backward(test::own_rows(all), cache);
    together.reduce(moe);
    together.step(optimizer, moe);
    CHECK(moe.selector().selection_bias().value.norm() > 0.0);
    CHECK(test::relative_error(moe.selector().selection_bias().value,
                               one.selector().selection_bias().value) < 1e-12);
  }
}

TEST_CASE("Scores that do not fit are refused", "[parallel][mpi]") {
  QuantileBalance<double> quantile;
  const std::vector<double> scores(7, 0.0);
  const std::vector<std::uint8_t> allowed(3, 1);
  CHECK(test::message_of<ShapeError>([&] { quantile.add_scores(scores, 4, allowed); }) ==
        "QuantileBalance::add_scores: 7 scores of 3 experts, expected whole tokens of 3");
  CHECK(test::message_of<ConfigError>([] { const RankBatchLoss<double> none({}, nullptr); }) ==
        "RankBatchLoss: channel = null, expected a Channel");
}

}  // namespace weir::rank_balance_test
