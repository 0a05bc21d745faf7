// SPDX-License-Identifier: MIT
/// \file
/// A decoder-only language model: embedding, blocks, norm, head.
#pragma once

#include <concepts>
#include <optional>
#include <span>
#include <string_view>
#include <utility>
#include <vector>

#include <weir/core/cache_state.hpp>
#include <weir/core/decoding.hpp>
#include <weir/core/error.hpp>
#include <weir/core/list.hpp>
#include <weir/core/pass.hpp>
#include <weir/core/token_ids.hpp>
#include <weir/core/types.hpp>
#include <weir/model/any_layer.hpp>
#include <weir/model/block.hpp>
#include <weir/model/block_stack.hpp>
#include <weir/model/decoder_parts.hpp>
#include <weir/model/language_head.hpp>
#include <weir/nn/embedding.hpp>
#include <weir/nn/linear.hpp>
#include <weir/ops/rows.hpp>

namespace weir {

/// Maps token ids to the logits of the token that follows each:
///
///     h = e embedding[ids];   h <- block_l(h) for each layer l;   logits = scale(norm(h) W^T)
///
/// W [vocab, d_model] is a head of its own or, if tied, the embedding. Blocks may be of any kind,
/// so that one class serves dense and sparse models and any mixture of the two. For `scale`, mostly
/// the identity, see LogitScale.
///
/// Other parts that use h behind the blocks, such as modules that predict further tokens, find it
/// in `hidden` and `normed`. They may share `embed` and `head`, and hand the gradient of h to
/// `backward`.
template <std::floating_point T>
class Decoder {
 public:
  using Scalar = T;
  using HeadCache = typename LanguageHead<T>::Cache;
  using State = DecoderState<T>;
  using HiddenGradient = weir::HiddenGradient<T>;

  struct EmbedCache {
    typename Embedding<T>::Cache table;
    Matrix<T> x, dx;  ///< Only used if there is a multiplier.
  };

  struct Cache {
    CacheState state;
    EmbedCache embedding;
    typename BlockStack<T>::Cache layers;
    typename AnyLayer<T>::Cache norm;
    HeadCache head;
    Matrix<T> normed, d_normed, d_hidden;  ///< The head's input, gradients of it and of h.
    List<Index> last;                      ///< The rows of the last new tokens, in decoding.
    Matrix<T> x_last;                      ///< Those rows, if they are not all.
    bool has_logits = false;               ///< Whether the last pass went through the head.
  };

  /// \param head     Empty for tied weights.
  /// \throws ConfigError  if the head does not fit the embedding, or a setting is out of range.
  Decoder(Embedding<T> embedding, std::vector<Block<T>> layers, AnyLayer<T> norm,
          std::optional<Linear<T>> head = std::nullopt, const DecoderConfig& config = {});

  /// \param ids      One per token; with several sequences, packed one after the other as
  ///                 pass.sequences says.
  /// \return         Logits [tokens, vocab]; zeros for padding.
  /// \throws ConfigError  if an id is out of range, that of padding included.
  /// \throws ShapeError   if pass.mask or pass.sequences do not fit.
  const Matrix<T>& forward(TokenIds ids, const Pass& pass, Cache& cache) const {
    const Matrix<T>& x = run_to_head("Decoder::forward", ids, pass, cache);
    cache.has_logits = true;
    return cache.state.finish(*this, pass, head(x, pass, cache.head));
  }

  /// The same up to the head: norm(h), [tokens, d_model]. For LanguageLoss.
  const Matrix<T>& forward_to_head(TokenIds ids, const Pass& pass, Cache& cache) const {
    const Matrix<T>& x = run_to_head("Decoder::forward_to_head", ids, pass, cache);
    cache.has_logits = false;
    return cache.state.finish(*this, pass, x);
  }

  /// Adds to all gradients; the layers' auxiliary losses are part of the objective.
  /// \param d_logits  [tokens, vocab], of the last forward pass.
  /// \param also      The gradient of h from elsewhere.
  /// \throws StateError   if the cache does not fit, see CacheState.
  /// \throws ShapeError   if d_logits does not have the shape of the logits, or a gradient in
  ///                      `also` that of h.
  void backward(MatrixIn<T> d_logits, Cache& cache, const HiddenGradient& also = {}) {
    begin_backward(d_logits, true, cache, also);
    backward_layers(head_backward(d_logits, cache.head), cache, also);
  }

