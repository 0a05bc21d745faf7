// SPDX-License-Identifier: MIT
/// \file
/// What all ranks do, or none has done. Needs weir::io.
#pragma once

#include <cstddef>
#include <exception>
#include <string>
#include <vector>

#include <weir/core/error.hpp>
#include <weir/core/function_ref.hpp>
#include <weir/io/file_error.hpp>
#include <weir/parallel/mpi/collectives.hpp>
#include <weir/parallel/mpi/exchange.hpp>

namespace weir::io::detail {

/// Does `action` on this rank, and says what went wrong, if anything.
inline std::string fault_of(FunctionRef<void()> action) {
  try {
    action();
  } catch (const std::exception& error) {
    const std::string fault = error.what();
    return fault.empty() ? "failed" : fault;
  }
  return "";
}

/// Lets all ranks know whether something went wrong on one.
/// \param fault     What went wrong here, or nothing.
/// \throws FileError  on all ranks, with what the first rank said that has a fault.
inline void expect_no_fault(Channel& channel, Exchange& exchange, const std::string& fault) {
  const std::vector<std::string> faults =
      all_gather_texts(channel, exchange, "faults of ranks", fault);
  for (std::size_t r = 0; r < faults.size(); ++r) {
    if (!faults[r].empty()) throw_error<FileError>("rank ", r, ": ", faults[r]);
  }
}

/// Does `action` on this rank, and lets all ranks know whether all could.
/// \throws FileError  as `expect_no_fault`.
inline void on_all_ranks(Channel& channel, Exchange& exchange, FunctionRef<void()> action) {
  expect_no_fault(channel, exchange, fault_of(action));
}

}  // namespace weir::io::detail
