// SPDX-License-Identifier: MIT
// How close an attention layer in training comes to the machine's limits, projections included:
//
//     attention/forward/tokens:N/threads:T    one sequence of N tokens
//     attention/training/tokens:N/threads:T   forward and backward
//         peak%       the time for the arithmetic alone over the time taken
//
// The layer is 1024 wide, with 16 query heads of 64 numbers that share 4 heads of keys and values.
// FLOPs are those of the projections, and 4 * 64 for each head, query and key that the query sees;
// three times that in training, whatever is computed anew.
#include <string>
#include <string_view>

#include <benchmark/benchmark.h>

#include <weir/attention/grouped_query.hpp>
#include <weir/core/init.hpp>
#include <weir/core/pass.hpp>
#include <weir/core/random.hpp>
#include <weir/core/types.hpp>

#include "support/clock.hpp"
#include "support/limits.hpp"
#include "support/program.hpp"
#include "support/rows.hpp"

namespace {

namespace bench = weir::bench;
using Attention = weir::GroupedQueryAttention<float>;
using weir::Index;
using weir::Matrix;

constexpr Index kWidth = 1024;
constexpr Index kHeads = 16;
constexpr Index kGroups = 4;
constexpr Index kDim = 64;

enum class Mode { kForward, kTraining };

/// Passes over one sequence.
class Work {
 public:
  Work(Mode mode, Index tokens)
      : mode_(mode), x_(weir::normal_init<float>(tokens, kWidth, 1.0, rng_)), dy_(x_) {
    run();  // Caches grow.
  }

  double run_round(bench::Cost& cost) {
    const auto tokens = static_cast<double>(x_.rows());
    const double projections = 2.0 * tokens * kWidth * kDim * 2.0 * (kHeads + kGroups);
    const double scores = 4.0 * kDim * kHeads * 0.5 * tokens * (tokens + 1.0);
    constexpr double kPasses = 3.0;  // Backward is two more of each product.
    cost.tokens = tokens;
    cost.flops = (projections + scores) * (mode_ == Mode::kTraining ? kPasses : 1.0);
    return bench::seconds_of([&] { run(); });
  }

 private:
  void run() {
    const weir::Pass pass{.training = mode_ == Mode::kTraining};
    benchmark::DoNotOptimize(attention_.forward(x_, pass, cache_).data());
    if (mode_ == Mode::kTraining) benchmark::DoNotOptimize(attention_.backward(dy_, cache_).data());
  }

  Mode mode_;
  weir::Rng rng_ = weir::Rng(1);
  Attention attention_{rng_, {.d_model = kWidth, .heads = kHeads, .kv_heads = kGroups}};
  Matrix<float> x_, dy_;
  Attention::Cache cache_;
};

void add_attention_row(std::string_view name, Mode mode, Index tokens, int threads) {
  const std::string row = "attention/" + std::string(name) + "/tokens:" + std::to_string(tokens);
  bench::add_row(row, threads, [=](benchmark::State& state) {
    Work work(mode, tokens);
    return bench::measure_against_limits(state, bench::Precision::kFloat32,
                                         [&](bench::Cost& cost) { return work.run_round(cost); });
  });
}

}  // namespace

int main(int argc, char** argv) {
  for (const int threads : bench::thread_counts()) {
    for (const Index tokens : {64, 512, 2048, 4096, 8192, 16384}) {
      add_attention_row("forward", Mode::kForward, tokens, threads);
      add_attention_row("training", Mode::kTraining, tokens, threads);
    }
  }
  return bench::run_rows(argc, argv);
}
