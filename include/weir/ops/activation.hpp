// SPDX-License-Identifier: MIT
/// \file
/// Elementwise functions on contiguous numbers: activations with their derivatives, and the blocks
/// of lanes that they, the softmax and the norms are computed in.
#pragma once

#include <algorithm>
#include <cmath>
#include <concepts>
#include <limits>
#include <numbers>
#include <string_view>

#include <weir/core/parallel.hpp>
#include <weir/core/types.hpp>

namespace weir {

/// As many numbers as the widest vector register holds. Eigen treats the ends of an unaligned array
/// with other code than its middle, which rounds differently; in blocks of fixed size an element
/// gets the same bits wherever it lies in memory.
template <class T>
using Lanes = Eigen::Array<T, 64 / sizeof(T), 1>;

/// How many numbers a block of lanes has.
template <class T>
inline constexpr Index kLanes = Lanes<T>::SizeAtCompileTime;

/// The `count` <= kLanes numbers from `from` on, followed by zeros.
template <class T>
Lanes<T> load_lanes(const T* from, Index count) {
  if (count >= kLanes<T>) return Eigen::Map<const Lanes<T>>(from);
  Lanes<T> lanes = Lanes<T>::Zero();
  for (Index i = 0; i < count; ++i) lanes[i] = from[i];
  return lanes;
}

/// The first `count` <= kLanes lanes to `to`.
template <class T>
void store_lanes(const Lanes<T>& lanes, T* to, Index count) {
  if (count >= kLanes<T>) {
    Eigen::Map<Lanes<T>>{to} = lanes;
  } else {
    for (Index i = 0; i < count; ++i) to[i] = lanes[i];
  }
}

/// out[i] = f(in[i]...) for i in [0, count), `f` being given and returning `Lanes<T>`. `out` may be
/// one of the inputs.
template <class T, class F, class... In>
void map_lanes(Index count, F&& f, T* out, const In*... in) {
  Index i = 0;
  for (; i + kLanes<T> <= count; i += kLanes<T>) {
    store_lanes<T>(f(load_lanes<T>(in + i, kLanes<T>)...), out + i, kLanes<T>);
  }
  if (i < count) store_lanes<T>(f(load_lanes<T>(in + i, count - i)...), out + i, count - i);
}

/// The sum of f(in[i]...) for i in [0, count), in an order that depends on `count` alone.
template <class T, class F, class... In>
T sum_lanes(Index count, F&& f, const T* first, const In*... in) {
  Lanes<T> sum = Lanes<T>::Zero();
  Index i = 0;
  for (; i + kLanes<T> <= count; i += kLanes<T>) {
    sum += f(load_lanes<T>(first + i, kLanes<T>), load_lanes<T>(in + i, kLanes<T>)...);
  }
  if (i < count) {
    const Lanes<T> last =
        f(load_lanes<T>(first + i, count - i), load_lanes<T>(in + i, count - i)...);
    for (Index lane = 0; lane < count - i; ++lane) sum[lane] += last[lane];
  }
  return sum.sum();
}

/// Calls `body(row, col, count)` for pieces of at most 1024 columns that cover [rows, cols], on all
/// threads: elementwise work in steps that stay in L1, shared out even if there is only one row.
/// `cost` is roughly how many elementary operations one element takes.
template <class Body>
void parallel_pieces(Index rows, Index cols, Index cost, Body&& body) {
  constexpr Index kPiece = 1024;
  const Index per_row = (cols + kPiece - 1) / kPiece;
  parallel_rows(rows * per_row, cost * std::min(cols, kPiece), [&](Index begin, Index end) {
    for (Index i = begin; i < end; ++i) {
      const Index col = i % per_row * kPiece;
      body(i / per_row, col, std::min(kPiece, cols - col));
    }
  });
}

/// out[j] += sum_t f(t, j, count) for j in [0, cols), `f` giving the `count` lanes from column j on
/// of row t: the gradient of what all rows share. Threads divide the columns, rows are added from
/// the first to the last.
template <class T, class F>
void add_over_rows(Index rows, Index cols, T* out, F&& f) {
  constexpr Index kBlocks = 4;  // Side by side, so that whole cache lines are read.
  constexpr Index kWidth = kBlocks * kLanes<T>;
  parallel_rows((cols + kWidth - 1) / kWidth, rows * kWidth, [&](Index begin, Index end) {
    for (Index first = begin * kWidth; first < std::min(cols, end * kWidth); first += kWidth) {
      Lanes<T> sum[kBlocks];
      for (Lanes<T>& lanes : sum) lanes.setZero();
      for (Index t = 0; t < rows; ++t) {
        for (Index b = 0; b < kBlocks; ++b) {
          const Index col = first + b * kLanes<T>;
          if (col < cols) sum[b] += f(t, col, std::min(kLanes<T>, cols - col));
        }
      }
      for (Index b = 0; b < kBlocks; ++b) {
        const Index col = first + b * kLanes<T>;
        if (col >= cols) break;
        const Index count = std::min(kLanes<T>, cols - col);
        store_lanes<T>(load_lanes<T>(out + col, count) + sum[b], out + col, count);
      }
    }
  });
}

/// max(x, 0); a NaN stays a NaN.
template <class T>
Lanes<T> rectify_lanes(const Lanes<T>& x) {
  Lanes<T> y;
  for (Index i = 0; i < kLanes<T>; ++i) y[i] = x[i] < T(0) ? T(0) : x[i];
  return y;
}

/// exp(x), but exactly zero where it would be below the normal numbers, also for x = -inf. (Eigen's
/// vector code stops at the edge of what a number can hold.)
template <class T>
Lanes<T> exp_lanes(const Lanes<T>& x) {
  return rectify_lanes<T>(x.exp() - std::numeric_limits<T>::min());
}

/// 1 / (1 + exp(-x)).
template <class T>
Lanes<T> sigmoid_lanes(const Lanes<T>& x) {
  return (T(1) + exp_lanes<T>(-x)).inverse();
}

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
    for (Index i = 0; i < count; ++i) {
      const T x = z[i];
      da[i] = x > T(0) ? T(1) : (x <= T(0) ? T(0) : x);
    }
  }
};

