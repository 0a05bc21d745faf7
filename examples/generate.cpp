// SPDX-License-Identifier: MIT
// Lets a model from disk write: one that train_lm saved, one in a folder as Hugging Face has them,
// or a GGUF file as llama.cpp has them. It continues one prompt as it is written, several at once,
// or what you type line by line. With MPI, it runs on the ranks of a job, too: each has some of the
// experts, and some of the prompts.
#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <exception>
#include <functional>
#include <iostream>
#include <optional>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include <weir/core/cache_storage.hpp>
#include <weir/core/parallel.hpp>
#include <weir/io/expert_store.hpp>
#include <weir/model/generate.hpp>

#include "command_line.hpp"
#include "interrupt.hpp"
#include "load_model.hpp"
#include "progress.hpp"
#include "rank_job.hpp"
#include "run_on_ranks.hpp"

#ifdef WEIR_MPI
#include <weir/parallel/mpi/collectives.hpp>
#include <weir/parallel/mpi/exchange.hpp>
#include <weir/parallel/mpi/rank_generate.hpp>
#endif

namespace {

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
  std::string cache = "full";
  ModelOptions how;
  int threads = weir::hardware_threads();
};

/// What there is to say about a text that has been written.
std::string summary_of(Index tokens, double seconds, const Decoder::State& state) {
  return std::to_string(tokens) + " tokens, " +
         fixed(static_cast<double>(tokens) / std::max(seconds, 1e-9), 1) + " tokens/s, cache of " +
         std::to_string(state.bytes_per_token()) + " bytes a token";
}

using Conversations = std::vector<weir::Conversation<float>>;

/// Continues this rank's conversations, all ranks together.
/// \param show     Is told how many tokens there are so far.
std::vector<weir::Generated> continue_all(const LoadedModel& writer, Conversations& conversations,
                                          const std::function<void(Index)>& show = {}) {
#ifdef WEIR_MPI
  if (rank_job().size() > 1) {
    weir::Channel channel(*rank_job().ranks);
    return weir::generate<float>(channel, writer.model, conversations, show);
  }
#endif
  Index count = 0;
  for (auto& conversation : conversations) {
    const auto on_token = conversation.until.on_token;
    conversation.until.on_token = [&count, &show, on_token](Index id) {
      ++count;
      if (show) show(count);
      return !on_token || on_token(id);
    };
  }
  return weir::generate<float>(writer.model, conversations);
}

/// The texts of all ranks, text i being one of rank i mod the number of ranks.
/// \param mine     This rank's.
std::vector<std::string> gather(std::vector<std::string> mine, std::size_t count) {
#ifdef WEIR_MPI
  if (rank_job().size() > 1) {
    weir::Channel channel(*rank_job().ranks);
    weir::Exchange exchange;
    const auto ranks = static_cast<std::size_t>(channel.size());
    std::vector<std::string> all;
    for (std::size_t i = 0; i < count; ++i) {
      const bool is_mine = i % ranks == static_cast<std::size_t>(channel.rank());
      all.push_back(weir::all_gather_texts(channel, exchange, "texts",
                                           is_mine ? mine[i / ranks] : std::string())[i % ranks]);
    }
    return all;
  }
#endif
  mine.resize(count);
  return mine;
}

/// Continues one prompt and shows each token as soon as it is known. Of several ranks, the first
/// one has the prompt.
/// \return         How many tokens were written.
Index write_on(const LoadedModel& writer, const Options& options, Text& text,
               const std::vector<Index>& prompt, weir::Rng& rng, Decoder::State& state) {
  const Interrupt interrupt;
  Conversations conversations;
  if (rank_job().is_first()) {
    auto& one = conversations.emplace_back(
        weir::Conversation<float>{.prompt = prompt,
                                  .until = {.count = options.tokens, .tokens = writer.ends},
                                  .sampling = options.sampling,
                                  .rng = rng,
                                  .state = std::move(state)});
    one.until.on_token = [&](Index id) {
      if (std::find(writer.ends.begin(), writer.ends.end(), id) == writer.ends.end()) {
        std::cout << text.add(id) << std::flush;
      }
      return !Interrupt::happened();
    };
  }
  const auto written = continue_all(writer, conversations);
  if (written.empty()) return 0;
  rng = conversations[0].rng;
  state = std::move(conversations[0].state);
  std::cout << text.flush() << '\n';
  return static_cast<Index>(written[0].tokens.size());
}

