// SPDX-License-Identifier: MIT
/// \file
/// The ranks of an MPI job, and what happens when one of them is not heard from.
#pragma once

#include <array>
#include <chrono>
#include <exception>
#include <mpi.h>
#include <stdexcept>
#include <string>
#include <string_view>
#include <thread>
#include <utility>

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

/// Settings of Communicator.
struct CommunicatorConfig {
  /// How long a rank waits for the next message of another one, and for each message to travel,
  /// before it gives up. It has to be longer than any rank computes between two exchanges.
  double timeout_seconds = 60.0;
};

/// A clock that runs from now, or from the last `restart`.
class Deadline {
 public:
  explicit Deadline(double seconds) : seconds_(seconds), begin_(Clock::now()) {}

  void restart() { begin_ = Clock::now(); }
  double seconds() const { return seconds_; }
  bool is_over() const {
    return std::chrono::duration<double>(Clock::now() - begin_).count() > seconds_;
  }

 private:
  using Clock = std::chrono::steady_clock;

  double seconds_;
  Clock::time_point begin_;
};

/// The ranks of an existing MPI communicator, in a communicator of their own (`MPI_Comm_idup`), so
/// that its messages meet no others. Errors of MPI become exceptions that name the call, and every
/// wait has an end, see CommunicatorConfig: a rank that died or stalls becomes a RankError of the
/// others instead of a wait for ever.
///
/// Constructors are collective: each rank makes the same communicators in the same order. The
/// destructor frees the communicator, unless an exception is on its way, when other ranks may not
/// come to it, or MPI has been finalised.
class Communicator {
 public:
  /// \throws ConfigError  if the timeout is not positive.
  /// \throws MpiError     if MPI is not initialised, or a call fails.
  /// \throws RankError    if a rank does not take part in time.
  explicit Communicator(MPI_Comm existing, CommunicatorConfig config = {}) : config_(config) {
    expect_positive("Communicator", "timeout_seconds", config.timeout_seconds);
    int initialised = 0;
    expect_success("MPI_Initialized", MPI_Initialized(&initialised));
    if (initialised == 0) {
      throw_error<MpiError>("Communicator: MPI is not initialised, expected MPI_Init before");
    }
    duplicate(existing);
  }

  /// Another communicator of the same ranks.
  explicit Communicator(const Communicator& other, CommunicatorConfig config) : config_(config) {
    expect_positive("Communicator", "timeout_seconds", config.timeout_seconds);
    duplicate(other.comm_);
  }

  Communicator(const Communicator&) = delete;
  Communicator& operator=(const Communicator&) = delete;
  Communicator(Communicator&& other) noexcept
      : config_(other.config_),
        comm_(std::exchange(other.comm_, MPI_COMM_NULL)),
        rank_(other.rank_),
        size_(other.size_),
        exceptions_(other.exceptions_) {}
  Communicator& operator=(Communicator&& other) noexcept {
    std::swap(config_, other.config_);
    std::swap(comm_, other.comm_);
    std::swap(rank_, other.rank_);
    std::swap(size_, other.size_);
    return *this;
  }
  ~Communicator() {
    if (comm_ == MPI_COMM_NULL || std::uncaught_exceptions() > exceptions_) return;
    int finalised = 0;
    if (MPI_Finalized(&finalised) == MPI_SUCCESS && finalised == 0) MPI_Comm_free(&comm_);
  }

  int rank() const { return rank_; }
  int size() const { return size_; }
  MPI_Comm get() const { return comm_; }
  const CommunicatorConfig& config() const { return config_; }

 private:
  void duplicate(MPI_Comm existing) {
    MPI_Request request = MPI_REQUEST_NULL;
    expect_success("MPI_Comm_rank", MPI_Comm_rank(existing, &rank_));
    expect_success("MPI_Comm_size", MPI_Comm_size(existing, &size_));
    expect_success("MPI_Comm_idup", MPI_Comm_idup(existing, &comm_, &request));
    const Deadline deadline(config_.timeout_seconds);
    for (int done = 0; done == 0;) {
      expect_success("MPI_Test", MPI_Test(&request, &done, MPI_STATUS_IGNORE));
      if (done == 0 && deadline.is_over()) {
        comm_ = MPI_COMM_NULL;
        throw_error<RankError>("Communicator: rank ", rank_, " of ", size_, " waited ",
                               deadline.seconds(),
                               " s for another rank to make the communicator, expected all to");
      }
      if (done == 0) std::this_thread::yield();
    }
    expect_success("MPI_Comm_set_errhandler", MPI_Comm_set_errhandler(comm_, MPI_ERRORS_RETURN));
  }

  CommunicatorConfig config_;
  MPI_Comm comm_ = MPI_COMM_NULL;
  int rank_ = 0;
  int size_ = 1;
  int exceptions_ = std::uncaught_exceptions();
};

}  // namespace weir
