// SPDX-License-Identifier: MIT
/// \file
/// What a gated feed-forward network keeps of a pass for its derivative.
#pragma once

#include <weir/core/precision.hpp>
#include <weir/core/scratch.hpp>
#include <weir/core/types.hpp>
#include <weir/core/workspace.hpp>
#include <weir/kernels/e4m3_rows.hpp>

namespace weir {

/// The matrices of a pass through y = (act(gate) * up) down^T with gate = x Wg^T and up = x Wu^T:
/// x, gate, up and hidden = act(gate) * up, one row for each token or slot.
template <class T>
struct GluRows {
  Eigen::Map<Matrix<T>> x, gate, up, hidden;
};

/// Where they stay from `forward` to `backward`. Where the network is trained in FP8, x, gate and
/// up are kept rounded, and hidden is computed again. (arXiv:2412.19437, section 3.3.3.)
template <class T>
class KeptGlu {
 public:
  /// Where a forward pass writes them: memory of `frame` unless they are kept as they are.
  /// \param training   Whether anything is kept; else hidden takes the place of gate.
  /// \param precision  Of the network.
  GluRows<T> begin(Index rows, Index d_in, Index d_hidden, bool training, Precision precision,
                   Workspace::Frame& frame) {
    fp8_ = training && precision == Precision::kFp8;
    const bool stay = training && !fp8_;
    const auto place = [&](Scratch<T>& kept, Index cols) {
      return stay ? kept.reshape(rows, cols) : frame.matrix<T>(rows, cols);
    };
    auto x = place(x_, d_in);
    auto gate = place(gate_, d_hidden);
    auto up = place(up_, d_hidden);
    return {x, gate, up, training ? place(hidden_, d_hidden) : gate};
  }

  /// Keeps at the end of a pass what is kept rounded.
  void end(const GluRows<T>& rows) {
    rounded_x_.set(rows.x, fp8_);
    rounded_gate_.set(rows.gate, fp8_);
    rounded_up_.set(rows.up, fp8_);
  }

  /// How many rows are kept as they are.
  Index exact_rows() const { return x_.rows(); }

  /// Whether `hidden` has to be computed again.
  bool is_fp8() const { return fp8_; }

  /// What was kept. In FP8 it is in memory of `frame`, and so is room for `hidden`.
  GluRows<T> restored(Workspace::Frame& frame) {
    if (!fp8_) return {x_.view(), gate_.view(), up_.view(), hidden_.view()};
    auto gate = rounded_gate_.restored(frame);
    return {rounded_x_.restored(frame), gate, rounded_up_.restored(frame),
            frame.matrix<T>(gate.rows(), gate.cols())};
  }

  /// As they are, where the pass keeps them so.
  const Scratch<T>& hidden() const { return hidden_; }

 private:
  Scratch<T> x_, gate_, up_, hidden_;
  kernels::E4M3Rows<T> rounded_x_, rounded_gate_, rounded_up_;
  bool fp8_ = false;
};

}  // namespace weir
