// SPDX-License-Identifier: MIT
#include <cmath>
#include <nlohmann/json.hpp>
#include <variant>
#include <vector>

#include <weir/io/families/rope_config.hpp>

#include "support/catch.hpp"

namespace weir::io::families_rope_config_test {
namespace {

/// The settings that write_rope writes, with the context that files have beside them.
nlohmann::json written(const RopeSettings& rope, bool scores, Index context) {
  nlohmann::json json;
  write_rope(rope, scores, json);
  if (!json.contains("max_position_embeddings")) json["max_position_embeddings"] = context;
  return json;
}

RopeSettings read_back(const nlohmann::json& json, bool scores) {
  ConfigFile file(JsonObject("config.json", nlohmann::json::parse(json.dump())));
  return read_rope(file, 1e4, scores, 1.0);
}

}  // namespace

TEST_CASE("Every scaling of rotary positions comes back from its configuration", "[io][rope]") {
  const std::vector<RopeScaling> scalings = {
      NoScaling{},
      LinearScaling{.factor = 4.0},
      DynamicNtkScaling{.factor = 2.0, .original_context = 2048, .length = 2048},
      Llama3Scaling{
          .factor = 8.0, .low_freq_factor = 1.0, .high_freq_factor = 4.0, .original_context = 8192},
      LongRopeScaling{.short_factors = {1.0, 1.5},
                      .long_factors = {2.0, 3.0},
                      .short_mscale = 1.25,
                      .long_mscale = 1.5,
                      .original_context = 1024,
                      .length = 2048},
      Yarn{.factor = 32.0, .original_context = 4096, .truncate = false}};
  for (const RopeScaling& scaling : scalings) {
    CAPTURE(scaling.index());
    const RopeSettings rope{.theta = 5e5, .scaling = scaling};
    const RopeSettings back = read_back(written(rope, false, 2048), false);
    CHECK(back.theta == 5e5);
    CHECK(back.scaling == scaling);
  }
  const Yarn deepseek{.factor = 40.0, .mscale = 0.707, .mscale_all_dim = 0.5};
  CHECK(read_back(written({.scaling = deepseek}, true, 2048), true).scaling ==
        RopeScaling(deepseek));
}

TEST_CASE("A yarn says by how much it multiplies where that is not the usual factor",
          "[io][rope]") {
  const auto scaling_of = [](const Yarn& yarn) {
    return written({.scaling = yarn}, false, 2048)["rope_scaling"];
  };
  const Yarn usual{.factor = 32.0};
  CHECK_FALSE(scaling_of(usual).contains("attention_factor"));

  // By definition 0.1 m ln(32) + 1 with m = 1.1.
  const Yarn other{.factor = 32.0, .mscale = 1.1};
  const nlohmann::json scaling = scaling_of(other);
  REQUIRE(scaling.contains("attention_factor"));
  CHECK(scaling["attention_factor"].get<double>() == Approx(1.0 + 0.11 * std::log(32.0)));
  const RopeSettings back = read_back(written({.scaling = other}, false, 2048), false);
  REQUIRE(std::holds_alternative<Yarn>(back.scaling));
  CHECK(std::get<Yarn>(back.scaling).mscale == Approx(1.1));
}

}  // namespace weir::io::families_rope_config_test
