// SPDX-License-Identifier: MIT
// Trains a byte-level decoder with mixtures of experts on text, compares it with byte models of
// order 0 to 2 fitted on the same text, and lets it write. Without options it learns from the C++
// headers it was itself compiled from. `train_lm --help` lists the options.
#include <CLI/CLI.hpp>
#include <algorithm>
#include <chrono>
#include <cmath>
#include <cstdint>
#include <fstream>
#include <iostream>
#include <nlohmann/json.hpp>
#include <optional>
#include <span>
#include <string>
#include <utility>
#include <vector>

#include <weir/attention/grouped_query.hpp>
#include <weir/core/storage.hpp>
#include <weir/model/decoder.hpp>
#include <weir/model/generate.hpp>
#include <weir/model/interleave.hpp>
#include <weir/moe/balance/bias_balance.hpp>
#include <weir/moe/balance/switch_loss.hpp>
#include <weir/moe/balance/z_loss.hpp>
#include <weir/moe/beside/shared_experts.hpp>
#include <weir/moe/capacity/capacity_factor.hpp>
#include <weir/moe/capacity/dropless.hpp>
#include <weir/moe/experts/glu_bank.hpp>
#include <weir/moe/moe_layer.hpp>
#include <weir/moe/router/jitter_router.hpp>
#include <weir/moe/router/linear_router.hpp>
#include <weir/moe/selector/sigmoid_top_k.hpp>
#include <weir/moe/selector/softmax_top_k.hpp>
#include <weir/moe/selector/top_k_softmax.hpp>
#include <weir/nn/cross_entropy.hpp>
#include <weir/nn/glu.hpp>
#include <weir/nn/rms_norm.hpp>
#include <weir/optim/adamw.hpp>
#include <weir/optim/clip.hpp>
#include <weir/optim/warmup_cosine.hpp>

#include "byte_baseline.hpp"
#include "corpus.hpp"
#include "progress.hpp"

namespace {

using weir::Index;
using Json = nlohmann::json;

constexpr Index kBytes = 256;

struct Options {
  std::vector<std::string> text;
  std::string metrics;
  std::uint64_t seed = 1;
  int threads = weir::hardware_threads();
  bool quiet = false;

  Index layers = 4;
  Index d_model = 128;
  Index heads = 4;
  Index kv_heads = 2;
  Index d_hidden = 256;
  bool tied = false;

  bool dense = false;
  Index experts = 8;
  Index k = 2;
  Index shared = 0;
  weir::Interleave interleave = {.stride = 2};
  std::string selector = "top-k-softmax";
  double capacity_factor = 0.0;
  double balance = 0.01;
  double z_loss = 0.001;
  double bias_rate = 0.001;
  double jitter = 0.0;

  Index steps = 600;
  Index batch = 16;
  Index context = 128;
  double learning_rate = 3e-3;
  Index warmup = 50;
  double weight_decay = 0.1;
  double clip = 1.0;
  Index eval_every = 50;
  Index eval_tokens = 65536;

