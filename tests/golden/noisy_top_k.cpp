// SPDX-License-Identifier: MIT
// The layer of Shazeer et al. 2017 with noisy top-k gating and the importance and load losses, as a
// port to PyTorch has it: in the paper's form, and in that of a later version.
#include <cmath>
#include <numbers>
#include <string>
#include <utility>
#include <vector>

#include <weir/core/index_span.hpp>
#include <weir/moe/balance/importance_loss.hpp>
#include <weir/moe/balance/load_loss.hpp>
#include <weir/moe/balance/squared_variation.hpp>
#include <weir/moe/capacity/dropless.hpp>
#include <weir/moe/concepts.hpp>
#include <weir/moe/experts/mlp_bank.hpp>
#include <weir/moe/moe_layer.hpp>
#include <weir/moe/router/linear_router.hpp>
#include <weir/moe/router/noisy_router.hpp>
#include <weir/moe/selector/top_k_softmax.hpp>
#include <weir/ops/softmax.hpp>
#include <weir/ops/top_k.hpp>

#include "golden/families.hpp"
#include "golden/moe_case.hpp"
#include "support/fixed_noise.hpp"

namespace weir::golden {
namespace {

struct Inputs {
  explicit Inputs(CaseFile& file)
      : tokens(file.size("batch_tokens")),
        d_model(file.size("d_model")),
        hidden(file.size("hidden")),
        out(file.size("out")),
        experts(file.size("n_experts")),
        k(file.size("top_k")),
        coefficient(file.number_or("loss_coef", 0.0)),
        x(file.matrix("in.x", {tokens, d_model})),
        cotangent(matrix_or_zero(file, "in.cotangent", {tokens, out})) {
    is_noisy = file.training() && file.flag_or("noisy_gating", true);
    if (is_noisy) noise.values = file.matrix("in.noise", {tokens, experts});
  }

  Index tokens, d_model, hidden, out, experts, k;
  double coefficient;
  Matrix<double> x, cotangent;
  bool is_noisy = false;   ///< In training, unless it is switched off.
  test::FixedNoise noise;  ///< That of the reference.
};

NoisyRouter<double, test::FixedNoise> read_router(CaseFile& file, const Inputs& in) {
  const Matrix<double> gate = weight(file, "w_gate", in.d_model, in.experts);
  const Matrix<double> noise = in.is_noisy || file.has("w.w_noise")
                                   ? weight(file, "w_noise", in.d_model, in.experts)
                                   : Matrix<double>::Zero(in.d_model, in.experts);
  return {gate.transpose(), noise.transpose(),
          NoisyRouterConfig{.min_std = file.number_or("noise_epsilon", 1e-2)}, in.noise};
}

std::string expert_weight(Index expert, const std::string& member) {
  return "experts." + std::to_string(expert) + "." + member;
}

template <Activation Act>
MlpBank<double, Act> read_bank(CaseFile& file, const Inputs& in) {
  std::vector<Matrix<double>> first, second, first_bias, second_bias;
  for (Index e = 0; e < in.experts; ++e) {
    const auto bias = [&](const std::string& name, Index size) {
      const Matrix<double> column = file.matrix("w." + expert_weight(e, name), {size});
      return Matrix<double>(Eigen::Map<const Matrix<double>>(column.data(), 1, size));
    };
    first.push_back(weight(file, expert_weight(e, "fc1.weight"), in.hidden, in.d_model));
    second.push_back(weight(file, expert_weight(e, "fc2.weight"), in.out, in.hidden));
    first_bias.push_back(bias("fc1.bias", in.hidden));
    second_bias.push_back(bias("fc2.bias", in.out));
  }
  return {std::move(first), std::move(second), std::move(first_bias), std::move(second_bias)};
}

/// The weights of the later version: g_e = p_e / (sum_{j in S} p_j + 1e-6), p the softmax over all
/// experts.
class LaterGate : public SelectorBase<double> {
 public:
  explicit LaterGate(Index k) : k_(k) {}

  void check(Index /*experts*/) const {}

