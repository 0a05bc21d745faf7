// SPDX-License-Identifier: MIT
// What each family's `make` builds: kinds are types, so the types are looked at.
#include <cmath>
#include <cstddef>
#include <string>
#include <variant>

#include <weir/attention/grouped_query.hpp>
#include <weir/attention/latent.hpp>
#include <weir/core/random.hpp>
#include <weir/core/verbs.hpp>
#include <weir/model/block.hpp>
#include <weir/model/decoder.hpp>
#include <weir/moe/balance/bias_balance.hpp>
#include <weir/moe/balance/communication_loss.hpp>
#include <weir/moe/balance/device_loss.hpp>
#include <weir/moe/balance/switch_loss.hpp>
#include <weir/moe/balance/z_loss.hpp>
#include <weir/moe/beside/shared_experts.hpp>
#include <weir/moe/capacity/capacity_factor.hpp>
#include <weir/moe/capacity/device_capacity.hpp>
#include <weir/moe/capacity/dropless.hpp>
#include <weir/moe/experts/any_bank.hpp>
#include <weir/moe/experts/clamped_glu_bank.hpp>
#include <weir/moe/experts/glu_bank.hpp>
#include <weir/moe/experts/input_weighted.hpp>
#include <weir/moe/experts/mlp_bank.hpp>
#include <weir/moe/moe_layer.hpp>
#include <weir/moe/router/jitter_router.hpp>
#include <weir/moe/router/linear_router.hpp>
#include <weir/moe/selector/biased_probability_top_k.hpp>
#include <weir/moe/selector/sigmoid_top_k.hpp>
#include <weir/moe/selector/softmax_top_k.hpp>
#include <weir/moe/selector/sparse_mixer.hpp>
#include <weir/moe/selector/top_k_softmax.hpp>
#include <weir/nn/glu.hpp>
#include <weir/nn/layer_norm.hpp>
#include <weir/ops/activation.hpp>
#include <weir/ops/llama3_scaling.hpp>
#include <weir/ops/rope.hpp>
#include <weir/ops/rope_scaling.hpp>
#include <weir/presets/dbrx.hpp>
#include <weir/presets/deepseek_moe_16b.hpp>
#include <weir/presets/deepseek_v2.hpp>
#include <weir/presets/deepseek_v2_lite.hpp>
#include <weir/presets/deepseek_v3.hpp>
#include <weir/presets/dense.hpp>
#include <weir/presets/ernie_4_5.hpp>
#include <weir/presets/glm_4_5.hpp>
#include <weir/presets/gpt_oss_20b.hpp>
#include <weir/presets/granite_moe.hpp>
#include <weir/presets/grok_1.hpp>
#include <weir/presets/llama_4_scout.hpp>
#include <weir/presets/mixtral_8x7b.hpp>
#include <weir/presets/olmoe_1b_7b.hpp>
#include <weir/presets/openmoe_8b.hpp>
#include <weir/presets/openmoe_base.hpp>
#include <weir/presets/openmoe_network.hpp>
#include <weir/presets/phi_3_5_moe.hpp>
#include <weir/presets/qwen2_moe.hpp>
#include <weir/presets/qwen3_30b_a3b.hpp>
#include <weir/presets/scaled.hpp>
#include <weir/presets/st_moe_32b.hpp>
#include <weir/presets/switch_base_8.hpp>
#include <weir/presets/switch_large.hpp>

#include "support/catch.hpp"
#include "support/matrices.hpp"

