// SPDX-License-Identifier: MIT
/// \file
/// Messages between ranks that all send to all, while the program goes on.
#pragma once

#include <algorithm>
#include <cstddef>
#include <exception>
#include <memory>
#include <mpi.h>
#include <new>
#include <string>
#include <string_view>
#include <thread>
#include <utility>

#include <weir/core/error.hpp>
#include <weir/core/list.hpp>
#include <weir/core/scratch.hpp>
#include <weir/core/types.hpp>
#include <weir/parallel/mpi/communicator.hpp>
#include <weir/parallel/timeline.hpp>

namespace weir {

/// A communicator on which exchanges follow each other in an order that is the same on all ranks. A
/// message carries the number of its exchange as its tag. Since MPI delivers the messages between
/// two ranks in the order in which they were sent, a rank that left out an exchange, or had one too
/// many, is noticed by the next message.
///
/// Exchanges of two channels may overlap. All ranks begin those of all channels in the same order,
/// by which a rank that is out of step is found, see ExchangeLog.
class Channel {
 public:
  explicit Channel(const Communicator& ranks)
      : comm_(ranks, ranks.config()), number_(comm_.log().add_channel()) {}

  int rank() const { return comm_.rank(); }
  int size() const { return comm_.size(); }
  MPI_Comm comm() const { return comm_.get(); }
  double timeout_seconds() const { return comm_.config().timeout_seconds; }

  ExchangeLog& log() const { return comm_.log(); }

  /// Begins the next exchange, of which the log takes note.
  /// \return         Its tag.
  int begin(std::string_view what) {
    log().begin(number_, what);
    return static_cast<int>(sequence_++ % kTags);
  }

 private:
  static constexpr Index kTags = 32768;  // MPI promises that many.

  Communicator comm_;
  int number_;
  Index sequence_ = 0;
};

/// One all-to-all-v of bytes, or a part of it, made of non-blocking sends and receives, so that a
/// rank that is missing is known by name and no rank waits for a message that it does not need:
///
///     exchange.begin(channel, "dispatch", bytes_to_send, bytes_to_receive);
///     exchange.receive(from, offset, bytes);           // for each rank that sends any
///     (write to exchange.outgoing())
///     exchange.send(to, offset, bytes);                // for each rank that gets any
///     exchange.advance();                              // now and then: lets messages travel
///     exchange.finish();                               // all are here: read exchange.incoming()
///
/// Both ranks know the size of each message beforehand; of no bytes there is no message. What
/// arrives with another size, or out of turn, is refused.
///
/// It owns the memory of its messages, which grows and never shrinks. An exchange that is destroyed
/// with messages on their way, as after an exception, leaves that memory to MPI, which may still
/// write to it. A copy starts empty.
class Exchange {
 public:
  Exchange() = default;
  Exchange(const Exchange& /*other*/) {}
  // NOLINTNEXTLINE(bugprone-unhandled-self-assignment)
  Exchange& operator=(const Exchange& /*other*/) { return *this; }
  Exchange(Exchange&& other) noexcept { swap(other); }
  Exchange& operator=(Exchange&& other) noexcept {
    swap(other);
    return *this;
  }
  ~Exchange() {
    if (pending() > 0) abandon();
  }

  void swap(Exchange& other) noexcept {
    std::swap(channel_, other.channel_);
    std::swap(what_, other.what_);
    std::swap(tag_, other.tag_);
    std::swap(pending_, other.pending_);
    std::swap(arriving_, other.arriving_);
    std::swap(began_, other.began_);
    std::swap(arrived_, other.arrived_);
    outgoing_.swap(other.outgoing_);
    incoming_.swap(other.incoming_);
    requests_.swap(other.requests_);
    messages_.swap(other.messages_);
    done_.swap(other.done_);
    statuses_.swap(other.statuses_);
  }

  /// Starts the next exchange of `channel`, which has to outlive it. All ranks do so in the same
  /// order.
  /// \param what     What it is for, in messages; a literal.
  /// \throws StateError   if messages of the one before are still on their way.
  void begin(Channel& channel, std::string_view what, Index send_bytes, Index receive_bytes) {
    if (pending() > 0) {
      throw_error<StateError>("Exchange::begin: ", pending(), " messages of ", what_,
                              " are on their way, expected finish() before");
    }
    channel_ = &channel;
    what_ = what;
    tag_ = channel.begin(what);
    began_ = arrived_ = Timeline::now();
    requests_.clear();
    messages_.clear();
    outgoing_.reserve(send_bytes);
    incoming_.reserve(receive_bytes);
  }

