// SPDX-License-Identifier: MIT
/// \file
/// What is thrown when a file cannot be read, written or trusted.
#pragma once

#include <algorithm>
#include <cstddef>
#include <stdexcept>
#include <string>
#include <vector>

#include <weir/core/error.hpp>

namespace weir::io {

/// A file is missing, cannot be read or written, or is not what its format wants it to be. The
/// message begins with the file's path.
class FileError : public std::runtime_error {
  using std::runtime_error::runtime_error;
};

/// \throws FileError  if there are faults, naming up to five of them.
inline void expect_no_faults(const std::string& path, const std::vector<std::string>& faults) {
  if (faults.empty()) return;
  constexpr std::size_t kMostNamed = 5;
  std::string text;
  for (std::size_t i = 0; i < std::min(faults.size(), kMostNamed); ++i) {
    text += (i > 0 ? "; " : "") + faults[i];
  }
  if (faults.size() > kMostNamed) {
    text += "; and " + std::to_string(faults.size() - kMostNamed) + " more";
  }
  throw_error<FileError>(path, ": ", text);
}

}  // namespace weir::io
