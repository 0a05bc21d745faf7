// SPDX-License-Identifier: MIT
/// \file
/// Reads safetensors files, which may be broken or made with ill intent: a message, or the numbers,
/// never anything else.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <filesystem>
#include <limits>
#include <map>
#include <nlohmann/json.hpp>
#include <set>
#include <span>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include <weir/core/error.hpp>
#include <weir/core/types.hpp>
#include <weir/io/dtype.hpp>
#include <weir/io/file_error.hpp>
#include <weir/io/mapped_file.hpp>

namespace weir::io {

/// "[2, 3]"; "[]" for a scalar.
inline std::string shape_text(const std::vector<Index>& shape) {
  std::string text = "[";
  for (const Index length : shape) text += (text.size() > 1 ? ", " : "") + std::to_string(length);
  return text + "]";
}

/// One tensor of a file.
struct Tensor {
  Dtype dtype = Dtype::kF32;
  std::vector<Index> shape;          ///< Empty for a scalar.
  std::span<const std::byte> bytes;  ///< Its numbers, row-major, in the file.

  /// How many numbers it has; the reader has made sure that this fits an Index.
  Index size() const {
    Index count = 1;
    for (const Index length : shape) count *= length;
    return count;
  }
};

/// The tensors of a file of the format
///
///     8 bytes   N, little-endian
///     N bytes   JSON: {"name": {"dtype": "F64", "shape": [2, 3], "data_offsets": [0, 48]}, ...,
///                      "__metadata__": {"key": "text", ...}}
///     the rest  the data, little-endian, row-major, tensor after tensor without gaps
///
/// (https://github.com/huggingface/safetensors, section "Format".) The file is mapped into memory,
/// and numbers are read only when they are asked for. Everything that the header says is checked
/// before it is believed, so that no file makes the reader look outside of it or allocate more than
/// a small multiple of the header's size.
class Safetensors {
 public:
  /// The longest header that is read, as in the reference implementation.
  static constexpr std::size_t kMostHeader = 100'000'000;

  /// \throws FileError  naming the file, and the tensor if it is about one.
  static Safetensors read(const std::string& path) {
    std::error_code error;
    if (!std::filesystem::exists(path, error)) {
      throw_error<FileError>(path, ": there is no such file");
    }
    if (!std::filesystem::is_regular_file(path, error)) {
      throw_error<FileError>(path, ": is not a regular file");
    }
    Safetensors file(path);
    file.mapped_ = MappedFile(path);
    file.parse(file.mapped_.bytes());
    return file;
  }

  /// \param path     For messages.
  /// \param bytes    The content of a file.
  /// \throws FileError  as `read`.
  Safetensors(std::string path, std::string bytes) : Safetensors(std::move(path)) {
    content_.assign(bytes.begin(), bytes.end());
    parse(std::as_bytes(std::span(content_)));
  }

  const std::string& path() const { return path_; }
  const std::map<std::string, std::string>& metadata() const { return metadata_; }
  const std::map<std::string, Tensor>& tensors() const { return tensors_; }
  bool has(const std::string& name) const { return tensors_.contains(name); }

  /// \throws FileError  if there is no tensor of that name.
  const Tensor& tensor(const std::string& name) const {
    const auto found = tensors_.find(name);
    if (found == tensors_.end()) reject("tensor '", name, "' is missing");
    return found->second;
  }

  /// The numbers of a floating-point tensor.
  /// \throws FileError  if it is missing or of another kind.
  std::vector<double> reals(const std::string& name) const {
    const Tensor& t = tensor(name);
    if (!is_real(t.dtype)) {
      reject("tensor '", name, "' is ", name_of(t.dtype), ", expected a floating-point kind");
    }
    return numbers<double>(t);
  }

  /// The numbers of an integer or Boolean tensor.
  /// \throws FileError  if it is missing or of another kind.
  std::vector<std::int64_t> integers(const std::string& name) const {
    const Tensor& t = tensor(name);
    if (is_real(t.dtype)) {
      reject("tensor '", name, "' is ", name_of(t.dtype),
             ", expected I64, I32, I16, I8, U8 or BOOL");
    }
    return numbers<std::int64_t>(t);
  }

 private:
  using Json = nlohmann::json;

  explicit Safetensors(std::string path) : path_(std::move(path)) {}

  template <class T>
  static std::vector<T> numbers(const Tensor& tensor) {
    std::vector<T> result(static_cast<std::size_t>(tensor.size()));
    convert(tensor.dtype, tensor.bytes.data(), tensor.size(), result.data());
    return result;
  }

  template <class... Parts>
  [[noreturn]] void reject(const Parts&... parts) const {
    throw_error<FileError>(path_, ": ", parts...);
  }

  void parse(std::span<const std::byte> bytes) {
    std::uint64_t length = 0;
    if (bytes.size() < sizeof length) {
      reject("has ", bytes.size(), " bytes, expected at least ", sizeof length);
    }
    std::memcpy(&length, bytes.data(), sizeof length);
    const std::size_t rest = bytes.size() - sizeof length;
    if (length > rest) {
      reject("the header claims ", length, " bytes, only ", rest, " follow in the file");
    }
    if (length > kMostHeader) {
      reject("the header has ", length, " bytes, expected at most ", kMostHeader);
    }
    const auto header_bytes = bytes.subspan(sizeof length, static_cast<std::size_t>(length));
    data_ = bytes.subspan(sizeof length + header_bytes.size());
    const Json header =
        parsed({reinterpret_cast<const char*>(header_bytes.data()), header_bytes.size()});
    for (const auto& [name, entry] : header.items()) {
      if (name == "__metadata__") {
        add_metadata(entry);
      } else {
        add_tensor(name, entry);
      }
    }
    check_layout();
  }

