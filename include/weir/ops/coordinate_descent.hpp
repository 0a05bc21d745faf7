// SPDX-License-Identifier: MIT
/// \file
/// A choice of k that is differentiable: soft top-k by coordinate descent, as in CoLT5.
///
/// lambda_e in [0, 1] says how far score e of n is among the k largest. The maximum of
///
///     sum_e s_e lambda_e + epsilon H(lambda)    over    sum_e lambda_e = k,  0 <= lambda_e <= 1
///
/// is approached by alternate updates of the multipliers a and b_e <= 0,
///
///     a <- epsilon_i (log k - log sum_e exp((s_e + b_e) / epsilon_i)),    at first b_e = -s_e
///     b_e <- -max(s_e + a, 0)
///     epsilon_{i+1} = max(decay * epsilon_i, epsilon)
///     lambda_e = exp((s_e + a + b_e) / epsilon_last)
///
/// As s_e + b_e = min(s_e, -a), only the number a passes from one iteration to the next. k need not
/// be whole. A larger score never has a smaller lambda; scores at the bound have exactly 1.
/// Forbidden scores are left out. The derivative is that of the iterations, not of the maximum that
/// they approach.
///
/// (Lei et al. 2023, arXiv:2304.04947, and Ainslie et al. 2023, arXiv:2303.09752; `coor_descent` of
/// lucidrains' colt5-attention.)
#pragma once

#include <algorithm>
#include <cmath>
#include <limits>
#include <string_view>

#include <weir/core/error.hpp>
#include <weir/core/types.hpp>
#include <weir/ops/exp.hpp>
#include <weir/ops/lanes.hpp>
#include <weir/ops/vector_loops.hpp>

namespace weir {

/// Settings of `coordinate_descent`, by default those of colt5-attention.
struct CoordinateDescentConfig {
  double epsilon = 0.1;  ///< Strength of the entropy. A smaller one makes the choice harder, and
                         ///< needs more iterations or a larger `first_epsilon`.
  Index iterations = 20;
  double first_epsilon = 0.0;  ///< The epsilon of the first iteration; 0 stands for `epsilon`.
  double epsilon_decay = 1.0;  ///< Multiplies that after each iteration, down to `epsilon`.

  /// \param who      The name of the user, for messages.
  /// \throws ConfigError  unless epsilon > 0, first_epsilon is 0 or at least epsilon,
  ///                      0 < epsilon_decay <= 1 and iterations >= 1.
  void check(std::string_view who) const {
    expect_positive(who, "epsilon", epsilon);
    expect_at_least<Index>(who, "iterations", iterations, 1);
    if (first_epsilon != 0.0 && !(first_epsilon >= epsilon && std::isfinite(first_epsilon))) {
      throw_error<ConfigError>(who, ": first_epsilon = ", first_epsilon,
                               ", expected 0 or at least epsilon = ", epsilon);
    }
    if (!(epsilon_decay > 0.0 && epsilon_decay <= 1.0)) {
      throw_error<ConfigError>(who, ": epsilon_decay = ", epsilon_decay,
                               ", expected 0 < epsilon_decay <= 1");
    }
  }

  /// epsilon_i, where i = 0 is the first iteration and i = `iterations` belongs to lambda.
  double epsilon_at(Index i) const {
    const double first = std::max(first_epsilon, epsilon);
    return std::max(first * std::pow(epsilon_decay, static_cast<double>(i)), epsilon);
  }
};

namespace detail {

/// The terms of the sum that an iteration takes the logarithm of, scaled to a largest one of 1.
template <class T>
struct DescentTerms {
  T bound;    ///< -a after the previous iteration.
  T largest;  ///< The largest of min(s_e, bound).
  T epsilon;

  DescentTerms(T top, T a_before, double epsilon_now)
      : bound(-a_before), largest(std::min(top, bound)), epsilon(static_cast<T>(epsilon_now)) {}

  /// exp((min(s_e, bound) - largest) / epsilon); zero for a forbidden score.
  Lanes<T> operator()(const Lanes<T>& s, const Lanes<T>& mark) const {
    const Lanes<T> limit = Lanes<T>{} + bound;
    const Lanes<T> m = s < limit ? s : limit;
    const Lanes<T> e = exp_lanes<T>((m - largest) / epsilon);
    return mark == -std::numeric_limits<T>::infinity() ? Lanes<T>{} : e;
  }

