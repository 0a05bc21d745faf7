// SPDX-License-Identifier: MIT
// A mixture whose experts are on the ranks of an MPI job, each of which trains on tokens of its
// own:
//
//     mpirun -np 4 build/demo/examples/ranks
//
// The task is to imitate a fixed network. The losses are those of any number of ranks, rounding
// aside.
#include <iostream>
#include <memory>

#include <weir/core/init.hpp>
#include <weir/moe/balance/bias_balance.hpp>
#include <weir/moe/capacity/dropless.hpp>
#include <weir/moe/experts/glu_bank.hpp>
#include <weir/moe/moe_layer.hpp>
#include <weir/moe/router/linear_router.hpp>
#include <weir/moe/selector/sigmoid_top_k.hpp>
#include <weir/nn/mlp.hpp>
#include <weir/optim/adamw.hpp>
#include <weir/parallel/mpi/data_parallel.hpp>
#include <weir/parallel/mpi/expert_parallel.hpp>
#include <weir/parallel/mpi/job.hpp>

int train(const weir::Communicator& ranks) {
  weir::Rng rng(1);  // The same on all ranks, so that they begin with the same weights.
  auto channels = std::make_shared<weir::ExpertChannels>(ranks);
  const weir::RankNodes nodes = weir::RankNodes::single(ranks.size());
  weir::MoELayer moe(
      weir::LinearRouter<float>(32, 8, rng), weir::SigmoidTopK<float>(8, {.k = 2}),
      weir::Dropless(),
      weir::ExpertParallel(weir::GluBank<float>(32, 8, 64, rng),  // Keeps this rank's experts.
                           weir::Placement::contiguous(8, nodes), channels, {.chunks = 2}),
      weir::BiasBalance<float>({.rate = 1e-2}));
  weir::AdamW<float> optimizer({.learning_rate = 1e-2, .weight_decay = 0.01});
  weir::DataParallel<float> together(ranks);
  together.agree(moe);

  const weir::Mlp<float> teacher(32, 64, rng);
  const weir::Index tokens = 240, first = ranks.rank() * tokens / ranks.size(),
                    last = (ranks.rank() + 1) * tokens / ranks.size();
  decltype(moe)::Cache cache;
  for (int step = 0; step <= 400; ++step) {
    const weir::Matrix<float> all = weir::normal_init<float>(tokens, 32, 1.0, rng);
    const weir::Matrix<float> x = all.middleRows(first, last - first);  // This rank's tokens.
    const weir::Matrix<float> error =
        moe.forward(x, weir::kTraining, cache) - weir::infer(teacher, x);
    const auto count = static_cast<float>(all.size());  // Of all ranks: gradients are summed.
    moe.backward(2.0F / count * error, cache);
    together.reduce(moe);
    const double norm = together.clip_global_norm(moe, 1.0);
    together.step(optimizer, moe);
    const double loss = together.sum(error.squaredNorm() / count);
    if (step % 100 == 0 && ranks.rank() == 0) {
      std::cout << "step " << step << "  loss " << loss << "  gradient " << norm << std::endl;
    }
  }
  return 0;
}

int main(int argc, char** argv) {
  return weir::run_job(argc, argv, {.timeout_seconds = 60.0},
                       [](const weir::Communicator& ranks) { return train(ranks); });
}
