// SPDX-License-Identifier: MIT
/// \file
/// Text from a decoder that checks drafts of its own multi-token modules
/// (DeepSeek-AI 2024, arXiv:2412.19437, section 5.4.3; Leviathan et al. 2022, arXiv:2211.17192).
#pragma once

#include <algorithm>
#include <concepts>
#include <cstddef>
#include <numeric>
#include <span>
#include <utility>
#include <vector>

#include <weir/core/cache_storage.hpp>
#include <weir/core/error.hpp>
#include <weir/core/index_span.hpp>
#include <weir/core/list.hpp>
#include <weir/core/random.hpp>
#include <weir/core/token_ids.hpp>
#include <weir/core/types.hpp>
#include <weir/model/any_layer.hpp>
#include <weir/model/decoder.hpp>
#include <weir/model/generate.hpp>
#include <weir/model/multi_token.hpp>
#include <weir/model/sampling.hpp>
#include <weir/ops/top_k.hpp>

namespace weir {

/// How the drafts fared, summed over calls.
struct DraftReport {
  Index passes = 0;  ///< How many passes the main model made, those over the prompts included.
  Index tokens = 0;  ///< How many tokens were drawn.
  /// How many drafts of each module the main model checked, and how many it accepted. A draft that
  /// follows a refused one is not checked.
  List<Index> checked = {}, accepted = {};

  /// The share of the checked drafts that were accepted; 0 if none was checked. (DeepSeek-V3
  /// reports 0.85 to 0.90 for its one module.)
  double acceptance() const {
    const Index all = std::accumulate(checked.begin(), checked.end(), Index(0));
    const Index good = std::accumulate(accepted.begin(), accepted.end(), Index(0));
    return all == 0 ? 0.0 : static_cast<double>(good) / static_cast<double>(all);
  }
};

/// What speculative decoding remembers about one conversation. A copy continues on its own.
template <std::floating_point T>
struct SpeculativeState {
  /// Rows for the positions from `begin` on, one after the other.
  struct Rows {
    std::vector<T> values;
    Index begin = 0;
  };

  typename Decoder<T>::State main;
  List<Index> tokens;                                  ///< All tokens that `main` has seen.
  std::vector<typename MultiToken<T>::State> modules;  ///< One for each module.
  std::vector<Index> lengths;                          ///< How many positions each module has seen.
  std::vector<Rows> hidden;  ///< The rows that each module has yet to read.
  bool complete = true;      ///< False if an exception ended the last call.

  SpeculativeState() = default;
  /// \param storage  See DecoderState; that of the modules, too.
  explicit SpeculativeState(CacheStorage storage) : main(storage) {}
};

namespace detail {

/// One conversation in progress. Tokens 0 .. L - 1 are known; the main model has seen all of them
/// except the last. Module k, counted from 0, has seen some of the positions 0 .. L - 2. At
/// position i it reads token i + k + 1, which is a draft if it is not known yet, and the output of
/// module k - 1 for position i.
template <class T>
class Speculation {
 public:
  Speculation(const Decoder<T>& model, const MultiToken<T>& modules, SpeculativeState<T>& state,
              DraftReport& report);

  void run(Turn<T>& turn);

 private:
  std::size_t depth() const { return modules_.depth(); }
  Index known() const { return state_.tokens.count(); }

  /// Runs a pass of the main model.
  const Matrix<T>& feed(TokenIds ids, bool last_only) {
    const Matrix<T>& logits = decode(model_, ids, state_.main, cache_, last_only);
    ++report_.passes;
    return logits;
  }

  /// Hands the main model's h of the first `count` tokens of the last pass to the first module.
  void keep(Index count) {
    const Matrix<T>& h = model_.hidden(cache_);
    const bool normed = modules_.config().source == HiddenSource::kNormed;
    append(state_.hidden[0], (normed ? model_.norm(h, norm_cache_) : h).topRows(count));
  }

  void draw(Turn<T>& turn, MatrixIn<T> logits) {
    turn.add(turn.sample(sampler_, logits));
    state_.tokens.push_back(turn.result.tokens.back());
    ++report_.tokens;
  }

