// SPDX-License-Identifier: MIT
/// \file
/// Outputs of experts that are zero at random in training: the expert output masking and the final
/// output masking of NLLB.
#pragma once

#include <cstdint>
#include <utility>

#include <weir/core/error.hpp>
#include <weir/core/random.hpp>
#include <weir/moe/capacity/capacity_wrapper.hpp>
#include <weir/moe/routing.hpp>

namespace weir {

/// What OutputMasking draws for.
enum class MaskedUnit {
  kAssignment,  ///< The output of one expert for one token: expert output masking.
  kToken,       ///< What all of a token's experts yield: final output masking.
};

/// How OutputMasking keeps the mean of an output the same in training and evaluation.
enum class MaskScaling {
  kEvaluation,  ///< Evaluation multiplies by 1 - rate: fairseq.
  kTraining,    ///< Training divides by 1 - rate: a Dropout2d over [assignments, d_model].
};

/// Settings of OutputMasking.
struct OutputMaskingConfig {
  double rate = 0.2;
  MaskedUnit unit = MaskedUnit::kAssignment;
  MaskScaling scaling = MaskScaling::kEvaluation;
};

/// Any capacity policy, after which outputs of experts are zero with probability `rate` in
/// training:
///
///     y_t = s * sum_{e in S_t, kept} m_te g_te E_e(x_t)
///
///     m_te = 0 with probability rate, else 1     in training; one draw for each assignment, or
///                                                with kToken one for each token
///     m_te = 1                                   otherwise
///
///     s = 1 in training, 1 - rate otherwise      kEvaluation
///     s = 1 / (1 - rate) in training, else 1     kTraining
///
/// All else is as if there were no mask: an assignment whose output is masked has its place in the
/// expert, and capacity, RenormaliseKept, balancers and reports see it with the weight that it has.
/// The token's other experts do not get that weight. The expert is not run, though, where nothing
/// is made of its output. The mask is constant to the derivative: through a masked output, nothing
/// reaches expert, token or weight. What a dropped assignment passes on (OnDrop::kPass) and
/// what shared experts yield is neither masked nor scaled.
///
/// Needs `pass.rng` in training, unless rate is 0; the draws do not depend on the number of
/// threads. As causal as the inner policy. One within the other has both units, and both factors s.
///
/// (NLLB Team 2022, arXiv:2207.04672, and Elbayad et al. 2022, arXiv:2212.07571; in fairseq
/// `moe_eom` and `moe_fom`, with kEvaluation. Hugging Face's NLLB-MoE evaluates as fairseq does
/// with `moe_token_dropout` as the rate. It trains with a dropout of single features instead,
/// divided by 1 - rate as well, so that the mean differs from that of evaluation; there is no
/// setting for it.)
template <class Inner>
class OutputMasking : public CapacityWrapper<Inner> {
 public:
  /// \throws ConfigError  unless 0 <= rate < 1.
  explicit OutputMasking(Inner inner, OutputMaskingConfig config = {})
      : CapacityWrapper<Inner>(std::move(inner)), config_(config) {
    if (!(config_.rate >= 0.0 && config_.rate < 1.0)) {
      fail<ConfigError>("OutputMasking: rate = ", config_.rate, ", expected 0 <= rate < 1");
    }
  }

  /// \throws ConfigError  as the inner policy; if it draws without pass.rng.
  template <class T>
  void apply(Routing<T>& routing) const {
    inner_.apply(routing);
    if (config_.rate == 0.0) return;
    if (routing.training) {
      const Rng draws = routing.generator("OutputMasking").split();
      mask(routing,
           [&](Index i) { return unit_interval(draws.at(static_cast<std::uint64_t>(i))); });
    }
    const bool scales = routing.training == (config_.scaling == MaskScaling::kTraining);
    const double left = 1.0 - config_.rate;
    if (scales) routing.output_scale *= static_cast<T>(routing.training ? 1.0 / left : left);
  }

  /// Masks what the draws say.
  /// \param draw     `draw(i)` is u of the assignment or token i, which is masked if u < rate.
  template <class T, class Draw>
  void mask(Routing<T>& routing, Draw&& draw) const {
    routing.output_masked.resize(routing.expert.size(), 0);
    for (Index t = 0; t < routing.tokens(); ++t) {
      for (Index a = routing.first(t); a < routing.last(t); ++a) {
        const Index drawn = config_.unit == MaskedUnit::kToken ? t : a;
        if (draw(drawn) < config_.rate) routing.output_masked[static_cast<std::size_t>(a)] = 1;
      }
    }
  }

  const OutputMaskingConfig& config() const { return config_; }

 private:
  using CapacityWrapper<Inner>::inner_;
  OutputMaskingConfig config_;
};

}  // namespace weir
