// SPDX-License-Identifier: MIT
/// \file
/// Writes GGUF files.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <filesystem>
#include <functional>
#include <limits>
#include <set>
#include <span>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include <weir/core/error.hpp>
#include <weir/core/types.hpp>
#include <weir/io/atomic_file.hpp>
#include <weir/io/gguf_metadata.hpp>
#include <weir/io/gguf_numbers.hpp>
#include <weir/io/gguf_parser.hpp>
#include <weir/io/gguf_type.hpp>
#include <weir/io/safetensors.hpp>

namespace weir::io {

/// A tensor to be written, made row by row when it is its turn.
template <class T>
struct GgufSource {
  std::string name;
  std::vector<Index> shape;  ///< 1 to 4 lengths, row-major; the last one is that of a row.
  GgufType type = GgufType::kF32;

  /// Writes the rows `first` to `first + count - 1`, counted over all lengths but the last.
  std::function<void(Index first, Index count, T* to)> write_rows;
};

/// A tensor with the numbers of `matrix`, which has to stay until it is written.
/// \param shape  A row-major shape for them, such as {cols} for a matrix of one row.
template <class T>
GgufSource<T> gguf_source(std::string name, const Matrix<T>& matrix, GgufType type,
                          std::vector<Index> shape) {
  const Index cols = shape.empty() ? 1 : shape.back();
  return {std::move(name), std::move(shape), type,
          [&matrix, cols](Index first, Index count, T* to) {
            std::copy_n(matrix.data() + first * cols, count * cols, to);
          }};
}

namespace detail {

/// The longest name that llama.cpp reads; the format allows one byte more.
inline constexpr std::size_t kGgufMostWrittenName = 63;

inline std::uint64_t padded_to_gguf(std::uint64_t bytes) {
  return (bytes + kGgufAlignment - 1) / kGgufAlignment * kGgufAlignment;
}

/// The bytes of a tensor after all checks of its description.
template <class T>
std::uint64_t checked_gguf_bytes(const GgufSource<T>& source) {
  const auto bad = [&](const auto&... parts) {
    throw_error<ConfigError>("write_gguf: tensor '", source.name, "': ", parts...);
  };
  if (!is_writable(source.type)) {
    bad("type = ", name_of(source.type), ", expected F32, F16, BF16 or Q8_0");
  }
  if (source.shape.empty() || source.shape.size() > kGgufMostDimensions) {
    bad("shape has ", source.shape.size(), " lengths, expected 1 to ", kGgufMostDimensions);
  }
  // As in llama.cpp, whose sizes are signed.
  constexpr Index kMostNumbers = std::numeric_limits<Index>::max() / 8;
  Index size = 1;
  for (const Index length : source.shape) {
    if (length < 1 || size > kMostNumbers / length) {
      bad("shape ", shape_text(source.shape), ", expected positive lengths of at most ",
          kMostNumbers, " numbers");
    }
    size *= length;
  }
  const Index block = block_length(source.type);
  if (source.shape.back() % block != 0) {
    bad("has rows of ", source.shape.back(), " numbers, expected a multiple of ", block, " for ",
        name_of(source.type));
  }
  return static_cast<std::uint64_t>(size / block) * block_bytes(source.type);
}

/// The file up to its data.
template <class T>
std::string gguf_start(const GgufMetadata& metadata, const std::vector<GgufSource<T>>& sources) {
  std::string start = "GGUF";
  append_gguf<std::uint32_t>(start, 3);
  append_gguf<std::uint64_t>(start, sources.size());
  append_gguf<std::uint64_t>(start, metadata.size());
  start += metadata.encoded();
  std::set<std::string_view> names;
  std::uint64_t offset = 0;
  for (const GgufSource<T>& source : sources) {
    if (!is_gguf_name(source.name, kGgufMostWrittenName) || !names.insert(source.name).second) {
      throw_error<ConfigError>("write_gguf: a tensor is named '", source.name,
                               "', expected different words of printable ASCII with up to ",
                               kGgufMostWrittenName, " bytes");
    }
    const std::uint64_t bytes = checked_gguf_bytes(source);
    append_gguf_text(start, source.name);
    append_gguf(start, static_cast<std::uint32_t>(source.shape.size()));
    for (auto length = source.shape.rbegin(); length != source.shape.rend(); ++length) {
      append_gguf(start, static_cast<std::uint64_t>(*length));
    }
    append_gguf(start, static_cast<std::uint32_t>(source.type));
    append_gguf(start, offset);
    offset += padded_to_gguf(bytes);
  }
  start.resize(static_cast<std::size_t>(padded_to_gguf(start.size())), '\0');
  return start;
}

/// Appends the rows of a tensor to `file`, some at a time.
template <class T>
void write_gguf_tensor(AtomicFile& file, const GgufSource<T>& source) {
  constexpr Index kNumbers = 65536;
  const Index cols = source.shape.back();
  Index rows = 1;
  for (std::size_t i = 0; i + 1 < source.shape.size(); ++i) rows *= source.shape[i];
  const Index at_once = std::min(rows, std::max(kNumbers / cols, Index(1)));
  const std::size_t row_bytes =
      static_cast<std::size_t>(cols / block_length(source.type)) * block_bytes(source.type);
  std::vector<T> numbers(static_cast<std::size_t>(at_once * cols));
  std::vector<std::byte> stored(static_cast<std::size_t>(at_once) * row_bytes);
  for (Index first = 0; first < rows; first += at_once) {
    const Index count = std::min(at_once, rows - first);
    source.write_rows(first, count, numbers.data());
    quantise("write_gguf: tensor '" + source.name + "'", source.type, numbers.data(), count * cols,
             stored.data());
    file.write(std::span(stored).first(static_cast<std::size_t>(count) * row_bytes));
  }
  const std::uint64_t bytes = static_cast<std::uint64_t>(rows) * row_bytes;
  file.write(std::string(static_cast<std::size_t>(padded_to_gguf(bytes) - bytes), '\0'));
}

}  // namespace detail

/// Writes a GGUF file of version 3: the metadata in their order and the tensors in theirs, each
/// made and rounded some rows at a time. The file gets its name once it is whole and on the disk;
/// the memory needed beside the start of the file is that of 65536 numbers or of one row. \throws
/// ConfigError  if a tensor's name is there twice, is not a word of printable ASCII or has
///                      more than 63 bytes; if its type is not one that `is_writable`, or its rows
///                      are no multiple of the type's blocks; if it does not have 1 to 4 positive
///                      lengths; or if a number does not fit its type.
/// \throws FileError    if the file cannot be written. In both cases the old file stays.
template <class T>
void write_gguf(const std::filesystem::path& path, const GgufMetadata& metadata,
                const std::vector<GgufSource<T>>& sources) {
  const std::string start = detail::gguf_start(metadata, sources);
  AtomicFile file(path);
  file.write(start);
  for (const GgufSource<T>& source : sources) detail::write_gguf_tensor(file, source);
  file.commit();
}

}  // namespace weir::io
