// SPDX-License-Identifier: MIT
// A mixture of experts made small for a device: half of its experts are removed, what is left
// learns from the whole (distillation), and its weights get 4 bits; and a narrower dense model
// learns from the same teacher. Each step states size, speed and loss, beside students that learn
// from the text alone. `distil --help` lists the options.
#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <iostream>
#include <optional>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include <weir/core/input_samples.hpp>
#include <weir/core/parallel.hpp>
#include <weir/core/storage.hpp>
#include <weir/model/generate.hpp>
#include <weir/optim/adamw.hpp>
#include <weir/optim/clip.hpp>
#include <weir/tuning/distillation.hpp>
#include <weir/tuning/expert_scores.hpp>
#include <weir/tuning/quantisation.hpp>
#include <weir/tuning/surgery.hpp>

#include "byte_decoder.hpp"
#include "command_line.hpp"
#include "interrupt.hpp"
#include "progress.hpp"
#include "resumable.hpp"
#include "small_training.hpp"

namespace {

using weir::Index;
using Model = weir::Decoder<float>;

struct Options {
  Index seeds = 3;
  Index teacher_steps = 250;
  Index steps = 80;
  Index context = 64;
  double temperature = 2.0;
  double hard = 0.2;
  double hidden = 0.1;
  std::vector<std::string> text;
  std::string save;
  Index save_every = 50;
  int threads = weir::hardware_threads();
  bool quiet = false;
};

constexpr double kTeacherRate = 2e-3;
constexpr double kStudentRate = 1e-3;

const ByteDecoderConfig kTeacher = {
    .layers = 2, .d_model = 128, .d_hidden = 128, .interleave = {.stride = 1}};
const ByteDecoderConfig kDense = {.layers = 2, .d_model = 64, .d_hidden = 64, .dense = true};

std::optional<int> parse(int argc, char** argv, Options& options) {
  CommandLine line("Makes a small mixture of experts smaller: pruned, distilled, with 4 bits.");
  line.add("--seeds", options.seeds, "How many teachers, each from another seed")
      ->check(limits::at_least(1));
  line.add("--text", options.text, "Files or folders to learn from (default: C++ headers)");
  line.add("--teacher-steps", options.teacher_steps, "Steps of the teacher")
      ->check(limits::at_least(1));
  line.add("--steps", options.steps, "Steps of a student")->check(limits::at_least(1));
  line.add("--context", options.context, "Bytes of a window")->check(limits::between(1, 1e6));
  line.add("--temperature", options.temperature, "Of the probabilities that are compared")
      ->check(limits::above_zero());
  line.add("--hard", options.hard, "How much of the loss the text itself has")
      ->check(limits::between(0, 1));
  line.add("--hidden", options.hidden, "Coefficient of the difference of hidden states")
      ->check(limits::at_least(0));
  line.add("--save", options.save,
           "Save in this folder, and go on from what is there if it was stopped");
  line.add("--save-every", options.save_every, "Steps between checkpoints")
      ->check(limits::at_least(1));
  line.add("--threads", options.threads, "How many cores to use")->check(limits::at_least(1));
  line.add("--quiet", options.quiet, "No progress, only the table");
  return line.parse(argc, argv);
}

/// A model that learns from another one, and the map between their hidden states.
struct Student {
  using Scalar = float;

  Model model;
  weir::HiddenLoss<float> hidden;

  template <class Self, class Visit>
  static void visit(Self& self, Visit& visit) {
    visit("", self.model);
    visit("hidden", self.hidden);
  }
};

/// What a student learns from.
enum class Source { kText, kLogits, kLogitsAndHidden };

/// Trains students of one teacher on one text.
class School {
 public:
  School(const Options& options, const Corpus& corpus, const Model& teacher)
      : corpus_(corpus),
        teacher_(teacher),
        loss_({.temperature = options.temperature, .hard = options.hard}),
        by_text_({.hard = 1.0}) {
    weir::set_storage(teacher_, weir::Storage::kPacked);  // The same bits, faster.
  }

