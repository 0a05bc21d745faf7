// SPDX-License-Identifier: MIT
/// \file
/// Latent attention under the names of DeepSeek's own code, which has the up-projections of keys
/// and values in one matrix.
#pragma once

#include <string>

#include <weir/attention/latent_config.hpp>
#include <weir/core/types.hpp>

#include "golden/case_file.hpp"
#include "golden/checker.hpp"

namespace weir::golden {

/// Sizes as DeepSeek names them.
inline LatentConfig read_latent_config(CaseFile& file) {
  return {.d_model = file.size("d_model"),
          .heads = file.size("n_heads"),
          .q_rank = static_cast<Index>(file.number_or("q_lora_rank", 0.0)),
          .kv_rank = file.size("kv_lora_rank"),
          .nope_dim = file.size("qk_nope_head_dim"),
          .rope_dim = file.size("qk_rope_head_dim"),
          .value_dim = file.size("v_head_dim"),
          .rope_theta = file.number_or("rope_theta", 1e4),
          .norm_epsilon = file.number_or("rms_eps", 1e-6)};
}

/// Sets the YaRN of DeepSeek's inference code, which has it if cfg.max_seq_len is above
/// cfg.original_seq_len; without these, cfg.yarn says so.
/// \throws FileError  if they contradict each other.
inline void read_yarn(CaseFile& file, LatentConfig& config) {
  const Index original = file.size_or("original_seq_len", 4096);
  const bool wanted = file.flag_or("yarn", false);
  const Index most = file.size_or("max_seq_len", wanted ? original + 1 : original);
  if (file.flag_or("yarn", most > original) != (most > original)) {
    throw_error<FileError>(file.path(), ": cfg.yarn contradicts cfg.max_seq_len");
  }
  const double mscale = file.number_or("mscale", 1.0);
  const Yarn yarn{.factor = file.number_or("rope_factor", 40.0),
                  .original_context = original,
                  .beta_fast = file.number_or("beta_fast", 32.0),
                  .beta_slow = file.number_or("beta_slow", 1.0),
                  .mscale = mscale,
                  .mscale_all_dim = mscale};
  if (most > original) config.rope_scaling = yarn;
}

/// What the file calls a parameter.
inline std::string latent_name(const LatentConfig& config, const std::string& parameter) {
  if (parameter == "query_down") return "wq_a.weight";
  if (parameter == "query_norm.weight") return "q_norm.weight";
  if (parameter == "query") return config.q_rank > 0 ? "wq_b.weight" : "wq.weight";
  if (parameter == "kv_down") return "wkv_a.weight";
  if (parameter == "key_up" || parameter == "value_up") return "wkv_b.weight";
  if (parameter == "output") return "wo.weight";
  return parameter;
}

/// The rows `first` to `first + rows` of each head, of which `from` has as many as fit.
inline Matrix<double> part_of_heads(const Matrix<double>& from, Index heads, Index first,
                                    Index rows) {
  const Index height = from.rows() / heads;
  Matrix<double> part(heads * rows, from.cols());
  for (Index h = 0; h < heads; ++h) {
    part.middleRows(h * rows, rows) = from.middleRows(h * height + first, rows);
  }
  return part;
}

/// The reverse: each head's rows of `upper` above those of `lower`.
inline Matrix<double> join_heads(const Matrix<double>& upper, const Matrix<double>& lower,
                                 Index heads) {
  const Index above = upper.rows() / heads;
  const Index below = lower.rows() / heads;
  Matrix<double> joined(upper.rows() + lower.rows(), upper.cols());
  for (Index h = 0; h < heads; ++h) {
    joined.middleRows(h * (above + below), above) = upper.middleRows(h * above, above);
    joined.middleRows(h * (above + below) + above, below) = lower.middleRows(h * below, below);
  }
  return joined;
}

/// The value of the parameter `name`, from the tensors that begin with `prefix`.
/// \param shaped  As large as it has to be.
inline Matrix<double> latent_weight(CaseFile& file, const LatentConfig& config,
                                    const std::string& prefix, const std::string& name,
                                    const Matrix<double>& shaped) {
  const std::string tensor = prefix + latent_name(config, name);
  if (name == "key_up" || name == "value_up") {
    const Matrix<double> both =
        file.matrix(tensor, {config.heads * (config.nope_dim + config.value_dim), config.kv_rank});
    return name == "key_up" ? part_of_heads(both, config.heads, 0, config.nope_dim)
                            : part_of_heads(both, config.heads, config.nope_dim, config.value_dim);
  }
  if (name.ends_with("norm.weight")) return file.matrix(tensor, {shaped.cols()});
  return file.matrix(tensor, {shaped.rows(), shaped.cols()});
}

/// Compares the gradients of the parameters that begin with `ours` with the tensors that begin with
/// `theirs`.
inline void check_latent_gradients(Checker& checker, Gradients& gradients,
                                   const LatentConfig& config, const std::string& ours,
                                   const std::string& theirs) {
  const auto check = [&](const std::string& name) {
    gradients.check(checker, ours + name, theirs + latent_name(config, name));
  };
  if (config.q_rank > 0) {
    check("query_down");
    check("query_norm.weight");
  }
  check("query");
  check("kv_down");
  check("kv_norm.weight");
  const Matrix<double> key_up = gradients.take(ours + "key_up");
  const Matrix<double> value_up = gradients.take(ours + "value_up");
  checker.reals("g." + theirs + "wkv_b.weight", join_heads(key_up, value_up, config.heads));
  check("output");
}

}  // namespace weir::golden
