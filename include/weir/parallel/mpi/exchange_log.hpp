// SPDX-License-Identifier: MIT
/// \file
/// What ranks have begun together, so that one that begins something else is known by name.
#pragma once

#include <algorithm>
#include <array>
#include <cstddef>
#include <cstdint>
#include <mpi.h>
#include <optional>
#include <string>
#include <string_view>
#include <thread>
#include <utility>
#include <vector>

#include <weir/core/types.hpp>
#include <weir/parallel/mpi/deadline.hpp>
#include <weir/parallel/mpi/mpi_error.hpp>

namespace weir {

/// The last exchanges that this rank has begun, in all channels of a communicator. All ranks begin
/// the same in the same order. A rank that gives up waiting asks all others, and those that wait as
/// well answer. Comparing the answers shows which rank is out of step, because it left something
/// out or did something else, whoever gives up first. Ranks that do not answer have died, stall or
/// compute.
///
/// Nothing is sent before a rank asks.
class ExchangeLog {
 public:
  /// How many exchanges are remembered.
  static constexpr Index kWindow = 64;

  /// What a rank says of itself. All of it is sent as bytes.
  struct State {
    static constexpr std::size_t kLength = 28;
    struct Entry {
      std::int32_t channel = 0;
      std::array<char, kLength> what{};  ///< Padded with NUL.
      bool operator==(const Entry&) const = default;
    };
    std::int64_t ask = 0;    ///< The number of a question of a rank, and of the answer to it.
    std::int64_t count = 0;  ///< How many exchanges it has begun.
    /// Exchange i, if it is one of the last, at i mod kWindow.
    std::array<Entry, kWindow> last = {};

    const Entry& entry(std::int64_t i) const { return last[static_cast<std::size_t>(i % kWindow)]; }
    bool remembers(std::int64_t i) const { return i < count && i >= count - kWindow && i >= 0; }
  };

  /// \param comm     A communicator that nobody else uses; stays the caller's.
  ExchangeLog(MPI_Comm comm, int rank, int size) : comm_(comm), rank_(rank), size_(size) {}

  MPI_Comm comm() const { return comm_; }

  /// The number of a new channel.
  int add_channel() { return channels_++; }

  /// Takes note of an exchange.
  /// \param what     What it is for; a literal.
  void begin(int channel, std::string_view what) {
    last_[static_cast<std::size_t>(count_++ % kWindow)] = {channel, what};
  }

  /// Answers those that have asked. To be called now and then while this rank waits.
  void answer() {
    int asked = 0;
    MPI_Status status{};
    do {
      expect_success("MPI_Iprobe", MPI_Iprobe(MPI_ANY_SOURCE, kAsk, comm_, &asked, &status));
      if (asked != 0) send(status.MPI_SOURCE, kTell, take(status));
    } while (asked != 0);
  }

  /// How long a rank that has waited in vain waits for answers.
  static double patience(double waited) { return std::min(1.0, 0.5 * waited); }

  /// Asks all other ranks where they are.
  /// \return         What each has answered within the time; this rank's own is there, too.
  const std::vector<std::optional<State>>& ask(double seconds) {
    states_.assign(static_cast<std::size_t>(size_), std::nullopt);
    states_[static_cast<std::size_t>(rank_)] = state();
    ++asks_;
    for (int r = 0; r < size_; ++r) {
      if (r != rank_) send(r, kAsk, asks_);
    }
    const Deadline deadline(seconds);
    const auto all = [&] {
      return std::all_of(states_.begin(), states_.end(),
                         [](const auto& s) { return s.has_value(); });
    };
    while (!all() && !deadline.is_over()) {
      answer();
      int told = 0;
      MPI_Status status{};
      expect_success("MPI_Iprobe", MPI_Iprobe(MPI_ANY_SOURCE, kTell, comm_, &told, &status));
      if (told != 0) take(status);
      if (told == 0) std::this_thread::yield();
    }
    return states_;
  }

  /// Who of those that have answered began something else than the most others, in words; empty if
  /// all began the same as far as is known.
  static std::string out_of_step(const std::vector<std::optional<State>>& states);

