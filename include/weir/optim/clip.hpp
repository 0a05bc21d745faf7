// SPDX-License-Identifier: MIT
/// \file
/// Gradient clipping (Pascanu et al. 2013, arXiv:1211.5063, algorithm 1).
#pragma once

#include <algorithm>
#include <array>
#include <cmath>
#include <limits>
#include <numeric>
#include <string>
#include <string_view>
#include <type_traits>
#include <utility>
#include <vector>

#include <weir/core/error.hpp>
#include <weir/core/parallel.hpp>
#include <weir/core/parameter.hpp>
#include <weir/core/types.hpp>
#include <weir/core/verbs.hpp>
#include <weir/core/walk.hpp>
#include <weir/ops/vector_loops.hpp>

namespace weir {

namespace detail {

/// At most this many tasks share the gradients of a model, so that their results fit on the stack.
inline constexpr Index kGradientTasks = 256;

/// The gradients that count: those of parameters that are neither frozen nor never used.
template <class T>
struct CollectGradients final : Walk<T> {
  void at_parameter(std::string_view /*name*/, Parameter<T>& parameter) override {
    if (!parameter.frozen && parameter.grad.size() > 0) gradients.push_back(&parameter.grad);
  }
  std::vector<Matrix<T>*> gradients;
};

template <class Model>
std::vector<Matrix<typename Model::Scalar>*> gradients_of(Model& model) {
  CollectGradients<typename Model::Scalar> collect;
  collect("", model);
  return std::move(collect.gradients);
}

/// Calls `body(task, numbers, count)` for pieces that together are all gradients, laid end to end
/// and divided evenly, whatever the number of threads, among at most `kGradientTasks` tasks. The
/// pieces of one task come in order, from one thread.
template <class T, class Body>
void parallel_gradients(const std::vector<Matrix<T>*>& gradients, Body&& body) {
  constexpr Index kWorthwhile = 16384;
  Index total = 0;
  for (const Matrix<T>* gradient : gradients) total += gradient->size();
  const Index share = std::max(kWorthwhile, (total + kGradientTasks - 1) / kGradientTasks);

  parallel_for((total + share - 1) / share, [&](Index task) {
    const Index begin = task * share;
    const Index end = begin + share;
    Index offset = 0;
    for (Matrix<T>* gradient : gradients) {
      if (offset >= end) break;
      const Index size = gradient->size();
      const Index from = std::max(begin - offset, Index{0});
      const Index to = std::min(end - offset, size);
      if (from < to) body(task, gradient->data() + from, to - from);
      offset += size;
    }
  });
}

/// Throws for the first parameter whose gradient is not finite or, if all are, for the one with
/// which the sum of squares overflows.
template <class Model>
[[noreturn]] void fail_non_finite(std::string_view where, Model& model) {
  double total = 0.0;
  std::string at_fault;
  for (const auto& [name, parameter] : parameters(model)) {
    if (parameter->frozen || parameter->grad.size() == 0) continue;
    if (!parameter->grad.allFinite()) {
      at_fault = name;
      if (parameter->grad.hasNaN()) total = std::numeric_limits<double>::quiet_NaN();
      break;
    }
    if (std::isfinite(total)) at_fault = name;
    total += loops::sum_of_squares_as_double(parameter->grad.size(), parameter->grad.data());
  }
  throw_error<NonFiniteError>(where, ": gradient of ", at_fault, " has norm ",
                              std::isnan(total) ? "nan" : "inf", ", expected finite");
}

/// The sum over all tasks of `sum_of(numbers, count)` of their pieces.
template <class T, class Sum>
double sum_over_gradients(const std::vector<Matrix<T>*>& gradients, Sum&& sum_of) {
  std::array<double, kGradientTasks> sums{};
  parallel_gradients(gradients, [&](Index task, const T* numbers, Index count) {
    sums[static_cast<std::size_t>(task)] += sum_of(numbers, count);
  });
  return std::accumulate(sums.begin(), sums.end(), 0.0);
}

/// The norm of gradients whose squares overflow or vanish: they are divided by the power of two of
/// the largest of them first.
/// \return         NaN or infinite if a number is.
inline double scaled_norm(const std::vector<Matrix<double>*>& gradients) {
  double largest = 0.0;
  for (const Matrix<double>* gradient : gradients) {
    if (!gradient->allFinite()) return std::numeric_limits<double>::infinity();
    largest = std::max(largest, gradient->cwiseAbs().maxCoeff());
  }
  if (largest == 0.0) return 0.0;
  const int exponent = std::ilogb(largest);
  const double squares = sum_over_gradients(gradients, [&](const double* numbers, Index count) {
    double sum = 0.0;
    for (Index i = 0; i < count; ++i) {
      const double scaled = std::scalbn(numbers[i], -exponent);
      sum += scaled * scaled;
    }
    return sum;
  });
  return std::scalbn(std::sqrt(squares), exponent);
}

template <class Model, class T>
double finite_global_norm(std::string_view where, Model& model,
                          const std::vector<Matrix<T>*>& gradients) {
  const double squares = sum_over_gradients(gradients, [](const T* numbers, Index count) {
    return loops::sum_of_squares_as_double(count, numbers);
  });
  double norm = std::sqrt(squares);
  if constexpr (std::is_same_v<T, double>) {
    constexpr double kLeast = 1e-280;  // Below, squares may have lost digits.
    if (squares < kLeast || !std::isfinite(squares)) norm = scaled_norm(gradients);
  }
  if (!std::isfinite(norm)) fail_non_finite(where, model);
  return norm;
}

}  // namespace detail

/// The Euclidean norm of all gradients taken as one vector:
///
///     sqrt(sum_p ||g_p||^2)
///
/// Summed in double, whatever the common scale of the gradients, and the same to the last bit for
/// any number of threads. Frozen parameters and those that never had a gradient do not count.
/// \throws NonFiniteError   if it is NaN or infinite. The message names the first such parameter.
template <class Model>
double global_norm(Model& model) {
  return detail::finite_global_norm("global_norm", model, detail::gradients_of(model));
}

/// Makes a long step short without turning it. Where the norm of all gradients is above `max_norm`:
///
///     g_p <- g_p * max_norm / norm
///
/// (Pascanu et al. 2013, arXiv:1211.5063, algorithm 1, the threshold being the norm of all
/// parameters together.) Frozen parameters are neither counted nor scaled.
///
/// \return              The norm before clipping.
/// \throws ConfigError      if max_norm is not above zero.
/// \throws NonFiniteError   as `global_norm` does. The step is given up by `discard(model)` then:
///                          all gradients are zero, and the batch counts in no balancing rule. The
///                          caller has only to go on with the next batch.
template <class Model>
double clip_global_norm(Model& model, double max_norm) {
  using T = typename Model::Scalar;
  expect_positive("clip_global_norm", "max_norm", max_norm);
  const std::vector<Matrix<T>*> all = detail::gradients_of(model);
  double norm = 0.0;
  try {
    norm = detail::finite_global_norm("clip_global_norm", model, all);
  } catch (const NonFiniteError&) {
    discard(model);
    throw;
  }
  if (norm > max_norm) {
    const auto factor = static_cast<T>(max_norm / norm);
    detail::parallel_gradients(all, [&](Index, T* numbers, Index count) {
      loops::scale(count, factor, numbers, numbers);
    });
  }
  return norm;
}

}  // namespace weir
