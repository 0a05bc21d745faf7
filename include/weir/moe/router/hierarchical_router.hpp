// SPDX-License-Identifier: MIT
/// \file
/// The router of a two-level mixture of experts (Shazeer et al. 2017, arXiv:1701.06538, appendix
/// B).
#pragma once

#include <array>
#include <concepts>
#include <limits>
#include <span>
#include <utility>

#include <weir/core/error.hpp>
#include <weir/core/index_span.hpp>
#include <weir/core/parallel.hpp>
#include <weir/core/pass.hpp>
#include <weir/core/types.hpp>
#include <weir/moe/concepts.hpp>
#include <weir/moe/forbidden_experts.hpp>
#include <weir/moe/router/group_logits.hpp>
#include <weir/moe/router/move_noise.hpp>
#include <weir/moe/routing.hpp>
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
/// Mesh TensorFlow: b stacks the second-level networks of all groups, which are all computed.
/// Noise, jitter or a temperature of one level are matters of that level's router.
///
/// If one of the routers drew noise, or both, two levels of noise are told, for
/// HierarchicalLoadLoss: that of the groups, around a without noise, and that of the experts,
/// around z without the noise of b. A level that drew none has the deviation zero. A router of
/// three levels tells none.
///
/// Where the pass forbids experts, the sum over j runs over the others in the group: the token is
/// routed as if there were no such expert, in either level.
///
/// \tparam Groups   A Router of groups.
/// \tparam Experts  A Router of experts, of the same d_model.
template <Router Groups, Router Experts = Groups>
class HierarchicalRouter : public RouterBase<typename Experts::Scalar> {
 public:
  using T = typename Experts::Scalar;

  static_assert(std::same_as<T, typename Groups::Scalar>, "the two levels differ in their scalar");

  struct Cache {
    CacheState state;
    typename Groups::Cache groups;
    typename Experts::Cache experts;
    Matrix<T> within;                    ///< [tokens, experts], the softmax of b in each group.
    Matrix<T> open;                      ///< b, -infinity where forbidden; only used if any is.
    Matrix<T> logits;                    ///< z
    bool tells_noise = false;            ///< The last pass drew noise.
    std::array<NoiseLevel<T>, 2> noise;  ///< That of the groups, and that of the experts.
    GroupLogits<T> group_logits;         ///< The groups' logits in z, where noise is told.
    Matrix<T> da, db, dz;                ///< Gradients, those of the noise first.
    Matrix<T> dx;
  };

  /// \throws ConfigError  if the two differ in d_model, or unless the groups divide the experts.
  HierarchicalRouter(Groups groups, Experts experts)
      : groups_(std::move(groups)), experts_(std::move(experts)) {
    if (groups_.d_model() != experts_.d_model()) {
      throw_error<ConfigError>("HierarchicalRouter: the router of experts takes ",
                               experts_.d_model(), " features, expected ", groups_.d_model(),
                               " as the router of groups");
    }
    if (experts_.experts() % groups_.experts() != 0) {
      throw_error<ConfigError>("HierarchicalRouter: groups = ", groups_.experts(),
                               ", expected a divisor of experts = ", experts_.experts());
    }
  }

  /// \param x        [tokens, d_model]
  /// \return         z [tokens, experts]
  /// \throws ShapeError   if x does not have d_model columns, or pass.allowed does not fit.
  /// \throws ConfigError  if a real token is allowed no expert.
  const Matrix<T>& forward(MatrixIn<T> x, const Pass& pass, Cache& cache) const {
    cache.state.begin();
    expect_columns("HierarchicalRouter::forward", "x", x, d_model());
    const Matrix<T>& a = forward_groups(x, pass, cache);
    const Matrix<T>& b = forward_experts(x, pass, cache);
    const Matrix<T>& open = open_logits(b, pass, cache);
    set_shape(cache.logits, x.rows(), experts());
    if (pass.training) set_shape(cache.within, x.rows(), experts());
    for_each_group(x.rows(), [&](Index t, Index g, Index first, Index size) {
      const T* const from = &b(t, first);
      const T at = a(t, g);
      T sum = logsumexp<T>(span_of(&open(t, first), size));
      const bool none = sum == -std::numeric_limits<T>::infinity();  // All in it are forbidden.
      if (none) sum = logsumexp<T>(span_of(from, size));
      const auto joint = [=](const Lanes<T>& z) -> Lanes<T> { return at + (z - sum); };
      map_lanes<T>(size, joint, &cache.logits(t, first), from);
      if (pass.training) loops::exp_shifted<T>(size, &open(t, first), sum, &cache.within(t, first));
    });
    tell_noise(a, b, pass, cache);
    if (pass.training) {
      set_zero(cache.da, x.rows(), groups());
      set_zero(cache.db, x.rows(), experts());
      set_zero(cache.dz, x.rows(), experts());
    }
    return cache.state.finish(*this, pass, cache.logits);
  }

  /// Two levels, or none.
  std::span<const NoiseLevel<T>> noise(const Cache& cache) const {
    return {cache.noise.data(), cache.tells_noise ? cache.noise.size() : std::size_t(0)};
  }

