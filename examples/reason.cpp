// SPDX-License-Identifier: MIT
// Reinforcement learning as DeepSeek-R1 does it, small: a byte model learns to add from examples,
// to a middling accuracy, and goes on by rewards for right answers alone (GRPO). The answers are
// drawn from a copy of the model with narrow weights, whose routers choose other experts here and
// there; training takes the recorded ones (routing replay), or chooses anew. `reason --help` lists
// the options.
#include <cstddef>
#include <cstdint>
#include <iostream>
#include <map>
#include <optional>
#include <span>
#include <stdexcept>
#include <string>
#include <vector>

#include <weir/core/parallel.hpp>
#include <weir/core/storage.hpp>
#include <weir/model/generate.hpp>
#include <weir/moe/imposed_routing.hpp>
#include <weir/moe/selector/around/replay.hpp>
#include <weir/nn/cross_entropy.hpp>
#include <weir/optim/adamw.hpp>
#include <weir/optim/clip.hpp>
#include <weir/tuning/policy_optimisation.hpp>
#include <weir/tuning/rollout_recorder.hpp>

#include "arithmetic.hpp"
#include "byte_decoder.hpp"
#include "bytes.hpp"
#include "command_line.hpp"
#include "interrupt.hpp"
#include "progress.hpp"
#include "resumable.hpp"

namespace {

using weir::Index;
using Model = weir::Decoder<float>;

/// A model, and what changes with it.
struct Training {
  Model model;
  weir::AdamW<float> optimizer;
  weir::Rng rng;
  std::map<std::string, double> figures = {};  ///< Sums over the steps.
};

struct Options {
  Index seeds = 3;
  Index base_steps = 300;
  Index rollouts = 60;
  Index questions = 32;
  Index group = 8;
  Index parts = 4;
  std::string storage = "bf16";
  double base_rate = 3e-3;
  double learning_rate = 3e-4;
  double kl = 0.02;
  double clip = 0.2;
  Index judged = 512;
  std::string save;
  Index save_every = 50;
  int threads = weir::hardware_threads();
  bool quiet = false;
};

const ByteDecoderConfig kModel = {.layers = 3,
                                  .d_model = 64,
                                  .heads = 4,
                                  .kv_heads = 4,
                                  .d_hidden = 64,
                                  .interleave = {.stride = 1}};

std::optional<int> parse(int argc, char** argv, Options& options) {
  CommandLine line("Teaches a small mixture of experts to add, by examples and then by rewards.");
  line.add("--seeds", options.seeds, "How many models, each from another seed")
      ->check(limits::at_least(1));
  line.add("--base-steps", options.base_steps, "Steps of learning from examples")
      ->check(limits::at_least(1));
  line.add("--base-rate", options.base_rate, "Learning rate of these")->check(limits::at_least(0));
  line.add("--rollouts", options.rollouts, "How often answers are drawn and learned from")
      ->check(limits::at_least(1));
  line.add("--questions", options.questions, "Questions of a rollout")->check(limits::at_least(1));
  line.add("--group", options.group, "Answers to each of them")->check(limits::at_least(2));
  line.add("--parts", options.parts, "Steps for each rollout, each with a part of its questions")
      ->check(limits::at_least(1));
  line.add("--storage", options.storage, "How the copy that answers stores its weights")
      ->check([](const std::string& name) {
        return std::string(weir::storage_named(name) ? "" : name + " is no storage");
      });
  line.add("--learning-rate", options.learning_rate, "Learning rate of the steps by rewards")
      ->check(limits::at_least(0));
  line.add("--kl", options.kl, "How much the distance to the model of the examples costs")
      ->check(limits::at_least(0));
  line.add("--clip", options.clip, "How far a ratio of probabilities counts")
      ->check(limits::between(0, 0.99));
  line.add("--judged", options.judged, "Questions to judge by, which nobody learns from")
      ->check(limits::at_least(1));
  line.add("--save", options.save,
           "Save in this folder, and go on from what is there if it was stopped");
  line.add("--save-every", options.save_every, "Steps between checkpoints")
      ->check(limits::at_least(1));
  line.add("--threads", options.threads, "How many cores to use")->check(limits::at_least(1));
  line.add("--quiet", options.quiet, "No progress, only the table");
  return line.parse(argc, argv);
}

Model make_model(weir::Rng& rng) {
  return make_byte_decoder(kModel, rng, [](const ByteDecoderConfig& config, weir::Rng& draws) {
    return weir::MoELayer(
        weir::LinearRouter<float>(config.d_model, config.experts, draws),
        weir::Replay(weir::TopKSoftmax<float>({.k = config.k})), weir::Dropless(),
        weir::GluBank<float>(config.d_model, config.experts, config.d_hidden, draws),
        weir::SwitchLoss<float>({.coefficient = config.balance}),
        weir::ZLoss<float>({.coefficient = config.z_loss}));
  });
}

std::vector<weir::Conversation<float>> conversations(std::span<const Sum> sums, Index group,
                                                     const weir::Sampling& sampling,
                                                     weir::Rng& rng) {
  constexpr Index kLongest = 6;
  std::vector<weir::Conversation<float>> all;
  for (const Sum& sum : sums) {
    for (Index i = 0; i < group; ++i) {
      all.push_back({.prompt = sum.question(),
                     .until = {.count = kLongest, .tokens = {'\n'}},
                     .sampling = sampling,
                     .rng = rng.split()});
    }
  }
  return all;
}

/// The share of questions set aside that the model answers, always by the likeliest byte.
double accuracy(const Model& model, Index count) {
  weir::Rng rng(12345);
  std::vector<Sum> sums;
  for (Index i = 0; i < count; ++i) sums.push_back(Sum::random(rng, true));
  auto all = conversations(sums, 1, {.temperature = 0.0}, rng);
  const auto answers = weir::generate(model, all);
  Index right = 0;
  for (std::size_t i = 0; i < sums.size(); ++i) {
    right += answers[i].tokens == sums[i].answer() ? 1 : 0;
  }
  return static_cast<double>(right) / static_cast<double>(count);
}

/// One step of learning from examples.
void learn_from_examples(Training& stage, Model::Cache& cache) {
  constexpr Index kExamples = 64;
  weir::PolicyBatch<float> batch;  // Answers are learned, questions are not.
  for (Index i = 0; i < kExamples; ++i) {
    const Sum sum = Sum::random(stage.rng, false);
    batch.add(sum.question(), sum.answer(), 0.0);
  }
  const weir::CrossEntropy<float> loss;
  weir::CrossEntropy<float>::Cache loss_cache;
  loss.forward(stage.model.forward(batch.ids, batch.training(), cache), batch.targets, loss_cache);
  stage.model.backward(loss.backward(loss_cache), cache);
  weir::clip_global_norm(stage.model, 1.0);
  stage.optimizer.step(stage.model);
}

/// Answers of a rollout, and what is learned from them.
class Rollout {
 public:
  Rollout(const Options& options, bool replays, const Model& reference)
      : options_(options),
        replays_(replays),
        reference_(reference),
        loss_({.clip_low = options.clip, .clip_high = options.clip, .kl = options.kl}) {}

