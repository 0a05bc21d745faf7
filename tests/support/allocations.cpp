// SPDX-License-Identifier: MIT
#include "support/allocations.hpp"

#include <atomic>
#include <cerrno>
#include <cstdlib>

#if defined(__GLIBC__)
#include <malloc.h>
#endif

#if defined(__SANITIZE_ADDRESS__) || defined(__SANITIZE_THREAD__)
#define WEIR_SANITIZED
#elif defined(__has_feature)
#if __has_feature(address_sanitizer) || __has_feature(thread_sanitizer) || \
    __has_feature(memory_sanitizer)
#define WEIR_SANITIZED
#endif
#endif

#if defined(__GLIBC__) && !defined(WEIR_SANITIZED)
#define WEIR_COUNTS_ALLOCATIONS
#endif

namespace {
constinit std::atomic<long> allocations{0};
constinit std::atomic<long> until_failure{0};  // 0: none is to fail.
constinit std::atomic<long> bytes{0};          // In use.
constinit std::atomic<long> most_bytes{0};     // In use at once.

/// Counts an allocation.
/// \return         Whether it is to fail; errno then says why, as callers in glibc expect.
[[maybe_unused]] bool fails() {
  ++allocations;
  if (until_failure.load() <= 0 || --until_failure != 0) return false;
  errno = ENOMEM;
  return true;
}

#ifdef WEIR_COUNTS_ALLOCATIONS
/// Counts the bytes of a block, which may be null, and returns it.
void* counted(void* block) {
  if (block == nullptr) return block;
  const long now = bytes += static_cast<long>(malloc_usable_size(block));
  long most = most_bytes.load();
  while (most < now && !most_bytes.compare_exchange_weak(most, now)) {
  }
  return block;
}

void uncount(void* block) {
  if (block != nullptr) bytes -= static_cast<long>(malloc_usable_size(block));
}
#endif
}  // namespace

namespace weir::test {

bool allocations_are_counted() {
#ifdef WEIR_COUNTS_ALLOCATIONS
  return true;
#else
  return false;
#endif
}

long allocations_so_far() {
  return allocations.load();
}

long bytes_in_use() {
  return bytes.load();
}

long most_bytes_in_use() {
  return most_bytes.exchange(bytes.load());
}

void fail_allocation(long nth) {
  until_failure.store(nth);
}

}  // namespace weir::test

#ifdef WEIR_COUNTS_ALLOCATIONS
// A program's own malloc takes the place of the C library's, for all of its libraries too; glibc
// offers its own under another name.
// NOLINTBEGIN(bugprone-reserved-identifier,cert-dcl37-c,readability-identifier-naming)
extern "C" {
void* __libc_malloc(std::size_t size);
void* __libc_calloc(std::size_t count, std::size_t size);
void* __libc_realloc(void* block, std::size_t size);
void* __libc_memalign(std::size_t alignment, std::size_t size);
void __libc_free(void* block);

void* malloc(std::size_t size) noexcept {
  return fails() ? nullptr : counted(__libc_malloc(size));
}

void* calloc(std::size_t count, std::size_t size) noexcept {
  return fails() ? nullptr : counted(__libc_calloc(count, size));
}

void* realloc(void* block, std::size_t size) noexcept {
  if (fails()) return nullptr;
  const long before = block == nullptr ? 0 : static_cast<long>(malloc_usable_size(block));
  void* const moved = __libc_realloc(block, size);
  if (moved != nullptr || size == 0) bytes -= before;
  return counted(moved);
}

void* memalign(std::size_t alignment, std::size_t size) noexcept {
  return fails() ? nullptr : counted(__libc_memalign(alignment, size));
}

void* aligned_alloc(std::size_t alignment, std::size_t size) noexcept {
  return fails() ? nullptr : counted(__libc_memalign(alignment, size));
}

int posix_memalign(void** block, std::size_t alignment, std::size_t size) noexcept {
  void* const memory = fails() ? nullptr : counted(__libc_memalign(alignment, size));
  if (memory == nullptr) return ENOMEM;
  *block = memory;
  return 0;
}

void free(void* block) noexcept {
  uncount(block);
  __libc_free(block);
}
}
// NOLINTEND(bugprone-reserved-identifier,cert-dcl37-c,readability-identifier-naming)
#endif