  void add_noise_gradient(std::span<const NoiseLevel<T>> d_noise, Cache& cache) const {
    if (d_noise.empty()) return;
    // What is told as clean are the groups' logits in z, less the noise of a, and z, less that of
    // b: noise is the difference between the logits with it and those without it.
    cache.group_logits.add_gradient(T(1), d_noise.front().clean, cache.dz);
    cache.dz += d_noise.back().clean;
    if (!groups_.noise(cache.groups).empty()) {
      cache.da -= d_noise.front().clean;
      groups_.add_noise_gradient(d_noise.first(1), cache.groups);
    }
    if (!experts_.noise(cache.experts).empty()) {
      cache.db -= d_noise.back().clean;
      experts_.add_noise_gradient(d_noise.last(1), cache.experts);
    }
  }

  /// \param d_logits  [tokens, experts], of the last forward pass.
  /// \throws StateError   if the cache does not fit, see CacheState.
  /// \throws ShapeError   if d_logits does not have the shape of the logits.
  const Matrix<T>& backward(MatrixIn<T> d_logits, Cache& cache) {
    cache.state.begin_backward("HierarchicalRouter::backward", *this, d_logits);
    add_rows<T>(d_logits, cache.dz, cache.dz);
    for_each_group(d_logits.rows(), [&](Index t, Index g, Index first, Index size) {
      // da_g = sum_e dz_e,   db_e = dz_e - within_e sum_j dz_j.
      const T* const dz = &cache.dz(t, first);
      T* const db = &cache.db(t, first);
      const T sum = loops::sum(size, dz);
      cache.da(t, g) += sum;
      loops::add(size, db, dz, db);
      loops::add_scaled(size, -sum, &cache.within(t, first), db);
    });
    const Matrix<T>& through_groups = groups_.backward(cache.da, cache.groups);
    const Matrix<T>& through_experts = experts_.backward(cache.db, cache.experts);
    set_shape(cache.dx, d_logits.rows(), d_model());
    add_rows<T>(through_groups, through_experts, cache.dx);
    return cache.dx;
  }

  /// The members of the router of groups as `groups.*`, those of the router of experts under their
  /// own names, or as `experts.*` if that router has groups as well.
  template <class Self, class Visit>
  static void visit(Self& self, Visit& visit) {
    visit("groups", self.groups_);
    visit(self.experts_.groups() > 0 ? "experts" : "", self.experts_);
  }

  Index d_model() const { return experts_.d_model(); }
  Index experts() const { return experts_.experts(); }
  Index groups() const { return groups_.experts(); }
  Index group_size() const { return experts() / groups(); }

  /// Those of the router of experts.
  Parameter<T>* expert_vectors() { return experts_.expert_vectors(); }
  const Parameter<T>* expert_vectors() const { return experts_.expert_vectors(); }

  Groups& group_router() { return groups_; }
  const Groups& group_router() const { return groups_; }
  Experts& expert_router() { return experts_; }
  const Experts& expert_router() const { return experts_; }

 private:
  /// a. What the pass allows concerns experts, and is none of this router's business.
  const Matrix<T>& forward_groups(MatrixIn<T> x, const Pass& pass, Cache& cache) const {
    const PassRecord::Scope scope(pass.record, "groups");
    Pass of_groups = pass;
    of_groups.allowed = {};
    of_groups.without_best = 0.0;
    return groups_.forward(x, of_groups, cache.groups);
  }

  const Matrix<T>& forward_experts(MatrixIn<T> x, const Pass& pass, Cache& cache) const {
    const PassRecord::Scope scope(experts_.groups() > 0 ? pass.record : nullptr, "experts");
    return experts_.forward(x, pass, cache.experts);
  }

  /// b as it counts in sums over a group.
  static const Matrix<T>& open_logits(const Matrix<T>& b, const Pass& pass, Cache& cache) {
    if (pass.allowed.empty()) return b;
    expect_allowed_fits("HierarchicalRouter", b.rows(), b.cols(), pass, 0);
    copy_rows<T>(b, cache.open);
    forbid_experts<T>(pass, cache.open);
    return cache.open;
  }

  void tell_noise(const Matrix<T>& a, const Matrix<T>& b, const Pass& pass, Cache& cache) const {
    const std::span<const NoiseLevel<T>> of_a = groups_.noise(cache.groups);
    const std::span<const NoiseLevel<T>> of_b = experts_.noise(cache.experts);
    const bool two_levels = groups_.groups() == 0 && experts_.groups() == 0;
    cache.tells_noise = two_levels && !(of_a.empty() && of_b.empty());
    if (!cache.tells_noise) return;
    cache.group_logits.set("HierarchicalRouter", cache.logits, groups(), pass);
    move_noise<T>(of_a, a, T(1), cache.group_logits.values(), cache.noise[0]);
    move_noise<T>(of_b, b, T(1), cache.logits, cache.noise[1]);
  }

  /// Calls `body(t, g, first, size)` for each token and group, `first` being the group's first
  /// expert.
  template <class Body>
  void for_each_group(Index tokens, Body&& body) const {
    parallel_rows(tokens, 16 * experts(), [&](Index begin, Index end) {
      const Index size = group_size();
      for (Index t = begin; t < end; ++t) {
        for (Index g = 0; g < groups(); ++g) body(t, g, g * size, size);
      }
    });
  }

  Groups groups_;
  Experts experts_;
};

}  // namespace weir
