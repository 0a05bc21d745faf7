// SPDX-License-Identifier: MIT
// The layer of moe_bench beside the same layer in other libraries: by hand on Eigen and on oneDNN,
// in libtorch, and in ggml with weights of 8 and of 4 bits. Each row is weir against one peer, on
// all threads, the same weights and tokens; `ratio` is how many times as long the peer takes.
// Before it is measured, a peer has to return what weir returns. Peers that were not found when
// this was configured have no rows; ggml is loaded from the folder that WEIR_LLAMA_CPP_DIR names.
#include <array>
#include <chrono>
#include <cstddef>
#include <exception>
#include <functional>
#include <iostream>
#include <memory>
#include <sstream>
#include <stdexcept>
#include <string>
#include <string_view>
#include <thread>
#include <utility>
#include <vector>

#include <Eigen/Core>
#include <benchmark/benchmark.h>

#include <weir/core/parallel.hpp>
#include <weir/core/parameter.hpp>
#include <weir/core/storage.hpp>
#include <weir/core/types.hpp>
#include <weir/moe/capacity/dropless.hpp>
#include <weir/moe/experts/glu_bank.hpp>
#include <weir/moe/moe_layer.hpp>
#include <weir/moe/router/linear_router.hpp>
#include <weir/moe/selector/softmax_top_k.hpp>

#include "peers/peer.hpp"
#include "support/clock.hpp"
#include "support/mixture.hpp"
#include "support/program.hpp"
#include "support/rows.hpp"

namespace {

namespace bench = weir::bench;
using bench::MoeWeights;
using bench::Peer;
using bench::Shape;
using weir::Index;
using weir::Matrix;
using weir::Storage;

/// Who is compared, and what with.
struct Contender {
  std::string_view name;
  Storage storage;  ///< Of weir's weights in `forward`.
  bool trains;
  std::unique_ptr<Peer> (*make)(const MoeWeights& weights, int threads);
};

constexpr std::array kContenders = {
    Contender{"Eigen", Storage::kPacked, true, bench::make_eigen_peer},
#if defined(WEIR_BENCH_DNNL)
    Contender{"oneDNN", Storage::kPacked, true, bench::make_dnnl_peer},
    Contender{"oneDNN", Storage::kBfloat16, false, bench::make_dnnl_bfloat16_peer},
#endif
#if defined(WEIR_BENCH_TORCH)
    Contender{"libtorch", Storage::kPacked, true, bench::make_torch_peer},
    Contender{"libtorch", Storage::kBfloat16, false, bench::make_torch_bfloat16_peer},
#endif
#if defined(WEIR_BENCH_GGML)
    Contender{"ggml", Storage::kInt8Dot, false, bench::make_ggml_int8_peer},
    Contender{"ggml", Storage::kInt4Dot, false, bench::make_ggml_int4_peer},
#endif
};

/// As rows call it.
std::string_view label_of(Storage storage) {
  return storage == Storage::kPacked ? "fp32" : weir::name_of(storage);
}

enum class Task { kForward, kTraining };

/// A peer that computes something else.
class Disagreement : public std::runtime_error {
  using std::runtime_error::runtime_error;
};
bool any_disagreement = false;

/// The weights of a shape, and weir's layer with a copy of them.
class Weir {
 public:
  explicit Weir(const Shape& shape)
      : shape_(shape), weights_(bench::make_weights(shape)), layer_(make()) {}

  const Shape& shape() const { return shape_; }

  MoeWeights weights() const {
    MoeWeights all = {shape_.d_model,
                      shape_.d_hidden,
                      shape_.experts,
                      shape_.k,
                      shape_.k > 1,
                      weights_.router.data(),
                      {},
                      {},
                      {}};
    for (std::size_t e = 0; e < weights_.gate.size(); ++e) {
      all.gate.push_back(weights_.gate[e].data());
      all.up.push_back(weights_.up[e].data());
      all.down.push_back(weights_.down[e].data());
    }
    return all;
  }

  void set_storage(Storage storage) {
    if (storage == storage_) return;
    if (storage_ != Storage::kTrainable && storage_ != Storage::kPacked) {
      layer_ = make();  // The bits that were rounded away.
    }
    weir::set_storage(layer_, storage);
    storage_ = storage;
  }

  const Matrix<float>& forward(const Matrix<float>& x) {
    return layer_.forward(x, weir::Pass{}, cache_);
  }

  const Matrix<float>& step(const Matrix<float>& x, const Matrix<float>& dy) {
    layer_.forward(x, weir::kTraining, cache_);
    return layer_.backward(dy, cache_);
  }

