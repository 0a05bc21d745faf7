// SPDX-License-Identifier: MIT
#include <filesystem>
#include <fstream>
#include <iterator>
#include <string>
#include <vector>

#include <weir/core/verbs.hpp>
#include <weir/io/families/mixtral.hpp>
#include <weir/io/peft.hpp>
#include <weir/nn/linear.hpp>
#include <weir/presets/mixtral.hpp>
#include <weir/presets/mixtral_8x7b.hpp>
#include <weir/presets/scaled.hpp>
#include <weir/tuning/lora.hpp>

#include "io/files.hpp"
#include "io/folder.hpp"
#include "support/catch.hpp"
#include "support/matrices.hpp"

namespace weir::peft_test {

namespace {

/// adapter_config.json as PEFT 0.15 writes it, with what a test says.
std::string config_text(const std::string& more) {
  return R"({"alpha_pattern": {}, "auto_mapping": null, "base_model_name_or_path": "m",
    "corda_config": null, "eva_config": null, "exclude_modules": null, "fan_in_fan_out": false,
    "inference_mode": true, "init_lora_weights": true, "layer_replication": null,
    "layers_pattern": null, "layers_to_transform": null, "loftq_config": {}, "lora_dropout": 0.25,
    "megatron_config": null, "megatron_core": "megatron.core", "modules_to_save": null,
    "rank_pattern": {}, "revision": null, "target_modules": ["q_proj"], "task_type": "CAUSAL_LM",
    "trainable_token_indices": null, "use_rslora": false)" +
         more + "}";
}
const std::string kPlain =
    R"(, "peft_type": "LORA", "bias": "none", "use_dora": false, "r": 1, "lora_alpha": 3)";

void write(const std::filesystem::path& path, const std::string& text) {
  std::ofstream(path, std::ios::binary) << text;
}

/// A of one row (1, 2) and B (3, 4, 5)^T of the linear map `module`.
std::string tensors_text(const std::string& module) {
  const std::string full = "\"base_model.model." + module;
  return test::file_of("{" + full + R"(.lora_A.weight":{"dtype":"F32","shape":[1,2],)" +
                           R"("data_offsets":[0,8]},)" + full +
                           R"(.lora_B.weight":{"dtype":"F32","shape":[3,1],)" +
                           R"("data_offsets":[8,20]}})",
                       test::bytes_of<float>({1, 2, 3, 4, 5}));
}

struct TwoLinears {
  using Scalar = double;
  Linear<double> q_proj, other;
  template <class Self, class Visit>
  static void visit(Self& self, Visit& visit) {
    visit("q_proj", self.q_proj);
    visit("other", self.other);
  }
};

TwoLinears two_linears() {
  return {Linear<double>(Matrix<double>(Matrix<double>::Zero(3, 2))),
          Linear<double>(Matrix<double>(Matrix<double>::Zero(3, 2)))};
}

std::string read(const std::filesystem::path& path) {
  std::ifstream file(path, std::ios::binary);
  return {std::istreambuf_iterator<char>(file), {}};
}

}  // namespace

TEST_CASE("An adapter as PEFT writes it is read", "[io][golden]") {
  const test::Folder folder;
  write(folder.path() / "adapter_config.json", config_text(kPlain));
  write(folder.path() / "adapter_model.safetensors", tensors_text("q_proj"));
  TwoLinears model = two_linears();
  CHECK(io::load_peft(folder.path(), model, "mine") == 1);
  REQUIRE(model.q_proj.weight().adapters.size() == 1);
  CHECK(model.other.weight().adapters.empty());
  const LowRank<double>& adapter = model.q_proj.weight().adapters[0];
  CHECK(adapter.name == "mine");
  CHECK(adapter.dropout == 0.25);
  CHECK(adapter.scale() == 3.0);
  Matrix<double> x(1, 2);
  x << 7.0, 9.0;  // x A^T = 25, times the scale 75.
  Matrix<double> y(1, 3);
  y << 225.0, 300.0, 375.0;
  CHECK(infer(model.q_proj, x) == y);
  CHECK(test::message_of<ConfigError>([&] { io::load_peft(folder.path(), model, "mine"); }) ==
        "load_peft: q_proj.weight has an adapter 'mine' already, expected another name");
}

