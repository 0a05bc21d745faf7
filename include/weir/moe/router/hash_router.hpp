// SPDX-License-Identifier: MIT
/// \file
/// Hash layers: the token's id alone says which expert it goes to (Roller et al. 2021,
/// arXiv:2106.04426).
#pragma once

#include <concepts>
#include <span>

#include <weir/core/error.hpp>
#include <weir/core/parameter.hpp>
#include <weir/core/pass.hpp>
#include <weir/core/types.hpp>
#include <weir/moe/concepts.hpp>
#include <weir/moe/router/hash_tables.hpp>

namespace weir {

/// Sends a token to the expert that a fixed table has for its id:
///
///     logits_te = 0 if e = table[id_t], else -10000
///
/// With TopKSoftmax({.k = 1}) or SoftmaxTopK({.k = 1}) the weight is exactly 1, as in the paper.
/// Nothing is trained: dL/dx is zero, and balancing losses have no effect. The ids come from
/// `pass.token_ids`, which a Decoder sets; those of padding may be anything. The table is a buffer:
/// a checkpoint carries it.
template <std::floating_point T>
class HashRouter : public RouterBase<T> {
 public:
  struct Cache {
    CacheState state;
    Matrix<T> logits, dx;
  };

  /// \param table    The expert of each id, such as one of hash_tables.hpp.
  /// \throws ConfigError  if a size is below 1, the table is empty, or an expert out of range.
  HashRouter(Index d_model, Index experts, std::span<const Index> table);

  /// \param x        [tokens, d_model]; only its shape matters.
  /// \return         [tokens, experts]; zero for padding.
  /// \throws ShapeError   if x or pass.token_ids do not fit.
  /// \throws ConfigError  without ids, or if one is not in the table.
  const Matrix<T>& forward(MatrixIn<T> x, const Pass& pass, Cache& cache) const;

  /// \return         Zero, [tokens, d_model].
  /// \throws StateError   if the cache does not fit, see CacheState.
  /// \throws ShapeError   if d_logits does not have the shape of the logits.
  const Matrix<T>& backward(MatrixIn<T> d_logits, Cache& cache) {
    cache.state.begin_backward("HashRouter::backward", *this, d_logits);
    set_zero(cache.dx, d_logits.rows(), d_model_);
    return cache.dx;
  }

  template <class Self, class Visit>
  static void visit(Self& self, Visit& visit) {
    visit("table", self.table_);
  }

  Index d_model() const { return d_model_; }
  Index experts() const { return experts_; }
  Index vocab() const { return table_.value.cols(); }

  /// The expert of a token.
  /// \throws ConfigError  if the id is not in the table, or a loaded table has no such expert.
  Index expert_of(Index id) const;

 private:
  Index d_model_, experts_;
  Buffer<T> table_;
};

template <std::floating_point T>
HashRouter<T>::HashRouter(Index d_model, Index experts, std::span<const Index> table)
    : d_model_(d_model), experts_(experts) {
  expect_at_least<Index>("HashRouter", "d_model", d_model, 1);
  expect_at_least<Index>("HashRouter", "experts", experts, 1);
  if (table.empty()) {
    throw_error<ConfigError>("HashRouter: the table is empty, expected one per id");
  }
  set_shape(table_.value, 1, static_cast<Index>(table.size()));
  for (Index id = 0; id < vocab(); ++id) {
    const Index expert = table[static_cast<std::size_t>(id)];
    if (expert < 0 || expert >= experts) {
      throw_error<ConfigError>("HashRouter: table[", id, "] = ", expert,
                               ", expected 0 <= expert < experts = ", experts);
    }
    table_.value(0, id) = static_cast<T>(expert);
  }
}

template <std::floating_point T>
const Matrix<T>& HashRouter<T>::forward(MatrixIn<T> x, const Pass& pass, Cache& cache) const {
  constexpr T kElsewhere = T(-10000);
  cache.state.begin();
  expect_columns("HashRouter::forward", "x", x, d_model_);
  pass.check("HashRouter::forward", x.rows());
  if (pass.token_ids.empty() && x.rows() > 0) {
    throw_error<ConfigError>(
        "HashRouter::forward: pass.token_ids is empty, expected one id per token");
  }
  set_shape(cache.logits, x.rows(), experts_);
  for (Index t = 0; t < x.rows(); ++t) {
    if (pass.is_padding(t)) {
      cache.logits.row(t).setZero();
      continue;
    }
    cache.logits.row(t).setConstant(kElsewhere);
    cache.logits(t, expert_of(pass.token_ids[static_cast<std::size_t>(t)])) = T(0);
  }
  return cache.state.finish(*this, pass, cache.logits);
}

template <std::floating_point T>
Index HashRouter<T>::expert_of(Index id) const {
  if (id < 0 || id >= vocab()) {
    throw_error<ConfigError>("HashRouter: token id ", id, ", expected 0 <= id < vocab = ", vocab());
  }
  const T expert = table_.value(0, id);
  if (!(expert >= T(0) && expert < static_cast<T>(experts_))) {
    throw_error<ConfigError>("HashRouter: table[", id, "] = ", expert,
                             ", expected 0 <= expert < experts = ", experts_);
  }
  return static_cast<Index>(expert);
}

}  // namespace weir

#ifdef WEIR_COMPILED
extern template class weir::HashRouter<float>;
extern template class weir::HashRouter<double>;
#endif
