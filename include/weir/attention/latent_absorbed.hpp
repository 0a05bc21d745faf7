// SPDX-License-Identifier: MIT
/// \file
/// Latent attention by the absorbed way, without keys and values (DeepSeek-AI 2024,
/// arXiv:2405.04434, section 2.1.2).
#pragma once

#include <algorithm>
#include <span>
#include <vector>

#include <weir/attention/causal.hpp>
#include <weir/attention/latent_cache.hpp>
#include <weir/attention/latent_config.hpp>
#include <weir/core/list.hpp>
#include <weir/core/parallel.hpp>
#include <weir/core/scratch.hpp>
#include <weir/core/storage.hpp>
#include <weir/core/types.hpp>
#include <weir/kernels/head_blocks.hpp>

namespace weir {

/// Since q_nope . (W_uk c) = (W_uk^T q_nope) . c, and a sum of W_uv c is W_uv of the sum, queries
/// can be compared with latents, and latents added up, as one key and value head of kv_rank +
/// rope_dim and kv_rank numbers that all query heads share:
///
///     a_h = softmax(scale [q_nope_h W_uk_h | q_rope_h] [c | k_rope]^T)
///     out_h = (sum_j a_hj c_j) W_uv_h^T
template <class T>
class LatentAbsorbed {
 public:
  /// Workspace.
  struct Cache {
    List<AttentionSpan> spans;   ///< The sequences, their queries numbered without gaps.
    List<KeyValueRows<T>> kept;  ///< The contents of their states.
    List<Index> rows;            ///< Which of the tokens are absorbed.
    Scratch<T> apart;            ///< The rows that each head multiplies, head after head.
    Scratch<T> q;                ///< [rows, heads * (kv_rank + rope_dim)]
    Scratch<T> latents;          ///< The weighted sums of latents, [rows, heads * kv_rank].
    Scratch<T> context;          ///< [rows, heads * value_dim]
    std::vector<Product<T>> products;
    typename CausalAttention<T>::Cache attention;

    void clear() {
      spans.clear();
      kept.clear();
      rows.clear();
    }

    /// Adds a sequence.
    /// \param span   The place of its queries among all tokens, some of which may not be added.
    /// \param state  The tokens that it has seen, the new ones included.
    void add(const AttentionSpan& span, const LatentCache<T>& state) {
      spans.push_back({rows.count(), span.queries, 0, span.keys});
      kept.push_back(KeyValueRows<T>::of(state));
      for (Index i = 0; i < span.queries; ++i) rows.push_back(span.query_begin + i);
    }
  };

  explicit LatentAbsorbed(const LatentConfig& config)
      : config_(config),
        keys_(config.heads, kernels::HeadBlocks<T>::Side::kTransposed),
        values_(config.heads, kernels::HeadBlocks<T>::Side::kRows) {}

  /// Keeps copies of the weights for inference, or forgets them for kTrainable.
  void set_storage(const Matrix<T>& key_up, const Matrix<T>& value_up, Storage storage) {
    keys_.set_storage(key_up, storage);
    values_.set_storage(value_up, storage);
  }

  /// Sets the rows of `context` that belong to the sequences added to `cache`.
  /// \param q         [tokens, heads * (nope_dim + rope_dim)], rotated.
  /// \param key_up    [heads * nope_dim, kv_rank]; read unless the copies are stored for inference.
  /// \param value_up  [heads * value_dim, kv_rank]; read unless the copies are stored for
  /// inference. \param context   [tokens, heads * value_dim]
  void attend(const Matrix<T>& q, const Matrix<T>& key_up, const Matrix<T>& value_up,
              Matrix<T>& context, Cache& cache) const;

 private:
  /// Calls `body(i, h)` for each row and head.
  template <class Body>
  void for_each_head(Index rows, Index cost, Body&& body) const {
    parallel_rows(rows, config_.heads * cost, [&](Index begin, Index end) {
      for (Index i = begin; i < end; ++i) {
        for (Index h = 0; h < config_.heads; ++h) body(i, h);
      }
    });
  }

  LatentConfig config_;
  kernels::HeadBlocks<T> keys_, values_;
};

template <class T>
void LatentAbsorbed<T>::attend(const Matrix<T>& q, const Matrix<T>& key_up,
                               const Matrix<T>& value_up, Matrix<T>& context, Cache& cache) const {
  if (cache.rows.empty()) return;
  const Index count = cache.rows.count();
  const Index heads = config_.heads;
  const Index rank = config_.kv_rank;
  const Index width = rank + config_.rope_dim;

  auto low_q = cache.q.reshape(count, heads * width);
  auto nope = cache.apart.reshape(heads * count, config_.nope_dim);
  for_each_head(count, config_.query_dim(), [&](Index i, Index h) {
    const T* const from = &q(cache.rows[i], h * config_.query_dim());
    std::copy_n(from, config_.nope_dim, &nope(h * count + i, 0));
    std::copy_n(from + config_.nope_dim, config_.rope_dim, &low_q(i, h * width + rank));
  });
  keys_.multiply(nope, key_up, low_q, width, cache.products);

  auto latents = cache.latents.reshape(count, heads * rank);
  CausalAttention<T>({heads, 1, width, rank, config_.scale()}, cache.spans, low_q, cache.kept)
      .forward(latents, cache.attention);

  auto sums = cache.apart.reshape(heads * count, rank);
  for_each_head(count, rank, [&](Index i, Index h) {
    std::copy_n(&latents(i, h * rank), rank, &sums(h * count + i, 0));
  });
  auto values = cache.context.reshape(count, heads * config_.value_dim);
  values_.multiply(sums, value_up, values, config_.value_dim, cache.products);
  parallel_rows(count, values.cols(), [&](Index begin, Index end) {
    for (Index i = begin; i < end; ++i) {
      std::copy_n(&values(i, 0), values.cols(), &context(cache.rows[i], 0));
    }
  });
}

}  // namespace weir

#ifdef WEIR_COMPILED
extern template class weir::LatentAbsorbed<float>;
extern template class weir::LatentAbsorbed<double>;
#endif
