// SPDX-License-Identifier: MIT
/// \file
/// The main function of a program whose ranks end together.
#pragma once

#include <algorithm>
#include <chrono>
#include <cstdio>
#include <exception>
#include <mpi.h>
#include <optional>
#include <string>
#include <string_view>
#include <thread>

#include <weir/core/function_ref.hpp>
#include <weir/parallel/mpi/communicator.hpp>
#include <weir/parallel/mpi/progress_thread.hpp>

namespace weir {

/// Ends the job on all ranks: writes "rank 1 of 4: `message`" to standard error, and calls
/// MPI_Abort.
[[noreturn]] inline void end_job(const Communicator& ranks, std::string_view message) {
  const std::string line = "rank " + std::to_string(ranks.rank()) + " of " +
                           std::to_string(ranks.size()) + ": " + std::string(message) + '\n';
  std::fwrite(line.data(), 1, line.size(), stderr);
  std::fflush(stderr);
  // One after the other, where several ranks give up at once: the first call ends all ranks, and
  // Open MPI's mpirun has crashed in a run in which it got two.
  std::this_thread::sleep_for(std::chrono::milliseconds(200) * std::min(ranks.rank(), 20));
  MPI_Abort(ranks.get(), 1);
  std::terminate();  // MPI_Abort does not return.
}

/// Waits for all ranks to come to the end, so that none is in MPI_Finalize while another one ends
/// the job, at which Open MPI's mpirun may hang. Twice the timeout, as the others are the ones who
/// can tell what they miss.
/// \throws RankError    if they do not.
inline void wait_for_the_end(const Communicator& ranks) {
  MPI_Request request = MPI_REQUEST_NULL;
  expect_success("MPI_Ibarrier", MPI_Ibarrier(ranks.get(), &request));
  ranks.log().begin(-1, "the end of the job");
  const Deadline deadline(2.0 * ranks.config().timeout_seconds);
  for (int done = 0; done == 0;) {
    expect_success("MPI_Test", MPI_Test(&request, &done, MPI_STATUS_IGNORE));
    if (done != 0) return;
    ranks.log().answer();
    if (deadline.is_over()) {
      throw_error<RankError>("run_job: has ended, and waited ", deadline.seconds(),
                             " s for the other ranks, expected them to end as well");
    }
    std::this_thread::yield();
  }
}

/// Settings of `run_job`.
struct JobConfig {
  double timeout_seconds = CommunicatorConfig{}.timeout_seconds;
  bool progress_thread = false;  ///< Whether the ranks have a ProgressThread each.
};

/// Runs `body` on all ranks of MPI_COMM_WORLD, between MPI_Init and MPI_Finalize:
///
///     int main(int argc, char** argv) {
///       return weir::run_job(argc, argv, {}, [&](const weir::Communicator& ranks) { ... });
///     }
///
/// An exception that leaves `body` on one rank, be it of that rank alone (no memory, a file that is
/// missing) or a RankError, ends the job on all of them by `end_job`; so does a rank that returns
/// another number than 0, and one that returns long before the others.
/// \return         What `body` returned.
inline int run_job(int argc, char** argv, const JobConfig& config,
                   FunctionRef<int(const Communicator&)> body) {
  int provided = MPI_THREAD_SINGLE;
  const int needed = config.progress_thread ? MPI_THREAD_MULTIPLE : MPI_THREAD_FUNNELED;
  if (MPI_Init_thread(&argc, &argv, needed, &provided) != MPI_SUCCESS) return 1;
  // What goes wrong with one of several messages is told to these in MPICH, not to the
  // communicator.
  for (MPI_Comm comm : {MPI_COMM_WORLD, MPI_COMM_SELF}) {
    expect_success("MPI_Comm_set_errhandler", MPI_Comm_set_errhandler(comm, MPI_ERRORS_RETURN));
  }
  int code = 0;
  {
    const Communicator ranks(MPI_COMM_WORLD, {.timeout_seconds = config.timeout_seconds});
    try {
      std::optional<ProgressThread> progress;
      if (config.progress_thread) progress.emplace(ranks);
      code = body(ranks);
      if (code == 0) wait_for_the_end(ranks);
    } catch (const std::exception& error) {
      end_job(ranks, error.what());
    } catch (...) {
      end_job(ranks, "an exception that is no std::exception");
    }
    if (code != 0) end_job(ranks, "ended with code " + std::to_string(code));
  }
  MPI_Finalize();
  return code;
}

}  // namespace weir