namespace weir::families_test {
using namespace weir::presets;

namespace {

using T = double;
using Projection = LinearRouter<T>;

template <class Config>
Decoder<T> small(const Config& config) {
  Rng rng(1);
  return presets::make<T>(scaled(config, {.d_model = 16, .vocab = 16}), rng);
}

// The branches of a layer, in order: "attention moe mlp".
std::string branches(const Decoder<T>& model, std::size_t layer) {
  std::string names;
  for (const Branch<T>& branch : model.layers()[layer].branches()) {
    names += (names.empty() ? "" : branch.parallel ? "|" : " ") + branch.name;
  }
  return names;
}

template <class L>
const L& layer_of(const Decoder<T>& model, std::size_t layer, std::size_t branch) {
  const L* found = model.layers()[layer].branches()[branch].layer.template get<L>();
  REQUIRE(found != nullptr);
  return *found;
}

GroupedQueryConfig attention(const Decoder<T>& model, std::size_t layer) {
  return layer_of<GroupedQueryAttention<T>>(model, layer, 0).config();
}

}  // namespace

TEST_CASE("Mixtral routes by the softmax over two logits", "[presets]") {
  using Moe = MoELayer<Projection, TopKSoftmax<T>, Dropless, GluBank<T>, SwitchLoss<T>>;
  const Decoder<T> model = small(mixtral_8x7b());
  CHECK(branches(model, 0) == "attention moe");
  CHECK(branches(model, 1) == "attention moe");
  const Moe& moe = layer_of<Moe>(model, 1, 1);
  CHECK(moe.selector().config().k == 2);
  CHECK(moe.selector().config().scale == 1.0);
  CHECK(moe.balancer<0>().config().coefficient == 0.01);  // 0.02 as a mean over two layers.
  CHECK(attention(model, 0).rope_theta == 1e6);
  CHECK(attention(model, 0).window == 0);
  CHECK(!model.tied());
}

TEST_CASE("Grok-1 has norms behind its branches, softcaps and multipliers", "[presets]") {
  using Moe = MoELayer<Projection, SoftmaxTopK<T>, Dropless, GluBank<T, GeluTanh>, SwitchLoss<T>>;
  const Decoder<T> model = small(grok_1());
  for (const Branch<T>& branch : model.layers()[0].branches()) {
    CHECK(branch.post_norm.has_value());
  }
  CHECK(!layer_of<Moe>(model, 0, 1).selector().config().renormalise);
  CHECK(attention(model, 0).softcap == 30.0);
  CHECK(model.config().embedding_multiplier == 4.0);
  CHECK(model.config().logit_multiplier == 0.5773502691896257);
  CHECK(model.tied());
}

TEST_CASE("DBRX has layer norms without bias, clamps, and four renormalised experts", "[presets]") {
  using Moe = MoELayer<Projection, SoftmaxTopK<T>, Dropless, GluBank<T>, SwitchLoss<T>>;
  const Decoder<T> model = small(dbrx());
  const auto* norm = model.layers()[0].branches()[1].norm.get<LayerNorm<T>>();
  REQUIRE(norm != nullptr);
  CHECK(!norm->has_bias());
  CHECK(layer_of<Moe>(model, 0, 1).selector().config().renormalise);
  CHECK(layer_of<Moe>(model, 0, 1).selector().config().norm == 1.0);
  CHECK(layer_of<Moe>(model, 0, 1).selector().config().k == 4);
  CHECK(attention(model, 0).clip_qkv == 8.0);
}

TEST_CASE("Qwen2-MoE has a gate of its own for the shared expert", "[presets]") {
  using Moe =
      SharedExperts<MoELayer<Projection, SoftmaxTopK<T>, Dropless, GluBank<T>, SwitchLoss<T>>,
                    Glu<T>>;
  Decoder<T> model = small(qwen1_5_moe_a2_7b());
  CHECK(!layer_of<Moe>(model, 1, 1).moe().selector().config().renormalise);
  CHECK(attention(model, 0).qkv_bias);
  CHECK(!attention(model, 0).output_bias);
  Index gates = 0;
  for (const auto& [name, parameter] : parameters(model)) {
    if (name == "layers.1.moe.shared_gate.weight") gates += parameter->value.rows();
  }
  CHECK(gates == 1);
}

TEST_CASE("GLM-4.5 has DeepSeek-V3's mixture behind partly rotated heads", "[presets]") {
  using Moe = SharedExperts<
      MoELayer<Projection, SigmoidTopK<T>, Dropless, GluBank<T>, BiasBalance<T>, SwitchLoss<T>>,
      Glu<T>>;
  const Decoder<T> model = small(glm_4_5());
  CHECK(branches(model, 0) == "attention mlp");
  CHECK(layer_of<Moe>(model, 1, 1).moe().selector().config().scale == 2.5);
  CHECK(2 * attention(model, 0).rotary_dim == attention(model, 0).head_dim);
  CHECK(attention(model, 0).qk_norm == QkNorm::kPerHead);
}

TEST_CASE("ERNIE 4.5 chooses by biased probabilities and rotates neighbours", "[presets]") {
  using Moe = SharedExperts<MoELayer<Projection, BiasedProbabilityTopK<T>, Dropless, GluBank<T>,
                                     BiasBalance<T>, SwitchLoss<T>>,
                            Glu<T>>;
  const Decoder<T> model = small(ernie_4_5_21b_a3b());
  CHECK(branches(model, 0) == "attention mlp");
  CHECK(layer_of<Moe>(model, 1, 1).moe().selector().config().renormalise);
  CHECK(attention(model, 0).rope_layout == RopeLayout::kInterleaved);
  CHECK(model.tied());
}

TEST_CASE("Granite multiplies what a branch adds, and Phi-3.5-MoE has layer norms", "[presets]") {
  using Granite = MoELayer<Projection, TopKSoftmax<T>, Dropless, GluBank<T>, SwitchLoss<T>>;
  const Decoder<T> granite = small(granite_3_1_1b_a400m());
  CHECK(layer_of<Granite>(granite, 0, 1).selector().config().k == 8);
  CHECK(granite.layers()[1].branches()[0].multiplier == 0.22);
  CHECK(attention(granite, 0).scale == 0.015625);
  using Phi = MoELayer<Projection, SparseMixer<T>, Dropless, GluBank<T>, SwitchLoss<T>>;
  const Decoder<T> phi = small(phi_3_5_moe());
  CHECK(layer_of<Phi>(phi, 0, 1).selector().config().epsilon == 0.01);
  CHECK(phi.layers()[0].branches()[0].norm.get<LayerNorm<T>>() != nullptr);
  CHECK(attention(phi, 0).output_bias);
}

TEST_CASE("Dense presets have no mixture", "[presets]") {
  const Decoder<T> model = small(qwen3_8b());
  CHECK(branches(model, 0) == "attention mlp");
  CHECK(branches(model, 1) == "attention mlp");
  CHECK(attention(small(mistral_7b()), 1).window == 8);
  CHECK(std::holds_alternative<Llama3Scaling>(attention(small(llama_3_1_8b()), 0).rope_scaling));
}

TEST_CASE("OLMoE keeps raw probabilities and Qwen3 divides them by their sum", "[presets]") {
  using Raw = MoELayer<Projection, SoftmaxTopK<T>, Dropless, GluBank<T>, SwitchLoss<T>, ZLoss<T>>;
  const Decoder<T> olmoe = small(olmoe_1b_7b());
  CHECK(!layer_of<Raw>(olmoe, 0, 1).selector().config().renormalise);
  CHECK(attention(olmoe, 0).qk_norm == QkNorm::kFull);
  using Renormalised = MoELayer<Projection, SoftmaxTopK<T>, Dropless, GluBank<T>, SwitchLoss<T>>;
  const Decoder<T> qwen = small(qwen3_30b_a3b());
  CHECK(layer_of<Renormalised>(qwen, 0, 1).selector().config().renormalise);
  CHECK(layer_of<Renormalised>(qwen, 0, 1).selector().config().k == 8);
  CHECK(attention(qwen, 0).qk_norm == QkNorm::kPerHead);
}

TEST_CASE("gpt-oss has clamped experts, a router with bias, and a window in every other layer",
          "[presets]") {
  using Moe = MoELayer<Projection, TopKSoftmax<T>, Dropless, ClampedGluBank<T>, SwitchLoss<T>>;
  const Decoder<T> model = small(gpt_oss_20b());
  CHECK(layer_of<Moe>(model, 0, 1).selector().config().k == 4);
  CHECK(attention(model, 0).window == 8);
  CHECK(attention(model, 1).window == 0);
  for (std::size_t layer = 0; layer < 2; ++layer) {
    CHECK(attention(model, layer).sinks);
    CHECK(attention(model, layer).qkv_bias);
    CHECK(attention(model, layer).output_bias);
    CHECK(std::get<Yarn>(attention(model, layer).rope_scaling).factor == 32.0);
  }
  const auto whole = std::get<GroupedQueryConfig>(gpt_oss_20b().shape.attention_of(0));
  CHECK(whole.window == 128);
}

TEST_CASE("Llama 4 weights what an expert takes, and knows no positions in every fourth layer",
          "[presets]") {
  using Moe = SharedExperts<
      MoELayer<Projection, SigmoidTopK<T>, Dropless, InputWeighted<GluBank<T>>, SwitchLoss<T>>,
      Glu<T>>;
  const Decoder<T> model = small(llama_4_scout());
  REQUIRE(model.layers().size() == 4);
  for (std::size_t layer = 0; layer < 4; ++layer) {
    layer_of<Moe>(model, layer, 1);
    const GroupedQueryConfig config = attention(model, layer);
    CHECK(config.rope == (layer != 3));
    CHECK(std::holds_alternative<Llama3Scaling>(config.rope_scaling) == (layer != 3));
    CHECK(config.chunk == (layer != 3 ? 8 : 0));
    CHECK((config.qk_norm == QkNorm::kL2) == (layer != 3));
    CHECK((config.temperature_scale > 0.0) == (layer == 3));
  }
}

TEST_CASE("Llama 4 Scout turns 29 of 64 pairs 16 times slower than its theta says",
          "[presets][golden]") {
  // Computed by a separate script: pair 35 is the first with a wavelength above 8192.
  const auto config = std::get<GroupedQueryConfig>(llama_4_scout().shape.attention_of(0));
  const Rope rope(
      config.head_dim,
      {.theta = config.rope_theta, .layout = config.rope_layout, .scaling = config.rope_scaling});
  const Rope plain(config.head_dim, {.theta = 5e5});
  CHECK(rope.frequencies()[34] == Approx(0.0009384738703573802).epsilon(1e-12));
  CHECK(rope.frequencies()[35] == Approx(4.7781061769823416e-05).epsilon(1e-12));
  Index slow = 0;
  for (Index i = 0; i < 64; ++i) {
    const double ratio = plain.frequencies()[i] / rope.frequencies()[i];
    if (ratio > 1.5) {
      CHECK(ratio == Approx(16.0).epsilon(1e-13));
      ++slow;
    }
  }
  CHECK(slow == 29);
}

TEST_CASE("DeepSeekMoE begins with a dense layer", "[presets]") {
  using Moe =
      SharedExperts<MoELayer<Projection, SoftmaxTopK<T>, Dropless, GluBank<T>, SwitchLoss<T>>,
                    Glu<T>>;
  const Decoder<T> model = small(deepseek_moe_16b());
  CHECK(branches(model, 0) == "attention mlp");
  CHECK(branches(model, 1) == "attention moe");
  layer_of<Moe>(model, 1, 1);
}

TEST_CASE("DeepSeek-V2 chooses from three of eight groups, V2-Lite from all", "[presets]") {
  using Moe = SharedExperts<MoELayer<Projection, SoftmaxTopK<T>, DeviceCapacity, GluBank<T>,
                                     SwitchLoss<T>, DeviceLoss<T>, CommunicationLoss<T>>,
                            Glu<T>>;
  const auto selector = [](const Decoder<T>& model) {
    return layer_of<Moe>(model, 1, 1).moe().selector();
  };
  const Decoder<T> wide = small(deepseek_v2());
  CHECK(selector(wide).config().groups.count == 8);
  CHECK(selector(wide).config().groups.allowed == 3);
  CHECK(selector(wide).config().groups.summed == 1);
  CHECK(selector(wide).config().scale == 16.0);
  CHECK(!selector(wide).config().renormalise);
  CHECK(layer_of<LatentAttention<T>>(wide, 0, 0).config().q_rank > 0);
  const Decoder<T> lite = small(deepseek_v2_lite());
  CHECK(selector(lite).config().groups.count == 1);
  CHECK(selector(lite).config().scale == 1.0);
  CHECK(layer_of<LatentAttention<T>>(lite, 0, 0).config().q_rank == 0);
  CHECK(std::get<Yarn>(layer_of<LatentAttention<T>>(lite, 0, 0).config().rope_scaling)
            .mscale_all_dim == 0.707);
}

TEST_CASE("DeepSeek-V3's experts are balanced by a bias", "[presets]") {
  using Moe = SharedExperts<
      MoELayer<Projection, SigmoidTopK<T>, Dropless, GluBank<T>, BiasBalance<T>, SwitchLoss<T>>,
      Glu<T>>;
  const DeepSeekV3Config published = deepseek_v3();
  CHECK(published.groups.count == 8);
  CHECK(published.groups.allowed == 4);
  CHECK(published.groups.summed == 2);
  CHECK(published.scale == 2.5);
  const Decoder<T> model = small(published);
  CHECK(branches(model, 0) == "attention mlp");
  CHECK(layer_of<Moe>(model, 1, 1).moe().selector().config().scale == 2.5);
  CHECK(layer_of<Moe>(model, 1, 1).moe().selector().config().groups.allowed == 4);
  CHECK(layer_of<Moe>(model, 1, 1).moe().selector().config().renormalise);
  // The loss counts the largest unbiased scores of all groups, eq. 18.
  const SwitchLossConfig& loss = layer_of<Moe>(model, 1, 1).moe().balancer<1>().config();
  CHECK(loss.count == LoadCount::kTopProbabilities);
  CHECK(loss.scope == Scope::kSequence);
}

TEST_CASE("Switch has one expert in every other layer, with a capacity and jitter", "[presets]") {
  using Moe = MoELayer<JitterRouter<Projection>, SoftmaxTopK<T>, CapacityFactor, MlpBank<T, Relu>,
                       SwitchLoss<T>>;
  const Decoder<T> model = small(switch_base_8());
  CHECK(branches(model, 0) == "attention mlp");
  CHECK(branches(model, 1) == "attention moe");
  const Moe& moe = layer_of<Moe>(model, 1, 1);
  CHECK(moe.selector().config().k == 1);
  CHECK(!moe.selector().config().renormalise);
  CHECK(!moe.capacity().config().count_k);
  CHECK(moe.capacity().config().train == 1.25);
  CHECK(moe.capacity().config().evaluate == 2.0);
  CHECK(model.tied());
  using Gated = MoELayer<JitterRouter<Projection>, SoftmaxTopK<T>, CapacityFactor,
                         GluBank<T, GeluTanh>, SwitchLoss<T>>;
  layer_of<Gated>(small(switch_xxl_128()), 1, 1);
}

TEST_CASE("Embeddings of models like T5 begin with a variance of 1", "[presets]") {
  const auto deviation = [](Decoder<T> model) {
    const Matrix<T>& table = parameters(model)[0].parameter->value;
    return std::sqrt(table.squaredNorm() / static_cast<T>(table.size()));
  };
  // A table has 16 rows of 16.
  CHECK(deviation(small(switch_base_8())) == Approx(1.0).margin(0.25));
  CHECK(deviation(small(openmoe_base())) == Approx(1.0).margin(0.25));
  CHECK(deviation(small(mixtral_8x7b())) < 0.1);
}

TEST_CASE("The sizes of Switch have the capacities of their configurations", "[presets]") {
  const auto check = [](const SwitchConfig& config, double train, double evaluate, Index minimum,
                        Index group_size) {
    CHECK(config.capacity_train == train);
    CHECK(config.capacity_evaluate == evaluate);
    CHECK(config.capacity_minimum == minimum);
    CHECK(config.group_size == group_size);
  };
  check(switch_base_8(), 1.25, 2.0, 4, 8192);
  check(switch_large_128(), 1.25, 2.0, 4, 4096);
  check(switch_xxl_128(), 1.25, 4.0, 2, 4096);
  check(switch_c_2048(), 1.0, 2.0, 2, 2048);

  using Moe = MoELayer<JitterRouter<Projection>, SoftmaxTopK<T>, CapacityFactor, MlpBank<T, Relu>,
                       SwitchLoss<T>>;
  const Decoder<T> model = small(switch_c_2048());
  const CapacityFactorConfig capacity = layer_of<Moe>(model, 0, 1).capacity().config();
  CHECK(capacity.train == 1.0);
  CHECK(capacity.minimum == 2);
  CHECK(capacity.group_size == 2048);
}

TEST_CASE("T5's descendants do not scale scores, but a tied head", "[presets]") {
  const auto check = [](const Decoder<T>& model, double multiplier) {
    for (std::size_t layer = 0; layer < model.layers().size(); ++layer) {
      const GroupedQueryConfig config = attention(model, layer);
      CHECK(config.shape().scale == 1.0);
      CHECK(config.query_init_factor() ==
            Approx(1.0 / std::sqrt(static_cast<double>(config.head_dim))));
      CHECK(config.init_scale == 0.1);
    }
    CHECK(model.config().logit_multiplier == multiplier);
  };
  check(small(switch_base_8()), 0.25);  // d_model is 16.
  check(small(switch_large_128()), 0.25);
  check(small(switch_xxl_128()), 1.0);
  check(small(switch_c_2048()), 1.0);
  check(small(st_moe_32b()), 1.0);
  check(small(openmoe_8b()), 0.25);
  check(small(openmoe_released(openmoe_8b())), 1.0);
}

TEST_CASE("T5's descendants begin with an embedding of variance 1", "[presets]") {
  const auto stddev = [](Decoder<T> model) {
    for (auto& [name, parameter] : parameters(model)) {
      if (name != "embedding.weight") continue;
      return parameter->value.norm() / std::sqrt(static_cast<double>(parameter->value.size()));
    }
    return 0.0;
  };
  // 256 numbers: the standard error is 0.044.
  CHECK(stddev(small(switch_base_8())) == Approx(1.0).margin(0.2));
  CHECK(stddev(small(st_moe_32b())) == Approx(1.0).margin(0.2));
  CHECK(stddev(small(openmoe_8b())) == Approx(1.0).margin(0.2));
  CHECK(stddev(small(mixtral_8x7b())) == Approx(0.02).margin(0.004));
}

TEST_CASE("OpenMoE's losses are means over its sparse layers, its capacities of 4096 tokens",
          "[presets]") {
  using Moe =
      MoELayer<Projection, SoftmaxTopK<T>, CapacityFactor, GluBank<T>, SwitchLoss<T>, ZLoss<T>>;
  Rng rng(1);
  // Every fourth of eight layers is sparse.
  const OpenMoEConfig config = scaled(openmoe_base(), {.d_model = 16, .vocab = 16, .layers = 8});
  const Decoder<T> model = presets::make<T>(config, rng);
  for (const std::size_t layer : {3U, 7U}) {
    const Moe& moe = layer_of<Moe>(model, layer, 1);
    CHECK(moe.balancer<0>().config().coefficient == 0.005);
    CHECK(moe.balancer<1>().config().coefficient == 0.5e-4);
    CHECK(moe.capacity().config().group_size == 4096);
    CHECK(moe.capacity().config().minimum == 4);
  }
}

TEST_CASE("ST-MoE and OpenMoE have a dense network with each mixture", "[presets]") {
  const Decoder<T> st = small(st_moe_32b());
  CHECK(branches(st, 2) == "attention mlp");
  CHECK(branches(st, 3) == "attention moe mlp");
  const Decoder<T> open = small(openmoe_8b());
  CHECK(branches(open, 4) == "attention mlp");
  CHECK(branches(open, 5) == "attention moe mlp");
  OpenMoEConfig paper = openmoe_base();
  paper.parallel = true;
  CHECK(branches(small(paper), 3) == "attention moe|mlp");
  using Released = MoELayer<Projection, SoftmaxTopK<T>, CapacityFactor, AnyBank<OpenMoENetwork<T>>,
                            SwitchLoss<T>, ZLoss<T>>;
  layer_of<Released>(small(openmoe_released(openmoe_base())), 3, 1);
}

TEST_CASE("What make cannot build it refuses", "[presets]") {
  Rng rng(1);
  MixtralConfig mixtral = scaled(mixtral_8x7b());
  mixtral.shape.network = Network::kPlain;
  CHECK(test::message_of<ConfigError>([&] { presets::make<T>(mixtral, rng); }) ==
        "gated_experts: network = kPlain, expected kGated");
  mixtral = scaled(mixtral_8x7b());
  mixtral.shape.encoder_layers = 2;
  CHECK(test::message_of<ConfigError>([&] { presets::make<T>(mixtral, rng); }) ==
        "compose: encoder_layers = 2, expected 0; see ModelShape::decoder_half");
  DeepSeekV3Config groups = scaled(deepseek_v3(), {.experts = 20});
  CHECK(test::message_of<ConfigError>([&] { presets::make<T>(groups, rng); }) ==
        "SigmoidTopK: groups.count = 8, expected a divisor of experts = 20");
}

}  // namespace weir::families_test
