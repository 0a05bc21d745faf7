// SPDX-License-Identifier: MIT
// Configurations of whole decoders and of attention that no file here has: padding, a tied head,
// another index that is ignored, one token. A small Mixtral is made by a slow reference, with
// gradients by central differences; the others are files here with a part taken away.
#include <cmath>
#include <cstdint>
#include <string>
#include <vector>

#include "golden/made_case.hpp"
#include "golden/slow_moe.hpp"
#include "support/catch.hpp"

namespace weir::decoder_variants_test {
using namespace weir::golden;
using slow::Real;

namespace {

constexpr Index kModel = 4, kVocab = 5, kExperts = 3, kLayers = 2;
constexpr double kCoefficient = 0.3;

MadeCase golden_file(const std::string& name) {
  return MadeCase(Safetensors::read(WEIR_SOURCE_DIR "/tests/golden/" + name + ".safetensors"));
}

std::string layer(Index l) {
  return "w.model.layers." + std::to_string(l) + ".";
}

Real rms_norm(const Real& x, const Real& w) {
  Real y = x;
  for (Index t = 0; t < x.rows(); ++t) {
    y.row(t) /= std::sqrt(x.row(t).squaredNorm() / static_cast<double>(x.cols()) + 1e-5);
  }
  return y * w.row(0).asDiagonal();
}

/// One head of two numbers, turned by its position.
Real turned(Real rows) {
  for (Index t = 0; t < rows.rows(); ++t) {
    const double a = rows(t, 0), b = rows(t, 1), angle = static_cast<double>(t);
    rows(t, 0) = a * std::cos(angle) - b * std::sin(angle);
    rows(t, 1) = b * std::cos(angle) + a * std::sin(angle);
  }
  return rows;
}

/// Two heads of two numbers over one of keys and values; the whole sequence so far.
Real attend(const MadeCase& m, Index l, const Real& x) {
  const auto project = [&](const std::string& name) {
    return Real(x * m.at(layer(l) + "self_attn." + name + "_proj.weight").transpose());
  };
  const Real q = project("q"), k = turned(project("k")), v = project("v");
  Real context(x.rows(), kModel);
  for (Index h = 0; h < 2; ++h) {
    const Real scores = turned(q.middleCols(2 * h, 2)) * k.transpose() / std::sqrt(2.0);
    for (Index t = 0; t < x.rows(); ++t) {
      const Real p = slow::softmax(scores.row(t).head(t + 1));
      context.row(t).segment(2 * h, 2) = p * v.topRows(t + 1);
    }
  }
  return context * m.at(layer(l) + "self_attn.o_proj.weight").transpose();
}

/// What the reference decoder yields for one sequence without padding.
struct Sequence {
  Real logits;
  std::vector<slow::Routing> routing;  ///< Of each layer.
  std::vector<Real> probabilities;
};

Sequence run(const MadeCase& m, const std::vector<Index>& ids, Index k, bool tied) {
  Sequence result;
  const Real& embedding = m.at("w.model.embed_tokens.weight");
  Real x(static_cast<Index>(ids.size()), kModel);
  for (Index t = 0; t < x.rows(); ++t) {
    x.row(t) = embedding.row(ids[static_cast<std::size_t>(t)]);
  }
  for (Index l = 0; l < kLayers; ++l) {
    x += attend(m, l, rms_norm(x, m.at(layer(l) + "input_layernorm.weight")));
    const Real in = rms_norm(x, m.at(layer(l) + "post_attention_layernorm.weight"));
    const std::string moe = layer(l) + "block_sparse_moe.";
    const Real p = slow::softmax(in * m.at(moe + "gate.weight").transpose());
    result.routing.push_back(slow::route(p, p, k, true));
    result.probabilities.push_back(p);
    x += slow::mix(result.routing.back().weights, [&](Index e) {
      const std::string w = moe + "experts." + std::to_string(e) + ".";
      return slow::glu(in, m.at(w + "w1.weight"), m.at(w + "w3.weight"), m.at(w + "w2.weight"),
                       slow::silu);
    });
  }
  const Real& head = tied ? embedding : m.at("w.lm_head.weight");
  result.logits = rms_norm(x, m.at("w.model.norm.weight")) * head.transpose();
  return result;
}

/// A batch of two sequences, the first of them with `padding` tokens in front.
struct Batch {
  Index seq = 5, padding = 0, k = 2;
  bool tied = false;
  MadeCase::Integers tokens = {1, 4, 0, 2, 3, 2, 2, 1, 0, 4};
  Index ignored = -100;
  MadeCase::Integers labels = {};

