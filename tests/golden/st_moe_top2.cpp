// SPDX-License-Identifier: MIT
// The MoE layer of st-moe-pytorch: top-2 gates, the second expert rejected at random by its share,
// a capacity per sequence, and GEGLU experts.

#include <cstdint>
#include <span>
#include <string>
#include <utility>
#include <vector>

#include <weir/core/cache_state.hpp>
#include <weir/core/list.hpp>
#include <weir/core/parameter.hpp>
#include <weir/core/pass_record.hpp>
#include <weir/moe/balance/switch_loss.hpp>
#include <weir/moe/balance/z_loss.hpp>
#include <weir/moe/capacity/capacity_factor.hpp>
#include <weir/moe/concepts.hpp>
#include <weir/moe/experts/any_bank.hpp>
#include <weir/moe/experts/bank_wrapper.hpp>
#include <weir/moe/moe_layer.hpp>
#include <weir/moe/report.hpp>
#include <weir/moe/router/linear_router.hpp>
#include <weir/moe/selector/around/rank_policy.hpp>
#include <weir/moe/selector/around/selector_wrapper.hpp>
#include <weir/moe/selector/softmax_top_k.hpp>
#include <weir/nn/linear.hpp>
#include <weir/ops/activation.hpp>

#include "golden/families.hpp"
#include "golden/moe_case.hpp"
#include "support/routing.hpp"

namespace weir::golden {
namespace {

using Real = Matrix<double>;

const std::string kExpert =
    "Linear(d,2h,bias) -> chunk(x,gate) -> gelu_exact(gate)*x*mult_bias -> Linear(h,d,bias)";

/// (Gelu(b) * a * m) Wo^T + bo with (a, b) = x Wi^T + bi, cut in the middle.
class GegluExpert {
 public:
  using Scalar = double;

  struct Cache {
    CacheState state;
    Linear<double>::Cache in, out;
    Real activated, slope, hidden, d_in;
  };

  GegluExpert(Linear<double> in, Real mult_bias, Linear<double> out)
      : in_(std::move(in)), mult_bias_{std::move(mult_bias)}, out_(std::move(out)) {}

  const Real& forward(MatrixIn<double> x, const Pass& pass, Cache& cache) const {
    cache.state.begin();
    const Index hidden = mult_bias_.value.cols();
    const Real& in = in_.forward(x, pass, cache.in);
    const Real gate = in.rightCols(hidden);
    cache.activated.resize(in.rows(), hidden);
    cache.slope.resize(in.rows(), hidden);
    Gelu::value(gate.size(), gate.data(), cache.activated.data());
    Gelu::derivative(gate.size(), gate.data(), cache.slope.data());
    cache.hidden =
        cache.activated.cwiseProduct(in.leftCols(hidden)) * mult_bias_.value.row(0).asDiagonal();
    return cache.state.finish(*this, pass, out_.forward(cache.hidden, pass, cache.out));
  }

  const Real& backward(MatrixIn<double> dy, Cache& cache) {
    cache.state.begin_backward("GegluExpert::backward", *this, dy);
    const Index hidden = mult_bias_.value.cols();
    const Real& d_hidden = out_.backward(dy, cache.out);
    const Real x = cache.in.y.leftCols(hidden);
    const Real d_product = d_hidden * mult_bias_.value.row(0).asDiagonal();
    mult_bias_.gradient() += d_hidden.cwiseProduct(cache.activated).cwiseProduct(x).colwise().sum();
    cache.d_in.resize(dy.rows(), 2 * hidden);
    cache.d_in.leftCols(hidden) = d_product.cwiseProduct(cache.activated);
    cache.d_in.rightCols(hidden) = d_product.cwiseProduct(x).cwiseProduct(cache.slope);
    return in_.backward(cache.d_in, cache.in);
  }

  template <class Self, class Visit>
  static void visit(Self& self, Visit& visit) {
    visit("net.0", self.in_);
    visit("net.1.mult_bias", self.mult_bias_);
    visit("net.2", self.out_);
  }

 private:
  Linear<double> in_;
  Parameter<double> mult_bias_;
  Linear<double> out_;
};

/// A bank whose weights have, beside their own gradient, that of a factor 1 in front of the
/// experts' input: dL/dg_te += dL/d(input of e) . x_t. This is the code's
/// straight_through_dispatch_tensor; it is in none of the papers, and weir has no such thing.
class StraightThroughBank : public BankWrapper<AnyBank<GegluExpert>> {
 public:
  StraightThroughBank(AnyBank<GegluExpert> bank, bool straight_through)
      : BankWrapper(std::move(bank)), straight_through_(straight_through) {}

