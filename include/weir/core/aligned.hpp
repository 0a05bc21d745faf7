// SPDX-License-Identifier: MIT
/// \file
/// Memory that begins at a cache line.
#pragma once

#include <cstddef>
#include <new>
#include <vector>

#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace weir {

/// Allocates at the borders of cache lines, which are as wide as the widest vector: no load or
/// store of a vector crosses one. Large memory begins at the border of a huge page and asks the
/// system for such pages, so that streaming through weights does not wait for address translation.
template <class T>
struct CacheLineAllocator {
  using value_type = T;  // NOLINT(readability-identifier-naming): the standard's name.

  static constexpr std::size_t kLine = 64;
  static constexpr std::size_t kHugePage = std::size_t{2} << 20U;

  CacheLineAllocator() = default;
  template <class Other>
  CacheLineAllocator(const CacheLineAllocator<Other>& /*other*/) {}  // NOLINT: a conversion.

  T* allocate(std::size_t count) {
    const std::size_t bytes = count * sizeof(T);
    void* const memory = ::operator new(bytes, alignment(bytes));
#if defined(__linux__)
    // Advice: where it is not taken, nothing is lost but time.
    if (bytes >= kHugePage) static_cast<void>(madvise(memory, bytes, MADV_HUGEPAGE));
#endif
    return static_cast<T*>(memory);
  }
  void deallocate(T* memory, std::size_t count) {
    ::operator delete(memory, alignment(count * sizeof(T)));
  }

  template <class Other>
  bool operator==(const CacheLineAllocator<Other>& /*other*/) const {
    return true;
  }

 private:
  static std::align_val_t alignment(std::size_t bytes) {
    return std::align_val_t{bytes >= kHugePage ? kHugePage : kLine};
  }
};

/// A vector whose memory begins at a cache line.
template <class T>
using AlignedVector = std::vector<T, CacheLineAllocator<T>>;

}  // namespace weir
