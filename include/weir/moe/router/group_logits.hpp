// SPDX-License-Identifier: MIT
/// \file
/// The logits of groups of experts.
#pragma once

#include <limits>
#include <string_view>

#include <weir/core/index_span.hpp>
#include <weir/core/parallel.hpp>
#include <weir/core/pass.hpp>
#include <weir/core/types.hpp>
#include <weir/moe/forbidden_experts.hpp>
#include <weir/ops/exp.hpp>
#include <weir/ops/logsumexp.hpp>
#include <weir/ops/rows.hpp>

namespace weir {

/// What the logits z [tokens, experts] say of groups of neighbouring experts, all of the same size:
///
///     x_tg = log sum_e exp(z_te),    e the experts of group g that the pass allows to token t
///
/// A softmax over the groups' x gives the sums of the probabilities of their experts. x is
/// -infinity for a group without allowed experts, and has no gradient there.
template <class T>
class GroupLogits {
 public:
  /// \param groups   A divisor of the columns of z.
  /// \throws              As `expect_allowed_fits`.
  void set(std::string_view who, MatrixIn<T> z, Index groups, const Pass& pass);

  /// x [tokens, groups]
  const Matrix<T>& values() const { return x_; }

  /// Adds `factor` times the gradient: dz_te += factor * dx_tg * exp(z_te - x_tg).
  void add_gradient(T factor, MatrixIn<T> dx, MatrixOut<T> dz) const {
    for_each_group([&](Index t, Index g, Index first, Index size) {
      const T d = factor * dx(t, g);
      if (d == T(0) || x_(t, g) == -std::numeric_limits<T>::infinity()) return;
      loops::add_exp_shifted<T>(size, d, &z_(t, first), x_(t, g), &dz(t, first));
    });
  }

 private:
  /// Calls `body(t, g, first, size)` for each token and group, `first` being the group's first
  /// expert.
  template <class Body>
  void for_each_group(Body&& body) const {
    parallel_rows(z_.rows(), 16 * z_.cols(), [&](Index begin, Index end) {
      const Index size = z_.cols() / x_.cols();
      for (Index t = begin; t < end; ++t) {
        for (Index g = 0; g < x_.cols(); ++g) body(t, g, g * size, size);
      }
    });
  }

  Matrix<T> z_;  // -infinity where the pass forbids the expert.
  Matrix<T> x_;
};

template <class T>
void GroupLogits<T>::set(std::string_view who, MatrixIn<T> z, Index groups, const Pass& pass) {
  expect_allowed_fits(who, z.rows(), z.cols(), pass, 0);
  copy_rows<T>(z, z_);
  if (!pass.allowed.empty()) forbid_experts<T>(pass, z_);
  set_shape(x_, z.rows(), groups);
  for_each_group([&](Index t, Index g, Index first, Index size) {
    x_(t, g) = logsumexp<T>(span_of(&z_(t, first), size));
  });
}

}  // namespace weir

#ifdef WEIR_COMPILED
extern template class weir::GroupLogits<float>;
extern template class weir::GroupLogits<double>;
#endif