  const Real& backward(MatrixIn<double> dy, const Dispatch<double>& dispatch,
                       std::span<double> d_weight, Cache& cache) {
    const Real& dx = bank_.backward(dy, dispatch, d_weight, cache.inner);
    for (Index e = 0; straight_through_ && e < experts(); ++e) {
      const Real& dx_of_expert = cache.inner.experts[static_cast<std::size_t>(e)].in.dx;
      for (Index slot = dispatch.begin(e); slot < dispatch.end(e); ++slot) {
        d_weight[static_cast<std::size_t>(dispatch.assignment(slot))] +=
            dx_of_expert.row(slot - dispatch.begin(e)).dot(cache.inner.x.view().row(slot));
      }
    }
    return dx;
  }

 private:
  bool straight_through_;
};

/// A RankPolicy with the file's draws, [ranks, tokens].
class DrawnPolicy : public SelectorWrapper<RankPolicy<SoftmaxTopK<double>>> {
 public:
  DrawnPolicy(RankPolicy<SoftmaxTopK<double>> policy, List<double> uniform)
      : SelectorWrapper(std::move(policy)), uniform_(std::move(uniform)) {}

  void forward(MatrixIn<double> logits, const Pass& pass, Routing<double>& routing,
               Cache& cache) const {
    inner_.inner().forward(logits, pass, routing, cache.inner.inner);
    const Index k = inner_.inner().config().k;
    inner_.reject(pass, routing,
                  [&](Index a) { return uniform_[a % k * routing.tokens() + a / k]; });
  }

 private:
  List<double> uniform_;
};

/// The Switch loss of each sequence over the first choices that were kept. The paper counts all
/// first choices; this code's mask of them is the one that its capacity has thinned out.
class KeptFirstChoiceLoss : public BalancerBase {
 public:
  using Cache = SwitchLoss<double>::Cache;

  explicit KeptFirstChoiceLoss(double coefficient)
      : balance_({.coefficient = coefficient,
                  .fraction = LoadFraction::kOfTokens,
                  .scope = Scope::kSequence}) {}

  double forward(const Routing<double>& routing, Cache& cache) const {
    return balance_.forward(kept_first_choices(routing), cache);
  }

  void backward(const Routing<double>& routing, double scale, RoutingGradient<double>& gradient,
                Cache& cache) const {
    balance_.backward(kept_first_choices(routing), scale, gradient, cache);
  }

 private:
  static Routing<double> kept_first_choices(const Routing<double>& routing) {
    Routing<double> first = routing;
    first.expert.clear();
    for (Index t = 0; t < routing.tokens(); ++t) {
      const Index a = routing.first(t);
      if (routing.kept[a] != 0) first.expert.push_back(routing.expert[a]);
      first.offsets[t + 1] = first.assignments();
    }
    return first;
  }