  /// Lets the first `count` modules draft a token each.
  void draft(std::size_t count);

  /// Draws tokens as long as they equal the drafts, and one more. The other drafts are taken back.
  void check(Turn<T>& turn);

  /// A token that is known or drafted.
  Index token(Index i) const { return i < known() ? state_.tokens[i] : drafts_[i - known()]; }

  using Rows = typename SpeculativeState<T>::Rows;

  Index offset(const Rows& rows, Index position) const {
    return (position - rows.begin) * model_.d_model();
  }
  Eigen::Map<const Matrix<T>> rows(const Rows& rows, Index begin, Index end) const {
    return {rows.values.data() + offset(rows, begin), end - begin, model_.d_model()};
  }
  void append(Rows& rows, MatrixIn<T> more) const {
    for (Index t = 0; t < more.rows(); ++t) {
      const T* row = &more.coeffRef(t, 0);
      rows.values.insert(rows.values.end(), row, row + more.cols());
    }
  }
  void forget_from(Rows& rows, Index position) const {
    rows.values.resize(static_cast<std::size_t>(offset(rows, position)));
  }
  void forget_before(Rows& rows, Index position) const {
    rows.values.erase(rows.values.begin(), rows.values.begin() + offset(rows, position));
    rows.begin = position;
  }

