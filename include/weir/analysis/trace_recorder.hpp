// SPDX-License-Identifier: MIT
/// \file
/// Records where the tokens of passes go.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <limits>
#include <span>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include <weir/analysis/trace.hpp>
#include <weir/core/error.hpp>
#include <weir/core/index_span.hpp>
#include <weir/core/pass.hpp>
#include <weir/core/random.hpp>
#include <weir/core/routing_observer.hpp>
#include <weir/core/types.hpp>
#include <weir/moe/routing.hpp>

namespace weir {

/// Settings of TraceRecorder.
struct TraceRecorderConfig {
  TraceLayout layout = {};
  double share = 1.0;      ///< Of the sequences: whole ones are recorded, or nothing of them.
  std::uint64_t seed = 0;  ///< Decides which.
  Index most_records = 1'000'000;  ///< Further records are only counted.
  Index buffer_records = 4096;     ///< How many are in memory at most, if there is a sink.

  /// \throws ConfigError  if a setting is out of range.
  void check() const {
    layout.check();
    expect_in("TraceRecorder", "share", share, 0.0, 1.0);
    expect_at_least<Index>("TraceRecorder", "most_records", most_records, 0);
    expect_at_least<Index>("TraceRecorder", "buffer_records", buffer_records, 1);
  }
};

/// What a recorder is told about one sequence of the next pass.
struct TracedSequence {
  Index id = 0;        ///< Different ones for different sequences.
  Index position = 0;  ///< Of its first token in this pass: how many the sequence had before.
  Index domain = 0;    ///< As TraceRecorder::domain says.
};

/// Where the records of a recorder go.
class TraceSink {
 public:
  TraceSink() = default;
  TraceSink(const TraceSink&) = default;
  TraceSink& operator=(const TraceSink&) = default;
  virtual ~TraceSink() = default;

  /// \param records  Whole ones.
  virtual void write(std::span<const std::byte> records) = 0;
};

/// Records the routing of tokens in all mixtures of experts, from training, prefill and decoding,
/// whatever the weights are stored as:
///
///     TraceRecorder recorder;
///     const Index code = recorder.domain("C++");
///     PassRecord record;
///     record.show_routings_to(&recorder);
///     recorder.begin({{{.id = 0, .domain = code}}});
///     model.forward(ids, {.record = &record}, cache);
///     const Trace trace = recorder.trace();
///
/// Records stay in memory, up to most_records, or go to a sink, such as io::TraceWriter, a buffer
/// at a time. Padding is not recorded. What backward computes again is not seen again. Sampling
/// takes or leaves whole sequences, so that neighbours stay neighbours:
///
///     recorded if u(seed, id) < share
///
/// u being a hash with values in [0, 1), which does not depend on what was recorded before.
/// Recording allocates nothing once all layers have been seen and, without a sink, memory has
/// grown.
class TraceRecorder final : public RoutingObserver {
 public:
  /// Keeps records in memory.
  /// \throws ConfigError  if a setting is out of range.
  explicit TraceRecorder(const TraceRecorderConfig& config = {}) : config_(config) {
    config_.check();
  }

  /// Hands records to `sink`, which has to outlive the recorder.
  explicit TraceRecorder(TraceSink& sink, const TraceRecorderConfig& config = {})
      : TraceRecorder(config) {
    sink_ = &sink;
    buffer_.reserve(static_cast<std::size_t>(config.buffer_records) * record_bytes());
  }

  /// The number of the domain with this name, a new one if there is none yet.
  Index domain(std::string_view name) {
    const auto found = std::find(domains_.begin(), domains_.end(), name);
    if (found != domains_.end()) return found - domains_.begin();
    domains_.emplace_back(name);
    return static_cast<Index>(domains_.size()) - 1;
  }

  /// Says what the next pass is about.
  /// \param sequences  One for each sequence of the pass; they are copied.
  /// \throws ConfigError  if a number is negative or not that of a domain. Where no domain has been
  ///                      named, 0 is that of an unnamed one.
  void begin(std::span<const TracedSequence> sequences);
  void begin(const std::vector<TracedSequence>& sequences) { begin(std::span(sequences)); }

