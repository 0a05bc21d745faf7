// SPDX-License-Identifier: MIT
/// \file
/// A std::vector that counts with Index.
#pragma once

#include <initializer_list>
#include <utility>
#include <vector>

#include <weir/core/types.hpp>

namespace weir {

/// A std::vector whose places and sizes are `Index`, as those of matrices are.
template <class T>
class List : public std::vector<T> {
 public:
  using Vector = std::vector<T>;

  List() = default;
  List(std::initializer_list<T> values) : Vector(values) {}
  List(Vector values) : Vector(std::move(values)) {}  // NOLINT(google-explicit-constructor)
  explicit List(Index count, const T& value = T()) : Vector(unsigned_of(count), value) {}

  T& operator[](Index i) { return this->data()[i]; }
  const T& operator[](Index i) const { return this->data()[i]; }

  Index count() const { return static_cast<Index>(this->size()); }
  void resize(Index count) { Vector::resize(unsigned_of(count)); }
  void reserve(Index count) { Vector::reserve(unsigned_of(count)); }
  void assign(Index count, const T& value) { Vector::assign(unsigned_of(count), value); }
  template <class Iterator>
  requires(!std::is_integral_v<Iterator>) void assign(Iterator begin, Iterator end) {
    Vector::assign(begin, end);
  }

 private:
  static std::size_t unsigned_of(Index count) { return static_cast<std::size_t>(count); }
};

}  // namespace weir
