// SPDX-License-Identifier: MIT
/// \file
/// Safetensors files made by hand, for the tests of what reads them.
#pragma once

#include <cstdint>
#include <cstring>
#include <initializer_list>
#include <string>
#include <string_view>

namespace weir::test {

/// The bytes of `values` as they stand in a file.
template <class Stored>
std::string bytes_of(std::initializer_list<Stored> values) {
  std::string bytes(values.size() * sizeof(Stored), '\0');
  std::memcpy(bytes.data(), values.begin(), bytes.size());
  return bytes;
}

/// A file with this header and these data.
inline std::string file_of(std::string_view header, const std::string& data = {}) {
  std::string bytes = bytes_of<std::uint64_t>({header.size()});
  return bytes.append(header).append(data);
}

}  // namespace weir::test