TEST_CASE("alpha_pattern and use_rslora are honoured", "[io]") {
  const test::Folder folder;
  std::string text = config_text(kPlain);
  text.replace(text.find(R"("alpha_pattern": {})"), 19, R"("alpha_pattern": {"q_proj": 8})");
  text.replace(text.find(R"("use_rslora": false)"), 19, R"("use_rslora": true)");
  write(folder.path() / "adapter_config.json", text);
  write(folder.path() / "adapter_model.safetensors", tensors_text("q_proj"));
  TwoLinears model = two_linears();
  io::load_peft(folder.path(), model, "mine");
  CHECK(model.q_proj.weight().adapters[0].scale() == 8.0);
  CHECK(model.q_proj.weight().adapters[0].rank_stabilised);
}

TEST_CASE("What later versions of PEFT write besides is read over", "[io]") {
  const test::Folder folder;
  write(folder.path() / "adapter_config.json",
        config_text(kPlain + R"(, "arrow_config": null, "ensure_weight_tying": false,
          "lora_bias": false, "peft_version": "0.17.1", "qalora_group_size": 16,
          "target_parameters": null, "use_qalora": false)"));
  write(folder.path() / "adapter_model.safetensors", tensors_text("q_proj"));
  TwoLinears model = two_linears();
  CHECK(io::load_peft(folder.path(), model, "mine") == 1);
  CHECK(model.q_proj.weight().adapters[0].scale() == 3.0);
}

TEST_CASE("Adapters of a Mixtral have the names of Hugging Face's modules and come back to the bit",
          "[io]") {
  const presets::MixtralConfig config = presets::scaled(presets::mixtral_8x7b(), {.d_model = 16});
  Rng rng(1);
  auto model = presets::make<float>(config, rng);
  auto base = model;
  add_lora(model, "*.attention.*", rng, {.name = "a", .rank = 2, .alpha = 5.0, .dropout = 0.125});
  add_lora(model, "*.experts.1.*", rng, {.name = "a", .rank = 3, .alpha = 5.0, .dropout = 0.125});
  add_lora(model, "*.router.weight", rng, {.name = "a", .rank = 2, .alpha = 7.0, .dropout = 0.125});
  for (auto& [name, parameter] : parameters(model)) {
    if (matches_pattern("*.lora_B.*", name)) {
      parameter->value =
          test::random_matrix<float>(parameter->value.rows(), parameter->value.cols(), 3);
    }
  }
  const auto names = io::Family<presets::MixtralConfig>::names(config, nullptr);
  const test::Folder folder;
  io::save_peft(folder.path(), model, "a", names, "mistralai/Mixtral-8x7B-v0.1");
  const auto file = io::Safetensors::read((folder.path() / "adapter_model.safetensors").string());
  const std::string layer = "base_model.model.model.layers.0.";
  CHECK(file.tensor(layer + "self_attn.q_proj.lora_A.weight").shape == std::vector<Index>{2, 16});
  CHECK(file.has(layer + "block_sparse_moe.experts.1.w3.lora_B.weight"));
  CHECK(file.has(layer + "block_sparse_moe.gate.lora_B.weight"));
  CHECK_FALSE(file.has(layer + "block_sparse_moe.experts.0.w3.lora_B.weight"));

  set_storage(base, Storage::kPacked);
  CHECK(io::load_peft(folder.path(), base, "b", names) ==
        static_cast<Index>(file.tensors().size()) / 2);
  set_storage(base, Storage::kTrainable);
  const std::vector<Index> ids = {1, 2, 3, 4, 5};
  CHECK(infer(base, ids, {.adapters = "b"}) == infer(model, ids));
  CHECK(infer(base, ids, {.adapters = ""}) == infer(model, ids, {.adapters = ""}));
  CHECK(infer(base, ids) != infer(base, ids, {.adapters = ""}));

  const test::Folder again;
  io::save_peft(again.path(), base, "b", names, "mistralai/Mixtral-8x7B-v0.1");
  for (const char* const name : {"adapter_model.safetensors", "adapter_config.json"}) {
    CHECK(read(again.path() / name) == read(folder.path() / name));
  }

  merge_lora(base, "b");
  CHECK(test::message_of<ConfigError>([&] { io::save_peft(again.path(), base, "b", names); }) ==
        "save_peft: adapter 'b' of layers.0.attention.query is merged, expected unmerge_lora "
        "before");
  CHECK(test::message_of<ConfigError>([&] { io::save_peft(again.path(), base, "c", names); }) ==
        "save_peft: there is no adapter 'c'");
}

TEST_CASE("A weight that shares a published tensor with others cannot be saved in PEFT's layout",
          "[io]") {
  Linear<double> layer{Matrix<double>(Matrix<double>::Zero(3, 2))};
  const std::vector<presets::TensorName> names = {{"weight", "qkv.weight"},
                                                  {"other", "qkv.weight"}};
  Rng rng(1);
  add_lora(layer, "*", rng);
  const test::Folder folder;
  CHECK(test::message_of<ConfigError>(
            [&] { io::save_peft(folder.path(), layer, "default", names); }) ==
        "save_peft: the layout has no linear map of its own for weight, expected weights that are "
        "published as they are");
}

TEST_CASE("What is no plain LoRA, or does not fit, is refused and changes nothing", "[io]") {
  const test::Folder folder;
  TwoLinears model = two_linears();
  const auto message = [&](const std::string& config, const std::string& tensors) {
    write(folder.path() / "adapter_config.json", config);
    write(folder.path() / "adapter_model.safetensors", tensors);
    std::string text =
        test::message_of<io::FileError>([&] { io::load_peft(folder.path(), model, "mine"); });
    CHECK(model.q_proj.weight().adapters.empty());
    const std::string root = folder.path().string() + "/";
    while (text.find(root) != std::string::npos) text.erase(text.find(root), root.size());
    return text;
  };
  const std::string config = config_text(kPlain);
  const std::string tensors = tensors_text("q_proj");
  const auto with = [&](const std::string& from, const std::string& to) {
    std::string text = config;
    text.replace(text.find(from), from.size(), to);
    return text;
  };
  CHECK(message(with("\"use_dora\": false", "\"use_dora\": true"), tensors) ==
        "adapter_config.json: 'use_dora' is true, expected false");
  CHECK(message(with("\"LORA\"", "\"IA3\""), tensors) ==
        "adapter_config.json: 'peft_type' is \"IA3\", expected \"LORA\"");
  CHECK(message(with("\"none\"", "\"all\""), tensors) ==
        "adapter_config.json: 'bias' is \"all\", expected \"none\"");
  CHECK(message(with("\"modules_to_save\": null", "\"modules_to_save\": [\"x\"]"), tensors) ==
        "adapter_config.json: 'modules_to_save' is [\"x\"], expected none");
  CHECK(message(with("\"init_lora_weights\": true", "\"init_lora_weights\": \"pissa\""), tensors) ==
        "adapter_config.json: 'init_lora_weights' is \"pissa\", expected one that leaves the base "
        "as it is");
  CHECK(message(with("\"lora_dropout\": 0.25", "\"lora_dropout\": 1.0"), tensors) ==
        "adapter_config.json: 'lora_dropout' is 1.0, expected 0 <= lora_dropout < 1");
  CHECK(message(with("\"rank_pattern\": {}", "\"rank_pattern\": {\"^a$\": 1}"), tensors) ==
        "adapter_config.json: rank_pattern: '^a$' is a regular expression, expected the name of a "
        "module");
  CHECK(message(with("\"r\": 1", "\"r\": 2"), tensors) ==
        "adapter_model.safetensors: 'base_model.model.q_proj.lora_A.weight' is F32 [1, 2], "
        "expected real numbers [2, 2]; 'base_model.model.q_proj.lora_B.weight' is F32 [3, 1], "
        "expected real numbers [3, 2]");
  CHECK(message(with("\"r\": 1", "\"r\": 0"), tensors) ==
        "adapter_config.json: 'r' is 0, expected a number >= 1");
  for (const char* const alpha : {"0", "-2", "0.0"}) {
    const std::string is = std::string("\"lora_alpha\": ") + alpha;
    CHECK(message(with("\"lora_alpha\": 3", is), tensors) ==
          std::string("adapter_config.json: 'lora_alpha' is ") + alpha + ", expected a number > 0");
  }
  CHECK(message(with("\"alpha_pattern\": {}", "\"alpha_pattern\": {\"q_proj\": -1}"), tensors) ==
        "adapter_config.json: 'alpha_pattern' is {\"q_proj\":-1}, expected numbers > 0");
  CHECK(message(config, tensors_text("k_proj")) ==
        "adapter_model.safetensors: 'k_proj' is no linear map of the model; 'k_proj' is no linear "
        "map of the model");
  CHECK(message(config, tensors.substr(0, 30)).find("adapter_model.safetensors") == 0);
  CHECK(message("{", tensors).find("adapter_config.json: is not valid JSON") == 0);
  CHECK(test::message_of<ConfigError>([&] { io::load_peft(folder.path(), model, "a.b"); }) ==
        "load_peft: name = 'a.b', expected a name without '.', '*' and '/'");
}

}  // namespace weir::peft_test
