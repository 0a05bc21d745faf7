// SPDX-License-Identifier: MIT
/// \file
/// Causal softmax attention of ready-made queries, keys and values: the core that every kind of
/// attention layer shares. It works blockwise with an online softmax (Dao et al. 2022,
/// arXiv:2205.14135; Milakov & Gimelshein 2018, arXiv:1805.02867), so that memory is linear in the
/// number of tokens.
#pragma once

#include <algorithm>
#include <cstdint>
#include <span>

#include <weir/attention/backward_cells.hpp>
#include <weir/attention/few_queries.hpp>
#include <weir/attention/key_runs.hpp>
#include <weir/attention/operands.hpp>
#include <weir/attention/query_blocks.hpp>
#include <weir/core/function_ref.hpp>
#include <weir/core/index_span.hpp>
#include <weir/core/list.hpp>
#include <weir/core/parallel.hpp>
#include <weir/core/scratch.hpp>
#include <weir/core/types.hpp>
#include <weir/core/workspace.hpp>
#include <weir/ops/exp.hpp>
#include <weir/ops/lanes.hpp>
#include <weir/ops/vector_loops.hpp>

namespace weir {

/// For each query head h with queries q, and the keys k and values v of its group:
///
///     out_i = sum_j p_ij v_j,    p_ij = exp(s_ij - logsumexp_i),    s_ij = scale * q_i . k_j
///
/// The sum is over the keys j of the same sequence that are not padding, not later than query i,
/// and in its window and chunk if there are any (see `AttentionHeads`, also for the softcap of s).
/// A query that sees no key at all has out = 0 and passes no gradient on.
///
/// A sink is one more score of each query of a head. It is the same for all of them and has no
/// value, so it takes its share of the softmax away (the released code of gpt-oss; Xiao et al.
/// 2023, arXiv:2309.17453, use a token instead).
///
///     logsumexp_i = log(exp(sink_h) + sum_j exp(s_ij))
///
/// A NaN in a key reaches the queries that see it; a NaN in a value also reaches some queries that
/// are computed together with them. A key or value that no query of a block of 64 sees does not
/// enter its computation.
///
/// The cost is queries times the keys they see; memory is linear. Results do not depend on the
/// number of threads, nor those of a query on the queries beside it, see KeyRuns. The backward pass
/// computes probabilities anew, see BackwardCells.
template <class T>
class CausalAttention {
  using Blocks = QueryBlocks<T>;

 public:
  /// What `backward` needs, and workspace.
  struct Cache : Blocks::Cache {
    /// Some rows of the sequence that one task deals with.
    struct Task {
      Index span, first;
    };
    /// Some keys that one query sees, if its span has few queries.
    struct FewTask {
      Index span, query, begin, end;
    };
    typename BackwardCells<T>::Lists cells;
    List<Task> tasks;
    List<FewTask> few_tasks;
    List<Index> few_queries;  ///< Where each query begins in few_tasks, and the end.
    Workspace workspace;
  };

  /// \param mask   One byte per row of k, 0 for padding; or empty.
  /// \param q      [queries, heads * head_dim]
  /// \param k      [keys, kv_heads * head_dim]
  /// \param v      [keys, kv_heads * value_dim]
  /// \param sinks  One logit for each query head; or empty.
  CausalAttention(const AttentionHeads& shape, std::span<const AttentionSpan> spans,
                  std::span<const std::uint8_t> mask, MatrixIn<T> q, MatrixIn<T> k, MatrixIn<T> v,
                  std::span<const T> sinks = {})
      : in_{shape, spans, mask, q, k, v, sinks, {}} {}

  /// Takes keys and values that lie in a place of their own for each span, such as the states of
  /// several conversations. Only `forward` may be called. The key_begin of spans is ignored.
  CausalAttention(const AttentionHeads& shape, std::span<const AttentionSpan> spans, MatrixIn<T> q,
                  std::span<const KeyValueRows<T>> rows, std::span<const T> sinks = {})
      : in_{shape, spans, {}, q, none(), none(), sinks, rows} {}

  /// \param out  [queries, heads * value_dim]; rows outside of every span are left as they are.
  void forward(MatrixOut<T> out, Cache& cache) const;

  /// Sets the gradients of q, k and v. Padding keys get zero.
  /// \param out      The result of `forward` with the same cache and operands.
  /// \param d_out    [queries, heads * value_dim]
  /// \param d_sinks  One for each query head, added to; or empty.
  void backward(MatrixIn<T> out, MatrixIn<T> d_out, MatrixOut<T> dq, MatrixOut<T> dk,
                MatrixOut<T> dv, Cache& cache, std::span<T> d_sinks = {}) const;

 private:
  using Task = typename Cache::Task;

  static Index last_block(Index n) {
    return n == 0 ? -1 : (n - 1) / Blocks::kBlock * Blocks::kBlock;
  }
  static Eigen::Map<const Matrix<T>> none() { return {nullptr, 0, 0}; }

  /// Whether packing keys for the queries and filling up a strip costs more than it saves.
  static bool is_few(const AttentionSpan& s) { return s.queries <= Blocks::kStrip / 4; }

  /// Cuts the forward pass into tasks.
  void cut(Cache& cache) const;

  /// The sink's share of a query's softmax is p = exp(sink - logsumexp). The gradient of its score
  /// is p (0 - d_out . out).
  void add_sink_gradients(Cache& cache, std::span<T> d_sinks) const;

  /// Calls `body(i)` for each i in [0, count), in parallel if there is enough to do.
  void run(Index count, FunctionRef<void(Index)> body) const;

