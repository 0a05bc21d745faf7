// SPDX-License-Identifier: MIT
/// \file
/// A weight matrix of a layer, in whichever storage it is kept.
#pragma once

#include <array>
#include <utility>

#include <weir/core/aligned.hpp>
#include <weir/core/low_rank.hpp>
#include <weir/core/parameter.hpp>
#include <weir/core/storage.hpp>
#include <weir/core/thread_space.hpp>
#include <weir/core/types.hpp>
#include <weir/kernels/matmul.hpp>
#include <weir/kernels/packed_product.hpp>
#include <weir/kernels/packed_weight.hpp>

namespace weir::kernels {

/// A weight [out, in]: a parameter, or packed for inference.
template <class T>
class Weight {
 public:
  Weight() = default;
  explicit Weight(Matrix<T> value) : parameter_(std::move(value)) {}

  Index rows() const { return packed_.empty() ? parameter_.value.rows() : packed_.rows(); }
  Index cols() const { return packed_.empty() ? parameter_.value.cols() : packed_.cols(); }

  /// Its value is empty unless the storage is kTrainable; adapters are there in any storage.
  LinearParameter<T>& parameter() { return parameter_; }
  const LinearParameter<T>& parameter() const { return parameter_; }

  /// Where it is stored for inference, the value is unpacked to a place of this thread, where it
  /// stays until the thread asks for another weight's.
  WeightValue<T> value() const {
    if (storage_ == Storage::kTrainable) return WeightValue<T>::of(parameter_);
    auto& space = ThreadSpace<T, Weight>::of_this_thread();
    space.reserve(rows() * cols());
    T* const unpacked = space.take(rows() * cols());
    packed_.unpack(unpacked, nullptr);
    return {{unpacked, rows(), cols()}};
  }

  const PackedWeight<T>& packed() const { return packed_; }

  Storage storage() const { return storage_; }

  /// If memory runs out, nothing has changed.
  /// \param memory  Where packed numbers go, with room for `PackedWeight::bytes`. If null, they get
  ///                memory of their own.
  void set_storage(Storage storage, SharedMemory* memory = nullptr);

  /// Whether `set_storage` would do anything.
  bool changes_to(Storage storage) const { return storage != storage_ && rows() != 0; }

  /// The same weight in another storage.
  Weight stored(Storage storage, SharedMemory* memory = nullptr) const;

 private:
  LinearParameter<T> parameter_;
  PackedWeight<T> packed_;
  Storage storage_ = Storage::kTrainable;
};

template <class T>
void Weight<T>::set_storage(Storage storage, SharedMemory* memory) {
  if (!changes_to(storage)) return;
  *this = stored(storage, memory);
}

template <class T>
Weight<T> Weight<T>::stored(Storage storage, SharedMemory* memory) const {
  Weight result;
  result.storage_ = storage;
  if (storage_ != Storage::kTrainable) packed_.unpack(result.parameter_.value);
  if (storage != Storage::kTrainable) {
    const bool unpacked = storage_ != Storage::kTrainable;
    const Parameter<T>& value = unpacked ? result.parameter_ : parameter_;
    result.packed_ = {value, storage, memory};
    result.parameter_ = {};
    result.parameter_.stored_rows = rows();
    result.parameter_.stored_cols = cols();
  }
  result.parameter_.adapters = parameter_.adapters;
  return result;
}

/// Changes the storage of several weights. If memory runs out, nothing has changed.
template <class T, std::size_t count>
void set_storage(const std::array<Weight<T>*, count>& weights, Storage storage) {
  std::array<Weight<T>, count> changed;
  for (std::size_t i = 0; i < count; ++i) {
    if (weights[i]->changes_to(storage)) changed[i] = weights[i]->stored(storage);
  }
  for (std::size_t i = 0; i < count; ++i) {
    if (weights[i]->changes_to(storage)) *weights[i] = std::move(changed[i]);
  }
}

/// A product with a weight: out [rows of x, rows of the weight].
template <class T>
struct WeightProduct {
  const Weight<T>* weight = nullptr;
  T* out = nullptr;
  Index out_row = 0;

  WeightProduct(const Weight<T>& w, MatrixOut<T> to)
      : weight(&w), out(to.data()), out_row(to.outerStride()) {}
};

/// out_i = x W_i^T for several weights, all in the same storage and as wide as x. Parameters are
/// multiplied in their precision.
template <class T, std::size_t count>
void multiply_weights(MatrixIn<T> x, const std::array<WeightProduct<T>, count>& products) {
  if (products[0].weight->storage() == Storage::kTrainable) {
    std::array<Product<T>, count> plain;
    for (std::size_t i = 0; i < count; ++i) {
      const Parameter<T>& w = products[i].weight->parameter();
      Eigen::Map<Matrix<T>, 0, Eigen::OuterStride<>> out(products[i].out, x.rows(), w.value.rows(),
                                                         Eigen::OuterStride<>(products[i].out_row));
      plain[i] = forward_product<T>(x, w, out);
    }
    return multiply<T>(plain);
  }
  std::array<PackedTo<T>, count> packed;
  for (std::size_t i = 0; i < count; ++i) {
    packed[i] = {&products[i].weight->packed(), 0, x.rows(), products[i].out, products[i].out_row};
  }
  multiply_packed<T>(x, packed);
}

}  // namespace weir::kernels

#ifdef WEIR_COMPILED
extern template class weir::kernels::Weight<float>;
extern template class weir::kernels::Weight<double>;
#endif
