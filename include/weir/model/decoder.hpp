// SPDX-License-Identifier: MIT
/// \file
/// A decoder-only language model: embedding, blocks, norm, head.
#pragma once

#include <algorithm>
#include <cmath>
#include <concepts>
#include <optional>
#include <span>
#include <string>
#include <utility>
#include <vector>

#include <weir/core/decode_states.hpp>
#include <weir/core/error.hpp>
#include <weir/core/pass.hpp>
#include <weir/core/types.hpp>
#include <weir/kernels/matmul.hpp>
#include <weir/kernels/packed_product.hpp>
#include <weir/model/any_layer.hpp>
#include <weir/model/block.hpp>
#include <weir/model/logit_scale.hpp>
#include <weir/nn/embedding.hpp>
#include <weir/nn/linear.hpp>
#include <weir/ops/rows.hpp>

namespace weir {

/// Settings of `Decoder`.
struct DecoderConfig {
  double embedding_multiplier = 1.0;  ///< e; Grok-1: sqrt(d_model).
  double logit_multiplier = 1.0;      ///< m of LogitScale.
  double logit_softcap = 0.0;         ///< c of LogitScale; 0: none.
};

/// Maps token ids to the logits of the token that follows each:
///
///     h = e embedding[ids];   h <- block_l(h) for each layer l;   logits = scale(norm(h) W^T)
///
/// W [vocab, d_model] is a head of its own or, tied, the embedding. Blocks are of any make, so that
/// one class serves dense and sparse models and any interleave of the two. For `scale`, mostly the
/// identity, see LogitScale.
///
/// What hangs on the model beside its logits, such as modules that predict further tokens, finds h
/// behind the blocks in `hidden` and `normed`, shares `embed` and `head`, and hands the gradient of
/// h to `backward`.
template <std::floating_point T>
class Decoder {
 public:
  using Scalar = T;

  struct EmbedCache {
    typename Embedding<T>::Cache table;
    Matrix<T> x, dx;  ///< Multiplied, where there is a multiplier.
  };

  struct HeadCache {
    typename Linear<T>::Cache linear;  ///< Of a head of its own.
    Matrix<T> x, dx;                   ///< [tokens, d_model], where the head is tied.
    Matrix<T> logits, d_z;             ///< [tokens, vocab], where it is tied or logits are scaled.
  };

  struct Cache {
    EmbedCache embedding;
    std::vector<typename Block<T>::Cache> layers;
    typename AnyLayer<T>::Cache norm;
    HeadCache head;
    Matrix<T> d_normed, d_hidden;
    std::vector<Index> last;                        ///< The rows of the last new tokens, decoding.
    Matrix<T> x_last;                               ///< Those rows, where they are not all.
    std::vector<typename Block<T>::State*> states;  ///< Those of one layer.
    T aux_loss = T(0);                              ///< Sum over the layers.
    bool filled = false;
  };

  /// What decoding keeps of one sequence. A copy continues on its own.
  struct State {
    std::vector<typename Block<T>::State> layers;
    Index length = 0;  ///< Tokens so far.

    /// Forgets all tokens but the first `to`, as after a draft that was not accepted.
    /// \throws ConfigError  unless 0 <= to <= length.
    /// \throws StateError   if a layer has already forgotten what would then be needed, such as
    ///                      keys that had left a window. The state cannot be continued then.
    void truncate(Index to) {
      if (to < 0 || to > length) {
        fail<ConfigError>("Decoder::State::truncate: length = ", to, ", expected 0 to ", length);
      }
      for (auto& layer : layers) layer.truncate(to);
      length = to;
    }
  };

  /// The gradient of what is made of h beside the logits; null: none. What is there has to live
  /// until `backward` returns.
  struct HiddenGradient {
    const Matrix<T>* hidden = nullptr;  ///< Of `hidden`, [tokens, d_model].
    const Matrix<T>* normed = nullptr;  ///< Of `normed`, [tokens, d_model].
  };

  /// \param head     Empty for tied weights.
  /// \throws ConfigError  if the head does not fit the embedding, or a setting is out of range.
  Decoder(Embedding<T> embedding, std::vector<Block<T>> layers, AnyLayer<T> norm,
          std::optional<Linear<T>> head = std::nullopt, const DecoderConfig& config = {})
      : embedding_(std::move(embedding)),
        layers_(std::move(layers)),
        norm_(std::move(norm)),
        head_(std::move(head)),
        config_(config),
        scale_{config.logit_multiplier, config.logit_softcap} {
    if (!(config.embedding_multiplier > 0.0 && std::isfinite(config.embedding_multiplier))) {
      fail<ConfigError>("Decoder: embedding_multiplier = ", config.embedding_multiplier,
                        ", expected finite and > 0");
    }
    scale_.check("Decoder");
    if (head_ && (head_->d_in() != d_model() || head_->d_out() != vocab())) {
      fail<ConfigError>("Decoder: the head is [", head_->d_out(), ", ", head_->d_in(),
                        "], expected [", vocab(), ", ", d_model(), "] as the embedding");
    }
  }

