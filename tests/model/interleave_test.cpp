// SPDX-License-Identifier: MIT
#include <string>

#include <weir/model/interleave.hpp>

#include "support/catch.hpp"
#include "support/matrices.hpp"

namespace weir::interleave_test {

namespace {

// The first `layers` layers, S for a sparse one and d for a dense one.
std::string pattern(const Interleave& interleave, Index layers) {
  std::string text;
  for (Index i = 0; i < layers; ++i) text += interleave.is_sparse(i) ? 'S' : 'd';
  return text;
}

std::string message(const Interleave& interleave) {
  return test::message_of<ConfigError>([&] { interleave.is_sparse(0); });
}

}  // namespace

TEST_CASE("Interleave matches patterns written out", "[model][interleave][golden]") {
  CHECK(pattern({}, 4) == "SSSS");
  CHECK(pattern({.stride = 2}, 7) == "dSdSdSd");
  CHECK(pattern({.stride = 4}, 12) == "dddSdddSdddS");
  CHECK(pattern({.stride = 3, .phase = 0}, 7) == "SddSddS");
  CHECK(pattern({.stride = 3, .phase = 1}, 7) == "dSddSdd");
  CHECK(pattern({.first_dense = 3}, 6) == "dddSSS");
  CHECK(pattern({.stride = 2, .first_dense = 3, .phase = 0}, 8) == "ddddSdSd");
  CHECK(pattern({.first_dense = 9}, 4) == "dddd");
}

TEST_CASE("Interleave expresses the published rules", "[model][interleave]") {
  const auto stride = GENERATE(as<Index>{}, 1, 2, 4, 6);
  for (Index i = 0; i < 24; ++i) {
    INFO("stride " << stride << ", layer " << i);
    // Megatron-Core with moe_layer_freq.
    CHECK(Interleave{.stride = stride, .phase = 0}.is_sparse(i) == (i % stride == 0));
    // flaxformer, OpenMoE, Llama 4 and Qwen: the last of each stride.
    CHECK(Interleave{.stride = stride}.is_sparse(i) == ((i + 1) % stride == 0));
    // DeepSeek with first_k_dense_replace.
    CHECK(Interleave{.first_dense = 3}.is_sparse(i) == (i >= 3));
    // Hugging Face's Switch.
    if (stride > 1) {
      CHECK(Interleave{.stride = stride, .phase = 1}.is_sparse(i) == (i % stride == 1));
    }
  }
}

TEST_CASE("Interleave counts the sparse layers of published models",
          "[model][interleave][golden]") {
  CHECK(Interleave{}.count_sparse(32) == 32);                  // Mixtral 8x7B
  CHECK(Interleave{.stride = 2}.count_sparse(12) == 6);        // the encoder of Switch-Base
  CHECK(Interleave{.stride = 6}.count_sparse(24) == 4);        // OpenMoE-8B
  CHECK(Interleave{.first_dense = 3}.count_sparse(61) == 58);  // DeepSeek-V3
  CHECK(Interleave{.first_dense = 1}.count_sparse(60) == 59);  // DeepSeek-V2
  CHECK(Interleave{}.count_sparse(0) == 0);
  CHECK(Interleave{.first_dense = 3}.count_sparse(2) == 0);
}

TEST_CASE("Interleave says what is wrong with its settings", "[model][interleave]") {
  CHECK(message({.stride = 0}) == "Interleave: stride = 0, expected >= 1");
  CHECK(message({.first_dense = -1}) == "Interleave: first_dense = -1, expected >= 0");
  CHECK(message({.stride = 2, .phase = 2}) ==
        "Interleave: phase = 2, expected -1 <= phase < stride = 2");
  CHECK(message({.phase = -2}) == "Interleave: phase = -2, expected -1 <= phase < stride = 1");
  CHECK(test::message_of<ConfigError>([] { Interleave{.stride = -1}.count_sparse(3); }) ==
        "Interleave: stride = -1, expected >= 1");
}

}  // namespace weir::interleave_test
