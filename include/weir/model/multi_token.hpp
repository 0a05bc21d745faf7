// SPDX-License-Identifier: MIT
/// \file
/// Modules that predict the tokens after the next one
/// (DeepSeek-AI 2024, "DeepSeek-V3 Technical Report", arXiv:2412.19437, section 2.2).
#pragma once

#include <algorithm>
#include <concepts>
#include <cstddef>
#include <cstdint>
#include <utility>
#include <vector>

#include <weir/core/cache_state.hpp>
#include <weir/core/error.hpp>
#include <weir/core/index_span.hpp>
#include <weir/core/list.hpp>
#include <weir/core/pass.hpp>
#include <weir/core/sequences.hpp>
#include <weir/core/token_ids.hpp>
#include <weir/core/token_rows.hpp>
#include <weir/core/types.hpp>
#include <weir/core/workspace.hpp>
#include <weir/model/any_layer.hpp>
#include <weir/model/block.hpp>
#include <weir/model/decoder.hpp>
#include <weir/model/language_loss.hpp>
#include <weir/model/multi_token_module.hpp>
#include <weir/nn/linear.hpp>

namespace weir {

/// What the main model gives to the first module: its h behind the last block, either before or
/// after the norm in front of the head.
enum class HiddenSource { kHidden, kNormed };

/// What the losses of the modules are divided by.
enum class TargetMean {
  kMain,  ///< The number of the main model's targets, as in the paper.
  kOwn,   ///< Each module's number of targets in the pass, as in Megatron-Core.
};

/// Settings of `MultiToken`.
struct MultiTokenConfig {
  double weight = 0.3;  ///< lambda; DeepSeek-V3: 0.3, later in the training 0.1.
  /// kNormed is what serving engines give to the released weights of DeepSeek-V3 (vLLM).
  HiddenSource source = HiddenSource::kNormed;
  TargetMean mean = TargetMean::kMain;
  Index ignore_index = kNoTarget;  ///< Targets with this value are skipped.
};

/// D modules behind a Decoder. The k-th one predicts the token k + 1 places on. h^0 is the h of the
/// main model, and t are the tokens of a sequence:
///
///     x_i   = W_k concat(norm_e(Emb(t_{i+k})), norm_h(h^{k-1}_i))
///     h^k   = block_k(x)
///     P(t_{i+k+1} | t_0 .. t_{i+k}) = softmax(Head(norm(h^k_i)))
///
/// Emb and Head are those of the main model, multipliers and softcap included. The loss is
///
///     L = lambda / D sum_k L_k,   L_k = -1/N sum_i log P(t_{i+k+1})
///
/// N is the number of the main model's targets, of which module k has k fewer in each sequence (or
/// its own number, see TargetMean). No module looks across the end of a sequence: it works on the
/// positions i that have a token i + k, and a position one of whose tokens is padding is padding.
/// Gradients go through everything: the modules, h, embedding and head. Balancing losses of modules
/// are not multiplied by lambda, but by the share of the sequences that are long enough for the
/// module, so that micro-batches of whole sequences add up to the batch.
///
/// The paper's equation has h first; the released weights, and this class, the embedding.
///
///     const Matrix<T>& logits = model.forward(ids, pass, cache);
///     T loss = cross_entropy.forward(logits, targets, loss_cache);
///     loss += modules.forward(model, cache, ids, targets, pass, modules_cache);
///     model.backward(cross_entropy.backward(loss_cache), cache,
///                    modules.backward(model, modules_cache));
template <std::floating_point T>
class MultiToken {
 public:
  using Scalar = T;
  using State = typename Block<T>::State;  ///< The memory of one sequence in one module.

  /// The cache of one module.
  struct ModuleCache {
    TokenRows main, placed;  ///< The rows of the main model, and of the module.
    Sequences sequences;
    List<Index> rows;  ///< Where its positions are among those of the module before it.
    List<Index> ids, token_ids, targets;
    List<std::uint8_t> mask;
    Matrix<T> h;       ///< h^{k-1}, [positions, d_model].
    Matrix<T> joined;  ///< [positions, 2 d_model]
    typename Decoder<T>::EmbedCache embed;
    typename AnyLayer<T>::Cache embedding_norm, hidden_norm, norm;
    typename Linear<T>::Cache projection;
    typename Block<T>::Cache layer;
    typename Decoder<T>::HeadCache head;  ///< In decoding.
    typename LanguageLoss<T>::Cache loss;
    Matrix<T> d_h;  ///< The gradient of h^k.
  };

