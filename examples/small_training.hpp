// SPDX-License-Identifier: MIT
/// \file
/// Short trainings of small byte models, for programs that compare them.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <functional>
#include <iostream>
#include <string>
#include <vector>

#include <weir/core/sequences.hpp>
#include <weir/model/decoder.hpp>
#include <weir/nn/cross_entropy.hpp>
#include <weir/optim/adamw.hpp>
#include <weir/optim/clip.hpp>

#include "bytes.hpp"
#include "corpus.hpp"

inline constexpr weir::Index kWindows = 16;  ///< In a batch.

/// Windows of a text as one pass.
struct Windows {
  inline static weir::Index length = 128;  ///< Bytes of a window.

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
/// \param through_stored  See Pass::through_stored.
inline void train(weir::Decoder<float>& model, weir::AdamW<float>& optimizer, const Corpus& corpus,
                  weir::Index steps, weir::Rng& rng,
                  const std::function<void(weir::Index)>& before_step = {},
                  bool through_stored = false) {
  const weir::CrossEntropy<float> cross_entropy;
  weir::CrossEntropy<float>::Cache loss_cache;
  weir::Decoder<float>::Cache cache;
  for (weir::Index step = 0; step < steps; ++step) {
    const Windows windows = random_windows(corpus, rng);
    const auto& logits = model.forward(windows.bytes.ids,
                                       {.training = true,
                                        .sequences = &windows.sequences,
                                        .rng = &rng,
                                        .through_stored = through_stored},
                                       cache);
    cross_entropy.forward(logits, windows.bytes.targets, loss_cache);
    model.backward(cross_entropy.backward(loss_cache), cache);
    if (before_step) before_step(step);
    weir::clip_global_norm(model, 1.0);
    optimizer.step(model);
  }
}

/// The number of an argument, or `fallback` without it.
inline weir::Index argument(int argc, char** argv, int place, weir::Index fallback) {
  return argc > place ? static_cast<weir::Index>(std::stoll(argv[place])) : fallback;
}
