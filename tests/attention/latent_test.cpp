// SPDX-License-Identifier: MIT
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>
#include <random>
#include <stdexcept>
#include <string>
#include <variant>
#include <vector>

#include <weir/attention/latent.hpp>
#include <weir/core/decoding.hpp>
#include <weir/core/layer.hpp>
#include <weir/core/storage.hpp>

#include "support/allocations.hpp"
#include "support/caches.hpp"
#include "support/catch.hpp"
#include "support/gradient.hpp"
#include "support/matrices.hpp"
#include "support/threads.hpp"

namespace weir::latent_test {

static_assert(DecodingLayer<LatentAttention<float>>);
static_assert(DecodingLayer<LatentAttention<double>>);

namespace {

using Latent = LatentAttention<double>;

constexpr LatentDecoding kWays[] = {LatentDecoding::kAbsorbed, LatentDecoding::kExpanded,
                                    LatentDecoding::kCheaper};

/// A layer whose norms are not one.
template <class T = double>
LatentAttention<T> make(const LatentConfig& config, std::uint64_t seed = 1) {
  Rng rng(seed);
  LatentAttention<T> layer(rng, config);
  for (auto& [name, parameter] : parameters(layer)) {
    if (name.ends_with("norm.weight"))
      parameter->value += normal_init<T>(1, parameter->value.cols(), 0.3, rng);
  }
  return layer;
}

/// Odd sizes, none equal to another.
LatentConfig small(Index q_rank = 5) {
  return {.d_model = 9,
          .heads = 3,
          .q_rank = q_rank,
          .kv_rank = 7,
          .nope_dim = 5,
          .rope_dim = 4,
          .value_dim = 6,
          .rope_theta = 100.0};
}

LatentConfig with(LatentConfig config, LatentDecoding decoding) {
  config.decoding = decoding;
  return config;
}

/// `name` as the layer shows it to optimizers and checkpoints.
const Matrix<double>& weight(Latent& layer, const std::string& name) {
  for (auto& [candidate, parameter] : parameters(layer)) {
    if (candidate == name) return parameter->value;
  }
  throw std::out_of_range(name);
}

/// The definition, written out: for each query all its scores, then their softmax.
Matrix<double> reference(Latent& layer, const Matrix<double>& x, const Pass& pass = {}) {
  const Latent::Config& c = layer.config();
  const Sequences all({x.rows()});
  const Sequences& sequences = pass.sequences != nullptr ? *pass.sequences : all;
  const auto normed = [&](const Matrix<double>& rows, const std::string& name) {
    Matrix<double> y = rows;
    for (Index t = 0; t < y.rows(); ++t) {
      y.row(t) /=
          std::sqrt(y.row(t).squaredNorm() / static_cast<double>(y.cols()) + c.norm_epsilon);
      y.row(t) = y.row(t).cwiseProduct(weight(layer, name + ".weight").row(0)).eval();
    }
    return y;
  };
  const Rope rope(
      c.rope_dim,
      {.theta = c.rope_theta, .layout = RopeLayout::kInterleaved, .scaling = c.rope_scaling});
  const auto rotated = [&](Matrix<double> part, Index position) {
    rope.rotate<double>(part, std::vector<Index>{position});
    return part;
  };
  const Matrix<double> from =
      c.q_rank > 0 ? normed(x * weight(layer, "query_down").transpose(), "query_norm") : x;
  const Matrix<double> q = from * weight(layer, "query").transpose();
  const Matrix<double> down = x * weight(layer, "kv_down").transpose();
  const Matrix<double> latent = normed(down.leftCols(c.kv_rank), "kv_norm");
  const Matrix<double> key_nope = latent * weight(layer, "key_up").transpose();
  const Matrix<double> v = latent * weight(layer, "value_up").transpose();
  const Yarn* const yarn = std::get_if<Yarn>(&c.rope_scaling);
  const double m =
      yarn != nullptr ? 0.1 * yarn->mscale_all_dim * std::log(yarn->factor) + 1.0 : 1.0;
  const double scale = m * m / std::sqrt(static_cast<double>(c.nope_dim + c.rope_dim));

  Matrix<double> context = Matrix<double>::Zero(x.rows(), v.cols());
  for (Index s = 0; s < sequences.count(); ++s) {
    Index begin = sequences.begin(s);  // Of positions.
    while (begin < sequences.end(s) && pass.is_padding(begin)) ++begin;
    for (Index t = begin; t < sequences.end(s); ++t) {
      for (Index head = 0; head < c.heads; ++head) {
        const Matrix<double> own =
            q.row(t).segment(head * (c.nope_dim + c.rope_dim), c.nope_dim + c.rope_dim);
        const Matrix<double> q_rope = rotated(own.rightCols(c.rope_dim), t - begin);
        double total = 0.0;
        for (Index j = begin; j <= t; ++j) {
          if (pass.is_padding(j)) continue;
          const Matrix<double> k_rope = rotated(down.row(j).tail(c.rope_dim), j - begin);
          const double score = own.row(0)
                                   .head(c.nope_dim)
                                   .dot(key_nope.row(j).segment(head * c.nope_dim, c.nope_dim)) +
                               q_rope.row(0).dot(k_rope.row(0));
          const double p = std::exp(scale * score);
          total += p;
          context.row(t).segment(head * c.value_dim, c.value_dim) +=
              p * v.row(j).segment(head * c.value_dim, c.value_dim);
        }
        if (total > 0.0) context.row(t).segment(head * c.value_dim, c.value_dim) /= total;
      }
    }
  }
  for (Index t = 0; t < x.rows(); ++t) {
    if (pass.is_padding(t)) context.row(t).setZero();
  }
  return context * weight(layer, "output").transpose();
}

/// Decodes the sequences of x, each in chunks of its own lengths which are drawn, some of none.
/// Every call serves all sequences.
template <class T>
Matrix<T> decoded(const LatentAttention<T>& layer, const Matrix<T>& x, const Sequences& sequences,
                  Index most_at_once, std::uint64_t seed) {
  const auto count = static_cast<std::size_t>(sequences.count());
  std::vector<LatentCache<T>> kept(count);
  std::vector<LatentCache<T>*> states;
  for (auto& state : kept) states.push_back(&state);
  typename LatentAttention<T>::Cache cache;
  std::mt19937_64 random(seed);
  Matrix<T> y = Matrix<T>::Constant(x.rows(), x.cols(), std::numeric_limits<T>::quiet_NaN());
  for (Index done = 0; done < x.rows();) {
    Sequences now;
    std::vector<Index> rows;
    for (Index s = 0; s < sequences.count(); ++s) {
      const Index first = sequences.begin(s) + kept[static_cast<std::size_t>(s)].length();
      const auto drawn =
          static_cast<Index>(random() % static_cast<std::uint64_t>(most_at_once + 1));
      const Index length = std::min(drawn, sequences.end(s) - first);
      now.append(length);
      for (Index t = first; t < first + length; ++t) rows.push_back(t);
    }
    Matrix<T> chunk(now.tokens(), x.cols());
    for (Index i = 0; i < chunk.rows(); ++i)
      chunk.row(i) = x.row(rows[static_cast<std::size_t>(i)]);
    const Matrix<T>& out = layer.decode(chunk, Pass{.sequences = &now}, states, cache);
    for (Index i = 0; i < chunk.rows(); ++i) y.row(rows[static_cast<std::size_t>(i)]) = out.row(i);
    done += now.tokens();
  }
  return y;
}

}  // namespace

TEST_CASE("LatentAttention matches a case worked by hand", "[attention][latent][golden]") {
  // One head; x_0 = (1, 0), x_1 = (0, 1). Latents x . (1, -1) = 1 and -1, of which the norm leaves
  // r = 1 / sqrt(1 + 1e-6) and -r. Queries and keys: one number without position, q_nope = x . (0,
  // 1) and the latent, and x itself, turned by t radians. Values are twice the latent, and go to
  // the first output. Token 0 sees itself alone: y_0 = 2 r. Token 1 has the scores
  //   s_0 = (r + R(1)(0, 1) . (1, 0)) / sqrt(3) = (r - sin(1)) / sqrt(3)
  //   s_1 = (-r + 1) / sqrt(3)                              (rotation keeps the norm)
  // so p_0 = 1 / (1 + exp(s_1 - s_0)) = 0.522866 and y_1 = 2 r (p_0 - p_1) = 0.091463.
  Latent layer = make({.d_model = 2,
                       .heads = 1,
                       .kv_rank = 1,
                       .nope_dim = 1,
                       .rope_dim = 2,
                       .value_dim = 1,
                       .rope_theta = 1.0});
  for (auto& [name, parameter] : parameters(layer)) {
    Matrix<double>& w = parameter->value;
    if (name == "query") w << 0, 1, 1, 0, 0, 1;
    if (name == "kv_down") w << 1, -1, 1, 0, 0, 1;
    if (name == "kv_norm.weight" || name == "key_up") w << 1;
    if (name == "value_up") w << 2;
    if (name == "output") w << 1, 0;
  }
  const Matrix<double> y = infer(layer, Matrix<double>::Identity(2, 2));
  CHECK(y(0, 0) == Approx(2.0).epsilon(1e-6));
  CHECK(y(1, 0) == Approx(0.091463).epsilon(1e-5));
  CHECK(y.col(1).isZero(0.0));
}

TEST_CASE("LatentAttention is the softmax attention of its definition", "[attention][latent]") {
  LatentConfig config = small(GENERATE(as<Index>{}, 0, 5));
  config.rope_scaling = GENERATE(values<RopeScaling>(
      {NoScaling{},
       Yarn{.factor = 8.0, .original_context = 16, .mscale = 1.0, .mscale_all_dim = 0.7},
       LinearScaling{.factor = 4.0},
       DynamicNtkScaling{.factor = 2.0, .original_context = 16, .length = 80},
       Llama3Scaling{.factor = 8.0, .original_context = 16}}));
  Latent layer = make(config);
  Latent::Cache cache;

  SECTION("one sequence, short or longer than two blocks of keys") {
    for (const Index tokens : {1, 2, 17, 65, 140}) {
      INFO("tokens " << tokens);
      const Matrix<double> x = test::random_matrix(tokens, 9, 2);
      CHECK(test::relative_error(infer(layer, x), reference(layer, x)) <= 1e-13);
      CHECK(layer.forward(x, kTraining, cache) == infer(layer, x));
    }
  }
  SECTION("packed sequences, with and without padding") {
    const Sequences sequences({3, 0, 70, 1, 33, 0});
    const Matrix<double> x = test::random_matrix(sequences.tokens(), 9, 3);
    std::vector<std::uint8_t> mask(static_cast<std::size_t>(sequences.tokens()), 1);
    Pass pass{.sequences = &sequences};
    CHECK(test::relative_error(layer.forward(x, pass, cache), reference(layer, x, pass)) <= 1e-13);
    for (const std::size_t padding : {0U, 3U, 4U, 40U, 73U, 100U}) mask[padding] = 0;
    pass.mask = mask;
    CHECK(test::relative_error(layer.forward(x, pass, cache), reference(layer, x, pass)) <= 1e-13);
  }
}

TEST_CASE("LatentAttention decodes each way what it would compute at once, in random settings",
          "[attention][latent][property]") {
  for (std::uint64_t seed = 0; seed < 40; ++seed) {
    INFO("seed " << seed);
    std::mt19937_64 random(seed);
    const auto draw = [&](Index least, Index most) {
      return least + static_cast<Index>(random() % static_cast<std::uint64_t>(most - least + 1));
    };
    LatentConfig config{.d_model = draw(1, 12),
                        .heads = draw(1, 5),
                        .q_rank = draw(0, 6),
                        .kv_rank = draw(1, 20),
                        .nope_dim = draw(1, 9),
                        .rope_dim = 2 * draw(1, 4),
                        .value_dim = draw(1, 9)};
    if (draw(0, 1) == 1) {
      config.rope_scaling = Yarn{.factor = 4.0, .original_context = 8, .mscale_all_dim = 1.0};
    }
    Sequences sequences;
    for (Index s = draw(1, 5); s > 0; --s) sequences.append(draw(0, 30));
    const Matrix<double> x = test::random_matrix(sequences.tokens(), config.d_model, seed);
    const Index most_at_once = draw(1, 12);
    Latent::Cache cache;
    Latent layer = make(config, seed);
    const Matrix<double> whole =
        layer.forward(x, Pass{.training = true, .sequences = &sequences}, cache);
    CHECK(test::relative_error(whole, reference(layer, x, Pass{.sequences = &sequences})) <= 1e-12);
    for (const LatentDecoding way : kWays) {
      const Latent decoder = make(with(config, way), seed);
      CHECK(test::relative_error(decoded(decoder, x, sequences, most_at_once, seed), whole) <=
            1e-12);
    }
  }
}

TEST_CASE("LatentAttention decodes long sequences token by token, in chunks and in one",
          "[attention][latent]") {
  const auto way = GENERATE(from_range(std::begin(kWays), std::end(kWays)));
  const auto chunk = GENERATE(as<Index>{}, 1, 3, 70, 150);
  const Index tokens = 150;
  const LatentConfig config = with(small(), way);

  SECTION("double") {
    const Latent layer = make(config);
    const Matrix<double> x = test::random_matrix(tokens, 9, 10);
    Latent::State state;
    Latent::Cache cache;
    Matrix<double> y(tokens, 9);
    for (Index t = 0; t < tokens; t += chunk) {
      const Index count = std::min(chunk, tokens - t);
      y.middleRows(t, count) = decode(layer, x.middleRows(t, count), state, cache);
      CHECK(state.length() == t + count);
    }
    CHECK(test::relative_error(y, infer(layer, x)) <= 1e-12);
  }
  SECTION("float") {
    const auto layer = make<float>(config);
    const Matrix<float> x = test::random_matrix<float>(tokens, 9, 10);
    LatentAttention<float>::State state;
    LatentAttention<float>::Cache cache;
    Matrix<float> y(tokens, 9);
    for (Index t = 0; t < tokens; t += chunk) {
      const Index count = std::min(chunk, tokens - t);
      y.middleRows(t, count) = decode(layer, x.middleRows(t, count), state, cache);
    }
    CHECK(test::relative_error(y, infer(layer, x)) <= 1e-5);
  }
}

TEST_CASE("LatentAttention remembers kv_rank + rope_dim numbers per token, for any heads",
          "[attention][latent]") {
  LatentConfig config = small();
  config.heads = GENERATE(as<Index>{}, 1, 3, 16);
  const Latent layer = make(config);
  const Matrix<double> x = test::random_matrix(20, 9, 10);
  Latent::State state;
  Latent::Cache cache;
  decode(layer, x, state, cache);

  CHECK(state.matrix().size() == 20 * (7 + 4));
  CHECK(state.kv_rank() == 7);
  CHECK(state.rope_dim() == 4);
  // What it remembers is the latent after its norm, and the key rotated to its position.
  layer.forward(x, kTraining, cache);
  CHECK(state.latents() == cache.kv_norm.y);
  CHECK(state.rope_keys() == cache.kv.rightCols(4));
  CHECK(sizeof(Latent::State) <= sizeof(std::vector<double>) + 5 * sizeof(Index));
  if (test::allocations_are_counted()) {
    CHECK(test::count_allocations([&] { const Latent::State copy = state; }) == 1);
  }
}

TEST_CASE("LatentAttention takes the cheaper way: expanded for a prompt, absorbed for a token",
          "[attention][latent]") {
  const LatentConfig config{
      .d_model = 8, .heads = 2, .kv_rank = 32, .nope_dim = 8, .rope_dim = 4, .value_dim = 8};
  const Latent cheaper = make(config);
  const Latent absorbed = make(with(config, LatentDecoding::kAbsorbed));
  const Latent expanded = make(with(config, LatentDecoding::kExpanded));
  const Matrix<double> x = test::random_matrix(30, 8, 11);
  Latent::State state;
  Latent::Cache cache;
  const auto decoded_by = [&](const Latent& layer, Index first, Index count) -> Matrix<double> {
    Latent::State copy = state;
    return decode(layer, x.middleRows(first, count), copy, cache);
  };
  CHECK(decoded_by(cheaper, 0, 20) == decoded_by(expanded, 0, 20));
  CHECK(decoded_by(cheaper, 0, 20) != decoded_by(absorbed, 0, 20));
  decode(cheaper, x.topRows(20), state, cache);
  CHECK(decoded_by(cheaper, 20, 1) == decoded_by(absorbed, 20, 1));
  CHECK(decoded_by(cheaper, 20, 1) != decoded_by(expanded, 20, 1));
}

TEST_CASE("LatentAttention serves a prompt and single tokens in one call", "[attention][latent]") {
  // The prompt takes the expanded way, the tokens around it the absorbed one.
  const LatentConfig config{
      .d_model = 8, .heads = 2, .kv_rank = 32, .nope_dim = 8, .rope_dim = 4, .value_dim = 8};
  const Latent layer = make(config);
  const Sequences sequences({12, 25, 7});
  const Matrix<double> x = test::random_matrix(44, 8, 11);
  Latent::Cache cache;
  const Matrix<double> whole =
      layer.forward(x, Pass{.training = true, .sequences = &sequences}, cache);
  Latent::State first, second, third;
  decode(layer, x.topRows(11), first, cache);
  decode(layer, x.bottomRows(7).topRows(6), third, cache);
  const Sequences now({1, 25, 1});
  Matrix<double> chunk(27, 8);
  chunk << x.row(11), x.middleRows(12, 25), x.row(43);
  std::vector<Latent::State*> states = {&first, &second, &third};
  const Matrix<double> y = layer.decode(chunk, Pass{.sequences = &now}, states, cache);
  CHECK(test::relative_error(y.row(0), whole.row(11)) <= 1e-13);
  CHECK(test::relative_error(y.middleRows(1, 25), whole.middleRows(12, 25)) <= 1e-13);
  CHECK(test::relative_error(y.row(26), whole.row(43)) <= 1e-13);
}

TEST_CASE("LatentAttention continues a copied and a shortened cache", "[attention][latent]") {
  const Latent layer = make(small());
  const Matrix<double> x = test::random_matrix(20, 9, 11);
  Latent::Cache cache;
  Latent::State state;
  decode(layer, x.topRows(12), state, cache);
  Latent::State copy = state;
  const Matrix<double> rest = decode(layer, x.bottomRows(8), state, cache);

  CHECK(decode(layer, x.bottomRows(8), copy, cache) == rest);
  state.truncate(12);
  CHECK(decode(layer, x.bottomRows(8), state, cache) == rest);
  CHECK(decode(layer, Matrix<double>(0, 9), state, cache).rows() == 0);
  CHECK(state.length() == 20);
}

TEST_CASE("LatentAttention does not look ahead", "[attention][latent]") {
  const Latent layer = make(small());
  const Index tokens = 100;
  const Matrix<double> x = test::random_matrix(tokens, 9, 6);
  const Matrix<double> before = infer(layer, x);
  for (const Index changed : {1, 63, 64, 99}) {
    INFO("token " << changed);
    Matrix<double> other = x;
    other.row(changed) *= -5.0;
    const Matrix<double> after = infer(layer, other);
    CHECK(after.topRows(changed) == before.topRows(changed));
    CHECK(after.row(changed) != before.row(changed));
  }
}

TEST_CASE("LatentAttention keeps NaN within its sequence", "[attention][latent]") {
  const auto way = GENERATE(from_range(std::begin(kWays), std::end(kWays)));
  const Latent layer = make(with(small(), way));
  const Sequences sequences({3, 4, 2});
  Matrix<double> x = test::random_matrix(9, 9, 6);
  x(4, 2) = std::numeric_limits<double>::quiet_NaN();
  const auto check = [](const Matrix<double>& y) {
    CHECK(y.topRows(3).allFinite());
    CHECK(y.bottomRows(2).allFinite());
    CHECK(y.middleRows(4, 3).array().isNaN().all());
  };
  Latent::Cache cache;
  check(layer.forward(x, Pass{.training = true, .sequences = &sequences}, cache));
  std::vector<Latent::State> kept(3);
  std::vector<Latent::State*> states = {&kept[0], &kept[1], &kept[2]};
  check(layer.decode(x, Pass{.sequences = &sequences}, states, cache));
}

TEST_CASE("LatentAttention does not notice padding before a sequence", "[attention][latent]") {
  LatentConfig config = small();
  config.rope_scaling = Yarn{.factor = 8.0, .original_context = 8};
  const Latent layer = make(config);
  const Matrix<double> x = test::random_matrix(30, 9, 8);
  std::vector<std::uint8_t> mask(30, 1);
  for (std::size_t t = 0; t < 9; ++t) mask[t] = 0;
  Latent::Cache cache;
  const Matrix<double> shifted = layer.forward(x, Pass{.training = true, .mask = mask}, cache);

  CHECK(test::relative_error(shifted.bottomRows(21), infer(layer, x.bottomRows(21))) <= 1e-13);
}

TEST_CASE("LatentAttention in float is close to double", "[attention][latent]") {
  const auto narrow = make<float>(small());
  const auto wide = make<double>(small());
  const Matrix<double> x = 3.0 * test::random_matrix(100, 9, 4);
  const Matrix<double> y = infer(narrow, x.cast<float>()).cast<double>();
  CHECK(test::relative_error(y, infer(wide, x)) <= 1e-5);
}

TEST_CASE("LatentAttention survives scores far beyond the range of exp", "[attention][latent]") {
  auto layer = make<float>(small());
  for (auto& [name, parameter] : parameters(layer)) {
    if (name == "query" || name == "kv_down" || name == "key_up") parameter->value *= 1e3F;
  }
  LatentAttention<float>::Cache cache;
  LatentAttention<float>::State state;
  const Matrix<float> x = test::random_matrix<float>(40, 9, 5);
  CHECK(layer.forward(x, kTraining, cache).allFinite());
  CHECK(layer.backward(x, cache).allFinite());
  CHECK(decode(layer, x, state, cache).allFinite());
  CHECK(decode(layer, x.topRows(1), state, cache).allFinite());
}

TEST_CASE("LatentAttention gradients agree with finite differences",
          "[attention][latent][gradient]") {
  LatentConfig config = small(GENERATE(as<Index>{}, 0, 5));
  config.heads = GENERATE(as<Index>{}, 1, 2);
  config.norm_epsilon = 0.1;
  SECTION("one sequence") {
    Latent layer = make(config);
    test::check_gradients(layer, test::random_matrix(7, 9, 12));
  }
  SECTION("packed sequences with padding, and a Yarn that scales both rotation and score") {
    config.rope_scaling =
        Yarn{.factor = 8.0, .original_context = 16, .mscale = 3.0, .mscale_all_dim = 1.0};
    Latent layer = make(config);
    const Sequences sequences({4, 0, 1, 6});
    std::vector<std::uint8_t> mask(11, 1);
    mask[0] = mask[4] = mask[7] = 0;
    const Pass pass{.sequences = &sequences, .mask = mask};
    test::check_gradients(layer, test::random_matrix(11, 9, 13), pass);
  }
}

TEST_CASE("LatentAttention accumulates gradients", "[attention][latent]") {
  Latent layer = make(small());
  const Matrix<double> x = test::random_matrix(9, 9, 15);
  Latent::Cache cache;
  layer.forward(x, kTraining, cache);
  layer.backward(x, cache);
  std::vector<Matrix<double>> once;
  for (auto& [name, parameter] : parameters(layer)) once.push_back(parameter->grad);
  layer.forward(x, kTraining, cache);
  layer.backward(x, cache);
  std::size_t i = 0;
  for (auto& [name, parameter] : parameters(layer)) {
    INFO(name);
    CHECK(test::relative_error(parameter->grad, 2.0 * once[i++]) <= 1e-14);
  }
}

TEST_CASE("LatentAttention gives the same bits on any number of threads",
          "[attention][latent][parallel]") {
  const auto way = GENERATE(from_range(std::begin(kWays), std::end(kWays)));
  const auto storage = GENERATE(Storage::kTrainable, Storage::kPacked);
  auto layer = make<float>({.d_model = 32,
                            .heads = 4,
                            .q_rank = 24,
                            .kv_rank = 40,
                            .nope_dim = 16,
                            .rope_dim = 8,
                            .value_dim = 20,
                            .decoding = way});
  const Sequences sequences({150, 7, 90});
  const Sequences few({1, 2, 1});
  const Matrix<float> x = test::random_matrix<float>(sequences.tokens(), 32, 16);
  set_storage(layer, storage);
  const auto run = [&] {
    zero_gradients(layer);
    LatentAttention<float>::Cache cache;
    std::vector<LatentCache<float>> kept(3);
    std::vector<LatentCache<float>*> states = {&kept[0], &kept[1], &kept[2]};
    std::vector<Matrix<float>> results;
    results.push_back(layer.forward(x, Pass{.training = true, .sequences = &sequences}, cache));
    if (storage == Storage::kTrainable) results.push_back(layer.backward(x, cache));
    for (auto& [name, parameter] : parameters(layer)) results.push_back(parameter->grad);
    results.push_back(layer.decode(x, Pass{.sequences = &sequences}, states, cache));
    results.push_back(layer.decode(x.topRows(4), Pass{.sequences = &few}, states, cache));
    return results;
  };
  const auto one = run();
  const test::Threads threads(2);
  const auto two = run();
  for (std::size_t i = 0; i < one.size(); ++i) CHECK(one[i] == two[i]);
}

TEST_CASE("LatentAttention gives the same bits with a cache that has been used",
          "[attention][latent]") {
  Latent layer = make(small());
  Latent::Cache used;
  Latent::State state;
  layer.backward(layer.forward(test::random_matrix(130, 9, 17), kTraining, used), used);
  decode(layer, test::random_matrix(3, 9, 17), state, used);
  zero_gradients(layer);
  const Matrix<double> x = test::random_matrix(75, 9, 18);
  Latent::Cache fresh;

  CHECK(layer.forward(x, kTraining, used) == layer.forward(x, kTraining, fresh));
  CHECK(layer.backward(x, used) == layer.backward(x, fresh));
}

TEST_CASE("LatentAttention allocates nothing in the steady state", "[attention][latent]") {
  if (!test::allocations_are_counted()) return;
  const auto storage = GENERATE(Storage::kTrainable, Storage::kPacked);
  const auto way = GENERATE(from_range(std::begin(kWays), std::end(kWays)));
  auto layer = make<float>(with(small(), way));
  set_storage(layer, storage);
  const Matrix<float> x = test::random_matrix<float>(40, 9, 18);
  LatentAttention<float>::Cache cache;
  const auto train = [&] {
    layer.forward(x, kTraining, cache);
    if (storage == Storage::kTrainable) layer.backward(x, cache);
  };
  train();
  CHECK(test::count_allocations(train) == 0);

  const Sequences sequences({20, 20});
  const Sequences step({1, 1});
  LatentCache<float> first, second;
  std::vector<LatentCache<float>*> states = {&first, &second};
  layer.decode(x, Pass{.sequences = &sequences}, states, cache);
  for (auto* state : states) state->reserve(100);
  const auto decode = [&] { layer.decode(x.topRows(2), Pass{.sequences = &step}, states, cache); };
  decode();
  first.truncate(20);
  second.truncate(19);
  CHECK(test::count_allocations(decode) == 0);
}

TEMPLATE_TEST_CASE("LatentAttention computes the same in every storage",
                   "[attention][latent][storage]", float, double) {
  using T = TestType;
  const double kSame = std::is_same_v<T, float> ? 1e-5 : 1e-13;
  const auto way = GENERATE(from_range(std::begin(kWays), std::end(kWays)));
  const auto make_layer = [&] {
    return make<T>({.d_model = 36,
                    .heads = 3,
                    .q_rank = 20,
                    .kv_rank = 34,
                    .nope_dim = 17,
                    .rope_dim = 6,
                    .value_dim = 19,
                    .decoding = way});
  };
  auto layer = make_layer();
  const Sequences sequences({12, 5});
  const Matrix<T> x = test::random_matrix<T>(17, 36, 1);
  const Pass pass{.training = true, .sequences = &sequences};
  typename LatentAttention<T>::Cache cache;
  const Matrix<T> plain = layer.forward(x, pass, cache);

  set_storage(layer, Storage::kPacked);
  CHECK(parameters(layer).size() == 2);
  CHECK(test::relative_error(layer.forward(x, pass, cache), plain) <= kSame);
  CHECK(test::relative_error(decoded(layer, x, sequences, 3, 1), plain) <= kSame);
  const auto copy = layer;
  CHECK(test::relative_error(decoded(copy, x, sequences, 3, 1), plain) <= kSame);
  CHECK(test::message_of<StateError>([&] { layer.backward(x, cache); }) ==
        "LatentAttention::backward: the weights are stored for inference, expected "
        "Storage::kTrainable");

  set_storage(layer, Storage::kBfloat16);
  const Matrix<T> rounded = layer.forward(x, pass, cache);
  CHECK(test::relative_error(rounded, plain) > 1e-4);
  CHECK(test::relative_error(rounded, plain) < 2e-2);
  // In float, tokens and what lies between two products may be rounded too, in each way another.
  CHECK(test::relative_error(decoded(layer, x, sequences, 3, 1), rounded) <=
        (std::is_same_v<T, float> ? 2e-2 : 1e-13));

  set_storage(layer, Storage::kPacked);
  set_storage(layer, Storage::kTrainable);
  if (std::is_same_v<T, double>) {
    CHECK(test::relative_error(decoded(layer, x, sequences, 3, 1), rounded) <= 1e-13);
  }
  auto other = make_layer();
  set_storage(other, Storage::kPacked);
  set_storage(other, Storage::kTrainable);
  CHECK(other.forward(x, pass, cache) == plain);
  other.backward(plain, cache);
}

TEST_CASE("LatentAttention accepts no tokens and one token", "[attention][latent]") {
  const auto way = GENERATE(from_range(std::begin(kWays), std::end(kWays)));
  Latent layer = make(with(small(), way));
  const Matrix<double> none(0, 9);
  Latent::Cache cache;
  Latent::State state;
  CHECK(test::relative_error(layer.forward(none, kTraining, cache), none) == 0.0);
  CHECK(test::relative_error(layer.backward(none, cache), none) == 0.0);
  for (auto& [name, parameter] : parameters(layer)) CHECK(parameter->grad.isZero(0.0));
  const Sequences sequences({0, 0});
  CHECK(layer.forward(none, Pass{.training = true, .sequences = &sequences}, cache).rows() == 0);
  CHECK(decode(layer, none, state, cache).rows() == 0);
  const Sequences no_sequence;
  CHECK(layer.decode(none, Pass{.sequences = &no_sequence}, {}, cache).rows() == 0);
  CHECK(state.length() == 0);
  const Matrix<double> x = test::random_matrix(1, 9, 3);
  CHECK(test::relative_error(decode(layer, x, state, cache), infer(layer, x)) <= 1e-14);
}

TEST_CASE("A latent query that sees no key gets nothing and gives nothing", "[attention][latent]") {
  Latent layer = make(small());
  const Matrix<double> x = test::random_matrix(5, 9, 9);
  const std::vector<std::uint8_t> mask(5, 0);
  Latent::Cache cache;
  CHECK(layer.forward(x, Pass{.training = true, .mask = mask}, cache).isZero(0.0));
  CHECK(layer.backward(x, cache).isZero(0.0));
  for (auto& [name, parameter] : parameters(layer)) CHECK(parameter->grad.isZero(0.0));
}

TEST_CASE("LatentAttention names its parameters, as many as the formula says",
          "[attention][latent]") {
  const auto described = [](Latent& layer) {
    std::vector<std::string> shapes;
    for (auto& [name, parameter] : parameters(layer)) {
      shapes.push_back(name + " " + shape_of(parameter->value));
    }
    return shapes;
  };
  Latent low_rank = make(small(5));
  CHECK(described(low_rank) ==
        std::vector<std::string>{"query_down [5, 9]", "query_norm.weight [1, 5]", "query [27, 5]",
                                 "kv_down [11, 9]", "kv_norm.weight [1, 7]", "key_up [15, 7]",
                                 "value_up [18, 7]", "output [9, 18]"});
  Latent full = make(small(0));
  CHECK(described(full) == std::vector<std::string>{"query [27, 9]", "kv_down [11, 9]",
                                                    "kv_norm.weight [1, 7]", "key_up [15, 7]",
                                                    "value_up [18, 7]", "output [9, 18]"});
  // d r_q + r_q + r_q h (n + r) or d h (n + r); + d (r_kv + r) + r_kv + r_kv h (n + v) + h v d.
  const auto count = [](Latent& layer) {
    Index numbers = 0;
    for (auto& [name, parameter] : parameters(layer)) numbers += parameter->value.size();
    return numbers;
  };
  const Index rest = 9 * (7 + 4) + 7 + 7 * 3 * (5 + 6) + 3 * 6 * 9;
  CHECK(count(low_rank) == 9 * 5 + 5 + 5 * 3 * (5 + 4) + rest);
  CHECK(count(full) == 9 * 3 * (5 + 4) + rest);
}

TEST_CASE("LatentAttention keeps nothing for backward in a pass that does not train",
          "[attention][latent]") {
  const Latent layer = make(small());
  const Matrix<double> x = test::random_matrix(5, 9, 20);
  Latent::Cache cache;
  layer.forward(x, Pass{}, cache);
  Latent::State state;
  decode(layer, x, state, cache);
  CHECK(cache.x.size() == 0);
  CHECK(cache.query_norm.x.size() == 0);
  CHECK(cache.kv_norm.x.size() == 0);
}

TEST_CASE("LatentAttention begins with the asked-for spread", "[attention][latent]") {
  const auto tensors = [](double init_scale) {
    LatentConfig config = small();
    config.init_scale = init_scale;
    Rng rng(1);
    Latent layer(rng, config);
    return std::vector<Matrix<double>>{weight(layer, "query"), weight(layer, "key_up"),
                                       weight(layer, "output")};
  };
  for (std::size_t i = 0; i < 3; ++i) {
    CHECK(test::relative_error(tensors(4.0)[i], 2.0 * tensors(1.0)[i]) <= 1e-15);
  }
}

TEST_CASE("LatentCache holds what it is given", "[attention][latent]") {
  LatentCache<double> cache;
  CHECK(cache.empty());
  const Matrix<double> latents = test::random_matrix(5, 3, 1);
  const Matrix<double> keys = test::random_matrix(5, 2, 2);
  cache.append(latents.topRows(2), keys.topRows(2));
  cache.append(latents.bottomRows(3), keys.bottomRows(3));
  CHECK(cache.length() == 5);
  CHECK(cache.latents() == latents);
  CHECK(cache.rope_keys() == keys);
  CHECK(cache.matrix().leftCols(3) == latents);

  CHECK(test::message_of<ShapeError>([&] { cache.append(keys, keys); }) ==
        "LatentCache::append: latents is [5, 2], expected [tokens, 3]");
  CHECK(test::message_of<ShapeError>([&] { cache.append(latents, keys.topRows(2)); }) ==
        "LatentCache::append: rope_keys is [2, 2], expected [5, 2]");
  CHECK(test::message_of<ConfigError>([&] { cache.truncate(6); }) ==
        "LatentCache::truncate: length = 6, expected 0 <= length <= 5");
  CHECK(test::message_of<ConfigError>([&] { cache.truncate(-1); }) ==
        "LatentCache::truncate: length = -1, expected 0 <= length <= 5");
  CHECK(cache.latents() == latents);

  LatentCache<double> copy = cache;
  cache.truncate(2);
  CHECK(cache.latents() == latents.topRows(2));
  CHECK(copy.latents() == latents);
  cache.clear();
  CHECK(cache.empty());
  cache.append(keys, latents);  // Another width, now that it is empty.
  CHECK(cache.kv_rank() == 2);
  CHECK(cache.rope_keys() == latents);
  if (test::allocations_are_counted()) {
    cache.reserve(10);
    CHECK(test::count_allocations([&] { cache.append(keys, latents); }) == 0);
  }
}

TEST_CASE("LatentAttention says what is wrong with its configuration", "[attention][latent]") {
  const auto message = [](auto&& change) {
    LatentConfig config = small();
    change(config);
    return test::message_of<ConfigError>([&] { make(config); });
  };
  CHECK(message([](LatentConfig& c) { c.d_model = 0; }) ==
        "LatentAttention: d_model = 0, expected >= 1");
  CHECK(message([](LatentConfig& c) { c.heads = 0; }) ==
        "LatentAttention: heads = 0, expected >= 1");
  CHECK(message([](LatentConfig& c) { c.q_rank = -1; }) ==
        "LatentAttention: q_rank = -1, expected >= 0");
  CHECK(message([](LatentConfig& c) { c.kv_rank = 0; }) ==
        "LatentAttention: kv_rank = 0, expected >= 1");
  CHECK(message([](LatentConfig& c) { c.nope_dim = 0; }) ==
        "LatentAttention: nope_dim = 0, expected >= 1");
  CHECK(message([](LatentConfig& c) { c.rope_dim = 0; }) ==
        "LatentAttention: rope_dim = 0, expected >= 2");
  CHECK(message([](LatentConfig& c) { c.rope_dim = 3; }) ==
        "LatentAttention: rope_dim = 3, expected an even number");
  CHECK(message([](LatentConfig& c) { c.value_dim = 0; }) ==
        "LatentAttention: value_dim = 0, expected >= 1");
  CHECK(message([](LatentConfig& c) { c.rope_theta = std::nan(""); }) ==
        "LatentAttention: rope_theta = nan, expected a finite number > 0");
  CHECK(message([](LatentConfig& c) { c.norm_epsilon = 0.0; }) ==
        "LatentAttention: norm_epsilon = 0, expected a finite number > 0");
  CHECK(message([](LatentConfig& c) { c.rope_scaling = Yarn{.factor = 0.0}; }) ==
        "LatentAttention: yarn.factor = 0, expected a finite number >= 1");
  CHECK(message([](LatentConfig& c) { c.rope_scaling = LinearScaling{.factor = 0.0}; }) ==
        "LatentAttention: linear.factor = 0, expected a finite number >= 1");
}

TEST_CASE("LatentAttention says what is wrong with a call", "[attention][latent]") {
  Latent layer = make(small());
  Latent::Cache cache;
  Latent::State state;
  const Matrix<double> x = test::random_matrix(3, 9, 19);
  const Matrix<double> wide = test::random_matrix(3, 10, 19);
  test::check_refused_caches(layer, x, "LatentAttention::backward");
  CHECK(test::message_of<ShapeError>([&] { infer(layer, wide); }) ==
        "LatentAttention::forward: x is [3, 10], expected [tokens, 9]");
  CHECK(test::message_of<ShapeError>([&] { decode(layer, wide, state, cache); }) ==
        "LatentAttention::decode: x is [3, 10], expected [tokens, 9]");
  std::vector<std::uint8_t> mask(2, 1);
  CHECK(test::message_of<ShapeError>([&] {
          layer.forward(x, Pass{.training = true, .mask = mask}, cache);
        }) == "LatentAttention::forward: pass.mask has 2 entries, expected 3 (one per token)");
  const Sequences sequences({1, 2});
  layer.forward(x, kTraining, cache);

  Latent::State other;
  const auto decode_all = [&](std::vector<Latent::State*> states, Pass pass) {
    layer.decode(x, pass, states, cache);
  };
  const Pass pass{.sequences = &sequences};
  CHECK(test::message_of<StateError>([&] { decode_all({&state}, pass); }) ==
        "LatentAttention::decode: 1 states, expected 2 (one for each sequence)");
  CHECK(test::message_of<StateError>([&] {
          decode_all({&state, &other}, {});
        }) == "LatentAttention::decode: 2 states, expected 1 (one for each sequence)");
  CHECK(test::message_of<StateError>([&] {
          decode_all({&state, nullptr}, pass);
        }) == "LatentAttention::decode: states[1] is null");
  CHECK(test::message_of<StateError>([&] {
          decode_all({&state, &state}, pass);
        }) ==
        "LatentAttention::decode: states[0] and states[1] are the same, expected one for each "
        "sequence");
  mask = {1, 0, 1};
  CHECK(test::message_of<ConfigError>([&] { decode_all({&state}, {.mask = mask}); }) ==
        "LatentAttention::decode: token 1 is padding, expected none where tokens are kept");
  CHECK(state.empty());
  layer.backward(x, cache);  // What was refused has left the cache alone.

  mask = {1, 1, 1};
  decode_all({&state}, {.mask = mask});
  CHECK(state.length() == 3);
  CHECK_THROWS_AS(layer.backward(x, cache), StateError);
  state.clear();
  state.append(wide, wide);
  CHECK(test::message_of<ShapeError>([&] { decode(layer, x, state, cache); }) ==
        "LatentAttention::decode: latents is [3, 10], expected [3, 7]");
  state.clear();
  state.append(wide.leftCols(7), wide);
  CHECK(test::message_of<ShapeError>([&] { decode(layer, x, state, cache); }) ==
        "LatentAttention::decode: rope_keys is [3, 10], expected [3, 4]");
  CHECK(state.length() == 3);
}

}  // namespace weir::latent_test
