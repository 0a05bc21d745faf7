// SPDX-License-Identifier: MIT
#include <algorithm>
#include <cmath>
#include <limits>
#include <span>
#include <utility>
#include <vector>

#include <weir/core/random.hpp>
#include <weir/parallel/cluster_model.hpp>
#include <weir/parallel/drawn_tokens.hpp>

#include "support/catch.hpp"
#include "support/matrices.hpp"

namespace weir::cluster_model_test {

Traffic count(const RoutedTokens& tokens, const Placement& placement, RowsSent sent) {
  Traffic traffic(placement.nodes(), sent);
  traffic.add(tokens.layer, placement, [&](Index t) { return tokens.source[t]; });
  return traffic;
}

Traffic drawn(Index experts, Index k, Index tokens_per_rank, const RankNodes& nodes,
              double skew = 0.0) {
  const RoutingDistribution distribution{.popularity = zipf_popularity(experts, skew, 1), .k = k};
  return count(draw_tokens(distribution, tokens_per_rank, nodes.ranks(), 2),
               Placement::contiguous(experts, nodes), RowsSent::kPerAssignment);
}

TEST_CASE("The model's times are those worked out by hand", "[parallel][cluster_model]") {
  // Nodes {0, 1} and {2, 3}, one expert on each rank. Rows: 0 -> 1 twice, 0 -> 2, 1 -> 2, 3 -> 2.
  const Placement placement = Placement::contiguous(4, RankNodes::uniform(4, 2));
  RoutedTokens tokens;
  tokens.layer.experts = 4;
  for (const auto& [source, expert] :
       std::vector<std::pair<Index, Index>>{{0, 1}, {0, 1}, {0, 2}, {1, 2}, {3, 2}, {3, 3}}) {
    tokens.layer.add({expert});
    tokens.source.push_back(source);
  }
  const Traffic traffic = count(tokens, placement, RowsSent::kPerAssignment);
  // Inside, rank 0 sends 2 rows in a message, rank 1 receives them; across, rank 2 gets 2 of each.
  const ClusterLoad load = exchange_load(traffic, 100, 0);
  CHECK(load.messages_inside == 1.0);
  CHECK(load.bytes_inside == 200.0);
  CHECK(load.messages_across == 2.0);
  CHECK(load.bytes_across == 200.0);
  // One unit for both ranks of a node: 0 sends 200 to 1; 2 gets 100 from 3 as 3 sends them.
  CHECK(exchange_load(traffic, 100, 1).bytes_inside == 400.0);
  CHECK(exchange_load(traffic, 100, 1).messages_inside == 2.0);
  CHECK(exchange_load(traffic, 100, 2).bytes_inside == 200.0);

  ClusterModel model{.start = 5.0,
                     .inside = {.per_message = 1.0, .seconds_per_byte = 0.01},
                     .across = {.per_message = 10.0, .seconds_per_byte = 0.1},
                     .pass_start = 2.0,
                     .flops = 10.0};
  const LayerWork work{.sizes = {.dispatch = 100, .combine = 200}, .flops_per_assignment = 30.0};
  LayerPrediction layer = predict_layer(traffic, work, model);
  CHECK(layer.dispatch == Approx(5.0 + (1.0 + 2.0) + (20.0 + 20.0)));
  CHECK(layer.combine == Approx(5.0 + (1.0 + 4.0) + (20.0 + 40.0)));
  CHECK(layer.compute == Approx(2.0 + 3 * 30.0 / 10.0));  // Rank 2 has three assignments.
  CHECK(layer.seconds == Approx(48.0 + 70.0 + 11.0));
  CHECK(layer.load_imbalance == Approx(2.0));
  CHECK(layer.seconds == Approx(load_seconds(layer_load(traffic, work, 0), model)));
  model.at_once = true;
  model.overlap = 0.5;
  layer = predict_layer(traffic, work, model);
  CHECK(layer.seconds == Approx(45.0 + 65.0 + 11.0 - 0.5 * 11.0));
  CHECK(layer.seconds == Approx(load_seconds(layer_load(traffic, work, 0), model)));

  const StepPrediction step = predict_step(
      traffic,
      {.layers = 3, .forward = work, .backward = work, .other_flops = 70.0, .gradient_bytes = 40.0},
      model);
  CHECK(step.layers == Approx(6.0 * layer.seconds));
  CHECK(step.other == Approx(7.0));
  CHECK(step.all_reduce == Approx(6.0 * (5.0 + 10.0 + 10.0 * 0.1)));
  CHECK(step.seconds == Approx(step.layers + step.other + step.all_reduce));
}

TEST_CASE("Nothing to send takes the start of an exchange, and one rank no exchange of rows",
          "[parallel][cluster_model]") {
  const ClusterModel model{.start = 1e-6, .inside = LinkModel::of(1e-6, 1e9), .pass_start = 1e-5};
  const LayerWork work{.sizes = {.dispatch = 8, .combine = 8}, .flops_per_assignment = 1.0};
  const LayerPrediction none = predict_layer(drawn(4, 1, 0, RankNodes::single(2)), work, model);
  CHECK(none.seconds == Approx(1e-5 + 2e-6));
  CHECK(none.load_imbalance == 0.0);
  const LayerPrediction one = predict_layer(drawn(4, 1, 9, RankNodes::single(1)), work, model);
  CHECK(one.dispatch == Approx(1e-6));
  CHECK(all_reduce_seconds(1e9, 1, model.inside) == 0.0);
}

TEST_CASE("More tokens, skewed experts and slower links take longer", "[parallel][cluster_model]") {
  const ClusterModel model{
      .start = 1e-6, .inside = LinkModel::of(2e-6, 1e10), .across = LinkModel::of(5e-6, 1e9)};
  ClusterModel slower = model;
  slower.across = LinkModel::of(5e-6, 5e8);
  const LayerWork work{.sizes = {.dispatch = 1024, .combine = 2048}, .flops_per_assignment = 1e6};
  const RankNodes nodes = RankNodes::uniform(8, 4);
  const double few = predict_layer(drawn(16, 2, 50, nodes), work, model).seconds;
  const double many = predict_layer(drawn(16, 2, 500, nodes), work, model).seconds;
  CHECK(many > 5.0 * few);
  CHECK(many < 12.0 * few);
  CHECK(predict_layer(drawn(16, 2, 500, nodes, 1.5), work, model).seconds > 1.5 * many);
  CHECK(predict_layer(drawn(16, 2, 500, nodes), work, slower).seconds > many);
}

TEST_CASE("A fit finds the numbers of the model that made the runs", "[parallel][cluster_model]") {
  const ClusterModel truth{.start = 3e-5,
                           .inside = LinkModel::of(2e-6, 4e9),
                           .across = LinkModel::of(2e-5, 1e9),
                           .pass_start = 1e-5,
                           .flops = 3e10,
                           .units = 2};
  const auto noise = GENERATE(0.0, 0.03);
  Rng rng(8);
  std::vector<MeasuredRun> runs, others;
  for (const Index ranks : {2, 3, 4, 6}) {
    for (const Index per_node : {1, 2, 4}) {
      for (const Index tokens : {20, 200, 1000}) {
        const Traffic traffic = drawn(12, 2, tokens, RankNodes::uniform(ranks, per_node), 0.5);
        const ClusterLoad exchange = exchange_load(traffic, 512, 2);
        const ClusterLoad layer = layer_load(
            traffic, {.sizes = {.dispatch = 512, .combine = 512}, .flops_per_assignment = 2e5}, 2);
        for (const ClusterLoad& load : {exchange, layer}) {
          const double seconds = load_seconds(load, truth) * (1.0 + noise * rng.uniform(-1.0, 1.0));
          (ranks == 3 ? others : runs).push_back({load, seconds});
        }
      }
    }
  }
  const ClusterModel found = fit_cluster(runs, 2);
  CHECK(found.units == 2);
  const double margin = noise == 0.0 ? 1e-6 : 0.25;
  CHECK(found.inside.seconds_per_byte == Approx(truth.inside.seconds_per_byte).epsilon(margin));
  CHECK(found.across.seconds_per_byte == Approx(truth.across.seconds_per_byte).epsilon(margin));
  CHECK(found.flops == Approx(truth.flops).epsilon(margin));
  if (noise == 0.0) {
    CHECK(found.start == Approx(truth.start));
    CHECK(found.inside.per_message == Approx(truth.inside.per_message));
    CHECK(found.across.per_message == Approx(truth.across.per_message));
    CHECK(found.pass_start == Approx(truth.pass_start));
  }
  for (const MeasuredRun& run : others) {
    CHECK(load_seconds(run.load, found) == Approx(run.seconds).epsilon(noise == 0.0 ? 1e-6 : 0.08));
  }
}

TEST_CASE("A fit that is not negative is the best of its kind", "[parallel][cluster_model]") {
  // x_1 would be negative without the condition: (y - a_0 x_0) is least with a_0 alone.
  Matrix<double> features(3, 2);
  features << 1.0, 1.0, 1.0, 2.0, 1.0, 3.0;
  const std::vector<double> falling = fit_nonnegative(features, {3.0, 2.0, 1.0});
  CHECK(falling[1] == 0.0);
  // sum ((x - y) / y)^2 is least at sum (1 / y) / sum (1 / y^2).
  CHECK(falling[0] == Approx((1.0 / 3 + 0.5 + 1.0) / (1.0 / 9 + 0.25 + 1.0)));
  const std::vector<double> exact = fit_nonnegative(features, {3.0, 5.0, 7.0});
  CHECK(exact[0] == Approx(1.0));
  CHECK(exact[1] == Approx(2.0));

  // Karush-Kuhn-Tucker: no feature that is left out could lower the error, those within are flat.
  for (std::uint64_t seed = 1; seed <= 20; ++seed) {
    Matrix<double> a = test::random_matrix(9, 5, seed);
    a.col(3).setZero();
    a.col(4) = a.col(0);
    std::vector<double> y;
    Rng rng(seed + 100);
    for (int i = 0; i < 9; ++i) y.push_back(rng.uniform(0.5, 2.0));
    const std::vector<double> x = fit_nonnegative(a, y);
    CHECK(x[3] == 0.0);
    std::vector<double> gradient(5, 0.0);
    for (Index i = 0; i < 9; ++i) {
      const double of = y[static_cast<std::size_t>(i)];
      double rest = -of;
      for (Index j = 0; j < 5; ++j) rest += a(i, j) * x[static_cast<std::size_t>(j)];
      for (Index j = 0; j < 5; ++j) {
        gradient[static_cast<std::size_t>(j)] += a(i, j) * rest / (of * of);
      }
    }
    for (std::size_t j = 0; j < 5; ++j) {
      CHECK(x[j] >= 0.0);
      CHECK(gradient[j] >= -1e-6);
      CHECK(std::abs(x[j] * gradient[j]) <= 1e-6);
    }
  }
}

TEST_CASE("Drawn tokens have the popularity and the groups that were asked for",
          "[parallel][cluster_model]") {
  const RoutedTokens drawn = draw_tokens({.popularity = {1.0, 0.0, 3.0, 4.0}, .k = 1}, 2000, 2, 5);
  CHECK(drawn.tokens() == 4000);
  CHECK(drawn.source[1999] == 0);
  CHECK(drawn.source[2000] == 1);
  const std::vector<double> share = popularity_of(drawn.layer);
  CHECK(share[0] == Approx(500.0).margin(70.0));
  CHECK(share[1] == 0.0);
  CHECK(share[2] == Approx(1500.0).margin(110.0));
  CHECK(share[3] == Approx(2000.0).margin(110.0));

  const RoutedTokens grouped = draw_tokens(
      {.popularity = zipf_popularity(8, 0.7, 3), .k = 3, .groups = {.count = 4, .allowed = 2}}, 100,
      1, 5);
  for (Index t = 0; t < 100; ++t) {
    const std::span<const Index> chosen = grouped.layer.experts_of(t);
    CHECK(chosen.size() == 3);
    std::vector<bool> group(4, false), expert(8, false);
    for (const Index e : chosen) {
      group[static_cast<std::size_t>(e / 2)] = true;
      CHECK_FALSE(expert[static_cast<std::size_t>(e)]);
      expert[static_cast<std::size_t>(e)] = true;
    }
    CHECK(std::count(group.begin(), group.end(), true) == 2);
  }
  CHECK(draw_tokens({.popularity = {1.0}}, 0, 3, 1).tokens() == 0);
  std::vector<double> even = zipf_popularity(3, 0.0, 1);
  CHECK(even == std::vector<double>{1.0, 1.0, 1.0});
}

TEST_CASE("The simulator says what is wrong", "[parallel][cluster_model]") {
  const auto message = [](auto action) { return test::message_of<ConfigError>(action); };
  const auto model = [&](const ClusterModel& m) { return message([&] { m.check(); }); };
  CHECK(model({.start = -1.0}) == "ClusterModel: start = -1, expected a finite number >= 0");
  CHECK(model({.across = {.per_message = std::nan("")}}) ==
        "ClusterModel: across.per_message = nan, expected a finite number >= 0");
  CHECK(model({.inside = {.per_message = -1.0}}) ==
        "ClusterModel: inside.per_message = -1, expected a finite number >= 0");
  CHECK(model({.inside = {.seconds_per_byte = -1.0}}) ==
        "ClusterModel: inside.seconds_per_byte = -1, expected a finite number >= 0");
  CHECK(model({.across = {.seconds_per_byte = -1.0}}) ==
        "ClusterModel: across.seconds_per_byte = -1, expected a finite number >= 0");
  CHECK(model({.pass_start = -1.0}) ==
        "ClusterModel: pass_start = -1, expected a finite number >= 0");
  CHECK(model({.flops = 0.0}) == "ClusterModel: flops = 0, expected a finite number > 0");
  CHECK(model({.units = -1}) == "ClusterModel: units = -1, expected >= 0");
  CHECK(model({.overlap = 1.5}) == "ClusterModel: overlap = 1.5, expected 0 <= overlap <= 1");
  CHECK(message([] { LinkModel::of(0.0, 0.0); }) ==
        "LinkModel: bandwidth = 0, expected a finite number > 0");
  CHECK(message([] { all_reduce_seconds(1.0, 0, {}); }) ==
        "all_reduce_seconds: ranks = 0, expected >= 1");
  CHECK(message([] { all_reduce_seconds(-1.0, 1, {}); }) ==
        "all_reduce_seconds: bytes = -1, expected a finite number >= 0");
  CHECK(message([] { fit_cluster({}, 1); }) == "fit_nonnegative: rows = 0, expected >= 1");
  CHECK(message([] { fit_cluster({{.load = {.exchanges = 1.0}, .seconds = 0.0}}, 1); }) ==
        "fit_nonnegative: target = 0, expected a finite number > 0");
  CHECK(message([] { fit_nonnegative(Matrix<double>::Ones(2, 1), {1.0}); }) ==
        "fit_nonnegative: there are 1 targets, expected 2, one for each row");
  CHECK(message([] {
          fit_nonnegative(Matrix<double>::Ones(2, 13), {1.0, 1.0});
        }) == "fit_nonnegative: columns = 13, expected 1 <= columns <= 12");
  CHECK(test::message_of<NonFiniteError>([] {
          fit_nonnegative(Matrix<double>::Constant(1, 1, std::numeric_limits<double>::infinity()),
                          {1.0});
        }) == "fit_nonnegative: a feature is not finite");
  CHECK(message([] {
          draw_tokens({.popularity = {1.0, 0.0}, .k = 2}, 1, 1, 1);
        }) == "RoutingDistribution: k = 2, expected 1 <= k <= 1");
  CHECK(message([] {
          draw_tokens({.popularity = {1.0, -1.0}}, 1, 1, 1);
        }) == "RoutingDistribution: popularity = -1, expected a finite number >= 0");
  CHECK(message([] { draw_tokens({.popularity = {1.0}}, 1, 0, 1); }) ==
        "draw_tokens: ranks = 0, expected >= 1");
  CHECK(message([] { zipf_popularity(0, 1.0, 1); }) ==
        "zipf_popularity: experts = 0, expected >= 1");
  CHECK(message([] { zipf_popularity(1, -1.0, 1); }) ==
        "zipf_popularity: exponent = -1, expected a finite number >= 0");
  CHECK(message([] { draw_tokens({.popularity = {1.0}}, -1, 1, 1); }) ==
        "draw_tokens: tokens_per_rank = -1, expected >= 0");
}

}  // namespace weir::cluster_model_test
