// SPDX-License-Identifier: MIT
// Prints how large published mixtures of experts are, counted from their configs beside the figures
// their authors give, and then makes each of them small and trains it for a step.
// `models --help` lists the options.
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <functional>
#include <iostream>
#include <optional>
#include <span>
#include <string>
#include <string_view>
#include <utility>
#include <variant>
#include <vector>

#include <weir/attention/latent_config.hpp>
#include <weir/attention/latent_pages.hpp>
#include <weir/attention/pages.hpp>
#include <weir/core/cache_storage.hpp>
#include <weir/core/parallel.hpp>
#include <weir/core/parameter.hpp>
#include <weir/core/random.hpp>
#include <weir/model/decoder.hpp>
#include <weir/nn/cross_entropy.hpp>
#include <weir/optim/adamw.hpp>
#include <weir/presets/count.hpp>
#include <weir/presets/dbrx.hpp>
#include <weir/presets/deepseek_moe_16b.hpp>
#include <weir/presets/deepseek_v2.hpp>
#include <weir/presets/deepseek_v2_lite.hpp>
#include <weir/presets/deepseek_v3.hpp>
#include <weir/presets/ernie_4_5.hpp>
#include <weir/presets/glm_4_5.hpp>
#include <weir/presets/gpt_oss_20b.hpp>
#include <weir/presets/granite_moe.hpp>
#include <weir/presets/grok_1.hpp>
#include <weir/presets/llama_4_scout.hpp>
#include <weir/presets/mixtral_8x22b.hpp>
#include <weir/presets/mixtral_8x7b.hpp>
#include <weir/presets/olmoe_1b_7b.hpp>
#include <weir/presets/openmoe_34b.hpp>
#include <weir/presets/openmoe_8b.hpp>
#include <weir/presets/openmoe_base.hpp>
#include <weir/presets/phi_3_5_moe.hpp>
#include <weir/presets/qwen2_moe.hpp>
#include <weir/presets/qwen3_30b_a3b.hpp>
#include <weir/presets/scaled.hpp>
#include <weir/presets/st_moe_32b.hpp>
#include <weir/presets/switch_base_128.hpp>
#include <weir/presets/switch_base_256.hpp>
#include <weir/presets/switch_base_8.hpp>

#include "bytes.hpp"
#include "command_line.hpp"
#include "progress.hpp"

