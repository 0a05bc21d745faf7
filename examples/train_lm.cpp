// SPDX-License-Identifier: MIT
// Trains a byte-level decoder with mixtures of experts on text, compares it with byte models of
// order 0 to 2 fitted on the same text, and lets it write. Without options it learns from the C++
// headers it was itself compiled from. `train_lm --help` lists the options.
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <filesystem>
#include <fstream>
#include <iostream>
#include <map>
#include <optional>
#include <stdexcept>
#include <string>
#include <string_view>
#include <vector>

#include <weir/analysis/trace_recorder.hpp>
#include <weir/analysis/traced_tokens.hpp>
#include <weir/core/cache_storage.hpp>
#include <weir/core/input_samples.hpp>
#include <weir/core/parallel.hpp>
#include <weir/core/storage.hpp>
#include <weir/io/checkpoint.hpp>
#include <weir/model/decoder.hpp>
#include <weir/model/generate.hpp>
#include <weir/model/language_loss.hpp>
#include <weir/model/text_mixture.hpp>
#include <weir/nn/cross_entropy.hpp>
#include <weir/optim/adamw.hpp>
#include <weir/optim/clip.hpp>
#include <weir/optim/set_precision.hpp>
#include <weir/optim/warmup_cosine.hpp>
#include <weir/tuning/quantisation.hpp>

#include "byte_baseline.hpp"
#include "byte_decoder.hpp"
#include "bytes.hpp"
#include "command_line.hpp"
#include "corpus.hpp"
#include "escaped.hpp"
#include "interrupt.hpp"
#include "live_report.hpp"
#include "loads.hpp"
#include "progress.hpp"
#include "rank_training.hpp"
#include "run_on_ranks.hpp"
#include "training_texts.hpp"

namespace {

using weir::Index;

struct Options {
  std::vector<std::string> text;
  std::vector<std::string> mix_at;
  TextChoice texts;  ///< What these two say.
  std::string metrics;
  std::string report;
  std::string save;
  Index save_every = 200;
  std::string resume;
  std::uint64_t seed = 1;
  int threads = weir::hardware_threads();
  bool quiet = false;

  ByteDecoderConfig model;

  Index steps = 600;
  Index batch = 16;
  Index context = 128;
  std::string precision = "fp32";
  double learning_rate = 3e-3;
  Index warmup = 50;
  double weight_decay = 0.1;
  double clip = 1.0;
  Index eval_every = 50;
  Index eval_tokens = 65536;
  std::vector<std::string> storage;
  std::vector<std::string> cache;

