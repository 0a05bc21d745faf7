// SPDX-License-Identifier: MIT
// Compares weir with values that other implementations computed, one file per case.
#include <charconv>
#include <cmath>
#include <exception>
#include <iostream>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "golden/case_file.hpp"
#include "golden/checker.hpp"
#include "golden/families.hpp"

namespace {

using namespace weir::golden;

constexpr double kTolerance = 1e-9;

/// What the program, or a file, comes to; also the exit status.
enum Outcome { kPass = 0, kFail = 1, kUnknown = 2 };

void print_help() {
  std::cout
      << "usage: check_golden [--tolerance X] FILE...\n"
         "\n"
         "Rebuilds the case in each golden FILE (safetensors) from its configuration (cfg.*),\n"
         "inputs (in.*) and weights (w.*), runs weir on it in double precision, forward and\n"
         "backward, and compares every result (out.*) and gradient (g.*) that the file holds:\n"
         "\n"
         "  - integers and masks exactly, top-k choices in any order;\n"
         "  - numbers by the largest difference over the largest entry of the tensor in the\n"
         "    file (the difference itself where no entry exceeds 1e-12).\n"
         "\n"
         "What a file does not have is not compared. A tensor of the file that nothing is "
         "compared\n"
         "with or computed from is a failure. Where scores are equal, the choice is the file's.\n"
         "\n"
         "  --tolerance X   the largest relative error that passes (default 1e-9)\n"
         "  --help          this text\n"
         "\n"
         "Exit status: 0 if all passes; 1 on any failure, among them a file that is missing,\n"
         "malformed or contradicts itself; 2 if a case is not known and nothing failed (1 wins\n"
         "over 2). The leading number of the metadata entry `case`, or else of the name of the\n"
         "file, says what the case is. Known are:\n"
         "\n";
  for (const Family& family : kFamilies) {
    std::cout << (family.number < 10 ? "  0" : "  ") << family.number << "  " << family.what
              << '\n';
  }
}

/// \throws UnknownCase  if no family has the number of `file`.
const Family& family_of(const CaseFile& file) {
  const auto number = file.family();
  for (const Family& family : kFamilies) {
    if (number == family.number) return family;
  }
  weir::throw_error<UnknownCase>(file.path(), ": case '", file.name(), "' is not known");
}

Outcome check_file(const std::string& path, double tolerance) {
  std::cout << path << '\n';
  try {
    CaseFile file(Safetensors::read(path));
    const Family& family = family_of(file);
    Checker checker(file, tolerance, std::cout);
    family.check(file, checker);
    checker.finish();
    std::cout << "  " << checker.checks() << " checks, " << checker.failures() << " failed\n";
    return checker.failures() == 0 ? kPass : kFail;
  } catch (const UnknownCase& unknown) {
    std::cerr << "check_golden: " << unknown.what() << '\n';
    return kUnknown;
  } catch (const FileError& error) {
    std::cerr << "check_golden: " << error.what() << '\n';
  } catch (const std::exception& error) {
    std::cerr << "check_golden: " << path << ": " << error.what() << '\n';
  }
  return kFail;
}

int fail_usage(const std::string& what) {
  std::cerr << "check_golden: " << what << "; see check_golden --help\n";
  return kFail;
}

bool parse_tolerance(std::string_view text, double& tolerance) {
  const char* end = text.data() + text.size();
  const auto result = std::from_chars(text.data(), end, tolerance);
  return result.ec == std::errc() && result.ptr == end && std::isfinite(tolerance) &&
         tolerance >= 0.0;
}

int run(const std::vector<std::string>& arguments) {
  double tolerance = kTolerance;
  std::vector<std::string> paths;
  for (std::size_t i = 0; i < arguments.size(); ++i) {
    const std::string& argument = arguments[i];
    if (argument == "--help") {
      print_help();
      return kPass;
    }
    if (argument == "--tolerance") {
      if (i + 1 == arguments.size()) return fail_usage("--tolerance needs a value");
      if (!parse_tolerance(arguments[++i], tolerance)) {
        return fail_usage("--tolerance " + arguments[i] + ", expected a finite number >= 0");
      }
    } else if (argument.starts_with("-")) {
      return fail_usage("unknown option " + argument);
    } else {
      paths.push_back(argument);
    }
  }
  if (paths.empty()) return fail_usage("no file given");

  int failed = 0;
  int unknown = 0;
  for (const std::string& path : paths) {
    const Outcome outcome = check_file(path, tolerance);
    failed += outcome == kFail ? 1 : 0;
    unknown += outcome == kUnknown ? 1 : 0;
  }
  std::cout << paths.size() << " files, " << failed << " failed, " << unknown << " not known\n";
  return failed > 0 ? kFail : unknown > 0 ? kUnknown : kPass;
}

}  // namespace

int main(int argc, char** argv) {
  try {
    return run({argv + 1, argv + argc});
  } catch (const std::exception& error) {
    std::cerr << "check_golden: " << error.what() << '\n';
    return kFail;
  }
}
