// SPDX-License-Identifier: MIT
// The layer in ggml, llama.cpp's library of tensors, with weights in blocks of 8 or of 4 bits. It
// is loaded when the program runs, from WEIR_LLAMA_CPP_DIR, and its functions are declared here.
#include <array>
#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <dlfcn.h>
#include <filesystem>
#include <map>
#include <memory>
#include <new>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "peers/peer.hpp"

namespace weir::bench {
namespace {

struct Context;
struct Tensor;
struct Graph;
struct Buffer;
struct BufferType;
struct Backend;
struct Device;
struct Registry;
struct Allocator;
struct ThreadPool;

struct ContextParams {
  std::size_t size;
  void* memory;
  bool no_alloc;
};
struct ThreadPoolParams {
  std::array<bool, 512> mask;
  int threads;
  int priority;
  std::uint32_t poll;
  bool strict;
  bool paused;
};

/// Kinds of numbers, as ggml counts them.
enum Type : int { kF32 = 0, kQ4_0 = 2, kQ8_0 = 8, kI32 = 26 };

/// What is needed of ggml.
struct Ggml {
  Context* (*init)(ContextParams) = nullptr;
  void (*free)(Context*) = nullptr;
  std::size_t (*tensor_overhead)() = nullptr;
  std::size_t (*graph_overhead)() = nullptr;
  Tensor* (*new_2d)(Context*, int, std::int64_t, std::int64_t) = nullptr;
  Tensor* (*new_3d)(Context*, int, std::int64_t, std::int64_t, std::int64_t) = nullptr;
  Tensor* (*mul_mat)(Context*, Tensor*, Tensor*) = nullptr;
  Tensor* (*mul_mat_id)(Context*, Tensor*, Tensor*, Tensor*) = nullptr;
  Tensor* (*soft_max)(Context*, Tensor*) = nullptr;
  Tensor* (*argsort_top_k)(Context*, Tensor*, int) = nullptr;
  Tensor* (*get_rows)(Context*, Tensor*, Tensor*) = nullptr;
  Tensor* (*reshape_2d)(Context*, Tensor*, std::int64_t, std::int64_t) = nullptr;
  Tensor* (*reshape_3d)(Context*, Tensor*, std::int64_t, std::int64_t, std::int64_t) = nullptr;
  Tensor* (*sum_rows)(Context*, Tensor*) = nullptr;
  Tensor* (*div)(Context*, Tensor*, Tensor*) = nullptr;
  Tensor* (*mul)(Context*, Tensor*, Tensor*) = nullptr;
  Tensor* (*add)(Context*, Tensor*, Tensor*) = nullptr;
  Tensor* (*swiglu_split)(Context*, Tensor*, Tensor*) = nullptr;
  Tensor* (*view_2d)(Context*, Tensor*, std::int64_t, std::int64_t, std::size_t,
                     std::size_t) = nullptr;
  Graph* (*new_graph)(Context*) = nullptr;
  void (*build)(Graph*, Tensor*) = nullptr;
  void (*set_input)(Tensor*) = nullptr;
  void (*set_output)(Tensor*) = nullptr;
  std::size_t (*row_size)(int, std::int64_t) = nullptr;
  std::size_t (*quantise)(int, const float*, void*, std::int64_t, std::int64_t, std::int64_t,
                          const float*) = nullptr;
  Buffer* (*allocate)(Context*, BufferType*) = nullptr;
  void (*free_buffer)(Buffer*) = nullptr;
  const char* (*buffer_name)(BufferType*) = nullptr;
  void (*set)(Tensor*, const void*, std::size_t, std::size_t) = nullptr;
  void (*get)(const Tensor*, void*, std::size_t, std::size_t) = nullptr;
  Backend* (*make_backend)(Device*, const char*) = nullptr;
  void (*free_backend)(Backend*) = nullptr;
  int (*compute)(Backend*, Graph*) = nullptr;
  Registry* (*registry)(Device*) = nullptr;
  void* (*function)(Registry*, const char*) = nullptr;
  BufferType* (*plain_buffers)(Device*) = nullptr;
  bool (*supports)(Device*, const Tensor*) = nullptr;
  Allocator* (*make_allocator)(BufferType*) = nullptr;
  void (*free_allocator)(Allocator*) = nullptr;
  bool (*place)(Allocator*, Graph*) = nullptr;
  ThreadPoolParams (*pool_params)(int) = nullptr;
  void (*load_all)(const char*) = nullptr;
  Device* (*device_of_type)(int) = nullptr;
  const char* (*version)() = nullptr;
  // Of the processor's part, which is not known before it is loaded.
  ThreadPool* (*make_pool)(ThreadPoolParams*) = nullptr;
  void (*free_pool)(ThreadPool*) = nullptr;
  void (*use_pool)(Backend*, ThreadPool*) = nullptr;
  void (*set_threads)(Backend*, int) = nullptr;
  BufferType** (*extra_buffers)(Device*) = nullptr;
  Device* device = nullptr;

