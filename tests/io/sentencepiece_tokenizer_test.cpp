// SPDX-License-Identifier: MIT
#include <cstddef>
#include <fstream>
#include <random>
#include <sentencepiece_processor.h>
#include <sentencepiece_trainer.h>
#include <string>
#include <vector>

#include <weir/io/load_tokenizer.hpp>
#include <weir/io/sentencepiece_tokenizer.hpp>

#include "io/folder.hpp"
#include "support/catch.hpp"
#include "support/matrices.hpp"

namespace weir::sentencepiece_tokenizer_test {
using namespace weir::io;

namespace {

using Ids = std::vector<Index>;

class Sentences : public sentencepiece::SentenceIterator {
 public:
  bool done() const override { return next_ == kAll.size(); }
  void Next() override { ++next_; }
  const std::string& value() const override { return kAll[next_]; }
  sentencepiece::util::Status status() const override { return {}; }

 private:
  inline static const std::vector<std::string> kAll = {
      "the quick brown fox jumps over the lazy dog", "a router sends each token to its experts",
      "the experts that are chosen add up",          "wer reitet so spät durch Nacht und Wind",
      "the thing is that nothing is there",          "one two three four five six seven"};

  std::size_t next_ = 0;
};

/// Trains a model on a few sentences and writes it to `path`.
void train(const std::string& path, const std::string& settings) {
  Sentences sentences;
  std::string model;
  const auto status = sentencepiece::SentencePieceTrainer::Train(
      "--minloglevel=2 --hard_vocab_limit=false --num_threads=1 " + settings, &sentences, &model);
  REQUIRE(status.ok());
  std::ofstream(path, std::ios::binary) << model;
}

/// As Llama 2 and Mixtral have it.
const std::string kLlama =
    "--model_type=bpe --vocab_size=330 --byte_fallback=true --remove_extra_whitespaces=false "
    "--normalization_rule_name=identity --split_digits=true "
    "--user_defined_symbols=[INST],▁▁";

std::vector<std::string> texts() {
  const std::vector<std::string> parts = {"the ", "experts", " ", "  ", "é",      "你", "\n",
                                          "42",   "x",       "▁", "👍",  "[INST]", "ß",  "nothing"};
  std::vector<std::string> all = {"", " ", "   ", "the", " the", "  the "};
  std::mt19937 random(5);
  for (int i = 0; i < 200; ++i) {
    std::string text;
    for (auto left = random() % 15; left > 0; --left) text += parts[random() % parts.size()];
    all.push_back(text);
  }
  return all;
}

}  // namespace

TEST_CASE("SentencePieceTokenizer gives the tokens and texts of the library", "[io][tokenizer]") {
  const auto settings = GENERATE(as<std::string>{}, kLlama, kLlama + " --add_dummy_prefix=false",
                                 "--model_type=unigram --vocab_size=120",
                                 "--model_type=bpe --vocab_size=90 --character_coverage=1",
                                 "--model_type=unigram --vocab_size=100 --add_dummy_prefix=false");
  const test::Folder folder;
  const std::string path = (folder.path() / "tokenizer.model").string();
  train(path, settings);
  const SentencePieceTokenizer tokenizer = SentencePieceTokenizer::read(path);
  sentencepiece::SentencePieceProcessor library;
  REQUIRE(library.Load(path).ok());

  CHECK(tokenizer.vocab_size() == library.GetPieceSize());
  CHECK(tokenizer.bos() == 1);
  CHECK(tokenizer.eos() == 2);
  CHECK(tokenizer.id_of("</s>") == 2);
  CHECK(tokenizer.token_of(1) == "<s>");
  for (const std::string& text : texts()) {
    std::vector<int> expected = library.EncodeAsIds(text);
    Ids ids = tokenizer.encode(text);
    CHECK(tokenizer.decode(ids) == library.DecodeIds(expected));
    expected.insert(expected.begin(), 1);
    CHECK(ids == Ids(expected.begin(), expected.end()));
  }
}

TEST_CASE("SentencePieceTokenizer takes the model's numbers for beginning and end",
          "[io][tokenizer]") {
  const test::Folder folder;
  const std::string path = (folder.path() / "tokenizer.model").string();
  const auto made_with = [&](const std::string& numbers) {
    train(path, "--model_type=unigram --vocab_size=100 " + numbers);
    return SentencePieceTokenizer::read(path);
  };
  const SentencePieceTokenizer end_first = made_with("--eos_id=0 --bos_id=1 --unk_id=2");
  CHECK(end_first.eos() == 0);
  CHECK(end_first.bos() == 1);
  CHECK(end_first.encode("the").front() == 1);
  const SentencePieceTokenizer begin_first = made_with("--bos_id=0 --unk_id=1 --eos_id=2");
  CHECK(begin_first.bos() == 0);
  CHECK(begin_first.eos() == 2);
  CHECK(begin_first.encode("the").front() == 0);
  // As T5's, which has no beginning.
  const SentencePieceTokenizer no_begin = made_with("--pad_id=0 --eos_id=1 --unk_id=2 --bos_id=-1");
  CHECK_FALSE(no_begin.bos().has_value());
  CHECK(no_begin.eos() == 1);
  CHECK(no_begin.encode("the") == no_begin.encode("the", {.add_special = false}));
  const SentencePieceTokenizer no_end = made_with("--unk_id=0 --bos_id=1 --eos_id=-1");
  CHECK_FALSE(no_end.eos().has_value());
  CHECK(no_end.bos() == 1);
}

TEST_CASE("SentencePieceTokenizer decodes any tokens as the library does", "[io][tokenizer]") {
  const auto settings = GENERATE(as<std::string>{}, kLlama, "--model_type=unigram --vocab_size=120",
                                 "--model_type=unigram --vocab_size=120 --add_dummy_prefix=false",
                                 "--model_type=unigram --vocab_size=120 --add_dummy_prefix=false "
                                 "--remove_extra_whitespaces=false");
  const test::Folder folder;
  const std::string path = (folder.path() / "tokenizer.model").string();
  train(path, settings);
  const SentencePieceTokenizer tokenizer = SentencePieceTokenizer::read(path);
  sentencepiece::SentencePieceProcessor library;
  REQUIRE(library.Load(path).ok());

  std::mt19937 random(9);
  const int space = library.PieceToId("▁");
  for (int round = 0; round < 300; ++round) {
    std::vector<int> ids;
    for (auto left = random() % 8; left > 0; --left) {
      const int id = static_cast<int>(random() % static_cast<unsigned int>(tokenizer.vocab_size()));
      ids.push_back(random() % 3 == 0 || library.IsByte(id) ? space : id);
    }
    CHECK(tokenizer.decode(Ids(ids.begin(), ids.end())) == library.DecodeIds(ids));
  }
}

TEST_CASE("SentencePieceTokenizer reads special tokens only where it is asked to",
          "[io][tokenizer]") {
  const test::Folder folder;
  const std::string path = (folder.path() / "tokenizer.model").string();
  train(path, kLlama);
  const auto tokenizer = load_tokenizer(folder.path());
  const Ids the = tokenizer->encode("the", {.add_special = false});
  REQUIRE(the.size() == 1);
  CHECK(tokenizer->encode("the</s>the") == Ids{1, the[0], 2, the[0]});
  CHECK(tokenizer->encode("</s>", {.read_special = false}).size() > 2);
  CHECK(tokenizer->decode(Ids{1, the[0], 2}, Specials::kKeep) == "<s> the</s>");

  std::ofstream(folder.path() / "tokenizer_config.json")
      << R"({"tokenizer_class": "LlamaTokenizer", "bos_token": "<s>", "eos_token": "</s>",)"
         R"( "add_bos_token": false, "add_eos_token": true})";
  CHECK(load_tokenizer(folder.path())->encode("the") == Ids{the[0], 2});
}

TEST_CASE("SentencePieceTokenizer streams bytes of characters together", "[io][tokenizer]") {
  const test::Folder folder;
  const std::string path = (folder.path() / "tokenizer.model").string();
  train(path, kLlama);
  const SentencePieceTokenizer tokenizer = SentencePieceTokenizer::read(path);
  TextStream stream(tokenizer);
  CHECK(stream.add(*tokenizer.id_of("<0xE4>")).empty());
  CHECK(stream.add(*tokenizer.id_of("<0xBD>")).empty());
  CHECK(stream.add(*tokenizer.id_of("<0xA0>")) == "你");
  CHECK(stream.add(*tokenizer.id_of("▁")) == " ");
  CHECK(stream.flush().empty());
  CHECK(stream.add(*tokenizer.id_of("▁")).empty());
}

TEST_CASE("SentencePieceTokenizer says what it cannot read", "[io][tokenizer]") {
  const test::Folder folder;
  const std::string path = (folder.path() / "tokenizer.model").string();
  CHECK(test::message_of<FileError>([&] {
          SentencePieceTokenizer::read(path);
        }).starts_with(path + ": "));
  std::ofstream(path) << "no model";
  CHECK(test::message_of<FileError>([&] {
          SentencePieceTokenizer::read(path);
        }).starts_with(path + ": "));
}

}  // namespace weir::sentencepiece_tokenizer_test
