// SPDX-License-Identifier: MIT
// One decoder learns two modalities, bytes of text and pictures of digits with their names, with
// experts that both may use, experts of one modality alone (MoMa, Lin et al. 2024,
// arXiv:2407.21770), and both kinds side by side. Shows how well each predicts either modality, and
// which expert got which tokens. `modalities --help` lists the options.
#include <array>
#include <cmath>
#include <cstdint>
#include <iostream>
#include <map>
#include <optional>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include <weir/core/parallel.hpp>
#include <weir/core/pass_record.hpp>
#include <weir/core/routing_observer.hpp>
#include <weir/model/decoder.hpp>
#include <weir/moe/expert_mask.hpp>
#include <weir/moe/routing.hpp>
#include <weir/nn/cross_entropy.hpp>
#include <weir/optim/clip.hpp>
#include <weir/optim/warmup_cosine.hpp>

#include "byte_decoder.hpp"
#include "bytes.hpp"
#include "command_line.hpp"
#include "corpus.hpp"
#include "digits.hpp"
#include "progress.hpp"
#include "resumable.hpp"

namespace {

using weir::Index;

constexpr Index kExperts = 8;
constexpr Index kModalities = 2;
constexpr std::array<const char*, kModalities> kNames = {"text", "pixels"};
constexpr Index kIgnored = -100;  // Targets that are not predicted.

/// Pixels are tokens behind the bytes.
Index modality_of(Index token) {
  return token < kBytes ? 0 : 1;
}

struct Options {
  Index steps = 300;
  Index seeds = 3;
  Index batch = 12;
  Index context = 64;
  Index d_model = 64;
  int threads = weir::hardware_threads();
  std::string save;
  Index save_every = 100;
  Index stop_after = 0;
};

std::optional<int> parse(int argc, char** argv, Options& options) {
  CommandLine line(
      "Trains decoders on text and pictures, with experts for both, for one, or mixed.");
  line.add("--steps", options.steps, "Optimizer steps of each training")
      ->check(limits::between(2, 1e9));
  line.add("--seeds", options.seeds, "Trainings of each kind")->check(limits::between(1, 99));
  line.add("--batch", options.batch, "Windows of text and pictures in a step, of each this many")
      ->check(limits::between(1, 1e6));
  line.add("--context", options.context, "Bytes in a window of text")
      ->check(limits::between(1, 1e6));
  line.add("--d-model", options.d_model, "Width of a token, a multiple of 8")
      ->check(limits::between(8, 1e5));
  line.add("--threads", options.threads, "How many cores to use")->check(limits::at_least(1));
  line.add("--save", options.save,
           "Keep checkpoints in this folder; what is there already goes on");
  line.add("--save-every", options.save_every, "Steps between checkpoints")
      ->check(limits::at_least(1));
  line.add("--stop-after", options.stop_after, "Stop each training after this step (0: the last)")
      ->check(limits::at_least(0));
  return line.parse(argc, argv);
}

/// Which experts text and pixels may use.
struct Kind {
  std::string name;
  std::vector<std::uint8_t> table;  ///< [modalities * experts], see weir::modality_mask.
  Index shared = 0;                 ///< Experts that every token visits besides.
};

std::vector<Kind> kinds() {
  return {{"free", {1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1}},
          {"restricted", {1, 1, 1, 1, 0, 0, 0, 0, 0, 0, 0, 0, 1, 1, 1, 1}},
          {"some for both", {1, 1, 1, 0, 0, 0, 1, 1, 0, 0, 0, 1, 1, 1, 1, 1}},
          {"shared, restricted", {1, 1, 1, 1, 0, 0, 0, 0, 0, 0, 0, 0, 1, 1, 1, 1}, 1}};
}

/// Sequences of both modalities: windows of text, and digits, each its name and its pixels.
struct Batch {
  std::vector<Index> ids, targets, modality;
  weir::Sequences sequences;

  void add(const std::vector<Index>& tokens) {
    for (std::size_t i = 0; i + 1 < tokens.size(); ++i) {
      ids.push_back(tokens[i]);
      targets.push_back(tokens[i + 1]);
      modality.push_back(modality_of(tokens[i]));
    }
    sequences.append(static_cast<Index>(tokens.size()) - 1);
  }

  void add_text(const std::string& text, std::size_t start, Index length) {
    add(to_ids(std::string_view(text).substr(start, static_cast<std::size_t>(length) + 1)));
  }

