// SPDX-License-Identifier: MIT
#include <cstddef>
#include <nlohmann/json.hpp>
#include <random>
#include <string>
#include <vector>

#include <weir/io/bpe_tokenizer.hpp>

#include "io/tokenizers.hpp"
#include "support/catch.hpp"
#include "support/matrices.hpp"

namespace weir::bpe_tokenizer_test {
using namespace weir::io;
using nlohmann::json;

namespace {

using Ids = std::vector<Index>;

BpeTokenizer tokenizer_of(const json& file) {
  return BpeTokenizer("f", file.dump());
}

/// What Hugging Face's `tokenizers` 0.23.2 makes of a text.
struct Expected {
  std::string text;
  Ids ids;
  std::string decoded;
};

void check(const BpeTokenizer& tokenizer, const std::vector<Expected>& cases) {
  for (const auto& [text, ids, decoded] : cases) {
    INFO(text);
    CHECK(tokenizer.encode(text) == ids);
    CHECK(tokenizer.decode(ids) == decoded);
  }
}

}  // namespace

TEST_CASE("BpeTokenizer on bytes gives the tokens of Hugging Face's library", "[io][tokenizer]") {
  const BpeTokenizer tokenizer = tokenizer_of(test::byte_level_json());
  check(
      tokenizer,
      {{"", {281}, ""},
       {"the thing's", {281, 260, 32, 259, 263, 265}, "the thing's"},
       {" hello  hello world",
        {281, 32, 275, 32, 32, 275, 32, 119, 111, 114, 108, 100},
        " hello  hello world"},
       {"12312 1234", {281, 267, 266, 32, 267, 52}, "12312 1234"},
       {"aaaaaaa aa\n\n\nword", {281, 277, 276, 97, 264, 97, 270, 10, 283}, "aaaaaaa aa\n\n\nword"},
       {"é 你!  \t x", {281, 271, 32, 279, 33, 268, 9, 32, 120}, "é 你!  \t x"},
       {"<|end|>the<|begin|>  words", {281, 282, 260, 281, 268, 283, 115}, "the  words"},
       {"A\r\n\n  HE'S\u00a0\u180e\u200bthe",
        {281, 65, 13, 270, 32, 32, 72, 69, 39, 83, 194, 160, 225, 160, 142, 226, 128, 139, 260},
        "A\r\n\n  HE'S\u00a0\u180e\u200bthe"},
       {"    a    b    ", {281, 268, 32, 264, 268, 32, 32, 98, 269}, "    a    b    "}});
}

TEST_CASE("BpeTokenizer has GPT-2's words, a space before them, and tokens without merges",
          "[io][tokenizer]") {
  json file = test::byte_level_json();
  file["pre_tokenizer"] = {{"type", "ByteLevel"}, {"add_prefix_space", true}};
  file["model"]["ignore_merges"] = true;
  check(tokenizer_of(file),
        {{"", {281}, ""},
         {"the thing's", {281, 261, 32, 259, 263, 265}, " the thing's"},
         {" hello  hello world", {281, 280, 32, 280, 258}, " hello  hello world"},
         {"12312 1234", {281, 32, 267, 266, 32, 267, 52}, " 12312 1234"},
         {"aaaaaaa aa\n\n\nword",
          {281, 264, 277, 276, 264, 97, 270, 10, 283},
          " aaaaaaa aa\n\n\nword"},
         {"<|end|>the<|begin|>  words", {281, 282, 261, 281, 268, 283, 32, 115}, " the  word s"}});
}

TEST_CASE("BpeTokenizer on characters gives the tokens of Hugging Face's library",
          "[io][tokenizer]") {
  check(tokenizer_of(test::character_json()),
        {{"", {1}, ""},
         {"the lo", {1, 270, 259, 274}, "the lo"},
         {"  the    hello", {1, 273, 270, 275, 269, 272, 265}, "  the    hello"},
         {"é世界 \n", {1, 259, 266, 267, 234, 152, 143, 259, 13}, "é世界 \n"},
         {"a<s> the</s>a", {1, 271, 1, 259, 270, 2, 271}, "a  the a"},
         {"<0x0A>▁▁the", {1, 259, 63, 51, 123, 51, 68, 65, 259, 270}, "<0x0A>  the"},
         {"👍 ll", {1, 259, 243, 162, 148, 144, 259, 272}, "👍 ll"}});
}

TEST_CASE("BpeTokenizer reads merges as pairs, and steps in sequences", "[io][tokenizer]") {
  json file = test::byte_level_json();
  const BpeTokenizer before = tokenizer_of(file);
  for (json& merge : file["model"]["merges"]) {
    const auto text = merge.get<std::string>();
    const std::size_t space = text.find(' ');
    merge = {text.substr(0, space), text.substr(space + 1)};
  }
  file["normalizer"] = {{"type", "Sequence"}, {"normalizers", json::array()}};
  file["pre_tokenizer"] = {{"type", "Sequence"},
                           {"pretokenizers", json::array({file["pre_tokenizer"]})}};
  file["post_processor"] = {
      {"type", "Sequence"},
      {"processors", json::array({{{"type", "ByteLevel"}}, file["post_processor"]})}};
  const BpeTokenizer after = tokenizer_of(file);
  for (const char* text : {"the thing's 12312", " hello", "é你 \n\n word<|end|>"}) {
    CHECK(after.encode(text) == before.encode(text));
  }
}

TEST_CASE("BpeTokenizer composes characters where its file says NFC", "[io][tokenizer]") {
  json file = test::byte_level_json();
  const std::string decomposed = "e\xCC\x81";  // "e" and an accent
  CHECK(tokenizer_of(file).encode(decomposed) == Ids{281, 'e', 0xCC, 0x81});
  file["normalizer"] = {{"type", "NFC"}};
  CHECK(tokenizer_of(file).encode(decomposed) == Ids{281, 271});
  CHECK(tokenizer_of(file).encode("e") == Ids{281, 'e'});
}

TEST_CASE("BpeTokenizer divides by digits, and leaves out what a Split removes",
          "[io][tokenizer]") {
  const json byte_level = {
      {"type", "ByteLevel"}, {"add_prefix_space", false}, {"use_regex", false}};
  const auto encoded = [&](const json& step) {
    json file = test::byte_level_json();
    file["pre_tokenizer"] = {{"type", "Sequence"}, {"pretokenizers", {step, byte_level}}};
    return tokenizer_of(file).encode("12 123");
  };
  CHECK(encoded({{"type", "Digits"}, {"individual_digits", true}}) ==
        Ids{281, '1', '2', ' ', '1', '2', '3'});
  CHECK(encoded({{"type", "Digits"}, {"individual_digits", false}}) == Ids{281, 266, ' ', 267});
  const auto split = [](bool is_inverted) {
    return json{{"type", "Split"},
                {"pattern", {{"Regex", "2"}}},
                {"behavior", "Removed"},
                {"invert", is_inverted}};
  };
  CHECK(encoded(split(false)) == Ids{281, '1', ' ', '1', '3'});
  CHECK(encoded(split(true)) == Ids{281, '2', '2'});
}

TEST_CASE("BpeTokenizer writes spaces as Metaspace says", "[io][tokenizer]") {
  const auto encoded = [](const char* scheme) {
    json file = test::character_json();
    file["normalizer"] = nullptr;
    file["pre_tokenizer"] = {
        {"type", "Metaspace"}, {"replacement", "▁"}, {"prepend_scheme", scheme}, {"split", false}};
    return tokenizer_of(file).encode("a<s>a a");
  };
  CHECK(encoded("always") == Ids{1, 271, 1, 271, 271});
  CHECK(encoded("first") == Ids{1, 271, 1, 263, 271});
  CHECK(encoded("never") == Ids{1, 263, 1, 263, 271});
}

TEST_CASE("BpeTokenizer lets added tokens take in white space, and finds the longest",
          "[io][tokenizer]") {
  json file = test::byte_level_json();
  file["added_tokens"][2]["lstrip"] = true;
  file["added_tokens"][2]["rstrip"] = true;
  file["added_tokens"].push_back(test::added_token(284, "wor", false));
  file["added_tokens"].push_back(test::added_token(285, "words!", true));
  const BpeTokenizer tokenizer = tokenizer_of(file);
  const auto ids = [&](const char* text) { return tokenizer.encode(text, {.add_special = false}); };

  CHECK(ids("a \xE3\x80\x80\nword \tb") == Ids{'a', 283, 'b'});
  CHECK(ids(" word word ") == Ids{283, 283});
  CHECK(ids("worwords!words?") == Ids{284, 285, 283, 's', '?'});
  CHECK(tokenizer.encode("words!", {.add_special = false, .read_special = false}) ==
        Ids{'w', 'o', 'r', 'd', 's', '!'});
}

TEST_CASE("BpeTokenizer finds added tokens in normalised text where they say so",
          "[io][tokenizer]") {
  json file = test::byte_level_json();
  file["normalizer"] = {{"type", "Replace"}, {"pattern", {{"String", "x"}}}, {"content", "y"}};
  file["added_tokens"].push_back(test::added_token(284, "x1", false));
  file["added_tokens"].push_back(test::added_token(285, "x2", false));
  file["added_tokens"][4]["normalized"] = true;
  CHECK(tokenizer_of(file).encode("x1y1x2y2", {.add_special = false}) ==
        Ids{284, 'y', '1', 285, 285});
}

TEST_CASE("BpeTokenizer reads and writes special tokens only where it is asked to",
          "[io][tokenizer]") {
  const BpeTokenizer tokenizer = tokenizer_of(test::byte_level_json());
  CHECK(tokenizer.encode("<|end|>", {.add_special = false}) == Ids{282});
  CHECK(tokenizer.encode("<|end|>word", {.read_special = false}) ==
        Ids{281, '<', '|', 'e', 'n', 'd', '|', '>', 283});
  const Ids ids = {281, 260, 282, 283};
  CHECK(tokenizer.decode(ids) == "theword");
  CHECK(tokenizer.decode(ids, Specials::kKeep) == "<|begin|>the<|end|>word");
}

TEST_CASE("BpeTokenizer puts the tokens of its template before and behind a text",
          "[io][tokenizer]") {
  json file = test::byte_level_json();
  json& single = file["post_processor"]["single"];
  single.push_back(single[0]);
  CHECK(tokenizer_of(file).encode("the") == Ids{281, 260, 281});
}

TEST_CASE("A tokenizer names its tokens", "[io][tokenizer]") {
  BpeTokenizer tokenizer = tokenizer_of(test::byte_level_json());
  CHECK(tokenizer.vocab_size() == 284);
  CHECK(tokenizer.id_of("Ġthe") == 261);
  CHECK(tokenizer.id_of("<|end|>") == 282);
  CHECK(!tokenizer.id_of(" the"));
  CHECK(tokenizer.token_of(261) == "Ġthe");
  CHECK(tokenizer.find(261)->bytes == " the");
  CHECK(tokenizer.find(282)->is_special);
  CHECK(!tokenizer.find(283)->is_special);
  CHECK(tokenizer.find(284) == nullptr);
  CHECK(tokenizer.bos() == 281);
  CHECK(!tokenizer.eos());
  tokenizer.set_eos(282);
  tokenizer.set_frame({}, {282, 282});
  CHECK(tokenizer.eos() == 282);
  CHECK(tokenizer.encode("the") == Ids{260, 282, 282});

  CHECK(test::message_of<ConfigError>([&] { tokenizer.token_of(284); }) ==
        "token_of: id = 284, expected one of the 284 ids that has a token");
  CHECK(test::message_of<ConfigError>([&] { tokenizer.set_bos(-1); }) ==
        "set_bos: id = -1, expected one of the 284 ids that has a token");
  CHECK(test::message_of<ConfigError>([&] { tokenizer.set_frame({281}, {999}); }) ==
        "set_frame: id = 999, expected one of the 284 ids that has a token");
  CHECK(tokenizer.before().empty());
}

TEST_CASE("Decoding leaves out ids without a token, and refuses negative ones", "[io][tokenizer]") {
  const BpeTokenizer tokenizer = tokenizer_of(test::byte_level_json());
  CHECK(tokenizer.decode(Ids{260, 284, 1'000'000'000'000, 264}) == "the a");
  CHECK(test::message_of<ConfigError>([&] {
          tokenizer.decode(Ids{260, -1});
        }) == "decode: id = -1, expected >= 0");
}

TEST_CASE("Decoding removes one space where encoding adds one", "[io][tokenizer]") {
  const BpeTokenizer tokenizer = tokenizer_of(test::character_json());
  CHECK(tokenizer.decode(Ids{259}).empty());
  CHECK(tokenizer.decode(Ids{1, 259, 259}) == " ");
  CHECK(tokenizer.decode(Ids{273}) == " ");
  CHECK(tokenizer.decode(Ids{263, 259}) == "a ");
  CHECK(tokenizer.decode(Ids{1, 259}, Specials::kKeep) == "<s> ");
}

TEST_CASE("A tokenizer on bytes gives each text back, and U+FFFD for what is none",
          "[io][tokenizer]") {
  const BpeTokenizer bytes = tokenizer_of(test::byte_level_json());
  const BpeTokenizer characters = tokenizer_of(test::character_json());
  std::mt19937 random(3);
  const std::vector<std::string> parts = {
      "the ", "a",    "\n",    "  ", "é",    "你",      std::string(1, '\0'),
      "\xFF", "\xE4", "hello", "12", "word", "\xC2\x85"};
  for (int round = 0; round < 300; ++round) {
    std::string text;
    for (auto left = random() % 20; left > 0; --left) text += parts[random() % parts.size()];
    CHECK(bytes.decode(bytes.encode(text)) == valid_utf8(text));
    CHECK(characters.decode(characters.encode(text)) == valid_utf8(text));
  }
  CHECK(bytes.encode("\xFF") == bytes.encode("\xEF\xBF\xBD"));
}

TEST_CASE("TextStream gives the text of decode, whole characters at a time", "[io][tokenizer]") {
  const auto is_special = GENERATE(Specials::kSkip, Specials::kKeep);
  const auto file = GENERATE(as<json>{}, test::byte_level_json(), test::character_json());
  const BpeTokenizer tokenizer = tokenizer_of(file);
  std::mt19937 random(11);
  TextStream stream(tokenizer, is_special);
  for (int round = 0; round < 100; ++round) {
    Ids ids;
    if (round % 2 == 0) ids = tokenizer.encode("  é你👍 the<|end|></s> a");
    for (auto left = random() % 12; left > 0; --left) {
      ids.push_back(static_cast<Index>(random() % 290));
    }
    std::string text;
    for (const Index id : ids) {
      const std::string shown = stream.add(id);
      CHECK(shown == valid_utf8(shown));
      text += shown;
    }
    text += stream.flush();
    CHECK(text == tokenizer.decode(ids, is_special));
  }
}

TEST_CASE("TextStream holds back the bytes of a character until it is complete",
          "[io][tokenizer]") {
  const BpeTokenizer tokenizer = tokenizer_of(test::byte_level_json());
  TextStream stream(tokenizer);
  CHECK(stream.add(0xE4).empty());
  CHECK(stream.add(0xBD).empty());
  CHECK(stream.add(0xA0) == "你");
  CHECK(stream.add(0xE4).empty());
  CHECK(stream.add('a') ==
        "\xEF\xBF\xBD"
        "a");
  CHECK(stream.add(0xE4).empty());
  CHECK(stream.flush() == "\xEF\xBF\xBD");
  CHECK(stream.flush().empty());
}

}  // namespace weir::bpe_tokenizer_test
