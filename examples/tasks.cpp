// SPDX-License-Identifier: MIT
// Two tasks of stated similarity share experts: one gate for each task (MMoE, Ma et al. 2018,
// doi:10.1145/3219819.3220007) against a network that both share as a whole, with as many
// parameters. `tasks --help` lists the options.
#include <algorithm>
#include <array>
#include <cmath>
#include <cstdint>
#include <iostream>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include <weir/core/init.hpp>
#include <weir/core/layer.hpp>
#include <weir/core/parallel.hpp>
#include <weir/moe/experts/any_bank.hpp>
#include <weir/moe/multi_gate.hpp>
#include <weir/moe/router/linear_router.hpp>
#include <weir/moe/selector/softmax_top_k.hpp>
#include <weir/nn/linear.hpp>
#include <weir/nn/mlp.hpp>
#include <weir/optim/adamw.hpp>

#include "command_line.hpp"
#include "progress.hpp"
#include "resumable.hpp"

namespace {

using weir::Index;
using Matrix = weir::Matrix<float>;

constexpr Index kFeatures = 100;
constexpr Index kTasks = 2;
constexpr Index kExperts = 8;
constexpr Index kExpertWidth = 16;
constexpr Index kTowerWidth = 8;
constexpr double kNoise = 0.1;  // Of a label; its square is the least error there is.

struct Options {
  Index steps = 1500;
  Index seeds = 3;
  Index batch = 256;
  int threads = weir::hardware_threads();
  std::string save;
  Index save_every = 500;
  Index stop_after = 0;
};

std::optional<int> parse(int argc, char** argv, Options& options) {
  CommandLine line("Trains networks on two tasks at once, with a gate for each and without.");
  line.add("--steps", options.steps, "Optimizer steps of each training")
      ->check(limits::between(1, 1e9));
  line.add("--seeds", options.seeds, "Trainings of each kind")->check(limits::between(1, 99));
  line.add("--batch", options.batch, "Examples in a step")->check(limits::between(1, 1e6));
  line.add("--threads", options.threads, "How many cores to use")->check(limits::at_least(1));
  line.add("--save", options.save,
           "Keep checkpoints in this folder; what is there already goes on");
  line.add("--save-every", options.save_every, "Steps between checkpoints")
      ->check(limits::at_least(1));
  line.add("--stop-after", options.stop_after, "Stop each training after this step (0: the last)")
      ->check(limits::at_least(0));
  return line.parse(argc, argv);
}

/// y = relu(x W^T + b): an expert, and the first part of a tower.
class Hidden {
 public:
  using Scalar = float;
  struct Cache {
    weir::CacheState state;
    weir::Linear<float>::Cache linear;
    Matrix z, y, dz;
  };

  Hidden(Index d_in, Index d_out, weir::Rng& rng) : linear_(d_in, d_out, rng, {.bias = true}) {}

  const Matrix& forward(weir::MatrixIn<float> x, const weir::Pass& pass, Cache& cache) const {
    cache.state.begin();
    weir::copy_rows<float>(linear_.forward(x, pass, cache.linear), cache.z);
    weir::set_shape(cache.y, cache.z.rows(), cache.z.cols());
    weir::activation_forward<weir::Relu, float>(cache.z, cache.y);
    return cache.state.finish(*this, pass, cache.y);
  }
  const Matrix& backward(weir::MatrixIn<float> dy, Cache& cache) {
    cache.state.begin_backward("Hidden::backward", *this, dy);
    weir::set_shape(cache.dz, dy.rows(), dy.cols());
    weir::activation_backward<weir::Relu, float>(cache.z, dy, cache.dz);
    return linear_.backward(cache.dz, cache.linear);
  }
  template <class Self, class Visit>
  static void visit(Self& self, Visit& visit) {
    visit("", self.linear_);
  }

 private:
  weir::Linear<float> linear_;
};

/// What a task makes of its mixture: a hidden layer and one number.
class Tower {
 public:
  using Scalar = float;
  struct Cache {
    weir::CacheState state;
    Hidden::Cache hidden;
    weir::Linear<float>::Cache out;
  };

