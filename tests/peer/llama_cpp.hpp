// SPDX-License-Identifier: MIT
/// \file
/// Runs llama.cpp, whose shared libraries are loaded where somebody has put them.
#pragma once

#include <algorithm>
#include <array>
#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <dlfcn.h>
#include <filesystem>
#include <memory>
#include <stdexcept>
#include <string>
#include <type_traits>
#include <utility>
#include <vector>

#include <weir/core/types.hpp>

namespace weir::test {

/// The functions of libllama and libggml that tests need. The libraries are those of the folder
/// that the environment variable WEIR_LLAMA_CPP_DIR names, otherwise those of the macro of that
/// name: libllama*.so, libggml*.so and the parts for kinds of processors beside them, such as the
/// npm package @node-llama-cpp/linux-x64 has them.
///
/// Settings are passed by value, and their layout is that of llama.cpp v0.5.0 (include/llama.h).
/// Only the members up to the last one that is needed are declared; behind them lies more room than
/// any version takes, so that members added there do no harm. Other changes are noticed by the
/// values that settings have by default.
class LlamaCpp {
 public:
  /// Numbers of `enum llama_ftype`.
  enum class FileKind : int { kF16 = 1, kQ4_0 = 2, kQ8_0 = 7, kQ4KM = 15, kQ6K = 18, kMxfp4 = 38 };

  /// The libraries, loaded by the first call.
  /// \return  Nothing if they are absent or of another layout; `why_not` says what is wrong then.
  static const LlamaCpp* find() { return loaded().why_not_.empty() ? &loaded() : nullptr; }
  static const std::string& why_not() { return loaded().why_not_; }

  std::string version() const { return version_(); }

  /// Converts the file `from` with `llama_model_quantize`.
  void quantise(const std::filesystem::path& from, const std::filesystem::path& to, FileKind kind,
                bool pure = false) const {
    QuantiseParams params = quantise_defaults_();
    params.nthread = 1;
    params.ftype = static_cast<int>(kind);
    params.pure = pure;
    complaints().clear();
    if (quantise_(from.c_str(), to.c_str(), &params) != 0) fail("llama_model_quantize", from);
  }

  /// The bytes that ggml stores for `numbers`, rows of `cols` of them, as the kind `type`.
  std::vector<std::byte> stored(std::uint32_t type, const std::vector<float>& numbers,
                                std::int64_t cols) const {
    const auto rows = static_cast<std::int64_t>(numbers.size()) / cols;
    std::vector<std::byte> bytes(static_cast<std::size_t>(rows) * row_size_(type, cols));
    quantise_chunk_(type, numbers.data(), bytes.data(), 0, rows, cols, nullptr);
    return bytes;
  }

  /// The `count` numbers that ggml reads from `bytes`.
  std::vector<float> read(std::uint32_t type, const std::byte* bytes, std::int64_t count) const {
    std::vector<float> numbers(static_cast<std::size_t>(count));
    traits_(type)->to_float(bytes, numbers.data(), count);
    return numbers;
  }

  class Model;

 private:
  static constexpr std::size_t kRoom = 512;

  struct ModelParams {
    void* devices;
    void* overrides;
    std::int32_t gpu_layers;
    std::array<std::byte, kRoom> rest;
  };
  struct ContextParams {
    std::uint32_t n_ctx, n_batch, n_ubatch, n_seq_max, n_rs_seq, n_outputs_max, n_outputs_per_seq;
    std::int32_t threads, threads_batch;
    std::int32_t context_type, rope_scaling, pooling, attention, flash_attention;
    float rope_base, rope_scale, yarn_ext, yarn_attention, yarn_fast, yarn_slow;
    std::uint32_t yarn_context;
    float defrag;
    void* evaluated;
    void* evaluated_data;
    std::int32_t type_k, type_v;
    std::array<std::byte, kRoom> rest;
  };
  struct QuantiseParams {
    std::int32_t nthread, ftype, output_type, embedding_type;
    bool requantise, quantise_output, only_copy, pure, keep_split, dry_run;
    std::array<std::byte, kRoom> rest;
  };
  struct Batch {
    std::int32_t n_tokens;
    std::int32_t* token;
    float* embeddings;
    std::int32_t* position;
    std::int32_t* n_sequences;
    std::int32_t** sequences;
    std::int8_t* has_logits;
  };
  struct Traits {
    const char* name;
    std::int64_t block;
    std::int64_t block_interleave;
    std::size_t bytes;
    bool is_quantised;
    void (*to_float)(const void*, float*, std::int64_t);
  };

  LlamaCpp();

  static const LlamaCpp& loaded() {
    static const LlamaCpp library;
    return library;
  }

  static std::string folder() {
    if (const char* const named = std::getenv("WEIR_LLAMA_CPP_DIR")) return named;
#ifdef WEIR_LLAMA_CPP_DIR
    return WEIR_LLAMA_CPP_DIR;
#else
    return {};
#endif
  }

