// SPDX-License-Identifier: MIT
/// \file
/// Trainings that go on where they stopped, bit for bit.
#pragma once

#include <filesystem>
#include <functional>
#include <map>
#include <stdexcept>
#include <string>

#include <weir/core/random.hpp>
#include <weir/core/types.hpp>
#include <weir/io/checkpoint.hpp>
#include <weir/optim/adamw.hpp>

/// Where a training keeps its checkpoints, and how far it goes this time.
struct Resumable {
  std::string folder = {};       ///< Empty: nothing is kept.
  weir::Index save_every = 100;  ///< Steps; the last one is kept in any case.
  weir::Index until = 0;         ///< The step to stop after.
  /// What has to be the same when it goes on, by option.
  std::map<std::string, std::string> settings = {};
};

/// Takes steps until `run.until` of them are done, those of earlier runs in the folder included.
/// \param rng       The only generator that `step` draws from.
/// \param step      Takes one step of the optimizer.
/// \throws std::runtime_error  if the folder's checkpoint has other settings.
template <class Model>
void train_resumably(const Resumable& run, Model& model, weir::AdamW<float>& optimizer,
                     weir::Rng& rng, const std::function<void()>& step) {
  if (!run.folder.empty()) {
    if (const auto checkpoint = weir::io::latest_checkpoint(run.folder)) {
      const auto saved = weir::io::read_notes(*checkpoint);
      for (const auto& [name, value] : run.settings) {
        const auto found = saved.find(name);
        if (found != saved.end() && found->second == value) continue;
        throw std::runtime_error("--" + name + ": " + value + ", but " + checkpoint->string() +
                                 " was saved with " +
                                 (found == saved.end() ? "none" : found->second));
      }
      rng = weir::io::load(*checkpoint, model, optimizer).rng;
    }
  }
  while (optimizer.steps() < run.until) {
    step();
    const bool due = optimizer.steps() % run.save_every == 0 || optimizer.steps() == run.until;
    if (due && !run.folder.empty()) {
      weir::io::save(run.folder, model, optimizer, {.rng = rng, .notes = run.settings},
                     {.keep = 2});
    }
  }
}
