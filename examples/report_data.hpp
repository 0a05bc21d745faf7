// SPDX-License-Identifier: MIT
/// \file
/// The numbers of a report, as JSON and as a table.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <map>
#include <nlohmann/json.hpp>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include <weir/analysis/co_activation.hpp>
#include <weir/analysis/load_statistics.hpp>
#include <weir/analysis/mutual_information.hpp>
#include <weir/analysis/next_expert.hpp>
#include <weir/analysis/repeat_rate.hpp>
#include <weir/analysis/routing_overlap.hpp>
#include <weir/analysis/token_groups.hpp>
#include <weir/analysis/top_tokens.hpp>
#include <weir/analysis/trace_csv.hpp>
#include <weir/analysis/traced_tokens.hpp>

#include "report_matrix.hpp"

namespace report {

using weir::Index;
using weir::TracedLayer;
using weir::TracedTokens;

/// A line for each number.
class Table {
 public:
  void add(const std::string& model, const std::string& statistic, const std::string& layer,
           const std::string& group, const std::string& expert, const Estimate& e) {
    for (const std::string* field : {&model, &statistic, &layer, &group, &expert}) {
      text_.append(weir::csv_field(*field)).append(",");
    }
    for (const double value : {e.value, e.low, e.high, e.chance}) {
      if (std::isfinite(value)) {
        char digits[32];
        std::snprintf(digits, sizeof digits, "%.9g", value);
        text_ += digits;
      }
      text_ += ',';
    }
    text_.back() = '\n';
  }
  const std::string& text() const { return text_; }

 private:
  std::string text_ = "model,statistic,layer,group,expert,value,low,high,chance\n";
};

/// A model's tokens, and what the report calls it.
struct Model {
  std::string name;
  TracedTokens tokens;
  /// The loss without the best experts, in bits, one for each share; empty if it was not measured.
  std::vector<Estimate> redundancy = {};
};

/// How a report is made.
struct Options {
  weir::BootstrapConfig bootstrap = {};
  Index position_groups = 16;
  Index least_token_count = 5;  ///< For statistics by token id.
  Index top = 10;
  // On the page, for all models together; where there is no room, layers are left out.
  std::size_t text_bytes = 1'000'000;      ///< For routes.
  std::size_t matrix_bytes = 450'000;      ///< For co-activations.
  std::size_t position_bytes = 250'000;    ///< For shares by position.
  std::size_t top_bytes = 300'000;         ///< For the tokens of each expert.
  std::size_t domain_bytes = 200'000;      ///< For shares by domain.
  std::size_t links = 3000;                ///< Of the flow of all models.
  std::vector<double> masked_shares = {};  ///< Of the experts, for the loss without the best.
};

/// The statistics of one model. Each is added to a table as well.
class Statistics {
 public:
  Statistics(const Model& model, const Options& options, Table& table)
      : model_(model), options_(options), table_(table) {}

  /// \param vocabulary  The place of each token id in the page's list.
  Json json(const std::map<Index, Index>& vocabulary);

 private:
  const TracedTokens& tokens() const { return model_.tokens; }

  Json keep(const std::string& statistic, const TracedLayer& layer, const std::string& group,
            const std::string& expert, const Estimate& e) {
    table_.add(model_.name, statistic, layer.name, group, expert, e);
    return of(e);
  }

  Json load(const TracedLayer& layer);
  Json by_domain(const TracedLayer& layer);
  Json repeat(const TracedLayer& layer);
  Json information(const TracedLayer& layer);
  Json spread(const TracedLayer& layer);
  Json together(const TracedLayer& layer);
  Json top(const TracedLayer& layer, const std::map<Index, Index>& vocabulary);
  Json positions();
  Json flow();
  Json redundancy();

  weir::TokenGroups positions_of() const {
    Index most = 0;
    for (const Index p : tokens().position) most = std::max(most, p + 1);
    return weir::by_position(tokens(), std::max<Index>(1, (most + options_.position_groups - 1) /
                                                              options_.position_groups));
  }