  /// What llama.cpp has printed since the last call that could fail.
  static std::string& complaints() {
    static std::string text;
    return text;
  }
  static void keep_complaint(int level, const char* text, void* /*data*/) {
    constexpr int kWarning = 3;
    if (level >= kWarning) complaints() += text;
  }
  [[noreturn]] static void fail(const std::string& what, const std::filesystem::path& path) {
    throw std::runtime_error(what + ": " + path.string() + ": " + complaints());
  }

  /// Finds the function `name` in `library`.
  template <class F>
  void find_function(void* library, const char* name, F& function) {
    function = reinterpret_cast<F>(::dlsym(library, name));
    if (function == nullptr) throw std::runtime_error(std::string("has no function ") + name);
  }
  void load(const std::filesystem::path& folder);
  void expect_known_layout() const;

  std::string why_not_;
  const char* (*version_)() = nullptr;
  void (*log_set_)(void (*)(int, const char*, void*), void*) = nullptr;
  void (*backends_)(const char*) = nullptr;
  ModelParams (*model_defaults_)() = nullptr;
  ContextParams (*context_defaults_)() = nullptr;
  QuantiseParams (*quantise_defaults_)() = nullptr;
  void* (*load_model_)(const char*, ModelParams) = nullptr;
  void (*free_model_)(void*) = nullptr;
  void* (*make_context_)(void*, ContextParams) = nullptr;
  void (*free_context_)(void*) = nullptr;
  const void* (*vocabulary_)(const void*) = nullptr;
  std::int32_t (*vocabulary_size_)(const void*) = nullptr;
  std::int32_t (*decode_)(void*, Batch) = nullptr;
  float* (*logits_)(void*) = nullptr;
  void* (*memory_)(const void*) = nullptr;
  void (*clear_)(void*, bool) = nullptr;
  bool (*truncate_)(void*, std::int32_t, std::int32_t, std::int32_t) = nullptr;
  std::uint32_t (*quantise_)(const char*, const char*, const QuantiseParams*) = nullptr;
  std::size_t (*quantise_chunk_)(std::uint32_t, const float*, void*, std::int64_t, std::int64_t,
                                 std::int64_t, const float*) = nullptr;
  std::size_t (*row_size_)(std::uint32_t, std::int64_t) = nullptr;
  const Traits* (*traits_)(std::uint32_t) = nullptr;
};

/// How llama.cpp computes.
struct LlamaCppConfig {
  int threads = 1;
  bool is_exact = true;  ///< Keys and values have 32 bits, and attention is not fused; otherwise it
                         ///< is as llama.cpp has it by default.
  Index at_once = 0;     ///< Tokens of the longest pass; 0: as many as of the longest conversation.
};

/// A model of a GGUF file with one conversation, on the processor.
class LlamaCpp::Model {
 public:
  /// \param most_tokens  The longest conversation.
  /// \throws std::runtime_error  with what llama.cpp says, if it does not take the file.
  Model(const LlamaCpp& library, const std::filesystem::path& path, Index most_tokens,
        const LlamaCppConfig& config = {});

  Index vocabulary() const { return library_.vocabulary_size_(library_.vocabulary_(model_.get())); }

  /// Goes on with `tokens` behind those of earlier calls.
  /// \return  [tokens, vocabulary], the logits behind each of them.
  Matrix<float> logits(std::vector<std::int32_t> tokens) { return run(std::move(tokens), false); }

  /// The same, behind the last of them alone.
  Matrix<float> last_logits(std::vector<std::int32_t> tokens) {
    return run(std::move(tokens), true);
  }

  /// Forgets the conversation.
  void clear() {
    library_.clear_(library_.memory_(context_.get()), true);
    position_ = 0;
  }

  /// Forgets what follows the first `count` tokens.
  void truncate(Index count) {
    position_ = static_cast<std::int32_t>(count);
    library_.truncate_(library_.memory_(context_.get()), 0, position_, -1);
  }

  /// The next `count` tokens, each the most probable one behind those before.
  std::vector<std::int32_t> greedy(const std::vector<std::int32_t>& prompt, Index count) {
    std::vector<std::int32_t> result;
    Matrix<float> last = logits(prompt);
    while (static_cast<Index>(result.size()) < count) {
      Index best = 0;
      last.row(last.rows() - 1).maxCoeff(&best);
      result.push_back(static_cast<std::int32_t>(best));
      last = logits({result.back()});
    }
    return result;
  }

 private:
  using Owned = std::unique_ptr<void, void (*)(void*)>;

  Matrix<float> run(std::vector<std::int32_t> tokens, bool last_only);