namespace {

using weir::Index;
using namespace weir::presets;

struct Options {
  Scale scale = {.d_model = 64};
  int steps = 1;
  double learning_rate = 3e-3;
  std::uint64_t seed = 1;
  int threads = weir::hardware_threads();
  bool no_training = false;
  bool quiet = false;
};

/// Fills `options` from the command line; returns the exit code if there is nothing left to do.
std::optional<int> parse(int argc, char** argv, Options& options) {
  CommandLine line("Counts published mixtures of experts, and trains each of them made small.");
  line.add("--no-training", options.no_training, "Only count");
  line.add("--d-model", options.scale.d_model, "Width of a token in the small models")
      ->check(limits::at_least(1));
  line.add("--steps", options.steps, "Optimizer steps of each small model")
      ->check(limits::at_least(1));
  line.add("--learning-rate", options.learning_rate, "Learning rate of AdamW")
      ->check(limits::at_least(0));
  line.add("--seed", options.seed, "Repeats a run bit for bit, with any --threads");
  line.add("--threads", options.threads, "How many cores to use")->check(limits::at_least(1));
  line.add("--quiet", options.quiet, "No progress, only the results");
  return line.parse(argc, argv);
}

// --- One training step -------------------------------------------------------------------------

constexpr std::string_view kText =
    "A weir is a low dam across a river. It holds the water back until it stands as high as the "
    "crest, and lets the rest pass over; so the level above it stays what it is, whatever the "
    "river "
    "brings. A mixture of experts has a weir, too.";

struct Trained {
  Index layers = 0;
  Count parameters = 0;
  double forward_ms = 0.0, step_ms = 0.0;
  double loss_before = 0.0, loss_after = 0.0;
};

/// Makes `config` small, and lets it learn to continue kText byte by byte.
template <class Config>
Trained train(const Config& config, const Options& options) {
  const Config small = scaled(config, options.scale);
  weir::Rng rng(options.seed);
  weir::Decoder<float> model = weir::presets::make<float>(small, rng);
  weir::AdamW<float> optimizer({.learning_rate = options.learning_rate});

  const std::vector<Index> ids = to_ids(kText);
  const auto inputs = std::span(ids).first(ids.size() - 1);
  const auto targets = std::span(ids).subspan(1);
  weir::Decoder<float>::Cache cache;
  const weir::CrossEntropy<float> loss;
  weir::CrossEntropy<float>::Cache loss_cache;
  const auto forward = [&](const weir::Pass& pass) {
    return static_cast<double>(
        loss.forward(model.forward(inputs, pass, cache), targets, loss_cache));
  };

  Trained result{.layers = small.shape.layers, .parameters = weir::parameter_count(model)};
  result.loss_before = forward({});  // Also a first pass, after which nothing is allocated.
  result.forward_ms = 1e3 * seconds_of([&] { forward({}); });
  for (int step = 0; step < options.steps; ++step) {
    result.step_ms += 1e3 * seconds_of([&] {
                        forward({.training = true, .rng = &rng});
                        model.backward(loss.backward(loss_cache), cache);
                        optimizer.step(model);
                      }) /
                      options.steps;
  }
  result.loss_after = forward({});
  return result;
}

// --- The models --------------------------------------------------------------------------------

struct Model {
  std::string name;
  std::string total, active;  ///< As published.
  ModelShape shape;
  std::function<Trained(const Options&)> train;
  std::string note;  ///< How the published figures are counted, if otherwise.
};

template <Preset Config>
Model model(std::string name, Config config, std::string total, std::string active,
            std::string note = "") {
  return {std::move(name),
          std::move(total),
          std::move(active),
          config.shape,
          [config](const Options& options) { return train(config, options); },
          std::move(note)};
}

std::vector<Model> all_models() {
  const std::string half = "an encoder-decoder; what is trained below is its decoder half";
  const std::string openmoe = "the paper's networks of three matrices, without norms and routers";
  return {
      model("Switch-Base-8", switch_base_8(), "0.6B", "-", half),
      model("Switch-Base-128", switch_base_128(), "7.4B", "-", half),
      model("Switch-Base-256", switch_base_256(), "14.7B", "-", half),
      model("ST-MoE-32B", st_moe_32b(), "269B", "32B",
            half + "; 32B is the dense model that costs as much"),
      model("Mixtral 8x7B", mixtral_8x7b(), "46.7B", "12.9B"),
      model("Mixtral 8x22B", mixtral_8x22b(), "140.6B", "39.1B"),
      model("OpenMoE-Base", openmoe_base(), "650M", "-", openmoe),
      model("OpenMoE-8B", openmoe_8b(), "8.7B", "2.1B", openmoe),
      model("OpenMoE-8B code", openmoe_released(openmoe_8b()), "11.9B", "-",
            "networks of four matrices, as in the code; 11.9B is its memory at 16 bits"),
      model("OpenMoE-34B", openmoe_34b(), "34B", "6.0B", openmoe),
      model("Grok-1", grok_1(), "314B", "25 %", "314B without the embedding, which is the head"),
      model("DBRX", dbrx(), "132B", "36B"),
      model("DeepSeekMoE-16B", deepseek_moe_16b(), "16.4B", "2.8B"),
      model("DeepSeek-V2-Lite", deepseek_v2_lite(), "15.7B", "2.4B",
            "active without the embedding"),
      model("DeepSeek-V2", deepseek_v2(), "236B", "21B"),
      model("DeepSeek-V3", deepseek_v3(), "671B", "37B",
            "without the module of multi-token prediction, " +
                grouped(count(deepseek_v3()).prediction) + " more"),
      model("OLMoE-1B-7B", olmoe_1b_7b(), "6.9B", "1.3B"),
      model("Qwen3-30B-A3B", qwen3_30b_a3b(), "30.5B", "3.3B"),
      model("gpt-oss-20b", gpt_oss_20b(), "20.9B", "3.6B", "active without the embedding"),
      model("Llama-4-Scout", llama_4_scout(), "109B", "17B",
            "the language model alone; 109B with the one for pictures"),
      model("Kimi-K2", kimi_k2(), "1.04T", "32.6B", "1.04T as its paper counts"),
      model("GLM-4.5-Air", glm_4_5_air(), "106B", "12B", "active without the embedding"),
      model("GLM-4.5", glm_4_5(), "355B", "32B",
            "355B with the module of multi-token prediction; active without the embedding"),
      model("ERNIE-4.5-21B-A3B", ernie_4_5_21b_a3b(), "21B", "3B"),
      model("Qwen1.5-MoE-A2.7B", qwen1_5_moe_a2_7b(), "14.3B", "2.7B"),
      model("Granite-3.1-1B-A400M", granite_3_1_1b_a400m(), "1.3B", "400M"),
      model("Phi-3.5-MoE", phi_3_5_moe(), "42B", "6.6B"),
  };
}

// --- Output ------------------------------------------------------------------------------------

/// Cells of a table, the first of each row to the left and the others to the right.
class Table {
 public:
  void add(std::vector<std::string> row) {
    width_.resize(std::max(width_.size(), row.size()));
    for (std::size_t i = 0; i < row.size(); ++i) width_[i] = std::max(width_[i], row[i].size());
    rows_.push_back(std::move(row));
  }

  void print() const {
    for (const auto& row : rows_) {
      for (std::size_t i = 0; i < row.size(); ++i) {
        const std::string space(width_[i] - row[i].size(), ' ');
        std::cout << (i == 0 ? row[i] + space : "  " + space + row[i]);
      }
      std::cout << '\n';
    }
  }

