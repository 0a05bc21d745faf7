// SPDX-License-Identifier: MIT
// GGUF files against llama.cpp itself.
#include <algorithm>
#include <array>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <filesystem>
#include <iostream>
#include <random>
#include <stdexcept>
#include <string>
#include <tuple>
#include <vector>

#include <weir/io/gguf.hpp>
#include <weir/io/gguf_writer.hpp>

#include "io/folder.hpp"
#include "peer/llama_cpp.hpp"
#include "support/catch.hpp"
#include "support/matrices.hpp"

namespace weir::gguf_test {
using namespace weir::io;
using FileKind = test::LlamaCpp::FileKind;

namespace {

/// llama.cpp, or nothing, which is said.
const test::LlamaCpp* llama_cpp() {
  const test::LlamaCpp* const found = test::LlamaCpp::find();
  if (found == nullptr) std::cout << "skipped: " << test::LlamaCpp::why_not() << '\n';
  return found;
}

constexpr std::array kBlockTypes = {GgufType::kQ4_0, GgufType::kQ5_0, GgufType::kQ8_0,
                                    GgufType::kQ4K,  GgufType::kQ6K,  GgufType::kMxfp4};

constexpr Index kModel = 256;  // One block of Q4_K, so that a conversion uses it.
constexpr Index kHidden = 512;
constexpr Index kWords = 96;

/// A decoder of the architecture "llama" with two layers of four experts.
void write_small_model(const std::filesystem::path& path) {
  GgufMetadata metadata;
  metadata.add_text("general.architecture", "llama");
  metadata.add_u32("llama.context_length", 64);
  metadata.add_u32("llama.embedding_length", kModel);
  metadata.add_u32("llama.block_count", 2);
  metadata.add_u32("llama.feed_forward_length", kHidden);
  metadata.add_u32("llama.attention.head_count", 4);
  metadata.add_u32("llama.attention.head_count_kv", 2);
  metadata.add_f32("llama.attention.layer_norm_rms_epsilon", 1e-5F);
  metadata.add_u32("llama.expert_count", 4);
  metadata.add_u32("llama.expert_used_count", 2);
  metadata.add_u32("llama.vocab_size", kWords);
  metadata.add_text("tokenizer.ggml.model", "no_vocab");

  std::vector<GgufSource<float>> sources;
  std::uint64_t seed = 1;
  const auto add = [&](const std::string& name, const std::vector<Index>& shape) {
    Index size = 1;
    for (const Index length : shape) size *= length;
    const Matrix<float> numbers = 0.05F * test::random_matrix<float>(1, size, seed++);
    const Index cols = shape.back();
    sources.push_back(
        {name + ".weight", shape, GgufType::kF32, [=](Index first, Index count, float* to) {
           std::copy_n(numbers.data() + first * cols, count * cols, to);
         }});
  };
  add("token_embd", {kWords, kModel});
  add("output_norm", {kModel});
  add("output", {kWords, kModel});
  for (const std::string layer : {"blk.0.", "blk.1."}) {
    add(layer + "attn_norm", {kModel});
    add(layer + "attn_q", {kModel, kModel});
    add(layer + "attn_k", {kModel / 2, kModel});
    add(layer + "attn_v", {kModel / 2, kModel});
    add(layer + "attn_output", {kModel, kModel});
    add(layer + "ffn_norm", {kModel});
    add(layer + "ffn_gate_inp", {4, kModel});
    add(layer + "ffn_gate_exps", {4, kHidden, kModel});
    add(layer + "ffn_up_exps", {4, kHidden, kModel});
    add(layer + "ffn_down_exps", {4, kModel, kHidden});
  }
  write_gguf<float>(path, metadata, sources);
}

}  // namespace

TEST_CASE("Blocks of any bytes have the values that llama.cpp reads, bit for bit",
          "[io][gguf][peer]") {
  const test::LlamaCpp* const peer = llama_cpp();
  if (peer == nullptr) return;
  std::mt19937 random(1);
  for (const GgufType type : kBlockTypes) {
    INFO(name_of(type));
    const Index count = 200 * block_length(type);
    std::vector<std::byte> bytes(200 * block_bytes(type));
    for (std::byte& byte : bytes) byte = static_cast<std::byte>(random() & 255U);
    std::vector<float> ours(static_cast<std::size_t>(count));
    dequantise(type, bytes.data(), count, ours.data());
    const std::vector<float> theirs =
        peer->read(static_cast<std::uint32_t>(type), bytes.data(), count);
    Index different = 0;
    for (std::size_t i = 0; i < ours.size(); ++i) {
      const bool both_nan = std::isnan(ours[i]) && std::isnan(theirs[i]);
      different += ours[i] == theirs[i] || both_nan ? 0 : 1;
    }
    CHECK(different == 0);
  }
}

TEST_CASE("Q8_0 has the bytes that llama.cpp writes", "[io][gguf][peer]") {
  const test::LlamaCpp* const peer = llama_cpp();
  if (peer == nullptr) return;
  for (int exponent = -140; exponent < 16; exponent += 3) {
    const Matrix<float> numbers = std::ldexp(1.0F, exponent) * test::random_matrix<float>(1, 64, 7);
    const std::vector<float> list(numbers.data(), numbers.data() + numbers.size());
    std::vector<std::byte> ours(2 * block_bytes(GgufType::kQ8_0));
    quantise("numbers", GgufType::kQ8_0, numbers.data(), numbers.size(), ours.data());
    CHECK(ours == peer->stored(static_cast<std::uint32_t>(GgufType::kQ8_0), list, 64));
  }
}

TEST_CASE("llama.cpp runs a file that write_gguf wrote", "[io][gguf][peer]") {
  const test::LlamaCpp* const peer = llama_cpp();
  if (peer == nullptr) return;
  const test::Folder folder;
  write_small_model(folder.path() / "a.gguf");
  test::LlamaCpp::Model model(*peer, folder.path() / "a.gguf", 32);
  CHECK(model.vocabulary() == kWords);
  const Matrix<float> whole = model.logits({1, 2, 3, 4, 5});
  CHECK(whole.rows() == 5);
  CHECK(whole.norm() > 0.1F);
  model.clear();
  CHECK(test::relative_error(model.logits({1, 2}), whole.topRows(2)) < 1e-5);
  CHECK(test::relative_error(model.logits({3, 4, 5}), whole.bottomRows(3)) < 1e-5);
  CHECK(model.greedy({6}, 5).size() == 5);
}

TEST_CASE("Files that llama.cpp converts are read", "[io][gguf][peer]") {
  const test::LlamaCpp* const peer = llama_cpp();
  if (peer == nullptr) return;
  const test::Folder folder;
  const std::string original = (folder.path() / "a.gguf").string();
  const std::string converted = (folder.path() / "b.gguf").string();
  write_small_model(original);
  const Gguf exact = Gguf::read(original);
  for (const auto& [kind, type, error] : {std::tuple(FileKind::kF16, GgufType::kF16, 0x1p-11),
                                          std::tuple(FileKind::kQ8_0, GgufType::kQ8_0, 0.01),
                                          std::tuple(FileKind::kQ6K, GgufType::kQ6K, 0.03),
                                          std::tuple(FileKind::kQ4KM, GgufType::kQ4K, 0.1),
                                          std::tuple(FileKind::kQ4_0, GgufType::kQ4_0, 0.12),
                                          std::tuple(FileKind::kMxfp4, GgufType::kMxfp4, 0.2)}) {
    INFO(name_of(type));
    peer->quantise(original, converted, kind);
    const Gguf file = Gguf::read(converted);
    for (const auto& [key, value] : exact.metadata()) CHECK(file.has(key));
    CHECK(file.text("general.architecture") == "llama");
    CHECK(file.tensor("blk.0.ffn_up_exps.weight").type == type);
    REQUIRE(file.tensors().size() == exact.tensors().size());
    for (const auto& [name, tensor] : exact.tensors()) {
      INFO(name);
      CHECK(file.tensor(name).shape == tensor.shape);
      const std::vector<double> before = exact.numbers(name);
      const std::vector<double> after = file.numbers(name);
      const Eigen::Map<const RowVector<double>> x(before.data(), tensor.size());
      const Eigen::Map<const RowVector<double>> y(after.data(), tensor.size());
      CHECK(test::relative_error(y, x) < error);
    }
  }
}

TEST_CASE("llama.cpp's complaints about a file are passed on", "[io][gguf][peer]") {
  const test::LlamaCpp* const peer = llama_cpp();
  if (peer == nullptr) return;
  const test::Folder folder;
  GgufMetadata metadata;
  metadata.add_text("general.architecture", "llama");
  write_gguf<float>(folder.path() / "a.gguf", metadata, {});
  const std::string complaint = test::message_of<std::runtime_error>(
      [&] { const test::LlamaCpp::Model model(*peer, folder.path() / "a.gguf", 32); });
  CHECK(complaint.find("llama.context_length") != std::string::npos);
}

}  // namespace weir::gguf_test
