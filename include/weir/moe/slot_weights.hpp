// SPDX-License-Identifier: MIT
/// \file
/// How much of each token goes into each slot of SoftMoE, and of each slot into each token.
#pragma once

#include <cmath>
#include <concepts>
#include <limits>
#include <utility>
#include <vector>

#include <weir/core/error.hpp>
#include <weir/core/index_span.hpp>
#include <weir/core/init.hpp>
#include <weir/core/parallel.hpp>
#include <weir/core/parameter.hpp>
#include <weir/core/pass.hpp>
#include <weir/core/scratch.hpp>
#include <weir/core/token_rows.hpp>
#include <weir/core/types.hpp>
#include <weir/kernels/matmul.hpp>
#include <weir/ops/rows.hpp>
#include <weir/ops/softmax.hpp>
#include <weir/ops/unit_rows.hpp>
#include <weir/ops/vector_loops.hpp>

namespace weir {

/// The weights of SoftMoE. For each sequence X [m, d_model]:
///
///     L = X Phi^T   [m, slots]   or, normalised,   L = scale * X^ Phi^^T
///     D = softmax over tokens of L,   C = softmax over slots of L
///
/// X^ and Phi^ are X and Phi with each row divided by its length plus epsilon; a row of zeros stays
/// what it is. Padding has no weight.
/// (Puigcerver et al. 2023, arXiv:2308.00951, eq. 1-3 and algorithm 2.)
template <std::floating_point T>
class SlotWeights {
 public:
  using Scalar = T;

  struct Cache {
    TokenRows rows;
    Matrix<T> x, unit_x;             ///< [tokens, d_model], zero for padding.
    Matrix<T> unit_phi, scaled_phi;  ///< [slots, d_model]
    Matrix<T> logits, combine;       ///< [tokens, slots]; combine is C.
    Scratch<T> dispatch;             ///< D^T, [slots, m] for each sequence in turn.
    Matrix<T> d_combine;             ///< Input of `backward`.
    Scratch<T> d_dispatch;           ///< Input of `backward`, laid out as `dispatch`.
    Scratch<T> d_transposed;
    Matrix<T> d_logits, d_unit_x, d_phi;
    std::vector<Product<T>> products;

    /// Calls `body(s, first token, tokens)` for each sequence that has tokens.
    template <class Body>
    void for_each_sequence(Body&& body) const {
      Index s = 0;
      rows.for_each_group(Scope::kSequence, [&](Index begin, Index end) {
        if (end > begin) body(s, begin, end - begin);
        ++s;
      });
    }

    /// The part [slots, m] of a sequence's m tokens from `begin` on.
    Eigen::Map<Matrix<T>> part_of(Scratch<T>& all, Index begin, Index m) const {
      return {all.data() + begin * logits.cols(), logits.cols(), m};
    }

    /// `to` = `from`, with zeros in the rows of padding, which may hold anything.
    void copy_real(MatrixIn<T> from, Matrix<T>& to) const {
      copy_rows<T>(from, to);
      for (Index t = 0; t < to.rows(); ++t) {
        if (rows.is_padding(t)) to.row(t).setZero();
      }
    }
  };

  /// \param phi      [slots, d_model]
  /// \param scale    The initial scale of normalised logits.
  SlotWeights(Matrix<T> phi, bool normalise, double scale, double epsilon)
      : epsilon_(static_cast<T>(epsilon)), phi_{std::move(phi)} {
    if (normalise) scale_.value.setConstant(1, 1, static_cast<T>(scale));
  }

  /// Sets `cache.combine` and `cache.dispatch`.
  /// \throws ShapeError      if the pass does not fit x.
  /// \throws NonFiniteError  if a logit of a real token is not finite.
  void forward(MatrixIn<T> x, const Pass& pass, Cache& cache) const;

  /// Turns `cache.d_combine` and `cache.d_dispatch` into gradients of Phi, scale and x, the last of
  /// which is added to dx.
  void backward(Cache& cache, Matrix<T>& dx);

