// SPDX-License-Identifier: MIT
/// \file
/// Who goes where: what a selector decides, a capacity policy thins out, dispatch sorts and
/// balancers look at.
#pragma once

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdint>
#include <limits>
#include <span>
#include <string_view>
#include <vector>

#include <weir/core/error.hpp>
#include <weir/core/parallel.hpp>
#include <weir/core/pass.hpp>
#include <weir/core/types.hpp>
#include <weir/moe/routing_trace.hpp>
#include <weir/ops/lanes.hpp>
#include <weir/ops/rows.hpp>
#include <weir/ops/top_k.hpp>
#include <weir/ops/vector_loops.hpp>

namespace weir {

/// Over which tokens a capacity or a loss is reckoned.
enum class Scope {
  kBatch,     ///< All tokens of the pass together.
  kSequence,  ///< Each sequence of the pass by itself.
};

/// The routing of one pass: a flat list of assignments, grouped by token, best choice first. The
/// token t has the assignments `first(t)` to `last(t)`, as many as its selector gave it: k in top-k
/// routing, none where it is padding.
template <class T>
struct Routing {
  Matrix<T> logits;  ///< [tokens, experts], from the router; -infinity where the pass forbids
                     ///< the expert to the token.
  Matrix<T> probabilities;  ///< [tokens, experts], what balancers take for the router's belief:
                            ///< each row sums to 1. Zero for padding.
  Matrix<T> clean_logits;   ///< [tokens, experts], the logits without noise, and
  Matrix<T> noise_std;      ///< the noise's standard deviation: where `noisy`, else unspecified.
  bool noisy = false;       ///< The router drew noise in this pass, and says which (`annotate`).
  Matrix<T> group_noise;    ///< [tokens, groups], the noise drawn for the logits of the first level
                            ///< of a router of two levels, and
  Matrix<T> group_noise_std;  ///< its standard deviation: where `groups` > 0, else unspecified.
  Index groups = 0;           ///< Of a router of two levels that is noisy. clean_logits are without
                              ///< the noise of the second level then; a level that has none has
                              ///< the standard deviation 0.

  std::vector<Index> offsets = {0};  ///< [tokens + 1], into the lists below.
  std::vector<Index> expert;         ///< One per assignment.
  std::vector<T> weight;             ///< What the expert's output is multiplied by.
  std::vector<std::uint8_t> kept;    ///< 0 where the capacity was exceeded: the expert is not run.

  std::vector<std::uint8_t> mask;  ///< As in Pass: 0 for padding; empty if there is none.
  Sequences sequences;             ///< As in Pass; one sequence if the pass names none.
  bool training = false;           ///< As in Pass.
  bool restricted = false;         ///< The pass forbids experts: logits may be -infinity.
  bool pass_dropped = false;       ///< A dropped assignment yields weight * x instead of zero.
  Rng* rng = nullptr;              ///< As in Pass: lives until the forward call returns.

  T renormalised_to = T(0);        ///< What the weights that a token kept have been made to sum to;
                                   ///< 0: they are the selector's (see RenormaliseKept).
  std::vector<T> selector_weight;  ///< The selector's weights where `weight` holds others.

  std::vector<std::uint8_t> output_masked;  ///< 1 where the expert's output is taken for zero, and
                                            ///< it is not run; empty: nowhere. And
  T output_scale = T(1);                    ///< what all experts' outputs are multiplied by, beside
                                            ///< the weights (see OutputMasking).

  const RoutingTrace* imposed = nullptr;  ///< What `choose` takes instead; see Replay.

  std::vector<Index> workspace;     ///< For capacity policies; contents unspecified.
  RowVector<T> per_assignment;      ///< Likewise.
  mutable RowVector<T> scratch[3];  ///< For balancers, during one call; contents unspecified.
  mutable RowVector<T> per_token;   ///< Likewise, and for capacity policies: numbers per token.

  Index tokens() const { return logits.rows(); }
  Index experts() const { return logits.cols(); }
  Index assignments() const { return static_cast<Index>(expert.size()); }
  Index first(Index token) const { return offsets[static_cast<std::size_t>(token)]; }
  Index last(Index token) const { return offsets[static_cast<std::size_t>(token) + 1]; }

