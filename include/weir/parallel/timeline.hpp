// SPDX-License-Identifier: MIT
/// \file
/// What a process did when: spans of time, as files that browsers show.
#pragma once

#include <algorithm>
#include <array>
#include <chrono>
#include <cstddef>
#include <cstdint>
#include <deque>
#include <span>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include <weir/core/error.hpp>
#include <weir/core/types.hpp>

namespace weir {

/// Nanoseconds of a clock that never goes back. Processes of one machine read the same clock, those
/// of different machines do not: see Timeline::shift.
using Nanoseconds = std::int64_t;

/// Something that took time.
struct TimelineSpan {
  static constexpr std::size_t kNameLength = 40;

  std::array<char, kNameLength> text = {};  ///< The name, followed by zeros if it is shorter.
  Nanoseconds begin = 0, end = 0;
  std::int64_t bytes = -1;  ///< How many were moved; -1 if that is not known.

  std::string_view name() const {
    return {text.data(),
            static_cast<std::size_t>(std::find(text.begin(), text.end(), '\0') - text.begin())};
  }
};

/// The spans of one thread, or of something else that goes on by itself, such as an exchange in the
/// background. Its memory is taken at once: of more spans than there is room for, the latest stay.
/// One thread at a time may add spans.
class TimelineTrack {
 public:
  TimelineTrack(std::string name, Index most_spans) : name_(std::move(name)) {
    spans_.resize(static_cast<std::size_t>(most_spans));
  }

  /// Adds a span. It must not overlap an earlier one of this track unless one is within the other:
  /// browsers could not draw that.
  /// \param name     Its first 40 bytes are kept.
  /// \param bytes    How many were moved; -1 if that is not known.
  void add(std::string_view name, Nanoseconds begin, Nanoseconds end, std::int64_t bytes = -1) {
    TimelineSpan& span = spans_[static_cast<std::size_t>(added_++) % spans_.size()];
    span.text.fill('\0');
    std::copy_n(name.begin(), std::min(name.size(), TimelineSpan::kNameLength), span.text.begin());
    span.begin = begin;
    span.end = std::max(begin, end);
    span.bytes = bytes;
  }

  const std::string& name() const { return name_; }
  Index spans() const { return std::min(added_, static_cast<Index>(spans_.size())); }
  /// How many spans were there that had to make room for later ones.
  Index left_out() const { return added_ - spans(); }
  /// \param i        Less than `spans()`; in the order they were added.
  const TimelineSpan& span(Index i) const {
    return spans_[static_cast<std::size_t>(left_out() + i) % spans_.size()];
  }
  void clear() { added_ = 0; }

 private:
  std::string name_;
  std::vector<TimelineSpan> spans_;
  Index added_ = 0;
};

/// Settings of Timeline.
struct TimelineConfig {
  Index rank = 0;            ///< The process's number among those that are shown together.
  Index most_spans = 16384;  ///< Of each track; 64 bytes each.
};

/// The tracks of one process:
///
///     Timeline timeline({.rank = 0});
///     TimelineTrack& compute = timeline.track("compute");
///     {
///       const SpanTimer timer(&compute, "experts");
///       ...
///     }
///     write(chrome_trace({timeline.events()}));
///
/// Recording allocates nothing once there are the tracks.
class Timeline {
 public:
  /// \throws ConfigError  unless rank >= 0 and most_spans >= 1.
  explicit Timeline(const TimelineConfig& config = {}) : config_(config) {
    expect_at_least<Index>("Timeline", "rank", config.rank, 0);
    expect_at_least<Index>("Timeline", "most_spans", config.most_spans, 1);
  }

  static Nanoseconds now() {
    return std::chrono::duration_cast<std::chrono::nanoseconds>(
               std::chrono::steady_clock::now().time_since_epoch())
        .count();
  }

  /// The track with this name, a new one if there is none yet. It lives as long as the timeline.
  /// Not for several threads at once.
  TimelineTrack& track(std::string_view name) {
    for (TimelineTrack& track : tracks_) {
      if (track.name() == name) return track;
    }
    return tracks_.emplace_back(std::string(name), config_.most_spans);
  }

  /// Adds `offset` to all times that are shown, those of spans to come as well: by how much the
  /// clock of the machine that they are shown with is ahead of this one's, see clock_offset.
  void shift(Nanoseconds offset) { offset_ += offset; }

  /// Forgets the spans, not the tracks.
  void clear() {
    for (TimelineTrack& track : tracks_) track.clear();
  }

  /// The spans as text for chrome_trace, which joins what several ranks have.
  std::string events() const;

  const TimelineConfig& config() const { return config_; }
  const std::deque<TimelineTrack>& tracks() const { return tracks_; }

 private:
  TimelineConfig config_;
  std::deque<TimelineTrack> tracks_;  // Which stay where they are.
  Nanoseconds offset_ = 0;
};

/// Adds a span to a track from its construction to its destruction; does nothing if there is no
/// track.
class SpanTimer {
 public:
  SpanTimer(TimelineTrack* track, std::string_view name, std::int64_t bytes = -1)
      : track_(track), name_(name), bytes_(bytes), begin_(track != nullptr ? Timeline::now() : 0) {}
  SpanTimer(const SpanTimer&) = delete;
  SpanTimer& operator=(const SpanTimer&) = delete;
  ~SpanTimer() {
    if (track_ != nullptr) track_->add(name_, begin_, Timeline::now(), bytes_);
  }

