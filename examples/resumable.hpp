// SPDX-License-Identifier: MIT
/// \file
/// Trainings that go on where they stopped, bit for bit.
#pragma once

#include <cstdio>
#include <cstdlib>
#include <filesystem>
#include <functional>
#include <map>
#include <stdexcept>
#include <string>

#include <weir/core/random.hpp>
#include <weir/core/types.hpp>
#include <weir/io/checkpoint.hpp>
#include <weir/optim/adamw.hpp>

#include "interrupt.hpp"

/// Where a training keeps its checkpoints, and how far it goes this time.
struct Resumable {
  std::string folder = {};       ///< Empty: nothing is kept.
  weir::Index save_every = 100;  ///< Steps; the last one is kept in any case.
  weir::Index until = 0;         ///< The step to stop after.
  /// What has to be the same when it goes on, by option.
  std::map<std::string, std::string> settings = {};
  /// What is kept beside the model, such as sums over the steps; null for nothing.
  std::map<std::string, double>* figures = nullptr;
};

namespace resumable {

constexpr const char* kFigure = "figure ";  // What their names in notes begin with.

inline std::map<std::string, std::string> notes_of(const Resumable& run) {
  std::map<std::string, std::string> notes = run.settings;
  if (run.figures == nullptr) return notes;
  for (const auto& [name, value] : *run.figures) {
    char text[64];
    std::snprintf(text, sizeof text, "%a", value);  // Every bit of it.
    notes[kFigure + name] = text;
  }
  return notes;
}

inline void read_figures(const std::map<std::string, std::string>& notes, const Resumable& run) {
  const std::string begin = kFigure;
  for (const auto& [name, value] : notes) {
    if (run.figures == nullptr || !name.starts_with(begin)) continue;
    (*run.figures)[name.substr(begin.size())] = std::strtod(value.c_str(), nullptr);
  }
}

}  // namespace resumable

/// Takes steps until `run.until` of them are done, those of earlier runs in the folder included.
/// \param rng       The only generator that `step` draws from.
/// \param step      Takes one or more steps of the optimizer.
/// \throws std::runtime_error  if the folder's checkpoint has other settings, or somebody
///                             interrupts: what was done is kept then.
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
      const auto state = weir::io::load(*checkpoint, model, optimizer);
      rng = state.rng;
      resumable::read_figures(state.notes, run);
    }
  }
  while (optimizer.steps() < run.until) {
    const weir::Index before = optimizer.steps();
    step();
    const weir::Index done = optimizer.steps();
    const bool interrupted = Interrupt::happened();
    const bool due = done / run.save_every > before / run.save_every || done >= run.until;
    if ((due || interrupted) && !run.folder.empty()) {
      weir::io::save(run.folder, model, optimizer, {.rng = rng, .notes = resumable::notes_of(run)},
                     {.keep = 2});
    }
    if (interrupted) {
      throw std::runtime_error(run.folder.empty() ? "interrupted"
                                                  : "interrupted; the same command goes on");
    }
  }
}