 private:
  static constexpr int kAsk = 1, kTell = 2;

  struct Begun {
    int channel = 0;
    std::string_view what;
  };

  State state() const {
    State state;
    state.count = count_;
    for (std::int64_t i = std::max<std::int64_t>(0, count_ - kWindow); i < count_; ++i) {
      const auto at = static_cast<std::size_t>(i % kWindow);
      state.last[at].channel = last_[at].channel;
      const std::string_view what = last_[at].what.substr(0, State::kLength);
      std::copy(what.begin(), what.end(), state.last[at].what.begin());
    }
    return state;
  }

  /// Receives a question, or an answer. \return  The number of the question.
  std::int64_t take(const MPI_Status& status) {
    State theirs;
    expect_success("MPI_Recv", MPI_Recv(&theirs, sizeof theirs, MPI_BYTE, status.MPI_SOURCE,
                                        status.MPI_TAG, comm_, MPI_STATUS_IGNORE));
    states_.resize(static_cast<std::size_t>(size_));
    const bool late = status.MPI_TAG == kTell && theirs.ask != asks_;
    if (!late) states_[static_cast<std::size_t>(status.MPI_SOURCE)] = theirs;
    return theirs.ask;
  }

  void send(int to, int tag, std::int64_t ask) {
    auto* const message = new State(state());  // MPI may read it until the job ends, which is soon.
    message->ask = ask;
    MPI_Request request = MPI_REQUEST_NULL;
    expect_success("MPI_Isend",
                   MPI_Isend(message, sizeof *message, MPI_BYTE, to, tag, comm_, &request));
    expect_success("MPI_Request_free", MPI_Request_free(&request));
  }

  MPI_Comm comm_;
  int rank_, size_;
  int channels_ = 0;
  std::int64_t count_ = 0, asks_ = 0;
  std::array<Begun, kWindow> last_{};
  std::vector<std::optional<State>> states_;
};

inline std::string ExchangeLog::out_of_step(const std::vector<std::optional<State>>& states) {
  std::int64_t end = 0;
  for (const auto& state : states) end = std::max(end, state ? state->count : 0);
  for (std::int64_t i = std::max<std::int64_t>(0, end - 2 * kWindow); i < end; ++i) {
    // Those that began the same as exchange i, together.
    std::vector<std::pair<State::Entry, std::vector<std::size_t>>> groups;
    for (std::size_t r = 0; r < states.size(); ++r) {
      if (!states[r] || !states[r]->remembers(i)) continue;
      const State::Entry& entry = states[r]->entry(i);
      const auto group = std::find_if(groups.begin(), groups.end(),
                                      [&](const auto& g) { return g.first == entry; });
      if (group == groups.end()) {
        groups.push_back({entry, {r}});
      } else {
        group->second.push_back(r);
      }
    }
    if (groups.size() < 2) continue;
    std::stable_sort(groups.begin(), groups.end(), [](const auto& a, const auto& b) {
      return a.second.size() < b.second.size();
    });
    const auto named = [](const auto& group) {
      std::string text;
      for (const std::size_t r : group.second) {
        text += (text.empty() ? "rank " : ", rank ") + std::to_string(r);
      }
      const auto& what = group.first.what;
      return std::pair(text, std::string(what.begin(), std::find(what.begin(), what.end(), '\0')));
    };
    const bool majority = groups.back().second.size() > groups[groups.size() - 2].second.size();
    std::string text;
    for (std::size_t g = 0; g + (majority ? 1 : 0) < groups.size(); ++g) {
      const auto [ranks, what] = named(groups[g]);
      text.append(text.empty() ? "" : " and ").append(ranks).append(" began '").append(what);
      text += '\'';
    }
    text += " as exchange " + std::to_string(i) + " of the job, expected ";
    if (!majority) return text + "the same on all ranks";
    const auto [ranks, what] = named(groups.back());
    return text.append(1, '\'').append(what).append("' as ").append(ranks);
  }
  return "";
}

}  // namespace weir
