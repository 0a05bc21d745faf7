// SPDX-License-Identifier: MIT
/// \file
/// Saves a model that is spread over ranks as Hugging Face publishes models, all ranks at once.
/// Needs weir::io.
#pragma once

#include <concepts>
#include <cstddef>
#include <cstdint>
#include <filesystem>
#include <map>
#include <nlohmann/json.hpp>
#include <optional>
#include <string>
#include <string_view>
#include <system_error>
#include <utility>
#include <variant>
#include <vector>

#include <weir/core/error.hpp>
#include <weir/core/types.hpp>
#include <weir/io/atomic_file.hpp>
#include <weir/io/checkpoint.hpp>
#include <weir/io/dtype.hpp>
#include <weir/io/model_config.hpp>
#include <weir/io/pretrained.hpp>
#include <weir/io/published_tensors.hpp>
#include <weir/io/read_model.hpp>
#include <weir/io/safetensors_writer.hpp>
#include <weir/io/tensor_layout.hpp>
#include <weir/model/decoder.hpp>
#include <weir/model/multi_token.hpp>
#include <weir/parallel/mpi/exchange.hpp>
#include <weir/parallel/mpi/on_all_ranks.hpp>
#include <weir/parallel/mpi/rank_shares.hpp>

namespace weir::io {

namespace detail {

inline std::filesystem::path without_slash(const std::filesystem::path& dir) {
  return dir.has_filename() ? dir : dir.parent_path();
}

/// Files that a model in a folder consists of; others are left alone where it is replaced.
inline bool is_of_model(const std::string& name) {
  return name == "config.json" || name == "model.safetensors" ||
         name == "model.safetensors.index.json" ||
         (name.starts_with("model-") && name.ends_with(".safetensors"));
}

/// Gives the folder `partial`, which holds a whole model, the name `dir`, with what else is there.
inline void replace_model(const std::filesystem::path& partial, const std::filesystem::path& dir) {
  namespace fs = std::filesystem;
  std::error_code missing;
  for (const auto& entry : fs::directory_iterator(dir, missing)) {
    const fs::path name = entry.path().filename();
    if (is_of_model(name.string())) continue;
    fs::copy(entry.path(), partial / name,
             fs::copy_options::recursive | fs::copy_options::copy_symlinks);
  }
  sync_folder(partial);
  exchange_folders(partial, dir);
  sync_folder(dir.parent_path());
  std::error_code ignored;
  fs::remove_all(partial, ignored);
}

/// A file of a model that ranks save.
struct RankFile {
  Index rank = 0;  ///< Who writes it.
  std::string name;
  std::vector<std::size_t> tensors;  ///< In the order of the file.
};

/// The files of all ranks.
inline std::vector<RankFile> rank_files(const RankShares& shares, Index ranks,
                                        const SavePretrainedConfig& config) {
  std::vector<RankFile> files;
  for (Index r = 0; r < ranks; ++r) {
    const std::vector<std::size_t> written = shares.written_by(r);
    if (written.empty()) continue;
    std::vector<PublishedTensor> tensors;
    tensors.reserve(written.size());
    for (const std::size_t t : written) tensors.push_back(shares.layout()[t]);
    const auto first = divide(tensors, config.dtype, config.shard_bytes);
    const auto place = [&](std::size_t f) {
      return written.begin() + static_cast<std::ptrdiff_t>(first[f]);
    };
    for (std::size_t f = 0; f + 1 < first.size(); ++f) {
      files.push_back({r, "", {place(f), place(f + 1)}});
    }
  }
  for (std::size_t f = 0; f < files.size(); ++f) files[f].name = shard_name(f, files.size());
  return files;
}

/// Writes the files of one rank, tensor by tensor.
class RankFileWriter {
 public:
  RankFileWriter(std::filesystem::path folder, const RankShares& shares,
                 const std::vector<RankFile>& files, Index rank, const SavePretrainedConfig& config)
      : folder_(std::move(folder)), shares_(shares), config_(config) {
    for (const RankFile& file : files) {
      if (file.rank == rank) files_.push_back(&file);
    }
  }

  /// Appends the next tensor.
  template <class T>
  void append(const std::vector<T>& numbers) {
    const RankFile& file = *files_[file_];
    if (next_ == 0) begin(file);
    writer_->append(numbers.data(), static_cast<Index>(numbers.size()));
    if (++next_ < file.tensors.size()) return;
    writer_->commit();
    writer_.reset();
    ++file_;
    next_ = 0;
  }

 private:
  void begin(const RankFile& file) {
    std::vector<TensorShape> shapes;
    for (const std::size_t t : file.tensors) {
      shapes.push_back({shares_.layout()[t].name, shares_.layout()[t].shape});
    }
    std::map<std::string, std::string> metadata = config_.metadata;
    metadata.emplace("format", "pt");  // Without which Hugging Face's code does not read them.
    writer_.emplace(folder_ / file.name, shapes, config_.dtype, metadata);
  }

