#!/usr/bin/env bash
# The figures of the README's section "Speed", one JSON file a case: tools/gpu_figures.sh OUT [CORPUS]
# Takes one Hopper GPU of 140 GB about 20 minutes; CASES="text_4k_bf16 peers_text_4k" takes some of them only.
# With GIB=80 the cases of text have the micro-batches that an H100 holds, and the steps that they divide.
# A case's file is there as soon as the case has ended, so that nothing is lost when the time runs out.
set -u
out=${1:?folder for the results} corpus=${2:-outputs/bench/corpus}
mkdir -p "$out"
ours=(parallel.distributed_optimizer=true data.decode.prefetch=32)
graphs=(train.cuda_graphs=true)
fp8=(precision="${FP8:-fp8_delayed}")
one=(data.max_documents=1)  # CUDA graphs have a fixed number of documents; packs of one are a dense batch

case_of() {
  case ${GIB:-140}_$1 in
    80_text_4k_bf16) echo train bench/text_4k "${ours[@]}" train.micro_batch_size=3 train.global_batch_size=12 ;;
    80_text_4k_bf16_graphs) echo train bench/text_4k "${ours[@]}" train.micro_batch_size=3 train.global_batch_size=12 "${graphs[@]}" "${one[@]}" ;;
    80_text_4k_fp8) echo train bench/text_4k "${ours[@]}" train.micro_batch_size=2 train.global_batch_size=12 "${graphs[@]}" "${one[@]}" "${fp8[@]}" ;;
    80_text_8k_fp8) echo train bench/text_8k "${ours[@]}" train.micro_batch_size=1 "${graphs[@]}" "${one[@]}" "${fp8[@]}" ;;
    80_peers_text_4k) echo peers bench/text_4k --no-ours --micro-batches 2 train.global_batch_size=12 ;;
    80_peers_text_8k) echo peers bench/text_8k --no-ours --micro-batches 1 ;;
    80_*) echo "no case $1 for a GPU of 80 GB" >&2; return 1 ;;
    *_text_4k_bf16) echo train bench/text_4k "${ours[@]}" train.micro_batch_size=4 "${graphs[@]}" "${one[@]}" ;;
    *_text_4k_fp8) echo train bench/text_4k "${ours[@]}" train.micro_batch_size=4 "${graphs[@]}" "${one[@]}" "${fp8[@]}" ;;
    *_text_8k_fp8) echo train bench/text_8k "${ours[@]}" train.micro_batch_size=2 "${graphs[@]}" "${one[@]}" "${fp8[@]}" ;;
    *_text_32k_bf16) echo train bench/text_32k "${ours[@]}" train.micro_batch_size=1 ;;
    *_mixed_bf16) echo train bench/mixed "${ours[@]}" train.micro_batch_size=2 "${graphs[@]}" data.max_documents=16 ;;
    *_mixed_fp8) echo train bench/mixed "${ours[@]}" train.micro_batch_size=2 "${graphs[@]}" data.max_documents=16 "${fp8[@]}" ;;
    *_peers_text_4k) echo peers bench/text_4k --no-ours --micro-batches 2,4 ;;
    *_peers_text_8k) echo peers bench/text_8k --no-ours --micro-batches 1,2 ;;
    *_peers_mixed) echo peers bench/mixed --no-ours --micro-batches 1,2 ;;
    *_vision) echo vision --tiles 64 ;;
    *_vision_fp8) echo vision --tiles 128 precision=fp8_current "precision.fp8.parts=[vision,language]" ;;
    *) echo "no case $1" >&2; return 1 ;;
  esac
}

all="text_4k_bf16 peers_text_4k text_4k_fp8 vision vision_fp8 mixed_bf16 peers_mixed mixed_fp8 text_8k_fp8 peers_text_8k text_32k_bf16"
[[ ${GIB:-140} == 80 ]] && all="text_4k_bf16 peers_text_4k text_4k_fp8 text_8k_fp8 peers_text_8k"
for name in ${CASES:-$all}; do
  words=$(case_of "$name") || exit 1
  options=(--json "$out/$name.json")
  [[ $name == vision* ]] || options+=(--steps "${STEPS:-10}" --warmup 3 --corpus "$corpus" data.index="$out/index")
  # Less memory is lost between tensors that way; CUDA graphs don't go with it.
  case $words in
    *cuda_graphs=true*) unset PYTORCH_CUDA_ALLOC_CONF ;;
    *) export PYTORCH_CUDA_ALLOC_CONF=expandable_segments:True ;;
  esac
  echo "== $name: nemo-bluelm bench $words"
  # shellcheck disable=SC2086
  python3 -m nemo_bluelm.cli.main bench $words "${options[@]}" 2>&1 | tr '\r' '\n' | grep -v 'create cuda graphs' | tail -8
done
