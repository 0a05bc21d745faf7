// SPDX-License-Identifier: MIT
/// \file
/// The router of a two-level mixture of experts (Shazeer et al. 2017, arXiv:1701.06538, appendix
/// B).
#pragma once

#include <concepts>
#include <utility>

#include <weir/core/error.hpp>
#include <weir/core/layer.hpp>
#include <weir/core/parallel.hpp>
#include <weir/core/types.hpp>
#include <weir/moe/concepts.hpp>
#include <weir/moe/router/group_count.hpp>
#include <weir/ops/exp.hpp>
#include <weir/ops/lanes.hpp>
#include <weir/ops/logsumexp.hpp>
#include <weir/ops/rows.hpp>
#include <weir/ops/vector_loops.hpp>

namespace weir {

/// Scores groups of experts by one router, and the experts within each group by another one:
///
///     z_te = a_tg + b_te - log sum_{j in g} exp(b_tj),    g the group of e
///
/// a [tokens, groups] and b [tokens, experts] are the logits of the two routers; the groups are
/// neighbours, all of the same size. A softmax of z over all experts is the product of the two
/// levels' softmaxes, and any selector, balancer and capacity can be used; HierarchicalTopK chooses
/// level by level.
///
///     p_te = softmax_g(a_t) softmax_{e in g}(b_t)
///
/// ZLoss of z is that of a. With LinearRouters these are the gating networks of Shazeer et al. and
/// Mesh TensorFlow: b stacks the second-level networks of all groups, which are all computed. What
/// concerns one level (noise, jitter, a temperature) is its router's affair. With a NoisyRouter at
/// one level or both, balancers are told of the noise of each: HierarchicalLoadLoss is for that.
/// A router of three levels tells of none.
///
/// \tparam Groups  A Router of groups, and
/// \tparam Experts one of experts, of the same d_model.
template <Router Groups, Router Experts = Groups>
class HierarchicalRouter {
 public:
  using Scalar = typename Experts::Scalar;
  using T = Scalar;

  static_assert(std::same_as<T, typename Groups::Scalar>, "the two levels differ in their scalar");

  static constexpr bool kHasNoise = AnnotatingRouter<Groups> || AnnotatingRouter<Experts>;
  /// Balancers are told of it.
  static constexpr bool kTellsNoise =
      kHasNoise && !GroupedRouter<Groups> && !GroupedRouter<Experts>;

  struct Cache {
    typename Groups::Cache groups;
    typename Experts::Cache experts;
    Matrix<T> a, b;    ///< Where an inner router returns its own by value.
    Matrix<T> within;  ///< [tokens, experts], the softmax of b in each group.
    Matrix<T> logits;
    Matrix<T> noisy_a;         ///< [tokens, groups], a, and
    Matrix<T> shift;           ///< what is added to the b of the group; where noise is told of.
    Matrix<T> d_clean;         ///< Gradients from balancers: of z without the noise of b, and
    RoutingGradient<T> group;  ///< of the noise of a.
    bool received = false;     ///< The two are of the last pass.
    Matrix<T> da, db;
    Matrix<T> da_x, db_x;  ///< Gradients of x, where an inner router returns its own by value.
    Matrix<T> dx;
    bool filled = false;
  };

  /// \throws ConfigError  if the two differ in d_model, or unless the groups divide the experts.
  HierarchicalRouter(Groups groups, Experts experts)
      : groups_(std::move(groups)), experts_(std::move(experts)) {
    if (groups_.d_model() != experts_.d_model()) {
      fail<ConfigError>("HierarchicalRouter: the router of experts takes ", experts_.d_model(),
                        " features, expected ", groups_.d_model(), " as the router of groups");
    }
    if (experts_.experts() % groups_.experts() != 0) {
      fail<ConfigError>("HierarchicalRouter: groups = ", groups_.experts(),
                        ", expected a divisor of experts = ", experts_.experts());
    }
  }

  Matrix<T> forward(MatrixIn<T> x) const {
    Cache cache;
    return forward(x, cache);
  }

  const Matrix<T>& forward(MatrixIn<T> x, Cache& cache) const { return forward(x, {}, cache); }

  /// \param x        [tokens, d_model]
  /// \return         z [tokens, experts]
  /// \throws ShapeError   if x does not have d_model columns.
  const Matrix<T>& forward(MatrixIn<T> x, const Pass& pass, Cache& cache) const {
    expect_columns("HierarchicalRouter::forward", "x", x, d_model());
    cache.filled = false;
    const Matrix<T>& a = keep(cache.a, apply(groups_, x, pass, cache.groups));
    const Matrix<T>& b = keep(cache.b, apply(experts_, x, pass, cache.experts));
    cache.within.resize(x.rows(), experts());
    cache.logits.resize(x.rows(), experts());
    cache.received = false;
    if constexpr (kTellsNoise) {
      cache.noisy_a = a;
      cache.shift.resize(x.rows(), groups());
    }
    const Index size = group_size();
    parallel_rows(x.rows(), 16 * experts(), [&](Index begin, Index end) {
      for (Index t = begin; t < end; ++t) {
        for (Index g = 0; g < groups(); ++g) {
          const T* const from = &b(t, g * size);
          const T sum = logsumexp(from, size);
          const T at = a(t, g);
          if constexpr (kTellsNoise) cache.shift(t, g) = at - sum;
          const auto joint = [=](const Lanes<T>& z) -> Lanes<T> { return at + (z - sum); };
          map_lanes<T>(size, joint, &cache.logits(t, g * size), from);
          loops::exp_shifted<T>(size, from, sum, &cache.within(t, g * size));
        }
      }
    });
    cache.filled = true;
    return cache.logits;
  }