  std::byte* outgoing() { return outgoing_.data(); }
  std::byte* incoming() { return incoming_.data(); }
  const std::byte* incoming() const { return incoming_.data(); }

  /// Expects `bytes` from rank `from`, at `offset` of `incoming`.
  void receive(int from, Index offset, Index bytes) { add(from, true, offset, bytes); }

  /// Sends `bytes` from `offset` of `outgoing` on, which stay as they are until `finish`.
  void send(int to, Index offset, Index bytes) { add(to, false, offset, bytes); }

  /// When it began, and when the last message of another rank was found to be here.
  Nanoseconds began() const { return began_; }
  Nanoseconds arrived() const { return arrived_; }

  /// How many bytes other ranks send.
  Index arriving_bytes() const {
    Index sum = 0;
    for (const Message& message : messages_) sum += message.arrives ? message.bytes : 0;
    return sum;
  }

  /// How many messages are on their way, in both directions.
  Index pending() const { return pending_; }

  /// Whether all messages of other ranks were found to be here.
  bool has_arrived() const { return arriving_ == 0; }

  /// Lets messages travel, and takes note of those that have arrived.
  /// \return         Whether all have.
  /// \throws RankError    if one is not what was expected.
  bool advance() {
    if (pending_ > 0) test();
    return pending_ == 0;
  }

  /// Waits until all messages have arrived, those of other ranks here and those of this one there.
  /// \throws RankError    if one is not what was expected, or none arrives for
  ///                      `channel.timeout_seconds()`.
  void finish() { wait(pending_); }

  /// Waits until the messages of the other ranks are here. Those of this one may be on their way.
  /// \throws RankError    as `finish`.
  void finish_receiving() { wait(arriving_); }

 private:
  static constexpr Index kLargest = Index{1} << 30;  // Of one message; MPI counts with an int.

  struct Message {
    int peer = 0;
    bool arrives = false;
    int bytes = 0;
  };

  void wait(const Index& left) {
    if (left == 0) return;
    Deadline deadline(channel_->timeout_seconds());
    constexpr Index kOften = 64;
    Index turn = 0;
    while (left > 0) {
      if (test()) {
        deadline.restart();
      } else if (deadline.is_over()) {
        fail_missing(deadline.seconds());
      } else {
        if (++turn % kOften == 0) channel_->log().answer();
        std::this_thread::yield();
      }
    }
  }

  void add(int peer, bool arrives, Index offset, Index bytes) {
    for (Index begin = 0; begin < bytes; begin += kLargest) {
      const int count = static_cast<int>(std::min(kLargest, bytes - begin));
      MPI_Request request = MPI_REQUEST_NULL;
      if (arrives) {
        expect_success("MPI_Irecv", MPI_Irecv(incoming_.data() + offset + begin, count, MPI_BYTE,
                                              peer, MPI_ANY_TAG, channel_->comm(), &request));
      } else {
        expect_success("MPI_Isend", MPI_Isend(outgoing_.data() + offset + begin, count, MPI_BYTE,
                                              peer, tag_, channel_->comm(), &request));
      }
      requests_.push_back(request);
      messages_.push_back({peer, arrives, count});
      ++pending_;
      arriving_ += arrives ? 1 : 0;
    }
  }

  /// Whether a message has arrived.
  bool test() {
    const Index arriving = arriving_;
    done_.resize(requests_.count());
    statuses_.resize(requests_.count());
    int count = 0;
    const int code = MPI_Testsome(static_cast<int>(requests_.count()), requests_.data(), &count,
                                  done_.data(), statuses_.data());
    int kind = MPI_SUCCESS;
    MPI_Error_class(code, &kind);
    if (kind != MPI_ERR_IN_STATUS) expect_success("MPI_Testsome", code);
    if (count == MPI_UNDEFINED) count = 0;
    for (Index i = 0; i < count; ++i) {
      check(messages_[done_[i]], statuses_[i],
            kind == MPI_ERR_IN_STATUS ? statuses_[i].MPI_ERROR : MPI_SUCCESS);
      --pending_;
      arriving_ -= messages_[done_[i]].arrives ? 1 : 0;
    }
    if (count > 0 && arriving > 0 && arriving_ == 0) arrived_ = Timeline::now();
    return count > 0;
  }