  /// The same behind `forward_to_head`.
  /// \param d_normed  [tokens, d_model], the gradient of what it returned.
  void backward_from_head(MatrixIn<T> d_normed, Cache& cache, const HiddenGradient& also = {}) {
    begin_backward(d_normed, false, cache, also);
    backward_layers(d_normed, cache, also);
  }

  /// Continues several sequences at once, each by any number of tokens, for inference. However a
  /// sequence is cut into calls, and whatever others are beside it, its logits have the same bits:
  /// those that `forward` gives for the whole, if its state rounds nothing (see CacheStorage; and
  /// to rounding where LatentDecoding takes another way). This is provided that no token's result
  /// depends on later ones or on other sequences, as a capacity can make it. Mixtures of experts
  /// see the tokens of all sequences in one pass. For one sequence, see the free function `decode`.
  ///
  /// \param ids      The new tokens, packed one sequence after the other as pass.sequences says;
  ///                 without, there is one sequence.
  /// \param pass     Is run as one that does not train, without auxiliary losses.
  /// \param states   One for each sequence, all different.
  /// \param last_only  Computes the logits of the last new token of each sequence alone.
  /// \return         Logits [ids, vocab]; with last_only, a row for each sequence that has new
  ///                 tokens.
  /// \throws ShapeError   if pass does not fit the ids.
  /// \throws StateError   unless there is one state for each sequence.
  /// \throws ConfigError  if a token is padding, which a state cannot hold, or an id is out of
  ///                      range. In these cases the states are unchanged. After any other
  ///                      exception, truncating each to its length restores them, if it succeeds.
  const Matrix<T>& decode(TokenIds ids, const Pass& pass, std::span<State* const> states,
                          Cache& cache, bool last_only = false) const;

  /// h behind the blocks, [tokens, d_model], and norm(h), [rows of the logits, d_model], of the
  /// last pass with `cache`. Both live in the cache until its next pass.
  const Matrix<T>& hidden(const Cache& cache) const {
    return layers_.output(embedded(cache.embedding), cache.layers);
  }
  const Matrix<T>& normed(const Cache& cache) const { return cache.normed; }

  /// norm(h) for inference, of any rows: [rows, d_model].
  const Matrix<T>& norm(MatrixIn<T> h, typename AnyLayer<T>::Cache& cache) const {
    return norm_.forward(h, Pass{}, cache);
  }

  /// e embedding[ids], [ids, d_model].
  /// \throws ConfigError  if an id is out of range.
  const Matrix<T>& embed(TokenIds ids, const Pass& pass, EmbedCache& cache) const {
    const Matrix<T>& x = embedding_.forward(ids, pass, cache.table);
    if (config_.embedding_multiplier == 1.0) return x;
    scale_rows<T>(static_cast<T>(config_.embedding_multiplier), x, cache.x);
    return cache.x;
  }

  /// Adds to the gradient of the embedding.
  /// \param dx       [ids, d_model], of the last `embed` with `cache`.
  void embed_backward(MatrixIn<T> dx, EmbedCache& cache) {
    if (config_.embedding_multiplier == 1.0) return embedding_.backward(dx, cache.table);
    scale_rows<T>(static_cast<T>(config_.embedding_multiplier), dx, cache.dx);
    embedding_.backward(cache.dx, cache.table);
  }

  /// scale(x W^T), [rows, vocab].
  /// \param x        [rows, d_model]
  const Matrix<T>& head(MatrixIn<T> x, const Pass& pass, HeadCache& cache) const {
    return head_.forward(x, embedding_, pass, cache);
  }

  /// Adds to the gradient of the head or, tied, of the embedding.
  /// \param d_logits  [rows, vocab], of the last `head` with `cache`.
  /// \return         dL/dx, [rows, d_model].
  const Matrix<T>& head_backward(MatrixIn<T> d_logits, HeadCache& cache) {
    return head_.backward(d_logits, embedding_, cache);
  }

