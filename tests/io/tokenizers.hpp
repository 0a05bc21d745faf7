// SPDX-License-Identifier: MIT
/// \file
/// Small tokenizers made by hand, for the tests of what reads them.
#pragma once

#include <array>
#include <cstddef>
#include <nlohmann/json.hpp>
#include <string>
#include <string_view>
#include <utility>

#include <weir/io/bpe_model.hpp>
#include <weir/io/byte_alphabet.hpp>

namespace weir::test {

/// An entry of "added_tokens".
inline nlohmann::json added_token(std::size_t id, const std::string& text, bool is_special) {
  return {{"id", id},        {"content", text},     {"single_word", false}, {"lstrip", false},
          {"rstrip", false}, {"normalized", false}, {"special", is_special}};
}

/// A vocabulary of these small tokens, and one more for each merge.
template <class Merges>
nlohmann::json bpe_model_json(const nlohmann::json& small, const Merges& merges) {
  nlohmann::json vocabulary = small;
  nlohmann::json pairs = nlohmann::json::array();
  for (const auto& [left, right] : merges) {
    const std::string merged = std::string(left) + std::string(right);
    if (!vocabulary.contains(merged)) vocabulary[merged] = vocabulary.size();
    pairs.push_back(std::string(left) + " " + std::string(right));
  }
  return {{"type", "BPE"},
          {"dropout", nullptr},
          {"unk_token", nullptr},
          {"continuing_subword_prefix", nullptr},
          {"end_of_word_suffix", nullptr},
          {"fuse_unk", false},
          {"byte_fallback", false},
          {"vocab", vocabulary},
          {"merges", pairs}};
}

/// A tokenizer.json on bytes, laid out as Llama 3's: the ids of the 256 bytes are their values,
/// then come 22 merges; 281 is "<|begin|>", 282 "<|end|>" and 283 "word", which is not special.
inline nlohmann::json byte_level_json() {
  using Pair = std::pair<std::string_view, std::string_view>;
  constexpr std::array<Pair, 22> kMerges = {
      Pair{"t", "h"},   Pair{"th", "e"},   Pair{"Ġ", "the"}, Pair{"i", "n"},   Pair{"in", "g"},
      Pair{"Ġ", "a"},   Pair{"'", "s"},    Pair{"1", "2"},   Pair{"12", "3"},  Pair{"Ġ", "Ġ"},
      Pair{"ĠĠ", "ĠĠ"}, Pair{"Ċ", "Ċ"},    Pair{"Ã", "©"},   Pair{"h", "e"},   Pair{"l", "l"},
      Pair{"he", "ll"}, Pair{"hell", "o"}, Pair{"a", "a"},   Pair{"aa", "aa"}, Pair{"ä", "½"},
      Pair{"ä½", "ł"},  Pair{"Ġhe", "llo"}};
  nlohmann::json letters = nlohmann::json::object();
  for (std::size_t byte = 0; byte < 256; ++byte) letters[io::byte_letters()[byte]] = byte;
  letters["Ġhe"] = 256;
  letters["llo"] = 257;
  letters["Ġworld"] = 258;
  const nlohmann::json byte_level = {{"type", "ByteLevel"},
                                     {"add_prefix_space", false},
                                     {"trim_offsets", true},
                                     {"use_regex", false}};
  const nlohmann::json split = {
      {"type", "Split"},
      {"pattern",
       {{"Regex", R"((?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}|)"
                  R"( ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+)"}}},
      {"behavior", "Isolated"},
      {"invert", false}};
  const nlohmann::json begin = {{"id", "<|begin|>"}, {"type_id", 0}};
  const nlohmann::json text = {{"id", "A"}, {"type_id", 0}};
  return {{"version", "1.0"},
          {"truncation", nullptr},
          {"padding", nullptr},
          {"added_tokens",
           {added_token(281, "<|begin|>", true), added_token(282, "<|end|>", true),
            added_token(283, "word", false)}},
          {"normalizer", nullptr},
          {"pre_tokenizer", {{"type", "Sequence"}, {"pretokenizers", {split, byte_level}}}},
          {"post_processor",
           {{"type", "TemplateProcessing"},
            {"single", {{{"SpecialToken", begin}}, {{"Sequence", text}}}},
            {"pair", nlohmann::json::array()},
            {"special_tokens",
             {{"<|begin|>", {{"id", "<|begin|>"}, {"ids", {281}}, {"tokens", {"<|begin|>"}}}}}}}},
          {"decoder", byte_level},
          {"model", bpe_model_json(letters, kMerges)}};
}

/// A tokenizer.json on characters with byte fallback, laid out as Mixtral's: 0 to 2 are "<unk>",
/// "<s>" and "</s>", 3 to 258 the bytes, 259 on characters, then come merges.
inline nlohmann::json character_json() {
  using Pair = std::pair<std::string_view, std::string_view>;
  constexpr std::array<Pair, 8> kMerges = {Pair{"▁", "t"}, Pair{"h", "e"},  Pair{"▁t", "he"},
                                           Pair{"▁", "a"}, Pair{"l", "l"},  Pair{"▁", "▁"},
                                           Pair{"l", "o"}, Pair{"▁▁", "▁▁"}};
  nlohmann::json small = {{"<unk>", 0}, {"<s>", 1}, {"</s>", 2}};
  for (unsigned int byte = 0; byte < 256; ++byte) {
    small[io::BpeModel::name_of(static_cast<unsigned char>(byte), io::BpeKind::kCharacters)] =
        byte + 3;
  }
  for (const char* const letter : {"▁", "t", "h", "e", "a", "l", "o", "é", "世"}) {
    small[letter] = small.size();
  }
  nlohmann::json model = bpe_model_json(small, kMerges);
  model["unk_token"] = "<unk>";
  model["fuse_unk"] = true;
  model["byte_fallback"] = true;
  const nlohmann::json space = {
      {"type", "Replace"}, {"pattern", {{"String", " "}}}, {"content", "▁"}};
  const nlohmann::json prepend = {{"type", "Prepend"}, {"prepend", "▁"}};
  const nlohmann::json begin = {{"id", "<s>"}, {"type_id", 0}};
  const nlohmann::json text = {{"id", "A"}, {"type_id", 0}};
  const nlohmann::json back = {
      {{"type", "Replace"}, {"pattern", {{"String", "▁"}}}, {"content", " "}},
      {{"type", "ByteFallback"}},
      {{"type", "Fuse"}},
      {{"type", "Strip"}, {"content", " "}, {"start", 1}, {"stop", 0}}};
  return {
      {"version", "1.0"},
      {"added_tokens",
       {added_token(0, "<unk>", true), added_token(1, "<s>", true), added_token(2, "</s>", true)}},
      {"normalizer", {{"type", "Sequence"}, {"normalizers", {prepend, space}}}},
      {"pre_tokenizer", nullptr},
      {"post_processor",
       {{"type", "TemplateProcessing"},
        {"single", {{{"SpecialToken", begin}}, {{"Sequence", text}}}},
        {"pair", nlohmann::json::array()},
        {"special_tokens", {{"<s>", {{"id", "<s>"}, {"ids", {1}}, {"tokens", {"<s>"}}}}}}}},
      {"decoder", {{"type", "Sequence"}, {"decoders", back}}},
      {"model", model}};
}

}  // namespace weir::test
