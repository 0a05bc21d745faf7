// SPDX-License-Identifier: MIT
/// \file
/// Messages that travel while a rank computes.
#pragma once

#include <atomic>
#include <chrono>
#include <mpi.h>
#include <thread>

#include <weir/core/error.hpp>
#include <weir/parallel/mpi/communicator.hpp>

namespace weir {

/// A thread that lets MPI go on with its messages while the rank computes. MPI moves large messages
/// only inside of its own functions: without this thread that is between the chunks of
/// ExpertParallel, and what the network's own memory holds. It sleeps most of the time; a processor
/// of its own does it good.
class ProgressThread {
 public:
  /// Collective. Needs MPI with MPI_THREAD_MULTIPLE, see `JobConfig::progress_thread`.
  /// \throws ConfigError  if MPI was initialised for one thread.
  explicit ProgressThread(const Communicator& ranks) : comm_(ranks, ranks.config()) {
    int provided = MPI_THREAD_SINGLE;
    expect_success("MPI_Query_thread", MPI_Query_thread(&provided));
    if (provided < MPI_THREAD_MULTIPLE) {
      throw_error<ConfigError>("ProgressThread: MPI was initialised with thread level ", provided,
                               ", expected MPI_THREAD_MULTIPLE");
    }
    thread_ = std::thread([this] { run(); });
  }
  ProgressThread(const ProgressThread&) = delete;
  ProgressThread& operator=(const ProgressThread&) = delete;
  ~ProgressThread() {
    stopped_ = true;
    thread_.join();
  }

 private:
  void run() {
    constexpr std::chrono::microseconds kPause(200);
    while (!stopped_) {
      int arrived = 0;  // Nobody sends anything here: to ask is what matters.
      MPI_Iprobe(MPI_ANY_SOURCE, MPI_ANY_TAG, comm_.get(), &arrived, MPI_STATUS_IGNORE);
      std::this_thread::sleep_for(kPause);
    }
  }

  Communicator comm_;
  std::atomic<bool> stopped_ = false;
  std::thread thread_;
};

}  // namespace weir
