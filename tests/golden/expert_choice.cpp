// SPDX-License-Identifier: MIT
// An expert-choice layer. The reference multiplies what goes into an expert by the score (out.y,
// g.*), the paper what comes out of it (out.y_paper, gp.*); the routing is the same.
#include <algorithm>
#include <cstdint>
#include <span>
#include <string>
#include <utility>
#include <vector>

#include <weir/moe/capacity/dropless.hpp>
#include <weir/moe/experts/glu_bank.hpp>
#include <weir/moe/moe_layer.hpp>
#include <weir/moe/router/linear_router.hpp>
#include <weir/moe/selector/expert_choice.hpp>
#include <weir/nn/glu.hpp>

#include "golden/families.hpp"
#include "golden/moe_case.hpp"

namespace weir::golden {
namespace {

const std::string kRouter = "router.gate.weight";
const std::string kMembers[] = {"gate", "up", "down"};

/// The experts' matrices out of a tensor [experts, in, out], each [out, in].
std::vector<Matrix<double>> read_experts(CaseFile& file, const std::string& name, Index experts,
                                         Index d_in, Index d_out) {
  const Matrix<double> all = file.matrix("w.experts." + name, {experts, d_in, d_out});
  std::vector<Matrix<double>> parts;
  for (Index e = 0; e < experts; ++e) {
    parts.push_back(all.middleRows(e * d_in, d_in).transpose());
  }
  return parts;
}

/// A bank whose experts see weight * x, and whose results are added up unweighted.
class InputWeightedBank {
 public:
  using Scalar = double;

  struct Cache {
    std::vector<Glu<double>::Cache> glu;
    Matrix<double> y, dx;
  };

  explicit InputWeightedBank(std::vector<Glu<double>> experts) : experts_(std::move(experts)) {}

  const Matrix<double>& forward(MatrixIn<double> x, const Dispatch<double>& dispatch,
                                Cache& cache) const {
    cache.glu.resize(experts_.size());
    cache.y.setZero(x.rows(), d_out());
    dispatch.for_each_expert([&](std::size_t e, Index begin, Index rows) {
      Matrix<double> scaled(rows, x.cols());
      for (Index i = 0; i < rows; ++i) {
        scaled.row(i) = dispatch.weight(begin + i) * x.row(dispatch.token(begin + i));
      }
      const Matrix<double>& y = experts_[e].forward(scaled, cache.glu[e]);
      for (Index i = 0; i < rows; ++i) cache.y.row(dispatch.token(begin + i)) += y.row(i);
    });
    return cache.y;
  }

  const Matrix<double>& backward(MatrixIn<double> dy, MatrixIn<double> x,
                                 const Dispatch<double>& dispatch, std::span<double> d_weight,
                                 Cache& cache) {
    cache.dx.setZero(x.rows(), d_in());
    dispatch.for_each_expert([&](std::size_t e, Index begin, Index rows) {
      Matrix<double> gradient(rows, d_out());
      for (Index i = 0; i < rows; ++i) gradient.row(i) = dy.row(dispatch.token(begin + i));
      const Matrix<double>& d_scaled = experts_[e].backward(gradient, cache.glu[e]);
      for (Index i = 0; i < rows; ++i) {
        const Index s = begin + i;
        d_weight[static_cast<std::size_t>(dispatch.assignment(s))] =
            d_scaled.row(i).dot(x.row(dispatch.token(s)));
        cache.dx.row(dispatch.token(s)) += dispatch.weight(s) * d_scaled.row(i);
      }
    });
    return cache.dx;
  }

  Index d_in() const { return experts_[0].d_model(); }
  Index d_out() const { return experts_[0].d_model(); }
  Glu<double>& operator[](std::size_t e) { return experts_[e]; }