  Ggml();
};

std::filesystem::path folder() {
  const char* const named = std::getenv("WEIR_LLAMA_CPP_DIR");
#if defined(WEIR_LLAMA_CPP_DIR)
  return named != nullptr ? named : WEIR_LLAMA_CPP_DIR;
#else
  return named != nullptr ? named : "";
#endif
}

void* open_library(const std::string& prefix) {
  if (!std::filesystem::is_directory(folder())) {
    throw std::runtime_error(
        "WEIR_LLAMA_CPP_DIR does not name the folder of llama.cpp's libraries");
  }
  for (const auto& entry : std::filesystem::directory_iterator(folder())) {
    const std::string name = entry.path().filename().string();
    if (!name.starts_with(prefix) || name.find(".so") == std::string::npos) continue;
    if (void* const library = ::dlopen(entry.path().c_str(), RTLD_NOW | RTLD_LOCAL)) return library;
    throw std::runtime_error(::dlerror());
  }
  throw std::runtime_error(folder().string() + " has no " + prefix + "so");
}

template <class Function>
void find(void* library, const char* name, Function*& function) {
  function = reinterpret_cast<Function*>(::dlsym(library, name));
  if (function == nullptr) throw std::runtime_error(std::string("ggml has no ") + name);
}

Ggml::Ggml() {
  void* const base = open_library("libggml-base.");
  void* const all = open_library("libggml.");
  find(base, "ggml_init", init);
  find(base, "ggml_free", free);
  find(base, "ggml_tensor_overhead", tensor_overhead);
  find(base, "ggml_graph_overhead", graph_overhead);
  find(base, "ggml_new_tensor_2d", new_2d);
  find(base, "ggml_new_tensor_3d", new_3d);
  find(base, "ggml_mul_mat", mul_mat);
  find(base, "ggml_mul_mat_id", mul_mat_id);
  find(base, "ggml_soft_max", soft_max);
  find(base, "ggml_argsort_top_k", argsort_top_k);
  find(base, "ggml_get_rows", get_rows);
  find(base, "ggml_reshape_2d", reshape_2d);
  find(base, "ggml_reshape_3d", reshape_3d);
  find(base, "ggml_sum_rows", sum_rows);
  find(base, "ggml_div", div);
  find(base, "ggml_mul", mul);
  find(base, "ggml_add", add);
  find(base, "ggml_swiglu_split", swiglu_split);
  find(base, "ggml_view_2d", view_2d);
  find(base, "ggml_new_graph", new_graph);
  find(base, "ggml_build_forward_expand", build);
  find(base, "ggml_set_input", set_input);
  find(base, "ggml_set_output", set_output);
  find(base, "ggml_row_size", row_size);
  find(base, "ggml_quantize_chunk", quantise);
  find(base, "ggml_backend_alloc_ctx_tensors_from_buft", allocate);
  find(base, "ggml_backend_buffer_free", free_buffer);
  find(base, "ggml_backend_buft_name", buffer_name);
  find(base, "ggml_backend_tensor_set", set);
  find(base, "ggml_backend_tensor_get", get);
  find(base, "ggml_backend_dev_init", make_backend);
  find(base, "ggml_backend_free", free_backend);
  find(base, "ggml_backend_graph_compute", compute);
  find(base, "ggml_backend_dev_backend_reg", registry);
  find(base, "ggml_backend_reg_get_proc_address", function);
  find(base, "ggml_backend_dev_buffer_type", plain_buffers);
  find(base, "ggml_backend_dev_supports_op", supports);
  find(base, "ggml_gallocr_new", make_allocator);
  find(base, "ggml_gallocr_free", free_allocator);
  find(base, "ggml_gallocr_alloc_graph", place);
  find(base, "ggml_threadpool_params_default", pool_params);
  find(base, "ggml_version", version);
  find(all, "ggml_backend_load_all_from_path", load_all);
  find(all, "ggml_backend_dev_by_type", device_of_type);
  load_all(folder().c_str());
  constexpr int kProcessor = 0;
  device = device_of_type(kProcessor);
  if (device == nullptr) throw std::runtime_error("ggml has no part for this processor");
  const auto find_own = [&]<class Function>(const char* name, Function*& own) {
    own = reinterpret_cast<Function*>(function(registry(device), name));
    if (own == nullptr) throw std::runtime_error(std::string("ggml has no ") + name);
  };
  find_own("ggml_threadpool_new", make_pool);
  find_own("ggml_threadpool_free", free_pool);
  find_own("ggml_backend_cpu_set_threadpool", use_pool);
  find_own("ggml_backend_set_n_threads", set_threads);
  find_own("ggml_backend_dev_get_extra_bufts", extra_buffers);
}

const Ggml& ggml() {
  static const Ggml functions;
  return functions;
}

/// Is freed by a function of ggml.
template <class T>
using Owned = std::unique_ptr<T, void (*)(T*)>;

/// Router, choice and experts as a graph, one for each number of tokens.
class GgmlPeer final : public Peer {
 public:
  GgmlPeer(const MoeWeights& weights, int type, int threads)
      : d_model_(weights.d_model),
        k_(weights.k),
        experts_(weights.experts),
        renormalise_(weights.renormalise),
        backend_(ggml().make_backend(ggml().device, nullptr), ggml().free_backend),
        pool_(make_pool(threads), ggml().free_pool),
        exact_(context(4), ggml().free),
        coded_(nullptr, ggml().free),
        exact_buffer_(nullptr, ggml().free_buffer),
        coded_buffer_(nullptr, ggml().free_buffer) {
    ggml().set_threads(backend_.get(), threads);
    ggml().use_pool(backend_.get(), pool_.get());
    const std::int64_t d = weights.d_model;
    const std::int64_t hidden = weights.d_hidden;
    router_ = ggml().new_2d(exact_.get(), kF32, d, experts_);
    exact_buffer_.reset(ggml().allocate(exact_.get(), ggml().plain_buffers(ggml().device)));
    if (exact_buffer_ == nullptr) throw std::bad_alloc();
    ggml().set(router_, weights.router, 0, sizeof(float) * static_cast<std::size_t>(experts_ * d));
    BufferType* const repacking = repacking_buffers();
    if (repacking == nullptr || !place_experts(repacking, type, hidden)) {
      place_experts(ggml().plain_buffers(ggml().device), type, hidden);
    }
    fill(gate_, type, weights.gate, hidden, d);
    fill(up_, type, weights.up, hidden, d);
    fill(down_, type, weights.down, d, hidden);
  }