  void step(Student& student, weir::AdamW<float>& optimizer, weir::Rng& rng, Source source) {
    const Windows windows = random_windows(corpus_, rng);
    const weir::Pass pass = {.sequences = &windows.sequences};
    const bool by_text = source == Source::kText;
    const weir::DistillationLoss<float>& loss = by_text ? by_text_ : loss_;
    weir::Pass training = pass;
    training.training = true;
    const auto& logits = student.model.forward(windows.bytes.ids, training, cache_);
    const auto& of_teacher =
        by_text ? logits : teacher_.forward(windows.bytes.ids, pass, teacher_cache_);
    loss.forward(logits, of_teacher, windows.bytes.targets, loss_cache_);
    Model::HiddenGradient also;
    if (source == Source::kLogitsAndHidden) {
      student.hidden.forward(student.model.hidden(cache_), teacher_.hidden(teacher_cache_),
                             hidden_cache_);
      also.hidden = &student.hidden.backward(hidden_cache_);
    }
    student.model.backward(loss.backward(loss_cache_), cache_, also);
    weir::clip_global_norm(student, 1.0);
    optimizer.step(student);
  }

 private:
  const Corpus& corpus_;
  Model teacher_;
  weir::DistillationLoss<float> loss_, by_text_;
  weir::DistillationLoss<float>::Cache loss_cache_;
  weir::HiddenLoss<float>::Cache hidden_cache_;
  Model::Cache cache_, teacher_cache_;
};

/// Rows of a text that the weights of a model are given.
void sample_inputs(const Model& model, const Corpus& corpus, weir::InputSamples& samples) {
  weir::Rng rng(7);
  const Windows windows = random_windows(corpus, rng);
  weir::infer(model, windows.bytes.ids, {.sequences = &windows.sequences, .inputs = &samples});
}

/// The model with the half of the experts in each layer that tokens use most.
Model pruned(const Model& whole, const Corpus& corpus) {
  Model model = whole;
  weir::InputSamples samples(1024);
  sample_inputs(model, corpus, samples);
  std::vector<weir::Matrix<float>> inputs;
  for (auto& block : model.layers()) {
    inputs.push_back(samples.of(weir::router_weight("distil", block.branches().back().layer)));
  }
  for (std::size_t l = 0; l < inputs.size(); ++l) {
    weir::ExpertSurgery surgery(model.layers()[l].branches().back().layer, inputs[l]);
    surgery.keep(weir::most_important(surgery.use(), surgery.experts() / 2));
  }
  return model;
}

/// Size, speed and loss of a model, as text of one width.
class Figures {
 public:
  Figures(const Options& options, const Corpus& corpus) : options_(options), corpus_(corpus) {}

  /// \param storage  How weights are stored for speed and loss.
  std::string of(Model model, weir::Storage storage) const {
    const weir::StorageRules rules = {{"*", storage}};
    const auto stored = weir::storage_report(model, rules);
    weir::set_storage(model, rules);
    const double bytes = static_cast<double>(stored.bytes()) +
                         static_cast<double>(weir::parameter_count(model)) * sizeof(float);
    const double bits = bits_per_byte(model, corpus_);
    const std::vector<Index> prompt = to_ids("template <");
    const Index count = options_.context;
    weir::Rng rng(1);
    weir::generate(model, prompt, 1, {}, rng);  // So that memory is there.
    const double seconds = seconds_of([&] { weir::generate(model, prompt, count, {}, rng); });
    return padded(fixed(bytes / 1e6, 2), 7) +
           padded(grouped(static_cast<long long>(static_cast<double>(count) / seconds)), 10) +
           padded(fixed(bits, 3), 9);
  }

 private:
  const Options& options_;
  const Corpus& corpus_;
};

/// The work for one seed: a teacher, and what is made of it.
class Line {
 public:
  Line(const Options& options, const Corpus& corpus, Resumable saving, Index seed)
      : options_(options),
        corpus_(corpus),
        saving_(std::move(saving)),
        seed_(seed),
        figures_(options, corpus),
        status_(options.quiet) {}