  struct Cache {
    CacheState state;
    std::vector<ModuleCache> modules;
    std::vector<T> losses;  ///< L_k, without lambda / D.
    Matrix<T> d_source;     ///< The gradient of h^0.
    Workspace workspace;    ///< What modules need while they run.
  };

  /// \param modules  The D modules.
  /// \throws ConfigError  without modules, if a projection is not [d, 2 d] with the same d for all,
  ///                      or if the weight is negative or not finite.
  explicit MultiToken(std::vector<MultiTokenModule<T>> modules,
                      const MultiTokenConfig& config = {});

  /// \param model    The main model.
  /// \param main     The cache of its last forward pass, with the same ids and pass.
  /// \param ids      One per token, as in that pass.
  /// \param targets  The token that follows each, or `ignore_index`: those of the main model.
  /// \param tokens   N; 0 for the number of targets. See CrossEntropy. Of no use with kOwn.
  /// \return         L, without the auxiliary losses, which go to pass.record.
  /// \throws ShapeError      if h of the main model, targets or pass do not fit the ids.
  /// \throws ConfigError     if a target is out of range, if pass.allowed is given, or N with kOwn.
  /// \throws NonFiniteError  as CrossEntropy does.
  T forward(const Decoder<T>& model, const typename Decoder<T>::Cache& main, TokenIds ids,
            TokenIds targets, const Pass& pass, Cache& cache, Index tokens = 0) const;

  /// Adds to the gradients of the modules and to those of embedding and head of `model`.
  /// \param model    The model of the last forward pass.
  /// \return         The gradient of h, for `model.backward`; lives in the cache.
  /// \throws StateError   if the cache does not fit, see CacheState.
  typename Decoder<T>::HiddenGradient backward(Decoder<T>& model, Cache& cache);

  /// Continues one sequence in module k, counted from 0, for inference.
  /// \param ids      t_{i+k+1} for each new position i.
  /// \param h        The output of the main model, or of the module before, for these positions:
  ///                 [ids, d_model].
  /// \return         The input of the module after it, [ids, d_model].
  /// \throws ConfigError  if an id is out of range; the state is as it was.
  const Matrix<T>& decode(std::size_t k, const Decoder<T>& model, TokenIds ids, MatrixIn<T> h,
                          State& state, ModuleCache& cache) const {
    expect_shape("MultiToken::decode", "h", h, ids.count(), d_model());
    ids.copy_to(cache.ids);
    const Pass pass = {.token_ids = cache.ids};
    State* const states[] = {&state};
    return modules_[k].layer.decode(join(k, model, ids, h, pass, cache), pass, states, cache.layer);
  }

  /// The logits of t_{i+k+2} for rows of a result of `decode`: [rows, vocab].
  const Matrix<T>& logits(std::size_t k, const Decoder<T>& model, MatrixIn<T> h,
                          ModuleCache& cache) const {
    return model.head(modules_[k].norm.forward(h, Pass{}, cache.norm), Pass{}, cache.head);
  }

  /// Parameters `modules.K.*`.
  template <class Self, class Visit>
  static void visit(Self& self, Visit& visit) {
    visit("modules", self.modules_);
  }

  /// D, the number of modules.
  std::size_t depth() const { return modules_.size(); }
  Index d_model() const { return modules_.front().projection.d_out(); }
  const MultiTokenConfig& config() const { return config_; }
  std::vector<MultiTokenModule<T>>& modules() { return modules_; }
  const std::vector<MultiTokenModule<T>>& modules() const { return modules_; }

 private:
  T scale() const { return static_cast<T>(config_.weight / static_cast<double>(modules_.size())); }

  Index count_targets(TokenIds targets) const {
    Index count = 0;
    for (Index t = 0; t < targets.count(); ++t) count += targets[t] != config_.ignore_index ? 1 : 0;
    return count;
  }

