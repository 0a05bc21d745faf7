// SPDX-License-Identifier: MIT
// Multi-head latent attention as in DeepSeek-V3's own inference code, by its naive and its absorbed
// path.
#include <algorithm>
#include <span>
#include <string>
#include <vector>

#include <weir/attention/latent.hpp>

#include "golden/families.hpp"
#include "golden/latent_case.hpp"
#include "golden/moe_case.hpp"

namespace weir::golden {
namespace {

LatentConfig read_config(CaseFile& file) {
  LatentConfig config = read_latent_config(file);
  read_yarn(file, config);
  return config;
}

LatentAttention<double> read_layer(CaseFile& file, const LatentConfig& config) {
  Rng rng(0);
  LatentAttention<double> layer(rng, config);
  for (auto& [name, parameter] : parameters(layer)) {
    parameter->value = latent_weight(file, config, "w.", name, parameter->value);
  }
  return layer;
}

/// Decodes the sequences of x side by side, `chunk` tokens of each at a time.
Matrix<double> decode(const LatentAttention<double>& layer, const Matrix<double>& x, Index batch,
                      Index chunk, std::vector<LatentCache<double>>& kept) {
  kept.assign(static_cast<std::size_t>(batch), {});
  std::vector<LatentCache<double>*> states;
  for (auto& state : kept) states.push_back(&state);
  LatentAttention<double>::Cache cache;
  const Index seq = x.rows() / batch;
  Matrix<double> y(x.rows(), x.cols());
  for (Index t = 0; t < seq; t += chunk) {
    const Index count = std::min(chunk, seq - t);
    const Sequences sequences = Sequences::uniform(batch, count);
    Matrix<double> tokens(batch * count, x.cols());
    for (Index b = 0; b < batch; ++b) {
      tokens.middleRows(b * count, count) = x.middleRows(b * seq + t, count);
    }
    const Matrix<double>& out = layer.decode(tokens, Pass{.sequences = &sequences}, states, cache);
    for (Index b = 0; b < batch; ++b) {
      y.middleRows(b * seq + t, count) = out.middleRows(b * count, count);
    }
  }
  return y;
}

void check_angles(CaseFile& file, Checker& checker, const LatentConfig& config) {
  const Rope rope(config.rope_dim, {.theta = config.rope_theta,
                                    .layout = RopeLayout::kInterleaved,
                                    .scaling = config.rope_scaling});
  std::vector<Index> positions;
  for (Index t = 0; t < file.size("seq"); ++t) positions.push_back(t);
  Scratch<double> table;
  rope.tabulate(std::span<const Index>(positions), table);
  checker.reals("out.freqs_cos", table.view().leftCols(config.rope_dim / 2));
  checker.reals("out.freqs_sin", table.view().rightCols(config.rope_dim / 2));
}

void check_decoding(CaseFile& file, Checker& checker, const LatentConfig& config,
                    const Matrix<double>& x) {
  const Index batch = file.size("batch");
  for (const LatentDecoding way : {LatentDecoding::kAbsorbed, LatentDecoding::kExpanded}) {
    const bool absorbed = way == LatentDecoding::kAbsorbed;
    LatentConfig config_of_way = config;
    config_of_way.decoding = way;
    const LatentAttention<double> layer = read_layer(file, config_of_way);
    for (const Index chunk : {Index{1}, Index{3}, x.rows()}) {
      checker.section(std::string(absorbed ? "absorbed" : "expanded") + " decoding, " +
                      std::to_string(std::min(chunk, x.rows() / batch)) + " at a time");
      std::vector<LatentCache<double>> kept;
      const Matrix<double> y = decode(layer, x, batch, chunk, kept);
      checker.reals(absorbed ? "out.y_absorb" : "out.y", y);
      Matrix<double> rows(x.rows(), config.kv_rank + config.rope_dim);
      for (Index b = 0; b < batch; ++b) {
        const LatentCache<double>& state = kept[static_cast<std::size_t>(b)];
        rows.middleRows(b * state.length(), state.length()) = state.matrix();
      }
      checker.reals("out.kv_cache_normed_latent", rows.leftCols(config.kv_rank));
      checker.reals("out.pe_cache", rows.rightCols(config.rope_dim));
    }
  }
}

}  // namespace

void check_mla(CaseFile& file, Checker& checker) {
  const LatentConfig config = read_config(file);
  const std::vector<Index> shape = {file.size("batch"), file.size("seq"), config.d_model};
  const Matrix<double> x = file.matrix("in.x", shape);
  const Matrix<double> cotangent = matrix_or_zero(file, "in.cotangent", shape);
  const Sequences sequences = Sequences::uniform(shape[0], shape[1]);
  check_angles(file, checker, config);

  LatentAttention<double> layer = read_layer(file, config);
  LatentAttention<double>::Cache cache;
  const Matrix<double> y = layer.forward(x, Pass{.training = true, .sequences = &sequences}, cache);
  checker.reals("out.y", y);
  checker.scalar("out.loss", y.cwiseProduct(cotangent).sum());
  checker.reals("g.x", layer.backward(cotangent, cache));
  Gradients gradients(layer);
  check_latent_gradients(checker, gradients, config, "", "");
  gradients.finish(checker);
  check_decoding(file, checker, config, x);
}

}  // namespace weir::golden