  const float* forward(const float* x, std::ptrdiff_t tokens) override {
    Pass& pass = pass_for(tokens);
    const std::size_t bytes = sizeof(float) * static_cast<std::size_t>(tokens * d_model_);
    ggml().set(pass.x, x, 0, bytes);
    if (ggml().compute(backend_.get(), pass.graph) != 0) throw std::runtime_error("ggml failed");
    out_.resize(static_cast<std::size_t>(tokens * d_model_));
    ggml().get(pass.y, out_.data(), 0, bytes);
    return out_.data();
  }

 private:
  struct Pass {
    Owned<Context> context;
    Owned<Allocator> memory;
    Graph* graph = nullptr;
    Tensor* x = nullptr;
    Tensor* y = nullptr;
  };

  static Context* context(std::size_t tensors) {
    const std::size_t size = tensors * ggml().tensor_overhead() + ggml().graph_overhead();
    return ggml().init({size, nullptr, true});
  }

  static ThreadPool* make_pool(int threads) {
    ThreadPoolParams params = ggml().pool_params(threads);
    return ggml().make_pool(&params);
  }

  /// Those that arrange weights for its fastest loops; null if there are none.
  static BufferType* repacking_buffers() {
    BufferType** const extra = ggml().extra_buffers(ggml().device);
    for (std::size_t i = 0; extra != nullptr && extra[i] != nullptr; ++i) {
      if (ggml().buffer_name(extra[i]) == std::string("CPU_REPACK")) return extra[i];
    }
    return nullptr;
  }

