// SPDX-License-Identifier: MIT
/// \file
/// Values of the metadata of GGUF files.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <iterator>
#include <span>
#include <string_view>

namespace weir::io {

/// The kinds of metadata, under the format's own numbers. Each value has a kind, and all elements
/// of an array have one. (https://github.com/ggml-org/ggml, docs/gguf.md, gguf_metadata_value_type;
/// number 9 there is the array.)
enum class GgufKind : std::uint32_t {
  kU8 = 0,
  kI8 = 1,
  kU16 = 2,
  kI16 = 3,
  kU32 = 4,
  kI32 = 5,
  kF32 = 6,
  kBool = 7,
  kString = 8,
  kU64 = 10,
  kI64 = 11,
  kF64 = 12,
};

namespace detail {

inline constexpr std::uint32_t kGgufArray = 9;

struct GgufKindInfo {
  std::string_view name;
  std::size_t width;  // Bytes of a value; 0 for strings.
};

/// By the format's numbers.
inline constexpr std::array<GgufKindInfo, 13> kGgufKinds = {{{"U8", 1},
                                                             {"I8", 1},
                                                             {"U16", 2},
                                                             {"I16", 2},
                                                             {"U32", 4},
                                                             {"I32", 4},
                                                             {"F32", 4},
                                                             {"BOOL", 1},
                                                             {"STRING", 0},
                                                             {"ARRAY", 0},
                                                             {"U64", 8},
                                                             {"I64", 8},
                                                             {"F64", 8}}};

template <class T>
T little_endian(const std::byte* bytes) {
  T value;
  std::memcpy(&value, bytes, sizeof value);
  return value;
}

}  // namespace detail

/// The name of a kind, such as "U32".
constexpr std::string_view name_of(GgufKind kind) {
  return detail::kGgufKinds[static_cast<std::size_t>(kind)].name;
}

/// Bytes of a value of that kind; 0 for strings, which differ.
constexpr std::size_t width_of(GgufKind kind) {
  return detail::kGgufKinds[static_cast<std::size_t>(kind)].width;
}

/// A value of the metadata, as it stands in the file: numbers are decoded when they are asked for.
struct GgufValue {
  GgufKind kind = GgufKind::kU32;  ///< Of an array: of its elements.
  bool is_array = false;
  std::size_t count = 1;             ///< Elements of an array; 1 for others.
  std::span<const std::byte> bytes;  ///< The value, or the elements one after the other.
};

/// The strings of an array, read one after the other where they lie in the file: going through a
/// tokenizer's hundreds of thousands of tokens allocates nothing.
class GgufStrings {
 public:
  class Iterator {
   public:
    // NOLINTBEGIN(readability-identifier-naming): the names of std::iterator_traits.
    using iterator_category = std::forward_iterator_tag;
    using value_type = std::string_view;
    using difference_type = std::ptrdiff_t;
    using pointer = const std::string_view*;
    using reference = std::string_view;
    // NOLINTEND(readability-identifier-naming)

    Iterator() = default;
    explicit Iterator(const std::byte* at) : at_(at) {}

    std::string_view operator*() const {
      return {reinterpret_cast<const char*>(at_ + sizeof(std::uint64_t)), length()};
    }
    Iterator& operator++() {
      at_ += sizeof(std::uint64_t) + length();
      return *this;
    }
    Iterator operator++(int) {
      const Iterator before = *this;
      ++*this;
      return before;
    }
    bool operator==(const Iterator&) const = default;

   private:
    std::size_t length() const { return detail::little_endian<std::uint64_t>(at_); }

    const std::byte* at_ = nullptr;
  };

  /// \param value  An array of strings of a file whose reader has checked their lengths.
  explicit GgufStrings(const GgufValue& value) : bytes_(value.bytes), count_(value.count) {}

  std::size_t size() const { return count_; }
  Iterator begin() const { return Iterator(bytes_.data()); }
  Iterator end() const { return Iterator(bytes_.data() + bytes_.size()); }

 private:
  std::span<const std::byte> bytes_;
  std::size_t count_;
};

}  // namespace weir::io