  std::string prompt = "template <";
  Index generate = 400;
  weir::Sampling sampling = {.temperature = 0.7, .top_p = 0.95};
};

/// Four bits, rounded for text of the training.
constexpr const char* kCalibrated = "int4-calibrated";

constexpr const char* kExamples =
    "\nExamples:\n"
    "  train_lm                                      C++ headers, a few minutes\n"
    "  train_lm --text ~/books --steps 3000          text of your own\n"
    "  train_lm --text headers=0.7 --text readmes=0.3 --mix-at 0.8:headers=0.2,readmes=0.8\n"
    "                                                two texts; the weights change at 80 %\n"
    "  train_lm --dense                              the same without experts, to compare\n"
    "  train_lm --experts 16 --selector sigmoid-top-k --balance 0 --bias-rate 0.001\n"
    "                                                balanced without a loss, as DeepSeek-V3\n"
    "  train_lm --precision fp8                      products in 8 bits, as DeepSeek-V3 trains\n"
    "  train_lm --metrics run.jsonl --quiet          figures for a plot\n"
    "  train_lm --report run                         run/report.html, to watch in a browser\n"
    "  train_lm --save run --resume run              goes on where the last run stopped\n"
    "  mpirun -np 4 train_lm --threads 1             experts and text on four ranks (MPI)\n"
    "\nCtrl-C ends the training early, with results, a sample and, with --save, a checkpoint.\n";

/// Refuses options that contradict each other.
/// \throws std::runtime_error  with the names of both.
void check(const Options& options) {
  if (options.texts.mixed()) options.texts.phases(options.steps, options.batch);
  const ByteDecoderConfig& model = options.model;
  const auto expect = [](bool holds, const std::string& message) {
    if (!holds) throw std::runtime_error(message);
  };
  const auto number = [](Index value) { return std::to_string(value); };
  expect(model.d_model % (2 * model.heads) == 0, "--d-model: " + number(model.d_model) +
                                                     ", expected an even multiple of --heads " +
                                                     number(model.heads));
  expect(model.heads % model.kv_heads == 0, "--kv-heads: " + number(model.kv_heads) +
                                                ", expected a divisor of --heads " +
                                                number(model.heads));
  expect(model.attention != "latent" || model.d_model % (4 * model.heads) == 0,
         "--d-model: " + number(model.d_model) + ", expected a multiple of 4 * --heads " +
             number(model.heads) + " for --attention latent");
  expect(
      model.dense || model.k <= model.experts,
      "--top-k: " + number(model.k) + ", expected no more than --experts " + number(model.experts));
  const Index ranks = rank_job().size();
  expect(options.batch % ranks == 0, "--batch: " + number(options.batch) +
                                         ", expected a multiple of the " + number(ranks) +
                                         " ranks");
  expect(model.interleave.phase < model.interleave.stride,
         "--phase: " + number(model.interleave.phase) + ", expected less than --stride " +
             number(model.interleave.stride));
}

/// Fills `options` from the command line; returns the exit code if there is nothing left to do.
std::optional<int> parse(int argc, char** argv, Options& options) {
  CommandLine line("Trains a byte-level mixture-of-experts language model and lets it write.");
  line.group("Data");
  line.add(
      "--text", options.text,
      "Files or folders to learn from, of any size (default: C++ headers). With weights,\n"
      "NAME=WEIGHT, they are mixed: windows of each, shuffled, in these proportions. NAME is a\n"
      "file, a folder, headers (C++) or readmes (English)");
  line.add("--mix-at", options.mix_at,
           "Other weights from this share of the steps on: SHARE:NAME=WEIGHT,NAME=WEIGHT");
  line.add("--metrics", options.metrics, "Write figures over time to this file, JSON lines");
  line.add("--report", options.report,
           "Keep report.html in this folder up to date: curves, warnings, where tokens go");
  line.add("--save", options.save, "Save checkpoints in this folder, the last three stay");
  line.add("--save-every", options.save_every, "Steps between checkpoints")
      ->check(limits::at_least(1));
  line.add("--resume", options.resume,
           "Go on from the newest checkpoint in this folder, if there is one; the other options\n"
           "have to be those of the run that saved it");
  line.add("--seed", options.seed, "Repeats a run bit for bit, with any --threads");
  line.add("--threads", options.threads, "How many cores to use")->check(limits::at_least(1));
  line.add("--quiet", options.quiet, "No progress, only the results");

  ByteDecoderConfig& model = options.model;
  line.group("Model");
  line.add("--layers", model.layers, "Decoder layers")->check(limits::at_least(1));
  line.add("--d-model", model.d_model, "Width of a token")->check(limits::at_least(1));
  line.add("--heads", model.heads, "Query heads")->check(limits::at_least(1));
  line.add("--kv-heads", model.kv_heads, "Key and value heads, a divisor of --heads")
      ->check(limits::at_least(1));
  line.add("--attention", model.attention,
           "grouped-query, or latent as DeepSeek-V2 has it, which heeds no --kv-heads")
      ->check(CLI::IsMember({"grouped-query", "latent"}));
  line.add("--d-hidden", model.d_hidden, "Width of one expert; dense layers have --top-k times it")
      ->check(limits::at_least(1));
  line.add("--tied", model.tied, "Use the embedding as the output head");

  line.group("Mixture of experts");
  line.add("--dense", model.dense, "No experts: the dense model of equal active parameters");
  line.add("--experts", model.experts, "Experts of a sparse layer")->check(limits::at_least(1));
  line.add("--top-k", model.k, "Experts each token visits")->check(limits::at_least(1));
  line.add("--shared", model.shared, "Experts every token visits besides")
      ->check(limits::at_least(0));
  line.add("--stride", model.interleave.stride, "Every n-th layer is sparse")
      ->check(limits::at_least(1));
  line.add("--first-dense", model.interleave.first_dense, "How many layers at the start are dense")
      ->check(limits::at_least(0));
  line.add("--phase", model.interleave.phase, "Which layer of a stride is sparse (-1: the last)")
      ->check(limits::at_least(-1));
  line.add("--selector", model.selector, "How experts are chosen and weighted")
      ->check(CLI::IsMember({"softmax-top-k", "top-k-softmax", "sigmoid-top-k"}));
  line.add("--capacity-factor", model.capacity_factor, "Limit on an expert's tokens (0: dropless)")
      ->check(limits::at_least(0));
  line.add("--balance", model.balance, "Coefficient of the Switch load-balancing loss")
      ->check(limits::at_least(0));
  line.add("--z-loss", model.z_loss, "Coefficient of the router z-loss")
      ->check(limits::at_least(0));
  line.add("--bias-rate", model.bias_rate, "Step of the selection bias, for sigmoid-top-k")
      ->check(limits::at_least(0));
  line.add("--jitter", model.jitter, "Noise on the router's input while training")
      ->check(limits::between(0, 1));

  line.group("Training");
  line.add("--steps", options.steps, "Optimizer steps")->check(limits::between(1, 1e9));
  line.add("--batch", options.batch, "Sequences in a step")->check(limits::between(1, 1e9));
  line.add("--context", options.context, "Bytes in a sequence")->check(limits::between(1, 1e9));
  line.add("--precision", options.precision,
           "How weights are multiplied: fp32, bf16, or fp8 as DeepSeek-V3 (with moments in bf16)")
      ->check(CLI::IsMember({"fp32", "bf16", "fp8"}));
  line.add("--learning-rate", options.learning_rate, "Its peak")->check(limits::at_least(0));
  line.add("--warmup", options.warmup, "Steps until the peak")->check(limits::at_least(0));
  line.add("--weight-decay", options.weight_decay, "Weight decay of AdamW")
      ->check(limits::at_least(0));
  line.add("--clip", options.clip, "Largest norm of the gradient")->check(limits::above_zero());
  line.add("--eval-every", options.eval_every, "Steps between validations")
      ->check(limits::at_least(1));
  line.add("--eval-tokens", options.eval_tokens, "Bytes of validation text to judge by")
      ->check(limits::between(1, 1e9));

  line.add("--storage", options.storage,
           "Judge the trained model stored like this as well: bf16, int8, int4, int4-calibrated,\n"
           "fp8, mxfp4, int8-dot, int4-dot, packed")
      ->check([](const std::string& name) {
        const bool known = name == kCalibrated || weir::storage_named(name).has_value();
        return std::string(known ? "" : name + " is no storage");
      });

  line.add("--cache", options.cache,
           "Judge the trained model as it decodes with what it keeps of earlier bytes stored\n"
           "like this: full, bf16, int8, int6")
      ->check(CLI::IsMember(std::vector<std::string>(weir::kCacheStorageNames.begin(),
                                                     weir::kCacheStorageNames.end())));

  line.group("Writing");
  line.add("--prompt", options.prompt, "What the model continues")
      ->check([](const std::string& prompt) {
        return std::string(prompt.empty() ? "at least one byte is needed" : "");
      });
  line.add("--generate", options.generate, "Bytes to write")->check(limits::between(0, 1e9));
  line.add("--temperature", options.sampling.temperature, "0 always takes the likeliest byte")
      ->check(limits::at_least(0));
  line.add("--sample-top-k", options.sampling.top_k, "Draw from the n likeliest bytes (0: all)")
      ->check(limits::at_least(0));
  line.add("--sample-top-p", options.sampling.top_p, "Draw from the likeliest bytes of this mass")
      ->check(limits::between(0, 1));
  line.add("--sample-min-p", options.sampling.min_p,
           "Draw from bytes this likely, as a share of the likeliest")
      ->check(limits::between(0, 1));
  line.footer(kExamples);
  return line.parse(argc, argv);
}

struct Validation {
  double bits = 0.0;                 ///< Bits per byte, the mean of all texts.
  std::vector<double> bits_of_text;  ///< Of each text.
  NamedReports reports;              ///< Loads summed over all windows.
};

class Trainer {
 public:
  Trainer(const Options& options, const std::vector<TrainingText>& texts)
      : options_(options),
        texts_(texts),
        notes_of_texts_(notes_of(options.texts, texts)),
        mixture_(mixture_of(options, texts)),
        rng_(options.seed),
        model_(make_byte_decoder(options.model, rng_)),
        optimizer_({.learning_rate = options.learning_rate,
                    .weight_decay = options.weight_decay,
                    .bfloat16_moments = options.precision == "fp8"}),
        schedule_{.peak = options.learning_rate,
                  .warmup_steps = std::min(options.warmup, options.steps - 1),
                  .total_steps = options.steps,
                  .floor = options.learning_rate / 10.0},
        sequences_(weir::Sequences::uniform(options.batch / rank_job().size(), options.context)) {
    weir::set_precision(model_, *weir::precision_named(options.precision));
    ranks_.agree(model_);
    ranks_.watch(model_, cache_);
    const auto of_each = options.eval_tokens / static_cast<Index>(texts.size());
    const Index batches = std::max<Index>(1, of_each / (options.batch * options.context));
    for (const TrainingText& text : texts) {
      validation_windows_.push_back(spread_windows(static_cast<std::size_t>(text.validation.size()),
                                                   options.context, batches * options.batch));
    }
  }

