// SPDX-License-Identifier: MIT
/// \file
/// The texts that train_lm learns from: as one, or mixed by weights that change over the training.
#pragma once

#include <algorithm>
#include <charconv>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <filesystem>
#include <ios>
#include <map>
#include <optional>
#include <sstream>
#include <stdexcept>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include <weir/core/types.hpp>
#include <weir/io/text_files.hpp>
#include <weir/model/text_mixture.hpp>

#include "byte_baseline.hpp"
#include "corpus.hpp"
#include "escaped.hpp"

/// What --text and --mix-at say.
struct TextChoice {
  struct Text {
    std::string name;  ///< A file, a folder, or a text that the program knows by this name.
    std::vector<std::string> paths;
  };
  struct Change {
    double share = 0.0;  ///< Of the training, after which these weights hold.
    std::vector<double> weights;
    std::string said;  ///< The option's value.
  };

  std::vector<Text> texts;      ///< A single one, of all paths, where none has a weight.
  std::vector<double> weights;  ///< One per text, or none.
  std::vector<Change> changes;

  bool mixed() const { return !weights.empty(); }

  /// The phases of a training of `steps` steps with `batch` windows in each.
  /// \throws std::runtime_error  if a change is outside of the training, or two fall on one step.
  std::vector<weir::MixturePhase> phases(weir::Index steps, weir::Index batch) const {
    std::vector<weir::MixturePhase> phases = {{0, weights}};
    for (const Change& change : changes) {
      const auto step =
          static_cast<weir::Index>(std::llround(change.share * static_cast<double>(steps)));
      if (step * batch <= phases.back().from || step >= steps) {
        throw std::runtime_error("--mix-at: " + change.said + " begins after step " +
                                 std::to_string(step) + " of " + std::to_string(steps) +
                                 ", expected a step between those of other changes, the beginning "
                                 "and the end");
      }
      phases.push_back({step * batch, change.weights});
    }
    return phases;
  }
};

namespace training_texts {

/// "NAME=WEIGHT" in its parts; nothing if it does not end in a number.
inline std::optional<std::pair<std::string, double>> name_and_weight(const std::string& said) {
  const std::size_t equals = said.rfind('=');
  if (equals == std::string::npos || equals == 0) return std::nullopt;
  const std::string number = said.substr(equals + 1);
  std::size_t read = 0;
  double weight = 0.0;
  try {
    weight = std::stod(number, &read);
  } catch (const std::logic_error&) {
    return std::nullopt;
  }
  if (read != number.size()) return std::nullopt;
  return std::pair(said.substr(0, equals), weight);
}

inline void expect(bool holds, const std::string& option, const std::string& said,
                   const std::string& expected) {
  if (!holds) throw std::runtime_error(option + ": " + said + ", expected " + expected);
}

inline void expect_weight(const std::string& option, const std::string& said, double weight) {
  expect(std::isfinite(weight) && weight >= 0.0, option, said, "a weight >= 0");
}

/// The shortest text that is this number again.
inline std::string shortest(double number) {
  char text[32];
  return {text, std::to_chars(text, text + sizeof text, number).ptr};
}

inline double sum_of(const std::vector<double>& weights) {
  double sum = 0.0;
  for (const double weight : weights) sum += weight;
  return sum;
}

/// One value of --mix-at, "SHARE:NAME=WEIGHT,NAME=WEIGHT".
inline TextChoice::Change change_of(const std::string& said,
                                    const std::vector<TextChoice::Text>& texts) {
  const std::string form = "SHARE:NAME=WEIGHT,NAME=WEIGHT with a share between 0 and 1";
  const std::size_t colon = said.find(':');
  expect(colon != std::string::npos, "--mix-at", said, form);
  const auto share = name_and_weight("share=" + said.substr(0, colon));
  expect(share && share->second > 0.0 && share->second < 1.0, "--mix-at", said, form);
  TextChoice::Change change{share->second, std::vector<double>(texts.size(), -1.0), said};
  std::istringstream items(said.substr(colon + 1));
  for (std::string item; std::getline(items, item, ',');) {
    const auto pair = name_and_weight(item);
    expect(pair.has_value(), "--mix-at", said, form);
    expect_weight("--mix-at", said, pair->second);
    const auto text = std::find_if(texts.begin(), texts.end(), [&](const TextChoice::Text& known) {
      return known.name == pair->first;
    });
    expect(text != texts.end(), "--mix-at", said,
           "names as in --text, which has no " + pair->first);
    double& weight = change.weights[static_cast<std::size_t>(text - texts.begin())];
    expect(weight < 0.0, "--mix-at", said, "each text once");
    weight = pair->second;
  }
  for (std::size_t i = 0; i < texts.size(); ++i) {
    expect(change.weights[i] >= 0.0, "--mix-at", said, "a weight for " + texts[i].name + ", too");
  }
  const double sum = sum_of(change.weights);
  expect(sum > 0.0 && std::isfinite(sum), "--mix-at", said, "a weight above 0");
  return change;
}

}  // namespace training_texts

