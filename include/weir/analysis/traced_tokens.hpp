// SPDX-License-Identifier: MIT
/// \file
/// The tokens of a trace in order, and where each layer sent them.
#pragma once

#include <algorithm>
#include <cstdint>
#include <span>
#include <string>
#include <string_view>
#include <tuple>
#include <vector>

#include <weir/analysis/trace.hpp>
#include <weir/core/error.hpp>
#include <weir/core/index_span.hpp>
#include <weir/core/list.hpp>
#include <weir/core/types.hpp>

namespace weir {

/// Where one layer sent the tokens. Token t has the choices `first(t)` to `last(t)`, best first;
/// none if the layer did not see it.
struct TracedLayer {
  std::string name;
  Index experts = 0;
  List<Index> offsets = {0};         ///< [tokens + 1], into the next three.
  List<Index> expert = {};           ///< [choices]
  List<std::uint8_t> kept = {};      ///< [choices]; 0 if the expert was full.
  List<float> weight = {};           ///< [choices]
  List<std::uint8_t> recorded = {};  ///< [tokens]; 0 if the layer did not see the token.
  List<float> entropy = {};  ///< [tokens], of the router's probabilities; 0 if not recorded.
  List<Index> pass = {};     ///< [tokens]: in which pass the layer saw the token; -1 if in none.
  List<Index> record = {};   ///< [tokens]: ascending in the order of a pass; -1 if not recorded.

  Index tokens() const { return offsets.count() - 1; }
  Index first(Index t) const { return offsets[t]; }
  Index last(Index t) const { return offsets[t + 1]; }
  Index choices(Index t) const { return last(t) - first(t); }
  std::span<const Index> experts_of(Index t) const {
    return span_of(expert.data() + first(t), choices(t));
  }
  /// The expert chosen first, or -1 if there is none.
  Index first_choice(Index t) const { return choices(t) > 0 ? expert[first(t)] : Index(-1); }

  /// Adds a token with these experts, all of which kept it, to the first pass.
  void add(const std::vector<Index>& experts_chosen) {
    pass.push_back(0);
    record.push_back(tokens());
    for (const Index e : experts_chosen) {
      expert.push_back(e);
      kept.push_back(1);
      weight.push_back(1.0F / static_cast<float>(experts_chosen.size()));
    }
    offsets.push_back(expert.count());
    recorded.push_back(1);
    entropy.push_back(0.0F);
  }
};

/// The tokens of several sequences, in order of the sequences' numbers and of positions, and what
/// each layer did with them: a trace by token instead of by record. A domain is any label of
/// sequences: a subject, a language, a task.
struct TracedTokens {
  struct Sequence {
    Index id = 0;
    Index domain = 0;
    Index begin = 0, end = 0;  ///< Its tokens.
  };

  std::vector<Sequence> sequences;
  List<Index> position;  ///< [tokens]
  List<Index> id;        ///< [tokens]; -1 if unknown.
  std::vector<std::string> domains;
  std::vector<TracedLayer> layers;

  /// Nothing.
  TracedTokens() = default;

  /// \throws ConfigError  if a layer has two records of the same place, or if records of one
  ///                      sequence or place differ in the domain or the token.
  explicit TracedTokens(const Trace& trace);

  Index tokens() const { return position.count(); }
  Index count() const { return static_cast<Index>(sequences.size()); }

  /// Whether token t + 1 follows token t in the same sequence, with no position between them.
  bool is_followed(Index t, const Sequence& sequence) const {
    return t + 1 < sequence.end && position[t + 1] == position[t] + 1;
  }

  /// The layer with this name.
  /// \throws ConfigError  if there is none.
  const TracedLayer& layer(std::string_view name) const {
    for (const TracedLayer& l : layers) {
      if (l.name == name) return l;
    }
    throw_error<ConfigError>("TracedTokens: there is no layer '", name, "'");
  }

  /// The numbers of all sequences: 0, 1, 2, ...
  std::vector<Index> all() const {
    std::vector<Index> numbers(sequences.size());
    for (std::size_t s = 0; s < numbers.size(); ++s) numbers[s] = static_cast<Index>(s);
    return numbers;
  }
};

inline TracedTokens::TracedTokens(const Trace& trace) : domains(trace.domains()) {
  struct Place {
    std::int64_t sequence, position;
    std::uint16_t layer;
    Index record;
    auto key() const { return std::tie(sequence, position, layer); }
  };
  std::vector<Place> places;
  places.reserve(static_cast<std::size_t>(trace.records()));
  for (Index i = 0; i < trace.records(); ++i) {
    const TraceHead head = trace.record(i).head();
    places.push_back({head.sequence, head.position, head.layer, i});
  }
  std::sort(places.begin(), places.end(),
            [](const Place& a, const Place& b) { return a.key() < b.key(); });
  for (const TraceLayer& layer : trace.layers()) {
    layers.push_back({.name = layer.name, .experts = layer.experts});
  }
  const auto end_token = [&] {
    for (TracedLayer& layer : layers) {
      if (layer.tokens() == tokens()) continue;  // The layer has seen it.
      layer.offsets.push_back(layer.expert.count());
      layer.recorded.push_back(0);
      layer.entropy.push_back(0.0F);
      layer.pass.push_back(-1);
      layer.record.push_back(-1);
    }
  };
  for (std::size_t i = 0; i < places.size(); ++i) {
    const Place& place = places[i];
    const TraceRecord record = trace.record(place.record);
    const TraceHead& head = record.head();
    const bool same_sequence = i > 0 && places[i - 1].sequence == place.sequence;
    const bool same_token = same_sequence && places[i - 1].position == place.position;
    if (same_token && places[i - 1].layer == place.layer) {
      throw_error<ConfigError>("TracedTokens: layer '", layers[place.layer].name,
                               "' has two records of sequence ", place.sequence, ", position ",
                               place.position, ", expected one");
    }
    if ((same_sequence && sequences.back().domain != Index(head.domain)) ||
        (same_token && id.back() != head.token)) {
      throw_error<ConfigError>("TracedTokens: records of sequence ", place.sequence, ", position ",
                               place.position, " differ in the domain or the token");
    }
    if (!same_token) {
      end_token();
      if (!same_sequence) {
        sequences.push_back({place.sequence, Index(head.domain), tokens(), tokens()});
      }
      ++sequences.back().end;
      position.push_back(place.position);
      id.push_back(head.token);
    }
    TracedLayer& layer = layers[place.layer];
    for (Index c = 0; c < record.choices(); ++c) {
      const TraceChoice choice = record.choice(c);
      layer.expert.push_back(choice.expert);
      layer.kept.push_back(static_cast<std::uint8_t>(choice.kept));
      layer.weight.push_back(choice.weight);
    }
    layer.offsets.push_back(layer.expert.count());
    layer.recorded.push_back(1);
    layer.entropy.push_back(head.entropy);
    layer.pass.push_back(static_cast<Index>(head.pass));
    layer.record.push_back(place.record);
  }
  end_token();
}

}  // namespace weir
