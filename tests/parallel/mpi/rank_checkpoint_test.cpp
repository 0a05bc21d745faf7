// SPDX-License-Identifier: MIT
#include <algorithm>
#include <cstdint>
#include <filesystem>
#include <memory>
#include <set>
#include <string>
#include <utility>
#include <vector>

#include <weir/core/random.hpp>
#include <weir/io/checkpoint_folder.hpp>
#include <weir/io/weights.hpp>
#include <weir/moe/balance/bias_balance.hpp>
#include <weir/moe/capacity/dropless.hpp>
#include <weir/moe/experts/glu_bank.hpp>
#include <weir/moe/moe_layer.hpp>
#include <weir/moe/router/linear_router.hpp>
#include <weir/moe/selector/sigmoid_top_k.hpp>
#include <weir/optim/adamw.hpp>
#include <weir/parallel/mpi/data_parallel.hpp>
#include <weir/parallel/mpi/expert_parallel.hpp>
#include <weir/parallel/mpi/rank_checkpoint.hpp>

#include "parallel/mpi/rank_folder.hpp"
#include "parallel/mpi/ranks.hpp"
#include "support/catch.hpp"
#include "support/matrices.hpp"

namespace weir::rank_checkpoint_test {

namespace {

namespace fs = std::filesystem;

constexpr Index kModel = 10, kExperts = 5, kTokens = 40;

auto mixture(const Communicator& ranks) {
  Rng rng(2);
  const GluBank<double> bank(kModel, kExperts, 8, rng);
  return MoELayer(LinearRouter<double>(kModel, kExperts, rng),
                  SigmoidTopK<double>(kExperts, {.k = 2}), Dropless(),
                  ExpertParallel<GluBank<double>>(
                      bank, Placement::contiguous(kExperts, RankNodes::single(ranks.size())),
                      std::make_shared<ExpertChannels>(ranks)),
                  BiasBalance<double>({.rate = 0.01}));
}
using Mixture = decltype(mixture(std::declval<const Communicator&>()));

/// A run of the ranks of a communicator.
struct Run {
  Mixture moe;
  DataParallel<double> together;
  AdamW<double> optimizer;
  io::TrainingState state;

  explicit Run(const Communicator& ranks, bool shards = true)
      : moe(mixture(ranks)), together(ranks, {.shards_states = shards}) {
    together.agree(moe);
    state.rng = Rng(static_cast<std::uint64_t>(100 + ranks.rank()));
  }

