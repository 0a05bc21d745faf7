// SPDX-License-Identifier: MIT
/// \file
/// Causal softmax attention of ready-made queries, keys and values: the core that every kind of
/// attention layer shares. Blockwise with an online softmax (Dao et al. 2022, arXiv:2205.14135;
/// Milakov & Gimelshein 2018, arXiv:1805.02867), so that memory is linear in the number of tokens.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>
#include <span>
#include <vector>

#include <weir/core/error.hpp>
#include <weir/core/parallel.hpp>
#include <weir/core/scratch.hpp>
#include <weir/core/types.hpp>
#include <weir/kernels/matmul.hpp>
#include <weir/kernels/thread_space.hpp>

namespace weir {

/// How the columns of queries, keys and values divide into heads. Query head h reads the keys and
/// values of head h / (heads / kv_heads) (Ainslie et al. 2023, arXiv:2305.13245).
struct AttentionHeads {
  Index heads = 0;      ///< of the queries; a multiple of kv_heads
  Index kv_heads = 0;   ///< of the keys and values
  Index head_dim = 0;   ///< numbers in a query and in a key
  Index value_dim = 0;  ///< numbers in a value
  double scale = 1.0;   ///< of the product of a query and a key, such as 1 / sqrt(head_dim)

  Index group() const { return heads / kv_heads; }
};

/// One sequence: its queries are its last tokens, its keys all of them. Query i therefore has
/// position `first_position() + i` and sees the keys up to that position.
struct AttentionSpan {
  Index query_begin, queries;  ///< rows of q
  Index key_begin, keys;       ///< rows of k and v; keys >= queries

  Index first_position() const { return keys - queries; }
};

/// For each query head h with queries q, and the keys k and values v of its group:
///
///     out_i = sum_j p_ij v_j,    p_ij = exp(s_ij - logsumexp_i),    s_ij = scale * q_i . k_j
///
/// over the keys j of the same sequence that are not padding and not later than query i. A query
/// that sees no key at all has out = 0 and passes no gradient on.
///
/// Results do not depend on the number of threads. The backward pass computes probabilities anew,
/// once over blocks of queries for dq and once over blocks of keys for dk and dv, so that each sum
/// is one task's and has one order.
template <class T>
struct CausalAttention {
  /// What `backward` needs, and workspace.
  struct Cache {
    /// [heads, queries]; +infinity for a query that sees no key, so that all its p are zero.
    Scratch<T> logsumexp;

    /// Some rows of the sequence that one task deals with.
    struct Task {
      Index span, first;
    };
    /// The rows of every head as left operands of block products.
    struct Packed {
      Scratch<T> storage;
      Index height = 0;

      T* at(Index head, Index row) {
        return storage.data() + (head * height + row) * storage.cols();
      }
    };
    /// Some keys that one query looks at, where the queries of a span are few.
    struct FewTask {
      Index span, query, first;
    };
    std::vector<Task> tasks;
    std::vector<FewTask> few_tasks;
    Scratch<T> partial;  ///< A few-task's sums over its keys: [total | largest score | values].
    std::vector<Index> query_base, key_base;  ///< Where each span begins in the packed operands.
    Scratch<T> dot;                           ///< d_out . out, [heads, queries].
    Packed k_rows, k_cols, v_rows, v_cols;
    Packed q_rows, q_cols, d_out_rows, d_out_cols;
  };

  AttentionHeads shape;
  std::span<const AttentionSpan> spans;
  std::span<const std::uint8_t> mask;  ///< One byte per row of k, 0 for padding; or empty.
  Eigen::Ref<const Matrix<T>> q;       ///< [queries, heads * head_dim]
  Eigen::Ref<const Matrix<T>> k;       ///< [keys, kv_heads * head_dim]
  Eigen::Ref<const Matrix<T>> v;       ///< [keys, kv_heads * value_dim]

