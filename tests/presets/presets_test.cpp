// SPDX-License-Identifier: MIT
// What holds for every preset, made small.
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <functional>
#include <span>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include <weir/core/init.hpp>
#include <weir/core/parameter.hpp>
#include <weir/core/random.hpp>
#include <weir/core/sequences.hpp>
#include <weir/core/storage.hpp>
#include <weir/model/multi_token.hpp>
#include <weir/nn/cross_entropy.hpp>
#include <weir/optim/adamw.hpp>
#include <weir/presets/count.hpp>
#include <weir/presets/dbrx.hpp>
#include <weir/presets/deepseek_moe_16b.hpp>
#include <weir/presets/deepseek_v2.hpp>
#include <weir/presets/deepseek_v2_lite.hpp>
#include <weir/presets/deepseek_v3.hpp>
#include <weir/presets/dense.hpp>
#include <weir/presets/ernie_4_5.hpp>
#include <weir/presets/glm_4_5.hpp>
#include <weir/presets/gpt_oss_20b.hpp>
#include <weir/presets/granite_moe.hpp>
#include <weir/presets/grok_1.hpp>
#include <weir/presets/llama_4_scout.hpp>
#include <weir/presets/mixtral_8x22b.hpp>
#include <weir/presets/mixtral_8x7b.hpp>
#include <weir/presets/olmoe_1b_7b.hpp>
#include <weir/presets/openmoe_8b.hpp>
#include <weir/presets/openmoe_base.hpp>
#include <weir/presets/phi_3_5_moe.hpp>
#include <weir/presets/qwen2_moe.hpp>
#include <weir/presets/qwen3_30b_a3b.hpp>
#include <weir/presets/scaled.hpp>
#include <weir/presets/st_moe_32b.hpp>
#include <weir/presets/switch_base_8.hpp>
#include <weir/presets/switch_large.hpp>

#include "support/caches.hpp"
#include "support/catch.hpp"
#include "support/matrices.hpp"
#include "support/threads.hpp"

namespace weir::presets_test {
using namespace weir::presets;

namespace {

struct Small {
  std::string name;
  ModelShape shape;  // Of what is made: the decoder half of an encoder-decoder.
  std::function<Decoder<double>(std::uint64_t seed)> make;

