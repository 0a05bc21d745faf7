// SPDX-License-Identifier: MIT
#include <nlohmann/json.hpp>
#include <string>
#include <thread>
#include <vector>

#include <weir/parallel/timeline.hpp>

#include "support/allocations.hpp"
#include "support/catch.hpp"
#include "support/matrices.hpp"

namespace weir::timeline_test {

TEST_CASE("A timeline of two ranks is a trace file that browsers open", "[parallel][timeline]") {
  Timeline first({.rank = 0});
  TimelineTrack& compute = first.track("compute");
  compute.add("experts", 1'500, 4'001'500);
  compute.add("say \"hi\"\\\n\xC3", 5'000'000, 5'000'007, 4096);
  first.track("exchange");
  Timeline second({.rank = 3});
  second.track("main").add("early", -1'200, -900);

  const auto file = nlohmann::json::parse(chrome_trace({first.events(), second.events()}));
  CHECK(file["displayTimeUnit"] == "ms");
  const auto spans_of = [&](int rank) {
    std::vector<nlohmann::json> found;
    for (const auto& event : file["traceEvents"]) {
      if (event["ph"] == "X" && event["pid"] == rank) found.push_back(event);
    }
    return found;
  };
  const auto spans = spans_of(0);
  REQUIRE(spans.size() == 2);
  CHECK(spans[0] == nlohmann::json({{"ph", "X"},
                                    {"name", "experts"},
                                    {"pid", 0},
                                    {"tid", 0},
                                    {"ts", 1.5},
                                    {"dur", 4000.0}}));
  CHECK(spans[1]["name"] == "say \"hi\"\\??");
  CHECK(spans[1]["dur"] == 0.007);
  CHECK(spans[1]["args"]["bytes"] == 4096);
  REQUIRE(spans_of(3).size() == 1);
  CHECK(spans_of(3)[0]["ts"] == -1.2);
  CHECK(spans_of(3)[0]["dur"] == 0.3);

  const auto name_of = [&](const char* what, int rank, int track) {
    for (const auto& event : file["traceEvents"]) {
      if (event["ph"] == "M" && event["name"] == what && event["pid"] == rank &&
          event.value("tid", 0) == track) {
        return event["args"]["name"].get<std::string>();
      }
    }
    return std::string("none");
  };
  CHECK(name_of("process_name", 3, 0) == "rank 3");
  CHECK(name_of("thread_name", 0, 0) == "compute");
  CHECK(name_of("thread_name", 0, 1) == "exchange");
  CHECK(name_of("thread_name", 3, 0) == "main");
  CHECK(nlohmann::json::parse(chrome_trace({}))["traceEvents"].empty());
  CHECK(nlohmann::json::parse(chrome_trace({Timeline().events()}))["traceEvents"].size() == 2);
}

TEST_CASE("A track has a fixed size and keeps the latest spans", "[parallel][timeline]") {
  Timeline timeline({.most_spans = 3});
  TimelineTrack& track = timeline.track("t");
  CHECK(&timeline.track("t") == &track);
  CHECK(track.spans() == 0);
  const std::string name(60, 'x');
  const long allocated = test::count_allocations([&] {
    for (Index i = 0; i < 5; ++i) {
      track.add(i == 4 ? std::string_view(name) : std::string_view("abc"), 10 * i, 10 * i + 3, i);
    }
    const SpanTimer none(nullptr, "nothing");
  });
  if (test::allocations_are_counted()) CHECK(allocated == 0);
  CHECK(track.spans() == 3);
  CHECK(track.left_out() == 2);
  CHECK(track.span(0).begin == 20);
  CHECK(track.span(0).name() == "abc");
  CHECK(track.span(2).bytes == 4);
  CHECK(track.span(2).name() == std::string(40, 'x'));
  timeline.clear();
  CHECK(track.spans() == 0);
  CHECK(track.left_out() == 0);
}

TEST_CASE("Timers of several threads have tracks of their own", "[parallel][timeline]") {
  Timeline timeline;
  std::vector<TimelineTrack*> tracks;
  for (int i = 0; i < 3; ++i) tracks.push_back(&timeline.track("thread " + std::to_string(i)));
  std::vector<std::thread> threads;
  for (TimelineTrack* const track : tracks) {
    threads.emplace_back([track] {
      for (int i = 0; i < 100; ++i) {
        const SpanTimer outer(track, "outer");
        const SpanTimer inner(track, "inner", 8);
      }
    });
  }
  for (std::thread& thread : threads) thread.join();
  for (const TimelineTrack* const track : tracks) {
    REQUIRE(track->spans() == 200);
    for (Index i = 0; i < 200; i += 2) {
      const TimelineSpan& inner = track->span(i);
      const TimelineSpan& outer = track->span(i + 1);
      CHECK(inner.name() == "inner");
      CHECK(inner.bytes == 8);
      CHECK((outer.begin <= inner.begin && inner.begin <= inner.end && inner.end <= outer.end));
    }
  }
}

TEST_CASE("Overlap is the time in which both tracks have a span", "[parallel][timeline]") {
  Timeline timeline;
  TimelineTrack& a = timeline.track("a");
  TimelineTrack& b = timeline.track("b");
  CHECK(overlap_time(a, b) == 0);
  a.add("late", 40, 50);
  a.add("early", 0, 10);
  a.add("within", 2, 5);
  a.add("touching", 10, 20);
  b.add("x", 5, 12);
  b.add("y", 15, 45);
  b.add("z", 60, 70);
  CHECK(busy_time(a) == 30);
  CHECK(busy_time(b) == 47);
  CHECK(overlap_time(a, b) == 7 + 5 + 5);
  CHECK(overlap_time(b, a) == overlap_time(a, b));
  CHECK(overlap_time(a, a) == busy_time(a));
}

TEST_CASE("Clocks of two machines are compared by a question and its answer",
          "[parallel][timeline]") {
  // The other clock is 1000 ahead; there and back again takes 10 and 30.
  const Nanoseconds offset = clock_offset(100, 100 + 10 + 1000, 140);
  CHECK(offset == 990);
  Timeline timeline;
  timeline.track("t").add("s", 2000, 3000);
  timeline.shift(offset);
  CHECK(timeline.events().find("\"ts\":2.990,\"dur\":1.000") != std::string::npos);
  timeline.track("t").add("first", -990, -990);
  timeline.track("t").add("before", -1991, -990);
  const std::string events = timeline.events();
  CHECK(events.find("\"ts\":0.000,\"dur\":0.000") != std::string::npos);
  CHECK(events.find("\"ts\":-1.001,\"dur\":1.001") != std::string::npos);
}

TEST_CASE("Timeline says what is wrong", "[parallel][timeline]") {
  const auto message = [](auto action) { return test::message_of<ConfigError>(action); };
  CHECK(message([] { Timeline({.rank = -1}); }) == "Timeline: rank = -1, expected >= 0");
  CHECK(message([] { Timeline({.most_spans = 0}); }) == "Timeline: most_spans = 0, expected >= 1");
}

}  // namespace weir::timeline_test
