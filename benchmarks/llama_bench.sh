#!/bin/sh
# SPDX-License-Identifier: MIT
# The same random models in weir and in llama.cpp's own benchmark, or that of a fork such as
# ik_llama.cpp: prompts of 512 tokens, and one token at a time, in weir behind a prompt of 128, in
# the others from the first on. Weights are bfloat16; both models together take 7 GB of disk, see
# pretrained_bench.cpp.
#
#     benchmarks/llama_bench.sh build/bench/benchmarks/pretrained_bench PATH/llama-bench...
set -eu
if [ $# -lt 2 ]; then
  sed -n '3,8s/^# \{0,1\}//p' "$0"
  exit 1
fi
weir=$1
shift
threads=$(nproc)
folder=${WEIR_BENCH_FOLDER:-${TMPDIR:-/tmp}/weir_pretrained}
"$weir" "--benchmark_filter=^pretrained/(mix|fine)/(gguf|prefill/bf16|decode/bf16)/threads:$threads/"
for program; do
  for shape in mix fine; do
    echo "$program: $shape"
    "$program" -m "$folder/$shape/model.gguf" -t "$threads" -ngl 0 -p 512 -n 0 -r 5
    "$program" -m "$folder/$shape/model.gguf" -t "$threads" -ngl 0 -p 0 -n 32 -r 5
  done
done
