// SPDX-License-Identifier: MIT
/// \file
/// Reads GGUF files, which may be broken or made with ill intent: a message, or the numbers, never
/// anything else.
#pragma once

#include <cstddef>
#include <cstdint>
#include <limits>
#include <map>
#include <span>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include <weir/core/error.hpp>
#include <weir/core/types.hpp>
#include <weir/io/file_error.hpp>
#include <weir/io/gguf_parser.hpp>
#include <weir/io/gguf_tensor.hpp>
#include <weir/io/gguf_value.hpp>
#include <weir/io/mapped_file.hpp>

namespace weir::io {

/// The metadata and tensors of a file of the format
///
///     "GGUF", u32 version (2 or 3), u64 tensors, u64 entries of metadata
///     each entry of metadata:  string key, u32 kind, the value
///     each tensor:             string name, u32 dimensions, u64 lengths (the innermost first),
///                              u32 kind, u64 offset in the data
///     padding to a multiple of the alignment (the entry general.alignment, otherwise 32)
///     the data, each tensor at the next multiple of the alignment
///
/// where a string is its u64 length and its bytes, an array its u32 kind, its u64 count and its
/// elements, and all numbers are little-endian. (https://github.com/ggml-org/ggml, docs/gguf.md.)
/// The file is mapped into memory, and numbers and strings are read only when they are asked for.
/// Everything that the file says of itself is checked before it is believed, so that no file makes
/// the reader look outside of it or allocate more than a small multiple of the file's size. Keys
/// and names have to be printable ASCII without spaces. Arrays of arrays are refused.
class Gguf {
 public:
  /// \throws FileError  naming the file, and the key or the tensor if it is about one.
  static Gguf read(const std::string& path) {
    Gguf file(path);
    file.mapped_ = MappedFile(path);
    file.contents_ = detail::GgufParser(path, file.mapped_.bytes()).parsed();
    return file;
  }

  /// \param path     For messages.
  /// \param bytes    The content of a file.
  /// \throws FileError  as `read`.
  Gguf(std::string path, const std::string& bytes) : path_(std::move(path)) {
    content_.assign(bytes.begin(), bytes.end());
    contents_ = detail::GgufParser(path_, std::as_bytes(std::span(content_))).parsed();
  }

  const std::string& path() const { return path_; }

  /// The metadata in the file's order.
  const std::vector<std::pair<std::string_view, GgufValue>>& metadata() const {
    return contents_.metadata;
  }
  const std::map<std::string_view, GgufTensor>& tensors() const { return contents_.tensors; }
  bool has(std::string_view key) const { return contents_.entries.contains(key); }
  bool has_tensor(std::string_view name) const { return contents_.tensors.contains(name); }

  /// \throws FileError  if there is no tensor of that name.
  const GgufTensor& tensor(std::string_view name) const {
    const auto found = contents_.tensors.find(name);
    if (found == contents_.tensors.end()) reject("tensor '", name, "' is missing");
    return found->second;
  }

  /// The entry of that key.
  /// \throws FileError  if there is none.
  const GgufValue& value(std::string_view key) const {
    const auto found = contents_.entries.find(key);
    if (found == contents_.entries.end()) reject("key '", key, "' is missing");
    return contents_.metadata[found->second].second;
  }

  /// A number of any of the integer kinds.
  /// \throws FileError  if it is missing, of another kind, or above 2^63 - 1.
  std::int64_t integer(std::string_view key) const {
    return integer_at(key, single(key, is_integer, kInteger), 0);
  }

  /// A number of the kinds F32 and F64.
  /// \throws FileError  if it is missing or of another kind.
  double real(std::string_view key) const {
    return real_at(single(key, is_floating_point, kReal), 0);
  }

  /// \throws FileError  if the entry is missing or no BOOL.
  bool boolean(std::string_view key) const {
    return single(key, is_boolean, kBoolean).bytes[0] != std::byte{0};
  }

  /// \throws FileError  if the entry is missing or no STRING.
  std::string_view text(std::string_view key) const {
    return *GgufStrings(single(key, is_string, kText)).begin();
  }

  /// An array of any of the integer kinds or of BOOL.
  /// \throws FileError  if it is missing, of another kind, or has a number above 2^63 - 1.
  std::vector<std::int64_t> integers(std::string_view key) const;

  /// An array of the kinds F32 and F64.
  /// \throws FileError  if it is missing or of another kind.
  std::vector<double> reals(std::string_view key) const;

  /// An array of STRING; valid as long as the file is there.
  /// \throws FileError  if it is missing or of another kind.
  GgufStrings texts(std::string_view key) const {
    return GgufStrings(array(key, is_string, kText));
  }

