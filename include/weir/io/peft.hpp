// SPDX-License-Identifier: MIT
/// \file
/// Saves and loads low-rank adapters alone, in the layout of Hugging Face's PEFT.
#pragma once

#include <algorithm>
#include <array>
#include <cmath>
#include <filesystem>
#include <map>
#include <nlohmann/json.hpp>
#include <set>
#include <span>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include <weir/core/error.hpp>
#include <weir/core/low_rank.hpp>
#include <weir/core/types.hpp>
#include <weir/core/verbs.hpp>
#include <weir/io/atomic_file.hpp>
#include <weir/io/dtype.hpp>
#include <weir/io/file_error.hpp>
#include <weir/io/json_object.hpp>
#include <weir/io/safetensors.hpp>
#include <weir/io/safetensors_writer.hpp>
#include <weir/io/tensor_layout.hpp>
#include <weir/presets/tensor_names.hpp>

namespace weir::io {

namespace detail {

inline constexpr std::string_view kPeftPrefix = "base_model.model.";

/// What PEFT calls the linear map whose weight weir calls `weight`: the published name without
/// ".weight". Without `names`, weir's own.
/// \throws ConfigError  if the layout has no linear map of its own for the weight.
inline std::string peft_module(std::string_view who, std::string_view weight,
                               std::span<const presets::TensorName> names) {
  constexpr std::string_view kEnding = ".weight";
  std::string module(weight);
  if (names.empty()) {
    if (module.ends_with(kEnding)) module.resize(module.size() - kEnding.size());
    return module;
  }
  const presets::TensorName* entry = nullptr;
  for (const presets::TensorName& name : names) {
    const auto numbers = match_name(name.ours, weight);
    if (!numbers) continue;
    entry = &name;
    module = fill_name(name.theirs, *numbers);
    break;
  }
  bool plain = entry != nullptr && module.ends_with(kEnding);
  if (plain) {
    const presets::Arrangement& how = entry->how;
    plain = how.turns == presets::Turns::kOnce && !how.vector && !how.transposed && !how.flat &&
            !how.pairs && !how.heads;
    for (const presets::TensorName& other : names) {
      plain = plain && (&other == entry || other.theirs != entry->theirs);
    }
  }
  if (!plain) {
    throw_error<ConfigError>(who, ": the layout has no linear map of its own for ", weight,
                             ", expected weights that are published as they are");
  }
  module.resize(module.size() - kEnding.size());
  return module;
}

/// A setting of adapter_config.json for one linear map: that of the pattern that is its name or the
/// end of it behind a dot, else `general`. (PEFT's get_pattern_key matches "(.*\.)?(PATTERN)$".)
inline double peft_setting(const JsonObject& json, const std::string& patterns,
                           const std::string& module, double general) {
  if (!json.has(patterns)) return general;
  const JsonObject by_name = json.object(patterns);
  bool known = false;
  for (const auto& [pattern, value] : by_name.json().items()) {
    if (pattern.find_first_of("^$*+?()[]{}|\\") != std::string::npos) {
      throw_error<FileError>(by_name.path(), ": '", pattern,
                             "' is a regular expression, expected the name of a module");
    }
    const bool matches = module == pattern || module.ends_with("." + pattern);
    if (!matches) continue;
    // PEFT takes the first in the file's order, which is not known here.
    const double own = by_name.number(pattern);
    if (known && own != general) by_name.bad(pattern, "one value for each module");
    known = true;
    general = own;
  }
  return general;
}

/// \throws FileError  if adapter_config.json asks for what LowRank does not compute.
inline void expect_plain_lora(const JsonObject& json) {
  if (json.text("peft_type") != "LORA") json.bad("peft_type", "\"LORA\"");
  if (json.has("bias") && json.text("bias") != "none") json.bad("bias", "\"none\"");
  for (const char* const key : {"use_dora", "fan_in_fan_out", "lora_bias", "use_qalora"}) {
    if (json.has(key) && json.flag(key)) json.bad(key, "false");
  }
  for (const char* const key :
       {"modules_to_save", "layer_replication", "target_parameters", "trainable_token_indices",
        "alora_invocation_tokens", "arrow_config"}) {
    if (json.has(key) && !json.at(key).empty()) json.bad(key, "none");
  }
  if (json.has("init_lora_weights") && json.at("init_lora_weights").is_string()) {
    const std::string how = json.text("init_lora_weights");
    const bool keeps_base = how == "gaussian" || how == "eva" || how == "orthogonal";
    if (!keeps_base) json.bad("init_lora_weights", "one that leaves the base as it is");
  }
}

}  // namespace detail

/// Saves the adapter `adapter` of `model` as PEFT does: adapter_model.safetensors with
///
///     base_model.model.MODULE.lora_A.weight  [rank, in],   ...lora_B.weight  [out, rank]
///
/// and adapter_config.json with r, lora_alpha, lora_dropout and use_rslora; where weights differ in
/// rank or alpha, rank_pattern and alpha_pattern say so. PEFT loads the folder onto the published
/// model. The weights of the model may be stored in any way.
/// \param names    The layout that MODULE is named by, such as io::Family<Config>::names(config,
///                 nullptr). Without, names are weir's own, which only `load_peft` knows.
/// \param base     What adapter_config.json calls the base model; may be empty.
/// \throws ConfigError  if there is no such adapter, if it is merged, if its weights differ in
///                      dropout or use_rslora, or if the layout has no linear map for one of them.
/// \throws FileError    if a file cannot be written.
template <class Model>
void save_peft(const std::filesystem::path& folder, Model& model, std::string_view adapter,
               std::span<const presets::TensorName> names = {}, const std::string& base = "") {
  using T = typename Model::Scalar;
  struct Part {
    std::string module;
    const LowRank<T>* low_rank;
  };
  std::vector<Part> parts;
  std::vector<NamedMatrix<T>> matrices;
  for (const auto& [name, weight] : linear_weights(model)) {
    const LowRank<T>* const low_rank = weight->find(adapter);
    if (low_rank == nullptr) continue;
    if (low_rank->is_merged()) {
      throw_error<ConfigError>("save_peft: adapter '", adapter, "' of ", name,
                               " is merged, expected unmerge_lora before");
    }
    parts.push_back({detail::peft_module("save_peft", name, names), low_rank});
    const std::string full = std::string(detail::kPeftPrefix) + parts.back().module;
    matrices.push_back({full + ".lora_A.weight", &low_rank->a.value});
    matrices.push_back({full + ".lora_B.weight", &low_rank->b.value});
  }
  if (parts.empty()) {
    throw_error<ConfigError>("save_peft: there is no adapter '", adapter, "'");
  }
  const LowRank<T>& first = *parts[0].low_rank;
  nlohmann::json ranks = nlohmann::json::object();
  nlohmann::json alphas = nlohmann::json::object();
  std::set<std::string> targets;
  for (const auto& [module, low_rank] : parts) {
    if (low_rank->dropout != first.dropout || low_rank->rank_stabilised != first.rank_stabilised) {
      throw_error<ConfigError>("save_peft: ", module, " differs from ", parts[0].module,
                               " in dropout or rank_stabilised, expected the same for all");
    }
    targets.insert(module);
    if (low_rank->rank() != first.rank()) ranks[module] = low_rank->rank();
    if (low_rank->alpha != first.alpha) alphas[module] = low_rank->alpha;
  }
  const nlohmann::json json = {
      {"peft_type", "LORA"},
      {"task_type", "CAUSAL_LM"},
      {"base_model_name_or_path", base.empty() ? nlohmann::json() : nlohmann::json(base)},
      {"r", first.rank()},
      {"lora_alpha", first.alpha},
      {"lora_dropout", first.dropout},
      {"use_rslora", first.rank_stabilised},
      {"target_modules", targets},
      {"rank_pattern", ranks},
      {"alpha_pattern", alphas},
      {"bias", "none"},
      {"fan_in_fan_out", false},
      {"use_dora", false},
      {"inference_mode", true},
      {"init_lora_weights", true},
      {"modules_to_save", nullptr}};
  std::error_code error;
  std::filesystem::create_directories(folder, error);
  if (error) throw_error<FileError>(folder.string(), ": cannot be created: ", error.message());
  write_safetensors<T>(folder / "adapter_model.safetensors", matrices, dtype_of<T>(),
                       {{"format", "pt"}});
  AtomicFile file(folder / "adapter_config.json");
  try {
    file.write(json.dump(2));
  } catch (const nlohmann::json::exception& fault) {
    throw_error<ConfigError>("save_peft: a name is not UTF-8: ", fault.what());
  }
  file.commit();
}

/// Loads what PEFT or `save_peft` saved, and gives it to the weights of `model` as the adapter
/// `adapter`. Kinds of LoRA that compute something else (DoRA, biases, modules that were trained as
/// a whole) are refused by name.
/// \param names    As for `save_peft`.
/// \return         How many weights got the adapter.
/// \throws ConfigError  if the model has an adapter of that name already, or it can be no name.
/// \throws FileError    if a file is missing or broken, or does not fit the model. The model is as
///                      before then.
template <class Model>
Index load_peft(const std::filesystem::path& folder, Model& model, const std::string& adapter,
                std::span<const presets::TensorName> names = {}) {
  using T = typename Model::Scalar;
  constexpr std::size_t kMostConfig = std::size_t{16} << 20U;
  check_adapter_name("load_peft", adapter);
  const JsonObject json = JsonObject::read((folder / "adapter_config.json").string(), kMostConfig);
  detail::expect_plain_lora(json);
  const Index rank = json.count("r");
  const double alpha = json.number("lora_alpha");
  if (!(alpha > 0.0)) json.bad("lora_alpha", "a number > 0");
  const double dropout = json.has("lora_dropout") ? json.number("lora_dropout") : 0.0;
  if (!(dropout >= 0.0 && dropout < 1.0)) json.bad("lora_dropout", "0 <= lora_dropout < 1");
  const bool rank_stabilised = json.has("use_rslora") && json.flag("use_rslora");
  const Safetensors file = Safetensors::read((folder / "adapter_model.safetensors").string());

  std::map<std::string, LinearParameter<T>*> weights;  // By the names of their modules in the file.
  for (const auto& [name, weight] : linear_weights(model)) {
    if (weight->find(adapter) != nullptr) {
      throw_error<ConfigError>("load_peft: ", name, " has an adapter '", adapter,
                               "' already, expected another name");
    }
    try {
      weights[detail::peft_module("load_peft", name, names)] = weight;
    } catch (const ConfigError&) {
      // A weight that no adapter of this layout can be for.
    }
  }
  std::vector<std::pair<LinearParameter<T>*, LowRank<T>>> loaded;
  std::vector<std::string> faults;
  const auto matrix = [&](const std::string& name, Index rows, Index cols, Matrix<T>& to) {
    const auto found = file.tensors().find(name);
    if (found == file.tensors().end()) {
      faults.push_back("'" + name + "' is missing");
      return;
    }
    const Tensor& tensor = found->second;
    if (tensor.shape != std::vector<Index>{rows, cols} || !is_real(tensor.dtype)) {
      faults.push_back("'" + name + "' is " + std::string(name_of(tensor.dtype)) + " " +
                       shape_text(tensor.shape) + ", expected real numbers " +
                       shape_text({rows, cols}));
      return;
    }
    set_shape(to, rows, cols);
    convert(tensor.dtype, tensor.bytes.data(), to.size(), to.data());
  };
  for (const auto& [name, tensor] : file.tensors()) {
    constexpr std::string_view kA = ".lora_A.weight";
    constexpr std::string_view kB = ".lora_B.weight";
    if (!name.starts_with(detail::kPeftPrefix) || !(name.ends_with(kA) || name.ends_with(kB))) {
      faults.push_back("'" + name + "' is no part of an adapter");
      continue;
    }
    const std::string module = name.substr(detail::kPeftPrefix.size(),
                                           name.size() - detail::kPeftPrefix.size() - kA.size());
    const auto found = weights.find(module);
    if (found == weights.end()) {
      faults.push_back("'" + module + "' is no linear map of the model");
      continue;
    }
    const std::string full = std::string(detail::kPeftPrefix) + module;
    if (name.ends_with(kB)) {
      if (!file.has(full + std::string(kA))) {
        faults.push_back("'" + full + std::string(kA) + "' is missing");
      }
      continue;
    }
    const double own =
        detail::peft_setting(json, "rank_pattern", module, static_cast<double>(rank));
    constexpr double kMostRank = 1e6;
    if (!(own >= 1.0 && own <= kMostRank)) json.bad("r", "a number >= 1");
    if (own != std::floor(own)) json.bad("rank_pattern", "whole numbers");
    const auto own_rank = static_cast<Index>(own);
    const double own_alpha = detail::peft_setting(json, "alpha_pattern", module, alpha);
    if (!(own_alpha > 0.0)) json.bad("alpha_pattern", "numbers > 0");
    LowRank<T> low_rank{.name = adapter,
                        .a = {},
                        .b = {},
                        .alpha = own_alpha,
                        .rank_stabilised = rank_stabilised,
                        .dropout = dropout};
    matrix(full + std::string(kA), own_rank, found->second->d_in(), low_rank.a.value);
    matrix(full + std::string(kB), found->second->d_out(), own_rank, low_rank.b.value);
    set_zero(low_rank.merged.value, 1, 1);
    loaded.emplace_back(found->second, std::move(low_rank));
  }
  expect_no_faults(file.path(), faults);
  for (auto& [weight, low_rank] : loaded) weight->adapters.push_back(std::move(low_rank));
  return static_cast<Index>(loaded.size());
}

}  // namespace weir::io
