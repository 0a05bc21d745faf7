// SPDX-License-Identifier: MIT
/// \file
/// What generated conversations leave behind for training on them: where each token was routed, and
/// how probable it was.
#pragma once

#include <algorithm>
#include <cmath>
#include <concepts>
#include <cstddef>
#include <cstdint>
#include <span>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include <weir/core/error.hpp>
#include <weir/core/index_span.hpp>
#include <weir/core/list.hpp>
#include <weir/core/pass.hpp>
#include <weir/core/pass_record.hpp>
#include <weir/core/routing_observer.hpp>
#include <weir/core/sequences.hpp>
#include <weir/core/types.hpp>
#include <weir/model/generate.hpp>
#include <weir/moe/imposed_routing.hpp>
#include <weir/moe/routing.hpp>
#include <weir/ops/logsumexp.hpp>

namespace weir {

/// Records the routing of all tokens of conversations, prompts included, in all mixtures, and the
/// log-probabilities of the new tokens, while `generate` decodes them through caches, many at once
/// and a token at a time. Training runs the same conversations as whole sequences, in an order of
/// its own, and takes the experts that the rollout has used (rollout routing replay, Ma et al.
/// 2025, arXiv:2510.11370):
///
///     RolloutRecorder<float> recorder;
///     const auto answers = generate(rollout_model, conversations, &recorder);
///     ... make a batch of prompts and answers ...
///     impose_routing(model, recorder.traces(order, batch.sequences));
///     model.forward(batch.ids, batch.training(), cache);
///     ...
///     release_routing(model);
///
/// Each conversation begins with an empty state: the tokens of a prefix that others have computed
/// are not seen.
template <std::floating_point T>
class RolloutRecorder final : public GenerationObserver<T>, public RoutingObserver {
 public:
  RolloutRecorder() = default;
  RolloutRecorder(const RolloutRecorder&) = delete;  // The record points here.
  RolloutRecorder& operator=(const RolloutRecorder&) = delete;
  ~RolloutRecorder() override = default;

  /// Forgets everything but the layers and the memory.
  void clear() {
    for (Layer& layer : layers_) {
      for (Chosen& chosen : layer.conversations) chosen.clear();
    }
    for (List<T>& log_p : log_p_) log_p.clear();
  }

  /// log p of each new token under the model's own softmax, at temperature 1 and with all tokens
  /// allowed, whatever the sampling was.
  /// \throws ConfigError  if there was no such conversation.
  const List<T>& log_probabilities(Index conversation) const {
    expect_known(conversation, log_p_.size());
    return log_p_[static_cast<std::size_t>(conversation)];
  }

  /// The traces of a pass whose sequence s is what conversation `order[s]` begins with.
  /// \throws ShapeError   unless there is one conversation for each sequence.
  /// \throws ConfigError  if there was no such conversation, or it was shorter than its sequence.
  std::vector<LayerTrace> traces(std::span<const Index> order, const Sequences& sequences) const;

  PassRecord* begin(std::span<const Index> conversations) override {
    present_.assign(conversations.begin(), conversations.end());
    record_.clear();
    record_.show_routings_to(this);
    return &record_;
  }

  /// \throws NonFiniteError  if the token's log-probability is not finite.
  void drawn(Index conversation, MatrixIn<T> logits, Index token) override {
    const T log_p = logits(0, token) - logsumexp<T>(span_of(logits.data(), logits.cols()));
    if (!std::isfinite(log_p)) {
      throw_error<NonFiniteError>("RolloutRecorder: token ", token, " of conversation ",
                                  conversation, " has the log-probability ", log_p,
                                  ", expected finite");
    }
    at(log_p_, conversation).push_back(log_p);
  }

  void see(std::string_view layer, const Routing<float>& routing, const Pass& /*pass*/) override {
    add(layer, routing);
  }
  void see(std::string_view layer, const Routing<double>& routing, const Pass& /*pass*/) override {
    add(layer, routing);
  }