  void check(const Matrix<T>& source, TokenIds ids, TokenIds targets, const Pass& pass) const;

  /// Finds the positions of module k, counted from 0, and the tokens and targets of each.
  void place(std::size_t k, TokenIds ids, TokenIds targets, const Pass& pass,
             const ModuleCache* before, ModuleCache& own) const;

  /// The input of module k's block.
  const Matrix<T>& join(std::size_t k, const Decoder<T>& model, TokenIds ids, MatrixIn<T> h,
                        const Pass& pass, ModuleCache& own) const {
    const MultiTokenModule<T>& module = modules_[k];
    set_shape(own.joined, h.rows(), 2 * d_model());
    own.joined.leftCols(d_model()) =
        module.embedding_norm.forward(model.embed(ids, pass, own.embed), pass, own.embedding_norm);
    own.joined.rightCols(d_model()) = module.hidden_norm.forward(h, pass, own.hidden_norm);
    return module.projection.forward(own.joined, pass, own.projection);
  }

  std::vector<MultiTokenModule<T>> modules_;
  MultiTokenConfig config_;
  LanguageLoss<T> loss_;
};

template <std::floating_point T>
MultiToken<T>::MultiToken(std::vector<MultiTokenModule<T>> modules, const MultiTokenConfig& config)
    : modules_(std::move(modules)),
      config_(config),
      loss_({.cross_entropy = {.ignore_index = config.ignore_index}}) {
  expect_at_least<std::size_t>("MultiToken", "modules", modules_.size(), 1);
  for (std::size_t k = 0; k < modules_.size(); ++k) {
    const Linear<T>& projection = modules_[k].projection;
    if (projection.d_out() == d_model() && projection.d_in() == 2 * d_model()) continue;
    throw_error<ConfigError>("MultiToken: projection ", k, " is [", projection.d_out(), ", ",
                             projection.d_in(), "], expected [", d_model(), ", ", 2 * d_model(),
                             "]");
  }
  expect_at_least("MultiToken", "weight", config.weight, 0.0);
}

template <std::floating_point T>
T MultiToken<T>::forward(const Decoder<T>& model, const typename Decoder<T>::Cache& main,
                         TokenIds ids, TokenIds targets, const Pass& pass, Cache& cache,
                         Index tokens) const {
  cache.state.begin();
  const Workspace::Lend lend(&cache.workspace);
  const Matrix<T>& source =
      config_.source == HiddenSource::kHidden ? model.hidden(main) : model.normed(main);
  check(source, ids, targets, pass);
  if (config_.mean == TargetMean::kOwn && tokens != 0) {
    throw_error<ConfigError>("MultiToken::forward: tokens = ", tokens,
                             ", expected 0 where each module divides by its own number of targets");
  }
  if (config_.mean == TargetMean::kMain && tokens == 0) tokens = count_targets(targets);
  cache.modules.resize(modules_.size());
  cache.losses.assign(modules_.size(), T(0));
  set_shape(cache.d_source, source.rows(), source.cols());
  const Matrix<T>* h = &source;
  for (std::size_t k = 0; k < modules_.size(); ++k) {
    ModuleCache& own = cache.modules[k];
    place(k, ids, targets, pass, k == 0 ? nullptr : &cache.modules[k - 1], own);
    set_shape(own.h, own.rows.count(), d_model());
    for (Index r = 0; r < own.rows.count(); ++r) own.h.row(r) = h->row(own.rows[r]);
    Pass inner = pass;
    inner.sequences = &own.sequences;
    inner.mask = own.mask;
    inner.token_ids = own.token_ids;
    inner.places = {};  // A module has the first tokens of each sequence.
    own.placed.set("MultiToken::forward", inner, own.rows.count());
    inner.aux_scale *= own.placed.real_sequences() / std::max(1.0, own.main.real_sequences());
    const PassRecord::Scope module_scope(pass.record, "modules", static_cast<Index>(k));
    const PassRecord::Scope layer_scope(pass.record, "layer");
    h = &modules_[k].layer.forward(join(k, model, own.ids, own.h, inner, own), inner, own.layer);
    const Matrix<T>& normed = modules_[k].norm.forward(*h, inner, own.norm);
    cache.losses[k] = loss_.forward(model, normed, own.targets, inner, own.loss, tokens);
  }
  T sum = T(0);
  for (const T loss : cache.losses) sum += loss;
  cache.state.finish(*this, pass, cache.d_source);
  return scale() * sum;
}

template <std::floating_point T>
typename Decoder<T>::HiddenGradient MultiToken<T>::backward(Decoder<T>& model, Cache& cache) {
  cache.state.begin_backward("MultiToken::backward", *this, cache.d_source);
  const Index d = d_model();
  const Workspace::Lend lend(&cache.workspace);
  for (std::size_t k = modules_.size(); k-- > 0;) {
    ModuleCache& own = cache.modules[k];
    MultiTokenModule<T>& module = modules_[k];
    const Matrix<T>& d_head =
        module.norm.backward(loss_.backward(model, own.loss, scale()), own.norm);
    const Matrix<T>* dh = &d_head;
    if (k + 1 < modules_.size()) {
      own.d_h += d_head;  // The next module has put its part there.
      dh = &own.d_h;
    }
    const Matrix<T>& d_joined =
        module.projection.backward(module.layer.backward(*dh, own.layer), own.projection);
    model.embed_backward(module.embedding_norm.backward(d_joined.leftCols(d), own.embedding_norm),
                         own.embed);
    const Matrix<T>& d_before = module.hidden_norm.backward(d_joined.rightCols(d), own.hidden_norm);
    Matrix<T>& to = k == 0 ? cache.d_source : cache.modules[k - 1].d_h;
    const Index rows = k == 0 ? cache.d_source.rows() : cache.modules[k - 1].h.rows();
    set_zero(to, rows, d);
    for (Index r = 0; r < own.rows.count(); ++r) to.row(own.rows[r]) = d_before.row(r);
  }
  if (config_.source == HiddenSource::kHidden) return {.hidden = &cache.d_source};
  return {.normed = &cache.d_source};
}

template <std::floating_point T>
void MultiToken<T>::check(const Matrix<T>& source, TokenIds ids, TokenIds targets,
                          const Pass& pass) const {
  constexpr auto kWhere = "MultiToken::forward";
  const Index count = ids.count();
  expect_shape(kWhere, "h of the main model", source, count, d_model());
  if (targets.count() != count) {
    throw_error<ShapeError>(kWhere, ": targets has ", targets.count(), " entries, expected ", count,
                            " (one per token)");
  }
  pass.check(kWhere, count);
  if (!pass.allowed.empty()) {
    throw_error<ConfigError>(kWhere, ": pass.allowed has ", pass.allowed.size(),
                             " entries, expected none: modules have experts of their own");
  }
}

template <std::floating_point T>
void MultiToken<T>::place(std::size_t k, TokenIds ids, TokenIds targets, const Pass& pass,
                          const ModuleCache* before, ModuleCache& own) const {
  const auto shift = static_cast<Index>(k) + 1;
  own.sequences.clear();
  own.rows.clear();
  own.ids.clear();
  own.token_ids.clear();
  own.targets.clear();
  own.mask.clear();
  const bool masked = !pass.mask.empty();
  own.main.set("MultiToken::forward", pass, ids.count());
  const Sequences& main = own.main.sequences();
  for (Index s = 0; s < main.count(); ++s) {
    const Index first = before == nullptr ? main.begin(s) : before->sequences.begin(s);
    own.sequences.append(std::max<Index>(0, main.length(s) - shift));
    for (Index i = 0; i + shift < main.length(s); ++i) {
      const Index token = main.begin(s) + i + shift;
      const bool padding =
          masked && (pass.is_padding(token) || (before == nullptr ? pass.is_padding(first + i)
                                                                  : before->mask[first + i] == 0));
      own.rows.push_back(first + i);
      own.ids.push_back(ids[token]);
      own.token_ids.push_back(pass.token_ids.empty() ? ids[token] : element(pass.token_ids, token));
      own.targets.push_back(padding ? config_.ignore_index : targets[token]);
      if (masked) own.mask.push_back(padding ? 0 : 1);
    }
  }
}

}  // namespace weir

#ifdef WEIR_COMPILED
extern template class weir::MultiToken<float>;
extern template class weir::MultiToken<double>;
#endif
