// SPDX-License-Identifier: MIT
/// \file
/// What the cases of a whole decoder with Hugging Face's loss have in common.
#pragma once

#include <algorithm>
#include <cstdint>
#include <string>
#include <vector>

#include <weir/attention/grouped_query.hpp>
#include <weir/core/layer.hpp>
#include <weir/core/pass_record.hpp>
#include <weir/core/sequences.hpp>
#include <weir/model/decoder.hpp>
#include <weir/moe/report.hpp>
#include <weir/moe/routing.hpp>
#include <weir/nn/cross_entropy.hpp>

#include "golden/case_file.hpp"
#include "golden/checker.hpp"
#include "golden/moe_case.hpp"

namespace weir::golden {

/// Tokens and labels, and the sizes.
struct DecoderInputs {
  explicit DecoderInputs(CaseFile& file)
      : batch(file.size("batch")),
        seq(file.size("seq")),
        vocab(file.size("vocab")),
        d_model(file.size("d_model")),
        d_ff(file.size("d_ff")),
        layers(file.size("n_layers")),
        heads(file.size("n_heads")),
        kv_heads(file.size("n_kv_heads")),
        experts(file.size("n_experts")),
        k(file.size("top_k")),
        sequences(Sequences::uniform(batch, seq)) {
    if (file.flag("tied_embedding")) {
      throw_error<UnknownCase>(file.path(), ": only a head of its own is known here");
    }
    const std::vector<std::int64_t> tokens = file.integers("in.tokens", {batch, seq});
    const std::vector<std::int64_t> labels = file.integers("in.labels", {batch, seq});
    ids.assign(tokens.begin(), tokens.end());
    // The target of a token is the label of the next.
    targets.assign(labels.begin() + 1, labels.end());
    targets.push_back(0);
    for (std::size_t t = 0; t < targets.size(); ++t) {
      if ((static_cast<Index>(t) + 1) % seq == 0) targets[t] = CrossEntropyConfig{}.ignore_index;
    }
  }

  Pass pass() const { return {.training = true, .sequences = &sequences}; }

  Index batch, seq, vocab, d_model, d_ff, layers, heads, kv_heads, experts, k;
  std::vector<Index> ids, targets;
  Sequences sequences;
};

/// The assignments to each expert in each layer.
using Loads = std::vector<RowVector<double>>;

/// What the balancing loss of layer l has to know of the others: the sum of their assignments.
/// Empty where `loads` is.
inline RowVector<double> load_elsewhere(const Loads& loads, Index l) {
  RowVector<double> sum;
  for (std::size_t other = 0; other < loads.size(); ++other) {
    if (static_cast<Index>(other) == l) continue;
    sum = sum.size() == 0 ? loads[other] : RowVector<double>(sum + loads[other]);
  }
  return sum;
}

/// Compares `name`, [tokens, k]: which experts were chosen, in the reference's order.
inline void check_choice(Checker& checker, CaseFile& file, const Routing<double>& routing,
                         const std::string& name) {
  std::vector<std::int64_t> choice = file.integers(name);
  const Index k = static_cast<Index>(choice.size()) / std::max<Index>(1, routing.tokens());
  for (std::size_t i = 0; i < choice.size(); ++i) {
    const Index t = static_cast<Index>(i) / k;
    const auto begin = routing.expert.begin() + routing.first(t);
    const auto end = routing.expert.begin() + routing.last(t);
    if (std::find(begin, end, choice[i]) == end || end - begin != k) choice[i] = -1;
  }
  checker.integers(name, choice);
}

/// Runs the decoder forward and backward, and compares logits, losses and what the routers decide.
///
/// The reference's balancing loss is one for all layers: it counts choices and averages
/// probabilities over the tokens of all layers laid end to end. Its f_e are those of all layers, so
/// that each layer has to know the loads of the others before it can tell its share of the loss: a
/// first pass counts them.
///
/// \param make      Makes a Decoder<double>; its argument are `Loads`, or none for the first pass.
/// \param coefficient  Of the balancing loss, which the file has unscaled.
/// \return          The decoder, with its gradients.
template <class Moe, class Make>
Decoder<double> check_decoder(CaseFile& file, Checker& checker, const DecoderInputs& in,
                              double coefficient, Make&& make) {
  Decoder<double>::Cache cache;
  Loads loads;
  {
    const Decoder<double> first = make(loads);
    PassRecord record(PassRecord::Collects::kLossesAndReports);
    Pass pass = in.pass();
    pass.record = &record;
    first.forward(in.ids, pass, cache);
    for (const PassRecord::NamedReport& named : record.reports()) {
      const std::vector<Index>& load = named.report.load;
      loads.push_back(Eigen::Map<const RowVector<Index>>(load.data(), in.experts).cast<double>());
    }
  }
  Decoder<double> decoder = make(loads);
  const CrossEntropy<double> objective;
  CrossEntropy<double>::Cache loss_cache;
  PassRecord record;
  Pass pass = in.pass();
  pass.record = &record;
  const Matrix<double> logits = decoder.forward(in.ids, pass, cache);
  const double loss = objective.forward(logits, in.targets, loss_cache);
  checker.reals("out.logits", logits);
  checker.scalar("out.ce_loss", loss);
  checker.scalar("out.aux_loss", record.aux_loss() / coefficient);
  checker.scalar("out.loss", loss + record.aux_loss());

  for (Index l = 0; l < in.layers; ++l) {
    const std::string prefix = "out.layers." + std::to_string(l) + ".";
    const auto i = static_cast<std::size_t>(l);
    const Branch<double>& branch = decoder.layers()[i].branches()[1];
    const Matrix<double> x = infer(branch.norm, cache.layers[i].branches[0].out);
    typename Moe::Cache moe;
    branch.layer.get<Moe>()->forward(x, in.pass(), moe);
    if (file.has(prefix + "router_logits")) {
      checker.reals(prefix + "router_logits", moe.routing.logits);
    }
    if (file.has(prefix + "router_probs")) {
      checker.reals(prefix + "router_probs", moe.routing.probabilities);
    }
    check_choice(checker, file, moe.routing, prefix + "topk_idx");
    checker.reals(prefix + "combine_dense", dense_weights(moe.routing));
  }

  decoder.backward(objective.backward(loss_cache), cache);
  return decoder;
}

/// Compares the logits of each sequence decoded token by token, and of all of them together.
inline void check_decoding(Checker& checker, const Decoder<double>& decoder,
                           const DecoderInputs& in) {
  const Sequences one_each = Sequences::uniform(in.batch, 1);
  const auto batch = static_cast<std::size_t>(in.batch);
  std::vector<Decoder<double>::State> states(batch);
  std::vector<Decoder<double>::State*> pointers;
  pointers.reserve(batch);
  for (Decoder<double>::State& state : states) pointers.push_back(&state);
  Decoder<double>::Cache cache;
  Matrix<double> logits(in.batch * in.seq, in.vocab);
  for (Index t = 0; t < in.seq; ++t) {
    std::vector<Index> ids;
    for (Index b = 0; b < in.batch; ++b) {
      ids.push_back(in.ids[static_cast<std::size_t>(b * in.seq + t)]);
    }
    const Matrix<double>& next = decoder.decode(ids, {.sequences = &one_each}, pointers, cache);
    for (Index b = 0; b < in.batch; ++b) logits.row(b * in.seq + t) = next.row(b);
  }
  checker.section("Decoding all sequences together, token by token");
  checker.reals("out.logits", logits);
}

}  // namespace weir::golden
