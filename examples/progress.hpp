// SPDX-License-Identifier: MIT
/// \file
/// Progress of a long run on a terminal, or line by line where there is none.
#pragma once

#include <algorithm>
#include <chrono>
#include <cmath>
#include <cstdio>
#include <iostream>
#include <string>
#include <unistd.h>
#include <utility>
#include <vector>

/// "#####-----" with `done` of `all` in it.
inline std::string bar(double done, double all, int width) {
  const int filled = static_cast<int>(std::lround(done / all * width));
  return std::string(static_cast<std::size_t>(filled), '#') +
         std::string(static_cast<std::size_t>(width - filled), '-');
}

/// One block character per value, in proportion to the largest.
template <class Number>
std::string spark_line(const std::vector<Number>& values) {
  static const char* const kBlocks[] = {"▁", "▂", "▃", "▄", "▅", "▆", "▇", "█"};
  const double largest =
      values.empty() ? 0.0 : static_cast<double>(*std::max_element(values.begin(), values.end()));
  std::string line;
  for (const Number value : values) {
    const double share = largest > 0.0 ? static_cast<double>(value) / largest : 0.0;
    line += kBlocks[static_cast<std::size_t>(std::lround(share * 7.0))];
  }
  return line;
}

/// `value` with `digits` digits behind the point.
inline std::string fixed(double value, int digits) {
  char text[64];
  std::snprintf(text, sizeof text, "%.*f", digits, value);
  return text;
}

/// `text` with spaces before it, so that it is at least `width` long.
inline std::string padded(const std::string& text, std::size_t width) {
  return std::string(width - std::min(width, text.size()), ' ') + text;
}

/// 1234567 as "1,234,567".
inline std::string grouped(long long value) {
  std::string text = std::to_string(value);
  for (auto at = static_cast<int>(text.size()) - 3; at > 0; at -= 3) {
    text.insert(static_cast<std::size_t>(at), ",");
  }
  return text;
}

/// How many seconds `f()` takes.
template <class F>
double seconds_of(F&& f) {
  const auto start = std::chrono::steady_clock::now();
  std::forward<F>(f)();
  return std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
}

/// A status line that is rewritten in place on a terminal. Where output goes to a file, only the
/// lines that are worth keeping are written.
class StatusLine {
 public:
  explicit StatusLine(bool quiet) : quiet_(quiet), terminal_(isatty(STDOUT_FILENO) == 1) {}

  void show(const std::string& text, bool keep) {
    if (quiet_) return;
    if (terminal_) {
      std::cout << '\r' << text << "\033[K" << (keep ? "\n" : "") << std::flush;
      open_ = !keep;
    } else if (keep) {
      std::cout << text << std::endl;
    }
  }

  /// Ends a line that is still being rewritten.
  void close() {
    if (open_) std::cout << '\n';
    open_ = false;
  }

 private:
  bool quiet_;
  bool terminal_;
  bool open_ = false;
};
