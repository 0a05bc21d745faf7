// SPDX-License-Identifier: MIT
#include <optional>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include <weir/attention/grouped_query.hpp>
#include <weir/core/expert_map.hpp>
#include <weir/core/storage_rules.hpp>
#include <weir/model/decoder.hpp>
#include <weir/moe/beside/shared_experts.hpp>
#include <weir/moe/capacity/dropless.hpp>
#include <weir/moe/experts/glu_bank.hpp>
#include <weir/moe/experts/mlp_bank.hpp>
#include <weir/moe/moe_layer.hpp>
#include <weir/moe/router/linear_router.hpp>
#include <weir/moe/selector/top_k_softmax.hpp>
#include <weir/nn/glu.hpp>
#include <weir/nn/linear.hpp>
#include <weir/nn/rms_norm.hpp>
#include <weir/optim/set_precision.hpp>

#include "support/catch.hpp"
#include "support/matrices.hpp"

namespace weir::set_precision_test {

namespace {

Decoder<float> make_decoder(bool tied, bool recompute = false) {
  Rng rng(1);
  std::vector<Block<float>> layers;
  for (int l = 0; l < 2; ++l) {
    LinearRouter<float> router(32, 3, rng, {.init_scale = 4.0});
    MoELayer routed(std::move(router), TopKSoftmax<float>({.k = 2}), Dropless(),
                    GluBank<float>(32, 3, 40, rng));
    SharedExperts moe(std::move(routed), Glu<float>(32, 24, rng), Linear<float>(32, 1, rng));
    layers.push_back(pre_norm_block<float>(
        RmsNorm<float>(32),
        GroupedQueryAttention<float>(rng, {.d_model = 32, .heads = 2, .kv_heads = 1}),
        RmsNorm<float>(32), std::move(moe), "moe"));
  }
  return {Embedding<float>(50, 32, rng, {.stddev = 1.0}),
          std::move(layers),
          RmsNorm<float>(32),
          tied ? std::nullopt : std::optional<Linear<float>>(Linear<float>(32, 50, rng)),
          {.recompute = recompute}};
}

/// The names of the parameters that are trained in `precision`.
std::vector<std::string> names_in(Precision precision, Decoder<float>& model) {
  std::vector<std::string> names;
  for (const auto& [name, parameter] : parameters(model)) {
    if (parameter->precision() == precision) names.push_back(name);
  }
  return names;
}

const std::vector<Index> kIds = {3, 1, 4, 1, 5, 9, 2, 6, 5, 35};

}  // namespace

TEST_CASE("Precisions have names", "[optim][precision]") {
  CHECK(name_of(Precision::kFull) == "fp32");
  CHECK(name_of(Precision::kBfloat16) == "bf16");
  for (const std::string_view name : kPrecisionNames) {
    CHECK(name_of(*precision_named(name)) == name);
  }
  CHECK_FALSE(precision_named("fp16").has_value());
}

TEST_CASE("Gates, norms, embedding and head are trained in full", "[optim][precision]") {
  const bool tied = GENERATE(false, true);
  Decoder<float> model = make_decoder(tied);
  set_precision(model, Precision::kFp8);
  std::vector<std::string> full = {"embedding.weight"};
  for (const std::string layer : {"layers.0.", "layers.1."}) {
    full.push_back(layer + "attention_norm.weight");
    full.push_back(layer + "moe_norm.weight");
    full.push_back(layer + "moe.router.weight");
    full.push_back(layer + "moe.shared_gate.weight");
  }
  full.push_back("norm.weight");
  if (!tied) full.push_back("head.weight");
  CHECK(names_in(Precision::kFull, model) == full);
  set_precision(model, Precision::kFull);
  CHECK(names_in(Precision::kFp8, model).empty());
}

TEST_CASE("The first rule that matches a part decides how it is trained", "[optim][precision]") {
  Decoder<float> model = make_decoder(false);
  set_precision(model, {{"layers.0.*.shared", Precision::kFp8},
                        {"*.shared", Precision::kBfloat16},
                        {"*.shared", Precision::kFull}});
  CHECK(names_in(Precision::kFp8, model) == std::vector<std::string>{"layers.0.moe.shared.gate",
                                                                     "layers.0.moe.shared.up",
                                                                     "layers.0.moe.shared.down"});
  CHECK(names_in(Precision::kBfloat16, model) ==
        std::vector<std::string>{"layers.1.moe.shared.gate", "layers.1.moe.shared.up",
                                 "layers.1.moe.shared.down"});
  set_precision(model, {{"*.1.*.shared", Precision::kFull}});
  CHECK(names_in(Precision::kBfloat16, model).empty());
  CHECK(names_in(Precision::kFp8, model).size() == 3);
}

TEST_CASE("A precision rounds products, in inference too, and full precision is as before",
          "[optim][precision]") {
  Decoder<float> model = make_decoder(false);
  const Matrix<float> exact = infer(model, kIds);
  const auto error_in = [&](Precision precision) {
    set_precision(model, precision);
    return test::relative_error(infer(model, kIds), exact);
  };
  const double bf16 = error_in(Precision::kBfloat16);
  const double fp8 = error_in(Precision::kFp8);
  CHECK(bf16 > 1e-4);
  CHECK(bf16 < 0.02);
  CHECK(fp8 > 0.01);
  CHECK(fp8 < 0.2);
  set_precision(model, Precision::kFull);
  CHECK(infer(model, kIds) == exact);
  // A part alone, too.
  Rng rng(3);
  Linear<float> alone(40, 30, rng);
  set_precision(alone, Precision::kFp8);
  CHECK(alone.weight().precision() == Precision::kFp8);
}

TEST_CASE("Recomputed layers have the same gradients in every precision", "[optim][precision]") {
  const Precision precision = GENERATE(Precision::kBfloat16, Precision::kFp8);
  const auto gradients = [&](bool recompute) {
    Decoder<float> model = make_decoder(false, recompute);
    set_precision(model, precision);
    Decoder<float>::Cache cache;
    const Matrix<float> logits = model.forward(kIds, kTraining, cache);
    model.backward(logits, cache);
    std::vector<Matrix<float>> all;
    for (const auto& [name, parameter] : parameters(model)) all.push_back(parameter->grad);
    return all;
  };
  CHECK(gradients(false) == gradients(true));
}

TEST_CASE("A precision that cannot be is refused", "[optim][precision]") {
  Decoder<float> model = make_decoder(false);
  for (const std::string none : {"*.router", "head", "*.shared_gate"}) {
    CHECK(test::message_of<ConfigError>([&] {
            set_precision(model, {{"*", Precision::kFp8}, {none, Precision::kFp8}});
          }) == "set_precision: no part matches '" + none + "', expected at least one");
  }
  CHECK(names_in(Precision::kFp8, model).empty());
  set_storage(model, StorageRules{{"layers.1.attention", Storage::kPacked}});
  CHECK(test::message_of<StateError>([&] { set_precision(model, Precision::kFp8); }) ==
        "set_precision: part 'layers.1.attention' is stored for inference, expected "
        "Storage::kTrainable");
  CHECK(names_in(Precision::kFp8, model).empty());
  set_precision(model, {{"*.experts", Precision::kFp8}});
  CHECK(names_in(Precision::kFp8, model).size() == 18);

  Rng rng(1);
  Linear<double> checked(4, 3, rng);
  CHECK(test::message_of<ConfigError>([&] { set_precision(checked, Precision::kBfloat16); }) ==
        "set_precision: precision = bf16 for a layer of doubles, expected Precision::kFull");
  set_precision(checked, Precision::kFull);
}

TEMPLATE_TEST_CASE("A cold expert is trained in the precision of the others", "[optim][precision]",
                   GluBank<float>, MlpBank<float>) {
  Rng rng(1);
  TestType bank(8, 2, 4, rng);
  set_precision(bank, Precision::kFp8);
  bank.remap_experts({.source = {ExpertMap::kCold, 0, 1}, .rng = &rng});
  for (const auto& [name, parameter] : parameters(bank)) {
    INFO(name);
    CHECK(parameter->precision() == Precision::kFp8);
  }
}

}  // namespace weir::set_precision_test
