// SPDX-License-Identifier: MIT
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <optional>
#include <span>
#include <string>
#include <utility>
#include <vector>

#include <weir/attention/grouped_query.hpp>
#include <weir/model/multi_token.hpp>
#include <weir/moe/balance/bias_balance.hpp>
#include <weir/moe/balance/switch_loss.hpp>
#include <weir/moe/capacity/dropless.hpp>
#include <weir/moe/experts/glu_bank.hpp>
#include <weir/moe/moe_layer.hpp>
#include <weir/moe/router/hash_router.hpp>
#include <weir/moe/router/linear_router.hpp>
#include <weir/moe/selector/sigmoid_top_k.hpp>
#include <weir/moe/selector/softmax_top_k.hpp>
#include <weir/nn/glu.hpp>
#include <weir/nn/rms_norm.hpp>
#include <weir/optim/adamw.hpp>

#include "support/allocations.hpp"
#include "support/catch.hpp"
#include "support/gradient.hpp"
#include "support/threads.hpp"

namespace weir::multi_token_test {

namespace {

using Ids = std::vector<Index>;

constexpr Index kVocab = 7;
constexpr Index kModel = 4;

template <class T>
RmsNorm<T> make_norm(Rng& rng) {
  RmsNorm<T> norm(kModel);
  norm.weight().value += normal_init<T>(1, kModel, 0.3, rng);
  return norm;
}

template <class T>
GroupedQueryAttention<T> make_attention(Rng& rng) {
  return {rng, {.d_model = kModel, .heads = 2, .kv_heads = 1}};
}

template <class T>
Decoder<T> make_decoder(bool tied, const DecoderConfig& config = {}) {
  Rng rng(1);
  std::vector<Block<T>> layers;
  layers.push_back(pre_norm_block<T>(make_norm<T>(rng), make_attention<T>(rng), make_norm<T>(rng),
                                     Glu<T>(kModel, 3, rng), "mlp"));
  std::optional<Linear<T>> head;
  if (!tied) head.emplace(kModel, kVocab, rng);
  return {Embedding<T>(kVocab, kModel, rng, {.stddev = 0.5}), std::move(layers), make_norm<T>(rng),
          std::move(head), config};
}

template <class T>
MultiToken<T> make_modules(std::size_t depth, const MultiTokenConfig& config = {},
                           const SwitchLossConfig& balance = {.coefficient = 0.1}) {
  Rng rng(7);
  std::vector<MultiTokenModule<T>> modules;
  for (std::size_t k = 0; k < depth; ++k) {
    auto moe =
        MoELayer(LinearRouter<T>(kModel, 3, rng, {.init_scale = 1.0}), SoftmaxTopK<T>({.k = 2}),
                 Dropless(), GluBank<T>(kModel, 3, 3, rng), SwitchLoss<T>(balance));
    modules.push_back({make_norm<T>(rng), make_norm<T>(rng), Linear<T>(2 * kModel, kModel, rng),
                       pre_norm_block<T>(make_norm<T>(rng), make_attention<T>(rng),
                                         make_norm<T>(rng), std::move(moe), "moe"),
                       make_norm<T>(rng)});
  }
  return MultiToken<T>(std::move(modules), config);
}

// Main model and modules in training, with all that is kept between steps.
template <class T>
struct Training {
  CrossEntropy<T> loss{};
  typename Decoder<T>::Cache cache = {};
  typename MultiToken<T>::Cache module_cache = {};
  typename CrossEntropy<T>::Cache loss_cache = {};
  PassRecord record = {};  // Of the last pass of both.

  T evaluate(const Decoder<T>& model, const MultiToken<T>& modules, const Ids& ids,
             const Ids& targets, Pass pass = {}, Index tokens = 0) {
    record.clear();
    pass = test::recorded(pass, record);
    T sum = loss.forward(model.forward(ids, pass, cache), targets, loss_cache, tokens);
    sum += modules.forward(model, cache, ids, targets, pass, module_cache, tokens);
    return sum + static_cast<T>(record.aux_loss());
  }

