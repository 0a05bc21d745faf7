// SPDX-License-Identifier: MIT
/// \file
/// Elementwise functions of activations, with their derivatives.
#pragma once

#include <concepts>
#include <numbers>
#include <string_view>

#include <weir/core/types.hpp>
#include <weir/ops/exp.hpp>
#include <weir/ops/lanes.hpp>
#include <weir/ops/normal.hpp>
#include <weir/ops/vector_loops.hpp>

namespace weir {

/// A function of one number and its derivative, both over contiguous arrays. Kinds are types, so a
/// new activation is a struct like these.
///
///     value(count, z, a)          a[i]  = f(z[i])
///     derivative(count, z, da)    da[i] = f'(z[i])
///
/// The output may be the input. A NaN stays a NaN.
template <class A>
concept Activation = requires(Index count, const float* z, float* out, const double* z64,
                              double* out64) {
  { A::kName } -> std::convertible_to<std::string_view>;
  A::value(count, z, out);
  A::derivative(count, z, out);
  A::value(count, z64, out64);
  A::derivative(count, z64, out64);
};

/// f(z) = max(z, 0), with f'(0) = 0.
struct Relu {
  static constexpr std::string_view kName = "relu";

  template <class T>
  static void value(Index count, const T* z, T* a) {
    map_lanes<T>(count, rectify_lanes<T>, a, z);
  }

  template <class T>
  static void derivative(Index count, const T* z, T* da) {
    const auto f = [](const Lanes<T>& x) -> Lanes<T> {
      return x > T(0) ? Lanes<T>{} + T(1) : (x <= T(0) ? Lanes<T>{} : x);
    };
    map_lanes<T>(count, f, da, z);
  }
};

/// f(z) = max(z, 0)^2. (So et al. 2021, arXiv:2109.08668.)
struct SquaredRelu {
  static constexpr std::string_view kName = "relu2";

  template <class T>
  static void value(Index count, const T* z, T* a) {
    const auto f = [](const Lanes<T>& x) -> Lanes<T> {
      const Lanes<T> positive = rectify_lanes<T>(x);
      return positive * positive;
    };
    map_lanes<T>(count, f, a, z);
  }

  template <class T>
  static void derivative(Index count, const T* z, T* da) {
    const auto f = [](const Lanes<T>& x) -> Lanes<T> { return T(2) * rectify_lanes<T>(x); };
    map_lanes<T>(count, f, da, z);
  }
};

/// f(z) = z sigmoid(z), also called swish. (Hendrycks & Gimpel 2016, arXiv:1606.08415.)
struct Silu {
  static constexpr std::string_view kName = "silu";

  template <class T>
  static void value(Index count, const T* z, T* a) {
    const auto f = [](const Lanes<T>& x) -> Lanes<T> { return x * sigmoid_lanes<T>(x); };
    map_lanes<T>(count, f, a, z);
  }

  template <class T>
  static void derivative(Index count, const T* z, T* da) {
    const auto f = [](const Lanes<T>& x) -> Lanes<T> {
      const Lanes<T> s = sigmoid_lanes<T>(x);
      return s * (T(1) + x * (T(1) - s));
    };
    map_lanes<T>(count, f, da, z);
  }
};

/// f(z) = z Phi(z), Phi the distribution function of the standard normal, exact.
/// (Hendrycks & Gimpel 2016, arXiv:1606.08415, section 2.)
struct Gelu {
  static constexpr std::string_view kName = "gelu";

  template <class T>
  static void value(Index count, const T* z, T* a) {
    const auto f = [](const Lanes<double>& x) -> Lanes<double> {
      return x * normal_lanes<T>(x).cdf;
    };
    map_as_double<T>(count, f, a, z);
  }

  template <class T>
  static void derivative(Index count, const T* z, T* da) {
    const auto f = [](const Lanes<double>& x) -> Lanes<double> {
      const NormalLanes normal = normal_lanes<T>(x);
      return normal.cdf + x * normal.density;
    };
    map_as_double<T>(count, f, da, z);
  }
};

/// The approximation of `Gelu` that GPT-2 and its descendants were trained with:
///
///     f(z) = z/2 (1 + tanh(u)) = z sigmoid(2u),   u = sqrt(2 / pi) (z + 0.044715 z^3)
///
/// (Hendrycks & Gimpel 2016, arXiv:1606.08415, section 2.)
struct GeluTanh {
  static constexpr std::string_view kName = "gelu_tanh";

  template <class T>
  static void value(Index count, const T* z, T* a) {
    const auto f = [](const Lanes<T>& x) -> Lanes<T> { return x * gate<T>(x); };
    map_lanes<T>(count, f, a, z);
  }

  template <class T>
  static void derivative(Index count, const T* z, T* da) {
    const auto f = [](const Lanes<T>& x) -> Lanes<T> {
      const Lanes<T> s = gate<T>(x);
      return s + x * s * (T(1) - s) * (kSlope<T> + T(3) * kCubic<T> * x * x);
    };
    map_lanes<T>(count, f, da, z);
  }

 private:
  /// 2u = kSlope z + kCubic z^3.
  template <class T>
  static constexpr T kSlope = T(2) * std::numbers::sqrt2_v<T>* std::numbers::inv_sqrtpi_v<T>;
  template <class T>
  static constexpr T kCubic = T(0.044715) * kSlope<T>;

  /// sigmoid(2u), which keeps its digits where it is small; 1 + tanh(u) would lose them.
  template <class T>
  static Lanes<T> gate(const Lanes<T>& x) {
    return sigmoid_lanes<T>(x * (kSlope<T> + kCubic<T> * x * x));
  }
};

}  // namespace weir
