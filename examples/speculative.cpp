// SPDX-License-Identifier: MIT
// DeepSeek-V3 made small, with its module of multi-token prediction: trained on text byte by byte,
// it then writes faster than byte by byte, by drafting the byte after the next one and checking the
// draft along with the next; and it answers several prompts behind one prefix at once.
#include <cmath>
#include <exception>
#include <iostream>
#include <optional>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include <weir/weir.hpp>

#include "bytes.hpp"
#include "command_line.hpp"
#include "corpus.hpp"
#include "progress.hpp"

namespace {

using weir::Index;
using Model = weir::Decoder<float>;
using Modules = weir::MultiToken<float>;

struct Options {
  std::vector<std::string> text;  // Empty: headers.
  Index d_model = 96;
  Index layers = 3;
  Index steps = 800;
  Index batch = 16;
  Index context = 128;
  Index generate = 400;
  double learning_rate = 6e-3;
  double temperature = 0.5;
  std::uint64_t seed = 1;
  int threads = weir::hardware_threads();
  bool quiet = false;
};

/// Fills `options` from the command line; returns the exit code if there is nothing left to do.
std::optional<int> parse(int argc, char** argv, Options& options) {
  CommandLine line("Trains a small DeepSeek-V3 and lets it write with drafts of its own.");
  line.add("--text", options.text, "Files or folders to learn from (Eigen and weir)");
  line.add("--d-model", options.d_model, "Width of a token")->check(limits::at_least(1));
  line.add("--layers", options.layers, "The first is dense")->check(limits::between(2, 1000));
  line.add("--steps", options.steps, "Optimizer steps")->check(limits::at_least(1));
  line.add("--batch", options.batch, "Pieces of text in a step")->check(limits::at_least(1));
  line.add("--context", options.context, "Bytes of a piece")->check(limits::between(2, 1 << 20));
  line.add("--generate", options.generate, "Bytes to write")->check(limits::at_least(0));
  line.add("--learning-rate", options.learning_rate, "Learning rate of AdamW, at its peak")
      ->check(limits::at_least(0));
  line.add("--temperature", options.temperature, "0 always takes the likeliest byte")
      ->check(limits::at_least(0));
  line.add("--seed", options.seed, "Repeats a run bit for bit, with any --threads");
  line.add("--threads", options.threads, "How many cores to use")->check(limits::at_least(1));
  line.add("--quiet", options.quiet, "No progress, only the results");
  return line.parse(argc, argv);
}

/// A model and its modules, to be trained together.
struct Both {
  using Scalar = float;
  Model& model;
  Modules& modules;

