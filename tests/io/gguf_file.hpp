// SPDX-License-Identifier: MIT
/// \file
/// GGUF files made by hand, for the tests of what reads them.
#pragma once

#include <cstdint>
#include <string>
#include <string_view>
#include <vector>

#include "io/files.hpp"

namespace weir::test {

inline std::string gguf_text(std::string_view text) {
  return bytes_of<std::uint64_t>({text.size()}) + std::string(text);
}

/// An entry of the metadata: a key, the number of its kind, and the value's bytes.
inline std::string gguf_entry(std::string_view key, std::uint32_t kind, const std::string& value) {
  return gguf_text(key) + bytes_of<std::uint32_t>({kind}) + value;
}

/// An entry that is an array.
inline std::string gguf_array(std::string_view key, std::uint32_t kind, std::uint64_t count,
                              const std::string& elements) {
  return gguf_entry(key, 9,
                    bytes_of<std::uint32_t>({kind}) + bytes_of<std::uint64_t>({count}) + elements);
}

/// The description of a tensor; the first length is the innermost.
inline std::string gguf_tensor(std::string_view name, const std::vector<std::uint64_t>& lengths,
                               std::uint32_t type, std::uint64_t offset) {
  std::string bytes =
      gguf_text(name) + bytes_of<std::uint32_t>({static_cast<std::uint32_t>(lengths.size())});
  for (const std::uint64_t length : lengths) bytes += bytes_of<std::uint64_t>({length});
  return bytes + bytes_of<std::uint32_t>({type}) + bytes_of<std::uint64_t>({offset});
}

/// A file of these entries and descriptions, padded to the alignment where it has data.
inline std::string gguf_file(const std::vector<std::string>& entries,
                             const std::vector<std::string>& tensors = {},
                             const std::string& data = {}, std::size_t alignment = 32) {
  std::string bytes = "GGUF" + bytes_of<std::uint32_t>({3}) +
                      bytes_of<std::uint64_t>({tensors.size(), entries.size()});
  for (const std::string& entry : entries) bytes += entry;
  for (const std::string& tensor : tensors) bytes += tensor;
  if (!tensors.empty()) bytes.resize((bytes.size() + alignment - 1) / alignment * alignment);
  return bytes + data;
}

}  // namespace weir::test
