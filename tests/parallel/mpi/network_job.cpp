// SPDX-License-Identifier: MIT
// Two ranks on hosts of their own, with a slow network between them: experts that take their time,
// once with all rows in one chunk, once in several, whose rows travel while others compute, and
// once with something else to do meanwhile. Writes what happened as a Chrome trace to the file that
// its first argument names.
//
//     mpirun -np 2 network_job trace.json 100000000       # bits per second of the network
#include <algorithm>
#include <chrono>
#include <cstdlib>
#include <fstream>
#include <iostream>
#include <memory>
#include <stdexcept>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include <weir/core/init.hpp>
#include <weir/core/meanwhile.hpp>
#include <weir/core/random.hpp>
#include <weir/moe/experts/bank_wrapper.hpp>
#include <weir/moe/experts/glu_bank.hpp>
#include <weir/parallel/mpi/collectives.hpp>
#include <weir/parallel/mpi/expert_parallel.hpp>
#include <weir/parallel/mpi/job.hpp>
#include <weir/parallel/timeline.hpp>

namespace {

using weir::Index;

constexpr Index kModel = 256, kExperts = 8, kTokens = 2048;
constexpr auto kTimeOfRow = std::chrono::microseconds(200);

/// Experts that need some time for each row, as large ones do; asleep, so that it does not depend
/// on what else the machine has to do.
class SlowBank : public weir::BankWrapper<weir::GluBank<float>> {
 public:
  explicit SlowBank(weir::GluBank<float> bank) : BankWrapper(std::move(bank)) {}

  const weir::Matrix<float>& forward(weir::MatrixIn<float> x, const weir::Dispatch<float>& dispatch,
                                     const weir::Pass& pass, Cache& cache) const {
    std::this_thread::sleep_for(dispatch.slots() * kTimeOfRow);
    return bank_.forward(x, dispatch, pass, cache.inner);
  }
};

/// Each token has one expert, the same number of tokens each.
weir::Dispatch<float> evenly(Index tokens) {
  weir::Assignments assignments;
  assignments.expert_count = kExperts;
  for (Index t = 0; t < tokens; ++t) {
    assignments.expert.push_back(t % kExperts);
    assignments.kept.push_back(1);
    assignments.offsets.push_back(t + 1);
  }
  weir::Dispatch<float> dispatch;
  dispatch.build(assignments, weir::List<float>(tokens, 1.0F));
  return dispatch;
}

double seconds_of(const auto& body) {
  const auto begin = std::chrono::steady_clock::now();
  body();
  return std::chrono::duration<double>(std::chrono::steady_clock::now() - begin).count();
}

void expect(bool holds, const std::string& what) {
  if (!holds) throw std::runtime_error("network_job: not so: " + what);
}

int run(const weir::Communicator& ranks, const std::string& trace, double bits_per_second) {
  weir::Rng rng(1);
  const weir::GluBank<float> whole(kModel, kExperts, 16, rng);
  const weir::Matrix<float> x = weir::normal_init<float>(kTokens, kModel, 1.0, rng);
  const weir::Dispatch<float> dispatch = evenly(kTokens);
  weir::GluBank<float>::Cache whole_cache;
  const weir::Matrix<float> expected = whole.forward(x, dispatch, {}, whole_cache);

  auto channels = std::make_shared<weir::ExpertChannels>(ranks);
  weir::Channel channel(ranks);
  weir::Exchange exchange;
  const auto placement = weir::Placement::contiguous(kExperts, weir::RankNodes::uniform(2, 1));
  // With something else that takes `pause` seconds, as shared experts are, while tokens travel.
  const auto timed = [&](Index chunks, double pause = 0.0) {
    const weir::ExpertParallel<SlowBank> bank(SlowBank(whole), placement, channels,
                                              {.chunks = chunks});
    weir::ExpertParallel<SlowBank>::Cache cache;
    bank.forward(x.topRows(0), evenly(0), {}, cache);  // Connections are made.
    return seconds_of([&] {
      const auto work = [&] { std::this_thread::sleep_for(std::chrono::duration<double>(pause)); };
      weir::Meanwhile other(work);
      expect(bank.forward(x, dispatch, {}, cache) == expected, "the bits are those of one process");
      other.finish();
    });
  };
  const double at_once = timed(1);
  weir::Timeline timeline({.rank = ranks.rank()});
  channels->timeline = &timeline;
  const double in_chunks = timed(4);
  channels->timeline = nullptr;

  // Half of the rows travel to the other rank, and as many back.
  const double ways = kTokens / 2 * kModel * 4.0 * 8.0 / bits_per_second;
  const double computing = std::chrono::duration<double>(kTokens * kTimeOfRow).count();
  weir::Nanoseconds overlap = 0;
  for (const weir::TimelineTrack& track : timeline.tracks()) {
    if (track.name() == "experts" || track.name() == "meanwhile") continue;
    overlap += weir::overlap_time(timeline.track("experts"), track);
  }

  weir::Timeline beside({.rank = ranks.rank()});
  channels->timeline = &beside;
  const double pause = 0.5 * ways;
  const double with_other = timed(4, pause);
  channels->timeline = nullptr;
  weir::Nanoseconds on_the_way = 0;
  for (const weir::TimelineTrack& track : beside.tracks()) {
    if (!track.name().starts_with("dispatch")) continue;
    on_the_way = std::max(on_the_way, weir::overlap_time(beside.track("meanwhile"), track));
  }

  const std::vector<std::string> events =
      weir::all_gather_texts(channel, exchange, "events", timeline.events());
  if (ranks.rank() == 0) {
    std::ofstream(trace) << weir::chrome_trace(events);
    std::cout << "a way takes " << ways << " s, computing " << computing << " s; in one chunk "
              << at_once << " s, in four " << in_chunks << " s, both at once, over all ways, "
              << static_cast<double>(overlap) * 1e-9 << " s; with something else of " << pause
              << " s " << with_other << " s\n";
  }
  expect(at_once > 0.9 * (2 * ways + computing), "the network is as slow as it should be");
  expect(in_chunks < at_once - 0.5 * ways, "rows travel while experts compute");
  expect(static_cast<double>(overlap) * 1e-9 > 0.5 * ways, "the timeline shows it");
  expect(with_other < in_chunks + 0.5 * pause, "something else is done meanwhile");
  expect(static_cast<double>(on_the_way) * 1e-9 > 0.9 * pause, "the timeline shows it, too");
  return 0;
}

}  // namespace

int main(int argc, char** argv) {
  if (argc < 3) return 2;
  const std::string trace = argv[1];
  const double bits_per_second = std::strtod(argv[2], nullptr);
  return weir::run_job(
      argc, argv, {.timeout_seconds = 20.0, .progress_thread = true},
      [&](const weir::Communicator& ranks) { return run(ranks, trace, bits_per_second); });
}