  void forward(MatrixIn<double> logits, const Pass& pass, Routing<double>& routing,
               Cache& /*cache*/) const {
    routing.begin("LaterGate", logits, pass, k_);
    routing.assign_each(k_);
    for (Index t = 0; t < routing.tokens(); ++t) {
      double* p = routing.probabilities.row(t).data();
      Index* chosen = routing.expert.data() + routing.first(t);
      softmax_row<double>(row_span(routing.logits, t), row_span(routing.probabilities, t));
      top_k<double>(row_span(routing.probabilities, t), span_of(chosen, k_));
      const double sum = sum_of(p, chosen);
      for (Index i = 0; i < k_; ++i) routing.weight[routing.first(t) + i] = p[chosen[i]] / sum;
    }
  }

  void backward(const Routing<double>& routing, RoutingGradient<double>& gradient,
                Cache& /*cache*/) const {
    for (Index t = 0; t < routing.tokens(); ++t) {
      const double* p = routing.probabilities.row(t).data();
      const Index* chosen = routing.expert.data() + routing.first(t);
      const double* d_weight = gradient.weights.data() + routing.first(t);
      double* dp = gradient.probabilities.row(t).data();
      const double sum = sum_of(p, chosen);
      double inner = 0.0;
      for (Index i = 0; i < k_; ++i) inner += d_weight[i] * p[chosen[i]] / sum;
      for (Index i = 0; i < k_; ++i) dp[chosen[i]] += (d_weight[i] - inner) / sum;
      add_softmax_backward_row<double>(row_span(routing.probabilities, t),
                                       row_span(gradient.probabilities, t),
                                       row_span(gradient.logits, t));
    }
  }

 private:
  double sum_of(const double* p, const Index* chosen) const {
    double sum = 1e-6;
    for (Index i = 0; i < k_; ++i) sum += p[chosen[i]];
    return sum;
  }

  Index k_;
};

/// The load of the later version, which compares logits with thresholds that are probabilities.
class LaterLoad : public BalancerBase {
 public:
  struct Cache {
    RowVector<double> load;  ///< [experts]
  };

  explicit LaterLoad(double coefficient) : coefficient_(coefficient) {}

  double forward(const Routing<double>& routing, Cache& cache) const {
    cache.load.setZero(routing.experts());
    if (routing.noise.empty() || chooses_all(routing)) {
      routing.add_load(0, routing.tokens(), cache.load);
    } else {
      for_each(routing, [&](Index /*t*/, Index e, Index /*rival*/, double z, double /*std*/) {
        cache.load[e] += 0.5 * std::erfc(-z / std::numbers::sqrt2);
      });
    }
    return coefficient_ * squared_variation<double>(cache.load, Variance::kSample);
  }

  void backward(const Routing<double>& routing, double scale, RoutingGradient<double>& gradient,
                Cache& cache) const {
    if (routing.noise.empty() || chooses_all(routing)) return;
    RowVector<double> d_load;
    squared_variation<double>(cache.load, Variance::kSample, &d_load);
    for_each(routing, [&](Index t, Index e, Index rival, double z, double std) {
      const double density =
          std::exp(-0.5 * z * z) * std::numbers::inv_sqrtpi / std::numbers::sqrt2;
      const double d = scale * coefficient_ * d_load[e] * density / std;
      gradient.noise.back().clean(t, e) += d;
      gradient.noise.back().deviation(t, e) -= d * z;
      gradient.probabilities(t, rival) -= d;
    });
  }

 private:
  static bool chooses_all(const Routing<double>& routing) {
    return routing.assignments() == routing.tokens() * routing.experts();
  }

  template <class Body>
  static void for_each(const Routing<double>& routing, Body&& body) {
    std::vector<Index> order(static_cast<std::size_t>(routing.experts()));
    for (Index t = 0; t < routing.tokens(); ++t) {
      const double* p = routing.probabilities.row(t).data();
      const auto k = static_cast<std::size_t>(routing.last(t) - routing.first(t));
      top_k<double>(row_span(routing.probabilities, t), order);
      for (Index e = 0; e < routing.experts(); ++e) {
        const Index rival = routing.logits(t, e) > p[order[k]] ? order[k] : order[k - 1];
        const NoiseLevel<double>& level = routing.noise.back();
        const double std = level.deviation(t, e);
        body(t, e, rival, (level.clean(t, e) - p[rival]) / std, std);
      }
    }
  }

