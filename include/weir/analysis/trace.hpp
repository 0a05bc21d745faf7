// SPDX-License-Identifier: MIT
/// \file
/// Where each token went in each layer: records of a fixed size, one behind the other.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <limits>
#include <span>
#include <string>
#include <utility>
#include <vector>

#include <weir/core/error.hpp>
#include <weir/core/types.hpp>

namespace weir {

/// During what a token was routed.
enum class TracePhase : std::uint16_t {
  kTrain,
  kPrefill,   ///< In inference, several tokens of a sequence at once, or its first one.
  kDecoding,  ///< In inference, one token that continues a sequence.
};

/// A layer that a trace has records of.
struct TraceLayer {
  std::string name;  ///< Its path, such as "layers.3.moe".
  Index experts = 0;
};

/// What a record has room for.
struct TraceLayout {
  Index choices = 8;  ///< Experts of a token; of more, the first ones are kept.
  Index logits = 0;   ///< The router's logits of a token; 0: none are kept.

  /// The bytes of one record: `kFixed`, 8 for each choice, 4 for each logit, and what is missing to
  /// a multiple of 8.
  std::size_t record_bytes() const {
    return (kFixed + 8 * static_cast<std::size_t>(choices) + 4 * static_cast<std::size_t>(logits) +
            7) /
           8 * 8;
  }

  /// \throws ConfigError  unless 1 <= choices <= 65535 and 0 <= logits <= 65535.
  void check() const {
    constexpr Index kMost = std::numeric_limits<std::uint16_t>::max();
    expect_in<Index>("TraceLayout", "choices", choices, 1, kMost);
    expect_in<Index>("TraceLayout", "logits", logits, 0, kMost);
  }

  bool operator==(const TraceLayout&) const = default;

  static constexpr std::size_t kFixed = 40;
};

/// The part of a record that has the same size in all traces.
struct TraceHead {
  std::int64_t sequence = 0;  ///< A number of its own for each sequence of a trace.
  std::int64_t position = 0;  ///< The place in the sequence.
  std::int32_t token = -1;    ///< The token's id; -1 if it was not known.
  std::uint32_t pass = 0;     ///< In which pass of those that were recorded, such as a step.
  std::uint32_t domain = 0;   ///< Of the trace's domains.
  std::uint16_t layer = 0;    ///< Of the trace's layers.
  TracePhase phase = TracePhase::kTrain;
  std::uint16_t assigned = 0;  ///< How many experts the token had.
  std::uint16_t choices = 0;   ///< How many of them the record has.
  float entropy = 0.0F;        ///< -sum_e p_e ln p_e of the router's probabilities.
};
static_assert(sizeof(TraceHead) == TraceLayout::kFixed, "no padding: records are bytes of files");

/// One expert of a token. They are listed in the selector's order, best first.
struct TraceChoice {
  std::uint16_t expert = 0;
  std::uint16_t kept = 1;  ///< 0 if the expert was full.
  float weight = 0.0F;     ///< The selector's weight of the expert's output.
};
static_assert(sizeof(TraceChoice) == 8, "no padding: records are bytes of files");

/// One token in one layer, as it lies in a trace.
class TraceRecord {
 public:
  TraceRecord(const std::byte* bytes, const TraceLayout& layout) : bytes_(bytes), layout_(layout) {
    std::memcpy(&head_, bytes, sizeof head_);
  }

  const TraceHead& head() const { return head_; }
  Index choices() const { return head_.choices; }

  /// \param i        Less than `choices()`.
  TraceChoice choice(Index i) const { return at<TraceChoice>(sizeof(TraceHead), i); }

  /// How many logits there are: the layout's, or the layer's experts if they are fewer.
  Index logits() const { return layout_.logits; }
  /// \param e        Less than `logits()`; what no expert has is 0.
  float logit(Index e) const {
    return at<float>(sizeof(TraceHead) + static_cast<std::size_t>(layout_.choices) * 8, e);
  }

 private:
  template <class V>
  V at(std::size_t offset, Index i) const {
    V value;
    std::memcpy(&value, bytes_ + offset + static_cast<std::size_t>(i) * sizeof value, sizeof value);
    return value;
  }

  const std::byte* bytes_;
  TraceLayout layout_;
  TraceHead head_;
};

/// Records, and what their numbers refer to. The bytes are somebody else's: a recorder's, or those
/// of a file. Numbers are little-endian.
class Trace {
 public:
  /// A trace of nothing.
  Trace() = default;