  /// Those that the token was assigned to, dropped or not, best first.
  std::span<const Index> experts_of(Index token) const {
    return {expert.data() + first(token), expert.data() + last(token)};
  }

  bool is_padding(Index token) const {
    return !mask.empty() && mask[static_cast<std::size_t>(token)] == 0;
  }

  /// How many of the tokens `begin` to `end` are not padding.
  Index real_tokens(Index begin, Index end) const {
    Index count = 0;
    for (Index t = begin; t < end; ++t) count += is_padding(t) ? 0 : 1;
    return count;
  }
  Index real_tokens() const { return real_tokens(0, tokens()); }

  /// Whether the expert is run for the assignment: it is kept, and its output not masked.
  bool is_run(Index assignment) const {
    const auto a = static_cast<std::size_t>(assignment);
    return kept[a] != 0 && (output_masked.empty() || output_masked[a] == 0);
  }

  /// Calls `body(begin, end)` with the token range of each group that `scope` makes.
  template <class Body>
  void for_each_group(Scope scope, Body&& body) const {
    if (scope == Scope::kBatch) {
      body(Index(0), tokens());
    } else {
      for (Index s = 0; s < sequences.count(); ++s) body(sequences.begin(s), sequences.end(s));
    }
  }

  /// Adds to `load[e]` how many assignments the tokens `begin` to `end` made to expert e, kept or
  /// not.
  void add_load(Index begin, Index end, RowVector<T>& load) const {
    for (Index a = first(begin); a < offsets[static_cast<std::size_t>(end)]; ++a) {
      load[expert[static_cast<std::size_t>(a)]] += T(1);
    }
  }

  /// Makes `allowed[e]` 1 for each expert e that the pass allows to any real token.
  void mark_allowed(std::vector<std::uint8_t>& allowed) const {
    for (Index t = 0; t < tokens(); ++t) {
      if (is_padding(t)) continue;
      for (Index e = 0; e < experts(); ++e) {
        if (!restricted || !is_forbidden(t, e)) allowed[static_cast<std::size_t>(e)] = 1;
      }
      if (std::count(allowed.begin(), allowed.end(), 0) == 0) return;
    }
  }

  /// Where `who` has its random numbers from.
  /// \throws ConfigError  if the pass came without a generator.
  Rng& generator(std::string_view who) const {
    if (rng == nullptr) {
      fail<ConfigError>(who, ": pass.rng = null, expected a generator",
                        training ? " in training" : "");
    }
    return *rng;
  }

  bool is_forbidden(Index token, Index e) const {
    return logits(token, e) == -std::numeric_limits<T>::infinity();
  }

  /// Makes the scores [experts] of forbidden experts -infinity, for a choice by other numbers than
  /// the logits: one that lost all to underflow, or has a bias, must not be chosen either.
  void forbid(Index token, T* scores) const {
    if (!restricted) return;
    for (Index e = 0; e < experts(); ++e) {
      if (is_forbidden(token, e)) scores[e] = -std::numeric_limits<T>::infinity();
    }
  }

  /// Makes the probabilities [experts] that `forbid` marked zero again.
  void clear_forbidden(Index token, T* probabilities_of_token) const {
    if (!restricted) return;
    for (Index e = 0; e < experts(); ++e) {
      if (is_forbidden(token, e)) probabilities_of_token[e] = T(0);
    }
  }

