// SPDX-License-Identifier: MIT
/// \file
/// What readers of files hand to BpeTokenizer.
#pragma once

#include <vector>

#include <weir/core/types.hpp>
#include <weir/io/added_tokens.hpp>
#include <weir/io/bpe_model.hpp>
#include <weir/io/text_pipeline.hpp>
#include <weir/io/token_table.hpp>

namespace weir::io {

/// Everything of which a BpeTokenizer consists.
struct BpeParts {
  TokenTable table;  ///< All tokens, also those that are added to the model's.
  BpeModel model;
  TextPipeline pipeline = {};
  AddedTokens added = {};                ///< Those that are found in the text as it is,
  AddedTokens added_to_normalised = {};  ///< and those that are found in normalised text.
  bool strips_space = false;  ///< Whether a space at the beginning of decoded text is removed.
  std::vector<Index> before = {};
  std::vector<Index> after = {};
};

}  // namespace weir::io
