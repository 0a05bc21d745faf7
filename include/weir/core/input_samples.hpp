// SPDX-License-Identifier: MIT
/// \file
/// Samples of what the weights of a model are multiplied with.
#pragma once

#include <algorithm>
#include <cstdint>
#include <map>
#include <mutex>
#include <span>

#include <weir/core/error.hpp>
#include <weir/core/index_span.hpp>
#include <weir/core/input_observer.hpp>
#include <weir/core/parameter.hpp>
#include <weir/core/random.hpp>
#include <weir/core/types.hpp>

namespace weir {

/// Rows that layers multiplied with their weights in forward passes, for calibration and reports:
///
///     InputSamples samples;
///     model.forward(text, {.inputs = &samples}, cache);
///
/// Up to `most` rows are kept for each weight, each row that came with the same probability
/// (reservoir sampling: Vitter 1985, doi:10.1145/3147.3165). Padding is left out. A weight is known
/// by where its parameter lies: samples are for the model that was run, until it is moved.
class InputSamples final : public InputObserver {
 public:
  /// \throws ConfigError  if most < 1.
  explicit InputSamples(Index most = 256) : most_(most) {
    expect_at_least<Index>("InputSamples", "most", most, 1);
  }

  void see(const Parameter<float>& weight, MatrixIn<float> x,
           std::span<const std::uint8_t> mask) override {
    add(&weight, x, mask);
  }
  void see(const Parameter<double>& weight, MatrixIn<double> x,
           std::span<const std::uint8_t> mask) override {
    add(&weight, x, mask);
  }

  /// The rows kept for a weight, [rows, inputs]; without any, a matrix without rows.
  template <class T>
  Matrix<float> of(const Parameter<T>& weight) const {
    const std::scoped_lock lock(mutex_);
    const auto found = samples_.find(&weight);
    if (found == samples_.end()) return Matrix<float>(0, weight.value.cols());
    const Sample& sample = found->second;
    return sample.rows.topRows(std::min(most_, sample.seen));
  }

 private:
  struct Sample {
    Matrix<float> rows;  // Its first min(most_, seen) rows count.
    Index seen = 0;
    Rng rng;
  };

  template <class T>
  void add(const void* weight, MatrixIn<T> x, std::span<const std::uint8_t> mask);

  Index most_;
  mutable std::mutex mutex_;
  std::map<const void*, Sample> samples_;
};

template <class T>
void InputSamples::add(const void* weight, MatrixIn<T> x, std::span<const std::uint8_t> mask) {
  const std::scoped_lock lock(mutex_);
  Sample& sample = samples_[weight];
  for (Index i = 0; i < x.rows(); ++i) {
    if (!mask.empty() && element(mask, i) == 0) continue;
    const Index place = sample.seen < most_ ? sample.seen : sample.rng.below(sample.seen + 1);
    ++sample.seen;
    if (place >= most_) continue;
    if (place >= sample.rows.rows()) {
      const Index rows = std::min(most_, std::max<Index>(16, 2 * sample.rows.rows()));
      Matrix<float> grown(rows, x.cols());
      std::copy_n(sample.rows.data(), sample.rows.size(), grown.data());
      sample.rows.swap(grown);
    }
    for (Index c = 0; c < x.cols(); ++c) sample.rows(place, c) = static_cast<float>(x(i, c));
  }
}

}  // namespace weir
