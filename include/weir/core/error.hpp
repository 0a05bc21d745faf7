// SPDX-License-Identifier: MIT
/// \file
/// How the library reports misuse: an exception whose message names the
/// parameter, the value it has and the value it should have.
#pragma once

#include <sstream>
#include <stdexcept>
#include <string>
#include <string_view>

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

/// \throws ConfigError  unless `value`, the setting `name` of `where`, is at least `least`.
template <class V>
void expect_at_least(std::string_view where, std::string_view name, V value, V least) {
  if (!(value >= least)) {
    fail<ConfigError>(where, ": ", name, " = ", value, ", expected >= ", least);
  }
}

/// \throws ConfigError  unless `value`, the setting `name` of `where`, is above zero.
template <class V>
void expect_positive(std::string_view where, std::string_view name, V value) {
  if (!(value > V(0))) fail<ConfigError>(where, ": ", name, " = ", value, ", expected > 0");
}

}  // namespace weir
