// SPDX-License-Identifier: MIT
/// \file
/// Scaling and capping of logits, as some models do it at the end.
#pragma once

#include <cmath>
#include <concepts>
#include <string_view>

#include <weir/core/error.hpp>
#include <weir/core/types.hpp>
#include <weir/ops/lanes.hpp>
#include <weir/ops/rows.hpp>
#include <weir/ops/tanh.hpp>
#include <weir/ops/vector_loops.hpp>

namespace weir {

/// Logits z scaled, and kept below a cap in size:
///
///     l = m z                        without a cap
///     l = c tanh(m z / c)            with the softcap c
///
/// Grok-1: m = 1 / sqrt(3) (xai-org/grok-1, run.py); Gemma 2: c = 30 (Gemma Team 2024,
/// arXiv:2408.00118, section 2).
template <std::floating_point T>
struct LogitScale {
  double multiplier = 1.0;  ///< m, above 0.
  double softcap = 0.0;     ///< c; 0 stands for none.

  /// Whether logits stay as they are.
  bool is_identity() const { return multiplier == 1.0 && softcap == 0.0; }

  /// \param logits  Like z; may be z.
  void forward(MatrixIn<T> z, MatrixOut<T> logits) const;

  /// The derivative of `forward`:
  ///
  ///     dz = m dl                      without a cap
  ///     dz = m (1 - (l / c)^2) dl      with the softcap c
  ///
  /// \param logits  The result of `forward`.
  /// \param dz      Like d_logits; may be d_logits.
  void backward(MatrixIn<T> logits, MatrixIn<T> d_logits, MatrixOut<T> dz) const;

  /// \throws ConfigError  unless the multiplier is positive, the softcap not negative, and both
  ///                      finite.
  void check(std::string_view where) const {
    expect_positive(where, "logit_multiplier", multiplier);
    expect_at_least(where, "logit_softcap", softcap, 0.0);
  }
};

template <std::floating_point T>
void LogitScale<T>::forward(MatrixIn<T> z, MatrixOut<T> logits) const {
  const T m = static_cast<T>(softcap > 0.0 ? multiplier / softcap : multiplier);
  const T c = static_cast<T>(softcap);
  const auto capped = [=](const Lanes<T>& v) -> Lanes<T> { return c * tanh_lanes<T>(m * v); };
  parallel_pieces(z.rows(), z.cols(), 8, [&](Index t, Index col, Index count) {
    if (c == T(0)) {
      loops::scale<T>(count, m, &z.coeffRef(t, col), &logits(t, col));
    } else {
      map_lanes<T>(count, capped, &logits(t, col), &z.coeffRef(t, col));
    }
  });
}

template <std::floating_point T>
void LogitScale<T>::backward(MatrixIn<T> logits, MatrixIn<T> d_logits, MatrixOut<T> dz) const {
  const T m = static_cast<T>(multiplier);
  const T inverse = softcap > 0.0 ? static_cast<T>(1.0 / softcap) : T(0);
  parallel_pieces(logits.rows(), logits.cols(), 4, [&](Index t, Index col, Index count) {
    const auto f = [=](const Lanes<T>& l, const Lanes<T>& d) -> Lanes<T> {
      const Lanes<T> tanh = inverse * l;
      return m * (T(1) - tanh * tanh) * d;
    };
    map_lanes<T>(count, f, &dz(t, col), &logits.coeffRef(t, col), &d_logits.coeffRef(t, col));
  });
}

}  // namespace weir

#ifdef WEIR_COMPILED
extern template struct weir::LogitScale<float>;
extern template struct weir::LogitScale<double>;
#endif
