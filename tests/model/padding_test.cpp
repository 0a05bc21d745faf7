// SPDX-License-Identifier: MIT
// Padding may hold anything: no layer lets it reach a real token, a gradient or a loss.
#include <cstdint>
#include <limits>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include <weir/attention/grouped_query.hpp>
#include <weir/attention/latent.hpp>
#include <weir/core/storage.hpp>
#include <weir/core/verbs.hpp>
#include <weir/model/block.hpp>
#include <weir/model/decoder.hpp>
#include <weir/moe/balance/switch_loss.hpp>
#include <weir/moe/balance/z_loss.hpp>
#include <weir/moe/beside/residual_moe.hpp>
#include <weir/moe/beside/shared_experts.hpp>
#include <weir/moe/capacity/capacity_factor.hpp>
#include <weir/moe/depths/mixture_of_depths.hpp>
#include <weir/moe/experts/any_bank.hpp>
#include <weir/moe/experts/clamped_glu_bank.hpp>
#include <weir/moe/experts/glu_bank.hpp>
#include <weir/moe/experts/input_weighted.hpp>
#include <weir/moe/experts/mlp_bank.hpp>
#include <weir/moe/experts/pass_dropped.hpp>
#include <weir/moe/experts/with_zero_experts.hpp>
#include <weir/moe/moe_layer.hpp>
#include <weir/moe/router/cosine_router.hpp>
#include <weir/moe/router/linear_router.hpp>
#include <weir/moe/selector/softmax_top_k.hpp>
#include <weir/moe/soft_moe.hpp>
#include <weir/nn/cross_entropy.hpp>
#include <weir/nn/embedding.hpp>
#include <weir/nn/glu.hpp>
#include <weir/nn/layer_norm.hpp>
#include <weir/nn/linear.hpp>
#include <weir/nn/mlp.hpp>
#include <weir/nn/rms_norm.hpp>
#include <weir/ops/padding.hpp>
#include <weir/presets/openmoe_network.hpp>

#include "support/catch.hpp"
#include "support/gradient.hpp"
#include "support/matrices.hpp"

