// SPDX-License-Identifier: MIT
#include <functional>
#include <string>
#include <variant>
#include <vector>

#include <weir/presets/count.hpp>
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
#include <weir/presets/mixtral_8x22b.hpp>
#include <weir/presets/mixtral_8x7b.hpp>
#include <weir/presets/olmoe_1b_7b.hpp>
#include <weir/presets/openmoe_34b.hpp>
#include <weir/presets/openmoe_8b.hpp>
#include <weir/presets/openmoe_base.hpp>
#include <weir/presets/phi_3_5_moe.hpp>
#include <weir/presets/qwen2_moe.hpp>
#include <weir/presets/qwen3_30b_a3b.hpp>
#include <weir/presets/st_moe_32b.hpp>
#include <weir/presets/switch_base_128.hpp>
#include <weir/presets/switch_base_256.hpp>
#include <weir/presets/switch_base_8.hpp>
#include <weir/presets/switch_large.hpp>

#include "support/allocations.hpp"
#include "support/catch.hpp"
#include "support/matrices.hpp"

namespace weir::count_test {
using namespace weir::presets;

namespace {

// A dense-free model of one layer, small enough to count by hand.
ModelShape small_shape() {
  return {.layers = 1,
          .d_model = 6,
          .vocab = 10,
          .attention = GroupedQueryConfig{.heads = 2, .kv_heads = 1, .head_dim = 4},
          .experts = 3,
          .k = 2,
          .d_hidden = 5};
}

std::string message(const ModelShape& shape) {
  return test::message_of<ConfigError>([&] { count(shape); });
}

}  // namespace

TEST_CASE("The counts of published models are right to the last digit", "[presets][golden]") {
  struct Published {
    std::string name;
    ModelShape shape;
    Count total, active;
  };
  const std::vector<Published> models = {
      {"Mixtral 8x7B", mixtral_8x7b().shape, 46'702'792'704, 12'879'925'248},
      {"Mixtral 8x22B", mixtral_8x22b().shape, 140'620'634'112, 39'152'031'744},
      {"Mixtral 8x22B v0.3", mixtral_8x22b(32768).shape, 140'630'071'296, 39'161'468'928},
      {"Grok-1", grok_1().shape, 315'684'820'992, 83'756'587'008},
      {"DBRX", dbrx().shape, 131'596'523'520, 36'469'708'800},
      {"OLMoE-1B-7B", olmoe_1b_7b().shape, 6'919'161'856, 1'282'017'280},
      {"Qwen3-30B-A3B", qwen3_30b_a3b().shape, 30'532'122'624, 3'353'032'704},
      {"Qwen1.5-MoE-A2.7B", qwen1_5_moe_a2_7b().shape, 14'315'784'192, 2'689'173'504},
      {"Kimi K2", kimi_k2().shape, 1'026'408'232'448, 32'861'500'928},
      {"GLM-4.5-Air", glm_4_5_air().shape, 106'852'251'264, 13'424'129'664},
      {"GLM-4.5", glm_4_5().shape, 352'797'829'024, 33'632'266'144},
      {"ERNIE-4.5-21B-A3B", ernie_4_5_21b_a3b().shape, 21'825'437'888, 3'352'150'208},
      {"Granite-3.1-1B-A400M", granite_3_1_1b_a400m().shape, 1'334'628'352, 428'658'688},
      {"Phi-3.5-MoE", phi_3_5_moe().shape, 41'873'153'344, 6'640'999'744},
      {"Llama 3.1 8B", llama_3_1_8b().shape, 8'030'261'248, 8'030'261'248},
      {"Mistral 7B", mistral_7b().shape, 7'241'732'096, 7'241'732'096},
      {"Qwen3-8B", qwen3_8b().shape, 8'190'735'360, 8'190'735'360},
      {"gpt-oss-20b", gpt_oss_20b().shape, 20'914'757'184, 4'187'440'704},
      {"Llama-4-Scout", llama_4_scout().shape, 107'769'861'120, 17'172'894'720},
      {"DeepSeekMoE-16B", deepseek_moe_16b().shape, 16'375'728'128, 2'828'650'496},
      {"DeepSeek-V2-Lite", deepseek_v2_lite().shape, 15'706'484'224, 2'661'150'208},
      {"DeepSeek-V2", deepseek_v2().shape, 235'741'434'880, 21'375'800'320},
      {"DeepSeek-V3", deepseek_v3().shape, 671'026'419'200, 37'552'297'472},
      {"Switch-Base-8", switch_base_8().shape, 619'339'008, 222'977'280},
      {"Switch-Base-128", switch_base_128().shape, 7'415'217'408, 224'083'200},
      {"Switch-Base-256", switch_base_256().shape, 14'664'154'368, 225'262'848},
      {"Switch-Large-128", switch_large_128().shape, 26'309'291'008, 740'813'824},
      {"Switch-XXL-128", switch_xxl_128().shape, 394'675'073'024, 11'147'915'264},
      {"Switch-C-2048", switch_c_2048().shape, 1'571'327'875'360, 1'747'228'960},
      {"ST-MoE-32B", st_moe_32b().shape, 269'104'613'376, 35'062'450'176},
      {"OpenMoE-8B as released", openmoe_released(openmoe_8b()).shape, 11'855'046'656,
       3'801'982'976},
      {"OpenMoE-34B as released", openmoe_released(openmoe_34b()).shape, 46'270'737'408,
       10'031'950'848},
  };
  for (const Published& model : models) {
    INFO(model.name);
    const ModelCount c = count(model.shape);
    CHECK(c.total() == model.total);
    CHECK(c.active() == model.active);
  }
}

TEST_CASE("Counts without embedding and head are those published", "[presets][golden]") {
  CHECK(count(grok_1()).total() - count(grok_1()).embedding == 314'879'514'624);
  CHECK(count(gpt_oss_20b()).active_without_embedding() == 3'608'307'264);
  CHECK(count(deepseek_v2_lite()).active_without_embedding() == 2'451'435'008);
  CHECK(count(deepseek_v2()).active_without_embedding() == 20'851'512'320);
  CHECK(count(deepseek_v3()).active_without_embedding() == 36'625'618'432);
  CHECK(count(openmoe_released(openmoe_8b())).active_without_vocab() == 2'751'834'112);
}

TEST_CASE("OpenMoE's paper leaves norms and routers out", "[presets][golden]") {
  const auto weights = [](const ModelCount& c) { return c.total() - c.norms - c.routers; };
  CHECK(weights(count(openmoe_base())) == 649'887'744);
  CHECK(weights(count(openmoe_8b())) == 8'779'464'704);
  CHECK(weights(count(openmoe_34b())) == 34'610'479'104);

  OpenMoEConfig released = openmoe_released(openmoe_base());
  for (Index* width :
       {&released.shape.d_hidden, &released.shape.dense_hidden, &released.shape.extra_hidden}) {
    *width = 2048;
  }
  const ModelCount c = count(released);
  CHECK(c.active_without_vocab() - c.norms - c.routers == 141'557'760);
  CHECK(c.active() - c.head - c.norms - c.routers == 338'460'672);
}

TEST_CASE("DeepSeek-V3's module of multi-token prediction is counted apart", "[presets][golden]") {
  const ModelCount c = count(deepseek_v3());
  CHECK(c.prediction == 11'610'068'224);
  // With its own copy of embedding and head, as the files have it: 685 billion.
  CHECK(c.total() + c.prediction + c.embedding + c.head == 684'489'845'504);
  CHECK(count(deepseek_v2()).prediction == 0);
  // GLM-4.5-Air's files, which have such copies too, are said to hold 110 billion.
  const ModelCount air = count(glm_4_5_air());
  CHECK(air.total() + air.prediction + air.embedding + air.head == 110'468'824'832);
}

TEST_CASE("Latent attention keeps 576 values of a token in each layer", "[presets][golden]") {
  CHECK(count(deepseek_v3()).cache_values == 576 * 61);
  CHECK(count(deepseek_v2()).cache_values == 576 * 60);
  CHECK(count(deepseek_v2_lite()).cache_values == 576 * 27);
  CHECK(count(deepseek_v2()).multi_head_cache_values == 2 * 128 * 128 * 60);
  CHECK(count(mixtral_8x7b()).cache_values == 2 * 8 * 128 * 32);
  CHECK(count(mixtral_8x7b()).multi_head_cache_values == 4 * count(mixtral_8x7b()).cache_values);
  CHECK(count(mixtral_8x7b()).cache_bytes() == 131072.0);
  CHECK(count(switch_base_8()).cache_values == 2 * 768 * 12);

  // DeepSeek-V2 with 6 bits a value against DeepSeek 67B, 95 layers of 8 groups, with 16.
  const double dense_67b = 2 * 8 * 128 * 95 * 2.0;
  CHECK(1.0 - count(deepseek_v2()).cache_bytes(6.0) / dense_67b == Approx(0.9334).epsilon(1e-4));
  CHECK(1.0 - count(deepseek_v2()).cache_bytes() / dense_67b == Approx(0.8224).epsilon(1e-4));
}

TEST_CASE("A small model is counted by hand", "[presets]") {
  ModelShape shape = small_shape();
  ModelCount c = count(shape);
  CHECK(c.embedding == 60);
  CHECK(c.head == 60);
  CHECK(c.attention == 6 * 8 + 2 * 6 * 4 + 8 * 6);
  CHECK(c.norms == 3 * 6);
  CHECK(c.routers == 3 * 6);
  CHECK(c.experts == 3 * 3 * 6 * 5);
  CHECK(c.total() == 60 + 60 + 144 + 18 + 18 + 270);
  CHECK(c.active() == 60 + 60 + 144 + 18 + 18 + 180);
  CHECK(c.active_without_embedding() == c.active() - 60);
  CHECK(c.active_without_vocab() == c.active() - 120);
  CHECK(c.active_share() == Approx(480.0 / 570.0));
  CHECK(c.flops() == 2 * (60 + 144 + 18 + 180));
  CHECK(c.flops(10) == c.flops() + 2 * 10 * (8 + 8));
  CHECK(c.cache_bytes() == 2 * 4 * 2);
  CHECK(c.multi_head_cache_bytes() == 2 * 8 * 2);

  shape.attention = GroupedQueryConfig{.heads = 3, .kv_heads = 1};  // head_dim = 6 / 3
  CHECK(count(shape).attention == 6 * 6 + 2 * 6 * 2 + 6 * 6);
  shape = small_shape();
  shape.tied = true;
  CHECK(count(shape).head == 0);
  CHECK(count(shape).flops() == c.flops());  // A tied head is multiplied like any other.
  shape.expert_bias = shape.router_bias = shape.selection_bias = true;
  CHECK(count(shape).experts == 3 * (3 * 6 * 5 + 2 * 5 + 6));
  CHECK(count(shape).routers == 3 * 6 + 3);
  CHECK(count(shape).selection_bias == 3);
  CHECK(count(shape).flops() == c.flops());
  shape = small_shape();
  shape.shared_hidden = 7;
  CHECK(count(shape).shared == 3 * 6 * 7);
  CHECK(count(shape).flops() == c.flops() + 2 * 3 * 6 * 7);
  shape.extra_hidden = 2;
  CHECK(count(shape).dense == 3 * 6 * 2);
  CHECK(count(shape).norms == c.norms + 6);
  shape.post_norms = true;
  CHECK(count(shape).norms == c.norms + 6 + 3 * 6);
  shape.post_norms = false;
  shape.network = Network::kPlain;
  CHECK(count(shape).dense == 2 * 6 * 2);
  CHECK(count(shape).experts == 3 * 2 * 6 * 5);
  shape.network = Network::kOpenMoE;
  CHECK(count(shape).dense == 4 * 6 * 2);
  shape.network = Network::kGated;
  shape.layers = 3;
  shape.interleave = {.first_dense = 2};
  shape.dense_hidden = 4;
  CHECK(count(shape).dense == 3 * 6 * 2 + 2 * 3 * 6 * 4);
  CHECK(count(shape).experts == c.experts);
}

TEST_CASE("A window limits what a token costs and what is kept of it", "[presets]") {
  ModelShape shape = small_shape();
  shape.layers = 4;
  const ModelCount full = count(shape);
  CHECK(full.windowed_cache_values == 0);
  GroupedQueryConfig local = std::get<GroupedQueryConfig>(shape.attention);
  shape.other_attention = local;
  shape.others = {.stride = 4};
  local.window = 10;
  shape.attention = local;
  const ModelCount c = count(shape);
  CHECK(c.total() == full.total());
  CHECK(c.cache_values == full.cache_values);
  CHECK(c.windowed_cache_values == 3 * 2 * 4);
  CHECK(c.flops(10) == full.flops(10));
  CHECK(c.flops(100) == full.flops() + 2 * (8 + 8) * (3 * 10 + 100));
  local.chunk = 7;
  shape.attention = local;
  CHECK(count(shape).flops(100) == full.flops() + 2 * (8 + 8) * (3 * 7 + 100));

  const ModelCount oss = count(gpt_oss_20b());
  CHECK(oss.windowed_cache_values == 12 * 2 * 8 * 64);
  CHECK(oss.window == 128);
  CHECK(count(llama_4_scout()).windowed_cache_values == 36 * 2 * 8 * 128);
}

TEST_CASE("Counting allocates nothing", "[presets]") {
  Count sum = 0;
  CHECK(test::count_allocations([&] {
          sum += count(deepseek_v3()).total() + count(gpt_oss_20b()).total() +
                 count(switch_c_2048()).total();
        }) == 0);
  CHECK(sum > 0);
}

TEST_CASE("An encoder-decoder has a decoder half", "[presets]") {
  const ModelShape whole = switch_base_8().shape;
  const ModelCount both = count(whole);
  const ModelCount half = count(whole.decoder_half());
  CHECK(both.experts == 2 * half.experts);
  CHECK(both.dense == 2 * half.dense);
  CHECK(both.attention == 3 * half.attention);
  CHECK(both.position_tables == 2 * 32 * 12);
  CHECK(half.position_tables == 0);
  CHECK(both.cache_values == half.cache_values);
  CHECK(count(mixtral_8x7b().shape.decoder_half()).total() == count(mixtral_8x7b()).total());
}

TEST_CASE("DBRX has 65 times as many combinations of experts as Mixtral", "[presets][golden]") {
  CHECK(combinations(8, 2) == 28);
  CHECK(combinations(16, 4) == 1820);
  CHECK(combinations(16, 4) / combinations(8, 2) == 65);
  CHECK(combinations(256, 8) == 409'663'695'276'000);
  CHECK(combinations(5, 0) == 1);
  CHECK(combinations(0, 0) == 1);
  CHECK(combinations(2048, 1) == 2048);
  CHECK(combinations(66, 33) == 7'219'428'434'016'265'740);
  for (Count n = 1; n < 40; ++n) {
    for (Count k = 1; k < n; ++k) {
      CHECK(combinations(n, k) == combinations(n - 1, k - 1) + combinations(n - 1, k));
    }
  }
  CHECK(test::message_of<ConfigError>([] { combinations(3, 4); }) ==
        "combinations: chosen = 4, expected 0 <= chosen <= experts = 3");
  CHECK(test::message_of<ConfigError>([] { combinations(67, 33); }) ==
        "combinations: C(67, 33) does not fit 63 bits");
}

TEST_CASE("The gate of a shared expert is counted", "[presets]") {
  ModelShape shape = small_shape();
  shape.shared_hidden = 4;
  const ModelCount without = count(shape);
  shape.shared_gate = true;
  CHECK(count(shape).shared == without.shared + 6);
  CHECK(count(shape).multiplications == without.multiplications + 6);
}

TEST_CASE("Biases of norms and head are counted", "[presets]") {
  ModelShape shape = small_shape();
  const ModelCount without = count(shape);
  shape.norm_bias = shape.head_bias = true;
  CHECK(without.norms == 3 * 6);
  CHECK(count(shape).norms == 2 * without.norms);
  CHECK(count(shape).head == without.head + 10);
  shape.tied = true;
  CHECK(count(shape).head == 0);
}

TEST_CASE("A dense model is counted by its layers", "[presets]") {
  ModelShape shape = small_shape();
  shape.experts = shape.k = shape.d_hidden = 0;
  shape.dense_hidden = 5;
  const ModelCount c = count(shape);
  CHECK(c.dense == 3 * 6 * 5);
  CHECK(c.experts + c.routers + c.idle_experts == 0);
  CHECK(c.active() == c.total());
}

TEST_CASE("A shape that makes no model is refused", "[presets]") {
  const auto with = [](auto change) {
    ModelShape shape = small_shape();
    change(shape);
    return message(shape);
  };
  CHECK(with([](ModelShape& s) { s.layers = 0; }) == "ModelShape: layers = 0, expected >= 1");
  CHECK(with([](ModelShape& s) { s.d_model = 0; }) == "ModelShape: d_model = 0, expected >= 1");
  CHECK(with([](ModelShape& s) { s.vocab = 0; }) == "ModelShape: vocab = 0, expected >= 1");
  CHECK(with([](ModelShape& s) { s.experts = -1; }) == "ModelShape: experts = -1, expected >= 0");
  CHECK(with([](ModelShape& s) { s.experts = 0; }) ==
        "ModelShape: k = 2, expected 0 without experts");
  CHECK(with([](ModelShape& s) { s.experts = s.k = 0; }) ==
        "ModelShape: d_hidden = 5, expected 0 without experts");
  CHECK(with([](ModelShape& s) { s.experts = s.k = s.d_hidden = 0; }) ==
        "ModelShape: dense_hidden = 0, expected >= 1");
  CHECK(with([](ModelShape& s) { s.k = 4; }) ==
        "ModelShape: k = 4, expected 1 <= k <= experts = 3");
  CHECK(with([](ModelShape& s) { s.k = 0; }) ==
        "ModelShape: k = 0, expected 1 <= k <= experts = 3");
  CHECK(with([](ModelShape& s) { s.d_hidden = 0; }) == "ModelShape: d_hidden = 0, expected >= 1");
  CHECK(with([](ModelShape& s) { s.shared_hidden = -1; }) ==
        "ModelShape: shared_hidden = -1, expected >= 0");
  CHECK(with([](ModelShape& s) { s.encoder_layers = -1; }) ==
        "ModelShape: encoder_layers = -1, expected >= 0");
  CHECK(with([](ModelShape& s) { s.attention = GroupedQueryConfig{.heads = 4, .kv_heads = 3}; }) ==
        "GroupedQueryAttention: kv_heads = 3, expected a divisor of heads = 4");
  CHECK(with([](ModelShape& s) { s.interleave = {.first_dense = 1}; }) ==
        "ModelShape: dense_hidden = 0, expected >= 1");
}

}  // namespace weir::count_test
