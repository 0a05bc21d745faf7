// SPDX-License-Identifier: MIT
/// \file
/// A report for the terminal.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdlib>
#include <iostream>
#include <stdexcept>
#include <string>
#include <vector>

#include "progress.hpp"
#include "report_data.hpp"
#include "report_text.hpp"

namespace report {

/// A colour of the 256 that terminals have, bright enough for black text.
inline int terminal_colour(Index expert) {
  constexpr int kColours[] = {117, 215, 150, 218, 229, 183, 123, 209,
                              192, 147, 222, 159, 180, 114, 211, 153};
  return kColours[expert % 16];
}

/// "12.3 % (10.1 to 14.0, by chance 12.5)", or the same with two digits and no percent.
/// \param e        [value, low, high, chance]
inline std::string stated(const Json& e, bool percent) {
  if (e[0].is_null()) return "-";
  const auto number = [&](const Json& v) {
    return percent ? fixed(100.0 * v.get<double>(), 1) : fixed(v.get<double>(), 2);
  };
  std::string text = number(e[0]) + (percent ? " %" : "");
  if (!e[1].is_null()) text += " (" + number(e[1]) + " to " + number(e[2]);
  if (!e[3].is_null()) text += (e[1].is_null() ? " (" : ", ") + ("by chance " + number(e[3]));
  return text + (e[1].is_null() && e[3].is_null() ? "" : ")");
}

/// Number i of what `lists_of` has made.
inline Json estimate_at(const Json& lists, std::size_t i) {
  return {lists["value"][i], lists["low"][i], lists["high"][i], lists["chance"][i]};
}

/// The place of the value that is most times its chance; that of none if there is none.
/// \param counts   Whether the value at a place is looked at.
template <class Counts>
std::size_t largest_to_chance(const Json& lists, Counts&& counts) {
  std::size_t best = lists["value"].size();
  double most = 0.0;
  for (std::size_t i = 0; i < lists["value"].size(); ++i) {
    if (!counts(i) || lists["value"][i].is_null() || lists["chance"][i].is_null()) continue;
    const auto chance = lists["chance"][i].get<double>();
    const double times = chance > 0.0 ? lists["value"][i].get<double>() / chance : 0.0;
    if (times <= most) continue;
    most = times;
    best = i;
  }
  return best;
}

inline void print_line(const std::string& what, const std::string& value) {
  std::cout << "    " << what << std::string(what.size() < 38 ? 38 - what.size() : 0, ' ') << ' '
            << value << '\n';
}

/// What is most unlike chance of a layer's experts together, by position, and in the next layer.
inline void print_pairs(const Json& model, std::size_t l) {
  const auto experts = model["layers"][l]["experts"].get<std::size_t>();
  const Json& together = model["together"][l];
  if (!together.is_null()) {
    const std::size_t i =
        largest_to_chance(together, [&](std::size_t at) { return at / experts != at % experts; });
    if (i < experts * experts) {
      print_line("of expert " + std::to_string(i / experts) + "'s tokens also at " +
                     std::to_string(i % experts) + ":",
                 stated(estimate_at(together, i), true));
    }
  }
  const Json& position = model["position"];
  const Json& share = position["share"][l];
  const std::size_t i = largest_to_chance(share, [](std::size_t) { return true; });
  if (i < share["value"].size()) {
    print_line("expert " + std::to_string(i % experts) + " at positions from " +
                   position["from"][i / experts].dump() + ":",
               stated(estimate_at(share, i), true));
  }
  if (l < model["flow"].size()) {
    print_line("the next expert, guessed from this:", stated(model["flow"][l]["known"], true));
  }
}

inline void print_layer(const Json& model, std::size_t l) {
  const Json& load = model["load"][l];
  std::vector<double> share;
  for (const Json& e : load["share"]) share.push_back(e[0].is_null() ? 0.0 : e[0].get<double>());
  std::cout << "  " << model["layers"][l]["name"].get<std::string>() << "  load "
            << spark_line(share) << '\n';
  print_line("largest load over mean:", stated(load["max"], false));
  print_line("variation of the load (CV):", stated(load["cv"], false));
  print_line("entropy of the router, nats:", stated(load["entropy"], false));
  if (load["dropped"][0].is_number() && load["dropped"][0].get<double>() > 0.0) {
    const Json& drops = model["position"]["drop"][l];
    print_line("dropped:", stated(load["dropped"], true));
    print_line("  at the first positions:", stated(drops.front(), true));
    print_line("  at the last positions:", stated(drops.back(), true));
  }
  print_line("same first expert as the token before:",
             stated(model["repeat"][l]["first"][0], true));
  print_line("any expert in common with it:", stated(model["repeat"][l]["any"][0], true));
  print_line("bits about the first expert, token id:", stated(model["info"][l]["token"], false));
  print_line("  its text:", stated(model["info"][l]["domain"], false));
  print_line("  its position:", stated(model["info"][l]["position"], false));
  print_pairs(model, l);
}

/// \param masked   Shares of the experts.
/// \param losses   Of each share; none if they were not measured.
inline void print_redundancy(const Json& masked, const Json& losses) {
  const auto bits = [](const Json& v) { return v.is_null() ? "-" : fixed(v.get<double>(), 3); };
  for (std::size_t i = 0; i < losses.size(); ++i) {
    std::cout << "  without the best " << padded(fixed(100.0 * masked[i].get<double>(), 1), 4)
              << " % of experts: " << bits(losses[i][0]) << " bits (" << bits(losses[i][1])
              << " to " << bits(losses[i][2]) << "), without random ones " << bits(losses[i][3])
              << '\n';
  }
}

/// The beginning of each text, each token with the colour of its first expert, or behind the
/// expert's number where there are no colours.
inline void print_text(const Model& model, const MakeText& make_text, Index layer, bool colours) {
  constexpr Index kShown = 240;
  const TracedTokens& tokens = model.tokens;
  const TracedLayer& at = tokens.layers[static_cast<std::size_t>(layer)];
  std::vector<bool> shown(tokens.domains.size(), false);
  std::cout << "\nfirst experts in " << at.name << ":";
  for (Index e = 0; colours && e < at.experts; ++e) {
    std::cout << " \033[30;48;5;" << terminal_colour(e) << "m " << e << " \033[0m";
  }
  std::cout << '\n';
  for (const TracedTokens::Sequence& s : tokens.sequences) {
    const auto domain = static_cast<std::size_t>(s.domain);
    if (shown[domain]) continue;
    shown[domain] = true;
    std::cout << "---- " << escaped(tokens.domains[domain]) << '\n';
    for (Index t = s.begin; t < std::min(s.end, s.begin + kShown); ++t) {
      const std::string text = text_of(make_text, tokens.id[t]);
      const Index e = at.first_choice(t);
      if (!colours) {
        std::cout << text << '{' << e << '}';
      } else if (text == "\n") {
        std::cout << '\n';
      } else {
        std::cout << "\033[30;48;5;" << terminal_colour(e) << 'm' << text << "\033[0m";
      }
    }
    std::cout << '\n';
  }
}

/// \param data     What the page would have.
/// \throws std::runtime_error  if there is no such layer.
inline void print(const Json& data, const std::vector<Model>& models, const MakeText& make_text,
                  Index layer, bool terminal) {
  const auto layers = static_cast<Index>(models[0].tokens.layers.size());
  if (layer >= layers) {
    throw std::runtime_error("--layer: " + std::to_string(layer) + ", expected less than " +
                             std::to_string(layers) + ", the layers with experts");
  }
  std::cout << data["title"].get<std::string>() << '\n';
  for (const Json& fact : data["facts"]) {
    std::cout << "  " << fact[0].get<std::string>() << ": " << fact[1].get<std::string>() << '\n';
  }
  for (const Json& saying : data["says"]) {
    std::cout << (saying[0] == "bad" ? "! " : "* ") << saying[1].get<std::string>() << '\n';
  }
  for (const Json& model : data["models"]) {
    std::cout << '\n' << model["name"].get<std::string>() << '\n';
    for (std::size_t l = 0; l < model["layers"].size(); ++l) print_layer(model, l);
    print_redundancy(data["masked"], model["redundancy"]);
  }
  const bool colours = terminal && std::getenv("NO_COLOR") == nullptr;
  for (const Model& model : models) {
    if (models.size() > 1) std::cout << '\n' << model.name;
    print_text(model, make_text, layer, colours);
  }
}

}  // namespace report