  /// Lets a copy of the model answer, and the model take a step for each part of the answers.
  void step(Training& stage) {
    sums_.clear();
    for (Index q = 0; q < options_.questions; ++q) sums_.push_back(Sum::random(stage.rng, false));
    all_ = conversations(sums_, options_.group, {}, stage.rng);
    Model copy = stage.model;
    weir::set_storage(copy, *weir::storage_named(options_.storage));
    recorder_.clear();
    const auto answers = weir::generate(copy, all_, &recorder_);
    std::vector<double> rewards;
    for (std::size_t i = 0; i < answers.size(); ++i) {
      const Sum& sum = sums_[i / static_cast<std::size_t>(options_.group)];
      rewards.push_back(answers[i].tokens == sum.answer() ? 1.0 : 0.0);
      stage.figures["right"] += rewards.back();
    }
    const auto advantages = weir::group_advantages(rewards, options_.group);
    for (Index part = 0; part < options_.parts; ++part) {
      const Index first = part * options_.questions / options_.parts * options_.group;
      const Index last = (part + 1) * options_.questions / options_.parts * options_.group;
      batch_.clear();
      order_.clear();
      for (Index i = first; i < last; ++i) {
        const auto at = static_cast<std::size_t>(i);
        batch_.add(all_[at].prompt, answers[at].tokens, advantages[at],
                   recorder_.log_probabilities(i));
        order_.push_back(i);
      }
      if (batch_.answers() > 0) learn(stage);
    }
  }

 private:
  /// A step of the optimizer for the answers in the batch.
  void learn(Training& stage) {
    Model& model = stage.model;
    const auto traces = recorder_.traces(order_, batch_.sequences);
    weir::PassRecord record;
    weir::Pass pass = batch_.evaluation();
    pass.record = &record;
    if (options_.kl > 0.0) {
      batch_.set_reference(reference_.forward(batch_.ids, batch_.evaluation(), cache_));
    }
    record.show_routings_to(&tracer_);
    if (replays_) {  // What the routers would have chosen is only counted.
      model.forward_to_head(batch_.ids, pass, cache_);
      count(stage, traces);
      record.show_routings_to(nullptr);
      weir::impose_routing(model, traces);
    }
    pass.training = true;
    const auto& logits = model.forward(batch_.ids, pass, cache_);
    if (!replays_) count(stage, traces);
    loss_.forward(logits, batch_, loss_cache_);
    model.backward(loss_.backward(loss_cache_), cache_);
    weir::release_routing(model);
    weir::clip_global_norm(model, 1.0);
    stage.optimizer.step(model);
    stage.figures["drift"] += loss_cache_.drift;
    stage.figures["clipped"] += loss_cache_.clipped;
    stage.figures["kl"] += static_cast<double>(loss_cache_.kl);
  }

  void count(Training& stage, std::span<const weir::LayerTrace> traces) {
    stage.figures["differ"] +=
        static_cast<double>(weir::differently_routed(traces, tracer_.traces()));
    stage.figures["tokens"] += static_cast<double>(batch_.sequences.tokens());
  }

