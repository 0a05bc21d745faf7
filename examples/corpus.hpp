// SPDX-License-Identifier: MIT
/// \file
/// Text files, read and split for training.
#pragma once

#include <algorithm>
#include <cstddef>
#include <filesystem>
#include <fstream>
#include <iterator>
#include <stdexcept>
#include <string>
#include <vector>

/// Bytes to train on, and bytes of the same kind to judge by.
struct Corpus {
  std::string train, validation;
  std::size_t files = 0;
};

/// The paths in a list such as "/usr/include:/home".
inline std::vector<std::string> split_paths(std::string list) {
  std::vector<std::string> paths;
  for (std::size_t end = 0; end != std::string::npos;) {
    end = list.find(':');
    paths.push_back(list.substr(0, end));
    list.erase(0, end == std::string::npos ? end : end + 1);
  }
  return paths;
}

/// The regular files among `paths` and, recursively, in the folders among them, sorted by name.
/// \throws std::runtime_error  if a path does not exist.
inline std::vector<std::filesystem::path> files_in(const std::vector<std::string>& paths) {
  namespace fs = std::filesystem;
  std::vector<fs::path> files;
  for (const fs::path path : paths) {
    if (fs::is_directory(path)) {
      for (const auto& entry : fs::recursive_directory_iterator(path)) {
        if (entry.is_regular_file()) files.push_back(entry.path());
      }
    } else if (fs::exists(path)) {
      files.push_back(path);
    } else {
      throw std::runtime_error("no such file or folder: " + path.string());
    }
  }
  std::sort(files.begin(), files.end());
  return files;
}

/// Of each file, this part is set aside for validation: one in 20 bytes, the last ones.
inline constexpr std::ptrdiff_t kSetAside = 20;

/// Reads the files that `files_in` finds. From each, the last 5 % are set aside for validation.
/// \throws std::runtime_error  if a path does not exist, a file cannot be read, or there is no
/// text.
inline Corpus read_corpus(const std::vector<std::string>& paths) {
  Corpus corpus;
  for (const std::filesystem::path& file : files_in(paths)) {
    std::ifstream in(file, std::ios::binary);
    const std::string text{std::istreambuf_iterator<char>(in), std::istreambuf_iterator<char>()};
    if (!in) throw std::runtime_error("cannot read " + file.string());
    const std::size_t split = text.size() - text.size() / kSetAside;
    corpus.train.append(text, 0, split);
    corpus.validation.append(text, split);
    ++corpus.files;
  }
  if (corpus.validation.empty()) throw std::runtime_error("the text is too short to learn from");
  return corpus;
}

/// Where `count` windows of `length` bytes begin that are spread evenly over a text of `size`
/// bytes, each with a byte behind it.
inline std::vector<std::size_t> spread_windows(std::size_t size, std::ptrdiff_t length,
                                               std::ptrdiff_t count) {
  const auto room = static_cast<double>(size - static_cast<std::size_t>(length) - 1);
  std::vector<std::size_t> starts;
  for (std::ptrdiff_t i = 0; i < count; ++i) {
    const double share = static_cast<double>(i) / static_cast<double>(count);
    starts.push_back(static_cast<std::size_t>(room * share));
  }
  return starts;
}

inline std::vector<std::size_t> spread_windows(const std::string& text, std::ptrdiff_t length,
                                               std::ptrdiff_t count) {
  return spread_windows(text.size(), length, count);
}
