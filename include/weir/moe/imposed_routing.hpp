// SPDX-License-Identifier: MIT
/// \file
/// The routing of all mixtures of a model in one pass, recorded and imposed on other passes.
#pragma once

#include <algorithm>
#include <cstddef>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include <weir/core/error.hpp>
#include <weir/core/pass.hpp>
#include <weir/core/routing_observer.hpp>
#include <weir/core/walk.hpp>
#include <weir/moe/routing.hpp>
#include <weir/moe/routing_trace.hpp>

namespace weir {

/// The routing of one mixture in one pass.
struct LayerTrace {
  std::string layer;  ///< The mixture's path, such as "layers.3.moe".
  RoutingTrace trace;
};

/// Keeps the routing of all mixtures in the last pass:
///
///     PassTracer tracer;
///     PassRecord record;
///     record.show_routings_to(&tracer);
///     model.forward(ids, {.record = &record}, cache);
///     impose_routing(other, tracer.traces());
///
/// Allocates only for new layers and for more tokens than ever before.
class PassTracer final : public RoutingObserver {
 public:
  void see(std::string_view layer, const Routing<float>& routing, const Pass& /*pass*/) override {
    of(layer).record(routing);
  }
  void see(std::string_view layer, const Routing<double>& routing, const Pass& /*pass*/) override {
    of(layer).record(routing);
  }

  /// One for each mixture that was seen, in the order of the first pass.
  const std::vector<LayerTrace>& traces() const { return traces_; }

 private:
  RoutingTrace& of(std::string_view layer) {
    const auto found = std::find_if(traces_.begin(), traces_.end(),
                                    [&](const LayerTrace& own) { return own.layer == layer; });
    if (found != traces_.end()) return found->trace;
    traces_.push_back({std::string(layer), {}});
    return traces_.back().trace;
  }

  std::vector<LayerTrace> traces_;
};

namespace detail {

/// Calls `at(layer, node)` for each selector on which a choice can be imposed.
template <class T, class At>
struct WalkImposable final : Walk<T> {
  explicit WalkImposable(At& at_selector) : at(at_selector) {}
  bool at_node(const Node& node) override {
    if (!node.can_be_imposed_on()) return true;
    constexpr std::string_view kSelector = "selector.";
    std::string_view layer = this->path();
    if (layer.ends_with(kSelector)) layer.remove_suffix(kSelector.size());
    if (layer.ends_with('.')) layer.remove_suffix(1);
    at(layer, node);
    return true;
  }
  At& at;
};

template <class Layer, class At>
void for_each_imposable(Layer& layer, At&& at) {
  WalkImposable<typename Layer::Scalar, At> walk(at);
  walk("", layer);
}

}  // namespace detail

/// Imposes on each mixture of `layer` the trace of its name, for all passes until `release_routing`
/// or the next call. The selectors of all mixtures have to be wrapped in a Replay. A pass on which
/// traces are imposed has their tokens, in their order, whatever was beside them before. Training
/// that computes forward passes anew (see BlockStack) replays until after `backward`.
/// \throws ConfigError  unless there is one trace for each mixture with a Replay, and one such
///                      mixture for each trace. Nothing has changed then.
template <class Layer>
void impose_routing(Layer& layer, std::span<const LayerTrace> traces) {
  const auto trace_of = [&](std::string_view name) -> const LayerTrace* {
    for (const LayerTrace& own : traces) {
      if (own.layer == name) return &own;
    }
    return nullptr;
  };
  std::vector<std::string> found;
  detail::for_each_imposable(layer, [&](std::string_view name, const Node& /*node*/) {
    if (trace_of(name) == nullptr) {
      throw_error<ConfigError>("impose_routing: there is no trace of '", name,
                               "', expected one for each mixture");
    }
    found.emplace_back(name);
  });
  for (const LayerTrace& own : traces) {
    if (std::find(found.begin(), found.end(), own.layer) != found.end()) continue;
    throw_error<ConfigError>("impose_routing: the model has no mixture '", own.layer,
                             "' whose selector is a Replay");
  }
  detail::for_each_imposable(
      layer, [&](std::string_view name, const Node& node) { node.impose(&trace_of(name)->trace); });
}

/// Lets all mixtures of `layer` choose experts themselves again.
template <class Layer>
void release_routing(Layer& layer) {
  detail::for_each_imposable(
      layer, [](std::string_view /*name*/, const Node& node) { node.impose(nullptr); });
}

/// How many of the tokens have other experts in `a` than in `b`, whatever their order, in at least
/// one layer.
/// \throws ConfigError  unless both are about the same layers, in the same order, and as many
///                      tokens.
inline Index differently_routed(std::span<const LayerTrace> a, std::span<const LayerTrace> b) {
  const auto fail = [](const std::string& what, const std::string& expected) {
    throw_error<ConfigError>("differently_routed: b has ", what, ", expected ", expected, " as a");
  };
  const auto layers = [](std::size_t count) { return std::to_string(count) + " layers"; };
  if (a.size() != b.size()) fail(layers(b.size()), layers(a.size()));
  std::vector<bool> differs;
  for (std::size_t l = 0; l < a.size(); ++l) {
    const RoutingTrace& first = a[l].trace;
    const RoutingTrace& second = b[l].trace;
    if (a[l].layer != b[l].layer) fail("'" + b[l].layer + "'", "'" + a[l].layer + "'");
    const auto tokens = [](const RoutingTrace& t) {
      return std::to_string(t.tokens()) + " tokens";
    };
    if (first.tokens() != second.tokens()) fail(tokens(second), tokens(first));
    differs.resize(static_cast<std::size_t>(first.tokens()), false);
    for (Index t = 0; t < first.tokens(); ++t) {
      const auto begin = first.experts_chosen().begin();
      const auto other = second.experts_chosen().begin();
      if (std::is_permutation(begin + first.first(t), begin + first.last(t),
                              other + second.first(t), other + second.last(t))) {
        continue;
      }
      differs[static_cast<std::size_t>(t)] = true;
    }
  }
  return std::count(differs.begin(), differs.end(), true);
}

}  // namespace weir
