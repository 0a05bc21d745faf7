// SPDX-License-Identifier: MIT
#include <csignal>
#include <cstdint>
#include <filesystem>
#include <fstream>
#include <limits>
#if defined(__linux__)
#include <sched.h>
#include <sys/mount.h>
#endif
#include <string>
#include <sys/resource.h>
#include <sys/wait.h>
#include <unistd.h>
#include <vector>

#include <weir/attention/grouped_query.hpp>
#include <weir/io/checkpoint.hpp>
#include <weir/model/decoder.hpp>
#include <weir/moe/balance/bias_balance.hpp>
#include <weir/moe/balance/relu_l1_loss.hpp>
#include <weir/moe/balance/switch_loss.hpp>
#include <weir/moe/capacity/dropless.hpp>
#include <weir/moe/experts/glu_bank.hpp>
#include <weir/moe/moe_layer.hpp>
#include <weir/moe/router/jitter_router.hpp>
#include <weir/moe/router/linear_router.hpp>
#include <weir/moe/selector/sigmoid_top_k.hpp>
#include <weir/nn/cross_entropy.hpp>
#include <weir/nn/rms_norm.hpp>
#include <weir/optim/adamw.hpp>
#include <weir/optim/clip.hpp>
#include <weir/optim/muon.hpp>
#include <weir/optim/set_precision.hpp>
#include <weir/optim/sgd.hpp>

#include "io/folder.hpp"
#include "support/catch.hpp"
#include "support/matrices.hpp"

