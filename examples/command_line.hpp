// SPDX-License-Identifier: MIT
/// \file
/// The options of a program.
#pragma once

#include <CLI/CLI.hpp>
#include <cmath>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include <weir/version.hpp>

#include "run_program.hpp"

namespace limits {

/// A check of an option's number. What is no number is left to CLI11 to refuse.
template <class Holds>
auto number_that(const std::string& expected, Holds holds) {
  return [expected, holds](const std::string& text) -> std::string {
    double value = 0.0;
    if (!CLI::detail::lexical_cast(text, value) || holds(value)) return "";
    return text + ", expected " + expected;
  };
}

inline auto at_least(double least) {
  return number_that("a number >= " + CLI::detail::to_string(least),
                     [=](double v) { return v >= least && std::isfinite(v); });
}

inline auto above_zero() {
  return number_that("a number > 0", [](double v) { return v > 0.0 && std::isfinite(v); });
}

inline auto between(double least, double most) {
  return number_that(
      "a number between " + CLI::detail::to_string(least) + " and " + CLI::detail::to_string(most),
      [=](double v) { return v >= least && v <= most; });
}

}  // namespace limits

/// Options, each of which is a variable: what it holds when it is added is the default.
class CommandLine {
 public:
  explicit CommandLine(const std::string& description) : app_(description) {
    app_.get_formatter()->column_width(34);
    app_.set_help_flag("-h,--help", "Print this and exit");
    app_.set_version_flag("--version",
                          "weir " + std::to_string(WEIR_VERSION_MAJOR) + "." +
                              std::to_string(WEIR_VERSION_MINOR) + "." +
                              std::to_string(WEIR_VERSION_PATCH),
                          "Print the version and exit");
  }

  /// What stands below the options in the help.
  void footer(const std::string& text) { app_.footer(text); }

  /// What is added from here on is listed under this heading.
  void group(const std::string& name) { group_ = name; }

  template <class Value>
  CLI::Option* add(const std::string& name, Value& value, const std::string& help) {
    return app_.add_option(name, value, help)->capture_default_str()->group(group_);
  }
  CLI::Option* add(const std::string& name, bool& value, const std::string& help) {
    return app_.add_flag(name, value, help)->group(group_);
  }
  CLI::Option* add(const std::string& name, std::vector<std::string>& value,
                   const std::string& help) {
    return app_.add_option(name, value, help)->group(group_);
  }

  /// Sets the variables. Returns the exit code if there is nothing left to do.
  std::optional<int> parse(int argc, char** argv) {
    try {
      app_.parse(argc, argv);
    } catch (const CLI::ParseError& error) {
      return app_.exit(error);
    }
    return std::nullopt;
  }

 private:
  CLI::App app_;
  std::string group_ = "Options";
};