  void add_picture(weir::Rng& rng) {
    const auto digit = static_cast<std::size_t>(rng.below(10));
    std::vector<Index> tokens = to_ids(std::string(kDigitNames[digit]) + "\n");
    for (const Index level : draw_digit(digit, rng)) tokens.push_back(kBytes + level);
    add(tokens);
  }
};

/// Counts how many tokens of each modality each expert of each layer got.
class LoadByModality final : public weir::RoutingObserver {
 public:
  using Load = std::array<std::array<double, kExperts>, kModalities>;

  void see(std::string_view layer, const weir::Routing<float>& routing,
           const weir::Pass& pass) override {
    Load& load = loads_[std::string(layer)];
    for (Index t = 0; t < routing.tokens(); ++t) {
      const Index modality = modality_of(pass.token_ids[static_cast<std::size_t>(t)]);
      for (const Index e : routing.experts_of(t)) {
        load[static_cast<std::size_t>(modality)][static_cast<std::size_t>(e)] += 1.0;
      }
    }
  }
  void see(std::string_view, const weir::Routing<double>&, const weir::Pass&) override {}

  void print(const std::string& name) const {
    for (const auto& [layer, load] : loads_) {
      for (std::size_t m = 0; m < kModalities; ++m) {
        double sum = 0.0;
        for (const double count : load[m]) sum += count;
        std::cout << name << std::string(20 - name.size(), ' ') << padded(layer, 12)
                  << padded(kNames[m], 8);
        for (const double count : load[m]) {
          std::cout << padded(count > 0.0 ? fixed(100.0 * count / sum, 0) : "-", 5);
        }
        std::cout << '\n';
      }
    }
  }

 private:
  std::map<std::string, Load> loads_;
};

/// What a training came to.
struct Outcome {
  std::array<double, kModalities> bits = {};  ///< For a byte of text, for a pixel.
  double seconds = 0.0;
  LoadByModality loads;
};

class Training {
 public:
  Training(const Options& options, const Kind& kind, Index seed, const Corpus& corpus)
      : options_(options),
        kind_(kind),
        seed_(seed),
        corpus_(corpus),
        rng_(static_cast<std::uint64_t>(seed)),
        model_(make_byte_decoder({.layers = 2,
                                  .d_model = options.d_model,
                                  .d_hidden = options.d_model,
                                  .experts = kExperts,
                                  .k = kind.shared > 0 ? 1 : 2,
                                  .shared = kind.shared,
                                  .interleave = {.stride = 1},
                                  .vocab = kBytes + kLevels},
                                 rng_)),
        schedule_{.peak = 3e-3,
                  .warmup_steps = std::min<Index>(20, options.steps - 1),
                  .total_steps = options.steps,
                  .floor = 3e-4} {}

  Outcome run(StatusLine& status) {
    Resumable run{.save_every = options_.save_every,
                  .until = options_.stop_after > 0 ? std::min(options_.stop_after, options_.steps)
                                                   : options_.steps,
                  .settings = {{"steps", std::to_string(options_.steps)},
                               {"batch", std::to_string(options_.batch)},
                               {"context", std::to_string(options_.context)}}};
    const std::string name = kind_.name + ", seed " + std::to_string(seed_);
    if (!options_.save.empty()) run.folder = options_.save + "/" + name;
    Outcome outcome;
    outcome.seconds = seconds_of([&] {
      train_resumably(run, model_, optimizer_, rng_, [&] {
        step();
        status.show(
            name + ": " + std::to_string(optimizer_.steps()) + "/" + std::to_string(options_.steps),
            false);
      });
    });
    evaluate(outcome);
    return outcome;
  }

 private:
  void step() {
    Batch batch;
    const auto room = static_cast<Index>(corpus_.train.size()) - options_.context;
    for (Index i = 0; i < options_.batch; ++i) {
      batch.add_text(corpus_.train, static_cast<std::size_t>(rng_.below(room)), options_.context);
      batch.add_picture(rng_);
    }
    const auto allowed = weir::modality_mask(batch.modality, kind_.table, kExperts);
    const auto& logits = model_.forward(
        batch.ids,
        {.training = true, .sequences = &batch.sequences, .allowed = allowed, .rng = &rng_},
        cache_);
    loss_.forward(logits, batch.targets, loss_cache_);
    model_.backward(loss_.backward(loss_cache_), cache_);
    weir::clip_global_norm(model_, 1.0);
    optimizer_.set_learning_rate(schedule_.at(optimizer_.steps()));
    optimizer_.step(model_);
  }