  /// \param out  [queries, heads * value_dim]; rows outside of every span are left as they are.
  void forward(MatrixOut<T> out, Cache& cache) const {
    cache.logsumexp.reshape(shape.heads, q.rows());
    cache.tasks.clear();
    cache.few_tasks.clear();
    for (Index s = 0; s < span_count(); ++s) {
      if (is_few(span(s))) {
        for (Index i = 0; i < span(s).queries; ++i) {
          for (Index first = 0; first <= span(s).first_position() + i; first += kChunk) {
            cache.few_tasks.push_back({s, i, first});
          }
        }
      } else {
        // The last block has the most keys: it goes first, so that no thread is left with it.
        for (Index first = last_block(span(s).queries); first >= 0; first -= kBlock) {
          cache.tasks.push_back({s, first});
        }
      }
    }
    lay_out(cache);
    pack_keys(cache, Form::kRows, k, shape.head_dim, cache.k_rows, true);
    pack_keys(cache, Form::kCols, v, shape.value_dim, cache.v_cols, true);
    run(cache.tasks, shape.heads, [&](const auto& task, Index head) {
      forward_block(span(task.span), cache.key_base[index(task.span)], task.first, head, out,
                    cache);
    });
    const auto few = static_cast<Index>(cache.few_tasks.size());
    auto partial = cache.partial.reshape(few, shape.heads * (2 + shape.value_dim));
    run(few, [&](Index i) { forward_few(cache.few_tasks[index(i)], partial.row(i).data()); });
    for (Index i = 0; i < few;) {
      const Index begin = i++;
      while (i < few && cache.few_tasks[index(i)].first > 0) ++i;
      combine(cache.few_tasks[index(begin)], partial.middleRows(begin, i - begin), out,
              cache.logsumexp);
    }
  }

  /// Sets the gradients of q, k and v. Padding keys get zero.
  /// \param out    What `forward` returned with the same cache; likewise q, k, v, spans and mask.
  /// \param d_out  [queries, heads * value_dim]
  void backward(MatrixIn<T> out, MatrixIn<T> d_out, MatrixOut<T> dq, MatrixOut<T> dk,
                MatrixOut<T> dv, Cache& cache) const {
    lay_out(cache);
    pack_keys(cache, Form::kRows, k, shape.head_dim, cache.k_rows, false);
    pack_keys(cache, Form::kCols, k, shape.head_dim, cache.k_cols, false);
    pack_keys(cache, Form::kRows, v, shape.value_dim, cache.v_rows, false);
    pack_queries(cache, Form::kRows, q, shape.head_dim, cache.q_rows);
    pack_queries(cache, Form::kCols, q, shape.head_dim, cache.q_cols);
    pack_queries(cache, Form::kRows, d_out, shape.value_dim, cache.d_out_rows);
    pack_queries(cache, Form::kCols, d_out, shape.value_dim, cache.d_out_cols);

    auto dot = cache.dot.reshape(shape.heads, q.rows());
    const Index width = shape.value_dim;
    parallel_rows(q.rows(), 2 * out.cols(), [&](Index begin, Index end) {
      for (Index i = begin; i < end; ++i) {
        for (Index head = 0; head < shape.heads; ++head) {
          dot(head, i) = out.row(i)
                             .segment(head * width, width)
                             .dot(d_out.row(i).segment(head * width, width));
        }
      }
    });

    cache.tasks.clear();
    for (Index s = 0; s < span_count(); ++s) {
      for (Index first = last_block(span(s).queries); first >= 0; first -= kBlock) {
        cache.tasks.push_back({s, first});
      }
    }
    run(cache.tasks, shape.heads, [&](const auto& task, Index head) {
      backward_queries(span(task.span), cache.key_base[index(task.span)], task.first, head, d_out,
                       dq, cache);
    });
    cache.tasks.clear();
    for (Index s = 0; s < span_count(); ++s) {
      for (Index first = 0; first < span(s).keys; first += kBlock) {
        cache.tasks.push_back({s, first});
      }
    }
    run(cache.tasks, shape.kv_heads, [&](const auto& task, Index kv_head) {
      backward_keys(span(task.span), cache.query_base[index(task.span)], task.first, kv_head, dk,
                    dv, cache);
    });
  }

