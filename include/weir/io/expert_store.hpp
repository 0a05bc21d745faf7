// SPDX-License-Identifier: MIT
/// \file
/// Which experts of a model are in memory.
#pragma once

#include <algorithm>
#include <compare>
#include <cstddef>
#include <iterator>
#include <list>
#include <map>
#include <memory>
#include <mutex>
#include <utility>

#include <weir/core/aligned.hpp>
#include <weir/core/error.hpp>
#include <weir/core/function_ref.hpp>
#include <weir/core/types.hpp>
#include <weir/nn/packed_glu.hpp>

namespace weir::io {

/// An expert of a model: its layer and its number there.
struct ExpertKey {
  Index layer = 0, expert = 0;
  auto operator<=>(const ExpertKey&) const = default;
};

/// What an `ExpertStore` has done so far.
struct ExpertStatistics {
  Index hits = 0;              ///< Experts that were in memory when they were wanted.
  Index misses = 0;            ///< Experts that had to be fetched.
  Index evictions = 0;         ///< Experts that made room for others.
  Index predicted = 0;         ///< Experts that were predicted and not in memory.
  Index confirmed = 0;         ///< Those of them that the next fetch of their layer wanted.
  std::size_t bytes = 0;       ///< What is in memory now.
  std::size_t most_bytes = 0;  ///< The most that was.

  /// The share of wanted experts that were in memory; 0 before the first.
  double hit_rate() const {
    return hits + misses == 0 ? 0.0
                              : static_cast<double>(hits) / static_cast<double>(hits + misses);
  }
};

/// Memory for experts. That of the last one that was let go is kept for the next one of its size:
/// to fetch new pages from the system, which clears them, takes a quarter of the time of reading
/// an expert from the page cache. Must be in a shared pointer.
class ExpertMemory : public std::enable_shared_from_this<ExpertMemory> {
 public:
  /// Contents unspecified. May be called from several threads, as may be the end of the memory.
  SharedMemory take(std::size_t bytes) {
    Memory memory = exchange(nullptr);
    if (memory == nullptr || memory.get_deleter().size != bytes) {
      memory.reset();
      memory = allocate_aligned<std::byte>(bytes);
    }
    const auto let_go = [self = this->shared_from_this(), bytes](std::byte* begin) {
      self->exchange(Memory(begin, {bytes}));
    };
    return {std::shared_ptr<std::byte>(memory.release(), let_go), bytes};
  }

 private:
  using Memory = AlignedMemory<std::byte>;

  /// Keeps `memory`, and returns what was kept before.
  Memory exchange(Memory memory) {
    const std::scoped_lock lock(mutex_);
    spare_.swap(memory);
    return memory;
  }

  std::mutex mutex_;
  Memory spare_;
};

/// Packed experts in memory, up to a number of bytes, for all layers of a model. Where there is no
/// room for another one, the least recently used makes room, but experts that have been used more
/// than once are kept before those that have been used once: the store has two lists, each ordered
/// by the last use. A new expert begins in the first; with its second use it comes into the second,
/// which holds up to 3/4 of the bytes and gives its least recently used back to the first. The
/// least recently used of the first list goes. (Segmented LRU: Karedla, Love & Wherry 1994,
/// doi:10.1109/2.268884.)
///
/// Experts that a pass still computes with stay until it is done, even if they have made room. All
/// functions may be called from several threads.
template <class T>
class ExpertStore {
 public:
  /// \throws ConfigError  if there is no room for anything.
  explicit ExpertStore(std::size_t capacity) : capacity_(capacity) {
    if (capacity == 0) throw_error<ConfigError>("ExpertStore: capacity = 0, expected >= 1");
  }

  /// The weights of an expert, from memory or else by `load()`.
  /// \param bytes    What they take.
  PackedGlu<T> get(const ExpertKey& key, std::size_t bytes, FunctionRef<PackedGlu<T>()> load);

  bool holds(const ExpertKey& key) const {
    const std::scoped_lock lock(mutex_);
    return places_.contains(key);
  }

  std::size_t capacity() const { return capacity_; }

  /// Where experts are to be stored.
  SharedMemory memory(std::size_t bytes) { return memory_->take(bytes); }

  ExpertStatistics statistics() const {
    const std::scoped_lock lock(mutex_);
    return statistics_;
  }

  /// Counts experts that were predicted, and how many of them were wanted then.
  void count_predictions(Index predicted, Index confirmed) {
    const std::scoped_lock lock(mutex_);
    statistics_.predicted += predicted;
    statistics_.confirmed += confirmed;
  }

 private:
  struct Entry {
    ExpertKey key;
    std::size_t bytes = 0;
    PackedGlu<T> weights;
  };
  using Entries = std::list<Entry>;  // The most recently used first.

  struct Place {
    typename Entries::iterator entry;
    bool is_hot = false;
  };

  void use(Place& place);
  void make_room(std::size_t bytes);

  mutable std::mutex mutex_;
  std::shared_ptr<ExpertMemory> memory_ = std::make_shared<ExpertMemory>();
  std::size_t capacity_;
  Entries once_, hot_;
  std::size_t hot_bytes_ = 0;
  std::map<ExpertKey, Place> places_;
  ExpertStatistics statistics_;
};

template <class T>
PackedGlu<T> ExpertStore<T>::get(const ExpertKey& key, std::size_t bytes,
                                 FunctionRef<PackedGlu<T>()> load) {
  const std::scoped_lock lock(mutex_);
  if (const auto found = places_.find(key); found != places_.end()) {
    ++statistics_.hits;
    use(found->second);
    return found->second.entry->weights;
  }
  ++statistics_.misses;
  make_room(bytes);
  once_.push_front({key, bytes, load()});
  try {
    places_[key] = {once_.begin(), false};
  } catch (...) {
    once_.pop_front();
    throw;
  }
  statistics_.bytes += bytes;
  statistics_.most_bytes = std::max(statistics_.most_bytes, statistics_.bytes);
  return once_.front().weights;
}

template <class T>
void ExpertStore<T>::use(Place& place) {
  Entries& from = place.is_hot ? hot_ : once_;
  hot_.splice(hot_.begin(), from, place.entry);
  if (place.is_hot) return;
  place.is_hot = true;
  hot_bytes_ += place.entry->bytes;
  while (hot_bytes_ > capacity_ / 4 * 3 && hot_.size() > 1) {
    const auto coldest = std::prev(hot_.end());
    hot_bytes_ -= coldest->bytes;
    places_.at(coldest->key).is_hot = false;
    once_.splice(once_.begin(), hot_, coldest);
  }
}

template <class T>
void ExpertStore<T>::make_room(std::size_t bytes) {
  while (statistics_.bytes > 0 && statistics_.bytes + bytes > capacity_) {
    Entries& from = once_.empty() ? hot_ : once_;
    const Entry& coldest = from.back();
    statistics_.bytes -= coldest.bytes;
    if (once_.empty()) hot_bytes_ -= coldest.bytes;
    places_.erase(coldest.key);
    from.pop_back();
    ++statistics_.evictions;
  }
}

}  // namespace weir::io
