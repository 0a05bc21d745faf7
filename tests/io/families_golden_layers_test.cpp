// SPDX-License-Identifier: MIT
// Mixtures that other people's code computed are put into folders under their published names, and
// yield what this code had.
#include <filesystem>
#include <map>
#include <string>
#include <utility>
#include <vector>

#include <weir/io/families/gpt_oss.hpp>
#include <weir/io/families/qwen_moe.hpp>
#include <weir/io/pretrained.hpp>
#include <weir/io/safetensors.hpp>
#include <weir/io/safetensors_writer.hpp>
#include <weir/presets/scaled.hpp>

#include "io/folder.hpp"
#include "support/catch.hpp"
#include "support/matrices.hpp"

namespace weir::families_golden_layers_test {
namespace {

using Values = std::pair<std::vector<Index>, std::vector<double>>;

io::Safetensors golden_file(const std::string& name) {
  return io::Safetensors::read(WEIR_SOURCE_DIR "/tests/golden/" + name + ".safetensors");
}

/// A folder of a model of this config, with the golden file's weights in the mixture of layer 0.
template <class Config>
void write_with_mixture(const std::filesystem::path& folder, const Config& config,
                        const io::Safetensors& golden) {
  Rng rng(1);
  Decoder<double> model = presets::make<double>(config, rng);
  io::save_pretrained(folder, model, config, {.dtype = io::Dtype::kF64});
  std::map<std::string, Values> all;
  {
    const io::Safetensors saved = io::Safetensors::read((folder / "model.safetensors").string());
    for (const auto& [name, tensor] : saved.tensors()) {
      all[name] = {tensor.shape, saved.reals(name)};
    }
  }
  for (const auto& [name, tensor] : golden.tensors()) {
    if (!name.starts_with("w.")) continue;
    const std::string published = "model.layers.0.mlp." + name.substr(2);
    INFO(published);
    REQUIRE(all.contains(published));
    REQUIRE(all.at(published).first == tensor.shape);
    all.at(published).second = golden.reals(name);
  }
  std::vector<io::TensorShape> shapes;
  for (const auto& [name, values] : all) shapes.push_back({name, values.first});
  io::SafetensorsWriter writer(folder / "model.safetensors", shapes, io::Dtype::kF64, {});
  for (const auto& [name, values] : all) {
    writer.append(values.second.data(), static_cast<Index>(values.second.size()));
  }
  writer.commit();
}

template <class Config>
void check_mixture(const Config& config, const io::Safetensors& golden) {
  const test::Folder folder;
  write_with_mixture(folder.path(), config, golden);
  const auto loaded = io::load_family<Config, double>(folder.path());
  const Branch<double>& branch = loaded.model.layers()[0].branches()[1];
  REQUIRE(branch.name == "moe");
  const auto matrix = [&](const std::string& name) {
    const std::vector<double> numbers = golden.reals(name);
    return Matrix<double>(Eigen::Map<const Matrix<double>>(
        numbers.data(), static_cast<Index>(numbers.size()) / config.shape.d_model,
        config.shape.d_model));
  };
  CHECK(test::relative_error(infer(branch.layer, matrix("in.x")), matrix("out.y")) <= 1e-13);
}

TEST_CASE("gpt-oss's golden mixture goes through a folder", "[io][pretrained][golden]") {
  presets::GptOssConfig config = presets::scaled(presets::gpt_oss_20b(), {.d_model = 16});
  config.shape.experts = 8;
  config.shape.k = 2;
  config.shape.d_hidden = 12;
  check_mixture(config, golden_file("17_gpt_oss_moe"));
}

TEST_CASE("Qwen2-MoE's golden mixture goes through a folder", "[io][pretrained][golden]") {
  presets::Qwen2MoeConfig config = presets::scaled(presets::qwen1_5_moe_a2_7b(), {.d_model = 16});
  config.shape.experts = 6;
  config.shape.k = 2;
  config.shape.d_hidden = 12;
  config.shape.shared_hidden = 20;
  check_mixture(config, golden_file("01c_qwen2moe_shared_gate"));
}

}  // namespace
}  // namespace weir::families_golden_layers_test
