// SPDX-License-Identifier: MIT
/// \file
/// Normalisation of queries and keys, which bounds the scores of attention (Henry et al. 2020,
/// arXiv:2010.04245; Dehghani et al. 2023, arXiv:2302.05442).
#pragma once

#include <algorithm>
#include <cmath>
#include <concepts>

#include <weir/core/parallel.hpp>
#include <weir/core/parameter.hpp>
#include <weir/core/scratch.hpp>
#include <weir/core/types.hpp>
#include <weir/nn/rms_norm.hpp>
#include <weir/ops/lanes.hpp>
#include <weir/ops/rows.hpp>
#include <weir/ops/vector_loops.hpp>

namespace weir {

/// What queries and keys are normalised over, and when.
enum class QkNorm {
  kNone,
  kFull,     ///< RMSNorm over all heads together, before rotation (OLMoE; arXiv:2409.02060).
  kPerHead,  ///< RMSNorm of each head with one weight for all, before rotation (Qwen3;
             ///< arXiv:2505.09388).
  kL2,       ///< Each head over its root mean square, no weight, after rotation (Llama 4).
};

/// `RmsNorm` of the queries or the keys of all tokens, in place.
template <std::floating_point T>
class HeadNorm {
 public:
  using Cache = typename RmsNorm<T>::Cache;

  /// \param dim  How many numbers of a row are normalised together.
  HeadNorm(Index dim, double epsilon) : norm_(dim, epsilon) {}

  Parameter<T>& weight() { return norm_.weight(); }  ///< [1, dim], begins as one.
  const Parameter<T>& weight() const { return norm_.weight(); }

  /// \param x  [tokens, a multiple of dim]
  void forward(Matrix<T>& x, Cache& cache) const { copy(norm_.forward(parts(x), cache), x); }

  /// Takes the gradient of what `forward` wrote to that of what it read.
  void backward(Matrix<T>& d, Cache& cache) { copy(norm_.backward(parts(d), cache), d); }

 private:
  Eigen::Map<const Matrix<T>> parts(const Matrix<T>& x) const {
    return {x.data(), x.size() / norm_.d_model(), norm_.d_model()};
  }

  static void copy(const Matrix<T>& from, Matrix<T>& to) {
    parallel_pieces(1, to.size(), 1, [&](Index, Index begin, Index count) {
      std::copy_n(from.data() + begin, count, to.data() + begin);
    });
  }

  RmsNorm<T> norm_;
};

/// Each head over its root mean square, in place:
///
///     y = r x,    r = 1 / sqrt(mean(x^2) + epsilon),    dx = r (dy - y mean(dy y))
///
/// (The released code of Llama 4 calls it an L2 norm.)
template <class T>
struct HeadL2Norm {
  Index dim = 0;  ///< of a head
  double epsilon = 0.0;

  /// \param x        [tokens, heads * dim]
  /// \param inverse  Becomes r, [tokens, heads].
  void forward(Matrix<T>& x, Scratch<T>& inverse) const {
    auto r = inverse.reshape(x.rows(), x.cols() / dim);
    parallel_rows(x.rows(), 2 * x.cols(), [&](Index begin, Index end) {
      for (Index t = begin; t < end; ++t) {
        for (Index head = 0; head < r.cols(); ++head) {
          T* const row = &x(t, head * dim);
          const T mean = loops::sum_of_squares<T>(dim, row) / static_cast<T>(dim);
          r(t, head) = T(1) / std::sqrt(mean + static_cast<T>(epsilon));
          loops::scale<T>(dim, r(t, head), row, row);
        }
      }
    });
  }

  /// \param y  What `forward` left in its x.
  /// \param d  The gradient of y, which becomes that of x.
  void backward(const Matrix<T>& y, Matrix<T>& d, const Scratch<T>& inverse) const {
    const auto r = inverse.view();
    parallel_rows(y.rows(), 4 * y.cols(), [&](Index begin, Index end) {
      for (Index t = begin; t < end; ++t) {
        for (Index head = 0; head < r.cols(); ++head) {
          const T* const of_y = &y(t, head * dim);
          T* const of_d = &d(t, head * dim);
          const T along = loops::dot<T>(dim, of_y, of_d) / static_cast<T>(dim);
          const auto f = [along, scale = r(t, head)](const Lanes<T>& dy,
                                                     const Lanes<T>& v) -> Lanes<T> {
            return scale * (dy - along * v);
          };
          map_lanes<T>(dim, f, of_d, of_d, of_y);
        }
      }
    });
  }
};

}  // namespace weir
