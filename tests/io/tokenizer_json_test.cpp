// SPDX-License-Identifier: MIT
#include <cstddef>
#include <functional>
#include <nlohmann/json.hpp>
#include <string>

#include <weir/io/bpe_tokenizer.hpp>

#include "io/tokenizers.hpp"
#include "support/catch.hpp"
#include "support/matrices.hpp"

namespace weir::tokenizer_json_test {
using namespace weir::io;
using nlohmann::json;

namespace {

/// What the reader says about a file with this content.
std::string complaint(const std::string& content) {
  return test::message_of<FileError>([&] { BpeTokenizer("f", content); });
}

/// What it says about a file that `change` has changed.
std::string complaint(json file, const std::function<void(json&)>& change) {
  change(file);
  return complaint(file.dump());
}

std::string on_bytes(const std::function<void(json&)>& change) {
  return complaint(test::byte_level_json(), change);
}

std::string on_characters(const std::function<void(json&)>& change) {
  return complaint(test::character_json(), change);
}

}  // namespace

TEST_CASE("BpeTokenizer refuses what is not the JSON of an object", "[io][tokenizer]") {
  CHECK(on_bytes([](json&) {}) == "no exception");
  CHECK(on_characters([](json&) {}) == "no exception");
  CHECK(complaint("").starts_with("f: is not valid JSON: "));
  CHECK(complaint("{\"a\": \"\xFF\"}").starts_with("f: is not valid JSON: "));
  CHECK(complaint("[]") == "f: is not a JSON object");
  CHECK(complaint("{}") == "f: has no 'model'");
  CHECK(complaint(R"({"a": 1, "a": 2})") == "f: 'a' is there twice");
  CHECK(complaint(R"({"model": {"vocab": {"x": 1, "y": 2, "x": 3}}})") == "f: 'x' is there twice");
  CHECK(complaint("{\"a\": " + std::string(100'000, '[')) == "f: is nested too deeply");
  CHECK(complaint(R"({"model": 7})") == "f: 'model' is not an object");
}

TEST_CASE("BpeTokenizer refuses by name what it does not know", "[io][tokenizer]") {
  CHECK(on_bytes([](json& file) {
          file["truncation"] = {{"max_length", 512}};
        }) == R"(f: 'truncation' is {"max_length":512}, expected null)");
  CHECK(on_bytes([](json& file) { file["padding"] = 1; }) == "f: 'padding' is 1, expected null");
  CHECK(on_bytes([](json& file) { file["surprise"] = 1; }) ==
        "f: 'surprise' is 1, expected it not to be there: weir does not know what it changes");
  CHECK(on_bytes([](json& file) { file["model"]["type"] = "Unigram"; }) ==
        R"(f: model: 'type' is "Unigram", expected "BPE")");
  CHECK(on_bytes([](json& file) { file["model"]["dropout"] = 0.1; }) ==
        "f: model: 'dropout' is 0.1, expected 0");
  CHECK(on_bytes([](json& file) { file["model"]["end_of_word_suffix"] = "</w>"; }) ==
        R"(f: model: 'end_of_word_suffix' is "</w>", expected "")");
  CHECK(on_bytes([](json& file) { file["model"]["continuing_subword_prefix"] = "##"; }) ==
        R"(f: model: 'continuing_subword_prefix' is "##", expected "")");
  CHECK(on_bytes([](json& file) { file["model"]["ignore_merges"] = 1; }) ==
        "f: model: 'ignore_merges' is 1, expected true or false");
  CHECK(on_bytes([](json& file) {
          file["model"]["more"] = true;
        }).starts_with("f: model: 'more' is true, expected it not to be there"));
  CHECK(on_characters([](json& file) { file["model"]["byte_fallback"] = false; }) ==
        "f: model: has neither ByteLevel nor byte_fallback = true, expected one of them");
}

TEST_CASE("BpeTokenizer refuses steps that it does not know", "[io][tokenizer]") {
  CHECK(on_bytes([](json& file) {
          file["normalizer"] = {{"type", "Lowercase"}};
        }) ==
        R"(f: normalizer: 'type' is "Lowercase", expected NFC, Prepend, Replace or Sequence)");
  CHECK(
      on_bytes([](json& file) {
        file["normalizer"] = {{"type", "Replace"}, {"pattern", {{"Regex", "a"}}}, {"content", "b"}};
      }) == "f: normalizer: pattern: has no 'String'");
  CHECK(
      on_bytes([](json& file) {
        file["normalizer"] = {{"type", "Replace"}, {"pattern", {{"String", ""}}}, {"content", "b"}};
      }) ==
      R"(f: normalizer: pattern: 'String' is "", expected at least one character, none of them NUL)");
  CHECK(on_bytes([](json& file) {
          file["pre_tokenizer"] = {{"type", "Whitespace"}};
        }) == R"(f: pre_tokenizer: 'type' is "Whitespace", )"
              "expected ByteLevel, Digits, Metaspace, Sequence or Split");
  CHECK(on_bytes([](json& file) {
          file["pre_tokenizer"]["pretokenizers"][0]["behavior"] = "MergedWithNext";
        }) == R"(f: pre_tokenizer: pretokenizers: 'behavior' is "MergedWithNext", )"
              "expected Isolated or Removed");
  CHECK(on_bytes([](json& file) {
          file["pre_tokenizer"]["pretokenizers"][0]["pattern"] = {{"Regex", "\\w"}};
        }) == R"(f: pre_tokenizer: pretokenizers: the regular expression '\w' uses \w, )"
              "which weir does not know");
  CHECK(on_bytes([](json& file) {
          file["pre_tokenizer"]["pretokenizers"].push_back({{"type", "Digits"}});
        }) == R"(f: pre_tokenizer: pretokenizers: 'type' is "Digits", )"
              "expected ByteLevel to be the last step");
  const std::string not_first = R"(f: pre_tokenizer: pretokenizers: 'type' is "ByteLevel", )"
                                "expected add_prefix_space = false where it is not the first step";
  CHECK(on_bytes([](json& file) {
          file["pre_tokenizer"]["pretokenizers"][1]["add_prefix_space"] = true;
        }) == not_first);
  CHECK(on_bytes([](json& file) {
          file["pre_tokenizer"]["pretokenizers"][1].erase("add_prefix_space");
        }) == not_first);
  CHECK(on_bytes([](json& file) {
          for (int i = 0; i < 32; ++i) {
            auto& steps = file["pre_tokenizer"]["pretokenizers"];
            steps.insert(steps.begin(), json{{"type", "Digits"}});
          }
        }).ends_with("expected at most 32 of them"));
  CHECK(on_characters([](json& file) {
          file["pre_tokenizer"] = {{"type", "Metaspace"}, {"replacement", "_"}, {"split", true}};
        }) == "f: pre_tokenizer: 'split' is true, expected false");
  CHECK(on_characters([](json& file) {
          file["pre_tokenizer"] = {{"type", "Metaspace"},
                                   {"replacement", "_"},
                                   {"split", false},
                                   {"prepend_scheme", "last"}};
        }) == R"(f: pre_tokenizer: 'prepend_scheme' is "last", expected always, first or never)");
  CHECK(on_bytes([](json& file) { file["post_processor"]["type"] = "BertProcessing"; }) ==
        R"(f: post_processor: 'type' is "BertProcessing", )"
        "expected ByteLevel, Sequence or TemplateProcessing");
}

TEST_CASE("BpeTokenizer refuses a template that is not around one text", "[io][tokenizer]") {
  const json text = {{"Sequence", {{"id", "A"}, {"type_id", 0}}}};
  const auto with = [](const json& single) {
    return on_bytes([&](json& file) { file["post_processor"]["single"] = single; });
  };
  CHECK(with(json::array()).ends_with("'single' is [], expected the text 'A' once"));
  CHECK(with(json::array({text, text})).ends_with("expected the text 'A' once"));
  CHECK(with(json::array({{{"Sequence", {{"id", "B"}}}}})).ends_with("expected the text 'A' once"));
  CHECK(with(json::array({text, {{"SpecialToken", {{"id", "?"}}}}})) ==
        "f: post_processor: special_tokens: has no '?'");
  CHECK(on_bytes([](json& file) {
          file["post_processor"]["special_tokens"]["<|begin|>"]["ids"] = {999};
        }) ==
        "f: post_processor: special_tokens: <|begin|>: 'ids' is [999], expected ids of tokens");
  CHECK(on_bytes([](json& file) {
          file["post_processor"] = {
              {"type", "Sequence"},
              {"processors", {file["post_processor"], file["post_processor"]}}};
        }).ends_with(R"('type' is "TemplateProcessing", expected only one template)"));
}

TEST_CASE("BpeTokenizer refuses a decoder that does not undo its model", "[io][tokenizer]") {
  CHECK(on_bytes([](json& file) { file["decoder"] = nullptr; }) == "f: has no 'decoder'");
  CHECK(on_bytes([](json& file) { file["decoder"] = test::character_json()["decoder"]; }) ==
        R"(f: decoder: 'type' is "Sequence", expected ByteLevel)");
  CHECK(on_characters([](json& file) {
          file["decoder"] = {{"type", "ByteLevel"}};
        }) == R"(f: decoder: 'type' is "ByteLevel", expected Sequence)");
  CHECK(on_characters([](json& file) {
          file["decoder"]["decoders"][3]["start"] = 2;
        }).ends_with(", the last one or not"));
  CHECK(on_characters([](json& file) { file["decoder"]["decoders"].erase(3); }) == "no exception");
}

TEST_CASE("BpeTokenizer refuses a vocabulary that is none", "[io][tokenizer]") {
  const auto with = [](const std::string& name, const json& id) {
    return on_bytes([&](json& file) { file["model"]["vocab"][name] = id; });
  };
  CHECK(with("new", 5) == "f: token 'ą' has the id 5 of another token");
  CHECK(with("new", -1) == "f: token 'new' has the id -1, expected 0 <= id < 1588 with 282 tokens");
  CHECK(with("new", 1588) ==
        "f: token 'new' has the id 1588, expected 0 <= id < 1588 with 282 tokens");
  CHECK(with("new", 4'000'000'000'000'000'000) ==
        "f: token 'new' has the id 4000000000000000000, expected 0 <= id < 1588 with 282 tokens");
  CHECK(with("new", 1.5) ==
        "f: token 'new' has the id 1.5, expected 0 <= id < 1588 with 282 tokens");
  CHECK(with("new", "7") ==
        "f: token 'new' has the id \"7\", expected 0 <= id < 1588 with 282 tokens");
  CHECK(with("new", 1000) == "no exception");  // Published vocabularies have holes.
  CHECK(with("", 1000) == "f: the token with the id 1000 is empty or has a NUL in it");
  CHECK(with(std::string("a\0b", 3), 1000) ==
        "f: the token with the id 1000 is empty or has a NUL in it");
  CHECK(on_bytes([](json& file) { file["model"]["vocab"].erase("q"); }) ==
        "f: has no token 'q' for the byte 113");
  CHECK(on_characters([](json& file) { file["model"]["vocab"].erase("<0x0A>"); }) ==
        "f: has no token '<0x0A>' for the byte 10");
  CHECK(on_bytes([](json& file) { file["model"].erase("vocab"); }) == "f: model: has no 'vocab'");
  CHECK(on_bytes([](json& file) { file["model"]["vocab"] = json::array(); }) ==
        "f: model: 'vocab' is not an object");
  // Bytes that are never part of a text may be missing.
  CHECK(on_bytes([](json& file) { file["model"]["vocab"].erase(byte_letters()[0xFF]); }) ==
        "no exception");
}

TEST_CASE("BpeTokenizer refuses merges of what is not in its vocabulary", "[io][tokenizer]") {
  const auto with = [](const json& merge) {
    return on_bytes([&](json& file) { file["model"]["merges"].push_back(merge); });
  };
  CHECK(with("the zzz") ==
        "f: merge 22 of 'the' and 'zzz' needs 'zzz', which is not in the vocabulary");
  CHECK(with("z z") == "f: merge 22 of 'z' and 'z' needs 'zz', which is not in the vocabulary");
  CHECK(with({"z", "z"}) ==
        "f: merge 22 of 'z' and 'z' needs 'zz', which is not in the vocabulary");
  CHECK(with("t h") == "f: merge 22 of 't' and 'h' is there twice");
  CHECK(with("th") == "f: merge 22 is not a pair of tokens");
  CHECK(with("t h e") == "f: merge 22 is not a pair of tokens");
  CHECK(with({"t"}) == "f: merge 22 is not a pair of tokens");
  CHECK(with({"t", 7}) == "f: merge 22 is not a pair of tokens");
  CHECK(with(7) == "f: merge 22 is not a pair of tokens");
  CHECK(on_bytes([](json& file) { file["model"]["merges"] = 7; }) ==
        "f: model: 'merges' is not a list");
  CHECK(on_bytes([](json& file) { file["model"].erase("merges"); }) == "f: model: has no 'merges'");
}

TEST_CASE("BpeTokenizer refuses added tokens that contradict its vocabulary", "[io][tokenizer]") {
  const auto with = [](const json& token) {
    return on_bytes([&](json& file) { file["added_tokens"].push_back(token); });
  };
  CHECK(with(test::added_token(5, "new", false)) ==
        "f: added token 'new' with the id 5 has the id or the name of another token");
  CHECK(with(test::added_token(284, "the", false)) ==
        "f: added token 'the' with the id 284 has the id or the name of another token");
  CHECK(with(test::added_token(260, "the", true)) == "no exception");
  CHECK(with(test::added_token(99'999, "new", false)) ==
        "f: token 'new' has the id 99999, expected 0 <= id < 1594 with 285 tokens");
  CHECK(with(test::added_token(284, "", false)) ==
        "f: the token with the id 284 is empty or has a NUL in it");
  json token = test::added_token(284, "new", false);
  token["single_word"] = true;
  CHECK(with(token) == "f: added_tokens: 'single_word' is true, expected false");
  CHECK(with(7) == "f: added_tokens: is not a JSON object");
}

}  // namespace weir::tokenizer_json_test
