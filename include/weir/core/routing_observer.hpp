// SPDX-License-Identifier: MIT
/// \file
/// Who sees where the tokens of a model are routed to.
#pragma once

#include <string_view>

namespace weir {

struct Pass;
template <class T>
struct Routing;  // weir/moe/routing.hpp

/// Sees the routing of each mixture of experts in forward passes whose record shows it, see
/// PassRecord::show_routings_to. A mixture within an expert, or within the router, of another one
/// is not shown: its rows are not the tokens of the pass.
class RoutingObserver {
 public:
  RoutingObserver() = default;
  RoutingObserver(const RoutingObserver&) = default;
  RoutingObserver& operator=(const RoutingObserver&) = default;
  virtual ~RoutingObserver() = default;

  /// Is called by the thread that runs the pass, one layer after the other.
  /// \param layer    The layer's path, such as "layers.3.moe".
  /// \param routing  What the layer's forward pass made, drops included. It changes with the next.
  /// \param pass     What the layer was told.
  virtual void see(std::string_view layer, const Routing<float>& routing, const Pass& pass) = 0;
  virtual void see(std::string_view layer, const Routing<double>& routing, const Pass& pass) = 0;
};

}  // namespace weir