  void train(Index steps) {
    for (Index i = 0; i < steps; ++i, ++state.position) {
      state.rng.bits();
      Mixture::Cache cache;
      const Matrix<double> all =
          test::random_matrix(kTokens, kModel, 10 + static_cast<std::uint64_t>(state.position));
      const Index first = together.rank() * kTokens / together.size();
      const Index last = (together.rank() + 1) * kTokens / together.size();
      const Matrix<double> x = all.middleRows(first, last - first);
      const Matrix<double> error = moe.forward(x, kTraining, cache) - x;
      moe.backward(error, cache);
      together.reduce(moe);
      together.step(optimizer, moe);
    }
  }
};

void check_close(Run& a, Run& b, double tolerance) {
  std::vector<NamedParameter<double>> all = parameters(b.moe);
  for (const auto& [name, parameter] : parameters(a.moe)) {
    const auto same = std::ranges::find(all, name, &NamedParameter<double>::name);
    if (same == all.end()) continue;  // Of a rank that only one of them has.
    INFO(name);
    if (tolerance == 0.0) {
      CHECK(parameter->value == same->parameter->value);
    } else {
      CHECK(test::relative_error(parameter->value, same->parameter->value) < tolerance);
    }
  }
  CHECK(test::relative_error(a.moe.selector().selection_bias().value,
                             b.moe.selector().selection_bias().value) <= tolerance);
}

}  // namespace

TEST_CASE("A run of ranks that is resumed goes on bit for bit", "[parallel][mpi]") {
  const bool shards = GENERATE(true, false);
  const test::RankFolder folder;
  Run whole(test::ranks(), shards);
  whole.train(3);
  whole.state.notes["what"] = "a test";
  const fs::path saved =
      io::save(whole.together, folder.path(), whole.moe, whole.optimizer, whole.state);
  CHECK(saved.filename() == "step-000000003");
  whole.train(3);

  Run resumed(test::ranks(), shards);
  resumed.train(1);  // So that there is something to be forgotten.
  resumed.state = io::load(resumed.together, folder.path(), resumed.moe, resumed.optimizer);
  CHECK(resumed.state.notes.at("what") == "a test");
  CHECK(resumed.optimizer.steps() == 3);
  resumed.train(3);
  check_close(resumed, whole, 0.0);
  CHECK(resumed.state.rng.bits() == whole.state.rng.bits());
  CHECK(resumed.state.position == whole.state.position);
}

TEST_CASE("A checkpoint of some ranks goes on on one, and is a folder as Hugging Face has them",
          "[parallel][mpi]") {
  const test::RankFolder folder;
  Run run(test::ranks());
  run.train(3);
  const fs::path saved = io::save(run.together, folder.path(), run.moe, run.optimizer, run.state);

  const io::CheckpointFolder tensors(saved);
  std::set<std::string> names;
  for (const std::string& name : tensors.names()) names.insert(name);
  const Communicator alone(MPI_COMM_SELF);
  Run of_one(alone);
  CHECK(names.size() == parameters(of_one.moe).size() + buffers(of_one.moe).size());
  for (const auto& [name, parameter] : parameters(of_one.moe)) CHECK(names.contains(name));

  const Communicator also_alone(MPI_COMM_SELF);
  Run weights_alone(also_alone);
  io::load_weights(tensors, weights_alone.moe);
  check_close(run, weights_alone, 0.0);
  Rng rng(1);
  LinearRouter<double> other(kModel, kExperts, rng);
  const Matrix<double> before = other.expert_vectors()->value;
  CHECK(test::message_of<io::FileError>([&] { io::load_weights(tensors, other); }) ==
        saved.string() + ": 'weight' is missing");
  Mixture smaller = Run(also_alone).moe;
  smaller.router() = LinearRouter<double>(kModel + 1, kExperts, rng);
  CHECK(test::message_of<io::FileError>([&] { io::load_weights(tensors, smaller); }) ==
        saved.string() + ": 'router.weight' is [5, 10], expected [5, 11]");
  CHECK(other.expert_vectors()->value == before);

  io::load(of_one.together, saved, of_one.moe, of_one.optimizer);
  of_one.state.position = run.state.position;
  check_close(run, of_one, 0.0);
  run.train(3);
  of_one.train(3);
  check_close(run, of_one, 1e-11);
}

TEST_CASE("A checkpoint of one rank goes on on all", "[parallel][mpi]") {
  const test::RankFolder folder;
  const Communicator alone(MPI_COMM_SELF);
  Run of_one(alone);
  of_one.train(3);
  if (test::ranks().rank() == 0) {
    io::save(of_one.together, folder.path(), of_one.moe, of_one.optimizer, of_one.state);
  }
  MPI_Barrier(test::ranks().get());
  Run run(test::ranks());
  run.state = io::load(run.together, folder.path(), run.moe, run.optimizer);
  run.train(2);
  of_one.train(2);
  check_close(run, of_one, 1e-11);
}

TEST_CASE("A checkpoint that is broken for one rank is refused by all", "[parallel][mpi]") {
  const test::RankFolder folder;
  Run run(test::ranks());
  run.train(1);
  const fs::path saved = io::save(run.together, folder.path(), run.moe, run.optimizer, run.state);
  MPI_Barrier(test::ranks().get());
  if (test::ranks().rank() == 0) fs::resize_file(saved / "model.safetensors.index.json", 40);
  MPI_Barrier(test::ranks().get());
  const std::string message = test::message_of<io::FileError>(
      [&] { io::load(run.together, saved, run.moe, run.optimizer); });
  CHECK(message.starts_with("rank 0: "));
  CHECK(test::message_of<io::FileError>([&] {
          io::load(run.together, folder.path() / "none", run.moe, run.optimizer);
        }).ends_with("none: there is no checkpoint"));
}

}  // namespace weir::rank_checkpoint_test
