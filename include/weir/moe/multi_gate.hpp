// SPDX-License-Identifier: MIT
/// \file
/// Several tasks that share experts: multi-gate mixture of experts (MMoE).
#pragma once

#include <concepts>
#include <cstddef>
#include <span>
#include <string>
#include <utility>
#include <vector>

#include <weir/core/cache_state.hpp>
#include <weir/core/error.hpp>
#include <weir/core/index_span.hpp>
#include <weir/core/layer.hpp>
#include <weir/core/list.hpp>
#include <weir/core/parallel.hpp>
#include <weir/core/pass.hpp>
#include <weir/core/scratch.hpp>
#include <weir/core/types.hpp>
#include <weir/moe/concepts.hpp>
#include <weir/moe/dispatch.hpp>
#include <weir/moe/experts/gathered_pass.hpp>
#include <weir/moe/report.hpp>
#include <weir/moe/routing.hpp>
#include <weir/nn/linear.hpp>
#include <weir/ops/padding.hpp>
#include <weir/ops/rows.hpp>
#include <weir/ops/vector_loops.hpp>

namespace weir {

/// One bank of experts for several tasks. Each task has a gate of its own, which mixes the experts,
/// and a tower of its own, which makes the task's output of the mixture:
///
///     y_k = h_k(f_k(x)),   f_k(x) = sum_i g_k(x)_i f_i(x),   g_k(x) = softmax(W_k x)
///
/// (Ma et al. 2018, doi:10.1145/3219819.3220007, eq. 6-8.) f_i are the experts, h_k the towers,
/// g_k the gates: with LinearRouter and SoftmaxTopK({.k = experts}) those of the paper. Any router
/// and any selector make a gate, sparse ones too, and any bank the experts. An expert computes a
/// token once, however many tasks use it, and not at all if no task does; the bank sees the weight
/// 1 for each.
///
///     MultiGateMixture layer(gates, SoftmaxTopK<float>({.k = 8}), bank, towers);
///     const Matrix<float>& y = layer.forward(x, pass, cache);
///     y.middleCols(cache.column(k), cache.columns(k));    the output of task k
///
/// One task with a gate and no tower is a MoELayer without balancers. Padding yields zero, see
/// PaddingRows. There is no capacity and no balancing loss, as in the paper.
template <class R, class S, class B, class L = Linear<typename R::Scalar>>
class MultiGateMixture {
 public:
  using Scalar = typename R::Scalar;
  using T = Scalar;

  static_assert(Router<R>, "the gates of MultiGateMixture have to be Routers, see RouterBase");
  static_assert(Selector<S, T>, "the second argument has to be a Selector of the gates' scalar");
  static_assert(ExpertBank<B>, "the third argument of MultiGateMixture has to be an ExpertBank");
  static_assert(Layer<L>, "the towers of MultiGateMixture have to be Layers");
  static_assert(std::same_as<T, typename B::Scalar> && std::same_as<T, typename L::Scalar>,
                "gates, bank and towers differ in their scalar");

  /// What belongs to one task.
  struct TaskCache {
    typename R::Cache router;
    typename S::Cache selector;
    typename L::Cache tower;
    Routing<T> routing;
    RoutingGradient<T> gradient;
    List<Index> place;  ///< [assignments], which of the experts of its token each has.
    Matrix<T> mixture;  ///< [tokens, d_out of the bank], f_k(x).
    Matrix<T> dy;       ///< [tokens, columns of the task]
    const Matrix<T>* result = nullptr;  ///< The task's output; only while `forward` runs.
  };

  struct Cache {
    CacheState state;
    std::vector<TaskCache> tasks;
    List<Index> offsets;       ///< [tasks + 1], where the columns of each task begin.
    Assignments used;          ///< The experts that each token has for any task.
    Assignments one_each;      ///< The same, each for a row of its own.
    Dispatch<T> tokens, rows;  ///< Of these two; a row is a slot of `tokens`.
    List<Index> place_of;      ///< [experts]
    List<T> ones;              ///< [slots]
    List<Index> token_ids;     ///< [slots], where the pass has ids.
    typename B::Cache bank;
    Matrix<T> cleared;         ///< The input without padding; only used if there is padding.
    Scratch<T> x, out, d_out;  ///< [slots, .], what the experts take and make.
    Matrix<T> y, dx;           ///< [tokens, .]
    RowVector<T> d_one;        ///< [slots], the derivative of a weight that is always 1.

