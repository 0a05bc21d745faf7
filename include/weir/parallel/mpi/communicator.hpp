// SPDX-License-Identifier: MIT
/// \file
/// The ranks of an MPI job, and what happens when one of them is not heard from.
#pragma once

#include <exception>
#include <memory>
#include <mpi.h>
#include <string>
#include <thread>
#include <utility>

#include <weir/core/error.hpp>
#include <weir/parallel/mpi/deadline.hpp>
#include <weir/parallel/mpi/exchange_log.hpp>
#include <weir/parallel/mpi/mpi_error.hpp>

namespace weir {

/// Settings of Communicator.
struct CommunicatorConfig {
  /// How long a rank waits for the next message of another one, and for each message to travel,
  /// before it gives up. It has to be longer than any rank computes between two exchanges.
  double timeout_seconds = 60.0;
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
    expect_success("MPI_Comm_rank", MPI_Comm_rank(existing, &rank_));
    expect_success("MPI_Comm_size", MPI_Comm_size(existing, &size_));
    log_ = std::make_shared<OwnLog>(duplicate(existing), rank_, size_);
    comm_ = duplicate(existing);
  }

  /// Another communicator of the same ranks, with the same log.
  explicit Communicator(const Communicator& other, CommunicatorConfig config)
      : config_(config), log_(other.log_), rank_(other.rank_), size_(other.size_) {
    expect_positive("Communicator", "timeout_seconds", config.timeout_seconds);
    log().begin(-1, "a new communicator");
    comm_ = duplicate(other.comm_);
  }

  Communicator(const Communicator&) = delete;
  Communicator& operator=(const Communicator&) = delete;
  Communicator(Communicator&& other) noexcept
      : config_(other.config_),
        log_(std::move(other.log_)),
        comm_(std::exchange(other.comm_, MPI_COMM_NULL)),
        rank_(other.rank_),
        size_(other.size_),
        exceptions_(other.exceptions_) {}
  Communicator& operator=(Communicator&& other) noexcept {
    std::swap(config_, other.config_);
    std::swap(log_, other.log_);
    std::swap(comm_, other.comm_);
    std::swap(rank_, other.rank_);
    std::swap(size_, other.size_);
    return *this;
  }
  ~Communicator() { free(comm_, exceptions_); }

  int rank() const { return rank_; }
  int size() const { return size_; }
  MPI_Comm get() const { return comm_; }
  const CommunicatorConfig& config() const { return config_; }
  /// What the ranks have begun on this communicator and those made from it.
  ExchangeLog& log() const { return log_->log; }

 private:
  /// The log, and its communicator.
  struct OwnLog {
    OwnLog(MPI_Comm comm, int rank, int size) : log(comm, rank, size) {}
    OwnLog(const OwnLog&) = delete;
    OwnLog& operator=(const OwnLog&) = delete;
    ~OwnLog() { free(log.comm(), exceptions); }

    ExchangeLog log;
    int exceptions = std::uncaught_exceptions();
  };

  static void free(MPI_Comm comm, int exceptions) {
    if (comm == MPI_COMM_NULL || std::uncaught_exceptions() > exceptions) return;
    int finalised = 0;
    if (MPI_Finalized(&finalised) == MPI_SUCCESS && finalised == 0) MPI_Comm_free(&comm);
  }

  MPI_Comm duplicate(MPI_Comm existing) const {
    MPI_Comm made = MPI_COMM_NULL;
    MPI_Request request = MPI_REQUEST_NULL;
    expect_success("MPI_Comm_idup", MPI_Comm_idup(existing, &made, &request));
    const Deadline deadline(config_.timeout_seconds);
    for (int done = 0; done == 0;) {
      expect_success("MPI_Test", MPI_Test(&request, &done, MPI_STATUS_IGNORE));
      if (done != 0) break;
      if (log_ != nullptr) log().answer();
      if (deadline.is_over()) fail(deadline.seconds());
      std::this_thread::yield();
    }
    expect_success("MPI_Comm_set_errhandler", MPI_Comm_set_errhandler(made, MPI_ERRORS_RETURN));
    return made;
  }

  [[noreturn]] void fail(double seconds) const {
    std::string fault;
    if (log_ != nullptr) fault = log().out_of_step(log().ask(ExchangeLog::patience(seconds)));
    if (!fault.empty()) throw_error<RankError>("Communicator: ", fault);
    throw_error<RankError>("Communicator: rank ", rank_, " of ", size_, " waited ", seconds,
                           " s for another rank to make the communicator, expected all to");
  }

  CommunicatorConfig config_;
  std::shared_ptr<OwnLog> log_;
  MPI_Comm comm_ = MPI_COMM_NULL;
  int rank_ = 0;
  int size_ = 1;
  int exceptions_ = std::uncaught_exceptions();
};

}  // namespace weir
