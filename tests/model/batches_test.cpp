// SPDX-License-Identifier: MIT
#include <algorithm>
#include <vector>

#include <weir/attention/grouped_query.hpp>
#include <weir/model/batches.hpp>
#include <weir/model/decoder.hpp>
#include <weir/nn/cross_entropy.hpp>
#include <weir/nn/mlp.hpp>
#include <weir/nn/rms_norm.hpp>

#include "support/catch.hpp"
#include "support/matrices.hpp"
#include "support/texts.hpp"

namespace weir::batches_test {

namespace {

using Ids = std::vector<Index>;
using Mask = std::vector<std::uint8_t>;

constexpr Index kVocab = 9;

Decoder<double> make_decoder() {
  Rng rng(1);
  const RmsNorm<double> norm(8);
  std::vector<Block<double>> layers;
  layers.push_back(pre_norm_block<double>(
      norm, GroupedQueryAttention<double>(rng, {.d_model = 8, .heads = 2, .kv_heads = 1}), norm,
      Mlp<double>(8, 6, rng), "mlp"));
  return {Embedding<double>(kVocab, 8, rng), std::move(layers), norm};
}

/// The loss of a batch, and the gradient of the embedding.
std::pair<double, Matrix<double>> train(const TokenBatch& batch, Index tokens = 0) {
  Decoder<double> model = make_decoder();
  Decoder<double>::Cache cache;
  CrossEntropy<double> loss;
  CrossEntropy<double>::Cache errors;
  const Matrix<double>& logits = model.forward(batch.ids, batch.training(), cache);
  const double value = loss.forward(logits, batch.targets, errors, tokens);
  model.backward(loss.backward(errors), cache);
  return {value, parameters(model)[0].parameter->grad};
}

}  // namespace

TEST_CASE("window_batch cuts windows and what follows each token", "[model][batches]") {
  const Ids text = {5, 6, 7, 8, 1, 2};
  const TokenBatch batch = window_batch(text, Ids{3, 0}, 2);
  CHECK(batch.ids == Ids{8, 1, 5, 6});
  CHECK(batch.targets == Ids{1, 2, 6, 7});
  CHECK(batch.mask.empty());
  CHECK(batch.sequences.count() == 2);
  CHECK(batch.sequences.end(0) == 2);
  CHECK(batch.real_tokens() == 4);
  CHECK(window_batch(text, Ids{0}, 5).targets == Ids{6, 7, 8, 1, 2});
  CHECK(window_batch(std::vector<int>{1, 2, 3}, Ids{1}, 1).targets == Ids{3});
  CHECK(window_batch(text, Ids{}, 2).ids.empty());
}

TEST_CASE("padded_batch fills up to one length", "[model][batches]") {
  const std::vector<Ids> documents = {{1, 2, 3}, {4, 5}, {6, 7, 8, 1}};
  const TokenBatch right = padded_batch(documents, {.pad_id = 8, .ignore_index = -1});
  CHECK(right.ids == Ids{1, 2, 8, 4, 8, 8, 6, 7, 8});
  CHECK(right.targets == Ids{2, 3, -1, 5, -1, -1, 7, 8, 1});
  CHECK(right.mask == Mask{1, 1, 0, 1, 0, 0, 1, 1, 1});
  CHECK(right.sequences.count() == 3);
  CHECK(right.sequences.end(1) == 6);
  CHECK(right.real_tokens() == 6);
  const TokenBatch left = padded_batch(documents, {.left = true});
  CHECK(left.ids == Ids{0, 1, 2, 0, 0, 4, 6, 7, 8});
  CHECK(left.targets == Ids{-100, 2, 3, -100, -100, 5, 7, 8, 1});
  CHECK(left.mask == Mask{0, 1, 1, 0, 0, 1, 1, 1, 1});
  const TokenBatch cut = padded_batch(documents, {.length = 1});
  CHECK(cut.ids == Ids{1, 4, 6});
  CHECK(cut.targets == Ids{2, 5, 7});
  CHECK(cut.mask.empty());
  CHECK(padded_batch(documents, {.length = 4}).ids.size() == 12);
}

TEST_CASE("packed_batch puts documents one after the other", "[model][batches]") {
  const std::vector<Ids> documents = {{1, 2, 3}, {4, 5}, {6, 7, 8, 1}};
  const TokenBatch batch = packed_batch(documents);
  CHECK(batch.ids == Ids{1, 2, 4, 6, 7, 8});
  CHECK(batch.targets == Ids{2, 3, 5, 7, 8, 1});
  CHECK(batch.mask.empty());
  CHECK(batch.sequences.count() == 3);
  CHECK(batch.sequences.end(0) == 2);
  CHECK(batch.sequences.end(2) == 6);
}

TEST_CASE("Padded, packed and single documents have the same loss and gradient",
          "[model][batches]") {
  std::vector<Ids> documents;
  for (const Index count : {5, 2, 9, 6}) {
    documents.push_back(test::random_ids(count, kVocab, static_cast<std::uint64_t>(count)));
  }
  const auto [packed, packed_gradient] = train(packed_batch(documents));
  for (const bool left : {false, true}) {
    const auto [padded, gradient] = train(padded_batch(documents, {.left = left}));
    CHECK(padded == Approx(packed).epsilon(1e-12));
    CHECK(test::relative_error(gradient, packed_gradient) < 1e-11);
  }
  double sum = 0.0;
  Matrix<double> gradient = Matrix<double>::Zero(kVocab, 8);
  for (const Ids& document : documents) {
    const auto [value, own] = train(packed_batch(std::span<const Ids>(&document, 1)), 18);
    sum += value;
    gradient += own;
  }
  CHECK(sum == Approx(packed).epsilon(1e-12));
  CHECK(test::relative_error(gradient, packed_gradient) < 1e-11);
}

TEST_CASE("pack_items fills bins from the longest item to the shortest", "[model][batches]") {
  using Bins = std::vector<Ids>;
  // 7 | 6 4 | 4 3 2 into bins of 10: 7 + 3, 6 + 4, 4 + 2.
  CHECK(pack_items(Ids{4, 7, 2, 6, 4, 3}, 10) == Bins{{1, 5}, {0, 3}, {2, 4}});
  CHECK(pack_items(Ids{5, 5, 5}, 5) == Bins{{0}, {1}, {2}});
  CHECK(pack_items(Ids{}, 5).empty());
  CHECK(pack_items(Ids{0, 0}, 0) == Bins{{0, 1}});
  Rng rng(3);
  Ids lengths;
  for (int i = 0; i < 200; ++i) lengths.push_back(1 + rng.below(50));
  const Bins bins = pack_items(lengths, 64);
  std::vector<int> seen(lengths.size(), 0);
  Index total = 0;
  for (const Ids& bin : bins) {
    Index sum = 0;
    for (const Index item : bin) {
      sum += lengths[static_cast<std::size_t>(item)];
      ++seen[static_cast<std::size_t>(item)];
    }
    CHECK(sum <= 64);
    total += sum;
  }
  CHECK(std::all_of(seen.begin(), seen.end(), [](int n) { return n == 1; }));
  CHECK(9 * static_cast<Index>(bins.size()) <= 11 * ((total + 63) / 64) + 9 + 11);
}

TEST_CASE("The batches say what does not fit", "[model][batches]") {
  const Ids text = {1, 2, 3, 4};
  const auto window = [&](Index start, Index length) {
    return test::message_of<ConfigError>([&] { window_batch(text, Ids{0, start}, length); });
  };
  CHECK(
      window(2, 2) ==
      "window_batch: starts[1] = 2 with length = 2, expected a window and one token more inside 4 "
      "tokens");
  CHECK(window(-1, 2) ==
        "window_batch: starts[1] = -1 with length = 2, expected a window and one token more inside "
        "4 tokens");
  CHECK(window(0, 0) == "window_batch: length = 0, expected >= 1");
  CHECK(window(0, std::numeric_limits<Index>::max()) != "no exception");
  const std::vector<Ids> documents = {{1, 2}, {3}};
  CHECK(test::message_of<ConfigError>([&] { packed_batch(documents); }) ==
        "packed_batch: documents[1] has 1 tokens, expected at least 2 (one follows another)");
  CHECK(test::message_of<ConfigError>([&] { padded_batch(documents); }) ==
        "padded_batch: documents[1] has 1 tokens, expected at least 2 (one follows another)");
  CHECK(test::message_of<ConfigError>([&] { padded_batch({}, {.length = -1}); }) ==
        "padded_batch: length = -1, expected >= 0");
  CHECK(test::message_of<ConfigError>([&] {
          pack_items(Ids{3, 6}, 5);
        }) == "pack_items: lengths[1] = 6, expected 0 <= lengths[1] <= 5");
}

}  // namespace weir::batches_test
