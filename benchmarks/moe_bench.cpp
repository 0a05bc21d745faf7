// SPDX-License-Identifier: MIT
// How close mixtures of experts come to the machine's limits, router included:
//
//     moe/SHAPE/STORAGE/forward|training/tokens:N/uniform|skewed/threads:N
//         limit%      the larger of the times for arithmetic alone and for reading the weights of
//                     the experts that are used alone, over the time taken
//         peak%       arithmetic alone
//         bandwidth%  reading alone
//     experts/...     the time of 64 experts over that of 8, at equal work (64:8)
//     skew/...        the time with half of the tokens at one expert over that with none preferred
//
// bf16/training and fp8/training are steps whose products are rounded, of parameters in fp32;
// fp32-trainable/training is one without. Shapes are in support/mixture.hpp. A training step is
// forward and backward, no optimizer. FLOPs are 6 * d_model * d_hidden for a token and an expert it
// visits, three times that in training.
#include <string>
#include <string_view>
#include <vector>

#include <benchmark/benchmark.h>

#include <weir/core/pass.hpp>
#include <weir/core/precision.hpp>
#include <weir/core/storage.hpp>
#include <weir/core/types.hpp>

#include "support/clock.hpp"
#include "support/mixture.hpp"
#include "support/program.hpp"
#include "support/rows.hpp"

namespace {

namespace bench = weir::bench;
using bench::Load;
using bench::Mixture;
using bench::Shape;
using weir::Index;
using weir::Matrix;
using weir::Storage;

enum class Mode { kForward, kTraining };

/// A mode, and how the weights are stored for it.
struct Setting {
  std::string_view name;
  Storage storage;
  Mode mode;
  weir::Precision precision = weir::Precision::kFull;
};

constexpr Setting kTraining = {"fp32-trainable/training", Storage::kTrainable, Mode::kTraining};
constexpr Setting kTrainingBfloat16 = {"bf16/training", Storage::kTrainable, Mode::kTraining,
                                       weir::Precision::kBfloat16};
constexpr Setting kTrainingFp8 = {"fp8/training", Storage::kTrainable, Mode::kTraining,
                                  weir::Precision::kFp8};
constexpr Setting kTrainable = {"fp32-trainable/forward", Storage::kTrainable, Mode::kForward};
constexpr Setting kPacked = {"fp32/forward", Storage::kPacked, Mode::kForward};
constexpr Setting kBfloat16 = {"bf16/forward", Storage::kBfloat16, Mode::kForward};

/// Weights as codes; "dot" where tokens become codes, too.
constexpr Setting kCodes[] = {{"int8/forward", Storage::kInt8, Mode::kForward},
                              {"int8-dot/forward", Storage::kInt8Dot, Mode::kForward},
                              {"int4/forward", Storage::kInt4, Mode::kForward},
                              {"int4-dot/forward", Storage::kInt4Dot, Mode::kForward},
                              {"fp8/forward", Storage::kFp8, Mode::kForward},
                              {"mxfp4/forward", Storage::kMxFp4, Mode::kForward}};

std::string row_name(std::string_view family, const Shape& shape, const Setting& setting) {
  return std::string(family) + '/' + std::string(shape.name) + '/' + std::string(setting.name);
}

/// Batches of tokens for a layer, and what passes over them cost.
class Workload {
 public:
  /// Runs each batch once: caches grow, weights are arranged, costs become known.
  Workload(Mixture& layer, Mode mode, Index tokens, Load load)
      : layer_(layer), mode_(mode), batches_(make_batches(layer.shape(), tokens, load)) {
    for (const Matrix<float>& x : batches_) {
      run(x);
      costs_.push_back(mode == Mode::kTraining ? layer.training_cost() : layer.forward_cost());
    }
  }

  /// Runs the passes of a round and returns how long one takes. `cost`: of one.
  double run_round(bench::Cost& cost) {
    // Few tokens: all batches, so that the weights of a pass are not left over from the last.
    const std::size_t passes = batches_.front().rows() <= kFew ? batches_.size() : 1;
    bench::Cost sum;
    const double seconds = bench::seconds_of([&] {
      for (std::size_t i = 0; i < passes; ++i) {
        run(batches_[next_]);
        sum += costs_[next_];
        next_ = (next_ + 1) % batches_.size();
      }
    });
    const auto share = 1.0 / static_cast<double>(passes);
    cost = {share * sum.tokens, share * sum.flops, share * sum.bytes};
    return share * seconds;
  }
  double run_round() {
    bench::Cost cost;
    return run_round(cost);
  }

 private:
  static constexpr Index kFew = 8;

  static std::vector<Matrix<float>> make_batches(const Shape& shape, Index tokens, Load load) {
    return bench::make_batches(shape, tokens, load, tokens <= kFew ? 8 : 1);
  }

