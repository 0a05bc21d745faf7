// SPDX-License-Identifier: MIT
/// \file
/// What banks of experts have in common that add to what another one does.
#pragma once

#include <span>
#include <utility>

#include <weir/core/expert_map.hpp>
#include <weir/core/pass.hpp>
#include <weir/moe/concepts.hpp>
#include <weir/moe/dispatch.hpp>

namespace weir {

/// Whether a bank is a PassDropped, which looks at dropped assignments. A wrapper shows its bank
/// none, or rows that are no tokens, so that PassDropped has to be around all other wrappers.
template <class Bank>
inline constexpr bool kPassesDropped = false;

/// A bank that does what the one inside does: a base for wrappers, which replace what they change.
/// A wrapper with a cache of its own derives it from `Cache`, and hands `cache.inner` to the bank
/// inside.
template <ExpertBank Bank>
class BankWrapper {
 public:
  using Scalar = typename Bank::Scalar;
  using T = Scalar;

  static_assert(!kPassesDropped<Bank>, "PassDropped has to be the outermost wrapper of a bank");

  struct Cache {
    typename Bank::Cache inner;
  };

  const Matrix<T>& forward(MatrixIn<T> x, const Dispatch<T>& dispatch, const Pass& pass,
                           Cache& cache) const {
    return bank_.forward(x, dispatch, pass, cache.inner);
  }

  const Matrix<T>& backward(MatrixIn<T> dy, const Dispatch<T>& dispatch, std::span<T> d_weight,
                            Cache& cache) {
    return bank_.backward(dy, dispatch, d_weight, cache.inner);
  }

  /// The members of the bank inside, under its own names.
  template <class Self, class Visit>
  static void visit(Self& self, Visit& visit) {
    visit("", self.bank());
  }

  /// The bank's, where it has that.
  void remap_experts(const ExpertMap& map) requires requires(Bank& bank) {
    bank.remap_experts(map);
  }
  { bank_.remap_experts(map); }

  Index experts() const { return bank_.experts(); }
  Index d_in() const { return bank_.d_in(); }
  Index d_out() const { return bank_.d_out(); }

  Bank& bank() { return bank_; }
  const Bank& bank() const { return bank_; }

 protected:
  explicit BankWrapper(Bank bank) : bank_(std::move(bank)) {}

  Bank bank_;
};

}  // namespace weir