  template <class Self, class Visit>
  static void visit(Self& self, Visit& visit) {
    visit("", self.model);
    visit("", self.modules);
  }
};

/// Lets the model learn the next byte, and its module the one after.
void train(Model& model, Modules& modules, const std::string& text, const Options& options,
           weir::Rng& rng) {
  Both both = {model, modules};
  weir::AdamW<float> optimizer({.learning_rate = options.learning_rate});
  const weir::WarmupCosine schedule{.peak = options.learning_rate,
                                    .warmup_steps = options.steps / 20,
                                    .total_steps = options.steps,
                                    .floor = options.learning_rate / 10.0};
  const weir::CrossEntropy<float> cross_entropy;
  weir::CrossEntropy<float>::Cache loss_cache;
  ByteBatch batch;
  Model::Cache cache;
  Modules::Cache modules_cache;
  const auto sequences = weir::Sequences::uniform(options.batch, options.context);
  StatusLine status(options.quiet);
  for (Index step = 0; step < options.steps; ++step) {
    batch.clear();
    for (Index s = 0; s < options.batch; ++s) {
      const Index room = static_cast<Index>(text.size()) - options.context;
      batch.add(text, static_cast<std::size_t>(rng.below(room)), options.context);
    }
    const weir::Pass pass{.training = true, .sequences = &sequences, .rng = &rng};
    const auto& logits = model.forward(batch.ids, pass, cache);
    const float next = cross_entropy.forward(logits, batch.targets, loss_cache);
    modules.forward(model, cache, batch.ids, batch.targets, pass, modules_cache);
    const auto d_hidden = modules.backward(model, modules_cache);
    model.backward(cross_entropy.backward(loss_cache), cache, d_hidden);
    weir::clip_global_norm(both, 1.0);
    optimizer.set_learning_rate(schedule.at(step));
    optimizer.step(both);  // also moves the biases that balance the experts
    const bool keep = (step + 1) % 100 == 0 || step + 1 == options.steps;
    const auto bits = [](float nats) {
      return fixed(static_cast<double>(nats) / std::log(2.0), 3);
    };
    status.show("step " + std::to_string(step + 1) + '/' + std::to_string(options.steps) +
                    "  bits for the next byte " + bits(next) + ", for the one after " +
                    bits(modules_cache.losses.front()),
                keep);
  }
}

/// A text, byte by byte and with drafts: the same, in fewer passes.
void write_twice(const Model& model, const Modules& modules, const Options& options) {
  const std::vector<Index> prompt = to_ids("template <");
  const weir::Sampling sampling{.temperature = options.temperature};
  weir::Rng rng(options.seed);
  weir::Rng same_rng = rng;
  std::vector<Index> plain;
  std::vector<Index> drafted;
  weir::DraftReport report;
  const double alone = seconds_of(
      [&] { plain = weir::generate<float>(model, prompt, options.generate, sampling, rng); });
  const double with_drafts = seconds_of([&] {
    drafted = weir::speculate<float>(model, modules, prompt, options.generate, sampling, same_rng,
                                     report);
  });
  std::cout << "\n"
            << to_text(prompt) << to_text(drafted) << "\n\n"
            << "byte by byte:  " << options.generate + 1 << " passes, " << fixed(alone, 2) << " s\n"
            << "with drafts:   " << report.passes << " passes, " << fixed(with_drafts, 2) << " s; "
            << fixed(100.0 * report.acceptance(), 1) << " % of the drafts accepted\n"
            << "the same text: " << (plain == drafted ? "yes" : "no") << '\n';
}

/// Several ways on from one prefix, which is computed once.
void continue_prefix(const Model& model, const Options& options) {
  const std::vector<Index> prefix = to_ids("// SPDX-License-Identifier: MIT\n");
  weir::Rng rng(options.seed);
  Model::State state;
  weir::generate<float>(model, prefix, 0, {}, rng, state);  // reads, and writes nothing
  std::vector<weir::Conversation<float>> conversations;
  for (const std::string_view prompt : {"#include <", "namespace ", "/// \\throws "}) {
    weir::Conversation<float> conversation;
    conversation.prompt = to_ids(prompt);
    conversation.state = state;
    conversation.until = {.count = options.generate, .tokens = {'\n'}};
    conversation.sampling = {.temperature = options.temperature};
    conversations.push_back(std::move(conversation));
  }
  const auto results = weir::generate<float>(model, conversations);
  std::cout << "\nthree ways on from one prefix, at once, each to the end of its line:\n";
  for (std::size_t i = 0; i < results.size(); ++i) {
    std::cout << "  " << to_text(conversations[i].prompt) << to_text(results[i].tokens)
              << (results[i].ending == weir::Ending::kToken ? "" : "...\n");
  }
}

void run(Options options) {
  if (options.text.empty()) options.text = split_paths(WEIR_DEFAULT_CORPUS);
  weir::set_threads(options.threads);
  const Corpus corpus = read_corpus(options.text);
  if (static_cast<Index>(corpus.train.size()) <= options.context + 1) {
    throw std::runtime_error("the text is too short for --context");
  }
  weir::Rng rng(options.seed);
  const auto config = weir::presets::scaled(weir::presets::deepseek_v3(),
                                            {.d_model = options.d_model, .layers = options.layers});
  Model model = weir::presets::make<float>(config, rng);
  Modules modules = weir::presets::make_prediction<float>(config, rng);
  std::cout << "DeepSeek-V3 made small: " << config.shape.layers << " layers, "
            << config.shape.experts << " experts, " << config.shape.k << " for each byte; "
            << grouped(weir::parameter_count(model)) << " parameters, and "
            << grouped(weir::parameter_count(modules)) << " in the module that drafts\n"
            << "learning from " << grouped(static_cast<long long>(corpus.train.size()))
            << " bytes of " << corpus.files << " files\n";
  train(model, modules, corpus.train, options, rng);
  write_twice(model, modules, options);
  continue_prefix(model, options);
}

}  // namespace

int main(int argc, char** argv) {
  return run_program("speculative", argc, argv, parse, run);
}