 private:
  // Scores are computed as a [rows, kStrip] strip, left operand times right operand. Softmax then
  // works on whole vectors of a strip's columns, and the strip is, as it lies, the right operand of
  // the product with the values. One side of the attention matrix is "rows", cut in blocks of
  // kRowBlock; the other is "columns", cut in blocks of kBlock, which are a few strips.
  static constexpr Index kHeight = kernels::Block<T>::kRows;
  static constexpr Index kStrip = kernels::Block<T>::kCols;
  static constexpr Index kBlock = 64;
  static constexpr Index kRowBlock = 96;
  // A few queries are computed one by one, their keys in chunks of kChunk for parallelism, and
  // those in pieces of kFewRows that stay in L1.
  static constexpr Index kChunk = 256;
  static constexpr Index kFewRows = 32;
  static_assert(kBlock % kStrip == 0 && kRowBlock % kHeight == 0);

  using Strip = Eigen::Array<T, kStrip, 1>;
  using StripMap = Eigen::Map<Strip>;
  using ConstStripMap = Eigen::Map<const Strip>;
  using RowMap = Eigen::Map<Eigen::Array<T, 1, Eigen::Dynamic>>;
  using ConstRowMap = Eigen::Map<const Eigen::Array<T, 1, Eigen::Dynamic>>;
  using Task = typename Cache::Task;
  using Packed = typename Cache::Packed;

  /// How the rows of a head lie in memory as left operand: as they are or transposed.
  enum class Form { kRows, kCols };

  static std::size_t index(Index i) { return static_cast<std::size_t>(i); }
  static Index round_up(Index n) { return (n + kHeight - 1) / kHeight * kHeight; }
  static Index strips(Index columns) { return (columns + kStrip - 1) / kStrip; }
  static Index last_block(Index n) { return n == 0 ? -1 : (n - 1) / kBlock * kBlock; }

  Index span_count() const { return static_cast<Index>(spans.size()); }
  const AttentionSpan& span(Index s) const { return spans[index(s)]; }

  /// So few queries that packing keys for them and filling up a strip costs more than it saves.
  static bool is_few(const AttentionSpan& s) { return s.queries <= kStrip / 4; }

  bool is_padding(Index key) const { return !mask.empty() && mask[index(key)] == 0; }

  bool any_padding(Index begin, Index end) const {
    for (Index key = begin; key < end; ++key) {
      if (is_padding(key)) return true;
    }
    return false;
  }

  /// Calls `body(i)` for each i in [0, count), in parallel if there is enough to do.
  template <class Body>
  void run(Index count, Body&& body) const {
    constexpr Index kSerialWork = 100'000;  // Multiply-adds below which waking a thread costs more.
    Index work = 0;
    for (const AttentionSpan& s : spans) work += s.queries * s.keys;
    work *= shape.heads * (shape.head_dim + shape.value_dim);
    if (work <= kSerialWork) {
      for (Index i = 0; i < count; ++i) body(i);
    } else {
      parallel_for(count, body);
    }
  }

  /// Calls `body(task, head)` for every pair, heads of one task together.
  template <class Body>
  void run(const std::vector<Task>& tasks, Index head_count, Body&& body) const {
    run(static_cast<Index>(tasks.size()) * head_count,
        [&](Index i) { body(tasks[index(i / head_count)], i % head_count); });
  }

  /// Gives each span its place in the packed operands.
  void lay_out(Cache& cache) const {
    cache.query_base.assign(1, 0);
    cache.key_base.assign(1, 0);
    for (const AttentionSpan& s : spans) {
      cache.query_base.push_back(cache.query_base.back() + round_up(s.queries));
      cache.key_base.push_back(cache.key_base.back() + round_up(s.keys));
    }
  }

