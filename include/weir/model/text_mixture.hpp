// SPDX-License-Identifier: MIT
/// \file
/// Which windows of which texts a training reads, in which order.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <string>
#include <utility>
#include <vector>

#include <weir/core/error.hpp>
#include <weir/core/random.hpp>
#include <weir/core/shuffle.hpp>
#include <weir/core/types.hpp>

namespace weir {

/// The weights of the texts of a mixture from a place in the training on.
struct MixturePhase {
  Index from = 0;               ///< How many windows have been drawn when the phase begins.
  std::vector<double> weights;  ///< One per text, >= 0, in any unit: only their ratios matter.
};

/// Settings of `TextMixture`.
struct TextMixtureConfig {
  Index length = 128;      ///< Tokens of a window; one token more has to follow them.
  std::uint64_t seed = 0;  ///< Decides about the order of the windows.
};

/// A window of one of several texts.
struct TextWindow {
  Index text = 0;
  Index start = 0;  ///< The window has the tokens [start, start + length) of the text.
  Index epoch = 0;  ///< How often all windows of the text had been drawn before.

  bool operator==(const TextWindow&) const = default;
};

/// Draws windows from several texts in proportion to weights that may change over the training, as
/// DBRX's training changed its mix of data. It knows the lengths of the texts, not their tokens:
/// texts may be larger than memory (see io::TextFiles).
///
/// *Which text.* In a phase with weights p, which sum to 1, draw n = 1, 2, ... of the phase takes
/// the text that is furthest behind its share, the first of equal ones:
///
///     argmax_i  n p_i - (windows of text i drawn in the phase before)
///
/// so that no text is ever a whole window ahead of its share, and the shares of each batch are as
/// equal as whole windows allow. A text of weight 0 is never drawn.
///
/// *Which window.* An epoch of a text cuts it into windows that do not overlap, from a random place
/// of the first `length` tokens on, and takes them in a random order, each once; then the next
/// epoch begins. Phases do not interrupt epochs.
///
/// Everything follows from the sizes, phases, length and seed, and from the number of windows
/// drawn, `position()`: a checkpoint needs that number only, and `seek` goes on from there.
class TextMixture {
 public:
  /// \param sizes    Tokens of each text.
  /// \param phases   The first begins at 0, each other one later than the one before it.
  /// \throws ConfigError  unless there is a text, each has at least length + 1 tokens, and each
  ///                      phase has a weight per text, none negative and not all 0.
  TextMixture(const std::vector<Index>& sizes, std::vector<MixturePhase> phases,
              const TextMixtureConfig& config = {})
      : config_(config), phases_(std::move(phases)) {
    expect_at_least<Index>("TextMixture", "length", config.length, 1);
    if (sizes.empty()) {
      throw_error<ConfigError>("TextMixture: there are no sizes, expected one per text");
    }
    for (std::size_t i = 0; i < sizes.size(); ++i) {
      if (sizes[i] > config.length) continue;
      throw_error<ConfigError>("TextMixture: sizes[", i, "] = ", sizes[i],
                               ", expected a window and one token more, length = ", config.length);
    }
    check_phases(sizes.size());
    for (const Index size : sizes) texts_.push_back({.size = size});
    for (const MixturePhase& phase : phases_) units_.push_back(units_of(phase.weights));
    restart();
  }

  /// Draws a window.
  TextWindow next() {
    if (phase_ + 1 < phases_.size() && phases_[phase_ + 1].from == position_) begin(phase_ + 1);
    const std::vector<Index>& units = units_[phase_];
    Index total = 0;
    std::size_t chosen = 0;
    for (std::size_t i = 0; i < texts_.size(); ++i) {
      texts_[i].behind += units[i];
      total += units[i];
      if (texts_[i].behind > texts_[chosen].behind) chosen = i;
    }
    texts_[chosen].behind -= total;
    ++position_;
    return next_of(chosen);
  }

  /// How many windows have been drawn.
  Index position() const { return position_; }

  /// Goes to where `position` windows have been drawn, by drawing them again: what an epoch is
  /// shuffled with depends on the draws before it. Ten million draws take a quarter of a second.
  /// \throws ConfigError  if the position is negative.
  void seek(Index position) {
    expect_at_least<Index>("TextMixture::seek", "position", position, 0);
    if (position < position_) restart();
    while (position_ < position) next();
  }

  Index texts() const { return static_cast<Index>(texts_.size()); }