    /// The first column of a task in y, and how many it has; 0 <= task < tasks.
    Index column(Index task) const { return offsets[task]; }
    Index columns(Index task) const { return offsets[task + 1] - offsets[task]; }
  };

  /// \param gates     One for each task.
  /// \param selector  Each task has a copy of it.
  /// \param towers    One for each task, or none: f_k(x) is the output then.
  /// \throws ConfigError  without gates, if gates, bank and towers do not fit each other, or if the
  ///                      selector does not serve that many experts.
  MultiGateMixture(std::vector<R> gates, const S& selector, B bank, std::vector<L> towers = {})
      : gates_(std::move(gates)), bank_(std::move(bank)), towers_(std::move(towers)) {
    expect_at_least<std::size_t>("MultiGateMixture", "gates", gates_.size(), 1);
    for (std::size_t k = 0; k < gates_.size(); ++k) {
      const R& gate = gates_[k];
      if (gate.experts() != bank_.experts() || gate.d_model() != bank_.d_in()) {
        throw_error<ConfigError>("MultiGateMixture: gates[", k, "] has ", gate.experts(),
                                 " experts and d_model = ", gate.d_model(), ", expected ",
                                 bank_.experts(), " and ", bank_.d_in(), " as the bank");
      }
    }
    if (!towers_.empty() && towers_.size() != gates_.size()) {
      throw_error<ConfigError>("MultiGateMixture: there are ", towers_.size(),
                               " towers, expected none or ", gates_.size(), " (one per gate)");
    }
    selectors_.assign(gates_.size(), selector);
    check();
  }

  /// \param x        [tokens, d_model]; any number of tokens, also none.
  /// \return         [tokens, columns of all tasks], task by task.
  /// \throws ShapeError      if x, pass.mask or pass.sequences do not fit, or a tower does not fit
  ///                         the bank.
  /// \throws NonFiniteError  if a gate gives a real token a logit that is not finite.
  const Matrix<T>& forward(MatrixIn<T> x, const Pass& pass, Cache& cache) const {
    cache.state.begin();
    expect_columns("MultiGateMixture::forward", "x", x, d_model());
    pass.check("MultiGateMixture::forward", x.rows());
    check();
    cache.tasks.resize(gates_.size());
    {
      const auto rows = without_padding<T>(x, pass.mask, cache.cleared);
      for (std::size_t k = 0; k < gates_.size(); ++k) route(rows, pass, k, cache.tasks[k]);
    }
    find_used(x.rows(), cache);
    run_experts(x, pass, cache);
    cache.offsets.assign(1, 0);
    for (std::size_t k = 0; k < gates_.size(); ++k) {
      run_tower(pass, k, cache);
      cache.offsets.push_back(cache.offsets.back() + cache.tasks[k].result->cols());
    }
    set_shape(cache.y, x.rows(), cache.offsets.back());
    for (std::size_t k = 0; k < gates_.size(); ++k) {
      const auto task = static_cast<Index>(k);
      copy_rows_to<T>(*cache.tasks[k].result,
                      cache.y.middleCols(cache.column(task), cache.columns(task)));
    }
    return cache.state.finish(*this, pass, cache.y);
  }

