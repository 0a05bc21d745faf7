// SPDX-License-Identifier: MIT
/// \file
/// The tokens of a vocabulary.
#pragma once

#include <cstddef>
#include <functional>
#include <optional>
#include <string>
#include <string_view>
#include <unordered_map>
#include <utility>
#include <vector>

#include <weir/core/types.hpp>

namespace weir::io {

/// One token of a vocabulary.
struct Token {
  std::string name;          ///< Its name in the file, such as "Ġthe" for " the".
  std::string bytes;         ///< What it adds to a text; not always whole characters.
  bool is_special = false;   ///< Whether it stands for no text, such as the beginning of one.
  bool begins_word = false;  ///< Whether it begins with a space that not each text has.
};

/// Tokens by id and by name. Not each id up to the largest has to have a token.
class TokenTable {
 public:
  /// One more than the largest id.
  Index size() const { return static_cast<Index>(tokens_.size()); }

  /// Nothing for an id without a token.
  const Token* find(Index id) const {
    if (id < 0 || id >= size()) return nullptr;
    const auto& token = tokens_[static_cast<std::size_t>(id)];
    return token ? &*token : nullptr;
  }

  std::optional<Index> id_of(std::string_view name) const {
    const auto found = ids_.find(name);
    if (found == ids_.end()) return std::nullopt;
    return found->second;
  }

  /// \param id       At least 0. Memory grows with the largest one.
  /// \return         Whether neither the id nor the name had been there.
  bool add(Index id, Token token) {
    if (find(id) != nullptr || !ids_.emplace(token.name, id).second) return false;
    if (id >= size()) tokens_.resize(static_cast<std::size_t>(id) + 1);
    tokens_[static_cast<std::size_t>(id)] = std::move(token);
    return true;
  }

  /// Makes a token special that has not been.
  void mark_special(Index id) { tokens_[static_cast<std::size_t>(id)]->is_special = true; }

 private:
  struct Hash {
    using is_transparent = void;  // NOLINT(readability-identifier-naming)
    std::size_t operator()(std::string_view text) const {
      return std::hash<std::string_view>()(text);
    }
  };

  std::vector<std::optional<Token>> tokens_;
  std::unordered_map<std::string, Index, Hash, std::equal_to<>> ids_;
};

}  // namespace weir::io