  std::string prompt = "template <";
  Index generate = 400;
  weir::Sampling sampling = {.temperature = 0.7, .top_p = 0.95};
};

/// Fills `options` from the command line; returns the exit code if there is nothing left to do.
std::optional<int> parse(int argc, char** argv, Options& options) {
  CLI::App app("Trains a byte-level mixture-of-experts language model and lets it write.");
  app.get_formatter()->column_width(34);
  app.set_help_flag("-h,--help", "Print this and exit");

  app.add_option("--text", options.text, "Files or folders to learn from (default: C++ headers)")
      ->group("Data");
  app.add_option("--metrics", options.metrics, "Write figures over time to this file, JSON lines")
      ->group("Data");
  app.add_option("--seed", options.seed, "Repeats a run bit for bit, with any --threads")
      ->capture_default_str()
      ->group("Data");
  app.add_option("--threads", options.threads, "How many cores to use")
      ->capture_default_str()
      ->group("Data");
  app.add_flag("--quiet", options.quiet, "No progress, only the results")->group("Data");

  const auto model = [&app](const std::string& name, auto& value, const std::string& help) {
    app.add_option(name, value, help)->capture_default_str()->group("Model");
  };
  model("--layers", options.layers, "Decoder layers");
  model("--d-model", options.d_model, "Width of a token");
  model("--heads", options.heads, "Query heads");
  model("--kv-heads", options.kv_heads, "Key and value heads, a divisor of --heads");
  model("--d-hidden", options.d_hidden, "Width of one expert; dense layers have --top-k times it");
  app.add_flag("--tied", options.tied, "Use the embedding as the output head")->group("Model");

  const auto moe = [&app](const std::string& name, auto& value, const std::string& help) {
    return app.add_option(name, value, help)->capture_default_str()->group("Mixture of experts");
  };
  app.add_flag("--dense", options.dense, "No experts: the dense model of equal active parameters")
      ->group("Mixture of experts");
  moe("--experts", options.experts, "Experts of a sparse layer");
  moe("--top-k", options.k, "Experts each token visits");
  moe("--shared", options.shared, "Experts every token visits besides");
  moe("--stride", options.interleave.stride, "Every so-many-th layer is sparse");
  moe("--first-dense", options.interleave.first_dense, "So many layers at the start are dense");
  moe("--phase", options.interleave.phase, "Which layer of a stride is sparse (-1: the last)");
  moe("--selector", options.selector, "How experts are chosen and weighted")
      ->check(CLI::IsMember({"softmax-top-k", "top-k-softmax", "sigmoid-top-k"}));
  moe("--capacity-factor", options.capacity_factor, "Limit on an expert's tokens (0: dropless)");
  moe("--balance", options.balance, "Coefficient of the Switch load-balancing loss");
  moe("--z-loss", options.z_loss, "Coefficient of the router z-loss");
  moe("--bias-rate", options.bias_rate, "Step of the selection bias, for sigmoid-top-k");
  moe("--jitter", options.jitter, "Noise on the router's input while training");

  const auto training = [&app](const std::string& name, auto& value, const std::string& help) {
    return app.add_option(name, value, help)->capture_default_str()->group("Training");
  };
  training("--steps", options.steps, "Optimizer steps")->check(CLI::PositiveNumber);
  training("--batch", options.batch, "Sequences in a step")->check(CLI::PositiveNumber);
  training("--context", options.context, "Bytes in a sequence")->check(CLI::PositiveNumber);
  training("--learning-rate", options.learning_rate, "Its peak");
  training("--warmup", options.warmup, "Steps until the peak");
  training("--weight-decay", options.weight_decay, "Of AdamW");
  training("--clip", options.clip, "Largest norm of the gradient");
  training("--eval-every", options.eval_every, "Steps between validations")
      ->check(CLI::PositiveNumber);
  training("--eval-tokens", options.eval_tokens, "Bytes of validation text to judge by")
      ->check(CLI::PositiveNumber);

  const auto writing = [&app](const std::string& name, auto& value, const std::string& help) {
    return app.add_option(name, value, help)->capture_default_str()->group("Writing");
  };
  writing("--prompt", options.prompt, "What the model continues")
      ->check([](const std::string& prompt) {
        return std::string(prompt.empty() ? "at least one byte is needed" : "");
      });
  writing("--generate", options.generate, "Bytes to write")->check(CLI::NonNegativeNumber);
  writing("--temperature", options.sampling.temperature, "0 always takes the likeliest byte");
  writing("--sample-top-k", options.sampling.top_k, "Draw from so many bytes (0: all)");
  writing("--sample-top-p", options.sampling.top_p, "Draw from the likeliest bytes of this mass");

  try {
    app.parse(argc, argv);
  } catch (const CLI::ParseError& error) {
    return app.exit(error);
  }
  return std::nullopt;
}

// --- The model ---------------------------------------------------------------------------------

using Layer = weir::AnyLayer<float>;

/// The dense network of width `width` times that of one expert.
Layer dense_layer(const Options& options, Index width, weir::Rng& rng) {
  return weir::Glu<float>(options.d_model, width * options.d_hidden, rng);
}

/// Router, experts and balancing around a selector and a capacity policy.
template <class Selector, class Capacity, class... Rules>
Layer moe_layer(const Options& options, Selector selector, Capacity capacity, weir::Rng& rng,
                Rules... rules) {
  weir::JitterRouter router(weir::LinearRouter<float>(options.d_model, options.experts, rng),
                            {.epsilon = options.jitter});
  weir::GluBank<float> experts(options.d_model, options.experts, options.d_hidden, rng);
  weir::MoELayer moe(std::move(router), std::move(selector), capacity, std::move(experts),
                     weir::SwitchLoss<float>({.coefficient = options.balance}),
                     weir::ZLoss<float>({.coefficient = options.z_loss}), rules...);
  if (options.shared == 0) return moe;
  weir::Glu<float> shared(options.d_model, options.shared * options.d_hidden, rng);
  return weir::SharedExperts(std::move(moe), std::move(shared));
}

template <class Capacity>
Layer moe_layer(const Options& options, Capacity capacity, weir::Rng& rng) {
  if (options.selector == "sigmoid-top-k") {
    return moe_layer(options, weir::SigmoidTopK<float>(options.experts, {.k = options.k}), capacity,
                     rng, weir::BiasBalance<float>({.rate = options.bias_rate}));
  }
  if (options.selector == "top-k-softmax") {
    return moe_layer(options, weir::TopKSoftmax<float>({.k = options.k}), capacity, rng);
  }
  return moe_layer(options, weir::SoftmaxTopK<float>({.k = options.k}), capacity, rng);
}

Layer moe_layer(const Options& options, weir::Rng& rng) {
  if (options.capacity_factor == 0.0) return moe_layer(options, weir::Dropless(), rng);
  return moe_layer(options,
                   weir::CapacityFactor({.train = options.capacity_factor,
                                         .evaluate = 2.0 * options.capacity_factor}),
                   rng);
}

weir::Decoder<float> make_model(const Options& options, weir::Rng& rng) {
  weir::Embedding<float> embedding(kBytes, options.d_model, rng);
  std::vector<weir::Block<float>> layers;
  for (Index l = 0; l < options.layers; ++l) {
    const bool sparse = !options.dense && options.interleave.is_sparse(l);
    const Index active = options.k + options.shared;
    weir::GroupedQueryAttention<float> attention(
        rng, {.d_model = options.d_model, .heads = options.heads, .kv_heads = options.kv_heads});
    layers.push_back(weir::pre_norm_block<float>(
        weir::RmsNorm<float>(options.d_model), std::move(attention),
        weir::RmsNorm<float>(options.d_model),
        sparse ? moe_layer(options, rng) : dense_layer(options, active, rng),
        sparse ? "moe" : "mlp"));
  }
  std::optional<weir::Linear<float>> head;
  if (!options.tied) head = weir::Linear<float>(options.d_model, kBytes, rng);
  return {std::move(embedding), std::move(layers), weir::RmsNorm<float>(options.d_model),
          std::move(head)};
}

/// Total parameters, and those that one token meets.
std::pair<Index, Index> count_parameters(weir::Decoder<float>& model, const Options& options) {
  Index total = 0;
  Index in_experts = 0;
  for (const auto& [name, parameter] : weir::parameters(model)) {
    total += parameter->value.size();
    if (name.find(".experts.") != std::string::npos) in_experts += parameter->value.size();
  }
  return {total, total - in_experts + in_experts * options.k / options.experts};
}

// --- Text --------------------------------------------------------------------------------------

/// Byte ids of several windows of text, and the byte that follows each.
struct Batch {
  std::vector<Index> ids, targets;

