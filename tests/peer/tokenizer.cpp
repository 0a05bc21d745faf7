// SPDX-License-Identifier: MIT
// What weir makes of texts, for tokenizer.mjs to compare with what other libraries make of them.
//
//     peer_tokenizer json FILE < TEXTS                    a tokenizer.json
//     peer_tokenizer ranks FILE MODEL SPECIAL < TEXTS     a file of ranks, with the pattern of
//                                                         MODEL; SPECIAL is {"name": id, ...}
//     peer_tokenizer pattern MODEL                        that pattern
//     peer_tokenizer unassigned                           the characters that its Unicode does not
//                                                         have, in one text
//
// TEXTS is a JSON list of texts. Writes, one a line, {"ids": [...], "text": "decoded"}.
#include <cstdint>
#include <exception>
#include <iostream>
#include <map>
#include <nlohmann/json.hpp>
#include <stdexcept>
#include <string>
#include <vector>

#include <weir/io/bpe_tokenizer.hpp>
#include <weir/io/regex.hpp>
#include <weir/io/token_ranks.hpp>

namespace {

std::string pattern_of(const std::string& model) {
  const std::map<std::string, std::string> patterns = {{"gpt2", weir::io::patterns::kGpt2},
                                                       {"cl100k_base", weir::io::patterns::kCl100k},
                                                       {"o200k_base", weir::io::patterns::kO200k},
                                                       {"kimi_k2", weir::io::patterns::kKimiK2}};
  return patterns.at(model);
}

weir::io::BpeTokenizer tokenizer_of(const std::vector<std::string>& arguments) {
  if (arguments.size() == 2 && arguments[0] == "json") {
    return weir::io::BpeTokenizer::read(arguments[1]);
  }
  if (arguments.size() == 4 && arguments[0] == "ranks") {
    weir::io::RanksConfig config{.pattern = pattern_of(arguments[2])};
    const auto special = nlohmann::json::parse(arguments[3]);
    for (const auto& [name, id] : special.items()) {
      config.special.emplace_back(name, id.get<weir::Index>());
    }
    return weir::io::BpeTokenizer::from_ranks(arguments[1], config);
  }
  throw std::invalid_argument("peer_tokenizer: expected json FILE or ranks FILE MODEL SPECIAL");
}

std::string unassigned_characters() {
  std::string all;
  for (std::uint32_t code = 0x80; code < 0x110000; ++code) {
    if (code >= 0xD800 && code < 0xE000) continue;
    const auto tail = [&](unsigned int shift) {
      return static_cast<char>(0x80U | (code >> shift & 0x3FU));
    };
    if (code < 0x800) {
      all += {static_cast<char>(0xC0U | code >> 6U), tail(0)};
    } else if (code < 0x10000) {
      all += {static_cast<char>(0xE0U | code >> 12U), tail(6), tail(0)};
    } else {
      all += {static_cast<char>(0xF0U | code >> 18U), tail(12), tail(6), tail(0)};
    }
  }
  std::string unassigned;
  for (const auto& [begin, end] : weir::io::Regex("peer_tokenizer", "\\p{Cn}").matches(all)) {
    unassigned += all.substr(begin, end - begin);
  }
  return unassigned;
}

}  // namespace

int main(int argc, char** argv) {
  try {
    if (argc == 2 && std::string(argv[1]) == "unassigned") {
      std::cout << unassigned_characters();
      return 0;
    }
    if (argc == 3 && std::string(argv[1]) == "pattern") {
      std::cout << pattern_of(argv[2]);
      return 0;
    }
    const auto tokenizer = tokenizer_of({argv + 1, argv + argc});
    for (const auto& text : nlohmann::json::parse(std::cin)) {
      const auto ids = tokenizer.encode(text.get<std::string>());
      std::cout << nlohmann::json{{"ids", ids}, {"text", tokenizer.decode(ids)}}.dump() << '\n';
    }
  } catch (const std::exception& error) {
    std::cerr << error.what() << '\n';
    return 1;
  }
  return 0;
}
