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

/// RFC 4648, with padding.
inline std::string base64(const std::vector<std::uint8_t>& bytes) {
  constexpr const char* kDigits =
      "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";
  std::string text;
  for (std::size_t i = 0; i < bytes.size(); i += 3) {
    std::uint32_t bits = std::uint32_t{bytes[i]} << 16U;
    if (i + 1 < bytes.size()) bits |= std::uint32_t{bytes[i + 1]} << 8U;
    if (i + 2 < bytes.size()) bits |= bytes[i + 2];
    text += kDigits[bits >> 18U];
    text += kDigits[bits >> 12U & 63U];
    text += i + 1 < bytes.size() ? kDigits[bits >> 6U & 63U] : '=';
    text += i + 2 < bytes.size() ? kDigits[bits & 63U] : '=';
  }
  return text;
}

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

/// Where the tokens went, small enough for a page: of each layer that is shown, and each of the
/// first k choices, the expert's number in one byte (two where there are more than 256), and
/// 126 times the weight's share, plus 128 if the expert was full; 255: no such choice. What does
/// not fit into `most_bytes` is left out: first choices beyond the second, then layers evenly.
inline Json routes_json(const TracedTokens& tokens, std::size_t most_bytes) {
  Index k = 1;
  Index experts = 1;
  for (const TracedLayer& layer : tokens.layers) {
    experts = std::max(experts, layer.experts);
    for (Index t = 0; t < layer.tokens(); ++t) k = std::max(k, layer.choices(t));
  }
  const std::size_t width = experts > 256 ? 3 : 2;
  const std::size_t layers = tokens.layers.size();
  const auto bytes = [&](Index choices) {
    return static_cast<std::size_t>(tokens.tokens() * choices) * width * 4 / 3 + 1;
  };
  while (k > 2 && bytes(k) * layers > most_bytes) --k;
  const std::size_t stride =
      std::max<std::size_t>(1, (bytes(k) * layers + most_bytes - 1) / most_bytes);

  Json json = {{"k", k}, {"layers", Json::array()}, {"data", Json::array()}};
  for (std::size_t l = 0; l < layers; l += stride) {
    const TracedLayer& layer = tokens.layers[l];
    std::vector<std::uint8_t> data;
    for (Index t = 0; t < tokens.tokens(); ++t) {
      float sum = 0.0F;
      for (Index a = layer.first(t); a < layer.last(t); ++a) sum += std::abs(layer.weight[a]);
      for (Index c = 0; c < k; ++c) {
        const bool chosen = c < layer.choices(t);
        const Index a = layer.first(t) + c;
        const Index expert = chosen ? layer.expert[a] : 0;
        const float share = chosen && sum > 0.0F ? std::abs(layer.weight[a]) / sum : 0.0F;
        data.push_back(static_cast<std::uint8_t>(expert & 255));
        if (width == 3) data.push_back(static_cast<std::uint8_t>(expert >> 8));
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
