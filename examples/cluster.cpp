// SPDX-License-Identifier: MIT
// What a mixture of experts costs on a cluster, by a model: fitted to the runs of cluster_measure
// and checked on runs that it was not fitted to; then, with published numbers of a cluster, as a
// prediction for 64 to 4096 devices.
#include <algorithm>
#include <cmath>
#include <iostream>
#include <optional>
#include <string>
#include <vector>

#include <weir/parallel/cluster_model.hpp>
#include <weir/parallel/drawn_tokens.hpp>
#include <weir/parallel/placement.hpp>
#include <weir/parallel/traffic.hpp>

#include "cluster_run.hpp"
#include "command_line.hpp"
#include "progress.hpp"

namespace {

using weir::Index;

struct Options {
  std::string runs;
  Index units = 2;
  std::vector<Index> devices = {64, 128, 256, 512, 1024, 2048, 4096};
  Index tokens = 4096;
  Index drawn = 1 << 19;
  double skew = 0.0;
};

std::optional<int> parse(int argc, char** argv, Options& options) {
  CommandLine line("Models the time of a mixture of experts on a cluster.");
  line.add("--runs", options.runs, "Runs of cluster_measure to fit and to check");
  line.add("--units", options.units, "Processors of the machine that made them")
      ->check(limits::at_least(1));
  line.add("--devices", options.devices, "Devices to predict for: multiples of 8")
      ->check(limits::between(8, 65536));
  line.add("--tokens", options.tokens, "Tokens of each device")->check(limits::at_least(1));
  line.add("--drawn", options.drawn, "Tokens of all devices that are drawn at most")
      ->check(limits::at_least(1));
  line.add("--skew", options.skew, "Exponent by which experts differ in popularity")
      ->check(limits::at_least(0));
  return line.parse(argc, argv);
}

// --- Runs that were measured --------------------------------------------------------------------

/// Two measured times of one run, and what they depend on.
struct Measured {
  ClusterRun run;
  bool backward = false;
  weir::MeasuredRun of;
};

std::vector<Measured> with_loads(const std::vector<ClusterRun>& runs, Index units) {
  std::vector<Measured> measured;
  for (const ClusterRun& run : runs) {
    const weir::Traffic traffic = traffic_of(run);
    for (const bool backward : {false, true}) {
      measured.push_back({run,
                          backward,
                          {weir::layer_load(traffic, work_of(run, backward), units),
                           backward ? run.backward : run.forward}});
    }
  }
  return measured;
}

/// The smallest and largest runs on 2 and 4 ranks; 3 ranks and sizes between are for the check.
bool is_fitted(const ClusterRun& run, const std::vector<ClusterRun>& all) {
  const auto is_end = [&](Index ClusterRun::*size) {
    const auto [least, most] = std::minmax_element(
        all.begin(), all.end(),
        [&](const ClusterRun& a, const ClusterRun& b) { return a.*size < b.*size; });
    return run.*size == (*least).*size || run.*size == (*most).*size;
  };
  return run.ranks != 3 && is_end(&ClusterRun::tokens) && is_end(&ClusterRun::d_model);
}

std::string milliseconds(double seconds) {
  return fixed(1e3 * seconds, 2);
}

void check_model(const Options& options) {
  const std::vector<ClusterRun> runs = read_runs(options.runs);
  std::vector<weir::MeasuredRun> fitted;
  std::vector<Measured> checked;
  for (const Measured& m : with_loads(runs, options.units)) {
    if (is_fitted(m.run, runs)) {
      fitted.push_back(m.of);
    } else {
      checked.push_back(m);
    }
  }
  const weir::ClusterModel model = weir::fit_cluster(fitted, options.units);
  std::cout << "Fitted to " << fitted.size() << " passes on 2 and 4 ranks:\n"
            << "  an exchange " << fixed(1e6 * model.start, 0) << " us, a message "
            << fixed(1e6 * model.inside.per_message, 1) << " us, "
            << fixed(1e-9 / model.inside.seconds_per_byte, 2) << " GB/s; a pass "
            << fixed(1e6 * model.pass_start, 0) << " us, " << fixed(1e-9 * model.flops, 1)
            << " Gflop/s a processor\n\nPasses that it was not fitted to (milliseconds):\n\n"
            << "ranks  tokens  width  pass      measured  predicted   error\n";
  double worst = 0.0, sum = 0.0;
  Index within = 0;
  for (const Measured& m : checked) {
    const double predicted = weir::load_seconds(m.of.load, model);
    const double error = predicted / m.of.seconds - 1.0;
    worst = std::max(worst, std::abs(error));
    sum += std::abs(error);
    within += std::abs(error) <= 0.2 ? 1 : 0;
    std::cout << padded(std::to_string(m.run.ranks), 5) << padded(std::to_string(m.run.tokens), 8)
              << padded(std::to_string(m.run.d_model), 7)
              << (m.backward ? "  backward" : "  forward ")
              << padded(milliseconds(m.of.seconds), 10) << padded(milliseconds(predicted), 11)
              << padded((error < 0.0 ? "" : "+") + fixed(100.0 * error, 1) + " %", 9) << '\n';
  }
  if (checked.empty()) return;
  std::cout << "\nWithin 20 %: " << within << " of " << checked.size() << "; mean error "
            << fixed(100.0 * sum / static_cast<double>(checked.size()), 1) << " %, largest "
            << fixed(100.0 * worst, 1) << " %\n\n";
}

// --- A large cluster ----------------------------------------------------------------------------

/// A mixture of DeepSeek-V3 (arXiv:2412.19437, section 4.2).
constexpr Index kExperts = 256, kChoices = 8, kModel = 7168, kHidden = 2048;
constexpr Index kDevicesPerNode = 8;

/// Eight H800 on a node. NVLink 160 GB/s and InfiniBand 50 GB/s a device, used at once
/// (arXiv:2412.19437, section 3.2.2); FP8 products at 1550 Tflop/s (README of DeepGEMM): these are
/// the most that was reported, and time is at least what they allow.
weir::ClusterModel h800_cluster() {
  weir::ClusterModel model;
  model.inside = weir::LinkModel::of(0.0, 160e9);
  model.across = weir::LinkModel::of(0.0, 50e9);
  model.at_once = true;
  model.flops = 1550e12;
  return model;
}

/// Expert e on rank e * ranks / experts, or, where there are more ranks, on each rank that is e
/// modulo the experts.
weir::Placement spread(const weir::RankNodes& nodes) {
  if (nodes.ranks() <= kExperts) return weir::Placement::contiguous(kExperts, nodes);
  std::vector<std::vector<Index>> ranks_of(kExperts);
  for (Index r = 0; r < nodes.ranks(); ++r) {
    ranks_of[static_cast<std::size_t>(r % kExperts)].push_back(r);
  }
  return {ranks_of, nodes};
}

void predict(const Options& options) {
  const weir::ClusterModel model = h800_cluster();
  weir::LayerWork work;
  work.sizes.dispatch = kModel + kModel / 128 * 4;  // FP8, with a scale for each 128.
  work.sizes.combine = 2 * kModel;                  // BF16
  work.flops_per_assignment = 6.0 * static_cast<double>(kModel * kHidden);
  std::cout << "PREDICTION, nothing of this was run: one forward pass of a DeepSeek-V3 mixture,\n"
            << options.tokens
            << " tokens on each H800, FP8 out and BF16 back, experts on all "
               "devices\n(8 groups, of which a token has 4). Milliseconds.\n\n"
            << "devices  experts  nodes of  load   dispatch  combine  experts    pass  computing\n"
               "          each    a token   max/mean\n";
  for (const Index devices : options.devices) {
    if (devices % kDevicesPerNode != 0) {
      weir::throw_error<weir::ConfigError>("--devices = ", devices, ", expected a multiple of ",
                                           kDevicesPerNode);
    }
    const auto nodes = weir::RankNodes::uniform(devices, kDevicesPerNode);
    const weir::Placement placement = spread(nodes);
    const Index drawn = std::clamp<Index>(options.drawn / devices, 1, options.tokens);
    const weir::RoutedTokens tokens =
        weir::draw_tokens({.popularity = weir::zipf_popularity(kExperts, options.skew, 1),
                           .k = kChoices,
                           .groups = {.count = 8, .allowed = 4, .summed = 2}},
                          drawn, devices, 2);
    weir::Traffic traffic(nodes, weir::RowsSent::kPerNode);
    traffic.add(tokens.layer, placement, [&](Index t) { return tokens.source[t]; });
    double on_nodes = 0.0;
    for (Index n = 1; n <= nodes.nodes(); ++n) {
      on_nodes += static_cast<double>(n * traffic.tokens_on_nodes(n)) /
                  static_cast<double>(tokens.tokens());
    }
    // As if each token that was drawn came as often as it takes.
    const double times = static_cast<double>(options.tokens) / static_cast<double>(drawn);
    const weir::LayerPrediction layer = weir::predict_layer(traffic, work, model);
    const auto ms = [&](double seconds) { return fixed(1e3 * times * seconds, 2); };
    std::cout << padded(std::to_string(devices), 7)
              << padded(fixed(static_cast<double>(placement.most_slots()), 0), 9)
              << padded(fixed(on_nodes, 2), 10) << padded(fixed(layer.load_imbalance, 2), 7)
              << padded(ms(layer.dispatch), 10) << padded(ms(layer.combine), 9)
              << padded(ms(layer.compute), 9) << padded(ms(layer.seconds), 8)
              << padded(fixed(100.0 * layer.compute / layer.seconds, 0) + " %", 11) << std::endl;
  }
}

void run(Options options) {
  if (!options.runs.empty()) check_model(options);
  predict(options);
}

}  // namespace

int main(int argc, char** argv) {
  return run_program("cluster", argc, argv, parse, run);
}
