// SPDX-License-Identifier: MIT
/// \file
/// What the tests of published families have in common.
#pragma once

#include <algorithm>
#include <filesystem>
#include <fstream>
#include <functional>
#include <map>
#include <nlohmann/json.hpp>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include <weir/core/random.hpp>
#include <weir/core/verbs.hpp>
#include <weir/io/checkpoint_folder.hpp>
#include <weir/io/file_error.hpp>
#include <weir/io/pretrained.hpp>
#include <weir/io/safetensors.hpp>
#include <weir/io/safetensors_writer.hpp>

#include "io/folder.hpp"
#include "support/catch.hpp"
#include "support/matrices.hpp"

namespace weir::test {

inline const std::vector<Index> kIds = {3, 1, 4, 1, 5, 9, 2, 6};

inline void write_text(const std::filesystem::path& path, std::string_view text) {
  std::ofstream(path, std::ios::binary) << text;
}

/// Reads a config.json with this text.
template <class Config>
Config config_of(std::string_view text) {
  const Folder folder;
  write_text(folder.path() / "config.json", text);
  return std::get<0>(
      io::parse_config_of<Config>(io::ConfigFile::read((folder.path() / "config.json").string())));
}

/// What is wrong with this text after `change`, without the path.
template <class Config>
std::string config_fault(std::string_view text,
                         const std::function<void(nlohmann::json&)>& change) {
  nlohmann::json json = nlohmann::json::parse(text);
  change(json);
  const std::string message = message_of<io::FileError>([&] { config_of<Config>(json.dump()); });
  const std::string name = "config.json: ";
  const std::size_t at = message.find(name);
  return at == std::string::npos ? message : message.substr(at + name.size());
}

/// The settings of a published configuration that change the model, and that are not written with
/// the same value where a model of this configuration is saved.
template <class Config>
std::vector<std::string> lost_settings(std::string_view text) {
  const Config config = config_of<Config>(text);
  const nlohmann::json written = io::detail::config_json(config, io::Dtype::kBF16);
  const nlohmann::json published = nlohmann::json::parse(text);
  std::vector<std::string> lost;
  for (const auto& [key, value] : published.items()) {
    if (written.contains(key) && written[key] == value) continue;
    nlohmann::json without = published;
    without.erase(key);
    try {
      if (config_of<Config>(without.dump()) != config) lost.push_back(key);
    } catch (const io::FileError&) {
      lost.push_back(key);  // It has to be there.
    }
  }
  return lost;
}

/// A model whose parameters and biases of selection are all drawn at random, norms and biases too.
template <class Config>
Decoder<float> random_model(const Config& config, std::uint64_t seed = 7) {
  Rng rng(seed);
  Decoder<float> model = presets::make<float>(config, rng);
  const auto change = [&](auto& value) {
    for (Index i = 0; i < value.size(); ++i) {
      value.data()[i] += static_cast<float>(0.1 * rng.normal());
    }
  };
  for (auto& [name, parameter] : parameters(model)) change(parameter->value);
  if (config.shape.selection_bias) {
    for (auto& [name, buffer] : buffers(model)) change(buffer->value);
  }
  return model;
}

/// The tensors of a folder: name and shape, such as "model.norm.weight [32]", of those that begin
/// with `prefix`.
inline std::vector<std::string> tensors_in(const std::filesystem::path& folder,
                                           std::string_view prefix) {
  const io::CheckpointFolder source(folder);
  std::vector<std::string> all;
  for (const std::string& name : source.names()) {
    if (name.starts_with(prefix)) {
      all.push_back(name + " " + io::shape_text(source.find(name)->shape()));
    }
  }
  return all;
}

using Tensors = std::map<std::string, std::pair<std::vector<Index>, std::vector<float>>>;

/// Writes model.safetensors anew, with what `change` does to its tensors.
inline void change_tensors(const std::filesystem::path& folder,
                           const std::function<void(Tensors&)>& change) {
  Tensors tensors;
  {
    const io::CheckpointFolder source(folder);
    for (const std::string& name : source.names()) {
      const io::StoredTensor& tensor = *source.find(name);
      Index size = 1;
      for (const Index length : tensor.shape()) size *= length;
      std::vector<float> numbers(static_cast<std::size_t>(size));
      tensor.read(0, size, numbers.data());
      tensors[name] = {tensor.shape(), std::move(numbers)};
    }
  }
  change(tensors);
  std::vector<io::TensorShape> shapes;
  for (const auto& [name, tensor] : tensors) shapes.push_back({name, tensor.first});
  io::SafetensorsWriter writer(folder / "model.safetensors", shapes, io::Dtype::kF32, {});
  for (const auto& [name, tensor] : tensors) {
    writer.append(tensor.second.data(), static_cast<Index>(tensor.second.size()));
  }
  writer.commit();
}

/// Puts the experts of each layer together, as newer versions of Hugging Face's code hold them.
inline void fuse_experts(Tensors& all, Index layers, Index experts) {
  for (Index l = 0; l < layers; ++l) {
    const std::string bank = "model.layers." + std::to_string(l) + ".mlp.experts.";
    if (!all.contains(bank + "0.gate_proj.weight")) continue;
    const auto join = [&](const std::string& name, const std::vector<std::string>& parts) {
      std::vector<Index> shape = {experts, 0, 0};
      std::vector<float> numbers;
      for (Index e = 0; e < experts; ++e) {
        for (const std::string& part : parts) {
          const auto& [own, values] = all.at(bank + std::to_string(e) + "." + part + ".weight");
          if (e == 0) shape[1] += own[0];
          shape[2] = own[1];
          numbers.insert(numbers.end(), values.begin(), values.end());
          all.erase(bank + std::to_string(e) + "." + part + ".weight");
        }
      }
      all[bank + name] = {shape, numbers};
    };
    join("gate_up_proj", {"gate_proj", "up_proj"});
    join("down_proj", {"down_proj"});
  }
}

/// A model of a family in a folder.
template <class Config>
struct SavedModel {
  explicit SavedModel(const Config& own) : config(own), model(random_model(own)) {
    io::save_pretrained(folder.path(), model, config);
  }