 private:
  TimelineTrack* track_;
  std::string_view name_;
  std::int64_t bytes_;
  Nanoseconds begin_;
};

/// By how much another machine's clock is ahead, from a question and its answer: the answer is
/// taken to have been given half-way, so that the error is at most (received - sent) / 2. Of
/// several tries, the one with the shortest way is the best. (Cristian 1989, "Probabilistic clock
/// synchronization".)
///
/// \param sent, received  When the question went out and the answer came, by the own clock.
/// \param answered        The other clock in between.
inline Nanoseconds clock_offset(Nanoseconds sent, Nanoseconds answered, Nanoseconds received) {
  return answered - (sent + (received - sent) / 2);
}

namespace detail {

/// Text in quotes. What is not printable ASCII becomes a question mark.
inline std::string json_text(std::string_view text) {
  std::string quoted = "\"";
  for (const char c : text) {
    if (c == '"' || c == '\\') quoted += '\\';
    quoted += c >= ' ' && c <= '~' ? c : '?';
  }
  return quoted + '"';
}

/// Microseconds with three digits behind the point.
inline std::string microseconds(Nanoseconds time) {
  const std::int64_t size = time < 0 ? -time : time;
  const std::string digits = std::to_string(1000 + size % 1000);
  return (time < 0 ? "-" : "") + std::to_string(size / 1000) + "." + digits.substr(1);
}

/// The stretches in which a track has a span, in order and apart from one another.
inline std::vector<std::pair<Nanoseconds, Nanoseconds>> stretches(const TimelineTrack& track) {
  std::vector<std::pair<Nanoseconds, Nanoseconds>> all;
  for (Index i = 0; i < track.spans(); ++i) {
    all.emplace_back(track.span(i).begin, track.span(i).end);
  }
  std::sort(all.begin(), all.end());
  std::vector<std::pair<Nanoseconds, Nanoseconds>> joined;
  for (const auto& [begin, end] : all) {
    if (!joined.empty() && begin <= joined.back().second) {
      joined.back().second = std::max(joined.back().second, end);
    } else {
      joined.emplace_back(begin, end);
    }
  }
  return joined;
}

}  // namespace detail

inline std::string Timeline::events() const {
  std::string text;
  const std::string process = R"(,"pid":)" + std::to_string(config_.rank);
  const auto add = [&](const std::string& event) {
    if (!text.empty()) text += ",\n";
    text += "{" + event + "}";
  };
  const std::string number = std::to_string(config_.rank);
  add(R"("ph":"M","name":"process_name")" + process + R"(,"args":{"name":"rank )" + number +
      R"("})");
  add(R"("ph":"M","name":"process_sort_index")" + process + R"(,"args":{"sort_index":)" + number +
      "}");
  Index place = 0;
  for (const TimelineTrack& track : tracks_) {
    const std::string thread = process + R"(,"tid":)" + std::to_string(place);
    add(R"("ph":"M","name":"thread_name")" + thread + R"(,"args":{"name":)" +
        detail::json_text(track.name()) + "}");
    add(R"("ph":"M","name":"thread_sort_index")" + thread + R"(,"args":{"sort_index":)" +
        std::to_string(place) + "}");
    for (Index i = 0; i < track.spans(); ++i) {
      const TimelineSpan& span = track.span(i);
      add(R"("ph":"X","name":)" + detail::json_text(span.name()) + thread + R"(,"ts":)" +
          detail::microseconds(span.begin + offset_) + R"(,"dur":)" +
          detail::microseconds(span.end - span.begin) +
          (span.bytes < 0 ? "" : R"(,"args":{"bytes":)" + std::to_string(span.bytes) + "}"));
    }
    ++place;
  }
  return text;
}

/// A file in the Trace Event Format, which Perfetto (ui.perfetto.dev) and chrome://tracing open: an
/// object with complete events ("X") for spans, a process for each rank and a thread for each
/// track. (https://docs.google.com/document/d/1CvAClvFfyA5R-PhYUmn5OOQtYMH4h6I0nSsKchNAySU)
///
/// \param events   `Timeline::events` of each rank.
inline std::string chrome_trace(const std::vector<std::string>& events) {
  std::string text = "{\"displayTimeUnit\":\"ms\",\"traceEvents\":[\n";
  for (std::size_t i = 0; i < events.size(); ++i) {
    if (i > 0) text += ",\n";
    text += events[i];
  }
  return text + "\n]}\n";
}

/// How long a track had a span.
inline Nanoseconds busy_time(const TimelineTrack& track) {
  Nanoseconds sum = 0;
  for (const auto& [begin, end] : detail::stretches(track)) sum += end - begin;
  return sum;
}

/// How long both tracks had a span, such as computing while something is under way.
inline Nanoseconds overlap_time(const TimelineTrack& a, const TimelineTrack& b) {
  const auto left = detail::stretches(a), right = detail::stretches(b);
  Nanoseconds sum = 0;
  for (std::size_t i = 0, j = 0; i < left.size() && j < right.size();) {
    const Nanoseconds begin = std::max(left[i].first, right[j].first);
    const Nanoseconds end = std::min(left[i].second, right[j].second);
    sum += std::max<Nanoseconds>(0, end - begin);
    ++(left[i].second < right[j].second ? i : j);
  }
  return sum;
}

}  // namespace weir
