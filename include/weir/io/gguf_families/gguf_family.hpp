// SPDX-License-Identifier: MIT
/// \file
/// What weir knows of an architecture of GGUF files.
#pragma once

namespace weir::io {

/// How the models of a preset's config stand in GGUF files. Each family specialises it:
///
///     static bool reads(const Gguf& file);                 // whether it is one of this family
///     static constexpr bool kMayBeTied = true;             // whether output.weight may be missing
///     static Config read(GgufSettings& settings);          // all except `vocab` and `tied`
///     static std::string_view architecture(const Config& config);
///     static void write(const Config& config, GgufSettingsWriter& to);
///     static std::vector<presets::TensorName> names(const Config& config, const Gguf* file);
///
/// `read` uses each setting that it knows and leaves it to the caller to refuse the rest; `write`
/// throws ConfigError for what such a file cannot say. `names` looks at the file, if there is one,
/// to see in which of several layouts it was written. Where files have tensors that a model does
/// not need, there is also
///
///     static std::vector<std::string_view> ignored(const Gguf& file);   // patterns of their names
template <class Config>
struct GgufFamily;

}  // namespace weir::io
