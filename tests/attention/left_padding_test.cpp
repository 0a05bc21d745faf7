// SPDX-License-Identifier: MIT
// Padding before a sequence changes nothing: positions count from the first real token.
#include <cmath>
#include <cstdint>
#include <limits>
#include <string>
#include <utility>
#include <vector>

#include <weir/attention/grouped_query.hpp>
#include <weir/attention/latent.hpp>
#include <weir/model/decoder.hpp>
#include <weir/nn/glu.hpp>
#include <weir/nn/rms_norm.hpp>

#include "attention/grouped_query_reference.hpp"
#include "support/catch.hpp"
#include "support/matrices.hpp"

namespace weir::left_padding_test {

namespace {

constexpr Index kModel = 6;

struct Padded {
  Sequences sequences;
  std::vector<std::uint8_t> mask;
  Matrix<double> x;
  std::vector<Index> real;  ///< The rows of real tokens, in order.

  Pass pass() const { return {.training = true, .sequences = &sequences, .mask = mask}; }

  Matrix<double> tokens(const Matrix<double>& rows) const {
    Matrix<double> only(static_cast<Index>(real.size()), rows.cols());
    for (std::size_t i = 0; i < real.size(); ++i) {
      only.row(static_cast<Index>(i)) = rows.row(real[i]);
    }
    return only;
  }
};

/// The sequences of `lengths` in the rows x, with padding before each, as in a batch.
Padded padded(const std::vector<Index>& lengths, const std::vector<Index>& before,
              const Matrix<double>& x) {
  Padded all;
  Index rows = 0;
  for (std::size_t s = 0; s < lengths.size(); ++s) {
    all.sequences.append(before[s] + lengths[s]);
    for (Index t = 0; t < before[s] + lengths[s]; ++t, ++rows) {
      all.mask.push_back(t < before[s] ? 0 : 1);
      if (t >= before[s]) all.real.push_back(rows);
    }
  }
  all.x.setConstant(rows, x.cols(), std::numeric_limits<double>::quiet_NaN());
  for (std::size_t i = 0; i < all.real.size(); ++i) {
    all.x.row(all.real[i]) = x.row(static_cast<Index>(i));
  }
  return all;
}

/// Compares results and gradients of `layer` with and without padding.
template <class L>
void check_left_padding(const L& layer) {
  const std::vector<Index> lengths = {9, 1, 70, 13};
  const Sequences plain(lengths);
  const Matrix<double> x = test::random_matrix(plain.tokens(), kModel, 1);
  const Matrix<double> dy = test::random_matrix(plain.tokens(), kModel, 2);
  L one = layer;
  typename L::Cache cache;
  const Matrix<double> y = one.forward(x, Pass{.training = true, .sequences = &plain}, cache);
  const Matrix<double> dx = one.backward(dy, cache);
  for (const std::vector<Index>& before :
       {std::vector<Index>{1, 2, 3, 0}, {5, 30, 66, 64}, {0, 0, 100, 7}}) {
    INFO("padding of the third sequence " << before[2]);
    const Padded batch = padded(lengths, before, x);
    L other = layer;
    typename L::Cache own;
    const Matrix<double> with = other.forward(batch.x, batch.pass(), own);
    CHECK(test::relative_error(batch.tokens(with), y) <= 1e-13);
    const Matrix<double> d_with = other.backward(padded(lengths, before, dy).x, own);
    CHECK(test::relative_error(batch.tokens(d_with), dx) <= 1e-12);
    const auto expected = parameters(one);
    const auto got = parameters(other);
    for (std::size_t i = 0; i < got.size(); ++i) {
      INFO(got[i].name);
      CHECK(test::relative_error(got[i].parameter->grad, expected[i].parameter->grad) <= 1e-12);
    }

    // A prompt that was padded in a batch goes on without: states hold real tokens alone.
    const Index begin = plain.begin(2);
    typename L::State state;
    const Matrix<double> decoded = decode(layer, x.middleRows(begin, 60), state, own);
    const Matrix<double> last = decode(layer, x.middleRows(begin + 60, 10), state, own);
    CHECK(test::relative_error(decoded, batch.tokens(with).middleRows(begin, 60)) <= 1e-12);
    CHECK(test::relative_error(last, batch.tokens(with).middleRows(begin + 60, 10)) <= 1e-12);
  }
}

GroupedQueryConfig base() {
  return {.d_model = kModel, .heads = 2, .kv_heads = 1, .head_dim = 4};
}

GroupedQueryConfig with_temperature() {
  GroupedQueryConfig config = base();
  config.rope = false;
  config.temperature_scale = 0.5;
  config.temperature_floor = 3;
  return config;
}

}  // namespace

TEST_CASE("Padding before a sequence changes nothing for grouped-query attention",
          "[attention][grouped_query][padding]") {
  std::vector<std::pair<std::string, GroupedQueryConfig>> all(6, {"rotation", base()});
  all[1] = {"chunks", base()};
  all[1].second.chunk = 8;
  all[2] = {"window", base()};
  all[2].second.window = 7;
  all[3] = {"temperature", with_temperature()};
  all[4] = {"sinks, biases and dynamic NTK", base()};
  all[4].second.sinks = all[4].second.qkv_bias = all[4].second.output_bias = true;
  all[4].second.rope_scaling =
      DynamicNtkScaling{.factor = 2.0, .original_context = 16, .length = 70};
  all[5] = {"chunks and window", base()};
  all[5].second.chunk = 20;
  all[5].second.window = 6;
  for (const auto& [name, config] : all) {
    INFO(name);
    check_left_padding(test::random_attention(config));
  }
}

TEST_CASE("Padding before a sequence changes nothing for latent attention",
          "[attention][latent][padding]") {
  Rng rng(3);
  for (const Index q_rank : {0, 5}) {
    check_left_padding(LatentAttention<double>(rng, {.d_model = kModel,
                                                     .heads = 2,
                                                     .q_rank = q_rank,
                                                     .kv_rank = 4,
                                                     .nope_dim = 3,
                                                     .rope_dim = 4,
                                                     .value_dim = 5}));
  }
}

TEST_CASE("Chunks and temperatures count from the first real token",
          "[attention][grouped_query][padding]") {
  // Chunks of 2 without projections that mix: the token behind two real ones begins a chunk, and
  // sees itself alone, whatever stands before.
  GroupedQueryConfig config{.d_model = 2, .heads = 1, .kv_heads = 1, .rope = false, .chunk = 2};
  Rng rng(1);
  GroupedQueryAttention<double> layer(rng, config);
  for (auto& [name, parameter] : parameters(layer)) parameter->value.setIdentity();
  Matrix<double> x(4, 2);
  x << 9, 9, 1, 0, 0, 1, 3, 5;
  const std::vector<std::uint8_t> mask = {0, 1, 1, 1};
  const Matrix<double> y = infer(layer, x, {.mask = mask});
  CHECK(y.row(0).isZero(0));
  CHECK(y.row(1) == x.row(1));
  // Scores 0 and 1 / sqrt(2) of the first two real tokens.
  const double share = std::exp(1.0 / std::sqrt(2.0)) / (1.0 + std::exp(1.0 / std::sqrt(2.0)));
  CHECK(y(2, 0) == Approx(1.0 - share));
  CHECK(y(2, 1) == Approx(share));
  CHECK(y.row(3) == x.row(3));

  // Temperature 1 + ln(1 + floor((t + 1) / 2)): 1 for the first token, 1 + ln 2 for the second.
  config.chunk = 0;
  config.temperature_scale = 1.0;
  config.temperature_floor = 2;
  GroupedQueryAttention<double> tempered(rng, config);
  for (auto& [name, parameter] : parameters(tempered)) parameter->value.setIdentity();
  const double sharper = std::exp((1.0 + std::log(2.0)) / std::sqrt(2.0));
  const Matrix<double> z = infer(tempered, x, {.mask = mask});
  CHECK(z(2, 1) == Approx(sharper / (1.0 + sharper)));
}

TEST_CASE("Padding before a sequence changes nothing for a decoder", "[model][decoder][padding]") {
  Rng rng(5);
  std::vector<Block<double>> layers;
  GroupedQueryConfig chunked = base();
  chunked.chunk = 4;
  for (const GroupedQueryConfig& config : {chunked, with_temperature()}) {
    layers.push_back(
        pre_norm_block<double>(RmsNorm<double>(kModel), GroupedQueryAttention<double>(rng, config),
                               RmsNorm<double>(kModel), Glu<double>(kModel, 8, rng), "mlp"));
  }
  const Decoder<double> model(Embedding<double>(11, kModel, rng, {.stddev = 1.0}),
                              std::move(layers), RmsNorm<double>(kModel));
  const std::vector<Index> ids = {3, 1, 4, 1, 5, 9, 2, 6, 5, 3};
  const Matrix<double> plain = infer(model, ids);
  for (const std::size_t before : {1U, 2U, 3U, 4U, 17U}) {
    std::vector<Index> all(before, 0);
    all.insert(all.end(), ids.begin(), ids.end());
    std::vector<std::uint8_t> mask(all.size(), 1);
    for (std::size_t t = 0; t < before; ++t) mask[t] = 0;
    const Matrix<double> logits = infer(model, all, {.mask = mask});
    CHECK(test::relative_error(logits.bottomRows(10), plain) <= 1e-13);
    CHECK(logits.topRows(static_cast<Index>(before)).isZero(0));
  }
  Decoder<double>::State state;
  Decoder<double>::Cache cache;
  CHECK(test::relative_error(decode(model, ids, state, cache), plain) <= 1e-13);
}

}  // namespace weir::left_padding_test
