// SPDX-License-Identifier: MIT
// What a config.json of a family cannot say is not saved.
#include <nlohmann/json.hpp>
#include <string>

#include <weir/core/error.hpp>
#include <weir/io/families/deepseek.hpp>
#include <weir/io/families/ernie.hpp>
#include <weir/io/families/glm4_moe.hpp>
#include <weir/io/families/grok.hpp>
#include <weir/io/families/mixtral.hpp>
#include <weir/presets/mixtral_8x7b.hpp>

#include "support/catch.hpp"
#include "support/matrices.hpp"

namespace weir::io::families_unsaid_test {
namespace {

template <class Config>
std::string refusal(const Config& config) {
  nlohmann::json json;
  return test::message_of<ConfigError>([&] { Family<Config>::write(config, json); });
}

}  // namespace

TEST_CASE("Scores of groups that a family does not have are not saved", "[io][pretrained]") {
  auto v2 = presets::deepseek_v2();
  CHECK(refusal(v2) == "no exception");
  v2.groups.summed = 2;
  CHECK(refusal(v2) == "save_pretrained: groups.summed = 2, expected 1 in this family");
  auto v3 = presets::deepseek_v3();
  CHECK(refusal(v3) == "no exception");
  v3.groups.summed = 1;
  CHECK(refusal(v3) == "save_pretrained: groups.summed = 1, expected 2 in this family");
  auto glm = presets::glm_4_5();
  CHECK(refusal(glm) == "no exception");
  glm.groups.summed = 1;
  CHECK(refusal(glm) == "save_pretrained: groups.summed = 1, expected 2 in this family");
}

TEST_CASE("Shared experts that are not as wide as several others are not saved",
          "[io][pretrained]") {
  auto v3 = presets::deepseek_v3();
  v3.shape.shared_hidden = 3000;
  CHECK(refusal(v3) ==
        "save_pretrained: shared_hidden = 3000, expected a multiple of d_hidden = 2048");
  v3.shape.d_hidden = 0;
  CHECK(refusal(v3) ==
        "save_pretrained: shared_hidden = 3000, expected a multiple of d_hidden = 0");
  auto ernie = presets::ernie_4_5_21b_a3b();
  CHECK(refusal(ernie) == "no exception");
  ernie.shape.shared_hidden = 1000;
  CHECK(refusal(ernie) ==
        "save_pretrained: shared_hidden = 1000, expected a multiple of d_hidden = 1536");
  ernie.shape.d_hidden = 0;
  CHECK(refusal(ernie) ==
        "save_pretrained: shared_hidden = 1000, expected a multiple of d_hidden = 0");
}

TEST_CASE("Attention and weights that a family does not have are not saved", "[io][pretrained]") {
  auto mixtral = presets::mixtral_8x7b();
  CHECK(refusal(mixtral) == "no exception");
  mixtral.shape.attention = presets::deepseek_v3().shape.attention;
  CHECK(refusal(mixtral) ==
        "save_pretrained: attention is a LatentConfig, expected a GroupedQueryConfig in this "
        "family");
  auto v2 = presets::deepseek_v2();
  v2.shape.attention = presets::mixtral_8x7b().shape.attention;
  CHECK(refusal(v2) ==
        "save_pretrained: attention is a GroupedQueryConfig, expected a LatentConfig in this "
        "family");
  auto grok = presets::grok_1();
  CHECK(refusal(grok) == "no exception");
  grok.renormalise = true;
  CHECK(refusal(grok) == "save_pretrained: renormalise = true, expected false in this family");
}

}  // namespace weir::io::families_unsaid_test
