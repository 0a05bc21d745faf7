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
#include <weir/parallel/mpi/expert_parallel.hpp>

#include "parallel/mpi/ranks.hpp"
#include "support/allocations.hpp"
#include "support/catch.hpp"
#include "support/matrices.hpp"

namespace weir::expert_parallel_test {

namespace {

using Bank = GluBank<float>;
using Parallel = ExpertParallel<Bank>;

constexpr Index kModel = 20, kExperts = 7, kHidden = 12;

static_assert(ExpertBank<Parallel>);

Bank whole_bank() {
  Rng rng(3);
  return {kModel, kExperts, kHidden, rng};
}

template <class B>
auto mixture(B bank) {
  Rng rng(4);
  return MoELayer(LinearRouter<float>(kModel, kExperts, rng), SoftmaxTopK<float>({.k = 2}),
                  Dropless(), std::move(bank));
}

std::shared_ptr<ExpertChannels> channels() {
  return std::make_shared<ExpertChannels>(test::ranks());
}

Index ranks() {
  return test::ranks().size();
}

/// All kinds of placements without replicas; the last rank of the last has no expert if there are
/// others.
std::vector<Placement> placements() {
  const RankNodes nodes = RankNodes::single(ranks());
  std::vector<Index> skewed;
  for (Index e = 0; e < kExperts; ++e) skewed.push_back(e % 3 % std::max<Index>(1, ranks() - 1));
  return {Placement::contiguous(kExperts, nodes), Placement::round_robin(kExperts, nodes),
          Placement::from_map(skewed, nodes)};
}

/// The mixture of all experts in this process, for the tokens of all ranks.
struct Reference {
  decltype(mixture(whole_bank())) moe = mixture(whole_bank());
  Matrix<float> x, dy, y, dx;

