// SPDX-License-Identifier: MIT
// A model of a published shape with random weights, from the files of a checkpoint to its tokens:
//
//     pretrained/SHAPE/load/bf16/threads:N       config.json and bfloat16 files to weights stored
//                                                for inference; the files are in the page cache if
//                                                they have room there
//         GB/s             of the files
//         copies           that rate over the one at which as much memory, or 4 GB, is copied to
//                          new memory
//         memory           the most memory that loading takes, over the size of the files
//     pretrained/SHAPE/prefill/bf16/threads:N    a prompt of 512 tokens, up to its last logits
//     pretrained/SHAPE/decode/bf16/threads:N     one token at a time behind a prompt of 128
//     pretrained/SHAPE/decode/quarter/threads:N  the same with a quarter of the experts in memory
//         tokens/s
//         hits             the share of wanted experts that were in memory
//         llama tokens/s   of llama.cpp, with the same weights in bfloat16 and as many threads, in
//                          the same row, where the environment variable WEIR_LLAMA_CPP_DIR or
//                          CMake names the folder of its libraries (see .ci/run)
//         llama:weir       the time of llama.cpp over that of weir
//
//     pretrained/SHAPE/gguf/threads:N            only mix and fine: writes model.gguf, for the
//                                                benchmarks of other programs (llama_bench.sh)
//
// SHAPE is olmoe, OLMoE-1B-7B as published (14 GB of files, and as much memory), layers, three of
// its layers (2.8 GB), or small; or of Mixtral's family, 1024 wide, of 8 layers with 16 heads in 4
// groups: mix, with 8 experts of 3584, of which a token meets 2, or fine, with 64 of 512 and 6
// (1.6 and 1.8 GB, and as much as model.gguf). Files are made in the folder that WEIR_BENCH_FOLDER
// names, by default weir_pretrained among the temporary files, and stay there.
#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdlib>
#include <cstring>
#include <filesystem>
#include <fstream>
#include <memory>
#include <span>
#include <string>
#include <utility>
#include <vector>

#include <benchmark/benchmark.h>

#include <weir/attention/grouped_query_config.hpp>
#include <weir/core/aligned.hpp>
#include <weir/core/parallel.hpp>
#include <weir/core/random.hpp>
#include <weir/core/storage.hpp>
#include <weir/core/types.hpp>
#include <weir/io/families/mixtral.hpp>
#include <weir/io/families/olmoe.hpp>
#include <weir/io/gguf_families/llama.hpp>
#include <weir/io/gguf_families/olmoe.hpp>
#include <weir/io/gguf_model_writer.hpp>
#include <weir/io/pretrained.hpp>
#include <weir/model/decoder.hpp>
#include <weir/nn/packed_glu.hpp>
#include <weir/presets/mixtral.hpp>
#include <weir/presets/model_shape.hpp>
#include <weir/presets/olmoe_1b_7b.hpp>
#include <weir/presets/scaled.hpp>

#include "peer/llama_cpp.hpp"
#include "support/clock.hpp"
#include "support/program.hpp"
#include "support/rows.hpp"

namespace {

namespace bench = weir::bench;
namespace fs = std::filesystem;
namespace io = weir::io;
namespace presets = weir::presets;
using weir::Index;

constexpr double kGiga = 1e-9;

/// A model of a family, of sizes that have a name.
template <class Config>
struct Shape {
  std::string name;
  Config config;

