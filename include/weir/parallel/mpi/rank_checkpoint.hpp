// SPDX-License-Identifier: MIT
/// \file
/// Saves a training run of many ranks at once, and resumes it on as many or others. Needs weir::io.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
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
#include <weir/core/random.hpp>
#include <weir/core/types.hpp>
#include <weir/core/verbs.hpp>
#include <weir/io/atomic_file.hpp>
#include <weir/io/checkpoint.hpp>
#include <weir/io/checkpoint_folder.hpp>
#include <weir/io/dtype.hpp>
#include <weir/io/file_error.hpp>
#include <weir/io/safetensors_writer.hpp>
#include <weir/io/weights.hpp>
#include <weir/parallel/mpi/collectives.hpp>
#include <weir/parallel/mpi/data_parallel.hpp>
#include <weir/parallel/mpi/exchange.hpp>
#include <weir/parallel/mpi/on_all_ranks.hpp>

namespace weir::io {

namespace detail {

inline std::string file_of_rank(Index rank, Index ranks) {
  const auto number = [](Index n) {
    const std::string digits = std::to_string(n);
    return std::string(digits.size() < 5 ? 5 - digits.size() : 0, '0') + digits;
  };
  return "model-" + number(rank + 1) + "-of-" + number(ranks) + ".safetensors";
}

/// A tensor of this rank's file.
struct RankTensor {
  TensorShape shape;
  std::span<const std::byte> bytes;
};

template <class Number>
RankTensor rank_tensor(std::string name, const Matrix<Number>& matrix, Dtype dtype) {
  return {{std::move(name), {matrix.rows(), matrix.cols()}, dtype},
          std::as_bytes(std::span(matrix.data(), static_cast<std::size_t>(matrix.size())))};
}

/// Writes this rank's tensors to a file of its own in `folder`, and tells the others their names.
/// The index of all comes from rank 0.
inline void write_rank_file(Channel& channel, Exchange& exchange,
                            const std::filesystem::path& folder, Dtype dtype,
                            const std::vector<RankTensor>& tensors) {
  on_all_ranks(channel, exchange, [&] {
    if (tensors.empty()) return;
    std::vector<TensorShape> shapes;
    shapes.reserve(tensors.size());
    for (const RankTensor& tensor : tensors) shapes.push_back(tensor.shape);
    SafetensorsWriter writer(folder / file_of_rank(channel.rank(), channel.size()), shapes, dtype,
                             {{"format", "pt"}});
    for (const RankTensor& tensor : tensors) writer.append_bytes(tensor.bytes);
    writer.commit();
  });
  std::string mine;
  std::int64_t size = 0;
  for (const RankTensor& tensor : tensors) {
    mine += tensor.shape.name + '\n';
    size += static_cast<std::int64_t>(tensor.bytes.size());
  }
  List<std::int64_t> sizes;
  all_gather<std::int64_t>(channel, exchange, "sizes of files", std::span(&size, 1), sizes);
  const std::vector<std::string> names =
      all_gather_texts(channel, exchange, "names of tensors", mine);
  on_all_ranks(channel, exchange, [&] {
    if (channel.rank() != 0) return;
    nlohmann::json places = nlohmann::json::object();
    std::int64_t total = 0;
    for (int r = 0; r < channel.size(); ++r) {
      std::string_view text = names[static_cast<std::size_t>(r)];
      for (; !text.empty(); text.remove_prefix(text.find('\n') + 1)) {
        places[std::string(text.substr(0, text.find('\n')))] = file_of_rank(r, channel.size());
      }
      total += sizes[r];
    }
    const nlohmann::json json = {{"metadata", {{"total_size", total}}}, {"weight_map", places}};
    AtomicFile file(folder / "model.safetensors.index.json");
    file.write(json.dump(2) + "\n");
    file.commit();
  });
}

/// Reads what this rank has of the tensors of a folder.
template <class T>
void read_tensor(const CheckpointFolder& folder, const std::string& name, Matrix<T>& into) {
  const StoredTensor* const tensor = folder.find(name);
  const std::vector<Index> shape = {into.rows(), into.cols()};
  if (tensor == nullptr || tensor->shape() != shape) {
    throw_error<FileError>(folder.path(), ": '", name, "' is ",
                           tensor == nullptr ? "missing" : shape_text(tensor->shape()),
                           ", expected ", shape_text(shape));
  }
  tensor->read(0, into.size(), into.data());
}

/// Fills the states of the parameter `name` from the tensors "name.*" that are there.
template <class T>
void read_state(const CheckpointFolder& folder, const std::string& name,
                const SavedState<T>& state) {
  const auto read = [&](std::string_view what, auto&& fill) {
    const StoredTensor* const tensor = folder.find(name + "." + std::string(what));
    if (tensor == nullptr) return;
    if (tensor->shape().size() != 2) {
      throw_error<FileError>(folder.path(), ": '", name, ".", what, "' is ",
                             shape_text(tensor->shape()), ", expected a matrix");
    }
    Matrix<T> numbers;
    set_shape(numbers, tensor->shape()[0], tensor->shape()[1]);
    tensor->read(0, numbers.size(), numbers.data());
    fill(std::move(numbers));
  };
  for (const auto& [what, matrix] : state.matrices) {
    read(what, [into = matrix](Matrix<T> numbers) { *into = std::move(numbers); });
  }
  for (const auto& [what, matrix] : state.halves) {
    read(what, [into = matrix](const Matrix<T>& numbers) {
      *into = numbers.template cast<Eigen::bfloat16>();
    });
  }
}

/// What `load` does on one rank.
template <class T, class Model, class Optimizer>
TrainingState load_rank(const std::filesystem::path& path, DataParallel<T>& together, Model& model,
                        Optimizer& optimizer) {
  const JsonObject json = read_state(path / "state.json");
  const JsonObject ranks = json.object("ranks");
  const auto saved = static_cast<Index>(ranks.json().size());
  const Index me = together.rank();
  const bool same = saved == together.size();
  const JsonObject own = ranks.object(std::to_string(same ? me : 0));
  TrainingState state{.rng = Rng::restore(own.bits("rng_stream"), own.bits("rng_position")),
                      .position = json.count("position"),
                      .notes = texts_in(json.object("notes"))};
  bool common = true;  // Whether all ranks had the same generator.
  for (Index r = 0; r < saved; ++r) {
    const JsonObject of_rank = ranks.object(std::to_string(r));
    common = common && of_rank.bits("rng_stream") == own.bits("rng_stream") &&
             of_rank.bits("rng_position") == own.bits("rng_position");
  }
  for (Index r = 0; !same && !common && r <= me; ++r) {
    Rng split = state.rng.split();
    if (r == me) state.rng = split;
  }
  std::set<std::string> reached;
  std::map<std::string, Index> steps;
  for (Index r = 0; r < saved; ++r) {
    const JsonObject of_rank = ranks.object(std::to_string(r));
    for (const std::string& name : of_rank.texts("reached")) reached.insert(name);
    steps.merge(counts_in(of_rank.object("parameter_steps")));
  }
  const CheckpointFolder weights(path), memory(path / "optimizer");

  // All that can fail comes before anything changes.
  Optimizer loaded = optimizer.without_states();
  std::vector<Matrix<T>> values;
  const auto parameters_of_model = parameters(model);
  const auto buffers_of_model = buffers(model);
  for (const auto& [name, parameter] : parameters_of_model) {
    values.emplace_back(parameter->value.rows(), parameter->value.cols());
    read_tensor(weights, name, values.back());
  }
  for (const auto& [name, buffer] : buffers_of_model) {
    values.emplace_back(buffer->value.rows(), buffer->value.cols());
    read_tensor(weights, name, values.back());
  }
  for (const auto& entry : together.parameters().all()) {
    const bool needed = together.config().shards_states ? entry.owner == me : entry.is_on(me);
    if (!needed) continue;
    const SavedState<T> of_parameter = loaded.saved_state(entry.name);
    read_state(memory, entry.name, of_parameter);
    const auto count = steps.find(entry.name);
    if (of_parameter.steps != nullptr && count != steps.end()) *of_parameter.steps = count->second;
  }
  loaded.set_steps(json.count("steps"));
  optimizer = std::move(loaded);
  std::size_t next = 0;
  for (const auto& [name, parameter] : parameters_of_model) {
    parameter->value = std::move(values[next++]);
    parameter->grad.resize(0, 0);
    parameter->reached = false;
    if (reached.contains(name)) {
      set_zero(parameter->grad, parameter->value.rows(), parameter->value.cols());
    }
  }
  for (const auto& [name, buffer] : buffers_of_model) buffer->value = std::move(values[next++]);
  return state;
}

}  // namespace detail

/// Saves a run of all ranks of `together` after a step, like `save` of one process, each rank the
/// parameters that it owns (see SharedParameters) and their optimizer states, all at the same time,
/// to a folder that all ranks reach:
///
///     dir/step-N/  model-00001-of-00004.safetensors ...  model.safetensors.index.json
///                  optimizer/  (the same)                state.json
///
/// The weights are a folder of safetensors as Hugging Face divides them, under the names of the
/// whole model, which CheckpointFolder and others read. The checkpoint gets its name once all of it
/// is on the disk. Collective.
/// \param state         This rank's generator; position and notes are those of rank 0.
/// \throws FileError    on all ranks, if a file cannot be written by one.
template <class T, class Model, class Optimizer>
std::filesystem::path save(DataParallel<T>& together, const std::filesystem::path& dir,
                           Model& model, Optimizer& optimizer, const TrainingState& state,
                           const SaveConfig& config = {}) {
  expect_at_least<Index>("save", "keep", config.keep, 0);
  expect_at_least<Index>("save", "position", state.position, 0);
  Channel& channel = together.channel();
  Exchange exchange;
  const Index me = channel.rank();
  std::filesystem::path path = dir / detail::checkpoint_name(optimizer.steps());
  const std::filesystem::path partial = path.string() + ".partial";
  detail::on_all_ranks(channel, exchange, [&] {
    if (me != 0) return;
    std::filesystem::create_directories(dir);
    detail::remove_checkpoint(partial);  // Of a run that ended while saving.
    std::filesystem::create_directories(partial / "optimizer");
  });

  std::vector<detail::RankTensor> weights, memory;
  nlohmann::json mine = {{"reached", nlohmann::json::array()},
                         {"parameter_steps", nlohmann::json::object()},
                         {"rng_stream", state.rng.stream()},
                         {"rng_position", state.rng.position()}};
  together.find(model);
  for (const auto& entry : together.parameters().all()) {
    if (entry.owner != me) continue;
    weights.push_back(detail::rank_tensor(entry.name, entry.parameter->value, dtype_of<T>()));
    if (entry.parameter->grad.size() > 0) mine["reached"].push_back(entry.name);
    const auto saved = optimizer.saved_state(entry.name);
    for (const auto& [what, matrix] : saved.matrices) {
      if (matrix->size() == 0) continue;
      memory.push_back(
          detail::rank_tensor(entry.name + "." + std::string(what), *matrix, dtype_of<T>()));
    }
    for (const auto& [what, matrix] : saved.halves) {
      if (matrix->size() == 0) continue;
      memory.push_back(
          detail::rank_tensor(entry.name + "." + std::string(what), *matrix, Dtype::kBF16));
    }
    if (saved.steps != nullptr) mine["parameter_steps"][entry.name] = *saved.steps;
  }
  // A buffer is written by the first rank that has it.
  std::string names;
  const auto own_buffers = buffers(model);
  for (const auto& [name, buffer] : own_buffers) names += name + '\n';
  const std::vector<std::string> all_names =
      all_gather_texts(channel, exchange, "names of buffers", names);
  for (const auto& [name, buffer] : own_buffers) {
    bool first = true;
    for (Index r = 0; r < me; ++r) {
      const std::string& theirs = all_names[static_cast<std::size_t>(r)];
      first = first && ('\n' + theirs).find('\n' + name + '\n') == std::string::npos;
    }
    if (first) weights.push_back(detail::rank_tensor(name, buffer->value, dtype_of<T>()));
  }
  detail::write_rank_file(channel, exchange, partial, dtype_of<T>(), weights);
  detail::write_rank_file(channel, exchange, partial / "optimizer", dtype_of<T>(), memory);

  const std::vector<std::string> states =
      all_gather_texts(channel, exchange, "states of ranks", mine.dump());
  detail::on_all_ranks(channel, exchange, [&] {
    if (me != 0) return;
    nlohmann::json ranks = nlohmann::json::object();
    for (std::size_t r = 0; r < states.size(); ++r) {
      ranks[std::to_string(r)] = nlohmann::json::parse(states[r]);
    }
    const nlohmann::json json = {{"version", detail::kCheckpointVersion},
                                 {"steps", optimizer.steps()},
                                 {"position", state.position},
                                 {"notes", state.notes},
                                 {"ranks", std::move(ranks)}};
    AtomicFile file(partial / "state.json");
    file.write(json.dump(2));
    file.commit();
    detail::exchange_folders(partial, path);
    sync_folder(dir);
    detail::remove_checkpoint(partial);
    detail::keep_latest(dir, path, config.keep);
  });
  return path;
}

/// Loads a checkpoint of `save` on the ranks of `together`, as many as saved it or others, wherever
/// their placement has the experts. With as many ranks and the same placement, the run goes on bit
/// for bit; each rank gets back its generator. With another number, all get the generator that all
/// had, if it was the same, and else streams split from that of rank 0. Collective; `together` has
/// agreed on the model.
///
/// \param path          A folder with checkpoints, of which the newest is taken, or one of those.
/// \throws FileError    on all ranks, if one finds no checkpoint, a broken one, or a tensor missing
///                      or of another shape. Other ranks may have loaded it by then.
template <class T, class Model, class Optimizer>
TrainingState load(DataParallel<T>& together, std::filesystem::path path, Model& model,
                   Optimizer& optimizer) {
  Channel& channel = together.channel();
  Exchange exchange;
  TrainingState state;
  detail::on_all_ranks(channel, exchange, [&] {
    std::error_code error;
    if (!std::filesystem::exists(path / "state.json", error)) {
      const auto latest = latest_checkpoint(path);
      if (!latest) throw_error<FileError>(path.string(), ": there is no checkpoint");
      path = *latest;
    }
    state = detail::load_rank<T>(path, together, model, optimizer);
  });
  return state;
}

}  // namespace weir::io
