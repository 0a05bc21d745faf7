// SPDX-License-Identifier: MIT
/// \file
/// All of weir, lowest layer first. A program compiles faster with the headers it uses.
#pragma once

// clang-format off
#include <weir/core/aligned.hpp>
#include <weir/core/error.hpp>
#include <weir/core/init.hpp>
#include <weir/core/layer.hpp>
#include <weir/core/parallel.hpp>
#include <weir/core/parameter.hpp>
#include <weir/core/pass.hpp>
#include <weir/core/random.hpp>
#include <weir/core/scratch.hpp>
#include <weir/core/sequences.hpp>
#include <weir/core/storage.hpp>
#include <weir/core/thread_pool.hpp>
#include <weir/core/types.hpp>

#include <weir/ops/activation.hpp>
#include <weir/ops/exp.hpp>
#include <weir/ops/lanes.hpp>
#include <weir/ops/logsumexp.hpp>
#include <weir/ops/normal.hpp>
#include <weir/ops/rope.hpp>
#include <weir/ops/softmax.hpp>
#include <weir/ops/top_k.hpp>
#include <weir/ops/trigonometry.hpp>

#include <weir/kernels/bfloat16.hpp>
#include <weir/kernels/matmul.hpp>
#include <weir/kernels/packed_product.hpp>
#include <weir/kernels/packed_weight.hpp>
#include <weir/kernels/panel.hpp>
#include <weir/kernels/register_block.hpp>
#include <weir/kernels/schedule.hpp>
#include <weir/kernels/thread_space.hpp>
#include <weir/kernels/transpose.hpp>
#include <weir/kernels/weight.hpp>

#include <weir/nn/cross_entropy.hpp>
#include <weir/nn/embedding.hpp>
#include <weir/nn/glu.hpp>
#include <weir/nn/layer_norm.hpp>
#include <weir/nn/linear.hpp>
#include <weir/nn/mlp.hpp>
#include <weir/nn/packed_glu.hpp>
#include <weir/nn/rms_norm.hpp>

#include <weir/moe/balance/bias_balance.hpp>
#include <weir/moe/balance/communication_loss.hpp>
#include <weir/moe/balance/device_loss.hpp>
#include <weir/moe/balance/entropy_loss.hpp>
#include <weir/moe/balance/expert_groups.hpp>
#include <weir/moe/balance/global_batch_loss.hpp>
#include <weir/moe/balance/gshard_loss.hpp>
#include <weir/moe/balance/importance_loss.hpp>
#include <weir/moe/balance/load_loss.hpp>
#include <weir/moe/balance/priced_probability.hpp>
#include <weir/moe/balance/quantile_balance.hpp>
#include <weir/moe/balance/relu_l1_loss.hpp>
#include <weir/moe/balance/second_place_loss.hpp>
#include <weir/moe/balance/switch_loss.hpp>
#include <weir/moe/balance/z_loss.hpp>
#include <weir/moe/capacity/adaptive_capacity.hpp>
#include <weir/moe/capacity/capacity_factor.hpp>
#include <weir/moe/capacity/device_capacity.hpp>
#include <weir/moe/capacity/dropless.hpp>
#include <weir/moe/capacity/dynamic_capacity.hpp>
#include <weir/moe/capacity/fixed_capacity.hpp>
#include <weir/moe/capacity/overflow.hpp>
#include <weir/moe/capacity/renormalise_kept.hpp>
#include <weir/moe/concepts.hpp>
#include <weir/moe/dispatch.hpp>
#include <weir/moe/expert_mask.hpp>
#include <weir/moe/experts/any_bank.hpp>
#include <weir/moe/experts/clamped_glu_bank.hpp>
#include <weir/moe/experts/expert_linear.hpp>
#include <weir/moe/experts/glu_bank.hpp>
#include <weir/moe/experts/input_weighted.hpp>
#include <weir/moe/experts/mlp_bank.hpp>
#include <weir/moe/experts/with_zero_experts.hpp>
#include <weir/moe/mixture_of_depths.hpp>
#include <weir/moe/moe_layer.hpp>
#include <weir/moe/report.hpp>
#include <weir/moe/residual_moe.hpp>
#include <weir/moe/router/cosine_router.hpp>
#include <weir/moe/router/gumbel_router.hpp>
#include <weir/moe/router/hash_router.hpp>
#include <weir/moe/router/input_dropout_router.hpp>
#include <weir/moe/router/jitter_router.hpp>
#include <weir/moe/router/linear_router.hpp>
#include <weir/moe/router/noise.hpp>
#include <weir/moe/router/noisy_router.hpp>
#include <weir/moe/router/scaled_input_router.hpp>
#include <weir/moe/router/temperature_router.hpp>
#include <weir/moe/routing.hpp>
#include <weir/moe/routing_trace.hpp>
#include <weir/moe/selector/balanced_assignment.hpp>
#include <weir/moe/selector/biased_softmax_top_k.hpp>
#include <weir/moe/selector/expert_choice.hpp>
#include <weir/moe/selector/group_limit.hpp>
#include <weir/moe/selector/rank_policy.hpp>
#include <weir/moe/selector/relu_routing.hpp>
#include <weir/moe/selector/replay.hpp>
#include <weir/moe/selector/score_function.hpp>
#include <weir/moe/selector/selection_bias.hpp>
#include <weir/moe/selector/sigmoid_top_k.hpp>
#include <weir/moe/selector/sinkhorn.hpp>
#include <weir/moe/selector/softmax_top_k.hpp>
#include <weir/moe/selector/sparse_mixer.hpp>
#include <weir/moe/selector/threshold.hpp>
#include <weir/moe/selector/top_k_softmax.hpp>
#include <weir/moe/selector/top_p.hpp>
#include <weir/moe/selector/variable_choice.hpp>
#include <weir/moe/shared_experts.hpp>
#include <weir/moe/soft_moe.hpp>

#include <weir/attention/causal.hpp>
#include <weir/attention/grouped_query.hpp>
#include <weir/attention/kv_cache.hpp>

#include <weir/model/any_layer.hpp>
#include <weir/model/block.hpp>
#include <weir/model/decoder.hpp>
#include <weir/model/generate.hpp>
#include <weir/model/interleave.hpp>
#include <weir/model/sampling.hpp>

#include <weir/optim/adamw.hpp>
#include <weir/optim/clip.hpp>
#include <weir/optim/schedule.hpp>

#include <weir/version.hpp>
// clang-format on
