// SPDX-License-Identifier: MIT
/// \file
/// Takes GGUF files apart and checks all that they say of themselves.
#pragma once

#include <algorithm>
#include <bit>
#include <cstddef>
#include <cstdint>
#include <cstring>
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
#include <weir/io/gguf_tensor.hpp>
#include <weir/io/gguf_type.hpp>
#include <weir/io/gguf_value.hpp>
#include <weir/io/safetensors.hpp>

namespace weir::io::detail {

/// What a file holds. Keys, names and values lie in the file's bytes.
struct GgufContents {
  std::vector<std::pair<std::string_view, GgufValue>> metadata;
  std::map<std::string_view, std::size_t> entries;  // The place of each key in `metadata`.
  std::map<std::string_view, GgufTensor> tensors;
};

inline constexpr std::size_t kGgufAlignment = 32;  // Unless the file says otherwise.
inline constexpr std::string_view kGgufAlignmentKey = "general.alignment";
inline constexpr std::size_t kGgufMostKey = 65535;
inline constexpr std::size_t kGgufMostName = 64;
inline constexpr std::uint32_t kGgufMostDimensions = 4;

/// Whether `text` is a word of printable ASCII, neither empty nor longer than `most`.
inline bool is_gguf_name(std::string_view text, std::size_t most) {
  return !text.empty() && text.size() <= most &&
         std::all_of(text.begin(), text.end(), [](char c) { return c > ' ' && c <= '~'; });
}

/// One pass over the bytes of a file.
class GgufParser {
 public:
  GgufParser(std::string_view path, std::span<const std::byte> bytes)
      : path_(path), bytes_(bytes) {}

  /// \throws FileError  as `Gguf::read`.
  GgufContents parsed() {
    static_assert(std::endian::native == std::endian::little, "files are little-endian");
    read_start();
    for (std::uint64_t i = 0; i < entry_count_; ++i) read_entry(i);
    read_alignment();
    for (std::uint64_t i = 0; i < tensor_count_; ++i) read_tensor(i);
    find_data();
    return std::move(contents_);
  }

 private:
  /// A tensor whose bytes have not been found yet.
  struct Placed {
    std::string_view name;
    GgufTensor* tensor;
    std::uint64_t offset;
    std::uint64_t bytes;
  };

  template <class... Parts>
  [[noreturn]] void reject(const Parts&... parts) const {
    throw_error<FileError>(path_, ": ", parts...);
  }

  std::size_t rest() const { return bytes_.size() - at_; }

  /// The next `count` bytes, which belong to `what`.
  std::span<const std::byte> take(std::uint64_t count, std::string_view what) {
    if (count > rest()) {
      reject("ends within ", what, ", which needs ", count, " bytes at position ", at_,
             " where only ", rest(), " follow");
    }
    const auto taken = bytes_.subspan(at_, static_cast<std::size_t>(count));
    at_ += taken.size();
    return taken;
  }

  template <class T>
  T take(std::string_view what) {
    return little_endian<T>(take(sizeof(T), what).data());
  }

  std::string_view take_string(std::string_view what) {
    const auto text = take(take<std::uint64_t>(what), what);
    return {reinterpret_cast<const char*>(text.data()), text.size()};
  }

  void read_start();
  void read_entry(std::uint64_t index);
  GgufValue read_value(std::string_view key);
  void read_alignment();
  void read_tensor(std::uint64_t index);
  void find_data();

