// SPDX-License-Identifier: MIT
// libFuzzer: any bytes are refused with a FileError, or are a file whose metadata and tensors can
// be read.
#include <cstddef>
#include <cstdint>
#include <string>
#include <string_view>

#include <weir/io/gguf.hpp>

namespace {

/// Reads an entry by each function that takes its kind, and by one that does not.
void read_entry(const weir::io::Gguf& file, std::string_view key,
                const weir::io::GgufValue& value) {
  using weir::io::GgufKind;
  std::size_t count = 1;
  if (value.kind == GgufKind::kString) {
    count = 0;
    if (value.is_array) {
      for (const std::string_view text : file.texts(key)) {
        if (text.size() > value.bytes.size()) __builtin_trap();
        ++count;
      }
    } else {
      count = file.text(key).size() <= value.bytes.size() ? 1 : 0;
    }
  } else if (value.kind == GgufKind::kF32 || value.kind == GgufKind::kF64) {
    if (value.is_array) {
      count = file.reals(key).size();
    } else {
      file.real(key);
    }
  } else if (value.is_array) {
    count = file.integers(key).size();
  } else if (value.kind == GgufKind::kBool) {
    file.boolean(key);
  } else {
    file.integer(key);
  }
  if (count != value.count) __builtin_trap();
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) {
  using weir::io::FileError;
  try {
    const weir::io::Gguf file("file", std::string(reinterpret_cast<const char*>(data), size));
    for (const auto& [name, tensor] : file.tensors()) {
      if (static_cast<weir::Index>(file.numbers(name).size()) != tensor.size()) __builtin_trap();
    }
    for (const auto& [key, value] : file.metadata()) {
      if (!file.has(key)) __builtin_trap();
      try {
        read_entry(file, key, value);
      } catch (const FileError&) {  // A number above 2^63 - 1.
      }
    }
  } catch (const FileError&) {
  }
  return 0;
}