  /// Predicts text that was set aside and pictures that are new; names of digits do not count.
  void evaluate(Outcome& outcome) {
    constexpr Index kCount = 48;
    std::array<Batch, kModalities> batches;
    for (const std::size_t start : spread_windows(corpus_.validation, options_.context, kCount)) {
      batches[0].add_text(corpus_.validation, start, options_.context);
    }
    weir::Rng rng(12345);
    for (Index i = 0; i < kCount; ++i) batches[1].add_picture(rng);
    for (std::size_t m = 0; m < kModalities; ++m) {
      Batch& batch = batches[m];
      for (Index& target : batch.targets) {
        if (modality_of(target) != static_cast<Index>(m)) target = kIgnored;
      }
      const auto allowed = weir::modality_mask(batch.modality, kind_.table, kExperts);
      weir::PassRecord record;
      record.show_routings_to(&outcome.loads);
      const weir::Matrix<float> logits =
          weir::infer(model_, batch.ids,
                      {.sequences = &batch.sequences, .allowed = allowed, .record = &record});
      outcome.bits[m] =
          static_cast<double>(loss_.forward(logits, batch.targets, loss_cache_)) / std::log(2.0);
    }
  }

  const Options& options_;
  const Kind& kind_;
  Index seed_;
  const Corpus& corpus_;
  weir::Rng rng_;
  weir::Decoder<float> model_;
  weir::WarmupCosine schedule_;
  weir::AdamW<float> optimizer_;
  weir::CrossEntropy<float> loss_;
  weir::CrossEntropy<float>::Cache loss_cache_;
  weir::Decoder<float>::Cache cache_;
};

void run(Options options) {
  if (options.d_model % 8 != 0) {
    throw std::runtime_error("--d-model: " + std::to_string(options.d_model) +
                             ", expected a multiple of 8");
  }
  weir::set_threads(options.threads);
  const Corpus corpus = read_corpus(split_paths(WEIR_DEFAULT_CORPUS));
  if (static_cast<Index>(corpus.validation.size()) < options.context + 2) {
    throw std::runtime_error("--context: " + std::to_string(options.context) +
                             ", expected less than the text that is set aside, " +
                             std::to_string(corpus.validation.size()) + " bytes");
  }
  const std::vector<Kind> all = kinds();
  StatusLine status(false);
  std::vector<Outcome> outcomes;
  for (const Kind& kind : all) {
    for (Index seed = 1; seed <= options.seeds; ++seed) {
      outcomes.push_back(Training(options, kind, seed, corpus).run(status));
    }
  }
  status.close();

  const auto seeds = static_cast<std::size_t>(options.seeds);
  for (std::size_t m = 0; m < kModalities; ++m) {
    std::cout << (m == 0 ? "bits for a byte of text" : "\nbits for a pixel") << " after "
              << options.steps << " steps\n"
              << std::string(20, ' ');
    for (std::size_t s = 1; s <= seeds; ++s) {
      std::cout << padded("seed " + std::to_string(s), 9);
    }
    std::cout << padded("mean", 9) << (m == 0 ? padded("seconds", 10) : "") << '\n';
    for (std::size_t k = 0; k < all.size(); ++k) {
      std::cout << all[k].name << std::string(20 - all[k].name.size(), ' ');
      double sum = 0.0;
      double seconds = 0.0;
      for (std::size_t s = 0; s < seeds; ++s) {
        const Outcome& outcome = outcomes[k * seeds + s];
        std::cout << padded(fixed(outcome.bits[m], 3), 9);
        sum += outcome.bits[m];
        seconds += outcome.seconds;
      }
      std::cout << padded(fixed(sum / static_cast<double>(seeds), 3), 9)
                << (m == 0 ? padded(fixed(seconds, 1), 10) : "") << '\n';
    }
  }
  std::cout << "\nshare of a modality's tokens at each expert, %, seed 1\n" << std::string(40, ' ');
  for (Index e = 0; e < kExperts; ++e) std::cout << padded(std::to_string(e), 5);
  std::cout << '\n';
  for (std::size_t k = 0; k < all.size(); ++k) outcomes[k * seeds].loads.print(all[k].name);
}

}  // namespace

int main(int argc, char** argv) {
  return run_program("modalities", argc, argv, parse, run);
}
