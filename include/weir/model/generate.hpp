// SPDX-License-Identifier: MIT
/// \file
/// Text from a decoder, token by token, for one conversation or many.
#pragma once

#include <algorithm>
#include <concepts>
#include <cstddef>
#include <functional>
#include <span>
#include <string>
#include <string_view>
#include <type_traits>
#include <utility>
#include <vector>

#include <weir/core/error.hpp>
#include <weir/core/index_span.hpp>
#include <weir/core/list.hpp>
#include <weir/core/parallel.hpp>
#include <weir/core/pass.hpp>
#include <weir/core/pass_record.hpp>
#include <weir/core/random.hpp>
#include <weir/core/sequences.hpp>
#include <weir/core/token_ids.hpp>
#include <weir/core/types.hpp>
#include <weir/model/decoder.hpp>
#include <weir/model/sampling.hpp>

namespace weir {

/// When a text ends: as soon as one of these conditions holds. The token that ends it belongs to
/// it.
struct Until {
  Index count = 0;                             ///< There are this many new tokens; may be 0.
  std::vector<Index> tokens = {};              ///< The last token is one of these.
  std::vector<std::vector<Index>> texts = {};  ///< The new tokens end with one of these.
  /// Is called with each new token before the next one is computed, and returns false to end the
  /// text. If empty, the condition never holds.
  std::function<bool(Index)> on_token = {};

  /// \throws ConfigError  if count is negative or a text is empty.
  void check() const {
    expect_at_least<Index>("generate", "count", count, 0);
    for (std::size_t i = 0; i < texts.size(); ++i) {
      if (texts[i].empty()) {
        throw_error<ConfigError>("generate: until.texts[", i,
                                 "] is empty, expected at least one token");
      }
    }
  }
};

/// Why a text ended. If there are several reasons, it is the first of them in this order.
enum class Ending { kToken, kText, kCallback, kCount };

/// The result of one conversation.
struct Generated {
  std::vector<Index> tokens;  ///< The new tokens, the last one included.
  Ending ending = Ending::kCount;
};

/// One conversation of many: what has been said so far, and how it goes on.
template <std::floating_point T>
struct Conversation {
  std::vector<Index> prompt;  ///< At least one token; it follows the tokens of `state`.
  Until until = {};
  Sampling sampling = {};  ///< A repetition penalty is about the prompt and the new tokens.
  Rng rng = Rng(0);  ///< Each conversation has its own, so that others do not change its tokens.
  typename Decoder<T>::State state = {};  ///< Empty, or a copy of a prefix's state.
  std::string adapters = "*";  ///< The adapters of the model that take part, see Pass::adapters.
};

/// Sees what `generate` computes, pass by pass.
template <std::floating_point T>
class GenerationObserver {
 public:
  GenerationObserver() = default;
  GenerationObserver(const GenerationObserver&) = default;
  GenerationObserver& operator=(const GenerationObserver&) = default;
  virtual ~GenerationObserver() = default;

  /// Is called before each pass of the model.
  /// \param conversations  Which conversation each sequence of the pass belongs to.
  /// \return         The record of the pass, which may be null.
  virtual PassRecord* begin(std::span<const Index> conversations) = 0;

  /// Is called for each new token.
  /// \param logits   [1, vocab], from which it was drawn.
  virtual void drawn(Index conversation, MatrixIn<T> logits, Index token) = 0;
};

namespace detail {

/// A conversation as `take_turns` sees it.
template <class T>
struct Turn {
  TokenIds prompt;
  const Until* until = nullptr;
  const Sampling* sampling = nullptr;
  Rng* rng = nullptr;
  typename Decoder<T>::State* state = nullptr;
  Generated result = {};
  bool ended = false;
  std::vector<Index> before = {};  ///< Prompt and new tokens, if their repetition is penalised.
  std::string_view adapters = "*";
  Index number = 0;  ///< Of the conversation.

  void check(Index vocab) const {
    if (prompt.count() == 0) {
      throw_error<ConfigError>("generate: prompt is empty, expected at least one token");
    }
    for (Index i = 0; i < prompt.count(); ++i) {
      if (prompt[i] >= 0 && prompt[i] < vocab) continue;
      throw_error<ConfigError>("generate: prompt[", i, "] = ", prompt[i], " of conversation ",
                               number, ", expected 0 <= id < ", vocab);
    }
    until->check();
    sampling->check();
  }

  /// Draws the next token, which `add` is to be told of.
  Index sample(Sampler<T>& sampler, MatrixIn<T> logits);