  /// \param dy       dL/dy, as `forward` returned y; for the pass that filled `cache` last.
  /// \return         dL/dx, auxiliary losses of gates and experts included.
  /// \throws StateError   if the cache does not fit, see CacheState.
  /// \throws ShapeError   if dy does not have the shape of y.
  const Matrix<T>& backward(MatrixIn<T> dy, Cache& cache) {
    cache.state.begin_backward("MultiGateMixture::backward", *this, dy);
    auto d_out = cache.d_out.reshape(cache.tokens.slots(), bank_.d_out());
    d_out.setZero();
    set_zero(cache.dx, dy.rows(), d_model());
    for (std::size_t k = 0; k < gates_.size(); ++k) {
      TaskCache& task = cache.tasks[k];
      const auto number = static_cast<Index>(k);
      copy_rows<T>(dy.middleCols(cache.column(number), cache.columns(number)), task.dy);
      const Matrix<T>& d_mixture =
          towers_.empty() ? task.dy : towers_[k].backward(task.dy, task.tower);
      task.gradient.reset(task.routing);
      unmix(d_mixture, cache, task, d_out);
      selectors_[k].backward(task.routing, task.gradient, task.selector);
      const Matrix<T>& dx = gates_[k].backward(task.gradient.logits, task.router);
      add_rows<T>(cache.dx, dx, cache.dx);
    }
    set_shape(cache.d_one, cache.tokens.slots());
    const Matrix<T>& d_rows = bank_.backward(
        d_out, cache.rows, span_of(cache.d_one.data(), cache.d_one.size()), cache.bank);
    Matrix<T>& through_experts = cache.cleared;  // The input is not needed any more.
    set_shape(through_experts, dy.rows(), d_model());
    gather_backward<T>(d_rows, cache.tokens, through_experts);
    add_rows<T>(cache.dx, through_experts, cache.dx);
    return cache.dx;
  }

  /// Members `gates.k.*`, `selectors.k.*`, `experts.*` and `towers.k.*`.
  template <class Self, class Visit>
  static void visit(Self& self, Visit& visit) {
    for (std::size_t k = 0; k < self.gates_.size(); ++k) {
      visit("gates." + std::to_string(k), self.gates_[k]);
      visit("selectors." + std::to_string(k), self.selectors_[k]);
    }
    visit("experts", self.bank_);
    for (std::size_t k = 0; k < self.towers_.size(); ++k) {
      visit("towers." + std::to_string(k), self.towers_[k]);
    }
  }

  Index tasks() const { return static_cast<Index>(gates_.size()); }
  Index d_model() const { return bank_.d_in(); }
  Index experts() const { return bank_.experts(); }
  bool has_towers() const { return !towers_.empty(); }

  /// The parts of a task; 0 <= task < tasks().
  R& gate(Index task) { return gates_[static_cast<std::size_t>(task)]; }
  const R& gate(Index task) const { return gates_[static_cast<std::size_t>(task)]; }
  S& selector(Index task) { return selectors_[static_cast<std::size_t>(task)]; }
  const S& selector(Index task) const { return selectors_[static_cast<std::size_t>(task)]; }
  L& tower(Index task) { return towers_[static_cast<std::size_t>(task)]; }
  const L& tower(Index task) const { return towers_[static_cast<std::size_t>(task)]; }
  B& bank() { return bank_; }
  const B& bank() const { return bank_; }

 private:
  void check() const {
    for (std::size_t k = 0; k < gates_.size(); ++k) {
      selectors_[k].check(bank_.experts());
      selectors_[k].check_router(gates_[k]);
    }
  }

  /// Lets the gate of a task choose and weight experts.
  void route(MatrixIn<T> x, const Pass& pass, std::size_t k, TaskCache& task) const {
    const PassRecord::Scope scope(pass.record, "gates", static_cast<Index>(k));
    const Matrix<T>& logits = gates_[k].forward(x, pass, task.router);
    selectors_[k].forward(logits, pass, task.routing, task.selector);
    if (pass.record == nullptr) return;
    if (pass.record->wants_reports()) pass.record->add_report(report_of(task.routing));
    pass.record->show(task.routing, pass);
  }

