// SPDX-License-Identifier: MIT
/// \file
/// Reads a safetensors file that may be broken or made with ill intent: a message, or the numbers,
/// never anything else.
///
///     8 bytes   N, little-endian
///     N bytes   JSON: {"name": {"dtype": "F64", "shape": [2, 3], "data_offsets": [0, 48]}, ...,
///                      "__metadata__": {"key": "text", ...}}
///     the rest  the data, little-endian, row-major, tensor after tensor without gaps
///
/// (https://github.com/huggingface/safetensors, section "Format".)
#pragma once

#include <algorithm>
#include <bit>
#include <cstdint>
#include <cstring>
#include <filesystem>
#include <fstream>
#include <limits>
#include <map>
#include <nlohmann/json.hpp>
#include <set>
#include <stdexcept>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include <weir/core/error.hpp>
#include <weir/core/types.hpp>

namespace weir::golden {

/// A file is not what its format, or its case, wants it to be.
class FileError : public std::runtime_error {
  using std::runtime_error::runtime_error;
};

/// "[2, 3]"; "[]" for a scalar.
inline std::string shape_text(const std::vector<Index>& shape) {
  std::string text = "[";
  for (const Index length : shape) text += (text.size() > 1 ? ", " : "") + std::to_string(length);
  return text + "]";
}

/// One tensor of a file.
struct Tensor {
  std::string dtype;
  std::vector<Index> shape;  ///< Empty for a scalar.
  std::size_t begin = 0;     ///< Of its bytes in the file.
  std::size_t end = 0;

  /// The number of elements; the reader has made sure that it fits.
  Index size() const {
    Index count = 1;
    for (const Index length : shape) count *= length;
    return count;
  }
};

class Safetensors {
 public:
  /// \throws FileError    naming the file, and the tensor if it is about one.
  static Safetensors read(const std::string& path) {
    std::error_code error;
    if (!std::filesystem::is_regular_file(path, error)) {
      throw_error<FileError>(path, std::filesystem::exists(path, error)
                                       ? ": is not a regular file"
                                       : ": there is no such file");
    }
    std::ifstream stream(path, std::ios::binary | std::ios::ate);
    if (!stream) throw_error<FileError>(path, ": cannot be opened");
    std::string bytes(static_cast<std::size_t>(stream.tellg()), '\0');
    stream.seekg(0);
    stream.read(bytes.data(), static_cast<std::streamsize>(bytes.size()));
    if (!stream) throw_error<FileError>(path, ": cannot be read to its end");
    return {path, std::move(bytes)};
  }

  /// \param path     For messages.
  /// \param bytes    The content of the file.
  /// \throws FileError    as `read` does.
  Safetensors(std::string path, std::string bytes)
      : path_(std::move(path)), bytes_(std::move(bytes)) {
    static_assert(std::endian::native == std::endian::little, "the data are used as they stand");
    std::uint64_t length = 0;
    if (bytes_.size() < sizeof length) {
      reject("has ", bytes_.size(), " bytes, expected at least ", sizeof length);
    }
    std::memcpy(&length, bytes_.data(), sizeof length);
    const std::size_t rest = bytes_.size() - sizeof length;
    if (length > rest) {
      reject("the header claims ", length, " bytes, only ", rest, " follow in the file");
    }
    data_ = sizeof length + static_cast<std::size_t>(length);
    const nlohmann::json header = parse({bytes_.data() + sizeof length, data_ - sizeof length});
    for (const auto& [name, entry] : header.items()) {
      if (name == "__metadata__") {
        add_metadata(entry);
      } else {
        add_tensor(name, entry);
      }
    }
    check_layout();
  }

  const std::string& path() const { return path_; }
  const std::map<std::string, std::string>& metadata() const { return metadata_; }
  const std::map<std::string, Tensor>& tensors() const { return tensors_; }
  bool has(const std::string& name) const { return tensors_.count(name) > 0; }

  /// \throws FileError    if there is no tensor of that name.
  const Tensor& tensor(const std::string& name) const {
    const auto found = tensors_.find(name);
    if (found == tensors_.end()) reject("tensor '", name, "' is missing");
    return found->second;
  }

  /// The elements of a floating-point tensor.
  /// \throws FileError    if it is missing or of another kind.
  std::vector<double> reals(const std::string& name) const {
    const Tensor& t = tensor(name);
    if (t.dtype == "F64") return elements<double, double>(t);
    if (t.dtype == "F32") return elements<float, double>(t);
    reject("tensor '", name, "' is ", t.dtype, ", expected F64 or F32");
  }