  /// \param d_logits  [tokens, experts], of the last forward pass.
  /// \throws StateError   if the last forward pass with `cache` did not succeed, or there was none.
  /// \throws ShapeError   if d_logits does not have the shape of the logits.
  const Matrix<T>& backward(MatrixIn<T> d_logits, Cache& cache) {
    if (!cache.filled) fail<StateError>("HierarchicalRouter::backward: no forward pass before it");
    expect_shape("HierarchicalRouter::backward", "d_logits", d_logits, cache.logits.rows(),
                 experts());
    cache.da.resize(d_logits.rows(), groups());
    cache.db.resize(d_logits.rows(), experts());
    const Index size = group_size();
    parallel_rows(d_logits.rows(), 4 * experts(), [&](Index begin, Index end) {
      for (Index t = begin; t < end; ++t) {
        for (Index g = 0; g < groups(); ++g) {
          // da_g = sum_e dz_e,   db_e = dz_e - within_e sum_j dz_j,   and z without the noise of b
          // depends on a and the logarithm as z does.
          const T* const dz = &d_logits.coeffRef(t, g * size);
          T sum = loops::sum(size, dz);
          if (cache.received) sum += loops::sum<T>(size, &cache.d_clean(t, g * size));
          cache.da(t, g) = sum;
          const auto rest = [=](const Lanes<T>& d, const Lanes<T>& share) -> Lanes<T> {
            return d - sum * share;
          };
          map_lanes<T>(size, rest, &cache.db(t, g * size), dz, &cache.within(t, g * size));
        }
      }
    });
    if (cache.received) cache.da -= cache.group.clean_logits;
    const Matrix<T>& da_x = keep(cache.da_x, groups_.backward(cache.da, cache.groups));
    const Matrix<T>& db_x = keep(cache.db_x, experts_.backward(cache.db, cache.experts));
    cache.dx.resize(d_logits.rows(), d_model());
    add_rows<T>(da_x, db_x, cache.dx);
    return cache.dx;
  }

  /// Tells the routing of the noise of both levels, if one of them drew any.
  void annotate(const Cache& cache, Routing<T>& routing) const requires kTellsNoise {
    routing.noisy = false;
    if constexpr (AnnotatingRouter<Groups>) {
      // Into the matrices of their size.
      routing.clean_logits.swap(routing.group_noise);
      routing.noise_std.swap(routing.group_noise_std);
      groups_.annotate(cache.groups, routing);
      routing.clean_logits.swap(routing.group_noise);
      routing.noise_std.swap(routing.group_noise_std);
    }
    const bool noisy_groups = routing.noisy;
    routing.noisy = false;
    if constexpr (AnnotatingRouter<Experts>) experts_.annotate(cache.experts, routing);
    const bool noisy_experts = routing.noisy;
    routing.noisy = noisy_groups || noisy_experts;
    if (!routing.noisy) return;

    routing.groups = groups();
    if (noisy_groups) {
      routing.group_noise = cache.noisy_a - routing.group_noise;
    } else {
      routing.group_noise.setZero(cache.logits.rows(), groups());
      routing.group_noise_std.setZero(cache.logits.rows(), groups());
    }
    if (noisy_experts) {
      parallel_rows(cache.logits.rows(), experts(), [&](Index begin, Index end) {
        for (Index t = begin; t < end; ++t) {
          for (Index g = 0; g < groups(); ++g) {
            routing.clean_logits.row(t).segment(g * group_size(), group_size()).array() +=
                cache.shift(t, g);
          }
        }
      });
    } else {
      routing.clean_logits = cache.logits;
      routing.noise_std.setZero(cache.logits.rows(), experts());
    }
  }

  /// Takes the gradients with respect to the noise, which the next `backward` includes; a level
  /// that drew none has none.
  void receive(const RoutingGradient<T>& gradient, Cache& cache) const requires kTellsNoise {
    cache.received = gradient.groups > 0;
    if (!cache.received) return;
    cache.d_clean = gradient.clean_logits;
    cache.group.clean_logits = -gradient.group_noise;  // The noise is a - a~.
    cache.group.noise_std = gradient.group_noise_std;
    if constexpr (AnnotatingRouter<Groups>) groups_.receive(cache.group, cache.groups);
    if constexpr (AnnotatingRouter<Experts>) experts_.receive(gradient, cache.experts);
  }

  /// The members of the router of groups as `groups.*`, those of the router of experts under their
  /// own names.
  template <class Self, class Visit>
  static void visit(Self& self, Visit& visit) {
    visit("groups", self.groups_);
    Experts::visit(self.experts_, visit);
  }

  Index d_model() const { return experts_.d_model(); }
  Index experts() const { return experts_.experts(); }
  Index groups() const { return groups_.experts(); }
  Index group_size() const { return experts() / groups(); }

  Groups& group_router() { return groups_; }
  const Groups& group_router() const { return groups_; }
  Experts& expert_router() { return experts_; }
  const Experts& expert_router() const { return experts_; }

 private:
  Groups groups_;
  Experts experts_;
};

}  // namespace weir