  /// Whether what is in the folder has the logits of the model.
  bool comes_back() const {
    const auto loaded = io::load_family<Config>(folder.path());
    return infer(loaded.model, kIds) == infer(model, kIds);
  }

  std::vector<std::string> tensors(std::string_view prefix) const {
    return tensors_in(folder.path(), prefix);
  }

  /// All numbers of a tensor in the folder.
  std::vector<float> numbers(const std::string& name) const {
    const io::CheckpointFolder source(folder.path());
    const io::StoredTensor* const tensor = source.find(name);
    REQUIRE(tensor != nullptr);
    Index size = 1;
    for (const Index length : tensor->shape()) size *= length;
    std::vector<float> all(static_cast<std::size_t>(size));
    tensor->read(0, size, all.data());
    return all;
  }

  /// The value of a parameter of the model.
  Matrix<float> value(const std::string& name) {
    for (const auto& [own, parameter] : parameters(model)) {
      if (own == name) return parameter->value;
    }
    FAIL("no parameter " << name);
    return {};
  }

  /// Whether it does so with the experts of each layer in one tensor.
  bool comes_back_fused() const {
    change_tensors(folder.path(), [&](Tensors& all) {
      fuse_experts(all, config.shape.layers, config.shape.experts);
      CHECK(all.contains("model.layers.1.mlp.experts.down_proj"));
    });
    return comes_back();
  }

  /// What loading says, without the path, after `change` of the tensors.
  std::string fault_after(const std::function<void(Tensors&)>& change) const {
    change_tensors(folder.path(), change);
    const std::string message =
        message_of<io::FileError>([&] { io::load_family<Config>(folder.path()); });
    const std::string path = folder.path().string();
    return message.starts_with(path) ? message.substr(path.size()) : message;
  }

  Folder folder;
  Config config;
  Decoder<float> model;
};

/// A model comes back with the same logits, and a tensor that is missing, of another shape or too
/// many is named.
/// \param tensor   One of the tensors.
template <class Config>
void check_family(const Config& config, const std::string& tensor) {
  const SavedModel saved(config);
  CHECK(saved.comes_back());
  const std::filesystem::path file = saved.folder.path() / "model.safetensors";
  const std::filesystem::path kept = saved.folder.path() / "kept";
  std::filesystem::copy_file(file, kept);
  const auto restore = [&] {
    std::filesystem::copy_file(kept, file, std::filesystem::copy_options::overwrite_existing);
  };
  std::vector<Index> shape;
  const std::string missing = saved.fault_after([&](Tensors& all) {
    REQUIRE(all.contains(tensor));
    shape = all.at(tensor).first;
    all.erase(tensor);
  });
  CHECK(missing == ": '" + tensor + "' is missing");
  restore();
  std::vector<Index> other = shape;
  other.push_back(1);
  const std::string misshapen =
      saved.fault_after([&](Tensors& all) { all.at(tensor).first = other; });
  CHECK(misshapen ==
        ": '" + tensor + "' is " + io::shape_text(other) + ", expected " + io::shape_text(shape));
  restore();
  CHECK(saved.fault_after([&](Tensors& all) {
    all["model.more"] = {{1}, {1.0F}};
  }) == ": 'model.more' is not in the model");
}

}  // namespace weir::test