  void pack_keys(Cache& cache, Form form, MatrixIn<T> from, Index dim, Packed& to,
                 bool skip_few) const {
    to.height = cache.key_base.back();
    to.storage.reshape(shape.kv_heads * to.height, round_up(dim));
    for (Index s = 0; s < span_count(); ++s) {
      if (skip_few && is_few(span(s))) continue;
      pack_span(form, from, span(s).key_begin, span(s).keys, cache.key_base[index(s)],
                shape.kv_heads, dim, to);
    }
  }

  void pack_queries(Cache& cache, Form form, MatrixIn<T> from, Index dim, Packed& to) const {
    to.height = cache.query_base.back();
    to.storage.reshape(shape.heads * to.height, round_up(dim));
    for (Index s = 0; s < span_count(); ++s) {
      pack_span(form, from, span(s).query_begin, span(s).queries, cache.query_base[index(s)],
                shape.heads, dim, to);
    }
  }

  static void pack_span(Form form, MatrixIn<T> from, Index begin, Index rows, Index base,
                        Index head_count, Index dim, Packed& to) {
    parallel_rows(head_count * ((rows + kRowBlock - 1) / kRowBlock), kRowBlock * dim,
                  [&](Index first, Index last) {
                    for (Index i = first; i < last; ++i) {
                      const Index row = i / head_count * kRowBlock;
                      const Index head = i % head_count;
                      const Index count = std::min(kRowBlock, rows - row);
                      const T* source =
                          from.data() + (begin + row) * from.outerStride() + head * dim;
                      T* target = to.at(head, base + row);
                      if (form == Form::kRows) {
                        kernels::pack<kHeight>(source, from.outerStride(), 1, count, dim, target);
                      } else {
                        kernels::pack<kHeight>(source, 1, from.outerStride(), dim, count, target);
                      }
                    }
                  });
  }

  /// Packs `count` (at most kBlock) rows of one head as the columns of right operands, one
  /// [dim, kStrip] strip after the other, filled up with zeros.
  static void pack_columns(MatrixIn<T> from, Index row, Index count, Index head, Index dim,
                           T factor, T* to) {
    kernels::pack<kStrip>(from.data() + row * from.outerStride() + head * dim, from.outerStride(),
                          1, count, dim, to);
    const Index size = strips(count) * kStrip * dim;
    if (factor != T(1)) Eigen::Map<Eigen::Array<T, Eigen::Dynamic, 1>>(to, size) *= factor;
  }

  /// The inverse for results: writes `factor` times the strips to `count` rows of one head.
  static void unpack_columns(const T* from, T factor, Index row, Index count, Index head, Index dim,
                             MatrixOut<T>& to) {
    for (Index i = 0; i < count; ++i) {
      const T* column = from + i / kStrip * kStrip * dim + i % kStrip;
      T* target = to.data() + (row + i) * to.outerStride() + head * dim;
      for (Index d = 0; d < dim; ++d) target[d] = factor * column[d * kStrip];
    }
  }

  /// out [rows, kStrip] (+)= left [rows, depth] * right [depth, kStrip].
  /// \param capacity  The depth that left was packed with.
  static void multiply_strip(const T* left, Index rows, Index capacity, const T* right, Index depth,
                             T* out, bool accumulate) {
    for (Index i = 0; i < rows; i += kHeight) {
      kernels::multiply_rows(std::min(kHeight, rows - i), left + i * capacity, right, depth,
                             out + i * kStrip, kStrip, accumulate);
    }
  }

  /// Sets the scores, [rows, kStrip] of keys by queries, that must not count to `value`.
  /// \param first_key  Position of row 0; \param first_query that of column 0.
  void hide(const AttentionSpan& s, Index first_key, Index rows, Index first_query, T value,
            T* scores) const {
    for (Index r = 0; r < rows; ++r) {
      const Index key = first_key + r;
      const bool padding = is_padding(s.key_begin + key);
      const Index hidden = padding ? kStrip : std::clamp<Index>(key - first_query, 0, kStrip);
      std::fill_n(scores + r * kStrip, hidden, value);
    }
  }

