// SPDX-License-Identifier: MIT
/// \file
/// How the library reports misuse: an exception whose message names the
/// parameter, the value it has and the value it should have.
#pragma once

#include <cmath>
#include <sstream>
#include <stdexcept>
#include <string>
#include <string_view>
#include <type_traits>

#include <weir/core/types.hpp>

namespace weir {

/// A matrix argument does not have the documented shape.
class ShapeError : public std::invalid_argument {
  using std::invalid_argument::invalid_argument;
};

/// A configuration value is out of range or contradicts another.
class ConfigError : public std::invalid_argument {
  using std::invalid_argument::invalid_argument;
};

/// A value that has to be finite is NaN or infinite.
class NonFiniteError : public std::domain_error {
  using std::domain_error::domain_error;
};

/// A call came out of order, such as `backward` before any `forward`.
class StateError : public std::logic_error {
  using std::logic_error::logic_error;
};

/// Formats `parts` one after the other and throws them as an `Error`.
template <class Error, class... Parts>
[[noreturn]] void fail(const Parts&... parts) {
  std::ostringstream message;
  (message << ... << parts);
  throw Error(message.str());
}

/// "[rows, cols]" for use in a message.
template <class M>
std::string shape_of(const M& m) {
  std::ostringstream text;
  text << "[" << m.rows() << ", " << m.cols() << "]";
  return text.str();
}

/// \throws ShapeError   unless `m`, the argument `name` of `where`, is [any number of tokens,
/// cols].
template <class M>
void expect_columns(std::string_view where, std::string_view name, const M& m, Index cols) {
  if (m.cols() != cols) {
    fail<ShapeError>(where, ": ", name, " is ", shape_of(m), ", expected [tokens, ", cols, "]");
  }
}

/// \throws ShapeError   unless `m`, the argument `name` of `where`, is [rows, cols].
template <class M>
void expect_shape(std::string_view where, std::string_view name, const M& m, Index rows,
                  Index cols) {
  if (m.rows() != rows || m.cols() != cols) {
    fail<ShapeError>(where, ": ", name, " is ", shape_of(m), ", expected [", rows, ", ", cols, "]");
  }
}

namespace detail {

/// Begins what a message says of the values that are expected: numbers have to be finite.
template <class V>
constexpr std::string_view kExpectedNumber =
    std::is_floating_point_v<V> ? ", expected a finite number " : ", expected ";

template <class V>
bool is_finite(V value) {
  if constexpr (std::is_floating_point_v<V>) {
    return std::isfinite(value);
  } else {
    return true;
  }
}

}  // namespace detail

/// \throws ConfigError  unless `value`, the setting `name` of `where`, is finite and at least
///                      `least`.
template <class V>
void expect_at_least(std::string_view where, std::string_view name, V value, V least) {
  if (value >= least && detail::is_finite(value)) return;
  fail<ConfigError>(where, ": ", name, " = ", value, detail::kExpectedNumber<V>, ">= ", least);
}

/// \throws ConfigError  unless `value`, the setting `name` of `where`, is finite and above zero.
template <class V>
void expect_positive(std::string_view where, std::string_view name, V value) {
  if (value > V(0) && detail::is_finite(value)) return;
  fail<ConfigError>(where, ": ", name, " = ", value, detail::kExpectedNumber<V>, "> 0");
}

/// \throws ConfigError  unless `value`, the setting `name` of `where`, is finite.
template <class V>
void expect_finite(std::string_view where, std::string_view name, V value) {
  if (std::isfinite(value)) return;
  fail<ConfigError>(where, ": ", name, " = ", value, ", expected a finite number");
}

/// \throws ConfigError  unless low <= `value` <= high, `value` being the setting `name` of `where`.
template <class V>
void expect_in(std::string_view where, std::string_view name, V value, V low, V high) {
  if (value >= low && value <= high) return;
  fail<ConfigError>(where, ": ", name, " = ", value, ", expected ", low, " <= ", name,
                    " <= ", high);
}

/// \throws ConfigError  unless 0 <= `value` < 1, `value` being the setting `name` of `where`.
template <class V>
void expect_fraction(std::string_view where, std::string_view name, V value) {
  if (value >= V(0) && value < V(1)) return;
  fail<ConfigError>(where, ": ", name, " = ", value, ", expected 0 <= ", name, " < 1");
}

}  // namespace weir
