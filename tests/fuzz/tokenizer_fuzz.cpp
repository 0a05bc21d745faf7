// SPDX-License-Identifier: MIT
// libFuzzer: any bytes are refused with a FileError, or are a tokenizer whose tokens are in its
// vocabulary and whose text is UTF-8. Up to the first NUL they are a tokenizer.json, or a file of
// ranks where they do not begin with a brace; what follows is the text.
#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <string>
#include <string_view>
#include <vector>

#include <weir/io/bpe_tokenizer.hpp>

namespace {

using weir::io::BpeTokenizer;

constexpr std::size_t kMostText = 256;

BpeTokenizer tokenizer_of(std::string_view file) {
  if (file.starts_with('{')) return BpeTokenizer("file", file);
  return BpeTokenizer::from_ranks("file", file, {weir::io::patterns::kCl100k, {{"<|end|>", 1000}}});
}

void check(const BpeTokenizer& tokenizer, std::string_view text) {
  for (const bool reads : {false, true}) {
    const std::vector<weir::Index> ids = tokenizer.encode(text, {.read_special = reads});
    for (const weir::Index id : ids) {
      if (tokenizer.find(id) == nullptr) __builtin_trap();
    }
    const std::string decoded = tokenizer.decode(ids, weir::io::Specials::kKeep);
    if (decoded != weir::io::valid_utf8(decoded)) __builtin_trap();
  }
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) {
  const std::string_view input(reinterpret_cast<const char*>(data), size);
  const std::size_t end = std::min(input.find('\0'), size);
  try {
    const BpeTokenizer tokenizer = tokenizer_of(input.substr(0, end));
    check(tokenizer, input.substr(std::min(end + 1, size)).substr(0, kMostText));
    check(tokenizer, "The thing's 123\xC3\xA9\n\n  <|end|></s> \xE4\xBD\xA0\xFF");
  } catch (const weir::io::FileError&) {
  }
  return 0;
}