 private:
  /// The experts of a conversation's tokens in one layer.
  struct Chosen {
    List<Index> counts;  ///< How many each token has.
    List<Index> expert;
    List<std::uint8_t> kept;

    void clear() {
      counts.clear();
      expert.clear();
      kept.clear();
    }
  };
  struct Layer {
    std::string name;
    Index experts = 0;
    std::vector<Chosen> conversations;
  };

  template <class V>
  static V& at(std::vector<V>& list, Index i) {
    const auto place = static_cast<std::size_t>(i);
    if (list.size() <= place) list.resize(place + 1);
    return list[place];
  }

  static void expect_known(Index conversation, std::size_t count) {
    if (conversation >= 0 && static_cast<std::size_t>(conversation) < count) return;
    throw_error<ConfigError>("RolloutRecorder: conversation = ", conversation,
                             ", expected 0 <= conversation < ", count);
  }

  void add(std::string_view name, const Assignments& routing, const Sequences& rows);
  template <class V>
  void add(std::string_view name, const Routing<V>& routing) {
    add(name, routing, routing.rows.sequences());
  }

  std::vector<Layer> layers_;
  std::vector<List<T>> log_p_;
  List<Index> present_;  // The conversations of the pass.
  PassRecord record_;
};

template <std::floating_point T>
void RolloutRecorder<T>::add(std::string_view name, const Assignments& routing,
                             const Sequences& rows) {
  if (rows.count() != present_.count()) {
    throw_error<StateError>("RolloutRecorder: layer '", name, "' has a pass of ", rows.count(),
                            " sequences, expected ", present_.count(), " as begin was told");
  }
  auto layer = std::find_if(layers_.begin(), layers_.end(),
                            [&](const Layer& known) { return known.name == name; });
  if (layer == layers_.end()) {
    layers_.push_back({std::string(name), routing.experts(), {}});
    layer = layers_.end() - 1;
  }
  for (Index s = 0; s < rows.count(); ++s) {
    Chosen& chosen = at(layer->conversations, present_[s]);
    for (Index t = rows.begin(s); t < rows.end(s); ++t) {
      chosen.counts.push_back(routing.last(t) - routing.first(t));
      for (Index a = routing.first(t); a < routing.last(t); ++a) {
        chosen.expert.push_back(routing.expert[a]);
        chosen.kept.push_back(routing.kept[a]);
      }
    }
  }
}

template <std::floating_point T>
std::vector<LayerTrace> RolloutRecorder<T>::traces(std::span<const Index> order,
                                                   const Sequences& sequences) const {
  if (static_cast<Index>(order.size()) != sequences.count()) {
    throw_error<ShapeError>("RolloutRecorder::traces: order has ", order.size(),
                            " entries, expected ", sequences.count(), " (one per sequence)");
  }
  std::vector<LayerTrace> traces;
  for (const Layer& layer : layers_) {
    List<Index> offsets = {0};
    List<Index> expert;
    List<std::uint8_t> kept;
    for (Index s = 0; s < sequences.count(); ++s) {
      const Index conversation = element(order, s);
      expect_known(conversation, layer.conversations.size());
      const Chosen& chosen = layer.conversations[static_cast<std::size_t>(conversation)];
      if (chosen.counts.count() < sequences.length(s)) {
        throw_error<ConfigError>("RolloutRecorder::traces: conversation ", conversation, " has ",
                                 chosen.counts.count(), " recorded tokens, expected at least ",
                                 sequences.length(s), " as sequence ", s);
      }
      Index end = 0;
      for (Index t = 0; t < sequences.length(s); ++t) {
        end += chosen.counts[t];
        offsets.push_back(offsets.back() + chosen.counts[t]);
      }
      expert.insert(expert.end(), chosen.expert.begin(), chosen.expert.begin() + end);
      kept.insert(kept.end(), chosen.kept.begin(), chosen.kept.begin() + end);
    }
    traces.push_back({layer.name, RoutingTrace(layer.experts, std::move(offsets), std::move(expert),
                                               std::move(kept))});
  }
  return traces;
}

}  // namespace weir