  struct Step {
    double loss = 0.0;  ///< Nats per byte, without auxiliary losses.
    double aux_loss = 0.0;
    double gradient_norm = 0.0;
    weir::LayerReport load;  ///< All layers together.
  };

  /// Lets `observer` see the routing of training passes; null for nobody.
  void show_routings_to(weir::RoutingObserver* observer) { observer_ = observer; }

  Step step() {
    batch_.clear();
    for (Index s = 0; s < options_.batch; ++s) {  // All ranks draw the same, and read their own.
      const bool own = is_own(s);
      if (mixture_) {
        const weir::TextWindow window = mixture_->next();
        if (own) add(texts_[static_cast<std::size_t>(window.text)].train, window.start);
      } else {
        const Index start = rng_.below(texts_[0].train.size() - options_.context);
        if (own) add(texts_[0].train, start);
      }
    }
    record_.clear();
    record_.show_routings_to(observer_);
    Step result;
    // Losses are means over the rank's tokens, whose sum over ranks is to be that of all tokens.
    const double share = 1.0 / static_cast<double>(rank_job().size());
    const auto rank = static_cast<std::uint64_t>(rank_job().rank());
    const bool alone = rank_job().size() == 1;
    // Of each rank and step its own; rng_ stays the same on all ranks.
    weir::Rng own_noise(rng_.at(rng_.position()) +
                        static_cast<std::uint64_t>(optimizer_.steps() * rank_job().size()) + rank);
    result.loss = share * forward({.training = true,
                                   .sequences = &sequences_,
                                   .rng = alone ? &rng_ : &own_noise,
                                   .aux_scale = share});
    result.loss = ranks_.sum(result.loss);
    result.aux_loss = ranks_.sum(record_.aux_loss());
    result.load = sum_of_all(record_.reports());
    model_.backward_from_head(loss_.backward(model_, loss_cache_, static_cast<float>(share)),
                              cache_);
    result.gradient_norm = ranks_.clip(model_, options_.clip);
    optimizer_.set_learning_rate(schedule_.at(optimizer_.steps()));
    ranks_.step(optimizer_, model_);
    record_.show_routings_to(nullptr);
    return result;
  }