  /// The header as an object without any name twice.
  Json parsed(std::string_view text) const {
    std::set<std::string> names;
    const auto inspect = [&](int depth, Json::parse_event_t event, const Json& value) {
      const bool opens =
          event == Json::parse_event_t::object_start || event == Json::parse_event_t::array_start;
      if (opens && depth > kMostDepth) reject("the header is nested too deeply");
      if (event == Json::parse_event_t::key && depth == 1) {
        const auto& name = value.get_ref<const std::string&>();
        if (name.find('\0') != std::string::npos) reject("a tensor's name has a NUL in it");
        if (!names.insert(name).second) reject("tensor '", name, "' is there twice");
      }
      return true;
    };
    Json header;
    try {
      header = Json::parse(text.begin(), text.end(), inspect);
    } catch (const Json::exception& error) {
      reject("the header is not valid JSON: ", error.what());
    }
    if (!header.is_object()) reject("the header is not a JSON object");
    return header;
  }

  void add_metadata(const Json& entries) {
    if (!entries.is_object()) reject("__metadata__ is not a JSON object");
    for (const auto& [key, value] : entries.items()) {
      if (!value.is_string()) reject("__metadata__: '", key, "' is not a string");
      metadata_[key] = value.get<std::string>();
    }
  }

  void add_tensor(const std::string& name, const Json& entry) {
    const auto bad = [&](const auto&... parts) { reject("tensor '", name, "': ", parts...); };
    if (!entry.is_object()) bad("is not described by a JSON object");
    for (const char* key : {"dtype", "shape", "data_offsets"}) {
      if (!entry.contains(key)) bad("has no ", key);
    }
    const Json& dtype = entry.at("dtype");
    const Json& shape = entry.at("shape");
    const Json& offsets = entry.at("data_offsets");
    if (!dtype.is_string()) bad("dtype is not a string");
    if (!is_list_of_lengths(shape)) bad("shape is not a list of lengths");
    if (!is_list_of_lengths(offsets) || offsets.size() != 2) bad("data_offsets is not a pair");

    Tensor tensor;
    const auto& named = dtype.get_ref<const std::string&>();
    const auto known = dtype_named(named);
    if (!known) bad("dtype ", named, " is not supported");
    tensor.dtype = *known;
    const std::size_t width = width_of(tensor.dtype);
    std::size_t bytes = width;
    for (const Json& length : shape) {
      const auto n = length.get<std::size_t>();
      if (n > 0 && bytes > kMost / n) bad("shape ", shape.dump(), " is too large");
      bytes *= n;
      tensor.shape.push_back(static_cast<Index>(n));
    }
    const auto begin = offsets[0].get<std::size_t>();
    const auto end = offsets[1].get<std::size_t>();
    if (begin > end || end > data_.size()) {
      bad("data_offsets ", offsets.dump(), " do not lie within the ", data_.size(),
          " bytes of data");
    }
    if (end - begin != bytes) {
      bad("data_offsets ", offsets.dump(), " hold ", end - begin, " bytes, expected ", bytes,
          " for ", named, " ", shape.dump());
    }
    if (begin % width != 0 && bytes > 0) {
      bad("data_offsets ", offsets.dump(), " do not begin at a multiple of ", width, " bytes");
    }
    tensor.bytes = data_.subspan(begin, bytes);
    tensors_.emplace(name, std::move(tensor));
  }

  /// Each byte of the data has to belong to one tensor.
  void check_layout() const {
    std::vector<std::pair<const std::string*, const Tensor*>> order;
    for (const auto& [name, tensor] : tensors_) order.emplace_back(&name, &tensor);
    std::sort(order.begin(), order.end(), [](const auto& a, const auto& b) {
      return std::pair(a.second->bytes.data(), a.second->bytes.size()) <
             std::pair(b.second->bytes.data(), b.second->bytes.size());
    });
    const std::byte* end = data_.data();
    for (const auto& [name, tensor] : order) {
      const std::byte* const begin = tensor->bytes.data();
      if (begin < end) reject("tensor '", *name, "' overlaps another one");
      if (begin > end) reject("a gap lies before the data of tensor '", *name, "'");
      end = begin + tensor->bytes.size();
    }
    const auto behind = data_.data() + data_.size() - end;
    if (behind != 0) reject("has ", behind, " bytes behind its last tensor");
  }

  static bool is_list_of_lengths(const Json& list) {
    return list.is_array() && std::all_of(list.begin(), list.end(), [](const Json& length) {
             return length.is_number_unsigned() && length.get<std::uint64_t>() <= kMost;
           });
  }

  static constexpr auto kMost = static_cast<std::size_t>(std::numeric_limits<Index>::max());
  static constexpr int kMostDepth = 3;

  std::string path_;
  MappedFile mapped_;
  std::vector<char> content_;  // Where the bytes did not come from a file.
  std::span<const std::byte> data_;
  std::map<std::string, std::string> metadata_;
  std::map<std::string, Tensor> tensors_;
};

}  // namespace weir::io