  /// Parameters `embedding.*`, `layers.N.*`, `norm.*` and, unless tied, `head.*`.
  template <class Self, class Visit>
  static void visit(Self& self, Visit& visit) {
    if (!self.head_.is_tied_and_stored()) visit("embedding", self.embedding_);
    visit("", self.layers_);
    visit("norm", self.norm_);
    visit("head", self.head_);
  }
  /// A tied head is stored beside the embedding, which is then no parameter any more.
  template <class Self, class Visit>
  static void visit_stored(Self& self, Visit& visit) {
    visit("", self.layers_);
    visit("norm", self.norm_);
    typename LanguageHead<T>::Stored head(self.head_, self.embedding_);
    visit("head", head);
  }

  Index vocab() const { return embedding_.vocab(); }
  Index d_model() const { return embedding_.d_model(); }
  bool tied() const { return head_.is_tied(); }
  const DecoderConfig& config() const { return config_; }
  /// Whether training computes the layers' forward passes again for less memory, see BlockStack.
  bool recompute() const { return layers_.recompute(); }
  void set_recompute(bool recompute) { layers_.set_recompute(recompute); }
  const LanguageHead<T>& language_head() const { return head_; }
  std::vector<Block<T>>& layers() { return layers_.layers(); }
  const std::vector<Block<T>>& layers() const { return layers_.layers(); }

 private:
  /// h behind the layers, which `layers(x, pass)` runs.
  template <class Run>
  const Matrix<T>& run(TokenIds ids, const Pass& pass, Cache& cache, Run&& layers) const {
    const Matrix<T>& x = embed(ids, pass, cache.embedding);
    Pass own = pass;
    if (own.token_ids.empty()) own.token_ids = cache.embedding.table.ids;
    return layers(x, own);
  }

  const Matrix<T>& set_normed(const Matrix<T>& h, const Pass& pass, Cache& cache) const {
    copy_rows<T>(norm_.forward(h, pass, cache.norm), cache.normed);
    return cache.normed;
  }

  const Matrix<T>& run_to_head(std::string_view where, TokenIds ids, const Pass& pass,
                               Cache& cache) const {
    cache.state.begin();
    pass.check(where, ids.count());
    const Matrix<T>& h =
        run(ids, pass, cache, [&](const Matrix<T>& x, const Pass& own) -> const Matrix<T>& {
          return layers_.forward(x, own, cache.layers);
        });
    return set_normed(h, pass, cache);
  }

  void begin_backward(MatrixIn<T> d, bool of_logits, Cache& cache,
                      const HiddenGradient& also) const;

  void backward_layers(MatrixIn<T> d_normed, Cache& cache, const HiddenGradient& also);

  const Matrix<T>& embedded(const EmbedCache& cache) const {
    return config_.embedding_multiplier == 1.0 ? cache.table.y : cache.x;
  }