namespace weir::checkpoint_test {
namespace fs = std::filesystem;

namespace {

using Ids = std::vector<Index>;

Decoder<float> make_decoder(std::uint64_t seed, Index experts = 4) {
  Rng rng(seed);
  const RmsNorm<float> norm(8);
  std::vector<Block<float>> layers;
  layers.push_back(pre_norm_block<float>(
      norm, GroupedQueryAttention<float>(rng, {.d_model = 8, .heads = 2, .kv_heads = 1}), norm,
      MoELayer(JitterRouter(LinearRouter<float>(8, experts, rng, {.init_scale = 1.0})),
               SigmoidTopK<float>(experts, {.k = 2}), Dropless(),
               GluBank<float>(8, experts, 6, rng), SwitchLoss<float>({.coefficient = 0.1}),
               BiasBalance<float>({.rate = 0.01})),
      "moe"));
  return {Embedding<float>(11, 8, rng, {.stddev = 0.5}), std::move(layers), norm,
          Linear<float>(8, 11, rng)};
}

/// One step of training; returns the loss.
template <class Optimizer>
float train(Decoder<float>& model, Optimizer& optimizer, io::TrainingState& state) {
  Ids ids;
  Ids targets;
  for (Index t = 0; t < 12; ++t) {
    ids.push_back((state.position + t * t) % 11);
    targets.push_back((state.position + t * 3) % 11);
  }
  ++state.position;
  Decoder<float>::Cache cache;
  CrossEntropy<float>::Cache loss_cache;
  const CrossEntropy<float> loss;
  const auto& logits = model.forward(ids, {.training = true, .rng = &state.rng}, cache);
  const float value = loss.forward(logits, targets, loss_cache);
  model.backward(loss.backward(loss_cache), cache);
  optimizer.step(model);
  return value;
}

template <class Optimizer>
void check_resumes(const Optimizer& fresh, Index experts = 4,
                   Precision precision = Precision::kFull) {
  const test::Folder folder;
  Decoder<float> model = make_decoder(1, experts);
  set_precision(model, precision);
  Optimizer optimizer = fresh;
  io::TrainingState state{.rng = Rng(5), .notes = {{"text", "wörter"}}};
  for (int step = 0; step < 3; ++step) train(model, optimizer, state);
  const fs::path saved = io::save(folder.path(), model, optimizer, state);
  CHECK(saved.filename() == "step-000000003");
  CHECK(io::read_notes(saved) == state.notes);

  Decoder<float> resumed = make_decoder(2, experts);
  set_precision(resumed, precision);
  Optimizer resumed_optimizer = fresh;
  io::TrainingState resumed_state = io::load(folder.path(), resumed, resumed_optimizer);
  CHECK(resumed_optimizer.steps() == 3);
  CHECK(resumed_state.position == 3);
  CHECK(resumed_state.notes.at("text") == "wörter");
  for (int step = 0; step < 4; ++step) {
    CHECK(train(model, optimizer, state) == train(resumed, resumed_optimizer, resumed_state));
  }
  const auto expected = parameters(model);
  const auto actual = parameters(resumed);
  for (std::size_t i = 0; i < expected.size(); ++i) {
    INFO(expected[i].name);
    CHECK(actual[i].parameter->value == expected[i].parameter->value);
  }
  CHECK(buffers(resumed)[0].buffer->value == buffers(model)[0].buffer->value);
}

/// Steps without a batch: parameters that were reached before go on by their moments and decay.
template <class Optimizer>
void check_drifts_on(const Optimizer& fresh) {
  const test::Folder folder;
  Decoder<float> model = make_decoder(1);
  Optimizer optimizer = fresh;
  io::TrainingState state{.rng = Rng(5)};
  train(model, optimizer, state);
  io::save(folder.path(), model, optimizer, state);
  Decoder<float> resumed = make_decoder(2);
  Optimizer resumed_optimizer = fresh;
  io::load(folder.path(), resumed, resumed_optimizer);
  const Matrix<float> before = infer(model, Ids{1, 2, 3});
  optimizer.step(model);
  resumed_optimizer.step(resumed);
  CHECK(infer(model, Ids{1, 2, 3}) != before);
  CHECK(infer(resumed, Ids{1, 2, 3}) == infer(model, Ids{1, 2, 3}));
}

std::string complaint_of_loading(const fs::path& path, Decoder<float>& model) {
  AdamW<float> optimizer;
  return test::message_of<io::FileError>([&] { io::load(path, model, optimizer); });
}

void overwrite(const fs::path& path, const std::string& text) {
  std::ofstream(path, std::ios::binary) << text;
}

std::string content(const fs::path& path) {
  std::ifstream file(path, std::ios::binary);
  return {std::istreambuf_iterator<char>(file), {}};
}

}  // namespace

TEST_CASE("A resumed run is the uninterrupted one, bit for bit", "[io][checkpoint]") {
  check_resumes(AdamW<float>({.learning_rate = 0.01}));
  check_resumes(AdamW<float>({.learning_rate = 0.01, .lazy = true}), 24);  // Most have no token.
  check_resumes(Sgd<float>({.learning_rate = 0.1, .momentum = 0.9}));
  check_resumes(Muon<float>({.learning_rate = 0.01}));
  check_drifts_on(AdamW<float>({.learning_rate = 0.01}));
  check_drifts_on(Sgd<float>({.learning_rate = 0.1, .momentum = 0.9}));
  check_drifts_on(Muon<float>({.learning_rate = 0.01}));
}

TEST_CASE("A run with rounded products and moments resumes, bit for bit",
          "[io][checkpoint][precision]") {
  const Precision precision = GENERATE(Precision::kBfloat16, Precision::kFp8);
  check_resumes(AdamW<float>({.learning_rate = 0.01, .bfloat16_moments = true}), 4, precision);
  check_resumes(AdamW<float>({.learning_rate = 0.01, .lazy = true, .bfloat16_moments = true}), 24,
                precision);
}

TEST_CASE("Moments of 16 bits take their place in a checkpoint, and others become them",
          "[io][checkpoint][precision]") {
  const test::Folder folder;
  Decoder<float> model = make_decoder(1);
  AdamW<float> exact({.learning_rate = 0.01});
  io::TrainingState state{.rng = Rng(5)};
  train(model, exact, state);
  const fs::path path = io::save(folder.path(), model, exact, state);
  const auto whole = fs::file_size(path / "optimizer.safetensors");

  AdamW<float> rounded({.learning_rate = 0.01, .bfloat16_moments = true});
  io::load(path, model, rounded);
  const std::string name = "head.weight";
  CHECK(rounded.moments(name).first.size() == 0);
  CHECK(test::relative_error(rounded.moments(name).short_first.cast<float>(),
                             exact.moments(name).first) < 1.0 / 256.0);
  io::save(folder.path(), model, rounded, state);
  // Numbers are half of it, names the rest.
  CHECK(fs::file_size(path / "optimizer.safetensors") < whole);
  AdamW<float> widened({.learning_rate = 0.01});
  io::load(path, model, widened);
  CHECK(widened.moments(name).first == rounded.moments(name).short_first.cast<float>());
}

TEST_CASE("Weights are saved and loaded by themselves", "[io][weights]") {
  const test::Folder folder;
  const fs::path path = folder.path() / "weights.safetensors";
  Decoder<float> model = make_decoder(1);
  io::save_weights(path, model);
  Decoder<float> other = make_decoder(2);
  io::load_weights(path, other);
  const Ids ids = {1, 5, 3};
  CHECK(infer(other, ids) == infer(model, ids));

  io::save_weights(path, model, io::Dtype::kBF16);
  io::load_weights(path, other);
  const double error = test::relative_error(infer(other, ids), infer(model, ids));
  CHECK(error > 1e-5);
  CHECK(error < 3e-2);
  set_storage(other, Storage::kPacked);
  CHECK(test::message_of<StateError>([&] { io::save_weights(path, other); }) ==
        "save_weights: weights are stored for inference, expected set_storage(model, "
        "Storage::kTrainable) before");
  CHECK_THROWS_AS(io::load_weights(path, other), StateError);
}

TEST_CASE("The last checkpoints are kept", "[io][checkpoint]") {
  const test::Folder folder;
  Decoder<float> model = make_decoder(1);
  AdamW<float> optimizer;
  io::TrainingState state{.rng = Rng(5)};
  CHECK_FALSE(io::latest_checkpoint(folder.path() / "none"));
  for (int step = 0; step < 5; ++step) {
    train(model, optimizer, state);
    io::save(folder.path(), model, optimizer, state, {.keep = 2});
  }
  std::vector<std::string> names;
  for (const auto& entry : fs::directory_iterator(folder.path())) {
    names.push_back(entry.path().filename().string());
  }
  std::sort(names.begin(), names.end());
  CHECK(names == std::vector<std::string>{"step-000000004", "step-000000005"});
  // Saved again, it is replaced.
  state.position = 77;
  io::save(folder.path(), model, optimizer, state, {.keep = 0});
  CHECK(io::load(folder.path(), model, optimizer).position == 77);
  CHECK(*io::latest_checkpoint(folder.path()) == folder.path() / "step-000000005");
  CHECK(io::load(folder.path() / "step-000000004", model, optimizer).position == 4);
  CHECK(test::message_of<ConfigError>([&] {
          io::save(folder.path(), model, optimizer, state, {.keep = -1});
        }) == "save: keep = -1, expected >= 0");
  state.position = -1;
  CHECK(test::message_of<ConfigError>([&] { io::save(folder.path(), model, optimizer, state); }) ==
        "save: position = -1, expected >= 0");
}

TEST_CASE("A checkpoint of another model changes nothing", "[io][checkpoint]") {
  const test::Folder folder;
  Decoder<float> model = make_decoder(1);
  AdamW<float> optimizer;
  io::TrainingState state{.rng = Rng(5)};
  train(model, optimizer, state);
  const fs::path saved = io::save(folder.path(), model, optimizer, state);

  Decoder<float> other = make_decoder(2, 6);
  const Ids ids = {1, 5, 3};
  const Matrix<float> before = infer(other, ids);
  const std::string fault = complaint_of_loading(folder.path(), other);
  CHECK(fault.find("'layers.0.moe.router.weight' is [4, 8], expected [6, 8]") != std::string::npos);
  CHECK(fault.find("'layers.0.moe.experts.4.gate' is missing") != std::string::npos);
  CHECK(fault.find("more") != std::string::npos);
  CHECK(infer(other, ids) == before);

  const auto broken = [&](const char* name, const std::string& text) {
    const std::string whole = content(saved / name);
    overwrite(saved / name, text);
    Decoder<float> fresh = make_decoder(3);
    const Matrix<float> untouched = infer(fresh, ids);
    const std::string complaint = complaint_of_loading(saved, fresh);
    CHECK(infer(fresh, ids) == untouched);
    overwrite(saved / name, whole);
    return complaint.substr(complaint.find(name) + std::string(name).size());
  };
  CHECK(broken("state.json", "{}") == ": has no 'version'");
  CHECK(broken("state.json", R"({"version":2})") ==
        ": has version 2, expected at most 1: it is from a newer weir");
  CHECK(broken("state.json", R"({"version":-1})") == ": 'version' is -1, expected a number >= 0");
  CHECK(broken("state.json", "[").starts_with(": is not valid JSON: "));
  CHECK(broken("model.safetensors", "") == ": has 0 bytes, expected at least 8");
  const std::string optimizer_file = content(saved / "optimizer.safetensors");
  CHECK(broken("optimizer.safetensors", optimizer_file.substr(0, optimizer_file.size() - 1))
            .find("do not lie within") != std::string::npos);
  const auto with = [](std::string text, const std::string& from, const std::string& to) {
    return text.replace(text.find(from), from.size(), to);
  };
  const std::string unknown = with(optimizer_file, ".router.weight.", ".router.weigth.");
  CHECK(broken("optimizer.safetensors", unknown).ends_with("' is not known to the optimizer"));
  const std::string whole_numbers = with(optimizer_file, "\"F32\"", "\"I32\"");
  CHECK(broken("optimizer.safetensors", whole_numbers)
            .ends_with("], expected a matrix of real numbers"));
  const std::string model_file = with(content(saved / "model.safetensors"), "\"F32\"", "\"I32\"");
  CHECK(broken("model.safetensors", model_file).find(", expected a floating-point kind") !=
        std::string::npos);
  nlohmann::json edited = nlohmann::json::parse(content(saved / "state.json"));
  edited["parameter_steps"]["none"] = 3;
  CHECK(broken("state.json", edited.dump()) ==
        ": 'parameter_steps' names 'none', which is not in the model");
  CHECK(test::message_of<io::FileError>([&] {
          io::read_notes(folder.path() / "none");
        }).starts_with((folder.path() / "none").string()));
  CHECK(complaint_of_loading(folder.path() / "none", model)
            .ends_with("none: there is no checkpoint"));
}

TEST_CASE("A note that is not UTF-8 is refused, and the checkpoint before it stays",
          "[io][checkpoint]") {
  const test::Folder folder;
  Decoder<float> model = make_decoder(1);
  AdamW<float> optimizer;
  io::TrainingState state{.rng = Rng(5), .notes = {{"text", "old"}}};
  train(model, optimizer, state);
  const fs::path saved = io::save(folder.path(), model, optimizer, state);
  state.notes["text"] = "\xFF";
  CHECK(test::message_of<ConfigError>([&] {
          io::save(folder.path(), model, optimizer, state);
        }).starts_with("save: a note is not UTF-8: "));
  CHECK(io::read_notes(saved).at("text") == "old");
}

TEST_CASE("Saving may be killed at any moment", "[io][checkpoint]") {
  const test::Folder folder;
  Decoder<float> model = make_decoder(1);
  AdamW<float> optimizer;
  io::TrainingState state{.rng = Rng(5)};
  train(model, optimizer, state);
  io::save(folder.path(), model, optimizer, state);
  for (unsigned int delay = 0; delay < 50; ++delay) {
    const pid_t child = ::fork();
    REQUIRE(child >= 0);
    if (child == 0) {
      for (;;) {
        train(model, optimizer, state);
        io::save(folder.path(), model, optimizer, state, {.keep = 2});
      }
    }
    ::usleep(300 * delay + 1000);
    ::kill(child, SIGKILL);
    int status = 0;
    ::waitpid(child, &status, 0);
    Decoder<float> resumed = make_decoder(2);
    AdamW<float> resumed_optimizer;
    const io::TrainingState found = io::load(folder.path(), resumed, resumed_optimizer);
    CHECK(found.position == resumed_optimizer.steps());
  }
}

namespace {

/// Saves a first checkpoint, lets `obstruct` see to it that less than another one can be written,
/// and tries to save that. In a child, which returns 0 if all was as it should be.
template <class Obstruct>
int child_that_cannot_save(const fs::path& folder, const std::string& complaint,
                           Obstruct&& obstruct) {
  const pid_t child = ::fork();
  if (child == 0) {
    Decoder<float> model = make_decoder(1);
    AdamW<float> optimizer;
    io::TrainingState state{.rng = Rng(5)};
    train(model, optimizer, state);
    io::save(folder, model, optimizer, state);
    train(model, optimizer, state);
    obstruct();
    std::string message;
    try {
      io::save(folder, model, optimizer, state);
    } catch (const io::FileError& error) {
      message = error.what();
    }
    if (!message.ends_with(complaint)) ::_exit(2);
    Decoder<float> resumed = make_decoder(2);
    AdamW<float> resumed_optimizer;
    io::load(folder, resumed, resumed_optimizer);
    ::_exit(resumed_optimizer.steps() == 1 ? 0 : 3);
  }
  int status = 0;
  ::waitpid(child, &status, 0);
  return WIFEXITED(status) ? WEXITSTATUS(status) : -1;
}

}  // namespace

TEST_CASE("A write that fails half-way leaves the last checkpoint", "[io][checkpoint]") {
  for (const rlim_t bytes : {0U, 1U, 100U, 4096U, 8192U}) {
    const test::Folder folder;
    CHECK(child_that_cannot_save(folder.path(), ": cannot be written: File too large", [=] {
            std::signal(SIGXFSZ, SIG_IGN);
            const rlimit limit{bytes, bytes};
            ::setrlimit(RLIMIT_FSIZE, &limit);
          }) == 0);
  }
}

#if defined(__linux__)
TEST_CASE("A full disk leaves the last checkpoint", "[io][checkpoint]") {
  const test::Folder folder;
  // A small disk that only a process of its own sees. Not every system lets users have one.
  const auto make_disk = [&](const std::string& size) {
    const std::string options = "size=" + size;
    return ::unshare(::geteuid() == 0 ? CLONE_NEWNS : CLONE_NEWUSER | CLONE_NEWNS) == 0 &&
           ::mount("none", "/", nullptr, MS_REC | MS_PRIVATE, nullptr) == 0 &&
           ::mount("none", folder.path().c_str(), "tmpfs", 0, options.c_str()) == 0;
  };
  constexpr int kNoDisk = 77;
  const pid_t child = ::fork();
  if (child == 0) {
    if (!make_disk("64k")) ::_exit(kNoDisk);
    const auto fill = [&] {
      std::ofstream rest(folder.path() / "rest", std::ios::binary);
      const std::string page(4096, 'x');
      for (int i = 0; i < 16 && rest; ++i) rest << page << std::flush;
    };
    ::_exit(child_that_cannot_save(folder.path(), ": No space left on device", fill));
  }
  int status = 0;
  ::waitpid(child, &status, 0);
  REQUIRE(WIFEXITED(status));
  if (WEXITSTATUS(status) == kNoDisk) {
    WARN("no disk of its own on this system");
  } else {
    CHECK(WEXITSTATUS(status) == 0);
  }
}
#endif

}  // namespace weir::checkpoint_test
