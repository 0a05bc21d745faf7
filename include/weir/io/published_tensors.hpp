// SPDX-License-Identifier: MIT
/// \file
/// Reads and writes the matrices of a model under published names.
#pragma once

#include <algorithm>
#include <cstddef>
#include <filesystem>
#include <map>
#include <memory>
#include <nlohmann/json.hpp>
#include <optional>
#include <span>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include <weir/core/error.hpp>
#include <weir/core/name_pattern.hpp>
#include <weir/core/parallel.hpp>
#include <weir/core/parameter.hpp>
#include <weir/core/types.hpp>
#include <weir/io/atomic_file.hpp>
#include <weir/io/dtype.hpp>
#include <weir/io/file_error.hpp>
#include <weir/io/safetensors.hpp>
#include <weir/io/safetensors_writer.hpp>
#include <weir/io/tensor_layout.hpp>
#include <weir/io/tensor_source.hpp>

namespace weir::io {

/// Matrices of a model, each under its name.
template <class T>
using ModelTensors = std::vector<std::pair<std::string, Matrix<T>*>>;

/// The names and shapes of `tensors`.
template <class T>
std::vector<NamedShape> shapes_of(const ModelTensors<T>& tensors) {
  std::vector<NamedShape> shapes;
  for (const auto& [name, matrix] : tensors) {
    shapes.push_back({name, matrix->rows(), matrix->cols()});
  }
  return shapes;
}

/// Reads the matrices of a model from the tensors of a checkpoint, one after the other, so that
/// each may be stored in another way before the next is read.
template <class T>
class PublishedReader {
 public:
  /// Makes sure that all tensors are there.
  /// \param tensors   The matrices, which need not hold numbers yet.
  /// \param layout    Made for them.
  /// \param ignored   Patterns of tensors in the source that a model does not need.
  /// \throws FileError  if a tensor is missing, of another shape, or neither in the layout nor
  ///                    ignored; the message names up to five.
  PublishedReader(const TensorSource& source, ModelTensors<T> tensors,
                  const std::vector<PublishedTensor>& layout,
                  std::span<const std::string_view> ignored = {});

  /// Reads the matrices whose names begin with `prefix` and that have neither been read yet nor are
  /// deferred.
  void read(std::string_view prefix);

  /// The number of the matrix of that name; nothing if there is none.
  std::optional<std::size_t> find(const std::string& name) const;

  /// From now on, the matrix is only read by `read_deferred`; the model's own may go.
  void defer(std::size_t matrix) { deferred_[matrix] = true; }

  /// Rows of a matrix, for `Parameter::rows`; nothing if it does not lie in the source row by row.
  /// They live as long as the reader.
  const RowReader<T>* rows_of(std::size_t matrix) {
    const bool by_rows = std::all_of(parts_[matrix].begin(), parts_[matrix].end(),
                                     [](const Part& part) { return part.piece.col_step == 1; });
    if (!by_rows) return nullptr;
    if (rows_[matrix] == nullptr) rows_[matrix] = std::make_unique<Rows>(parts_[matrix]);
    return rows_[matrix].get();
  }

  /// Tells the system that the matrices whose names begin with `prefix` will not be read again
  /// soon.
  void release(std::string_view prefix) const {
    for (std::size_t m = 0; m < tensors_.size(); ++m) {
      if (!tensors_[m].first.starts_with(prefix)) continue;
      for (const Part& part : parts_[m]) part.tensor->release(part.piece.begin, extent(part.piece));
    }
  }

  /// Reads a matrix to another place, as often as wanted, from any thread.
  /// \param to       Has its shape.
  void read_deferred(std::size_t matrix, Matrix<T>& to) const {
    for (const Part& part : parts_[matrix]) read_part(part, to);
  }

  /// Tells the system that the matrix will be read soon.
  void prefetch(std::size_t matrix) const {
    for (const Part& part : parts_[matrix]) {
      part.tensor->prefetch(part.piece.begin, extent(part.piece));
    }
  }

 private:
  struct Part {
    const StoredTensor* tensor = nullptr;
    TensorPiece piece;
  };

  class Rows;

  static void read_part(const Part& part, Matrix<T>& to);

  /// How many numbers of the tensor lie between the first and the last of a piece, both included.
  static Index extent(const TensorPiece& piece) {
    return (piece.rows - 1) * piece.row_step + (piece.cols - 1) * piece.col_step + 1;
  }

  ModelTensors<T> tensors_;
  std::vector<std::vector<Part>> parts_;  // Of each matrix; none once it has been read.
  std::vector<bool> deferred_;
  std::map<std::string, std::size_t> numbers_;
  std::vector<std::unique_ptr<const RowReader<T>>> rows_;  // Of each matrix, once it is asked for.
};

/// The rows of a matrix whose parts lie row by row.
template <class T>
class PublishedReader<T>::Rows final : public RowReader<T> {
 public:
  explicit Rows(std::vector<Part> parts) : parts_(std::move(parts)) {}

  void read(Index first, Index count, T* to) const override {
    for (const auto& [tensor, piece] : parts_) {
      const Index begin = std::max(first, piece.first_row);
      const Index end = std::min(first + count, piece.first_row + piece.rows);
      for (Index row = begin; row < end; ++row) {
        tensor->read(piece.begin + (row - piece.first_row) * piece.row_step, piece.cols,
                     to + (row - first) * piece.cols);
      }
    }
  }