  const Options& options_;
  bool replays_;
  const Model& reference_;
  weir::PolicyLoss<float> loss_;
  weir::PolicyLoss<float>::Cache loss_cache_;
  Model::Cache cache_;
  weir::RolloutRecorder<float> recorder_;
  weir::PassTracer tracer_;
  weir::PolicyBatch<float> batch_;
  std::vector<Sum> sums_;
  std::vector<weir::Conversation<float>> all_;
  std::vector<Index> order_;
};

/// Everything for one seed: the model of the examples, and what rewards make of it in both ways.
class Line {
 public:
  Line(const Options& options, const Resumable& saving, Index seed)
      : options_(options), saving_(saving), seed_(seed), status_(options.quiet) {}

  void run() {
    weir::Rng draws(static_cast<std::uint64_t>(seed_));
    Training base{make_model(draws), weir::AdamW<float>({.learning_rate = options_.base_rate}),
                  draws};
    Model::Cache cache;
    const double seconds = seconds_of([&] {
      run(base, "examples", options_.base_steps, [&] {
        learn_from_examples(base, cache);
        show("examples", base.optimizer.steps(), options_.base_steps, "");
      });
    });
    status_.clear();
    std::cout << "seed " << seed_ << "  examples " << percent(accuracy(base.model, options_.judged))
              << std::string(44, ' ') << padded(fixed(seconds, 1), 9) << std::endl;
    for (const bool replays : {true, false}) learn_from_rewards(base.model, replays);
  }

 private:
  void learn_from_rewards(const Model& base, bool replays) {
    Training stage{base, weir::AdamW<float>({.learning_rate = options_.learning_rate}),
                   weir::Rng(static_cast<std::uint64_t>(1000 + seed_))};
    Rollout rollout(options_, replays, base);
    const std::string way = replays ? "replay" : "no-replay";
    const Index steps = options_.rollouts * options_.parts;
    const auto answers = static_cast<double>(options_.questions * options_.group);
    const double seconds = seconds_of([&] {
      run(stage, way, steps, [&] {
        const double right = stage.figures["right"];
        rollout.step(stage);
        const double share = (stage.figures["right"] - right) / answers;
        show(way, stage.optimizer.steps(), steps, "right " + fixed(100.0 * share, 0) + " %");
      });
    });
    const auto mean = [&](const char* figure) {
      return stage.figures[figure] / static_cast<double>(stage.optimizer.steps());
    };
    status_.clear();
    std::cout << "        " << way << std::string(9 - way.size(), ' ')
              << percent(accuracy(stage.model, options_.judged))
              << percent(stage.figures["differ"] / stage.figures["tokens"])
              << padded(fixed(1000.0 * mean("drift"), 2), 12) << percent(mean("clipped"))
              << padded(fixed(mean("kl"), 3), 16) << padded(fixed(seconds, 1), 9) << std::endl;
  }

  /// Takes steps until there are `steps` of them.
  template <class Step>
  void run(Training& training, const std::string& part, Index steps, Step&& step) {
    Resumable resumable = saving_;
    if (!resumable.folder.empty()) resumable.folder += "/" + name(part);
    resumable.until = steps;
    resumable.figures = &training.figures;
    train_resumably(resumable, training.model, training.optimizer, training.rng, step);
  }

  static std::string percent(double share) { return padded(fixed(100.0 * share, 1), 8); }

  std::string name(const std::string& part) const {
    return "seed-" + std::to_string(seed_) + "/" + part;
  }

  void show(const std::string& what, Index done, Index all, const std::string& figure) {
    status_.show(fitted({name(what), std::to_string(done) + "/" + std::to_string(all), figure},
                        static_cast<double>(done), static_cast<double>(all), status_.columns()),
                 false);
  }

  const Options& options_;
  const Resumable& saving_;
  Index seed_;
  StatusLine status_;
};

void run(Options options) {
  if (options.parts > options.questions) {
    throw std::runtime_error("--parts: " + std::to_string(options.parts) +
                             ", expected no more than --questions " +
                             std::to_string(options.questions));
  }
  weir::set_threads(options.threads);
  const Interrupt interrupt;
  const auto number = [](auto value) { return std::to_string(value); };
  const Resumable saving{.folder = options.save,
                         .save_every = options.save_every,
                         .settings = {{"base-steps", number(options.base_steps)},
                                      {"base-rate", number(options.base_rate)},
                                      {"rollouts", number(options.rollouts)},
                                      {"questions", number(options.questions)},
                                      {"group", number(options.group)},
                                      {"parts", number(options.parts)},
                                      {"storage", options.storage},
                                      {"learning-rate", number(options.learning_rate)},
                                      {"kl", number(options.kl)},
                                      {"clip", number(options.clip)}}};
  std::cout << "                    right  routed    drift of             distance to\n"
            << "                  answers    anew  the policy clipped        examples  seconds\n"
            << "                        %       %      / 1000       %\n";
  for (Index seed = 1; seed <= options.seeds; ++seed) Line(options, saving, seed).run();
}

}  // namespace

int main(int argc, char** argv) {
  return run_program("reason", argc, argv, parse, run);
}
