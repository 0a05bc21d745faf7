// SPDX-License-Identifier: MIT
// A model that has learnt one text learns a second one in several ways: all of it, with a pull
// towards where it was, with frozen routers, by adapters, or by those experts alone that the second
// text uses most. Shows what each costs, what it gains on the second text, and what it forgets of
// the first.
//
//     finetune [steps on the first text [steps on the second [bytes of a window]]]
#include <functional>
#include <iostream>
#include <numeric>
#include <string>
#include <utility>
#include <vector>

#include <weir/core/input_samples.hpp>
#include <weir/core/pass_record.hpp>
#include <weir/core/storage_rules.hpp>
#include <weir/moe/expert_mask.hpp>
#include <weir/tuning/expert_scores.hpp>
#include <weir/tuning/lora.hpp>
#include <weir/tuning/surgery.hpp>
#include <weir/tuning/training_parts.hpp>

#include "byte_decoder.hpp"
#include "progress.hpp"
#include "small_training.hpp"

namespace {

using weir::Index;
using Model = weir::Decoder<float>;

Index trained_numbers(Model& model) {
  Index count = 0;
  for (const auto& [name, parameter] : weir::parameters(model)) {
    count += parameter->frozen ? 0 : parameter->value.size();
  }
  return count;
}

/// Trains only the experts that make up half of what the text uses, layer by layer (ESFT).
void train_relevant_experts(Model& model, const Corpus& text) {
  weir::Rng rng(7);
  std::vector<std::string> layers;
  std::vector<weir::ExpertRelevance> relevance;
  for (int sample = 0; sample < 4; ++sample) {
    const Windows windows = random_windows(text, rng);
    weir::PassRecord record(weir::PassRecord::Collects::kLossesAndReports);
    weir::infer(model, windows.bytes.ids, {.sequences = &windows.sequences, .record = &record});
    relevance.resize(record.reports().size());
    layers.clear();
    for (std::size_t l = 0; l < relevance.size(); ++l) {
      layers.push_back(record.reports()[l].name);
      relevance[l].add(record.reports()[l].report);
    }
  }
  std::vector<std::string> patterns;
  for (std::size_t l = 0; l < layers.size(); ++l) {
    const auto experts = weir::relevant_experts(relevance[l].gate_scores(), 0.5);
    for (std::string& pattern : weir::expert_patterns(layers[l] + ".experts", experts)) {
      patterns.push_back(std::move(pattern));
    }
  }
  weir::train_only(model, patterns);
}

struct Way {
  std::string name;
  double learning_rate;
  std::function<void(Model&)> prepare;
  double pull = 0.0;
};

/// What a model needs for a byte of two texts.
struct Bits {
  double first = 0.0, second = 0.0;
};

void print_row(const std::string& name, const Bits& bits, const Bits& before) {
  std::cout << name << std::string(46 - name.size(), ' ') << padded(fixed(bits.first, 3), 8)
            << padded(fixed(bits.first - before.first, 3), 8) << padded(fixed(bits.second, 3), 8)
            << padded(fixed(before.second - bits.second, 3), 8) << std::endl;
}

/// The second text in experts of its own: clones of the two that it uses most, in each layer, which
/// alone are trained, by tokens that may go to no others.
void isolate(const Model& base, const Corpus& first, const Corpus& second, const Bits& before,
             Index steps) {
  constexpr Index kExperts = 8;
  Model model = base;
  weir::Rng rng(7);
  const Windows windows = random_windows(second, rng);
  weir::InputSamples samples(512);
  weir::infer(model, windows.bytes.ids, {.sequences = &windows.sequences, .inputs = &samples});
  for (std::size_t l = 0; l < model.layers().size(); ++l) {
    weir::AnyLayer<float>& mixture = model.layers()[l].branches().back().layer;
    weir::ExpertSurgery surgery(mixture, samples.of(weir::router_weight("finetune", mixture)));
    for (const Index busy : weir::most_important(surgery.use(), 2)) surgery.clone(busy);
  }
  const std::vector<Index> own = {kExperts, kExperts + 1};
  std::vector<Index> others(kExperts);
  std::iota(others.begin(), others.end(), Index{0});
  const auto without_own = weir::all_but(kExperts + 2, own);
  const auto only_own = weir::all_but(kExperts + 2, others);

  std::cout << "\nknowledge in two experts of its own"
               "               first text       second text\n"
               "                                                bits  forgot    bits  gained\n";
  print_row("before", before, before);
  std::vector<std::string> patterns;
  for (std::size_t l = 0; l < model.layers().size(); ++l) {
    for (std::string& pattern :
         weir::expert_patterns("layers." + std::to_string(l) + ".moe.experts", own)) {
      patterns.push_back(std::move(pattern));
    }
  }
  weir::train_only(model, patterns);
  weir::AdamW<float> tuner({.learning_rate = 2e-3, .weight_decay = 0.0});
  weir::Rng batches(5);
  train(model, tuner, second, steps, batches, {}, {.allowed = only_own});
  print_row("each text has its experts",
            {bits_per_byte(model, first, {.allowed = without_own}),
             bits_per_byte(model, second, {.allowed = only_own})},
            before);
  print_row("all have all experts", {bits_per_byte(model, first), bits_per_byte(model, second)},
            before);
  print_row("unlearnt: the two are masked",
            {bits_per_byte(model, first, {.allowed = without_own}),
             bits_per_byte(model, second, {.allowed = without_own})},
            before);

  // The same mask where knowledge could go anywhere.
  Model everywhere = base;
  weir::AdamW<float> optimizer({.learning_rate = 1e-3, .weight_decay = 0.0});
  weir::Rng again(5);
  train(everywhere, optimizer, second, steps, again);
  const std::vector<Index> two = {0, 1};
  const auto masked = weir::all_but(kExperts, two);
  print_row("everything trained, two of its experts masked",
            {bits_per_byte(everywhere, first, {.allowed = masked}),
             bits_per_byte(everywhere, second, {.allowed = masked})},
            before);
}

void run(SmallRun how) {
  const Index steps = how.steps;
  const Index tuning_steps = how.more;
  const Corpus first = read_corpus(split_paths(WEIR_DEFAULT_CORPUS));
  const Corpus second = read_corpus(split_paths(WEIR_SECOND_CORPUS));

  weir::Rng rng(1);
  Model base = make_byte_decoder({.interleave = {.stride = 1}}, rng);
  weir::AdamW<float> optimizer({.learning_rate = 2e-3});
  train(base, optimizer, first, steps, rng);
  const double first_before = bits_per_byte(base, first);
  const double second_before = bits_per_byte(base, second);
  std::cout << "bits per byte after " << steps << " steps: first text " << fixed(first_before, 3)
            << ", second text " << fixed(second_before, 3) << "\nthen " << tuning_steps
            << " steps on the second text\n\n"
            << "                          trained   first text       second text\n"
            << "                       parameters   bits  forgot    bits  gained  seconds\n";

  weir::Rng draws(3);
  const std::vector<Way> ways = {
      {"everything", 1e-3, [](Model&) {}},
      {"  pulled to the base", 1e-3, [](Model&) {}, 0.01},
      {"  routers frozen", 1e-3, [](Model& model) { weir::freeze(model, "*.router.*"); }},
      {"half of expert use", 1e-3, [&](Model& model) { train_relevant_experts(model, second); }},
      {"LoRA, rank 8, all maps", 5e-3,
       [&](Model& model) {
         weir::freeze(model, "*");
         weir::add_lora(model, "layers.*", draws, {.rank = 8, .alpha = 16.0});
       }},
      {"LoRA on attention", 5e-3,
       [&](Model& model) {
         weir::freeze(model, "*");
         weir::add_lora(model, "*.attention.*", draws, {.rank = 8, .alpha = 16.0});
       }},
      {"  experts in 4 bits", 5e-3,
       [&](Model& model) {
         weir::freeze(model, "*");
         weir::set_storage(model, {{"*.experts", weir::Storage::kInt4}});
         weir::add_lora(model, "*.attention.*", draws, {.rank = 8, .alpha = 16.0});
       }},
      {"routers alone", 5e-3, [](Model& model) { weir::train_only(model, {"*.router.*"}); }},
  };
  for (const Way& way : ways) {
    Model model = base;
    way.prepare(model);
    weir::AdamW<float> tuner({.learning_rate = way.learning_rate, .weight_decay = 0.0});
    const weir::TowardsBase<float> towards(base, "*", way.pull);
    const auto pull = [&](Index) { towards.add_gradient(model); };
    weir::Rng batches(5);
    const double seconds = seconds_of([&] {
      train(model, tuner, second, tuning_steps, batches,
            way.pull > 0.0 ? std::function<void(Index)>(pull) : nullptr, {.through_stored = true});
    });
    const double first_after = bits_per_byte(model, first);
    const double second_after = bits_per_byte(model, second);
    std::cout << way.name << std::string(24 - way.name.size(), ' ')
              << padded(std::to_string(trained_numbers(model)), 9)
              << padded(fixed(first_after, 3), 8) << padded(fixed(first_after - first_before, 3), 8)
              << padded(fixed(second_after, 3), 8)
              << padded(fixed(second_before - second_after, 3), 8) << padded(fixed(seconds, 1), 9)
              << std::endl;
  }
  isolate(base, first, second, {first_before, second_before}, tuning_steps);
}

}  // namespace

int main(int argc, char** argv) {
  return run_program("finetune", argc, argv, parse_small_run, run);
}