  /// Calls `body(task, head)` for every pair, heads of one task together.
  void run(const List<Task>& tasks, Index head_count,
           FunctionRef<void(const Task&, Index)> body) const {
    run(tasks.count() * head_count, [&](Index i) { body(tasks[i / head_count], i % head_count); });
  }

  AttentionOperands<T> in_;
};

template <class T>
void CausalAttention<T>::forward(MatrixOut<T> out, Cache& cache) const {
  cache.logsumexp.reshape(in_.shape.heads, in_.q.rows());
  cut(cache);
  Workspace::Frame frame(cache.workspace);
  if (!cache.tasks.empty() && in_.rows.empty()) {
    cache.v.set(frame, in_.v, in_.shape.kv_heads, in_.shape.value_dim);
  }
  const Blocks blocks = {in_, cache};
  run(cache.tasks, in_.shape.heads,
      [&](const Task& task, Index head) { blocks.forward(task.span, task.first, head, out); });

  const FewQueries<T> few = {in_};
  const Index count = cache.few_tasks.count();
  auto partial = frame.matrix<T>(count, few.partial_width());  // The sums of each task.
  const Index parts = few.parts();
  run(count * parts, [&](Index i) {
    const auto& task = cache.few_tasks[i / parts];
    few.attend(task.span, task.query, task.begin, task.end, i % parts,
               partial.row(i / parts).data());
  });
  run(cache.few_queries.count() - 1, [&](Index i) {
    const Index begin = cache.few_queries[i];
    const auto& task = cache.few_tasks[begin];
    few.combine(in_.span(task.span).query_begin + task.query,
                partial.middleRows(begin, cache.few_queries[i + 1] - begin), out, cache.logsumexp);
  });
}

template <class T>
void CausalAttention<T>::backward(MatrixIn<T> out, MatrixIn<T> d_out, MatrixOut<T> dq,
                                  MatrixOut<T> dk, MatrixOut<T> dv, Cache& cache,
                                  std::span<T> d_sinks) const {
  const AttentionHeads& shape = in_.shape;
  Workspace::Frame frame(cache.workspace);
  cache.q.set(frame, in_.q, shape.heads, shape.head_dim);
  cache.k.set(frame, in_.k, shape.kv_heads, shape.head_dim);
  cache.d_out.set(frame, d_out, shape.heads, shape.value_dim);

  auto dots = cache.dot.reshape(shape.heads, in_.q.rows());
  const Index width = shape.value_dim;
  parallel_rows(in_.q.rows(), 2 * out.cols(), [&](Index begin, Index end) {
    for (Index i = begin; i < end; ++i) {
      for (Index head = 0; head < shape.heads; ++head) {
        dots(head, i) =
            loops::dot<T>(width, &out.coeffRef(i, head * width), &d_out.coeffRef(i, head * width));
      }
    }
  });

  const auto parallel = [&](Index count, FunctionRef<void(Index)> body) { run(count, body); };
  BackwardCells<T>(in_, cache, cache.cells, frame, parallel).run(dq, dk, dv);
  if (!d_sinks.empty()) add_sink_gradients(cache, d_sinks);
}

template <class T>
void CausalAttention<T>::cut(Cache& cache) const {
  cache.tasks.clear();
  cache.few_tasks.clear();
  cache.few_queries.assign(1, 0);
  for (Index s = 0; s < in_.span_count(); ++s) {
    const AttentionSpan& span = in_.span(s);
    if (!is_few(span)) {
      // The last block has the most keys: it goes first, so that no thread is left with it.
      for (Index first = last_block(span.queries); first >= 0; first -= Blocks::kBlock) {
        cache.tasks.push_back({s, first});
      }
      continue;
    }
    for (Index i = 0; i < span.queries; ++i) {
      const Index end = span.prefix() + i + 1;
      Index begin = in_.first_key(span, end - 1);
      while (begin < end) {
        const Index run = std::min(in_.together(span, begin, KeyRuns::kRun), end - begin);
        cache.few_tasks.push_back({s, i, begin, begin + run});
        begin += run;
      }
      cache.few_queries.push_back(cache.few_tasks.count());
    }
  }
}

template <class T>
void CausalAttention<T>::add_sink_gradients(Cache& cache, std::span<T> d_sinks) const {
  run(in_.shape.heads, [&](Index head) {
    const auto of_query = [sink = in_.sink(head)](const Lanes<T>& logsumexp,
                                                  const Lanes<T>& dot) -> Lanes<T> {
      return exp_lanes<T>(sink - logsumexp) * dot;
    };
    for (const AttentionSpan& s : in_.spans) {
      if (s.queries == 0) continue;
      element(d_sinks, head) -=
          sum_lanes<T>(s.queries, of_query, &cache.logsumexp.view()(head, s.query_begin),
                       &cache.dot.view()(head, s.query_begin));
    }
  });
}

template <class T>
void CausalAttention<T>::run(Index count, FunctionRef<void(Index)> body) const {
  constexpr Index kSerialWork = 100'000;  // Multiply-adds below which waking a thread costs more.
  Index work = 0;
  for (const AttentionSpan& s : in_.spans) work += s.queries * in_.shape.most_visible(s.keys);
  work *= in_.shape.heads * (in_.shape.head_dim + in_.shape.value_dim);
  if (work <= kSerialWork) {
    for (Index i = 0; i < count; ++i) body(i);
  } else {
    parallel_for(count, body);
  }
}

}  // namespace weir

#ifdef WEIR_COMPILED
extern template class weir::CausalAttention<float>;
extern template class weir::CausalAttention<double>;
#endif
