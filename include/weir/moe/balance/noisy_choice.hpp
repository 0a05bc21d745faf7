// SPDX-License-Identifier: MIT
/// \file
/// How likely a choice of the largest of some noisy logits is (Shazeer et al. 2017,
/// arXiv:1701.06538, appendix A, eq. 8-9).
#pragma once

#include <algorithm>
#include <concepts>
#include <limits>
#include <span>

#include <weir/core/types.hpp>
#include <weir/moe/routing.hpp>
#include <weir/ops/lanes.hpp>
#include <weir/ops/normal.hpp>

namespace weir {

/// One token's choice of the largest of the options `begin` to `end`, by logits with noise. The
/// pointers are to option 0. The chance of option e is
///
///     P_e = Phi((clean_e - threshold_e) / std_e)
///
/// the chance that it were chosen if the noise of that one logit were drawn again. threshold_e is
/// what the noisy logit has to exceed: the largest of those not chosen if e is chosen, else the
/// smallest of the chosen ones. See LoadLoss, and HierarchicalLoadLoss, where a token has a choice
/// of groups and one in each group.
template <std::floating_point T>
struct NoisyChoice {
  /// The choice of token t among the columns `first` to `last` of the noisy logits.
  NoisyChoice(const Matrix<T>& logits, const NoiseLevel<T>& level, Index t, Index first, Index last)
      : noisy(&logits(t, 0)),
        clean(&level.clean(t, 0)),
        std(&level.deviation(t, 0)),
        begin(first),
        end(last) {}

  const T* noisy;
  const T* clean;
  const T* std;
  Index begin, end;

  /// What the options have to exceed.
  struct Rivals {
    T in, out;                    ///< Threshold of the chosen ones, and of the others.
    Index in_option, out_option;  ///< Whose logits those are; in_option -1 if there is none.
    bool none;                    ///< Nothing is chosen.
  };

  /// \param chosen   What was chosen, in any order, perhaps twice; what is no option here is
  ///                 skipped.
  Rivals rivals(std::span<const Index> chosen) const;

  struct Chance {
    Lanes<double> probability;
    Lanes<double> slope;      ///< d probability / d clean
    Lanes<double> z;          ///< Argument of Phi; zero where the slope is.
    LaneBits<double> inside;  ///< The option was chosen.
  };

  /// The chances of `count` options from e on, at most as many as there are lanes. There is nothing
  /// to estimate, and no slope, where std is zero or all are chosen.
  Chance chance(Index e, Index count, T in, T out) const;

  /// Adds the gradient of sum_e d_e P_e, whose thresholds are noisy logits of other options.
  /// \param chosen   As for `rivals`; there is nothing to add without any.
  /// \param d        [options]
  /// \param d_noisy  The gradient of the noisy logits of the token, from option 0 on.
  /// \param d_level  The gradient of the level, in its row t.
  void add_gradient(std::span<const Index> chosen, const T* d, T* d_noisy, NoiseLevel<T>& d_level,
                    Index t) const;

 private:
  static void add(const Lanes<double>& more, T* to, Index count) {
    store_rounded<T>(load_as_double(to, count) + more, to, count);
  }
};

template <std::floating_point T>
typename NoisyChoice<T>::Rivals NoisyChoice<T>::rivals(std::span<const Index> chosen) const {
  constexpr T kLowest = -std::numeric_limits<T>::infinity();
  Rivals rivals = {kLowest, kLowest, -1, -1, true};
  for (const Index e : chosen) {
    if (e < begin || e >= end) continue;
    if (rivals.none || noisy[e] <= rivals.out) rivals.out = noisy[e], rivals.out_option = e;
    rivals.none = false;
  }
  if (rivals.none) return rivals;
  for (Index e = begin; e < end; ++e) {
    if (!(noisy[e] > rivals.in)) continue;
    if (std::find(chosen.begin(), chosen.end(), e) != chosen.end()) continue;
    rivals.in = noisy[e];
    rivals.in_option = e;
  }
  return rivals;
}

template <std::floating_point T>
typename NoisyChoice<T>::Chance NoisyChoice<T>::chance(Index e, Index count, T in, T out) const {
  constexpr double kLowest = -std::numeric_limits<double>::infinity();
  const Lanes<double> zero{};
  const Lanes<double> one = zero + 1.0;
  const Lanes<double> with_noise = load_as_double(noisy + e, count);
  const Lanes<double> without = load_as_double(clean + e, count);
  const Lanes<double> deviation = load_as_double(std + e, count);
  // Logits that tie at the border have both thresholds, which then are equal.
  const LaneBits<double> inside = with_noise > static_cast<double>(in);
  const Lanes<double> threshold =
      inside ? zero + static_cast<double>(in) : zero + static_cast<double>(out);
  const LaneBits<double> certain =
      (deviation <= 0.0) | (threshold == kLowest) | (with_noise == kLowest);
  const Lanes<double> safe = certain ? one : deviation;
  const Lanes<double> z = certain ? zero : (without - threshold) / safe;
  const NormalLanes normal = normal_lanes<T>(z);
  const Lanes<double> decided = inside ? one : zero;
  return {certain ? decided : normal.cdf, certain ? zero : normal.density / safe, z, inside};
}

template <std::floating_point T>
void NoisyChoice<T>::add_gradient(std::span<const Index> chosen, const T* d, T* d_noisy,
                                  NoiseLevel<T>& d_level, Index t) const {
  const Rivals rivals = this->rivals(chosen);
  if (rivals.none) return;
  Lanes<double> d_in{}, d_out{};
  for (Index e = begin; e < end; e += kLanes<double>) {
    const Index count = std::min(kLanes<double>, end - e);
    const Chance of_e = chance(e, count, rivals.in, rivals.out);
    const Lanes<double> through = load_as_double(d + e, count) * of_e.slope;
    add(through, &d_level.clean(t, e), count);
    add(-(through * of_e.z), &d_level.deviation(t, e), count);
    d_in -= of_e.inside ? through : Lanes<double>{};
    d_out -= of_e.inside ? Lanes<double>{} : through;
  }
  if (rivals.in_option >= 0) d_noisy[rivals.in_option] += static_cast<T>(sum_of<double>(d_in));
  d_noisy[rivals.out_option] += static_cast<T>(sum_of<double>(d_out));
}

}  // namespace weir

#ifdef WEIR_COMPILED
extern template struct weir::NoisyChoice<float>;
extern template struct weir::NoisyChoice<double>;
#endif