  /// What the last step recorded.
  const weir::PassRecord& record() const { return record_; }

  /// How far the selection biases of each layer are apart, where it has any.
  std::map<std::string, double> bias_spread() {
    constexpr std::string_view kEnd = ".selector.bias";
    std::map<std::string, double> spread;
    for (const auto& [name, buffer] : weir::buffers(model_)) {
      if (!name.ends_with(kEnd)) continue;
      spread[name.substr(0, name.size() - kEnd.size())] =
          static_cast<double>(buffer->value.maxCoeff() - buffer->value.minCoeff());
    }
    return spread;
  }

  /// Where some tokens of the validation text go.
  weir::TracedTokens routes() {
    constexpr Index kTokens = 4096;
    weir::TraceRecorder recorder({.layout = {.choices = options_.model.k}});
    weir::PassRecord record;
    record.show_routings_to(&recorder);
    Index id = 0;
    for (std::size_t t = 0; t < texts_.size(); ++t) {
      const Index domain =
          recorder.domain(mixture_ ? escaped(texts_[t].name) : std::string("validation text"));
      const auto all = static_cast<Index>(validation_windows_[t].size());
      const auto windows = std::min<Index>(
          all, std::max<Index>(1, kTokens / options_.context / static_cast<Index>(texts_.size())));
      for (Index i = 0; i < windows; ++i) {
        batch_.clear();
        add_validation(t, static_cast<std::size_t>(i * all / windows));
        recorder.begin({{.id = id++, .domain = domain}});
        model_.forward_to_head(batch_.ids, {.record = &record}, cache_);
      }
    }
    return weir::TracedTokens(recorder.trace());
  }

  Validation validate() {
    record_.clear();
    Validation result;
    for (std::size_t t = 0; t < texts_.size(); ++t) {
      result.bits_of_text.push_back(
          bits_of(t, [&] { return forward({.sequences = &sequences_}); }));
    }
    result.bits = mean(result.bits_of_text);
    result.reports = sum_by_layer(record_.reports());
    return result;
  }

  /// Bits per byte of the model stored in another way; see --storage.
  double validate_stored(const std::string& name) {
    weir::Decoder<float> trained = model_;
    const bool calibrated = name == kCalibrated;
    const auto storage = calibrated ? weir::Storage::kInt4 : *weir::storage_named(name);
    if (calibrated) calibrate(storage);
    weir::set_storage(model_, storage);
    const double bits = validate().bits;
    model_ = std::move(trained);
    return bits;
  }

  struct Cached {
    double bits = 0.0;
    Index bytes_per_token = 0;
  };

  /// Bits per byte of the model as it decodes, window by window; see --cache.
  Cached validate_cached(weir::CacheStorage storage) {
    const weir::CrossEntropy<float> loss;
    weir::CrossEntropy<float>::Cache loss_cache;
    Cached result;
    std::vector<double> bits;
    for (std::size_t t = 0; t < texts_.size(); ++t) {
      bits.push_back(bits_of(t, [&] {
        const weir::Decoder<float>::State empty(storage);
        std::vector<weir::Decoder<float>::State> states(
            static_cast<std::size_t>(sequences_.count()), empty);
        std::vector<weir::Decoder<float>::State*> pointers;
        for (auto& state : states) pointers.push_back(&state);
        const weir::Matrix<float>& logits =
            model_.decode(batch_.ids, {.sequences = &sequences_}, pointers, cache_);
        result.bytes_per_token = states.front().bytes_per_token();
        return static_cast<double>(loss.forward(logits, batch_.targets, loss_cache));
      }));
    }
    result.bits = mean(bits);
    return result;
  }

