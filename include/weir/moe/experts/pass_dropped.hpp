// SPDX-License-Identifier: MIT
/// \file
/// Tokens that go past a full expert: Hugging Face's Switch until 2025.
#pragma once

#include <algorithm>
#include <span>
#include <utility>

#include <weir/core/error.hpp>
#include <weir/core/parallel.hpp>
#include <weir/core/pass.hpp>
#include <weir/core/scratch.hpp>
#include <weir/moe/concepts.hpp>
#include <weir/moe/dispatch.hpp>
#include <weir/moe/experts/bank_wrapper.hpp>
#include <weir/ops/rows.hpp>
#include <weir/ops/vector_loops.hpp>

namespace weir {

/// A bank in which an assignment that was dropped yields its token times its weight, as if the
/// expert were the identity:
///
///     y_t = sum_{e in S_t, kept} g_te E_e(x_t) + sum_{e in S_t, dropped} g_te x_t
///
/// Other banks yield zero for it, and the residual around the layer carries the token (Switch,
/// GShard, Megatron-Core). With RenormaliseKept, a dropped assignment has the weight that it had
/// before. What is passed on is neither masked nor scaled by an OutputMasking inside.
template <ExpertBank Bank>
class PassDropped : public BankWrapper<Bank> {
 public:
  using typename BankWrapper<Bank>::T;
  using BankWrapper<Bank>::d_in;
  using BankWrapper<Bank>::d_out;

  struct Cache : BankWrapper<Bank>::Cache {
    Scratch<T> x;     ///< [dropped assignments, d_in], the token of each.
    Matrix<T> y, dx;  ///< [tokens, d_in], only where anything was dropped.
  };

  /// \throws ConfigError  if the bank changes the width.
  explicit PassDropped(Bank bank) : BankWrapper<Bank>(std::move(bank)) {
    if (d_in() != d_out()) {
      throw_error<ConfigError>("PassDropped: the bank yields ", d_out(), " features, expected ",
                               d_in(), " as it takes");
    }
  }

  const Matrix<T>& forward(MatrixIn<T> x, const Dispatch<T>& dispatch, const Pass& pass,
                           Cache& cache) const {
    const Matrix<T>& of_experts = bank_.forward(x, dispatch, pass, cache.inner);
    if (dispatch.dropped().empty()) return of_experts;
    copy_rows<T>(of_experts, cache.y);
    if (pass.training) cache.x.reshape(std::ssize(dispatch.dropped()), d_in());
    for_each_dropped(dispatch, [&](Index i, const Dropped& dropped) {
      const T* const token = &x.coeffRef(dropped.token, 0);
      loops::add_scaled<T>(d_in(), dropped.weight, token, &cache.y(dropped.token, 0));
      if (pass.training) std::copy_n(token, d_in(), &cache.x.view()(i, 0));
    });
    return cache.y;
  }

  /// dx_t += g_te dy_t and d_weight[a] = dy_t . x_t for each dropped assignment a of a token t.
  const Matrix<T>& backward(MatrixIn<T> dy, const Dispatch<T>& dispatch, std::span<T> d_weight,
                            Cache& cache) {
    const Matrix<T>& through_experts = bank_.backward(dy, dispatch, d_weight, cache.inner);
    if (dispatch.dropped().empty()) return through_experts;
    copy_rows<T>(through_experts, cache.dx);
    for_each_dropped(dispatch, [&](Index i, const Dropped& dropped) {
      const T* const d = &dy.coeffRef(dropped.token, 0);
      loops::add_scaled<T>(d_in(), dropped.weight, d, &cache.dx(dropped.token, 0));
      d_weight[static_cast<std::size_t>(dropped.assignment)] =
          loops::dot<T>(d_in(), d, &cache.x.view()(i, 0));
    });
    return cache.dx;
  }

 private:
  using BankWrapper<Bank>::bank_;
  using Dropped = typename Dispatch<T>::Dropped;

  /// Calls `body(i, dropped)` for each dropped assignment, the tokens divided among threads.
  template <class Body>
  static void for_each_dropped(const Dispatch<T>& dispatch, Body&& body) {
    const std::span<const Dropped> all = dispatch.dropped();
    const auto is_before = [](const Dropped& dropped, Index token) {
      return dropped.token < token;
    };
    constexpr Index kCost = 1024;
    parallel_rows(dispatch.tokens(), kCost, [&](Index begin, Index end) {
      auto i = std::lower_bound(all.begin(), all.end(), begin, is_before) - all.begin();
      for (; i < std::ssize(all); ++i) {
        const Dropped& dropped = all[static_cast<std::size_t>(i)];
        if (dropped.token >= end) break;
        body(i, dropped);
      }
    });
  }
};

template <class Bank>
inline constexpr bool kPassesDropped<PassDropped<Bank>> = true;

}  // namespace weir
