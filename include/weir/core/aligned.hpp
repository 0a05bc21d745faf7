// SPDX-License-Identifier: MIT
/// \file
/// Memory that begins at a cache line.
#pragma once

#include <cassert>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <new>
#include <utility>
#include <vector>

#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace weir {

/// Allocates at the borders of cache lines, which are as wide as the widest vector: no load or
/// store of a vector crosses one. Large memory consists of whole huge pages, as far as the system
/// grants them, so that streaming through weights does not wait for address translation. Two
/// virtual cores of Zen 4 read 65 GB/s from such memory and 48 from small pages; two of Zen 3, by
/// `parts_bench --benchmark_filter=pages`, 17.8-22.6 and 16.5-18.3 with other work on the machine.
template <class T>
struct CacheLineAllocator {
  using value_type = T;  // NOLINT(readability-identifier-naming): the standard's name.

  static constexpr std::size_t kLine = 64;
  static constexpr std::size_t kHugePage = std::size_t{2} << 20U;
  static constexpr std::size_t kMostBytes = PTRDIFF_MAX - kHugePage;

  CacheLineAllocator() = default;
  template <class Other>
  CacheLineAllocator(const CacheLineAllocator<Other>& /*other*/) {}  // NOLINT: a conversion.

  /// \throws std::bad_alloc  if there is no such memory.
  T* allocate(std::size_t count) {
    if (count > kMostBytes / sizeof(T)) throw std::bad_array_new_length();
    const std::size_t bytes = bytes_of(count);
    void* const memory = ::operator new(bytes, alignment(bytes));
    // Memory that was in use before has small pages. Once they are given up, huge pages can take
    // their place. If that fails, memory is merely slower.
    give_up_pages(memory, bytes);
#if defined(__linux__)
    if (bytes >= kHugePage) {
      static_cast<void>(madvise(memory, bytes / kHugePage * kHugePage, MADV_HUGEPAGE));
    }
#endif
    return static_cast<T*>(memory);
  }
  /// Large memory goes back to the system at once. The C library would keep most of it: a program
  /// that lets go of one model of 14 GB would not have room for another.
  void deallocate(T* memory, std::size_t count) {
    give_up_pages(memory, bytes_of(count));
    ::operator delete(memory, alignment(bytes_of(count)));
  }

  /// How many bytes `count` numbers take. Large sizes are rounded up to whole huge pages, since the
  /// rest would consist of small ones, but only where that adds no more than an eighth.
  static constexpr std::size_t bytes_of(std::size_t count) {
    const std::size_t bytes = count * sizeof(T);
    if (bytes < kHugePage) return bytes;
    const std::size_t whole = (bytes + kHugePage - 1) / kHugePage * kHugePage;
    return whole - bytes <= bytes / 8 ? whole : bytes;
  }

  template <class Other>
  bool operator==(const CacheLineAllocator<Other>& /*other*/) const {
    return true;
  }

 private:
  static std::align_val_t alignment(std::size_t bytes) {
    return std::align_val_t{bytes >= kHugePage ? kHugePage : kLine};
  }

  /// Gives whole huge pages back to the system, with contents that nobody needs.
  static void give_up_pages([[maybe_unused]] void* memory, [[maybe_unused]] std::size_t bytes) {
#if defined(__linux__)
    if (bytes < kHugePage) return;
    static_cast<void>(madvise(memory, bytes / kHugePage * kHugePage, MADV_DONTNEED));
#endif
  }
};

/// Asks the system for huge pages where `bytes` from `memory` on cover any, before the memory is
/// used. For memory that does not come from CacheLineAllocator, such as that of matrices; nothing
/// happens to what it holds.
inline void prefer_huge_pages([[maybe_unused]] void* memory, [[maybe_unused]] std::size_t bytes) {
#if defined(__linux__)
  constexpr std::size_t kHugePage = CacheLineAllocator<std::byte>::kHugePage;
  if (bytes < 2 * kHugePage) return;  // It may cover none.
  const auto begin = reinterpret_cast<std::uintptr_t>(memory);
  const std::size_t first = (begin + kHugePage - 1) / kHugePage * kHugePage;
  const std::size_t covered = (begin + bytes - first) / kHugePage * kHugePage;
  static_cast<void>(
      madvise(static_cast<std::byte*>(memory) + (first - begin), covered, MADV_HUGEPAGE));
#endif
}

/// Gives memory of `size` numbers back to CacheLineAllocator; none if `size` is 0.
template <class T>
struct AlignedDeleter {
  std::size_t size = 0;
  void operator()(T* memory) const { CacheLineAllocator<T>().deallocate(memory, size); }
};

/// Memory of CacheLineAllocator that goes with its owner. It knows its size.
template <class T>
using AlignedMemory = std::unique_ptr<T, AlignedDeleter<T>>;

/// Memory for `size` numbers, contents unspecified.
/// \throws std::bad_alloc  if there is no such memory.
template <class T>
AlignedMemory<T> allocate_aligned(std::size_t size) {
  return {CacheLineAllocator<T>().allocate(size), AlignedDeleter<T>{size}};
}

/// A vector whose memory begins at a cache line.
template <class T>
using AlignedVector = std::vector<T, CacheLineAllocator<T>>;

/// One piece of memory from which arrays are taken, front to back. It lives as long as the last of
/// them. Many small arrays thus share a few huge pages.
class SharedMemory {
 public:
  /// How many bytes of it an array of `count` numbers takes.
  template <class T>
  static std::size_t bytes_of(std::size_t count) {
    constexpr std::size_t kLine = CacheLineAllocator<T>::kLine;
    return (count * sizeof(T) + kLine - 1) / kLine * kLine;
  }

  explicit SharedMemory(std::size_t bytes)
      : SharedMemory(allocate_aligned<std::byte>(bytes), bytes) {}

  /// Memory that is somebody else's, `bytes` from `memory` on, which begins at a cache line.
  SharedMemory(std::shared_ptr<std::byte> memory, std::size_t bytes)
      : memory_(std::move(memory)), bytes_(bytes) {}

  /// An array that begins at a cache line, contents unspecified. There has to be room for it.
  template <class T>
  std::shared_ptr<T[]> take(std::size_t count) {  // NOLINT(modernize-avoid-c-arrays)
    assert(bytes_of<T>(count) <= bytes_ - used_);
    std::byte* const at = memory_.get() + used_;
    used_ += bytes_of<T>(count);
    return {memory_, reinterpret_cast<T*>(at)};
  }

 private:
  std::shared_ptr<std::byte> memory_;
  [[maybe_unused]] std::size_t bytes_ = 0;  // For the assertion.
  std::size_t used_ = 0;
};

}  // namespace weir
