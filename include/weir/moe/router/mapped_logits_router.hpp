// SPDX-License-Identifier: MIT
/// \file
/// What routers have in common that scale or shift the logits of another one.
#pragma once

#include <array>
#include <span>
#include <string_view>
#include <utility>

#include <weir/core/pass.hpp>
#include <weir/core/types.hpp>
#include <weir/moe/concepts.hpp>
#include <weir/moe/router/group_logits.hpp>
#include <weir/moe/router/move_noise.hpp>
#include <weir/moe/router/router_wrapper.hpp>
#include <weir/moe/routing.hpp>
#include <weir/ops/rows.hpp>

namespace weir {

/// A base for routers whose logits z' [tokens, experts] are those of the inner router, z, scaled
/// and shifted:
///
///     z' = scale z + shift
///
/// Scale and shift are constant to the derivative. The noise that the inner router tells is told as
/// noise of z', of the groups' logits too if there are two levels; see `move_noise`.
template <Router Inner>
class MappedLogitsRouter : public RouterWrapper<Inner> {
 public:
  using Wrapper = RouterWrapper<Inner>;
  using T = typename Inner::Scalar;

  struct Cache : Wrapper::Cache {
    Matrix<T> logits;        ///< z'
    bool is_mapped = false;  ///< The last pass has made z'. Otherwise the logits are z.
    T scale = T(1);
    std::size_t levels = 0;                ///< How many levels of noise there are.
    std::array<NoiseLevel<T>, 2> noise;    ///< The noise of z'.
    std::array<NoiseLevel<T>, 2> d_noise;  ///< Gradients of the noise of z.
    GroupLogits<T> before, after;  ///< Groups' logits of z and of z', with two levels alone.
    Matrix<T> dz;
  };

  std::span<const NoiseLevel<T>> noise(const Cache& cache) const {
    if (!cache.is_mapped) return Wrapper::noise(cache);
    return {cache.noise.data(), cache.levels};
  }

  void add_noise_gradient(std::span<const NoiseLevel<T>> d_noise, Cache& cache) const {
    if (!cache.is_mapped) return Wrapper::add_noise_gradient(d_noise, cache);
    for (std::size_t i = 0; i < d_noise.size(); ++i) {
      scale_rows<T>(cache.scale, d_noise[i].clean, cache.d_noise[i].clean);
      scale_rows<T>(cache.scale, d_noise[i].deviation, cache.d_noise[i].deviation);
    }
    if (d_noise.size() == 2) {  // x' - clean' = scale (x - clean), and both x depend on z.
      cache.after.add_gradient(cache.scale, d_noise.front().clean, cache.dz);
      cache.before.add_gradient(-cache.scale, d_noise.front().clean, cache.dz);
    }
    Wrapper::add_noise_gradient({cache.d_noise.data(), d_noise.size()}, cache);
  }

 protected:
  explicit MappedLogitsRouter(Inner inner) : Wrapper(std::move(inner)) {}

  /// The second half of `forward`, once cache.logits is z'.
  /// \param who      The derived class, for messages.
  const Matrix<T>& finish_mapped(std::string_view who, const Matrix<T>& z, T scale,
                                 const Pass& pass, Cache& cache) const {
    cache.is_mapped = true;
    cache.scale = scale;
    if (pass.training) set_zero(cache.dz, z.rows(), z.cols());
    const std::span<const NoiseLevel<T>> inner = Wrapper::noise(cache);
    cache.levels = inner.size();
    if (inner.empty()) return cache.logits;
    move_noise<T>(inner, z, scale, cache.logits, cache.noise[cache.levels - 1]);
    if (inner.size() == 1) return cache.logits;
    const Index groups = inner.front().clean.cols();
    cache.before.set(who, z, groups, pass);
    cache.after.set(who, cache.logits, groups, pass);
    move_noise<T>(inner.first(1), cache.before.values(), scale, cache.after.values(),
                  cache.noise[0]);
    return cache.logits;
  }

  /// `backward`, after the check of the cache.
  const Matrix<T>& backward_mapped(MatrixIn<T> d_logits, Cache& cache) {
    if (!cache.is_mapped) return this->inner_.backward(d_logits, cache.inner);
    cache.dz += cache.scale * d_logits;
    return this->inner_.backward(cache.dz, cache.inner);
  }
};

}  // namespace weir