  /// Bits per byte of a byte model on the very bytes of a text that `validate` predicts.
  double validate(std::size_t text, const ByteBaseline& baseline, int order) {
    double bits = 0.0;
    const std::vector<std::size_t>& starts = validation_windows_[text];
    for (const std::size_t start : starts) {
      const std::size_t before = std::min<std::size_t>(start, ByteBaseline::kHighest);
      window_.resize(before + static_cast<std::size_t>(options_.context) + 1);
      texts_[text].validation.read(static_cast<Index>(start - before), window_);
      for (std::size_t i = before + 1; i < window_.size(); ++i) {
        bits += baseline.bits(window_, i, std::min(order, static_cast<int>(i)));
      }
    }
    return bits / static_cast<double>(static_cast<Index>(starts.size()) * options_.context);
  }

  /// Bits per byte of the validation windows of a text, batch by batch; `loss()` is that of
  /// `batch_`, in nats per byte.
  template <class Loss>
  double bits_of(std::size_t text, Loss&& loss) {
    const auto size = static_cast<std::size_t>(options_.batch);
    const std::size_t windows = validation_windows_[text].size();
    double bits = 0.0;
    for (std::size_t begin = 0; begin < windows; begin += size) {
      batch_.clear();
      for (std::size_t w = begin; w < begin + size; ++w) {
        if (is_own(static_cast<Index>(w - begin))) add_validation(text, w);
      }
      bits += loss();
    }
    bits = ranks_.sum(bits) / static_cast<double>(rank_job().size());
    return bits * static_cast<double>(size) / (std::log(2.0) * static_cast<double>(windows));
  }

  /// The mean of a figure of each text.
  static double mean(const std::vector<double>& figures) {
    return training_texts::sum_of(figures) / static_cast<double>(figures.size());
  }

  /// What has been drawn of the texts; none if they are not mixed.
  const std::optional<weir::TextMixture>& mixture() const { return mixture_; }

  void save(const std::string& folder) {
    weir::io::TrainingState state;
    state.rng = rng_;
    state.position = mixture_ ? mixture_->position() : 0;
    state.notes = notes();
    ranks_.save(folder, model_, optimizer_, state);
  }
  void resume(const std::filesystem::path& checkpoint) {
    const Notes own = notes();
    Notes saved = weir::io::read_notes(checkpoint);
    saved.try_emplace("precision", "fp32");  // Of a train_lm that had no other.
    saved.try_emplace("text", "without weights");
    for (const auto& [name, value] : saved) {
      const auto found = own.find(name);
      if (found != own.end() && found->second != value) {
        throw std::runtime_error("--" + name + ": " + found->second + ", but " +
                                 checkpoint.string() + " was saved with " + value);
      }
    }
    const weir::io::TrainingState state = ranks_.load(checkpoint, model_, optimizer_);
    rng_ = state.rng;
    if (mixture_) mixture_->seek(state.position);
  }

  Index steps() const { return optimizer_.steps(); }
  weir::Decoder<float>& model() { return model_; }
  RankTraining& ranks() { return ranks_; }
  double learning_rate() const { return optimizer_.learning_rate(); }

 private:
  Notes notes() const {
    Notes notes = notes_of(options_.model);
    notes["precision"] = options_.precision;
    notes.insert(notes_of_texts_.begin(), notes_of_texts_.end());
    if (!mixture_) return notes;
    notes["seed"] = std::to_string(options_.seed);
    notes["context"] = std::to_string(options_.context);
    if (!options_.texts.changes.empty()) {
      notes["batch"] = std::to_string(options_.batch);
      notes["steps"] = std::to_string(options_.steps);
    }
    return notes;
  }

  static std::optional<weir::TextMixture> mixture_of(const Options& options,
                                                     const std::vector<TrainingText>& texts) {
    if (!options.texts.mixed()) return std::nullopt;
    std::vector<Index> sizes;
    for (const TrainingText& text : texts) sizes.push_back(text.train.size());
    return weir::TextMixture(sizes, options.texts.phases(options.steps, options.batch),
                             {.length = options.context, .seed = options.seed});
  }

  /// Whether sequence s of a batch is this rank's.
  bool is_own(Index s) const {
    return s >= rank_job().begin(options_.batch) && s < rank_job().end(options_.batch);
  }

