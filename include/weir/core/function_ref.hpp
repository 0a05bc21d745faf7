// SPDX-License-Identifier: MIT
/// \file
/// A function handed to a loop without making the loop a template.
#pragma once

#include <memory>
#include <type_traits>
#include <utility>

namespace weir {

template <class Signature>
class FunctionRef;

/// Refers to something that can be called, which has to outlive it: a parameter type for functions
/// that take a lambda, such as the body of a loop. Such a function is compiled once, not once for
/// each lambda. Each call is indirect, so the body should be long enough to be worth it.
template <class Result, class... Args>
class FunctionRef<Result(Args...)> {
 public:
  template <class F>
  // NOLINTNEXTLINE(google-explicit-constructor, bugprone-forwarding-reference-overload)
  requires(!std::is_same_v<std::remove_cvref_t<F>, FunctionRef>) FunctionRef(F&& f)
      : object_(const_cast<void*>(static_cast<const void*>(std::addressof(f)))),
        call_(&call<std::remove_reference_t<F>>) {}

  Result operator()(Args... args) const { return call_(object_, args...); }

 private:
  template <class F>
  static Result call(void* object, Args... args) {
    return static_cast<Result>((*static_cast<F*>(object))(args...));
  }

  void* object_;
  Result (*call_)(void*, Args...);
};

}  // namespace weir