  explicit Reference(Index tokens)
      : x(test::random_matrix<float>(tokens, kModel, 5)),
        dy(test::random_matrix<float>(tokens, kModel, 6)) {
    decltype(moe)::Cache cache;
    y = moe.forward(x, kTraining, cache);
    dx = moe.backward(dy, cache);
  }
};

template <class A, class B>
void check_same(const std::string& what, const A& a, const B& b) {
  INFO(what << " on rank " << test::ranks().rank() << " of " << ranks());
  REQUIRE(a.rows() == b.rows());
  REQUIRE(a.cols() == b.cols());
  CHECK((a.array() == b.array()).all());
}

Matrix<float> sum_over_ranks(Matrix<float> m) {
  Matrix<float> sum(m.rows(), m.cols());
  MPI_Allreduce(m.data(), sum.data(), static_cast<int>(m.size()), MPI_FLOAT, MPI_SUM,
                test::ranks().get());
  return sum;
}

}  // namespace

TEST_CASE("ExpertParallel computes the bits of one process, whatever the placement and chunks",
          "[parallel][mpi]") {
  const Index tokens = GENERATE(as<Index>{}, 61, 3, 0);
  Reference reference(tokens);
  const auto shared = channels();
  for (const Placement& placement : placements()) {
    for (const Index chunks : {1, 2, 5}) {
      INFO(tokens << " tokens, " << chunks << " chunks");
      auto moe = mixture(Parallel(whole_bank(), placement, shared, {.chunks = chunks}));
      decltype(moe)::Cache cache;
      for (Index pass = 0; pass < 2; ++pass) {  // The second in the memory of the first.
        zero_gradients(moe);
        check_same("y", moe.forward(test::own_rows(reference.x), kTraining, cache),
                   test::own_rows(reference.y));
        check_same("dx", moe.backward(test::own_rows(reference.dy), cache),
                   test::own_rows(reference.dx));
      }
      std::vector<NamedParameter<float>> whole = parameters(reference.moe);
      for (const auto& [name, parameter] : parameters(moe)) {
        const auto same = std::ranges::find(whole, name, &NamedParameter<float>::name);
        REQUIRE(same != whole.end());
        check_same(name, parameter->value, same->parameter->value);
        if (name.starts_with("router.")) {
          CHECK(test::relative_error(sum_over_ranks(parameter->gradient()),
                                     same->parameter->gradient()) < 1e-5);
        } else {
          check_same("gradient of " + name, parameter->gradient(), same->parameter->gradient());
        }
      }
    }
  }
}

TEST_CASE("ExpertParallel in two levels, or once per node, computes the same bits",
          "[parallel][mpi]") {
  if (ranks() != 4) return;
  const Reference reference(61);
  const auto shared = channels();
  for (const std::vector<Index>& node_of :
       {std::vector<Index>{0, 0, 1, 1}, {0, 1, 0, 1}, {0, 0, 0, 0}, {3, 1, 2, 0}}) {
    const RankNodes nodes(node_of);
    Placement replicated = Placement::contiguous(kExperts, nodes);
    replicated = replicated.with_replica(0, 3);
    for (const Placement& placement : {Placement::round_robin(kExperts, nodes), replicated,
                                       Placement::from_map({0, 0, 1, 1, 0, 2, 2}, nodes)}) {
      for (const bool once : {false, true}) {
        INFO("nodes " << node_of[0] << node_of[1] << node_of[2] << node_of[3] << " once " << once);
        auto moe = mixture(Parallel(whole_bank(), placement, shared,
                                    {.chunks = 3, .two_level = !once, .once_per_node = once}));
        decltype(moe)::Cache cache;
        for (int pass = 0; pass < 2; ++pass) {
          check_same("y", moe.forward(test::own_rows(reference.x), kTraining, cache),
                     test::own_rows(reference.y));
          check_same("dx", moe.backward(test::own_rows(reference.dy), cache),
                     test::own_rows(reference.dx));
        }
      }
    }
  }
  CHECK(test::message_of<ConfigError>([&] {
          Parallel(whole_bank(), Placement::contiguous(kExperts, RankNodes({0, 1, 1, 1})), shared,
                   {.two_level = true});
        }) == "ExpertParallel: two_level with node 1 of 3 ranks, expected 1 as on node 0");
  CHECK(test::message_of<ConfigError>([&] {
          Parallel(whole_bank(), Placement::contiguous(kExperts, RankNodes({0, 1, 1, 1})), shared,
                   {.once_per_node = true});
        }) == "ExpertParallel: once_per_node with node 1 of 3 ranks, expected 1 as on node 0");
}

TEST_CASE("Each rank of an ExpertParallel has the experts of its placement, under their numbers",
          "[parallel][mpi]") {
  for (const Placement& placement : placements()) {
    Parallel bank(whole_bank(), placement, channels());
    std::vector<std::string> names;
    for (const auto& [name, parameter] : parameters(bank)) names.push_back(name);
    std::vector<std::string> expected;
    for (const Index e : placement.experts_on(test::ranks().rank())) {
      for (const char* const of : {".gate", ".up", ".down"}) {
        expected.push_back(std::to_string(e) + of);
      }
    }
    CHECK(names == expected);
  }
}

TEST_CASE("Replicas of an ExpertParallel share the tokens and the gradient", "[parallel][mpi]") {
  Reference reference(61);
  Placement placement = Placement::contiguous(kExperts, RankNodes::single(ranks()));
  for (Index r = 0; r < ranks(); ++r) {
    if (!placement.holds(r, 2)) placement = placement.with_replica(2, r);
  }
  if (ranks() > 1 && !placement.holds(1, 0)) placement = placement.with_replica(0, 1);
  auto moe = mixture(Parallel(whole_bank(), placement, channels()));
  decltype(moe)::Cache cache;
  check_same("y", moe.forward(test::own_rows(reference.x), kTraining, cache),
             test::own_rows(reference.y));
  check_same("dx", moe.backward(test::own_rows(reference.dy), cache), test::own_rows(reference.dx));
  std::vector<NamedParameter<float>> mine = parameters(moe);
  for (const auto& [name, parameter] : parameters(reference.moe)) {
    const auto same = std::ranges::find(mine, name, &NamedParameter<float>::name);
    const Matrix<float> zero =
        Matrix<float>::Zero(parameter->value.rows(), parameter->value.cols());
    const Matrix<float> sum =
        sum_over_ranks(same == mine.end() ? zero : same->parameter->gradient());
    INFO(name);
    CHECK(test::relative_error(sum, parameter->gradient()) < 1e-5);
  }
}

TEST_CASE("What formats round does not depend on the number of ranks", "[parallel][mpi]") {
  const Reference reference(61);
  const Communicator alone(MPI_COMM_SELF);
  const ExpertParallelConfig config = {.dispatch_format = RowFormat::kFp8,
                                       .combine_format = RowFormat::kBfloat16};
  auto one = mixture(Parallel(whole_bank(), Placement::contiguous(kExperts, RankNodes::single(1)),
                              std::make_shared<ExpertChannels>(alone), config));
  decltype(one)::Cache cache_of_one;
  const Matrix<float> y = one.forward(reference.x, kTraining, cache_of_one);
  const Matrix<float> dx = one.backward(reference.dy, cache_of_one);
  const double error = test::relative_error(y, reference.y);
  CHECK(error > 1e-3);  // E4M3 has 4 bits of significand,
  CHECK(error < 0.06);  // so that a number is off by 1/16 at most.

  for (const bool once : {false, true}) {
    ExpertParallelConfig with_others = config;
    with_others.once_per_node = once;
    auto moe = mixture(Parallel(whole_bank(), placements().front(), channels(), with_others));
    decltype(moe)::Cache cache;
    check_same("y", moe.forward(test::own_rows(reference.x), kTraining, cache), test::own_rows(y));
    check_same("dx", moe.backward(test::own_rows(reference.dy), cache), test::own_rows(dx));
  }
}

TEST_CASE("ExpertParallel allocates nothing in the steady state", "[parallel][mpi]") {
  if (!test::allocations_are_counted()) return;
  const bool once = GENERATE(false, true);
  const Reference reference(61);
  const Communicator alone(MPI_COMM_SELF);  // MPI itself allocates for messages.
  auto moe = mixture(Parallel(whole_bank(), Placement::contiguous(kExperts, RankNodes::single(1)),
                              std::make_shared<ExpertChannels>(alone), {.once_per_node = once}));
  decltype(moe)::Cache cache;
  const auto pass = [&] {
    moe.forward(reference.x, kTraining, cache);
    moe.backward(reference.dy, cache);
  };
  pass();
  pass();
  CHECK(test::count_allocations(pass) == 0);
}

TEST_CASE("ExpertParallel refuses what does not fit, by name", "[parallel][mpi]") {
  const RankNodes nodes = RankNodes::single(ranks());
  const auto message = [&](Placement placement, const std::shared_ptr<ExpertChannels>& shared,
                           ExpertParallelConfig config) {
    return test::message_of<ConfigError>(
        [&] { Parallel(whole_bank(), std::move(placement), shared, config); });
  };
  const auto shared = channels();
  CHECK(message(Placement::contiguous(kExperts, nodes), nullptr, {}) ==
        "ExpertParallel: channels = null, expected ExpertChannels");
  CHECK(message(Placement::contiguous(kExperts, RankNodes::single(9)), shared, {}) ==
        "ExpertParallel: the placement is one of 9 ranks, expected " + std::to_string(ranks()) +
            " as the channels");
  CHECK(message(Placement::contiguous(6, nodes), shared, {}) ==
        "ExpertParallel: the placement has 6 experts, expected 7 as routed to");
  CHECK(message(Placement::contiguous(kExperts, nodes), shared, {.chunks = 0}) ==
        "ExpertParallel: chunks = 0, expected >= 1");
  CHECK(test::message_of<ConfigError>([&] {
          Rng rng(1);
          const GluBank<double> bank(4, 2, 4, rng);
          ExpertParallel<GluBank<double>>(bank, Placement::contiguous(2, nodes), shared,
                                          {.dispatch_format = RowFormat::kFp8});
        }) ==
        "ExpertParallel: dispatch_format = fp8, expected full for numbers that are no floats");
  CHECK(test::message_of<ConfigError>([&] {
          Parallel::from_local(std::nullopt, 4, 4, Placement::from_map({0, 0}, nodes), shared);
        }) == (test::ranks().rank() == 0
                   ? "ExpertParallel: the bank has 0 experts, expected 2, those that the placement "
                     "gives to rank 0"
                   : "no exception"));
}

}  // namespace weir::expert_parallel_test