  /// Looks at every record once.
  /// \param bytes     Of the records.
  /// \param left_out  How many records there was no room for.
  /// \throws ConfigError  unless the bytes are whole records that refer to these layers, domains
  ///                      and experts, with each expert of a token once and weights that are
  ///                      finite.
  Trace(const TraceLayout& layout, std::vector<TraceLayer> layers, std::vector<std::string> domains,
        std::span<const std::byte> bytes, Index left_out = 0)
      : layout_(layout),
        layers_(std::move(layers)),
        domains_(std::move(domains)),
        bytes_(bytes),
        left_out_(left_out) {
    check();
  }

  Index records() const { return static_cast<Index>(bytes_.size() / layout_.record_bytes()); }
  /// \param i        Less than `records()`.
  TraceRecord record(Index i) const {
    return {bytes_.data() + static_cast<std::size_t>(i) * layout_.record_bytes(), layout_};
  }

  const TraceLayout& layout() const { return layout_; }
  const std::vector<TraceLayer>& layers() const { return layers_; }
  const std::vector<std::string>& domains() const { return domains_; }
  std::span<const std::byte> bytes() const { return bytes_; }
  Index left_out() const { return left_out_; }

 private:
  void check() const;
  void check_record(Index i, std::vector<Index>& last_with) const;

  TraceLayout layout_;
  std::vector<TraceLayer> layers_;
  std::vector<std::string> domains_;
  std::span<const std::byte> bytes_;
  Index left_out_ = 0;
};

inline void Trace::check() const {
  constexpr Index kMost = std::numeric_limits<std::uint16_t>::max();
  layout_.check();
  expect_in<Index>("Trace", "layers", static_cast<Index>(layers_.size()), 0, kMost);
  expect_at_least<Index>("Trace", "left_out", left_out_, 0);
  Index experts = 0;
  for (const TraceLayer& layer : layers_) {
    expect_in<Index>("Trace", "experts", layer.experts, 1, kMost);
    experts = std::max(experts, layer.experts);
  }
  if (bytes_.size() % layout_.record_bytes() != 0) {
    throw_error<ConfigError>("Trace: there are ", bytes_.size(), " bytes, expected a multiple of ",
                             layout_.record_bytes());
  }
  std::vector<Index> last_with(static_cast<std::size_t>(experts), -1);
  for (Index i = 0; i < records(); ++i) check_record(i, last_with);
}

/// \param last_with  The last record with each expert.
inline void Trace::check_record(Index i, std::vector<Index>& last_with) const {
  const TraceRecord record = this->record(i);
  const TraceHead& head = record.head();
  const auto expect_below = [i](const char* name, auto value, std::size_t most) {
    if (static_cast<std::size_t>(value) < most) return;
    throw_error<ConfigError>("Trace: record ", i, " has ", name, " = ", value, ", expected ", name,
                             " < ", most);
  };
  expect_below("layer", head.layer, layers_.size());
  expect_below("domain", head.domain, domains_.size());
  expect_below("phase", static_cast<std::uint16_t>(head.phase), 3);
  expect_below("choices", head.choices, static_cast<std::size_t>(layout_.choices) + 1);
  expect_below("choices", head.choices, std::size_t{head.assigned} + 1);
  if (head.sequence < 0 || head.position < 0 || head.token < -1) {
    throw_error<ConfigError>("Trace: record ", i, " has sequence = ", head.sequence,
                             ", position = ", head.position, ", token = ", head.token,
                             ", expected none below 0 (-1 for an unknown token)");
  }
  bool finite = std::isfinite(head.entropy);
  for (Index c = 0; c < record.choices(); ++c) {
    const TraceChoice choice = record.choice(c);
    expect_below("expert", choice.expert, static_cast<std::size_t>(layers_[head.layer].experts));
    expect_below("kept", choice.kept, 2);
    finite = finite && std::isfinite(choice.weight);
    if (std::exchange(last_with[choice.expert], i) == i) {
      throw_error<ConfigError>("Trace: record ", i, " has expert ", choice.expert,
                               " twice, expected it once");
    }
  }
  if (!finite) {
    throw_error<ConfigError>("Trace: record ", i, " has a weight or an entropy that is not finite");
  }
}

}  // namespace weir
