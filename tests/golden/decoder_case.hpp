// SPDX-License-Identifier: MIT
/// \file
/// What the cases of a whole decoder with Hugging Face's loss have in common.
#pragma once

#include <algorithm>
#include <cstdint>
#include <span>
#include <string>
#include <utility>
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

/// Tokens, labels and padding, and the sizes.
///
/// Padding is where in.attention_mask is zero or, in a file with cfg.left_padding and without a
/// mask, in front of the first label of a sequence. The token before the first real one has that as
/// its target; what the reference predicts from a row of padding, which sees nothing, is its own
/// affair. A file whose loss counts such targets has a loss and gradients that cannot be compared.
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
    tied = file.flag_or("tied_embedding", false);
    ignore_index = static_cast<Index>(file.number_or("ignore_index", -100.0));
    const std::vector<std::int64_t> tokens = file.integers("in.tokens", {batch, seq});
    const std::vector<std::int64_t> labels =
        file.has("in.labels") ? file.integers("in.labels", {batch, seq}) : tokens;
    ids.assign(tokens.begin(), tokens.end());
    read_mask(file, labels);
    // The target of a token is the label of the next.
    targets.assign(labels.begin() + 1, labels.end());
    targets.push_back(0);
    for (Index t = 0; t < batch * seq; ++t) {
      Index& target = targets[static_cast<std::size_t>(t)];
      if ((t + 1) % seq == 0) target = ignore_index;
      if (!pass().is_padding(t) || target == ignore_index) continue;
      target = ignore_index;
      predicts_from_padding = true;
    }
  }

  Pass pass() const { return {.training = true, .sequences = &sequences, .mask = mask}; }

  /// `ours` with the rows of padding as the tensor `name` has them.
  Matrix<double> with_padding_of(CaseFile& file, const std::string& name,
                                 Matrix<double> ours) const {
    if (mask.empty() || !file.has(name)) return ours;
    const Matrix<double> theirs = file.matrix(name);
    for (Index t = 0; t < ours.rows() && theirs.rows() == ours.rows(); ++t) {
      if (pass().is_padding(t)) ours.row(t) = theirs.row(t);
    }
    return ours;
  }

  Index batch, seq, vocab, d_model, d_ff, layers, heads, kv_heads, experts, k;
  bool tied = false;
  bool predicts_from_padding = false;
  Index ignore_index = -100;
  std::vector<Index> ids, targets;
  std::vector<std::uint8_t> mask;  ///< Empty without padding.
  Sequences sequences;

 private:
  void read_mask(CaseFile& file, const std::vector<std::int64_t>& labels) {
    const bool left = file.flag_or("left_padding", false);
    std::vector<std::uint8_t> real(ids.size(), 1);
    if (file.has("in.attention_mask")) {
      const std::vector<std::int64_t> ones = file.integers("in.attention_mask", {batch, seq});
      for (std::size_t t = 0; t < real.size(); ++t) real[t] = ones[t] != 0 ? 1 : 0;
    } else if (left) {
      for (Index b = 0; b < batch; ++b) {
        for (auto t = static_cast<std::size_t>(b * seq);
             t < static_cast<std::size_t>((b + 1) * seq); ++t) {
          if (labels[t] != ignore_index) break;
          real[t] = 0;
        }
      }
    }
    if (std::find(real.begin(), real.end(), 0) != real.end()) mask = std::move(real);
  }
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

