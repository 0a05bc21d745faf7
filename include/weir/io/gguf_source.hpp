// SPDX-License-Identifier: MIT
/// \file
/// The tensors of a GGUF file as those of a checkpoint.
#pragma once

#include <cstddef>
#include <map>
#include <memory>
#include <span>
#include <string>
#include <utility>
#include <vector>

#include <weir/core/types.hpp>
#include <weir/io/gguf.hpp>
#include <weir/io/gguf_tensor.hpp>
#include <weir/io/gguf_type.hpp>
#include <weir/io/mapped_file.hpp>
#include <weir/io/tensor_source.hpp>

namespace weir::io {

namespace detail {

/// A tensor of a GGUF file, whose blocks become numbers while they are read.
class GgufStoredTensor final : public StoredTensor {
 public:
  explicit GgufStoredTensor(const GgufTensor& tensor) : tensor_(tensor) {}

  const std::vector<Index>& shape() const override { return tensor_.shape; }
  void read(Index begin, Index count, float* to) const override {
    dequantise(tensor_, begin, count, to);
  }
  void read(Index begin, Index count, double* to) const override {
    dequantise(tensor_, begin, count, to);
  }
  void release(Index begin, Index count) const override { release_pages(bytes(begin, count)); }
  void prefetch(Index begin, Index count) const override { prefetch_pages(bytes(begin, count)); }

 private:
  /// The blocks in which these numbers are.
  std::span<const std::byte> bytes(Index begin, Index count) const {
    const Index block = block_length(tensor_.type);
    const std::size_t width = block_bytes(tensor_.type);
    const auto first = static_cast<std::size_t>(begin / block);
    const auto last = static_cast<std::size_t>((begin + count + block - 1) / block);
    return tensor_.bytes.subspan(first * width, (last - first) * width);
  }

  const GgufTensor& tensor_;
};

}  // namespace detail

/// A GGUF file whose tensors a model is read from.
class GgufTensorSource final : public TensorSource {
 public:
  /// \throws FileError  as Gguf::read.
  explicit GgufTensorSource(const std::string& path) : file_(Gguf::read(path)) {
    for (const auto& [name, tensor] : file_.tensors()) {
      tensors_[std::string(name)] = std::make_unique<detail::GgufStoredTensor>(tensor);
    }
  }

  const Gguf& file() const { return file_; }

  const std::string& path() const override { return file_.path(); }

  std::vector<std::string> names() const override {
    std::vector<std::string> all;
    for (const auto& [name, tensor] : tensors_) all.push_back(name);
    return all;
  }

  const StoredTensor* find(const std::string& name) const override {
    const auto found = tensors_.find(name);
    return found == tensors_.end() ? nullptr : found->second.get();
  }

 private:
  Gguf file_;
  std::map<std::string, std::unique_ptr<StoredTensor>> tensors_;
};

}  // namespace weir::io
