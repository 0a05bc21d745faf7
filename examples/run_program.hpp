// SPDX-License-Identifier: MIT
/// \file
/// The `main` of a program.
#pragma once

#include <exception>
#include <iostream>
#include <optional>

/// Runs a program with its options, says what went wrong, and returns the exit code.
/// \param parse    Sets the options; returns the exit code if there is nothing left to do.
template <class Options>
int run_program(const char* name, int argc, char** argv,
                std::optional<int> (*parse)(int argc, char** argv, Options& options),
                void (*run)(Options options)) {
  Options options;
  try {
    if (const auto exit_code = parse(argc, argv, options)) return *exit_code;
    run(options);
  } catch (const std::exception& error) {
    std::cerr << name << ": " << error.what() << '\n';
    return 1;
  }
  return 0;
}