  void run() {
    weir::Rng rng(static_cast<std::uint64_t>(seed_));
    Model teacher = make_byte_decoder(kTeacher, rng);
    weir::AdamW<float> optimizer({.learning_rate = kTeacherRate});
    const double seconds = seconds_of([&] {
      train_resumably(part("teacher", options_.teacher_steps), teacher, optimizer, rng, [&] {
        constexpr Index kAtOnce = 10;
        const Index left = options_.teacher_steps - optimizer.steps();
        train(teacher, optimizer, corpus_, std::min(kAtOnce, left), rng);
        show("teacher", optimizer.steps(), options_.teacher_steps);
      });
    });
    std::cout << "seed " << seed_ << '\n';
    row("a teacher with 8 experts", teacher, weir::Storage::kPacked, seconds);
    School school(options_, corpus_, teacher);

    const Model few = pruned(teacher, corpus_);
    row("its 4 most used experts", few, weir::Storage::kPacked);
    learn(school, few, weir::HiddenLoss<float>(options_.hidden), "few-text", "  + text alone",
          Source::kText);
    Model small = learn(school, few, weir::HiddenLoss<float>(options_.hidden), "few-logits",
                        "  + its logits", Source::kLogits);
    learn(school, few, weir::HiddenLoss<float>(options_.hidden), "few-hidden",
          "  + logits, hidden states", Source::kLogitsAndHidden);
    row("    logits, then 4 bits", small, weir::Storage::kInt4);
    weir::InputSamples samples(2048);
    sample_inputs(small, corpus_, samples);
    weir::calibrate(small, {{"*", weir::Storage::kInt4}}, samples);
    row("    the same, calibrated", small, weir::Storage::kInt4);

    weir::Rng dense_draws(static_cast<std::uint64_t>(100 + seed_));
    const Model dense = make_byte_decoder(kDense, dense_draws);
    const weir::HiddenLoss<float> map(kDense.d_model, kTeacher.d_model, dense_draws,
                                      options_.hidden);
    learn(school, dense, map, "dense-text", "dense, from the text alone", Source::kText);
    learn(school, dense, map, "dense-logits", "  from logits", Source::kLogits);
    learn(school, dense, map, "dense-hidden", "  from logits, hidden states",
          Source::kLogitsAndHidden);
  }

 private:
  std::string name(const std::string& part) const {
    return "seed-" + std::to_string(seed_) + "/" + part;
  }

  Resumable part(const std::string& folder, Index steps) const {
    Resumable resumable = saving_;
    if (!resumable.folder.empty()) resumable.folder += "/" + name(folder);
    resumable.until = steps;
    return resumable;
  }

  Model learn(School& school, const Model& from, const weir::HiddenLoss<float>& hidden,
              const std::string& folder, const std::string& title, Source source) {
    Student student{from, hidden};
    weir::AdamW<float> optimizer({.learning_rate = kStudentRate});
    weir::Rng rng(static_cast<std::uint64_t>(1000 + seed_));
    const double seconds = seconds_of([&] {
      train_resumably(part(folder, options_.steps), student, optimizer, rng, [&] {
        school.step(student, optimizer, rng, source);
        show(folder, optimizer.steps(), options_.steps);
      });
    });
    row(title, student.model, weir::Storage::kPacked, seconds);
    return std::move(student.model);
  }

  void show(const std::string& what, Index done, Index all) {
    status_.show(fitted({name(what), std::to_string(done) + "/" + std::to_string(all)},
                        static_cast<double>(done), static_cast<double>(all), status_.columns()),
                 false);
  }

  void row(const std::string& title, const Model& model, weir::Storage storage,
           std::optional<double> seconds = std::nullopt) {
    status_.clear();
    std::cout << title << std::string(30 - title.size(), ' ') << figures_.of(model, storage)
              << (seconds ? padded(fixed(*seconds, 1), 12) : "") << std::endl;
  }

  const Options& options_;
  const Corpus& corpus_;
  Resumable saving_;
  Index seed_;
  Figures figures_;
  StatusLine status_;
};

void run(Options options) {
  if (options.text.empty()) options.text = split_paths(WEIR_DEFAULT_CORPUS);
  weir::set_threads(options.threads);
  const Interrupt interrupt;
  const Corpus corpus = read_corpus(options.text);
  Windows::length = options.context;
  if (static_cast<Index>(corpus.validation.size()) < options.context + 2) {
    throw std::runtime_error("the text is too short: 5 % of it are fewer bytes than --context");
  }
  const auto number = [](auto value) { return std::to_string(value); };
  const Resumable saving{.folder = options.save,
                         .save_every = options.save_every,
                         .settings = {{"teacher-steps", number(options.teacher_steps)},
                                      {"steps", number(options.steps)},
                                      {"context", number(options.context)},
                                      {"temperature", number(options.temperature)},
                                      {"hard", number(options.hard)},
                                      {"hidden", number(options.hidden)}}};
  std::cout << "                                          bytes bits for  seconds of\n"
            << "                                   MB  a second   a byte    training\n";
  for (Index seed = 1; seed <= options.seeds; ++seed) Line(options, corpus, saving, seed).run();
}

}  // namespace

int main(int argc, char** argv) {
  return run_program("distil", argc, argv, parse, run);
}