  void clear() {
    ids.clear();
    targets.clear();
  }

  void add(std::string_view text, std::size_t start, Index length) {
    for (std::size_t i = start; i < start + static_cast<std::size_t>(length); ++i) {
      ids.push_back(static_cast<unsigned char>(text[i]));
      targets.push_back(static_cast<unsigned char>(text[i + 1]));
    }
  }
};

/// Start of window `i` of `count` spread evenly over the text.
std::size_t window_start(std::string_view text, Index context, Index i, Index count) {
  const auto room = static_cast<double>(text.size() - static_cast<std::size_t>(context) - 1);
  return static_cast<std::size_t>(room * static_cast<double>(i) / static_cast<double>(count));
}

struct Validation {
  double bits = 0.0;                                   ///< Bits per byte.
  std::vector<weir::PassRecord::NamedReport> reports;  ///< Loads summed over all windows.
};

void add_reports(std::vector<weir::PassRecord::NamedReport>& sum,
                 const std::vector<weir::PassRecord::NamedReport>& more) {
  if (sum.empty()) {
    sum = more;
    return;
  }
  for (std::size_t l = 0; l < sum.size(); ++l) {
    weir::LayerReport& into = sum[l].report;
    const weir::LayerReport& from = more[l].report;
    into.assignments += from.assignments;
    into.dropped += from.dropped;
    for (std::size_t e = 0; e < into.load.size(); ++e) into.load[e] += from.load[e];
  }
}

/// Assignments of each expert, over all sparse layers, and the share that was dropped.
std::pair<std::vector<Index>, double> total_load(
    const std::vector<weir::PassRecord::NamedReport>& reports) {
  std::vector<Index> load;
  double dropped = 0.0;
  double assignments = 0.0;
  for (const auto& [name, report] : reports) {
    load.resize(report.load.size());
    for (std::size_t e = 0; e < load.size(); ++e) load[e] += report.load[e];
    dropped += static_cast<double>(report.dropped);
    assignments += static_cast<double>(report.assignments);
  }
  return {load, assignments > 0.0 ? dropped / assignments : 0.0};
}

class Trainer {
 public:
  Trainer(const Options& options, const Corpus& corpus)
      : options_(options),
        corpus_(corpus),
        rng_(options.seed),
        model_(make_model(options, rng_)),
        optimizer_({.learning_rate = options.learning_rate, .weight_decay = options.weight_decay}),
        schedule_{.peak = options.learning_rate,
                  .warmup_steps = std::min(options.warmup, options.steps - 1),
                  .total_steps = options.steps,
                  .floor = options.learning_rate / 10.0},
        sequences_(weir::Sequences::uniform(options.batch, options.context)) {}