  /// Starts a new routing from the router's `logits`: no assignments yet.
  ///
  /// Where pass.allowed forbids an expert, the logit becomes -infinity, whatever the router made of
  /// it. Every selector then gives the expert no assignment, the probability 0 and no gradient, so
  /// that the token is routed as if the router had no such expert. Balancing losses still count all
  /// experts, where their formulas have a number of them.
  ///
  /// \param who      The selector's name, for messages.
  /// \param k        How many experts each token is to have; 0 if that is not fixed.
  /// \throws ConfigError     if a real token is allowed fewer than k experts, or none.
  /// \throws NonFiniteError  if a logit of a real token is NaN or infinite, where it is allowed.
  /// \throws ShapeError      if the pass does not fit the tokens or the experts.
  void begin(std::string_view who, MatrixIn<T> router_logits, const Pass& pass, Index k = 0) {
    pass.check(who, router_logits.rows());
    expect_allowed_fits(who, router_logits, pass, k);
    expect_finite(who, router_logits, pass);
    copy_rows<T>(router_logits, logits);
    restricted = !pass.allowed.empty();
    if (restricted) {
      for (Index t = 0; t < tokens(); ++t) {
        for (Index e = 0; e < experts(); ++e) {
          if (!is_allowed(pass, logits, t, e)) logits(t, e) = -std::numeric_limits<T>::infinity();
        }
      }
    }
    probabilities.resize(logits.rows(), logits.cols());
    mask.assign(pass.mask.begin(), pass.mask.end());
    if (pass.sequences != nullptr) {
      sequences = *pass.sequences;
    } else {
      sequences.clear();
      sequences.append(tokens());
    }
    training = pass.training;
    noisy = false;
    groups = 0;
    pass_dropped = false;
    rng = pass.rng;
    renormalised_to = T(0);
    output_masked.clear();
    output_scale = T(1);
    offsets.assign(static_cast<std::size_t>(tokens()) + 1, 0);
    expert.clear();
    weight.clear();
    kept.clear();
  }

  /// \throws ConfigError  if a selector gave a token an expert that is forbidden to it, since its
  ///                      groups had no other.
  void expect_allowed(std::string_view who) const {
    if (!restricted) return;
    for (Index t = 0; t < tokens(); ++t) {
      Index forbidden = 0;
      for (Index a = first(t); a < last(t); ++a) {
        forbidden += is_forbidden(t, expert[static_cast<std::size_t>(a)]) ? 1 : 0;
      }
      if (forbidden == 0) continue;
      const Index k = last(t) - first(t);
      fail<ConfigError>(who, ": token ", t, " is allowed ", k - forbidden,
                        " experts in its groups, expected at least k = ", k);
    }
  }

  /// Makes room for `k` kept assignments per real token, to be filled in at `first(t)` to
  /// `last(t)`.
  /// \throws ConfigError  if another number of experts, or a forbidden one, is imposed on a token.
  void assign_each(Index k) {
    if (imposed != nullptr) expect_imposed_fits(k);
    for (Index t = 0; t < tokens(); ++t) {
      offsets[static_cast<std::size_t>(t) + 1] = first(t) + (is_padding(t) ? 0 : k);
    }
    const auto count = static_cast<std::size_t>(offsets.back());
    expert.assign(count, 0);
    weight.assign(count, T(0));
    kept.assign(count, 1);
  }

  /// A token's k experts of the largest scores, as `top_k`; or those that are imposed, in the order
  /// in which `top_k` would list them.
  /// \param scores   [experts]
  void choose(Index token, const T* scores, Index k, Index* chosen) const {
    if (imposed == nullptr) return top_k(scores, experts(), k, chosen);
    const auto before = [scores](Index a, Index b) {
      return scores[a] > scores[b] || (scores[a] == scores[b] && a < b);
    };
    for (Index i = 0; i < k; ++i) chosen[i] = imposed->expert(imposed->first(token) + i);
    std::sort(chosen, chosen + k, before);
  }

 private:
  void expect_imposed_fits(Index k) const {
    for (Index t = 0; t < tokens(); ++t) {
      const Index count = imposed->last(t) - imposed->first(t);
      if (is_padding(t) && count > 0) {
        fail<ConfigError>("Replay: token ", t, " has ", count,
                          " experts in the trace, expected none for padding");
      }
      if (!is_padding(t) && count != k) {
        fail<ConfigError>("Replay: token ", t, " has ", count,
                          " experts in the trace, expected k = ", k);
      }
      for (Index a = imposed->first(t); a < imposed->last(t); ++a) {
        if (!is_forbidden(t, imposed->expert(a))) continue;
        fail<ConfigError>("Replay: token ", t, " has expert ", imposed->expert(a),
                          " in the trace, expected one that pass.allowed allows");
      }
    }
  }

