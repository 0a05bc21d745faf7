// SPDX-License-Identifier: MIT
/// \file
/// A choice of k that is differentiable: soft top-k by coordinate descent, as in CoLT5.
#pragma once

#include <algorithm>
#include <array>
#include <cmath>
#include <concepts>
#include <limits>
#include <string_view>

#include <weir/core/error.hpp>
#include <weir/core/types.hpp>
#include <weir/ops/exp.hpp>
#include <weir/ops/lanes.hpp>
#include <weir/ops/vector_loops.hpp>

namespace weir {

/// Settings of CoordinateDescent, by default those of colt5-attention.
struct CoordinateDescentConfig {
  double epsilon = 0.1;  ///< Strength of the entropy: the smaller, the harder the choice, and the
                         ///< more iterations it takes, unless the first ones have a larger one.
  Index iterations = 20;
  double first_epsilon = 0.0;  ///< Of the first iteration; 0: epsilon.
  double epsilon_decay = 1.0;  ///< What it is multiplied by after each, until it is epsilon.
};

/// How much of each of n scores is among the k largest, lambda_e in [0, 1]: the maximum of
///
///     sum_e s_e lambda_e + epsilon H(lambda)    over    sum_e lambda_e = k,  0 <= lambda_e <= 1
///
/// approached by alternate updates of the multipliers a and b_e <= 0,
///
///     a <- epsilon_i (log k - log sum_e exp((s_e + b_e) / epsilon_i)),    at first b_e = -s_e
///     b_e <- -max(s_e + a, 0)
///     epsilon_{i+1} = max(decay * epsilon_i, epsilon)
///     lambda_e = exp((s_e + a + b_e) / epsilon_last)
///
/// As s_e + b_e = min(s_e, -a), only the number a passes from one iteration to the next. k need not
/// be whole. Larger scores have no smaller lambda; those at the bound have exactly 1. What is
/// marked as forbidden is left out. The derivative is that of the iterations, not of the maximum
/// that they approach.
///
/// (Lei et al. 2023, arXiv:2304.04947, and Ainslie et al. 2023, arXiv:2303.09752; as `coor_descent`
/// of lucidrains' colt5-attention.)
template <std::floating_point T>
class CoordinateDescent {
 public:
  static constexpr Index kMostIterations = 128;

  /// \throws ConfigError  unless epsilon > 0, first_epsilon is 0 or at least epsilon,
  ///                      0 < epsilon_decay <= 1, and there are 1 to kMostIterations iterations.
  static void check(std::string_view who, const CoordinateDescentConfig& config) {
    expect_positive(who, "epsilon", config.epsilon);
    if (config.iterations < 1 || config.iterations > kMostIterations) {
      fail<ConfigError>(who, ": iterations = ", config.iterations, ", expected 1 to ",
                        kMostIterations);
    }
    if (config.first_epsilon != 0.0 &&
        !(config.first_epsilon >= config.epsilon && std::isfinite(config.first_epsilon))) {
      fail<ConfigError>(who, ": first_epsilon = ", config.first_epsilon,
                        ", expected 0 or at least epsilon = ", config.epsilon);
    }
    if (!(config.epsilon_decay > 0.0 && config.epsilon_decay <= 1.0)) {
      fail<ConfigError>(who, ": epsilon_decay = ", config.epsilon_decay,
                        ", expected 0 < epsilon_decay <= 1");
    }
  }

  /// Runs the iterations.
  /// \param scores   [count]; kept, not copied. What is forbidden has none above all others.
  /// \param marks    [count], -infinity where it is forbidden; kept, not copied.
  /// \param k        0 < k; at most the number of what is not forbidden is taken.
  CoordinateDescent(const CoordinateDescentConfig& config, const T* scores, const T* marks,
                    Index count, double k)
      : iterations_(static_cast<std::size_t>(config.iterations)),
        scores_(scores),
        marks_(marks),
        count_(count),
        top_(loops::max(count, scores)) {
    double epsilon = std::max(config.first_epsilon, config.epsilon);
    const auto allowed = static_cast<double>(
        count - std::count(marks, marks + count, -std::numeric_limits<T>::infinity()));
    const T log_k = static_cast<T>(std::log(std::min(k, allowed)));
    for (std::size_t i = 0; i < iterations_; ++i) {
      epsilon_[i] = static_cast<T>(epsilon);
      const T log_sum =
          i == 0 ? static_cast<T>(std::log(allowed)) : largest(i) / epsilon_[i] + std::log(sum(i));
      a_[i] = epsilon_[i] * (log_k - log_sum);
      epsilon = std::max(epsilon * config.epsilon_decay, config.epsilon);
    }
    last_epsilon_ = static_cast<T>(epsilon);
  }

  /// lambda_e of what is not forbidden.
  T lambda(Index e) const {
    return std::exp(std::min(scores_[e] + a_[iterations_ - 1], T(0)) / last_epsilon_);
  }

  /// Adds to d_scores [count] what the gradient of some of the lambdas makes of it.
  /// \param chosen   [k], whose they are.
  /// \param d_lambda [k]
  void backward(const Index* chosen, const T* d_lambda, Index k, T* d_scores) const {
    T d_a = T(0);
    for (Index i = 0; i < k; ++i) {
      const Index e = chosen[i];
      if (scores_[e] + a_[iterations_ - 1] > T(0)) continue;
      const T d = d_lambda[i] * lambda(e) / last_epsilon_;
      d_scores[e] += d;
      d_a += d;
    }
    // With m_e = min(s_e, -a_{i-1}), d a_i / d m_e = -w_e, w the softmax of m / epsilon_i.
    for (std::size_t i = iterations_ - 1; i > 0 && d_a != T(0); --i) {
      const T before = a_[i - 1];
      const T factor = d_a / sum(i);
      const auto through_score = [&, this](const Lanes<T>& d, const Lanes<T>& s,
                                           const Lanes<T>& mark) -> Lanes<T> {
        return s <= -before ? d - factor * term(s, mark, i) : d;
      };
      const auto through_bound = [&, this](const Lanes<T>& s, const Lanes<T>& mark) -> Lanes<T> {
        return s <= -before ? Lanes<T>{} : factor * term(s, mark, i);
      };
      map_lanes<T>(count_, through_score, d_scores, d_scores, scores_, marks_);
      d_a = sum_lanes<T>(count_, through_bound, scores_, marks_);
    }
  }

 private:
  /// max_e m_e before the update i > 0.
  T largest(std::size_t i) const { return std::min(top_, -a_[i - 1]); }

  /// exp((m_e - largest) / epsilon_i) for scores s_e; zero for what is forbidden.
  Lanes<T> term(const Lanes<T>& s, const Lanes<T>& mark, std::size_t i) const {
    const Lanes<T> bound = Lanes<T>{} - a_[i - 1];
    const Lanes<T> m = s < bound ? s : bound;
    const Lanes<T> e = exp_lanes<T>((m - largest(i)) / epsilon_[i]);
    return mark == -std::numeric_limits<T>::infinity() ? Lanes<T>{} : e;
  }

  T sum(std::size_t i) const {
    const auto f = [&, this](const Lanes<T>& s, const Lanes<T>& mark) -> Lanes<T> {
      return term(s, mark, i);
    };
    return sum_lanes<T>(count_, f, scores_, marks_);
  }

  std::size_t iterations_;
  const T* scores_;
  const T* marks_;
  Index count_;
  T top_;
  std::array<T, kMostIterations> a_;        // After each update.
  std::array<T, kMostIterations> epsilon_;  // Of each update.
  T last_epsilon_ = T(0);                   // Of lambda.
};

}  // namespace weir
