// SPDX-License-Identifier: MIT
// libFuzzer: any bytes are refused with a FileError, or are a trace whose records can be read.
#include <cstddef>
#include <cstdint>
#include <span>
#include <string_view>

#include <weir/io/trace_file.hpp>

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) {
  try {
    weir::io::TraceFileHeader header;
    const weir::Trace trace =
        weir::io::TraceFile::parse("file", std::as_bytes(std::span(data, size)), header);
    std::size_t lines = 0;
    weir::write_csv(trace, [&](std::string_view text) { lines += text.size(); });
    if (lines == 0) __builtin_trap();
  } catch (const weir::io::FileError&) {
  }
  return 0;
}
