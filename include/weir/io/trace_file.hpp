// SPDX-License-Identifier: MIT
/// \file
/// Traces in files.
#pragma once

#include <array>
#include <bit>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <filesystem>
#include <span>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include <weir/analysis/trace.hpp>
#include <weir/analysis/trace_csv.hpp>
#include <weir/analysis/trace_recorder.hpp>
#include <weir/core/error.hpp>
#include <weir/core/types.hpp>
#include <weir/io/atomic_file.hpp>
#include <weir/io/file_error.hpp>
#include <weir/io/mapped_file.hpp>

namespace weir::io {

static_assert(std::endian::native == std::endian::little, "files are little-endian");

/// How a file of a trace begins. Behind it are the records, then the names: of each layer the
/// number of its experts, and of each layer, then of each domain, the length of its name in bytes
/// and the name; numbers have 32 bits.
struct TraceFileHeader {
  std::array<char, 8> magic = {'w', 'e', 'i', 'r', 't', 'r', 'c', '\n'};
  std::uint32_t version = 1;
  std::uint32_t record_bytes = 0;
  std::uint32_t choices = 0;
  std::uint32_t logits = 0;
  std::uint64_t records = 0;
  std::uint64_t left_out = 0;
  std::uint64_t names_bytes = 0;
  std::uint32_t layers = 0;
  std::uint32_t domains = 0;
  double share = 1.0;      ///< Of the sequences, see TraceRecorderConfig.
  std::uint64_t seed = 0;  ///< The same.
};
static_assert(sizeof(TraceFileHeader) == 72, "no padding: it is bytes of files");

/// Writes the records of a recorder to a file as they come. The file appears when it is complete:
///
///     io::TraceWriter writer("run.trace");
///     TraceRecorder recorder(writer, {.layout = {.choices = 2}});
///     ...                                       // begin, passes
///     writer.commit(recorder);
class TraceWriter final : public TraceSink {
 public:
  /// \throws FileError  if the folder does not allow a new file.
  explicit TraceWriter(const std::filesystem::path& path) : file_(path) {
    file_.write(std::as_bytes(std::span(&empty_, 1)));
  }

  /// \throws FileError  if the records do not fit on the disk.
  void write(std::span<const std::byte> records) override { file_.write(records); }

  /// Completes the file with what `recorder` still has, and gives it its name.
  /// \throws StateError   unless this is where the recorder's records go.
  /// \throws FileError  as AtomicFile.
  void commit(TraceRecorder& recorder) {
    if (recorder.sink() != this) {
      throw_error<StateError>("TraceWriter::commit: the recorder has ",
                              recorder.sink() == nullptr ? "no sink" : "another sink",
                              ", expected this writer");
    }
    recorder.flush();
    std::string names;
    const auto add_number = [&names](std::size_t number) {
      const auto stored = static_cast<std::uint32_t>(number);
      names.append(std::string_view(reinterpret_cast<const char*>(&stored), sizeof stored));
    };
    for (const TraceLayer& layer : recorder.layers()) {
      add_number(static_cast<std::size_t>(layer.experts));
      add_number(layer.name.size());
      names += layer.name;
    }
    for (const std::string& domain : recorder.domains()) {
      add_number(domain.size());
      names += domain;
    }
    file_.write(names);
    const TraceRecorderConfig& config = recorder.config();
    TraceFileHeader header;
    header.record_bytes = static_cast<std::uint32_t>(config.layout.record_bytes());
    header.choices = static_cast<std::uint32_t>(config.layout.choices);
    header.logits = static_cast<std::uint32_t>(config.layout.logits);
    header.records = static_cast<std::uint64_t>(recorder.records());
    header.left_out = static_cast<std::uint64_t>(recorder.left_out());
    header.names_bytes = names.size();
    header.layers = static_cast<std::uint32_t>(recorder.layers().size());
    header.domains = static_cast<std::uint32_t>(recorder.domains().size());
    header.share = config.share;
    header.seed = config.seed;
    file_.write_at(0, std::as_bytes(std::span(&header, 1)));
    file_.commit();
  }

 private:
  TraceFileHeader empty_ = {};
  AtomicFile file_;
};

/// A file of a trace, read where it lies. Opening it looks at every record once, so that all that
/// the trace says can be relied on.
class TraceFile {
 public:
  /// \throws FileError  if there is no such file, or it is not a trace; the message says why.
  explicit TraceFile(const std::string& path)
      : file_(path), trace_(parse(path, file_.bytes(), header_)) {}

