// SPDX-License-Identifier: MIT
// The layer by hand on oneDNN's matmul primitive. Forward passes have the weights in whatever
// format oneDNN prefers, and SwiGLU fused into the products; training has them as they are, since
// they would have to be packed anew in each step.
#include <array>
#include <dnnl.hpp>
#include <map>
#include <type_traits>
#include <unordered_map>

#include "peers/hand_peer.hpp"

namespace weir::bench {
namespace {

using Desc = dnnl::memory::desc;
using Tag = dnnl::memory::format_tag;
using Type = dnnl::memory::data_type;
using Arguments = std::unordered_map<int, dnnl::memory>;

/// The processor, and its queue of work, which runs at once.
struct Device {
  dnnl::engine engine{dnnl::engine::kind::cpu, 0};
  dnnl::stream stream{engine};

  dnnl::memory wrap(const Desc& desc, const void* data) const {
    return {desc, engine, const_cast<void*>(data)};
  }
};

/// Products of matrices in plain format. A primitive is made for each shape once.
class DnnlProducts {
 public:
  void nt(MatrixIn<float> a, MatrixIn<float> b, MatrixOut<float> out) {
    run(a.data(), Tag::ab, b.data(), Tag::ba, out.data(), {a.rows(), a.cols(), b.rows()}, false);
  }
  void nn(MatrixIn<float> a, MatrixIn<float> b, MatrixOut<float> out, bool add) {
    run(a.data(), Tag::ab, b.data(), Tag::ab, out.data(), {a.rows(), a.cols(), b.cols()}, add);
  }
  void add_tn(MatrixIn<float> a, MatrixIn<float> b, MatrixOut<float> out) {
    run(a.data(), Tag::ba, b.data(), Tag::ab, out.data(), {a.cols(), a.rows(), b.cols()}, true);
  }

 private:
  /// Of a product [rows, inner] by [inner, cols].
  struct Sizes {
    Index rows, inner, cols;
  };

  void run(const float* a, Tag a_tag, const float* b, Tag b_tag, float* out, const Sizes& sizes,
           bool add) {
    const auto [rows, inner, cols] = sizes;
    const Desc a_desc({rows, inner}, Type::f32, a_tag);
    const Desc b_desc({inner, cols}, Type::f32, b_tag);
    const Desc out_desc({rows, cols}, Type::f32, Tag::ab);
    const std::array<Index, 6> key = {rows,
                                      inner,
                                      cols,
                                      static_cast<Index>(a_tag),
                                      static_cast<Index>(b_tag),
                                      static_cast<Index>(add)};
    auto found = primitives_.find(key);
    if (found == primitives_.end()) {
      dnnl::primitive_attr attributes;
      if (add) {
        dnnl::post_ops sum;
        sum.append_sum(1.0F);
        attributes.set_post_ops(sum);
      }
      const dnnl::matmul::primitive_desc desc({a_desc, b_desc, out_desc}, attributes,
                                              device_.engine);
      found = primitives_.emplace(key, desc).first;
    }
    found->second.execute(device_.stream, {{DNNL_ARG_SRC, device_.wrap(a_desc, a)},
                                           {DNNL_ARG_WEIGHTS, device_.wrap(b_desc, b)},
                                           {DNNL_ARG_DST, device_.wrap(out_desc, out)}});
    device_.stream.wait();
  }

  Device device_;
  std::map<std::array<Index, 6>, dnnl::matmul> primitives_;
};

/// A weight [out, in] in the formats that oneDNN has asked for so far: one, as far as is known.
class PackedWeight {
 public:
  PackedWeight(const Device& device, const float* weight, Index out, Index in)
      : plain_(device.wrap({{in, out}, Type::f32, Tag::ba}, weight)) {}

  const dnnl::memory& in_format(Device& device, const Desc& format) {
    for (const dnnl::memory& packed : packed_) {
      if (packed.get_desc() == format) return packed;
    }
    packed_.emplace_back(format, device.engine);
    dnnl::reorder(plain_, packed_.back()).execute(device.stream, plain_, packed_.back());
    device.stream.wait();
    return packed_.back();
  }

 private:
  dnnl::memory plain_;
  std::vector<dnnl::memory> packed_;
};

/// Multiplies in T, float or Eigen::bfloat16, in forward passes; trains in float.
template <class T>
class DnnlPeer final : public HandPeer<DnnlProducts> {
 public:
  DnnlPeer(const MoeWeights& weights, int threads) : HandPeer(weights, threads) {
    for (std::size_t e = 0; e < gate_.size(); ++e) {
      packed_gate_.emplace_back(device_, weights.gate[e], d_hidden_, d_model_);
      packed_up_.emplace_back(device_, weights.up[e], d_hidden_, d_model_);
      packed_down_.emplace_back(device_, weights.down[e], d_model_, d_hidden_);
    }
  }