 private:
  std::vector<Glu<double>> experts_;
};

/// The gradients of one member of all experts, one below the other, as the file has them.
Matrix<double> join(const std::vector<Matrix<double>>& parts) {
  const Index rows = parts[0].cols();
  Matrix<double> all(static_cast<Index>(parts.size()) * rows, parts[0].rows());
  for (std::size_t e = 0; e < parts.size(); ++e) {
    all.middleRows(static_cast<Index>(e) * rows, rows) = parts[e].transpose();
  }
  return all;
}

void check_decision(Checker& checker, CaseFile& file, const Routing<double>& routing) {
  checker.reals("out.router_logits", routing.logits);
  checker.reals("out.scores", routing.probabilities);
  std::vector<std::int64_t> serving;
  for (Index t = 0; t < routing.tokens(); ++t) {
    serving.push_back(routing.last(t) - routing.first(t));
  }
  checker.integers("out.experts_per_token", serving);

  // The file has the tokens of each expert by score, the largest first.
  const Matrix<double> weights = dense_weights(routing);
  const Index count = file.size("tokens_per_expert");
  std::vector<std::int64_t> tokens;
  Matrix<double> scores = Matrix<double>::Zero(routing.experts(), count);
  for (Index e = 0; e < routing.experts(); ++e) {
    std::vector<Index> taken;
    for (Index t = 0; t < routing.tokens(); ++t) {
      if (weights(t, e) > 0.0) taken.push_back(t);
    }
    std::stable_sort(taken.begin(), taken.end(),
                     [&](Index a, Index b) { return weights(a, e) > weights(b, e); });
    for (std::size_t i = 0; i < taken.size(); ++i) {
      tokens.push_back(taken[i]);
      if (static_cast<Index>(i) < count) scores(e, static_cast<Index>(i)) = weights(taken[i], e);
    }
  }
  checker.integers("out.token_idx", tokens);
  checker.reals("out.token_score", scores);
}

}  // namespace

void check_expert_choice(CaseFile& file, Checker& checker) {
  if (const std::string score = file.text("score"); score != "softmax over experts") {
    throw UnknownCase("score = " + score);
  }
  const MoeInputs in(file);
  const ExpertChoice<double> selector{
      .factor = file.number("capacity_factor"), .rounding = Rounding::kDown, .multiple = 8};
  const auto gate = read_experts(file, "gate_proj", in.experts, in.d_model, in.d_ff);
  const auto up = read_experts(file, "up_proj", in.experts, in.d_model, in.d_ff);
  const auto down = read_experts(file, "down_proj", in.experts, in.d_ff, in.d_model);
  const Matrix<double> router_weight = weight(file, kRouter, in.experts, in.d_model);

  checker.section("the paper: outputs are weighted");
  MoELayer moe(LinearRouter<double>(router_weight), selector, Dropless{},
               GluBank<double>(gate, up, down));
  decltype(moe)::Cache cache;
  const Matrix<double> y_paper = moe.forward(in.x, in.pass(), cache);
  check_decision(checker, file, cache.routing);
  checker.reals("out.y_paper", y_paper);
  checker.scalar("out.loss_paper", y_paper.cwiseProduct(in.cotangent).sum());
  checker.reals("gp.x", moe.backward(in.cotangent, cache));
  Gradients gradients(moe);
  checker.reals("gp." + kRouter, gradients.take("router.weight"));
  for (const std::string& member : kMembers) {
    std::vector<Matrix<double>> parts;
    for (Index e = 0; e < in.experts; ++e) {
      parts.push_back(gradients.take("experts." + std::to_string(e) + "." + member));
    }
    checker.reals("gp.experts." + member + "_proj", join(parts));
  }
  gradients.finish(checker);

  checker.section("the reference: inputs are weighted");
  std::vector<Glu<double>> experts;
  for (std::size_t e = 0; e < gate.size(); ++e) experts.emplace_back(gate[e], up[e], down[e]);
  InputWeightedBank bank(std::move(experts));
  LinearRouter<double> router(router_weight);
  LinearRouter<double>::Cache router_cache;
  InputWeightedBank::Cache bank_cache;
  Routing<double> routing;
  Dispatch<double> dispatch;
  selector.select(apply(router, in.x, in.pass(), router_cache), in.pass(), routing);
  dispatch.build(routing);
  const Matrix<double> y = bank.forward(in.x, dispatch, bank_cache);
  checker.reals("out.y", y);
  checker.scalar("out.loss", y.cwiseProduct(in.cotangent).sum());

  RoutingGradient<double> gradient;
  gradient.reset(routing);
  const std::span<double> d_weight(gradient.weights.data(), routing.expert.size());
  Matrix<double> dx = bank.backward(in.cotangent, in.x, dispatch, d_weight, bank_cache);
  selector.backward(routing, gradient);
  dx += router.backward(gradient.logits, router_cache);
  checker.reals("g.x", dx);
  checker.reals("g." + kRouter, Gradients(router).take("weight"));
  std::vector<Gradients> per_expert;
  for (std::size_t e = 0; e < gate.size(); ++e) per_expert.emplace_back(bank[e]);
  for (const std::string& member : kMembers) {
    std::vector<Matrix<double>> parts;
    for (Gradients& of_expert : per_expert) parts.push_back(of_expert.take(member));
    checker.reals("g.experts." + member + "_proj", join(parts));
  }
}

}  // namespace weir::golden
