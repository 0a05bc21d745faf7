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
CheckCase check_megatron_dropping;
CheckCase check_noisy_top_k;
CheckCase check_expert_choice;
CheckCase check_megatron_losses;
CheckCase check_other_aux_losses;
CheckCase check_gpt_oss;

struct Family {
  int number;
  const char* what;
  CheckCase* check;
};

inline constexpr Family kFamilies[] = {
    {1, "Mixtral, OLMoE and Qwen2-MoE layers", check_mixtral_block},
    {2, "DBRX layer", check_dbrx_ffn},
    {3, "Switch layer", check_switch_top1},
    {7, "ST-MoE layer", check_st_moe_top2},
    {8, "Megatron-Core token dropping", check_megatron_dropping},
    {6, "Shazeer's noisy top-k layer", check_noisy_top_k},
    {15, "Expert-choice layer", check_expert_choice},
    {8, "Megatron-Core losses", check_megatron_losses},
    {16, "Tutel and MegaBlocks losses", check_other_aux_losses},
    {17, "gpt-oss layer", check_gpt_oss},
};

}  // namespace weir::golden
