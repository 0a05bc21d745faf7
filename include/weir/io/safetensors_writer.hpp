// SPDX-License-Identifier: MIT
/// \file
/// Writes safetensors files.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <filesystem>
#include <map>
#include <nlohmann/json.hpp>
#include <set>
#include <span>
#include <string>
#include <vector>

#include <weir/core/error.hpp>
#include <weir/core/types.hpp>
#include <weir/io/atomic_file.hpp>
#include <weir/io/dtype.hpp>
#include <weir/io/file_error.hpp>

namespace weir::io {

/// A matrix to be written under a name.
template <class T>
struct NamedMatrix {
  std::string name;
  const Matrix<T>* matrix;
};

/// Writes `matrices` into one file, in their order, each as a tensor [rows, cols] of the kind
/// `dtype`. The file gets its name once it is whole and on the disk; the memory needed beside the
/// header does not depend on the sizes.
/// \param metadata  Texts for the header.
/// \throws ConfigError  if a name is there twice, is empty, has a NUL in it or is "__metadata__";
///                      if a name or the metadata is not UTF-8; or unless `is_storable(dtype)`.
/// \throws FileError    if the file cannot be written.
template <class T>
void write_safetensors(const std::filesystem::path& path,
                       const std::vector<NamedMatrix<T>>& matrices, Dtype dtype = dtype_of<T>(),
                       const std::map<std::string, std::string>& metadata = {}) {
  if (!is_storable(dtype)) {
    throw_error<ConfigError>("write_safetensors: dtype = ", name_of(dtype),
                             ", expected F64, F32, F16 or BF16");
  }
  nlohmann::json header = nlohmann::json::object();
  if (!metadata.empty()) header["__metadata__"] = metadata;
  std::size_t end = 0;
  for (const auto& [name, matrix] : matrices) {
    if (name.empty() || name == "__metadata__" || name.find('\0') != std::string::npos ||
        header.contains(name)) {
      throw_error<ConfigError>("write_safetensors: a tensor is named '", name,
                               "', expected different names other than '__metadata__'");
    }
    const std::size_t begin = end;
    end += static_cast<std::size_t>(matrix->size()) * width_of(dtype);
    header[name] = {{"dtype", name_of(dtype)},
                    {"shape", {matrix->rows(), matrix->cols()}},
                    {"data_offsets", {begin, end}}};
  }
  std::string text;
  try {
    text = header.dump();
  } catch (const nlohmann::json::exception& error) {
    throw_error<ConfigError>("write_safetensors: a name or the metadata is not UTF-8: ",
                             error.what());
  }
  text.append((8 - text.size() % 8) % 8, ' ');  // So that the data are aligned.

  AtomicFile file(path);
  const std::uint64_t length = text.size();
  file.write(std::as_bytes(std::span(&length, 1)));
  file.write(text);
  constexpr Index kNumbers = 65536;
  std::vector<std::byte> block(kNumbers * width_of(dtype));
  for (const auto& [name, matrix] : matrices) {
    for (Index begin = 0; begin < matrix->size(); begin += kNumbers) {
      const Index count = std::min(kNumbers, matrix->size() - begin);
      store(dtype, matrix->data() + begin, count, block.data());
      file.write(std::span(block).first(static_cast<std::size_t>(count) * width_of(dtype)));
    }
  }
  file.commit();
}

}  // namespace weir::io