  /// The elements of an integer or Boolean tensor.
  /// \throws FileError    if it is missing or of another kind.
  std::vector<std::int64_t> integers(const std::string& name) const {
    const Tensor& t = tensor(name);
    if (t.dtype == "I64") return elements<std::int64_t, std::int64_t>(t);
    if (t.dtype == "I32") return elements<std::int32_t, std::int64_t>(t);
    if (t.dtype == "I16") return elements<std::int16_t, std::int64_t>(t);
    if (t.dtype == "I8") return elements<std::int8_t, std::int64_t>(t);
    if (t.dtype == "U8" || t.dtype == "BOOL") return elements<std::uint8_t, std::int64_t>(t);
    reject("tensor '", name, "' is ", t.dtype, ", expected I64, I32, I16, I8, U8 or BOOL");
  }

 private:
  using Json = nlohmann::json;

  template <class... Parts>
  [[noreturn]] void reject(const Parts&... parts) const {
    throw_error<FileError>(path_, ": ", parts...);
  }

  /// The header as an object without any name twice.
  Json parse(std::string_view text) const {
    std::set<std::string> names;
    const auto note_names = [&](int depth, Json::parse_event_t event, const Json& key) {
      if (event != Json::parse_event_t::key || depth != 1) return true;
      if (!names.insert(key.get<std::string>()).second) {
        reject("tensor '", key.get<std::string>(), "' is there twice");
      }
      return true;
    };
    Json header;
    try {
      header = Json::parse(text.begin(), text.end(), note_names);
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
    tensor.dtype = dtype.get<std::string>();
    const std::size_t width = width_of(tensor.dtype);
    if (width == 0) bad("dtype ", tensor.dtype, " is not supported");
    std::size_t bytes = width;
    for (const Json& length : shape) {
      const auto n = length.get<std::size_t>();
      if (n > 0 && bytes > kMost / n) bad("shape ", shape.dump(), " is too large");
      bytes *= n;
      tensor.shape.push_back(static_cast<Index>(n));
    }
    const auto begin = offsets[0].get<std::size_t>();
    const auto end = offsets[1].get<std::size_t>();
    const std::size_t available = bytes_.size() - data_;
    if (begin > end || end > available) {
      bad("data_offsets ", offsets.dump(), " do not lie within the ", available, " bytes of data");
    }
    if (end - begin != bytes) {
      bad("data_offsets ", offsets.dump(), " hold ", end - begin, " bytes, expected ", bytes,
          " for ", tensor.dtype, " ", shape.dump());
    }
    tensor.begin = data_ + begin;
    tensor.end = data_ + end;
    tensors_.emplace(name, std::move(tensor));
  }

  /// Each byte of the data has to belong to one tensor.
  void check_layout() const {
    std::vector<std::pair<const std::string*, const Tensor*>> order;
    for (const auto& [name, tensor] : tensors_) order.emplace_back(&name, &tensor);
    std::sort(order.begin(), order.end(), [](const auto& a, const auto& b) {
      return std::pair(a.second->begin, a.second->end) < std::pair(b.second->begin, b.second->end);
    });
    std::size_t end = data_;
    for (const auto& [name, tensor] : order) {
      if (tensor->begin < end) reject("tensor '", *name, "' overlaps another one");
      if (tensor->begin > end) reject("a gap lies before the data of tensor '", *name, "'");
      end = tensor->end;
    }
    if (end != bytes_.size()) {
      reject("has ", bytes_.size() - end, " bytes behind its last tensor");
    }
  }

  static bool is_list_of_lengths(const Json& list) {
    return list.is_array() && std::all_of(list.begin(), list.end(), [](const Json& length) {
             return length.is_number_unsigned() && length.get<std::uint64_t>() <= kMost;
           });
  }

  /// Bytes of one element; 0 for a type that is not supported.
  static std::size_t width_of(std::string_view dtype) {
    constexpr std::pair<std::string_view, std::size_t> kWidths[] = {
        {"F64", 8}, {"F32", 4}, {"I64", 8}, {"I32", 4},
        {"I16", 2}, {"I8", 1},  {"U8", 1},  {"BOOL", 1}};
    for (const auto& [name, width] : kWidths) {
      if (name == dtype) return width;
    }
    return 0;
  }

  template <class Stored, class Wanted>
  std::vector<Wanted> elements(const Tensor& tensor) const {
    std::vector<Wanted> result(static_cast<std::size_t>(tensor.size()));
    const char* from = bytes_.data() + tensor.begin;
    for (Wanted& element : result) {
      Stored stored;
      std::memcpy(&stored, from, sizeof stored);
      element = static_cast<Wanted>(stored);
      from += sizeof stored;
    }
    return result;
  }

  static constexpr auto kMost = static_cast<std::size_t>(std::numeric_limits<Index>::max());

  std::string path_;
  std::string bytes_;
  std::size_t data_ = 0;  // Where the data begin.
  std::map<std::string, std::string> metadata_;
  std::map<std::string, Tensor> tensors_;
};

}  // namespace weir::golden
