// SPDX-License-Identifier: MIT
// libFuzzer: any bytes are refused with a FileError, or are a file whose tensors can be read.
#include <cstddef>
#include <cstdint>
#include <string>

#include <weir/io/safetensors.hpp>

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) {
  try {
    const weir::io::Safetensors file("file",
                                     std::string(reinterpret_cast<const char*>(data), size));
    for (const auto& [name, tensor] : file.tensors()) {
      if (weir::io::is_real(tensor.dtype)) {
        if (static_cast<weir::Index>(file.reals(name).size()) != tensor.size()) __builtin_trap();
      } else if (static_cast<weir::Index>(file.integers(name).size()) != tensor.size()) {
        __builtin_trap();
      }
    }
  } catch (const weir::io::FileError&) {
  }
  return 0;
}