  /// \throws StateError   unless `begin` was called since the layer was seen last, with as many
  ///                      sequences as the pass has.
  /// \throws ConfigError  if an expert's number or a layer's is above 65534.
  void see(std::string_view layer, const Routing<float>& routing, const Pass& pass) override {
    record(layer, routing, pass);
  }
  void see(std::string_view layer, const Routing<double>& routing, const Pass& pass) override {
    record(layer, routing, pass);
  }

  /// Hands what is in memory to the sink.
  void flush() {
    if (sink_ == nullptr || buffer_.empty()) return;
    sink_->write(buffer_);
    buffer_.clear();
  }

  /// What was recorded. It lives until the recorder is told anything else.
  /// \throws StateError   if there is a sink: it has the records.
  Trace trace() const {
    if (sink_ != nullptr) {
      throw_error<StateError>(
          "TraceRecorder::trace: there is a sink, expected none: it has the records");
    }
    return {config_.layout, layers_, domains_, buffer_, left_out_};
  }

  /// Forgets the records in memory, not the layers and domains.
  void clear() {
    records_ -= static_cast<Index>(buffer_.size() / record_bytes());  // Not those of the sink.
    buffer_.clear();
    left_out_ = 0;
  }

  /// Where records go; null if they stay in memory.
  const TraceSink* sink() const { return sink_; }

  const TraceRecorderConfig& config() const { return config_; }
  const std::vector<TraceLayer>& layers() const { return layers_; }
  const std::vector<std::string>& domains() const { return domains_; }
  Index records() const { return records_; }    ///< With those that went to the sink.
  Index left_out() const { return left_out_; }  ///< Records there was no room for.

 private:
  struct Known {
    TracedSequence sequence;
    bool recorded = false;
  };

  std::size_t record_bytes() const { return config_.layout.record_bytes(); }

  bool is_sampled(Index id) const {
    const auto bits = mix_bits(config_.seed + mix_bits(static_cast<std::uint64_t>(id)));
    return unit_interval(bits) < config_.share;
  }

  template <class T>
  void record(std::string_view layer, const Routing<T>& routing, const Pass& pass);

  template <class T>
  void add(const Routing<T>& routing, Index token, TraceHead head);

  Index index_of(std::string_view layer, Index experts);