  // With weights large enough that nothing is nearly linear.
  Decoder<double> make_large(std::uint64_t seed) const {
    Decoder<double> model = make(seed);
    Rng rng(seed);
    for (auto& [parameter_name, parameter] : parameters(model)) {
      Matrix<double>& value = parameter->value;
      value += normal_init<double>(value.rows(), value.cols(), 0.1, rng);
    }
    return model;
  }
};

// Without what makes a token's result depend on other tokens, or on chance.
template <class Config>
Config undisturbed(Config config) {
  if constexpr (requires { config.capacity_evaluate; }) {
    config.capacity_train = config.capacity_evaluate = static_cast<double>(config.shape.experts);
  }
  if constexpr (requires { config.jitter; }) config.jitter = 0.0;
  return config;
}

template <class Config>
Small small(std::string name, const Config& config, const Scale& scale) {
  const Config made = undisturbed(scaled(config, scale));
  return {std::move(name), made.shape.decoder_half(), [made](std::uint64_t seed) {
            Rng rng(seed);
            return presets::make<double>(made, rng);
          }};
}

// Switch-Base-128 and -256 are Switch-Base-8 with other numbers of experts, and OpenMoE-34B is
// OpenMoE-Base with other widths: made small, they are the same.
std::vector<Small> all_presets(const Scale& to = {.d_model = 16, .vocab = 128}) {
  OpenMoEConfig parallel = openmoe_base();
  parallel.parallel = true;
  return {
      small("Mixtral 8x7B", mixtral_8x7b(), to),
      small("Mixtral 8x22B", mixtral_8x22b(), to),
      small("Grok-1", grok_1(), to),
      small("DBRX", dbrx(), to),
      small("OLMoE-1B-7B", olmoe_1b_7b(), to),
      small("Qwen3-30B-A3B", qwen3_30b_a3b(), to),
      small("gpt-oss-20b", gpt_oss_20b(), to),
      small("Llama-4-Scout", llama_4_scout(), to),
      small("Qwen1.5-MoE-A2.7B", qwen1_5_moe_a2_7b(), to),
      small("GLM-4.5", glm_4_5(), to),
      small("ERNIE-4.5-21B-A3B", ernie_4_5_21b_a3b(), to),
      small("Granite-3.1-1B-A400M", granite_3_1_1b_a400m(), to),
      small("Phi-3.5-MoE", phi_3_5_moe(), to),
      small("Llama 3.1 8B", llama_3_1_8b(), to),
      small("DeepSeekMoE-16B", deepseek_moe_16b(), to),
      small("DeepSeek-V2-Lite", deepseek_v2_lite(), to),
      small("DeepSeek-V2", deepseek_v2(), to),
      small("DeepSeek-V3", deepseek_v3(), to),
      small("Switch-Base-8", switch_base_8(), to),
      small("Switch-XXL-128", switch_xxl_128(), to),
      small("ST-MoE-32B", st_moe_32b(), to),
      small("OpenMoE-Base", openmoe_base(), to),
      small("OpenMoE-Base in parallel", parallel, to),
      small("OpenMoE-8B", openmoe_8b(), to),
      small("OpenMoE-Base as released", openmoe_released(openmoe_base()), to),
  };
}

constexpr std::string_view kText =
    "It was the best of times, it was the worst of times, it was the age of wisdom, it was the age "
    "of foolishness, it was the epoch of belief, it was the epoch of incredulity, it was the "
    "season "
    "of Light, it was the season of Darkness, it was the spring of hope, it was the winter of "
    "despair, we had everything before us, we had nothing before us, we were all going direct to "
    "Heaven, we were all going direct the other way";

std::vector<Index> text(std::size_t begin, std::size_t count) {
  const std::string_view piece = kText.substr(begin, count);
  return {piece.begin(), piece.end()};
}

// Logits of `ids` decoded in pieces of `piece` tokens.
Matrix<double> decode_in_pieces(const Decoder<double>& model, std::span<const Index> ids,
                                std::size_t piece, Decoder<double>::State state = {},
                                Decoder<double>::State* end = nullptr) {
  Decoder<double>::Cache cache;
  Matrix<double> logits(static_cast<Index>(ids.size()), model.vocab());
  for (std::size_t begin = 0; begin < ids.size(); begin += piece) {
    const auto next = ids.subspan(begin, std::min(piece, ids.size() - begin));
    logits.middleRows(static_cast<Index>(begin), static_cast<Index>(next.size())) =
        decode(model, next, state, cache);
  }
  if (end != nullptr) *end = std::move(state);
  return logits;
}

// Cross-entropy and auxiliary losses of predicting each next byte, as in training.
struct Objective {
  CrossEntropy<double> loss{};
  Decoder<double>::Cache cache = {};
  CrossEntropy<double>::Cache loss_cache = {};
  PassRecord record = {};  // Of the last pass.

