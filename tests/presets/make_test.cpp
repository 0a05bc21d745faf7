// SPDX-License-Identifier: MIT
#include <weir/core/parameter.hpp>
#include <weir/core/random.hpp>
#include <weir/presets/count.hpp>
#include <weir/presets/deepseek_moe_16b.hpp>
#include <weir/presets/mixtral_8x22b.hpp>
#include <weir/presets/mixtral_8x7b.hpp>
#include <weir/presets/openmoe_34b.hpp>
#include <weir/presets/openmoe_8b.hpp>
#include <weir/presets/openmoe_base.hpp>
#include <weir/presets/scaled.hpp>
#include <weir/presets/st_moe_32b.hpp>
#include <weir/presets/switch_base_8.hpp>
#include <weir/presets/switch_large.hpp>

#include "support/catch.hpp"
#include "support/matrices.hpp"

using namespace weir;
using namespace weir::presets;

namespace {

// All numbers that belong to the model, trained or moved by a rule.
template <class Config>
Count numbers_of(const Config& config) {
  Rng rng(1);
  Decoder<float> model = presets::make<float>(config, rng);
  Count numbers = parameter_count(model);
  for (const auto& [name, buffer] : buffers(model)) numbers += buffer->value.size();
  return numbers;
}

}  // namespace

TEST_CASE("A model has as many numbers as its config counts", "[presets]") {
  const auto check = [](const auto& config) {
    const auto small = scaled(config);
    CHECK(numbers_of(small) == count(small.shape.decoder_half()).total());
  };
  check(mixtral_8x7b());
  check(deepseek_moe_16b());
  check(switch_base_8());
  check(switch_xxl_128());
  check(st_moe_32b());
  check(openmoe_8b());
  check(openmoe_released(openmoe_base()));
}
