// SPDX-License-Identifier: MIT
/// \file
/// A folder of safetensors files as Hugging Face publishes models: one file, or several with an
/// index.
#pragma once

#include <algorithm>
#include <cstddef>
#include <filesystem>
#include <map>
#include <memory>
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
#include <weir/io/json_object.hpp>
#include <weir/io/mapped_file.hpp>
#include <weir/io/mxfp4_tensor.hpp>
#include <weir/io/safetensors.hpp>
#include <weir/io/tensor_source.hpp>

namespace weir::io {

namespace detail {

/// A tensor of a safetensors file as it is.
class PlainTensor final : public StoredTensor {
 public:
  explicit PlainTensor(const Tensor& tensor) : tensor_(tensor) {}

  const std::vector<Index>& shape() const override { return tensor_.shape; }
  void read(Index begin, Index count, float* to) const override { convert_from(begin, count, to); }
  void read(Index begin, Index count, double* to) const override { convert_from(begin, count, to); }
  void release(Index begin, Index count) const override { release_pages(bytes(begin, count)); }
  void prefetch(Index begin, Index count) const override { prefetch_pages(bytes(begin, count)); }

 private:
  std::span<const std::byte> bytes(Index begin, Index count) const {
    const auto width = static_cast<Index>(width_of(tensor_.dtype));
    return tensor_.bytes.subspan(static_cast<std::size_t>(begin * width),
                                 static_cast<std::size_t>(count * width));
  }

  template <class T>
  void convert_from(Index begin, Index count, T* to) const {
    const std::size_t at = static_cast<std::size_t>(begin) * width_of(tensor_.dtype);
    convert(tensor_.dtype, tensor_.bytes.data() + at, count, to);
  }

  const Tensor& tensor_;
};

/// A matrix in 8 bits beside a tensor of factors, one for each block of 128 x 128 numbers, as
/// DeepSeek-V3 publishes it (`weight_scale_inv`; arXiv:2412.19437, section 3.3.2):
///
///     w[i, j] = q[i, j] * scale[i / 128, j / 128]
class ScaledTensor final : public StoredTensor {
 public:
  static constexpr Index kBlock = 128;

  /// \throws FileError  unless the factors fit.
  ScaledTensor(const std::string& path, const std::string& name, const Tensor& tensor,
               const Tensor& scales)
      : plain_(tensor) {
    const auto blocks = [](Index length) { return (length + kBlock - 1) / kBlock; };
    const std::vector<Index>& shape = tensor.shape;
    if (shape.size() != 2 || !is_real(scales.dtype) ||
        scales.shape != std::vector<Index>{blocks(shape[0]), blocks(shape[1])}) {
      throw_error<FileError>(path, ": tensor '", name, "' is ", shape_text(shape),
                             ", which its factors ", shape_text(scales.shape), " do not fit");
    }
    scales_.resize(static_cast<std::size_t>(scales.size()));
    convert(scales.dtype, scales.bytes.data(), scales.size(), scales_.data());
  }

  const std::vector<Index>& shape() const override { return plain_.shape(); }
  void read(Index begin, Index count, float* to) const override { scaled(begin, count, to); }
  void read(Index begin, Index count, double* to) const override { scaled(begin, count, to); }
  void release(Index begin, Index count) const override { plain_.release(begin, count); }
  void prefetch(Index begin, Index count) const override { plain_.prefetch(begin, count); }

 private:
  template <class T>
  void scaled(Index begin, Index count, T* to) const {
    plain_.read(begin, count, to);
    const Index cols = shape()[1];
    const Index blocks = (cols + kBlock - 1) / kBlock;
    for (Index done = 0; done < count;) {
      const Index row = (begin + done) / cols;
      const Index col = (begin + done) % cols;
      const Index length = std::min({kBlock - col % kBlock, cols - col, count - done});
      const Index block = row / kBlock * blocks + col / kBlock;
      const auto scale = static_cast<T>(scales_[static_cast<std::size_t>(block)]);
      for (Index i = 0; i < length; ++i) to[done + i] *= scale;
      done += length;
    }
  }

  PlainTensor plain_;
  std::vector<float> scales_;
};

/// Makes sure that a file which a folder names lies in that folder, or where the cache of Hugging
/// Face's hub keeps what `snapshots/<revision>` of a model links to.
/// \throws FileError  if it does not.
inline void expect_inside(const std::filesystem::path& folder, const std::string& name,
                          const std::string& named_by) {
  if (name.empty() || name == "." || name == ".." || name.find('/') != std::string::npos ||
      name.find('\0') != std::string::npos) {
    throw_error<FileError>(named_by, ": names the file ", nlohmann::json(name).dump(),
                           ", expected a plain name");
  }
  std::error_code error;
  const auto real = std::filesystem::canonical(folder / name, error);
  if (error) throw_error<FileError>((folder / name).string(), ": there is no such file");
  const auto home = std::filesystem::canonical(folder, error);
  const auto blobs = home.parent_path().parent_path() / "blobs";
  const bool in_hub = home.parent_path().filename() == "snapshots" && real.parent_path() == blobs;
  if (real.parent_path() != home && !in_hub) {
    throw_error<FileError>((folder / name).string(), ": is a link to '", real.string(),
                           "', expected a file of the folder");
  }
}

}  // namespace detail

/// The tensors of `model.safetensors`, or of the files that `model.safetensors.index.json` names.
/// A tensor "x" in 8 bits with a tensor "x_scale_inv" beside it is read as their product, and
/// "x_blocks" with "x_scales" beside it as the numbers of both, see Mxfp4Tensor.
class CheckpointFolder final : public TensorSource {
 public:
  /// \throws FileError  if there is neither, or a file is broken; if the index names a file outside
  ///                    of the folder, or a tensor is not where the index says.
  explicit CheckpointFolder(const std::filesystem::path& folder);

