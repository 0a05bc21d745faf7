// SPDX-License-Identifier: MIT
/// \file
/// How long exchanges, layers and steps take on a cluster, by a model of few numbers.
#pragma once

#include <algorithm>
#include <string_view>
#include <vector>

#include <weir/core/error.hpp>
#include <weir/core/list.hpp>
#include <weir/core/types.hpp>
#include <weir/parallel/nonnegative_fit.hpp>
#include <weir/parallel/traffic.hpp>

namespace weir {

/// A way between ranks: a message of n bytes keeps the rank that sends or receives it busy for
/// `per_message + n * seconds_per_byte`, which are the o and the G of LogGP (Alexandrov et al.
/// 1995, "LogGP: Incorporating long messages into the LogP model"). Its L, for which the messages
/// of an exchange wait together, is in ClusterModel::start.
struct LinkModel {
  double per_message = 0.0;
  double seconds_per_byte = 0.0;

  /// \param bandwidth  Bytes a second, of each rank and direction.
  static LinkModel of(double per_message, double bandwidth) {
    expect_positive("LinkModel", "bandwidth", bandwidth);
    return {.per_message = per_message, .seconds_per_byte = 1.0 / bandwidth};
  }
};

/// A cluster, as far as the model knows it. Which rank is on which node is the placement's matter.
struct ClusterModel {
  double start = 0.0;       ///< Seconds of an exchange with no messages, and latency.
  LinkModel inside = {};    ///< Between ranks of a node.
  LinkModel across = {};    ///< Between nodes.
  bool at_once = false;     ///< Whether ranks use both kinds of link at the same time.
  double pass_start = 0.0;  ///< Seconds of a layer's pass without any assignment.
  double flops = 1e12;      ///< Operations a second of one unit.
  /// What computes and moves messages on a node: ranks beyond that share. 0: one for each rank.
  Index units = 0;
  double overlap = 0.0;  ///< The share of the shorter of computing and exchanging that is hidden.

  /// \throws ConfigError  if a number is negative or not finite, flops = 0, or overlap > 1.
  void check() const {
    expect_at_least("ClusterModel", "start", start, 0.0);
    expect_at_least("ClusterModel", "inside.per_message", inside.per_message, 0.0);
    expect_at_least("ClusterModel", "inside.seconds_per_byte", inside.seconds_per_byte, 0.0);
    expect_at_least("ClusterModel", "across.per_message", across.per_message, 0.0);
    expect_at_least("ClusterModel", "across.seconds_per_byte", across.seconds_per_byte, 0.0);
    expect_at_least("ClusterModel", "pass_start", pass_start, 0.0);
    expect_positive("ClusterModel", "flops", flops);
    expect_at_least<Index>("ClusterModel", "units", units, 0);
    expect_in("ClusterModel", "overlap", overlap, 0.0, 1.0);
  }
};

/// What the busiest rank has of something, or the ranks of the busiest node on average of their
/// units, whichever is more:
///
///     max(max_r v_r, max_n sum_{r on n} v_r / units)
///
/// No schedule takes less.
/// \param of       v_r.
template <class Of>
double busiest(const RankNodes& nodes, Index units, Of&& of) {
  double most = 0.0;
  List<double> sum(nodes.nodes(), 0.0);
  for (Index r = 0; r < nodes.ranks(); ++r) {
    const auto value = static_cast<double>(of(r));
    most = std::max(most, value);
    sum[nodes.node_of(r)] += value;
  }
  for (Index n = 0; units > 0 && n < nodes.nodes(); ++n) {
    most = std::max(most, sum[n] / static_cast<double>(units));
  }
  return most;
}

/// What time depends on, in runs that are measured or predicted: each number is that of the
/// busiest.
struct ClusterLoad {
  double exchanges = 0.0;
  double messages_inside = 0.0, bytes_inside = 0.0;
  double messages_across = 0.0, bytes_across = 0.0;
  double passes = 0.0;
  double flops = 0.0;

