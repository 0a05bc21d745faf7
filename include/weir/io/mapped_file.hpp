// SPDX-License-Identifier: MIT
/// \file
/// A file whose bytes are read where they lie, without a copy.
#pragma once

#include <cerrno>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <fcntl.h>
#include <span>
#include <string>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>
#include <utility>

#include <weir/core/error.hpp>
#include <weir/io/file_error.hpp>

namespace weir::io {

/// The bytes of a regular file, mapped into memory for reading. Pages are read from the disk when
/// they are first looked at. A file that somebody shortens meanwhile ends the program (SIGBUS), as
/// with any mapped file; files that are replaced by renaming are safe.
class MappedFile {
 public:
  MappedFile() = default;

  /// \throws FileError  if there is no such regular file, or it cannot be mapped.
  explicit MappedFile(const std::string& path) {
    const int file = ::open(path.c_str(), O_RDONLY | O_CLOEXEC);
    if (file < 0) fail(path, "cannot be opened");
    struct stat status {};
    if (::fstat(file, &status) != 0) fail(path, "cannot be examined", file);
    if (!S_ISREG(status.st_mode)) {
      ::close(file);
      throw_error<FileError>(path, ": is not a regular file");
    }
    size_ = static_cast<std::size_t>(status.st_size);
    if (size_ > 0) {
      void* const bytes = ::mmap(nullptr, size_, PROT_READ, MAP_PRIVATE, file, 0);
      if (bytes == MAP_FAILED) fail(path, "cannot be mapped", file);
      bytes_ = static_cast<const std::byte*>(bytes);
    }
    ::close(file);
  }

  MappedFile(MappedFile&& other) noexcept
      : bytes_(std::exchange(other.bytes_, nullptr)), size_(std::exchange(other.size_, 0)) {}
  MappedFile& operator=(MappedFile&& other) noexcept {
    std::swap(bytes_, other.bytes_);
    std::swap(size_, other.size_);
    return *this;
  }
  ~MappedFile() {
    if (bytes_ != nullptr) ::munmap(const_cast<std::byte*>(bytes_), size_);
  }

  std::span<const std::byte> bytes() const { return {bytes_, size_}; }

 private:
  [[noreturn]] static void fail(const std::string& path, const char* what, int file = -1) {
    const int error = errno;
    if (file >= 0) ::close(file);
    throw_error<FileError>(path, ": ", what, ": ", std::strerror(error));
  }

  const std::byte* bytes_ = nullptr;
  std::size_t size_ = 0;
};

/// Tells the system that the pages of a mapped file which lie within `bytes` are not needed soon:
/// they count no longer as memory of this program. Looked at again, they are read again.
inline void release_pages(std::span<const std::byte> bytes) {
  const auto page = static_cast<std::uintptr_t>(::sysconf(_SC_PAGESIZE));
  const auto begin = (reinterpret_cast<std::uintptr_t>(bytes.data()) + page - 1) / page * page;
  const auto end = reinterpret_cast<std::uintptr_t>(bytes.data() + bytes.size()) / page * page;
  // NOLINTNEXTLINE(performance-no-int-to-ptr)
  if (begin < end) ::madvise(reinterpret_cast<void*>(begin), end - begin, MADV_DONTNEED);
}

/// Tells the system that the pages of a mapped file on which `bytes` lie will be needed soon: it
/// begins to read them, and the program goes on meanwhile.
inline void prefetch_pages(std::span<const std::byte> bytes) {
  const auto page = static_cast<std::uintptr_t>(::sysconf(_SC_PAGESIZE));
  const auto begin = reinterpret_cast<std::uintptr_t>(bytes.data()) / page * page;
  const auto end = reinterpret_cast<std::uintptr_t>(bytes.data() + bytes.size());
  // NOLINTNEXTLINE(performance-no-int-to-ptr)
  if (begin < end) ::madvise(reinterpret_cast<void*>(begin), end - begin, MADV_WILLNEED);
}

}  // namespace weir::io