  const Decoder<T>& model_;
  const MultiToken<T>& modules_;
  SpeculativeState<T>& state_;
  DraftReport& report_;
  typename Decoder<T>::Cache cache_;
  typename AnyLayer<T>::Cache norm_cache_;
  std::vector<typename MultiToken<T>::ModuleCache> caches_;
  Sampler<T> sampler_;
  List<Index> drafts_, ids_;
};

template <class T>
Speculation<T>::Speculation(const Decoder<T>& model, const MultiToken<T>& modules,
                            SpeculativeState<T>& state, DraftReport& report)
    : model_(model), modules_(modules), state_(state), report_(report), caches_(depth()) {
  if (modules.d_model() != model.d_model()) {
    throw_error<ConfigError>("speculate: the modules have d_model = ", modules.d_model(),
                             ", expected ", model.d_model(), " as the model");
  }
  if (!state.complete) {
    throw_error<StateError>(
        "speculate: the state is incomplete after an exception, expected a copy made before");
  }
  if (state.modules.empty()) {
    state.modules.resize(depth(), {{}, state.main.storage()});
    state.lengths.assign(depth(), 0);
    state.hidden.resize(depth());
  } else if (state.modules.size() != depth()) {
    throw_error<StateError>("speculate: the state has ", state.modules.size(),
                            " modules, expected ", depth());
  }
  const auto count = static_cast<Index>(depth());
  report.checked.resize(std::max(report.checked.count(), count));
  report.accepted.resize(std::max(report.accepted.count(), count));
}

template <class T>
void Speculation<T>::run(Turn<T>& turn) {
  const Matrix<T>& logits = feed(turn.prompt, true);
  state_.complete = false;
  turn.prompt.append_to(state_.tokens);
  keep(turn.prompt.count());
  turn.ended = turn.until->count == 0;
  if (!turn.ended) draw(turn, logits.row(0));
  while (!turn.ended) {
    const Index wanted = turn.until->count - static_cast<Index>(turn.result.tokens.size());
    draft(std::min(depth(), static_cast<std::size_t>(wanted - 1)));
    check(turn);
  }
  if (state_.main.length < known()) {
    feed(std::span<const Index>(&state_.tokens.back(), 1), true);
    keep(1);
  }
  state_.complete = true;
}

template <class T>
void Speculation<T>::draft(std::size_t count) {
  drafts_.clear();
  const Index seen = state_.main.length;
  for (std::size_t k = 0; k < count; ++k) {
    const Index begin = state_.lengths[k];
    ids_.clear();
    for (Index i = begin; i < seen; ++i) ids_.push_back(token(i + static_cast<Index>(k) + 1));
    const Matrix<T>& h = modules_.decode(k, model_, ids_, rows(state_.hidden[k], begin, seen),
                                         state_.modules[k], caches_[k]);
    state_.lengths[k] = seen;
    if (k + 1 < depth()) append(state_.hidden[k + 1], h);
    const Matrix<T>& logits = modules_.logits(k, model_, h.bottomRows(1), caches_[k]);
    Index best = 0;
    top_k<T>(row_span(logits, 0), {&best, 1});
    drafts_.push_back(best);
  }
}

template <class T>
void Speculation<T>::check(Turn<T>& turn) {
  const Index seen = state_.main.length;
  ids_.assign(1, state_.tokens.back());
  ids_.insert(ids_.end(), drafts_.begin(), drafts_.end());
  const Matrix<T>& logits = feed(ids_, false);
  Index good = 1;  // How many of the tokens that the main model was given are right.
  for (Index i = 0; i <= drafts_.count() && !turn.ended; ++i) {
    draw(turn, logits.row(i));
    if (i == drafts_.count()) break;
    ++report_.checked[i];
    if (drafts_[i] != state_.tokens.back()) break;
    ++report_.accepted[i];
    ++good;
  }
  state_.main.truncate(seen + good);
  keep(good);
  // Module k read drafts at the last k positions it saw, right or wrong.
  for (std::size_t k = 0; k < depth(); ++k) {
    const Index sure = std::max<Index>(0, seen - static_cast<Index>(k));
    if (state_.lengths[k] > sure) {
      state_.modules[k].truncate(sure);
      state_.lengths[k] = sure;
      if (k + 1 < depth()) forget_from(state_.hidden[k + 1], sure);
    }
    forget_before(state_.hidden[k], state_.lengths[k]);
  }
}

}  // namespace detail

/// Continues one conversation as `generate` does, in fewer passes of the main model. The D modules
/// draft the next D tokens, and the main model computes the last token and the drafts in one pass
/// of D + 1 tokens. Drafts are accepted up to the first one that differs from the token that the
/// main model itself draws; the others are taken back (`State::truncate`).
///
/// The text is the one that `generate` gives with the same rng, up to rounding, whether sampling is
/// greedy or not: each token is drawn from the main model's logits after the tokens before it, with
/// the same random numbers. The modules, which draft greedily, only decide the speed. (Where a
/// capacity couples the tokens of a pass, texts may differ; see `Decoder::decode`.)
///
/// \param prompt    At least one token; it follows the tokens of `state`.
/// \param state     Empty, or filled with the same model and modules. At the end it holds the
///                  prompt and the new tokens.
/// \param report    The numbers of this call are added to it.
/// \throws ConfigError     as `generate` does, and if the modules are not as wide as the model.
///                         `state` has not changed then.
/// \throws StateError      if `state` is of another number of modules, or incomplete.
/// \throws NonFiniteError  if the model yields NaN. `state` is incomplete then, as it is after an
///                         exception of the callback.
template <std::floating_point T>
Generated speculate(const Decoder<T>& model, const MultiToken<T>& modules, TokenIds prompt,
                    const Until& until, const Sampling& sampling, Rng& rng,
                    SpeculativeState<T>& state, DraftReport& report) {
  detail::Turn<T> turn = {prompt, &until, &sampling, &rng, &state.main};
  turn.check(model.vocab());
  detail::Speculation<T>(model, modules, state, report).run(turn);
  return std::move(turn.result);
}

/// Generates a text of `count` tokens that begins with `prompt` and is not continued later.
/// \return          The new tokens.
template <std::floating_point T>
std::vector<Index> speculate(const Decoder<T>& model, const MultiToken<T>& modules, TokenIds prompt,
                             Index count, const Sampling& sampling, Rng& rng, DraftReport& report) {
  SpeculativeState<T> state;
  const Until until = {.count = count};
  return speculate(model, modules, prompt, until, sampling, rng, state, report).tokens;
}

}  // namespace weir

#ifdef WEIR_COMPILED
extern template class weir::detail::Speculation<float>;
extern template class weir::detail::Speculation<double>;
#endif
