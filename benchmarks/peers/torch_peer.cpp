// SPDX-License-Identifier: MIT
// The layer in libtorch. Its float products are those of the BLAS it is linked with, which the
// dynamic linker chooses: on Debian, libopenblas0 has to be installed beside it, since the
// reference BLAS is a hundred times slower. OPENBLAS_CORETYPE in the environment says which
// kernels OpenBLAS runs where it does not know the processor.
#include <dlfcn.h>
#include <torch/torch.h>
#include <torch/version.h>
#include <utility>

#include "peers/peer.hpp"

namespace weir::bench {
namespace {

using torch::Tensor;

class TorchPeer final : public Peer {
 public:
  TorchPeer(const MoeWeights& weights, torch::Dtype type, int threads)
      : d_model_(weights.d_model),
        experts_(weights.experts),
        k_(weights.k),
        renormalise_(weights.renormalise),
        type_(type) {
    torch::set_num_threads(threads);
    const auto tensor = [&](const float* weight, std::int64_t rows, std::int64_t cols) {
      return wrap(weight, rows, cols).to(type_).requires_grad_(type_ == torch::kFloat32);
    };
    router_ = wrap(weights.router, weights.experts, weights.d_model)
                  .requires_grad_(type_ == torch::kFloat32);
    for (std::size_t e = 0; e < weights.gate.size(); ++e) {
      gate_.push_back(tensor(weights.gate[e], weights.d_hidden, weights.d_model));
      up_.push_back(tensor(weights.up[e], weights.d_hidden, weights.d_model));
      down_.push_back(tensor(weights.down[e], weights.d_model, weights.d_hidden));
    }
  }

  const float* forward(const float* x, std::ptrdiff_t tokens) override {
    const torch::NoGradGuard no_gradient;
    y_ = layer(wrap(x, tokens, d_model_)).to(torch::kFloat32);
    return y_.data_ptr<float>();
  }

  const float* step(const float* x, const float* dy, std::ptrdiff_t tokens) override {
    if (type_ != torch::kFloat32) return Peer::step(x, dy, tokens);
    // Gradients add up, as weir's do. To begin with none each time would be slower by half: pages
    // of fresh memory cost more than the additions.
    x_ = wrap(x, tokens, d_model_).requires_grad_();
    layer(x_).backward(wrap(dy, tokens, d_model_));
    return x_.grad().data_ptr<float>();
  }

  void zero_gradients() override {
    router_.mutable_grad() = Tensor();
    for (auto* weights : {&gate_, &up_, &down_}) {
      for (const Tensor& weight : *weights) weight.mutable_grad() = Tensor();
    }
  }

  MoeGradients gradients() override {
    MoeGradients all = {gradient(router_), {}, {}, {}};
    for (std::size_t e = 0; e < gate_.size(); ++e) {
      all.gate.push_back(gradient(gate_[e]));
      all.up.push_back(gradient(up_[e]));
      all.down.push_back(gradient(down_[e]));
    }
    return all;
  }

 private:
  /// Memory of somebody else as a tensor.
  static Tensor wrap(const float* data, std::int64_t rows, std::int64_t cols) {
    return torch::from_blob(const_cast<float*>(data), {rows, cols}, torch::kFloat32);
  }

  static const float* gradient(const Tensor& weight) {
    return weight.grad().defined() ? weight.grad().data_ptr<float>() : nullptr;
  }

  /// \param x        [tokens, d_model], float
  /// \return         [tokens, d_model], of the type of the experts
  Tensor layer(const Tensor& x) const {
    const auto [top, expert] = torch::linear(x, router_).softmax(-1).topk(k_);
    const Tensor weight = (renormalise_ ? top / top.sum(-1, true) : top).flatten().to(type_);
    const Tensor order = expert.flatten().argsort();
    const Tensor token = order.div(k_, "floor");
    const Tensor counts = expert.flatten().bincount({}, experts_);
    const Tensor slot_weight = weight.index_select(0, order).unsqueeze(1);

    const Tensor in = x.to(type_);
    Tensor y = torch::zeros_like(in);
    std::int64_t begin = 0;
    for (std::size_t e = 0; e < gate_.size(); ++e) {
      const auto rows = counts.data_ptr<std::int64_t>()[e];
      if (rows == 0) continue;
      const Tensor tokens = token.narrow(0, begin, rows);
      const Tensor x_e = in.index_select(0, tokens);
      const Tensor hidden = torch::silu(torch::linear(x_e, gate_[e])) * torch::linear(x_e, up_[e]);
      y.index_add_(0, tokens, torch::linear(hidden, down_[e]) * slot_weight.narrow(0, begin, rows));
      begin += rows;
    }
    return y;
  }

  std::int64_t d_model_, experts_, k_;
  bool renormalise_;
  torch::Dtype type_;  // Of the experts; the router is in float.
  Tensor router_;
  std::vector<Tensor> gate_, up_, down_;
  Tensor x_, y_;
};

}  // namespace

std::unique_ptr<Peer> make_torch_peer(const MoeWeights& weights, int threads) {
  return std::make_unique<TorchPeer>(weights, torch::kFloat32, threads);
}

std::unique_ptr<Peer> make_torch_bfloat16_peer(const MoeWeights& weights, int threads) {
  return std::make_unique<TorchPeer>(weights, torch::kBFloat16, threads);
}

std::string describe_torch() {
  std::string text = "libtorch " TORCH_VERSION;
  using Name = char* (*)();
  const auto core = reinterpret_cast<Name>(dlsym(RTLD_DEFAULT, "openblas_get_corename"));
  return text + (core != nullptr ? std::string(", OpenBLAS for ") + core() : ", not OpenBLAS");
}

}  // namespace weir::bench
