// SPDX-License-Identifier: MIT
/// \file
/// The sum of some gradients over the ranks that have them.
#pragma once

#include <algorithm>
#include <cstdint>
#include <utility>

#include <weir/core/list.hpp>
#include <weir/core/parameter.hpp>
#include <weir/core/types.hpp>
#include <weir/ops/vector_loops.hpp>
#include <weir/parallel/mpi/exchange.hpp>
#include <weir/parallel/mpi/shared_parameters.hpp>
#include <weir/parallel/timeline.hpp>

namespace weir {

/// Sums the gradients of a bucket of parameters. Each rank sends those of a parameter to its owner,
/// which adds them to its own in the order of the ranks, so that the sum has the same bits in every
/// run; then the owner sends the sum to the others (an all-reduce made of a reduce-scatter and an
/// all-gather, whose parts are whole parameters). The bytes that a rank sends:
///
///     sum over its parameters p of the bucket that it does not own     (1 + size_p) sizeof(T)
///   + sum over those that it owns   (ranks_p - 1) (1 + size_p) sizeof(T)        if sums are shared
///
/// The number before a gradient tells whether the rank has one.
template <class T>
class BucketSum {
 public:
  using Entry = typename SharedParameters<T>::Entry;

  /// \param places   The places of its parameters in `all`.
  BucketSum(List<Index> places, Index size) : places_(std::move(places)), size_(size) {}

  const List<Index>& places() const { return places_; }
  /// How many numbers its parameters have.
  Index size() const { return size_; }

  /// Starts: this rank's gradients are as they are to be added up.
  /// \param shares   Whether all ranks get the sums, or the owners alone.
  void begin(Channel& sums, Channel& shares_through, bool shares, List<Entry>& all) {
    shares_ = shares;
    begin_sums(sums, all);
    if (shares) expect_shares(shares_through, all);
    stage_ = Stage::kSumming;
  }

  bool has_begun() const { return stage_ != Stage::kIdle; }

  /// When the last sum of this rank's owned parameters began, and when the gradients of the other
  /// ranks were found to be here; how many bytes they are.
  Nanoseconds began() const { return sums_.began(); }
  Nanoseconds arrived() const { return sums_.arrived(); }
  Index arriving_bytes() const { return sums_.arriving_bytes(); }

  /// Goes on as far as messages have arrived; waits for them if `waits`.
  /// \return         Whether the sums of this rank's owned parameters are complete and sent.
  bool advance(bool waits, List<Entry>& all) {
    if (stage_ != Stage::kSumming) return true;
    if (waits) sums_.finish_receiving();
    if (!sums_.advance() && !waits) return false;
    add_up(all);
    if (shares_) send_shares(all, write);
    stage_ = Stage::kSharing;
    return true;
  }

  /// Waits for the sums of the others.
  void finish(List<Entry>& all) {
    advance(true, all);
    sums_.finish();
    if (shares_) {
      share_.finish_receiving();
      take_shares(all, [](Entry& entry, const T* from) {
        if (from[0] == T(0)) return;
        std::copy_n(from + 1, entry.size(), gradient(*entry.parameter, from[0]).data());
      });
      share_.finish();
    }
    stage_ = Stage::kIdle;
  }

  /// Starts to give the other ranks the values of the parameters that this one owns.
  void begin_values(Channel& channel, List<Entry>& all) {
    rank_ = channel.rank();
    ranks_ = channel.size();
    expect_shares(channel, all);
    send_shares(all, [](const Entry& entry, T* to) {
      to[0] = T(1);
      std::copy_n(entry.parameter->value.data(), entry.size(), to + 1);
    });
  }

  /// Waits for the values of the parameters that others own.
  void finish_values(List<Entry>& all) {
    share_.finish_receiving();
    take_shares(all, [](Entry& entry, const T* from) {
      std::copy_n(from + 1, entry.size(), entry.parameter->value.data());
    });
    share_.finish();
  }

 private:
  enum class Stage : std::uint8_t { kIdle, kSumming, kSharing };

  static constexpr Index kBytes = static_cast<Index>(sizeof(T));

  // Whether a rank has a gradient, and whether it was reached in this step.
  static T mark_of(const Parameter<T>& p) {
    if (p.grad.size() == 0) return T(0);
    return p.reached ? T(2) : T(1);
  }
  static void write(const Entry& entry, T* to) {
    to[0] = mark_of(*entry.parameter);
    if (to[0] != T(0)) std::copy_n(entry.parameter->grad.data(), entry.size(), to + 1);
  }
  static Matrix<T>& gradient(Parameter<T>& p, T mark) {
    const bool reached = p.reached || mark == T(2);
    Matrix<T>& grad = p.gradient();
    p.reached = reached;
    return grad;
  }

