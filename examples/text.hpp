// SPDX-License-Identifier: MIT
/// \file
/// Text as tokens, and tokens as text.
#pragma once

#include <functional>
#include <memory>
#include <sstream>
#include <stdexcept>
#include <string>
#include <vector>

#include <weir/core/types.hpp>

#include "bytes.hpp"
#include "escaped.hpp"

/// How text becomes tokens and the other way round.
class Text {
 public:
  Text() = default;
  Text(const Text&) = delete;
  Text& operator=(const Text&) = delete;
  virtual ~Text() = default;
  virtual std::vector<weir::Index> encode(const std::string& text, bool first) const = 0;
  /// What can be shown now that a further token is known.
  virtual std::string add(weir::Index id) = 0;
  virtual std::string flush() = 0;
};

/// For models over bytes.
class Bytes final : public Text {
 public:
  std::vector<weir::Index> encode(const std::string& text, bool /*first*/) const override {
    return to_ids(text);
  }
  std::string add(weir::Index id) override { return escaper_.add(static_cast<unsigned char>(id)); }
  std::string flush() override { return escaper_.flush(); }

 private:
  Escaper escaper_;
};

/// For models whose tokenizer is not at hand.
class Numbers final : public Text {
 public:
  std::vector<weir::Index> encode(const std::string& text, bool /*first*/) const override {
    std::istringstream words(text);
    std::vector<weir::Index> ids;
    for (weir::Index id = 0; words >> id;) ids.push_back(id);
    if (!words.eof()) throw std::runtime_error("'" + text + "' is no list of token ids");
    return ids;
  }
  std::string add(weir::Index id) override { return std::to_string(id) + " "; }
  std::string flush() override { return ""; }
};

/// Makes a Text that has seen no token yet.
using MakeText = std::function<std::unique_ptr<Text>()>;
