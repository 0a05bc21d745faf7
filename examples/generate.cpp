// SPDX-License-Identifier: MIT
// Lets a model from disk write: one that train_lm saved, one in a folder as Hugging Face has them,
// or a GGUF file as llama.cpp has them. It continues one prompt as it is written, several at once,
// or what you type line by line.
#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <exception>
#include <filesystem>
#include <functional>
#include <iostream>
#include <memory>
#include <optional>
#include <sstream>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include <weir/core/cache_storage.hpp>
#include <weir/core/parallel.hpp>
#include <weir/core/storage.hpp>
#include <weir/io/checkpoint.hpp>
#include <weir/io/gguf.hpp>
#include <weir/io/gguf_model.hpp>
#include <weir/io/json_object.hpp>
#include <weir/io/pretrained.hpp>
#if defined(WEIR_TEXT)
#include <weir/io/load_tokenizer.hpp>
#endif
#include <weir/model/generate.hpp>

#include "byte_decoder.hpp"
#include "bytes.hpp"
#include "command_line.hpp"
#include "escaped.hpp"
#include "interrupt.hpp"
#include "progress.hpp"

namespace {

namespace fs = std::filesystem;
namespace io = weir::io;
using weir::Index;
using Decoder = weir::Decoder<float>;

struct Options {
  Decoder::State new_state() const {
    return Decoder::State(weir::cache_storage_named(cache).value());
  }

  std::string model;
  std::vector<std::string> prompts;
  std::vector<std::string> ids;
  bool chat = false;
  Index tokens = 200;
  weir::Sampling sampling = {.temperature = 0.8, .min_p = 0.05};
  std::uint64_t seed = 1;
  std::string storage = "packed";
  std::string cache = "full";
  double expert_memory = 0.0;
  Index longest_text = 0;
  int threads = weir::hardware_threads();
};

/// How text becomes tokens and the other way round.
class Text {
 public:
  virtual ~Text() = default;
  virtual std::vector<Index> encode(const std::string& text, bool first) const = 0;
  /// What can be shown now that a further token is known.
  virtual std::string add(Index id) = 0;
  virtual std::string flush() = 0;
};

/// For models over bytes.
class Bytes final : public Text {
 public:
  std::vector<Index> encode(const std::string& text, bool /*first*/) const override {
    return to_ids(text);
  }
  std::string add(Index id) override { return escaper_.add(static_cast<unsigned char>(id)); }
  std::string flush() override { return escaper_.flush(); }

 private:
  Escaper escaper_;
};

/// For models whose tokenizer is not at hand.
class Numbers final : public Text {
 public:
  std::vector<Index> encode(const std::string& text, bool /*first*/) const override {
    std::istringstream words(text);
    std::vector<Index> ids;
    for (Index id = 0; words >> id;) ids.push_back(id);
    if (!words.eof()) throw std::runtime_error("'" + text + "' is no list of token ids");
    return ids;
  }
  std::string add(Index id) override { return std::to_string(id) + " "; }
  std::string flush() override { return ""; }
};

#if defined(WEIR_TEXT)
/// For models with a tokenizer.
class Tokens final : public Text {
 public:
  explicit Tokens(std::shared_ptr<const io::Tokenizer> tokenizer)
      : tokenizer_(std::move(tokenizer)), stream_(*tokenizer_) {}

  std::vector<Index> encode(const std::string& text, bool first) const override {
    return tokenizer_->encode(text, {.add_special = first});
  }
  std::string add(Index id) override { return escaped_part(stream_.add(id)); }
  std::string flush() override { return escaped_part(stream_.flush()) + escaper_.flush(); }

 private:
  std::string escaped_part(const std::string& text) {
    std::string shown;
    for (const char byte : text) shown += escaper_.add(static_cast<unsigned char>(byte));
    return shown;
  }