  Index begin(Index b) const { return b * seq + (b == 0 ? padding : 0); }
};

/// The sum of the losses; the balancing loss is one of all layers' tokens together.
double loss_of(const MadeCase& m, const Batch& batch, double* cross_entropy = nullptr,
               double* balance = nullptr, Real* logits = nullptr) {
  double nll = 0.0;
  Index targets = 0;
  slow::Routing all;
  std::vector<Real> of_layers;
  if (logits != nullptr) logits->setConstant(2 * batch.seq, kVocab, 7.0);
  for (Index b = 0; b < 2; ++b) {
    const Index first = batch.begin(b), end = (b + 1) * batch.seq;
    const std::vector<Index> ids(batch.tokens.begin() + first, batch.tokens.begin() + end);
    const Sequence s = run(m, ids, batch.k, batch.tied);
    if (logits != nullptr) logits->middleRows(first, end - first) = s.logits;
    for (Index l = 0; l < kLayers; ++l) {
      const auto i = static_cast<std::size_t>(l);
      all.chosen.insert(all.chosen.end(), s.routing[i].chosen.begin(), s.routing[i].chosen.end());
      of_layers.push_back(s.probabilities[i]);
    }
    for (Index t = first; t + 1 < end; ++t) {
      const Index target = batch.labels[static_cast<std::size_t>(t + 1)];
      if (target == batch.ignored) continue;
      nll -= std::log(slow::softmax(s.logits.row(t - first))(0, target));
      ++targets;
    }
  }
  Real p(static_cast<Index>(all.chosen.size()), kExperts);
  Index row = 0;
  for (const Real& part : of_layers) {
    p.middleRows(row, part.rows()) = part;
    row += part.rows();
  }
  const double aux = slow::switch_loss(all, p, true, 0, p.rows());
  const double mean = nll / static_cast<double>(targets);
  if (cross_entropy != nullptr) *cross_entropy = mean;
  if (balance != nullptr) *balance = aux;
  return mean + kCoefficient * aux;
}

MadeCase mixtral_case(Batch& batch) {
  const auto text = [](Index value) { return std::to_string(value); };
  MadeCase made("11_x", {{"vocab", text(kVocab)},
                         {"d_model", text(kModel)},
                         {"d_ff", "2"},
                         {"n_layers", text(kLayers)},
                         {"n_heads", "2"},
                         {"n_kv_heads", "1"},
                         {"n_experts", text(kExperts)},
                         {"top_k", text(batch.k)},
                         {"batch", "2"},
                         {"seq", text(batch.seq)},
                         {"router_aux_loss_coef", "0.3"},
                         {"rope_theta", "10000.0"},
                         {"rms_eps", "1e-05"},
                         {"sliding_window", "None"},
                         {"ignore_index", text(batch.ignored)},
                         {"left_padding", batch.padding > 0 ? "True" : "False"},
                         {"tied_embedding", batch.tied ? "True" : "False"}});
  std::uint64_t seed = 1;
  const auto add = [&](const std::string& name, Index rows, Index cols) {
    made.random(name, rows == 0 ? MadeCase::Shape{cols} : MadeCase::Shape{rows, cols}, seed++);
  };
  add("w.model.embed_tokens.weight", kVocab, kModel);
  add("w.model.norm.weight", 0, kModel);
  if (!batch.tied) add("w.lm_head.weight", kVocab, kModel);
  for (Index l = 0; l < kLayers; ++l) {
    add(layer(l) + "input_layernorm.weight", 0, kModel);
    add(layer(l) + "post_attention_layernorm.weight", 0, kModel);
    add(layer(l) + "self_attn.q_proj.weight", kModel, kModel);
    add(layer(l) + "self_attn.k_proj.weight", 2, kModel);
    add(layer(l) + "self_attn.v_proj.weight", 2, kModel);
    add(layer(l) + "self_attn.o_proj.weight", kModel, kModel);
    add(layer(l) + "block_sparse_moe.gate.weight", kExperts, kModel);
    for (Index e = 0; e < kExperts; ++e) {
      const std::string w = layer(l) + "block_sparse_moe.experts." + text(e) + ".";
      add(w + "w1.weight", 2, kModel);
      add(w + "w3.weight", 2, kModel);
      add(w + "w2.weight", kModel, 2);
    }
  }
  batch.tokens.resize(static_cast<std::size_t>(2 * batch.seq));
  if (batch.labels.empty()) {
    batch.labels = batch.tokens;
    // The first real token is predicted by padding: it is ignored, too.
    for (Index t = 0; t <= batch.padding && batch.padding > 0; ++t) {
      batch.labels[static_cast<std::size_t>(t)] = batch.ignored;
    }
  }
  made.integers("in.tokens", {2, batch.seq}, batch.tokens);
  made.integers("in.labels", {2, batch.seq}, batch.labels);
  if (batch.padding > 0) {
    MadeCase::Integers mask(static_cast<std::size_t>(2 * batch.seq), 1);
    for (Index t = 0; t < batch.padding; ++t) mask[static_cast<std::size_t>(t)] = 0;
    made.integers("in.attention_mask", {2, batch.seq}, mask);
  }
  return made;
}

void check_mixtral(Batch batch) {
  MadeCase made = mixtral_case(batch);
  double cross_entropy = 0.0, balance = 0.0;
  Real logits;
  const double loss = loss_of(made, batch, &cross_entropy, &balance, &logits);
  made.reals("out.logits", {2, batch.seq, kVocab}, logits);
  made.scalar("out.aux_loss", balance);
  made.scalar("out.ce_loss", cross_entropy);
  made.scalar("out.loss", loss);
  if (batch.seq > 1) {
    made.differentiate("w.", "g.", [&](const MadeCase& m) { return loss_of(m, batch); });
  }
  const MadeCase::Outcome outcome = made.check(1e-6);
  INFO(outcome.text);
  CHECK(outcome.failures == 0);
  made.at("out.logits")(2 * batch.seq - 1, 0) += 1e-3;
  CHECK(made.check(1e-6).failures == 2);  // Also of decoding.
}

}  // namespace

TEST_CASE("A Mixtral decoder may have padding, a tied head, another ignored index and all experts",
          "[golden][variants]") {
  check_mixtral({.padding = 2});
  check_mixtral({.k = 3, .tied = true});
  check_mixtral({.padding = 1, .k = 1, .ignored = -7});
  check_mixtral({.ignored = 3, .labels = {1, 4, 3, 2, 3, 2, 2, 1, 0, 3}});
  check_mixtral({.seq = 2});
}

TEST_CASE("A decoder's loss that counts what padding predicts, or nothing, is not compared",
          "[golden][variants]") {
  Batch batch{.padding = 2};
  batch.labels = batch.tokens;
  batch.labels[0] = batch.labels[1] = -100;
  MadeCase made = mixtral_case(batch);
  Real logits;
  double balance = 0.0;
  static_cast<void>(loss_of(made, batch, nullptr, &balance, &logits));
  made.reals("out.logits", {2, batch.seq, kVocab}, logits);
  made.scalar("out.aux_loss", balance);
  made.scalar("out.loss", 99.0);
  made.random("g.model.norm.weight", {kModel}, 5);
  MadeCase::Outcome outcome = made.check(1e-6);
  INFO(outcome.text);
  CHECK(outcome.failures == 0);
  CHECK(outcome.checks == 3);
  CHECK(outcome.text.find("g.* is not compared: it counts what padding predicts") !=
        std::string::npos);

  Batch one{.seq = 1};
  MadeCase single = mixtral_case(one);
  static_cast<void>(loss_of(single, one, nullptr, &balance, &logits));
  single.reals("out.logits", {2, 1, kVocab}, logits);
  single.scalar("out.aux_loss", balance);
  single.scalar("out.loss", std::nan(""));
  outcome = single.check(1e-6);
  INFO(outcome.text);
  CHECK(outcome.failures == 0);
  CHECK(outcome.checks == 3);
}

TEST_CASE("A DBRX decoder may have padding in front, and no balancing loss", "[golden][variants]") {
  MadeCase made = golden_file("13_dbrx_decoder");
  const Index seq = made.size("seq"), vocab = made.size("vocab");
  made.erase("g.");
  for (const char* gone : {"out.layers", "out.loss", "out.aux", "out.ce"}) made.erase(gone);
  // The first sequence becomes shorter, and its logits are those of its first tokens.
  const MadeCase::Integers tokens = made.integers_at("in.tokens");
  Real logits = made.at("out.logits");
  constexpr Index kPadding = 3;
  MadeCase::Integers padded = tokens, mask(tokens.size(), 1);
  for (Index t = seq - 1; t >= 0; --t) {
    const auto to = static_cast<std::size_t>(t);
    padded[to] = t >= kPadding ? tokens[to - kPadding] : 0;
    mask[to] = t >= kPadding ? 1 : 0;
    if (t >= kPadding) logits.row(t) = made.at("out.logits").row(t - kPadding).eval();
  }
  logits.topRows(kPadding).setConstant(3.0);
  made.integers("in.tokens", {2, seq}, padded);
  made.integers("in.labels", {2, seq}, padded);
  made.integers("in.attention_mask", {2, seq}, mask);
  made.reals("out.logits", {2, seq, vocab}, logits);
  made.config().erase("effective_aux_coef");
  made.config()["output_router_logits"] = "False";
  const MadeCase::Outcome outcome = made.check(1e-9);
  INFO(outcome.text);
  CHECK(outcome.failures == 0);
  CHECK(outcome.checks == 2);
}

TEST_CASE("A DeepSeek-V3 decoder may have YaRN, and lack settings that have usual values",
          "[golden][variants]") {
  MadeCase made = golden_file("12_deepseek_v3_decoder");
  made.name() = "12";
  for (const char* usual : {"rope_theta", "rms_eps", "tied_embedding", "yarn"}) {
    made.config().erase(usual);
  }
  CHECK(made.check(1e-9).failures == 0);
  // Stretched by 1, nothing changes; by 2, something does.
  made.config()["yarn"] = "True";
  made.config()["rope_factor"] = "1.0";
  CHECK(made.check(1e-9).failures == 0);
  made.config()["rope_factor"] = "2.0";
  CHECK(made.check(1e-9).failures > 0);
  made.config()["max_seq_len"] = "16";
  made.config()["original_seq_len"] = "16";
  CHECK(test::message_of<FileError>([&] { made.check(); }) ==
        "12.safetensors: cfg.yarn contradicts cfg.max_seq_len");
}

TEST_CASE("Latent attention without YaRN needs none of its settings", "[golden][variants]") {
  MadeCase made = golden_file("09_mla");
  for (const char* gone : {"max_seq_len", "original_seq_len", "rope_factor", "beta_fast",
                           "beta_slow", "mscale", "yarn"}) {
    made.config().erase(gone);
  }
  const MadeCase::Outcome all = made.check(1e-9);
  INFO(all.text);
  CHECK(all.failures == 0);
  made.erase("g.");
  made.erase("out.f");
  made.erase("out.k");
  made.erase("out.p");
  CHECK(made.check(1e-9).failures == 0);
}

TEST_CASE("Positions of padded attention may begin anywhere, and count real tokens alone",
          "[golden][variants]") {
  MadeCase made = golden_file("10_gqa_hf_mistral");
  const MadeCase::Integers mask = made.integers_at("in.attention_mask");
  const Index seq = made.size("seq");
  // As Hugging Face's generate() makes them: 1 for padding, then 0, 1, 2, ...
  MadeCase::Integers positions;
  for (std::size_t t = 0; t < mask.size(); ++t) {
    const bool first = static_cast<Index>(t) % seq == 0;
    const std::int64_t before = first ? -1 : positions.back();
    const bool after_padding = first || mask[t - 1] == 0;
    positions.push_back(mask[t] == 0 ? 1 : after_padding ? 0 : before + 1);
  }
  made.integers("in.positions", {2, seq}, positions);
  const MadeCase::Outcome outcome = made.check(1e-9);
  INFO(outcome.text);
  CHECK(outcome.failures == 0);
  made.integers_at("in.positions").back() += 1;
  CHECK(made.check(1e-9).failures == 1);
  made.integers_at("in.positions").back() -= 1;
  made.erase("out.y");
  made.erase("in.cotangent");
  made.erase("g.");
  made.erase("out.loss");
  CHECK(made.check(1e-9).failures == 0);
}

}  // namespace weir::decoder_variants_test