  std::string_view path_;
  std::span<const std::byte> bytes_;
  std::size_t at_ = 0;
  std::uint64_t tensor_count_ = 0;
  std::uint64_t entry_count_ = 0;
  std::size_t alignment_ = kGgufAlignment;
  std::vector<Placed> placed_;
  GgufContents contents_;
};

inline void GgufParser::read_start() {
  constexpr std::string_view kStart = "the start of the file";
  const auto magic = take(4, kStart);
  if (std::memcmp(magic.data(), "GGUF", magic.size()) != 0) reject("does not begin with 'GGUF'");
  const auto version = take<std::uint32_t>(kStart);
  if (version != 0 && (version & 0xFFFF) == 0) {
    reject("is big-endian, expected a little-endian file");
  }
  if (version != 2 && version != 3) reject("has version ", version, ", expected 2 or 3");
  tensor_count_ = take<std::uint64_t>(kStart);
  entry_count_ = take<std::uint64_t>(kStart);
  constexpr std::uint64_t kLeastEntry = 8 + 1 + 4 + 1;
  constexpr std::uint64_t kLeastTensor = 8 + 1 + 4 + 4 + 8;
  if (entry_count_ > rest() / kLeastEntry) {
    reject("claims ", entry_count_, " entries of metadata, only ", rest(), " bytes follow");
  }
  if (tensor_count_ > rest() / kLeastTensor) {
    reject("claims ", tensor_count_, " tensors, only ", rest(), " bytes follow");
  }
}

inline void GgufParser::read_entry(std::uint64_t index) {
  const std::string_view key = take_string("a key of the metadata");
  if (!is_gguf_name(key, kGgufMostKey)) {
    reject("key ", index, " is not a word of printable ASCII with up to ", kGgufMostKey, " bytes");
  }
  if (!contents_.entries.emplace(key, contents_.metadata.size()).second) {
    reject("key '", key, "' is there twice");
  }
  contents_.metadata.emplace_back(key, read_value(key));
}

inline GgufValue GgufParser::read_value(std::string_view key) {
  GgufValue value;
  auto number = take<std::uint32_t>(key);
  value.is_array = number == kGgufArray;
  std::uint64_t count = 1;
  if (value.is_array) {
    number = take<std::uint32_t>(key);
    count = take<std::uint64_t>(key);
    if (number == kGgufArray) reject("key '", key, "' is an array of arrays");
  }
  if (number >= kGgufKinds.size()) reject("key '", key, "' is of the unknown kind ", number);
  value.kind = static_cast<GgufKind>(number);
  const std::size_t width = width_of(value.kind);
  const std::size_t least = width > 0 ? width : sizeof(std::uint64_t);  // A string's length.
  if (count > rest() / least) {
    reject("key '", key, "' claims ", count, " of ", name_of(value.kind), ", only ", rest(),
           " bytes follow");
  }
  value.count = static_cast<std::size_t>(count);
  const std::size_t begin = at_;
  if (width > 0) {
    take(count * width, key);
  } else {
    for (std::uint64_t i = 0; i < count; ++i) take_string(key);
  }
  value.bytes = bytes_.subspan(begin, at_ - begin);
  if (value.kind == GgufKind::kBool) {
    for (const std::byte byte : value.bytes) {
      if (byte > std::byte{1}) {
        reject("key '", key, "' has the truth value ", std::to_integer<int>(byte),
               ", expected 0 or 1");
      }
    }
  }
  return value;
}

inline void GgufParser::read_alignment() {
  const auto found = contents_.entries.find(kGgufAlignmentKey);
  if (found == contents_.entries.end()) return;
  const GgufValue& value = contents_.metadata[found->second].second;
  if (value.is_array || value.kind != GgufKind::kU32) {
    reject("key '", kGgufAlignmentKey, "' is ", value.is_array ? "an array of " : "",
           name_of(value.kind), ", expected U32");
  }
  const auto alignment = little_endian<std::uint32_t>(value.bytes.data());
  if (!std::has_single_bit(alignment)) {
    reject("key '", kGgufAlignmentKey, "' is ", alignment, ", expected a power of 2");
  }
  alignment_ = alignment;
}

inline void GgufParser::read_tensor(std::uint64_t index) {
  const std::string_view name = take_string("a tensor's name");
  if (!is_gguf_name(name, kGgufMostName)) {
    reject("the name of tensor ", index, " is not a word of printable ASCII with up to ",
           kGgufMostName, " bytes");
  }
  const auto bad = [&](const auto&... parts) { reject("tensor '", name, "': ", parts...); };
  GgufTensor tensor;
  const auto dimensions = take<std::uint32_t>(name);
  if (dimensions > kGgufMostDimensions) {
    bad("has ", dimensions, " dimensions, expected at most ", kGgufMostDimensions);
  }
  constexpr auto kMost = static_cast<std::uint64_t>(std::numeric_limits<Index>::max());
  std::uint64_t capacity = 1;  // Numbers if no length was 0, so that no part overflows either.
  bool fits = true;
  for (std::uint32_t i = 0; i < dimensions; ++i) {
    const auto length = take<std::uint64_t>(name);
    if (length > kMost) bad("has a length of ", length, ", expected at most ", kMost);
    tensor.shape.insert(tensor.shape.begin(), static_cast<Index>(length));
    fits = fits && (length == 0 || capacity <= kMost / length);
    if (fits && length > 0) capacity *= length;
  }
  if (!fits) bad("shape ", shape_text(tensor.shape), " is too large");
  const auto number = take<std::uint32_t>(name);
  const auto type = gguf_type_numbered(number);
  if (!type) bad("its kind ", gguf_type_text(number), " is not supported");
  tensor.type = *type;
  const auto block = static_cast<std::uint64_t>(block_length(*type));
  const auto row = dimensions == 0 ? 1 : static_cast<std::uint64_t>(tensor.shape.back());
  if (row % block != 0) {
    bad("has rows of ", row, " numbers, expected a multiple of ", block, " for ", name_of(*type));
  }
  if (capacity / block > kMost / block_bytes(*type)) {
    bad("shape ", shape_text(tensor.shape), " is too large");
  }
  const auto offset = take<std::uint64_t>(name);
  if (offset % alignment_ != 0) {
    bad("begins at ", offset, " of the data, expected a multiple of ", alignment_);
  }
  const std::uint64_t blocks = static_cast<std::uint64_t>(tensor.size()) / block;
  const auto [entry, is_new] = contents_.tensors.emplace(name, std::move(tensor));
  if (!is_new) bad("is there twice");
  placed_.push_back({name, &entry->second, offset, blocks * block_bytes(*type)});
}

/// Each byte of the data has to belong to one tensor or to the padding behind it.
inline void GgufParser::find_data() {
  const std::size_t padding = (alignment_ - at_ % alignment_) % alignment_;
  const auto data = bytes_.subspan(at_ + std::min(padding, rest()));
  std::sort(placed_.begin(), placed_.end(), [](const Placed& a, const Placed& b) {
    return std::pair(a.offset, a.bytes) < std::pair(b.offset, b.bytes);
  });
  std::uint64_t end = 0;  // Of the tensor before, with its padding.
  for (const Placed& placed : placed_) {
    if (placed.offset > data.size() || placed.bytes > data.size() - placed.offset) {
      reject("tensor '", placed.name, "': its ", placed.bytes, " bytes at ", placed.offset,
             " do not lie within the ", data.size(), " bytes of data");
    }
    if (placed.offset < end) reject("tensor '", placed.name, "' overlaps another one");
    if (placed.offset > end) reject("a gap lies before the data of tensor '", placed.name, "'");
    placed.tensor->bytes = data.subspan(static_cast<std::size_t>(placed.offset),
                                        static_cast<std::size_t>(placed.bytes));
    end = placed.offset + (placed.bytes + alignment_ - 1) / alignment_ * alignment_;
  }
  if (data.size() > end) reject("has ", data.size() - end, " bytes behind its last tensor");
}

}  // namespace weir::io::detail
