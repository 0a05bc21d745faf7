// SPDX-License-Identifier: MIT
/// \file
/// Metadata for a GGUF file to be written.
#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>
#include <set>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include <weir/core/error.hpp>
#include <weir/io/gguf_parser.hpp>
#include <weir/io/gguf_value.hpp>

namespace weir::io {

namespace detail {

template <class T>
void append_gguf(std::string& bytes, T value) {
  bytes.append(reinterpret_cast<const char*>(&value), sizeof value);
}

inline void append_gguf_text(std::string& bytes, std::string_view text) {
  append_gguf<std::uint64_t>(bytes, text.size());
  bytes += text;
}

template <class T>
constexpr GgufKind kGgufKindOf = GgufKind::kU32;
template <>
inline constexpr GgufKind kGgufKindOf<std::int32_t> = GgufKind::kI32;
template <>
inline constexpr GgufKind kGgufKindOf<float> = GgufKind::kF32;

}  // namespace detail

/// The metadata of a file, in the order in which they are added. Each function is named for the
/// kind it writes, since readers do not take one kind for another.
///
/// All of them throw ConfigError if the key is there already or is not a word of printable ASCII
/// with up to 65535 bytes. The key general.alignment is not for users: files are aligned to 32.
class GgufMetadata {
 public:
  void add_u32(std::string_view key, std::uint32_t value) { add_number(key, value); }
  void add_i32(std::string_view key, std::int32_t value) { add_number(key, value); }
  void add_f32(std::string_view key, float value) { add_number(key, value); }
  void add_bool(std::string_view key, bool value) {
    begin(key, GgufKind::kBool);
    bytes_ += value ? '\1' : '\0';
  }
  void add_text(std::string_view key, std::string_view value) {
    begin(key, GgufKind::kString);
    detail::append_gguf_text(bytes_, value);
  }
  void add_u32s(std::string_view key, std::span<const std::uint32_t> v) { add_numbers(key, v); }
  void add_i32s(std::string_view key, std::span<const std::int32_t> v) { add_numbers(key, v); }
  void add_f32s(std::string_view key, std::span<const float> v) { add_numbers(key, v); }
  void add_texts(std::string_view key, const std::vector<std::string>& values) {
    begin_array(key, GgufKind::kString, values.size());
    for (const std::string& value : values) detail::append_gguf_text(bytes_, value);
  }

  /// Adds a value of another file as it stands there.
  void add_copy(std::string_view key, const GgufValue& value) {
    if (value.is_array) {
      begin_array(key, value.kind, value.count);
    } else {
      begin(key, value.kind);
    }
    bytes_.append(reinterpret_cast<const char*>(value.bytes.data()), value.bytes.size());
  }

  bool has(std::string_view key) const { return keys_.contains(key); }
  std::size_t size() const { return keys_.size(); }

  /// All entries, as they stand in a file.
  const std::string& encoded() const { return bytes_; }

 private:
  void begin_key(std::string_view key) {
    if (!detail::is_gguf_name(key, detail::kGgufMostKey) || key == detail::kGgufAlignmentKey ||
        keys_.contains(key)) {
      throw_error<ConfigError>("GgufMetadata: key = '", key,
                               "', expected different words of printable ASCII other than '",
                               detail::kGgufAlignmentKey, "'");
    }
    keys_.emplace(key);
    detail::append_gguf_text(bytes_, key);
  }
  void begin(std::string_view key, GgufKind kind) {
    begin_key(key);
    detail::append_gguf(bytes_, static_cast<std::uint32_t>(kind));
  }
  void begin_array(std::string_view key, GgufKind kind, std::size_t count) {
    begin_key(key);
    detail::append_gguf(bytes_, detail::kGgufArray);
    detail::append_gguf(bytes_, static_cast<std::uint32_t>(kind));
    detail::append_gguf<std::uint64_t>(bytes_, count);
  }

  template <class T>
  void add_number(std::string_view key, T value) {
    begin(key, detail::kGgufKindOf<T>);
    detail::append_gguf(bytes_, value);
  }
  template <class T>
  void add_numbers(std::string_view key, std::span<const T> values) {
    begin_array(key, detail::kGgufKindOf<T>, values.size());
    for (const T value : values) detail::append_gguf(bytes_, value);
  }

  std::set<std::string, std::less<>> keys_;
  std::string bytes_;
};

}  // namespace weir::io
