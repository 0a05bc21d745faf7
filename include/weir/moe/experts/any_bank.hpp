// SPDX-License-Identifier: MIT
/// \file
/// Experts that are layers of any kind.
#pragma once

#include <algorithm>
#include <span>
#include <string>
#include <utility>
#include <vector>

#include <weir/core/layer.hpp>
#include <weir/core/parallel.hpp>
#include <weir/core/scratch.hpp>
#include <weir/moe/dispatch.hpp>

namespace weir {

/// A bank made of a vector of layers [tokens, d_in] -> [tokens, d_out], each run on the rows of its
/// expert. For experts of different kinds or sizes, let `Expert` be an AnyLayer.
///
/// An expert's cache follows the number of its tokens: where its matrices are Eigen's, memory is
/// allocated whenever that number changes. GluBank and MlpBank do without.
template <Layer Expert>
class AnyBank {
 public:
  using Scalar = typename Expert::Scalar;
  using T = Scalar;

  struct Cache {
    std::vector<typename Expert::Cache> experts;
    Scratch<T> x, out, d_out, d_packed;  ///< [slots, .]
    Matrix<T> y, dx;                     ///< [tokens, .]
  };

  /// \param d_in, d_out  The widths of every expert.
  /// \throws ConfigError  without experts or if a width is below 1.
  AnyBank(std::vector<Expert> experts, Index d_in, Index d_out)
      : experts_(std::move(experts)), d_in_(d_in), d_out_(d_out) {
    expect_at_least<std::size_t>("AnyBank", "experts", experts_.size(), 1);
    expect_at_least<Index>("AnyBank", "d_in", d_in, 1);
    expect_at_least<Index>("AnyBank", "d_out", d_out, 1);
  }

  /// \throws ShapeError   if an expert's output is not d_out wide.
  const Matrix<T>& forward(MatrixIn<T> x, const Dispatch<T>& dispatch, Cache& cache) const {
    cache.experts.resize(experts_.size());
    gather<T>(x, dispatch, cache.x.reshape(dispatch.slots(), d_in_));
    auto out = cache.out.reshape(dispatch.slots(), d_out_);
    run(dispatch, [&](std::size_t e, Index begin, Index rows) {
      const Matrix<T>& y =
          experts_[e].forward(cache.x.view().middleRows(begin, rows), cache.experts[e]);
      expect_shape("AnyBank::forward", "an expert's output", y, rows, d_out_);
      out.middleRows(begin, rows) = y;
    });
    cache.y.resize(x.rows(), d_out_);
    combine<T>(out, dispatch, cache.y);
    return cache.y;
  }

  /// Experts without tokens are not called.
  const Matrix<T>& backward(MatrixIn<T> dy, const Dispatch<T>& dispatch, std::span<T> d_weight,
                            Cache& cache) {
    auto d_out = cache.d_out.reshape(dispatch.slots(), d_out_);
    auto d_packed = cache.d_packed.reshape(dispatch.slots(), d_in_);
    combine_backward<T>(dy, cache.out.view(), dispatch, d_out, d_weight);
    run(dispatch, [&](std::size_t e, Index begin, Index rows) {
      const Matrix<T>& dx = experts_[e].backward(d_out.middleRows(begin, rows), cache.experts[e]);
      d_packed.middleRows(begin, rows) = dx;
    });
    cache.dx.resize(dy.rows(), d_in_);
    gather_backward<T>(d_packed, dispatch, cache.dx);
    return cache.dx;
  }

  template <class Self, class Visit>
  static void visit(Self& self, Visit& visit) {
    for (std::size_t e = 0; e < self.experts_.size(); ++e) {
      visit(std::to_string(e), self.experts_[e]);
    }
  }

  Index experts() const { return static_cast<Index>(experts_.size()); }
  Index d_in() const { return d_in_; }
  Index d_out() const { return d_out_; }

 private:
  /// Calls `body` for each expert with slots: side by side, or, where one expert has more than a
  /// thread's share of them, one after the other with all threads inside each.
  template <class Body>
  static void run(const Dispatch<T>& dispatch, Body&& body) {
    Index largest = 0;
    for (Index e = 0; e < dispatch.experts(); ++e) largest = std::max(largest, dispatch.rows(e));
    if (largest * threads() > dispatch.slots()) {
      dispatch.for_each_expert(body);
    } else {
      parallel_for(dispatch.experts(), [&](Index e) {
        if (dispatch.rows(e) > 0) {
          body(static_cast<std::size_t>(e), dispatch.begin(e), dispatch.rows(e));
        }
      });
    }
  }

  std::vector<Expert> experts_;
  Index d_in_;
  Index d_out_;
};

}  // namespace weir