  /// Finds which experts each token needs, and where among them those of each task are.
  void find_used(Index tokens, Cache& cache) const {
    constexpr Index kNone = -1;
    Assignments& used = cache.used;
    used.expert_count = experts();
    used.offsets.assign(1, 0);
    used.expert.clear();
    cache.place_of.assign(experts(), kNone);
    for (TaskCache& task : cache.tasks) task.place.resize(task.routing.assignments());
    for (Index t = 0; t < tokens; ++t) {
      const Index first = used.offsets.back();
      for (TaskCache& task : cache.tasks) {
        for (Index a = task.routing.first(t); a < task.routing.last(t); ++a) {
          Index& place = cache.place_of[task.routing.expert[a]];
          if (place == kNone) {
            place = used.expert.count() - first;
            used.expert.push_back(task.routing.expert[a]);
          }
          task.place[a] = place;
        }
      }
      used.offsets.push_back(used.expert.count());
      for (Index u = first; u < used.expert.count(); ++u) {
        cache.place_of[used.expert[u]] = kNone;
      }
    }
    used.kept.assign(used.expert.count(), 1);
    cache.ones.assign(used.expert.count(), T(1));
    cache.tokens.build(used, cache.ones);

    Assignments& one_each = cache.one_each;
    one_each.expert_count = experts();
    one_each.offsets.resize(cache.tokens.slots() + 1);
    for (Index row = 0; row <= cache.tokens.slots(); ++row) one_each.offsets[row] = row;
    one_each.expert.resize(cache.tokens.slots());
    for (Index e = 0; e < experts(); ++e) {
      for (Index row = cache.tokens.begin(e); row < cache.tokens.end(e); ++row) {
        one_each.expert[row] = e;
      }
    }
    one_each.kept = used.kept;
    cache.rows.build(one_each, cache.ones);
  }

  /// Computes what each expert makes of each token that needs it.
  void run_experts(MatrixIn<T> x, const Pass& pass, Cache& cache) const {
    const PassRecord::Scope scope(pass.record, "experts");
    const Index slots = cache.tokens.slots();
    auto rows = cache.x.reshape(slots, d_model());
    gather<T>(x, cache.tokens, rows);
    const auto row_of = [](Index slot) { return slot; };
    const Pass own = gathered_pass(pass, cache.tokens, slots, row_of, cache.token_ids);
    const Matrix<T>& out = bank_.forward(rows, cache.rows, own, cache.bank);
    copy_rows_to<T>(out, cache.out.reshape(slots, bank_.d_out()));
  }

  /// f_k(x) = sum_i g_k(x)_i f_i(x), and what the tower makes of it.
  void run_tower(const Pass& pass, std::size_t k, Cache& cache) const {
    TaskCache& task = cache.tasks[k];
    const auto out = cache.out.view();
    set_zero(task.mixture, task.routing.tokens(), bank_.d_out());
    for_each_weight(cache, task, [&](Index t, Index a, Index slot) {
      loops::add_scaled<T>(out.cols(), task.routing.weight[a], &out(slot, 0), &task.mixture(t, 0));
    });
    task.result = &task.mixture;
    if (towers_.empty()) return;
    const PassRecord::Scope scope(pass.record, "towers", static_cast<Index>(k));
    Pass own = pass;
    own.allowed = {};
    task.result = &towers_[k].forward(task.mixture, own, task.tower);
  }

  /// The derivative of the mixture with respect to the weights and what the experts made.
  void unmix(const Matrix<T>& d_mixture, Cache& cache, TaskCache& task, MatrixOut<T> d_out) const {
    const auto out = cache.out.view();
    for_each_weight(cache, task, [&](Index t, Index a, Index slot) {
      const T* const d = &d_mixture(t, 0);
      task.gradient.weights[a] = loops::dot<T>(out.cols(), d, &out(slot, 0));
      loops::add_scaled<T>(out.cols(), task.routing.weight[a], d, &d_out(slot, 0));
    });
  }

  /// Calls `body(token, assignment, slot)` for each assignment of a task, tokens side by side.
  template <class Body>
  void for_each_weight(const Cache& cache, const TaskCache& task, Body&& body) const {
    parallel_rows(task.routing.tokens(), 4 * bank_.d_out(), [&](Index begin, Index end) {
      for (Index t = begin; t < end; ++t) {
        const std::span<const Index> slots = cache.tokens.slots_of(t);
        for (Index a = task.routing.first(t); a < task.routing.last(t); ++a) {
          body(t, a, element(slots, task.place[a]));
        }
      }
    });
  }

  std::vector<R> gates_;
  std::vector<S> selectors_;
  B bank_;
  std::vector<L> towers_;
};

}  // namespace weir