  struct Step {
    double loss = 0.0;  ///< Nats per byte, without auxiliary losses.
    double aux_loss = 0.0;
    double gradient_norm = 0.0;
  };

  Step step(Index number) {
    batch_.clear();
    const auto room = static_cast<Index>(corpus_.train.size()) - options_.context;
    for (Index s = 0; s < options_.batch; ++s) {
      batch_.add(corpus_.train, static_cast<std::size_t>(rng_.below(room)), options_.context);
    }
    record_.clear();
    const weir::Pass pass{
        .training = true, .sequences = &sequences_, .rng = &rng_, .record = &record_};
    const auto& logits = model_.forward(batch_.ids, pass, cache_);
    Step result;
    result.loss = static_cast<double>(loss_.forward(logits, batch_.targets, loss_cache_));
    result.aux_loss = record_.aux_loss();
    model_.backward(loss_.backward(loss_cache_), cache_);
    result.gradient_norm = weir::clip_global_norm(model_, options_.clip);
    optimizer_.set_learning_rate(schedule_.at(number));
    optimizer_.step(model_);
    return result;
  }

  Validation validate() {
    Validation result;
    const Index per_batch = options_.batch * options_.context;
    const Index batches = std::max<Index>(1, options_.eval_tokens / per_batch);
    for (Index b = 0; b < batches; ++b) {
      batch_.clear();
      for (Index s = 0; s < options_.batch; ++s) {
        batch_.add(corpus_.validation, start_of_validation(b * options_.batch + s),
                   options_.context);
      }
      record_.clear();
      const weir::Pass pass{.sequences = &sequences_, .record = &record_};
      const auto& logits = model_.forward(batch_.ids, pass, cache_);
      result.bits += static_cast<double>(loss_.forward(logits, batch_.targets, loss_cache_)) /
                     std::log(2.0) / static_cast<double>(batches);
      add_reports(result.reports, record_.reports());
    }
    return result;
  }

  /// Bits per byte of a byte model on the very bytes that `validate` predicts.
  double validate(const ByteBaseline& baseline, int order) const {
    const Index per_batch = options_.batch * options_.context;
    const Index windows = std::max<Index>(1, options_.eval_tokens / per_batch) * options_.batch;
    double bits = 0.0;
    for (Index w = 0; w < windows; ++w) {
      const std::size_t first = start_of_validation(w) + 1;
      for (std::size_t i = first; i < first + static_cast<std::size_t>(options_.context); ++i) {
        bits += baseline.bits(corpus_.validation, i, std::min(order, static_cast<int>(i)));
      }
    }
    return bits / static_cast<double>(windows * options_.context);
  }

