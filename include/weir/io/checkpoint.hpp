// SPDX-License-Identifier: MIT
/// \file
/// Saves a training run and resumes it, bit for bit.
#pragma once

#include <algorithm>
#include <cerrno>
#include <cstddef>
#include <cstdio>
#include <cstring>
#include <fcntl.h>
#include <filesystem>
#include <map>
#include <nlohmann/json.hpp>
#include <optional>
#include <set>
#include <span>
#include <string>
#include <utility>
#include <vector>

#include <weir/core/error.hpp>
#include <weir/core/random.hpp>
#include <weir/core/types.hpp>
#include <weir/io/atomic_file.hpp>
#include <weir/io/file_error.hpp>
#include <weir/io/json_object.hpp>
#include <weir/io/safetensors.hpp>
#include <weir/io/safetensors_writer.hpp>
#include <weir/io/weights.hpp>

namespace weir::io {

/// What a training run knows beside its model and its optimizer.
struct TrainingState {
  Rng rng = Rng(0);    ///< The generator of the passes.
  Index position = 0;  ///< How far the run has read its data, as it counts.
  std::map<std::string, std::string> notes = {};  ///< Anything else, in UTF-8.
};

/// Settings of `save`.
struct SaveConfig {
  Index keep = 3;  ///< How many checkpoints stay; older ones are removed. 0: all.
};

namespace detail {

inline constexpr int kCheckpointVersion = 1;
inline constexpr std::size_t kMostState = std::size_t{16} << 20U;

inline std::string checkpoint_name(Index step) {
  std::string digits = std::to_string(step);
  digits.insert(0, digits.size() < 9 ? 9 - digits.size() : 0, '0');
  return "step-" + digits;
}

/// The complete checkpoints in `dir`, oldest first.
inline std::vector<std::pair<Index, std::filesystem::path>> checkpoints_in(
    const std::filesystem::path& dir) {
  std::vector<std::pair<Index, std::filesystem::path>> found;
  std::error_code error;
  for (const auto& entry : std::filesystem::directory_iterator(dir, error)) {
    const std::string name = entry.path().filename().string();
    if (!name.starts_with("step-") || name.size() > 5 + 18) continue;
    const std::string digits = name.substr(5);
    if (digits.empty() || digits.find_first_not_of("0123456789") != std::string::npos) continue;
    if (!std::filesystem::is_regular_file(entry.path() / "state.json", error)) continue;
    found.emplace_back(static_cast<Index>(std::stoll(digits)), entry.path());
  }
  std::sort(found.begin(), found.end());
  return found;
}

/// Removes a checkpoint so that it is none from the first moment on.
inline void remove_checkpoint(const std::filesystem::path& checkpoint) {
  std::error_code ignored;  // What cannot be removed stays, and does no harm.
  std::filesystem::remove(checkpoint / "state.json", ignored);
  std::filesystem::remove_all(checkpoint, ignored);
}

/// Removes all but the last `keep` checkpoints in `dir`, but never `path`; none with 0.
inline void keep_latest(const std::filesystem::path& dir, const std::filesystem::path& path,
                        Index keep) {
  const auto all = checkpoints_in(dir);
  for (std::size_t i = 0; keep > 0 && i + static_cast<std::size_t>(keep) < all.size(); ++i) {
    if (all[i].second != path) remove_checkpoint(all[i].second);
  }
}

/// Gives the folder `from` the name `to`, and what had that name before the name `from`.
inline void exchange_folders(const std::filesystem::path& from, const std::filesystem::path& to) {
  std::error_code error;
  const unsigned int flags = std::filesystem::exists(to, error) ? RENAME_EXCHANGE : 0;
  if (::renameat2(AT_FDCWD, from.c_str(), AT_FDCWD, to.c_str(), flags) != 0) {
    throw_error<FileError>(to.string(), ": cannot be named: ", std::strerror(errno));
  }
}

/// state.json of a checkpoint.
inline JsonObject read_state(const std::filesystem::path& path) {
  JsonObject json = JsonObject::read(path.string(), kMostState);
  const Index version = json.count("version");
  if (version > kCheckpointVersion) {
    throw_error<FileError>(json.path(), ": has version ", version, ", expected at most ",
                           kCheckpointVersion, ": it is from a newer weir");
  }
  return json;
}

inline std::map<std::string, std::string> texts_in(const JsonObject& json) {
  std::map<std::string, std::string> all;
  for (const auto& [name, value] : json.json().items()) all[name] = json.text(name);
  return all;
}

inline std::map<std::string, Index> counts_in(const JsonObject& json) {
  std::map<std::string, Index> all;
  for (const auto& [name, value] : json.json().items()) all[name] = json.count(name);
  return all;
}

}  // namespace detail

/// Saves a run after a step, so that `load` continues it bit for bit: the parameters and buffers of
/// `model` (balancing rules keep what moves in buffers), what `optimizer` remembers, and `state`.
/// The checkpoint is the folder `dir`/step-N, N being the optimizer's steps:
///
///     model.safetensors  optimizer.safetensors  state.json
///
/// It gets its name once it is whole and on the disk. Whatever happens meanwhile, the checkpoints
/// that were there before stay; only then are all but the last `config.keep` removed.
/// \return              The path of the checkpoint.
/// \throws StateError   if weights are stored for inference.
/// \throws ConfigError  if two tensors have the same name, a note is not UTF-8, or keep or position
///                      is negative.
/// \throws FileError    if a file cannot be written.
template <class Model, class Optimizer>
std::filesystem::path save(const std::filesystem::path& dir, Model& model, Optimizer& optimizer,
                           const TrainingState& state, const SaveConfig& config = {}) {
  using T = typename Model::Scalar;
  expect_at_least<Index>("save", "keep", config.keep, 0);
  expect_at_least<Index>("save", "position", state.position, 0);
  std::set<std::string> names;
  for (const auto& [name, matrix] : tensors_of("save", model)) names.insert(name);
  std::error_code error;
  std::filesystem::create_directories(dir, error);
  if (error) throw_error<FileError>(dir.string(), ": cannot be created: ", error.message());
  std::filesystem::path path = dir / detail::checkpoint_name(optimizer.steps());
  const std::filesystem::path partial = path.string() + ".partial";
  detail::remove_checkpoint(partial);  // Of a run that ended while saving.
  if (!std::filesystem::create_directory(partial, error)) {
    throw_error<FileError>(partial.string(), ": cannot be created: ", error.message());
  }

  save_weights(partial / "model.safetensors", model);
  std::vector<TensorShape> shapes;
  std::vector<std::span<const std::byte>> memory;
  nlohmann::json steps = nlohmann::json::object();
  for (const auto& saved : optimizer.saved_states()) {
    if (!names.contains(saved.parameter)) continue;  // Of a part that the model has lost.
    const auto add = [&](std::string_view what, const auto& matrix, Dtype dtype) {
      shapes.push_back(
          {saved.parameter + "." + std::string(what), {matrix.rows(), matrix.cols()}, dtype});
      memory.push_back(
          std::as_bytes(std::span(matrix.data(), static_cast<std::size_t>(matrix.size()))));
    };
    for (const auto& [what, matrix] : saved.matrices) add(what, *matrix, dtype_of<T>());
    for (const auto& [what, matrix] : saved.halves) add(what, *matrix, Dtype::kBF16);
    if (saved.steps != nullptr) steps[saved.parameter] = *saved.steps;
  }
  SafetensorsWriter writer(partial / "optimizer.safetensors", shapes, dtype_of<T>());
  for (const auto& bytes : memory) writer.append_bytes(bytes);
  writer.commit();
  // A parameter that some batch has reached moves in every step, by its moments if nothing else.
  nlohmann::json reached = nlohmann::json::array();
  for (const auto& [name, parameter] : parameters(model)) {
    if (parameter->grad.size() > 0) reached.push_back(name);
  }
  const nlohmann::json json = {{"version", detail::kCheckpointVersion},
                               {"reached", std::move(reached)},
                               {"steps", optimizer.steps()},
                               {"parameter_steps", std::move(steps)},
                               {"rng_stream", state.rng.stream()},
                               {"rng_position", state.rng.position()},
                               {"position", state.position},
                               {"notes", state.notes}};
  AtomicFile file(partial / "state.json");
  try {
    file.write(json.dump(2));
  } catch (const nlohmann::json::exception& fault) {
    throw_error<ConfigError>("save: a note is not UTF-8: ", fault.what());
  }
  file.commit();
  detail::exchange_folders(partial, path);
  sync_folder(dir);
  detail::remove_checkpoint(partial);
  detail::keep_latest(dir, path, config.keep);
  return path;
}

/// The newest complete checkpoint in `dir`; nothing if there is none.
inline std::optional<std::filesystem::path> latest_checkpoint(const std::filesystem::path& dir) {
  const auto all = detail::checkpoints_in(dir);
  if (all.empty()) return std::nullopt;
  return all.back().second;
}

/// The notes of a checkpoint, from which a program may see what model to make for `load`.
/// \param path          One of the folders in which `save` puts checkpoints.
/// \throws FileError    if there is no checkpoint, or it is broken or of a newer version.
inline std::map<std::string, std::string> read_notes(const std::filesystem::path& path) {
  return detail::texts_in(detail::read_state(path / "state.json").object("notes"));
}

/// Loads a checkpoint of `save` into a model of the same shape and an optimizer of the same kind.
/// \param path          A folder with checkpoints, of which the newest is taken, or one of those.
/// \return              What the run knew beside them.
/// \throws FileError    if there is no checkpoint, it is broken or of a newer version, or a tensor
///                      is missing, unknown or of another shape. Nothing has changed then.
/// \throws StateError   if weights are stored for inference.
template <class Model, class Optimizer>
TrainingState load(std::filesystem::path path, Model& model, Optimizer& optimizer) {
  using T = typename Model::Scalar;
  const auto into = tensors_of("load", model);
  std::error_code error;
  if (!std::filesystem::exists(path / "state.json", error)) {
    const auto latest = latest_checkpoint(path);
    if (!latest) throw_error<FileError>(path.string(), ": there is no checkpoint");
    path = *latest;
  }
  const JsonObject json = detail::read_state(path / "state.json");
  TrainingState state{.rng = Rng::restore(json.bits("rng_stream"), json.bits("rng_position")),
                      .position = json.count("position"),
                      .notes = detail::texts_in(json.object("notes"))};
  const Index steps = json.count("steps");
  const auto parameter_steps = detail::counts_in(json.object("parameter_steps"));
  const std::vector<std::string> named = json.texts("reached");
  const std::set<std::string> reached(named.begin(), named.end());
  const Safetensors weights = Safetensors::read((path / "model.safetensors").string());
  detail::expect_same_tensors<T>(weights, into);
  const Safetensors memory = Safetensors::read((path / "optimizer.safetensors").string());

  // All that can fail comes before anything changes: an optimizer is filled and then exchanged.
  Optimizer loaded = optimizer.without_states();
  for (const auto& [name, tensor] : memory.tensors()) {
    const std::size_t dot = name.rfind('.');
    const std::string parameter = name.substr(0, dot);
    const std::string what = dot == std::string::npos ? "" : name.substr(dot + 1);
    Matrix<T>* matrix = nullptr;
    Matrix<T> widened;
    Matrix<Eigen::bfloat16>* halves = nullptr;
    if (weights.has(parameter)) {
      const auto memory_of = loaded.saved_state(parameter);
      for (const auto& [known, values] : memory_of.matrices) {
        if (known == what) matrix = values;
      }
      for (const auto& [known, values] : memory_of.halves) {
        if (known == what) halves = values;
      }
    }
    if (halves != nullptr) matrix = &widened;
    if (matrix == nullptr) {
      throw_error<FileError>(memory.path(), ": '", name, "' is not known to the optimizer");
    }
    if (tensor.shape.size() != 2 || !is_real(tensor.dtype)) {
      throw_error<FileError>(memory.path(), ": '", name, "' is ", name_of(tensor.dtype), " ",
                             shape_text(tensor.shape), ", expected a matrix of real numbers");
    }
    matrix->resize(tensor.shape[0], tensor.shape[1]);
    convert(tensor.dtype, tensor.bytes.data(), matrix->size(), matrix->data());
    if (halves != nullptr) *halves = widened.template cast<Eigen::bfloat16>();
  }
  for (const auto& [name, count] : parameter_steps) {
    if (!weights.has(name)) {
      throw_error<FileError>(json.path(), ": 'parameter_steps' names '", name,
                             "', which is not in the model");
    }
    if (Index* const of_parameter = loaded.saved_state(name).steps; of_parameter != nullptr) {
      *of_parameter = count;
    }
  }
  loaded.set_steps(steps);
  optimizer = std::move(loaded);
  detail::copy_tensors<T>(weights, into);
  for (const auto& [name, parameter] : parameters(model)) {
    parameter->grad.resize(0, 0);
    parameter->reached = false;
    if (reached.contains(name)) {
      parameter->grad.setZero(parameter->value.rows(), parameter->value.cols());
    }
  }
  return state;
}

}  // namespace weir::io