/// f(z) = max(z, 0)^2. (So et al. 2021, arXiv:2109.08668.)
struct SquaredRelu {
  static constexpr std::string_view kName = "relu2";

  template <class T>
  static void value(Index count, const T* z, T* a) {
    const auto f = [](const Lanes<T>& x) -> Lanes<T> { return rectify_lanes<T>(x).square(); };
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
    for (Index i = 0; i < count; ++i) a[i] = z[i] * normal_cdf(z[i]);
  }

  template <class T>
  static void derivative(Index count, const T* z, T* da) {
    const auto f = [](const Lanes<T>& x) -> Lanes<T> {
      Lanes<T> cdf;
      for (Index lane = 0; lane < kLanes<T>; ++lane) cdf[lane] = normal_cdf(x[lane]);
      return cdf + kDensityAtZero<T> * x * exp_lanes<T>(T(-0.5) * x * x);
    };
    map_lanes<T>(count, f, da, z);
  }

 private:
  template <class T>
  static constexpr T kDensityAtZero = std::numbers::inv_sqrtpi_v<T> / std::numbers::sqrt2_v<T>;

  template <class T>
  static T normal_cdf(T z) {
    return T(0.5) * std::erfc(-z / std::numbers::sqrt2_v<T>);
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

  /// sigmoid(2u), which unlike 1 + tanh(u) keeps its digits where it is small.
  template <class T>
  static Lanes<T> gate(const Lanes<T>& x) {
    return sigmoid_lanes<T>(x * (kSlope<T> + kCubic<T> * x * x));
  }
};

}  // namespace weir
