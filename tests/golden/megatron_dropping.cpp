// SPDX-License-Identifier: MIT
// What Megatron-Core does to a routing when the router is done: drop tokens by probability or by
// position, and move the expert bias; and its two ways of balancing without a loss, Sinkhorn and
// quantiles.
#include <algorithm>
#include <cstdint>
#include <string>
#include <vector>

#include <weir/moe/balance/bias_balance.hpp>
#include <weir/moe/balance/quantile_balance.hpp>
#include <weir/moe/capacity/capacity_factor.hpp>
#include <weir/moe/report.hpp>
#include <weir/moe/routing.hpp>
#include <weir/moe/selector/biased_softmax_top_k.hpp>
#include <weir/moe/selector/sigmoid_top_k.hpp>
#include <weir/moe/selector/sinkhorn.hpp>
#include <weir/ops/softmax.hpp>

#include "golden/megatron.hpp"
#include "golden/moe_case.hpp"
#include "support/routing.hpp"

namespace weir::golden {
namespace {

using Integers = std::vector<std::int64_t>;

/// The routing that sends each token to the experts that have a 1 in `map`, with the weights of
/// `probs`; both [tokens, experts].
Routing<double> routing_of(const Matrix<double>& probs, const Integers& map) {
  Routing<double> routing;
  routing.begin("Golden", Matrix<double>::Zero(probs.rows(), probs.cols()), kTraining);
  routing.probabilities = probs;
  for (Index t = 0; t < probs.rows(); ++t) {
    for (Index e = 0; e < probs.cols(); ++e) {
      if (map[static_cast<std::size_t>(t * probs.cols() + e)] == 0) continue;
      routing.expert.push_back(e);
      routing.weight.push_back(probs(t, e));
      routing.kept.push_back(1);
    }
    routing.offsets[t + 1] = routing.assignments();
  }
  return routing;
}

/// 1 where a token keeps an expert, [tokens, experts].
Integers kept_map(const Routing<double>& routing) {
  Integers map(static_cast<std::size_t>(routing.tokens() * routing.experts()), 0);
  for (Index t = 0; t < routing.tokens(); ++t) {
    for (Index a = routing.first(t); a < routing.last(t); ++a) {
      map[static_cast<std::size_t>(t * routing.experts() + routing.expert[a])] = routing.kept[a];
    }
  }
  return map;
}

/// Compares the map `name` of the file with that of `routing` plus the file's own fillers, which
/// have to bring expert e to `rows(e)` tokens. weir has no fillers, and which they are is not
/// defined.
template <class Rows>
void check_padded_map(Checker& checker, CaseFile& file, const std::string& name,
                      const Routing<double>& routing, Rows&& rows) {
  const Index experts = routing.experts();
  if (!file.has(name)) return;
  Integers filled = file.integers(name, {routing.tokens(), experts});
  const Integers ours = kept_map(routing);
  std::vector<Index> count(static_cast<std::size_t>(experts), 0);
  for (std::size_t i = 0; i < ours.size(); ++i) {
    count[i % count.size()] += filled[i];
    if (ours[i] != 0) filled[i] = 1;
  }
  for (Index e = 0; e < experts; ++e) {
    const Index expected = rows(e);
    if (count[static_cast<std::size_t>(e)] != expected) {
      checker.failure(name, "expert " + std::to_string(e) + " has not " + std::to_string(expected));
    }
  }
  checker.integers(name, filled);
}

/// Makes `kept` that of the file's map `name`, if it keeps as many tokens of each expert and none
/// that was not sent there: by position, which of them is up to torch's top-k of zeros and ones,
/// whose order is not defined, and by probability up to those that are equal.
/// \param routing  What weir kept.
void take_kept_of(Checker& checker, CaseFile& file, const std::string& name, DropOrder order,
                  Routing<double>& routing) {
  if (!file.has(name)) return;
  const Integers map = file.integers(name, {routing.tokens(), routing.experts()});
  if (map == kept_map(routing)) return;
  Routing<double> theirs = routing;
  Index kept = 0;
  for (Index t = 0; t < routing.tokens(); ++t) {
    for (Index a = routing.first(t); a < routing.last(t); ++a) {
      theirs.kept[a] =
          map[static_cast<std::size_t>(t * routing.experts() + routing.expert[a])] != 0 ? 1 : 0;
      kept += theirs.kept[a];
    }
  }
  if (std::count(map.begin(), map.end(), 1) != kept) return;  // Some were not sent there.
  for (Index e = 0; e < routing.experts(); ++e) {
    // The probabilities that are kept, the largest first; by position, only their number.
    std::vector<double> of_ours, of_theirs;
    for (Index a = 0; a < routing.assignments(); ++a) {
      const double value = order == DropOrder::kProbability ? routing.weight[a] : 1.0;
      if (routing.expert[a] == e && routing.kept[a] != 0) of_ours.push_back(value);
      if (routing.expert[a] == e && theirs.kept[a] != 0) of_theirs.push_back(value);
    }
    std::sort(of_ours.begin(), of_ours.end());
    std::sort(of_theirs.begin(), of_theirs.end());
    if (of_ours != of_theirs) return;
  }
  checker.section("with the file's order of ties");
  routing.kept = theirs.kept;
}

void check_drop(Checker& checker, CaseFile& file, const std::string& name, DropOrder order,
                Routing<double> routing, const Matrix<double>& cotangent) {
  const CapacityFactor policy({.train = file.number("capacity_factor"),
                               .rounding = Rounding::kUp,
                               .minimum = 0,
                               .order = order});
  const Index capacity = policy.capacity(routing.assignments(), routing.experts(), true);
  if (capacity != file.size_or("capacity", capacity)) {
    checker.failure("cfg.capacity", "weir has " + std::to_string(capacity));
  }
  test::limit(policy, routing, kTraining);
  take_kept_of(checker, file, "out." + name + ".map", order, routing);
  const Matrix<double> weights = dense_weights(routing);
  checker.reals("out." + name + ".probs", weights);
  checker.integers("out." + name + ".map", kept_map(routing));
  checker.reals("out." + name + "_pad.probs", weights);
  check_padded_map(checker, file, "out." + name + "_pad.map", routing,
                   [&](Index) { return capacity; });

  // The weights of what is kept are passed on as they are.
  Routing<double> slopes = routing;
  for (Index t = 0; t < routing.tokens(); ++t) {
    for (Index a = routing.first(t); a < routing.last(t); ++a) {
      slopes.weight[a] = cotangent(t, routing.expert[a]);
    }
  }
  checker.reals("g_" + name + ".probs", dense_weights(slopes));
}

/// The bias after one step in which the experts had in.tokens_per_expert.
void check_bias_update(Checker& checker, CaseFile& file, Index experts) {
  if (!file.has("out.updated_expert_bias")) return;
  SigmoidTopK<double> selector(experts);
  selector.selection_bias().value = file.matrix("in.expert_bias", {experts});
  const Integers load = file.integers("in.tokens_per_expert", {experts});
  Integers map;
  for (std::size_t e = 0; e < load.size(); ++e) {
    for (std::int64_t i = 0; i < load[e]; ++i) {
      map.resize(map.size() + load.size(), 0);
      map[map.size() - load.size() + e] = 1;
    }
  }
  const auto tokens = static_cast<Index>(map.size() / load.size());
  BiasBalance<double> balance({.rate = file.number("expert_bias_update_rate")});
  balance.observe(routing_of(Matrix<double>::Zero(tokens, experts), map));
  balance.update(selector);
  checker.reals("out.updated_expert_bias", selector.selection_bias().value);
}

/// Compares a routing by the plan: which experts, and their scores, [tokens, experts].
void check_sinkhorn(Checker& checker, CaseFile& file, const std::string& name,
                    const Matrix<double>& logits, Index k) {
  if (!file.has(name + ".scores") && !file.has(name + ".map")) return;
  const Routing<double> routing =
      test::route(Sinkhorn<double>({.k = k, .epsilon = 1e-8}), logits, kTraining);
  checker.reals(name + ".scores", dense_weights(routing));
  checker.integers(name + ".map", kept_map(routing));
}

/// Compares the choice after the offsets in.qb_beta, and the offsets that follow from it. The file
/// has what `qb_dual_update` makes of the softmax of its logits; Megatron-Core's router hands it
/// the logits themselves.
void check_quantile(Checker& checker, CaseFile& file, const Matrix<double>& logits) {
  if (!file.has("in.qb_beta")) return;
  BiasedSoftmaxTopK<double> selector(logits.cols(), {.k = file.size("top_k")});
  selector.selection_bias().value = -file.matrix("in.qb_beta", {logits.cols()});
  const Routing<double> routing = test::route(selector, softmax<double>(logits));
  check_choice(checker, file, routing, "out.qb_indices");
  QuantileBalance<double> balance({.recentre = false});
  balance.observe(routing);
  balance.update(selector);
  checker.reals("out.qb_new_beta", -selector.selection_bias().value);
}

}  // namespace

void check_megatron_dropping(CaseFile& file, Checker& checker) {
  const Index tokens = file.size("n_tokens");
  const Index experts = file.size("n_experts");
  check_bias_update(checker, file, experts);
  if (file.has("in.logits")) {
    const Matrix<double> logits = file.matrix("in.logits", {tokens, experts});
    checker.reals("out.sinkhorn", Sinkhorn<double>({.epsilon = 1e-8}).plan(logits));
    check_sinkhorn(checker, file, "out.sinkhorn_route_k1", logits, 1);
    check_sinkhorn(checker, file, "out.sinkhorn_route_k2", logits, 2);
    check_quantile(checker, file, logits);
  }
  if (!file.has("in.routing_map")) return;
  const Routing<double> routing = routing_of(file.matrix("in.probs", {tokens, experts}),
                                             file.integers("in.routing_map", {tokens, experts}));
  if (routing.assignments() != tokens * file.size("top_k")) {
    checker.failure("in.routing_map", "is not that of a top-k");
  }
  const Matrix<double> cotangent = matrix_or_zero(file, "in.cotangent", {tokens, experts});
  check_drop(checker, file, "drop_probs", DropOrder::kProbability, routing, cotangent);
  checker.section("by position, as a stable top-k has it");
  check_drop(checker, file, "drop_position", DropOrder::kTokenMajor, routing, cotangent);
  const LayerReport report = report_of(routing);
  check_padded_map(checker, file, "out.pad_routing_map_multiple4", routing,
                   [&](Index e) { return (report.load[static_cast<std::size_t>(e)] + 3) / 4 * 4; });
}

}  // namespace weir::golden