  weir::Decoder<float>& model() { return model_; }
  const std::vector<weir::PassRecord::NamedReport>& reports() const { return record_.reports(); }
  double learning_rate() const { return optimizer_.learning_rate(); }

 private:
  std::size_t start_of_validation(Index window) const {
    const Index per_batch = options_.batch * options_.context;
    const Index windows = std::max<Index>(1, options_.eval_tokens / per_batch) * options_.batch;
    return window_start(corpus_.validation, options_.context, window, windows);
  }

  const Options& options_;
  const Corpus& corpus_;
  weir::Rng rng_;
  weir::Decoder<float> model_;
  weir::AdamW<float> optimizer_;
  weir::WarmupCosine schedule_;
  weir::Sequences sequences_;
  weir::CrossEntropy<float> loss_;
  weir::PassRecord record_{weir::PassRecord::Collects::kLossesAndReports};
  weir::Decoder<float>::Cache cache_;
  weir::CrossEntropy<float>::Cache loss_cache_;
  Batch batch_;
};

// --- Output ------------------------------------------------------------------------------------

/// JSON of what a validation found.
Json to_json(const std::vector<weir::PassRecord::NamedReport>& reports) {
  Json json = Json::array();
  for (const auto& [name, report] : reports) {
    json.push_back({{"layer", name},
                    {"load", report.load},
                    {"drop_rate", report.drop_rate()},
                    {"imbalance", report.imbalance()}});
  }
  return json;
}

void print_loads(const std::vector<weir::PassRecord::NamedReport>& reports) {
  for (const auto& [name, report] : reports) {
    std::cout << "  " << name << "  max/mean " << fixed(report.imbalance(), 2) << "  dropped "
              << fixed(100.0 * report.drop_rate(), 1) << " %  load %";
    for (const Index load : report.load) {
      const double share = static_cast<double>(load) / static_cast<double>(report.assignments);
      std::cout << ' ' << fixed(100.0 * share, 1);
    }
    std::cout << "  " << spark_line(report.load) << '\n';
  }
}

/// Lets the model continue the prompt. Whenever the text fills the context it was trained on, it
/// goes on from the latter half.
void write_sample(const Options& options, weir::Decoder<float>& model) {
  weir::set_storage(model, weir::Storage::kPacked);  // from here on for inference only
  std::vector<Index> prompt;
  for (const char c : options.prompt) prompt.push_back(static_cast<unsigned char>(c));
  weir::Rng rng(options.seed);
  std::cout << "\nsample (the prompt comes first)\n----\n" << options.prompt;
  for (Index left = options.generate; left > 0;) {
    const Index kept = std::min(static_cast<Index>(prompt.size()), (options.context + 1) / 2);
    prompt.erase(prompt.begin(), prompt.end() - kept);
    const std::vector<Index> more =
        weir::generate(model, std::span<const Index>(prompt),
                       std::clamp<Index>(options.context - kept, 1, left), options.sampling, rng);
    for (const Index token : more) std::cout << static_cast<char>(token);
    std::cout << std::flush;
    prompt.insert(prompt.end(), more.begin(), more.end());
    left -= static_cast<Index>(more.size());
  }
  std::cout << "\n----\n";
}

void run(Options options) {
  if (options.text.empty()) options.text = split_paths(WEIR_DEFAULT_CORPUS);
  options.sampling.check();  // Not only after the training.
  weir::set_threads(options.threads);
  const Corpus corpus = read_corpus(options.text);
  if (static_cast<Index>(corpus.validation.size()) < options.context + 2) {
    throw std::runtime_error("the text is too short: 5 % of it are " +
                             std::to_string(corpus.validation.size()) +
                             " bytes, less than --context");
  }
  std::ofstream metrics;
  if (!options.metrics.empty()) {
    metrics.open(options.metrics);
    if (!metrics) throw std::runtime_error("cannot write " + options.metrics);
  }

  Trainer trainer(options, corpus);
  const auto [total, active] = count_parameters(trainer.model(), options);
  std::cout << "text: " << corpus.files << " files, "
            << grouped(static_cast<long long>(corpus.train.size())) << " bytes to learn from, "
            << grouped(static_cast<long long>(corpus.validation.size())) << " to judge by\n"
            << "model: " << options.layers << " layers of width " << options.d_model;
  if (options.dense) {
    std::cout << ", all dense";
  } else {
    std::cout << ", " << options.interleave.count_sparse(options.layers) << " with "
              << options.experts << " experts, " << options.k << " for each token";
  }
  std::cout << "\nparameters: " << grouped(total) << " in total, " << grouped(active)
            << " active for a token\n"
            << "threads: " << weir::threads() << std::endl;

  using Clock = std::chrono::steady_clock;
  StatusLine status(options.quiet);
  double seconds = 0.0;  // Of training alone.
  double smooth_loss = 0.0;
  Validation validation;
  for (Index step = 0; step < options.steps; ++step) {
    const auto begin = Clock::now();
    const Trainer::Step result = trainer.step(step);
    seconds += std::chrono::duration<double>(Clock::now() - begin).count();

    const double rate = static_cast<double>((step + 1) * options.batch * options.context) / seconds;
    const bool last = step + 1 == options.steps;
    const bool validate = last || (step + 1) % options.eval_every == 0;
    smooth_loss = step == 0 ? result.loss : 0.9 * smooth_loss + 0.1 * result.loss;
    const auto [load, dropped] = total_load(trainer.reports());
    if (validate) validation = trainer.validate();

    std::string line = "[" +
                       bar(static_cast<double>(step + 1), static_cast<double>(options.steps), 24) +
                       "] " + std::to_string(step + 1) + "/" + std::to_string(options.steps) +
                       "  loss " + fixed(smooth_loss, 3) + "  validation " +
                       (validation.bits > 0.0 ? fixed(validation.bits, 3) : "-") + " bits/byte  " +
                       fixed(rate / 1000.0, 1) + "k tokens/s";
    if (!options.dense) {
      line += "  dropped " + fixed(100.0 * dropped, 1) + " %  load " + spark_line(load);
    }
    status.show(line, validate);

    if (metrics.is_open()) {
      Json json = {{"step", step + 1},
                   {"loss", result.loss},
                   {"aux_loss", result.aux_loss},
                   {"gradient_norm", result.gradient_norm},
                   {"learning_rate", trainer.learning_rate()},
                   {"tokens_per_second", rate},
                   {"drop_rate", dropped},
                   {"load", load}};
      if (validate) {
        json["validation_bits_per_byte"] = validation.bits;
        json["layers"] = to_json(validation.reports);
      }
      metrics << json.dump() << std::endl;
    }
  }
  status.close();

  const ByteBaseline baseline(corpus.train);
  std::cout << "\ntrained for " << fixed(seconds, 1) << " s\n"
            << "validation bits/byte: model " << fixed(validation.bits, 3);
  Json summary = {{"model", validation.bits}};
  for (int order = 0; order <= ByteBaseline::kHighest; ++order) {
    const double bits = trainer.validate(baseline, order);
    std::cout << " | order-" << order << ' ' << fixed(bits, 3);
    summary["order-" + std::to_string(order)] = bits;
  }
  std::cout << "\nparameters: " << grouped(total) << " in total, " << grouped(active)
            << " active for a token\n";
  if (!validation.reports.empty()) std::cout << "expert load on the validation text:\n";
  print_loads(validation.reports);
  if (metrics.is_open()) {
    metrics << Json{{"validation_bits_per_byte", summary},
                    {"layers", to_json(validation.reports)},
                    {"parameters", {{"total", total}, {"active", active}}},
                    {"seconds", seconds}}
                   .dump()
            << std::endl;
  }
  if (options.generate > 0) write_sample(options, trainer.model());
}

}  // namespace

int main(int argc, char** argv) {
  Options options;
  try {
    if (const auto exit_code = parse(argc, argv, options)) return *exit_code;
    run(options);
  } catch (const std::exception& error) {
    std::cerr << "train_lm: " << error.what() << '\n';
    return 1;
  }
}
