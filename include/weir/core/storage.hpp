// SPDX-License-Identifier: MIT
/// \file
/// How the weights of a layer are stored for multiplication.
#pragma once

#include <concepts>
#include <string_view>
#include <vector>

#include <weir/core/error.hpp>
#include <weir/core/parameter.hpp>
#include <weir/core/types.hpp>

namespace weir {

/// How a layer keeps its weight matrices.
enum class Storage {
  /// As parameters: trainable, and arranged for multiplication anew in every pass.
  kTrainable,
  /// Arranged once, for inference: forward passes are faster, above all with few tokens. The layer
  /// has no parameters and cannot be trained.
  kPacked,
  /// As `kPacked`, but rounded to bfloat16 (8 bits of significand): half the memory, and up to
  /// twice the speed. Products are summed in float. Where the processor multiplies bfloat16 numbers
  /// itself (AVX512_BF16), tokens are rounded to bfloat16 as well on their way into a product;
  /// elsewhere the weights are widened exactly and multiplied in float. A layer in double, whose
  /// purpose is checking, keeps the rounded weights as doubles.
  kBfloat16,
};

/// \throws StateError   unless `storage` is kTrainable; `who` is the function that needs that.
inline void expect_trainable(std::string_view who, Storage storage) {
  if (storage != Storage::kTrainable) {
    fail<StateError>(who, ": the weights are stored for inference, expected Storage::kTrainable");
  }
}

namespace detail {

/// Walks a layer tree and sets the storage of each layer that has one.
class StorageSetter {
 public:
  explicit StorageSetter(Storage storage) : storage_(storage) {}

  template <class T>
  void operator()(std::string_view /*name*/, Parameter<T>& /*parameter*/) {}
  template <class T>
  void operator()(std::string_view /*name*/, Buffer<T>& /*buffer*/) {}

  template <class Member>
  void operator()(std::string_view name, std::vector<Member>& members) {
    for (Member& member : members) (*this)(name, member);
  }

  template <class Layer>
  void operator()(std::string_view /*name*/, Layer& layer) {
    if constexpr (requires { layer.set_storage(storage_); }) {
      layer.set_storage(storage_);
    } else if constexpr (requires { Layer::visit(layer, *this); }) {
      Layer::visit(layer, *this);
    }
  }

 private:
  Storage storage_;
};

}  // namespace detail

/// Stores the weights of `layer` and of all layers in it as `storage` says; layers that have no
/// large weights stay as they are. From `kPacked` and back, every bit is kept; from `kBfloat16` the
/// rounded values come back. With `kTrainable` the parameters return, without gradients until the
/// next backward pass.
///
///     set_storage(decoder, Storage::kBfloat16);   // after loading or training, before inference
///
/// Pointers to parameters (an optimizer's, for example) are no longer valid afterwards.
template <class Layer>
void set_storage(Layer& layer, Storage storage) {
  detail::StorageSetter set(storage);
  set("", layer);
}

}  // namespace weir