  Embedding<T> embedding_;
  BlockStack<T> layers_;
  AnyLayer<T> norm_;
  LanguageHead<T> head_;
  DecoderConfig config_;
};

template <std::floating_point T>
Decoder<T>::Decoder(Embedding<T> embedding, std::vector<Block<T>> layers, AnyLayer<T> norm,
                    std::optional<Linear<T>> head, const DecoderConfig& config)
    : embedding_(std::move(embedding)),
      layers_(std::move(layers), config.recompute),
      norm_(std::move(norm)),
      head_("Decoder", std::move(head),
            {.multiplier = config.logit_multiplier, .softcap = config.logit_softcap}),
      config_(config) {
  expect_positive("Decoder", "embedding_multiplier", config.embedding_multiplier);
  const std::optional<Linear<T>>& own = head_.linear();
  if (own && (own->d_in() != d_model() || own->d_out() != vocab())) {
    throw_error<ConfigError>("Decoder: the head is [", own->d_out(), ", ", own->d_in(),
                             "], expected [", vocab(), ", ", d_model(), "] as the embedding");
  }
}

template <std::floating_point T>
void Decoder<T>::begin_backward(MatrixIn<T> d, bool of_logits, Cache& cache,
                                const HiddenGradient& also) const {
  const char* const where = of_logits ? "Decoder::backward" : "Decoder::backward_from_head";
  const auto expect_like_h = [&](std::string_view what, const Matrix<T>* gradient) {
    if (gradient != nullptr) expect_shape(where, what, *gradient, hidden(cache).rows(), d_model());
  };
  if (cache.state.is_filled()) {
    expect_like_h("also.hidden", also.hidden);
    expect_like_h("also.normed", also.normed);
    if (cache.has_logits != of_logits) {
      throw_error<StateError>(
          where, ": the cache was filled by Decoder::", of_logits ? "forward_to_head" : "forward",
          ", expected Decoder::", of_logits ? "forward" : "forward_to_head");
    }
  }
  cache.state.begin_backward(where, *this, d, of_logits ? "d_logits" : "d_normed");
}

template <std::floating_point T>
void Decoder<T>::backward_layers(MatrixIn<T> d_normed, Cache& cache, const HiddenGradient& also) {
  using In = Eigen::Ref<const Matrix<T>>;
  const auto sum = [](const In& a, const Matrix<T>* b, Matrix<T>& place) -> In {
    if (b == nullptr) return a;
    set_shape(place, a.rows(), a.cols());
    add_rows<T>(a, *b, place);
    return place;
  };
  const In behind = sum(d_normed, also.normed, cache.d_normed);
  const In d = sum(norm_.backward(behind, cache.norm), also.hidden, cache.d_hidden);
  embed_backward(layers_.backward(d, embedded(cache.embedding), cache.layers), cache.embedding);
}

template <std::floating_point T>
const Matrix<T>& Decoder<T>::decode(TokenIds ids, const Pass& pass, std::span<State* const> states,
                                    Cache& cache, bool last_only) const {
  cache.state.begin();
  pass.check("Decoder::decode", ids.count());
  expect_states<State>("Decoder::decode", pass, states);
  Pass own = pass;
  own.training = false;
  own.aux_scale = 0.0;
  own.mask = {};  // It has no padding, and may not fit the rows of last_only.
  for (State* state : states) state->layers.resize(layers().size(), {{}, state->storage()});
  const auto count_of = [&](std::size_t s) {
    return pass.sequences == nullptr ? ids.count() : pass.sequences->length(static_cast<Index>(s));
  };
  cache.last.clear();
  for (std::size_t s = 0, end = 0; s < states.size(); ++s) {
    end += static_cast<std::size_t>(count_of(s));
    if (count_of(s) > 0) cache.last.push_back(static_cast<Index>(end) - 1);
  }
  const Matrix<T>* h =
      &run(ids, own, cache, [&](const Matrix<T>& x, const Pass& with_ids) -> const Matrix<T>& {
        const auto state_of = [&](std::size_t s, std::size_t l) -> auto& {
          return states[s]->layers[l];
        };
        return layers_.decode(x, with_ids, states.size(), state_of, cache.layers);
      });
  if (last_only && cache.last.count() < h->rows()) {
    set_shape(cache.x_last, cache.last.count(), d_model());
    for (Index i = 0; i < cache.last.count(); ++i) cache.x_last.row(i) = h->row(cache.last[i]);
    h = &cache.x_last;
  }
  const Matrix<T>& logits = head(set_normed(*h, own, cache), own, cache.head);
  for (std::size_t s = 0; s < states.size(); ++s) states[s]->length += count_of(s);
  return logits;
}

/// The logits [tokens, vocab] that `model` gives, for callers that keep no cache.
template <std::floating_point T>
Matrix<T> infer(const Decoder<T>& model, TokenIds ids, const Pass& pass = {}) {
  typename Decoder<T>::Cache cache;
  return model.forward(ids, pass, cache);
}

/// Continues one sequence by `ids`, a whole prompt or a single token; see Decoder::decode.
/// \param last_only  Computes only the logits of the last of them.
/// \return         Logits [ids, vocab]; [1, vocab] with last_only, if there are ids at all.
template <std::floating_point T>
const Matrix<T>& decode(const Decoder<T>& model, TokenIds ids, typename Decoder<T>::State& state,
                        typename Decoder<T>::Cache& cache, bool last_only = false) {
  typename Decoder<T>::State* const states[] = {&state};
  return model.decode(ids, Pass{}, states, cache, last_only);
}

}  // namespace weir

#ifdef WEIR_COMPILED
extern template class weir::Decoder<float>;
extern template class weir::Decoder<double>;
#endif