  std::shared_ptr<const io::Tokenizer> tokenizer_;
  io::TextStream stream_;
  Escaper escaper_;
};
#endif

/// A model, and how to talk with it.
struct Writer {
  Decoder model;
  std::function<std::unique_ptr<Text>()> make_text;
  std::vector<Index> ends = {};  ///< Tokens that end a text.
  std::shared_ptr<io::ExpertStore<float>> experts = {};
};

/// A checkpoint that train_lm has saved.
Writer load_trained(const fs::path& checkpoint, weir::Storage storage) {
  weir::Rng rng = weir::Rng::unset();
  Decoder model = make_byte_decoder(config_of(io::read_notes(checkpoint)), rng);
  io::load_weights(checkpoint / "model.safetensors", model);
  weir::set_storage(model, storage);
  return {std::move(model), [] { return std::make_unique<Bytes>(); }};
}

/// The tokens that end a text, as the configuration of the model names them.
std::vector<Index> ends_of(const fs::path& folder) {
  for (const char* const name : {"generation_config.json", "config.json"}) {
    if (!fs::exists(folder / name)) continue;
    const auto json = io::JsonObject::read((folder / name).string(), std::size_t{16} << 20U);
    if (!json.has("eos_token_id")) continue;
    const auto& value = json.at("eos_token_id");
    return value.is_array() ? value.get<std::vector<Index>>()
                            : std::vector<Index>{json.count("eos_token_id")};
  }
  return {};
}

/// The tokens that end a text, as a GGUF file names them.
std::vector<Index> ends_in(const io::Gguf& file) {
  std::vector<Index> ends;
  for (const char* const key : {"tokenizer.ggml.eos_token_id", "tokenizer.ggml.eot_token_id"}) {
    if (file.has(key)) ends.push_back(static_cast<Index>(file.integer(key)));
  }
  return ends;
}

/// A model of others: a folder, or a GGUF file. The tokenizer is that of the folder. The one within
/// a GGUF file is not used, since such files name the rules by which they divide text into words
/// without saying them.
Writer load_published(const Options& options, weir::Storage storage) {
  constexpr double kMega = 1e6;
  const fs::path path = options.model;
  const bool is_gguf = path.extension() == ".gguf";
  const io::LoadConfig how = {
      .storage = storage,
      .expert_bytes = static_cast<std::size_t>(kMega * options.expert_memory),
      .longest_text = options.longest_text};
  auto loaded = is_gguf ? io::load_gguf<float>(path, how) : io::load_pretrained<float>(path, how);
  Writer writer{std::move(loaded.model), [] { return std::make_unique<Numbers>(); },
                is_gguf ? ends_in(io::Gguf::read(path.string())) : ends_of(path), loaded.experts};
  const fs::path folder = is_gguf ? path.parent_path() : path;
  const bool has_tokenizer =
      fs::exists(folder / "tokenizer.json") || fs::exists(folder / "tokenizer.model");
  if (!options.ids.empty() || !has_tokenizer) return writer;
#if defined(WEIR_TEXT)
  const std::shared_ptr<const io::Tokenizer> tokenizer = io::load_tokenizer(folder);
  if (writer.ends.empty() && tokenizer->eos()) writer.ends = {*tokenizer->eos()};
  writer.make_text = [tokenizer] { return std::make_unique<Tokens>(tokenizer); };
#endif
  return writer;
}

Writer load(const Options& options) {
  const weir::Storage storage = weir::storage_named(options.storage).value();
  const fs::path path = options.model;
  if (path.extension() == ".gguf" || fs::exists(path / "config.json")) {
    return load_published(options, storage);
  }
  const auto checkpoint = io::latest_checkpoint(options.model);
  if (!checkpoint) {
    throw std::runtime_error(options.model + ": there is neither config.json nor a checkpoint");
  }
  return load_trained(*checkpoint, storage);
}

std::string rate_of(Index tokens, double seconds) {
  return std::to_string(tokens) + " tokens, " +
         fixed(static_cast<double>(tokens) / std::max(seconds, 1e-9), 1) + " tokens/s";
}

/// Continues one prompt and shows each token as soon as it is known.
/// \return         How many tokens were written.
Index write_on(const Writer& writer, const Options& options, Text& text,
               const std::vector<Index>& prompt, weir::Rng& rng, Decoder::State& state) {
  const Interrupt interrupt;
  weir::Until until{.count = options.tokens, .tokens = writer.ends};
  until.on_token = [&](Index id) {
    if (std::find(writer.ends.begin(), writer.ends.end(), id) == writer.ends.end()) {
      std::cout << text.add(id) << std::flush;
    }
    return !Interrupt::happened();
  };
  const auto written = weir::generate(writer.model, prompt, until, options.sampling, rng, state);
  std::cout << text.flush() << '\n';
  return static_cast<Index>(written.tokens.size());
}

/// Continues one prompt.
void write_one(const Writer& writer, const Options& options, const std::string& prompt) {
  const auto text = writer.make_text();
  const std::vector<Index> ids = text->encode(prompt, true);
  std::cout << prompt << (options.ids.empty() ? "" : " ") << std::flush;
  weir::Rng rng(options.seed);
  Decoder::State state = options.new_state();
  Index count = 0;
  const double seconds =
      seconds_of([&] { count = write_on(writer, options, *text, ids, rng, state); });
  std::cout << "----\n" << rate_of(count, seconds) << '\n';
}

/// Continues several prompts at once: each pass of the model computes a token of every text.
void write_many(const Writer& writer, const Options& options,
                const std::vector<std::string>& prompts) {
  std::vector<weir::Conversation<float>> conversations;
  StatusLine status(false);
  Index count = 0;
  const Interrupt interrupt;
  for (std::size_t i = 0; i < prompts.size(); ++i) {
    weir::Conversation<float> one{.prompt = writer.make_text()->encode(prompts[i], true),
                                  .until = {.count = options.tokens, .tokens = writer.ends},
                                  .sampling = options.sampling,
                                  .rng = weir::Rng(options.seed + i),
                                  .state = options.new_state()};
    one.until.on_token = [&](Index) {
      ++count;
      status.show(std::to_string(prompts.size()) + " texts, " + std::to_string(count) + " tokens",
                  false);
      return !Interrupt::happened();
    };
    conversations.push_back(std::move(one));
  }
  std::vector<weir::Generated> results;
  const double seconds = seconds_of([&] { results = generate(writer.model, conversations); });
  status.close();
  for (std::size_t i = 0; i < prompts.size(); ++i) {
    const auto text = writer.make_text();
    std::cout << "---- " << i + 1 << '\n' << prompts[i];
    for (const Index id : results[i].tokens) std::cout << text->add(id);
    std::cout << text->flush() << '\n';
  }
  std::cout << "----\n" << rate_of(count, seconds) << '\n';
}

/// Continues what is typed, line by line; all that was said before is remembered.
void chat(const Writer& writer, const Options& options) {
  std::cout << "Type a line for the model to continue; /new forgets what was said, Ctrl-C stops\n"
               "an answer, /quit or Ctrl-D ends.\n";
  weir::Rng rng(options.seed);
  Decoder::State state = options.new_state();
  for (std::string line; std::cout << "> " << std::flush && std::getline(std::cin, line);) {
    if (line == "/quit") break;
    if (line == "/new") {
      state = options.new_state();
      continue;
    }
    const auto text = writer.make_text();
    std::vector<Index> ids = text->encode(line, state.length == 0);
    if (!ids.empty()) write_on(writer, options, *text, ids, rng, state);
  }
  std::cout << '\n';
}

std::optional<int> parse(int argc, char** argv, Options& options) {
  CommandLine line("Lets a model from disk write.");
  line.group("Model");
  line.add("model", options.model,
           "A folder of checkpoints of train_lm or of a published model, or a .gguf file")
      ->required();
  line.add("--storage", options.storage, "How weights are kept; bf16 is half as large")
      ->check(CLI::IsMember(
          std::vector<std::string>(weir::kStorageNames.begin(), weir::kStorageNames.end())));
  line.add("--cache", options.cache,
           "How keys and values of earlier tokens are kept; bf16 is half as large as full")
      ->check(CLI::IsMember(std::vector<std::string>(weir::kCacheStorageNames.begin(),
                                                     weir::kCacheStorageNames.end())));
  line.add("--expert-memory", options.expert_memory,
           "Megabytes for experts, the others stay in the files (0: all in memory)")
      ->check(limits::at_least(0));
  line.add("--longest-text", options.longest_text,
           "Tokens of a text at most, where positions depend on it (0: as the model says)")
      ->check(limits::at_least(0));
  line.add("--threads", options.threads, "How many cores to use")->check(limits::at_least(1));
  line.group("Writing");
  line.add("--prompt", options.prompts, "What to continue; several are continued at once")
      ->allow_extra_args(false);
  line.add("--ids", options.ids, "The same as token ids: --ids \"1 2 3\"")->allow_extra_args(false);
  line.add("--chat", options.chat, "Continue what is typed, line by line");
  line.add("--tokens", options.tokens, "The most tokens to write")->check(limits::between(0, 1e9));
  line.add("--temperature", options.sampling.temperature, "0 always takes the likeliest token")
      ->check(limits::at_least(0));
  line.add("--top-k", options.sampling.top_k, "Draw from the n likeliest tokens (0: all)")
      ->check(limits::at_least(0));
  line.add("--top-p", options.sampling.top_p, "Draw from tokens with this probability together")
      ->check(limits::between(0, 1));
  line.add("--min-p", options.sampling.min_p, "Draw from tokens this likely beside the likeliest")
      ->check(limits::between(0, 1));
  line.add("--repetition-penalty", options.sampling.repetition_penalty,
           "Makes tokens that were there before rarer (1: none)")
      ->check(limits::above_zero());
  line.add("--seed", options.seed, "Repeats a text");
  line.footer(
      "\nExamples:\n"
      "  generate run --prompt \"int main(\"             a model that train_lm --save run has "
      "saved\n"
      "  generate OLMoE-1B-7B --storage bf16 --chat    a published one\n"
      "  generate qwen3.gguf --ids \"9707 11\"          tokens of a GGUF file by their numbers\n"
      "  generate Mixtral-8x7B --storage bf16 --expert-memory 8000 --prompt Once\n");
  return line.parse(argc, argv);
}

void run(const Options& options) {
  weir::set_threads(options.threads);
  const Writer writer = load(options);
  const std::vector<std::string>& prompts = options.ids.empty() ? options.prompts : options.ids;
  if (options.chat) {
    chat(writer, options);
  } else if (prompts.empty()) {
    throw std::runtime_error("nothing to do, expected --prompt, --ids or --chat");
  } else if (prompts.size() == 1) {
    write_one(writer, options, prompts[0]);
  } else {
    write_many(writer, options, prompts);
  }
  if (writer.experts != nullptr) {
    const io::ExpertStatistics s = writer.experts->statistics();
    std::cout << "experts: " << fixed(100.0 * s.hit_rate(), 1) << " % were in memory, "
              << fixed(static_cast<double>(s.most_bytes) / 1e6, 0) << " MB at most\n";
  }
}

}  // namespace

int main(int argc, char** argv) {
  Options options;
  try {
    if (const auto exit_code = parse(argc, argv, options)) return *exit_code;
    run(options);
  } catch (const std::exception& error) {
    std::cerr << "generate: " << error.what() << '\n';
    return 1;
  }
}
