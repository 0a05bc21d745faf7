// SPDX-License-Identifier: MIT
/// \file
/// The `main` of a program that may be a rank of an MPI job.
#pragma once

#include <optional>

#include "rank_job.hpp"
#include "run_program.hpp"

#ifdef WEIR_MPI
#include <cstdlib>
#include <iostream>
#include <memory>
#include <streambuf>

#include <weir/parallel/mpi/job.hpp>
#include <weir/parallel/mpi/token_travel.hpp>
#endif

/// `run_program`, alone or, where mpirun started it, on each rank, of which the first alone writes
/// to the terminal.
template <class Options>
int run_on_ranks(const char* name, int argc, char** argv,
                 std::optional<int> (*parse)(int argc, char** argv, Options& options),
                 void (*run)(Options options)) {
#ifdef WEIR_MPI
  // What Open MPI, and MPICH and its relatives, set for the programs that they start.
  const bool in_job =
      std::getenv("OMPI_COMM_WORLD_SIZE") != nullptr || std::getenv("PMI_SIZE") != nullptr;
  if (in_job) {
    // Ranks wait for the first one where it alone has something to do.
    const weir::JobConfig config = {.timeout_seconds = 300.0};
    return weir::run_job(argc, argv, config, [&](const weir::Communicator& ranks) {
      rank_job() = {&ranks, std::make_shared<weir::ExpertChannels>(ranks)};
      std::streambuf* const terminal = std::cout.rdbuf();
      if (!rank_job().is_first()) std::cout.rdbuf(nullptr);
      const int code = run_program(name, argc, argv, parse, run);
      std::cout.rdbuf(terminal);
      rank_job() = {};
      return code;
    });
  }
#endif
  return run_program(name, argc, argv, parse, run);
}
