// SPDX-License-Identifier: MIT
#include <cstdint>
#include <vector>

#include <weir/core/aligned.hpp>
#include <weir/core/storage.hpp>
#include <weir/kernels/weight.hpp>

#include "support/catch.hpp"
#include "support/matrices.hpp"

namespace weir::weight_test {
using kernels::PackedWeight;
using kernels::Weight;

namespace {

/// Where the numbers of a weight begin that is stored as kPacked.
template <class T>
const char* address(const Weight<T>& weight) {
  return static_cast<const char*>(weight.packed().data());
}

template <class T>
Matrix<T> product(const Matrix<T>& x, const Weight<T>& weight) {
  Matrix<T> y(x.rows(), weight.rows());
  kernels::multiply_weights<T, 1>(x, {{{weight, y}}});
  return y;
}

}  // namespace

TEMPLATE_TEST_CASE("Weights lie in the memory they are given, one behind the other",
                   "[kernels][weight]", float, double) {
  using T = TestType;
  const Matrix<T> value = test::random_matrix<T>(70, 33, 1);
  std::vector<Weight<T>> weights(3, Weight<T>(value));
  const auto size = PackedWeight<T>::bytes(70, 33, Storage::kPacked);
  SharedMemory memory(3 * size);
  for (Weight<T>& weight : weights) weight.set_storage(Storage::kPacked, &memory);
  CHECK(address(weights[1]) == address(weights[0]) + size);
  CHECK(address(weights[2]) == address(weights[1]) + size);
  for (Weight<T>& weight : weights) {
    weight.set_storage(Storage::kTrainable);
    CHECK(weight.parameter().value == value);
  }
}

TEMPLATE_TEST_CASE("Several products with one input are each product by itself",
                   "[kernels][weight]", float, double) {
  using T = TestType;
  const auto storage = GENERATE(Storage::kTrainable, Storage::kPacked, Storage::kBfloat16);
  const Matrix<T> x = test::random_matrix<T>(5, 33, 2);
  std::vector<Weight<T>> weights;
  for (const Index rows : {7, 40, 16}) {
    weights.emplace_back(test::random_matrix<T>(rows, 33, static_cast<std::uint64_t>(rows)));
    weights.back().set_storage(storage);
  }
  std::vector<Matrix<T>> y;
  for (const Weight<T>& weight : weights) y.emplace_back(Matrix<T>::Zero(5, weight.rows()));
  kernels::multiply_weights<T, 3>(x,
                                  {{{weights[0], y[0]}, {weights[1], y[1]}, {weights[2], y[2]}}});
  for (std::size_t i = 0; i < 3; ++i) CHECK(y[i] == product<T>(x, weights[i]));
}

TEMPLATE_TEST_CASE("A copy of a weight outlives every change of the original, and the memory",
                   "[kernels][weight]", float, double) {
  using T = TestType;
  const auto storage = GENERATE(Storage::kPacked, Storage::kBfloat16);
  const auto other = storage == Storage::kPacked ? Storage::kBfloat16 : Storage::kPacked;
  const Matrix<T> x = test::random_matrix<T>(7, 33, 2);
  Weight<T> weight(test::random_matrix<T>(70, 33, 1));
  {
    SharedMemory memory(PackedWeight<T>::bytes(70, 33, storage));
    weight.set_storage(storage, &memory);
  }
  Weight<T> copy = weight;
  const Matrix<T> before = product(x, copy);

  {
    SharedMemory memory(PackedWeight<T>::bytes(70, 33, other));
    weight.set_storage(other, &memory);
  }
  CHECK(weight.storage() == other);
  CHECK(test::relative_error(product(x, weight), before) < 1e-2);
  CHECK(copy.storage() == storage);
  CHECK(product(x, copy) == before);

  weight.set_storage(Storage::kTrainable);
  weight.parameter().value.setZero();
  CHECK(product(x, copy) == before);
  // The memory now belongs to the copy alone.
  weight = {};
  copy.set_storage(other);
  copy.set_storage(Storage::kTrainable);
  CHECK(copy.parameter().value.rows() == 70);
  CHECK(copy.parameter().value.cols() == 33);
}

TEST_CASE("A weight that is stored so already, or that is empty, takes no memory",
          "[kernels][weight]") {
  SharedMemory none(0);
  Weight<float> weight(test::random_matrix<float>(5, 3, 1));
  weight.set_storage(Storage::kTrainable, &none);
  CHECK(weight.storage() == Storage::kTrainable);
  weight.set_storage(Storage::kPacked);
  const char* const at = address(weight);
  weight.set_storage(Storage::kPacked, &none);
  CHECK(address(weight) == at);
  Weight<float> empty;
  empty.set_storage(Storage::kPacked, &none);
  CHECK(empty.storage() == Storage::kTrainable);
}

}  // namespace weir::weight_test