 private:
  std::vector<std::vector<std::string>> rows_;
  std::vector<std::size_t> width_;
};

std::string percent(double share) {
  return fixed(100.0 * share, 1) + " %";
}

void print_counts(const std::vector<Model>& models) {
  std::cout << "Parameters, and what one token meets of them\n\n";
  Table sizes;
  sizes.add({"", "total", "published", "active", "published", "share", "without embedding",
             "and without head"});
  for (const Model& m : models) {
    const ModelCount c = count(m.shape);
    sizes.add({m.name, grouped(c.total()), m.total, grouped(c.active()), m.active,
               percent(c.active_share()), grouped(c.active_without_embedding()),
               grouped(c.active_without_vocab())});
  }
  sizes.print();
  std::cout << '\n';
  for (const Model& m : models) {
    if (!m.note.empty()) std::cout << "  " << m.name << ": " << m.note << '\n';
  }

  std::cout << "\nExperts, the work for one token and what the cache keeps of it, at 16 bits\n\n";
  Table costs;
  costs.add({"", "experts", "of each token", "combinations", "GFLOP/token", "at 4096 before it",
             "cache bytes", "multi-head", "share"});
  for (const Model& m : models) {
    const ModelCount c = count(m.shape);
    const std::string shared = m.shape.shared_hidden > 0 ? " + shared" : "";
    costs.add({m.name, std::to_string(m.shape.experts), std::to_string(m.shape.k) + shared,
               grouped(combinations(m.shape.experts, m.shape.k)),
               fixed(static_cast<double>(c.flops()) / 1e9, 2),
               fixed(static_cast<double>(c.flops(4096)) / 1e9, 2),
               grouped(static_cast<Count>(c.cache_bytes())),
               grouped(static_cast<Count>(c.multi_head_cache_bytes())),
               percent(c.cache_bytes() / c.multi_head_cache_bytes())});
  }
  costs.print();
}

/// Claims of the authors, worked out.
void print_claims() {
  const ModelShape coarse = mixtral_8x7b().shape;
  const ModelShape fine = dbrx().shape;
  const Count of_coarse = combinations(coarse.experts, coarse.k);
  const Count of_fine = combinations(fine.experts, fine.k);
  std::cout << "\nDBRX can combine its experts in " << grouped(of_fine) << " ways, Mixtral in "
            << grouped(of_coarse) << ": " << of_fine / of_coarse << " times as many\n";

  const ModelShape wide = deepseek_v2().shape;
  const double latent = count(wide).cache_bytes(6.0);
  // DeepSeek 67B: 95 layers, 8 groups of heads of 128.
  const double dense = 95.0 * 2.0 * 8.0 * 128.0 * 2.0;
  std::cout << "DeepSeek-V2 keeps " << grouped(static_cast<Count>(latent))
            << " bytes of a token at 6 bits a number, DeepSeek 67B "
            << grouped(static_cast<Count>(dense)) << " at 16: " << percent(1.0 - latent / dense)
            << " less (" << percent(1.0 - count(wide).cache_bytes() / dense)
            << " at the same 16 bits)\n";
  // The same as a LatentCache stores it, with a scale for every 128 numbers.
  const auto& config = std::get<weir::LatentConfig>(wide.attention);
  for (const auto storage : {weir::CacheStorage::kInt8, weir::CacheStorage::kInt6}) {
    const weir::LatentPages<float> pages = {storage, config.kv_rank, config.rope_dim};
    const double stored = static_cast<double>(wide.layers) *
                          static_cast<double>(pages.page_bytes() / weir::Pages::kRows);
    std::cout << "  stored as " << weir::name_of(storage)
              << ", scales included: " << grouped(static_cast<Count>(stored)) << " bytes, "
              << percent(1.0 - stored / dense) << " less\n";
  }
}

void print_training(const std::vector<Model>& models, const Options& options) {
  std::cout << "\nMade small, d_model " << options.scale.d_model << ", and trained for "
            << options.steps << (options.steps == 1 ? " step" : " steps") << " on " << kText.size()
            << " bytes of text (loss in nats per byte)\n\n";
  StatusLine status(options.quiet);
  Table table;
  table.add({"", "layers", "parameters", "loss", "after", "forward ms", "step ms"});
  for (std::size_t i = 0; i < models.size(); ++i) {
    const Model& m = models[i];
    status.show(
        "  " + bar(static_cast<double>(i), static_cast<double>(models.size()), 20) + " " + m.name,
        false);
    const Trained result = m.train(options);
    table.add({m.name, std::to_string(result.layers), grouped(result.parameters),
               fixed(result.loss_before, 4), fixed(result.loss_after, 4),
               fixed(result.forward_ms, 2), fixed(result.step_ms, 2)});
  }
  status.show("", false);
  table.print();
}

}  // namespace

int main(int argc, char** argv) {
  Options options;
  try {
    if (const auto exit_code = parse(argc, argv, options)) return *exit_code;
    weir::set_threads(options.threads);
    const std::vector<Model> models = all_models();
    print_counts(models);
    print_claims();
    if (!options.no_training) print_training(models, options);
  } catch (const std::exception& error) {
    std::cerr << "models: " << error.what() << '\n';
    return 1;
  }
}
