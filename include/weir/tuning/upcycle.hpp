// SPDX-License-Identifier: MIT
/// \file
/// Mixtures made of trained dense networks.
#pragma once

#include <algorithm>
#include <cmath>
#include <numeric>
#include <string>
#include <type_traits>
#include <utility>
#include <vector>

#include <weir/core/error.hpp>
#include <weir/core/init.hpp>
#include <weir/core/random.hpp>
#include <weir/core/types.hpp>
#include <weir/model/any_layer.hpp>
#include <weir/model/block.hpp>
#include <weir/moe/experts/glu_bank.hpp>
#include <weir/moe/experts/mlp_bank.hpp>
#include <weir/moe/router/linear_router.hpp>
#include <weir/nn/glu.hpp>
#include <weir/nn/mlp.hpp>
#include <weir/ops/activation.hpp>

namespace weir {

/// Which weights of an upcycled expert bear the factor of its output.
enum class UpcycleScale {
  kOutput,  ///< The last map alone: the output is the dense one's, exactly.
  kEven,    ///< All maps the same power of it, as published. Exact for Relu, and for
            ///< SquaredRelu without a gate; otherwise the output is only alike.
};

/// Settings of upcycling.
struct UpcycleConfig {
  Index copies = 8;       ///< E: how many copies of the dense network there are among the experts.
  Index granularity = 1;  ///< G: into how many experts each copy is cut.
  /// 0 where the weights of a token's chosen experts sum to one. Otherwise k, for weights that are
  /// the probabilities of a softmax over all experts, as `SoftmaxTopK` gives them raw.
  Index raw_k = 0;
  UpcycleScale scale = UpcycleScale::kOutput;
  /// Standard deviation of the normal noise on the weights of the experts, relative to that of each
  /// weight matrix, so that copies differ. (The code of Drop-Upcycling, which compares with it,
  /// conversions/noise_upcycling.py, adds N(0, 0.02^2) to half of the neurons, whatever they are.)
  double noise = 0.0;
  /// r: the share of the neurons of each expert that are drawn anew. (Drop-Upcycling.)
  double drop = 0.0;
  double router_scale = 0.1;  ///< Of the router's rows, see LinearRouterConfig.

  Index experts() const { return copies * granularity; }

  /// How much larger the output of an expert has to be than the part of the dense network that it
  /// holds: G, or E G^2 / k with raw probabilities, each of which is 1 / (E G) at first.
  double output_factor() const {
    const auto g = static_cast<double>(granularity);
    return raw_k == 0 ? g : static_cast<double>(copies) * g * g / static_cast<double>(raw_k);
  }

