// SPDX-License-Identifier: MIT
/// \file
/// What all routers around another router have in common.
#pragma once

#include <span>
#include <utility>

#include <weir/core/cache_state.hpp>
#include <weir/core/expert_map.hpp>
#include <weir/core/parameter.hpp>
#include <weir/core/types.hpp>
#include <weir/moe/concepts.hpp>
#include <weir/moe/routing.hpp>

namespace weir {

/// A base for routers around another one. Everything is the inner router's unless the derived class
/// says otherwise: its noise, its groups, its expert vectors, its parameters under their own names.
/// The derived class adds `forward` and `backward`, and members to the cache if it needs any:
///
///     struct Cache : RouterWrapper<Inner>::Cache { ... };
template <Router Inner>
class RouterWrapper : public RouterBase<typename Inner::Scalar> {
 public:
  using T = typename Inner::Scalar;

  struct Cache {
    CacheState state;
    typename Inner::Cache inner;
  };

  std::span<const NoiseLevel<T>> noise(const Cache& cache) const {
    return inner_.noise(cache.inner);
  }
  void add_noise_gradient(std::span<const NoiseLevel<T>> d_noise, Cache& cache) const {
    inner_.add_noise_gradient(d_noise, cache.inner);
  }

  /// The inner one's, where it has that.
  void remap_experts(const ExpertMap& map) requires requires(Inner& inner) {
    inner.remap_experts(map);
  }
  { inner_.remap_experts(map); }

  Index d_model() const { return inner_.d_model(); }
  Index experts() const { return inner_.experts(); }
  Index groups() const { return inner_.groups(); }

  Parameter<T>* expert_vectors() { return inner_.expert_vectors(); }
  const Parameter<T>* expert_vectors() const { return inner_.expert_vectors(); }

  /// The members of the inner router, under its own names.
  template <class Self, class Visit>
  static void visit(Self& self, Visit& visit) {
    visit("", self.inner_);
  }

  Inner& inner() { return inner_; }
  const Inner& inner() const { return inner_; }

 protected:
  explicit RouterWrapper(Inner inner) : inner_(std::move(inner)) {}

  Inner inner_;
};

}  // namespace weir
