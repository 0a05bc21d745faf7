// SPDX-License-Identifier: MIT
/// \file
/// All that a report says about one model, or about two side by side.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <limits>
#include <map>
#include <string>
#include <utility>
#include <vector>

#include <weir/analysis/routing_overlap.hpp>

#include "report_data.hpp"
#include "report_text.hpp"
#include "report_words.hpp"

namespace report {

/// Sentences about a model's statistics.
inline std::vector<Saying> sayings(const Model& model, const Json& statistics) {
  std::vector<Saying> says;
  const std::string who = model.name + ": ";
  const auto percent = [](const Json& v) { return fixed(100.0 * v.get<double>(), 1) + " %"; };
  const auto& layers = statistics.at("layers");
  std::size_t repeats = 0;
  std::size_t busiest = 0;
  double token = 0.0, domain = 0.0, position = 0.0;
  const auto above = [](const Json& e) {
    return e[0].is_null() || e[3].is_null() ? 0.0 : e[0].get<double>() - e[3].get<double>();
  };
  for (std::size_t l = 0; l < layers.size(); ++l) {
    std::vector<double> share;
    for (const Json& e : statistics["load"][l]["share"]) {
      share.push_back(e[0].is_null() ? 0.0 : e[0].get<double>());
    }
    for (Saying& s : collapse_warnings(who + layers[l]["name"].get<std::string>(), share,
                                       static_cast<double>(model.tokens.tokens()))) {
      says.push_back(std::move(s));
    }
    const auto rate = [&](std::size_t i) { return above(statistics["repeat"][i]["first"][0]); };
    if (rate(l) > rate(repeats)) repeats = l;
    const auto peak = [&](std::size_t i) {
      const Json& v = statistics["load"][i]["max"][0];
      return v.is_null() ? 0.0 : v.get<double>();
    };
    if (peak(l) > peak(busiest)) busiest = l;
    token += above(statistics["info"][l]["token"]) / static_cast<double>(layers.size());
    domain += above(statistics["info"][l]["domain"]) / static_cast<double>(layers.size());
    position += above(statistics["info"][l]["position"]) / static_cast<double>(layers.size());
  }
  if (layers.empty()) return says;
  if (says.empty()) {
    const Json& max = statistics["load"][busiest]["max"];
    says.push_back({"good", who + "no layer has collapsed. The least level one is " +
                                layers[busiest]["name"].get<std::string>() +
                                ", whose busiest expert has " +
                                fixed(max[0].is_null() ? 0.0 : max[0].get<double>(), 2) +
                                " times the mean load (by chance " +
                                fixed(max[3].is_null() ? 0.0 : max[3].get<double>(), 2) + ")."});
  }
  const Json& rate = statistics["repeat"][repeats]["first"][0];
  if (!rate[0].is_null()) {
    says.push_back({"", who + "neighbouring tokens choose the same first expert most often in " +
                            layers[repeats]["name"].get<std::string>() + ": " + percent(rate[0]) +
                            " of the time, by chance " + percent(rate[3]) + "."});
  }
  const double at_most = std::log2(layers[0]["experts"].get<double>());
  says.push_back(
      {"", who + "of at most " + fixed(at_most, 1) +
               " bits about the first expert, the token's id tells " + fixed(token, 2) +
               (model.tokens.domains.size() > 1 ? ", the text it is from " + fixed(domain, 2)
                                                : std::string()) +
               " and its position " + fixed(position, 2) +
               " (mean over layers, beyond what chance would show)."});
  const Json& loss = statistics["redundancy"];
  if (loss.size() > 1 && !loss[0][0].is_null() && !loss.back()[0].is_null()) {
    const auto bits = [](const Json& v) { return fixed(v.get<double>(), 2); };
    const Json& most = loss.back();
    says.push_back({"", who + "without its best experts, up to the share measured, a token takes " +
                            bits(most[0]) + " bits instead of " + bits(loss[0][0]) +
                            (most[3].is_null() ? std::string()
                                               : "; without as many random ones " + bits(most[3])) +
                            "."});
  }
  return says;
}

/// What two models have in common, layer by layer; null where a layer has another number of experts
/// in each.
inline void compare(const std::vector<Model>& models, const Options& how, Json& data,
                    Table& table) {
  const TracedTokens& a = models[0].tokens;
  const TracedTokens& b = models[1].tokens;
  const std::string both = models[0].name + " / " + models[1].name;
  double first = 0.0;
  double by_chance = 0.0;
  double layers = 0.0;
  for (std::size_t l = 0; l < a.layers.size(); ++l) {
    if (a.layers[l].experts != b.layers[l].experts) {
      data["overlap"].push_back(nullptr);
      continue;
    }
    const weir::RoutingOverlap overlap =
        weir::routing_overlap(a, a.layers[l], b, b.layers[l], how.bootstrap);
    table.add(both, "overlap_shared", a.layers[l].name, "all", "", overlap.shared);
    table.add(both, "overlap_first", a.layers[l].name, "all", "", overlap.first);
    data["overlap"].push_back({{"shared", of(overlap.shared)}, {"first", of(overlap.first)}});
    first += overlap.first.value;
    by_chance += overlap.first.chance;
    layers += 1.0;
  }
  if (layers == 0.0) return;
  data["says"].push_back(
      {"", "The two models choose the same first expert for " + fixed(100.0 * first / layers, 0) +
               " % of the tokens (by chance " + fixed(100.0 * by_chance / layers, 1) + " %)."});
}

/// Texts and statistics. What differs from page to page, "title" and "facts", is left to others.
/// \param models   One, or two that have seen the same tokens and have as many layers.
/// \param table    Gets a line for each number.
inline Json describe(const std::vector<Model>& models, const MakeText& make_text,
                     const Options& how, Table& table) {
  const TracedTokens& tokens = models[0].tokens;
  const std::map<Index, Index> vocabulary = vocabulary_of(tokens);
  Json data = {{"domains", tokens.domains},
               {"tokens", {{"text", Json::array()}, {"id", Json::array()}}},
               {"text", text_json(tokens, vocabulary)},
               {"masked", how.masked_shares},
               {"models", Json::array()},
               {"says", Json::array()}};
  for (const auto& [id, place] : vocabulary) {
    data["tokens"]["text"].push_back(text_of(make_text, id));
    data["tokens"]["id"].push_back(id);
  }
  const RouteLayout layout = route_layout(models, std::numeric_limits<std::size_t>::max());
  for (const Model& model : models) {
    Json json = Statistics(model, how, table).json(vocabulary);
    for (const Saying& saying : sayings(model, json)) {
      data["says"].push_back({saying.kind, saying.text});
    }
    json["text"] = routes_json(model.tokens, layout);
    data["models"].push_back(std::move(json));
  }
  if (models.size() > 1) compare(models, how, data, table);
  return data;
}

namespace detail {

/// Leaves out layers evenly, but the first, so that the others have at most so many bytes if there
/// are several. Each layer of each model has one place in its list.
inline void thin(const std::vector<Json*>& lists, std::size_t most_bytes) {
  std::vector<std::size_t> bytes;  // Of each layer, of all lists.
  for (const Json* const list : lists) {
    bytes.resize(std::max(bytes.size(), list->size()));
    for (std::size_t l = 0; l < list->size(); ++l) bytes[l] += (*list)[l].dump().size();
  }
  std::size_t stride = 1;
  const auto kept = [&] {
    std::size_t sum = 0;
    for (std::size_t l = 0; l < bytes.size(); l += stride) sum += bytes[l];
    return sum;
  };
  while (stride < bytes.size() && kept() > most_bytes) ++stride;
  for (Json* const list : lists) {
    for (std::size_t l = 0; l < list->size(); ++l) {
      if (l % stride != 0) (*list)[l] = nullptr;
    }
  }
}

/// The links with the most tokens, and how many of all they have.
inline void thin_flow(Json& flow, std::size_t most) {
  Json& links = flow["links"];
  if (links.size() <= most) return;
  links.erase(links.begin() + static_cast<std::ptrdiff_t>(most), links.end());
  double shown = 0.0;
  for (const Json& link : links) shown += link[2].get<double>();
  flow["shown"] = number(shown / flow["total"].get<double>());
}

}  // namespace detail

/// What `describe` has made of the models, small enough for a page: the details of a part of the
/// layers, matrices as codes, the largest links, and the routes that have room.
inline Json for_page(Json data, const std::vector<Model>& models, const Options& how) {
  const RouteLayout layout = route_layout(models, how.text_bytes);
  std::vector<Json*> together, position, top, domain;
  std::size_t flows = 0;
  for (std::size_t m = 0; m < models.size(); ++m) {
    Json& json = data["models"][m];
    for (Json* const matrices : {&json["together"], &json["position"]["share"]}) {
      for (Json& matrix : *matrices) {
        if (!matrix.is_null()) matrix = packed(matrix);
      }
    }
    together.push_back(&json["together"]);
    position.push_back(&json["position"]["share"]);
    top.push_back(&json["top"]);
    domain.push_back(&json["domain"]);
    flows += json["flow"].size();
    json["text"] = routes_json(models[m].tokens, layout);
  }
  detail::thin(together, how.matrix_bytes);
  detail::thin(position, how.position_bytes);
  detail::thin(top, how.top_bytes);
  detail::thin(domain, how.domain_bytes);
  const std::size_t most = std::max<std::size_t>(32, how.links / std::max<std::size_t>(1, flows));
  for (Json& model : data["models"]) {
    for (Json& flow : model["flow"]) detail::thin_flow(flow, most);
  }
  return data;
}

}  // namespace report
