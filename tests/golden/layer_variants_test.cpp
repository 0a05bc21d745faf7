// SPDX-License-Identifier: MIT
// Configurations that no file here has, of the families of one layer: files made by a slow
// reference, with gradients by central differences.
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

#include "golden/made_case.hpp"
#include "golden/slow_moe.hpp"
#include "support/catch.hpp"

namespace weir::layer_variants_test {
using namespace weir::golden;
using slow::Real;

namespace {

std::string number(Index value) {
  return std::to_string(value);
}

/// x, a cotangent and the sizes.
MadeCase layer_case(const std::string& name, Index batch, Index seq, Index experts, Index k) {
  MadeCase made(name, {{"batch", number(batch)},
                       {"seq", number(seq)},
                       {"d_model", "3"},
                       {"d_ff", "2"},
                       {"n_experts", number(experts)},
                       {"top_k", number(k)}});
  made.random("in.x", {batch, seq, 3}, 1);
  made.random("in.cotangent", {batch, seq, 3}, 2);
  return made;
}

void add_glu(MadeCase& made, const std::string& prefix, Index d_ff, std::uint64_t seed,
             const std::string& gate, const std::string& up, const std::string& down) {
  made.random("w." + prefix + gate, {d_ff, 3}, seed);
  made.random("w." + prefix + up, {d_ff, 3}, seed + 1);
  made.random("w." + prefix + down, {3, d_ff}, seed + 2);
}

std::string expert(Index e) {
  return "experts." + number(e) + ".";
}

/// Checks the file with and without what it could leave out.
/// \param tied     Whether y depends on which of several experts of equal scores the file chose.
void check_made(MadeCase made, bool tied = false) {
  const MadeCase::Outcome outcome = made.check();
  INFO(outcome.text);
  CHECK(outcome.failures == 0);
  CHECK(outcome.checks >= 4);
  // A result that is wrong is found.
  MadeCase wrong = made;
  wrong.at("out.y")(0, 0) += 1e-3;
  CHECK(wrong.check().failures >= 1);
  // Only y: what is not there is not compared.
  made.erase("g");
  made.erase("out.l");
  if (!tied) made.erase("out.t");
  made.erase("out.a");
  const MadeCase::Outcome alone = made.check();
  INFO(alone.text);
  CHECK(alone.failures == 0);
  CHECK(alone.checks >= 1);
}

// --- 01: Mixtral, OLMoE, Qwen2-MoE ------------------------------------------------------------

slow::Routing route_block(const MadeCase& made) {
  const Real logits = made.at("in.x") * made.at("w.gate.weight").transpose();
  return slow::route(logits, slow::softmax(logits), made.size("top_k"),
                     made.text("norm_topk_prob") == "True");
}

Real block_y(const MadeCase& made) {
  const slow::Function act = slow::activation(made.text("activation"));
  return slow::mix(route_block(made).weights, [&](Index e) {
    const std::string w = "w." + expert(e);
    return slow::glu(made.at("in.x"), made.at(w + "gate_proj.weight"),
                     made.at(w + "up_proj.weight"), made.at(w + "down_proj.weight"), act);
  });
}

double block_loss(const MadeCase& made) {
  const Real logits = made.at("in.x") * made.at("w.gate.weight").transpose();
  const double aux =
      slow::switch_loss(route_block(made), slow::softmax(logits), true, 0, logits.rows());
  return block_y(made).cwiseProduct(made.at("in.cotangent")).sum() + 0.3 * aux;
}

MadeCase block_case(Index batch, Index seq, Index experts, Index k, bool renormalise,
                    const std::string& activation) {
  MadeCase made = layer_case("01x_block", batch, seq, experts, k);
  made.config()["norm_topk_prob"] = renormalise ? "True" : "False";
  made.config()["activation"] = activation;
  made.config()["aux_coef"] = "0.3";
  made.random("w.gate.weight", {experts, 3}, 3);
  for (Index e = 0; e < experts; ++e) {
    add_glu(made, expert(e), 2, 10 + 3 * static_cast<std::uint64_t>(e), "gate_proj.weight",
            "up_proj.weight", "down_proj.weight");
  }
  return made;
}

void finish_block(MadeCase& made) {
  made.reals("out.y", {made.size("batch"), made.size("seq"), 3}, block_y(made));
  made.scalar("out.loss", block_loss(made));
  made.integers("out.topk_idx", {made.at("in.x").rows(), made.size("top_k")},
                slow::listed(route_block(made)));
}

}  // namespace

TEST_CASE("A Mixtral layer may have single tokens, all experts and other activations",
          "[golden][variants]") {
  const auto check = [](Index batch, Index seq, Index k, bool renormalise,
                        const std::string& activation) {
    INFO(activation << ", k = " << k);
    MadeCase made = block_case(batch, seq, 3, k, renormalise, activation);
    finish_block(made);
    made.differentiate("w.", "g.", block_loss);
    made.differentiate("in.x", "g.x", block_loss);
    check_made(made);
  };
  check(1, 3, 1, false, "silu");
  check(2, 2, 1, true, "gelu");
  check(1, 1, 3, true, "silu");
  check(1, 1, 3, false, "relu");
  MadeCase unknown = block_case(1, 1, 2, 1, true, "tanh");
  unknown.scalar("out.loss", 0.0);
  CHECK(test::message_of<UnknownCase>([&] { unknown.check(); }) ==
        "01x_block.safetensors: cfg.activation = tanh, expected silu, relu, gelu or gelu_tanh");
}

TEST_CASE("Experts of equal scores may be chosen as the file has it", "[golden][variants]") {
  // Experts 1, 2 and 3 are the same to the router: the reference takes the last ones, weir the
  // first.
  MadeCase made = block_case(2, 3, 4, 2, false, "silu");
  Real& router = made.at("w.gate.weight");
  router.row(2) = router.row(3) = router.row(1);
  finish_block(made);
  made.differentiate("in.x", "g.x", block_loss);
  MadeCase padded = made;
  padded.integers("in.attention_mask", {2, 3}, {1, 0, 1, 1, 1, 0});
  CHECK(padded.check().failures == 0);
  check_made(made, true);
  // A choice of less than the best is none.
  MadeCase worse = block_case(2, 3, 4, 2, false, "silu");
  finish_block(worse);
  for (auto& e : worse.integers_at("out.topk_idx")) e = 3 - e;
  CHECK(worse.check().failures >= 1);
}

TEST_CASE("A file without results, or without a cotangent, is what it is", "[golden][variants]") {
  MadeCase made = block_case(1, 2, 3, 1, true, "silu");
  CHECK(made.check().failures == 1);
  finish_block(made);
  made.erase("in.cotangent");
  made.scalar("out.loss", block_loss([&] {
                MadeCase zero = made;
                zero.reals("in.cotangent", {1, 2, 3}, Real::Zero(2, 3));
                return zero;
              }()));
  const MadeCase::Outcome outcome = made.check();
  INFO(outcome.text);
  CHECK(outcome.failures == 0);
}

// --- 02: DBRX ----------------------------------------------------------------------------------

TEST_CASE("A DBRX layer may renormalise by any norm or none, and choose all experts",
          "[golden][variants]") {
  for (const std::string norm : {"None", "2"}) {
    for (const Index k : {2, 4}) {
      MadeCase made = layer_case("02_x", 1, 3, 4, k);
      made.config()["moe_normalize_expert_weights"] = norm;
      made.random("w.router.layer.weight", {4, 3}, 3);
      for (const std::string name : {"w1", "v1", "w2"}) {
        made.random("w.experts.mlp." + name, {8, 3}, static_cast<std::uint64_t>(name[0] + name[1]));
      }
      const auto y_of = [&](const MadeCase& m) {
        const Real x = m.at("in.x");
        const Real p = slow::softmax(x * m.at("w.router.layer.weight").transpose());
        slow::Routing routing = slow::route(p, p, k, false);
        if (norm != "None") {
          for (Index t = 0; t < x.rows(); ++t) {
            const double power = std::stod(norm);
            routing.weights.row(t) /=
                std::pow(routing.weights.row(t).array().pow(power).sum(), 1.0 / power);
          }
        }
        return slow::mix(routing.weights, [&](Index e) {
          const auto part = [&](const std::string& name) {
            return Real(m.at("w.experts.mlp." + name).middleRows(2 * e, 2));
          };
          return slow::glu(x, part("w1"), part("v1"), part("w2").transpose(), slow::silu);
        });
      };
      const auto loss = [&](const MadeCase& m) {
        return y_of(m).cwiseProduct(m.at("in.cotangent")).sum();
      };
      made.reals("out.y", {1, 3, 3}, y_of(made));
      made.scalar("out.loss", loss(made));
      made.differentiate("w.", "g.", loss);
      made.differentiate("in.x", "g.x", loss);
      check_made(made);
    }
  }
}

// --- 03: Switch --------------------------------------------------------------------------------

TEST_CASE("A Switch layer may have one token, and experts with another activation",
          "[golden][variants]") {
  for (const Index seq : {1, 4}) {
    MadeCase made = layer_case("03_x", 2, seq, 3, 1);
    made.config().erase("top_k");
    made.config()["expert_capacity"] = "1";
    made.config()["activation"] = "gelu";
    made.random("w.router.classifier.weight", {3, 3}, 3);
    for (Index e = 0; e < 3; ++e) {
      const std::string w = "w.experts.expert_" + number(e) + ".";
      made.random(w + "wi.weight", {2, 3}, 5 + static_cast<std::uint64_t>(e));
      made.random(w + "wo.weight", {3, 2}, 9 + static_cast<std::uint64_t>(e));
    }
    const auto y_of = [&](const MadeCase& m) {
      const Real x = m.at("in.x");
      const Real p = slow::softmax(x * m.at("w.router.classifier.weight").transpose());
      Real y(x.rows(), 3);
      std::vector<Index> taken;
      for (Index t = 0; t < x.rows(); ++t) {
        if (t % seq == 0) taken.assign(3, 0);
        const Index e = slow::best(p, t, 1)[0];
        const std::string w = "w.experts.expert_" + number(e) + ".";
        const bool fits = taken[static_cast<std::size_t>(e)]++ < 1;
        const Real inner = x.row(t) * m.at(w + "wi.weight").transpose();
        const Real out = inner.unaryExpr(&slow::gelu) * m.at(w + "wo.weight").transpose();
        y.row(t) = p(t, e) * (fits ? out.row(0) : x.row(t));
      }
      return y;
    };
    const auto loss = [&](const MadeCase& m) {
      return y_of(m).cwiseProduct(m.at("in.cotangent")).sum();
    };
    made.reals("out.y", {2, seq, 3}, y_of(made));
    made.scalar("out.loss", loss(made));
    made.differentiate("w.", "g.", loss);
    made.differentiate("in.x", "g.x", loss);
    check_made(made);
  }
}

// --- 04 and 05: DeepSeek -----------------------------------------------------------------------

namespace {

/// How DeepSeek's gates differ.
struct Gate {
  bool sigmoid = false;
  Index groups = 1, allowed = 1, summed = 1;
  bool renormalise = false;
  double scale = 1.0;
  bool by_sequence = true;
  double alpha = 0.0;
  bool biased = false;
  Index shared = 1;
};

struct Names {
  std::string gate, up, down;
};

MadeCase deepseek_case(const std::string& name, const Names& names, const Gate& gate, Index k,
                       const MadeCase::Config& config) {
  MadeCase made = layer_case(name, 2, 3, 4, k);
  for (const auto& [key, value] : config) made.config()[key] = value;
  made.random("w.gate.weight", {4, 3}, 3);
  if (gate.biased) made.random("w.gate.bias", {4}, 4);
  for (Index e = 0; e < 4; ++e) {
    add_glu(made, expert(e), 2, 10 + 3 * static_cast<std::uint64_t>(e), names.gate, names.up,
            names.down);
  }
  if (gate.shared > 0) {
    made.config()["n_shared_experts"] = number(gate.shared);
    made.config()["shared_d_ff"] = number(2 * gate.shared);
    add_glu(made, "shared_experts.", 2 * gate.shared, 40, names.gate, names.up, names.down);
  }

  const auto parts_of = [=](const MadeCase& m) {
    const Real x = m.at("in.x");
    const Real logits = x * m.at("w.gate.weight").transpose();
    const Real scores =
        gate.sigmoid ? Real(logits.unaryExpr(&slow::sigmoid)) : slow::softmax(logits);
    Real biased = scores;
    if (gate.biased) biased.rowwise() += m.at("w.gate.bias").row(0);
    const slow::Routing routing =
        slow::route(slow::limited(biased, gate.groups, gate.allowed, gate.summed), scores, k,
                    gate.renormalise, gate.scale);
    Real y = slow::mix(routing.weights, [&](Index e) {
      const std::string w = "w." + expert(e);
      return slow::glu(x, m.at(w + names.gate), m.at(w + names.up), m.at(w + names.down),
                       slow::silu);
    });
    const std::string w = "w.shared_experts.";
    if (gate.shared > 0) {
      y += slow::glu(x, m.at(w + names.gate), m.at(w + names.up), m.at(w + names.down), slow::silu);
    }
    const double aux = gate.by_sequence ? (slow::switch_loss(routing, scores, false, 0, 3) +
                                           slow::switch_loss(routing, scores, false, 3, 6)) /
                                              2.0
                                        : slow::switch_loss(routing, scores, false, 0, 6);
    return std::tuple(y, routing, gate.alpha * aux);
  };
  const auto loss = [=](const MadeCase& m) {
    const auto [y, routing, aux] = parts_of(m);
    return y.cwiseProduct(m.at("in.cotangent")).sum() + aux;
  };
  const auto [y, routing, aux] = parts_of(made);
  made.reals("out.y", {2, 3, 3}, y);
  made.scalar("out.loss", loss(made));
  made.integers("out.topk_idx", {6, k}, slow::listed(routing));
  made.reals("out.combine_dense", {6, 4}, routing.weights);
  if (gate.alpha > 0.0) made.scalar("out.aux_loss", aux);
  made.differentiate("w.", "g.", loss);
  made.differentiate("in.x", "g.x", loss);
  if (gate.biased) made.reals("g.gate.bias", {4}, Real::Zero(1, 4));
  return made;
}

const Names kV2 = {"gate_proj.weight", "up_proj.weight", "down_proj.weight"};
const Names kV3 = {"w1.weight", "w3.weight", "w2.weight"};

}  // namespace

TEST_CASE(
    "A DeepSeek-V2 layer may choose greedily, balance by batch, renormalise, have no shared "
    "experts, or be evaluated",
    "[golden][variants]") {
  const auto check = [](const Gate& gate, Index k, const MadeCase::Config& config) {
    MadeCase made = deepseek_case("04_x", kV2, gate, k, config);
    check_made(made);
  };
  check({.scale = 1.5, .by_sequence = false, .alpha = 0.2}, 2,
        {{"topk_method", "greedy"},
         {"scoring_func", "softmax"},
         {"seq_aux", "False"},
         {"norm_topk_prob", "False"},
         {"routed_scaling_factor", "1.5"},
         {"aux_loss_alpha", "0.2"}});
  // Renormalised weights are not scaled, and the loss of sequences is the other one.
  check({.renormalise = true, .alpha = 0.2}, 3,
        {{"topk_method", "greedy"},
         {"seq_aux", "True"},
         {"norm_topk_prob", "True"},
         {"routed_scaling_factor", "1.5"},
         {"aux_loss_alpha", "0.2"}});
  // A single expert is scaled and not renormalised.
  check({.scale = 1.5, .shared = 0}, 1,
        {{"topk_method", "greedy"},
         {"norm_topk_prob", "True"},
         {"n_shared_experts", "None"},
         {"routed_scaling_factor", "1.5"}});
  // All experts of one of two groups.
  check({.groups = 2, .allowed = 1, .scale = 2.0, .shared = 2}, 2,
        {{"topk_method", "group_limited_greedy"},
         {"n_group", "2"},
         {"topk_group", "1"},
         {"routed_scaling_factor", "2.0"}});
  // An evaluation has no loss, whatever its coefficient.
  check({.scale = 1.5}, 2,
        {{"topk_method", "greedy"},
         {"mode", "eval"},
         {"routed_scaling_factor", "1.5"},
         {"aux_loss_alpha", "0.2"}});
  check({.sigmoid = true, .renormalise = true, .by_sequence = false, .alpha = 0.2}, 2,
        {{"topk_method", "greedy"},
         {"scoring_func", "sigmoid"},
         {"norm_topk_prob", "True"},
         {"seq_aux", "False"},
         {"aux_loss_alpha", "0.2"}});
  MadeCase unknown = deepseek_case("04_x", kV2, {}, 2, {{"topk_method", "best"}});
  CHECK(test::message_of<UnknownCase>([&] { unknown.check(); }) ==
        "04_x.safetensors: cfg.topk_method = best, expected one of greedy, group_limited_greedy, "
        "noaux_tc");
}

TEST_CASE("A DeepSeek-V3 layer may have softmax scores, no bias and no groups",
          "[golden][variants]") {
  const auto check = [](const Gate& gate, Index k, const MadeCase::Config& config) {
    MadeCase made = deepseek_case("05_x", kV3, gate, k, config);
    check_made(made);
  };
  check({.groups = 2, .allowed = 1, .scale = 1.5}, 2,
        {{"score_func", "softmax"},
         {"correction_bias", "False"},
         {"n_group", "2"},
         {"topk_group", "1"},
         {"route_scale", "1.5"}});
  check({.scale = 1.5, .biased = true}, 2,
        {{"score_func", "softmax"}, {"correction_bias", "True"}, {"route_scale", "1.5"}});
  check({.groups = 2, .allowed = 1, .summed = 2, .biased = true}, 1,
        {{"score_func", "softmax"},
         {"correction_bias", "True"},
         {"n_group", "2"},
         {"topk_group", "1"}});
  check({.sigmoid = true, .renormalise = true, .scale = 2.5}, 4,
        {{"score_func", "sigmoid"},
         {"correction_bias", "False"},
         {"n_group", "1"},
         {"topk_group", "1"},
         {"route_scale", "2.5"}});
  check({.sigmoid = true, .groups = 2, .allowed = 1, .renormalise = true}, 1,
        {{"score_func", "sigmoid"}, {"n_group", "2"}, {"topk_group", "1"}});
}

// --- 06: noisy top-k ---------------------------------------------------------------------------

namespace {

/// A layer of `experts` experts with biases; the noise, if there is any, is in.noise.
MadeCase noisy_case(Index experts, Index k, const MadeCase::Config& config) {
  MadeCase made("06_x", {{"batch_tokens", "4"},
                         {"d_model", "3"},
                         {"hidden", "2"},
                         {"out", "2"},
                         {"n_experts", number(experts)},
                         {"top_k", number(k)},
                         {"loss_coef", "0.2"}});
  for (const auto& [key, value] : config) made.config()[key] = value;
  made.random("in.x", {4, 3}, 1);
  made.random("in.cotangent", {4, 2}, 2);
  made.random("w.w_gate", {3, experts}, 3);
  made.random("w.w_noise", {3, experts}, 4);
  for (Index e = 0; e < experts; ++e) {
    const std::string w = "w." + expert(e);
    const auto seed = static_cast<std::uint64_t>(5 + 4 * e);
    made.random(w + "fc1.weight", {2, 3}, seed);
    made.random(w + "fc1.bias", {2}, seed + 1);
    made.random(w + "fc2.weight", {2, 2}, seed + 2);
    made.random(w + "fc2.bias", {2}, seed + 3);
  }
  return made;
}

/// The sample variance over the squared mean.
double squared_variation(const Real& v) {
  const double mean = v.mean();
  return (v.array() - mean).square().sum() / static_cast<double>(v.size() - 1) / (mean * mean);
}

void check_noisy(MadeCase made, bool noisy, bool later) {
  const Index experts = made.size("n_experts");
  const Index k = made.size("top_k");
  if (noisy) made.random("in.noise", {4, experts}, 50);
  const auto parts_of = [=](const MadeCase& m) {
    const Real x = m.at("in.x");
    Real logits = x * m.at("w.w_gate");
    if (noisy) {
      const Real raw = x * m.at("w.w_noise");
      const Real deviation = raw.unaryExpr([](double z) { return std::log1p(std::exp(z)) + 0.01; });
      logits += m.at("in.noise").cwiseProduct(deviation);
    }
    const Real p = slow::softmax(logits);
    slow::Routing routing = slow::route(p, p, k, !later);
    if (later) {
      for (Index t = 0; t < 4; ++t) routing.weights.row(t) /= routing.weights.row(t).sum() + 1e-6;
    }
    const Real y = slow::mix(routing.weights, [&](Index e) {
      const std::string w = "w." + expert(e);
      Real inner = x * m.at(w + "fc1.weight").transpose();
      inner.rowwise() += m.at(w + "fc1.bias").row(0);
      Real out = inner.unaryExpr(&slow::relu) * m.at(w + "fc2.weight").transpose();
      out.rowwise() += m.at(w + "fc2.bias").row(0);
      return out;
    });
    // The load is how many tokens chose an expert, without a derivative.
    Real load = Real::Zero(1, experts);
    for (const slow::Experts& chosen : routing.chosen) {
      for (const Index e : chosen) load(0, e) += 1.0;
    }
    const double aux =
        0.2 * (squared_variation(routing.weights.colwise().sum()) + squared_variation(load));
    return std::pair(y, aux);
  };
  const auto loss = [=](const MadeCase& m) {
    const auto [y, aux] = parts_of(m);
    return y.cwiseProduct(m.at("in.cotangent")).sum() + aux;
  };
  made.reals("out.y", {4, 2}, parts_of(made).first);
  made.scalar("out.aux_loss", parts_of(made).second);
  made.scalar("out.loss", loss(made));
  made.differentiate("w.", "g.", loss);
  made.differentiate("in.x", "g.x", loss);
  const MadeCase::Outcome outcome = made.check();
  INFO(outcome.text);
  CHECK(outcome.failures == 0);
  CHECK(outcome.checks > 10);
}

}  // namespace

TEST_CASE("A layer of noisy top-k may choose all experts, and train without noise",
          "[golden][variants]") {
  for (const bool later : {false, true}) {
    const std::string version = later ? "head" : "7d8489a";
    check_noisy(noisy_case(3, 3, {{"mode", "train"}, {"version", version}}), true, later);
    check_noisy(noisy_case(4, 2, {{"noisy_gating", "False"}, {"version", version}}), false, later);
    check_noisy(noisy_case(3, 3, {{"mode", "eval"}, {"version", version}}), false, later);
  }
}

// --- 07: ST-MoE --------------------------------------------------------------------------------

TEST_CASE("A layer of st-moe-pytorch may be evaluated, with draws and without losses",
          "[golden][variants]") {
  for (const Index k : {1, 3}) {
    for (const Index seq : {1, 4}) {
      MadeCase made("07_x", {{"batch", "2"},
                             {"seq", number(seq)},
                             {"d_model", "3"},
                             {"expert_hidden", "2"},
                             {"n_experts", "3"},
                             {"top_n", number(k)},
                             {"capacity_factor", "1.0"},
                             {"threshold", "0.5"},
                             {"mode", "eval"},
                             {"balance_loss_coef", "0.1"},
                             {"router_z_loss_coef", "0.1"}});
      made.random("in.x", {2, seq, 3}, 1);
      made.random("in.cotangent", {2, seq, 3}, 2);
      made.random("in.uniform", {k, 2, seq}, 3) =
          (test::random_matrix(2 * k, seq, 3).array().abs() / 3.0).matrix();
      made.random("w.gate.to_gates.weight", {3, 3}, 4);
      for (Index e = 0; e < 3; ++e) {
        const std::string w = "w.experts.experts." + number(e) + ".net.";
        const auto seed = static_cast<std::uint64_t>(10 + 5 * e);
        made.random(w + "0.weight", {4, 3}, seed);
        made.random(w + "0.bias", {4}, seed + 1);
        made.random(w + "1.mult_bias", {2}, seed + 2);
        made.random(w + "2.weight", {3, 2}, seed + 3);
        made.random(w + "2.bias", {3}, seed + 4);
      }
      const auto y_of = [=](const MadeCase& m) {
        const Real x = m.at("in.x");
        const Real p = slow::softmax(x * m.at("w.gate.to_gates.weight").transpose());
        slow::Routing routing = slow::route(p, p, k, true);
        const Real u = m.at("in.uniform");  // [k * batch, seq]
        for (Index b = 0; b < 2; ++b) {
          std::vector<Index> taken(3, 0);  // At most 4 of an expert: the minimum.
          for (Index r = 0; r < k; ++r) {
            for (Index t = b * seq; t < (b + 1) * seq; ++t) {
              const Index e =
                  routing.chosen[static_cast<std::size_t>(t)][static_cast<std::size_t>(r)];
              const bool routed = r == 0 || u(r * 2 + b, t - b * seq) < routing.weights(t, e) / 0.5;
              if (!routed || taken[static_cast<std::size_t>(e)] == 4) {
                routing.weights(t, e) = 0.0;
              } else {
                ++taken[static_cast<std::size_t>(e)];
              }
            }
          }
        }
        return slow::mix(routing.weights, [&](Index e) {
          const std::string w = "w.experts.experts." + number(e) + ".net.";
          Real in = x * m.at(w + "0.weight").transpose();
          in.rowwise() += m.at(w + "0.bias").row(0);
          const Real gate = in.rightCols(2).unaryExpr(&slow::gelu);
          const Real hidden =
              gate.cwiseProduct(in.leftCols(2)) * m.at(w + "1.mult_bias").row(0).asDiagonal();
          Real out = hidden * m.at(w + "2.weight").transpose();
          out.rowwise() += m.at(w + "2.bias").row(0);
          return out;
        });
      };
      const auto loss = [=](const MadeCase& m) {
        return y_of(m).cwiseProduct(m.at("in.cotangent")).sum();
      };
      made.reals("out.y", {2, seq, 3}, y_of(made));
      made.scalar("out.loss", loss(made));
      made.scalar("out.aux_loss", 0.0);
      made.scalar("out.balance_loss", 0.0);
      made.scalar("out.z_loss", 0.0);
      made.differentiate("w.", "g.", loss);
      made.differentiate("in.x", "g.x", loss);
      check_made(made);
    }
  }
}

// --- 08: Megatron-Core -------------------------------------------------------------------------

TEST_CASE("A file of Megatron-Core may have any name, one of the results, and one expert",
          "[golden][variants]") {
  MadeCase made("08", {{"n_tokens", "4"}, {"n_experts", "5"}, {"top_k", "1"}});
  made.random("in.logits", {4, 5}, 1);
  made.random("in.cotangent", {4, 5}, 2);
  const auto weights = [](const MadeCase& m) {
    const Real score = m.at("in.logits").unaryExpr(&slow::sigmoid);
    return slow::route(score, score, 1, false).weights;  // One score is its weight as it is.
  };
  made.reals("out.sigmoid.probs", {4, 5}, weights(made));
  made.differentiate("in.logits", "g_sigmoid.logits", [&](const MadeCase& m) {
    return weights(m).cwiseProduct(m.at("in.cotangent")).sum();
  });
  const MadeCase::Outcome outcome = made.check();
  INFO(outcome.text);
  CHECK(outcome.failures == 0);
  CHECK(outcome.checks == 2);
}

TEST_CASE("What Megatron-Core drops among equals is up to the file", "[golden][variants]") {
  // All four tokens to expert 0, with equal probabilities for two of them: C = 2.
  MadeCase made(
      "08_some_drop",
      {{"n_tokens", "4"}, {"n_experts", "2"}, {"top_k", "1"}, {"capacity_factor", "1.0"}});
  Real probs = Real::Zero(4, 2);
  probs.col(0) << 0.5, 0.9, 0.5, 0.2;
  made.reals("in.probs", {4, 2}, probs);
  made.integers("in.routing_map", {4, 2}, {1, 0, 1, 0, 1, 0, 1, 0});
  const auto with_map = [&](const std::string& name, const MadeCase::Integers& map) {
    MadeCase m = made;
    m.integers("out." + name + ".map", {4, 2}, map);
    Real kept = probs;
    for (Index t = 0; t < 4; ++t)
      kept(t, 0) *= static_cast<double>(map[static_cast<std::size_t>(2 * t)]);
    m.reals("out." + name + ".probs", {4, 2}, kept);
    return m.check().failures;
  };
  // By probability, token 1 and one of the two.
  CHECK(with_map("drop_probs", {1, 0, 1, 0, 0, 0, 0, 0}) == 0);
  CHECK(with_map("drop_probs", {0, 0, 1, 0, 1, 0, 0, 0}) == 0);
  CHECK(with_map("drop_probs", {0, 0, 1, 0, 0, 0, 1, 0}) > 0);
  // By position, any two: torch's top-k of ones has no order. Three or one are wrong.
  CHECK(with_map("drop_position", {1, 0, 1, 0, 0, 0, 0, 0}) == 0);
  CHECK(with_map("drop_position", {0, 0, 1, 0, 0, 0, 1, 0}) == 0);
  CHECK(with_map("drop_position", {1, 0, 1, 0, 1, 0, 0, 0}) > 0);
  CHECK(with_map("drop_position", {1, 0, 0, 0, 0, 0, 0, 0}) > 0);
  CHECK(with_map("drop_position", {1, 1, 1, 0, 0, 0, 0, 0}) > 0);
}

// --- 15: expert choice -------------------------------------------------------------------------

TEST_CASE("Expert choice may have sigmoid scores, scores over tokens, and one token",
          "[golden][variants]") {
  for (const std::string score : {"sigmoid", "softmax over tokens", "softmax over experts"}) {
    for (const Index seq : {1, 6}) {
      INFO(score);
      MadeCase made = layer_case("15_x", 2, seq, 3, 1);
      made.config().erase("top_k");
      made.config()["capacity_factor"] = "2.0";
      made.config()["score"] = score;
      made.random("w.router.gate.weight", {3, 3}, 3);
      made.random("w.experts.gate_proj", {3, 3, 2}, 4);
      made.random("w.experts.up_proj", {3, 3, 2}, 5);
      made.random("w.experts.down_proj", {3, 2, 3}, 6);
      const Index tokens = 2 * seq;
      const auto y_of = [=](const MadeCase& m, bool of_input) {
        const Real x = m.at("in.x");
        const Real logits = x * m.at("w.router.gate.weight").transpose();
        const Real scores = score == "sigmoid" ? Real(logits.unaryExpr(&slow::sigmoid))
                            : score == "softmax over experts"
                                ? slow::softmax(logits)
                                : Real(slow::softmax(logits.transpose()).transpose());
        Real y = Real::Zero(tokens, 3);
        const Index count = std::min<Index>(8, tokens);  // 2 * 12 / 3, or all.
        for (Index e = 0; e < 3; ++e) {
          for (const Index t : slow::best(scores.col(e).transpose(), 0, count)) {
            const Real in = (of_input ? scores(t, e) : 1.0) * x.row(t);
            const Real out =
                slow::glu(in, m.at("w.experts.gate_proj").middleRows(3 * e, 3).transpose(),
                          m.at("w.experts.up_proj").middleRows(3 * e, 3).transpose(),
                          m.at("w.experts.down_proj").middleRows(2 * e, 2).transpose(), slow::silu);
            y.row(t) += (of_input ? 1.0 : scores(t, e)) * out;
          }
        }
        return y;
      };
      for (const bool of_input : {true, false}) {
        const std::string suffix = of_input ? "" : "_paper";
        const auto loss = [=](const MadeCase& m) {
          return y_of(m, of_input).cwiseProduct(m.at("in.cotangent")).sum();
        };
        made.reals("out.y" + suffix, {2, seq, 3}, y_of(made, of_input));
        made.scalar("out.loss" + suffix, loss(made));
        made.differentiate("w.", of_input ? "g." : "gp.", loss);
        made.differentiate("in.x", of_input ? "g.x" : "gp.x", loss);
      }
      check_made(made);
    }
  }
}

}  // namespace weir::layer_variants_test