  std::filesystem::path folder_;
  const RankShares& shares_;
  const SavePretrainedConfig& config_;
  std::vector<const RankFile*> files_;
  std::size_t file_ = 0, next_ = 0;
  std::optional<SafetensorsWriter> writer_;
};

/// Writes the files of all ranks, each rank its own.
/// \param tensors  Of the whole model; null where this rank has none.
/// \throws FileError  on all ranks, if one cannot write.
template <class T>
void write_rank_files(Channel& channel, Exchange& exchange, const std::filesystem::path& folder,
                      const RankShares& shares, const std::vector<RankFile>& files,
                      const ModelTensors<T>& tensors, const SavePretrainedConfig& config) {
  RankFileWriter writer(folder, shares, files, channel.rank(), config);
  std::vector<T> numbers;
  std::string fault = fault_of([&] {
    for (const std::size_t t : shares.written_by(channel.rank())) {
      if (shares.is_split(t)) break;
      gather_tensor(tensors, shares.layout()[t], numbers);
      writer.append(numbers);
    }
  });
  for (const RankFile& file : files) {
    for (const std::size_t t : file.tensors) {
      if (!shares.is_split(t)) continue;
      collect_tensor(channel, exchange, shares, t, tensors, numbers);
      // A rank that cannot write still sends to the others.
      if (file.rank != channel.rank() || !fault.empty()) continue;
      fault = fault_of([&] { writer.append(numbers); });
    }
  }
  expect_no_fault(channel, exchange, fault);
}

/// model.safetensors.index.json.
inline std::string index_of(const RankShares& shares, const std::vector<RankFile>& files,
                            Dtype dtype) {
  nlohmann::json places = nlohmann::json::object();
  std::int64_t total = 0;
  for (const RankFile& file : files) {
    for (const std::size_t t : file.tensors) {
      places[shares.layout()[t].name] = file.name;
      total += size_of(shares.layout()[t]) * static_cast<std::int64_t>(width_of(dtype));
    }
  }
  const nlohmann::json json = {{"metadata", {{"total_size", total}}}, {"weight_map", places}};
  return json.dump(2) + "\n";
}

}  // namespace detail

/// Saves a model whose experts are spread over ranks, by ExpertParallel or `spread_experts`, as
/// `save_pretrained` of one process saves the whole model: a folder of safetensors under the names
/// of the family, with config.json, that `load_pretrained` and Hugging Face's code read. All ranks
/// write at the same time, each files of its own with the experts that it has, and the dense
/// weights divided among them; a tensor that holds experts of several ranks is put together by one
/// of them, which needs memory for that tensor. The folder appears, or replaces the one that was
/// there, once all of it is on the disk; other files in it, such as a tokenizer, stay. Collective.
///
/// \param dir           A folder that all ranks reach; while it is written, `dir`.partial.
/// \param model         Parameters that several ranks have are the same on them.
/// \param model_config  What the whole model was made from.
/// \param prediction    Its modules of multi-token prediction, if any.
/// \throws ConfigError  on all ranks, if the family's configurations cannot say what `model_config`
///                      does, or unless `is_storable(dtype)`.
/// \throws FileError    on all ranks, naming one: if the model is not what `model_config` says, its
///                      weights are stored for inference, no rank has one of them, or a file cannot
///                      be written. What was in `dir` is as before then.
template <std::floating_point T, class Config>
void save_pretrained(Channel& channel, const std::filesystem::path& dir, Decoder<T>& model,
                     const Config& model_config, const SavePretrainedConfig& config = {},
                     MultiToken<T>* prediction = nullptr) {
  constexpr auto kWho = "save_pretrained";
  using Own = Family<Config>;
  expect_at_least<std::int64_t>(kWho, "shard_bytes", config.shard_bytes, 1);
  const nlohmann::json json = detail::config_json(model_config, config.dtype);
  Exchange exchange;

  // The whole model, whose memory is never touched.
  Pretrained<T> whole_model = detail::make_unset<T>(model_config);
  MultiToken<T>* const whole_prediction =
      prediction != nullptr && whole_model.prediction ? &*whole_model.prediction : nullptr;
  const auto whole = shapes_of(detail::all_tensors(kWho, whole_model.model, whole_prediction));
  auto layout = published_layout(Own::names(model_config, nullptr), whole,
                                 detail::head_sizes(model_config.shape));
  ModelTensors<T> tensors;
  std::vector<bool> mine(whole.size(), false);
  detail::on_all_ranks(channel, exchange, [&] {
    const ModelTensors<T> own = detail::all_tensors(kWho, model, prediction);
    auto own_layout = layout;
    leave_out(kWho, whole, shapes_of(own), own_layout);
    expect_no_loss(kWho, own, own_layout);
    std::map<std::string_view, Matrix<T>*> by_name;
    for (const auto& [name, matrix] : own) by_name[name] = matrix;
    for (std::size_t m = 0; m < whole.size(); ++m) {
      const auto found = by_name.find(whole[m].name);
      mine[m] = found != by_name.end();
      tensors.emplace_back(whole[m].name, mine[m] ? found->second : nullptr);
    }
  });
  const detail::RankShares shares(channel, exchange, whole, mine, std::move(layout));
  const auto files = detail::rank_files(shares, channel.size(), config);

  const std::filesystem::path path = detail::without_slash(dir);
  const std::filesystem::path partial = path.string() + ".partial";
  detail::on_all_ranks(channel, exchange, [&] {
    if (channel.rank() != 0) return;
    std::filesystem::remove_all(partial);  // Of a program that ended while saving.
    std::filesystem::create_directories(partial);
  });
  detail::write_rank_files(channel, exchange, partial, shares, files, tensors, config);
  detail::on_all_ranks(channel, exchange, [&] {
    if (channel.rank() != 0) return;
    if (files.size() > 1) {
      write_file(partial / "model.safetensors.index.json",
                 detail::index_of(shares, files, config.dtype));
    }
    write_file(partial / "config.json", json.dump(2) + "\n");
    detail::replace_model(partial, path);
  });
}

/// The same for a config of any family.
template <std::floating_point T>
void save_pretrained(Channel& channel, const std::filesystem::path& dir, Decoder<T>& model,
                     const ModelConfig& model_config, const SavePretrainedConfig& config = {},
                     MultiToken<T>* prediction = nullptr) {
  std::visit(
      [&](const auto& own) { save_pretrained(channel, dir, model, own, config, prediction); },
      model_config);
}

}  // namespace weir::io