  static bool is_allowed(const Pass& pass, MatrixIn<T> logits, Index t, Index e) {
    const auto each = static_cast<std::size_t>(logits.cols());
    const std::size_t row = pass.allowed.size() == each ? 0 : static_cast<std::size_t>(t) * each;
    return pass.allowed.empty() || pass.allowed[row + static_cast<std::size_t>(e)] != 0;
  }

  static void expect_allowed_fits(std::string_view who, MatrixIn<T> logits, const Pass& pass,
                                  Index k) {
    if (pass.allowed.empty()) return;
    const auto size = static_cast<Index>(pass.allowed.size());
    if (size != logits.cols() && size != logits.size()) {
      fail<ShapeError>(who, ": pass.allowed has ", size, " entries, expected ", logits.cols(),
                       " (one per expert) or ", logits.size(), " (for each token)");
    }
    for (Index t = 0; t < logits.rows(); ++t) {
      if (pass.is_padding(t)) continue;
      Index allowed = 0;
      for (Index e = 0; e < logits.cols(); ++e) allowed += is_allowed(pass, logits, t, e) ? 1 : 0;
      if (allowed >= std::max(k, Index(1))) continue;
      fail<ConfigError>(who, ": token ", t, " is allowed ", allowed, " of ", logits.cols(),
                        " experts, expected at least ", k > 0 ? "k = " : "", std::max(k, Index(1)));
    }
  }

  static void expect_finite(std::string_view who, MatrixIn<T> logits, const Pass& pass) {
    std::atomic<bool> finite = true;
    parallel_rows(logits.rows(), logits.cols(), [&](Index begin, Index end) {
      const auto zero = [](const Lanes<T>& z) -> Lanes<T> {
        return z - z;
      };  // NaN where not finite.
      for (Index t = begin; t < end; ++t) {
        if (pass.is_padding(t)) continue;
        if (sum_lanes<T>(logits.cols(), zero, &logits.coeffRef(t, 0)) != T(0)) finite = false;
      }
    });
    if (finite) return;
    for (Index t = 0; t < logits.rows(); ++t) {
      if (pass.is_padding(t)) continue;
      for (Index e = 0; e < logits.cols(); ++e) {
        if (!std::isfinite(logits(t, e)) && is_allowed(pass, logits, t, e)) {
          fail<NonFiniteError>(who, ": logits[", t, ", ", e, "] = ", logits(t, e),
                               ", expected a finite number");
        }
      }
    }
  }
};

/// The gradient of a loss with respect to the parts of a routing that have one. A balancer adds to
/// any of them; the selector's `backward` then carries `weights` and `probabilities` over to
/// `logits`.
template <class T>
struct RoutingGradient {
  Matrix<T> logits;           ///< [tokens, experts]
  Matrix<T> probabilities;    ///< [tokens, experts]
  RowVector<T> weights;       ///< [assignments]
  Matrix<T> clean_logits;     ///< [tokens, experts] where the routing is noisy, else unspecified;
  Matrix<T> noise_std;        ///< likewise.
  Matrix<T> group_noise;      ///< [tokens, groups] where the routing has noisy groups, else
                              ///< unspecified;
  Matrix<T> group_noise_std;  ///< likewise.
  Index groups = 0;           ///< As in Routing.

  /// Multiplies all parts by `factor`.
  void scale(T factor, const Routing<T>& routing) {
    logits *= factor;
    probabilities *= factor;
    weights *= factor;
    if (routing.noisy) {
      clean_logits *= factor;
      noise_std *= factor;
    }
    if (groups > 0) {
      group_noise *= factor;
      group_noise_std *= factor;
    }
  }

  /// Zeros of the shapes of `routing`.
  void reset(const Routing<T>& routing) {
    logits.setZero(routing.tokens(), routing.experts());
    probabilities.setZero(routing.tokens(), routing.experts());
    weights.setZero(routing.assignments());
    groups = routing.groups;
    if (routing.noisy) {
      clean_logits.setZero(routing.tokens(), routing.experts());
      noise_std.setZero(routing.tokens(), routing.experts());
    }
    if (groups > 0) {
      group_noise.setZero(routing.tokens(), groups);
      group_noise_std.setZero(routing.tokens(), groups);
    }
  }
};

}  // namespace weir
