// SPDX-License-Identifier: MIT
#include <array>
#include <chrono>
#include <filesystem>
#include <fstream>
#include <string>
#include <sys/resource.h>
#include <sys/stat.h>
#include <unistd.h>
#include <vector>

#include <weir/io/text_files.hpp>
#include <weir/model/text_mixture.hpp>

#include "io/folder.hpp"
#include "support/catch.hpp"
#include "support/matrices.hpp"

namespace weir::text_files_test {

namespace {

namespace fs = std::filesystem;
using io::FileError;
using io::TextFiles;
using Paths = std::vector<fs::path>;

fs::path write(const test::Folder& folder, const std::string& name, const std::string& text) {
  const fs::path path = folder.path() / name;
  std::ofstream(path, std::ios::binary) << text;
  return path;
}

std::string read(const TextFiles& text, Index begin, Index count) {
  std::string bytes(static_cast<std::size_t>(count), '?');
  text.read(begin, bytes);
  return bytes;
}

std::string read(const TextFiles& text) {
  return read(text, 0, text.size());
}

/// The largest number of kilobytes that this process has had in memory.
Index peak_kilobytes() {
  struct rusage usage {};
  getrusage(RUSAGE_SELF, &usage);
  return usage.ru_maxrss;
}

}  // namespace

TEST_CASE("TextFiles are one text", "[io][text]") {
  const test::Folder folder;
  const TextFiles text(Paths{write(folder, "a", "abcde"), write(folder, "empty", ""),
                             write(folder, "b", "f"),
                             write(folder, "c", std::string("\0\xFF g", 4))});
  CHECK(text.files() == 4);
  CHECK(text.size() == 10);
  const std::string whole = std::string("abcdef\0\xFF g", 10);
  for (Index begin = 0; begin <= 10; ++begin) {
    for (Index count = 0; begin + count <= 10; ++count) {
      CHECK(read(text, begin, count) ==
            whole.substr(static_cast<std::size_t>(begin), static_cast<std::size_t>(count)));
    }
  }
}

TEST_CASE("TextFiles set the end of each file aside", "[io][text]") {
  const test::Folder folder;
  const TextFiles text(Paths{write(folder, "a", "0123456789"), write(folder, "b", "xyz"),
                             write(folder, "c", ""), write(folder, "d", "ABCDE")});
  const auto [stays, aside] = text.without_last(5);
  CHECK(read(stays) == "01234567xyzABCD");
  CHECK(read(aside) == "89E");
  CHECK(aside.files() == 4);
  CHECK(read(text.without_last(1).second) == read(text));
  CHECK(text.without_last(1).first.size() == 0);
  CHECK(text.without_last(100).second.size() == 0);
}

TEST_CASE("TextFiles may be empty or one byte long", "[io][text]") {
  const test::Folder folder;
  const TextFiles none;
  CHECK(none.size() == 0);
  CHECK(none.files() == 0);
  CHECK(read(none).empty());
  const TextFiles empty(Paths{write(folder, "empty", "")});
  CHECK(empty.size() == 0);
  CHECK(empty.files() == 1);
  CHECK(read(empty).empty());
  CHECK(empty.fingerprint() == none.fingerprint());
  const TextFiles one(Paths{write(folder, "one", "x")});
  CHECK(read(one) == "x");
  CHECK(one.fingerprint() != empty.fingerprint());
}

TEST_CASE("TextFiles notice that a file was changed", "[io][text]") {
  const test::Folder folder;
  const fs::path path = write(folder, "a", "0123456789");
  const TextFiles text(Paths{path, write(folder, "b", "xyz")});
  const auto message = [&] { return test::message_of<FileError>([&] { read(text, 2, 4); }); };
  CHECK(message() == "no exception");

  fs::resize_file(path, 4);
  CHECK(message() == path.string() + ": has 4 bytes, expected 10 as when the text was opened");
  CHECK(read(text, 10, 3) == "xyz");  // The other file is as it was.
  fs::resize_file(path, 0);
  CHECK(message() == path.string() + ": has 0 bytes, expected 10 as when the text was opened");
  write(folder, "a", "012345678900");
  CHECK(message() == path.string() + ": has 12 bytes, expected 10 as when the text was opened");
  write(folder, "a", "9876543210");
  fs::last_write_time(path, fs::last_write_time(path) + std::chrono::seconds(1));
  CHECK(message() == path.string() + ": was changed, expected it as when the text was opened");
  fs::remove(path);
  CHECK(message() == path.string() + ": cannot be opened: No such file or directory");
  ::mkfifo(path.c_str(), 0600);  // Nobody will ever write into it.
  CHECK(message() == path.string() + ": is not a regular file");
}

TEST_CASE("The fingerprint of TextFiles tells texts apart", "[io][text]") {
  const test::Folder folder;
  std::string text;
  for (int i = 0; i < 5000; ++i) text += std::to_string(i * i);
  const auto print = [&](const std::string& of) {
    return TextFiles(Paths{write(folder, "x", of)}).fingerprint();
  };
  const std::uint64_t same = print(text);
  CHECK(print(text) == same);
  CHECK(print(text + " ") != same);
  std::string changed = text;
  changed.front() = '#';
  CHECK(print(changed) != same);
  changed = text;
  changed.back() = '#';
  CHECK(print(changed) != same);
  const TextFiles parts(
      Paths{write(folder, "a", text.substr(0, 100)), write(folder, "b", text.substr(100))});
  CHECK(read(parts) == text);
  CHECK(parts.fingerprint() != same);
}

TEST_CASE("TextFiles read texts larger than memory in bounded memory", "[io][text]") {
  // A file with holes of 64 TiB: more than any memory, mapped or not.
  const test::Folder folder;
  const fs::path path = write(folder, "huge", "");
  std::error_code error;
  Index size = Index{1} << 46;
  for (fs::resize_file(path, std::uintmax_t{1} << 46U, error); error && size > (Index{1} << 33);) {
    size /= 4;  // The file system has a limit.
    fs::resize_file(path, static_cast<std::uintmax_t>(size), error);
  }
  REQUIRE_FALSE(error);
  {
    std::fstream file(path, std::ios::in | std::ios::out | std::ios::binary);
    file.seekp(size - 3);
    file << "end";
  }
  const TextFiles text(Paths{path});
  const auto [train, validation] = text.without_last(20);
  REQUIRE(train.size() + validation.size() == size);
  TextMixture mixture({train.size(), validation.size()}, {{0, {0.5, 0.5}}}, {.length = 4096});
  std::string window(4097, '?');
  const Index before = peak_kilobytes();
  for (int n = 0; n < 4000; ++n) {
    const TextWindow at = mixture.next();
    (at.text == 0 ? train : validation).read(at.start, window);
  }
  CHECK(peak_kilobytes() - before < 8 * 1024);  // 16 MB were read.
  CHECK(window.find_first_not_of('\0') == std::string::npos);
  CHECK(read(text, size - 4, 4) == std::string("\0end", 4));
  CHECK(read(validation, validation.size() - 3, 3) == "end");
  CHECK(text.fingerprint() != 0);
}

TEST_CASE("TextFiles say what does not fit", "[io][text]") {
  const test::Folder folder;
  const std::string missing = (folder.path() / "missing").string();
  CHECK(test::message_of<FileError>([&] { TextFiles(Paths{missing}); }) ==
        missing + ": cannot be opened: No such file or directory");
  CHECK(test::message_of<FileError>([&] { TextFiles(Paths{folder.path()}); }) ==
        folder.path().string() + ": is not a regular file");
  const TextFiles text(Paths{write(folder, "a", "0123456789")});
  CHECK(test::message_of<ConfigError>([&] { read(text, 8, 3); }) ==
        "TextFiles::read: begin = 8 and 3 bytes, expected a range inside 10 bytes");
  CHECK(test::message_of<ConfigError>([&] { read(text, -1, 3); }) ==
        "TextFiles::read: begin = -1 and 3 bytes, expected a range inside 10 bytes");
  CHECK(test::message_of<ConfigError>([&] { text.without_last(0); }) ==
        "TextFiles::without_last: n = 0, expected >= 1");
}

}  // namespace weir::text_files_test
