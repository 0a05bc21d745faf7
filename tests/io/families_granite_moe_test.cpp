// SPDX-License-Identifier: MIT
#include <variant>

#include <weir/io/families/granite_moe.hpp>
#include <weir/presets/granite_moe.hpp>
#include <weir/presets/scaled.hpp>

#include "io/families.hpp"

namespace weir::families_granite_moe_test {
namespace {

using presets::GraniteMoeConfig;

// ibm-granite/granite-3.1-1b-a400m-base
constexpr auto kGranite = R"({
  "architectures": ["GraniteMoeForCausalLM"], "attention_bias": false, "attention_dropout": 0.0,
  "attention_multiplier": 0.015625, "bos_token_id": 0, "embedding_multiplier": 12.0,
  "eos_token_id": 0, "hidden_act": "silu", "hidden_size": 1024, "initializer_range": 0.02,
  "intermediate_size": 512, "logits_scaling": 6.0, "max_position_embeddings": 131072,
  "model_type": "granitemoe", "num_attention_heads": 16, "num_experts_per_tok": 8,
  "num_hidden_layers": 24, "num_key_value_heads": 8, "num_local_experts": 32,
  "output_router_logits": false, "pad_token_id": 0, "residual_multiplier": 0.22,
  "rms_norm_eps": 1e-06, "rope_scaling": null, "rope_theta": 1500000.0,
  "tie_word_embeddings": true, "torch_dtype": "bfloat16", "use_cache": true,
  "vocab_size": 49155})";

TEST_CASE("Granite's published configuration is read to the last number", "[io][pretrained]") {
  CHECK(test::config_of<GraniteMoeConfig>(kGranite) == presets::granite_3_1_1b_a400m());
  CHECK(test::lost_settings<GraniteMoeConfig>(kGranite).empty());
}

TEST_CASE("Granite's multipliers are 1 where config.json has none", "[io][pretrained]") {
  nlohmann::json json = nlohmann::json::parse(kGranite);
  for (const auto* const key : {"attention_multiplier", "embedding_multiplier", "logits_scaling",
                                "residual_multiplier", "tie_word_embeddings"}) {
    json.erase(key);
  }
  const GraniteMoeConfig config = test::config_of<GraniteMoeConfig>(json.dump());
  CHECK(std::get<GroupedQueryConfig>(config.shape.attention).scale == 1.0);
  CHECK(config.embedding_multiplier == 1.0);
  CHECK(config.logits_scaling == 1.0);
  CHECK(config.residual_multiplier == 1.0);
  CHECK(!config.shape.tied);
  CHECK(test::config_fault<GraniteMoeConfig>(
            kGranite, [](auto& own) { own["shared_intermediate_size"] = 1024; }) ==
        "'shared_intermediate_size' is 1024, expected it not to be there: weir does not know "
        "what it changes");
}

TEST_CASE("Granite comes back from its folder", "[io][pretrained]") {
  test::check_family(presets::scaled(presets::granite_3_1_1b_a400m()),
                     "model.layers.1.block_sparse_moe.input_linear.weight");
}

TEST_CASE("A layer of Granite is saved under its published names", "[io][pretrained]") {
  const test::SavedModel saved(presets::scaled(presets::granite_3_1_1b_a400m()));
  CHECK(
      saved.tensors("model.layers.1.") ==
      std::vector<std::string>{"model.layers.1.block_sparse_moe.input_linear.weight [16, 32, 32]",
                               "model.layers.1.block_sparse_moe.output_linear.weight [16, 32, 16]",
                               "model.layers.1.block_sparse_moe.router.layer.weight [16, 32]",
                               "model.layers.1.input_layernorm.weight [32]",
                               "model.layers.1.post_attention_layernorm.weight [32]",
                               "model.layers.1.self_attn.k_proj.weight [16, 32]",
                               "model.layers.1.self_attn.o_proj.weight [32, 32]",
                               "model.layers.1.self_attn.q_proj.weight [32, 32]",
                               "model.layers.1.self_attn.v_proj.weight [16, 32]"});
  CHECK(saved.tensors("lm_head").empty());
}

TEST_CASE("Granite keeps the rows of gate above those of up", "[io][pretrained]") {
  test::SavedModel saved(presets::scaled(presets::granite_3_1_1b_a400m()));
  const std::vector<float> both =
      saved.numbers("model.layers.1.block_sparse_moe.input_linear.weight");  // [16, 32, 32]
  const auto at = [&](Index e, Index row, Index in) {
    return both[static_cast<std::size_t>((e * 32 + row) * 32 + in)];
  };
  CHECK(at(3, 5, 7) == saved.value("layers.1.moe.experts.3.gate")(5, 7));
  CHECK(at(3, 16 + 5, 7) == saved.value("layers.1.moe.experts.3.up")(5, 7));
}

TEST_CASE("Granite's multipliers are those of its equations", "[presets]") {
  GraniteMoeConfig config = presets::scaled(presets::granite_3_1_1b_a400m());
  Decoder<float> model = test::random_model(config);
  const auto& branches = model.layers()[0].branches();
  CHECK(branches[0].multiplier == 0.22);
  CHECK(branches[1].multiplier == 0.22);
  // Without branches, the logits are those of 12 times the embedding, normed, by the embedding.
  for (Block<float>& layer : model.layers()) {
    for (Branch<float>& branch : layer.branches()) branch.multiplier = 0.0;
  }
  Matrix<float> table;
  Matrix<float> norm;
  for (const auto& [name, parameter] : parameters(model)) {
    if (name == "embedding.weight") table = parameter->value;
    if (name == "norm.weight") norm = parameter->value;
  }
  const Matrix<float> h = 12.0F * table.row(5);
  const float rms = std::sqrt(h.squaredNorm() / 32.0F + 1e-6F);
  const Matrix<float> expected = (h / rms).cwiseProduct(norm) * table.transpose() / 6.0F;
  CHECK(infer(model, std::vector<Index>{5}).isApprox(expected, 1e-5F));
  config.logits_scaling = 0.0;
  CHECK(test::message_of<ConfigError>([&] { test::random_model(config); }) ==
        "GraniteMoeConfig: logits_scaling = 0, expected a finite number > 0");
}

}  // namespace
}  // namespace weir::families_granite_moe_test
