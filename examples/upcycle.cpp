// SPDX-License-Identifier: MIT
// A trained dense model becomes a mixture of experts in several ways (sparse upcycling, virtual
// groups of smaller experts, noise, Drop-Upcycling) and is trained on, beside the dense model and a
// mixture that starts from nothing. Where theory says so, the mixture begins where the dense model
// ends.
//
//     upcycle [steps of the dense model [steps after it [bytes of a window]]]
#include <cmath>
#include <iostream>
#include <optional>
#include <string>
#include <vector>

#include <weir/tuning/training_parts.hpp>
#include <weir/tuning/upcycle.hpp>

#include "byte_decoder.hpp"
#include "progress.hpp"
#include "small_training.hpp"

namespace {

using weir::Index;
using Model = weir::Decoder<float>;

constexpr Index kModel = 128;

struct Way {
  std::string name;
  weir::UpcycleConfig config;
  Index k;
  Index warm_up = 0;  ///< Steps in which the routers alone are trained.
};

Model upcycled(const Model& dense, const Way& way) {
  Model model = dense;
  weir::Rng rng(2);
  weir::upcycle_blocks(model.layers(), "mlp", "moe",
                       [&](const weir::AnyLayer<float>& network,
                           Index /*layer*/) -> std::optional<weir::AnyLayer<float>> {
                         return weir::MoELayer(
                             weir::upcycled_router<float>(kModel, way.config, rng),
                             weir::TopKSoftmax<float>({.k = way.k}), weir::Dropless(),
                             weir::upcycled_bank(*network.get<weir::Glu<float>>(), way.config, rng),
                             weir::SwitchLoss<float>(), weir::ZLoss<float>());
                       });
  return model;
}

struct Options : SmallRun {
  Options() { more = 200; }
};

std::optional<int> parse(int argc, char** argv, Options& options) {
  return parse_small_run(argc, argv, options);
}

void run(Options how) {
  const Index steps = how.steps;
  const Index more = how.more;
  const Corpus text = read_corpus(split_paths(WEIR_DEFAULT_CORPUS));

  weir::Rng rng(1);
  Model dense = make_byte_decoder({.dense = true}, rng);
  weir::AdamW<float> optimizer({.learning_rate = 2e-3});
  train(dense, optimizer, text, steps, rng);
  const double before = bits_per_byte(dense, text);
  std::cout << "the dense model after " << steps << " steps: " << fixed(before, 3)
            << " bits per byte\n\n"
            << "                                  bits per byte at step\n"
            << "                      parameters      0  " << padded(std::to_string(more / 2), 5)
            << "  " << padded(std::to_string(more), 5) << "   seconds\n";

  const auto show = [&](const std::string& name, Model& model, weir::AdamW<float>& own,
                        Index warm_up) {
    weir::Rng batches(5);
    std::cout << name << std::string(22 - name.size(), ' ')
              << padded(std::to_string(weir::parameter_count(model)), 10)
              << padded(fixed(bits_per_byte(model, text), 3), 7) << std::flush;
    const weir::UnfreezeSchedule schedule({{"*.router.*", 0}, {"*", warm_up}});
    Index done = 0;
    double seconds = 0.0;
    for (const Index part : {more / 2, more - more / 2}) {
      seconds += seconds_of([&] {
        train(model, own, text, part, batches, [&](Index step) {
          if (warm_up > 0) schedule.apply(model, done + step);
        });
      });
      done += part;
      std::cout << padded(fixed(bits_per_byte(model, text), 3), 7) << std::flush;
    }
    std::cout << padded(fixed(seconds, 1), 10) << std::endl;
  };
  {
    Model model = dense;
    weir::AdamW<float> own({.learning_rate = 1e-3});
    show("dense, trained on", model, own, 0);
  }
  const std::vector<Way> ways = {
      {"8 copies", {.copies = 8}, 2},
      {"  routers first", {.copies = 8}, 2, more / 10},
      {"  noise of 5 %", {.copies = 8, .noise = 0.05}, 2},
      {"  half dropped", {.copies = 8, .drop = 0.5}, 2},
      {"8 copies in 4 parts", {.copies = 8, .granularity = 4}, 8},
      {"  scaled evenly", {.copies = 8, .granularity = 4, .scale = weir::UpcycleScale::kEven}, 8},
  };
  for (const Way& way : ways) {
    Model model = upcycled(dense, way);
    weir::AdamW<float> own({.learning_rate = 1e-3});
    show(way.name, model, own, way.warm_up);
  }
  {
    weir::Rng fresh(9);
    Model model = make_byte_decoder({.d_hidden = 512, .interleave = {.stride = 1}}, fresh);
    weir::AdamW<float> own({.learning_rate = 2e-3});
    show("a mixture from nothing", model, own, 0);
  }
}

}  // namespace

int main(int argc, char** argv) {
  return run_program("upcycle", argc, argv, parse, run);
}
