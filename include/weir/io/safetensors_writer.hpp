// SPDX-License-Identifier: MIT
/// \file
/// Writes safetensors files.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <filesystem>
#include <map>
#include <nlohmann/json.hpp>
#include <optional>
#include <span>
#include <string>
#include <vector>

#include <weir/core/error.hpp>
#include <weir/core/types.hpp>
#include <weir/io/atomic_file.hpp>
#include <weir/io/dtype.hpp>
#include <weir/io/file_error.hpp>

namespace weir::io {

/// A tensor that is going to be written.
struct TensorShape {
  std::string name;
  std::vector<Index> shape;
  std::optional<Dtype> dtype = {};  ///< Its kind of numbers, unless it is that of the file.
};

/// Writes a safetensors file from front to back. The memory needed beside the header does not
/// depend on the sizes.
class SafetensorsWriter {
 public:
  /// Begins the file; `commit` gives it its name.
  /// \param tensors   In the order of their numbers.
  /// \param dtype     The kind of numbers of tensors without one of their own.
  /// \param metadata  Texts for the header.
  /// \throws ConfigError  if a name is there twice, is empty, has a NUL in it or is
  ///                      "__metadata__"; if a name or the metadata is not UTF-8; or unless
  ///                      `is_storable(dtype)`.
  /// \throws FileError    if the file cannot be written.
  SafetensorsWriter(const std::filesystem::path& path, const std::vector<TensorShape>& tensors,
                    Dtype dtype, const std::map<std::string, std::string>& metadata = {})
      : header_(header(tensors, dtype, metadata)), dtype_(dtype), file_(path) {
    const std::uint64_t length = header_.size();
    file_.write(std::as_bytes(std::span(&length, 1)));
    file_.write(header_);
  }

  /// Appends the next numbers, which are rounded to the kind of the file.
  /// \tparam T         float or double.
  /// \throws FileError  if they do not fit on the disk.
  template <class T>
  void append(const T* numbers, Index count) {
    constexpr Index kNumbers = 65536;
    block_.resize(kNumbers * width_of(dtype_));
    for (Index begin = 0; begin < count; begin += kNumbers) {
      const Index some = std::min(kNumbers, count - begin);
      store(dtype_, numbers + begin, some, block_.data());
      file_.write(std::span(block_).first(static_cast<std::size_t>(some) * width_of(dtype_)));
    }
  }

  /// Appends the next numbers, which have the kind of their tensor.
  /// \throws FileError  if they do not fit on the disk.
  void append_bytes(std::span<const std::byte> bytes) { file_.write(bytes); }

  /// Gives the file its name, once all numbers have been appended.
  /// \throws FileError  if the bytes cannot be brought to the disk.
  void commit() { file_.commit(); }

 private:
  static std::string header(const std::vector<TensorShape>& tensors, Dtype dtype,
                            const std::map<std::string, std::string>& metadata);

  std::string header_;
  Dtype dtype_;
  AtomicFile file_;
  std::vector<std::byte> block_;
};

inline std::string SafetensorsWriter::header(const std::vector<TensorShape>& tensors, Dtype dtype,
                                             const std::map<std::string, std::string>& metadata) {
  constexpr auto kWho = "write_safetensors";
  if (!is_storable(dtype)) {
    throw_error<ConfigError>(kWho, ": dtype = ", name_of(dtype),
                             ", expected F64, F32, F16 or BF16");
  }
  nlohmann::json json = nlohmann::json::object();
  if (!metadata.empty()) json["__metadata__"] = metadata;
  std::size_t end = 0;
  for (const auto& [name, shape, own_dtype] : tensors) {
    const Dtype of_tensor = own_dtype.value_or(dtype);
    if (name.empty() || name == "__metadata__" || name.find('\0') != std::string::npos ||
        json.contains(name)) {
      throw_error<ConfigError>(kWho, ": a tensor is named '", name,
                               "', expected different names other than '__metadata__'");
    }
    const std::size_t begin = end;
    std::size_t bytes = width_of(of_tensor);
    for (const Index length : shape) bytes *= static_cast<std::size_t>(length);
    end += bytes;
    json[name] = {{"dtype", name_of(of_tensor)}, {"shape", shape}, {"data_offsets", {begin, end}}};
  }
  std::string text;
  try {
    text = json.dump();
  } catch (const nlohmann::json::exception& error) {
    throw_error<ConfigError>(kWho, ": a name or the metadata is not UTF-8: ", error.what());
  }
  text.append((8 - text.size() % 8) % 8, ' ');  // So that the data are aligned.
  return text;
}

/// A matrix to be written under a name.
template <class T>
struct NamedMatrix {
  std::string name;
  const Matrix<T>* matrix;
};

/// Writes `matrices` into one file, in their order, each as a tensor [rows, cols] of the kind
/// `dtype`. The file gets its name once it is whole and on the disk.
/// \param metadata  Texts for the header.
/// \throws ConfigError  as SafetensorsWriter.
/// \throws FileError    if the file cannot be written.
template <class T>
void write_safetensors(const std::filesystem::path& path,
                       const std::vector<NamedMatrix<T>>& matrices, Dtype dtype = dtype_of<T>(),
                       const std::map<std::string, std::string>& metadata = {}) {
  std::vector<TensorShape> tensors;
  for (const auto& [name, matrix] : matrices) {
    tensors.push_back({name, {matrix->rows(), matrix->cols()}});
  }
  SafetensorsWriter writer(path, tensors, dtype, metadata);
  for (const auto& [name, matrix] : matrices) writer.append(matrix->data(), matrix->size());
  writer.commit();
}

}  // namespace weir::io
