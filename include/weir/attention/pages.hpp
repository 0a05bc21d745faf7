// SPDX-License-Identifier: MIT
/// \file
/// Memory for rows that are added token by token, in pages that copies share.
#pragma once

#include <algorithm>
#include <atomic>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <memory>
#include <span>
#include <stdexcept>
#include <utility>
#include <vector>

#include <weir/core/aligned.hpp>
#include <weir/core/types.hpp>

namespace weir {

/// Memory for kRows rows of a sequence. How they lie in it, and whether a row is in one piece, is
/// up to the owner.
using Page = std::shared_ptr<std::byte>;

/// Pages of memory for a sequence that grows row by row at its end. A row stays where it is, and
/// memory is at most a page, or an eighth, too large. A copy shares the pages until either of the
/// two writes to one: only that page is then copied. Copies may be used by different threads.
class Pages {
 public:
  /// The rows of a page: a multiple of the numbers of keys that attention reads at a time.
  static constexpr Index kRows = 96;

  Pages() = default;
  Pages(const Pages& other)
      : pages_(other.pages_.begin(), other.pages_.begin() + pages_for(other.count_)),
        count_(other.count_),
        bytes_(other.bytes_) {}
  Pages(Pages&& other) noexcept
      : pages_(std::exchange(other.pages_, {})),
        count_(std::exchange(other.count_, 0)),
        bytes_(other.bytes_) {}
  Pages& operator=(Pages other) noexcept {
    pages_.swap(other.pages_);
    std::swap(count_, other.count_);
    std::swap(bytes_, other.bytes_);
    return *this;
  }
  ~Pages() = default;

  /// How many rows there are.
  Index count() const { return count_; }
  bool empty() const { return count_ == 0; }
  /// How many rows fit before pages are allocated, if no page is shared.
  Index capacity() const { return static_cast<Index>(pages_.size()) * kRows; }
  /// The bytes of a page; 0 before the first row.
  Index page_bytes() const { return bytes_; }

  /// Row i is in page i / kRows. Valid until the next change.
  std::span<const Page> pages() const { return pages_; }

  /// Adds `more` rows by `write(page, first, end, i)`, which writes rows i, i + 1 ... of those to
  /// the places `first` to `end` of a page. If memory runs out, no row has been added.
  /// \param page_bytes  Differs from what it was only while there are no rows.
  template <class Write>
  void append(Index more, Index page_bytes, Write&& write) {
    make_room(more, page_bytes);
    for (Index i = 0; i < more;) {
      const Index row = count_ + i;
      const Index first = row % kRows;
      const Index end = std::min(kRows, first + more - i);
      write(pages_[static_cast<std::size_t>(row / kRows)].get(), first, end, i);
      i += end - first;
    }
    count_ += more;
  }

  /// Makes room for `count` rows in all. Has no effect before the first row was added.
  /// \throws std::length_error  if no memory can be that large.
  void reserve(Index count) {
    if (bytes_ == 0) return;
    if (count > PTRDIFF_MAX / bytes_) throw std::length_error("Pages::reserve: too many rows");
    add_pages(pages_for(count));
  }

  /// Takes back all rows but the first `count`. Keeps the memory.
  void truncate(Index count) { count_ = count; }

  /// Removes the first `count` pages, which have to be full. Keeps their memory, if it is not
  /// shared, unless it is far more than is needed.
  void drop_front(Index count);

 private:
  static Index pages_for(Index rows) { return rows / kRows + (rows % kRows > 0 ? 1 : 0); }

  /// Adds pages until there are `count`. Those that are added at once lie in one piece of memory,
  /// which consists of huge pages if it is large and lives as long as one of them; a long sequence
  /// grows by an eighth at least.
  void add_pages(Index count);

  /// Zeros: attention may compute with the places of rows that are still to come, and leaves the
  /// results out.
  Page new_pages(Index count) const {
    const auto bytes = static_cast<std::size_t>(count * bytes_);
    Page pages = allocate_aligned<std::byte>(bytes);
    std::memset(pages.get(), 0, bytes);
    return pages;
  }
  Page copy_of(const Page& page) const {
    Page own = allocate_aligned<std::byte>(static_cast<std::size_t>(bytes_));
    std::memcpy(own.get(), page.get(), static_cast<std::size_t>(bytes_));
    return own;
  }

  static bool is_shared(const Page& page) {
    if (page.use_count() > 1) return true;
    // Whoever had the page before has read it before we write to it.
    std::atomic_thread_fence(std::memory_order_acquire);
    return false;
  }

  /// Makes pages for `more` rows that nobody else has.
  void make_room(Index more, Index page_bytes);

  std::vector<Page> pages_;  // Those in use come first.
  Index count_ = 0;
  Index bytes_ = 0;
};

inline void Pages::drop_front(Index count) {
  constexpr Index kFarTooMuch = 4;
  const auto front = pages_.begin() + count;
  const auto own =
      std::partition(pages_.begin(), front, [](const Page& page) { return is_shared(page); });
  std::rotate(own, front, pages_.end());  // Those of its own come behind the others.
  pages_.erase(pages_.begin(), own);
  count_ -= count * kRows;
  const Index needed = pages_for(count_);
  if (static_cast<Index>(pages_.size()) > kFarTooMuch * (needed + 1)) {
    pages_.resize(static_cast<std::size_t>(needed + 1));
    // What lies in one piece of memory with those that are gone would keep it.
    for (Page& page : pages_) {
      if (!is_shared(page)) page = copy_of(page);
    }
    pages_.shrink_to_fit();
  }
}

inline void Pages::make_room(Index more, Index page_bytes) {
  if (empty() && page_bytes != bytes_) {
    pages_.clear();
    bytes_ = page_bytes;
  }
  if (more == 0) return;
  const Index last = pages_for(count_ + more);
  for (Index i = count_ / kRows; i < std::min(last, static_cast<Index>(pages_.size())); ++i) {
    Page& page = pages_[static_cast<std::size_t>(i)];
    if (!is_shared(page)) continue;
    page = count_ > i * kRows ? copy_of(page) : new_pages(1);
  }
  add_pages(last);
}

inline void Pages::add_pages(Index count) {
  constexpr Index kShare = 8;
  const auto have = static_cast<Index>(pages_.size());
  if (count <= have) return;
  const Index more = std::max(count - have, have / kShare);
  pages_.reserve(static_cast<std::size_t>(have + more));
  const Page first = new_pages(more);
  if (more == 1) return pages_.push_back(first);
  for (Index i = 0; i < more; ++i) {
    // Each counts its owners by itself.
    pages_.push_back(Page(first.get() + i * bytes_, [first](std::byte* /*page*/) {}));
  }
}

}  // namespace weir
