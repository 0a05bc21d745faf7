// SPDX-License-Identifier: MIT
#include <algorithm>
#include <cstdint>
#include <filesystem>
#include <functional>
#include <map>
#include <string>
#include <string_view>
#include <type_traits>
#include <utility>
#include <variant>
#include <vector>

#include <weir/core/storage.hpp>
#include <weir/io/gguf_model.hpp>

#include "io/folder.hpp"
#include "io/gguf_models.hpp"
#include "support/catch.hpp"
#include "support/matrices.hpp"

namespace weir::io::gguf_model_test {
namespace {

const std::vector<Index> kIds = {3, 1, 4, 1, 5, 9, 2, 6, 5, 3, 5, 8};

/// All numbers of a model.
std::map<std::string, Matrix<float>> numbers_of(Decoder<float>& model) {
  std::map<std::string, Matrix<float>> numbers;
  for (const auto& [name, matrix] : tensors_of("test", model)) numbers[name] = *matrix;
  return numbers;
}

TEST_CASE("Models of all architectures come back from GGUF files to the bit", "[io][gguf]") {
  const test::Folder folder;
  const auto path = folder.path() / "a.gguf";
  test::for_each_gguf_model([&](const char* name, const auto& config) {
    INFO(name);
    using Config = std::decay_t<decltype(config)>;
    Decoder<float> model = test::random_gguf_model(config);
    save_gguf(path, model, config);
    auto loaded = load_gguf(path);
    REQUIRE(std::holds_alternative<Config>(loaded.config));
    const Config& own = std::get<Config>(loaded.config);
    CHECK(detail::are_same(own.shape, config.shape));
    CHECK(own.norm_epsilon == config.norm_epsilon);
    CHECK((numbers_of(loaded.model) == numbers_of(model)));
    CHECK((infer(loaded.model, kIds) == infer(model, kIds)));
  });
}

/// Kinds of tensors by name, of a file with a model of `config`.
template <class Config>
std::map<std::string, std::pair<std::string, std::vector<Index>>> saved(
    const Config& config, const SaveGgufConfig& how = {}) {
  const test::Folder folder;
  Decoder<float> model = test::random_gguf_model(config);
  save_gguf(folder.path() / "a.gguf", model, config, how);
  std::map<std::string, std::pair<std::string, std::vector<Index>>> kinds;
  const Gguf file = Gguf::read((folder.path() / "a.gguf").string());
  for (const auto& [name, tensor] : file.tensors()) {
    kinds[std::string(name)] = {std::string(name_of(tensor.type)), tensor.shape};
  }
  return kinds;
}

TEST_CASE("Weights are stored in the kind asked for, small tensors in F32", "[io][gguf]") {
  presets::MixtralConfig config = presets::scaled(presets::mixtral_8x7b(), {.d_model = 64});
  config.shape.d_hidden = 40;  // No multiple of Q8_0's blocks.
  const auto kinds = saved(config, {.dtype = GgufType::kQ8_0});
  using Kind = std::pair<std::string, std::vector<Index>>;
  CHECK(kinds.at("token_embd.weight") == Kind("Q8_0", {256, 64}));
  CHECK(kinds.at("output.weight") == Kind("Q8_0", {256, 64}));
  CHECK(kinds.at("output_norm.weight") == Kind("F32", {64}));
  CHECK(kinds.at("blk.1.attn_norm.weight") == Kind("F32", {64}));
  CHECK(kinds.at("blk.1.attn_q.weight") == Kind("Q8_0", {64, 64}));
  CHECK(kinds.at("blk.1.attn_k.weight") == Kind("Q8_0", {16, 64}));
  CHECK(kinds.at("blk.1.ffn_gate_inp.weight") == Kind("F32", {4, 64}));
  CHECK(kinds.at("blk.1.ffn_gate_exps.weight") == Kind("Q8_0", {4, 40, 64}));
  CHECK(kinds.at("blk.1.ffn_up_exps.weight") == Kind("Q8_0", {4, 40, 64}));
  CHECK(kinds.at("blk.1.ffn_down_exps.weight") == Kind("F16", {4, 64, 40}));
  CHECK(kinds.size() == 3 + 2 * 10);
}

TEST_CASE("The numbers of a file are where llama.cpp looks for them", "[io][gguf]") {
  const test::Folder folder;
  const std::string path = (folder.path() / "a.gguf").string();
  const auto check = [&](const auto& config, bool has_pairs) {
    Decoder<float> model = test::random_gguf_model(config);
    const auto numbers = numbers_of(model);
    save_gguf(path, model, config);
    const Gguf file = Gguf::read(path);
    const auto row_of = [&](const std::string& tensor, Index row) {
      const std::vector<double> all = file.numbers(tensor);
      return Eigen::Map<const Matrix<double>>(all.data(), static_cast<Index>(all.size()) / 32, 32)
          .row(row)
          .template cast<float>()
          .eval();
    };
    const Index half = std::get<GroupedQueryConfig>(config.shape.attention).head_dim / 2;
    REQUIRE(half > 1);
    for (const auto& [ours, theirs] :
         {std::pair("layers.0.attention.query", "blk.0.attn_q.weight"),
          std::pair("layers.0.attention.key", "blk.0.attn_k.weight")}) {
      const Matrix<float>& matrix = numbers.at(ours);
      CHECK(row_of(theirs, 1) == matrix.row(has_pairs ? half : 1));
      CHECK(row_of(theirs, 2 * half) == matrix.row(2 * half));  // The second head's first.
    }
    CHECK(row_of("blk.0.attn_v.weight", 1) == numbers.at("layers.0.attention.value").row(1));
    const Index hidden = config.shape.d_hidden;
    for (const std::string part : {"gate", "up"}) {
      CHECK(row_of("blk.1.ffn_" + part + "_exps.weight", hidden + 2) ==
            numbers.at("layers.1.moe.experts.1." + part).row(2));
    }
  };
  check(presets::scaled(presets::mixtral_8x7b()), true);
  check(presets::scaled(presets::qwen3_30b_a3b()), false);
}

TEST_CASE("Latent attention stands in GGUF files head by head", "[io][gguf]") {
  const presets::DeepSeekV3Config config =
      presets::scaled(test::gguf_deepseek_v3(), test::kGgufScale);
  const auto& latent = std::get<LatentConfig>(config.shape.attention);
  const auto kinds = saved(config, {.dtype = GgufType::kBF16});
  CHECK(kinds.at("blk.0.attn_k_b.weight").second ==
        std::vector<Index>{latent.heads, latent.kv_rank, latent.nope_dim});
  CHECK(kinds.at("blk.0.attn_v_b.weight").second ==
        std::vector<Index>{latent.heads, latent.value_dim, latent.kv_rank});
  CHECK(kinds.at("blk.1.exp_probs_b.bias").first == "F32");
  CHECK(kinds.at("blk.1.ffn_down_shexp.weight").first == "BF16");
  CHECK(kinds.contains("blk.0.ffn_down.weight"));
}

TEST_CASE("Loading rounds as the file does, and stores as asked for", "[io][gguf]") {
  const test::Folder folder;
  const auto path = folder.path() / "a.gguf";
  const presets::Qwen3Config config = presets::scaled(presets::qwen3_30b_a3b(), {.d_model = 64});
  Decoder<float> model = test::random_gguf_model(config);
  const Matrix<float> exact = infer(model, kIds);
  const auto error_with = [&](GgufType dtype) {
    save_gguf(path, model, config, {.dtype = dtype});
    return test::relative_error(infer(load_gguf_family<presets::Qwen3Config>(path).model, kIds),
                                exact);
  };
  CHECK(error_with(GgufType::kF16) < 0.005);
  CHECK(error_with(GgufType::kBF16) < 0.04);
  CHECK(error_with(GgufType::kQ8_0) < 0.04);
  save_gguf(path, model, config);
  set_storage(model, Storage::kBfloat16);
  const Matrix<float> rounded = infer(model, kIds);
  CHECK(infer(load_gguf_family<presets::Qwen3Config>(path, {.storage = Storage::kBfloat16}).model,
              kIds) == rounded);
  CHECK_THROWS_WITH(save_gguf(path, model, config),
                    "save_gguf: weights are stored for inference, expected set_storage(model, "
                    "Storage::kTrainable) before");
  // Experts that stay in the file, two of them in memory.
  const auto streamed = load_gguf_family<presets::Qwen3Config>(
      path, {.storage = Storage::kBfloat16, .expert_bytes = 40'000});
  CHECK(infer(streamed.model, kIds) == rounded);
  CHECK(streamed.experts->statistics().misses > 0);
}

TEST_CASE("Blocks of codes are read into every storage", "[io][gguf]") {
  const test::Folder folder;
  const auto path = folder.path() / "a.gguf";
  const presets::MixtralConfig config = presets::scaled(presets::mixtral_8x7b(), {.d_model = 64});
  Decoder<float> model = test::random_gguf_model(config);
  save_gguf(path, model, config, {.dtype = GgufType::kQ8_0});
  for (const Storage storage : {Storage::kPacked, Storage::kBfloat16}) {
    auto stored = load_gguf_family<presets::MixtralConfig>(path).model;
    set_storage(stored, storage);
    const Matrix<float> expected = infer(stored, kIds);
    const auto loaded = load_gguf_family<presets::MixtralConfig>(path, {.storage = storage});
    CHECK((infer(loaded.model, kIds) == expected));
    const auto streamed = load_gguf_family<presets::MixtralConfig>(
        path, {.storage = storage, .expert_bytes = 200'000});
    CHECK((infer(streamed.model, kIds) == expected));
  }
}

/// Writes a file of these names and settings.
template <class Config>
void write_as(const std::filesystem::path& path, Decoder<float>& model, const Config& config,
              const std::vector<presets::TensorName>& names, const GgufMetadata& metadata) {
  const auto tensors = tensors_of("test", model);
  write_gguf_model<float>(
      path, metadata, published_layout(names, shapes_of(tensors), detail::head_sizes(config.shape)),
      {}, GgufType::kF32, [&](const PublishedTensor& tensor, std::vector<float>& numbers) {
        gather_tensor(tensors, tensor, numbers);
      });
}

TEST_CASE("Queries, keys and values may be one tensor", "[io][gguf]") {
  const test::Folder folder;
  const auto path = folder.path() / "a.gguf";
  const auto config = presets::scaled(presets::qwen1_5_moe_a2_7b(), test::kGgufScale);
  Decoder<float> model = test::random_gguf_model(config);
  write_as(path, model, config,
           presets::join_names({presets::kGgufJoinedQkvNames, presets::kGgufNames}),
           gguf_metadata(config, {}));
  CHECK(Gguf::read(path.string()).has_tensor("blk.1.attn_qkv.bias"));
  CHECK((infer(load_gguf_family<presets::Qwen2MoeConfig>(path).model, kIds) == infer(model, kIds)));
}

TEST_CASE("Older files of latent attention are read", "[io][gguf]") {
  const test::Folder folder;
  const auto path = folder.path() / "a.gguf";
  const auto config = presets::scaled(test::gguf_deepseek_v2(), test::kGgufScale);
  const auto& latent = std::get<LatentConfig>(config.shape.attention);
  Decoder<float> model = test::random_gguf_model(config);
  const Matrix<float> expected = infer(model, kIds);
  save_gguf(path, model, config);
  GgufMetadata metadata;
  {
    const Gguf file = Gguf::read(path.string());
    for (const auto& [key, value] : file.metadata()) {
      const bool has_changed = key.find("_length_mla") != std::string_view::npos ||
                               key == "deepseek2.attention.key_length" ||
                               key == "deepseek2.attention.value_length" ||
                               key == "deepseek2.attention.head_count_kv";
      if (!has_changed) metadata.add_copy(key, value);
    }
  }
  const auto as_u32 = [](Index size) { return static_cast<std::uint32_t>(size); };
  metadata.add_u32("deepseek2.attention.key_length", as_u32(latent.query_dim()));
  metadata.add_u32("deepseek2.attention.value_length", as_u32(latent.value_dim));
  metadata.add_u32("deepseek2.attention.head_count_kv", as_u32(latent.heads));
  write_as(path, model, config,
           presets::join_names({presets::kLatentGgufNames, presets::kLatentGgufQueryNames,
                                presets::kLatentOldGgufUpNames, detail::kGgufJoinedExpertNames,
                                presets::kGgufNames}),
           metadata);
  CHECK(Gguf::read(path.string()).has_tensor("blk.1.ffn_gate_up_exps.weight"));
  CHECK((infer(load_gguf_family<presets::DeepSeekV2Config>(path).model, kIds) == expected));
}

TEST_CASE("GLM-4.5's module of multi-token prediction is the last layer of a file", "[io][gguf]") {
  const test::Folder folder;
  const auto path = folder.path() / "a.gguf";
  presets::Glm4MoeConfig config = test::gguf_glm(presets::glm_4_5());
  Decoder<float> model = test::random_gguf_model(config);
  GgufMetadata metadata;
  save_gguf(path, model, config);
  {
    const Gguf file = Gguf::read(path.string());
    for (const auto& [key, value] : file.metadata()) {
      if (key != "glm4moe.block_count") metadata.add_copy(key, value);
    }
  }
  metadata.add_u32("glm4moe.block_count", static_cast<std::uint32_t>(config.shape.layers + 1));
  metadata.add_u32("glm4moe.nextn_predict_layers", 1);
  config.shape.prediction_modules = 1;
  Rng rng(9);
  MultiToken<float> module = presets::make_prediction<float>(config, rng);
  const auto tensors = detail::all_tensors("test", model, &module);
  write_gguf_model<float>(
      path, metadata,
      published_layout(GgufFamily<presets::Glm4MoeConfig>::names(config, nullptr),
                       shapes_of(tensors), detail::head_sizes(config.shape)),
      {}, GgufType::kF32, [&](const PublishedTensor& tensor, std::vector<float>& numbers) {
        gather_tensor(tensors, tensor, numbers);
      });
  CHECK(Gguf::read(path.string()).has_tensor("blk.2.nextn.eh_proj.weight"));
  auto loaded = load_gguf_family<presets::Glm4MoeConfig>(path);
  CHECK(std::get<presets::Glm4MoeConfig>(loaded.config).shape.layers == config.shape.layers);
  REQUIRE(loaded.prediction);
  CHECK((infer(loaded.model, kIds) == infer(model, kIds)));
  for (const auto& [name, matrix] : tensors_of("test", *loaded.prediction)) {
    INFO(name);
    bool found = false;
    for (const auto& [own, numbers] : tensors_of("test", module)) {
      found = found || (own == name && *numbers == *matrix);
    }
    CHECK(found);
  }
}

TEST_CASE("A file of Phi-3.5-MoE is read as the published model", "[io][gguf]") {
  const test::Folder folder;
  const auto path = folder.path() / "a.gguf";
  const presets::PhiMoeConfig config = test::gguf_phi(8, 16);
  Decoder<float> model = test::random_gguf_model(config);
  test::write_gguf_phi(path, model, config);
  auto loaded = load_gguf(path);
  const auto& own = std::get<presets::PhiMoeConfig>(loaded.config);
  CHECK(presets::settled(own.shape) == presets::settled(config.shape));
  CHECK((numbers_of(loaded.model) == numbers_of(model)));
  CHECK((infer(loaded.model, kIds) == infer(model, kIds)));
  // For texts that are no longer than the training's.
  const auto near = load_gguf_family<presets::PhiMoeConfig>(path, {.longest_text = 8});
  const auto& scaling = std::get<LongRopeScaling>(
      std::get<GroupedQueryConfig>(std::get<presets::PhiMoeConfig>(near.config).shape.attention)
          .rope_scaling);
  CHECK(scaling.length == 8);
  CHECK(infer(near.model, kIds) != infer(model, kIds));
}

TEST_CASE("What a file has no place for is not left out", "[io][gguf]") {
  const test::Folder folder;
  const presets::Llama4Config config = test::gguf_llama4();
  Decoder<float> model = test::random_gguf_model(config);
  buffers(model)[0].buffer->value.setOnes();
  CHECK_THROWS_WITH(save_gguf(folder.path() / "a.gguf", model, config),
                    "save_gguf: 'layers.0.moe.selector.bias' is not zero, and the family's files "
                    "have no place for it");
}

TEST_CASE("A tokenizer goes from file to file", "[io][gguf]") {
  const test::Folder folder;
  GgufMetadata metadata;
  metadata.add_text("general.architecture", "none");
  metadata.add_text("tokenizer.ggml.model", "gpt2");
  metadata.add_texts("tokenizer.ggml.tokens", {"a", "b", "ab"});
  metadata.add_u32("tokenizer.ggml.eos_token_id", 2);
  write_gguf<float>(folder.path() / "t.gguf", metadata, {});
  const Gguf tokenizer = Gguf::read((folder.path() / "t.gguf").string());
  presets::MixtralConfig config = presets::scaled(presets::mixtral_8x7b(), {.vocab = 3});
  Decoder<float> model = test::random_gguf_model(config);
  const auto path = folder.path() / "a.gguf";
  save_gguf(path, model, config, {.tokenizer = &tokenizer});
  const Gguf file = Gguf::read(path.string());
  CHECK(file.text("tokenizer.ggml.model") == "gpt2");
  CHECK(file.texts("tokenizer.ggml.tokens").size() == 3);
  CHECK(file.integer("tokenizer.ggml.eos_token_id") == 2);
  const std::vector<Index> ids = {0, 1, 2};
  CHECK(infer(load_gguf_family<presets::MixtralConfig>(path).model, ids) == infer(model, ids));
  config.shape.vocab = 4;
  CHECK_THROWS_WITH(
      save_gguf(path, model, config, {.tokenizer = &tokenizer}),
      "save_gguf: the tokenizer of " + tokenizer.path() + " has 3 tokens, expected vocab = 4");
}

TEST_CASE("Families without an architecture of GGUF are named", "[io][gguf]") {
  const presets::DeepSeekMoEConfig config = presets::scaled(presets::deepseek_moe_16b());
  Rng rng(1);
  Decoder<float> model = presets::make<float>(config, rng);
  CHECK_THROWS_WITH(save_gguf("a.gguf", model, ModelConfig(config)),
                    "save_gguf: weir knows no architecture of GGUF for deepseek");
}

TEST_CASE("Tensors that are missing, unknown or of another shape are named", "[io][gguf]") {
  const test::Folder folder;
  const std::string path = (folder.path() / "a.gguf").string();
  const presets::MixtralConfig config = presets::scaled(presets::mixtral_8x7b());
  Decoder<float> model = test::random_gguf_model(config);
  // `change` has the sources of a good file.
  const auto fault_after = [&](const std::function<void(std::vector<GgufSource<float>>&)>& change) {
    std::vector<GgufSource<float>> sources;
    const auto tensors = tensors_of("test", model);
    const auto layout = published_layout(GgufFamily<presets::MixtralConfig>::names(config, nullptr),
                                         shapes_of(tensors), detail::head_sizes(config.shape));
    for (const PublishedTensor& tensor : layout) {
      const Index cols = tensor.shape.back();
      sources.push_back(
          {tensor.name, tensor.shape, GgufType::kF32,
           [cols](Index, Index count, float* to) { std::fill_n(to, count * cols, 0.0F); }});
    }
    change(sources);
    write_gguf<float>(path, gguf_metadata(config, {}), sources);
    return test::message_of<FileError>([&] { load_gguf_family<presets::MixtralConfig>(path); });
  };
  const auto find = [](std::vector<GgufSource<float>>& all, const std::string& name) {
    return std::find_if(all.begin(), all.end(), [&](const auto& own) { return own.name == name; });
  };
  CHECK(fault_after([](auto&) {}) == "no exception");
  CHECK(fault_after([&](auto& all) { all.erase(find(all, "blk.1.attn_k.weight")); }) ==
        path + ": 'blk.1.attn_k.weight' is missing");
  CHECK(fault_after([&](auto& all) { find(all, "blk.1.ffn_norm.weight")->shape = {64}; }) ==
        path + ": 'blk.1.ffn_norm.weight' is [64], expected [32]");
  CHECK(fault_after([&](auto& all) { find(all, "blk.1.ffn_norm.weight")->name = "x"; }) ==
        path + ": 'blk.1.ffn_norm.weight' is missing; 'x' is not in the model");
  CHECK(fault_after([&](auto& all) { all.erase(find(all, "token_embd.weight")); }) ==
        path + ": tensor 'token_embd.weight' is missing");
}

}  // namespace
}  // namespace weir::io::gguf_model_test