  /// \param ids      One per token; with several sequences, packed one after the other as
  ///                 pass.sequences says.
  /// \return         Logits [tokens, vocab], for inference. Keeps nothing.
  Matrix<T> forward(std::span<const Index> ids, const Pass& pass = {}) const {
    Cache cache;
    return forward(ids, pass, cache);
  }

  /// The same, keeping what `backward` needs.
  /// \throws ConfigError  if an id is out of range.
  /// \throws ShapeError   if pass.mask or pass.sequences do not fit.
  const Matrix<T>& forward(std::span<const Index> ids, const Pass& pass, Cache& cache) const {
    pass.check("Decoder::forward", static_cast<Index>(ids.size()));
    cache.filled = false;
    Pass own = pass;
    if (own.token_ids.empty()) own.token_ids = ids;
    const Matrix<T>& logits =
        run(ids, cache, false, [&](std::size_t l, MatrixIn<T> x) -> const Matrix<T>& {
          return layers_[l].forward(x, own, cache.layers[l]);
        });
    cache.filled = true;
    return logits;
  }

  /// Adds to all gradients; the layers' auxiliary losses are part of the objective.
  /// \param d_logits  [tokens, vocab], of the last forward pass.
  /// \param also      The gradient of h from elsewhere.
  /// \throws StateError   if the last pass with `cache` was no forward pass that succeeded.
  /// \throws ShapeError   if d_logits does not have the shape of the logits, or a gradient in
  ///                      `also` that of h.
  void backward(MatrixIn<T> d_logits, Cache& cache, const HiddenGradient& also = {}) {
    if (!cache.filled) {
      fail<StateError>("Decoder::backward: the cache is empty, expected a forward pass before");
    }
    const Index tokens = hidden(cache).rows();
    expect_shape("Decoder::backward", "d_logits", d_logits, tokens, vocab());
    if (also.hidden != nullptr) {
      expect_shape("Decoder::backward", "also.hidden", *also.hidden, tokens, d_model());
    }
    if (also.normed != nullptr) {
      expect_shape("Decoder::backward", "also.normed", *also.normed, tokens, d_model());
    }
    const auto sum = [](const Matrix<T>& a, const Matrix<T>* b, Matrix<T>& place) {
      if (b == nullptr) return &a;
      place.resize(a.rows(), a.cols());
      add_rows<T>(a, *b, place);
      return static_cast<const Matrix<T>*>(&place);
    };
    const Matrix<T>* d = sum(head_backward(d_logits, cache.head), also.normed, cache.d_normed);
    d = sum(norm_.backward(*d, cache.norm), also.hidden, cache.d_hidden);
    for (std::size_t l = layers_.size(); l-- > 0;) d = &layers_[l].backward(*d, cache.layers[l]);
    embed_backward(*d, cache.embedding);
  }

  /// h behind the last block, before the norm, of all tokens of the last pass with `cache`:
  /// [tokens, d_model].
  const Matrix<T>& hidden(const Cache& cache) const {
    return layers_.empty() ? embedded(cache.embedding) : cache.layers.back().branches.back().out;
  }

  /// norm(h), which the head was given: [rows of the logits, d_model].
  const Matrix<T>& normed(const Cache& cache) const {
    return head_ ? cache.head.linear.x : cache.head.x;
  }

  /// norm(h) for inference, of any rows: [rows, d_model].
  const Matrix<T>& norm(MatrixIn<T> h, typename AnyLayer<T>::Cache& cache) const {
    return norm_.forward(h, cache);
  }

  /// e embedding[ids], [ids, d_model].
  /// \throws ConfigError  if an id is out of range.
  const Matrix<T>& embed(std::span<const Index> ids, EmbedCache& cache) const {
    const Matrix<T>& x = embedding_.forward(ids, cache.table);
    if (config_.embedding_multiplier == 1.0) return x;
    multiply_embedding(x, cache.x);
    return cache.x;
  }