  T accumulate(Decoder<T>& model, MultiToken<T>& modules, const Ids& ids, const Ids& targets,
               const Pass& pass = {}, Index tokens = 0) {
    const T sum = evaluate(model, modules, ids, targets, pass, tokens);
    model.backward(loss.backward(loss_cache), cache, modules.backward(model, module_cache));
    return sum;
  }
};

double modules_loss(const Decoder<double>& model, const MultiToken<double>& modules, const Ids& ids,
                    const Ids& targets, const Pass& pass = {}, Index tokens = 0) {
  Training<double> training;
  training.evaluate(model, modules, ids, targets, pass, tokens);
  return modules.forward(model, training.cache, ids, targets, pass, training.module_cache, tokens);
}

void check_gradients(Decoder<double>& model, MultiToken<double>& modules, const Ids& ids,
                     const Ids& targets, const Pass& pass) {
  Training<double> training;
  training.accumulate(model, modules, ids, targets, pass);
  const auto check = [&](auto& layer) {
    for (auto& [name, parameter] : parameters(layer)) {
      INFO("parameter " << name);
      const Matrix<double> analytic = parameter->gradient();
      const Matrix<double> numeric = test::numeric_gradient(parameter->value, [&] {
        return Training<double>().evaluate(model, modules, ids, targets, pass);
      });
      const bool of_expert = name.find("experts") != std::string::npos;
      CHECK((of_expert || numeric.norm() > 1e-7));  // An expert may have no tokens.
      CHECK(test::relative_error(analytic, numeric) <= 1e-6);
    }
  };
  check(model);
  check(modules);
}

const Ids kIds = {3, 0, 6, 3, 1, 5, 2, 2, 4};
const Ids kTargets = {0, 6, 3, 1, 4, 2, 2, 4, 5};

}  // namespace

TEST_CASE("MultiToken is what the equations say, worked out step by step", "[model][mtp]") {
  const auto source = GENERATE(HiddenSource::kHidden, HiddenSource::kNormed);
  Decoder<double> model = make_decoder<double>(true);
  MultiToken<double> modules = make_modules<double>(2, {.weight = 0.4, .source = source});
  const Matrix<double>& table = parameters(model)[0].parameter->value;
  Decoder<double>::Cache cache;
  model.forward(kIds, Pass{}, cache);
  Matrix<double> h = source == HiddenSource::kHidden ? model.hidden(cache) : model.normed(cache);
  double expected = 0.0;
  for (std::size_t k = 0; k < 2; ++k) {
    const MultiTokenModule<double>& module = modules.modules()[k];
    const auto shift = static_cast<Index>(k) + 1;
    const Index positions = static_cast<Index>(kIds.size()) - shift;
    const std::span<const Index> later = std::span(kIds).subspan(k + 1);
    Matrix<double> embedded(positions, kModel);
    for (Index i = 0; i < positions; ++i) {
      embedded.row(i) = table.row(later[static_cast<std::size_t>(i)]);
    }
    const Matrix<double> weight = module.projection.weight().value;
    const Matrix<double> x =
        infer(module.embedding_norm, embedded) * weight.leftCols(kModel).transpose() +
        infer(module.hidden_norm, h.topRows(positions)) * weight.rightCols(kModel).transpose();
    h = infer(module.layer, x);
    const Matrix<double> logits = infer(module.norm, h) * table.transpose();
    for (Index i = 0; i < positions; ++i) {
      const Index target = kTargets[static_cast<std::size_t>(i + shift)];
      const double p = std::exp(logits(i, target)) / logits.row(i).array().exp().sum();
      expected -= 0.4 / 2.0 * std::log(p) / 9.0;
    }
  }
  CHECK(modules_loss(model, modules, kIds, kTargets) == Approx(expected).epsilon(1e-12));
}

TEST_CASE("Gradients of all that is shared and of the modules agree with finite differences",
          "[model][mtp][gradient]") {
  const auto tied = GENERATE(false, true);
  const std::size_t depth = tied ? 2 : 1;
  const auto source = tied ? HiddenSource::kHidden : HiddenSource::kNormed;
  Decoder<double> model = make_decoder<double>(tied);
  MultiToken<double> modules = make_modules<double>(depth, {.weight = 0.6, .source = source});
  const Sequences sequences({6, 6});
  // One sequence is padded on the right, the other on the left.
  const Ids ids = {3, 0, 6, 3, 1, 5, 2, 2, 4, 0, 5, 1};
  const std::vector<std::uint8_t> mask = {1, 1, 1, 1, 1, 0, 0, 1, 1, 1, 1, 1};
  const Ids targets = {0, 6, 3, 1, -100, -100, -100, 4, 0, 5, 1, 2};
  check_gradients(model, modules, ids, targets,
                  {.sequences = &sequences, .mask = mask, .aux_scale = 0.8});
}

TEST_CASE("Gradients are right with multipliers and softcap, which the modules share",
          "[model][mtp][gradient]") {
  Decoder<double> model = make_decoder<double>(
      true, {.embedding_multiplier = 2.0, .logit_multiplier = 0.5, .logit_softcap = 1.5});
  MultiToken<double> modules = make_modules<double>(1, {.mean = TargetMean::kOwn});
  check_gradients(model, modules, kIds, kTargets, {});
}

TEST_CASE("No module looks across the end of a sequence", "[model][mtp]") {
  const Decoder<double> model = make_decoder<double>(false);
  const MultiToken<double> modules = make_modules<double>(3);
  const Sequences sequences({4, 0, 1, 4});
  const double packed = modules_loss(model, modules, kIds, kTargets, {.sequences = &sequences});
  double sum = 0.0;
  for (Index s = 0; s < sequences.count(); ++s) {
    const auto begin = kIds.begin() + sequences.begin(s);
    const auto target = kTargets.begin() + sequences.begin(s);
    const auto length = sequences.length(s);
    const Ids ids(begin, begin + length);
    const Ids targets(target, target + length);
    sum += modules_loss(model, modules, ids, targets, {}, 9);
  }
  CHECK(packed == Approx(sum).epsilon(1e-12));
}

TEST_CASE("A module has one target fewer in each sequence than the one before it", "[model][mtp]") {
  const Decoder<double> model = make_decoder<double>(false);
  const MultiToken<double> modules = make_modules<double>(3);
  Training<double> training;
  const Sequences sequences({6, 3});
  training.evaluate(model, modules, kIds, kTargets, {.sequences = &sequences});
  const auto& own = training.module_cache.modules;
  CHECK(own[0].ids == Ids{0, 6, 3, 1, 5, 2, 4});
  CHECK(own[0].targets == Ids{6, 3, 1, 4, 2, 4, 5});
  CHECK(own[1].ids == Ids{6, 3, 1, 5, 4});
  CHECK(own[1].targets == Ids{3, 1, 4, 2, 5});
  CHECK(own[2].ids == Ids{3, 1, 5});
  CHECK(own[2].targets == Ids{1, 4, 2});
  CHECK(training.module_cache.losses.size() == 3);
}

TEST_CASE("Padding on either side changes nothing for the modules", "[model][mtp]") {
  const Decoder<double> model = make_decoder<double>(false);
  const MultiToken<double> modules = make_modules<double>(2);
  const Ids ids = {3, 0, 6, 3, 1};
  const Ids targets = {0, 6, 3, 1, 5};
  const double expected = modules_loss(model, modules, ids, targets);

  const Ids right = {3, 0, 6, 3, 1, 6, 6};
  const std::vector<std::uint8_t> right_mask = {1, 1, 1, 1, 1, 0, 0};
  CHECK(modules_loss(model, modules, right, {0, 6, 3, 1, 5, -100, -100}, {.mask = right_mask}) ==
        Approx(expected).epsilon(1e-12));

  // On the left it shifts positions, which rotary embeddings do not mind.
  const Ids left = {6, 6, 3, 0, 6, 3, 1};
  const std::vector<std::uint8_t> left_mask = {0, 0, 1, 1, 1, 1, 1};
  CHECK(modules_loss(model, modules, left, {-100, -100, 0, 6, 3, 1, 5}, {.mask = left_mask}) ==
        Approx(expected).epsilon(1e-12));
}

TEST_CASE("The loss is divided by the number of tokens it is told", "[model][mtp]") {
  const Decoder<double> model = make_decoder<double>(false);
  const MultiToken<double> modules = make_modules<double>(2);
  CHECK(modules_loss(model, modules, kIds, kTargets, {}, 18) ==
        Approx(0.5 * modules_loss(model, modules, kIds, kTargets)).epsilon(1e-12));
}

TEST_CASE("Each module may divide by its own number of targets", "[model][mtp]") {
  const Decoder<double> model = make_decoder<double>(false);
  const MultiToken<double> main = make_modules<double>(2);
  const MultiToken<double> own = make_modules<double>(2, {.mean = TargetMean::kOwn});
  Decoder<double>::Cache cache;
  MultiToken<double>::Cache main_cache, own_cache;
  model.forward(kIds, kTraining, cache);
  main.forward(model, cache, kIds, kTargets, {}, main_cache);
  own.forward(model, cache, kIds, kTargets, {}, own_cache);
  CHECK(own_cache.losses[0] == Approx(main_cache.losses[0] * 9.0 / 8.0).epsilon(1e-12));
  CHECK(own_cache.losses[1] == Approx(main_cache.losses[1] * 9.0 / 7.0).epsilon(1e-12));
  CHECK(test::message_of<ConfigError>(
            [&] { own.forward(model, cache, kIds, kTargets, {}, own_cache, 9); }) ==
        "MultiToken::forward: tokens = 9, expected 0 where each module divides by its own number "
        "of targets");
}

TEST_CASE("Sequences too short for a module are none to it", "[model][mtp]") {
  Decoder<double> model = make_decoder<double>(true);
  MultiToken<double> modules = make_modules<double>(2);
  const auto tokens = GENERATE(as<std::size_t>{}, 0, 1);
  const Ids ids(tokens, 3);
  Training<double> training;
  training.accumulate(model, modules, ids, ids);
  CHECK(training.module_cache.losses == std::vector<double>{0.0, 0.0});
  for (auto& [name, parameter] : parameters(modules)) {
    INFO("parameter " << name);
    CHECK(parameter->gradient().isZero(0.0));
  }
}

TEST_CASE("Balancing losses of modules are recorded by name, and not multiplied by lambda",
          "[model][mtp]") {
  const auto weight = GENERATE(0.0, 0.3);
  const Decoder<double> model = make_decoder<double>(false);
  const MultiToken<double> modules = make_modules<double>(2, {.weight = weight});
  Training<double> training;
  training.evaluate(model, modules, kIds, kTargets);
  REQUIRE(training.record.losses().size() == 2);
  CHECK(training.record.losses()[0].name == "modules.0.layer.moe.switch");
  CHECK(training.record.losses()[1].name == "modules.1.layer.moe.switch");
  CHECK(training.record.aux_loss() > 0.1);  // About 0.1 for each.
}

TEST_CASE("Balancing losses of modules add up over micro-batches of whole sequences",
          "[model][mtp]") {
  // The second sequence is too short for either module, the third for the second one.
  const Sequences batch({4, 1, 2, 2});
  const Sequences first({4, 1});
  const Sequences second({2, 2});
  const auto balance = [&](std::span<const Index> ids, std::span<const Index> targets,
                           const Sequences& sequences, double share) {
    const Decoder<double> model = make_decoder<double>(false);
    const MultiToken<double> modules = make_modules<double>(
        2, {}, SwitchLossConfig{.coefficient = 0.1, .scope = Scope::kSequence});
    Decoder<double>::Cache cache;
    MultiToken<double>::Cache module_cache;
    PassRecord record;
    const Pass pass{
        .training = true, .sequences = &sequences, .aux_scale = share, .record = &record};
    model.forward(ids, pass, cache);
    modules.forward(model, cache, ids, targets, pass, module_cache);
    return record.aux_loss();
  };
  const std::span<const Index> ids(kIds);
  const std::span<const Index> targets(kTargets);
  const double whole = balance(ids, targets, batch, 1.0);
  const double parts = balance(ids.first(5), targets.first(5), first, 0.5) +
                       balance(ids.subspan(5), targets.subspan(5), second, 0.5);
  CHECK(whole > 0.01);
  CHECK(parts == Approx(whole).epsilon(1e-12));
}

TEST_CASE("Modules tell their routers the ids of the tokens they embed", "[model][mtp]") {
  Rng rng(3);
  const Decoder<double> model = make_decoder<double>(false);
  auto moe =
      MoELayer(HashRouter<double>(kModel, kVocab, modulo_hash_table(kVocab, kVocab)),
               SoftmaxTopK<double>({.k = 1}), Dropless(), GluBank<double>(kModel, kVocab, 5, rng));
  MultiToken<double> modules(
      {{make_norm<double>(rng), make_norm<double>(rng), Linear<double>(2 * kModel, kModel, rng),
        Block<double>({{"moe", make_norm<double>(rng), std::move(moe)}}), make_norm<double>(rng)}});
  Decoder<double>::Cache cache;
  MultiToken<double>::Cache module_cache;
  PassRecord record(PassRecord::Collects::kLossesAndReports);
  const Pass pass{.record = &record};
  model.forward(kIds, pass, cache);
  modules.forward(model, cache, kIds, kTargets, pass, module_cache);
  REQUIRE(record.reports().size() == 1);
  CHECK(record.reports()[0].name == "modules.0.layer.moe");
  // The tokens are 0, 6, 3, 1, 5, 2, 2 and 4.
  CHECK(record.reports()[0].report.load == Ids{1, 1, 2, 1, 1, 1, 1});
}

TEST_CASE("Modules decode in pieces what they compute at once", "[model][mtp]") {
  const Decoder<double> model = make_decoder<double>(true);
  const MultiToken<double> modules = make_modules<double>(2);
  Training<double> training;
  training.evaluate(model, modules, kIds, kTargets);
  Matrix<double> h = model.normed(training.cache);
  for (std::size_t k = 0; k < 2; ++k) {
    const auto& expected = training.module_cache.modules[k];
    const Ids& ids = expected.ids;
    MultiToken<double>::State state;
    MultiToken<double>::ModuleCache cache;
    Matrix<double> next(static_cast<Index>(ids.size()), kModel);
    for (Index i = 0; i < next.rows(); i += 3) {
      const Index count = std::min<Index>(3, next.rows() - i);
      const auto some =
          std::span(ids).subspan(static_cast<std::size_t>(i), static_cast<std::size_t>(count));
      next.middleRows(i, count) =
          modules.decode(k, model, some, h.middleRows(i, count), state, cache);
    }
    CHECK(test::relative_error(modules.logits(k, model, next, cache),
                               expected.loss.slices[1].head.logits) <= 1e-12);
    h = next;
  }
}

TEST_CASE("Modules name their parameters, and let balancing rules act", "[model][mtp]") {
  Rng rng(4);
  auto moe =
      MoELayer(LinearRouter<double>(kModel, 3, rng), SigmoidTopK<double>(3, {.k = 1}), Dropless(),
               GluBank<double>(kModel, 3, 5, rng), BiasBalance<double>({.rate = 0.5}));
  MultiToken<double> modules(
      {{RmsNorm<double>(kModel), RmsNorm<double>(kModel), Linear<double>(2 * kModel, kModel, rng),
        Block<double>({{"moe", RmsNorm<double>(kModel), std::move(moe)}}),
        RmsNorm<double>(kModel)}});
  std::vector<std::string> names;
  for (const auto& [name, parameter] : parameters(modules)) names.push_back(name);
  REQUIRE(names.size() == 15);
  CHECK(names[0] == "modules.0.embedding_norm.weight");
  CHECK(names[1] == "modules.0.hidden_norm.weight");
  CHECK(names[2] == "modules.0.projection.weight");
  CHECK(names[3] == "modules.0.layer.moe_norm.weight");
  CHECK(names[14] == "modules.0.norm.weight");

  Decoder<double> model = make_decoder<double>(true);
  Training<double> training;
  training.accumulate(model, modules, {3, 1}, {1, 2});
  update(modules);
  CHECK(buffers(modules)[0].buffer->value.cwiseAbs() == Matrix<double>::Constant(1, 3, 0.5));
}

TEST_CASE("Training with modules lowers their loss too, bit for bit on any number of threads",
          "[model][mtp]") {
  const auto train = [] {
    Decoder<float> model = make_decoder<float>(true);
    MultiToken<float> modules = make_modules<float>(2);
    AdamW<float> optimizer({.learning_rate = 1e-2});
    AdamW<float> module_optimizer({.learning_rate = 1e-2});
    Training<float> training;
    std::vector<float> losses;
    Ids ids, targets;
    for (Index t = 0; t < 32; ++t) {
      ids.push_back(t * t % 7);
      targets.push_back((t + 1) * (t + 1) % 7);
    }
    for (int step = 0; step < 20; ++step) {
      training.accumulate(model, modules, ids, targets);
      losses.push_back(training.module_cache.losses[1]);
      optimizer.step(model);
      module_optimizer.step(modules);
    }
    return losses;
  };
  const std::vector<float> losses = train();
  CHECK(losses.back() < 0.9F * losses.front());
  const test::Threads two(2);
  CHECK(train() == losses);
}

TEST_CASE("A step with modules allocates nothing once it has run before", "[model][mtp]") {
  Decoder<float> model = make_decoder<float>(true);
  MultiToken<float> modules = make_modules<float>(2);
  const Sequences sequences({5, 4});
  const std::vector<std::uint8_t> mask = {1, 1, 1, 1, 1, 0, 1, 1, 1};
  Training<float> training;
  const auto step = [&] {
    training.accumulate(model, modules, kIds, kTargets, {.sequences = &sequences, .mask = mask});
  };
  step();
  step();
  CHECK(test::count_allocations(step) == 0);
}

TEST_CASE("MultiToken says what does not fit", "[model][mtp]") {
  Rng rng(5);
  const auto build = [&](Index d_in, Index d_out, double weight, std::size_t count) {
    return test::message_of<ConfigError>([&] {
      std::vector<MultiTokenModule<double>> modules;
      for (std::size_t k = 0; k < count; ++k) {
        modules.push_back({RmsNorm<double>(kModel), RmsNorm<double>(kModel),
                           k == 0 ? Linear<double>(8, 4, rng) : Linear<double>(d_in, d_out, rng),
                           Block<double>({{"a", RmsNorm<double>(4), RmsNorm<double>(4)}}),
                           RmsNorm<double>(kModel)});
      }
      MultiToken<double>(std::move(modules), {.weight = weight});
    });
  };
  CHECK(build(8, 4, 0.3, 0) == "MultiToken: modules = 0, expected >= 1");
  CHECK(build(8, 5, 0.3, 2) == "MultiToken: projection 1 is [5, 8], expected [4, 8]");
  CHECK(build(8, 4, -1.0, 1) == "MultiToken: weight = -1, expected a finite number >= 0");

  Decoder<double> model = make_decoder<double>(false);
  MultiToken<double> modules = make_modules<double>(1);
  Decoder<double>::Cache cache;
  MultiToken<double>::Cache own;
  const auto refusal = [&](MultiToken<double>& of) {
    return test::message_of<StateError>([&] { of.backward(model, own); });
  };
  const std::string where = "MultiToken::backward: ";
  const std::string empty = where + "the cache is empty, expected a forward pass that succeeded";
  CHECK(refusal(modules) == empty);
  model.forward(kIds, kTraining, cache);
  modules.forward(model, cache, kIds, kTargets, Pass{}, own);
  CHECK(refusal(modules) ==
        where + "the forward pass did not train, expected one with pass.training = true");
  modules.forward(model, cache, kIds, kTargets, kTraining, own);
  MultiToken<double> other = modules;
  CHECK(refusal(other) ==
        where + "the cache was filled by another layer, expected a forward pass of this one");
  modules.backward(model, own);
  CHECK(refusal(modules) ==
        where +
            "the cache was used by a backward pass already, expected a forward pass between the "
            "two");
  modules.forward(model, cache, kIds, kTargets, kTraining, own);
  CHECK_THROWS_AS(modules.forward(model, cache, kIds, Ids{1}, kTraining, own), ShapeError);
  CHECK(refusal(modules) == empty);
  const Ids few = {1, 2};
  const std::vector<std::uint8_t> mask = {1, 1};
  CHECK(test::message_of<ShapeError>([&] { modules.forward(model, cache, few, few, {}, own); }) ==
        "MultiToken::forward: h of the main model is [9, 4], expected [2, 4]");
  CHECK(test::message_of<ShapeError>([&] { modules.forward(model, cache, kIds, few, {}, own); }) ==
        "MultiToken::forward: targets has 2 entries, expected 9 (one per token)");
  CHECK(test::message_of<ShapeError>([&] {
          modules.forward(model, cache, kIds, kTargets, {.mask = mask}, own);
        }) == "MultiToken::forward: pass.mask has 2 entries, expected 9 (one per token)");
  CHECK(test::message_of<ConfigError>(
            [&] { modules.forward(model, cache, kIds, kTargets, {.allowed = mask}, own); }) ==
        "MultiToken::forward: pass.allowed has 2 entries, expected none: modules have experts of "
        "their own");
  MultiToken<double>::State state;
  MultiToken<double>::ModuleCache module_cache;
  CHECK(test::message_of<ShapeError>([&] {
          modules.decode(0, model, few, Matrix<double>(1, 4), state, module_cache);
        }) == "MultiToken::decode: h is [1, 4], expected [2, 4]");
}

}  // namespace weir::multi_token_test