  double coefficient_;
};

/// The load of `routing` as the balancer `loss` has it, [1, experts].
template <class Loss>
Matrix<double> load_of(const Loss& loss, const Routing<double>& routing) {
  typename Loss::Cache cache;
  static_cast<void>(loss.forward(routing, cache));
  return cache.load;
}

/// Compares the gradients of a layer whose forward pass filled `cache`.
template <class Moe>
void check_gradients(Checker& checker, const Inputs& in, Moe& layer, typename Moe::Cache& cache) {
  checker.reals("g.x", layer.backward(in.cotangent, cache));
  Gradients gradients(layer);
  checker.reals("g.w_gate", gradients.take("router.weight").transpose());
  checker.reals("g.w_noise", in.is_noisy
                                 ? Matrix<double>(gradients.take("router.noise_weight").transpose())
                                 : Matrix<double>::Zero(in.d_model, in.experts));
  for (Index e = 0; e < in.experts; ++e) {
    const std::string prefix = "experts." + std::to_string(e) + ".";
    gradients.check(checker, prefix + "in", expert_weight(e, "fc1.weight"));
    gradients.check(checker, prefix + "out", expert_weight(e, "fc2.weight"));
    gradients.check(checker, prefix + "in_bias", expert_weight(e, "fc1.bias"));
    gradients.check(checker, prefix + "out_bias", expert_weight(e, "fc2.bias"));
  }
  gradients.finish(checker);
}

template <Activation Act, class Selector, class Load>
void check(CaseFile& file, Checker& checker, const Inputs& in, const Selector& selector,
           const Load& balancer) {
  const ImportanceLoss<double> importance(
      {.coefficient = in.coefficient, .variance = Variance::kSample});
  const auto layer_with = [&](auto router) {
    return MoELayer(std::move(router), selector, Dropless(), read_bank<Act>(file, in), importance,
                    balancer);
  };
  auto layer = layer_with(read_router(file, in));
  typename decltype(layer)::Cache cache;
  PassRecord record;
  const Matrix<double> y = layer.forward(in.x, {.training = in.is_noisy, .record = &record}, cache);
  checker.reals("out.y", y);
  checker.scalar("out.loss", y.cwiseProduct(in.cotangent).sum() + record.aux_loss());
  checker.scalar("out.aux_loss", record.aux_loss());

  const Routing<double>& routing = cache.routing;
  ImportanceLoss<double>::Cache of_importance;
  static_cast<void>(importance.forward(routing, of_importance));
  const RowVector<double> load = load_of(balancer, routing);
  checker.reals("out.gates", dense_weights(routing));
  checker.reals("out.importance", of_importance.importance);
  checker.reals("out.load", load);
  checker.scalar("out.cv2_importance",
                 squared_variation<double>(of_importance.importance, Variance::kSample));
  checker.scalar("out.cv2_load", squared_variation<double>(load, Variance::kSample));
  checker.reals("out.clean_logits", infer(layer.router(), in.x));
  if (in.is_noisy) {
    checker.reals("out.noise_stddev", routing.noise.back().deviation);
    checker.reals("out.noisy_logits", routing.logits);
    if (in.k < in.experts) {  // It is not defined for all experts.
      checker.reals("out.load_paper", load_of(LoadLoss<double>(), routing));
    }
    return check_gradients(checker, in, layer, cache);
  }
  // The reference differentiates a pass without noise, too, as of an evaluation.
  auto quiet = layer_with(LinearRouter<double>(layer.router().weight().value));
  typename decltype(quiet)::Cache quiet_cache;
  checker.reals("out.y", quiet.forward(in.x, kTraining, quiet_cache));
  check_gradients(checker, in, quiet, quiet_cache);
}

}  // namespace

void check_noisy_top_k(CaseFile& file, Checker& checker) {
  const Inputs in(file);
  const bool later = file.text_or("version", "7d8489a") == "head";
  with_activation(file, "relu", [&]<Activation Act>() {
    if (!later) {
      return check<Act>(
          file, checker, in, TopKSoftmax<double>({.k = in.k}),
          LoadLoss<double>({.coefficient = in.coefficient, .variance = Variance::kSample}));
    }
    checker.section(
        "with this version's weights, softmax over all and 1e-6 in the divisor, and its load, "
        "whose thresholds are probabilities; out.load_paper with weir's LoadLoss");
    check<Act>(file, checker, in, LaterGate(in.k), LaterLoad(in.coefficient));
  });
}

}  // namespace weir::golden