  /// Adds to the gradient of the embedding.
  /// \param dx       [ids, d_model], of the last `embed` with `cache`.
  void embed_backward(MatrixIn<T> dx, EmbedCache& cache) {
    if (config_.embedding_multiplier == 1.0) return embedding_.backward(dx, cache.table);
    multiply_embedding(dx, cache.dx);
    embedding_.backward(cache.dx, cache.table);
  }

  /// scale(x W^T), [rows, vocab].
  /// \param x        [rows, d_model]
  const Matrix<T>& head(MatrixIn<T> x, HeadCache& cache) const {
    if (head_) {
      const Matrix<T>& z = head_->forward(x, cache.linear);
      if (scale_.is_identity()) return z;
      cache.logits.resize(z.rows(), z.cols());
      scale_.forward(z, cache.logits);
      return cache.logits;
    }
    cache.x = x;
    cache.logits.resize(x.rows(), vocab());
    if (tied_head_.empty()) {
      multiply_nt<T>(cache.x, embedding_.weight().value, cache.logits);
    } else {
      const kernels::PackedTo<T> to = {&tied_head_, 0, x.rows(), cache.logits.data(), vocab()};
      kernels::multiply_packed<T>(cache.x, {&to, 1});
    }
    if (!scale_.is_identity()) scale_.forward(cache.logits, cache.logits);
    return cache.logits;
  }

  /// Adds to the gradient of the head or, tied, of the embedding.
  /// \param d_logits  [rows, vocab], of the last `head` with `cache`.
  /// \return         dL/dx, [rows, d_model].
  const Matrix<T>& head_backward(MatrixIn<T> d_logits, HeadCache& cache) {
    if (!scale_.is_identity()) {
      cache.d_z.resize(d_logits.rows(), d_logits.cols());
      scale_.backward(cache.logits, d_logits, cache.d_z);
      return product_backward(cache.d_z, cache);
    }
    return product_backward(d_logits, cache);
  }

  /// Continues one sequence by `ids`, a whole prompt or a single token, for inference. However the
  /// sequence is cut into calls, the logits are to rounding those that `forward` gives for the
  /// whole, provided that no token's result depends on later ones; a capacity can make it so.
  /// \param last_only  Computes the logits of the last of them alone.
  /// \return         Logits [ids, vocab]; [1, vocab] with last_only, if there are ids at all.
  /// \throws ConfigError  if an id is out of range; `state` is as it was. After any other exception
  ///                      `state.truncate(state.length)` makes it so, if it can.
  const Matrix<T>& decode(std::span<const Index> ids, State& state, Cache& cache,
                          bool last_only = false) const {
    State* const states[] = {&state};
    return decode(ids, {}, states, cache, last_only);
  }

  /// Continues several sequences at once, each by any number of tokens. Mixtures of experts see the
  /// tokens of all of them in one pass; the logits of each are to rounding those it gets alone,
  /// under the same condition.
  /// \param ids      The new tokens, packed one sequence after the other as pass.sequences says;
  ///                 without, there is one sequence.
  /// \param pass     Is taken as not training, and without auxiliary losses.
  /// \param states   One for each sequence, all different.
  /// \param last_only  Computes the logits of the last new token of each sequence alone.
  /// \return         Logits [ids, vocab]; with last_only, a row for each sequence that has new
  ///                 tokens.
  /// \throws ShapeError   if pass does not fit the ids.
  /// \throws StateError   unless there is one state for each sequence.
  /// \throws ConfigError  if a token is padding, of which a state keeps nothing, or an id is out of
  ///                      range. The states are as they were in these cases; after any other
  ///                      exception truncating each to its length makes them so, if it can.
  const Matrix<T>& decode(std::span<const Index> ids, const Pass& pass,
                          std::span<State* const> states, Cache& cache,
                          bool last_only = false) const {
    pass.check("Decoder::decode", static_cast<Index>(ids.size()));
    expect_states<State>("Decoder::decode", pass, states);
    cache.filled = false;
    Pass own = pass;
    own.training = false;
    own.aux_scale = 0.0;
    if (own.token_ids.empty()) own.token_ids = ids;
    for (State* state : states) state->layers.resize(layers_.size());
    const auto end_of = [&](std::size_t s) {
      return pass.sequences == nullptr ? static_cast<Index>(ids.size())
                                       : pass.sequences->end(static_cast<Index>(s));
    };
    cache.last.clear();
    for (std::size_t s = 0; s < states.size(); ++s) {
      if (end_of(s) > (s == 0 ? 0 : end_of(s - 1))) cache.last.push_back(end_of(s) - 1);
    }
    const Matrix<T>& logits =
        run(ids, cache, last_only, [&](std::size_t l, MatrixIn<T> x) -> const Matrix<T>& {
          cache.states.clear();
          for (State* state : states) cache.states.push_back(&state->layers[l]);
          return layers_[l].decode(x, own, cache.states, cache.layers[l]);
        });
    for (std::size_t s = 0; s < states.size(); ++s) {
      states[s]->length += end_of(s) - (s == 0 ? 0 : end_of(s - 1));
    }
    return logits;
  }