  SwitchLoss<double> balance_;
};

std::string expert_prefix(Index expert) {
  return "experts.experts." + std::to_string(expert) + ".";
}

AnyBank<GegluExpert> read_bank(CaseFile& file, Index experts, Index d_model, Index d_ff) {
  std::vector<GegluExpert> bank;
  for (Index e = 0; e < experts; ++e) {
    const std::string net = expert_prefix(e) + "net.";
    bank.emplace_back(Linear<double>(weight(file, net + "0.weight", 2 * d_ff, d_model),
                                     file.matrix("w." + net + "0.bias", {2 * d_ff})),
                      file.matrix("w." + net + "1.mult_bias", {d_ff}),
                      Linear<double>(weight(file, net + "2.weight", d_model, d_ff),
                                     file.matrix("w." + net + "2.bias", {d_model})));
  }
  return {std::move(bank), d_model, d_model};
}

/// The weight of each token's places in each expert, [tokens * experts, capacity]: first choices
/// have taken theirs before second ones.
Real placed_weights(const Routing<double>& routing, Index k, Index capacity) {
  Real placed = Real::Zero(routing.tokens() * routing.experts(), capacity);
  routing.rows.for_each_group(Scope::kSequence, [&](Index begin, Index end) {
    List<Index> taken(routing.experts());
    for (Index r = 0; r < k; ++r) {
      for (Index t = begin; t < end; ++t) {
        const Index a = routing.first(t) + r;
        if (routing.kept[a] == 0) continue;
        const Index e = routing.expert[a];
        placed(t * routing.experts() + e, taken[e]++) = routing.weight[a];
      }
    }
  });
  return placed;
}

}  // namespace

void check_st_moe_top2(CaseFile& file, Checker& checker) {
  if (file.text_or("expert", kExpert) != kExpert) {
    throw_error<UnknownCase>(file.path(), ": cfg.expert = ", file.text("expert"), ", expected ",
                             kExpert);
  }
  // Outside of training second experts are drawn as well, but there are no losses.
  const double trains = file.training() ? 1.0 : 0.0;
  const Index k = file.size("top_n");
  const Index experts = file.size("n_experts");
  const Index d_model = file.size("d_model");
  const Index batch = file.size("batch");
  const Index seq = file.size("seq");
  const Index d_ff = file.size("expert_hidden");
  const Real x = file.matrix("in.x", {batch, seq, d_model});
  const Real cotangent = matrix_or_zero(file, "in.cotangent", {batch, seq, d_model});
  const Real uniform = matrix_or_zero(file, "in.uniform", {k, batch, seq});
  const Sequences sequences = Sequences::uniform(batch, seq);
  const CapacityFactor capacity({.train = file.number("capacity_factor"),
                                 .count_k = false,
                                 .rounding = Rounding::kDown,
                                 .minimum = 4,
                                 .scope = Scope::kSequence});
  const bool straight_through = file.flag_or("straight_through_dispatch", false);
  checker.section(straight_through
                      ? "balancing loss after the drop, straight-through gradient: this code's own"
                      : "balancing loss after the drop: this code's own");

  MoELayer layer(
      LinearRouter<double>(weight(file, "gate.to_gates.weight", experts, d_model)),
      DrawnPolicy(RankPolicy(SoftmaxTopK<double>({.k = k, .renormalise = true}),
                             {.train_threshold = {file.number_or("threshold", 0.2)}}),
                  std::vector(uniform.data(), uniform.data() + uniform.size())),
      capacity, StraightThroughBank(read_bank(file, experts, d_model, d_ff), straight_through),
      KeptFirstChoiceLoss(trains * file.number_or("balance_loss_coef", 0.0)),
      ZLoss<double>({.coefficient = trains * file.number_or("router_z_loss_coef", 0.0)}));
  decltype(layer)::Cache cache;
  PassRecord record;
  const Pass pass{.training = true, .sequences = &sequences, .record = &record};
  const Real y = layer.forward(x, pass, cache);
  checker.reals("out.y", y);
  checker.scalar("out.loss", y.cwiseProduct(cotangent).sum() + record.aux_loss());
  checker.reals("g.x", layer.backward(cotangent, cache));

  const Routing<double>& routing = cache.routing;
  const Index places = capacity.capacity(seq, experts, true);
  checker.reals("out.router_logits", routing.logits);
  check_choice(checker, file, routing, "out.topk_idx");
  checker.reals("out.combine_dense", dense_weights(routing));
  if (places != file.size_or("expert_capacity", places)) {
    checker.failure("cfg.expert_capacity", "weir has " + std::to_string(places));
  }
  checker.reals("out.combine_tensor", placed_weights(routing, k, places));
  const LayerReport report = layer.report(cache);
  checker.integers("out.tokens_kept_per_expert", {report.kept.begin(), report.kept.end()});

  // The file has the single losses unscaled, and their sum scaled.
  checker.scalar("out.aux_loss", record.aux_loss());
  checker.scalar("out.balance_loss", trains * test::loss_of(KeptFirstChoiceLoss(1.0), routing));
  checker.scalar("out.z_loss",
                 trains * test::loss_of(ZLoss<double>({.coefficient = 1.0}), routing));

  Gradients gradients(layer);
  gradients.check(checker, "router.weight", "gate.to_gates.weight");
  for (Index e = 0; e < experts; ++e) {
    for (const char* name :
         {"net.0.weight", "net.0.bias", "net.1.mult_bias", "net.2.weight", "net.2.bias"}) {
      gradients.check(checker, "experts." + std::to_string(e) + "." + name,
                      expert_prefix(e) + name);
    }
  }
  gradients.finish(checker);
}

}  // namespace weir::golden