  void check(const Message& message, const MPI_Status& status, int code) const {
    int kind = MPI_SUCCESS;
    MPI_Error_class(code, &kind);
    if (kind == MPI_ERR_TRUNCATE) {
      fail(message, "a message of more than ", message.bytes);
    }
    expect_success(message.arrives ? "MPI_Irecv" : "MPI_Isend", code);
    if (!message.arrives) return;
    int bytes = 0;
    expect_success("MPI_Get_count", MPI_Get_count(&status, MPI_BYTE, &bytes));
    if (status.MPI_TAG != tag_) {
      throw_error<RankError>(what_, ": rank ", message.peer, " of ", channel_->size(),
                             " is at exchange ", status.MPI_TAG, ", expected exchange ", tag_,
                             " as rank ", channel_->rank());
    }
    if (bytes != message.bytes) fail(message, "a message of ", bytes);
  }

  [[noreturn]] void fail(const Message& message, std::string_view what, int bytes) const {
    throw_error<RankError>(what_, ": rank ", message.peer, " of ", channel_->size(), " sent ", what,
                           bytes, " bytes, expected ", message.bytes, " (rank ", channel_->rank(),
                           ", exchange ", tag_, ")");
  }

  /// Those that are out of step are at fault; or else, of those that sent nothing, the ones that do
  /// not wait themselves, or all; or else those that took nothing.
  [[noreturn]] void fail_missing(double seconds) const {
    const auto& states = channel_->log().ask(ExchangeLog::patience(seconds));
    const std::string fault = ExchangeLog::out_of_step(states);
    if (!fault.empty()) {
      throw_error<RankError>(what_, ": ", fault, " (rank ", channel_->rank(), " of ",
                             channel_->size(), ", exchange ", tag_, ")");
    }
    std::string silent, senders, takers;
    const auto add = [](std::string& names, int peer) {
      const std::string name = std::to_string(peer);
      if (names.ends_with(' ' + name)) return;
      names += (names.empty() ? "rank " : ", rank ") + name;
    };
    for (Index i = 0; i < requests_.count(); ++i) {
      if (requests_[i] == MPI_REQUEST_NULL) continue;
      const auto& [peer, arrives, bytes] = messages_[i];
      add(arrives ? senders : takers, peer);
      if (arrives && !states[static_cast<std::size_t>(peer)]) add(silent, peer);
    }
    const std::string& named = !silent.empty() ? silent : !senders.empty() ? senders : takers;
    throw_error<RankError>(what_, ": ", named, " of ", channel_->size(),
                           senders.empty() ? " took nothing for " : " sent nothing for ", seconds,
                           " s, expected a message (rank ", channel_->rank(), ", exchange ", tag_,
                           ")");
  }

  void abandon() noexcept {
    int finalised = 0;
    if (MPI_Finalized(&finalised) == MPI_SUCCESS && finalised == 0) {
      for (Index i = 0; i < requests_.count(); ++i) {
        if (requests_[i] != MPI_REQUEST_NULL && messages_[i].arrives) MPI_Cancel(&requests_[i]);
      }
    }
    try {  // Two that nobody ever destroys.
      ::new Scratch<std::byte>(std::move(outgoing_));
      ::new Scratch<std::byte>(std::move(incoming_));
    } catch (const std::bad_alloc&) {
      std::terminate();
    }
  }

  Channel* channel_ = nullptr;
  std::string_view what_;
  int tag_ = 0;
  Index pending_ = 0;
  Index arriving_ = 0;  // Those of them that other ranks send.
  Nanoseconds began_ = 0, arrived_ = 0;
  Scratch<std::byte> outgoing_, incoming_;
  List<MPI_Request> requests_;
  List<Message> messages_;
  List<int> done_;
  List<MPI_Status> statuses_;
};

}  // namespace weir