  /// How many windows of a text have been drawn; 0 <= text < texts().
  Index drawn(Index text) const { return texts_[static_cast<std::size_t>(text)].drawn; }

  /// How often the text has been read, an epoch that has begun as the part that is done.
  double epochs(Index text) const {
    const Text& of = texts_[static_cast<std::size_t>(text)];
    if (of.windows == 0) return 0.0;
    return static_cast<double>(of.epoch) +
           static_cast<double>(of.place) / static_cast<double>(of.windows);
  }

  /// The phase that the next draw belongs to.
  std::size_t phase() const {
    const bool begins = phase_ + 1 < phases_.size() && phases_[phase_ + 1].from == position_;
    return phase_ + (begins ? 1 : 0);
  }
  const std::vector<MixturePhase>& phases() const { return phases_; }

 private:
  struct Text {
    Index size = 0;
    Index drawn = 0;
    Index behind = 0;  // Its share of the phase without what was drawn, in units.
    Index epoch = 0;
    Index place = 0;    // Windows drawn in the epoch.
    Index windows = 0;  // Of the epoch; 0 before the first.
    Index shift = 0;    // Where the first window of the epoch begins.
    Shuffle order = Shuffle(1, 0);
  };

  void check_phases(std::size_t texts) const {
    if (phases_.empty() || phases_[0].from != 0) {
      throw_error<ConfigError>("TextMixture: no phase begins at 0, expected the first to");
    }
    for (std::size_t p = 0; p < phases_.size(); ++p) {
      const std::string name = "phases[" + std::to_string(p) + "]";
      if (p > 0 && phases_[p].from <= phases_[p - 1].from) {
        throw_error<ConfigError>("TextMixture: ", name, ".from = ", phases_[p].from,
                                 ", expected more than that of the phase before, ",
                                 phases_[p - 1].from);
      }
      const std::vector<double>& weights = phases_[p].weights;
      if (weights.size() != texts) {
        throw_error<ConfigError>("TextMixture: ", name, " has ", weights.size(),
                                 " weights, expected ", texts, " (one per text)");
      }
      double sum = 0.0;
      for (std::size_t i = 0; i < texts; ++i) {
        expect_at_least("TextMixture", name + ".weights[" + std::to_string(i) + "]", weights[i],
                        0.0);
        sum += weights[i];
      }
      expect_positive("TextMixture", "the sum of " + name + ".weights", sum);
    }
  }

  /// The weights as whole numbers, so that no rounding depends on the machine.
  static std::vector<Index> units_of(const std::vector<double>& weights) {
    constexpr double kOne = 0x1.0p40;
    double sum = 0.0;
    for (const double weight : weights) sum += weight;
    std::vector<Index> units;
    for (const double weight : weights) {
      const auto rounded = static_cast<Index>(std::llround(weight / sum * kOne));
      units.push_back(weight > 0.0 ? std::max<Index>(rounded, 1) : 0);
    }
    return units;
  }

  void restart() {
    position_ = 0;
    for (Text& text : texts_) text = {.size = text.size};
    begin(0);
  }

  void begin(std::size_t phase) {
    phase_ = phase;
    for (Text& text : texts_) text.behind = 0;
  }

  TextWindow next_of(std::size_t index) {
    Text& text = texts_[index];
    if (text.place == text.windows) {
      if (text.windows > 0) ++text.epoch;
      begin_epoch(index);
    }
    const Index window = text.order(text.place++);
    ++text.drawn;
    return {static_cast<Index>(index), text.shift + window * config_.length, text.epoch};
  }

  void begin_epoch(std::size_t index) {
    Text& text = texts_[index];
    Rng rng(config_.seed);
    for (const auto part :
         {static_cast<std::uint64_t>(index), static_cast<std::uint64_t>(text.epoch)}) {
      rng = Rng(rng.at(part));
    }
    const Index room = text.size - 1 - config_.length;
    text.shift = rng.below(std::min(config_.length, room + 1));
    text.windows = (text.size - 1 - text.shift) / config_.length;
    text.place = 0;
    text.order = Shuffle(text.windows, rng.bits());
  }

  TextMixtureConfig config_;
  std::vector<MixturePhase> phases_;
  std::vector<std::vector<Index>> units_;  // Of each phase.
  std::vector<Text> texts_;
  std::size_t phase_ = 0;
  Index position_ = 0;
};

}  // namespace weir
