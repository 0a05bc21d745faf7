// SPDX-License-Identifier: MIT
/// \file
/// Which experts a mixture has after its experts were changed.
#pragma once

#include <algorithm>
#include <cstddef>
#include <string_view>
#include <utility>
#include <vector>

#include <weir/core/error.hpp>
#include <weir/core/random.hpp>
#include <weir/core/types.hpp>

namespace weir {

/// The experts of a mixture after a change, each with where it comes from: {0, 2} keeps two,
/// {1, 0} exchanges two, {0, 1, 1} clones one, {0, 1, kCold} adds one.
///
/// A cold expert yields zero: its last map is zero and the ones before it are drawn, so that it
/// learns. Its row of the router is zero and has the bias `cold_logit`; a router without biases
/// gets them where that is not 0. Its selection bias is zero.
///
/// Parts of a mixture that have something for each expert offer `void remap_experts(const
/// ExpertMap&)`, which either succeeds or changes nothing.
struct ExpertMap {
  static constexpr Index kCold = -1;

  std::vector<Index> source;  ///< The number that each had before, or kCold.
  double cold_logit = 0.0;
  Rng* rng = nullptr;  ///< For the maps of cold experts.

  Index experts() const { return static_cast<Index>(source.size()); }
  bool has_cold() const { return std::find(source.begin(), source.end(), kCold) != source.end(); }

  /// \throws ConfigError  unless there is an expert, all come from one of `experts` or are cold,
  ///                      and there is a generator for those that are.
  void check(std::string_view where, Index experts_before) const {
    expect_at_least<Index>(where, "experts", experts(), 1);
    for (std::size_t i = 0; i < source.size(); ++i) {
      if (source[i] >= kCold && source[i] < experts_before) continue;
      throw_error<ConfigError>(where, ": source[", i, "] = ", source[i],
                               ", expected kCold or 0 <= source < ", experts_before);
    }
    if (has_cold() && rng == nullptr) {
      throw_error<ConfigError>(where, ": rng = null, expected a generator for cold experts");
    }
  }

  /// The items of the experts.
  /// \param cold     Makes that of a cold expert.
  template <class Item, class Cold>
  void rearrange(std::vector<Item>& items, Cold&& cold) const {
    std::vector<Item> next;
    next.reserve(source.size());
    for (const Index from : source) {
      next.push_back(from == kCold ? Item(cold()) : items[static_cast<std::size_t>(from)]);
    }
    items = std::move(next);
  }

  /// The columns of a row that has a number for each expert.
  template <class T>
  Matrix<T> columns(const Matrix<T>& row, T cold) const {
    Matrix<T> next(row.rows(), experts());
    for (Index i = 0; i < experts(); ++i) {
      const Index from = source[static_cast<std::size_t>(i)];
      if (from == kCold) {
        next.col(i).setConstant(cold);
      } else {
        next.col(i) = row.col(from);
      }
    }
    return next;
  }

  /// The rows of a matrix that has a row for each expert; cold ones are zero.
  template <class T>
  Matrix<T> rows(const Matrix<T>& matrix) const {
    Matrix<T> next = Matrix<T>::Zero(experts(), matrix.cols());
    for (Index i = 0; i < experts(); ++i) {
      const Index from = source[static_cast<std::size_t>(i)];
      if (from != kCold) next.row(i) = matrix.row(from);
    }
    return next;
  }

  /// The same of a parameter and its gradient.
  template <class P>
  void remap_rows(P& parameter) const {
    parameter.value = rows(parameter.value);
    if (parameter.grad.size() > 0) parameter.grad = rows(parameter.grad);
  }
};

}  // namespace weir