  void forward_block(const AttentionSpan& s, Index base, Index first, Index head, MatrixOut<T>& out,
                     Cache& cache) const {
    const Index queries = std::min(kBlock, s.queries - first);
    const Index first_position = s.first_position() + first;
    const Index kv_head = head / shape.group();
    const Index dim = shape.head_dim;
    const Index value_dim = shape.value_dim;

    auto& space = kernels::ThreadSpace<T, CausalAttention>::of_this_thread();
    space.reserve(kBlock * (dim + value_dim) + kRowBlock * kStrip);
    T* const right = space.take(kBlock * dim);
    T* const sums = space.take_zeros(kBlock * value_dim);
    T* const scores = space.take(kRowBlock * kStrip);
    pack_columns(q, s.query_begin + first, queries, head, dim, static_cast<T>(shape.scale), right);

    Eigen::Array<T, kBlock, 1> top;  // the largest score so far
    top.setConstant(std::numeric_limits<T>::lowest());
    Eigen::Array<T, kBlock, 1> total = Eigen::Array<T, kBlock, 1>::Zero();
    for (Index row = 0; row < first_position + queries; row += kRowBlock) {
      const Index capacity = std::min(kRowBlock, s.keys - row);
      const bool padding = any_padding(s.key_begin + row, s.key_begin + row + capacity);
      for (Index strip = 0; strip < strips(queries); ++strip) {
        const Index position = first_position + strip * kStrip;
        const Index rows = std::min(capacity, position + kStrip - row);
        if (rows <= 0) continue;
        multiply_strip(cache.k_rows.at(kv_head, base + row), rows, dim,
                       right + strip * kStrip * dim, dim, scores, false);
        const bool hidden = padding || row + rows - 1 > position;
        if (hidden) {
          hide(s, row, rows, position, -std::numeric_limits<T>::infinity(), scores);
        }
        T* const sum = sums + strip * kStrip * value_dim;
        StripMap old_top(top.data() + strip * kStrip);
        Strip new_top = old_top;
        for (Index r = 0; r < rows; ++r) new_top = new_top.max(StripMap(scores + r * kStrip));
        StripMap strip_total(total.data() + strip * kStrip);
        if ((new_top != old_top).any()) {
          const Strip shrink = (old_top - new_top).exp();
          strip_total *= shrink;
          for (Index d = 0; d < value_dim; ++d) StripMap(sum + d * kStrip) *= shrink;
          old_top = new_top;
        }
        for (Index r = 0; r < rows; ++r) {
          StripMap p(scores + r * kStrip);
          p = (p - new_top).exp();
        }
        if (hidden) hide(s, row, rows, position, T(0), scores);  // Eigen's exp(-inf) is not zero.
        for (Index r = 0; r < rows; ++r) strip_total += StripMap(scores + r * kStrip);
        multiply_strip(cache.v_cols.at(kv_head, base + row), value_dim, capacity, scores, rows, sum,
                       true);
      }
    }

    for (Index i = 0; i < queries; ++i) {
      finish(total[i], top[i], head, s.query_begin + first + i, cache.logsumexp);
      total[i] = total[i] == T(0) ? T(0) : T(1) / total[i];
    }
    for (Index strip = 0; strip < strips(queries); ++strip) {
      const Strip factor = total.template segment<kStrip>(strip * kStrip);
      for (Index d = 0; d < value_dim; ++d) {
        StripMap(sums + (strip * value_dim + d) * kStrip) *= factor;
      }
    }
    unpack_columns(sums, T(1), s.query_begin + first, queries, head, value_dim, out);
  }

  void finish(T total, T top, Index head, Index query, Scratch<T>& logsumexp) const {
    logsumexp.view()(head, query) =
        total == T(0) ? std::numeric_limits<T>::infinity() : top + std::log(total);
  }