  /// All numbers of a tensor.
  /// \throws FileError  if it is missing.
  std::vector<double> numbers(std::string_view name) const {
    const GgufTensor& t = tensor(name);
    std::vector<double> result(static_cast<std::size_t>(t.size()));
    dequantise(t, 0, t.size(), result.data());
    return result;
  }

 private:
  using IsKind = bool (*)(GgufKind);

  static constexpr std::string_view kInteger = "an integer kind";
  static constexpr std::string_view kReal = "F32 or F64";
  static constexpr std::string_view kBoolean = "BOOL";
  static constexpr std::string_view kText = "STRING";

  explicit Gguf(std::string path) : path_(std::move(path)) {}

  template <class... Parts>
  [[noreturn]] void reject(const Parts&... parts) const {
    throw_error<FileError>(path_, ": ", parts...);
  }

  static bool is_string(GgufKind kind) { return kind == GgufKind::kString; }
  static bool is_boolean(GgufKind kind) { return kind == GgufKind::kBool; }
  static bool is_floating_point(GgufKind kind) {
    return kind == GgufKind::kF32 || kind == GgufKind::kF64;
  }
  static bool is_integer(GgufKind kind) {
    return !is_string(kind) && !is_boolean(kind) && !is_floating_point(kind);
  }
  static bool is_integer_or_boolean(GgufKind kind) { return is_integer(kind) || is_boolean(kind); }

  const GgufValue& single(std::string_view key, IsKind is_kind, std::string_view expected) const {
    return checked(key, false, is_kind, expected);
  }
  const GgufValue& array(std::string_view key, IsKind is_kind, std::string_view expected) const {
    return checked(key, true, is_kind, expected);
  }
  const GgufValue& checked(std::string_view key, bool is_array, IsKind is_kind,
                           std::string_view expected) const;

  std::int64_t integer_at(std::string_view key, const GgufValue& value, std::size_t index) const;

  static double real_at(const GgufValue& value, std::size_t index) {
    const std::byte* const at = value.bytes.data() + index * width_of(value.kind);
    return value.kind == GgufKind::kF32 ? static_cast<double>(detail::little_endian<float>(at))
                                        : detail::little_endian<double>(at);
  }

  std::string path_;
  MappedFile mapped_;
  std::vector<char> content_;  // Where the bytes did not come from a file.
  detail::GgufContents contents_;
};

inline const GgufValue& Gguf::checked(std::string_view key, bool is_array, IsKind is_kind,
                                      std::string_view expected) const {
  const GgufValue& found = value(key);
  if (found.is_array != is_array || !is_kind(found.kind)) {
    reject("key '", key, "' is ", found.is_array ? "an array of " : "", name_of(found.kind),
           ", expected ", is_array ? "an array of " : "", expected);
  }
  return found;
}

inline std::vector<std::int64_t> Gguf::integers(std::string_view key) const {
  const GgufValue& found = array(key, is_integer_or_boolean, "an integer kind or BOOL");
  std::vector<std::int64_t> result(found.count);
  for (std::size_t i = 0; i < found.count; ++i) result[i] = integer_at(key, found, i);
  return result;
}

inline std::vector<double> Gguf::reals(std::string_view key) const {
  const GgufValue& found = array(key, is_floating_point, kReal);
  std::vector<double> result(found.count);
  for (std::size_t i = 0; i < found.count; ++i) result[i] = real_at(found, i);
  return result;
}

inline std::int64_t Gguf::integer_at(std::string_view key, const GgufValue& value,
                                     std::size_t index) const {
  const std::byte* const at = value.bytes.data() + index * width_of(value.kind);
  switch (value.kind) {
    case GgufKind::kI8:
      return detail::little_endian<std::int8_t>(at);
    case GgufKind::kU16:
      return detail::little_endian<std::uint16_t>(at);
    case GgufKind::kI16:
      return detail::little_endian<std::int16_t>(at);
    case GgufKind::kU32:
      return detail::little_endian<std::uint32_t>(at);
    case GgufKind::kI32:
      return detail::little_endian<std::int32_t>(at);
    case GgufKind::kI64:
      return detail::little_endian<std::int64_t>(at);
    case GgufKind::kU64: {
      const auto number = detail::little_endian<std::uint64_t>(at);
      if (number > static_cast<std::uint64_t>(std::numeric_limits<std::int64_t>::max())) {
        reject("key '", key, "' is ", number, ", expected at most 9223372036854775807");
      }
      return static_cast<std::int64_t>(number);
    }
    default:
      return detail::little_endian<std::uint8_t>(at);
  }
}

}  // namespace weir::io
