// SPDX-License-Identifier: MIT
/// \file
/// The settings of a model in the metadata of a GGUF file.
#pragma once

#include <algorithm>
#include <array>
#include <charconv>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <limits>
#include <set>
#include <string>
#include <string_view>
#include <vector>

#include <weir/core/error.hpp>
#include <weir/core/types.hpp>
#include <weir/io/file_error.hpp>
#include <weir/io/gguf.hpp>
#include <weir/io/gguf_metadata.hpp>
#include <weir/io/gguf_value.hpp>

namespace weir::io {

/// Settings that change nothing of what a decoder computes, whatever the architecture.
inline constexpr auto kGgufSettingsWithoutEffect = std::to_array<std::string_view>(
    {"context_length", "vocab_size", "rope.scaling.finetuned", "tensor_data_layout"});

namespace detail {

/// The number with the fewest decimal digits that 32 bits round to `value`: what was meant where a
/// file says 0.00000999999975.
inline double shortest(float value) {
  if (!std::isfinite(value)) return static_cast<double>(value);
  std::array<char, 64> text{};
  const char* const end = std::to_chars(text.data(), text.data() + text.size(), value).ptr;
  double result = 0.0;
  std::from_chars(text.data(), end, result);
  return result;
}

}  // namespace detail

/// The settings of one model, which the file names with its architecture before them:
/// "block_count" here is "llama.block_count" there. What nobody has asked for must not matter:
/// `finish` refuses the rest by name.
class GgufSettings {
 public:
  /// \throws FileError  if the file does not name its architecture.
  explicit GgufSettings(const Gguf& file)
      : file_(file), architecture_(file.text("general.architecture")) {}

  const Gguf& file() const { return file_; }
  const std::string& architecture() const { return architecture_; }

  /// The settings with these names. Each is used; without a `missing` it has to be there. A count
  /// that the file has for each layer has to be the same for all.
  /// \throws FileError  if it is missing or of another kind.
  Index count(const std::string& key);
  Index count(const std::string& key, Index missing) { return has(key) ? count(key) : missing; }
  double number(const std::string& key);
  double number(const std::string& key, double missing) { return has(key) ? number(key) : missing; }
  bool flag(const std::string& key, bool missing) {
    return has(key) ? file_.boolean(whole(key)) : missing;
  }
  std::string text(const std::string& key, const std::string& missing) {
    return has(key) ? std::string(file_.text(whole(key))) : missing;
  }

  /// Whether it is there; it counts as used.
  bool has(const std::string& key) { return file_.has(use(key)); }

  /// Settings that do not matter here.
  template <class... Keys>
  void ignore(const Keys&... keys) {
    (use(keys), ...);
  }

  /// The only value with which weir computes what the model does.
  /// \throws FileError  if the setting is there with another one.
  void expect_count(const std::string& key, Index value) {
    if (count(key, value) != value) bad(key, std::to_string(value));
  }
  void expect_number(const std::string& key, double value) {
    if (number(key, value) != value) bad(key, decimal(value));
  }
  void expect_flag(const std::string& key, bool value) {
    if (flag(key, value) != value) bad(key, value ? "true" : "false");
  }

  /// \throws FileError  that says what the setting had to be.
  [[noreturn]] void bad(const std::string& key, std::string_view expected) const {
    throw_error<FileError>(file_.path(), ": key '", whole(key), "' is ", shown(whole(key)),
                           ", expected ", expected);
  }

  /// \throws FileError  if a setting of the architecture is neither used nor without effect, or the
  ///                    file is only a part of a model.
  void finish() const;

 private:
  std::string whole(const std::string& key) const { return architecture_ + "." + key; }
  const std::string& use(const std::string& key) { return *used_.insert(whole(key)).first; }

  static std::string decimal(double value) {
    std::array<char, 64> text{};
    return {text.data(), std::to_chars(text.data(), text.data() + text.size(), value).ptr};
  }

  /// A value for messages.
  std::string shown(const std::string& key) const;

  const Gguf& file_;
  std::string architecture_;
  std::set<std::string> used_;
};

inline Index GgufSettings::count(const std::string& key) {
  const std::string& name = use(key);
  const GgufValue& value = file_.value(name);
  const std::vector<std::int64_t> all =
      value.is_array ? file_.integers(name) : std::vector<std::int64_t>{file_.integer(name)};
  if (all.empty()) bad(key, "a number");
  if (std::any_of(all.begin(), all.end(), [&](auto one) { return one != all[0]; })) {
    bad(key, "the same number for all layers");
  }
  if (all[0] < 0 || all[0] > std::numeric_limits<std::int32_t>::max()) {
    bad(key, "0 to 2147483647");
  }
  return static_cast<Index>(all[0]);
}

inline double GgufSettings::number(const std::string& key) {
  const std::string& name = use(key);
  const double value = file_.real(name);
  return file_.value(name).kind == GgufKind::kF32 ? detail::shortest(static_cast<float>(value))
                                                  : value;
}

inline std::string GgufSettings::shown(const std::string& key) const {
  const GgufValue& value = file_.value(key);
  if (value.is_array) {
    return "an array of " + std::to_string(value.count) + " " + std::string(name_of(value.kind));
  }
  switch (value.kind) {
    case GgufKind::kString:
      return "'" + std::string(file_.text(key)) + "'";
    case GgufKind::kBool:
      return file_.boolean(key) ? "true" : "false";
    case GgufKind::kF32:
      return decimal(detail::shortest(static_cast<float>(file_.real(key))));
    case GgufKind::kF64:
      return decimal(file_.real(key));
    default:
      return std::to_string(file_.integer(key));
  }
}

inline void GgufSettings::finish() const {
  const auto& used_by_all = kGgufSettingsWithoutEffect;
  const std::string prefix = architecture_ + ".";
  for (const auto& [key, value] : file_.metadata()) {
    const std::string name(key);
    if (!key.starts_with(prefix) || used_.contains(name) ||
        std::find(used_by_all.begin(), used_by_all.end(), key.substr(prefix.size())) !=
            used_by_all.end()) {
      continue;
    }
    bad(name.substr(prefix.size()), "it not to be there: weir does not know what it changes");
  }
  constexpr auto kParts = "split.count";
  if (file_.has(kParts) && file_.integer(kParts) > 1) {
    throw_error<FileError>(file_.path(), ": is one of ", file_.integer(kParts),
                           " parts of a model, expected a whole one");
  }
}

/// Writes settings under an architecture's name, in the kinds that llama.cpp reads.
class GgufSettingsWriter {
 public:
  GgufSettingsWriter(GgufMetadata& metadata, std::string_view architecture)
      : metadata_(metadata), prefix_(std::string(architecture) + ".") {
    metadata_.add_text("general.architecture", architecture);
  }

  /// \throws ConfigError  unless 0 <= value < 2^32.
  void count(const std::string& key, Index value) {
    if (value < 0 || value > static_cast<Index>(std::numeric_limits<std::uint32_t>::max())) {
      throw_error<ConfigError>("save_gguf: ", prefix_, key, " = ", value,
                               ", expected 0 to 4294967295");
    }
    metadata_.add_u32(prefix_ + key, static_cast<std::uint32_t>(value));
  }
  void number(const std::string& key, double value) {
    metadata_.add_f32(prefix_ + key, static_cast<float>(value));
  }
  void flag(const std::string& key, bool value) { metadata_.add_bool(prefix_ + key, value); }
  void text(const std::string& key, std::string_view value) {
    metadata_.add_text(prefix_ + key, value);
  }

 private:
  GgufMetadata& metadata_;
  std::string prefix_;
};

}  // namespace weir::io