  /// Lets the balancing rules of all layers act, once after each optimizer step.
  void update() {
    for (Block<T>& layer : layers_) layer.update();
  }

  /// What the routing of the last pass with `cache` did, for each mixture of experts; nothing
  /// before the first pass.
  std::vector<NamedReport> reports(const Cache& cache) const {
    std::vector<NamedReport> reports;
    for (std::size_t l = 0; l < std::min(layers_.size(), cache.layers.size()); ++l) {
      layers_[l].add_reports("layers." + std::to_string(l) + ".", cache.layers[l], reports);
    }
    return reports;
  }

  /// See `weir::set_storage`. A tied head is stored beside the embedding, which then is no
  /// parameter either.
  void set_storage(Storage storage) {
    for (Block<T>& layer : layers_) weir::set_storage(layer, storage);
    norm_.set_storage(storage);
    if (head_) return head_->set_storage(storage);
    tied_head_ = storage == Storage::kTrainable
                     ? kernels::PackedWeight<T>()
                     : kernels::PackedWeight<T>(embedding_.weight().value, storage);
  }

  /// Parameters `embedding.*`, `layers.N.*`, `norm.*` and, unless tied, `head.*`.
  template <class Self, class Visit>
  static void visit(Self& self, Visit& visit) {
    if (self.tied_head_.empty()) visit("embedding", self.embedding_);
    visit("layers", self.layers_);
    visit("norm", self.norm_);
    if (self.head_) visit("head", *self.head_);
  }

  Index vocab() const { return embedding_.vocab(); }
  Index d_model() const { return embedding_.d_model(); }
  bool tied() const { return !head_; }
  const DecoderConfig& config() const { return config_; }
  std::vector<Block<T>>& layers() { return layers_; }
  const std::vector<Block<T>>& layers() const { return layers_; }

 private:
  template <class Run>
  const Matrix<T>& run(std::span<const Index> ids, Cache& cache, bool last_only,
                       Run&& layer) const {
    cache.layers.resize(layers_.size());
    cache.aux_loss = T(0);
    const Matrix<T>* x = &embed(ids, cache.embedding);
    for (std::size_t l = 0; l < layers_.size(); ++l) {
      x = &layer(l, *x);
      cache.aux_loss += cache.layers[l].aux_loss;
    }
    if (last_only && static_cast<Index>(cache.last.size()) < x->rows()) {
      cache.x_last.resize(static_cast<Index>(cache.last.size()), d_model());
      for (std::size_t i = 0; i < cache.last.size(); ++i) {
        cache.x_last.row(static_cast<Index>(i)) = x->row(cache.last[i]);
      }
      x = &cache.x_last;
    }
    return head(norm_.forward(*x, cache.norm), cache.head);
  }

  const Matrix<T>& embedded(const EmbedCache& cache) const {
    return config_.embedding_multiplier == 1.0 ? cache.table.y : cache.x;
  }

  void multiply_embedding(MatrixIn<T> x, Matrix<T>& y) const {
    scale_rows<T>(static_cast<T>(config_.embedding_multiplier), x, y);
  }

  const Matrix<T>& product_backward(MatrixIn<T> dz, HeadCache& cache) {
    if (head_) return head_->backward(dz, cache.linear);
    expect_trainable("Decoder::backward",
                     tied_head_.empty() ? Storage::kTrainable : Storage::kPacked);
    cache.dx.resize(dz.rows(), d_model());
    multiply_nn<T>(dz, embedding_.weight().value, cache.dx);
    multiply_tn<T>(dz, cache.x, embedding_.weight().gradient(), true);
    return cache.dx;
  }

  Embedding<T> embedding_;
  std::vector<Block<T>> layers_;
  AnyLayer<T> norm_;
  std::optional<Linear<T>> head_;
  DecoderConfig config_;
  LogitScale<T> scale_;
  kernels::PackedWeight<T> tied_head_;  // Empty unless the head is tied and stored for inference.
};

}  // namespace weir
