// SPDX-License-Identifier: MIT
// Times passes of a mixture whose experts are spread over the ranks of an MPI job, and adds a line
// for each size to a file, from which `cluster` learns:
//
//     for ranks in 2 3 4; do mpirun -np $ranks cluster_measure --out runs.csv; done
#include <algorithm>
#include <chrono>
#include <fstream>
#include <iostream>
#include <memory>
#include <mpi.h>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include <weir/core/init.hpp>
#include <weir/moe/dispatch.hpp>
#include <weir/moe/experts/glu_bank.hpp>
#include <weir/parallel/mpi/expert_parallel.hpp>
#include <weir/parallel/mpi/job.hpp>

#include "cluster_run.hpp"
#include "command_line.hpp"

namespace {

using weir::Index;

struct Options {
  std::string out = "cluster_runs.csv";
  std::vector<Index> tokens = {256, 512, 1024};
  std::vector<Index> d_model = {128, 192, 256};
  int repeats = 30;
};

std::optional<int> parse(int argc, char** argv, Options& options) {
  CommandLine line("Times passes of a mixture over the ranks of an MPI job.");
  line.add("--out", options.out, "File that lines are added to");
  line.add("--tokens", options.tokens, "Tokens of each rank")->check(limits::between(1, 1e6));
  line.add("--d-model", options.d_model, "Width of a token")->check(limits::between(1, 1e6));
  line.add("--repeats", options.repeats, "Passes, of which the quickest counts")
      ->check(limits::at_least(1));
  return line.parse(argc, argv);
}

/// Seconds from when all ranks begin until the last one has ended, the same on all of them.
template <class Pass>
double seconds_of_all(const weir::Communicator& ranks, Pass&& pass) {
  weir::expect_success("MPI_Barrier", MPI_Barrier(ranks.get()));
  const auto begin = std::chrono::steady_clock::now();
  std::forward<Pass>(pass)();
  double seconds = std::chrono::duration<double>(std::chrono::steady_clock::now() - begin).count();
  weir::expect_success("MPI_Allreduce",
                       MPI_Allreduce(MPI_IN_PLACE, &seconds, 1, MPI_DOUBLE, MPI_MAX, ranks.get()));
  return seconds;
}

/// The times of a run of this size.
void measure(const weir::Communicator& ranks, ClusterRun& run, int repeats) {
  using Bank = weir::ExpertParallel<weir::GluBank<float>>;
  weir::Rng rng(1);
  Bank bank(weir::GluBank<float>(run.d_model, kRunExperts, run.d_hidden, rng), placement_of(run),
            std::make_shared<weir::ExpertChannels>(ranks));

  // This rank's tokens, which lie together.
  const weir::RoutedTokens all = tokens_of(run);
  weir::Assignments own;
  own.expert_count = kRunExperts;
  for (Index t = ranks.rank() * run.tokens; t < (ranks.rank() + 1) * run.tokens; ++t) {
    for (const Index e : all.layer.experts_of(t)) own.expert.push_back(e);
    own.offsets.push_back(own.expert.count());
  }
  own.kept.assign(own.expert.count(), 1);
  const weir::List<float> weight(own.expert.count(), 0.5F);
  weir::Dispatch<float> dispatch;
  dispatch.build(own, weight);
  const auto x = weir::normal_init<float>(run.tokens, run.d_model, 1.0, rng);

  const weir::Pass training{.training = true};
  Bank::Cache cache;
  weir::List<float> d_weight(own.expert.count(), 0.0F);
  for (int i = 0; i <= repeats; ++i) {
    const double there = seconds_of_all(ranks, [&] { bank.forward(x, dispatch, training, cache); });
    const double back = seconds_of_all(ranks, [&] { bank.backward(x, dispatch, d_weight, cache); });
    if (i == 0) continue;  // Memory is taken in the first.
    // The quickest: whatever else the machine does only makes a pass slower.
    run.forward = i == 1 ? there : std::min(run.forward, there);
    run.backward = i == 1 ? back : std::min(run.backward, back);
  }
}

int run_all(const weir::Communicator& ranks, const Options& options) {
  for (const Index d_model : options.d_model) {
    for (const Index tokens : options.tokens) {
      ClusterRun run{
          .ranks = ranks.size(), .tokens = tokens, .d_model = d_model, .d_hidden = 2 * d_model};
      measure(ranks, run, options.repeats);
      if (ranks.rank() != 0) continue;
      std::ofstream file(options.out, std::ios::app);
      if (file.tellp() == 0) file << kRunHeader << '\n';
      file << line_of(run) << std::endl;
      if (!file) weir::throw_error<weir::ConfigError>(options.out, ": cannot be written");
      std::cout << line_of(run) << std::endl;
    }
  }
  return 0;
}

}  // namespace

int main(int argc, char** argv) {
  Options options;
  if (const auto exit_code = parse(argc, argv, options)) return *exit_code;
  return weir::run_job(argc, argv, {},
                       [&](const weir::Communicator& ranks) { return run_all(ranks, options); });
}
