// SPDX-License-Identifier: MIT
// A job in which rank 1 fails in the way that its argument names, in the middle of a training:
//
//     mpirun -np 3 failing_job stalled
#include <algorithm>
#include <csignal>
#include <cstdint>
#include <memory>
#include <new>
#include <string>
#include <unistd.h>

#include <weir/core/init.hpp>
#include <weir/core/random.hpp>
#include <weir/moe/capacity/dropless.hpp>
#include <weir/moe/dispatch.hpp>
#include <weir/moe/experts/glu_bank.hpp>
#include <weir/moe/moe_layer.hpp>
#include <weir/moe/router/linear_router.hpp>
#include <weir/moe/selector/softmax_top_k.hpp>
#include <weir/parallel/mpi/data_parallel.hpp>
#include <weir/parallel/mpi/expert_parallel.hpp>
#include <weir/parallel/mpi/job.hpp>

namespace {

constexpr weir::Index kModel = 16, kExperts = 6;
constexpr weir::Index kTokens = 64;

/// Says something else than the others in the exchange of counts.
void send_counts(weir::ExpertChannels& channels, const weir::Placement& placement,
                 std::int64_t rows) {
  weir::Exchange lie;
  constexpr weir::Index kHead = weir::TokenExchangeTerms::kCount;
  const weir::Index words = kHead + placement.most_slots();
  lie.begin(channels.counts, "counts of tokens", words * 8, words * 8);
  auto* const numbers = reinterpret_cast<std::int64_t*>(lie.outgoing());
  std::fill_n(numbers, words, rows);
  for (int r = 0; r < channels.counts.size(); ++r) {
    if (r != 1) lie.send(r, 0, (kHead + placement.slots(r)) * 8);
  }
  lie.finish();
}

/// Announces a row for each expert, and sends nine tenths of them.
void send_fewer_rows(const weir::TokenTravel<float>& travel) {
  weir::Assignments assignments;
  assignments.expert_count = kExperts;
  for (weir::Index e = 0; e < kExperts; ++e) {
    assignments.expert.push_back(e);
    assignments.kept.push_back(1);
    assignments.offsets.push_back(e + 1);
  }
  const weir::List<float> weights(kExperts, 1.0F);
  weir::Dispatch<float> dispatch;
  dispatch.build(assignments, weights);
  weir::TokenTravel<float>::Cache cache;
  travel.begin(dispatch, kModel, kModel, true, cache);
  weir::Exchange lie;
  const weir::Index bytes = 4 * kModel * kExperts;
  lie.begin(travel.channels().dispatch, "dispatch", bytes, bytes);
  for (int r = 0; r < travel.channels().dispatch.size(); ++r) {
    if (r != 1) lie.send(r, 0, cache.counts.sent(0, r) * 4 * kModel * 9 / 10);
  }
  lie.finish();
  ::pause();
}

int train(const weir::Communicator& ranks, const std::string& how) {
  auto channels = std::make_shared<weir::ExpertChannels>(ranks);
  const auto placement =
      weir::Placement::contiguous(kExperts, weir::RankNodes::single(ranks.size()));
  weir::Rng rng(1);
  const weir::GluBank<float> bank(kModel, kExperts, 32, rng);
  weir::ExpertParallelConfig config;
  if (ranks.rank() == 1 && how == "other_settings") config.chunks = 3;
  using Bank = weir::ExpertParallel<weir::GluBank<float>>;
  weir::MoELayer moe(weir::LinearRouter<float>(kModel, kExperts, rng),
                     weir::SoftmaxTopK<float>({.k = 2}), weir::Dropless(),
                     Bank(bank, placement, channels, config));
  weir::DataParallel<float> together(ranks);
  together.agree(moe);
  decltype(moe)::Cache cache;
  const weir::Matrix<float> x = weir::normal_init<float>(kTokens, kModel, 1.0, rng);
  for (int step = 0; step < 1000; ++step) {
    if (ranks.rank() == 1 && step == 20) {
      if (how == "killed") std::raise(SIGKILL);
      if (how == "stalled") ::pause();
      if (how == "stopped") std::raise(SIGSTOP);
      if (how == "throws") throw std::bad_alloc();
      if (how == "wrong_counts") send_counts(*channels, placement, -1);
      if (how == "fewer_rows") send_fewer_rows(moe.bank().travel());
      if (how == "ends") return 0;
    }
    const auto leaves_out = [&](const char* what) {
      return ranks.rank() == 1 && step == 20 && how == what;
    };
    moe.forward(x, weir::kTraining, cache);
    if (leaves_out("one_forward_more")) moe.forward(x, weir::kTraining, cache);
    if (!leaves_out("no_backward")) moe.backward(x, cache);
    if (!leaves_out("no_reduce")) together.reduce(moe);
  }
  return 0;
}

}  // namespace

int main(int argc, char** argv) {
  const std::string how = argc > 1 ? argv[1] : "";
  return weir::run_job(argc, argv, {.timeout_seconds = 2.0},
                       [&](const weir::Communicator& ranks) { return train(ranks, how); });
}
