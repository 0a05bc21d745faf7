// SPDX-License-Identifier: MIT
// What the examples show on a terminal.
#include <string>
#include <vector>

#include "../../examples/escaped.hpp"
#include "../../examples/progress.hpp"
#include "support/catch.hpp"

TEST_CASE("Text is shown as it is, and control bytes are written out", "[examples]") {
  CHECK(escaped("a\tb\n\\ ~") == "a\tb\n\\ ~");
  CHECK(escaped("\x1B[31m\r\b\x7F") == "\\x1B[31m\\x0D\\x08\\x7F");
  CHECK(escaped(std::string(1, '\0')) == "\\x00");
  // Characters of two, three and four bytes, and the first and last that are none.
  CHECK(escaped("\xC3\xA9 \xE2\x96\x87 \xF0\x9F\x98\x80") ==
        "\xC3\xA9 \xE2\x96\x87 \xF0\x9F\x98\x80");
  CHECK(escaped("\xC2\xA0") == "\xC2\xA0");
  CHECK(escaped("\xC2\x9B") == "\\xC2\\x9B");           // U+009B begins a control sequence.
  CHECK(escaped("\xC0\x8A") == "\\xC0\\x8A");           // A longer way to write U+000A.
  CHECK(escaped("\xE0\x82\x9B") == "\\xE0\\x82\\x9B");  // A longer way to write U+009B.
  CHECK(escaped("\xED\xA0\x80") == "\\xED\\xA0\\x80");  // Half of a surrogate pair.
  CHECK(escaped("\xF4\x90\x80\x80") == "\\xF4\\x90\\x80\\x80");
  CHECK(escaped("\xF0\x8F\xBF\xBF") == "\\xF0\\x8F\\xBF\\xBF");
  CHECK(escaped("\xFF\x80") == "\\xFF\\x80");
  // Characters that do not go on, in the middle and at the end.
  CHECK(escaped("\xE2\x96z\xC3") == "\\xE2\\x96z\\xC3");
  CHECK(escaped("\xC3\xC3\xA9") == "\\xC3\xC3\xA9");
}

TEST_CASE("A line of progress is as wide as there is room", "[examples]") {
  const std::vector<std::string> parts = {"1/2", "loss 3", "load \xE2\x96\x87\xE2\x96\x87"};
  CHECK(columns_of(parts[2]) == 7);
  CHECK(fitted(parts, 1, 2, 100) ==
        "[############------------] 1/2  loss 3  load \xE2\x96\x87\xE2\x96\x87");
  CHECK(fitted(parts, 1, 2, 31) == "[####----] 1/2  loss 3  load \xE2\x96\x87\xE2\x96\x87");
  CHECK(fitted(parts, 1, 2, 30) == "1/2  loss 3  load \xE2\x96\x87\xE2\x96\x87");
  CHECK(fitted(parts, 1, 2, 20) == "1/2  loss 3  load \xE2\x96\x87\xE2\x96\x87");
  CHECK(fitted(parts, 1, 2, 19) == "1/2  loss 3");
  CHECK(fitted(parts, 1, 2, 3) == "1/2");
  CHECK(fitted(parts, 1, 2, 2).empty());
  for (std::size_t columns = 0; columns < 60; ++columns) {
    CHECK(columns_of(fitted(parts, 1, 2, columns)) <= columns);
  }
  CHECK(cut("a\xE2\x96\x87z", 2) == "a\xE2\x96\x87");
  CHECK(cut("a\xE2\x96\x87z", 0).empty());
  CHECK(cut("a\xE2\x96\x87z", 9) == "a\xE2\x96\x87z");
}
