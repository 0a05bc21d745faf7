// SPDX-License-Identifier: MIT
/// \file
/// Gradient clipping (Pascanu et al. 2013, arXiv:1211.5063, algorithm 1).
#pragma once

#include <algorithm>
#include <array>
#include <cmath>
#include <numeric>
#include <string_view>
#include <vector>

#include <weir/core/error.hpp>
#include <weir/core/parallel.hpp>
#include <weir/core/parameter.hpp>
#include <weir/core/types.hpp>
#include <weir/core/verbs.hpp>
#include <weir/ops/vector_loops.hpp>

namespace weir {

namespace detail {

/// At most this many tasks share the gradients of a model, so that their results fit on the stack.
inline constexpr Index kGradientTasks = 256;

/// How many numbers the gradient of a parameter contributes: none if it is frozen or never used.
template <class T>
Index gradient_size(const NamedParameter<T>& named) {
  return named.parameter->frozen ? 0 : named.parameter->grad.size();
}

/// Calls `body(task, numbers, count)` for pieces that together are all gradients, laid end to end
/// and divided evenly, whatever the number of threads, among at most `kGradientTasks` tasks. The
/// pieces of one task come in order, from one thread.
template <class T, class Body>
void parallel_gradients(const std::vector<NamedParameter<T>>& parameters, Body&& body) {
  constexpr Index kWorthwhile = 16384;
  Index total = 0;
  for (const NamedParameter<T>& named : parameters) total += gradient_size(named);
  const Index share = std::max(kWorthwhile, (total + kGradientTasks - 1) / kGradientTasks);

  parallel_for((total + share - 1) / share, [&](Index task) {
    const Index begin = task * share;
    const Index end = begin + share;
    Index offset = 0;
    for (const NamedParameter<T>& named : parameters) {
      if (offset >= end) break;
      const Index size = gradient_size(named);
      const Index from = std::max(begin - offset, Index{0});
      const Index to = std::min(end - offset, size);
      if (from < to) body(task, named.parameter->grad.data() + from, to - from);
      offset += size;
    }
  });
}

/// Throws for the parameter whose gradient makes the sum of squares NaN or infinite.
template <class T>
[[noreturn]] void fail_non_finite(std::string_view where,
                                  const std::vector<NamedParameter<T>>& parameters) {
  double total = 0.0;
  std::string_view name;
  for (const NamedParameter<T>& named : parameters) {
    total += loops::sum_of_squares_as_double(gradient_size(named), named.parameter->grad.data());
    name = named.name;
    if (!std::isfinite(total)) break;
  }
  fail<NonFiniteError>(where, ": gradient of ", name, " has norm ",
                       std::isnan(total) ? "nan" : "inf", ", expected finite");
}

template <class T>
double finite_global_norm(std::string_view where,
                          const std::vector<NamedParameter<T>>& parameters) {
  std::array<double, kGradientTasks> sums{};
  parallel_gradients(parameters, [&](Index task, const T* numbers, Index count) {
    sums[static_cast<std::size_t>(task)] += loops::sum_of_squares_as_double(count, numbers);
  });
  const double norm = std::sqrt(std::accumulate(sums.begin(), sums.end(), 0.0));
  if (!std::isfinite(norm)) fail_non_finite(where, parameters);
  return norm;
}

}  // namespace detail

/// The Euclidean norm of all gradients taken as one vector:
///
///     sqrt(sum_p ||g_p||^2)
///
/// Summed in double, and the same to the last bit for any number of threads. Frozen parameters and
/// those that never had a gradient do not count.
/// \throws NonFiniteError   if it is NaN or infinite. The message names the first such parameter.
template <class Model>
double global_norm(Model& model) {
  return detail::finite_global_norm("global_norm", parameters(model));
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
/// \throws NonFiniteError   as `global_norm` does; no gradient is changed then.
template <class Model>
double clip_global_norm(Model& model, double max_norm) {
  using T = typename Model::Scalar;
  expect_positive("clip_global_norm", "max_norm", max_norm);
  const std::vector<NamedParameter<T>> all = parameters(model);
  const double norm = detail::finite_global_norm("clip_global_norm", all);
  if (norm > max_norm) {
    const auto factor = static_cast<T>(max_norm / norm);
    detail::parallel_gradients(all, [&](Index, T* numbers, Index count) {
      loops::scale(count, factor, numbers, numbers);
    });
  }
  return norm;
}

}  // namespace weir