  const LlamaCpp& library_;
  Owned model_;
  Owned context_;
  std::int32_t position_ = 0;
};

inline LlamaCpp::LlamaCpp() {
  const std::filesystem::path path = folder();
  if (path.empty()) {
    why_not_ = "WEIR_LLAMA_CPP_DIR does not name the folder of llama.cpp's libraries";
    return;
  }
  if (!std::filesystem::is_directory(path)) {
    why_not_ = path.string() + ": there is no such folder";
    return;
  }
  try {
    load(path);
    expect_known_layout();
  } catch (const std::exception& error) {
    why_not_ = path.string() + ": " + error.what();
  }
}

inline void LlamaCpp::load(const std::filesystem::path& folder) {
  void* library = nullptr;
  for (const auto& entry : std::filesystem::directory_iterator(folder)) {
    const std::string name = entry.path().filename().string();
    if (!name.starts_with("libllama.") || name.find(".so") == std::string::npos) continue;
    library = ::dlopen(entry.path().c_str(), RTLD_NOW | RTLD_LOCAL);
    if (library == nullptr) throw std::runtime_error(::dlerror());
  }
  if (library == nullptr) throw std::runtime_error("has no libllama");
  find_function(library, "llama_version", version_);
  find_function(library, "llama_log_set", log_set_);
  find_function(library, "ggml_backend_load_all_from_path", backends_);
  find_function(library, "llama_model_default_params", model_defaults_);
  find_function(library, "llama_context_default_params", context_defaults_);
  find_function(library, "llama_model_quantize_default_params", quantise_defaults_);
  find_function(library, "llama_model_load_from_file", load_model_);
  find_function(library, "llama_model_free", free_model_);
  find_function(library, "llama_init_from_model", make_context_);
  find_function(library, "llama_free", free_context_);
  find_function(library, "llama_model_get_vocab", vocabulary_);
  find_function(library, "llama_vocab_n_tokens", vocabulary_size_);
  find_function(library, "llama_decode", decode_);
  find_function(library, "llama_get_logits", logits_);
  find_function(library, "llama_get_memory", memory_);
  find_function(library, "llama_memory_clear", clear_);
  find_function(library, "llama_memory_seq_rm", truncate_);
  find_function(library, "llama_model_quantize", quantise_);
  find_function(library, "ggml_quantize_chunk", quantise_chunk_);
  find_function(library, "ggml_row_size", row_size_);
  find_function(library, "ggml_get_type_traits", traits_);
  log_set_(keep_complaint, nullptr);
  backends_(folder.c_str());
}

inline void LlamaCpp::expect_known_layout() const {
  constexpr std::int32_t kF16 = 1;
  const ContextParams context = context_defaults_();
  const QuantiseParams quantise = quantise_defaults_();
  const bool is_known =
      context.n_ctx == 512 && context.n_batch == 2048 && context.n_ubatch == 512 &&
      context.n_seq_max == 1 && context.n_outputs_max == 0 && context.n_outputs_per_seq == 1 &&
      context.pooling == -1 && context.attention == -1 && context.flash_attention == -1 &&
      context.yarn_ext == -1.0F && context.type_k == kF16 && context.type_v == kF16 &&
      quantise.nthread == 0 && quantise.ftype == static_cast<int>(FileKind::kQ8_0) &&
      quantise.output_type == quantise.embedding_type && !quantise.requantise &&
      quantise.quantise_output && !quantise.only_copy && !quantise.pure;
  if (!is_known) throw std::runtime_error(version() + " lays its settings out otherwise");
}

inline LlamaCpp::Model::Model(const LlamaCpp& library, const std::filesystem::path& path,
                              Index most_tokens, const LlamaCppConfig& config)
    : library_(library),
      model_(nullptr, library.free_model_),
      context_(nullptr, library.free_context_) {
  complaints().clear();
  ModelParams settings = library.model_defaults_();
  settings.gpu_layers = 0;
  model_.reset(library.load_model_(path.c_str(), settings));
  if (model_ == nullptr) fail("llama_model_load_from_file", path);
  ContextParams context = library.context_defaults_();
  const Index at_once = config.at_once > 0 ? config.at_once : most_tokens;
  context.n_ctx = static_cast<std::uint32_t>(most_tokens);
  context.n_batch = context.n_ubatch = static_cast<std::uint32_t>(at_once);
  context.n_outputs_per_seq = 0;
  context.threads = context.threads_batch = config.threads;
  if (config.is_exact) {
    context.flash_attention = 0;
    context.type_k = context.type_v = 0;  // F32
  }
  context_.reset(library.make_context_(model_.get(), context));
  if (context_ == nullptr) fail("llama_init_from_model", path);
}

inline Matrix<float> LlamaCpp::Model::run(std::vector<std::int32_t> tokens, bool last_only) {
  const std::size_t count = tokens.size();
  std::vector<std::int32_t> positions(count);
  std::vector<std::int32_t> sequence_counts(count, 1);
  std::int32_t sequence = 0;
  std::vector<std::int32_t*> sequences(count, &sequence);
  std::vector<std::int8_t> has_logits(count, last_only ? 0 : 1);
  if (count > 0) has_logits.back() = 1;
  for (std::int32_t& position : positions) position = position_++;
  complaints().clear();
  const std::int32_t status = library_.decode_(
      context_.get(), {static_cast<std::int32_t>(count), tokens.data(), nullptr, positions.data(),
                       sequence_counts.data(), sequences.data(), has_logits.data()});
  if (status != 0) fail("llama_decode", std::to_string(status));
  return Eigen::Map<const Matrix<float>>(library_.logits_(context_.get()),
                                         last_only ? 1 : static_cast<Index>(count), vocabulary());
}

}  // namespace weir::test
