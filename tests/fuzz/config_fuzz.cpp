// SPDX-License-Identifier: MIT
// libFuzzer: any bytes are refused as config.json with a FileError, or describe a model whose sizes
// can be checked and whose tensors can be named.
#include <cstddef>
#include <cstdint>
#include <string_view>
#include <variant>

#include <weir/core/error.hpp>
#include <weir/io/config_file.hpp>
#include <weir/io/file_error.hpp>
#include <weir/io/json_object.hpp>
#include <weir/io/model_config.hpp>
#include <weir/io/read_model.hpp>

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) {
  namespace io = weir::io;
  constexpr std::size_t kMostBytes = 1 << 16;
  try {
    const std::string_view text(reinterpret_cast<const char*>(data), size);
    const io::ModelConfig config = io::parse_config(io::ConfigFile(
        io::JsonObject("config.json", io::parse_json("config.json", text, kMostBytes))));
    std::visit(
        [](const auto& own) {
          static_cast<void>(io::detail::least_numbers(own.shape));
          own.shape.check();
          static_cast<void>(
              io::Family<std::remove_cvref_t<decltype(own)>>::names(own, nullptr).size());
        },
        config);
  } catch (const io::FileError&) {
  } catch (const weir::ConfigError&) {
  }
  return 0;
}