  /// Parameters `phi` and, where logits are normalised, `scale`.
  template <class Self, class Visit>
  static void visit(Self& self, Visit& visit) {
    visit("phi", self.phi_);
    if (self.is_normalised()) visit("scale", self.scale_);
  }

  Index slots() const { return phi_.value.rows(); }
  Index d_model() const { return phi_.value.cols(); }
  bool is_normalised() const { return scale_.value.size() != 0; }

 private:
  /// 1 / (length + epsilon), or zero for the length of a row that counts as zero.
  T inverse(T length) const {
    return length < std::numeric_limits<T>::min() ? T(0) : T(1) / (length + epsilon_);
  }

  /// unit = factor * v / (|v| + epsilon).
  void unit_row(T factor, const T* v, T* unit) const {
    const T by = inverse(safe_norm<T>(d_model(), v));
    const auto f = [=](const Lanes<T>& a) -> Lanes<T> { return factor * (by * a); };
    map_lanes<T>(d_model(), f, unit, v);
  }

  /// dv += factor * (du - v (du . v) / (|v| (|v| + epsilon))) / (|v| + epsilon).
  void add_unit_backward(T factor, const T* v, const T* du, T* dv) const;

  void compute_logits(Cache& cache) const;

  void expect_finite_logits(const Cache& cache) const;

  /// Computes the softmax over the m tokens of a sequence from `begin` on.
  void weigh_tokens(Index begin, Index m, Cache& cache) const;

  /// Computes the derivative of both softmaxes.
  void compute_d_logits(Cache& cache) const;

