// SPDX-License-Identifier: MIT
// libFuzzer: any bytes are refused as a GGUF file with a FileError, or describe a model whose sizes
// can be checked and whose tensors can be named.
#include <cstddef>
#include <cstdint>
#include <string>
#include <variant>

#include <weir/core/error.hpp>
#include <weir/io/file_error.hpp>
#include <weir/io/gguf.hpp>
#include <weir/io/gguf_families.hpp>
#include <weir/io/gguf_model_writer.hpp>
#include <weir/io/read_model.hpp>

namespace {

namespace io = weir::io;

template <class Config>
void read_as(const io::Gguf& file) {
  if (!io::GgufFamily<Config>::reads(file)) return;
  const auto config = io::detail::read_gguf_config<Config>(file);
  static_cast<void>(io::detail::least_numbers(config.shape));
  config.shape.check();
  static_cast<void>(io::GgufFamily<Config>::names(config, &file).size());
}

template <class... Configs>
void read_as_any(const io::Gguf& file, std::variant<Configs...>* /*families*/) {
  (read_as<Configs>(file), ...);
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) {
  try {
    const io::Gguf file("file", std::string(reinterpret_cast<const char*>(data), size));
    read_as_any(file, static_cast<io::GgufConfig*>(nullptr));
  } catch (const io::FileError&) {
  } catch (const weir::ConfigError&) {
  }
  return 0;
}
