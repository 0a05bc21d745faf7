// SPDX-License-Identifier: MIT
/// \file
/// Texts larger than memory: read window by window from where they lie.
#pragma once

#include <algorithm>
#include <cerrno>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <fcntl.h>
#include <filesystem>
#include <memory>
#include <span>
#include <string>
#include <sys/stat.h>
#include <unistd.h>
#include <utility>
#include <vector>

#include <weir/core/error.hpp>
#include <weir/core/random.hpp>
#include <weir/core/types.hpp>
#include <weir/io/file_error.hpp>

namespace weir::io {

namespace detail {

/// A file that is open for reading, and what the system knows about it.
class OpenFile {
 public:
  /// \throws FileError  if there is no such regular file, or it may not be read.
  explicit OpenFile(const std::string& path)
      : file_(::open(path.c_str(), O_RDONLY | O_CLOEXEC | O_NONBLOCK)) {
    const bool examined = file_ >= 0 && ::fstat(file_, &status_) == 0;
    const int error = errno;
    const bool regular = examined && S_ISREG(status_.st_mode);
    if (regular) return;
    if (file_ >= 0) ::close(file_);
    if (examined) throw_error<FileError>(path, ": is not a regular file");
    throw_error<FileError>(path, ": cannot be opened: ", std::strerror(error));
  }
  OpenFile(const OpenFile&) = delete;
  OpenFile& operator=(const OpenFile&) = delete;
  ~OpenFile() { ::close(file_); }

  const struct stat& status() const { return status_; }

  /// Reads up to into.size() bytes from byte `offset` on; fewer where the file ends.
  std::size_t read(Index offset, std::span<char> into, const std::string& path) const {
    std::size_t done = 0;
    while (done < into.size()) {
      const ssize_t count = ::pread(file_, into.data() + done, into.size() - done,
                                    static_cast<off_t>(offset) + static_cast<off_t>(done));
      if (count < 0 && errno == EINTR) continue;
      if (count < 0) throw_error<FileError>(path, ": cannot be read: ", std::strerror(errno));
      if (count == 0) break;
      done += static_cast<std::size_t>(count);
    }
    return done;
  }

 private:
  int file_;
  struct stat status_ = {};
};

}  // namespace detail

/// The bytes of many files, or of parts of them, one after the other, as one text. Memory holds the
/// files' names and what is asked for, whatever their size; no file stays open. A file that is
/// changed or shortened meanwhile is refused when it is read next, as far as its size or the time
/// of its last change tell; nothing that others do to it ends the program.
class TextFiles {
 public:
  TextFiles() = default;

  /// The whole files, in this order. Empty ones are fine.
  /// \throws FileError  if one is not a regular file that may be read.
  explicit TextFiles(std::span<const std::filesystem::path> paths) {
    auto files = std::make_shared<std::vector<File>>();
    for (const std::filesystem::path& path : paths) {
      const detail::OpenFile file(path.string());
      const struct stat& status = file.status();
      files->push_back({path.string(), status.st_size, status.st_mtim});
      append(files->size() - 1, 0, status.st_size);
    }
    files_ = std::move(files);
  }

  /// Divides a text of whole files: the last n-th part of each file is set aside.
  /// \return              What stays, and what is set aside.
  /// \throws ConfigError  unless n >= 1.
  std::pair<TextFiles, TextFiles> without_last(Index n) const {
    expect_at_least<Index>("TextFiles::without_last", "n", n, 1);
    std::pair<TextFiles, TextFiles> parts;
    parts.first.files_ = parts.second.files_ = files_;
    for (const Part& part : parts_) {
      const Index aside = part.size / n;
      parts.first.append(part.file, part.begin, part.size - aside);
      parts.second.append(part.file, part.begin + part.size - aside, aside);
    }
    return parts;
  }

  /// Of the text, in bytes.
  Index size() const { return size_; }

  /// How many files there are, empty ones included.
  std::size_t files() const { return files_ ? files_->size() : 0; }

  /// Reads the bytes [begin, begin + into.size()) of the text.
  /// \throws ConfigError  if they are not inside the text.
  /// \throws FileError    if a file was changed, or cannot be read any more.
  void read(Index begin, std::span<char> into) const {
    const auto count = static_cast<Index>(into.size());
    if (begin < 0 || count > size_ || begin > size_ - count) {
      throw_error<ConfigError>("TextFiles::read: begin = ", begin, " and ", count,
                               " bytes, expected a range inside ", size_, " bytes");
    }
    auto part = std::upper_bound(parts_.begin(), parts_.end(), begin,
                                 [](Index place, const Part& p) { return place < p.first; });
    while (!into.empty()) {
      const Part& from = *std::prev(part++);
      const Index inside = begin - from.first;
      const auto here = std::min(into.size(), static_cast<std::size_t>(from.size - inside));
      read_file((*files_)[from.file], from.begin + inside, into.first(here));
      into = into.subspan(here);
      begin += static_cast<Index>(here);
    }
  }

  /// A number that another text has with a probability of 2^-64 if it differs in the sizes of its
  /// parts or in one of 64 samples of 256 bytes, which are spread over it: enough to see that a
  /// run would go on with another text, not to rule out every change.
  /// \throws FileError  as `read`.
  std::uint64_t fingerprint() const {
    constexpr Index kSamples = 64;
    constexpr Index kSample = 256;
    std::uint64_t hash = 0;
    for (const Part& part : parts_) hash = mix_bits(hash ^ static_cast<std::uint64_t>(part.size));
    std::string sample(static_cast<std::size_t>(std::min(kSample, size_)), '\0');
    for (Index s = 0; s < kSamples; ++s) {
      const Index room = size_ - static_cast<Index>(sample.size());
      read(room / (kSamples - 1) * s + room % (kSamples - 1) * s / (kSamples - 1), sample);
      for (const char byte : sample) hash = mix_bits(hash ^ static_cast<unsigned char>(byte));
    }
    return hash;
  }

 private:
  struct File {
    std::string path;
    Index size;
    struct timespec changed;
  };
  struct Part {
    std::size_t file;
    Index begin, size;  // In the file.
    Index first;        // In the text.
  };

  void append(std::size_t file, Index begin, Index size) {
    if (size == 0) return;
    parts_.push_back({file, begin, size, size_});
    size_ += size;
  }

  static void read_file(const File& known, Index offset, std::span<char> into) {
    const detail::OpenFile file(known.path);
    const struct stat& status = file.status();
    if (status.st_size != known.size) {
      throw_error<FileError>(known.path, ": has ", Index(status.st_size), " bytes, expected ",
                             known.size, " as when the text was opened");
    }
    if (status.st_mtim.tv_sec != known.changed.tv_sec ||
        status.st_mtim.tv_nsec != known.changed.tv_nsec) {
      throw_error<FileError>(known.path, ": was changed, expected it as when the text was opened");
    }
    const std::size_t count = file.read(offset, into, known.path);
    if (count == into.size()) return;
    throw_error<FileError>(known.path, ": ends before byte ",
                           offset + static_cast<Index>(into.size()), ", expected ", known.size,
                           " bytes as when the text was opened");
  }

  std::shared_ptr<const std::vector<File>> files_;  // Shared by the parts of a text.
  std::vector<Part> parts_;
  Index size_ = 0;
};

}  // namespace weir::io
