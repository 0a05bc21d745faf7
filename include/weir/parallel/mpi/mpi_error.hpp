// SPDX-License-Identifier: MIT
/// \file
/// Errors of MPI, and of other ranks.
#pragma once

#include <array>
#include <cstddef>
#include <mpi.h>
#include <stdexcept>
#include <string_view>

#include <weir/core/error.hpp>

namespace weir {

/// A call of MPI failed. The message names the call and says what MPI says.
class MpiError : public std::runtime_error {
  using std::runtime_error::runtime_error;
};

/// Another rank was not heard from in time, or sent something else than this one expected. The
/// message names it. The ranks no longer agree then: end the job, as `run_job` does.
class RankError : public std::runtime_error {
  using std::runtime_error::runtime_error;
};

/// \throws MpiError     unless `code`, the result of the MPI function `call`, is MPI_SUCCESS.
inline void expect_success(std::string_view call, int code) {
  if (code == MPI_SUCCESS) return;
  std::array<char, MPI_MAX_ERROR_STRING> text{};
  int length = 0;
  if (MPI_Error_string(code, text.data(), &length) != MPI_SUCCESS) length = 0;
  throw_error<MpiError>(call, ": ",
                        std::string_view(text.data(), static_cast<std::size_t>(length)));
}

}  // namespace weir
