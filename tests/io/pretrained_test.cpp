// SPDX-License-Identifier: MIT
#include <cstddef>
#include <cstdint>
#include <filesystem>
#include <fstream>
#include <map>
#include <nlohmann/json.hpp>
#include <set>
#include <string>
#include <sys/wait.h>
#include <unistd.h>
#include <vector>

#include <weir/io/pretrained.hpp>
#include <weir/presets/mixtral_8x7b.hpp>
#include <weir/presets/scaled.hpp>

#include "io/folder.hpp"
#include "support/allocations.hpp"
#include "support/catch.hpp"
#include "support/matrices.hpp"

namespace weir::io::pretrained_test {
namespace {

namespace fs = std::filesystem;

const std::vector<Index> kIds = {3, 1, 4, 1, 5, 9, 2, 6};

presets::MixtralConfig small() {
  return presets::scaled(presets::mixtral_8x7b());
}

Decoder<float> make_small(const presets::MixtralConfig& config) {
  Rng rng(7);
  return presets::make<float>(config, rng);
}

std::set<std::string> files_in(const fs::path& folder) {
  std::set<std::string> names;
  for (const auto& entry : fs::directory_iterator(folder)) {
    names.insert(entry.path().filename().string());
  }
  return names;
}

TEST_CASE("A saved model is loaded again, in one file or several", "[io][pretrained]") {
  const test::Folder folder;
  Decoder<float> model = make_small(small());
  const Matrix<float> expected = infer(model, kIds);
  const std::string one = "model.safetensors";

  save_pretrained(folder.path(), model, small());
  CHECK(files_in(folder.path()) == std::set<std::string>{"config.json", one});
  CHECK(infer(load_pretrained<float>(folder.path()).model, kIds) == expected);

  // The parts replace the whole, and the whole replaces the parts' index.
  save_pretrained(folder.path(), model, small(), {.shard_bytes = 60'000});
  const auto parts = files_in(folder.path());
  CHECK(parts.size() > 4);
  CHECK_FALSE(parts.contains(one));
  CHECK(parts.contains("model.safetensors.index.json"));
  for (const auto& name : parts) {
    if (name.ends_with(".safetensors")) CHECK(fs::file_size(folder.path() / name) < 80'000);
  }
  CHECK(infer(load_pretrained<float>(folder.path()).model, kIds) == expected);

  save_pretrained(folder.path(), model, small());
  CHECK_FALSE(files_in(folder.path()).contains("model.safetensors.index.json"));
  CHECK(infer(load_pretrained<float>(folder.path()).model, kIds) == expected);

  // Texts in the headers are kept.
  save_pretrained(folder.path(), model, small(), {.metadata = {{"licence", "MIT"}}});
  CHECK(load_pretrained<float>(folder.path()).metadata ==
        std::map<std::string, std::string>{{"format", "pt"}, {"licence", "MIT"}});

  // A file for each tensor.
  save_pretrained(folder.path(), model, small(), {.shard_bytes = 1});
  CHECK(infer(load_pretrained<float>(folder.path()).model, kIds) == expected);
}

TEST_CASE("Numbers are stored as asked for", "[io][pretrained]") {
  const test::Folder folder;
  Decoder<float> model = make_small(small());
  set_storage(model, Storage::kBfloat16);  // Rounds them,
  set_storage(model, Storage::kTrainable);
  const auto size_with = [&](Dtype dtype) {
    save_pretrained(folder.path(), model, small(), {.dtype = dtype});
    return static_cast<double>(fs::file_size(folder.path() / "model.safetensors"));
  };
  const double whole = size_with(Dtype::kF32);
  CHECK(infer(load_pretrained<double>(folder.path()).model, kIds)
            .cast<float>()
            .isApprox(infer(model, kIds), 1e-4F));
  CHECK(size_with(Dtype::kF64) > 1.9 * whole);
  CHECK(infer(load_pretrained<float>(folder.path()).model, kIds) == infer(model, kIds));
  CHECK(size_with(Dtype::kBF16) < 0.6 * whole);
  // so that those that are stored lose nothing here; the embedding, the router and norms do.
  CHECK(
      infer(load_pretrained<float>(folder.path()).model, kIds).isApprox(infer(model, kIds), 0.02F));
  CHECK(size_with(Dtype::kF16) < 0.6 * whole);
  CHECK_THROWS_WITH(size_with(Dtype::kI8),
                    "write_safetensors: dtype = I8, expected F64, F32, F16 or BF16");
}

TEST_CASE("A model is loaded into its storage", "[io][pretrained]") {
  const test::Folder folder;
  Decoder<float> model = make_small(small());
  save_pretrained(folder.path(), model, small());
  for (const Storage storage :
       {Storage::kPacked, Storage::kBfloat16, Storage::kInt8, Storage::kInt4, Storage::kFp8,
        Storage::kMxFp4, Storage::kInt8Dot}) {
    auto loaded = load_pretrained<float>(folder.path(), {.storage = storage});
    CHECK_FALSE(is_trainable(loaded.model));
    Decoder<float> stored = model;
    set_storage(stored, storage);
    CHECK(infer(loaded.model, kIds) == infer(stored, kIds));
    CHECK_THROWS_WITH(
        save_pretrained(folder.path() / "other", loaded.model, small()),
        "save_pretrained: weights are stored for inference, expected set_storage(model, "
        "Storage::kTrainable) before");
    CHECK_FALSE(fs::exists(folder.path() / "other"));
  }
}

TEST_CASE("A model is loaded into the storages of its parts", "[io][pretrained]") {
  const test::Folder folder;
  Decoder<float> model = make_small(small());
  save_pretrained(folder.path(), model, small());
  const StorageRules rules = {{"*.experts", Storage::kInt4},
                              {"*.attention", Storage::kInt8},
                              {"head", Storage::kTrainable}};
  auto loaded =
      load_pretrained<float>(folder.path(), {.storage = Storage::kBfloat16, .rules = rules});
  StorageRules all = rules;
  all.push_back({"*", Storage::kBfloat16});
  set_storage(model, all);
  CHECK(infer(loaded.model, kIds) == infer(model, kIds));
  CHECK(parameters(loaded.model).size() == parameters(model).size());
  CHECK_THROWS_WITH(load_pretrained<float>(folder.path(), {.rules = {{"experts", Storage::kInt4}}}),
                    "load_pretrained: no part matches 'experts', expected at least one");
}

/// The most memory this process has had so far, in bytes.
std::size_t peak_memory() {
  std::ifstream status("/proc/self/status");
  std::string word;
  while (status >> word) {
    if (word == "VmHWM:") {
      std::size_t kilobytes = 0;
      status >> kilobytes;
      return kilobytes << 10U;
    }
  }
  return 0;
}

TEST_CASE("Loading takes the memory of the model alone", "[io][pretrained][slow]") {
  if (!test::allocations_are_counted() || peak_memory() == 0) return;  // Not with a sanitizer.
  const test::Folder folder;
  const presets::MixtralConfig config =
      presets::scaled(presets::mixtral_8x7b(), {.d_model = 256, .layers = 6, .experts = 8});
  const auto save = [&] {
    Decoder<float> model = make_small(config);
    save_pretrained(folder.path(), model, config, {.dtype = Dtype::kBF16});
  };
  const auto in_child = [](auto&& f) {
    const pid_t child = ::fork();
    if (child == 0) ::_exit(f());
    int status = 0;
    ::waitpid(child, &status, 0);
    return WIFEXITED(status) ? WEXITSTATUS(status) : -1;
  };
  // Not here, where memory that is free again would be touched already.
  REQUIRE(in_child([&] {
            save();
            return 0;
          }) == 0);
  const auto stored = fs::file_size(folder.path() / "model.safetensors");
  CHECK(stored > std::size_t{20} << 20U);
  CHECK(in_child([&] {
          const std::size_t before = peak_memory();
          const auto loaded =
              load_pretrained<float>(folder.path(), {.storage = Storage::kBfloat16});
          const std::size_t grown = peak_memory() - before;
          // Of one layer of the six, the pages of the file are there too; as floats it would be a
          // third of the six.
          const auto most = (1.0 + 1.0 / 6.0 + 0.2) * static_cast<double>(stored);
          return static_cast<double>(grown) < most ? 0 : static_cast<int>(grown >> 20U);
        }) == 0);
}

TEST_CASE("A folder without a model is refused", "[io][pretrained]") {
  const test::Folder folder;
  const std::string dir = folder.path().string();
  const auto said = [&] {
    try {
      load_pretrained<float>(folder.path());
    } catch (const FileError& error) {
      return std::string(error.what()).substr(dir.size());
    }
    return std::string();
  };
  CHECK(said() == "/config.json: cannot be opened: No such file or directory");
  const auto config_is = [&](const std::string& text) {
    std::ofstream(folder.path() / "config.json") << text;
    return said();
  };
  CHECK(config_is("").starts_with("/config.json: is not valid JSON: "));
  CHECK(config_is("[]") == "/config.json: is not a JSON object");
  CHECK(config_is("{}") == "/config.json: has no 'model_type'");
  CHECK(config_is(R"({"model_type":"nobody"})") ==
        "/config.json: 'model_type' is \"nobody\", expected a family that weir knows, see "
        "io/model_config.hpp");
  Decoder<float> model = make_small(small());
  save_pretrained(folder.path(), model, small());
  nlohmann::json config = nlohmann::json::parse(std::ifstream(folder.path() / "config.json"));
  const auto with = [&](const char* setting, std::int64_t value) {
    nlohmann::json changed = config;
    changed[setting] = value;
    return config_is(changed.dump());
  };
  // Absurd sizes are refused before memory is asked for.
  CHECK(with("num_hidden_layers", std::int64_t{1} << 40) ==
        "/config.json: asks for 1099511627776 layers, " + dir + " has 41 tensors");
  for (const char* const setting : {"hidden_size", "vocab_size", "num_local_experts",
                                    "intermediate_size", "num_attention_heads"}) {
    INFO(setting);
    CHECK(with(setting, std::int64_t{1} << 60).starts_with("/config.json: asks for at least "));
  }
  fs::remove(folder.path() / "model.safetensors");
  CHECK(config_is(config.dump()) ==
        ": has neither model.safetensors nor model.safetensors.index.json");
  CHECK_THROWS_WITH(save_pretrained(folder.path(), model, small(), {.shard_bytes = 0}),
                    "save_pretrained: shard_bytes = 0, expected >= 1");
}

}  // namespace
}  // namespace weir::io::pretrained_test
