// SPDX-License-Identifier: MIT
/// \file
/// The way of tokens to experts that are not all in one place.
#pragma once

#include <span>

#include <weir/core/function_ref.hpp>
#include <weir/core/types.hpp>
#include <weir/moe/dispatch.hpp>

namespace weir {

/// Carries rows to the experts of a bank, which are spread over several processes, and what these
/// make of them back: for inference with a bank that has some of the experts itself. All processes
/// call `run` together.
template <class T>
class ExpertTravel {
 public:
  /// Computes the experts of this process for rows that came to them, which are the tokens of
  /// `dispatch`; its expert l is the l-th of `own`.
  using Compute = FunctionRef<const Matrix<T>&(MatrixIn<T> rows, const Dispatch<T>& dispatch)>;

  ExpertTravel() = default;
  ExpertTravel(const ExpertTravel&) = delete;
  ExpertTravel& operator=(const ExpertTravel&) = delete;
  virtual ~ExpertTravel() = default;

  /// How many experts there are in all processes.
  virtual Index experts() const = 0;

  /// Those of this process, perhaps none.
  virtual std::span<const Index> own() const = 0;

  /// Sets the rows of `out` [slots, d_out] to what the experts make of the tokens of `dispatch`.
  /// \param x        [tokens, d_in]
  /// \param compute  Is called any number of times.
  virtual void run(MatrixIn<T> x, const Dispatch<T>& dispatch, Compute compute,
                   MatrixOut<T> out) = 0;
};

}  // namespace weir