  Tower(Index d_in, weir::Rng& rng)
      : hidden_(d_in, kTowerWidth, rng), out_(kTowerWidth, 1, rng, {.bias = true}) {}

  const Matrix& forward(weir::MatrixIn<float> x, const weir::Pass& pass, Cache& cache) const {
    cache.state.begin();
    const Matrix& hidden = hidden_.forward(x, pass, cache.hidden);
    return cache.state.finish(*this, pass, out_.forward(hidden, pass, cache.out));
  }
  const Matrix& backward(weir::MatrixIn<float> dy, Cache& cache) {
    cache.state.begin_backward("Tower::backward", *this, dy);
    return hidden_.backward(out_.backward(dy, cache.out), cache.hidden);
  }
  template <class Self, class Visit>
  static void visit(Self& self, Visit& visit) {
    visit("hidden", self.hidden_);
    visit("out", self.out_);
  }

 private:
  Hidden hidden_;
  weir::Linear<float> out_;
};

using Model = weir::MultiGateMixture<weir::LinearRouter<float>, weir::SoftmaxTopK<float>,
                                     weir::AnyBank<Hidden>, Tower>;

/// Each task has a gate that mixes `k` of the experts. With one expert, both share all of it.
Model make_model(Index experts, Index width, Index k, weir::Rng& rng) {
  std::vector<weir::LinearRouter<float>> gates;
  std::vector<Hidden> bank;
  std::vector<Tower> towers;
  for (Index e = 0; e < experts; ++e) bank.emplace_back(kFeatures, width, rng);
  for (Index task = 0; task < kTasks; ++task) {
    gates.emplace_back(kFeatures, experts, rng);
    towers.emplace_back(width, rng);
  }
  return {std::move(gates), weir::SoftmaxTopK<float>({.k = k, .renormalise = k < experts}),
          weir::AnyBank<Hidden>(std::move(bank), kFeatures, width), std::move(towers)};
}

Index count_parameters(Model& model) {
  Index count = 0;
  for (const auto& [name, parameter] : weir::parameters(model)) count += parameter->value.size();
  return count;
}

/// Examples of two tasks whose weights have a given cosine, the recipe of Ma et al.:
///
///     w_1 = u_1,   w_2 = p u_1 + sqrt(1 - p^2) u_2,   y_k = w_k x + sum_i sin(a_i w_k x + b_i) +
///     noise
///
/// with orthogonal unit vectors u and normal x.
class Data {
 public:
  Data(double cosine, std::uint64_t seed) : weights_(kTasks, kFeatures) {
    weir::Rng rng(seed);
    Matrix u = weir::normal_init<float>(kTasks, kFeatures, 1.0, rng);
    u.row(0).normalize();
    u.row(1) -= u.row(1).dot(u.row(0)) * u.row(0);
    u.row(1).normalize();
    weights_.row(0) = u.row(0);
    weights_.row(1) = static_cast<float>(cosine) * u.row(0) +
                      static_cast<float>(std::sqrt(1.0 - cosine * cosine)) * u.row(1);
  }

  void draw(Index count, weir::Rng& rng, Matrix& x, Matrix& y) const {
    constexpr std::array<float, 3> kFrequencies = {1.0F, 2.0F, 3.0F};
    x = weir::normal_init<float>(count, kFeatures, 1.0, rng);
    y = x * weights_.transpose();
    const Matrix z = y;
    for (const float a : kFrequencies) y.array() += (a * z.array() + 0.5F * a).sin();
    y += weir::normal_init<float>(count, kTasks, kNoise, rng);
  }

