// SPDX-License-Identifier: MIT
// Operations on the experts of a trained model, in all of its layers at once: removed by several
// criteria, merged, cloned, split, added, exchanged, switched off; damaged, found and masked. Shows
// how far the output of the layers moves and what the model needs for a byte afterwards, and after
// a few steps of training that heal it. Then tokens have other numbers of experts than in training.
//
//     surgery [steps of training [steps of healing [bytes of a window]]]
#include <functional>
#include <iostream>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include <weir/core/input_samples.hpp>
#include <weir/tuning/active_experts.hpp>
#include <weir/tuning/expert_health.hpp>
#include <weir/tuning/expert_scores.hpp>
#include <weir/tuning/surgery.hpp>

#include "byte_decoder.hpp"
#include "progress.hpp"
#include "small_training.hpp"

namespace {

using weir::Index;
using Model = weir::Decoder<float>;
using Layer = weir::AnyLayer<float>;
using Surgery = weir::ExpertSurgery<Layer, weir::AdamW<float>>;

Layer& mixture_of(Model& model, std::size_t layer) {
  return model.layers()[layer].branches().back().layer;
}

/// What the mixtures of the model are given, layer by layer.
std::vector<weir::Matrix<float>> inputs_of(Model& model, const Corpus& text) {
  weir::Rng rng(7);
  const Windows windows = random_windows(text, rng);
  weir::InputSamples samples(512);
  weir::infer(model, windows.bytes.ids, {.sequences = &windows.sequences, .inputs = &samples});
  std::vector<weir::Matrix<float>> inputs;
  for (std::size_t l = 0; l < model.layers().size(); ++l) {
    inputs.push_back(samples.of(weir::router_weight("surgery", mixture_of(model, l))));
  }
  return inputs;
}

/// The four experts that a score says matter most.
std::vector<Index> best_half(const std::vector<double>& score) {
  return weir::most_important(score, static_cast<Index>(score.size()) / 2);
}

/// How much the output changes without each expert.
std::vector<double> removal_changes(Surgery& surgery, bool renormalise) {
  std::vector<double> changes;
  for (Index e = 0; e < surgery.experts(); ++e) {
    const std::vector<Index> excluded = {e};
    changes.push_back(renormalise ? surgery.without(excluded).relative
                                  : surgery.without_output(e).relative);
  }
  return changes;
}

struct Operation {
  std::string name;
  std::function<weir::OutputChange(Surgery&, Layer&, const weir::Matrix<float>&)> operate;
};

struct Options : SmallRun {
  Options() { more = 50; }
};

std::optional<int> parse(int argc, char** argv, Options& options) {
  return parse_small_run(argc, argv, options);
}

/// Other numbers of experts for a token than the two that the model was trained with, layer by
/// layer and text by text.
void show_active_experts(Model model, const Corpus& text, const Corpus& other) {
  std::cout << "\nexperts of a token   in layers 0 1 2 3   bits per byte of C++, of Markdown   "
               "seconds\n";
  using Numbers = std::vector<Index>;
  const std::vector<Numbers> ways = {{2, 2, 2, 2}, {1, 1, 1, 1}, {1, 2, 2, 2}, {2, 1, 2, 2},
                                     {2, 2, 1, 2}, {2, 2, 2, 1}, {3, 3, 3, 3}, {8, 8, 8, 8}};
  for (const Numbers& numbers : ways) {
    std::string list;
    for (std::size_t l = 0; l < numbers.size(); ++l) {
      weir::set_active_experts(model, "layers." + std::to_string(l) + ".moe", numbers[l]);
      list += " " + std::to_string(numbers[l]);
    }
    double first = 0.0;
    double second = 0.0;
    const double seconds = seconds_of([&] {
      first = bits_per_byte(model, text);
      second = bits_per_byte(model, other);
    });
    std::cout << std::string(31, ' ') << list << padded(fixed(first, 3), 22)
              << padded(fixed(second, 3), 13) << padded(fixed(seconds, 2), 10) << std::endl;
  }
}

void run(Options how) {
  const Index steps = how.steps;
  const Index healing = how.more;
  const Corpus text = read_corpus(split_paths(WEIR_DEFAULT_CORPUS));
  weir::Rng rng(1);
  Model trained = make_byte_decoder({.interleave = {.stride = 1}}, rng);
  weir::AdamW<float> trained_by({.learning_rate = 2e-3});
  train(trained, trained_by, text, steps, rng);
  std::cout << "8 experts in each of 4 layers, " << fixed(bits_per_byte(trained, text), 3)
            << " bits per byte after " << steps << " steps\n\n"
            << "                              output of the layers   bits per byte\n"
            << "                     experts   changes  of tokens   then  after " << healing
            << " steps  seconds\n";

  weir::Rng draws(3);
  using X = const weir::Matrix<float>&;
  const std::vector<Operation> operations = {
      {"nothing",
       [](Surgery& s, Layer&, X) {
         return s.remap({.source = {0, 1, 2, 3, 4, 5, 6, 7}});
       }},
      {"exchange two", [](Surgery& s, Layer&, X) { return s.swap(0, 5); }},
      {"add a cold one", [&](Surgery& s, Layer&, X) { return s.add_cold(draws); }},
      {"clone the busiest",
       [](Surgery& s, Layer&, X) { return s.clone(weir::most_important(s.use(), 1)[0]); }},
      {"split the busiest",
       [&](Surgery& s, Layer&, X) { return s.split(weir::most_important(s.use(), 1)[0], draws); }},
      {"keep the 4 most used", [](Surgery& s, Layer&, X) { return s.keep(best_half(s.use())); }},
      {"  by router weight",
       [](Surgery& s, Layer& layer, X) { return s.keep(best_half(weir::router_norms(layer))); }},
      {"  by output change",
       [](Surgery& s, Layer&, X) { return s.keep(best_half(removal_changes(s, true))); }},
      {"  not renormalised",
       [](Surgery& s, Layer&, X) { return s.keep(best_half(removal_changes(s, false))); }},
      {"merge in 4 groups",
       [](Surgery& s, Layer& layer, X x) {
         const auto before = s.output();
         const auto use = s.use();
         const auto groups =
             weir::group_by_router<float>(weir::router_logits("surgery", layer, x), use, 4);
         for (const auto& group : groups) s.merge(group, use);
         return weir::output_change<float>(before, s.output());
       }},
  };
  for (const Operation& operation : operations) {
    Model model = trained;
    weir::AdamW<float> optimizer = trained_by;
    const auto inputs = inputs_of(model, text);
    weir::OutputChange mean;
    Index experts = 0;
    for (std::size_t l = 0; l < model.layers().size(); ++l) {
      Surgery surgery(mixture_of(model, l), inputs[l], optimizer,
                      "layers." + std::to_string(l) + ".moe");
      const auto change = operation.operate(surgery, mixture_of(model, l), inputs[l]);
      mean.relative += change.relative / static_cast<double>(model.layers().size());
      mean.tokens += change.tokens / static_cast<double>(model.layers().size());
      experts = surgery.experts();
    }
    const double then = bits_per_byte(model, text);
    weir::Rng batches(5);
    const double seconds = seconds_of([&] { train(model, optimizer, text, healing, batches); });
    std::cout << operation.name << std::string(21 - operation.name.size(), ' ')
              << padded(std::to_string(experts), 7) << padded(fixed(100.0 * mean.relative, 1), 8)
              << " %" << padded(fixed(100.0 * mean.tokens, 0), 9) << " %"
              << padded(fixed(then, 3), 7) << padded(fixed(bits_per_byte(model, text), 3), 10)
              << padded(fixed(seconds, 1), 15) << std::endl;
  }

  std::cout << "\nbits per byte with damaged experts, one of each layer\n";
  const auto inputs = inputs_of(trained, text);
  const auto checksums =
      weir::checksums_of(weir::expert_health(mixture_of(trained, 0), 8, inputs[0]));
  const std::vector<std::pair<std::string, float>> damages = {
      {"a thousand times too large", 1000.0F}, {"of the wrong sign", -1.0F}, {"lost", 0.0F}};
  for (const auto& [name, factor] : damages) {
    Model model = trained;
    for (auto& [weight_name, parameter] : weir::parameters(model)) {
      if (weir::matches_pattern("*.experts.2.down", weight_name)) parameter->value *= factor;
    }
    const auto health =
        weir::expert_health(mixture_of(model, 0), 8, inputs[0], {.checksums = checksums});
    const auto damaged = weir::damaged_experts(health);
    const auto allowed = weir::all_but(8, damaged);
    std::cout << "  " << name << std::string(28 - name.size(), ' ')
              << fixed(bits_per_byte(model, text), 3) << "   found: " << damaged.size() << " ("
              << name_of(health[2].condition)
              << ")   masked: " << fixed(bits_per_byte(model, text, {.allowed = allowed}), 3)
              << '\n';
  }
  show_active_experts(trained, text, read_corpus(split_paths(WEIR_SECOND_CORPUS)));
}

}  // namespace

int main(int argc, char** argv) {
  return run_program("surgery", argc, argv, parse, run);
}
