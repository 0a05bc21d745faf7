// SPDX-License-Identifier: MIT
/// \file
/// A training that may be spread over the ranks of an MPI job.
#pragma once

#include <cstddef>
#include <filesystem>
#include <optional>
#include <string>

#include <weir/core/types.hpp>
#include <weir/io/checkpoint.hpp>
#include <weir/model/decoder.hpp>
#include <weir/optim/adamw.hpp>
#include <weir/optim/clip.hpp>

#include "rank_job.hpp"

#ifdef WEIR_MPI
#include <weir/parallel/mpi/data_parallel.hpp>
#include <weir/parallel/mpi/rank_checkpoint.hpp>
#endif

/// The steps of a model, alone or together with other ranks.
class RankTraining {
 public:
  using Model = weir::Decoder<float>;
  using Optimizer = weir::AdamW<float>;

#ifdef WEIR_MPI
  /// Before the first step. A job of one rank is a job, too: it goes on from what others saved.
  void agree(Model& model) {
    if (rank_job().ranks == nullptr) return;
    together_.emplace(*rank_job().ranks);
    together_->agree(model);
  }

  /// Lets the gradients of each layer set out while `backward` goes on.
  void watch(Model& model, Model::Cache& cache) {
    if (!together_) return;
    cache.layers.layer_done = [this, &model](std::size_t layer) {
      together_->begin(model, "layers." + std::to_string(layer) + ".");
    };
  }

  /// \return         The norm of the gradient before it was clipped.
  double clip(Model& model, double most) {
    if (!together_) return weir::clip_global_norm(model, most);
    together_->reduce(model);
    return together_->clip_global_norm(model, most);
  }
  void step(Optimizer& optimizer, Model& model) {
    if (!together_) return optimizer.step(model);
    together_->step(optimizer, model);
  }

  /// The sum over all ranks.
  double sum(double value) {
    return together_ ? together_->sum(value) : value;
  }

  void save(const std::string& folder, Model& model, Optimizer& optimizer,
            const weir::io::TrainingState& state) {
    if (together_) {
      weir::io::save(*together_, folder, model, optimizer, state);
    } else {
      weir::io::save(folder, model, optimizer, state);
    }
  }
  weir::io::TrainingState load(const std::filesystem::path& path, Model& model,
                               Optimizer& optimizer) {
    if (together_) return weir::io::load(*together_, path, model, optimizer);
    return weir::io::load(path, model, optimizer);
  }

 private:
  std::optional<weir::DataParallel<float>> together_;
#else
  void agree(Model& /*model*/) {}
  void watch(Model& /*model*/, Model::Cache& /*cache*/) {}
  double clip(Model& model, double most) {
    return weir::clip_global_norm(model, most);
  }
  void step(Optimizer& optimizer, Model& model) {
    optimizer.step(model);
  }
  double sum(double value) {
    return value;
  }
  void save(const std::string& folder, Model& model, Optimizer& optimizer,
            const weir::io::TrainingState& state) {
    weir::io::save(folder, model, optimizer, state);
  }
  weir::io::TrainingState load(const std::filesystem::path& path, Model& model,
                               Optimizer& optimizer) {
    return weir::io::load(path, model, optimizer);
  }
#endif
};