  const Trace& trace() const { return trace_; }
  const TraceFileHeader& header() const { return header_; }

  /// The trace in `bytes`, which are those of a whole file and have to outlive it.
  /// \param path     For messages.
  static Trace parse(const std::string& path, std::span<const std::byte> bytes,
                     TraceFileHeader& header);

 private:
  MappedFile file_;
  TraceFileHeader header_;
  Trace trace_;
};

namespace detail {

/// Reads the names at the end of a trace's file.
class TraceNames {
 public:
  TraceNames(const std::string& path, std::span<const std::byte> bytes)
      : path_(path), bytes_(bytes) {}

  std::uint32_t number() {
    std::uint32_t value = 0;
    std::memcpy(&value, take(sizeof value).data(), sizeof value);
    return value;
  }
  std::string name() {
    const auto text = take(number());
    return {reinterpret_cast<const char*>(text.data()), text.size()};
  }
  void expect_end() const {
    if (!bytes_.empty()) {
      throw_error<FileError>(path_, ": ", bytes_.size(), " bytes follow the names, expected none");
    }
  }

 private:
  std::span<const std::byte> take(std::size_t count) {
    if (count > bytes_.size()) {
      throw_error<FileError>(path_, ": the names end early: ", count, " more bytes expected, ",
                             bytes_.size(), " are there");
    }
    const auto taken = bytes_.first(count);
    bytes_ = bytes_.subspan(count);
    return taken;
  }

  const std::string& path_;
  std::span<const std::byte> bytes_;
};

}  // namespace detail

inline Trace TraceFile::parse(const std::string& path, std::span<const std::byte> bytes,
                              TraceFileHeader& header) {
  const TraceFileHeader known;
  if (bytes.size() < sizeof header) {
    throw_error<FileError>(path, ": has ", bytes.size(), " bytes, expected at least ",
                           sizeof header);
  }
  std::memcpy(&header, bytes.data(), sizeof header);
  bytes = bytes.subspan(sizeof header);
  if (header.magic != known.magic) throw_error<FileError>(path, ": is not a trace of weir");
  if (header.version != known.version) {
    throw_error<FileError>(path, ": has version ", header.version, ", expected ", known.version);
  }
  const TraceLayout layout = {.choices = header.choices, .logits = header.logits};
  try {
    layout.check();
    if (header.record_bytes != layout.record_bytes()) {
      throw_error<FileError>(path, ": records have ", header.record_bytes, " bytes, expected ",
                             layout.record_bytes());
    }
    if (header.names_bytes > bytes.size() ||
        header.records != (bytes.size() - header.names_bytes) / layout.record_bytes() ||
        (bytes.size() - header.names_bytes) % layout.record_bytes() != 0) {
      throw_error<FileError>(path, ": has ", bytes.size(), " bytes behind its header, expected ",
                             header.records, " records of ", layout.record_bytes(), " and ",
                             header.names_bytes, " of names");
    }
    // A layer has at least 8 bytes of names, a domain 4.
    if (header.layers > header.names_bytes / 8 || header.domains > header.names_bytes / 4) {
      throw_error<FileError>(path, ": ", header.layers, " layers and ", header.domains,
                             " domains do not fit into ", header.names_bytes, " bytes of names");
    }
    const std::size_t names_at = bytes.size() - static_cast<std::size_t>(header.names_bytes);
    detail::TraceNames names(path, bytes.subspan(names_at));
    std::vector<TraceLayer> layers;
    std::vector<std::string> domains;
    for (std::uint32_t l = 0; l < header.layers; ++l) {
      const Index experts = names.number();
      layers.push_back({names.name(), experts});
    }
    for (std::uint32_t d = 0; d < header.domains; ++d) domains.push_back(names.name());
    names.expect_end();
    return {layout, std::move(layers), std::move(domains), bytes.first(names_at),
            static_cast<Index>(header.left_out)};
  } catch (const ConfigError& error) {
    throw_error<FileError>(path, ": ", error.what());
  }
}

/// Writes a trace as a table, see `write_csv`. The file appears when it is complete.
/// \throws FileError  as AtomicFile.
inline void save_csv(const std::filesystem::path& path, const Trace& trace) {
  AtomicFile file(path);
  write_csv(trace, [&](std::string_view text) { file.write(text); });
  file.commit();
}

}  // namespace weir::io
