// SPDX-License-Identifier: MIT
/// \file
/// The report of a routing.
#pragma once

#include <cmath>

#include <weir/core/list.hpp>
#include <weir/core/pass_record.hpp>
#include <weir/core/report.hpp>
#include <weir/moe/routing.hpp>

namespace weir {

/// The report of `routing`, without the losses.
template <class T>
LayerReport report_of(const Routing<T>& routing) {
  LayerReport report;
  report.assignments = routing.assignments();
  report.tokens = routing.rows.real();
  report.switched_off = routing.experts() - routing.open_experts();
  List<Index> load(routing.experts());
  List<Index> kept(routing.experts());
  List<double> weight(routing.experts());
  for (Index t = 0; t < routing.tokens(); ++t) {
    if (routing.rows.is_padding(t)) continue;
    bool served = false;
    for (Index a = routing.first(t); a < routing.last(t); ++a) {
      ++load[routing.expert[a]];
      weight[routing.expert[a]] += static_cast<double>(routing.weight[a]);
      kept[routing.expert[a]] += routing.kept[a];
      report.dropped += 1 - routing.kept[a];
      served = served || routing.kept[a] != 0;
    }
    report.dropped_tokens += served ? 0 : 1;
  }
  report.load = std::move(load);
  report.weight = std::move(weight);
  report.kept = std::move(kept);

  List<double> entropy(routing.tokens());
  constexpr Index kCostOfLogarithm = 32;
  routing.rows.for_each_real(kCostOfLogarithm * routing.experts(), [&](Index t) {
    for (const T p : routing.probabilities.row(t)) {
      if (p > T(0)) entropy[t] -= static_cast<double>(p) * std::log(static_cast<double>(p));
    }
  });
  for (const double of_token : entropy) report.entropy += of_token;
  if (report.tokens > 0) report.entropy /= static_cast<double>(report.tokens);
  return report;
}

/// The same with the losses that `record` has.
template <class T>
LayerReport report_of(const Routing<T>& routing, const PassRecord& record) {
  LayerReport report = report_of(routing);
  for (const PassRecord::Loss& loss : record.losses()) {
    report.losses.emplace_back(loss.name, loss.value);
  }
  return report;
}

}  // namespace weir
