// SPDX-License-Identifier: MIT
/// \file
/// Saves and loads the weights of any layer or model: its parameters and buffers.
#pragma once

#include <algorithm>
#include <filesystem>
#include <map>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include <weir/core/error.hpp>
#include <weir/core/types.hpp>
#include <weir/core/verbs.hpp>
#include <weir/io/dtype.hpp>
#include <weir/io/file_error.hpp>
#include <weir/io/safetensors.hpp>
#include <weir/io/safetensors_writer.hpp>
#include <weir/io/tensor_source.hpp>

namespace weir::io {

/// The parameters and buffers of `model` under their names, in its order.
/// \throws StateError   if a part of the model stores its weights for inference: they would be
///                      missing.
/// \throws ConfigError  if two have the same name.
template <class Model>
std::vector<std::pair<std::string, Matrix<typename Model::Scalar>*>> tensors_of(
    std::string_view who, Model& model) {
  if (!is_trainable(model)) {
    throw_error<StateError>(who,
                            ": weights are stored for inference, expected "
                            "set_storage(model, Storage::kTrainable) before");
  }
  std::vector<std::pair<std::string, Matrix<typename Model::Scalar>*>> all;
  for (const auto& [name, parameter] : parameters(model)) all.emplace_back(name, &parameter->value);
  for (const auto& [name, buffer] : buffers(model)) all.emplace_back(name, &buffer->value);
  auto names = all;
  std::sort(names.begin(), names.end());
  const auto twice = std::adjacent_find(
      names.begin(), names.end(), [](const auto& a, const auto& b) { return a.first == b.first; });
  if (twice != names.end()) {
    throw_error<ConfigError>(who, ": two tensors are named ", twice->first,
                             ", expected different names");
  }
  return all;
}

namespace detail {

/// \throws FileError  unless `file` has exactly the tensors of those names and shapes, each of a
///                    floating-point kind. The message names up to five that differ.
template <class T>
void expect_same_tensors(const Safetensors& file,
                         const std::vector<std::pair<std::string, Matrix<T>*>>& wanted) {
  std::vector<std::string> faults;
  std::map<std::string_view, bool> known;
  for (const auto& [name, matrix] : wanted) {
    known[name] = true;
    const auto found = file.tensors().find(name);
    if (found == file.tensors().end()) {
      faults.push_back("'" + name + "' is missing");
      continue;
    }
    const Tensor& tensor = found->second;
    const std::vector<Index> shape = {matrix->rows(), matrix->cols()};
    const bool is_row = matrix->rows() == 1 && tensor.shape == std::vector<Index>{matrix->cols()};
    if (tensor.shape != shape && !is_row) {
      faults.push_back("'" + name + "' is " + shape_text(tensor.shape) + ", expected " +
                       shape_text(shape));
    } else if (!is_real(tensor.dtype)) {
      faults.push_back("'" + name + "' is " + std::string(name_of(tensor.dtype)) +
                       ", expected a floating-point kind");
    }
  }
  for (const auto& [name, tensor] : file.tensors()) {
    if (!known.contains(name)) faults.push_back("'" + name + "' is not in the model");
  }
  expect_no_faults(file.path(), faults);
}

template <class T>
void copy_tensors(const Safetensors& file,
                  const std::vector<std::pair<std::string, Matrix<T>*>>& into) {
  for (const auto& [name, matrix] : into) {
    const Tensor& tensor = file.tensor(name);
    convert(tensor.dtype, tensor.bytes.data(), matrix->size(), matrix->data());
  }
}

}  // namespace detail

/// Writes the parameters and buffers of `model` to the safetensors file `path`, which appears once
/// it is whole.
/// \param dtype         How numbers are stored; by default exactly.
/// \throws StateError   if weights are stored for inference.
/// \throws ConfigError  if two tensors have the same name, or unless `is_storable(dtype)`.
/// \throws FileError    if the file cannot be written.
template <class Model>
void save_weights(const std::filesystem::path& path, Model& model,
                  Dtype dtype = dtype_of<typename Model::Scalar>()) {
  using T = typename Model::Scalar;
  std::vector<NamedMatrix<T>> matrices;
  for (const auto& [name, matrix] : tensors_of("save_weights", model)) {
    matrices.push_back({name, matrix});
  }
  write_safetensors<T>(path, matrices, dtype, {{"format", "weir"}});
}

/// Writes matrices under their names to a safetensors file, which appears once it is whole: the
/// weights of one expert, for instance, see ExpertSurgery.
/// \throws ConfigError  if two have the same name.
/// \throws FileError    if the file cannot be written.
template <class T>
void save_matrices(const std::filesystem::path& path,
                   const std::vector<std::pair<std::string, Matrix<T>>>& matrices) {
  std::vector<NamedMatrix<T>> named;
  for (const auto& [name, matrix] : matrices) named.push_back({name, &matrix});
  write_safetensors<T>(path, named, dtype_of<T>(), {{"format", "weir"}});
}

/// All tensors of a safetensors file, in the order of their names; one with a single axis is a row.
/// \throws FileError    if the file is broken, or a tensor is no matrix of real numbers.
template <class T>
std::vector<std::pair<std::string, Matrix<T>>> load_matrices(const std::filesystem::path& path) {
  const Safetensors file = Safetensors::read(path.string());
  std::vector<std::pair<std::string, Matrix<T>>> matrices;
  for (const auto& [name, tensor] : file.tensors()) {
    const bool is_row = tensor.shape.size() == 1;
    if ((!is_row && tensor.shape.size() != 2) || !is_real(tensor.dtype)) {
      throw_error<FileError>(file.path(), ": '", name, "' is ", name_of(tensor.dtype), " ",
                             shape_text(tensor.shape), ", expected a matrix of real numbers");
    }
    Matrix<T> matrix;
    set_shape(matrix, is_row ? 1 : tensor.shape[0], tensor.shape.back());
    convert(tensor.dtype, tensor.bytes.data(), matrix.size(), matrix.data());
    matrices.emplace_back(name, std::move(matrix));
  }
  return matrices;
}

/// Reads what `save_weights` wrote into a model of the same shape.
/// \throws FileError    if the file is broken, or a tensor is missing, unknown or of another shape.
///                      The model is as before then.
/// \throws StateError   if weights are stored for inference.
template <class Model>
void load_weights(const std::filesystem::path& path, Model& model) {
  const auto into = tensors_of("load_weights", model);
  const Safetensors file = Safetensors::read(path.string());
  detail::expect_same_tensors<typename Model::Scalar>(file, into);
  detail::copy_tensors<typename Model::Scalar>(file, into);
}

/// Reads the parameters and buffers of `model` from the tensors of a source, such as a
/// CheckpointFolder, under the same names. The source may have others, such as the experts of other
/// ranks.
/// \throws FileError    if a tensor is missing or of another shape. The model is as before then.
/// \throws StateError   if weights are stored for inference.
template <class Model>
void load_weights(const TensorSource& source, Model& model) {
  const auto into = tensors_of("load_weights", model);
  std::vector<std::string> faults;
  std::vector<const StoredTensor*> tensors;
  for (const auto& [name, matrix] : into) {
    const StoredTensor* const tensor = tensors.emplace_back(source.find(name));
    const std::vector<Index> shape = {matrix->rows(), matrix->cols()};
    if (tensor == nullptr) {
      faults.push_back("'" + name + "' is missing");
    } else if (tensor->shape() != shape) {
      faults.push_back("'" + name + "' is " + shape_text(tensor->shape()) + ", expected " +
                       shape_text(shape));
    }
  }
  expect_no_faults(source.path(), faults);
  for (std::size_t i = 0; i < into.size(); ++i) {
    Matrix<typename Model::Scalar>& matrix = *into[i].second;
    tensors[i]->read(0, matrix.size(), matrix.data());
  }
}

}  // namespace weir::io
