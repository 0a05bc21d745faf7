// SPDX-License-Identifier: MIT
#include <fstream>
#include <memory>
#include <nlohmann/json.hpp>
#include <string>
#include <vector>

#include <weir/io/load_tokenizer.hpp>

#include "io/folder.hpp"
#include "io/tokenizers.hpp"
#include "support/catch.hpp"
#include "support/matrices.hpp"

namespace weir::load_tokenizer_test {
using namespace weir::io;
using nlohmann::json;

namespace {

using Ids = std::vector<Index>;

/// A folder with a tokenizer.json and a tokenizer_config.json.
std::unique_ptr<Tokenizer> loaded(const json& file, const json& config) {
  const test::Folder folder;
  std::ofstream(folder.path() / "tokenizer.json") << file;
  std::ofstream(folder.path() / "tokenizer_config.json") << config;
  return load_tokenizer(folder.path());
}

std::string complaint(const json& config) {
  const std::string message =
      test::message_of<FileError>([&] { loaded(test::byte_level_json(), config); });
  const auto file = message.find("tokenizer_config.json");
  return file == std::string::npos ? message : message.substr(file);
}

}  // namespace

TEST_CASE("load_tokenizer reads the tokenizer.json of a folder", "[io][tokenizer]") {
  const test::Folder folder;
  const std::string path = folder.path().string();
  CHECK(test::message_of<FileError>([&] { load_tokenizer(path); }) ==
        path + ": has neither tokenizer.json nor tokenizer.model");
  std::ofstream(folder.path() / "tokenizer.json") << test::byte_level_json();
  std::ofstream(folder.path() / "tokenizer.model") << "not looked at";
  const auto tokenizer = load_tokenizer(path);
  CHECK(tokenizer->encode("the") == Ids{281, 260});
  CHECK(tokenizer->bos() == 281);
  CHECK(!tokenizer->eos());
}

TEST_CASE("load_tokenizer takes bos and eos from tokenizer_config.json", "[io][tokenizer]") {
  const auto tokenizer =
      loaded(test::byte_level_json(), {{"bos_token", nullptr},
                                       {"eos_token", {{"content", "<|end|>"}, {"lstrip", false}}},
                                       {"add_bos_token", false},
                                       {"tokenizer_class", "PreTrainedTokenizerFast"}});
  CHECK(tokenizer->bos() == 281);
  CHECK(tokenizer->eos() == 282);
  CHECK(tokenizer->encode("the") == Ids{281, 260});  // As its template says.

  CHECK(complaint(json::object({{"bos_token", "??"}})) ==
        R"(tokenizer_config.json: 'bos_token' is "??", expected a token of the vocabulary)");
  CHECK(complaint(json::object({{"eos_token", 7}})) ==
        "tokenizer_config.json: 'eos_token' is 7, expected a string");
}

TEST_CASE("load_tokenizer follows the settings of Llama's class rather than a template",
          "[io][tokenizer]") {
  const auto ids = [](const json& settings) {
    json config = {
        {"bos_token", "<s>"}, {"eos_token", "</s>"}, {"tokenizer_class", "LlamaTokenizer"}};
    config.update(settings);
    json file = test::character_json();
    file["post_processor"] = nullptr;
    return loaded(file, config)->encode("the");
  };
  CHECK(ids(json::object()) == Ids{1, 270});
  CHECK(ids(json::object({{"tokenizer_class", "LlamaTokenizerFast"}})) == Ids{1, 270});
  CHECK(ids(json::object({{"tokenizer_class", "GPT2Tokenizer"}})) == Ids{270});
  CHECK(ids(json::object({{"add_bos_token", false}})) == Ids{270});
  CHECK(ids(json::object({{"add_bos_token", false}, {"add_eos_token", true}})) == Ids{270, 2});
  CHECK(ids(json::object({{"add_bos_token", true}, {"add_eos_token", true}})) == Ids{1, 270, 2});

  json file = test::byte_level_json();
  file["post_processor"] = nullptr;
  CHECK(test::message_of<FileError>([&] {
          loaded(file, json::object({{"tokenizer_class", "LlamaTokenizer"}}));
        }).ends_with(": add_bos_token = true without such a token"));
}

}  // namespace weir::load_tokenizer_test