  T sum(const T* scores, const T* marks, Index count) const {
    const auto term = [this](const Lanes<T>& s, const Lanes<T>& mark) -> Lanes<T> {
      return (*this)(s, mark);
    };
    return sum_lanes<T>(count, term, scores, marks);
  }
};

}  // namespace detail

/// Runs the iterations.
///
/// \param scores   [count]. A forbidden one must not be above all others.
/// \param marks    [count], -infinity where the score is forbidden.
/// \param k        Above 0; a k above the number of allowed scores counts as that number.
/// \param a        [config.iterations], the multiplier after each iteration.
template <class T>
void coordinate_descent(const CoordinateDescentConfig& config, const T* scores, const T* marks,
                        Index count, double k, T* a) {
  const auto allowed = static_cast<double>(
      count - std::count(marks, marks + count, -std::numeric_limits<T>::infinity()));
  const T log_k = static_cast<T>(std::log(std::min(k, allowed)));
  const T top = loops::max(count, scores);
  a[0] = static_cast<T>(config.epsilon_at(0)) * (log_k - static_cast<T>(std::log(allowed)));
  for (Index i = 1; i < config.iterations; ++i) {
    const detail::DescentTerms<T> terms(top, a[i - 1], config.epsilon_at(i));
    const T sum = terms.sum(scores, marks, count);
    a[i] = terms.epsilon * (log_k - (terms.largest / terms.epsilon + std::log(sum)));
  }
}

/// lambda of an allowed score, from the multipliers of `coordinate_descent`.
template <class T>
T coordinate_descent_lambda(const CoordinateDescentConfig& config, T score, const T* a) {
  const T beyond = std::min(score + a[config.iterations - 1], T(0));
  return std::exp(beyond / static_cast<T>(config.epsilon_at(config.iterations)));
}

/// Adds to d_scores [count] the gradient of the scores, given that of some of the lambdas.
///
/// \param scores   [count], as `coordinate_descent` had them.
/// \param marks    [count], as `coordinate_descent` had them.
/// \param a        [config.iterations], the result of `coordinate_descent`.
/// \param chosen   [k], the places of the lambdas that have a gradient; none of them is forbidden.
/// \param d_lambda [k]
template <class T>
void add_coordinate_descent_backward(const CoordinateDescentConfig& config, const T* scores,
                                     const T* marks, Index count, const T* a, const Index* chosen,
                                     const T* d_lambda, Index k, T* d_scores) {
  const T last_a = a[config.iterations - 1];
  const T last_epsilon = static_cast<T>(config.epsilon_at(config.iterations));
  T d_a = T(0);
  for (Index i = 0; i < k; ++i) {
    const T s = scores[chosen[i]];
    if (s + last_a > T(0)) continue;
    const T d = d_lambda[i] * coordinate_descent_lambda(config, s, a) / last_epsilon;
    d_scores[chosen[i]] += d;
    d_a += d;
  }
  // With m_e = min(s_e, -a_{i-1}), d a_i / d m_e = -w_e, w the softmax of m / epsilon_i.
  const T top = loops::max(count, scores);
  for (Index i = config.iterations - 1; i > 0 && d_a != T(0); --i) {
    const detail::DescentTerms<T> terms(top, a[i - 1], config.epsilon_at(i));
    const T factor = d_a / terms.sum(scores, marks, count);
    const auto through_score = [&](const Lanes<T>& d, const Lanes<T>& s,
                                   const Lanes<T>& mark) -> Lanes<T> {
      return s <= terms.bound ? d - factor * terms(s, mark) : d;
    };
    const auto through_bound = [&](const Lanes<T>& s, const Lanes<T>& mark) -> Lanes<T> {
      return s <= terms.bound ? Lanes<T>{} : factor * terms(s, mark);
    };
    map_lanes<T>(count, through_score, d_scores, d_scores, scores, marks);
    d_a = sum_lanes<T>(count, through_bound, scores, marks);
  }
}

}  // namespace weir