  const Model& model_;
  Options options_;
  Table& table_;
};

inline Json Statistics::load(const TracedLayer& layer) {
  const weir::LoadStatistics all = weir::load_statistics(tokens(), layer, options_.bootstrap);
  const auto share =
      weir::expert_share(tokens(), layer, weir::all_tokens(tokens()), options_.bootstrap);
  Json shares = Json::array();
  for (std::size_t e = 0; e < share.size(); ++e) {
    shares.push_back(keep("share", layer, "all", std::to_string(e), share[e]));
  }
  return {{"share", std::move(shares)},
          {"cv", keep("load_cv", layer, "all", "", all.variation)},
          {"max", keep("load_max_to_mean", layer, "all", "", all.max_to_mean)},
          {"entropy", keep("router_entropy", layer, "all", "", all.entropy)},
          {"load_entropy", keep("load_entropy", layer, "all", "", all.load_entropy)},
          {"dropped", keep("dropped", layer, "all", "", all.dropped)},
          {"dead", keep("dead_experts", layer, "all", "", all.dead)}};
}

inline Json Statistics::by_domain(const TracedLayer& layer) {
  const weir::TokenGroups domains = weir::by_domain(tokens());
  const auto share = weir::expert_share(tokens(), layer, domains, options_.bootstrap);
  Json json = Json::array();
  for (std::size_t i = 0; i < share.size(); ++i) {
    const std::size_t experts = static_cast<std::size_t>(layer.experts);
    json.push_back(keep("share_by_domain", layer, domains.names[i / experts],
                        std::to_string(i % experts), share[i]));
  }
  return json;
}

inline Json Statistics::repeat(const TracedLayer& layer) {
  Json json;
  for (const auto& [name, kind] :
       {std::pair("first", weir::Repeat::kFirst), std::pair("any", weir::Repeat::kAny)}) {
    Json all = Json::array();
    for (const weir::TokenGroups& groups :
         {weir::all_tokens(tokens()), weir::by_domain(tokens())}) {
      const auto rate = weir::repeat_rate(tokens(), layer, groups, kind, options_.bootstrap);
      for (std::size_t g = 0; g < rate.size(); ++g) {
        all.push_back(keep(std::string("repeat_") + name, layer, groups.names[g], "", rate[g]));
      }
    }
    json[name] = std::move(all);
  }
  return json;
}

inline Json Statistics::information(const TracedLayer& layer) {
  const auto bits = [&](const char* name, const weir::TokenGroups& groups) {
    return keep("information", layer, name, "",
                weir::mutual_information(tokens(), layer, groups, options_.bootstrap));
  };
  return {{"token", bits("token", weir::by_token(tokens()))},
          {"position", bits("position", positions_of())},
          {"domain", bits("domain", weir::by_domain(tokens()))}};
}

inline Json Statistics::spread(const TracedLayer& layer) {
  const auto spread = [&](const char* name, const weir::TokenGroups& groups) {
    return keep("spread", layer, name, "",
                weir::routing_spread(tokens(), layer, groups, options_.bootstrap));
  };
  return {{"token", spread("token", weir::by_token(tokens(), options_.least_token_count))},
          {"position", spread("position", positions_of())}};
}

inline Json Statistics::together(const TracedLayer& layer) {
  const auto all = weir::co_activation(tokens(), layer, options_.bootstrap);
  const auto experts = static_cast<std::size_t>(layer.experts);
  for (std::size_t i = 0; i < all.size(); ++i) {
    table_.add(model_.name, "together", layer.name, "expert " + std::to_string(i / experts),
               std::to_string(i % experts), all[i]);
  }
  return lists_of(all);
}

inline Json Statistics::top(const TracedLayer& layer, const std::map<Index, Index>& vocabulary) {
  Json json = Json::array();
  for (const auto& of_expert :
       weir::top_tokens(tokens(), layer, options_.top, 1, options_.bootstrap)) {
    Json list = Json::array();
    for (const weir::TopToken& token : of_expert) {
      const std::string expert = std::to_string(json.size());
      table_.add(model_.name, "top_token_share", layer.name, "token " + std::to_string(token.id),
                 expert, token.share_of_token);
      const auto place = vocabulary.find(token.id);
      if (place == vocabulary.end()) continue;
      list.push_back(
          {place->second, token.count, of(token.share_of_expert), of(token.share_of_token)});
    }
    json.push_back(std::move(list));
  }
  return json;
}

inline Json Statistics::positions() {
  const weir::TokenGroups groups = positions_of();
  Json json = {{"from", groups.key}, {"share", Json::array()}, {"drop", Json::array()}};
  for (const TracedLayer& layer : tokens().layers) {
    const auto share = weir::expert_share(tokens(), layer, groups, options_.bootstrap);
    const auto experts = static_cast<std::size_t>(layer.experts);
    for (std::size_t i = 0; i < share.size(); ++i) {
      table_.add(model_.name, "share_by_position", layer.name, "from " + groups.names[i / experts],
                 std::to_string(i % experts), share[i]);
    }
    json["share"].push_back(lists_of(share));
    Json drops = Json::array();
    const auto drop = weir::drop_ratio(tokens(), layer, groups, options_.bootstrap);
    for (std::size_t g = 0; g < drop.size(); ++g) {
      drops.push_back(keep("dropped_by_position", layer, "from " + groups.names[g], "", drop[g]));
    }
    json["drop"].push_back(std::move(drops));
  }
  return json;
}

inline Json Statistics::flow() {
  Json json = Json::array();
  const auto& layers = tokens().layers;
  for (std::size_t l = 0; l + 1 < layers.size(); ++l) {
    const weir::Matrix<double> n =
        weir::expert_flow(tokens(), layers[l], layers[l + 1], tokens().all());
    struct Link {
      Index e, f;
      double tokens;
      Estimate share;
    };
    const auto shares =
        weir::next_expert_share(tokens(), layers[l], layers[l + 1], options_.bootstrap);
    std::vector<Link> links;
    for (Index e = 0; e < n.rows(); ++e) {
      for (Index f = 0; f < n.cols(); ++f) {
        if (n(e, f) == 0.0) continue;
        links.push_back({e, f, n(e, f), shares[static_cast<std::size_t>(e * n.cols() + f)]});
        table_.add(model_.name, "next_share", layers[l].name,
                   "expert " + std::to_string(e) + ", then " + layers[l + 1].name,
                   std::to_string(f), links.back().share);
      }
    }
    std::stable_sort(links.begin(), links.end(),
                     [](const Link& a, const Link& b) { return a.tokens > b.tokens; });
    Json list = Json::array();
    for (const Link& link : links) {
      list.push_back({link.e, link.f, static_cast<Index>(link.tokens), of(link.share)});
    }
    const auto counts = [](const auto& sums) {
      Json all = Json::array();
      for (Index i = 0; i < sums.size(); ++i) all.push_back(static_cast<Index>(sums(i)));
      return all;
    };
    const weir::Predictability p =
        weir::predictability(tokens(), layers[l], layers[l + 1], options_.bootstrap);
    const weir::RowVector<double> out = n.rowwise().sum().transpose();
    const weir::RowVector<double> into = n.colwise().sum();
    json.push_back(
        {{"from", l},
         {"to", l + 1},
         {"links", std::move(list)},
         {"total", static_cast<Index>(n.sum())},
         {"shown", 1},
         {"out", counts(out)},
         {"into", counts(into)},
         {"known", keep("next_known", layers[l], layers[l + 1].name, "", p.known)},
         {"unknown", keep("next_unknown", layers[l], layers[l + 1].name, "", p.unknown)}});
  }
  return json;
}

inline Json Statistics::redundancy() {
  Json json = Json::array();
  for (std::size_t i = 0; i < model_.redundancy.size(); ++i) {
    const Estimate& e = model_.redundancy[i];
    table_.add(model_.name, "bits_without_best", "all",
               "share " + number(options_.masked_shares[i]).dump(), "", e);
    json.push_back(of(e));
  }
  return json;
}

inline Json Statistics::json(const std::map<Index, Index>& vocabulary) {
  Json json = {{"name", model_.name}};
  for (const TracedLayer& layer : tokens().layers) {
    Index k = 0;
    for (Index t = 0; t < layer.tokens(); ++t) k = std::max(k, layer.choices(t));
    json["layers"].push_back({{"name", layer.name}, {"experts", layer.experts}, {"k", k}});
    json["load"].push_back(load(layer));
    json["domain"].push_back(by_domain(layer));
    json["repeat"].push_back(repeat(layer));
    json["info"].push_back(information(layer));
    json["spread"].push_back(spread(layer));
    json["top"].push_back(top(layer, vocabulary));
    json["together"].push_back(k > 1 ? together(layer) : Json());
  }
  json["position"] = positions();
  json["flow"] = flow();
  json["redundancy"] = redundancy();
  return json;
}

}  // namespace report
