// SPDX-License-Identifier: MIT
/// \file
/// The options of a program.
#pragma once

#include <CLI/CLI.hpp>
#include <optional>
#include <string>
#include <utility>
#include <vector>

/// Options, each of which is a variable: what it holds when it is added is the default.
class CommandLine {
 public:
  explicit CommandLine(const std::string& description) : app_(description) {
    app_.get_formatter()->column_width(34);
    app_.set_help_flag("-h,--help", "Print this and exit");
  }

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