  const std::string& path() const override { return path_; }

  std::vector<std::string> names() const override {
    std::vector<std::string> all;
    for (const auto& [name, tensor] : tensors_) all.push_back(name);
    return all;
  }

  const StoredTensor* find(const std::string& name) const override {
    const auto found = tensors_.find(name);
    return found == tensors_.end() ? nullptr : found->second.get();
  }

  /// The texts in the headers of the files.
  const std::map<std::string, std::string>& metadata() const { return metadata_; }

 private:
  static constexpr std::size_t kMostIndex = std::size_t{256} << 20U;

  /// The files of the index, each of which holds the tensors that the index says.
  void read_index(const std::filesystem::path& folder, const std::string& index);

  void add_file(const std::filesystem::path& file) {
    files_.push_back(std::make_unique<Safetensors>(Safetensors::read(file.string())));
    metadata_.insert(files_.back()->metadata().begin(), files_.back()->metadata().end());
  }

  void add_tensors();

  std::string path_;
  std::vector<std::unique_ptr<Safetensors>> files_;
  std::map<std::string, std::unique_ptr<StoredTensor>> tensors_;
  std::map<std::string, std::string> metadata_;
};

inline CheckpointFolder::CheckpointFolder(const std::filesystem::path& folder)
    : path_(folder.string()) {
  const std::string one = "model.safetensors";
  const std::string index = one + ".index.json";
  std::error_code error;
  if (std::filesystem::exists(folder / one, error)) {
    detail::expect_inside(folder, one, path_);
    add_file(folder / one);
  } else if (std::filesystem::exists(folder / index, error)) {
    detail::expect_inside(folder, index, path_);
    read_index(folder, index);
  } else {
    throw_error<FileError>(path_, ": has neither ", one, " nor ", index);
  }
  add_tensors();
}

inline void CheckpointFolder::read_index(const std::filesystem::path& folder,
                                         const std::string& index) {
  const JsonObject json = JsonObject::read((folder / index).string(), kMostIndex);
  const JsonObject weights = json.object("weight_map");
  std::map<std::string, std::set<std::string>> tensors_of;
  for (const auto& [tensor, value] : weights.json().items()) {
    tensors_of[weights.text(tensor)].insert(tensor);
  }
  for (const auto& [file, named] : tensors_of) {
    detail::expect_inside(folder, file, json.path());
    add_file(folder / file);
    for (const std::string& tensor : named) {
      if (!files_.back()->has(tensor)) {
        throw_error<FileError>(json.path(), ": says that '", tensor, "' is in ", file,
                               ", where it is not");
      }
    }
    for (const auto& [tensor, unused] : files_.back()->tensors()) {
      if (!named.contains(tensor)) {
        throw_error<FileError>(files_.back()->path(), ": has '", tensor,
                               "', which is not so in the index");
      }
    }
  }
}

inline void CheckpointFolder::add_tensors() {
  std::map<std::string, std::pair<const Safetensors*, const Tensor*>> all;
  for (const auto& file : files_) {
    for (const auto& [name, tensor] : file->tensors()) all[name] = {file.get(), &tensor};
  }
  // The tensor whose name is `name` with another ending; none unless it has the first of the two.
  const auto beside = [&](const std::string& name, std::string_view ending,
                          std::string_view other) -> const Tensor* {
    if (!name.ends_with(ending)) return nullptr;
    const auto found = all.find(name.substr(0, name.size() - ending.size()) + std::string(other));
    return found == all.end() ? nullptr : found->second.second;
  };
  for (const auto& [name, found] : all) {
    const auto& [file, tensor] = found;
    const Tensor* const factors = beside(name, "", "_scale_inv");
    const Tensor* const exponents = beside(name, "_blocks", "_scales");
    if (factors != nullptr && width_of(tensor->dtype) == 1) {
      tensors_[name] =
          std::make_unique<detail::ScaledTensor>(file->path(), name, *tensor, *factors);
    } else if (exponents != nullptr) {
      tensors_[name] =
          std::make_unique<detail::Mxfp4Tensor>(file->path(), name, *tensor, *exponents);
    } else if (beside(name, "_scale_inv", "") == nullptr &&
               beside(name, "_scales", "_blocks") == nullptr) {
      tensors_[name] = std::make_unique<detail::PlainTensor>(*tensor);
    }
  }
}

}  // namespace weir::io