  void run(const Matrix<float>& x) {
    const weir::Pass pass{.training = mode_ == Mode::kTraining};
    const Matrix<float>& y = layer_.forward(x, pass);
    if (mode_ == Mode::kForward) return;
    if (dy_.size() == 0) dy_ = y;  // As good as the gradient of any loss.
    layer_.backward(dy_);
  }

  Mixture& layer_;
  Mode mode_;
  std::vector<Matrix<float>> batches_;
  std::vector<bench::Cost> costs_;
  Matrix<float> dy_;
  std::size_t next_ = 0;
};

/// Against the limits.
void add_moe_row(const Shape& shape, const Setting& setting, Index tokens, Load load, int threads) {
  const std::string name = row_name("moe", shape, setting) + "/tokens:" + std::to_string(tokens) +
                           '/' + std::string(bench::name_of(load));
  bench::add_row(name, threads, [=](benchmark::State& state) {
    Mixture& layer = bench::mixture(shape, setting.storage, setting.precision);
    Workload workload(layer, setting.mode, tokens, load);
    return bench::measure_against_limits(
        state, layer.precision(), [&](bench::Cost& cost) { return workload.run_round(cost); });
  });
}

/// Rounds of two workloads one right after the other, in changing order. The counter `name` is the
/// median of how many times as long the second takes; the seconds returned are the second's, too.
double measure_pair(benchmark::State& state, const std::string& name, Workload& first,
                    Workload& second) {
  bench::Figures figures;
  std::vector<double> times;
  bool in_order = true;
  bench::repeat_rounds([&] {
    double reference = in_order ? first.run_round() : 0.0;
    times.push_back(second.run_round());
    if (!in_order) reference = first.run_round();
    figures.add(name, times.back() / reference);
    in_order = !in_order;
  });
  figures.report(state);
  return bench::median(times);
}

constexpr Index kManyTokens = 2048;

/// Eight times the experts, the same work.
void add_experts_row(const Setting& setting, int threads) {
  const std::string name =
      "experts/" + std::string(setting.name) + "/tokens:" + std::to_string(kManyTokens);
  bench::add_row(name, threads, [=](benchmark::State& state) {
    constexpr Shape kFew = {"8", 1024, 512, 8, 2};
    constexpr Shape kMany = {"64", 1024, 512, 64, 2};
    Mixture few(kFew);
    Mixture many(kMany);
    few.set_storage(setting.storage);
    many.set_storage(setting.storage);
    Workload first(few, setting.mode, kManyTokens, Load::kUniform);
    Workload second(many, setting.mode, kManyTokens, Load::kUniform);
    return measure_pair(state, "64:8", first, second);
  });
}

/// The same layer with another load.
void add_skew_row(const Shape& shape, const Setting& setting, int threads) {
  const std::string name =
      row_name("skew", shape, setting) + "/tokens:" + std::to_string(kManyTokens);
  bench::add_row(name, threads, [=](benchmark::State& state) {
    Mixture& layer = bench::mixture(shape, setting.storage);
    Workload uniform(layer, setting.mode, kManyTokens, Load::kUniform);
    Workload skewed(layer, setting.mode, kManyTokens, Load::kSkewed);
    return measure_pair(state, "skewed:uniform", uniform, skewed);
  });
}

}  // namespace

int main(int argc, char** argv) {
  // All rows of a shape together, and of a storage within: making a layer takes longer than a row.
  for (const Shape& shape : bench::kShapes) {
    for (const Setting& setting :
         {kTraining, kTrainingBfloat16, kTrainingFp8, kTrainable, kPacked, kBfloat16}) {
      for (const int threads : bench::thread_counts()) {
        for (const Index tokens : {1, 8, 64, 512, 2048}) {
          if (setting.mode == Mode::kTraining && tokens < 512) continue;
          for (const Load load : {Load::kUniform, Load::kSkewed}) {
            add_moe_row(shape, setting, tokens, load, threads);
          }
        }
      }
      const bool rounds = setting.precision != weir::Precision::kFull;
      if (setting.name != kTrainable.name && shape.shared == 0 && !rounds) {
        add_skew_row(shape, setting, weir::hardware_threads());
      }
    }
    for (const Setting& setting : kCodes) {
      for (const int threads : bench::thread_counts()) {
        for (const Index tokens : {1, 64, 2048}) {
          add_moe_row(shape, setting, tokens, Load::kUniform, threads);
        }
      }
    }
  }
  for (const Setting& setting : {kTraining, kPacked, kBfloat16}) {
    for (const int threads : bench::thread_counts()) add_experts_row(setting, threads);
  }
  return bench::run_rows(argc, argv);
}