 private:
  std::vector<Part> parts_;
};

template <class T>
PublishedReader<T>::PublishedReader(const TensorSource& source, ModelTensors<T> tensors,
                                    const std::vector<PublishedTensor>& layout,
                                    std::span<const std::string_view> ignored)
    : tensors_(std::move(tensors)),
      parts_(tensors_.size()),
      deferred_(tensors_.size()),
      rows_(tensors_.size()) {
  for (std::size_t m = 0; m < tensors_.size(); ++m) numbers_[tensors_[m].first] = m;
  std::vector<std::string> faults;
  std::map<std::string_view, bool> known;
  for (const PublishedTensor& published : layout) {
    known[published.name] = true;
    const StoredTensor* const tensor = source.find(published.name);
    if (tensor == nullptr) {
      faults.push_back("'" + published.name + "' is missing");
    } else if (tensor->shape() != published.shape) {
      faults.push_back("'" + published.name + "' is " + shape_text(tensor->shape()) +
                       ", expected " + shape_text(published.shape));
    } else {
      for (const TensorPiece& piece : published.pieces) {
        parts_[piece.matrix].push_back({tensor, piece});
      }
    }
  }
  for (const std::string& name : source.names()) {
    const bool expected =
        known.contains(name) ||
        std::any_of(ignored.begin(), ignored.end(),
                    [&](std::string_view pattern) { return matches_pattern(pattern, name); });
    if (!expected) faults.push_back("'" + name + "' is not in the model");
  }
  expect_no_faults(source.path(), faults);
}

template <class T>
void PublishedReader<T>::read(std::string_view prefix) {
  for (std::size_t m = 0; m < tensors_.size(); ++m) {
    if (deferred_[m] || !tensors_[m].first.starts_with(prefix)) continue;
    for (const Part& part : parts_[m]) read_part(part, *tensors_[m].second);
    parts_[m].clear();
  }
}

template <class T>
std::optional<std::size_t> PublishedReader<T>::find(const std::string& name) const {
  const auto found = numbers_.find(name);
  return found == numbers_.end() ? std::nullopt : std::optional(found->second);
}

template <class T>
void PublishedReader<T>::read_part(const Part& part, Matrix<T>& to) {
  const TensorPiece& piece = part.piece;
  const StoredTensor& tensor = *part.tensor;
  if (piece.col_step == 1 && piece.row_step == piece.cols) {  // All in one.
    parallel_rows(piece.rows, piece.cols, [&](Index begin, Index end) {
      const Index at = piece.begin + begin * piece.cols;
      tensor.read(at, (end - begin) * piece.cols, &to(piece.first_row + begin, 0));
    });
  } else if (piece.col_step == 1) {
    parallel_rows(piece.rows, piece.cols, [&](Index begin, Index end) {
      for (Index i = begin; i < end; ++i) {
        const Index at = piece.begin + i * piece.row_step;
        tensor.read(at, piece.cols, &to(piece.first_row + i, 0));
      }
    });
  } else {  // The tensor's rows are columns here.
    constexpr Index kStrip = 16;
    const Index length = (piece.rows - 1) * piece.row_step + 1;
    parallel_for((piece.cols + kStrip - 1) / kStrip, [&](Index strip) {
      const Index first = strip * kStrip;
      const Index count = std::min(kStrip, piece.cols - first);
      Matrix<T> columns(count, length);
      for (Index j = 0; j < count; ++j) {
        const Index at = piece.begin + (first + j) * piece.col_step;
        tensor.read(at, length, &columns(j, 0));
      }
      for (Index i = 0; i < piece.rows; ++i) {
        for (Index j = 0; j < count; ++j) {
          to(piece.first_row + i, first + j) = columns(j, i * piece.row_step);
        }
      }
    });
  }
  tensor.release(piece.begin, extent(piece));
}

/// The numbers of a published tensor, put together from the matrices of a model.
template <class T>
void gather_tensor(const ModelTensors<T>& tensors, const PublishedTensor& published,
                   std::vector<T>& numbers) {
  Index count = 1;
  for (const Index length : published.shape) count *= length;
  numbers.resize(static_cast<std::size_t>(count));
  for (const TensorPiece& piece : published.pieces) {
    const Matrix<T>& from = *tensors[piece.matrix].second;
    parallel_rows(piece.rows, piece.cols, [&](Index begin, Index end) {
      for (Index i = begin; i < end; ++i) {
        T* const to = numbers.data() + piece.begin + i * piece.row_step;
        for (Index j = 0; j < piece.cols; ++j) {
          to[j * piece.col_step] = from(piece.first_row + i, j);
        }
      }
    });
  }
}

/// Makes sure that saving in this layout leaves nothing out.
/// \throws ConfigError  if a matrix that the layout has no place for is not zero.
template <class T>
void expect_no_loss(std::string_view who, const ModelTensors<T>& tensors,
                    const std::vector<PublishedTensor>& layout) {
  std::vector<bool> has_place(tensors.size());
  for (const PublishedTensor& published : layout) {
    for (const TensorPiece& piece : published.pieces) has_place[piece.matrix] = true;
  }
  for (std::size_t m = 0; m < tensors.size(); ++m) {
    if (has_place[m] || tensors[m].second->isZero(T(0))) continue;
    throw_error<ConfigError>(who, ": '", tensors[m].first,
                             "' is not zero, and the family's files have no place for it");
  }
}

}  // namespace weir::io