  TraceRecorderConfig config_;
  TraceSink* sink_ = nullptr;
  std::vector<TraceLayer> layers_;
  std::vector<std::uint32_t> seen_;  // The last pass that each layer was seen in.
  std::vector<std::string> domains_;
  std::vector<Known> sequences_;  // Of the pass.
  std::uint32_t passes_ = 0;
  std::vector<std::byte> buffer_;
  Index records_ = 0, left_out_ = 0;
};

inline void TraceRecorder::begin(std::span<const TracedSequence> sequences) {
  if (domains_.empty()) domains_.emplace_back();
  for (const TracedSequence& s : sequences) {
    expect_at_least<Index>("TraceRecorder::begin", "id", s.id, 0);
    expect_at_least<Index>("TraceRecorder::begin", "position", s.position, 0);
    expect_in<Index>("TraceRecorder::begin", "domain", s.domain, 0,
                     static_cast<Index>(domains_.size()) - 1);
  }
  sequences_.clear();
  for (const TracedSequence& s : sequences) sequences_.push_back({s, is_sampled(s.id)});
  ++passes_;
}

inline Index TraceRecorder::index_of(std::string_view layer, Index experts) {
  const auto found = std::find_if(layers_.begin(), layers_.end(),
                                  [&](const TraceLayer& known) { return known.name == layer; });
  constexpr Index kMost = std::numeric_limits<std::uint16_t>::max();
  const Index index = found - layers_.begin();
  if (found == layers_.end()) {
    expect_in<Index>("TraceRecorder", "experts", experts, 1, kMost);
    expect_in<Index>("TraceRecorder", "layers", index + 1, 1, kMost);
    layers_.push_back({std::string(layer), experts});
    seen_.push_back(0);
  } else if (found->experts != experts) {
    throw_error<ConfigError>("TraceRecorder: layer '", layer, "' has ", experts,
                             " experts, expected ", found->experts, " as before");
  }
  return index;
}

template <class T>
void TraceRecorder::record(std::string_view layer, const Routing<T>& routing, const Pass& pass) {
  const Sequences& rows = routing.rows.sequences();
  if (static_cast<Index>(sequences_.size()) != rows.count()) {
    throw_error<StateError>("TraceRecorder: layer '", layer, "' has a pass of ", rows.count(),
                            " sequences, expected ", sequences_.size(), " as begin was told");
  }
  const Index index = index_of(layer, routing.experts());
  std::uint32_t& seen = seen_[static_cast<std::size_t>(index)];
  if (std::exchange(seen, passes_) == passes_) {
    throw_error<StateError>("TraceRecorder: layer '", layer,
                            "' was seen twice, expected a call of begin before each pass");
  }
  for (Index s = 0; s < rows.count(); ++s) {
    const Known& known = sequences_[static_cast<std::size_t>(s)];
    if (!known.recorded) continue;
    for (Index t = rows.begin(s); t < rows.end(s); ++t) {
      if (routing.rows.is_padding(t)) continue;
      if (records_ >= config_.most_records) {
        ++left_out_;
        continue;
      }
      const Index place = pass.places.empty() ? t - rows.begin(s) : element(pass.places, t);
      TraceHead head;
      head.sequence = known.sequence.id;
      head.position = known.sequence.position + place;
      if (!pass.token_ids.empty()) head.token = static_cast<int>(element(pass.token_ids, t));
      head.pass = passes_ - 1;
      head.domain = static_cast<std::uint32_t>(known.sequence.domain);
      head.layer = static_cast<std::uint16_t>(index);
      const bool continues = rows.length(s) == 1 && head.position > 0;
      head.phase = pass.training ? TracePhase::kTrain
                   : continues   ? TracePhase::kDecoding
                                 : TracePhase::kPrefill;
      add(routing, t, head);
    }
  }
}

template <class T>
void TraceRecorder::add(const Routing<T>& routing, Index token, TraceHead head) {
  constexpr Index kMost = std::numeric_limits<std::uint16_t>::max();
  const Index first = routing.first(token);
  const Index assigned = routing.last(token) - first;
  const Index choices = std::min(assigned, config_.layout.choices);
  head.assigned = static_cast<std::uint16_t>(std::min(assigned, kMost));
  head.choices = static_cast<std::uint16_t>(choices);
  double entropy = 0.0;
  for (const T p : routing.probabilities.row(token)) {
    if (p > T(0)) entropy -= static_cast<double>(p) * std::log(static_cast<double>(p));
  }
  head.entropy = static_cast<float>(entropy);

  if (sink_ != nullptr && buffer_.size() + record_bytes() > buffer_.capacity()) flush();
  const std::size_t begin = buffer_.size();
  buffer_.resize(begin + record_bytes());
  std::byte* const bytes = buffer_.data() + begin;
  std::memcpy(bytes, &head, sizeof head);
  for (Index c = 0; c < choices; ++c) {
    const Index a = first + c;
    const TraceChoice choice = {.expert = static_cast<std::uint16_t>(routing.expert[a]),
                                .kept = routing.kept[a],
                                .weight = static_cast<float>(routing.weight[a])};
    std::memcpy(bytes + sizeof head + static_cast<std::size_t>(c) * sizeof choice, &choice,
                sizeof choice);
  }
  std::byte* const logits =
      bytes + sizeof head + static_cast<std::size_t>(config_.layout.choices) * sizeof(TraceChoice);
  for (Index e = 0; e < std::min(config_.layout.logits, routing.experts()); ++e) {
    const auto logit = static_cast<float>(routing.logits(token, e));
    std::memcpy(logits + static_cast<std::size_t>(e) * sizeof logit, &logit, sizeof logit);
  }
  ++records_;
}

}  // namespace weir