  const float* forward(const float* x, std::ptrdiff_t tokens) override {
    const Map tokens_in(x, tokens, d_model_);
    route(tokens_in);
    gather(tokens_in);
    silu_gate_.resize(routing_.slots(), d_hidden_);
    hidden_.resize(routing_.slots(), d_hidden_);
    out_.resize(routing_.slots(), d_model_);
    routing_.for_each_expert([&](std::size_t e, Index begin, Index rows) {
      const Products& products = products_for(rows);
      const auto in = device_.wrap(products.in, x_.row(begin).data());
      const auto silu_gate = device_.wrap(products.inner, silu_gate_.row(begin).data());
      const auto hidden = device_.wrap(products.inner, hidden_.row(begin).data());
      const auto out = device_.wrap(products.out, out_.row(begin).data());
      products.gate.run(device_, in, packed_gate_[e], silu_gate, {});
      products.up.run(device_, in, packed_up_[e], hidden,
                      {{DNNL_ARG_ATTR_MULTIPLE_POST_OP(0) | DNNL_ARG_SRC_1, silu_gate}});
      products.down.run(device_, hidden, packed_down_[e], out, {});
    });
    combine(tokens);
    return y_.data();
  }

 private:
  static constexpr bool kFloat = std::is_same_v<T, float>;
  static constexpr Type kType = kFloat ? Type::f32 : Type::bf16;

  struct Product {
    Desc format;  // Of the weight.
    dnnl::matmul primitive;

    Product(const Device& device, const Desc& in, const Desc& out, const dnnl::post_ops& after) {
      dnnl::primitive_attr attributes;
      attributes.set_post_ops(after);
      const Desc any({in.dims()[1], out.dims()[1]}, kType, Tag::any);
      const dnnl::matmul::primitive_desc desc({in, any, out}, attributes, device.engine);
      format = desc.weights_desc();
      primitive = dnnl::matmul(desc);
    }

    void run(Device& device, const dnnl::memory& in, PackedWeight& weight, const dnnl::memory& out,
             Arguments arguments) const {
      arguments.emplace(DNNL_ARG_SRC, in);
      arguments.emplace(DNNL_ARG_WEIGHTS, weight.in_format(device, format));
      arguments.emplace(DNNL_ARG_DST, out);
      primitive.execute(device.stream, arguments);
      device.stream.wait();
    }
  };

  /// The products of an expert with a certain number of slots: silu_gate = silu(in Wg^T),
  /// hidden = (in Wu^T) * silu_gate, out = hidden Wd^T.
  struct Products {
    Desc in, inner, out;
    Product gate, up, down;
  };

  const Products& products_for(Index rows) {
    auto found = products_by_rows_.find(rows);
    if (found == products_by_rows_.end()) {
      const Desc in({rows, d_model_}, kType, Tag::ab);
      const Desc inner({rows, d_hidden_}, kType, Tag::ab);
      const Desc out({rows, d_model_}, Type::f32, Tag::ab);
      dnnl::post_ops silu;
      silu.append_eltwise(1.0F, dnnl::algorithm::eltwise_swish, 1.0F, 0.0F);
      dnnl::post_ops times_gate;
      times_gate.append_binary(dnnl::algorithm::binary_mul, inner);
      found = products_by_rows_
                  .emplace(rows, Products{in, inner, out, Product(device_, in, inner, silu),
                                          Product(device_, in, inner, times_gate),
                                          Product(device_, inner, out, {})})
                  .first;
    }
    return found->second;
  }

  void gather(const Map& x) {
    x_.resize(routing_.slots(), d_model_);
#pragma omp parallel for schedule(static)
    for (Index s = 0; s < routing_.slots(); ++s) x_.row(s) = x.row(token_of(s)).template cast<T>();
  }

  Device device_;
  std::vector<PackedWeight> packed_gate_, packed_up_, packed_down_;
  std::map<Index, Products> products_by_rows_;
  Matrix<T> x_;                   // [slots, d_model]
  Matrix<T> silu_gate_, hidden_;  // [slots, d_hidden]
};

}  // namespace

std::unique_ptr<Peer> make_dnnl_peer(const MoeWeights& weights, int threads) {
  return std::make_unique<DnnlPeer<float>>(weights, threads);
}

std::unique_ptr<Peer> make_dnnl_bfloat16_peer(const MoeWeights& weights, int threads) {
  return std::make_unique<DnnlPeer<Eigen::bfloat16>>(weights, threads);
}

std::string describe_dnnl() {
  const dnnl_version_t& version = *dnnl_version();
  return "oneDNN " + std::to_string(version.major) + '.' + std::to_string(version.minor) + '.' +
         std::to_string(version.patch);
}

}  // namespace weir::bench
