// SPDX-License-Identifier: MIT
/// \file
/// Rows that are added token by token, in pages that copies share.
#pragma once

#include <algorithm>
#include <atomic>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <span>
#include <stdexcept>
#include <utility>
#include <vector>

#include <weir/core/aligned.hpp>
#include <weir/core/types.hpp>

namespace weir {

/// A page of rows, one behind the other.
template <class T>
using RowPage = std::shared_ptr<T>;

/// A matrix that grows by rows at its end. The rows lie in pages of kPage rows, each in one piece,
/// so that a row stays where it is and memory is never more than a page too large. A copy shares
/// the pages until either of the two writes to one: only that page is then copied. Copies may be
/// used by different threads.
template <class T>
class PagedRows {
 public:
  /// The rows of a page: a multiple of the numbers of keys that attention reads at a time.
  static constexpr Index kPage = 96;

  PagedRows() = default;
  PagedRows(const PagedRows& other)
      : pages_(other.pages_.begin(), other.pages_.begin() + pages_for(other.count_)),
        count_(other.count_),
        width_(other.width_) {}
  PagedRows(PagedRows&& other) noexcept
      : pages_(std::exchange(other.pages_, {})),
        count_(std::exchange(other.count_, 0)),
        width_(other.width_) {}
  PagedRows& operator=(PagedRows other) noexcept {
    pages_.swap(other.pages_);
    std::swap(count_, other.count_);
    std::swap(width_, other.width_);
    return *this;
  }
  ~PagedRows() = default;

  Index count() const { return count_; }
  bool empty() const { return count_ == 0; }
  /// How many numbers a row has; 0 before the first row.
  Index width() const { return width_; }
  /// The same, as of a matrix.
  Index rows() const { return count_; }
  Index cols() const { return width_; }
  /// How many rows fit before pages are allocated, if no page is shared.
  Index capacity() const { return static_cast<Index>(pages_.size()) * kPage; }

  /// The pages; row i is in page i / kPage. Valid until the next change.
  std::span<const RowPage<T>> pages() const { return pages_; }

  /// A copy of the rows, [count, width].
  Matrix<T> matrix() const {
    Matrix<T> copy(count_, width_);
    copy_to(copy.data());
    return copy;
  }
  /// Copies the rows to `to`, one behind the other.
  void copy_to(T* to) const {
    for (Index i = 0; i < count_; i += kPage) {
      std::copy_n(page(i / kPage), std::min(kPage, count_ - i) * width_, to + i * width_);
    }
  }

  /// Adds rows, which have to be as wide as the rows that are there, if there are any. If memory
  /// runs out, no row has been added.
  void append(MatrixIn<T> rows) {
    make_room(rows.rows(), rows.cols());
    for (Index i = 0; i < rows.rows(); ++i) add_part(rows, i, row(count_ + i));
    count_ += rows.rows();
  }

  /// Adds the rows [left | right].
  void append(MatrixIn<T> left, MatrixIn<T> right) {
    make_room(left.rows(), left.cols() + right.cols());
    for (Index i = 0; i < left.rows(); ++i) {
      add_part(right, i, add_part(left, i, row(count_ + i)));
    }
    count_ += left.rows();
  }

  /// Makes room for `count` rows in all. Has no effect before the width is known.
  /// \throws std::length_error  if no memory can be that large.
  void reserve(Index count) {
    if (width_ == 0) return;
    constexpr auto kMostNumbers = PTRDIFF_MAX / static_cast<Index>(sizeof(T));
    if (count > kMostNumbers / width_) throw std::length_error("PagedRows::reserve: too many rows");
    pages_.reserve(static_cast<std::size_t>(pages_for(count)));
    while (capacity() < count) pages_.push_back(new_page());
  }

  /// Takes back all rows but the first `count`. Keeps the memory.
  void truncate(Index count) { count_ = count; }

  /// Removes the first `count` pages, which have to be full. Keeps their memory, if it is not
  /// shared, unless it is far more than is needed.
  void drop_front(Index count);

 private:
  static Index pages_for(Index rows) { return rows / kPage + (rows % kPage > 0 ? 1 : 0); }

  RowPage<T> new_page() const {
    return allocate_aligned<T>(static_cast<std::size_t>(kPage * width_));
  }

  T* page(Index i) const { return pages_[static_cast<std::size_t>(i)].get(); }
  T* row(Index i) const { return page(i / kPage) + i % kPage * width_; }

  /// Writes row i of `rows` to `to`, and returns where it ends.
  static T* add_part(MatrixIn<T> rows, Index i, T* to) {
    return std::copy_n(rows.data() + i * rows.outerStride(), rows.cols(), to);
  }

  static bool is_shared(const RowPage<T>& page) {
    if (page.use_count() > 1) return true;
    // Whoever had the page before has read it before we write to it.
    std::atomic_thread_fence(std::memory_order_acquire);
    return false;
  }

  /// Makes pages for `more` rows that nobody else has.
  void make_room(Index more, Index width);

  std::vector<RowPage<T>> pages_;  // Those in use come first.
  Index count_ = 0;
  Index width_ = 0;
};

template <class T>
void PagedRows<T>::drop_front(Index count) {
  constexpr Index kFarTooMuch = 4;
  const auto front = pages_.begin() + count;
  const auto own =
      std::partition(pages_.begin(), front, [](const RowPage<T>& page) { return is_shared(page); });
  std::rotate(own, front, pages_.end());  // Those of its own come behind the others.
  pages_.erase(pages_.begin(), own);
  count_ -= count * kPage;
  const Index needed = pages_for(count_);
  if (static_cast<Index>(pages_.size()) > kFarTooMuch * (needed + 1)) {
    pages_.resize(static_cast<std::size_t>(needed + 1));
    pages_.shrink_to_fit();
  }
}

template <class T>
void PagedRows<T>::make_room(Index more, Index width) {
  if (empty() && width != width_) {
    pages_.clear();
    width_ = width;
  }
  if (more == 0) return;
  const Index last = pages_for(count_ + more);
  for (Index i = count_ / kPage; i < std::min(last, static_cast<Index>(pages_.size())); ++i) {
    RowPage<T>& page = pages_[static_cast<std::size_t>(i)];
    if (!is_shared(page)) continue;
    RowPage<T> own = new_page();
    const Index held = std::max<Index>(0, count_ - i * kPage);
    std::copy_n(page.get(), held * width_, own.get());
    page = std::move(own);
  }
  while (static_cast<Index>(pages_.size()) < last) pages_.push_back(new_page());
}

}  // namespace weir

#ifdef WEIR_COMPILED
extern template class weir::PagedRows<float>;
extern template class weir::PagedRows<double>;
#endif