namespace weir::padding_test {

namespace {

constexpr Index kModel = 6;
constexpr double kNan = std::numeric_limits<double>::quiet_NaN();
constexpr double kInf = std::numeric_limits<double>::infinity();

// Sequences with padding before, behind and between their tokens, and one that is all padding.
const Sequences& sequences() {
  static const Sequences all({7, 0, 5, 2, 40});
  return all;
}

const std::vector<std::uint8_t>& mask() {
  static const std::vector<std::uint8_t> bytes = [] {
    std::vector<std::uint8_t> real(54, 1);
    for (const std::size_t t : {0U, 1U, 4U, 9U, 10U, 11U, 12U, 13U, 14U, 15U, 16U, 40U, 53U}) {
      real[t] = 0;
    }
    return real;
  }();
  return bytes;
}

bool is_padding(Index t) {
  return mask()[static_cast<std::size_t>(t)] == 0;
}

// Random rows, with what `rubbish` gives in those of padding.
template <class T>
Matrix<T> rows(Index cols, std::uint64_t seed, double rubbish) {
  Matrix<T> x = test::random_matrix<T>(sequences().tokens(), cols, seed);
  for (Index t = 0; t < x.rows(); ++t) {
    if (is_padding(t)) x.row(t).setConstant(static_cast<T>(rubbish));
  }
  return x;
}

template <class T>
void check_padding_is_zero(const Matrix<T>& y) {
  for (Index t = 0; t < y.rows(); ++t) {
    if (is_padding(t)) CHECK(y.row(t).isZero(0));
  }
}

// What one pass of a layer gives: the result, the gradient of x and those of all parameters.
template <class T>
struct Outcome {
  Matrix<T> y, dx;
  std::vector<Matrix<T>> gradients;
  double aux_loss = 0.0;
};

template <class L, class T = typename L::Scalar>
Outcome<T> run(L layer, double in_x, double in_dy) {
  Outcome<T> out;
  typename L::Cache cache;
  PassRecord record;
  const Pass pass{.training = true, .sequences = &sequences(), .mask = mask(), .record = &record};
  out.y = layer.forward(rows<T>(kModel, 1, in_x), pass, cache);
  out.dx = layer.backward(rows<T>(out.y.cols(), 2, in_dy), cache);
  for (auto& [name, parameter] : parameters(layer)) out.gradients.push_back(parameter->gradient());
  out.aux_loss = record.aux_loss();
  return out;
}

// Whether both are the same bits in all rows, or in those of real tokens alone.
template <class T>
bool same(const Matrix<T>& a, const Matrix<T>& b) {
  return a.rows() == b.rows() && a.allFinite() && a == b;
}

template <class T>
Matrix<T> without_padding_rows(Matrix<T> y) {
  for (Index t = 0; t < y.rows(); ++t) {
    if (is_padding(t)) y.row(t).setZero();
  }
  return y;
}

// \param residual  Whether padding is handed on.
template <class L>
void check(const std::string& name, const L& layer, bool residual = false) {
  INFO(name);
  using T = typename L::Scalar;
  const Outcome<T> clean = run(layer, 0.0, 0.0);
  const std::pair<double, double> rubbish[] = {
      {kNan, 0.0}, {kInf, 0.0}, {0.3, -0.7}, {0.0, kNan}, {kNan, -kInf}};
  for (const auto& [in_x, in_dy] : rubbish) {
    INFO("padding of x " << in_x << ", of dy " << in_dy);
    const Outcome<T> dirty = run(layer, in_x, in_dy);
    if (!residual) {
      check_padding_is_zero(dirty.y);
      check_padding_is_zero(dirty.dx);
    }
    CHECK(same(without_padding_rows(dirty.y), without_padding_rows(clean.y)));
    CHECK(same(without_padding_rows(dirty.dx), without_padding_rows(clean.dx)));
    CHECK(dirty.aux_loss == clean.aux_loss);
    for (std::size_t i = 0; i < clean.gradients.size(); ++i) {
      INFO("parameter " << i);
      CHECK(same(dirty.gradients[i], clean.gradients[i]));
    }
  }

  const Pass pass{.sequences = &sequences(), .mask = mask()};
  for (const Storage storage : {Storage::kTrainable, Storage::kPacked, Storage::kBfloat16}) {
    L stored = layer;
    weir::set_storage(stored, storage);
    typename L::Cache cache;
    const Matrix<T> before = stored.forward(rows<T>(kModel, 1, 0.0), pass, cache);
    const Matrix<T> after = stored.forward(rows<T>(kModel, 1, kNan), pass, cache);
    if (!residual) check_padding_is_zero(after);
    CHECK(same(without_padding_rows(after), without_padding_rows(before)));
  }
}

// The layers' weights are large, so that nothing is nearly linear.
template <class T>
auto mixture(Rng& rng) {
  return MoELayer(LinearRouter<T>(kModel, 4, rng, {.bias = true, .init_scale = 5.0}),
                  SoftmaxTopK<T>({.k = 2}), CapacityFactor({.train = 1.0, .evaluate = 1.0}),
                  GluBank<T>(kModel, 4, 5, rng, {.init_scale = 1.0}),
                  SwitchLoss<T>({.coefficient = 0.3, .scope = Scope::kSequence}),
                  ZLoss<T>({.coefficient = 0.1}));
}

template <class T, class Router, class Bank>
auto mixture_of(Router router, Bank bank) {
  return MoELayer(std::move(router), SoftmaxTopK<T>({.k = 2}),
                  CapacityFactor({.train = 1.0, .evaluate = 1.0}), std::move(bank),
                  SwitchLoss<T>({.coefficient = 0.3}));
}

std::vector<GroupedQueryConfig> attentions() {
  const GroupedQueryConfig base{.d_model = kModel, .heads = 4, .kv_heads = 2, .head_dim = 4};
  std::vector<GroupedQueryConfig> all(8, base);
  all[1].qkv_bias = all[1].output_bias = all[1].sinks = true;
  all[2].window = 5;
  all[2].clip_qkv = 0.5;
  all[3].chunk = 4;
  all[3].qk_norm = QkNorm::kL2;
  all[4].rope = false;
  all[4].temperature_scale = 0.5;
  all[4].temperature_floor = 3;
  all[5].qk_norm = QkNorm::kPerHead;
  all[6].qk_norm = QkNorm::kFull;
  all[6].softcap = 2.0;
  all[7].rotary_dim = 2;
  all[7].rope_scaling = Llama3Scaling{.factor = 4.0, .original_context = 8};
  return all;
}

LatentConfig latent(Index q_rank) {
  return {.d_model = kModel,
          .heads = 2,
          .q_rank = q_rank,
          .kv_rank = 4,
          .nope_dim = 3,
          .rope_dim = 4,
          .value_dim = 5};
}

}  // namespace

TEMPLATE_TEST_CASE("Padding of a dense layer may hold anything", "[model][padding][property]",
                   float, double) {
  using T = TestType;
  Rng rng(3);
  check("Linear", Linear<T>(kModel, 4, rng, {.bias = true}));
  check("Glu", Glu<T>(kModel, 5, rng));
  check("Mlp", Mlp<T, Gelu>(kModel, 5, rng, {.bias = true}));
  check("RmsNorm", RmsNorm<T>(kModel));
  check("LayerNorm", LayerNorm<T>(kModel));
  check("OpenMoENetwork", presets::OpenMoENetwork<T>(kModel, 5, rng));
}

TEMPLATE_TEST_CASE("Padding of attention may hold anything", "[model][padding][property]", float,
                   double) {
  using T = TestType;
  Rng rng(4);
  for (const GroupedQueryConfig& config : attentions()) {
    check("GroupedQueryAttention", GroupedQueryAttention<T>(rng, config));
  }
  for (const Index q_rank : {0, 5}) {
    check("LatentAttention", LatentAttention<T>(rng, latent(q_rank)));
  }
}

TEMPLATE_TEST_CASE("Padding of a mixture may hold anything", "[model][padding][property]", float,
                   double) {
  using T = TestType;
  Rng rng(5);
  check("MoELayer", mixture<T>(rng));
  const auto linear = [&](Index experts) {
    return LinearRouter<T>(kModel, experts, rng, {.init_scale = 5.0});
  };
  const auto glus = [&] { return GluBank<T>(kModel, 4, 5, rng, {.init_scale = 1.0}); };
  check("cosine router",
        mixture_of<T>(CosineRouter<T>(kModel, 4, rng, {.d_projection = 5}), glus()));
  check("MlpBank", mixture_of<T>(linear(4), MlpBank<T, Gelu>(kModel, 4, 5, rng)));
  check("ClampedGluBank", mixture_of<T>(linear(4), ClampedGluBank<T>(kModel, 4, 5, rng)));
  check("InputWeighted", mixture_of<T>(linear(4), InputWeighted(glus())));
  check("PassDropped", mixture_of<T>(linear(4), PassDropped(glus())));
  check("WithZeroExperts",
        mixture_of<T>(linear(7),
                      WithZeroExperts(glus(), rng, {.zero = 1, .identity = 1, .constant = 1})));
  std::vector<Glu<T>> experts;
  for (int e = 0; e < 4; ++e) experts.emplace_back(kModel, 5, rng);
  check("AnyBank", mixture_of<T>(linear(4), AnyBank(experts, kModel, kModel)));
  check("SharedExperts", SharedExperts(mixture<T>(rng), Glu<T>(kModel, 5, rng)));
  check("SharedExperts with a gate",
        SharedExperts(mixture<T>(rng), Mlp<T>(kModel, 5, rng), Linear<T>(kModel, 1, rng)));
  check("ResidualMoE", ResidualMoE(mixture<T>(rng), Glu<T>(kModel, 5, rng),
                                   Linear<T>(kModel, 2, rng, {.bias = true})));
  check("SoftMoE", SoftMoE<GluBank<T>>(test::random_matrix<T>(8, kModel, 40), glus(),
                                       {.slots_per_expert = 2}));
}

TEMPLATE_TEST_CASE("Padding of a block may hold anything", "[model][padding][property]", float,
                   double) {
  using T = TestType;
  Rng rng(6);
  const auto attention = [&] { return GroupedQueryAttention<T>(rng, attentions()[1]); };
  check("Block",
        pre_norm_block<T>(RmsNorm<T>(kModel), attention(), LayerNorm<T>(kModel), mixture<T>(rng),
                          "moe"),
        true);
  std::vector<Branch<T>> branches;
  branches.push_back({"attention", RmsNorm<T>(kModel), attention(), RmsNorm<T>(kModel)});
  branches.push_back({"moe", RmsNorm<T>(kModel), mixture<T>(rng), RmsNorm<T>(kModel)});
  branches.push_back({"mlp", RmsNorm<T>(kModel), Mlp<T>(kModel, 5, rng, {.bias = true})});
  branches.back().parallel = true;
  check("parallel branches", Block<T>(std::move(branches)), true);
  check("MixtureOfDepths",
        MixtureOfDepths<Glu<T>>(Glu<T>(kModel, 5, rng), test::random_matrix<T>(1, kModel, 7),
                                {.capacity = 0.5}),
        true);
}

TEST_CASE("Gradients with padding agree with finite differences", "[model][padding][gradient]") {
  Rng rng(7);
  const Sequences two({4, 3});
  const std::vector<std::uint8_t> real = {0, 1, 1, 0, 0, 1, 1};
  const Pass pass{.sequences = &two, .mask = real};
  const auto check_gradients = [&](auto layer) {
    test::check_gradients(layer, test::random_matrix(7, kModel, 8), pass);
  };
  check_gradients(Linear<double>(kModel, 4, rng, {.bias = true}));
  check_gradients(Glu<double>(kModel, 5, rng));
  check_gradients(Mlp<double, Gelu>(kModel, 5, rng, {.bias = true}));
  check_gradients(RmsNorm<double>(kModel));
  check_gradients(LayerNorm<double>(kModel));
  check_gradients(GroupedQueryAttention<double>(rng, attentions()[1]));
  check_gradients(LatentAttention<double>(rng, latent(5)));
}

TEST_CASE("A layer refuses a mask that does not fit", "[model][padding]") {
  Rng rng(8);
  const std::vector<std::uint8_t> two = {1, 0};
  const auto message = [&](auto layer) {
    return test::message_of<ShapeError>([&] {
      typename decltype(layer)::Cache cache;
      layer.forward(test::random_matrix(3, kModel, 1), Pass{.mask = two}, cache);
    });
  };
  const std::string expected = "::forward: pass.mask has 2 entries, expected 3 (one per token)";
  CHECK(message(Linear<double>(kModel, 4, rng)) == "Linear" + expected);
  CHECK(message(Glu<double>(kModel, 5, rng)) == "Glu" + expected);
  CHECK(message(Mlp<double>(kModel, 5, rng)) == "Mlp" + expected);
  CHECK(message(RmsNorm<double>(kModel)) == "RmsNorm" + expected);
  CHECK(message(LayerNorm<double>(kModel)) == "LayerNorm" + expected);
  Embedding<double> embedding(5, kModel, rng);
  Embedding<double>::Cache cache;
  const std::vector<Index> ids = {1, 2, 3};
  CHECK(test::message_of<ShapeError>([&] { embedding.forward(ids, Pass{.mask = two}, cache); }) ==
        "Embedding" + expected);
}

TEMPLATE_TEST_CASE("Padding of a decoder reaches no gradient", "[model][padding]", float, double) {
  using T = TestType;
  const bool tied = GENERATE(false, true);
  Rng rng(9);
  std::vector<Block<T>> layers;
  layers.push_back(pre_norm_block<T>(RmsNorm<T>(kModel),
                                     GroupedQueryAttention<T>(rng, attentions()[3]),
                                     RmsNorm<T>(kModel), mixture<T>(rng), "moe"));
  std::optional<Linear<T>> head;
  if (!tied) head.emplace(kModel, 7, rng);
  const Decoder<T> model(Embedding<T>(7, kModel, rng, {.stddev = 0.5}), std::move(layers),
                         RmsNorm<T>(kModel), std::move(head), {.logit_softcap = 3.0});

  std::vector<Index> ids;
  std::vector<Index> targets;
  for (Index t = 0; t < sequences().tokens(); ++t) {
    ids.push_back(t % 6);
    targets.push_back(is_padding(t) ? -100 : (t * t) % 7);
  }
  const Pass pass{.training = true, .sequences = &sequences(), .mask = mask()};
  // Gradients of everything, with rubbish in padding: in ids, logits, their gradient and that of h.
  const auto gradients = [&](Index id_of_padding, double rubbish) {
    Decoder<T> copy = model;
    typename Decoder<T>::Cache cache;
    CrossEntropy<T> loss;
    typename CrossEntropy<T>::Cache loss_cache;
    for (std::size_t t = 0; t < ids.size(); ++t) {
      if (mask()[t] == 0) ids[t] = id_of_padding;
    }
    Matrix<T> logits = copy.forward(ids, pass, cache);
    check_padding_is_zero(logits);
    CHECK(logits.allFinite());
    for (Index t = 0; t < logits.rows(); ++t) {
      if (is_padding(t)) logits.row(t).setConstant(static_cast<T>(rubbish));
    }
    std::vector<Matrix<T>> all(
        1, Matrix<T>::Constant(1, 1, loss.forward(logits, targets, loss_cache)));
    Matrix<T> d_logits = loss.backward(loss_cache);
    CHECK(d_logits.allFinite());
    for (Index t = 0; t < logits.rows(); ++t) {
      if (is_padding(t)) d_logits.row(t).setConstant(static_cast<T>(rubbish));
    }
    const Matrix<T> d_hidden = rows<T>(kModel, 10, rubbish);
    copy.backward(d_logits, cache, {.hidden = &d_hidden, .normed = &d_hidden});
    for (auto& [name, parameter] : parameters(copy)) all.push_back(parameter->gradient());
    return all;
  };
  const std::vector<Matrix<T>> clean = gradients(0, 0.0);
  for (const double rubbish : {0.5, kNan, kInf}) {
    const std::vector<Matrix<T>> dirty = gradients(6, rubbish);
    REQUIRE(dirty.size() == clean.size());
    for (std::size_t i = 0; i < clean.size(); ++i) {
      INFO("number " << i);
      CHECK(same(dirty[i], clean[i]));
    }
  }
}

}  // namespace weir::padding_test
