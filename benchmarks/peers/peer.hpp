// SPDX-License-Identifier: MIT
/// \file
/// A mixture-of-experts layer as another library computes it. Free of Eigen, so that a peer can be
/// compiled with options of its own.
#pragma once

#include <cstddef>
#include <memory>
#include <stdexcept>
#include <string>
#include <vector>

namespace weir::bench {

/// The weights of a mixture of experts, row-major; somebody else keeps them as long as the peer
/// lives.
struct MoeWeights {
  std::ptrdiff_t d_model = 0;
  std::ptrdiff_t d_hidden = 0;
  std::ptrdiff_t experts = 0;
  std::ptrdiff_t k = 0;
  bool renormalise = true;             ///< See SoftmaxTopK.
  const float* router = nullptr;       ///< [experts, d_model]
  std::vector<const float*> gate, up;  ///< Of each expert, [d_hidden, d_model].
  std::vector<const float*> down;      ///< Of each expert, [d_model, d_hidden].
};

/// dL/d(weight), shaped as the weights are; null is zero.
struct MoeGradients {
  const float* router = nullptr;
  std::vector<const float*> gate, up, down;
};

/// The layer of `MoeWeights`: a linear router, softmax, the k best, and SwiGLU experts. Takes and
/// returns float, whatever it multiplies in; what it returns lives in it until the next call. Uses
/// as many threads as it was made for.
class Peer {
 public:
  Peer() = default;
  Peer(const Peer&) = delete;
  Peer& operator=(const Peer&) = delete;
  virtual ~Peer() = default;

  /// \param x        [tokens, d_model]
  /// \return         [tokens, d_model]
  virtual const float* forward(const float* x, std::ptrdiff_t tokens) = 0;

  /// Forward and backward; adds the gradients of all weights to `gradients()`.
  /// \param x        [tokens, d_model]
  /// \param dy       dL/dy, [tokens, d_model]
  /// \return         dL/dx, [tokens, d_model]
  virtual const float* step(const float* /*x*/, const float* /*dy*/, std::ptrdiff_t /*tokens*/) {
    throw std::logic_error("this peer does not train");
  }

  /// The sum of those of all steps since `zero_gradients`.
  virtual MoeGradients gradients() { throw std::logic_error("this peer does not train"); }
  virtual void zero_gradients() { throw std::logic_error("this peer does not train"); }
};

/// By hand on Eigen's products.
std::unique_ptr<Peer> make_eigen_peer(const MoeWeights& weights, int threads);

/// By hand on oneDNN's products, with prepacked weights in `forward`. The one in bfloat16 has the
/// router in float, and is not for training.
std::unique_ptr<Peer> make_dnnl_peer(const MoeWeights& weights, int threads);
std::unique_ptr<Peer> make_dnnl_bfloat16_peer(const MoeWeights& weights, int threads);

/// In libtorch, with its autograd; likewise.
std::unique_ptr<Peer> make_torch_peer(const MoeWeights& weights, int threads);
std::unique_ptr<Peer> make_torch_bfloat16_peer(const MoeWeights& weights, int threads);

/// In ggml, with weights in its blocks q8_0 and q4_0, arranged for its fastest loops. Not for
/// training.
/// \throws std::runtime_error  if there is no llama.cpp in WEIR_LLAMA_CPP_DIR.
std::unique_ptr<Peer> make_ggml_int8_peer(const MoeWeights& weights, int threads);
std::unique_ptr<Peer> make_ggml_int4_peer(const MoeWeights& weights, int threads);

/// Which versions of what these were linked with.
std::string describe_dnnl();
std::string describe_torch();
std::string describe_ggml();  ///< Or why it cannot be loaded.

}  // namespace weir::bench