  /// Adds a window of a text to the batch.
  void add(const weir::io::TextFiles& text, Index start) {
    window_.resize(static_cast<std::size_t>(options_.context) + 1);
    text.read(start, window_);
    batch_.add(window_, 0, options_.context);
  }
  void add_validation(std::size_t text, std::size_t window) {
    add(texts_[text].validation, static_cast<Index>(validation_windows_[text][window]));
  }

  /// Rounds the weights for the inputs that some training text gives them.
  void calibrate(weir::Storage storage) {
    constexpr Index kBatches = 8;
    weir::InputSamples samples(2048);
    std::vector<std::vector<std::size_t>> starts;
    for (const TrainingText& text : texts_) {
      starts.push_back(spread_windows(static_cast<std::size_t>(text.train.size()), options_.context,
                                      kBatches * options_.batch));
    }
    std::size_t window = 0;
    for (Index b = 0; b < kBatches; ++b) {
      batch_.clear();
      for (Index s = 0; s < options_.batch; ++s, ++window) {
        const std::size_t text = window % texts_.size();
        if (is_own(s)) add(texts_[text].train, static_cast<Index>(starts[text][window]));
      }
      forward({.sequences = &sequences_, .inputs = &samples});
    }
    weir::calibrate(model_, {{"*", storage}}, samples);
  }

  /// The loss of `batch_`, in nats per byte.
  double forward(weir::Pass pass) {
    pass.record = &record_;
    const auto& x = model_.forward_to_head(batch_.ids, pass, cache_);
    return static_cast<double>(loss_.forward(model_, x, batch_.targets, pass, loss_cache_));
  }

