// SPDX-License-Identifier: MIT
#include <cstdint>
#include <cstring>
#include <filesystem>
#include <fstream>
#include <functional>
#include <iterator>
#include <string>
#include <vector>

#include <weir/analysis/trace_csv.hpp>
#include <weir/analysis/trace_recorder.hpp>
#include <weir/io/trace_file.hpp>

#include "analysis/traces.hpp"
#include "io/folder.hpp"
#include "support/catch.hpp"
#include "support/matrices.hpp"

namespace weir::trace_file_test {

namespace {

/// Two layers, three tokens in two sequences; some were dropped.
void record_some(TraceRecorder& recorder) {
  const Index prose = recorder.domain("prose, \"plain\"");
  const Sequences sequences({2, 1});
  const std::vector<Index> ids = {4, 5, 6};
  const Pass pass = {.sequences = &sequences, .token_ids = ids};
  recorder.begin({{.id = 0, .domain = prose}, {.id = 3, .position = 8, .domain = prose}});
  Routing<double> routing = test::routing_of({{0, 1}, {1, 2}, {2, 0}}, 3, pass);
  routing.kept[2] = 0;
  recorder.see("layers.0.moe", routing, pass);
  recorder.see("layers.1.moe", test::routing_of({{3}, {2}, {0}}, 4, pass), pass);
}

std::string bytes_of(const std::string& path) {
  std::ifstream file(path, std::ios::binary);
  return {std::istreambuf_iterator<char>(file), std::istreambuf_iterator<char>()};
}

/// What is said about a file of these bytes.
std::string complaint_about(const std::string& bytes) {
  io::TraceFileHeader header;
  return test::message_of<io::FileError>(
      [&] { io::TraceFile::parse("f", std::as_bytes(std::span(bytes)), header); });
}

template <class V>
std::string with(std::string bytes, std::size_t offset, V value) {
  std::memcpy(bytes.data() + offset, &value, sizeof value);
  return bytes;
}

std::string sample(const TraceLayout& layout = {.choices = 2}) {
  const test::Folder folder;
  const std::string path = (folder.path() / "a.trace").string();
  io::TraceWriter writer(path);
  TraceRecorder recorder(writer, {.layout = layout, .buffer_records = 2});
  record_some(recorder);
  writer.commit(recorder);
  return bytes_of(path);
}

}  // namespace

TEST_CASE("A file of a trace has what a trace in memory has", "[io][trace]") {
  const test::Folder folder;
  const std::string path = (folder.path() / "a.trace").string();
  const TraceRecorderConfig config = {
      .layout = {.choices = 2, .logits = 3}, .most_records = 5, .buffer_records = 2};
  TraceRecorder in_memory(config);
  record_some(in_memory);
  {
    io::TraceWriter writer(path);
    TraceRecorder recorder(writer, config);
    record_some(recorder);
    CHECK_FALSE(std::filesystem::exists(path));
    writer.commit(recorder);
  }
  const io::TraceFile file(path);
  const Trace expected = in_memory.trace();
  CHECK(file.trace().records() == 5);
  CHECK(file.trace().left_out() == 1);
  CHECK(file.trace().layout() == expected.layout());
  CHECK(file.trace().domains() == expected.domains());
  REQUIRE(file.trace().layers().size() == 2);
  CHECK(file.trace().layers()[1].name == "layers.1.moe");
  CHECK(file.trace().layers()[1].experts == 4);
  CHECK(std::equal(expected.bytes().begin(), expected.bytes().end(), file.trace().bytes().begin(),
                   file.trace().bytes().end()));
  CHECK(file.header().share == 1.0);
}

TEST_CASE("A trace of nothing is a trace", "[io][trace]") {
  const test::Folder folder;
  const std::string path = (folder.path() / "a.trace").string();
  io::TraceWriter writer(path);
  TraceRecorder recorder(writer, {.share = 0.25, .seed = 9});
  writer.commit(recorder);
  const io::TraceFile file(path);
  CHECK(file.trace().records() == 0);
  CHECK(file.header().share == 0.25);
  CHECK(file.header().seed == 9);
}

TEST_CASE("A writer that does not commit leaves nothing", "[io][trace]") {
  const test::Folder folder;
  {
    io::TraceWriter writer(folder.path() / "a.trace");
    TraceRecorder recorder(writer);
    record_some(recorder);
  }
  CHECK(std::filesystem::is_empty(folder.path()));
  CHECK_THROWS_AS(io::TraceWriter(folder.path() / "no" / "a"), io::FileError);
  CHECK_THROWS_AS(io::TraceFile((folder.path() / "no").string()), io::FileError);
}

TEST_CASE("A writer completes the file of its own recorder alone", "[io][trace]") {
  const test::Folder folder;
  const auto path = folder.path() / "a.trace";
  {
    io::TraceWriter writer(path);
    io::TraceWriter other(folder.path() / "b.trace");
    TraceRecorder recorder(other);
    record_some(recorder);
    CHECK(test::message_of<StateError>([&] { writer.commit(recorder); }) ==
          "TraceWriter::commit: the recorder has another sink, expected this writer");
    TraceRecorder in_memory;
    CHECK(test::message_of<StateError>([&] { writer.commit(in_memory); }) ==
          "TraceWriter::commit: the recorder has no sink, expected this writer");
    CHECK_FALSE(std::filesystem::exists(path));
    other.commit(recorder);
  }
  CHECK(io::TraceFile((folder.path() / "b.trace").string()).trace().records() == 6);
  CHECK_FALSE(std::filesystem::exists(path));
}

TEST_CASE("A trace as a table", "[io][trace]") {
  const test::Folder folder;
  TraceRecorder recorder({.layout = {.choices = 2, .logits = 4}});
  record_some(recorder);
  const auto path = folder.path() / "a.csv";
  io::save_csv(path, recorder.trace());
  std::ifstream file(path);
  std::vector<std::string> lines;
  for (std::string line; std::getline(file, line);) lines.push_back(line);
  REQUIRE(lines.size() == 7);
  CHECK(lines[0] ==
        "layer,sequence,position,token,domain,phase,pass,entropy,assigned,expert_0,weight_0,kept_0,"
        "expert_1,weight_1,kept_1,logit_0,logit_1,logit_2,logit_3");
  CHECK(lines[2].starts_with("layers.0.moe,0,1,5,\"prose, \"\"plain\"\"\",prefill,0,"));
  CHECK(lines[2].find(",2,1,") != std::string::npos);
  CHECK(lines[2].ends_with(",-20,5,4,"));  // Three experts have three logits.
  CHECK(lines[3].starts_with("layers.0.moe,3,8,6,"));
  CHECK(lines[3].find(",decoding,") != std::string::npos);
  CHECK(lines[4].find(",1,3,1,1,,,,") != std::string::npos);  // One choice, kept.
  CHECK(csv_field("plain") == "plain");
  CHECK(csv_field("a\nb") == "\"a\nb\"");
}

TEST_CASE("A file that is no trace is refused with the reason", "[io][trace]") {
  const std::string good = sample();
  constexpr std::size_t kHeader = sizeof(io::TraceFileHeader);
  constexpr std::size_t kRecord = 56;
  REQUIRE(complaint_about(good) == "no exception");

  CHECK(complaint_about("") == "f: has 0 bytes, expected at least 72");
  CHECK(complaint_about(with(good, 0, 'W')) == "f: is not a trace of weir");
  CHECK(complaint_about(with(good, 8, std::uint32_t{2})) == "f: has version 2, expected 1");
  CHECK(complaint_about(with(good, 12, std::uint32_t{48})) ==
        "f: records have 48 bytes, expected 56");
  CHECK(complaint_about(with(good, 16, std::uint32_t{0})) ==
        "f: TraceLayout: choices = 0, expected 1 <= choices <= 65535");
  const std::string behind =
      "f: has " + std::to_string(good.size() - kHeader) + " bytes behind its header, expected ";
  CHECK(complaint_about(with(good, 24, std::uint64_t{7})).starts_with(behind + "7 records of 56"));
  CHECK(complaint_about(with(good, 24, ~std::uint64_t{0})).starts_with(behind));
  CHECK(complaint_about(with(good, 40, ~std::uint64_t{0})).starts_with(behind));
  CHECK(complaint_about(good.substr(0, good.size() - 1)).starts_with("f: has "));
  CHECK(complaint_about(with(good, 48, std::uint32_t{1000})) ==
        "f: 1000 layers and 1 domains do not fit into 58 bytes of names");
  CHECK(complaint_about(with(good, 48, std::uint32_t{1})).starts_with("f: "));
  CHECK(complaint_about(with(good, 52, std::uint32_t{0})) ==
        "f: 18 bytes follow the names, expected none");
  CHECK(complaint_about(with(good, 32, ~std::uint64_t{0})) ==
        "f: Trace: left_out = -1, expected >= 0");

  const auto in_record = [&](std::size_t offset, auto value) {
    return complaint_about(with(good, kHeader + kRecord + offset, value));
  };
  CHECK(in_record(0, std::int64_t{-1}) ==
        "f: Trace: record 1 has sequence = -1, position = 1, token = 5, expected none below 0 (-1 "
        "for an unknown token)");
  CHECK(in_record(24, std::uint32_t{1}) ==
        "f: Trace: record 1 has domain = 1, expected domain < 1");
  CHECK(in_record(28, std::uint16_t{2}) == "f: Trace: record 1 has layer = 2, expected layer < 2");
  CHECK(in_record(30, std::uint16_t{3}) == "f: Trace: record 1 has phase = 3, expected phase < 3");
  CHECK(in_record(34, std::uint16_t{3}) ==
        "f: Trace: record 1 has choices = 3, expected choices < 3");
  CHECK(in_record(32, std::uint16_t{1}) ==
        "f: Trace: record 1 has choices = 2, expected choices < 2");
  CHECK(in_record(36, std::uint32_t{0x7FC00000}) ==
        "f: Trace: record 1 has a weight or an entropy that is not finite");
  CHECK(in_record(40, std::uint16_t{3}) ==
        "f: Trace: record 1 has expert = 3, expected expert < 3");
  CHECK(in_record(40, std::uint16_t{2}) ==
        "f: Trace: record 1 has expert 2 twice, expected it once");
  CHECK(in_record(42, std::uint16_t{2}) == "f: Trace: record 1 has kept = 2, expected kept < 2");
}

TEST_CASE("Any byte of a trace may be wrong", "[io][trace]") {
  const std::string good = sample({.choices = 1, .logits = 1});
  Index refused = 0;
  for (std::size_t i = 0; i < good.size(); ++i) {
    for (const unsigned flip : {1U, 128U, 255U}) {
      const auto byte = static_cast<unsigned char>(static_cast<unsigned char>(good[i]) ^ flip);
      const std::string said = complaint_about(with(good, i, byte));
      REQUIRE((said == "no exception" || said.starts_with("f: ")));
      refused += said != "no exception";
    }
    REQUIRE(complaint_about(good.substr(0, i)).starts_with("f: "));
  }
  CHECK(refused > 100);
}

}  // namespace weir::trace_file_test
