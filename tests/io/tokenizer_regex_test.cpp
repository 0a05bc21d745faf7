// SPDX-License-Identifier: MIT
#include <string>
#include <string_view>
#include <vector>

#include <weir/io/regex.hpp>
#include <weir/io/token_ranks.hpp>

#include "support/catch.hpp"
#include "support/matrices.hpp"

namespace weir::io::tokenizer_regex_test {

namespace {

using Words = std::vector<std::string>;

Words words(const std::string& pattern, std::string_view text) {
  Words all;
  for (const auto& [begin, end] : Regex("f", pattern).matches(text)) {
    all.emplace_back(text.substr(begin, end - begin));
  }
  return all;
}

/// What is said about an expression, without the expression.
std::string complaint(const std::string& pattern) {
  const std::string message = weir::test::message_of<FileError>([&] { Regex("f", pattern); });
  const std::string start = "f: the regular expression '" + pattern + "' ";
  return message.starts_with(start) ? message.substr(start.size()) : message;
}

}  // namespace

TEST_CASE("Regex divides text as the expressions of published models want it", "[io][tokenizer]") {
  CHECK(words(patterns::kGpt2, "I've 12345  words\n") ==
        Words{"I", "'ve", " 12345", " ", " words", "\n"});
  CHECK(words(patterns::kCl100k, "I'VE 12345  words.\n\n x") ==
        Words{"I", "'VE", " ", "123", "45", " ", " words", ".\n\n", " x"});
  CHECK(words(patterns::kO200k, "camelCase HTTPServer's \xC3\x89t\xC3\xA9/\n") ==
        Words{"camel", "Case", " HTTPServer's", " \xC3\x89t\xC3\xA9", "/\n"});
  CHECK(words(patterns::kKimiK2, "ab\xE6\xBC\xA2\xE5\xAD\x97 C\xE3\x81\x82") ==
        Words{"ab", "\xE6\xBC\xA2\xE5\xAD\x97", " C\xE3\x81\x82"});
}

TEST_CASE("Regex has Unicode's classes, and Oniguruma's meaning of them", "[io][tokenizer]") {
  // U+0085, U+00A0 and U+3000 are white space; U+180E and U+200B are not.
  CHECK(words(R"(\s+)", "a\xC2\x85\xC2\xA0\xE3\x80\x80z\xE1\xA0\x8E\xE2\x80\x8B") ==
        Words{"\xC2\x85\xC2\xA0\xE3\x80\x80"});
  CHECK(words(R"([^\S\n]+)", "a \n\xE1\xA0\x8E") == Words{" "});
  CHECK(words(R"(\S)", " \xE1\xA0\x8E") == Words{"\xE1\xA0\x8E"});
  // Digits of all scripts; "½" is a number, but no digit.
  CHECK(words(R"(\d)", "1\xD9\xA3\xC2\xBD") == Words{"1", "\xD9\xA3"});
  CHECK(words(R"(\p{N})", "1\xD9\xA3\xC2\xBD") == Words{"1", "\xD9\xA3", "\xC2\xBD"});
  // U+3001 is used with Han, but not of its script.
  CHECK(words(R"(\p{Han}+)", "\xE6\xBC\xA2\xE3\x80\x81\xE5\xAD\x97") ==
        Words{"\xE6\xBC\xA2", "\xE5\xAD\x97"});
  CHECK(words("(?i:'S)", "'s'S'\xC5\xBF") == Words{"'s", "'S", "'\xC5\xBF"});
  // "^" and "$" are those of lines, "." is not the end of one.
  CHECK(words(R"(\s+$)", "a  \nb \n ") == Words{"  ", " \n "});
  CHECK(words("^.+", "ab\ncd\r") == Words{"ab", "cd\r"});
  CHECK(words("[a-e&&[^bd]]+", "abcde") == Words{"a", "c", "e"});
  CHECK(words("(?<=a)b|(?>a+)c|[\\]\\\\]", "ab aac]\\") == Words{"b", "aac", "]", "\\"});
}

TEST_CASE("Regex refuses what PCRE2 and Oniguruma read differently", "[io][tokenizer]") {
  CHECK(complaint("a\\") == "ends with a backslash");
  CHECK(complaint(R"(\w+)") == R"(uses \w, which weir does not know)");
  CHECK(complaint(R"([\h])") == R"(uses \h, which weir does not know)");
  CHECK(complaint(R"((a)\1)") == R"(uses \1, which weir does not know)");
  CHECK(complaint(R"(\pL)") == "has a property without braces at byte 0");
  CHECK(complaint(R"(\p{^L})") == "uses the property '^L', which weir does not know");
  CHECK(complaint("[a-z&&[bc]]") == "combines sets at byte 4, which weir does not know");
  CHECK(complaint("[a-z&&b]") == "combines sets at byte 4, which weir does not know");
  CHECK(complaint("[^a&&[^b]]") == "combines sets at byte 3, which weir does not know");
  CHECK(complaint("[a&&[^b]c]") == "combines sets at byte 7, which weir does not know");
  CHECK(complaint("[a&&[^b&&c]]") == "combines sets at byte 7, which weir does not know");
  CHECK(complaint("[&&[^b]]") == "has an empty set at byte 1");
  CHECK(complaint("[a&&[^b]") == "combines sets at byte 7, which weir does not know");
  CHECK(complaint("[[:alpha:]]") == "combines sets at byte 1, which weir does not know");
  CHECK(complaint("[]a]") == "has an empty set at byte 1");
  CHECK(complaint("[a") == "has a set without an end");
  CHECK(complaint("a]") == "has an unescaped bracket at byte 1");
  CHECK(complaint("(?R)") == "has a group '(?R)' that weir does not know");
  CHECK(complaint("(*UCP)a") == "has a group '(*UC' that weir does not know");
  CHECK(complaint("(?m:a)") == "has a group '(?m:' that weir does not know");
  CHECK(complaint("a{1,3}+") == "has a brace at byte 1 that weir does not know");
  CHECK(complaint("a{2}?") == "has a brace at byte 1 that weir does not know");
  CHECK(complaint("a{,3}") == "has a brace at byte 1 that weir does not know");
  CHECK(complaint("a{") == "has a brace at byte 1 that weir does not know");
}

TEST_CASE("Regex refuses what is no expression, matches nothing or is too long",
          "[io][tokenizer]") {
  CHECK(complaint("(a").starts_with("is none: "));
  CHECK(complaint("*").starts_with("is none: "));
  CHECK(complaint("\xFF").starts_with("is none: "));
  CHECK(complaint(R"(\p{Nonsense})").starts_with("is none: "));
  CHECK(complaint(std::string(300, '(') + "a" + std::string(300, ')')).starts_with("is none: "));
  CHECK(complaint("a{60000}{60000}").starts_with("is none: "));
  CHECK(complaint("a*") == "can match nothing, expected one that always matches something");
  CHECK(complaint("") == "can match nothing, expected one that always matches something");
  CHECK(complaint(std::string(16385, 'a')) ==
        "f: a regular expression has 16385 bytes, expected at most 16384");
}

TEST_CASE("Regex gives up on expressions that take for ever", "[io][tokenizer]") {
  const Regex regex("f", "(a+)+[bc]");
  CHECK(weir::test::message_of<FileError>([&] { regex.matches(std::string(40, 'a')); }) ==
        "f: the regular expression '(a+)+[bc]' takes too many steps on a text of 40 bytes");
  CHECK(regex.matches("aab").size() == 1);

  const std::string run(100'000, 'A');
  CHECK(words(patterns::kO200k, run) == Words{run});
}

}  // namespace weir::io::tokenizer_regex_test