  /// One query, all heads, some of the keys. Bound by reading keys and values: reads whole rows,
  /// each once.
  void forward_few(const typename Cache::FewTask& task, T* partial) const {
    const AttentionSpan& s = span(task.span);
    const Index end = std::min(task.first + kChunk, s.first_position() + task.query + 1);
    const Index dim = shape.head_dim;
    const Index value_dim = shape.value_dim;
    T* const total = partial;
    T* const top = total + shape.heads;
    T* const sums = top + shape.heads;
    std::fill_n(total, shape.heads, T(0));
    std::fill_n(top, shape.heads, std::numeric_limits<T>::lowest());
    std::fill_n(sums, shape.heads * value_dim, T(0));

    auto& space = kernels::ThreadSpace<T, CausalAttention>::of_this_thread();
    space.reserve(shape.heads * kFewRows);
    T* const scores = space.take(shape.heads * kFewRows);
    const T* const query = q.data() + (s.query_begin + task.query) * q.outerStride();
    for (Index row = task.first; row < end; row += kFewRows) {
      const Index rows = std::min(kFewRows, end - row);
      const Index key = s.key_begin + row;
      for (Index r = 0; r < rows; ++r) {
        const T* const key_row = k.data() + (key + r) * k.outerStride();
        for (Index head = 0; head < shape.heads; ++head) {
          scores[head * kFewRows + r] =
              inner_product(query + head * dim, key_row + head / shape.group() * dim, dim);
        }
      }
      const bool padding = any_padding(key, key + rows);
      const auto hide_padding = [&](T* p, T value) {
        for (Index r = 0; r < rows; ++r) {
          if (is_padding(key + r)) p[r] = value;
        }
      };
      for (Index head = 0; head < shape.heads; ++head) {
        RowMap p(scores + head * kFewRows, rows);
        p *= static_cast<T>(shape.scale);
        if (padding) hide_padding(p.data(), -std::numeric_limits<T>::infinity());
        const T new_top = std::max(top[head], p.maxCoeff());
        const T shrink = std::exp(top[head] - new_top);
        top[head] = new_top;
        p = (p - new_top).exp();
        if (padding) hide_padding(p.data(), T(0));
        total[head] = total[head] * shrink + p.sum();
        T* const sum = sums + head * value_dim;
        if (shrink != T(1)) RowMap(sum, value_dim) *= shrink;
        add_values(p.data(), v.data() + key * v.outerStride() + head / shape.group() * value_dim,
                   rows, sum);
      }
    }
  }

  static T inner_product(const T* a, const T* b, Index n) {
    T sum = T(0);
    Index i = 0;
    if (n >= kStrip) {
      Strip strip_sum = ConstStripMap(a) * ConstStripMap(b);
      for (i = kStrip; i + kStrip <= n; i += kStrip) {
        strip_sum += ConstStripMap(a + i) * ConstStripMap(b + i);
      }
      sum = strip_sum.sum();
    }
    if (i < n) sum += (ConstRowMap(a + i, n - i) * ConstRowMap(b + i, n - i)).sum();
    return sum;
  }

  /// sum += p [rows] * values [rows, value_dim], which has the stride of v.
  void add_values(const T* p, const T* values, Index rows, T* sum) const {
    Index d = 0;
    for (; d + kStrip <= shape.value_dim; d += kStrip) {
      Strip strip_sum = ConstStripMap(sum + d);
      for (Index r = 0; r < rows; ++r) {
        strip_sum += p[r] * ConstStripMap(values + r * v.outerStride() + d);
      }
      StripMap(sum + d) = strip_sum;
    }
    const Index rest = shape.value_dim - d;
    if (rest == 0) return;
    for (Index r = 0; r < rows; ++r) {
      RowMap(sum + d, rest) += p[r] * ConstRowMap(values + r * v.outerStride() + d, rest);
    }
  }