 private:
  Matrix weights_;
};

/// How the labels of the two tasks correlate.
double correlation(const Matrix& y) {
  const Matrix centred = y.rowwise() - y.colwise().mean();
  return static_cast<double>(centred.col(0).dot(centred.col(1)) /
                             (centred.col(0).norm() * centred.col(1).norm()));
}

struct Kind {
  std::string name;
  Index experts, width, k;
};

/// Trains a model, and returns its mean squared error on new examples.
double train(const Options& options, const Kind& kind, const std::string& name, const Data& data,
             Index seed, const Matrix& x_new, const Matrix& y_new) {
  weir::Rng rng(static_cast<std::uint64_t>(seed));
  Model model = make_model(kind.experts, kind.width, kind.k, rng);
  weir::AdamW<float> optimizer({.learning_rate = 5e-3, .weight_decay = 0.0});
  Resumable run{
      .save_every = options.save_every,
      .until = options.stop_after > 0 ? std::min(options.stop_after, options.steps) : options.steps,
      .settings = {{"steps", std::to_string(options.steps)},
                   {"batch", std::to_string(options.batch)}}};
  if (!options.save.empty()) run.folder = options.save + "/" + name;
  Model::Cache cache;
  Matrix x, y;
  train_resumably(run, model, optimizer, rng, [&] {
    data.draw(options.batch, rng, x, y);
    const Matrix error = model.forward(x, weir::kTraining, cache) - y;
    model.backward(2.0F / static_cast<float>(error.size()) * error, cache);
    // From the peak to a tenth of it, in a straight line.
    const double done = static_cast<double>(optimizer.steps()) / static_cast<double>(options.steps);
    optimizer.set_learning_rate(5e-3 * (1.0 - 0.9 * done));
    optimizer.step(model);
  });
  const Matrix error = weir::infer(model, x_new) - y_new;
  return static_cast<double>(error.squaredNorm()) / static_cast<double>(error.size());
}

void run(Options options) {
  weir::set_threads(options.threads);
  const std::vector<Kind> kinds = {{"all shared", 1, 125, 1},
                                   {"a gate per task", kExperts, kExpertWidth, kExperts},
                                   {"  2 of 8 experts", kExperts, kExpertWidth, 2}};
  std::cout << "parameters:";
  for (const Kind& kind : kinds) {
    weir::Rng rng(1);
    Model model = make_model(kind.experts, kind.width, kind.k, rng);
    std::cout << (&kind == kinds.data() ? " " : ", ") << count_parameters(model);
  }
  std::cout << "\nmean squared error on new examples after " << options.steps
            << " steps; that of the noise is " << fixed(kNoise * kNoise, 2) << "\n\n"
            << "  cosine   labels\n of tasks correlate  network         ";
  for (Index seed = 1; seed <= options.seeds; ++seed) {
    std::cout << padded("seed " + std::to_string(seed), 8);
  }
  std::cout << "    mean  seconds\n";
  StatusLine status(false);
  for (const double cosine : {1.0, 0.9, 0.5, 0.0}) {
    const Data data(cosine, 77);
    weir::Rng rng(88);
    Matrix x, y;
    data.draw(4096, rng, x, y);
    for (const Kind& kind : kinds) {
      const bool first = &kind == kinds.data();
      std::string line = padded(first ? fixed(cosine, 1) : "", 9) +
                         padded(first ? fixed(correlation(y), 2) : "", 10) + "  " + kind.name +
                         std::string(16 - kind.name.size(), ' ');
      double sum = 0.0;
      const double seconds = seconds_of([&] {
        for (Index seed = 1; seed <= options.seeds; ++seed) {
          const std::string name =
              "cosine " + fixed(cosine, 1) + ", " + kind.name + ", seed " + std::to_string(seed);
          status.show(name, false);
          const double error = train(options, kind, name, data, seed, x, y);
          sum += error;
          line += padded(fixed(error, 4), 8);
        }
      });
      status.show(line + padded(fixed(sum / static_cast<double>(options.seeds), 4), 8) +
                      padded(fixed(seconds, 1), 9),
                  true);
    }
  }
  status.close();
}

}  // namespace

int main(int argc, char** argv) {
  return run_program("tasks", argc, argv, parse, run);
}