  void add(Index token);
};

template <class T>
Index Turn<T>::sample(Sampler<T>& sampler, MatrixIn<T> logits) {
  const bool penalised = sampling->repetition_penalty != 1.0;
  if (penalised && before.empty()) prompt.append_to(before);
  const Index token = sampler.sample(logits, *sampling, *rng, before);
  if (penalised) before.push_back(token);
  return token;
}

template <class T>
void Turn<T>::add(Index token) {
  std::vector<Index>& tokens = result.tokens;
  tokens.push_back(token);
  const bool more = !until->on_token || until->on_token(token);
  const auto ends_with = [&](const std::vector<Index>& text) {
    return text.size() <= tokens.size() && std::equal(text.rbegin(), text.rend(), tokens.rbegin());
  };
  ended = true;
  if (std::find(until->tokens.begin(), until->tokens.end(), token) != until->tokens.end()) {
    result.ending = Ending::kToken;
  } else if (std::any_of(until->texts.begin(), until->texts.end(), ends_with)) {
    result.ending = Ending::kText;
  } else if (!more) {
    result.ending = Ending::kCallback;
  } else {
    ended = static_cast<Index>(tokens.size()) >= until->count;
  }
}

/// The samplers of a model's conversations: one for each thread that draws.
template <class T>
class Samplers {
 public:
  /// Draws the next token of each turn that has not ended, row i of the logits being that of turn
  /// i, in parallel if there is enough to do.
  const List<Index>& sample(std::span<Turn<T>* const> turns, const Matrix<T>& logits) {
    constexpr Index kWorthwhile = 16384;
    const auto count = static_cast<Index>(turns.size());
    const Index most = std::min<Index>(threads(), count * logits.cols() / kWorthwhile);
    const Index chunks = std::clamp<Index>(count, 1, std::max<Index>(1, most));
    if (samplers_.size() < static_cast<std::size_t>(chunks)) {
      samplers_.resize(static_cast<std::size_t>(chunks));
    }
    tokens_.resize(count);
    parallel_for(chunks, [&](Index chunk) {
      Sampler<T>& sampler = samplers_[static_cast<std::size_t>(chunk)];
      for (Index i = chunk * count / chunks; i < (chunk + 1) * count / chunks; ++i) {
        Turn<T>& turn = *element(turns, i);
        if (!turn.ended) tokens_[i] = turn.sample(sampler, logits.row(i));
      }
    });
    return tokens_;
  }