  /// Adds up what the tasks of one query found, in the order of the keys.
  /// \param partial  [tasks, heads * (2 + value_dim)]
  void combine(const typename Cache::FewTask& task, MatrixIn<T> partial, MatrixOut<T>& out,
               Scratch<T>& logsumexp) const {
    const Index query = span(task.span).query_begin + task.query;
    const Index count = shape.heads;
    out.row(query).setZero();
    for (Index head = 0; head < count; ++head) {
      auto row = out.row(query).segment(head * shape.value_dim, shape.value_dim);
      const T top = partial.col(count + head).maxCoeff();
      T total = T(0);
      for (Index i = 0; i < partial.rows(); ++i) {
        const T share = std::exp(partial(i, count + head) - top);
        total += share * partial(i, head);
        row += share * partial.row(i).segment(2 * count + head * shape.value_dim, shape.value_dim);
      }
      finish(total, top, head, query, logsumexp);
      if (total != T(0)) row *= T(1) / total;
    }
  }

  /// dq of one block of queries of one head:
  ///
  ///     ds_ij = p_ij (d_out_i . v_j - d_out_i . out_i),    dq_i = scale * sum_j ds_ij k_j
  void backward_queries(const AttentionSpan& s, Index base, Index first, Index head,
                        MatrixIn<T> d_out, MatrixOut<T>& dq, Cache& cache) const {
    const Index queries = std::min(kBlock, s.queries - first);
    const Index first_position = s.first_position() + first;
    const Index kv_head = head / shape.group();
    const Index dim = shape.head_dim;
    const Index value_dim = shape.value_dim;
    const auto scale = static_cast<T>(shape.scale);

    auto& space = kernels::ThreadSpace<T, CausalAttention>::of_this_thread();
    space.reserve(kBlock * (2 * dim + value_dim) + 2 * kRowBlock * kStrip);
    T* const right = space.take(kBlock * dim);
    T* const d_right = space.take(kBlock * value_dim);
    T* const sums = space.take_zeros(kBlock * dim);
    T* const scores = space.take(kRowBlock * kStrip);
    T* const d_p = space.take(kRowBlock * kStrip);
    pack_columns(q, s.query_begin + first, queries, head, dim, scale, right);
    pack_columns(d_out, s.query_begin + first, queries, head, value_dim, T(1), d_right);

    Eigen::Array<T, kBlock, 1> logsumexp = Eigen::Array<T, kBlock, 1>::Zero();
    Eigen::Array<T, kBlock, 1> dot = Eigen::Array<T, kBlock, 1>::Zero();
    for (Index i = 0; i < queries; ++i) {
      logsumexp[i] = cache.logsumexp.view()(head, s.query_begin + first + i);
      dot[i] = cache.dot.view()(head, s.query_begin + first + i);
    }
    for (Index row = 0; row < first_position + queries; row += kRowBlock) {
      const Index capacity = std::min(kRowBlock, s.keys - row);
      const bool padding = any_padding(s.key_begin + row, s.key_begin + row + capacity);
      for (Index strip = 0; strip < strips(queries); ++strip) {
        const Index position = first_position + strip * kStrip;
        const Index rows = std::min(capacity, position + kStrip - row);
        if (rows <= 0) continue;
        multiply_strip(cache.k_rows.at(kv_head, base + row), rows, dim,
                       right + strip * kStrip * dim, dim, scores, false);
        multiply_strip(cache.v_rows.at(kv_head, base + row), rows, value_dim,
                       d_right + strip * kStrip * value_dim, value_dim, d_p, false);
        const Strip strip_logsumexp = logsumexp.template segment<kStrip>(strip * kStrip);
        const Strip strip_dot = dot.template segment<kStrip>(strip * kStrip);
        for (Index r = 0; r < rows; ++r) {
          StripMap ds(scores + r * kStrip);
          ds = (ds - strip_logsumexp).exp() * (StripMap(d_p + r * kStrip) - strip_dot);
        }
        if (padding || row + rows - 1 > position) hide(s, row, rows, position, T(0), scores);
        multiply_strip(cache.k_cols.at(kv_head, base + row), dim, capacity, scores, rows,
                       sums + strip * kStrip * dim, true);
      }
    }
    unpack_columns(sums, scale, s.query_begin + first, queries, head, dim, dq);
  }

