// SPDX-License-Identifier: MIT
/// \file
/// Rounding of weights that looks at what they are multiplied with.
#pragma once

#include <algorithm>
#include <array>
#include <cmath>
#include <cstddef>

#include <Eigen/Cholesky>

#include <weir/core/parallel.hpp>
#include <weir/core/types.hpp>
#include <weir/kernels/block_codes.hpp>

namespace weir {

namespace detail {

/// The sum of importance (x - rounded x)^2 for the scale and the minimum of `block`, whose codes
/// are set.
inline double weighted_error(const float* x, Index count, const double* importance,
                             kernels::CodedBlock& block) {
  kernels::detail::choose_int4(x, count, block);
  double error = 0.0;
  for (Index i = 0; i < count; ++i) {
    const double off =
        static_cast<double>(x[i]) - kernels::coded_value(kernels::Code::kInt4, block, i);
    error += importance[i] * off * off;
  }
  return error;
}

/// Chooses scale and minimum of a block of 4 bits: those of plain rounding, or of numbers whose
/// range is cut at both ends, whichever has the least error weighted by importance.
inline kernels::CodedBlock weighted_int4(const float* x, Index count, const double* importance) {
  constexpr int kCuts = 8;
  constexpr float kCut = 0.04F;  // Of the range, each time.
  kernels::CodedBlock best;
  kernels::round_block(kernels::Code::kInt4, x, count, best);
  if (!(best.scale > 0.0F)) return best;
  double least = weighted_error(x, count, importance, best);
  const auto [low, high] = std::minmax_element(x, x + count);
  const float range = *high - *low;
  std::array<float, kernels::kMostBlock> cut{};
  for (int below = 0; below < kCuts; ++below) {
    for (int above = 0; above < kCuts; ++above) {
      const float from = *low + kCut * static_cast<float>(below) * range;
      const float to = *high - kCut * static_cast<float>(above) * range;
      for (Index i = 0; i < count; ++i) {
        cut[static_cast<std::size_t>(i)] = std::clamp(x[i], from, to);
      }
      kernels::CodedBlock block;
      kernels::round_block(kernels::Code::kInt4, cut.data(), count, block);
      const double error = weighted_error(x, count, importance, block);
      if (error < least) {
        least = error;
        best = block;
      }
    }
  }
  return best;
}

/// The upper triangular U with U^T U = (X^T X / rows + damping I)^-1, where damping is that share
/// of the mean of the diagonal; and the diagonal itself. `Real` is double: as a template, the
/// factorisation is compiled only in programs that calibrate.
template <class Real>
struct InverseFactor {
  Matrix<Real> upper;
  RowVector<Real> diagonal;
};

template <class Real>
InverseFactor<Real> inverse_factor(MatrixIn<float> x, Real damping) {
  const Matrix<Real> inputs = x.cast<Real>();
  Matrix<Real> gram = inputs.transpose() * inputs / static_cast<Real>(x.rows());
  const Real mean = gram.diagonal().mean();
  gram.diagonal().array() += mean > Real{0} ? damping * mean : Real{1};
  const RowVector<Real> diagonal = gram.diagonal().transpose();
  const Matrix<Real> identity = Matrix<Real>::Identity(gram.rows(), gram.cols());
  const Matrix<Real> inverse = gram.llt().solve(identity);
  return {inverse.llt().matrixU(), diagonal};
}

}  // namespace detail

/// Moves the numbers of a weight [out, in] to ones that the storage kInt4 holds, such that
/// x weight^T changes as little as possible for the rows of x. Weights are rounded input by input,
/// and what rounding changed in an output is made up for by the inputs that are still to come. The
/// scale of a block of 32 is the one with the least error weighted by the mean squares of its
/// inputs. (GPTQ: Frantar et al. 2022, arXiv:2210.17323, algorithm 1; the weights are those of
/// llama.cpp's importance matrix.)
///
/// \param x        [rows, in], at least one row; inputs that are zero in all rows are rounded
///                 plainly.
/// \param damping  This share of the mean square of an input is added to that of each: with few
///                 rows, more keeps rounding nearer to the plain one.
template <class T>
void round_to_int4_for(MatrixIn<float> x, double damping, MatrixOut<T> weight) {
  constexpr Index kBlock = kernels::block_length(kernels::Code::kInt4);
  const Index inputs = weight.cols();
  const detail::InverseFactor<double> factor = detail::inverse_factor(x, damping);
  parallel_rows(weight.rows(), inputs * inputs, [&](Index begin, Index end) {
    RowVector<double> row(inputs);
    std::array<float, static_cast<std::size_t>(kBlock)> numbers{};
    for (Index r = begin; r < end; ++r) {
      for (Index i = 0; i < inputs; ++i) row[i] = static_cast<double>(weight(r, i));
      for (Index first = 0; first < inputs; first += kBlock) {
        const Index count = std::min(kBlock, inputs - first);
        for (Index i = 0; i < count; ++i) {
          numbers[static_cast<std::size_t>(i)] = static_cast<float>(row[first + i]);
        }
        kernels::CodedBlock block =
            detail::weighted_int4(numbers.data(), count, factor.diagonal.data() + first);
        for (Index i = first; i < first + count; ++i) {
          kernels::CodedBlock one = block;
          const auto number = static_cast<float>(row[i]);
          kernels::detail::choose_int4(&number, 1, one);
          const float rounded = kernels::coded_value(kernels::Code::kInt4, one, 0);
          const double off = (row[i] - static_cast<double>(rounded)) / factor.upper(i, i);
          for (Index j = i + 1; j < inputs; ++j) row[j] -= off * factor.upper(i, j);
          weight(r, i) = static_cast<T>(rounded);
        }
      }
    }
  });
}

}  // namespace weir