 private:
  std::vector<Sampler<T>> samplers_;
  List<Index> tokens_;
};

/// Lets all turns take place, which have been checked and have the same adapters. Each pass of the
/// model computes the next token of every turn. A turn that has ended leaves once its last token
/// has gone into its state.
template <class T>
void take_turns(const Decoder<T>& model, std::span<Turn<T>> turns,
                GenerationObserver<T>* observer) {
  if (turns.empty()) return;
  for (Turn<T>& turn : turns) turn.ended = turn.until->count == 0;
  Samplers<T> samplers;
  typename Decoder<T>::Cache cache;
  std::vector<Index> ids;
  std::vector<Turn<T>*> present;
  std::vector<typename Decoder<T>::State*> states;
  std::vector<Index> numbers;
  Sequences sequences;
  for (Turn<T>& turn : turns) {
    present.push_back(&turn);
    turn.prompt.append_to(ids);
    sequences.append(turn.prompt.count());
  }
  while (!present.empty()) {
    states.clear();
    numbers.clear();
    for (Turn<T>* turn : present) {
      states.push_back(turn->state);
      numbers.push_back(turn->number);
    }
    PassRecord* const record = observer == nullptr ? nullptr : observer->begin(numbers);
    const Matrix<T>& logits = model.decode(
        ids, {.sequences = &sequences, .record = record, .adapters = turns[0].adapters}, states,
        cache, true);
    const List<Index>& tokens = samplers.sample(present, logits);
    ids.clear();
    sequences.clear();
    std::size_t staying = 0;
    for (std::size_t i = 0; i < present.size(); ++i) {
      Turn<T>& turn = *present[i];
      if (turn.ended) continue;
      const auto row = static_cast<Index>(i);
      if (observer != nullptr) observer->drawn(turn.number, logits.row(row), tokens[row]);
      turn.add(tokens[row]);
      ids.push_back(turn.result.tokens.back());
      sequences.append(1);
      present[staying++] = &turn;
    }
    present.resize(staying);
  }
}

}  // namespace detail

/// Continues each conversation by its prompt, then by tokens drawn one after the other, each from
/// the logits that follow all tokens before it. The first pass of the model computes all prompts;
/// every later pass computes the next token of all conversations that have not ended. Conversations
/// with other adapters have passes of their own, after those of the first. No token is computed
/// twice. At the end each state holds the prompt and the new tokens, so that the next
/// prompt follows them.
///
/// Every conversation gets the tokens that it would get alone, up to rounding and under the
/// condition that `Decoder::decode` names.
///
///     std::vector<Conversation<float>> conversations = ...;
///     const std::vector<Generated> results = generate(model, conversations);
///
/// \param conversations  A vector, an array or a span of them.
/// \param observer       Sees all passes; null for nobody.
/// \return          One result for each conversation, in their order.
/// \throws ConfigError     if a prompt is empty or has an id out of range, or a setting is out of
///                         range. Nothing has changed then.
/// \throws NonFiniteError  if the model yields NaN. No state can be continued then.
template <std::floating_point T>
std::vector<Generated> generate(const Decoder<T>& model,
                                std::span<Conversation<std::type_identity_t<T>>> conversations,
                                GenerationObserver<std::type_identity_t<T>>* observer = nullptr) {
  std::vector<detail::Turn<T>> turns;
  turns.reserve(conversations.size());
  for (Conversation<T>& c : conversations) {
    turns.push_back({c.prompt, &c.until, &c.sampling, &c.rng, &c.state});
    turns.back().adapters = c.adapters;
    turns.back().number = static_cast<Index>(turns.size()) - 1;
  }
  for (const detail::Turn<T>& turn : turns) turn.check(model.vocab());
  // The turns of each group of equal adapters, in their order.
  std::vector<bool> had(turns.size(), false);
  for (std::size_t first = 0; first < turns.size(); ++first) {
    if (had[first]) continue;
    std::vector<std::size_t> places;
    std::vector<detail::Turn<T>> group;
    for (std::size_t i = first; i < turns.size(); ++i) {
      if (turns[i].adapters != turns[first].adapters) continue;
      had[i] = true;
      places.push_back(i);
      group.push_back(turns[i]);
    }
    detail::take_turns<T>(model, group, observer);
    for (std::size_t i = 0; i < group.size(); ++i) {
      turns[places[i]].result = std::move(group[i].result);
    }
  }
  std::vector<Generated> results;
  results.reserve(turns.size());
  for (detail::Turn<T>& turn : turns) results.push_back(std::move(turn.result));
  return results;
}

/// Continues one conversation, as above.
///
/// \param prompt    At least one token; it follows the tokens of `state`.
template <std::floating_point T>
Generated generate(const Decoder<T>& model, TokenIds prompt, const Until& until,
                   const Sampling& sampling, Rng& rng, typename Decoder<T>::State& state) {
  detail::Turn<T> turn = {prompt, &until, &sampling, &rng, &state};
  turn.check(model.vocab());
  detail::take_turns<T>(model, {&turn, 1}, nullptr);
  return std::move(turn.result);
}

/// Continues one conversation by `count` tokens, or fewer if the callback ends it.
///
/// \param count     May be 0: then only the prompt is added to the state.
/// \param on_token  See `Until`.
/// \return          The new tokens, the last one included.
template <std::floating_point T>
std::vector<Index> generate(const Decoder<T>& model, TokenIds prompt, Index count,
                            const Sampling& sampling, Rng& rng, typename Decoder<T>::State& state,
                            const std::function<bool(Index)>& on_token = {}) {
  const Until until = {.count = count, .on_token = on_token};
  return generate(model, prompt, until, sampling, rng, state).tokens;
}

/// Generates a text that begins with `prompt` and is not continued later.
template <std::floating_point T>
std::vector<Index> generate(const Decoder<T>& model, TokenIds prompt, Index count,
                            const Sampling& sampling, Rng& rng,
                            const std::function<bool(Index)>& on_token = {}) {
  typename Decoder<T>::State state;
  return generate(model, prompt, count, sampling, rng, state, on_token);
}

}  // namespace weir

#ifdef WEIR_COMPILED
extern template struct weir::detail::Turn<float>;
extern template struct weir::detail::Turn<double>;
extern template void weir::detail::take_turns<float>(const weir::Decoder<float>&,
                                                     std::span<weir::detail::Turn<float>>,
                                                     weir::GenerationObserver<float>*);
extern template void weir::detail::take_turns<double>(const weir::Decoder<double>&,
                                                      std::span<weir::detail::Turn<double>>,
                                                      weir::GenerationObserver<double>*);
#endif