  /// dk and dv of one block of keys of one key head, from the queries of all heads of its group:
  ///
  ///     dv_j = sum_i p_ij d_out_i,    dk_j = scale * sum_i ds_ij q_i
  void backward_keys(const AttentionSpan& s, Index base, Index first, Index kv_head,
                     MatrixOut<T>& dk, MatrixOut<T>& dv, Cache& cache) const {
    const Index keys = std::min(kBlock, s.keys - first);
    const Index dim = shape.head_dim;
    const Index value_dim = shape.value_dim;
    const auto scale = static_cast<T>(shape.scale);

    auto& space = kernels::ThreadSpace<T, CausalAttention>::of_this_thread();
    space.reserve(2 * kBlock * (dim + value_dim) + 2 * kRowBlock * kStrip);
    T* const right = space.take(kBlock * dim);
    T* const value_right = space.take(kBlock * value_dim);
    T* const dk_sums = space.take_zeros(kBlock * dim);
    T* const dv_sums = space.take_zeros(kBlock * value_dim);
    T* const scores = space.take(kRowBlock * kStrip);
    T* const d_p = space.take(kRowBlock * kStrip);
    pack_columns(k, s.key_begin + first, keys, kv_head, dim, scale, right);
    pack_columns(v, s.key_begin + first, keys, kv_head, value_dim, T(1), value_right);

    // The first block with a query that sees the first key.
    const Index first_row = std::max<Index>(0, first - s.first_position()) / kRowBlock * kRowBlock;
    for (Index head = kv_head * shape.group(); head < (kv_head + 1) * shape.group(); ++head) {
      const auto logsumexp = cache.logsumexp.view().row(head).segment(s.query_begin, s.queries);
      const auto dot = cache.dot.view().row(head).segment(s.query_begin, s.queries);
      for (Index row = first_row; row < s.queries; row += kRowBlock) {
        const Index capacity = std::min(kRowBlock, s.queries - row);
        const Index position = s.first_position() + row;
        for (Index strip = 0; strip < strips(keys); ++strip) {
          const Index key = first + strip * kStrip;
          // Rows above this one see no key of the strip.
          const Index skip = std::max<Index>(0, key - position) / kHeight * kHeight;
          const Index rows = capacity - skip;
          if (rows <= 0) continue;
          multiply_strip(cache.q_rows.at(head, base + row) + skip * dim, rows, dim,
                         right + strip * kStrip * dim, dim, scores, false);
          multiply_strip(cache.d_out_rows.at(head, base + row) + skip * value_dim, rows, value_dim,
                         value_right + strip * kStrip * value_dim, value_dim, d_p, false);
          for (Index r = 0; r < rows; ++r) {
            StripMap p(scores + r * kStrip);
            StripMap ds(d_p + r * kStrip);
            p = (p - logsumexp[row + skip + r]).exp();
            ds = p * (ds - dot[row + skip + r]);
            const Index visible = position + skip + r - key + 1;
            if (visible < kStrip) {
              const Index hidden = kStrip - std::max<Index>(0, visible);
              std::fill_n(scores + (r + 1) * kStrip - hidden, hidden, T(0));
              std::fill_n(d_p + (r + 1) * kStrip - hidden, hidden, T(0));
            }
          }
          multiply_strip(cache.d_out_cols.at(head, base + row) + skip * kHeight, value_dim,
                         capacity, scores, rows, dv_sums + strip * kStrip * value_dim, true);
          multiply_strip(cache.q_cols.at(head, base + row) + skip * kHeight, dim, capacity, d_p,
                         rows, dk_sums + strip * kStrip * dim, true);
        }
      }
    }
    unpack_columns(dk_sums, scale, s.key_begin + first, keys, kv_head, dim, dk);
    unpack_columns(dv_sums, T(1), s.key_begin + first, keys, kv_head, value_dim, dv);
    for (Index i = 0; i < keys; ++i) {
      const Index key = s.key_begin + first + i;
      if (!is_padding(key)) continue;
      dk.row(key).segment(kv_head * dim, dim).setZero();
      dv.row(key).segment(kv_head * value_dim, value_dim).setZero();
    }
  }
};

}  // namespace weir
