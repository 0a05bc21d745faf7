// SPDX-License-Identifier: MIT
/// \file
/// Outputs of experts that are zero at random in training: the expert output masking and the final
/// output masking of NLLB.
#pragma once

#include <cstdint>
#include <span>
#include <utility>

#include <weir/core/error.hpp>
#include <weir/core/pass.hpp>
#include <weir/core/random.hpp>
#include <weir/moe/concepts.hpp>
#include <weir/moe/dispatch.hpp>
#include <weir/moe/experts/bank_wrapper.hpp>
#include <weir/ops/rows.hpp>

namespace weir {

/// What OutputMasking draws for.
enum class MaskedUnit {
  kAssignment,  ///< The output of one expert for one token: expert output masking.
  kToken,       ///< What all of a token's experts yield: final output masking.
};

/// How OutputMasking keeps the mean of an output the same in training and evaluation.
enum class MaskScaling {
  kInEvaluation,  ///< Evaluation multiplies by 1 - rate: fairseq.
  kInTraining,    ///< Training divides by 1 - rate: a Dropout2d over [assignments, d_model].
};

/// Settings of OutputMasking.
struct OutputMaskingConfig {
  double rate = 0.2;
  MaskedUnit unit = MaskedUnit::kAssignment;
  MaskScaling scaling = MaskScaling::kInEvaluation;
};

/// A bank in which outputs of experts are zero with probability `rate` in training:
///
///     y_t = s * sum_{e in S_t, kept} m_te g_te E_e(x_t)
///
///     m_te = 0 with probability rate, else 1     in training; one draw for each assignment, or
///                                                with kToken one for each token
///     m_te = 1                                   otherwise
///
///     s = 1 in training, 1 - rate otherwise      kInEvaluation
///     s = 1 / (1 - rate) in training, else 1     kInTraining
///
/// Everything but the experts is as if there were no mask: an assignment whose output is masked has
/// its place in the expert, and capacity, RenormaliseKept, balancers and reports see it with the
/// weight that it has. The token's other experts do not get that weight. The expert is not run,
/// though, where nothing is made of its output. The mask is constant to the derivative: through a
/// masked output, nothing reaches expert, token or weight. What a PassDropped around it passes on,
/// and what shared experts yield, is neither masked nor scaled.
///
/// Needs `pass.rng` in training, unless rate is 0; the draws do not depend on the number of
/// threads. Causal: what a token is masked by depends on its place alone. One within the other has
/// both units, and both factors s.
///
/// (NLLB Team 2022, arXiv:2207.04672, and Elbayad et al. 2022, arXiv:2212.07571; in fairseq
/// `moe_eom` and `moe_fom`, with kInEvaluation. Hugging Face's NLLB-MoE evaluates as fairseq does
/// with `moe_token_dropout` as the rate. It trains with a dropout of single features instead,
/// divided by 1 - rate as well, so that the mean differs from that of evaluation; there is no
/// setting for it.)
template <ExpertBank Bank>
class OutputMasking : public BankWrapper<Bank> {
 public:
  using typename BankWrapper<Bank>::T;

  struct Cache : BankWrapper<Bank>::Cache {
    bool masks = false;    ///< Whether the last forward pass drew.
    Dispatch<T> unmasked;  ///< The slots whose outputs count, if it did.
    T scale = T(1);        ///< s
    Matrix<T> y, dy;       ///< [tokens, d_out], only where s is not 1.
  };

  /// \throws ConfigError  unless 0 <= rate < 1.
  explicit OutputMasking(Bank bank, OutputMaskingConfig config = {})
      : BankWrapper<Bank>(std::move(bank)), config_(config) {
    expect_fraction("OutputMasking", "rate", config_.rate);
  }

  /// \throws ConfigError  if it draws without pass.rng.
  const Matrix<T>& forward(MatrixIn<T> x, const Dispatch<T>& dispatch, const Pass& pass,
                           Cache& cache) const {
    cache.masks = pass.training && config_.rate > 0.0;
    cache.scale = scale(pass.training);
    if (cache.masks) {
      const Rng draws = pass.generator("OutputMasking").split();
      const auto draw = [&](Index i) {
        return unit_interval(draws.at(static_cast<std::uint64_t>(i)));
      };
      mask(dispatch, draw, cache.unmasked);
    }
    const Matrix<T>& y = bank_.forward(x, seen_by_bank(dispatch, cache), pass, cache.inner);
    if (cache.scale == T(1)) return y;
    scale_rows<T>(cache.scale, y, cache.y);
    return cache.y;
  }

  const Matrix<T>& backward(MatrixIn<T> dy, const Dispatch<T>& dispatch, std::span<T> d_weight,
                            Cache& cache) {
    if (cache.masks) {
      for (Index s = 0; s < dispatch.slots(); ++s) {
        d_weight[static_cast<std::size_t>(dispatch.assignment(s))] = T(0);
      }
    }
    const Dispatch<T>& seen = seen_by_bank(dispatch, cache);
    if (cache.scale == T(1)) return bank_.backward(dy, seen, d_weight, cache.inner);
    scale_rows<T>(cache.scale, dy, cache.dy);
    return bank_.backward(cache.dy, seen, d_weight, cache.inner);
  }

  /// Masks what the draws say.
  /// \param draw     `draw(i)` is u of the assignment or token i, which is masked if u < rate.
  /// \param unmasked  What is left of `dispatch`.
  template <class Draw>
  void mask(const Dispatch<T>& dispatch, Draw&& draw, Dispatch<T>& unmasked) const {
    unmasked.build_part(dispatch, dispatch.experts(), [&](Index /*expert*/, Index s) {
      const bool by_token = config_.unit == MaskedUnit::kToken;
      return draw(by_token ? dispatch.token(s) : dispatch.assignment(s)) >= config_.rate;
    });
  }

  const OutputMaskingConfig& config() const { return config_; }

 private:
  using BankWrapper<Bank>::bank_;

  T scale(bool training) const {
    const double left = 1.0 - config_.rate;
    const bool scales = training == (config_.scaling == MaskScaling::kInTraining);
    return static_cast<T>(!scales ? 1.0 : training ? 1.0 / left : left);
  }

  static const Dispatch<T>& seen_by_bank(const Dispatch<T>& dispatch, const Cache& cache) {
    return cache.masks ? cache.unmasked : dispatch;
  }

  OutputMaskingConfig config_;
};

}  // namespace weir
