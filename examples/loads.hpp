// SPDX-License-Identifier: MIT
/// \file
/// What the experts of a model had to do.
#pragma once

#include <algorithm>
#include <iostream>
#include <nlohmann/json.hpp>
#include <vector>

#include <weir/core/pass_record.hpp>

#include "progress.hpp"

using Json = nlohmann::json;
using NamedReports = std::vector<weir::PassRecord::NamedReport>;

inline void add_load(const weir::LayerReport& from, weir::LayerReport& to) {
  to.load.resize(from.load.size());
  for (std::size_t e = 0; e < from.load.size(); ++e) to.load[e] += from.load[e];
  to.assignments += from.assignments;
  to.dropped += from.dropped;
}

/// The loads and drops of several passes, added up for each layer.
inline NamedReports sum_by_layer(const NamedReports& reports) {
  NamedReports sums;
  for (const auto& [name, report] : reports) {
    const auto same = [&layer = name](const auto& sum) { return sum.name == layer; };
    auto sum = std::find_if(sums.begin(), sums.end(), same);
    if (sum == sums.end()) sum = sums.insert(sum, {name, {}});
    add_load(report, sum->report);
  }
  return sums;
}

/// The loads and drops of all layers together.
inline weir::LayerReport sum_of_all(const NamedReports& reports) {
  weir::LayerReport sum;
  for (const auto& [name, report] : reports) add_load(report, sum);
  return sum;
}

inline void print_loads(const NamedReports& reports) {
  for (const auto& [name, report] : reports) {
    std::cout << "  " << name << "  max/mean " << fixed(report.imbalance(), 2) << "  dropped "
              << fixed(100.0 * report.drop_rate(), 1) << " %  load %";
    for (const weir::Index load : report.load) {
      const double share = static_cast<double>(load) / static_cast<double>(report.assignments);
      std::cout << ' ' << fixed(100.0 * share, 1);
    }
    std::cout << "  " << spark_line(report.load) << '\n';
  }
}

inline Json to_json(const NamedReports& reports) {
  Json json = Json::array();
  for (const auto& [name, report] : reports) {
    json.push_back({{"layer", name},
                    {"load", report.load},
                    {"drop_rate", report.drop_rate()},
                    {"imbalance", report.imbalance()}});
  }
  return json;
}
