// SPDX-License-Identifier: MIT
/// \file
/// What is thrown when a file cannot be read, written or trusted.
#pragma once

#include <stdexcept>

namespace weir::io {

/// A file is missing, cannot be read or written, or is not what its format wants it to be. The
/// message begins with the file's path.
class FileError : public std::runtime_error {
  using std::runtime_error::runtime_error;
};

}  // namespace weir::io
