// SPDX-License-Identifier: MIT
/// \file
/// The texts of a report: which tokens there are, and where each went.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <map>
#include <memory>
#include <nlohmann/json.hpp>
#include <string>
#include <vector>

#include <weir/analysis/traced_tokens.hpp>

#include "report_data.hpp"
#include "text.hpp"

namespace report {

/// What can be shown of a token, with the space before it if it has one. A part of a character is
/// shown as bytes.
inline std::string text_of(const MakeText& make_text, Index id) {
  const std::unique_ptr<Text> text = make_text();
  const std::vector<Index> before = text->encode("1", false);
  for (const Index b : before) text->add(b);
  return text->add(id) + text->flush();
}

/// The different ids of the tokens, ascending, and the place of each.
inline std::map<Index, Index> vocabulary_of(const TracedTokens& tokens) {
  std::map<Index, Index> vocabulary;
  for (const Index id : tokens.id) vocabulary[id] = 0;
  Index place = 0;
  for (auto& [id, at] : vocabulary) at = place++;
  return vocabulary;
}

/// The tokens in order: their places in the vocabulary, positions, and sequences as
/// [domain, begin, end].
inline Json text_json(const TracedTokens& tokens, const std::map<Index, Index>& vocabulary) {
  Json json = {{"ids", Json::array()}, {"position", tokens.position}, {"sequences", Json::array()}};
  for (const Index id : tokens.id) json["ids"].push_back(vocabulary.at(id));
  for (const TracedTokens::Sequence& s : tokens.sequences) {
    json["sequences"].push_back({s.domain, s.begin, s.end});
  }
  return json;
}

/// Which routes have room on a page, the same of all models on it.
struct RouteLayout {
  Index k = 1;             ///< Choices of a token: of more, the first ones are shown.
  std::size_t width = 2;   ///< Bytes of a choice.
  std::size_t stride = 1;  ///< One layer of so many is shown.
};

/// The layout of routes that fit into `most_bytes`: choices beyond the second are left out first,
/// then layers evenly, but one.
inline RouteLayout route_layout(const std::vector<Model>& models, std::size_t most_bytes) {
  RouteLayout layout;
  std::size_t layers = 1;
  for (const Model& model : models) {
    layers = std::max(layers, model.tokens.layers.size());
    for (const TracedLayer& layer : model.tokens.layers) {
      if (layer.experts > 256) layout.width = 3;
      for (Index t = 0; t < layer.tokens(); ++t) layout.k = std::max(layout.k, layer.choices(t));
    }
  }
  const auto bytes = [&] {
    std::size_t sum = 0;
    for (const Model& model : models) {
      const auto tokens = static_cast<std::size_t>(model.tokens.tokens());
      const std::size_t of_layer = tokens * static_cast<std::size_t>(layout.k) * layout.width;
      const std::size_t shown = (model.tokens.layers.size() + layout.stride - 1) / layout.stride;
      sum += shown * ((of_layer + 2) / 3 * 4);
    }
    return sum;
  };
  while (layout.k > 2 && bytes() > most_bytes) --layout.k;
  while (layout.stride < layers && bytes() > most_bytes) ++layout.stride;
  return layout;
}

/// Where the tokens went: of each layer that is shown, and each of the first k choices, the
/// expert's number in one byte (two where there are more than 256), and 126 times the weight's
/// share, plus 128 if the expert was full; 255: no such choice.
inline Json routes_json(const TracedTokens& tokens, const RouteLayout& layout) {
  Json json = {{"k", layout.k}, {"layers", Json::array()}, {"data", Json::array()}};
  for (std::size_t l = 0; l < tokens.layers.size(); l += layout.stride) {
    const TracedLayer& layer = tokens.layers[l];
    std::vector<std::uint8_t> data;
    for (Index t = 0; t < tokens.tokens(); ++t) {
      float sum = 0.0F;
      for (Index a = layer.first(t); a < layer.last(t); ++a) sum += std::abs(layer.weight[a]);
      for (Index c = 0; c < layout.k; ++c) {
        const bool chosen = c < layer.choices(t);
        const Index a = layer.first(t) + c;
        const Index expert = chosen ? layer.expert[a] : 0;
        const float share = chosen && sum > 0.0F ? std::abs(layer.weight[a]) / sum : 0.0F;
        data.push_back(static_cast<std::uint8_t>(expert & 255));
        if (layout.width == 3) data.push_back(static_cast<std::uint8_t>(expert >> 8));
        const int code = static_cast<int>(std::lround(126.0F * share));
        data.push_back(static_cast<std::uint8_t>(!chosen              ? 255
                                                 : layer.kept[a] != 0 ? code
                                                                      : 128 + code));
      }
    }
    json["layers"].push_back(l);
    json["data"].push_back(base64(data));
  }
  return json;
}

}  // namespace report
