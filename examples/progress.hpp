// SPDX-License-Identifier: MIT
/// \file
/// Progress of a long run on a terminal, or line by line where there is none.
#pragma once

#include <algorithm>
#include <chrono>
#include <cmath>
#include <cstddef>
#include <cstdio>
#include <iostream>
#include <string>
#include <sys/ioctl.h>
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

/// How many columns a text takes on a terminal: one for each character of UTF-8.
inline std::size_t columns_of(const std::string& text) {
  return static_cast<std::size_t>(std::count_if(text.begin(), text.end(), [](char byte) {
    return (static_cast<unsigned char>(byte) & 0xC0U) != 0x80U;
  }));
}

/// The beginning of a text that takes no more than `columns`.
inline std::string cut(const std::string& text, std::size_t columns) {
  std::size_t end = 0;
  for (std::size_t taken = 0; end < text.size(); ++end) {
    const bool begins = (static_cast<unsigned char>(text[end]) & 0xC0U) != 0x80U;
    if (begins && taken++ == columns) break;
  }
  return text.substr(0, end);
}

/// The first of `parts` that fit into `columns`, with two spaces between them, and if there is room
/// for at least `kLeastBar` characters, a bar in front of them.
inline std::string fitted(const std::vector<std::string>& parts, double done, double all,
                          std::size_t columns) {
  constexpr std::size_t kLeastBar = 8;
  constexpr std::size_t kBar = 24;
  constexpr std::size_t kAround = 3;  // "[" and "] ".
  std::string line;
  for (const std::string& part : parts) {
    const std::string longer = line.empty() ? part : line + "  " + part;
    if (columns_of(longer) > columns) break;
    line = longer;
  }
  const std::size_t taken = columns_of(line) + kAround;
  if (columns < taken + kLeastBar) return line;
  const std::size_t width = std::min(kBar, columns - taken);
  return "[" + bar(done, all, static_cast<int>(width)) + "] " + line;
}

/// A line that is written over and over on a terminal. Elsewhere, only what is kept is printed.
class StatusLine {
 public:
  explicit StatusLine(bool quiet) : quiet_(quiet), terminal_(isatty(STDOUT_FILENO) == 1) {}

  /// How many characters fit into one row: a line that wraps could not be written over. The last
  /// column stays free, since some terminals wrap as soon as it is taken.
  std::size_t columns() const {
    constexpr std::size_t kUnlimited = 10'000;
    winsize size = {};
    if (!terminal_ || ioctl(STDOUT_FILENO, TIOCGWINSZ, &size) != 0 || size.ws_col == 0) {
      return kUnlimited;
    }
    return size.ws_col - 1U;
  }

  /// \param keep     Whether the line stays, and the next one begins below it.
  void show(const std::string& text, bool keep) {
    if (quiet_) return;
    if (terminal_) {
      std::cout << '\r' << cut(text, columns()) << "\033[K" << (keep ? "\n" : "") << std::flush;
      open_ = !keep;
    } else if (keep) {
      std::cout << text << std::endl;
    }
  }

  /// Removes a line that is still being rewritten, so that another text can stand there.
  void clear() {
    if (open_) std::cout << "\r\033[K" << std::flush;
    open_ = false;
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
