// SPDX-License-Identifier: MIT
/// \file
/// The families of cases. A new one is a file beside this one, and a line in each half of this one.
#pragma once

#include "golden/case_file.hpp"
#include "golden/checker.hpp"

namespace weir::golden {

/// Rebuilds the case from its configuration, inputs and weights, and compares all it has in it.
/// \throws std::exception  if the file contradicts itself, or asks weir for what it refuses.
/// \throws UnknownCase     if it is a variant that is not known.
using CheckCase = void(CaseFile& file, Checker& checker);

CheckCase check_mixtral_block;
CheckCase check_dbrx_ffn;
CheckCase check_switch_top1;
CheckCase check_st_moe_top2;
CheckCase check_noisy_top_k;
CheckCase check_grouped_query;
CheckCase check_mixtral_decoder;
CheckCase check_dbrx_decoder;
CheckCase check_grok1_layer;
CheckCase check_expert_choice;
CheckCase check_other_aux_losses;
CheckCase check_gpt_oss;
CheckCase check_deepseek_v2_moe;
CheckCase check_deepseek_v3_moe;
CheckCase check_megatron;
CheckCase check_mla;
CheckCase check_deepseek_v3_decoder;

struct Family {
  int number;
  const char* what;
  CheckCase* check;
};

inline constexpr Family kFamilies[] = {
    {1, "Mixtral, OLMoE and Qwen2-MoE layers", check_mixtral_block},
    {2, "DBRX layer", check_dbrx_ffn},
    {3, "Switch layer", check_switch_top1},
    {4, "DeepSeek-V2 layer", check_deepseek_v2_moe},
    {5, "DeepSeek-V3 layer", check_deepseek_v3_moe},
    {6, "Shazeer's noisy top-k layer", check_noisy_top_k},
    {7, "ST-MoE layer", check_st_moe_top2},
    {8, "Megatron-Core's routing, dropping and losses", check_megatron},
    {9, "Multi-head latent attention", check_mla},
    {10, "Grouped-query attention with a window", check_grouped_query},
    {11, "Mixtral decoder", check_mixtral_decoder},
    {12, "DeepSeek-V3 decoder", check_deepseek_v3_decoder},
    {13, "DBRX decoder", check_dbrx_decoder},
    {14, "Grok-1 layer", check_grok1_layer},
    {15, "Expert-choice layer", check_expert_choice},
    {16, "Tutel and MegaBlocks losses", check_other_aux_losses},
    {17, "gpt-oss layer", check_gpt_oss},
};

}  // namespace weir::golden