/// Continues one prompt.
void write_one(const LoadedModel& writer, const Options& options, const std::string& prompt) {
  const auto text = writer.make_text();
  const std::vector<Index> ids = text->encode(prompt, true);
  std::cout << prompt << (options.ids.empty() ? "" : " ") << std::flush;
  weir::Rng rng(options.seed);
  Decoder::State state = options.new_state();
  Index count = 0;
  const double seconds =
      seconds_of([&] { count = write_on(writer, options, *text, ids, rng, state); });
  std::cout << "----\n" << summary_of(count, seconds, state) << '\n';
}

/// Continues several prompts at once: each pass of the model computes a token of every text. Of
/// several ranks, rank r has prompts r, r + ranks, ...
void write_many(const LoadedModel& writer, const Options& options,
                const std::vector<std::string>& prompts) {
  Conversations conversations;
  StatusLine status(false);
  const Interrupt interrupt;
  const auto ranks = static_cast<std::size_t>(rank_job().size());
  for (auto i = static_cast<std::size_t>(rank_job().rank()); i < prompts.size(); i += ranks) {
    auto& one = conversations.emplace_back(
        weir::Conversation<float>{.prompt = writer.make_text()->encode(prompts[i], true),
                                  .until = {.count = options.tokens, .tokens = writer.ends},
                                  .sampling = options.sampling,
                                  .rng = weir::Rng(options.seed + i),
                                  .state = options.new_state()});
    one.until.on_token = [](Index) { return !Interrupt::happened(); };
  }
  Index count = 0;
  std::vector<weir::Generated> results;
  const double seconds = seconds_of([&] {
    results = continue_all(writer, conversations, [&](Index tokens) {
      count = tokens;
      status.show(std::to_string(prompts.size()) + " texts, " + std::to_string(count) + " tokens",
                  false);
    });
  });
  status.close();
  std::vector<std::string> mine;
  for (const weir::Generated& result : results) {
    const auto text = writer.make_text();
    std::string& whole = mine.emplace_back();
    for (const Index id : result.tokens) whole += text->add(id);
    whole += text->flush();
  }
  const std::vector<std::string> texts = gather(std::move(mine), prompts.size());
  for (std::size_t i = 0; i < prompts.size(); ++i) {
    std::cout << "---- " << i + 1 << '\n' << prompts[i] << texts[i] << '\n';
  }
  if (!rank_job().is_first()) return;
  std::cout << "----\n" << summary_of(count, seconds, conversations[0].state) << '\n';
}

/// Continues what is typed, line by line; all that was said before is remembered.
void chat(const LoadedModel& writer, const Options& options) {
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
  add_model_options(line, options.how);
  line.add("--cache", options.cache,
           "How keys and values of earlier tokens are kept; bf16 is half as large as full")
      ->check(CLI::IsMember(std::vector<std::string>(weir::kCacheStorageNames.begin(),
                                                     weir::kCacheStorageNames.end())));
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
      "  generate Mixtral-8x7B --storage bf16 --expert-memory 8000 --prompt Once\n"
      "  mpirun -np 4 generate Mixtral-8x7B --storage bf16 --threads 8 --prompt Once\n");
  return line.parse(argc, argv);
}

void run(Options options) {
  weir::set_threads(options.threads);
  options.how.numbers = !options.ids.empty();
  if (options.chat && rank_job().size() > 1) {
    throw std::runtime_error("--chat: expected --prompt or --ids on several ranks");
  }
  const LoadedModel writer = load_any_model(options.model, options.how);
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
  return run_on_ranks("generate", argc, argv, parse, run);
}