/// Runs the decoder forward and backward, and compares logits, losses and what the routers decide.
///
/// The reference's balancing loss is one for all layers: it counts choices and averages
/// probabilities over the tokens of all layers laid end to end. Its f_e are those of all layers, so
/// that each layer has to know the loads of the others before it can tell its share of the loss: a
/// first pass counts them.
///
/// \param make      Makes a Decoder<double> from a coefficient of the balancing loss and `Loads`,
/// or
///                  none for the first pass.
/// \param coefficient  That of the file, which has the balancing loss unscaled.
/// \return          The decoder, with its gradients.
template <class Moe, class Make>
Decoder<double> check_decoder(CaseFile& file, Checker& checker, const DecoderInputs& in,
                              double coefficient, Make&& make) {
  Decoder<double>::Cache cache;
  Loads loads;
  {
    const Decoder<double> first = make(1.0, loads);
    PassRecord record(PassRecord::Collects::kLossesAndReports);
    Pass pass = in.pass();
    pass.record = &record;
    first.forward(in.ids, pass, cache);
    for (const PassRecord::NamedReport& named : record.reports()) {
      const std::vector<Index>& load = named.report.load;
      loads.push_back(Eigen::Map<const RowVector<Index>>(load.data(), in.experts).cast<double>());
    }
  }
  const auto with_record = [&](PassRecord& record) {
    Pass pass = in.pass();
    pass.record = &record;
    return pass;
  };
  PassRecord unscaled, record;
  make(1.0, loads).forward(in.ids, with_record(unscaled), cache);
  Decoder<double> decoder = make(coefficient, loads);
  const CrossEntropy<double> objective({.ignore_index = in.ignore_index});
  CrossEntropy<double>::Cache loss_cache;
  const Matrix<double> logits = decoder.forward(in.ids, with_record(record), cache);
  const double loss = objective.forward(logits, in.targets, loss_cache);
  checker.reals("out.logits", in.with_padding_of(file, "out.logits", logits));
  checker.scalar("out.aux_loss", unscaled.aux_loss());
  if (in.predicts_from_padding || loss_cache.tokens == 0) {
    const std::string why = in.predicts_from_padding ? "it counts what padding predicts"
                                                     : "there is nothing to predict";
    for (const char* name : {"out.ce_loss", "out.loss", "g."}) checker.leave(name, why);
  } else {
    checker.scalar("out.ce_loss", loss);
    checker.scalar("out.loss", loss + record.aux_loss());
  }

  for (Index l = 0; l < in.layers; ++l) {
    const std::string prefix = "out.layers." + std::to_string(l) + ".";
    const auto i = static_cast<std::size_t>(l);
    const Branch<double>& branch = decoder.layers()[i].branches()[1];
    const Matrix<double> x = infer(branch.norm, cache.layers.layers[i].branches[0].out);
    typename Moe::Cache moe;
    branch.layer.get<Moe>()->forward(x, in.pass(), moe);
    const auto check = [&](const std::string& name, const Matrix<double>& ours) {
      checker.reals(prefix + name, in.with_padding_of(file, prefix + name, ours));
    };
    check("router_logits", moe.routing.logits);
    check("router_probs", moe.routing.probabilities);
    check_choice(checker, file, moe.routing, prefix + "topk_idx", in.pass());
    check("combine_dense", dense_weights(moe.routing));
  }

  decoder.backward(objective.backward(loss_cache), cache);
  return decoder;
}

/// A head that is the embedding may be in the file under its own name, too.
inline void check_tied(Checker& checker, const std::string& head, Decoder<double>& decoder) {
  const Parameter<double>& embedding = *parameters(decoder).front().parameter;
  checker.reals("w." + head, embedding.value);
  if (embedding.grad.size() > 0) checker.reals("g." + head, embedding.grad);
}

/// Compares the logits of each sequence, which may have padding, decoded by itself.
inline void check_decoding_without_padding(CaseFile& file, Checker& checker,
                                           const Decoder<double>& decoder,
                                           const DecoderInputs& in) {
  Matrix<double> logits = Matrix<double>::Zero(in.batch * in.seq, in.vocab);
  Decoder<double>::Cache cache;
  for (Index b = 0; b < in.batch; ++b) {
    Decoder<double>::State state;
    for (Index t = b * in.seq; t < (b + 1) * in.seq; ++t) {
      if (in.pass().is_padding(t)) continue;
      const std::span<const Index> id(&in.ids[static_cast<std::size_t>(t)], 1);
      logits.row(t) = decode(decoder, id, state, cache);
    }
  }
  checker.section("Decoding each sequence without its padding, token by token");
  checker.reals("out.logits", in.with_padding_of(file, "out.logits", logits));
}

/// Compares the logits of each sequence decoded token by token, and of all of them together.
inline void check_decoding(CaseFile& file, Checker& checker, const Decoder<double>& decoder,
                           const DecoderInputs& in) {
  if (!file.has("out.logits")) return;
  if (!in.mask.empty()) return check_decoding_without_padding(file, checker, decoder, in);
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