  void zero_gradients() { weir::zero_gradients(layer_); }

  const Matrix<float>& gradient(std::string_view name) {
    for (const auto& [own_name, parameter] : weir::parameters(layer_)) {
      if (own_name == name) return parameter->gradient();
    }
    throw std::logic_error("weir has no parameter " + std::string(name));
  }

 private:
  using Layer =
      decltype(weir::MoELayer(std::declval<weir::LinearRouter<float>>(), weir::SoftmaxTopK<float>(),
                              weir::Dropless(), std::declval<weir::GluBank<float>>()));

  Layer make() const {
    return Layer(weir::LinearRouter<float>(weights_.router),
                 weir::SoftmaxTopK<float>({.k = shape_.k, .renormalise = shape_.k > 1}),
                 weir::Dropless(), weir::GluBank<float>(weights_.gate, weights_.up, weights_.down));
  }

  Shape shape_;
  bench::MixtureWeights weights_;
  Storage storage_ = Storage::kTrainable;
  Layer layer_;
  Layer::Cache cache_;
};

/// Kept until one of another shape is asked for.
Weir& weir_of(const Shape& shape) {
  static std::unique_ptr<Weir> kept;
  if (kept == nullptr || kept->shape().name != shape.name) {
    kept.reset();
    kept = std::make_unique<Weir>(shape);
  }
  return *kept;
}

/// \throws Disagreement     unless ||theirs - ours|| <= tolerance * ||ours||; no gradient at all is
///                          a gradient of zero.
void expect_same(std::string_view what, const Matrix<float>& ours, const float* theirs,
                 double tolerance) {
  const Matrix<float> zero =
      theirs == nullptr ? Matrix<float>::Zero(ours.rows(), ours.cols()) : Matrix<float>();
  const Eigen::Map<const Matrix<float>> given(theirs == nullptr ? zero.data() : theirs, ours.rows(),
                                              ours.cols());
  const double norm = ours.cast<double>().norm();
  const double difference = (given - ours).cast<double>().norm();
  if (!(difference <= tolerance * norm)) {
    std::ostringstream message;
    message << what << " is not weir's: relative difference " << difference / norm << ", expected "
            << tolerance << " at most";
    throw Disagreement(message.str());
  }
}

void expect_same_output(Weir& own, Peer& peer, const Matrix<float>& x, Storage storage) {
  // Tokens, weights and hidden values are rounded, in four bits by each in its own way.
  const double tolerance = storage == Storage::kPacked    ? 1e-4
                           : storage == Storage::kInt4Dot ? 0.4
                                                          : 3e-2;
  expect_same("y", own.forward(x), peer.forward(x.data(), x.rows()), tolerance);
}

void expect_same_step(Weir& own, Peer& peer, const Matrix<float>& x, const Matrix<float>& dy) {
  constexpr double kTolerance = 1e-4;
  own.zero_gradients();
  peer.zero_gradients();
  expect_same("dx", own.step(x, dy), peer.step(x.data(), dy.data(), x.rows()), kTolerance);
  const bench::MoeGradients theirs = peer.gradients();
  const auto expect_same_gradient = [&](const std::string& name, const float* gradient) {
    expect_same("the gradient of " + name, own.gradient(name), gradient, kTolerance);
  };
  expect_same_gradient("router.weight", theirs.router);
  for (std::size_t e = 0; e < theirs.gate.size(); ++e) {
    const std::string expert = "experts." + std::to_string(e);
    expect_same_gradient(expert + ".gate", theirs.gate[e]);
    expect_same_gradient(expert + ".up", theirs.up[e]);
    expect_same_gradient(expert + ".down", theirs.down[e]);
  }
}

/// Seconds of a call of `work` among others like it. Before it come a pause, in which the threads
/// of whoever worked before go to sleep instead of waiting for more on a core that is needed now,
/// and a call that wakes those of `work`. A call that is long enough to make that unimportant is
/// made once.
double seconds_of_call(const std::function<void()>& work) {
  constexpr std::chrono::milliseconds kPause(10);
  constexpr double kLong = 0.02;
  constexpr double kWindow = 0.01;
  std::this_thread::sleep_for(kPause);
  const double first = bench::seconds_of(work);
  if (first > kLong) return first;
  const bench::Clock::time_point begin = bench::Clock::now();
  double elapsed = 0.0;
  int calls = 0;
  do {
    work();
    ++calls;
    elapsed = bench::seconds_since(begin);
  } while (elapsed < kWindow);
  return elapsed / calls;
}

/// Measures one row, and returns weir's seconds for it.
double measure(benchmark::State& state, const Shape& shape, const Contender& contender, Peer& peer,
               Task task, Index tokens) {
  Weir& own = weir_of(shape);
  own.set_storage(task == Task::kTraining ? Storage::kTrainable : contender.storage);

  // Few tokens use few experts: with the next batch, the weights of others have to be read.
  const Index count = tokens <= 8 ? 8 : 1;
  const auto batches = bench::make_batches(shape, tokens, bench::Load::kUniform, count);
  const Matrix<float> dy = bench::make_tokens(shape, tokens, bench::Load::kUniform, count);
  std::size_t turn = 0;
  const auto next = [&]() -> const Matrix<float>& { return batches[turn++ % batches.size()]; };

  std::function<void()> ours = [&] { own.forward(next()); };
  std::function<void()> theirs = [&] { peer.forward(next().data(), tokens); };
  if (task == Task::kTraining) {
    expect_same_step(own, peer, batches[0], dy);
    ours = [&] { own.step(next(), dy); };
    theirs = [&] { peer.step(next().data(), dy.data(), tokens); };
  } else {
    // All of them: the first pass of a shape is not the one to be measured.
    for (const Matrix<float>& x : batches) expect_same_output(own, peer, x, contender.storage);
  }

  constexpr double kMilli = 1e3;
  bench::Figures figures;
  bool ours_first = true;
  bench::repeat_rounds([&] {
    double our_seconds = ours_first ? seconds_of_call(ours) : 0.0;
    const double their_seconds = seconds_of_call(theirs);
    if (!ours_first) our_seconds = seconds_of_call(ours);
    ours_first = !ours_first;
    figures.add("weir_ms", kMilli * our_seconds);
    figures.add("peer_ms", kMilli * their_seconds);
    figures.add("ratio", their_seconds / our_seconds);
  });
  figures.report(state);
  return figures.median("weir_ms") / kMilli;
}

void add_rows(const Shape& shape, const Contender& contender) {
  // Made for the first row that asks, kept until another contender or shape is measured.
  static std::unique_ptr<Peer> peer;
  static std::string peer_of;  // Its shape, precision and name.
  const std::string precision(label_of(contender.storage));
  const std::string contest =
      std::string(shape.name) + '/' + precision + '/' + std::string(contender.name);
  const auto add = [&](Task task, Index tokens) {
    const std::string setting =
        precision + (task == Task::kTraining ? "-trainable/training" : "/forward");
    const std::string name = "peers/" + std::string(shape.name) + '/' + setting +
                             "/tokens:" + std::to_string(tokens) + '/' +
                             std::string(contender.name);
    bench::add_row(name, weir::hardware_threads(), [=](benchmark::State& state) {
      try {
        if (peer == nullptr || peer_of != contest) {
          peer.reset();
          peer = contender.make(weir_of(shape).weights(), weir::threads());
          peer_of = contest;
        }
        return measure(state, shape, contender, *peer, task, tokens);
      } catch (const Disagreement& error) {
        any_disagreement = true;
        state.SkipWithError(error.what());
      } catch (const std::exception& error) {
        state.SkipWithError(error.what());
      }
      return 0.0;
    });
  };
  for (const Index tokens : {1, 64, 2048}) add(Task::kForward, tokens);
  if (contender.trains) add(Task::kTraining, 2048);
}

void describe_peers() {
  std::ostringstream eigen;
  eigen << "Eigen " << EIGEN_WORLD_VERSION << '.' << EIGEN_MAJOR_VERSION << '.'
        << EIGEN_MINOR_VERSION;
  benchmark::AddCustomContext("peers/Eigen", eigen.str());
#if defined(WEIR_BENCH_DNNL)
  benchmark::AddCustomContext("peers/oneDNN", bench::describe_dnnl());
#endif
#if defined(WEIR_BENCH_TORCH)
  benchmark::AddCustomContext("peers/libtorch", bench::describe_torch());
#endif
#if defined(WEIR_BENCH_GGML)
  benchmark::AddCustomContext("peers/ggml", bench::describe_ggml());
#endif
}

}  // namespace

int main(int argc, char** argv) {
  describe_peers();
  for (const Shape& shape : {bench::kFewLarge, bench::kManySmall, bench::kTopOne}) {
    for (const Contender& contender : kContenders) add_rows(shape, contender);
  }
  const int result = bench::run_rows(argc, argv);
  return any_disagreement ? 1 : result;
}