  /// \throws ConfigError  if a setting is out of range, or the hidden numbers of the dense network
  ///                      cannot be cut evenly.
  void check(Index d_hidden) const {
    expect_at_least<Index>("upcycle", "copies", copies, 1);
    expect_at_least<Index>("upcycle", "granularity", granularity, 1);
    expect_at_least<Index>("upcycle", "raw_k", raw_k, 0);
    expect_at_least("upcycle", "noise", noise, 0.0);
    expect_at_least("upcycle", "drop", drop, 0.0);
    if (drop > 1.0) throw_error<ConfigError>("upcycle: drop = ", drop, ", expected 0 <= drop <= 1");
    if (d_hidden % granularity != 0) {
      throw_error<ConfigError>("upcycle: granularity = ", granularity,
                               ", expected a divisor of d_hidden = ", d_hidden);
    }
  }
};

namespace detail {

/// Draws the rows (or columns) `chosen` of a matrix from a normal distribution with the mean and
/// standard deviation of the numbers that were there.
template <class T>
void draw_like(Matrix<T>& w, const std::vector<Index>& chosen, bool rows, Rng& rng) {
  double sum = 0.0;
  double squares = 0.0;
  double count = 0.0;
  const Index along = rows ? w.cols() : w.rows();
  const auto number = [&](Index i, Index j) -> T& { return rows ? w(i, j) : w(j, i); };
  for (const Index i : chosen) {
    for (Index j = 0; j < along; ++j) {
      const auto value = static_cast<double>(number(i, j));
      sum += value;
      squares += value * value;
      count += 1.0;
    }
  }
  if (count == 0.0) return;
  const double mean = sum / count;
  const double deviation = std::sqrt(std::max(0.0, squares / count - mean * mean));
  for (const Index i : chosen) {
    for (Index j = 0; j < along; ++j) {
      number(i, j) = static_cast<T>(mean + deviation * rng.normal());
    }
  }
}

template <class T>
void add_noise(Matrix<T>& w, double relative, Rng& rng) {
  if (relative == 0.0 || w.size() == 0) return;
  const auto mean = static_cast<double>(w.mean());
  const double variance =
      static_cast<double>(w.squaredNorm()) / static_cast<double>(w.size()) - mean * mean;
  const double deviation = relative * std::sqrt(std::max(0.0, variance));
  for (T& number : w.reshaped()) number += static_cast<T>(deviation * rng.normal());
}

/// `count` different numbers below `all`, in order.
inline std::vector<Index> sample(Index count, Index all, Rng& rng) {
  std::vector<Index> numbers(static_cast<std::size_t>(all));
  std::iota(numbers.begin(), numbers.end(), Index{0});
  draw_to_back(numbers, count, rng);
  numbers.erase(numbers.begin(), numbers.end() - count);
  std::sort(numbers.begin(), numbers.end());
  return numbers;
}

/// What one expert of an upcycled bank is made of: `in` [d_hidden, d_model] each, and `out`
/// [d_model, d_hidden], still of the dense network.
template <class T>
void make_expert(const UpcycleConfig& config, std::vector<Matrix<T>*> in, Matrix<T>& out,
                 double in_factor, double out_factor, Rng& rng) {
  const Index neurons = out.cols();
  if (config.drop > 0.0) {
    const auto count = static_cast<Index>(config.drop * static_cast<double>(neurons));
    const std::vector<Index> chosen = sample(count, neurons, rng);
    for (Matrix<T>* w : in) draw_like(*w, chosen, true, rng);
    draw_like(out, chosen, false, rng);
  }
  for (Matrix<T>* w : in) add_noise(*w, config.noise, rng);
  add_noise(out, config.noise, rng);
  for (Matrix<T>* w : in) *w *= static_cast<T>(in_factor);
  out *= static_cast<T>(out_factor);
}

}  // namespace detail

/// The experts of a mixture that is made of a trained gated network. Expert c G + s is part s of
/// copy c, that is neurons s d_hidden / G to (s + 1) d_hidden / G:
///
///     E_e(x) = (act(x (a Wg_s)^T) * (x (a Wu_s)^T)) (b Wd_s)^T
///
/// With `kOutput`, a = 1 and b = `output_factor()`; with `kEven`, a and b are its cube root. With
/// the router of `upcycled_router` and a selector that chooses a multiple of G experts, the chosen
/// are whole copies, a virtual group each. So the mixture yields what the dense network yields, to
/// rounding, without noise and drop and with `kOutput`: for all selectors whose weights sum to one,
/// such as TopKSoftmax, and SigmoidTopK and SoftmaxTopK renormalised.
///
/// With drop, the indices S of a share r of its neurons are drawn for each expert, and their
/// weights, of Wg, Wu and Wd each, from a normal distribution with the mean and standard deviation
/// of those that were there.
///
/// (Copies: Komatsuzaki et al. 2022, arXiv:2212.05055, section 3. Virtual groups and scales: He et
/// al. 2024, arXiv:2410.07524, section 4, and Megatron-Core, upcycling_utils.py. Drop: Nakamura et
/// al. 2025, arXiv:2502.19261, section 3.2; their code, conversions/drop_upcycling.py, draws S anew
/// for each map, and floor(r d_hidden) of them as here.)
/// \throws ConfigError  if a setting is out of range.
/// \throws StateError   if the dense network is stored for inference.
template <std::floating_point T, Activation Act>
GluBank<T, Act> upcycled_bank(const Glu<T, Act>& dense, const UpcycleConfig& config, Rng& rng) {
  expect_trainable("upcycled_bank", dense.storage());
  config.check(dense.d_hidden());
  const double factor = config.output_factor();
  const bool even = config.scale == UpcycleScale::kEven;
  const double in_factor = even ? std::cbrt(factor) : 1.0;
  const double out_factor = even ? std::cbrt(factor) : factor;
  const Index width = dense.d_hidden() / config.granularity;
  std::vector<Matrix<T>> gate, up, down;
  for (Index e = 0; e < config.experts(); ++e) {
    const Index first = e % config.granularity * width;
    gate.push_back(dense.gate().value.middleRows(first, width));
    up.push_back(dense.up().value.middleRows(first, width));
    down.push_back(dense.down().value.middleCols(first, width));
    detail::make_expert<T>(config, {&gate.back(), &up.back()}, down.back(), in_factor, out_factor,
                           rng);
  }
  return GluBank<T, Act>(std::move(gate), std::move(up), std::move(down));
}

/// The same of a network of two matrices, where `kEven` is the square root, and with
/// SquaredRelu the cube root. The bias behind an
/// activation that is not homogeneous stays as it is; that of the output is shared out among the
/// experts of a copy.
/// \throws ConfigError  if a setting is out of range, or with `kEven` and biases.
/// \throws StateError   if the dense network is stored for inference.
template <std::floating_point T, Activation Act>
MlpBank<T, Act> upcycled_bank(const Mlp<T, Act>& dense, const UpcycleConfig& config, Rng& rng) {
  expect_trainable("upcycled_bank", dense.storage());
  config.check(dense.d_hidden());
  const bool biased = dense.in_bias().value.size() > 0 || dense.out_bias().value.size() > 0;
  const bool even = config.scale == UpcycleScale::kEven;
  if (even && biased) {
    throw_error<ConfigError>("upcycled_bank: scale = kEven with biases, expected kOutput");
  }
  const double factor = config.output_factor();
  // Of SquaredRelu, the output is of the third degree in the weights.
  const double root = std::is_same_v<Act, SquaredRelu> ? std::cbrt(factor) : std::sqrt(factor);
  const Index width = dense.d_hidden() / config.granularity;
  std::vector<Matrix<T>> in, out, in_bias, out_bias;
  for (Index e = 0; e < config.experts(); ++e) {
    const Index first = e % config.granularity * width;
    in.push_back(dense.in().value.middleRows(first, width));
    out.push_back(dense.out().value.middleCols(first, width));
    detail::make_expert<T>(config, {&in.back()}, out.back(), even ? root : 1.0,
                           even ? root : factor, rng);
    if (!biased) continue;
    const auto share = static_cast<T>(factor / static_cast<double>(config.granularity));
    in_bias.push_back(dense.in_bias().value.middleCols(first, width));
    out_bias.push_back(share * dense.out_bias().value);
  }
  return MlpBank<T, Act>(std::move(in), std::move(out), std::move(in_bias), std::move(out_bias));
}

/// A router for such a bank: the experts of a copy have the same row, so that they are chosen
/// together. Rows are drawn from `switch_init`.
/// \throws ConfigError  if a setting is out of range.
template <std::floating_point T>
LinearRouter<T> upcycled_router(Index d_model, const UpcycleConfig& config, Rng& rng) {
  config.check(config.granularity);
  expect_at_least<Index>("upcycled_router", "d_model", d_model, 1);
  const Matrix<T> rows = switch_init<T>(config.copies, d_model, rng, config.router_scale);
  Matrix<T> weight(config.experts(), d_model);
  for (Index e = 0; e < config.experts(); ++e) weight.row(e) = rows.row(e / config.granularity);
  return LinearRouter<T>(std::move(weight));
}

/// Puts a mixture in the place of each dense network of a decoder that `make` makes one of:
///
///     upcycle_blocks(model.layers(), "mlp", "moe", [&](const AnyLayer<float>& dense, Index) {
///       const auto* glu = dense.get<Glu<float>>();
///       return std::optional<AnyLayer<float>>(MoELayer(upcycled_router<float>(64, config, rng),
///                                                      TopKSoftmax<float>({.k = 2}), Dropless(),
///                                                      upcycled_bank(*glu, config, rng)));
///     });
///
/// What `make` returns without a value stays dense. The new branch is called `to`, so that an
/// optimizer finds the other parameters under the names they had.
/// \return              How many mixtures were made.
/// \throws ConfigError  if no block has a branch `from`.
template <std::floating_point T, class Make>
Index upcycle_blocks(std::vector<Block<T>>& blocks, const std::string& from, const std::string& to,
                     Make&& make) {
  Index found = 0;
  std::vector<std::pair<Branch<T>*, AnyLayer<T>>> made;
  for (std::size_t l = 0; l < blocks.size(); ++l) {
    for (Branch<T>& branch : blocks[l].branches()) {
      if (branch.name != from) continue;
      ++found;
      auto layer = make(std::as_const(branch.layer), static_cast<Index>(l));
      if (layer) made.emplace_back(&branch, std::move(*layer));
    }
  }
  if (found == 0) {
    throw_error<ConfigError>("upcycle_blocks: no block has a branch '", from,
                             "', expected at least one");
  }
  for (auto& [branch, layer] : made) {
    branch->layer = std::move(layer);
    branch->name = to;
  }
  return static_cast<Index>(made.size());
}

}  // namespace weir
