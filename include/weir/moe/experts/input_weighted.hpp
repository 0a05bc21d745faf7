// SPDX-License-Identifier: MIT
/// \file
/// Experts whose input is weighted, not their output: Llama 4.
#pragma once

#include <algorithm>
#include <numeric>
#include <span>
#include <utility>

#include <weir/core/error.hpp>
#include <weir/core/list.hpp>
#include <weir/core/parallel.hpp>
#include <weir/core/pass.hpp>
#include <weir/core/scratch.hpp>
#include <weir/moe/concepts.hpp>
#include <weir/moe/dispatch.hpp>
#include <weir/moe/experts/bank_wrapper.hpp>
#include <weir/moe/experts/gathered_pass.hpp>
#include <weir/moe/routing.hpp>
#include <weir/ops/rows.hpp>
#include <weir/ops/vector_loops.hpp>

namespace weir {

/// A bank that multiplies what an expert takes by the weight, where other banks multiply what it
/// yields:
///
///     y_t = sum_{e in S_t, kept} E_e(g_te x_t)
///
/// Experts are not linear, so the two differ. With one expert per token, g_te = sigmoid(logit) and
/// a shared expert, which takes x_t as it is, this is the layer of Llama 4 (SigmoidTopK with k = 1,
/// not renormalised, and SharedExperts). Experts without biases yield zero for a weight of zero.
/// (Meta 2025, Llama4TextMoe of Hugging Face's transformers; Megatron-LM's
/// moe_apply_probs_on_input.)
template <ExpertBank Bank>
class InputWeighted : public BankWrapper<Bank> {
 public:
  using typename BankWrapper<Bank>::T;
  using BankWrapper<Bank>::d_in;
  using BankWrapper<Bank>::d_out;

  /// The bank inside sees one token per assignment, with a weight of one.
  struct Cache : BankWrapper<Bank>::Cache {
    Assignments assignments;   ///< What the bank inside sees.
    List<T> ones;              ///< The weights that it sees.
    Dispatch<T> dispatch;      ///< Where they go.
    List<Index> token_ids;     ///< [assignments], where the pass has ids.
    Matrix<T> x;               ///< [tokens, d_in], if the pass trains.
    Scratch<T> weighted, d_y;  ///< [assignments, .]; rows of dropped ones are unspecified.
    List<T> d_ones;            ///< The gradient of the weights that are one.
    Matrix<T> y, dx;           ///< [tokens, .]
  };

  explicit InputWeighted(Bank bank) : BankWrapper<Bank>(std::move(bank)) {}

  const Matrix<T>& forward(MatrixIn<T> x, const Dispatch<T>& dispatch, const Pass& pass,
                           Cache& cache) const {
    expect_shape("InputWeighted::forward", "x", x, dispatch.tokens(), d_in());
    if (pass.training) copy_rows<T>(x, cache.x);
    auto weighted = cache.weighted.reshape(dispatch.assignments(), d_in());
    parallel_rows(dispatch.slots(), 2 * d_in(), [&](Index begin, Index end) {
      for (Index s = begin; s < end; ++s) {
        loops::scale<T>(d_in(), dispatch.weight(s), &x.coeffRef(dispatch.token(s), 0),
                        &weighted(dispatch.assignment(s), 0));
      }
    });
    divide(dispatch, cache);
    const auto row_of = [&](Index s) { return dispatch.assignment(s); };
    const Pass own = gathered_pass(pass, dispatch, dispatch.assignments(), row_of, cache.token_ids);
    const Matrix<T>& out = bank_.forward(weighted, cache.dispatch, own, cache.inner);
    set_shape(cache.y, x.rows(), d_out());
    const auto one = [](Index) { return T(1); };
    add_up(out, dispatch, one, cache.y);
    return cache.y;
  }

  /// With dv_a = dL/d(g_te x_t) of assignment a: dx_t = sum_a g_te dv_a, d_weight[a] = dv_a . x_t.
  const Matrix<T>& backward(MatrixIn<T> dy, const Dispatch<T>& dispatch, std::span<T> d_weight,
                            Cache& cache) {
    auto d_y = cache.d_y.reshape(dispatch.assignments(), d_out());
    parallel_rows(dispatch.slots(), d_out(), [&](Index begin, Index end) {
      for (Index s = begin; s < end; ++s) {
        std::copy_n(&dy.coeffRef(dispatch.token(s), 0), d_out(), &d_y(dispatch.assignment(s), 0));
      }
    });
    cache.d_ones.resize(dispatch.assignments());
    const Matrix<T>& d_weighted = bank_.backward(d_y, cache.dispatch, cache.d_ones, cache.inner);

    parallel_rows(dispatch.slots(), 2 * d_in(), [&](Index begin, Index end) {
      for (Index s = begin; s < end; ++s) {
        const Index a = dispatch.assignment(s);
        d_weight[static_cast<std::size_t>(a)] =
            loops::dot<T>(d_in(), &d_weighted(a, 0), &cache.x(dispatch.token(s), 0));
      }
    });
    set_shape(cache.dx, dy.rows(), d_in());
    const auto weight = [&](Index s) { return dispatch.weight(s); };
    add_up(d_weighted, dispatch, weight, cache.dx);
    return cache.dx;
  }

 private:
  using BankWrapper<Bank>::bank_;

  /// The dispatch of the bank inside: each kept assignment a token of its own.
  static void divide(const Dispatch<T>& dispatch, Cache& cache) {
    Assignments& inner = cache.assignments;
    const Index count = dispatch.assignments();
    inner.expert_count = dispatch.experts();
    inner.offsets.resize(count + 1);
    std::iota(inner.offsets.begin(), inner.offsets.end(), Index(0));
    inner.expert.assign(count, 0);
    inner.kept.assign(count, 0);
    dispatch.for_each_expert([&](std::size_t e, Index begin, Index rows) {
      for (Index s = begin; s < begin + rows; ++s) {
        inner.expert[dispatch.assignment(s)] = static_cast<Index>(e);
        inner.kept[dispatch.assignment(s)] = 1;
      }
    });
    cache.ones.assign(count, T(1));
    cache.dispatch.build(inner, cache.ones);
  }

  /// sum[t] = sum over the slots s of t of weight(s) * rows[assignment of s].
  template <class Weight>
  static void add_up(MatrixIn<T> rows, const Dispatch<T>& dispatch, Weight&& weight,
                     MatrixOut<T> sum) {
    parallel_rows(dispatch.tokens(), 2 * sum.cols(), [&](Index begin, Index end) {
      for (Index t = begin; t < end; ++t) {
        sum.row(t).setZero();
        for (const Index s : dispatch.slots_of(t)) {
          loops::add_scaled<T>(sum.cols(), weight(s), &rows.coeffRef(dispatch.assignment(s), 0),
                               &sum(t, 0));
        }
      }
    });
  }
};

}  // namespace weir
