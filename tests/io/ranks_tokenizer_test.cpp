// SPDX-License-Identifier: MIT
#include <cstddef>
#include <fstream>
#include <string>
#include <vector>

#include <weir/io/bpe_tokenizer.hpp>

#include "io/folder.hpp"
#include "support/catch.hpp"
#include "support/matrices.hpp"

namespace weir::ranks_tokenizer_test {
using namespace weir::io;

namespace {

using Ids = std::vector<Index>;

std::string base64(const std::string& bytes) {
  const std::string digits = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";
  std::string text;
  for (std::size_t i = 0; i < bytes.size(); i += 3) {
    std::size_t bits = 0;
    for (std::size_t j = 0; j < 3; ++j) {
      bits = bits << 8U | (i + j < bytes.size() ? static_cast<unsigned char>(bytes[i + j]) : 0U);
    }
    for (std::size_t j = 0; j < 4; ++j) {
      text += i + j > bytes.size() ? '=' : digits[bits >> (18 - 6 * j) & 63U];
    }
  }
  return text;
}

/// Lines with all bytes as tokens, and these tokens behind them.
std::string ranks(const std::vector<std::string>& more) {
  std::vector<std::string> tokens;
  for (int byte = 0; byte < 256; ++byte) tokens.emplace_back(1, static_cast<char>(byte));
  tokens.insert(tokens.end(), more.begin(), more.end());
  std::string lines;
  for (std::size_t i = 0; i < tokens.size(); ++i) {
    lines += base64(tokens[i]) + " " + std::to_string(i) + "\n";
  }
  return lines;
}

std::string complaint(const std::string& lines, const RanksConfig& config = {patterns::kGpt2}) {
  return test::message_of<FileError>([&] { BpeTokenizer::from_ranks("f", lines, config); });
}

}  // namespace

TEST_CASE("A file of ranks merges what makes a token, the lowest rank first", "[io][tokenizer]") {
  const BpeTokenizer tokenizer =
      BpeTokenizer::from_ranks("f", ranks({"ab", "bc", "abc", " a", "\xC3\xA9", "xyz"}),
                               {.pattern = patterns::kCl100k, .special = {{"<|end|>", 300}}});
  CHECK(tokenizer.vocab_size() == 301);
  CHECK(tokenizer.encode("abc") == Ids{258});
  CHECK(tokenizer.encode("abcbc") == Ids{258, 257});  // "ab" goes first, then "bc", then "abc".
  CHECK(tokenizer.encode(" abc") == Ids{' ', 258});   // "ab" goes before " a".
  CHECK(tokenizer.encode("xyz wxyz") == Ids{261, ' ', 'w', 'x', 'y', 'z'});
  CHECK(tokenizer.encode("\xC3\xA9<|end|>") == Ids{260, 300});
  CHECK(tokenizer.encode("<|end|>", {.read_special = false}).size() == 7);
  CHECK(tokenizer.decode(Ids{260, 259, 300}) == "\xC3\xA9 a");
  CHECK(tokenizer.decode(Ids{300, 'a'}, Specials::kKeep) == "<|end|>a");
  CHECK(tokenizer.id_of("Ġa") == 259);
  CHECK(tokenizer.find(300)->is_special);
  CHECK(tokenizer.find(299) == nullptr);
}

TEST_CASE("A file of ranks is read from a file", "[io][tokenizer]") {
  const test::Folder folder;
  const std::string path = (folder.path() / "ranks").string();
  std::ofstream(path) << ranks({"ab"});
  CHECK(BpeTokenizer::from_ranks(path, {patterns::kGpt2}).encode("ab") == Ids{256});
}

TEST_CASE("A file of ranks that is broken is refused", "[io][tokenizer]") {
  CHECK(complaint(ranks({})) == "no exception");
  CHECK(complaint("") == "f: has no token 'Ā' for the byte 0");
  CHECK(complaint("AA==") == "f: line 1 has no space, expected base64 and a rank");
  for (const char* const token : {"", "A", "AA", "AAA", "A===", "AB==", "AAB=", "AA*=", "AA=A"}) {
    CHECK(complaint(std::string(token) + " 0\n") ==
          "f: line 1 does not begin with bytes in base64");
  }
  for (const char* const rank : {"", "1", "-1", "0 ", "0x", "99999999999999999999"}) {
    CHECK(complaint(std::string("AA== ") + rank) ==
          "f: line 1 does not have the next rank, expected 0, 1, 2, ...");
  }
  CHECK(complaint("AA== 0\n\nAQ== 1\n") == "f: line 2 has no space, expected base64 and a rank");
  CHECK(complaint(ranks({"ab", "cd", "ab"})) == "f: line 259 has the token of another line");
  CHECK(complaint(ranks({std::string(513, 'a')})) ==
        "f: line 257 has a token of more than 512 bytes");
  CHECK(complaint(ranks({}), {"a*"}).ends_with("expected one that always matches something"));
  CHECK(complaint(ranks({}), {patterns::kGpt2, {{"<|end|>", 5}}}) ==
        "f: the special token '<|end|>' with the id 5 is empty, no UTF-8, or there already");
  CHECK(complaint(ranks({}), {patterns::kGpt2, {{"", 300}}}) ==
        "f: the special token '' with the id 300 is empty, no UTF-8, or there already");
  CHECK(test::message_of<ConfigError>([] {
          BpeTokenizer::from_ranks("f", ranks({}), {patterns::kGpt2, {{"<|end|>", -1}}});
        }) == "from_ranks: id of '<|end|>' = -1, expected 0 <= id of '<|end|>' <= 66048");
}

}  // namespace weir::ranks_tokenizer_test