  const presets::ModelShape& sizes() const { return config.shape; }
};

Shape<presets::OlmoeConfig> olmoe() {
  return {"olmoe", presets::olmoe_1b_7b()};
}
Shape<presets::OlmoeConfig> olmoe_layers() {
  Shape<presets::OlmoeConfig> shape = {"layers", presets::olmoe_1b_7b()};
  shape.config.shape.layers = 3;
  return shape;
}
Shape<presets::OlmoeConfig> small_olmoe() {
  return {"small", presets::scaled(presets::olmoe_1b_7b(), {.d_model = 64, .layers = 2})};
}

/// A model of Mixtral's family that fits a small machine.
Shape<presets::MixtralConfig> mixtral(const std::string& name, Index experts, Index hidden,
                                      Index k) {
  return {
      name,
      {.shape = {.layers = 8,
                 .d_model = 1024,
                 .vocab = 32000,
                 .attention = weir::GroupedQueryConfig{.heads = 16, .kv_heads = 4, .head_dim = 64},
                 .experts = experts,
                 .k = k,
                 .d_hidden = hidden}}};
}
Shape<presets::MixtralConfig> mix() {
  return mixtral("mix", 8, 3584, 2);
}
Shape<presets::MixtralConfig> fine() {
  return mixtral("fine", 64, 512, 6);
}

/// Random numbers of variance 1 / in; ones for norms; of variance 1 for the embedding, so that
/// tokens differ enough to choose different experts.
void fill_random(const io::PublishedTensor& tensor, weir::Rng& rng, std::vector<float>& numbers) {
  Index count = 1;
  for (const Index length : tensor.shape) count *= length;
  numbers.resize(static_cast<std::size_t>(count));
  if (tensor.shape.size() == 1) {
    std::fill(numbers.begin(), numbers.end(), 1.0F);
    return;
  }
  const bool is_embedding = tensor.name.find("embed") != std::string::npos;
  const double variance = is_embedding ? 1.0 : 1.0 / static_cast<double>(tensor.shape.back());
  const auto bound = static_cast<float>(std::sqrt(3.0 * variance));
  const weir::Rng own = rng.split();
  weir::parallel_rows(count, 1, [&](Index begin, Index end) {
    for (Index i = begin; i < end; ++i) {
      const double unit = weir::unit_interval(own.at(static_cast<std::uint64_t>(i)));
      numbers[static_cast<std::size_t>(i)] = bound * static_cast<float>(2.0 * unit - 1.0);
    }
  });
}

/// The folder of a checkpoint in bfloat16, made if it is not there.
template <class Config>
fs::path folder_of(const Shape<Config>& shape) {
  const char* const named = std::getenv("WEIR_BENCH_FOLDER");
  const fs::path folder =
      (named == nullptr ? fs::temp_directory_path() / "weir_pretrained" : fs::path(named)) /
      shape.name;
  if (fs::exists(folder / "config.json")) return folder;
  fs::create_directories(folder);
  const Config& config = shape.config;
  weir::Rng unset = weir::Rng::unset();
  auto model = presets::make<float>(config, unset);
  const auto shapes = io::shapes_of(io::tensors_of("pretrained_bench", model));
  const auto layout = io::published_layout(io::Family<Config>::names(config, nullptr), shapes,
                                           io::detail::head_sizes(config.shape));
  weir::Rng rng(1);
  io::detail::write_model<float>(
      folder, layout, {.dtype = io::Dtype::kBF16},
      [&](const io::PublishedTensor& tensor, std::vector<float>& numbers) {
        fill_random(tensor, rng, numbers);
      });
  io::write_file(folder / "config.json", io::detail::config_json(config, io::Dtype::kBF16).dump(2));
  return folder;
}

/// The same model as a GGUF file in bfloat16, made if it is not there, tensor by tensor from the
/// files of the checkpoint.
template <class Config>
fs::path gguf_of(const Shape<Config>& shape) {
  const fs::path folder = folder_of(shape);
  const fs::path path = folder / "model.gguf";
  if (fs::exists(path)) return path;
  const Config& config = shape.config;
  const io::CheckpointFolder source(folder);
  weir::Rng unset = weir::Rng::unset();
  auto model = presets::make<float>(config, unset);
  const auto tensors = io::tensors_of("pretrained_bench", model);
  const auto shapes = io::shapes_of(tensors);
  const io::HeadSizes heads = io::detail::head_sizes(config.shape);
  const io::PublishedReader<float> reader(
      source, tensors,
      io::published_layout(io::Family<Config>::names(config, &source), shapes, heads));
  // Of the model's own memory, which it does not need, the C library would keep what was touched.
  for (const auto& [name, matrix] : tensors) matrix->resize(0, 0);
  const auto numbers_of = [&](const io::PublishedTensor& tensor, std::vector<float>& numbers) {
    for (const io::TensorPiece& piece : tensor.pieces) {
      weir::Matrix<float>& matrix = *tensors[piece.matrix].second;
      matrix.resize(shapes[piece.matrix].rows, shapes[piece.matrix].cols);
      reader.read_deferred(piece.matrix, matrix);
    }
    io::gather_tensor(tensors, tensor, numbers);
    for (const io::TensorPiece& piece : tensor.pieces) tensors[piece.matrix].second->resize(0, 0);
  };
  const io::SaveGgufConfig how{.dtype = io::GgufType::kBF16};
  io::write_gguf_model<float>(
      path, io::gguf_metadata(config, how),
      io::published_layout(io::GgufFamily<Config>::names(config, nullptr), shapes, heads), {},
      how.dtype, numbers_of);
  return path;
}

double bytes_in(const fs::path& folder) {
  double bytes = 0.0;
  for (const auto& entry : fs::directory_iterator(folder)) {
    if (entry.path().extension() == ".safetensors") {
      bytes += static_cast<double>(entry.file_size());
    }
  }
  return bytes;
}

/// A line of /proc/self/status, in bytes.
double memory(const std::string& name) {
  std::ifstream status("/proc/self/status");
  for (std::string word; status >> word;) {
    double kilobytes = 0.0;
    if (word == name && status >> kilobytes) return 1024.0 * kilobytes;
  }
  return 0.0;
}

/// Bytes per second, read and written, at which weir's threads copy to `bytes` of new memory. What
/// is read are the same 256 MiB again and again, which no cache holds.
double copy_rate(double bytes) {
  constexpr Index kPieces = 256;
  constexpr std::size_t kPiece = std::size_t{1} << 20U;
  const std::vector<std::byte> from(kPieces * kPiece, std::byte{1});
  const auto pieces = static_cast<Index>(bytes / static_cast<double>(kPiece)) + 1;
  const std::size_t size = static_cast<std::size_t>(pieces) * kPiece;
  const double seconds = bench::seconds_of([&] {
    weir::SharedMemory memory(size);
    const auto to = memory.take<std::byte>(size);
    weir::parallel_for(pieces, [&](Index i) {
      std::memcpy(to.get() + static_cast<std::size_t>(i) * kPiece,
                  from.data() + static_cast<std::size_t>(i % kPieces) * kPiece, kPiece);
    });
    benchmark::DoNotOptimize(to.get());
  });
  return 2.0 * static_cast<double>(size) / seconds;
}

template <class Config>
io::Pretrained<float> load(const Shape<Config>& shape, std::size_t expert_bytes = 0) {
  return io::load_family<Config, float>(
      folder_of(shape), {.storage = weir::Storage::kBfloat16, .expert_bytes = expert_bytes});
}

template <class Config>
void add_load_row(const Shape<Config>& shape, int threads) {
  bench::add_row("pretrained/" + shape.name + "/load/bf16", threads, [=](benchmark::State& state) {
    const fs::path folder = folder_of(shape);
    const double bytes = bytes_in(folder);
    bench::Figures figures;
    std::vector<double> times;
    bench::repeat_rounds([&] {
      std::ofstream("/proc/self/clear_refs") << 5;  // The peak begins anew.
      const double before = memory("VmRSS:");
      times.push_back(bench::seconds_of([&] { load(shape); }));
      figures.add("memory", (memory("VmHWM:") - before) / bytes);
      figures.add("GB/s", kGiga * bytes / times.back());
      figures.add("copies", 2.0 * bytes / times.back() / copy_rate(std::min(bytes, 4e9)));
    });
    figures.report(state);
    return bench::median(times);
  });
}

/// Makes the file anew, which takes seconds, not rounds.
template <class Config>
void add_gguf_row(const Shape<Config>& shape) {
  const int threads = weir::hardware_threads();
  bench::add_row("pretrained/" + shape.name + "/gguf", threads, [=](benchmark::State& state) {
    const fs::path path = folder_of(shape) / "model.gguf";
    fs::remove(path);
    const double seconds = bench::seconds_of([&] { gguf_of(shape); });
    state.counters["GB/s"] = kGiga * static_cast<double>(fs::file_size(path)) / seconds;
    state.SetLabel(path.string());
    return seconds;
  });
}

std::vector<Index> random_ids(Index count, Index vocab) {
  weir::Rng rng(2);
  std::vector<Index> ids(static_cast<std::size_t>(count));
  for (Index& id : ids) id = rng.below(vocab);
  return ids;
}

std::vector<std::int32_t> to_llama(std::span<const Index> ids) {
  return {ids.begin(), ids.end()};
}

/// Adds llama.cpp's figures to those of weir, if it is there. weir's model should be gone by now,
/// since large ones do not have room beside each other.
/// \param ids      A prompt, and tokens that are read one by one behind it. If there are none of
///                 these, it is the prompt that is timed.
template <class Config>
void add_llama_figures(const Shape<Config>& shape, int threads, const std::vector<Index>& ids,
                       std::size_t prompt, bench::Figures& figures) {
  namespace peer = weir::test;
  const peer::LlamaCpp* const library = peer::LlamaCpp::find();
  if (library == nullptr) return;
  peer::LlamaCpp::Model model(*library, gguf_of(shape), static_cast<Index>(ids.size()),
                              {.threads = threads, .is_exact = false});
  const std::vector<std::int32_t> start = to_llama(std::span(ids).first(prompt));
  const auto rest = to_llama(std::span(ids).subspan(prompt));
  model.last_logits(start);
  bench::repeat_rounds([&] {
    model.truncate(rest.empty() ? 0 : static_cast<Index>(prompt));
    const double seconds = bench::seconds_of([&] {
      if (rest.empty()) model.last_logits(start);
      for (const std::int32_t id : rest) model.last_logits({id});
    });
    const std::size_t tokens = rest.empty() ? prompt : rest.size();
    figures.add("llama tokens/s", static_cast<double>(tokens) / seconds);
  });
  figures.add("llama:weir", figures.median("tokens/s") / figures.median("llama tokens/s"));
}

template <class Config>
void add_prefill_row(const Shape<Config>& shape, int threads) {
  bench::add_row("pretrained/" + shape.name + "/prefill/bf16", threads,
                 [=](benchmark::State& state) {
                   constexpr Index kPrompt = 512;
                   const std::vector<Index> ids = random_ids(kPrompt, shape.sizes().vocab);
                   bench::Figures figures;
                   std::vector<double> times;
                   {
                     const auto loaded = load(shape);
                     weir::Decoder<float>::Cache cache;
                     const auto round = [&] {
                       weir::Decoder<float>::State sequence;
                       return bench::seconds_of(
                           [&] { weir::decode(loaded.model, ids, sequence, cache, true); });
                     };
                     round();  // Caches grow.
                     bench::repeat_rounds([&] {
                       times.push_back(round());
                       figures.add("tokens/s", kPrompt / times.back());
                     });
                   }
                   add_llama_figures(shape, threads, ids, kPrompt, figures);
                   figures.report(state);
                   return bench::median(times);
                 });
}

constexpr Index kStart = 128;  // Tokens before those that are decoded one by one.
constexpr Index kTokens = 32;

/// Times weir's decoding.
/// \param share    How many of the experts are in memory; 1: they are loaded before.
/// \return         The seconds of the rounds.
template <class Config>
std::vector<double> time_decoding(const Shape<Config>& shape, double share,
                                  const std::vector<Index>& ids, bench::Figures& figures) {
  const presets::ModelShape& sizes = shape.sizes();
  const auto expert = static_cast<double>(weir::PackedGlu<float>::bytes(
      sizes.d_model, sizes.d_hidden, sizes.d_model, weir::Storage::kBfloat16));
  const double all = expert * static_cast<double>(sizes.layers * sizes.experts);
  const auto loaded = load(shape, share < 1.0 ? static_cast<std::size_t>(share * all) : 0);
  weir::Decoder<float>::Cache cache;
  weir::Decoder<float>::State prompt;
  weir::decode(loaded.model, std::span(ids).first(kStart), prompt, cache, true);
  std::vector<double> times;
  bench::repeat_rounds([&] {
    weir::Decoder<float>::State sequence = prompt;
    const io::ExpertStatistics before =
        loaded.experts == nullptr ? io::ExpertStatistics() : loaded.experts->statistics();
    times.push_back(bench::seconds_of([&] {
      for (Index i = 0; i < kTokens; ++i) {
        const Index id = ids[static_cast<std::size_t>(kStart + i)];
        weir::decode(loaded.model, std::span(&id, 1), sequence, cache);
      }
    }));
    figures.add("tokens/s", kTokens / times.back());
    if (loaded.experts == nullptr) return;
    const io::ExpertStatistics after = loaded.experts->statistics();
    const auto hits = static_cast<double>(after.hits - before.hits);
    const auto misses = static_cast<double>(after.misses - before.misses);
    figures.add("hits", hits / (hits + misses));
  });
  return times;
}

/// \param share    See `time_decoding`.
template <class Config>
void add_decode_row(const Shape<Config>& shape, const std::string& name, double share,
                    int threads) {
  bench::add_row("pretrained/" + shape.name + "/decode/" + name, threads,
                 [=](benchmark::State& state) {
                   const std::vector<Index> ids = random_ids(kStart + kTokens, shape.sizes().vocab);
                   bench::Figures figures;
                   const std::vector<double> times = time_decoding(shape, share, ids, figures);
                   if (share == 1.0) add_llama_figures(shape, threads, ids, kStart, figures);
                   figures.report(state);
                   return bench::median(times);
                 });
}

}  // namespace

int main(int argc, char** argv) {
  for (const auto& shape : {small_olmoe(), olmoe_layers(), olmoe()}) {
    for (const int threads : bench::thread_counts()) {
      add_load_row(shape, threads);
      add_prefill_row(shape, threads);
      add_decode_row(shape, "bf16", 1.0, threads);
      add_decode_row(shape, "quarter", 0.25, threads);
    }
  }
  for (const auto& shape : {mix(), fine()}) {
    add_gguf_row(shape);
    for (const int threads : bench::thread_counts()) {
      add_prefill_row(shape, threads);
      add_decode_row(shape, "bf16", 1.0, threads);
    }
  }
  return bench::run_rows(argc, argv);
}
