// SPDX-License-Identifier: MIT
/// \file
/// Inputs for tests and ways to compare results.
#pragma once

#include <cmath>
#include <cstdint>
#include <exception>
#include <functional>
#include <string>

#include <weir/core/init.hpp>
#include <weir/core/types.hpp>

namespace weir::test {

/// [rows, cols] of standard normal numbers, the same for the same seed.
template <class T = double>
Matrix<T> random_matrix(Index rows, Index cols, std::uint64_t seed) {
  Rng rng(seed);
  return normal_init<T>(rows, cols, 1.0, rng);
}

/// ||a - b|| / ||b||, or ||a - b|| where b is zero; infinite where shapes differ.
template <class A, class B>
double relative_error(const A& a, const B& b) {
  if (a.rows() != b.rows() || a.cols() != b.cols()) return HUGE_VAL;
  if (a.size() == 0) return 0.0;
  const auto norm = static_cast<double>(b.norm());
  const auto error = static_cast<double>((a - b).norm());
  return norm > 0.0 ? error / norm : error;
}

/// The message of the `Error` that `action` throws, or what happened instead.
template <class Error>
std::string message_of(const std::function<void()>& action) {
  try {
    action();
  } catch (const Error& error) {
    return error.what();
  } catch (const std::exception& other) {
    return std::string("another exception: ") + other.what();
  }
  return "no exception";
}

}  // namespace weir::test
