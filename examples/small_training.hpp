// SPDX-License-Identifier: MIT
/// \file
/// Short trainings of small byte models, for programs that compare them.
#pragma once

#include <charconv>
#include <cmath>
#include <cstddef>
#include <functional>
#include <optional>
#include <stdexcept>
#include <string>
#include <system_error>
#include <utility>
#include <vector>

#include <weir/core/sequences.hpp>
#include <weir/model/decoder.hpp>
#include <weir/nn/cross_entropy.hpp>
#include <weir/optim/adamw.hpp>
#include <weir/optim/clip.hpp>

#include "bytes.hpp"
#include "corpus.hpp"
#include "run_program.hpp"

inline constexpr weir::Index kWindows = 16;  ///< In a batch.

/// Windows of a text as one pass.
struct Windows {
  inline static weir::Index length = 128;  ///< Bytes of a window.

  /// \throws std::runtime_error  unless the text has a window, and a byte behind it.
  static void expect_room(const std::string& text) {
    if (static_cast<weir::Index>(text.size()) > length) return;
    throw std::runtime_error("bytes of a window: " + std::to_string(length) +
                             ", expected fewer than a text has: " + std::to_string(text.size()));
  }

  ByteBatch bytes;
  weir::Sequences sequences;

  Windows(const std::string& text, const std::vector<std::size_t>& starts) {
    for (const std::size_t start : starts) {
      bytes.add(text, start, length);
      sequences.append(length);
    }
  }
};

/// Windows at random places of what a corpus has to train on.
inline Windows random_windows(const Corpus& corpus, weir::Rng& rng) {
  Windows::expect_room(corpus.train);
  const auto room = static_cast<weir::Index>(corpus.train.size()) - Windows::length;
  std::vector<std::size_t> starts;
  for (weir::Index w = 0; w < kWindows; ++w) {
    starts.push_back(static_cast<std::size_t>(rng.below(room)));
  }
  return {corpus.train, starts};
}

/// How many bits a model needs for a byte that it has not been trained on.
/// \param pass     What else the passes are told, such as adapters or allowed experts.
inline double bits_per_byte(const weir::Decoder<float>& model, const Corpus& corpus,
                            weir::Pass pass = {}) {
  constexpr std::ptrdiff_t kCount = 32;
  Windows::expect_room(corpus.validation);
  const Windows windows(corpus.validation,
                        spread_windows(corpus.validation, Windows::length, kCount));
  pass.sequences = &windows.sequences;
  const weir::CrossEntropy<float> loss;
  weir::CrossEntropy<float>::Cache cache;
  const weir::Matrix<float> logits = weir::infer(model, windows.bytes.ids, pass);
  return static_cast<double>(loss.forward(logits, windows.bytes.targets, cache)) / std::log(2.0);
}

/// Trains a model for some steps.
/// \param before_step  Is called before each optimizer's step, when the gradients are there.
/// \param pass     What else the passes are told, such as allowed experts.
inline void train(weir::Decoder<float>& model, weir::AdamW<float>& optimizer, const Corpus& corpus,
                  weir::Index steps, weir::Rng& rng,
                  const std::function<void(weir::Index)>& before_step = {}, weir::Pass pass = {}) {
  pass.training = true;
  pass.rng = &rng;
  const weir::CrossEntropy<float> cross_entropy;
  weir::CrossEntropy<float>::Cache loss_cache;
  weir::Decoder<float>::Cache cache;
  for (weir::Index step = 0; step < steps; ++step) {
    const Windows windows = random_windows(corpus, rng);
    pass.sequences = &windows.sequences;
    const auto& logits = model.forward(windows.bytes.ids, pass, cache);
    cross_entropy.forward(logits, windows.bytes.targets, loss_cache);
    model.backward(cross_entropy.backward(loss_cache), cache);
    if (before_step) before_step(step);
    weir::clip_global_norm(model, 1.0);
    optimizer.step(model);
  }
}

/// The arguments of such a program: whole numbers, each of which may be left out with those behind.
struct SmallRun {
  weir::Index steps = 600;   ///< Of the first training.
  weir::Index more = 150;    ///< Of each one after it.
  weir::Index window = 128;  ///< Bytes.
};

/// Sets the numbers that are given.
/// \throws std::runtime_error  if one is no number or too small, or there are too many.
inline std::optional<int> parse_small_run(int argc, char** argv, SmallRun& run) {
  const std::vector<std::pair<std::string, weir::Index*>> numbers = {
      {"steps", &run.steps}, {"more steps", &run.more}, {"bytes of a window", &run.window}};
  if (argc > static_cast<int>(numbers.size()) + 1) {
    throw std::runtime_error("there are " + std::to_string(argc - 1) +
                             " arguments, expected at most " + std::to_string(numbers.size()));
  }
  for (int i = 1; i < argc; ++i) {
    const auto& [name, number] = numbers[static_cast<std::size_t>(i - 1)];
    const std::string text = argv[i];
    const auto [end, error] = std::from_chars(text.data(), text.data() + text.size(), *number);
    if (error != std::errc() || end != text.data() + text.size() || *number < 1) {
      throw std::runtime_error(name + ": " + text + ", expected a whole number >= 1");
    }
  }
  Windows::length = run.window;
  return std::nullopt;
}