/// Understands the values of --text, each PATH or each NAME=WEIGHT, and of --mix-at. What exists as
/// a whole is a path, whatever its name.
/// \param known     Names of texts, and where they are.
/// \throws std::runtime_error  that names the option and its value. No text is read.
inline TextChoice choose_texts(const std::vector<std::string>& text,
                               const std::vector<std::string>& mix_at,
                               const std::map<std::string, std::string>& known) {
  using namespace training_texts;
  TextChoice choice;
  std::string without_weight;
  const auto paths_of = [&](const std::string& name) -> std::vector<std::string> {
    const auto found = known.find(name);
    if (found == known.end() || std::filesystem::exists(name)) return {name};
    return split_paths(found->second);
  };
  for (const std::string& said : text) {
    const auto pair = std::filesystem::exists(said) ? std::nullopt : name_and_weight(said);
    if (!pair) {
      without_weight = said;
      choice.texts.push_back({said, paths_of(said)});
      continue;
    }
    expect_weight("--text", said, pair->second);
    for (const TextChoice::Text& other : choice.texts) {
      expect(other.name != pair->first, "--text", said, "each text once");
    }
    choice.texts.push_back({pair->first, paths_of(pair->first)});
    choice.weights.push_back(pair->second);
  }
  if (choice.weights.empty()) {
    expect(mix_at.empty(), "--mix-at", mix_at.empty() ? "" : mix_at[0],
           "texts with weights, --text NAME=WEIGHT");
    TextChoice::Text all{"the text", {}};
    for (const TextChoice::Text& one : choice.texts) {
      all.paths.insert(all.paths.end(), one.paths.begin(), one.paths.end());
    }
    choice.texts = {all};
    return choice;
  }
  expect(without_weight.empty(), "--text", without_weight,
         "a weight, " + without_weight + "=WEIGHT, as the other texts have");
  const double sum = sum_of(choice.weights);
  expect(sum > 0.0 && std::isfinite(sum), "--text", text.back(), "a weight above 0");
  for (const std::string& said : mix_at) choice.changes.push_back(change_of(said, choice.texts));
  std::stable_sort(choice.changes.begin(), choice.changes.end(),
                   [](const auto& a, const auto& b) { return a.share < b.share; });
  return choice;
}

/// A text on the disk, in what is learnt from and what is set aside.
struct TrainingText {
  std::string name;
  weir::io::TextFiles train, validation;
};

/// Finds the files. Memory holds their names, not what is in them.
/// \throws std::runtime_error  if there is no such file, or a text is too short for windows of
///                             `context` bytes.
inline std::vector<TrainingText> open_texts(const TextChoice& choice, weir::Index context) {
  std::vector<TrainingText> texts;
  for (const TextChoice::Text& text : choice.texts) {
    for (const std::string& path : text.paths) {
      if (std::filesystem::exists(path)) continue;
      throw std::runtime_error("--text: no such file or folder: " + path);
    }
    const std::vector<std::filesystem::path> files = files_in(text.paths);
    auto [train, validation] = weir::io::TextFiles(files).without_last(kSetAside);
    if (validation.size() < context + 2) {
      throw std::runtime_error("--text: " + text.name + " is too short: 5 % of it are " +
                               std::to_string(validation.size()) + " bytes, less than --context");
    }
    texts.push_back({text.name, std::move(train), std::move(validation)});
  }
  return texts;
}

/// What a checkpoint remembers about the mixture, so that a resumed run reads the same windows.
inline std::map<std::string, std::string> notes_of(const TextChoice& choice,
                                                   const std::vector<TrainingText>& texts) {
  if (!choice.mixed()) return {{"text", "without weights"}};
  const auto weights_of = [&](const std::vector<double>& weights) {
    std::string said;
    for (std::size_t i = 0; i < weights.size(); ++i) {
      said += (i > 0 ? "," : "") + escaped(choice.texts[i].name) + "=" +
              training_texts::shortest(weights[i]);
    }
    return said;
  };
  std::map<std::string, std::string> notes = {{"text", weights_of(choice.weights)}};
  std::string changes;
  for (const TextChoice::Change& change : choice.changes) {
    changes += (changes.empty() ? "" : " ") + training_texts::shortest(change.share) + ":" +
               weights_of(change.weights);
  }
  notes["mix-at"] = changes.empty() ? "nothing" : changes;
  for (const TrainingText& text : texts) {
    std::ostringstream said;
    said << text.train.size() << " bytes, " << std::hex << text.train.fingerprint();
    notes["text " + escaped(text.name)] = said.str();
  }
  return notes;
}

/// Byte models of what the texts have to learn from, up to 128 MiB in total.
/// \return         The models, and whether they have seen everything.
inline std::pair<ByteBaseline, bool> count_bytes(const std::vector<TrainingText>& texts) {
  constexpr weir::Index kMost = weir::Index{1} << 27;
  constexpr weir::Index kPiece = weir::Index{1} << 20;
  std::pair<ByteBaseline, bool> counted = {{}, true};
  std::string piece;
  for (const TrainingText& text : texts) {
    const weir::Index size =
        std::min(text.train.size(), kMost / static_cast<weir::Index>(texts.size()));
    counted.second = counted.second && size == text.train.size();
    for (weir::Index begin = 0; begin < size; begin += kPiece) {
      const weir::Index before = std::min<weir::Index>(begin, ByteBaseline::kHighest);
      piece.resize(static_cast<std::size_t>(before + std::min(kPiece, size - begin)));
      text.train.read(begin - before, piece);
      counted.first.add(piece, static_cast<std::size_t>(before));
    }
  }
  return counted;
}
