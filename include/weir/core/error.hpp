// SPDX-License-Identifier: MIT
/// \file
/// How the library reports misuse: by an exception whose message names the parameter, the value it
/// has and the value it should have.
#pragma once

#include <cmath>
#include <concepts>
#include <cstddef>
#include <cstdio>
#include <initializer_list>
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

namespace detail {

/// A part of a message: text that lies elsewhere, or a number, which is formatted here. A call of
/// `throw_error` compiles to these constructors, so that no caller formats anything itself.
class MessagePart {
 public:
  // NOLINTBEGIN(cppcoreguidelines-pro-type-member-init): text has no need of `number_`.
  MessagePart(std::string_view text) : text_(text) {}  // NOLINT(google-explicit-constructor)
  MessagePart(const char* text) : text_(text) {}       // NOLINT(google-explicit-constructor)
  [[gnu::cold]] explicit MessagePart(double value) {
    // A NaN has a sign, too, which depends on the compiler.
    const double shown = std::isnan(value) ? std::abs(value) : value;
    set_length(std::snprintf(number_, sizeof number_, "%g", shown));
  }
  [[gnu::cold]] explicit MessagePart(long long value) {
    set_length(std::snprintf(number_, sizeof number_, "%lld", value));
  }
  [[gnu::cold]] explicit MessagePart(unsigned long long value) {
    set_length(std::snprintf(number_, sizeof number_, "%llu", value));
  }
  // NOLINTEND(cppcoreguidelines-pro-type-member-init)
  template <std::floating_point V>
  explicit MessagePart(V value) : MessagePart(static_cast<double>(value)) {}
  template <std::signed_integral V>
  explicit MessagePart(V value) : MessagePart(static_cast<long long>(value)) {}
  template <std::unsigned_integral V>
  explicit MessagePart(V value) : MessagePart(static_cast<unsigned long long>(value)) {}
  MessagePart(char) = delete;

  MessagePart(const MessagePart&) = delete;  // The text may be that of the object itself.
  MessagePart& operator=(const MessagePart&) = delete;

  std::string_view text() const { return text_; }

 private:
  void set_length(int length) { text_ = {number_, static_cast<std::size_t>(length)}; }

  std::string_view text_;
  char number_[24];  // NOLINT(modernize-avoid-c-arrays): no more than 20 digits and a sign.
};

[[gnu::cold]] inline std::string join(std::initializer_list<MessagePart> parts) {
  std::string text;
  for (const MessagePart& part : parts) text += part.text();
  return text;
}

template <class Error>
[[noreturn, gnu::cold, gnu::noinline]] void raise(std::initializer_list<MessagePart> parts) {
  throw Error(join(parts));
}

}  // namespace detail

/// Formats `parts`, which are text and numbers, one after the other and throws them as an `Error`.
template <class Error, class... Parts>
[[noreturn, gnu::cold]] void throw_error(
    Parts... parts) {  // By value, so that arrays of any length become one type.
  detail::raise<Error>({detail::MessagePart(parts)...});
}

namespace detail {

[[gnu::cold]] inline std::string shape_text(Index rows, Index cols) {
  return join({MessagePart("["), MessagePart(rows), MessagePart(", "), MessagePart(cols),
               MessagePart("]")});
}

[[noreturn, gnu::cold, gnu::noinline]] inline void fail_shape(std::string_view where,
                                                              std::string_view name, Index is_rows,
                                                              Index is_cols,
                                                              std::string_view expected) {
  throw_error<ShapeError>(where, ": ", name, " is ", shape_text(is_rows, is_cols), ", expected ",
                          expected);
}

[[noreturn, gnu::cold, gnu::noinline]] inline void fail_columns(std::string_view where,
                                                                std::string_view name,
                                                                Index is_rows, Index is_cols,
                                                                Index cols) {
  throw_error<ShapeError>(where, ": ", name, " is ", shape_text(is_rows, is_cols),
                          ", expected [tokens, ", cols, "]");
}

}  // namespace detail

/// "[rows, cols]" for use in a message.
template <class M>
std::string shape_of(const M& m) {
  return detail::shape_text(m.rows(), m.cols());
}

/// \throws ShapeError   unless `m`, the argument `name` of `where`, is [tokens, cols], with any
///                      number of tokens.
template <class M>
void expect_columns(std::string_view where, std::string_view name, const M& m, Index cols) {
  if (m.cols() != cols) detail::fail_columns(where, name, m.rows(), m.cols(), cols);
}

/// \throws ShapeError   unless `m`, the argument `name` of `where`, is [rows, cols].
template <class M>
void expect_shape(std::string_view where, std::string_view name, const M& m, Index rows,
                  Index cols) {
  if (m.rows() != rows || m.cols() != cols) {
    detail::fail_shape(where, name, m.rows(), m.cols(), detail::shape_text(rows, cols));
  }
}

namespace detail {

/// Introduces the expected value in a message; floating-point numbers also have to be finite.
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
  throw_error<ConfigError>(where, ": ", name, " = ", value, detail::kExpectedNumber<V>,
                           ">= ", least);
}

/// \throws ConfigError  unless `value`, the setting `name` of `where`, is finite and above zero.
template <class V>
void expect_positive(std::string_view where, std::string_view name, V value) {
  if (value > V(0) && detail::is_finite(value)) return;
  throw_error<ConfigError>(where, ": ", name, " = ", value, detail::kExpectedNumber<V>, "> 0");
}

/// \throws ConfigError  unless `value`, the setting `name` of `where`, is finite.
template <class V>
void expect_finite(std::string_view where, std::string_view name, V value) {
  if (std::isfinite(value)) return;
  throw_error<ConfigError>(where, ": ", name, " = ", value, ", expected a finite number");
}

/// \throws ConfigError  unless low <= `value` <= high, `value` being the setting `name` of `where`.
template <class V>
void expect_in(std::string_view where, std::string_view name, V value, V low, V high) {
  if (value >= low && value <= high) return;
  throw_error<ConfigError>(where, ": ", name, " = ", value, ", expected ", low, " <= ", name,
                           " <= ", high);
}

/// \throws ConfigError  unless 0 <= `value` < 1, `value` being the setting `name` of `where`.
template <class V>
void expect_fraction(std::string_view where, std::string_view name, V value) {
  if (value >= V(0) && value < V(1)) return;
  throw_error<ConfigError>(where, ": ", name, " = ", value, ", expected 0 <= ", name, " < 1");
}

}  // namespace weir