  /// Makes room for the weights of the experts. Whether they can be multiplied there.
  bool place_experts(BufferType* buffers, int type, std::int64_t hidden) {
    coded_buffer_.reset();
    coded_.reset(context(4));
    gate_ = ggml().new_3d(coded_.get(), type, d_model_, hidden, experts_);
    up_ = ggml().new_3d(coded_.get(), type, d_model_, hidden, experts_);
    down_ = ggml().new_3d(coded_.get(), type, hidden, d_model_, experts_);
    coded_buffer_.reset(ggml().allocate(coded_.get(), buffers));
    if (coded_buffer_ == nullptr) throw std::bad_alloc();
    const Owned<Context> probe(context(4), ggml().free);
    Tensor* const x = ggml().new_3d(probe.get(), kF32, d_model_, 1, 1);
    Tensor* const experts = ggml().new_2d(probe.get(), kI32, k_, 1);
    return ggml().supports(ggml().device, ggml().mul_mat_id(probe.get(), gate_, x, experts));
  }

  static void fill(Tensor* tensor, int type, const std::vector<const float*>& experts,
                   std::int64_t rows, std::int64_t cols) {
    const std::size_t one = ggml().row_size(type, cols) * static_cast<std::size_t>(rows);
    std::vector<std::byte> codes(one * experts.size());
    for (std::size_t e = 0; e < experts.size(); ++e) {
      ggml().quantise(type, experts[e], codes.data() + e * one, 0, rows, cols, nullptr);
    }
    ggml().set(tensor, codes.data(), 0, codes.size());
  }

  Pass& pass_for(std::ptrdiff_t tokens) {
    const auto known = passes_.find(tokens);
    if (known != passes_.end()) return known->second;
    const Ggml& g = ggml();
    constexpr std::size_t kMostTensors = 100;
    Pass pass = {Owned<Context>(context(kMostTensors), g.free),
                 Owned<Allocator>(nullptr, g.free_allocator)};
    Context* const c = pass.context.get();
    pass.x = g.new_2d(c, kF32, d_model_, tokens);
    g.set_input(pass.x);
    Tensor* const probabilities = g.soft_max(c, g.mul_mat(c, router_, pass.x));
    Tensor* const experts = g.argsort_top_k(c, probabilities, static_cast<int>(k_));
    Tensor* weights = g.get_rows(c, g.reshape_3d(c, probabilities, 1, experts_, tokens), experts);
    if (renormalise_) {
      weights = g.reshape_2d(c, weights, k_, tokens);
      weights = g.div(c, weights, g.sum_rows(c, weights));
      weights = g.reshape_3d(c, weights, 1, k_, tokens);
    }
    Tensor* const x = g.reshape_3d(c, pass.x, d_model_, 1, tokens);
    Tensor* const up = g.mul_mat_id(c, up_, x, experts);
    Tensor* const gate = g.mul_mat_id(c, gate_, x, experts);
    Tensor* const hidden = g.swiglu_split(c, gate, up);
    Tensor* const out = g.mul(c, g.mul_mat_id(c, down_, hidden, experts), weights);
    const std::size_t row = sizeof(float) * static_cast<std::size_t>(d_model_);
    const auto of_choice = [&](std::ptrdiff_t i) {
      return g.view_2d(c, out, d_model_, tokens, row * static_cast<std::size_t>(k_),
                       row * static_cast<std::size_t>(i));
    };
    pass.y = of_choice(0);
    for (std::ptrdiff_t i = 1; i < k_; ++i) pass.y = g.add(c, pass.y, of_choice(i));
    g.set_output(pass.y);
    pass.graph = g.new_graph(c);
    g.build(pass.graph, pass.y);
    pass.memory.reset(g.make_allocator(g.plain_buffers(g.device)));
    if (!g.place(pass.memory.get(), pass.graph)) throw std::bad_alloc();
    return passes_.emplace(tokens, std::move(pass)).first->second;
  }

  std::ptrdiff_t d_model_, k_, experts_;
  bool renormalise_;
  Owned<Backend> backend_;
  Owned<ThreadPool> pool_;
  Owned<Context> exact_, coded_;
  Owned<Buffer> exact_buffer_, coded_buffer_;
  Tensor* router_ = nullptr;
  Tensor* gate_ = nullptr;
  Tensor* up_ = nullptr;
  Tensor* down_ = nullptr;
  std::map<std::ptrdiff_t, Pass> passes_;
  std::vector<float> out_;
};

}  // namespace

std::unique_ptr<Peer> make_ggml_int8_peer(const MoeWeights& weights, int threads) {
  return std::make_unique<GgmlPeer>(weights, kQ8_0, threads);
}

std::unique_ptr<Peer> make_ggml_int4_peer(const MoeWeights& weights, int threads) {
  return std::make_unique<GgmlPeer>(weights, kQ4_0, threads);
}

std::string describe_ggml() {
  try {
    return ggml().version();
  } catch (const std::exception& error) {
    return error.what();
  }
}

}  // namespace weir::bench
