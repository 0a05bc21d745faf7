// SPDX-License-Identifier: MIT
/// \file
/// Files that are there as a whole or not at all.
#pragma once

#include <cerrno>
#include <cstddef>
#include <cstdio>
#include <cstring>
#include <fcntl.h>
#include <filesystem>
#include <span>
#include <string>
#include <string_view>
#include <sys/stat.h>
#include <unistd.h>
#include <utility>

#include <weir/core/error.hpp>
#include <weir/io/file_error.hpp>

namespace weir::io {

/// Waits until the names in `folder` are on the disk.
/// \throws FileError  if that fails.
inline void sync_folder(const std::filesystem::path& folder) {
  const std::string path = folder.empty() ? "." : folder.string();
  const int file = ::open(path.c_str(), O_RDONLY | O_DIRECTORY | O_CLOEXEC);
  const bool synced = file >= 0 && ::fsync(file) == 0;
  const int error = errno;
  if (file >= 0) ::close(file);
  if (!synced) throw_error<FileError>(path, ": cannot be synchronised: ", std::strerror(error));
}

/// Writes a file under a temporary name beside it. Only `commit` gives it its own name, once all
/// bytes are on the disk: whoever reads the path meets the old file or the whole new one, whenever
/// the program ends. Without `commit` nothing stays.
class AtomicFile {
 public:
  /// \throws FileError  if the folder does not allow a new file.
  explicit AtomicFile(std::filesystem::path path)
      : path_(std::move(path)), temporary_(path_.string() + ".XXXXXX") {
    file_ = ::mkostemp(temporary_.data(), O_CLOEXEC);
    if (file_ < 0) fail("cannot be created");
    if (::fchmod(file_, 0644) != 0) fail("cannot be made readable");
  }
  AtomicFile(const AtomicFile&) = delete;
  AtomicFile& operator=(const AtomicFile&) = delete;
  ~AtomicFile() {
    if (file_ < 0) return;
    ::close(file_);
    ::unlink(temporary_.c_str());
  }

  /// Appends `bytes`.
  /// \throws FileError  if they do not fit on the disk.
  void write(std::span<const std::byte> bytes) {
    while (!bytes.empty()) {
      const ssize_t written = ::write(file_, bytes.data(), bytes.size());
      if (written < 0 && errno == EINTR) continue;
      if (written < 0) fail("cannot be written");
      bytes = bytes.subspan(static_cast<std::size_t>(written));
    }
  }
  void write(std::string_view text) { write(std::as_bytes(std::span(text))); }

  /// Writes over what is there, from byte `offset` on.
  /// \throws FileError  as `write`.
  void write_at(std::size_t offset, std::span<const std::byte> bytes) {
    while (!bytes.empty()) {
      const ssize_t written =
          ::pwrite(file_, bytes.data(), bytes.size(), static_cast<off_t>(offset));
      if (written < 0 && errno == EINTR) continue;
      if (written < 0) fail("cannot be written");
      bytes = bytes.subspan(static_cast<std::size_t>(written));
      offset += static_cast<std::size_t>(written);
    }
  }

  /// Gives the file its name.
  /// \throws FileError  if the bytes cannot be brought to the disk; the old file is still there.
  void commit() {
    if (::fsync(file_) != 0) fail("cannot be synchronised");
    if (::rename(temporary_.c_str(), path_.c_str()) != 0) fail("cannot be named");
    ::close(std::exchange(file_, -1));
    sync_folder(path_.parent_path());
  }

 private:
  [[noreturn]] void fail(std::string_view what) {
    const int error = errno;
    if (file_ >= 0) {
      ::close(std::exchange(file_, -1));
      ::unlink(temporary_.c_str());
    }
    throw_error<FileError>(path_.string(), ": ", what, ": ", std::strerror(error));
  }

  std::filesystem::path path_;
  std::string temporary_;
  int file_ = -1;
};

/// Writes a whole file of text.
/// \throws FileError  as AtomicFile.
inline void write_file(const std::filesystem::path& path, std::string_view text) {
  AtomicFile file(path);
  file.write(text);
  file.commit();
}

}  // namespace weir::io