  double operator()(const Decoder<double>& model, std::span<const Index> ids) {
    const Sequences sequences = Sequences::uniform(1, static_cast<Index>(ids.size()) - 1);
    Rng rng(7);
    record.clear();
    const Pass pass{.training = true, .sequences = &sequences, .rng = &rng, .record = &record};
    const Matrix<double>& logits = model.forward(ids.first(ids.size() - 1), pass, cache);
    return loss.forward(logits, ids.subspan(1), loss_cache) + record.aux_loss();
  }
};

}  // namespace

TEST_CASE("A preset has as many numbers as its config counts", "[presets]") {
  for (const Small& preset : all_presets()) {
    INFO(preset.name);
    Decoder<double> model = preset.make(1);
    const ModelCount counted = count(preset.shape);
    CHECK(parameter_count(model) == counted.total() - counted.selection_bias);
    if (preset.shape.selection_bias) {
      Count numbers = 0;
      for (const auto& [name, buffer] : buffers(model)) numbers += buffer->value.size();
      CHECK(numbers == counted.selection_bias);
    }
  }
}

TEST_CASE("Presets keep their structure at any small size", "[presets]") {
  const auto scale =
      GENERATE(Scale{.d_model = 1, .vocab = 1}, Scale{.d_model = 7, .vocab = 130},
               Scale{.d_model = 12, .vocab = 128, .layers = 7, .experts = 16, .window = 3});
  const std::vector<Index> ids = scale.vocab == 1 ? std::vector<Index>(12, 0) : text(0, 12);
  for (const Small& preset : all_presets(scale)) {
    INFO(preset.name << ", d_model " << scale.d_model);
    Decoder<double> model = preset.make_large(9);
    const ModelCount counted = count(preset.shape);
    CHECK(parameter_count(model) == counted.total() - counted.selection_bias);
    const Matrix<double> whole = infer(model, ids);
    CHECK(whole.allFinite());
    CHECK(test::relative_error(decode_in_pieces(model, ids, 5), whole) <= 1e-11);
    set_storage(model, Storage::kPacked);
    CHECK(test::relative_error(infer(model, ids), whole) <= 1e-11);
  }
}

TEST_CASE("DeepSeek-V3's module of multi-token prediction has as many numbers as counted",
          "[presets]") {
  const DeepSeekV3Config config = scaled(deepseek_v3(), {.d_model = 16, .vocab = 128});
  Rng rng(1);
  Decoder<double> model = presets::make<double>(config, rng);
  MultiToken<double> modules = make_prediction<double>(config, rng);
  REQUIRE(modules.modules().size() == 1);
  Count numbers = parameter_count(modules);
  for (const auto& [name, buffer] : buffers(modules)) numbers += buffer->value.size();
  CHECK(numbers == count(config).prediction);

  // Behind the model, it is trained with it.
  const std::vector<Index> ids = text(0, 12);
  const std::vector<Index> targets = text(1, 12);
  Decoder<double>::Cache cache;
  MultiToken<double>::Cache modules_cache;
  CrossEntropy<double>::Cache loss_cache;
  const CrossEntropy<double> loss;
  loss.forward(model.forward(ids, kTraining, cache), targets, loss_cache);
  const double further = modules.forward(model, cache, ids, targets, kTraining, modules_cache);
  CHECK(further == Approx(0.3 * std::log(128.0)).epsilon(0.5));
  model.backward(loss.backward(loss_cache), cache, modules.backward(model, modules_cache));
  CHECK(parameters(modules).front().parameter->grad.norm() > 0.0);
}

TEST_CASE("Each preset decodes token by token and in chunks what it computes at once",
          "[presets]") {
  const std::vector<Index> ids = text(0, 24);
  for (const Small& preset : all_presets()) {
    INFO(preset.name);
    const Decoder<double> model = preset.make_large(2);
    const Matrix<double> whole = infer(model, ids);
    CHECK(test::relative_error(decode_in_pieces(model, ids, ids.size()), whole) <= 1e-11);
    CHECK(test::relative_error(decode_in_pieces(model, ids, 7), whole) <= 1e-11);
    CHECK(test::relative_error(decode_in_pieces(model, ids, 1), whole) <= 1e-11);
  }
}

TEST_CASE("A cache that has served other texts serves as a new one", "[presets]") {
  const std::vector<Index> ids = text(30, 14);
  const Sequences two({3, 4});
  const std::vector<std::uint8_t> mask = {0, 1, 1, 1, 1, 0, 1};
  for (const Small& preset : all_presets()) {
    INFO(preset.name);
    Decoder<double> model = preset.make_large(5);
    const auto gradients = [&](Objective& objective) {
      zero_gradients(model);
      std::vector<Matrix<double>> all = {Matrix<double>::Constant(1, 1, objective(model, ids))};
      model.backward(objective.loss.backward(objective.loss_cache), objective.cache);
      for (const auto& [name, parameter] : parameters(model)) all.push_back(parameter->grad);
      return all;
    };
    Objective fresh, used;
    const auto expected = gradients(fresh);
    used(model, text(0, 40));
    model.backward(used.loss.backward(used.loss_cache), used.cache);
    model.forward(text(3, 7), {.sequences = &two, .mask = mask}, used.cache);
    const auto again = gradients(used);
    for (std::size_t i = 0; i < expected.size(); ++i) {
      CHECK(test::same_gradients(expected[i], again[i]));
    }
  }
}

TEST_CASE("A rolling cache equals full attention under the window", "[presets]") {
  const std::vector<Index> ids = text(0, 280);
  for (const Small& preset : all_presets()) {
    if (count(preset.shape).window == 0) continue;
    INFO(preset.name);
    const Decoder<double> model = preset.make_large(8);
    Decoder<double>::State state;
    const Matrix<double> whole = infer(model, ids);
    CHECK(test::relative_error(decode_in_pieces(model, ids, 10, {}, &state), whole) <= 1e-11);

    // The cache has rolled: what it would take to go back to token 40 is gone.
    Decoder<double>::State copy = state;
    CHECK_THROWS_AS(copy.truncate(40), StateError);
    // But a draft can be taken back.
    state.truncate(260);
    const auto again = std::span(ids).subspan(260);
    CHECK(test::relative_error(decode_in_pieces(model, again, 1, state), whole.bottomRows(20)) <=
          1e-11);
  }
}

TEST_CASE("The gradients of each preset agree with finite differences",
          "[presets][gradient][slow]") {
  const test::Threads one(1);  // The models are too small to share.
  const std::vector<Index> ids = text(30, 14);
  for (const Small& preset : all_presets()) {
    INFO(preset.name);
    if (preset.name == "Phi-3.5-MoE") continue;  // SparseMixer's is another one, see there.
    Decoder<double> model = preset.make_large(3);
    Objective objective;
    objective(model, ids);
    model.backward(objective.loss.backward(objective.loss_cache), objective.cache);

    // One number of each parameter that the batch has reached: its largest derivative, or any.
    Rng rng(4);
    int compared = 0;
    for (auto& [name, parameter] : parameters(model)) {
      if (parameter->grad.size() == 0) continue;
      INFO(name);
      Index at = 0;
      parameter->grad.reshaped<Eigen::RowMajor>().cwiseAbs().maxCoeff(&at);
      if (rng.below(2) == 0) at = rng.below(parameter->value.size());
      double& value = parameter->value.data()[at];
      const double saved = value;
      const auto moved = [&](double step) {
        value = saved + step;
        return objective(model, ids);
      };
      const double numeric = (moved(1e-5) - moved(-1e-5)) / 2e-5;
      value = saved;
      CHECK(parameter->grad.data()[at] == Approx(numeric).epsilon(1e-5).margin(1e-8));
      ++compared;
    }
    CHECK(compared >= 15);
  }
}

TEST_CASE("200 steps of AdamW on real text lower the loss of each preset", "[presets][slow]") {
  const test::Threads one(1);
  for (const Small& preset : all_presets()) {
    INFO(preset.name);
    Decoder<double> model = preset.make(5);
    AdamW<double> optimizer({.learning_rate = 3e-3});
    Objective objective;
    Rng rng(6);
    const auto mean_loss = [&] { return objective(model, text(0, kText.size())); };
    const double before = mean_loss();
    for (int step = 0; step < 200; ++step) {
      const auto begin = static_cast<std::size_t>(rng.below(static_cast<Index>(kText.size()) - 33));
      objective(model, text(begin, 33));
      model.backward(objective.loss.backward(objective.loss_cache), objective.cache);
      optimizer.step(model);
    }
    CHECK(mean_loss() < 0.7 * before);
  }
}

}  // namespace weir::presets_test
