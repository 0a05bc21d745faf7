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
#include <weir/kernels/panel.hpp>
#include <weir/kernels/register_block.hpp>
#include <weir/kernels/thread_space.hpp>
#include <weir/kernels/transpose.hpp>
#include <weir/ops/exp.hpp>
#include <weir/ops/lanes.hpp>

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
    /// The rows of each head by themselves, one behind the other. Read column by column from the
    /// matrix, whose rows lie a power of two apart, they would push each other out of L1.
    struct Apart {
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
    Scratch<T> dot;      ///< d_out . out, [heads, queries].
    Apart q, k, v, d_out;
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
    if (!cache.tasks.empty()) set_apart(v, shape.kv_heads, shape.value_dim, cache.v);
    run(cache.tasks, shape.heads, [&](const auto& task, Index head) {
      forward_block(span(task.span), task.first, head, out, cache);
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
    set_apart(q, shape.heads, shape.head_dim, cache.q);
    set_apart(k, shape.kv_heads, shape.head_dim, cache.k);
    set_apart(d_out, shape.heads, shape.value_dim, cache.d_out);

    auto dot = cache.dot.reshape(shape.heads, q.rows());
    const Index width = shape.value_dim;
    const auto product = [](const Lanes<T>& a, const Lanes<T>& b) -> Lanes<T> { return a * b; };
    parallel_rows(q.rows(), 2 * out.cols(), [&](Index begin, Index end) {
      for (Index i = begin; i < end; ++i) {
        for (Index head = 0; head < shape.heads; ++head) {
          dot(head, i) = sum_lanes<T>(width, product, &out.coeffRef(i, head * width),
                                      &d_out.coeffRef(i, head * width));
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
      backward_queries(span(task.span), task.first, head, d_out, dq, cache);
    });
    cache.tasks.clear();
    for (Index s = 0; s < span_count(); ++s) {
      for (Index first = 0; first < span(s).keys; first += kBlock) {
        cache.tasks.push_back({s, first});
      }
    }
    run(cache.tasks, shape.kv_heads, [&](const auto& task, Index kv_head) {
      backward_keys(span(task.span), task.first, kv_head, dk, dv, cache);
    });
  }

 private:
  // Scores are computed as a [rows, kStrip] strip, left operand times right operand. Softmax then
  // works on whole vectors of a strip's columns, and the strip is, as it lies, the right operand of
  // the product with the values. One side of the attention matrix is "rows", cut in blocks of
  // kRowBlock; the other is "columns", cut in blocks of kBlock, which are a few strips.
  static constexpr Index kStrip = kernels::Block<T>::kCols;
  static constexpr Index kVectors = kStrip / kLanes<T>;
  static constexpr Index kBlock = 64;
  static constexpr Index kRowBlock = 96;
  // A few queries are computed one by one, their keys in chunks of kChunk for parallelism, and
  // those in pieces of kFewRows that stay in L1.
  static constexpr Index kChunk = 256;
  static constexpr Index kFewRows = 32;
  static_assert(kBlock % kStrip == 0 && kFewRows % kLanes<T> == 0);

  using Arithmetic = kernels::Native<T>;
  using Left = kernels::LeftRows<Arithmetic>;
  using Task = typename Cache::Task;
  using Apart = typename Cache::Apart;

  static std::size_t index(Index i) { return static_cast<std::size_t>(i); }
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

  /// Copies the heads of `from`, each `dim` wide.
  static void set_apart(MatrixIn<T> from, Index head_count, Index dim, Apart& to) {
    to.height = from.rows();
    to.storage.reshape(head_count * from.rows(), dim);
    parallel_rows(from.rows(), from.cols(), [&](Index begin, Index end) {
      for (Index head = 0; head < head_count; ++head) {
        for (Index row = begin; row < end; ++row) {
          std::copy_n(&from.coeffRef(row, head * dim), dim, to.at(head, row));
        }
      }
    });
  }

  /// Rows of one head from `row` on, as they are and transposed, as left operands.
  static Left rows_of(MatrixIn<T> from, Index row, Index head, Index dim) {
    return {&from.coeffRef(row, head * dim), from.outerStride(), 1};
  }
  static Left rows_of(Apart& from, Index row, Index head) {
    return {from.at(head, row), from.storage.cols(), 1};
  }
  static Left columns_of(Apart& from, Index row, Index head) {
    return {from.at(head, row), 1, from.storage.cols()};
  }

  /// Packs `count` (at most kBlock) rows of one head as the columns of right operands, one
  /// [dim, kStrip] strip after the other, filled up with zeros.
  static void pack_columns(MatrixIn<T> from, Index row, Index count, Index head, Index dim,
                           T factor, T* to) {
    kernels::pack<kStrip>(from.data() + row * from.outerStride() + head * dim, from.outerStride(),
                          1, count, dim, to);
    if (factor != T(1)) scale(to, strips(count) * kStrip * dim, factor);
  }

  /// The inverse for results: multiplies the strips by `factor` and writes them to `count` rows of
  /// one head.
  static void unpack_columns(T* from, T factor, Index row, Index count, Index head, Index dim,
                             MatrixOut<T>& to) {
    if (factor != T(1)) scale(from, strips(count) * kStrip * dim, factor);
    for (Index i = 0; i < count; i += kLanes<T>) {
      const T* const columns = from + i / kStrip * kStrip * dim + i % kStrip;
      const Index lanes = std::min(kLanes<T>, count - i);
      T* const target = &to(row + i, head * dim);
      Index d = 0;
      if (lanes == kLanes<T>) {
        for (; d + kLanes<T> <= dim; d += kLanes<T>) {
          kernels::transpose<T>(columns + d * kStrip, kStrip, target + d, to.outerStride());
        }
      }
      for (; d < dim; ++d) {
        for (Index lane = 0; lane < lanes; ++lane) {
          target[lane * to.outerStride() + d] = columns[d * kStrip + lane];
        }
      }
    }
  }

  static void scale(T* numbers, Index count, T factor) {
    const auto times = [factor](const Lanes<T>& x) -> Lanes<T> { return factor * x; };
    map_lanes<T>(count, times, numbers, numbers);
  }

  /// out [rows, kStrip] (+)= left [rows, depth] * right [depth, kStrip].
  static void multiply_strip(const Left& left, Index rows, const T* right, Index depth, T* out,
                             bool accumulate) {
    const kernels::PackedPanel<Arithmetic> panel = {right, nullptr, depth};
    kernels::multiply_panel<Arithmetic>(left, rows, depth, panel, out, kStrip, accumulate);
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

  void forward_block(const AttentionSpan& s, Index first, Index head, MatrixOut<T>& out,
                     Cache& cache) const {
    const Index queries = std::min(kBlock, s.queries - first);
    const Index first_position = s.first_position() + first;
    const Index kv_head = head / shape.group();
    const Index dim = shape.head_dim;
    const Index value_dim = shape.value_dim;

    auto& space = kernels::ThreadSpace<T, CausalAttention>::of_this_thread();
    space.reserve(kBlock * (dim + value_dim + 2) + kRowBlock * kStrip);
    T* const right = space.take(kBlock * dim);
    T* const sums = space.take_zeros(kBlock * value_dim);
    T* const scores = space.take(kRowBlock * kStrip);
    T* const top = space.take(kBlock);  // The largest score so far.
    T* const total = space.take_zeros(kBlock);
    std::fill_n(top, kBlock, std::numeric_limits<T>::lowest());
    pack_columns(q, s.query_begin + first, queries, head, dim, static_cast<T>(shape.scale), right);

    for (Index row = 0; row < first_position + queries; row += kRowBlock) {
      const Index capacity = std::min(kRowBlock, s.keys - row);
      const bool padding = any_padding(s.key_begin + row, s.key_begin + row + capacity);
      for (Index strip = 0; strip < strips(queries); ++strip) {
        const Index column = strip * kStrip;
        const Index position = first_position + column;
        const Index rows = std::min(capacity, position + kStrip - row);
        if (rows <= 0) continue;
        multiply_strip(rows_of(k, s.key_begin + row, kv_head, dim), rows, right + column * dim, dim,
                       scores, false);
        if (padding || row + rows - 1 > position) {
          hide(s, row, rows, position, -std::numeric_limits<T>::infinity(), scores);
        }
        T* const sum = sums + column * value_dim;
        soften(rows, scores, top + column, total + column, sum);
        multiply_strip(columns_of(cache.v, s.key_begin + row, kv_head), value_dim, scores, rows,
                       sum, true);
      }
    }

    for (Index i = 0; i < queries; ++i) {
      finish(total[i], top[i], head, s.query_begin + first + i, cache.logsumexp);
      total[i] = total[i] == T(0) ? T(0) : T(1) / total[i];
    }
    for (Index strip = 0; strip < strips(queries); ++strip) {
      for (Index vector = 0; vector < kStrip; vector += kLanes<T>) {
        const Lanes<T> factor = load_lanes<T>(total + strip * kStrip + vector);
        for (Index d = 0; d < value_dim; ++d) {
          T* const sum = sums + (strip * value_dim + d) * kStrip + vector;
          store_lanes<T>(load_lanes<T>(sum) * factor, sum);
        }
      }
    }
    unpack_columns(sums, T(1), s.query_begin + first, queries, head, value_dim, out);
  }

  /// Turns scores [rows, kStrip] into exp(score - top), `top` being raised to the largest of its
  /// column, and adds them to `total`. What was summed for a smaller top is brought to the new one.
  void soften(Index rows, T* scores, T* top, T* total, T* sum) const {
    Lanes<T> new_top[kVectors];
    for (Index j = 0; j < kVectors; ++j) new_top[j] = load_lanes<T>(top + j * kLanes<T>);
    for (Index r = 0; r < rows; ++r) {
#pragma GCC unroll 4
      for (Index j = 0; j < kVectors; ++j) {
        const Lanes<T> score = load_lanes<T>(scores + r * kStrip + j * kLanes<T>);
        new_top[j] = max_lanes<T>(new_top[j], score);
      }
    }
    for (Index j = 0; j < kVectors; ++j) {
      T* const column = scores + j * kLanes<T>;
      T* const of_total = total + j * kLanes<T>;
      const Lanes<T> old_top = load_lanes<T>(top + j * kLanes<T>);
      Lanes<T> sum_of_column = load_lanes<T>(of_total);
      if (any_lane<T>(new_top[j] != old_top)) {
        store_lanes<T>(new_top[j], top + j * kLanes<T>);
        const Lanes<T> shrink = exp_lanes<T>(old_top - new_top[j]);
        sum_of_column *= shrink;
        for (Index d = 0; d < shape.value_dim; ++d) {
          T* const s = sum + d * kStrip + j * kLanes<T>;
          store_lanes<T>(load_lanes<T>(s) * shrink, s);
        }
      }
      for (Index r = 0; r < rows; ++r) {
        const Lanes<T> p = exp_lanes<T>(load_lanes<T>(column + r * kStrip) - new_top[j]);
        store_lanes<T>(p, column + r * kStrip);
        sum_of_column += p;
      }
      store_lanes<T>(sum_of_column, of_total);
    }
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
      const bool padding = any_padding(key, key + rows);
      // Keys for all heads, then values for all: a group's share of both would not fit in L1.
      for (Index head = 0; head < shape.heads; ++head) {
        const T* const of_head = &k.coeffRef(key, head / shape.group() * dim);
        for (Index r = 0; r < rows; r += kLanes<T>) {
          const Index count = std::min(kLanes<T>, rows - r);
          const Lanes<T> products = inner_products(
              query + head * dim, of_head + r * k.outerStride(), k.outerStride(), count, dim);
          store_lanes<T>(static_cast<T>(shape.scale) * products, scores + head * kFewRows + r);
        }
      }
      for (Index head = 0; head < shape.heads; ++head) {
        T* const p = scores + head * kFewRows;
        // What is beyond the keys is hidden too, so that softmax works on whole vectors.
        std::fill(p + rows, p + kFewRows, -std::numeric_limits<T>::infinity());
        for (Index r = 0; padding && r < rows; ++r) {
          if (is_padding(key + r)) p[r] = -std::numeric_limits<T>::infinity();
        }
        const T old_top = top[head];
        top[head] = std::max(old_top, max_of(p, kFewRows));
        const auto exp = [top = top[head]](const Lanes<T>& x) -> Lanes<T> {
          return exp_lanes<T>(x - top);
        };
        map_lanes<T>(kFewRows, exp, p, p);
        if (top[head] != old_top) {
          const T shrink = std::exp(old_top - top[head]);
          total[head] *= shrink;
          scale(sums + head * value_dim, value_dim, shrink);
        }
        const auto same = [](const Lanes<T>& x) -> Lanes<T> { return x; };
        total[head] += sum_lanes<T>(kFewRows, same, p);
      }
      for (Index head = 0; head < shape.heads; ++head) {
        add_values(scores + head * kFewRows, &v.coeffRef(key, head / shape.group() * value_dim),
                   rows, sums + head * value_dim);
      }
    }
  }

  /// The products of one query and `count` <= kLanes keys.
  static Lanes<T> inner_products(const T* query, const T* key, Index stride, Index count,
                                 Index dim) {
    Lanes<T> sums[kLanes<T>];
    Index i = 0;
    for (; i + 4 <= count; i += 4)
      inner_products<4>(query, key + i * stride, stride, dim, sums + i);
    for (; i < count; ++i) inner_products<1>(query, key + i * stride, stride, dim, sums + i);
    for (; i < kLanes<T>; ++i) sums[i] = Lanes<T>{};
    return sums_of<T>(sums);
  }

  /// The lanes of the products of one query and as many keys.
  template <int keys>
  static void inner_products(const T* query, const T* key, Index stride, Index dim,
                             Lanes<T>* sums) {
    Lanes<T> sum[keys] = {};
    Index d = 0;
    for (; d + kLanes<T> <= dim; d += kLanes<T>) {
      const Lanes<T> part = load_lanes<T>(query + d);
#pragma GCC unroll 4
      for (Index i = 0; i < keys; ++i) sum[i] += part * load_lanes<T>(key + i * stride + d);
    }
    if (d < dim) {
      const Lanes<T> part = load_lanes<T>(query + d, dim - d);
#pragma GCC unroll 4
      for (Index i = 0; i < keys; ++i)
        sum[i] += part * load_lanes<T>(key + i * stride + d, dim - d);
    }
#pragma GCC unroll 4
    for (Index i = 0; i < keys; ++i) sums[i] = sum[i];
  }

  /// sum += p [rows] * values [rows, value_dim], which has the stride of v.
  void add_values(const T* p, const T* values, Index rows, T* sum) const {
    const Index stride = v.outerStride();
    Index d = 0;
    for (; d + 4 * kLanes<T> <= shape.value_dim; d += 4 * kLanes<T>) {
      add_values<4>(p, values + d, stride, rows, kLanes<T>, sum + d);
    }
    for (; d < shape.value_dim; d += kLanes<T>) {
      const Index lanes = std::min(kLanes<T>, shape.value_dim - d);
      add_values<1>(p, values + d, stride, rows, lanes, sum + d);
    }
  }

  /// `blocks` blocks of kLanes columns, of the last one `lanes` lanes.
  template <int blocks>
  static void add_values(const T* p, const T* values, Index stride, Index rows, Index lanes,
                         T* sum) {
    Lanes<T> even[blocks] = {};  // Two sums, neither of which waits for the other.
    Lanes<T> odd[blocks] = {};
    Index r = 0;
    for (; r + 1 < rows; r += 2) {
      const T* const first = values + r * stride;
      const T* const second = first + stride;
#pragma GCC unroll 4
      for (Index j = 0; j < blocks; ++j) {
        even[j] += p[r] * load_lanes<T>(first + j * kLanes<T>, lanes);
        odd[j] += p[r + 1] * load_lanes<T>(second + j * kLanes<T>, lanes);
      }
    }
    if (r < rows) {
      for (Index j = 0; j < blocks; ++j) {
        even[j] += p[r] * load_lanes<T>(values + r * stride + j * kLanes<T>, lanes);
      }
    }
#pragma GCC unroll 4
    for (Index j = 0; j < blocks; ++j) {
      T* const to = sum + j * kLanes<T>;
      store_lanes<T>(load_lanes<T>(to, lanes) + (even[j] + odd[j]), to, lanes);
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
  void backward_queries(const AttentionSpan& s, Index first, Index head, MatrixIn<T> d_out,
                        MatrixOut<T>& dq, Cache& cache) const {
    const Index queries = std::min(kBlock, s.queries - first);
    const Index first_position = s.first_position() + first;
    const Index kv_head = head / shape.group();
    const Index dim = shape.head_dim;
    const Index value_dim = shape.value_dim;
    const auto scale = static_cast<T>(shape.scale);

    auto& space = kernels::ThreadSpace<T, CausalAttention>::of_this_thread();
    space.reserve(kBlock * (2 * dim + value_dim + 2) + 2 * kRowBlock * kStrip);
    T* const right = space.take(kBlock * dim);
    T* const d_right = space.take(kBlock * value_dim);
    T* const sums = space.take_zeros(kBlock * dim);
    T* const scores = space.take(kRowBlock * kStrip);
    T* const d_p = space.take(kRowBlock * kStrip);
    pack_columns(q, s.query_begin + first, queries, head, dim, scale, right);
    pack_columns(d_out, s.query_begin + first, queries, head, value_dim, T(1), d_right);

    T* const logsumexp = space.take_zeros(kBlock);
    T* const dot = space.take_zeros(kBlock);
    std::copy_n(&cache.logsumexp.view()(head, s.query_begin + first), queries, logsumexp);
    std::copy_n(&cache.dot.view()(head, s.query_begin + first), queries, dot);
    for (Index row = 0; row < first_position + queries; row += kRowBlock) {
      const Index capacity = std::min(kRowBlock, s.keys - row);
      const bool padding = any_padding(s.key_begin + row, s.key_begin + row + capacity);
      for (Index strip = 0; strip < strips(queries); ++strip) {
        const Index position = first_position + strip * kStrip;
        const Index rows = std::min(capacity, position + kStrip - row);
        if (rows <= 0) continue;
        const Index column = strip * kStrip;
        multiply_strip(rows_of(cache.k, s.key_begin + row, kv_head), rows, right + column * dim,
                       dim, scores, false);
        multiply_strip(rows_of(v, s.key_begin + row, kv_head, value_dim), rows,
                       d_right + column * value_dim, value_dim, d_p, false);
        for (Index j = 0; j < kStrip; j += kLanes<T>) {
          const Lanes<T> lse = load_lanes<T>(logsumexp + column + j);
          const Lanes<T> along_out = load_lanes<T>(dot + column + j);
          for (Index r = 0; r < rows; ++r) {
            T* const ds = scores + r * kStrip + j;
            const Lanes<T> p = exp_lanes<T>(load_lanes<T>(ds) - lse);
            store_lanes<T>(p * (load_lanes<T>(d_p + r * kStrip + j) - along_out), ds);
          }
        }
        if (padding || row + rows - 1 > position) hide(s, row, rows, position, T(0), scores);
        multiply_strip(columns_of(cache.k, s.key_begin + row, kv_head), dim, scores, rows,
                       sums + column * dim, true);
      }
    }
    unpack_columns(sums, scale, s.query_begin + first, queries, head, dim, dq);
  }

  /// dk and dv of one block of keys of one key head, from the queries of all heads of its group:
  ///
  ///     dv_j = sum_i p_ij d_out_i,    dk_j = scale * sum_i ds_ij q_i
  void backward_keys(const AttentionSpan& s, Index first, Index kv_head, MatrixOut<T>& dk,
                     MatrixOut<T>& dv, Cache& cache) const {
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
          const Index skip = std::max<Index>(0, key - position);
          const Index rows = capacity - skip;
          if (rows <= 0) continue;
          const Index query = s.query_begin + row + skip;
          T* const dk_sum = dk_sums + strip * kStrip * dim;
          T* const dv_sum = dv_sums + strip * kStrip * value_dim;
          multiply_strip(rows_of(cache.q, query, head), rows, right + strip * kStrip * dim, dim,
                         scores, false);
          multiply_strip(rows_of(cache.d_out, query, head), rows,
                         value_right + strip * kStrip * value_dim, value_dim, d_p, false);
          for (Index r = 0; r < rows; ++r) {
#pragma GCC unroll 4
            for (Index j = 0; j < kStrip; j += kLanes<T>) {
              T* const p = scores + r * kStrip + j;
              T* const ds = d_p + r * kStrip + j;
              const Lanes<T> share = exp_lanes<T>(load_lanes<T>(p) - logsumexp[row + skip + r]);
              store_lanes<T>(share, p);
              store_lanes<T>(share * (load_lanes<T>(ds) - dot[row + skip + r]), ds);
            }
            const Index visible = position + skip + r - key + 1;
            if (visible < kStrip) {
              std::fill_n(scores + r * kStrip + visible, kStrip - visible, T(0));
              std::fill_n(d_p + r * kStrip + visible, kStrip - visible, T(0));
            }
          }
          multiply_strip(columns_of(cache.d_out, query, head), value_dim, scores, rows, dv_sum,
                         true);
          multiply_strip(columns_of(cache.q, query, head), dim, d_p, rows, dk_sum, true);
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
