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
#include <weir/core/pass.hpp>
#include <weir/core/scratch.hpp>
#include <weir/core/types.hpp>
#include <weir/nn/rms_norm.hpp>
#include <weir/ops/lanes.hpp>
#include <weir/ops/rows.hpp>
#include <weir/ops/vector_loops.hpp>

namespace weir {

/// What queries and keys are normalised over, and when.
enum class QkNorm {
  kNone,     ///< There is no normalisation.
  kFull,     ///< RMSNorm over all heads together, before rotation (OLMoE; arXiv:2409.02060).
  kPerHead,  ///< RMSNorm of each head with one weight for all, before rotation (Qwen3;
             ///< arXiv:2505.09388).
  kL2,       ///< Each head divided by its root mean square, after rotation (Llama 4).
};

/// `RmsNorm` of the queries or the keys of all tokens, in place.
template <std::floating_point T>
class HeadNorm {
 public:
  using Cache = typename RmsNorm<T>::Cache;

  /// \param dim  How many numbers of a row are normalised together.
  explicit HeadNorm(Index dim, RmsNormConfig config = {}) : norm_(dim, config) {}

  Parameter<T>& weight() { return norm_.weight(); }  ///< [1, dim], begins as one.
  const Parameter<T>& weight() const { return norm_.weight(); }

  /// \param x  [tokens, a multiple of dim]
  void forward(Matrix<T>& x, const Pass& pass, Cache& cache) const {
    // A mask would not fit the parts.
    copy(norm_.forward(parts(x), Pass{.training = pass.training}, cache), x);
  }

  /// Turns the gradient of the output of `forward` into that of its input.
  void backward(MatrixOut<T> d, Cache& cache) { copy(norm_.backward(parts(d), cache), d); }

 private:
  /// \param x  Without gaps between its rows.
  Eigen::Map<const Matrix<T>> parts(MatrixIn<T> x) const {
    return {x.data(), x.size() / norm_.d_model(), norm_.d_model()};
  }

  static void copy(const Matrix<T>& from, MatrixOut<T> to) {
    parallel_pieces(1, to.size(), 1, [&](Index, Index begin, Index count) {
      std::copy_n(from.data() + begin, count, to.data() + begin);
    });
  }

  RmsNorm<T> norm_;
};

/// Divides each head by its root mean square, in place:
///
///     y = r x,    r = 1 / sqrt(mean(x^2) + epsilon),    dx = r (dy - y mean(dy y))
///
/// (The released code of Llama 4 calls it an L2 norm.)
template <class T>
class HeadL2Norm {
 public:
  struct Cache {
    Scratch<T> inverse;  ///< r, [tokens, heads].
  };

  /// \param dim  How many numbers a head has.
  explicit HeadL2Norm(Index dim, RmsNormConfig config = {}) : dim_(dim), config_(config) {}

  /// \param x  [tokens, heads * dim]
  void forward(Matrix<T>& x, const Pass& pass, Cache& cache) const;

  /// \param y  The output of `forward`.
  /// \param d  The gradient of y, which becomes that of x.
  void backward(const Matrix<T>& y, MatrixOut<T> d, const Cache& cache) const;

 private:
  Index dim_;
  RmsNormConfig config_;
};

template <class T>
void HeadL2Norm<T>::forward(Matrix<T>& x, const Pass& pass, Cache& cache) const {
  const Index heads = x.cols() / dim_;
  if (pass.training) cache.inverse.reshape(x.rows(), heads);
  parallel_rows(x.rows(), 2 * x.cols(), [&](Index begin, Index end) {
    for (Index t = begin; t < end; ++t) {
      for (Index head = 0; head < heads; ++head) {
        T* const row = &x(t, head * dim_);
        const T mean = loops::sum_of_squares<T>(dim_, row) / static_cast<T>(dim_);
        const T r = T(1) / std::sqrt(mean + static_cast<T>(config_.epsilon));
        if (pass.training) cache.inverse.view()(t, head) = r;
        loops::scale<T>(dim_, r, row, row);
      }
    }
  });
}

template <class T>
void HeadL2Norm<T>::backward(const Matrix<T>& y, MatrixOut<T> d, const Cache& cache) const {
  const auto r = cache.inverse.view();
  parallel_rows(y.rows(), 4 * y.cols(), [&](Index begin, Index end) {
    for (Index t = begin; t < end; ++t) {
      for (Index head = 0; head < r.cols(); ++head) {
        const T* const of_y = &y(t, head * dim_);
        T* const of_d = &d(t, head * dim_);
        const T along = loops::dot<T>(dim_, of_y, of_d) / static_cast<T>(dim_);
        const auto f = [along, scale = r(t, head)](const Lanes<T>& dy,
                                                   const Lanes<T>& v) -> Lanes<T> {
          return scale * (dy - along * v);
        };
        map_lanes<T>(dim_, f, of_d, of_d, of_y);
      }
    }
  });
}

}  // namespace weir

#ifdef WEIR_COMPILED
extern template class weir::HeadL2Norm<float>;
extern template class weir::HeadL2Norm<double>;
#endif
