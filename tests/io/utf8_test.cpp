// SPDX-License-Identifier: MIT
#include <cstddef>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include <weir/io/utf8.hpp>

#include "support/catch.hpp"

namespace weir::io::utf8_test {

TEST_CASE("utf8_start tells characters, broken bytes and characters that are not complete",
          "[io][utf8]") {
  using Kind = Utf8Start::Kind;
  const auto is = [](std::string_view text, Kind kind, std::size_t length) {
    const Utf8Start start = utf8_start(text);
    return start.kind == kind && start.length == length;
  };
  CHECK(is(std::string_view("\0a", 2), Kind::kCharacter, 1));
  CHECK(is("\x7F", Kind::kCharacter, 1));
  CHECK(is("\xC2\x80", Kind::kCharacter, 2));
  CHECK(is("\xDF\xBFx", Kind::kCharacter, 2));
  CHECK(is("\xE0\xA0\x80", Kind::kCharacter, 3));
  CHECK(is("\xED\x9F\xBF", Kind::kCharacter, 3));
  CHECK(is("\xEE\x80\x80", Kind::kCharacter, 3));
  CHECK(is("\xF0\x90\x80\x80", Kind::kCharacter, 4));
  CHECK(is("\xF4\x8F\xBF\xBF", Kind::kCharacter, 4));

  CHECK(is("\x80", Kind::kBroken, 1));
  CHECK(is("\xC1\xBF", Kind::kBroken, 1));
  CHECK(is("\xC2\xC2", Kind::kBroken, 1));
  CHECK(is("\xE0\x9F\xBF", Kind::kBroken, 1));  // longer than needed
  CHECK(is("\xED\xA0\x80", Kind::kBroken, 1));  // a surrogate
  CHECK(is("\xE1\x80\x41", Kind::kBroken, 2));
  CHECK(is("\xF0\x8F\xBF\xBF", Kind::kBroken, 1));  // longer than needed
  CHECK(is("\xF4\x90\x80\x80", Kind::kBroken, 1));  // above U+10FFFF
  CHECK(is("\xF1\x80\x80\xC0", Kind::kBroken, 3));
  CHECK(is("\xF5\x80\x80\x80", Kind::kBroken, 1));

  CHECK(is("\xC2", Kind::kIncomplete, 1));
  CHECK(is("\xE1\x80", Kind::kIncomplete, 2));
  CHECK(is("\xF1\x80\x80", Kind::kIncomplete, 3));
}

TEST_CASE("valid_utf8 replaces what is broken as the Unicode Standard does in its table 3-11",
          "[io][utf8]") {
  const std::string bad = "\xEF\xBF\xBD";
  CHECK(valid_utf8("").empty());
  CHECK(valid_utf8("h\xC3\xA9llo") == "h\xC3\xA9llo");
  CHECK(valid_utf8("\xE1\x80\xE2\xF0\x91\x92\xF1\xBF\x41") == bad + bad + bad + bad + "A");
  CHECK(valid_utf8("\xC0\xAF\xE0\x80\xBF\xF0\x81\x82\x41") ==
        bad + bad + bad + bad + bad + bad + bad + bad + "A");
  CHECK(valid_utf8("a\xF0\x9F\x91") == "a" + bad);
}

TEST_CASE("Utf8Joiner gives the same text however it is cut", "[io][utf8]") {
  const std::string text = "a\xC3\xA9\xE4\xBD\xA0\xF0\x9F\x91\x8D\xFF\xE2\x82 z\xE2\x82";
  for (std::size_t first = 0; first <= text.size(); ++first) {
    for (std::size_t second = first; second <= text.size(); ++second) {
      Utf8Joiner joiner;
      std::string joined = joiner.add(text.substr(0, first));
      joined += joiner.add(text.substr(first, second - first));
      joined += joiner.add(text.substr(second));
      joined += joiner.flush();
      CHECK(joined == valid_utf8(text));
      CHECK(joiner.flush().empty());
    }
  }
}

TEST_CASE("replace_all replaces from left to right, without looking at what it has written",
          "[io][utf8]") {
  CHECK(replace_all("aaa", "aa", "a") == "aa");
  CHECK(replace_all("a b c", " ", "  ") == "a  b  c");
  CHECK(replace_all("abc", "d", "e") == "abc");
  CHECK(replace_all("", "d", "e").empty());
}

}  // namespace weir::io::utf8_test