  const Options& options_;
  const std::vector<TrainingText>& texts_;
  Notes notes_of_texts_;
  std::optional<weir::TextMixture> mixture_;
  weir::Rng rng_;
  weir::Decoder<float> model_;
  weir::AdamW<float> optimizer_;
  RankTraining ranks_;
  weir::WarmupCosine schedule_;
  weir::Sequences sequences_;
  weir::LanguageLoss<float> loss_;
  weir::Decoder<float>::Cache cache_;
  weir::LanguageLoss<float>::Cache loss_cache_;
  weir::PassRecord record_{weir::PassRecord::Collects::kLossesAndReports};
  weir::RoutingObserver* observer_ = nullptr;
  std::vector<std::vector<std::size_t>> validation_windows_;  // Where those of each text begin.
  std::string window_;                                        // Bytes of a text.
  ByteBatch batch_;
};

/// Lets the model continue the prompt. Whenever the text fills the context it was trained on, it
/// goes on from the latter half.
void write_sample(const Options& options, weir::Decoder<float>& model) {
  weir::set_storage(model, weir::Storage::kPacked);  // from here on for inference only
  std::vector<Index> prompt = to_ids(options.prompt);
  weir::Rng rng(options.seed);
  std::cout << "\nsample (the prompt comes first)\n----\n";
  Escaper escaper;
  const auto show = [&](unsigned char byte) { std::cout << escaper.add(byte); };
  for (const char byte : options.prompt) show(static_cast<unsigned char>(byte));
  for (Index left = options.generate; left > 0;) {
    const Index kept = std::min(static_cast<Index>(prompt.size()), (options.context + 1) / 2);
    prompt.erase(prompt.begin(), prompt.end() - kept);
    const Index count = std::clamp<Index>(options.context - kept, 1, left);
    const std::vector<Index> more = weir::generate(model, prompt, count, options.sampling, rng);
    for (const Index token : more) show(static_cast<unsigned char>(token));
    std::cout << std::flush;
    prompt.insert(prompt.end(), more.begin(), more.end());
    left -= count;
  }
  std::cout << escaper.flush() << "\n----\n";
}

/// One line of figures.
/// \param validation  Null if this step was not followed by one.
void write_metrics(std::ostream& metrics, Index done, double rate, const Trainer::Step& step,
                   double learning_rate, const Validation* validation,
                   const std::vector<TrainingText>& texts) {
  Json json = {{"step", done},
               {"loss", step.loss},
               {"aux_loss", step.aux_loss},
               {"gradient_norm", step.gradient_norm},
               {"learning_rate", learning_rate},
               {"tokens_per_second", rate},
               {"drop_rate", step.load.drop_rate()},
               {"load", step.load.load}};
  if (validation != nullptr) {
    json["validation_bits_per_byte"] = validation->bits;
    for (std::size_t t = 0; t < texts.size() && texts.size() > 1; ++t) {
      json["validation_by_text"][escaped(texts[t].name)] = validation->bits_of_text[t];
    }
    json["layers"] = to_json(validation->reports);
  }
  metrics << json.dump() << std::endl;
}

/// What there is to learn from.
void print_texts(const TextChoice& choice, const std::vector<TrainingText>& texts) {
  for (std::size_t t = 0; t < texts.size(); ++t) {
    const TrainingText& text = texts[t];
    std::cout << (choice.mixed() ? escaped(text.name) : std::string("text")) << ": "
              << text.train.files() << " files, " << grouped(text.train.size())
              << " bytes to learn from, " << grouped(text.validation.size()) << " to judge by\n";
  }
}

/// What came of a mixture of texts: how often each was read, and how well it is predicted.
void print_mixture(const std::vector<TrainingText>& texts, const weir::TextMixture& mixture,
                   const std::vector<double>& bits,
                   const std::vector<std::vector<double>>& of_orders) {
  std::cout << "  weights by phase    windows  epochs    bits  order-2  text\n";
  for (std::size_t t = 0; t < texts.size(); ++t) {
    std::string weights;
    for (const weir::MixturePhase& phase : mixture.phases()) {
      const double share = phase.weights[t] / training_texts::sum_of(phase.weights);
      weights += (weights.empty() ? "" : " ") + fixed(100.0 * share, 0) + " %";
    }
    const auto text = static_cast<Index>(t);
    std::cout << padded(weights, 18) << padded(grouped(mixture.drawn(text)), 11)
              << padded(fixed(mixture.epochs(text), 2), 8) << padded(fixed(bits[t], 3), 8)
              << padded(fixed(of_orders.back()[t], 3), 9) << "  " << escaped(texts[t].name) << '\n';
  }
}

void run(Options options) {
  if (options.text.empty()) options.text = split_paths(WEIR_DEFAULT_CORPUS);
  options.texts = choose_texts(options.text, options.mix_at,
                               {{"headers", WEIR_DEFAULT_CORPUS}, {"readmes", WEIR_SECOND_CORPUS}});
  check(options);
  if (!rank_job().is_first()) {  // The first rank speaks for all.
    options.quiet = true;
    options.metrics = options.report = "";
  }
  std::ofstream metrics;
  if (!options.metrics.empty()) metrics.open(options.metrics);
  if (!metrics) throw std::runtime_error("--metrics: cannot write " + options.metrics);
  weir::set_threads(options.threads);
  const std::vector<TrainingText> texts = open_texts(options.texts, options.context);

  Trainer trainer(options, texts);
  const ByteDecoderConfig& model = options.model;
  const auto [total, active] = count_parameters(trainer.model(), model, [&](Index of_rank) {
    return static_cast<Index>(trainer.ranks().sum(static_cast<double>(of_rank)));
  });
  const std::string parameters =
      "parameters: " + grouped(total) + " in total, " + grouped(active) + " active for a token\n";
  if (!options.quiet) {
    print_texts(options.texts, texts);
    std::cout << "model: " << model.layers << " layers of width " << model.d_model;
    if (model.dense) {
      std::cout << ", all dense";
    } else {
      std::cout << ", " << model.interleave.count_sparse(model.layers) << " with " << model.experts
                << " experts, " << model.k << " for each token";
    }
    std::cout << '\n' << parameters << "threads: " << weir::threads();
    if (rank_job().size() > 1) std::cout << " on each of " << rank_job().size() << " ranks";
    std::cout << std::endl;
  }

  if (!options.resume.empty()) {
    if (const auto checkpoint = weir::io::latest_checkpoint(options.resume)) {
      trainer.resume(*checkpoint);
      if (!options.quiet) std::cout << "going on from " << checkpoint->string() << std::endl;
    }
  }
  std::optional<report::LiveReport> live_report;
  report::Json facts;
  if (!options.report.empty()) {
    live_report.emplace(options.report, options.steps);
    trainer.show_routings_to(&live_report->logits());
    facts = report::Json::array({{"parameters", grouped(total)},
                                 {"active for a token", grouped(active)},
                                 {"layers", std::to_string(model.layers)},
                                 {"tokens in a step", grouped(options.batch * options.context)}});
    if (!model.dense) {
      facts.push_back({"experts", std::to_string(model.experts) + ", " + std::to_string(model.k) +
                                      " for each token"});
      facts.push_back({"selector", model.selector});
    }
  }
  StatusLine status(options.quiet);
  double seconds = 0.0;  // Of training alone.
  double smooth_loss = 0.0;
  Validation validation;
  const Interrupt interrupt;
  const Index before = trainer.steps();
  if (before >= options.steps) validation = trainer.validate();
  for (Index done = before + 1; done <= options.steps; ++done) {
    Trainer::Step step;
    seconds += seconds_of([&] { step = trainer.step(); });
    const double rate =
        static_cast<double>((done - before) * options.batch * options.context) / seconds;
    report::LiveStep live = {.step = done,
                             .loss = step.loss,
                             .gradient_norm = step.gradient_norm,
                             .tokens_per_second = rate};
    if (live_report) live.bias = trainer.bias_spread();
    smooth_loss = done == before + 1 ? step.loss : 0.9 * smooth_loss + 0.1 * step.loss;
    const bool interrupted = trainer.ranks().sum(Interrupt::happened() ? 1.0 : 0.0) > 0.0;
    const bool validate = interrupted || done == options.steps || done % options.eval_every == 0;
    weir::PassRecord of_step;
    if (live_report) of_step = trainer.record();
    if (validate) validation = trainer.validate();
    if (live_report) {
      live.record = &of_step;
      if (validate) live.validation = validation.bits;
      live_report->add(live);
      if (validate && !model.dense && rank_job().size() == 1) {
        live_report->set_routes({"the model", trainer.routes()});
      }
      if (validate || live_report->is_due()) {
        live_report->write(facts, !interrupted && done < options.steps);
      }
    }

    std::vector<std::string> parts = {
        std::to_string(done) + "/" + std::to_string(options.steps), "loss " + fixed(smooth_loss, 3),
        "validation " + (validation.bits > 0.0 ? fixed(validation.bits, 3) : "-") + " bits/byte",
        fixed(rate / 1000.0, 1) + "k tokens/s"};
    if (!model.dense) {
      parts.push_back("dropped " + fixed(100.0 * step.load.drop_rate(), 1) + " %");
      parts.push_back("load " + spark_line(step.load.load));
    }
    status.show(fitted(parts, static_cast<double>(done), static_cast<double>(options.steps),
                       status.columns()),
                validate);

    if (metrics.is_open()) {
      write_metrics(metrics, done, rate, step, trainer.learning_rate(),
                    validate ? &validation : nullptr, texts);
    }
    const bool save = interrupted || done == options.steps || done % options.save_every == 0;
    if (save && !options.save.empty()) trainer.save(options.save);
    if (interrupted) break;
  }
  status.close();

  const auto [baseline, counted_all] = count_bytes(texts);
  Json bits = {{"model", validation.bits}};
  std::vector<std::vector<double>> of_orders(ByteBaseline::kHighest + 1);
  std::cout << "\ntrained for " << fixed(seconds, 1) << " s\n"
            << "validation bits/byte: model " << fixed(validation.bits, 3);
  for (int order = 0; order <= ByteBaseline::kHighest; ++order) {
    const std::string name = "order-" + std::to_string(order);
    std::vector<double>& of_order = of_orders[static_cast<std::size_t>(order)];
    for (std::size_t t = 0; t < texts.size(); ++t) {
      of_order.push_back(trainer.validate(t, baseline, order));
    }
    bits[name] = Trainer::mean(of_order);
    std::cout << " | " << name << ' ' << fixed(bits[name], 3);
  }
  std::cout << (counted_all ? "\n" : " (the first 128 MiB)\n");
  if (trainer.mixture()) {
    print_mixture(texts, *trainer.mixture(), validation.bits_of_text, of_orders);
  }
  for (const std::string& name : options.storage) {
    const double stored = trainer.validate_stored(name);
    bits[name] = stored;
    std::cout << "stored as " << name << ": " << fixed(stored, 4) << " bits/byte, "
              << fixed(100.0 * (stored / validation.bits - 1.0), 2) << " % more than "
              << fixed(validation.bits, 4) << '\n';
  }
  // The keys and values of all heads, at 16 bits.
  const auto all_heads = static_cast<double>(4 * model.layers * model.d_model);
  for (const std::string& name : options.cache) {
    const auto cached = trainer.validate_cached(*weir::cache_storage_named(name));
    bits["cache-" + name] = cached.bits;
    std::cout << "decoded with a cache in " << name << ": " << fixed(cached.bits, 5)
              << " bits/byte, " << fixed(100.0 * (cached.bits / validation.bits - 1.0), 3)
              << " % more than " << fixed(validation.bits, 5) << "; " << cached.bytes_per_token
              << " bytes a token, "
              << fixed(100.0 * (1.0 - static_cast<double>(cached.bytes_per_token) / all_heads), 1)
              << " % less than all heads at 16 bits\n";
  }
  std::cout << parameters;
  if (!validation.reports.empty()) std::cout << "expert load on the validation text:\n";
  print_loads(validation.reports);
  if (metrics.is_open()) {
    const Json summary = {{"validation_bits_per_byte", bits},
                          {"layers", to_json(validation.reports)},
                          {"parameters", {{"total", total}, {"active", active}}},
                          {"seconds", seconds}};
    metrics << summary.dump() << std::endl;
  }
  if (options.generate > 0) write_sample(options, trainer.model());
}

}  // namespace

int main(int argc, char** argv) {
  return run_on_ranks("train_lm", argc, argv, parse, run);
}
