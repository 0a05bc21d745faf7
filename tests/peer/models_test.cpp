// SPDX-License-Identifier: MIT
// Models that go to llama.cpp, and those that come from it, beside it.
#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <filesystem>
#include <fstream>
#include <iostream>
#include <limits>
#include <string>
#include <string_view>
#include <tuple>
#include <variant>
#include <vector>

#include <weir/core/verbs.hpp>
#include <weir/io/gguf_model.hpp>
#include <weir/moe/capacity/dropless.hpp>
#include <weir/moe/moe_layer.hpp>
#include <weir/moe/router/linear_router.hpp>
#include <weir/moe/selector/top_k_softmax.hpp>
#include <weir/nn/cross_entropy.hpp>
#include <weir/nn/layer_norm.hpp>
#include <weir/optim/adamw.hpp>
#include <weir/presets/compose.hpp>

#include "io/folder.hpp"
#include "io/gguf_models.hpp"
#include "peer/llama_cpp.hpp"
#include "support/catch.hpp"
#include "support/matrices.hpp"

namespace weir::models_test {
using namespace weir::io;
using FileKind = test::LlamaCpp::FileKind;

namespace {

constexpr Index kTokens = 64;

/// Room for a prompt and what is written behind it.
constexpr Index kContext = 128;

const std::vector<Index> kPrompt = {3, 1, 4, 1, 5, 9, 2, 6, 5, 3, 5, 8};

std::vector<std::int32_t> to_peer(const std::vector<Index>& ids) {
  std::vector<std::int32_t> result;
  for (const Index id : ids) result.push_back(static_cast<std::int32_t>(id));
  return result;
}

/// llama.cpp, or nothing, which is said.
const test::LlamaCpp* llama_cpp() {
  const test::LlamaCpp* const found = test::LlamaCpp::find();
  if (found == nullptr) std::cout << "skipped: " << test::LlamaCpp::why_not() << '\n';
  return found;
}

/// Whether the processor has AMX: llama.cpp then keeps weights of eight bits in a form of their
/// own, in which it cannot multiply those of this model's attention, and aborts.
bool has_tiles() {
  std::ifstream file("/proc/cpuinfo");
  std::string word;
  while (file >> word) {
    if (word == "amx_int8") return true;
  }
  return false;
}

/// The next tokens, each the most probable one behind those before.
/// \param margin   Becomes the smallest distance between the best logit and the next.
std::vector<std::int32_t> greedy(const Decoder<float>& model, float& margin) {
  Decoder<float>::State state;
  Decoder<float>::Cache cache;
  std::vector<std::int32_t> result;
  std::vector<Index> ids = kPrompt;
  while (static_cast<Index>(result.size()) < kTokens) {
    RowVector<float> logits = decode(model, ids, state, cache, true).bottomRows(1);
    Index best = 0;
    const float most = logits.maxCoeff(&best);
    logits[best] = -std::numeric_limits<float>::infinity();
    margin = std::min(margin, most - logits.maxCoeff());
    result.push_back(static_cast<std::int32_t>(best));
    ids = {best};
  }
  return result;
}

/// Both have the same logits within `bound` of their norm, and write the same.
void check_same(const test::LlamaCpp& library, const std::filesystem::path& path,
                const Decoder<float>& model, double bound) {
  const bool is_tied = !Gguf::read(path.string()).has_tensor("output.weight");
  test::LlamaCpp::Model peer(library, path, kContext);
  const Matrix<float> theirs = peer.logits(to_peer(kPrompt));
  const Matrix<float> ours = infer(model, kPrompt);
  CHECK(test::relative_error(ours, theirs) < bound);
  peer.clear();
  float margin = std::numeric_limits<float>::infinity();
  const std::vector<std::int32_t> written = greedy(model, margin);
  CHECK(written == peer.greedy(to_peer(kPrompt), kTokens));
  // No choice is one of rounding.
  CHECK(margin > 2.0F * (ours - theirs).cwiseAbs().maxCoeff());
  // The text is none of one word, except that a random model whose head is its embedding may repeat
  // what it has just read.
  const bool is_varied =
      std::any_of(written.begin(), written.end(), [&](auto id) { return id != written[0]; });
  CHECK((is_varied || is_tied));
}

template <class Config>
Config small(const Config& config) {
  return presets::scaled(config, test::kGgufScale);
}

template <class Config>
Config untied(Config config) {
  config.shape.tied = false;
  return config;
}

/// A mixture whose rows fill blocks of 256 numbers.
presets::MixtralConfig wide_mixtral() {
  presets::MixtralConfig config = presets::scaled(presets::mixtral_8x7b(), {.d_model = 256});
  config.shape.d_hidden = 512;
  return config;
}

constexpr std::string_view kText =
    "A weir is a low dam across a river: many streams come to it, and each of them is sent where "
    "it is needed.";

/// A model that has learned `kText`, byte by byte.
Decoder<float> trained(const presets::MixtralConfig& config) {
  Rng rng(1);
  Decoder<float> model = presets::make<float>(config, rng);
  std::vector<Index> ids;
  for (const char byte : kText) ids.push_back(static_cast<unsigned char>(byte));
  const std::vector<Index> inputs(ids.begin(), ids.end() - 1);
  const std::vector<Index> targets(ids.begin() + 1, ids.end());
  AdamW<float> optimizer({.learning_rate = 5e-3});
  const CrossEntropy<float> loss;
  CrossEntropy<float>::Cache loss_cache;
  Decoder<float>::Cache cache;
  for (int step = 0; step < 200; ++step) {
    loss.forward(model.forward(inputs, Pass{.training = true}, cache), targets, loss_cache);
    model.backward(loss.backward(loss_cache), cache);
    optimizer.step(model);
    zero_gradients(model);
  }
  return model;
}

}  // namespace

// Each case of the following may end the process, since llama.cpp's assertions do.

#define WEIR_PEER_CASE(name, config, bound)                                       \
  TEST_CASE("llama.cpp computes what weir does with " name, "[io][gguf][peer]") { \
    const test::LlamaCpp* const peer = llama_cpp();                               \
    if (peer == nullptr) return;                                                  \
    const auto own = config;                                                      \
    Decoder<float> model = test::random_gguf_model(own);                          \
    const test::Folder folder;                                                    \
    save_gguf(folder.path() / "a.gguf", model, own);                              \
    check_same(*peer, folder.path() / "a.gguf", model, bound);                    \
  }

WEIR_PEER_CASE("llama", small(presets::llama_3_1_8b()), 1e-5)
WEIR_PEER_CASE("llama with experts", small(presets::mixtral_8x7b()), 1e-5)
WEIR_PEER_CASE("qwen3", small(presets::qwen3_8b()), 1e-5)
WEIR_PEER_CASE("qwen3moe", small(presets::qwen3_30b_a3b()), 1e-5)
WEIR_PEER_CASE("qwen2moe", small(presets::qwen1_5_moe_a2_7b()), 1e-5)
WEIR_PEER_CASE("olmoe", small(presets::olmoe_1b_7b()), 1e-5)
WEIR_PEER_CASE("dbrx", small(presets::dbrx()), 1e-5)
WEIR_PEER_CASE("deepseek2 of DeepSeek-V2", small(test::gguf_deepseek_v2()), 1e-5)
WEIR_PEER_CASE("deepseek2 of DeepSeek-V2-Lite", small(presets::deepseek_v2_lite()), 1e-5)
WEIR_PEER_CASE("deepseek2 of DeepSeek-V3", small(test::gguf_deepseek_v3()), 1e-5)
WEIR_PEER_CASE("gpt-oss", small(test::gguf_gpt_oss()), 1e-5)
// The GELU of llama.cpp is a table of 16-bit numbers.
WEIR_PEER_CASE("grok", small(test::gguf_grok()), 2e-3)
WEIR_PEER_CASE("grok with a head", small(untied(test::gguf_grok())), 2e-3)
WEIR_PEER_CASE("glm4moe of GLM-4.5-Air", test::gguf_glm(presets::glm_4_5_air()), 1e-5)
WEIR_PEER_CASE("glm4moe of GLM-4.5", test::gguf_glm(presets::glm_4_5()), 1e-5)
WEIR_PEER_CASE("ernie4_5-moe", small(presets::ernie_4_5_21b_a3b()), 1e-5)
WEIR_PEER_CASE("ernie4_5-moe with a head", small(untied(presets::ernie_4_5_21b_a3b())), 1e-5)
WEIR_PEER_CASE("granitemoe", small(presets::granite_3_1_1b_a400m()), 1e-5)
WEIR_PEER_CASE("granitemoe with a head", small(untied(presets::granite_3_1_1b_a400m())), 1e-5)
WEIR_PEER_CASE("llama4 of Scout", test::gguf_llama4(), 1e-5)
WEIR_PEER_CASE("llama4 of Maverick", test::gguf_llama4(128), 1e-5)

namespace {

/// Phi-3.5-MoE as far as llama.cpp computes it too: its weights of two experts are a softmax over
/// both, and layer norms are its norms where no vector has a mean.
Decoder<float> phi_of_llama_cpp(const presets::PhiMoeConfig& config) {
  Rng rng(7);
  const presets::ModelShape& shape = config.shape;
  presets::Parts<float> parts = presets::usual_parts<float>(shape, config.norm_epsilon, rng);
  parts.norm = [&] {
    return LayerNorm<float>(shape.d_model, {.epsilon = config.norm_epsilon, .bias = true});
  };
  parts.mixture = [&] {
    return MoELayer{LinearRouter<float>(shape.d_model, shape.experts, rng),
                    TopKSoftmax<float>({.k = shape.k}), Dropless(),
                    presets::gated_experts<float>(shape, rng)};
  };
  Decoder<float> model = presets::compose<float>(shape, parts, rng);
  test::randomise(model, rng);
  for (auto& [name, parameter] : parameters(model)) {
    Matrix<float>& value = parameter->value;
    if (name == "embedding.weight" || name.ends_with("attention.output_bias")) {
      value.colwise() -= value.rowwise().mean().eval();
    } else if (name.ends_with("attention.output") || name.ends_with(".down")) {
      value.rowwise() -= value.colwise().mean().eval();
    }
  }
  return model;
}

/// \param original   The context up to which frequencies are the short ones.
void check_phi(const test::LlamaCpp& library, Index original) {
  const presets::PhiMoeConfig config = test::gguf_phi(original, kContext);
  Decoder<float> model = phi_of_llama_cpp(config);
  const test::Folder folder;
  test::write_gguf_phi(folder.path() / "a.gguf", model, config);
  check_same(library, folder.path() / "a.gguf", model, 1e-5);
}

}  // namespace

TEST_CASE("llama.cpp computes what weir does with phimoe's attention, frequencies and biases",
          "[io][gguf][peer]") {
  const test::LlamaCpp* const peer = llama_cpp();
  if (peer == nullptr) return;
  check_phi(*peer, 4096);          // Short factors.
  check_phi(*peer, kContext / 2);  // Long ones.
}

TEST_CASE("llama.cpp computes what weir does with llama4 behind the first chunk",
          "[io][gguf][peer]") {
  const test::LlamaCpp* const peer = llama_cpp();
  if (peer == nullptr) return;
  presets::Llama4Config config = test::gguf_llama4();
  config.shape.d_model = 32;
  for (presets::AttentionShape* const shape :
       {&config.shape.attention, &*config.shape.other_attention}) {
    auto& attention = std::get<GroupedQueryConfig>(*shape);
    attention.heads = attention.kv_heads = 1;
    attention.head_dim = 8;
  }
  Decoder<float> model = test::random_gguf_model(config);
  const test::Folder folder;
  save_gguf(folder.path() / "a.gguf", model, config);
  constexpr Index kAtOnce = 1032;
  constexpr Index kPasses = 8;  // 8256 tokens, of which 64 are in the second chunk.
  std::vector<Index> ids;
  for (Index i = 0; i < kPasses * kAtOnce; ++i) ids.push_back((i * i + 7 * i) % 79);
  test::LlamaCpp::Model theirs(*peer, folder.path() / "a.gguf", kPasses * kAtOnce,
                               {.at_once = kAtOnce});
  Matrix<float> last;
  for (Index pass = 0; pass < kPasses; ++pass) {
    const auto begin = ids.begin() + pass * kAtOnce;
    last = theirs.logits(to_peer({begin, begin + kAtOnce}));
  }
  const Matrix<float> ours = infer(model, ids).bottomRows(kAtOnce);
  CHECK(test::relative_error(ours.topRows(64), last.topRows(64)) < 1e-5);
  CHECK(test::relative_error(ours.bottomRows(64), last.bottomRows(64)) < 1e-5);
}

TEST_CASE("llama.cpp writes what weir has learned", "[io][gguf][peer]") {
  const test::LlamaCpp* const peer = llama_cpp();
  if (peer == nullptr) return;
  const presets::MixtralConfig config = presets::scaled(presets::mixtral_8x7b(), {.vocab = 128});
  Decoder<float> model = trained(config);
  const test::Folder folder;
  save_gguf(folder.path() / "a.gguf", model, config);
  constexpr std::size_t kStart = 30;
  test::LlamaCpp::Model theirs(*peer, folder.path() / "a.gguf", kContext);
  std::vector<std::int32_t> prompt;
  for (const char byte : kText.substr(0, kStart))
    prompt.push_back(static_cast<unsigned char>(byte));
  std::string written;
  for (const std::int32_t id : theirs.greedy(prompt, kTokens)) written += static_cast<char>(id);
  CHECK(written == kText.substr(kStart, kTokens));
  check_same(*peer, folder.path() / "a.gguf", model, 1e-5);
}

// Where weights are in blocks of codes, llama.cpp rounds what it multiplies them with to 8 bits as
// well: on such files its logits differ from weir's by a few per cent of their norm. The numbers of
// the weights themselves are the same: from a file that has them in 32 bits, its logits are weir's.

namespace {

constexpr double kRoundedActivations = 0.05;

/// `converted` holds a model that weir computes as llama.cpp does.
template <class Config>
void check_converted(const test::LlamaCpp& library, const std::filesystem::path& converted) {
  auto loaded = load_gguf_family<Config>(converted);
  const Matrix<float> ours = infer(loaded.model, kPrompt);
  test::LlamaCpp::Model theirs(library, converted, kContext);
  CHECK(test::relative_error(ours, theirs.logits(to_peer(kPrompt))) < kRoundedActivations);
  const auto exact = converted.parent_path() / "exact.gguf";
  save_gguf(exact, loaded.model, std::get<Config>(loaded.config));
  test::LlamaCpp::Model same(library, exact, kContext);
  CHECK(test::relative_error(ours, same.logits(to_peer(kPrompt))) < 1e-5);
}

}  // namespace

TEST_CASE("weir computes what llama.cpp does with files that llama.cpp has converted",
          "[io][gguf][peer]") {
  const test::LlamaCpp* const peer = llama_cpp();
  if (peer == nullptr) return;
  const test::Folder folder;
  const auto original = folder.path() / "a.gguf";
  const auto converted = folder.path() / "b.gguf";
  const presets::MixtralConfig config = wide_mixtral();
  Decoder<float> model = test::random_gguf_model(config);
  save_gguf(original, model, config);
  for (const auto& [name, kind] :
       {std::tuple("F16", FileKind::kF16), std::tuple("Q8_0", FileKind::kQ8_0),
        std::tuple("Q4_0", FileKind::kQ4_0), std::tuple("Q4_K_M", FileKind::kQ4KM),
        std::tuple("Q6_K", FileKind::kQ6K), std::tuple("MXFP4", FileKind::kMxfp4)}) {
    INFO(name);
    peer->quantise(original, converted, kind);
    check_converted<presets::MixtralConfig>(*peer, converted);
  }
}

TEST_CASE("weir computes what llama.cpp does with a gpt-oss in four bits", "[io][gguf][peer]") {
  const test::LlamaCpp* const peer = llama_cpp();
  if (peer == nullptr) return;
  const test::Folder folder;
  const auto original = folder.path() / "a.gguf";
  const auto converted = folder.path() / "b.gguf";
  presets::GptOssConfig config = presets::scaled(test::gguf_gpt_oss(), {.d_model = 128});
  config.shape.d_hidden = 128;
  Decoder<float> model = test::random_gguf_model(config);
  save_gguf(original, model, config);
  peer->quantise(original, converted, FileKind::kMxfp4);
  CHECK(Gguf::read(converted.string()).tensor("blk.1.ffn_up_exps.weight").type == GgufType::kMxfp4);
  check_converted<presets::GptOssConfig>(*peer, converted);
}

TEST_CASE("weir computes what llama.cpp does with a deepseek2 in eight bits", "[io][gguf][peer]") {
  const test::LlamaCpp* const peer = llama_cpp();
  if (peer == nullptr) return;
  if (has_tiles()) {
    std::cout << "skipped: llama.cpp ends the program on a processor with AMX\n";
    return;
  }
  const test::Folder folder;
  const auto original = folder.path() / "a.gguf";
  const auto converted = folder.path() / "b.gguf";
  auto config = presets::scaled(test::gguf_deepseek_v3(), {.d_model = 128});
  auto& latent = std::get<LatentConfig>(config.shape.attention);
  latent.q_rank = latent.nope_dim = latent.rope_dim = latent.value_dim = 32;  // A block.
  latent.kv_rank = 64;
  config.shape.d_hidden = config.shape.shared_hidden = config.shape.dense_hidden = 64;
  Decoder<float> model = test::random_gguf_model(config);
  save_gguf(original, model, config);
  peer->quantise(original, converted, FileKind::kQ8_0);
  CHECK(Gguf::read(converted.string()).tensor("blk.1.attn_k_b.weight").type == GgufType::kQ8_0);
  check_converted<presets::DeepSeekV3Config>(*peer, converted);
}

TEST_CASE("llama.cpp computes what weir does with files in fewer bits", "[io][gguf][peer]") {
  const test::LlamaCpp* const peer = llama_cpp();
  if (peer == nullptr) return;
  const test::Folder folder;
  const auto path = folder.path() / "a.gguf";
  const presets::MixtralConfig config = wide_mixtral();
  Decoder<float> model = test::random_gguf_model(config);
  // It rounds what it multiplies to the kind of the weights.
  for (const auto& [type, bound] :
       {std::tuple(GgufType::kF16, 0.002), std::tuple(GgufType::kBF16, 0.02),
        std::tuple(GgufType::kQ8_0, kRoundedActivations)}) {
    INFO(name_of(type));
    save_gguf(path, model, config, {.dtype = type});
    test::LlamaCpp::Model theirs(*peer, path, kContext);
    const auto loaded = load_gguf_family<presets::MixtralConfig>(path);
    CHECK(test::relative_error(infer(loaded.model, kPrompt), theirs.logits(to_peer(kPrompt))) <
          bound);
  }
}

}  // namespace weir::models_test