  ClusterLoad& operator+=(const ClusterLoad& other) {
    exchanges += other.exchanges;
    messages_inside += other.messages_inside;
    bytes_inside += other.bytes_inside;
    messages_across += other.messages_across;
    bytes_across += other.bytes_across;
    passes += other.passes;
    flops += other.flops;
    return *this;
  }
};

/// The load of one exchange: of dispatch, and the other way round of combine. A rank's messages are
/// the ranks that it sends rows to or receives rows from, whichever are more, and so are its bytes.
inline ClusterLoad exchange_load(const Traffic& traffic, Index row_bytes, Index units) {
  const RankNodes& nodes = traffic.nodes();
  const auto count = [&](Index r, bool inside, auto&& value) {
    Index out = 0, in = 0;
    for (Index other = 0; other < nodes.ranks(); ++other) {
      if (other == r || nodes.share_node(r, other) != inside) continue;
      out += value(traffic.rows(r, other));
      in += value(traffic.rows(other, r));
    }
    return std::max(out, in);
  };
  const auto of = [&](bool inside, bool bytes) {
    return busiest(nodes, units, [&](Index r) {
      return count(r, inside,
                   [&](Index rows) { return bytes ? rows * row_bytes : Index(rows > 0 ? 1 : 0); });
    });
  };
  return {.exchanges = 1.0,
          .messages_inside = of(true, false),
          .bytes_inside = of(true, true),
          .messages_across = of(false, false),
          .bytes_across = of(false, true)};
}

/// What one pass of a mixture sends and computes.
struct LayerWork {
  RowSizes sizes = {};
  double flops_per_assignment = 0.0;  ///< Of an expert, on one row.
};

/// The load of a pass: two exchanges and the experts' computation.
inline ClusterLoad layer_load(const Traffic& traffic, const LayerWork& work, Index units) {
  ClusterLoad load = exchange_load(traffic, work.sizes.dispatch, units);
  load += exchange_load(traffic, work.sizes.combine, units);
  load.passes = 1.0;
  load.flops = work.flops_per_assignment *
               busiest(traffic.nodes(), units, [&](Index r) { return traffic.load(r); });
  return load;
}

/// Seconds of the exchanges of a load.
inline double exchange_seconds(const ClusterLoad& load, const ClusterModel& model) {
  const double inside = load.messages_inside * model.inside.per_message +
                        load.bytes_inside * model.inside.seconds_per_byte;
  const double across = load.messages_across * model.across.per_message +
                        load.bytes_across * model.across.seconds_per_byte;
  return load.exchanges * model.start +
         (model.at_once ? std::max(inside, across) : inside + across);
}

/// Seconds of the passes of a load.
///
///     exchange + compute - overlap * min(exchange, compute)
inline double load_seconds(const ClusterLoad& load, const ClusterModel& model) {
  const double exchange = exchange_seconds(load, model);
  const double compute = load.passes * model.pass_start + load.flops / model.flops;
  return exchange + compute - model.overlap * std::min(exchange, compute);
}

/// What the model says of a pass.
struct LayerPrediction {
  double dispatch = 0.0, compute = 0.0, combine = 0.0;  ///< Seconds.
  double seconds = 0.0;                                 ///< Of all, less what overlaps.
  double load_imbalance = 0.0;                          ///< Largest load of a rank over the mean.
};

/// \throws ConfigError  as ClusterModel::check.
inline LayerPrediction predict_layer(const Traffic& traffic, const LayerWork& work,
                                     const ClusterModel& model) {
  model.check();
  const ClusterLoad load = layer_load(traffic, work, model.units);
  LayerPrediction prediction;
  prediction.dispatch =
      exchange_seconds(exchange_load(traffic, work.sizes.dispatch, model.units), model);
  prediction.combine =
      exchange_seconds(exchange_load(traffic, work.sizes.combine, model.units), model);
  prediction.compute = model.pass_start + load.flops / model.flops;
  const double exchange = prediction.dispatch + prediction.combine;
  prediction.seconds =
      exchange + prediction.compute - model.overlap * std::min(exchange, prediction.compute);
  prediction.load_imbalance = traffic.load_imbalance();
  return prediction;
}

/// Seconds of an all-reduce of `bytes` over `ranks` in a ring (Patarasuk and Yuan 2009, "Bandwidth
/// optimal all-reduce algorithms for clusters of workstations"):
///
///     2 (ranks - 1) (start + per_message + bytes / ranks * seconds_per_byte)
///
/// \param start    The latency of a turn.
inline double all_reduce_seconds(double bytes, Index ranks, const LinkModel& link,
                                 double start = 0.0) {
  expect_at_least<Index>("all_reduce_seconds", "ranks", ranks, 1);
  expect_at_least("all_reduce_seconds", "bytes", bytes, 0.0);
  const double turns = 2.0 * static_cast<double>(ranks - 1);
  const double part = bytes / static_cast<double>(ranks);
  return turns * (start + link.per_message + part * link.seconds_per_byte);
}

/// A training step of a model whose layers all have the same routing.
struct StepWork {
  Index layers = 1;
  LayerWork forward = {}, backward = {};
  double other_flops = 0.0;     ///< Of each rank: attention and whatever else is not in experts.
  double gradient_bytes = 0.0;  ///< Of each rank, which are summed over all ranks.
};

/// What the model says of a step.
struct StepPrediction {
  double layers = 0.0;      ///< Seconds of all mixtures, forward and backward.
  double other = 0.0;       ///< Of everything else that is computed.
  double all_reduce = 0.0;  ///< Of summing gradients; nothing overlaps with it.
  double seconds = 0.0;
};

/// \throws ConfigError  as ClusterModel::check; unless layers >= 0.
inline StepPrediction predict_step(const Traffic& traffic, const StepWork& work,
                                   const ClusterModel& model) {
  expect_at_least<Index>("predict_step", "layers", work.layers, 0);
  StepPrediction step;
  step.layers =
      static_cast<double>(work.layers) * (predict_layer(traffic, work.forward, model).seconds +
                                          predict_layer(traffic, work.backward, model).seconds);
  const RankNodes& nodes = traffic.nodes();
  step.other = busiest(nodes, model.units, [&](Index) { return work.other_flops; }) / model.flops;
  step.all_reduce =
      all_reduce_seconds(work.gradient_bytes, nodes.ranks(),
                         nodes.nodes() > 1 ? model.across : model.inside, model.start);
  step.seconds = step.layers + step.other + step.all_reduce;
  return step;
}

/// A run that was measured: what it did and how long it took.
struct MeasuredRun {
  ClusterLoad load;
  double seconds = 0.0;
};

/// The model whose predictions of these runs, without overlap, have the least relative errors, see
/// `fit_nonnegative`. What no run has, such as messages between nodes, costs nothing then, and
/// computing is infinitely fast (1e300) where no run shows what it costs. `units` has to be what
/// the loads were computed with. \throws ConfigError  if there are no runs, or one took no time.
inline ClusterModel fit_cluster(const std::vector<MeasuredRun>& runs, Index units) {
  Matrix<double> features(static_cast<Index>(runs.size()), 7);
  std::vector<double> seconds;
  for (std::size_t i = 0; i < runs.size(); ++i) {
    const ClusterLoad& load = runs[i].load;
    features.row(static_cast<Index>(i)) << load.exchanges, load.messages_inside, load.bytes_inside,
        load.messages_across, load.bytes_across, load.passes, load.flops;
    seconds.push_back(runs[i].seconds);
  }
  const std::vector<double> x = fit_nonnegative(features, seconds);
  ClusterModel model;
  model.start = x[0];
  model.inside = {x[1], x[2]};
  model.across = {x[3], x[4]};
  model.pass_start = x[5];
  model.flops = x[6] > 0.0 ? 1.0 / x[6] : 1e300;
  model.units = units;
  return model;
}

}  // namespace weir
