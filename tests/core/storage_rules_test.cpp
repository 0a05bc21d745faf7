// SPDX-License-Identifier: MIT
#include <optional>
#include <string>
#include <string_view>
#include <vector>

#include <weir/attention/grouped_query.hpp>
#include <weir/core/storage_rules.hpp>
#include <weir/model/decoder.hpp>
#include <weir/moe/beside/shared_experts.hpp>
#include <weir/moe/capacity/dropless.hpp>
#include <weir/moe/experts/glu_bank.hpp>
#include <weir/moe/moe_layer.hpp>
#include <weir/moe/router/linear_router.hpp>
#include <weir/moe/selector/top_k_softmax.hpp>
#include <weir/nn/glu.hpp>
#include <weir/nn/linear.hpp>
#include <weir/nn/rms_norm.hpp>

#include "support/catch.hpp"
#include "support/matrices.hpp"

namespace weir::storage_rules_test {

namespace {

Decoder<float> make_decoder(bool tied) {
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
  return {Embedding<float>(50, 32, rng, {.stddev = 1.0}), std::move(layers), RmsNorm<float>(32),
          tied ? std::nullopt : std::optional<Linear<float>>(Linear<float>(32, 50, rng))};
}

/// "name:storage" of each part.
std::vector<std::string> parts_of(Decoder<float>& model) {
  std::vector<std::string> parts;
  for (const auto& [name, storage] : stored_parts(model)) {
    parts.push_back(name + ":" + std::to_string(static_cast<int>(storage)));
  }
  return parts;
}

std::string with(const std::string& name, Storage storage) {
  return name + ":" + std::to_string(static_cast<int>(storage));
}

const std::vector<Index> kIds = {3, 1, 4, 1, 5, 9, 2, 6, 5, 35};

}  // namespace

TEST_CASE("The first rule that matches a part decides how it is stored", "[core][storage]") {
  const bool tied = GENERATE(false, true);
  Decoder<float> model = make_decoder(tied);
  const std::size_t all = parameters(model).size();
  const Matrix<float> exact = infer(model, kIds);
  set_storage(model, {{"layers.0.*.experts", Storage::kPacked},
                      {"*.experts", Storage::kInt4},
                      {"*.attention", Storage::kInt8},
                      {"head", Storage::kBfloat16},
                      {"*.attention", Storage::kFp8}});
  CHECK(parts_of(model) ==
        std::vector<std::string>{with("layers.0.attention", Storage::kInt8),
                                 with("layers.0.moe.experts", Storage::kPacked),
                                 with("layers.0.moe.shared", Storage::kTrainable),
                                 with("layers.1.attention", Storage::kInt8),
                                 with("layers.1.moe.experts", Storage::kInt4),
                                 with("layers.1.moe.shared", Storage::kTrainable),
                                 with("head", Storage::kBfloat16)});
  CHECK(parameters(model).size() == all - 2 * (4 + 9) - 1);
  const double error = test::relative_error(infer(model, kIds), exact);
  CHECK(error > 1e-4);
  CHECK(error < 0.2);

  // What no rule matches stays as it is.
  set_storage(model, {{"*.shared", Storage::kInt8Dot}});
  CHECK(parts_of(model)[2] == with("layers.0.moe.shared", Storage::kInt8Dot));
  CHECK(parts_of(model)[4] == with("layers.1.moe.experts", Storage::kInt4));
}

TEST_CASE("Routers, gates and norms stay exact whatever the rules", "[core][storage]") {
  Decoder<float> model = make_decoder(false);
  set_storage(model, {{"*", Storage::kInt4}});
  std::vector<std::string> left;
  for (const auto& [name, parameter] : parameters(model)) left.push_back(name);
  CHECK(left == std::vector<std::string>{"embedding.weight", "layers.0.attention_norm.weight",
                                         "layers.0.moe_norm.weight", "layers.0.moe.router.weight",
                                         "layers.0.moe.shared_gate.weight",
                                         "layers.1.attention_norm.weight",
                                         "layers.1.moe_norm.weight", "layers.1.moe.router.weight",
                                         "layers.1.moe.shared_gate.weight", "norm.weight"});
  Decoder<float> other = make_decoder(false);
  set_storage(other, Storage::kInt4);
  CHECK(infer(model, kIds) == infer(other, kIds));
  set_storage(model, {{"*", Storage::kTrainable}});
  CHECK(is_trainable(model));
}

TEST_CASE("Storages have names", "[core][storage]") {
  CHECK(name_of(Storage::kTrainable) == "plain");
  CHECK(name_of(Storage::kBfloat16) == "bf16");
  CHECK(name_of(Storage::kInt4Dot) == "int4-dot");
  for (const std::string_view name : kStorageNames) CHECK(name_of(*storage_named(name)) == name);
  CHECK_FALSE(storage_named("int5").has_value());
}

TEST_CASE("A rule that matches no part is refused", "[core][storage]") {
  Decoder<float> model = make_decoder(false);
  CHECK(test::message_of<ConfigError>([&] {
          set_storage(model, {{"*.attention", Storage::kInt8}, {"*.router", Storage::kInt8}});
        }) == "set_storage: no part matches '*.router', expected at least one");
  CHECK(is_trainable(model));
  Rng rng(2);
  Linear<float> alone(3, 4, rng);
  set_storage(alone, {{"*", Storage::kInt8}});
  CHECK(alone.storage() == Storage::kInt8);
}

}  // namespace weir::storage_rules_test
