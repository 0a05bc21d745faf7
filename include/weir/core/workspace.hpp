// SPDX-License-Identifier: MIT
/// \file
/// Memory for what a function needs only while it runs, shared by all layers of a model.
#pragma once

#include <algorithm>
#include <cstddef>
#include <memory>
#include <new>
#include <utility>
#include <vector>

#include <weir/core/aligned.hpp>
#include <weir/core/types.hpp>

namespace weir {

/// A stack of memory. A function takes what it needs through a `Frame` and gives everything back
/// when the frame ends, so that the next function works in the same memory. It grows and never
/// shrinks; once it has been through a pass, it is in one piece, and a pass like that one allocates
/// nothing.
///
/// Every cache has a workspace of its own, for layers that are used alone. A model lends its own to
/// all of its layers (`Lend`), so that there is one for the model instead of one for each layer:
///
///     const Workspace::Lend lend(&cache.workspace);     // in the model's backward
///
///     Workspace::Frame frame(cache.workspace);          // in a layer's backward
///     auto d_hidden = frame.matrix<T>(rows, d_hidden());
///
/// Only one thread at a time may use a workspace. A copy starts empty.
class Workspace {
 public:
  Workspace() = default;
  Workspace(const Workspace& /*other*/) {}
  Workspace(Workspace&&) noexcept = default;
  Workspace& operator=(const Workspace& /*other*/) { return *this; }
  Workspace& operator=(Workspace&&) noexcept = default;
  ~Workspace() = default;

  class Frame;
  class Lend;

 private:
  // What is lent to this thread, or null.
  static Workspace*& lent() {
    thread_local Workspace* workspace = nullptr;
    return workspace;
  }

  struct Place {
    std::size_t piece = 0, offset = 0;  // Where the next bytes are.
    std::size_t used = 0;               // How many bytes are in use.
  };

  std::byte* take(std::size_t size);

  // Puts all pieces together, once nothing is in use.
  void join() noexcept;

  std::vector<AlignedMemory<std::byte>> pieces_;
  Place place_;
  std::size_t most_used_ = 0;
};

/// What one function has taken. Frames of a workspace end in the reverse of the order in which they
/// began.
class Workspace::Frame {
 public:
  /// \param own      Is used unless a workspace is lent to this thread.
  explicit Frame(Workspace& own)
      : workspace_(lent() == nullptr ? own : *lent()), begin_(workspace_.place_) {}
  Frame(const Frame&) = delete;
  Frame& operator=(const Frame&) = delete;
  ~Frame() {
    workspace_.place_ = begin_;
    if (begin_.used == 0 && workspace_.pieces_.size() > 1) workspace_.join();
  }

  /// `count` numbers, contents unspecified, from the border of a cache line on.
  /// \throws std::bad_alloc  if memory runs out; what was taken before stays.
  template <class T>
  T* take(Index count) {
    return reinterpret_cast<T*>(
        workspace_.take(SharedMemory::bytes_of<T>(static_cast<std::size_t>(count))));
  }

  /// A matrix, contents unspecified.
  template <class T>
  Eigen::Map<Matrix<T>> matrix(Index rows, Index cols) {
    return {take<T>(rows * cols), rows, cols};
  }

 private:
  Workspace& workspace_;
  Place begin_;
};

/// While it lives, all frames of this thread use the workspace that is lent.
class Workspace::Lend {
 public:
  /// \param workspace  Null: frames use their own, as for layers that run on several threads.
  explicit Lend(Workspace* workspace) : before_(std::exchange(lent(), workspace)) {}
  Lend(const Lend&) = delete;
  Lend& operator=(const Lend&) = delete;
  ~Lend() { lent() = before_; }

 private:
  Workspace* before_;
};

inline std::byte* Workspace::take(std::size_t size) {
  while (place_.piece < pieces_.size() &&
         pieces_[place_.piece].get_deleter().size - place_.offset < size) {
    ++place_.piece;
    place_.offset = 0;
  }
  if (place_.piece == pieces_.size()) {
    pieces_.reserve(pieces_.size() + 1);
    pieces_.push_back(allocate_aligned<std::byte>(std::max<std::size_t>(size, 1)));
  }
  std::byte* const taken = pieces_[place_.piece].get() + place_.offset;
  place_.offset += size;
  place_.used += size;
  most_used_ = std::max(most_used_, place_.used);
  return taken;
}

inline void Workspace::join() noexcept {
  pieces_.clear();
  try {
    pieces_.push_back(allocate_aligned<std::byte>(most_used_));
  } catch (const std::bad_alloc&) {
    most_used_ = 0;  // The next pass starts anew.
  }
}

}  // namespace weir