  T epsilon_;
  Parameter<T> phi_;    // [slots, d_model]
  Parameter<T> scale_;  // [1, 1], or empty.
};

template <std::floating_point T>
void SlotWeights<T>::forward(MatrixIn<T> x, const Pass& pass, Cache& cache) const {
  cache.rows.set("SoftMoE::forward", pass, x.rows());
  cache.copy_real(x, cache.x);
  compute_logits(cache);
  expect_finite_logits(cache);
  set_shape(cache.combine, cache.logits.rows(), slots());
  softmax<T>(cache.logits, cache.combine);
  for (Index t = 0; t < cache.logits.rows(); ++t) {
    if (cache.rows.is_padding(t)) cache.combine.row(t).setZero();
  }
  cache.dispatch.reserve(cache.logits.rows() * slots());
  cache.for_each_sequence([&](Index, Index begin, Index m) { weigh_tokens(begin, m, cache); });
}

template <std::floating_point T>
void SlotWeights<T>::backward(Cache& cache, Matrix<T>& dx) {
  compute_d_logits(cache);
  const Matrix<T>& left = is_normalised() ? cache.unit_x : cache.x;
  const Matrix<T>& right = is_normalised() ? cache.scaled_phi : phi_.value;
  set_shape(cache.d_unit_x, dx.rows(), d_model());
  set_zero(cache.d_phi, slots(), d_model());
  cache.products.clear();
  cache.products.push_back(product_nn<T>(cache.d_logits, right, cache.d_unit_x));
  if (dx.rows() > 0) cache.products.push_back(product_tn<T>(cache.d_logits, left, cache.d_phi));
  multiply<T>(cache.products);
  if (!is_normalised()) {
    add_rows<T>(phi_.gradient(), cache.d_phi, phi_.gradient());
    add_rows<T>(dx, cache.d_unit_x, dx);
    return;
  }
  T& d_scale = scale_.gradient()(0, 0);
  Matrix<T>& d_phi = phi_.gradient();
  for (Index i = 0; i < slots(); ++i) {
    d_scale += loops::dot<T>(d_model(), &cache.d_phi(i, 0), &cache.unit_phi(i, 0));
    add_unit_backward(scale_.value(0, 0), &phi_.value(i, 0), &cache.d_phi(i, 0), &d_phi(i, 0));
  }
  parallel_rows(dx.rows(), 4 * d_model(), [&](Index begin, Index end) {
    for (Index t = begin; t < end; ++t) {
      add_unit_backward(T(1), &cache.x(t, 0), &cache.d_unit_x(t, 0), &dx(t, 0));
    }
  });
}

template <std::floating_point T>
void SlotWeights<T>::add_unit_backward(T factor, const T* v, const T* du, T* dv) const {
  const T length = safe_norm<T>(d_model(), v);
  if (inverse(length) == T(0)) return;
  const T by = factor * inverse(length);
  const T along = loops::dot<T>(d_model(), du, v) / length * inverse(length);
  const auto f = [=](const Lanes<T>& sum, const Lanes<T>& d, const Lanes<T>& a) -> Lanes<T> {
    return sum + by * (d - along * a);
  };
  map_lanes<T>(d_model(), f, dv, dv, du, v);
}

template <std::floating_point T>
void SlotWeights<T>::compute_logits(Cache& cache) const {
  set_shape(cache.logits, cache.x.rows(), slots());
  if (!is_normalised()) return multiply_nt<T>(cache.x, phi_.value, cache.logits);
  set_shape(cache.unit_x, cache.x.rows(), d_model());
  set_shape(cache.unit_phi, slots(), d_model());
  set_shape(cache.scaled_phi, slots(), d_model());
  parallel_rows(cache.x.rows(), 4 * d_model(), [&](Index begin, Index end) {
    for (Index t = begin; t < end; ++t) unit_row(T(1), &cache.x(t, 0), &cache.unit_x(t, 0));
  });
  for (Index i = 0; i < slots(); ++i) {
    unit_row(T(1), &phi_.value(i, 0), &cache.unit_phi(i, 0));
    unit_row(scale_.value(0, 0), &phi_.value(i, 0), &cache.scaled_phi(i, 0));
  }
  multiply_nt<T>(cache.unit_x, cache.scaled_phi, cache.logits);
}

template <std::floating_point T>
void SlotWeights<T>::expect_finite_logits(const Cache& cache) const {
  for (Index t = 0; t < cache.logits.rows(); ++t) {
    for (Index i = 0; i < slots(); ++i) {
      if (std::isfinite(cache.logits(t, i))) continue;
      throw_error<NonFiniteError>("SoftMoE: logits[", t, ", ", i, "] = ", cache.logits(t, i),
                                  ", expected a finite number");
    }
  }
}

template <std::floating_point T>
void SlotWeights<T>::weigh_tokens(Index begin, Index m, Cache& cache) const {
  auto weights = cache.part_of(cache.dispatch, begin, m);
  if (cache.rows.real(begin, begin + m) == 0) {
    weights.setZero();
    return;
  }
  constexpr T kNever = -std::numeric_limits<T>::infinity();
  parallel_rows(slots(), 8 * m, [&](Index first, Index last) {
    for (Index i = first; i < last; ++i) {
      for (Index j = 0; j < m; ++j) {
        weights(i, j) = cache.rows.is_padding(begin + j) ? kNever : cache.logits(begin + j, i);
      }
      softmax_row<T>(row_span(weights, i), row_span(weights, i));
    }
  });
}

template <std::floating_point T>
void SlotWeights<T>::compute_d_logits(Cache& cache) const {
  set_zero(cache.d_logits, cache.logits.rows(), slots());
  add_softmax_backward<T>(cache.combine, cache.d_combine, cache.d_logits);
  cache.d_transposed.reserve(cache.logits.rows() * slots());
  cache.for_each_sequence([&](Index, Index begin, Index m) {
    auto d = cache.part_of(cache.d_transposed, begin, m);
    d.setZero();
    add_softmax_backward<T>(cache.part_of(cache.dispatch, begin, m),
                            cache.part_of(cache.d_dispatch, begin, m), d);
    parallel_rows(m, slots(), [&](Index first, Index last) {
      for (Index j = first; j < last; ++j) {
        for (Index i = 0; i < slots(); ++i) cache.d_logits(begin + j, i) += d(i, j);
      }
    });
  });
}

}  // namespace weir

#ifdef WEIR_COMPILED
extern template class weir::SlotWeights<float>;
extern template class weir::SlotWeights<double>;
#endif
