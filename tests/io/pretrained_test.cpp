// SPDX-License-Identifier: MIT
#include <weir/io/pretrained.hpp>

#include <filesystem>
#include <fstream>
#include <string>
#include <vector>

#include <nlohmann/json.hpp>
#include <weir/presets/mixtral_8x7b.hpp>
#include <weir/presets/scaled.hpp>

#include "io/folder.hpp"
#include "support/catch.hpp"
#include "support/matrices.hpp"

namespace weir {
namespace {

const std::vector<Index> kIds = {3, 1, 4, 1, 5, 9, 2, 6};

template <class Config>
void check_round_trip(const Config& config) {
  const test::Folder folder;
  Rng rng(7);
  Decoder<float> model = presets::make<float>(config, rng);
  io::save_pretrained(folder.path(), model, config);
  const auto loaded = io::load_pretrained<float>(folder.path());
  CHECK(infer(loaded.model, kIds) == infer(model, kIds));
}

TEST_CASE("A model saved as Hugging Face's code has it is loaded again", "[io][pretrained]") {
  check_round_trip(presets::scaled(presets::mixtral_8x7b()));
}

}  // namespace
}  // namespace weir