  template <class Body>
  void for_each(List<Entry>& all, Body&& body) {
    for (const Index place : places_) body(all[place]);
  }

  void begin_sums(Channel& channel, List<Entry>& all);
  void expect_shares(Channel& channel, List<Entry>& all);
  void add_up(List<Entry>& all);
  template <class Write>
  void send_shares(List<Entry>& all, Write&& write_entry);
  template <class Read>
  void take_shares(List<Entry>& all, Read&& read_entry);

  List<Index> places_;
  Index size_;
  bool shares_ = true;
  Stage stage_ = Stage::kIdle;
  int rank_ = 0, ranks_ = 1;
  Exchange sums_, share_;
  List<Index> from_;  // Where in what arrives the part of each rank begins, and is read on.
};

template <class T>
void BucketSum<T>::begin_sums(Channel& channel, List<Entry>& all) {
  rank_ = channel.rank();
  ranks_ = channel.size();
  from_.assign(ranks_ + 1, 0);
  for_each(all, [&](Entry& entry) {
    if (entry.owner != rank_) return;
    for (const Index r : entry.ranks) {
      if (r != rank_) from_[r + 1] += 1 + entry.size();
    }
  });
  for (Index r = 0; r < ranks_; ++r) from_[r + 1] += from_[r];
  sums_.begin(channel, "sum of gradients", (size_ + places_.count()) * kBytes,
              from_[ranks_] * kBytes);
  for (Index r = 0; r < ranks_; ++r) {
    sums_.receive(static_cast<int>(r), from_[r] * kBytes, (from_[r + 1] - from_[r]) * kBytes);
  }
  T* const to = reinterpret_cast<T*>(sums_.outgoing());
  Index offset = 0;
  for (Index owner = 0; owner < ranks_; ++owner) {
    if (owner == rank_) continue;
    const Index first = offset;
    for_each(all, [&](Entry& entry) {
      if (entry.owner != owner || entry.parameter == nullptr) return;
      write(entry, to + offset);
      offset += 1 + entry.size();
    });
    sums_.send(static_cast<int>(owner), first * kBytes, (offset - first) * kBytes);
  }
}

template <class T>
void BucketSum<T>::add_up(List<Entry>& all) {
  const T* const arrived = reinterpret_cast<const T*>(sums_.incoming());
  for_each(all, [&](Entry& entry) {
    if (entry.owner != rank_) return;
    Parameter<T>& own = *entry.parameter;
    for (const Index r : entry.ranks) {
      if (r == rank_) continue;
      const T* const theirs = arrived + from_[r];
      from_[r] += 1 + entry.size();
      if (theirs[0] == T(0)) continue;
      Matrix<T>& sum = gradient(own, theirs[0]);  // Zero where this rank had none.
      loops::add<T>(entry.size(), sum.data(), theirs + 1, sum.data());
    }
  });
}

template <class T>
void BucketSum<T>::expect_shares(Channel& channel, List<Entry>& all) {
  Index leaving = 0, offset = 0;
  for_each(all, [&](Entry& entry) {
    if (entry.owner == rank_) leaving += (entry.ranks.count() - 1) * (1 + entry.size());
  });
  share_.begin(channel, "share of gradients", leaving * kBytes, (size_ + places_.count()) * kBytes);
  for (Index owner = 0; owner < ranks_; ++owner) {
    if (owner == rank_) continue;
    const Index first = offset;
    for_each(all, [&](Entry& entry) {
      if (entry.owner == owner && entry.parameter != nullptr) offset += 1 + entry.size();
    });
    share_.receive(static_cast<int>(owner), first * kBytes, (offset - first) * kBytes);
  }
}

template <class T>
template <class Write>
void BucketSum<T>::send_shares(List<Entry>& all, Write&& write_entry) {
  T* const to = reinterpret_cast<T*>(share_.outgoing());
  Index offset = 0;
  for (Index r = 0; r < ranks_; ++r) {
    if (r == rank_) continue;
    const Index first = offset;
    for_each(all, [&](Entry& entry) {
      if (entry.owner != rank_ || !entry.is_on(r)) return;
      write_entry(entry, to + offset);
      offset += 1 + entry.size();
    });
    share_.send(static_cast<int>(r), first * kBytes, (offset - first) * kBytes);
  }
}

template <class T>
template <class Read>
void BucketSum<T>::take_shares(List<Entry>& all, Read&& read_entry) {
  const T* from = reinterpret_cast<const T*>(share_.incoming());
  for (Index owner = 0; owner < ranks_; ++owner) {
    if (owner == rank_) continue;
    for_each(all, [&](Entry& entry) {
      if (entry.owner != owner || entry.parameter == nullptr) return;
      read_entry(entry, from);
      from += 1 + entry.size();
    });
  }
}

}  // namespace weir
