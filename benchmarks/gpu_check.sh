#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# Everything that needs a CUDA GPU, in about twenty minutes: what a new card must show first, kernel
# tests, compute-sanitizer, benchmarks, real vLLM serving with the plugin and without it, and vLLM's
# features beside it.
set -uo pipefail

usage() {
  cat <<'USAGE'
usage: benchmarks/gpu_check.sh [options]

  --quick          what the first ten minutes must show, within ten minutes; same as --call 1
  --call N         one of the three parts, of at most ten minutes each, that 30 minutes are for
  --plan           print that plan and run nothing
  --steps A,B,...  only these, in this order. All: env,install,first,kernels,sanitizer,gemm,moe,
                   launch,tiles,checkpoint,serving,features
  --only TEXT      in first, kernels and sanitizer only kernels whose symbol contains it
  --emulate        no GPU: every program to its end on the emulated one, with small shapes
  --bundle DIR     unpack the offline vLLM of DIR (site.tar.xz, unpack.sh) and use it
  --out DIR        results; default $OUT, else benchmarks/results/<gpu>-<date>
  --work DIR       scratch (package, vLLM, checkpoint), kept; default /tmp/vllm-nvfp4-gpu-check
  --model NAME     shape of the served checkpoint; default Qwen3-8B
  --engine-arg A   a flag of `vllm serve`, e.g. attention_backend=TRITON_ATTN; repeatable
  --dry-run        print the commands and run none
  -h, --help       this text

PYTHON names the interpreter (default python3). It needs torch with CUDA, triton, cuda-core and
cuda-bindings, setuptools, and for the last two steps vLLM. Every step has a time limit of its own
and a log in the results folder; one that fails does not stop the next. Exit status: 0 every step
passed, 1 a step failed or ran out of time, 2 wrong usage, 3 a step was not run. With OUT set, as
where a GPU is lent by the call, the results are packed into one file beside the summary.
USAGE
}

ALL_STEPS=env,install,first,kernels,sanitizer,gemm,moe,launch,tiles,checkpoint,serving,features
root=$(cd "$(dirname "$0")/.." && pwd)
here=$root/benchmarks
python=${PYTHON:-python3}
out=${OUT:-}
work=${TMPDIR:-/tmp}/vllm-nvfp4-gpu-check
steps=
model=Qwen3-8B
bundle=
only=
call=0
plan=0
emulate=0
dry_run=0
engine_args=()

# Seconds that a step may take: of a whole run, then of each call of ten minutes.
declare -A limit=([env]=60 [bundle]=180 [install]=300 [first]=60 [kernels]=300 [sanitizer]=120
  [gemm]=300 [moe]=300 [launch]=60 [tiles]=150 [checkpoint]=240 [serving]=540 [features]=540)
declare -A limit1=([env]=20 [install]=90 [first]=40 [kernels]=110 [sanitizer]=60
  [gemm]=75 [moe]=55 [launch]=20 [tiles]=40)
declare -A limit2=([env]=20 [install]=90 [kernels]=230 [sanitizer]=110)
declare -A limit3=([env]=20 [install]=90 [gemm]=220 [moe]=150 [tiles]=90)
declare -A limit4=([env]=20 [bundle]=120 [install]=60 [checkpoint]=60 [serving]=310)
sanitizers=(memcheck synccheck racecheck initcheck)
emulated_limit=600

first_page() {
  cat <<'PAGE'
What the first ten minutes on a new card must show, in this order; each rests on those before it.
 1. env        the driver knows CUDA 13 (580 or newer), and the card is the one that is meant
 2. install    every kernel is compiled for it
 3. first      FP8 subnormals enter the tensor cores with their value: 0.5 of a weight is 2^-7 there,
               which PTX leaves open. If not: serve with activation=16, and report the card
               the quantiser gives the reference's bits
               torch computes what a load computes with the CPU's bits
 4. kernels    every kernel on every shape within its tolerance, twice with the same bits, and no
               semaphore left other than zero
 5. sanitizer  no access out of bounds, no barrier that threads miss
 6. gemm, moe  M = 1: the share of the copy rate; M = 4096: of the roofline; the times Marlin's
 7. launch     a product costs the host less than 10 us
 8. tiles      dispatch's choice loses less than 1.1 times on average to the best tile
PAGE
}

print_plan() {
  cat <<'PLAN'
30 minutes on a GPU, in three calls of at most ten minutes each:
  benchmarks/gpu_check.sh --call 1                 all of the first page, less of each
  benchmarks/gpu_check.sh --call 2                 every kernel test; racecheck and initcheck
  benchmarks/gpu_check.sh --call 3                 full tables of gemm, moe and tiles
  benchmarks/gpu_check.sh --call 3 --bundle DIR    or, with an offline vLLM: serve, against Marlin
Each call is whole: it installs what it needs, and packs its results into less than 16 MiB.
PLAN
}

die() {
  echo "gpu_check: $1" >&2
  exit 2
}

while [ $# -gt 0 ]; do
  case $1 in
    --quick) call=1 ;;
    --plan) plan=1 ;;
    --emulate) emulate=1 ;;
    --dry-run) dry_run=1 ;;
    -h | --help) usage && exit 0 ;;
    --steps | --call | --only | --bundle | --out | --work | --model | --engine-arg)
      [ $# -ge 2 ] || die "$1 needs a value"
      case $1 in
        --steps) steps=$2 ;;
        --call) call=$2 ;;
        --only) only=$2 ;;
        --bundle) bundle=$(realpath -m "$2") ;;
        --out) out=$2 ;;
        --work) work=$2 ;;
        --model) model=$2 ;;
        --engine-arg) engine_args+=("--$2") ;;
      esac
      shift
      ;;
    *) die "unknown option $1 (--help lists them)" ;;
  esac
  shift
done

[[ $call == [0-3] ]] || die "--call $call: needs 1, 2 or 3"
[ "$call" = 3 ] && [ -n "$bundle" ] && call=4
if [ "$call" != 0 ]; then
  declare -n these="limit$call"
  for step in "${!these[@]}"; do limit[$step]=${these[$step]}; done
fi
[ "$call" != 1 ] || sanitizers=(memcheck synccheck)
has_bundle=0
[ -z "$bundle" ] || [ "$call" = 2 ] || has_bundle=1
[ "$call" != 2 ] || sanitizers=(racecheck initcheck)
if [ -z "$steps" ]; then
  case $call in
    0) steps=$ALL_STEPS ;;
    1)
      steps=env,install,first,kernels,sanitizer,gemm,moe,launch,tiles
      if [ $has_bundle = 1 ]; then # time for it is taken from the last step and two others
        steps=${steps%,tiles} limit[bundle]=100 limit[install]=60 limit[moe]=45
      fi
      ;;
    2) steps=env,install,kernels,sanitizer ;;
    3) steps=env,install,gemm,moe,tiles ;;
    4) steps=env,install,checkpoint,serving ;;
  esac
fi
[ $plan = 0 ] || { first_page && echo && print_plan && exit 0; }
if [ $emulate = 1 ]; then
  for step in "${!limit[@]}"; do limit[$step]=$emulated_limit; done
fi
IFS=, read -ra wanted <<<"$steps"
for step in "${wanted[@]}"; do
  [[ ,$ALL_STEPS, == *,$step,* ]] || die "unknown step '$step'; known: $ALL_STEPS"
done
if [ -n "$bundle" ] && [ ! -f "$bundle/unpack.sh" ] && [ $dry_run = 0 ]; then
  die "--bundle $bundle: no unpack.sh in it"
fi
command -v "$python" >/dev/null || die "$python not found; set PYTHON"

# "89 geforce-rtx-4090", or nothing without a GPU.
program=("$python")
gpu="89 emulated-rtx-4090"
[ $emulate = 0 ] || program+=("$here/emulated_gpu.py")
[ $emulate = 1 ] || gpu=$("$python" - <<'PY' 2>/dev/null
import torch
if torch.cuda.is_available():
    p = torch.cuda.get_device_properties(0)
    print(f"{p.major}{p.minor}", "-".join(p.name.lower().replace("nvidia", "").split()))
PY
)
arch=${gpu%% *}
gpu_name=${gpu#* }
out=$(realpath -m "${out:-$here/results/${gpu_name:-no-gpu}-$(date +%Y-%m-%d)}")
work=$(realpath -m "$work")
site=$work/site
[ $dry_run = 1 ] || mkdir -p "$out" "$work"

names=() states=() seconds=() notes=()

record() { # name state seconds note
  names+=("$1") states+=("$2") seconds+=("$3") notes+=("$4")
  printf '[%s] %s%s\n' "$1" "$2" "${4:+: $4}"
}

# The beginning and the end of a log that became long.
cut_log() {
  [ "$(stat -c %s "$1")" -gt 700000 ] || return 0
  { head -c 128K "$1" && printf '\n[... cut ...]\n' && tail -c 512K "$1"; } >"$1.cut"
  mv "$1.cut" "$1"
}

# run NAME COMMAND...: with the limit of its step, into NAME.log. Status 3 of the command: not run.
run() {
  local name=$1 most=${limit[${1%%-*}]} log=$out/$1.log begin=$SECONDS status
  shift
  if [ $dry_run = 1 ]; then
    printf '[%s] timeout %s %s\n' "$name" "$most" "$(printf '%q ' "$@")"
    return 0
  fi
  printf '[%s] at most %s s: %s\n' "$name" "$most" "$(printf '%q ' "$@")"
  timeout -k 10 "$most" "$@" >"$log" 2>&1
  status=$?
  cut_log "$log"
  case $status in
    0) record "$name" passed $((SECONDS - begin)) "" ;;
    3) record "$name" "not run" $((SECONDS - begin)) "$(tail -n 1 "$log")" ;;
    124 | 137) record "$name" "timed out" $((SECONDS - begin)) "limit $most s; $log" ;;
    *) record "$name" failed $((SECONDS - begin)) "exit status $status; $log" ;;
  esac
  [ $status = 0 ] || tail -n 15 "$log" | sed 's/^/    /'
  return $status
}

not_run() { record "$1" "not run" 0 "$2"; }

needs_gpu() { # name; true where a GPU is, or the commands are only printed
  [ -n "$gpu" ] || [ $dry_run = 1 ] || { not_run "$1" "no CUDA GPU" && return 1; }
}

step_env() {
  run env "${program[@]}" "$here/report_environment.py"
  [ $dry_run = 1 ] || sed 's/^/    /' "$out/env.log"
}

step_install() {
  if [ $has_bundle = 1 ]; then
    if [ -d "$work/vllm-site/vllm" ]; then
      record bundle passed 0 "unpacked before"
    else
      run bundle bash "$bundle/unpack.sh" "$work/vllm-site"
    fi
  fi
  run install env NVFP4_BUILD_CUBINS="${arch:-0}" "$python" -m pip install --no-deps \
    --no-build-isolation --no-index --disable-pip-version-check --upgrade --target "$site" "$root"
}

step_first() {
  needs_gpu first || return
  run first "${program[@]}" "$here/check_kernels.py" --first --only "$only"
  [ $dry_run = 1 ] || sed 's/^/    /' "$out/first.log"
}

step_kernels() {
  needs_gpu kernels || return
  if [ $emulate = 1 ]; then
    run kernels "${program[@]}" "$here/check_kernels.py" --small --only "$only"
  elif [ -z "$only" ] && "$python" -c 'import pytest' 2>/dev/null; then
    local part=()
    [ "$call" != 1 ] || part=(-k 'not every_kind_of_data')
    run kernels "$python" -m pytest -p no:cacheprovider -m gpu --maxfail 20 \
      ${part[@]+"${part[@]}"} "$root/tests/kernels/cuda/test_cuda_kernels.py" \
      "$root/tests/kernels/cuda/test_cuda_moe.py"
  else
    echo "[kernels] check_kernels.py runs the products of the tests"
    run kernels "$python" "$here/check_kernels.py" --only "$only"
  fi
}

step_sanitizer() {
  needs_gpu sanitizer || return
  local tool
  tool=$(command -v compute-sanitizer || ls /usr/local/cuda*/bin/compute-sanitizer 2>/dev/null |
    tail -n 1)
  if [ -z "$tool" ] && [ $dry_run = 0 ]; then
    not_run sanitizer "compute-sanitizer is not installed (it comes with the CUDA toolkit)"
    return
  fi
  for check in "${sanitizers[@]}"; do
    local part=$only
    [ -n "$part" ] || [ "$check" = memcheck ] || part=bf16
    # Each tensor in memory of its own: torch cuts small ones from blocks of 2 MB, inside which no
    # access is out of bounds.
    run "sanitizer-$check" env PYTORCH_NO_CUDA_MEMORY_CACHING=1 "${tool:-compute-sanitizer}" \
      --tool "$check" --error-exitcode 9 \
      "${program[@]}" "$here/check_kernels.py" --small --only "$part"
  done
}

# The shapes that the emulated GPU can run through.
tiny=(--models tiny --m 1,20 --seconds 0)

step_gemm() {
  needs_gpu gemm || return
  local extra=(--budget 150)
  [ "$call" != 1 ] || extra=(--models Qwen3-8B --m 1,8,64,256,1024,4096 --budget 45)
  [ "$call" != 3 ] || extra=(--budget 180)
  [ $emulate = 0 ] || extra=("${tiny[@]}" --backends ours,ours-w4a16,ours-w4a8,cublas-bf16)
  # FP8 mma.sync is emulated on Hopper: its twin with integer MMA shows the schedule's speed.
  [ "${arch:-0}" != 90 ] || extra+=(--stand-in)
  run gemm "${program[@]}" "$here/bench_gemm.py" --out "$out/gemm.csv" "${extra[@]}"
}

step_moe() {
  needs_gpu moe || return
  local extra=(--budget 150)
  [ "$call" != 1 ] || extra=(--models Qwen3-30B-A3B --m 1,8,64,1024 --budget 30)
  [ "$call" != 3 ] || extra=(--budget 110)
  [ $emulate = 0 ] || extra=("${tiny[@]}" --routings uniform --backends ours,ours-w4a16,ours-w4a8)
  run moe "${program[@]}" "$here/bench_moe.py" --out "$out/moe.csv" "${extra[@]}"
}

step_launch() {
  needs_gpu launch || return
  local extra=(--limit 10)
  [ $emulate = 0 ] || extra=(--count 9)
  run launch "${program[@]}" "$here/bench_launch.py" --out "$out/launch.csv" "${extra[@]}"
}

step_tiles() {
  needs_gpu tiles || return
  local extra=(--budget 90)
  [ "$call" != 1 ] || extra=(--models Qwen3-8B --m 1,16,64 --budget 25)
  [ "$call" != 3 ] || extra=(--budget 60)
  [ $emulate = 0 ] || extra=(--models tiny --m 3 --seconds 0)
  run tiles "${program[@]}" "$here/bench_tiles.py" --out "$out/tiles.csv" "${extra[@]}"
}

step_checkpoint() {
  [ $emulate = 0 ] || model=tiny
  run checkpoint "$python" "$here/make_random_checkpoint.py" --model "$model" \
    --out "$work/$model-random" --keep
}

needs_vllm() { # name; true where it can be imported, or the commands are only printed
  [ $dry_run = 1 ] || "$python" -c 'import vllm' >/dev/null 2>&1 ||
    { not_run "$1" "vLLM cannot be imported (--bundle DIR brings one)" && return 1; }
}

step_serving() {
  needs_gpu serving || return
  if [ $emulate = 1 ]; then
    not_run serving "vLLM for CUDA serves on no emulated GPU"
    return
  fi
  needs_vllm serving || return
  local checkpoint=$work/$model-random
  if [ $dry_run = 0 ] && [ ! -f "$checkpoint/model.safetensors.index.json" ]; then
    not_run serving "no checkpoint at $checkpoint (the step checkpoint writes it)"
    return
  fi
  local extra=(--turns 2 --load-requests 32)
  [ "$call" = 0 ] || extra=(--turns 1 --tokens 64 --load-requests 0)
  run serving "$python" -m vllm_nvfp4.cli.main bench "$checkpoint" --batches 1,8,32,128 \
    --against "stock --linear-backend marlin" --out "$out/serving-$(date +%H%M%S)" "${extra[@]}" \
    -- ${engine_args[@]+"${engine_args[@]}"}
}

step_features() {
  needs_gpu features || return
  needs_vllm features || return
  local part=()
  [ "$call" = 0 ] || part=(--only "Prefix caching" --only "Sleep and wake")
  # vLLM's CPU build, whose engine is real.
  [ $emulate = 0 ] || part=(--only "Prefix caching")
  run features "$python" "$here/check_features.py" ${part[@]+"${part[@]}"}
}

summary() {
  local i num_failed=0 num_passed=0
  printf '\n%-22s %-10s %6s  %s\n' step state time note
  for i in "${!names[@]}"; do
    printf '%-22s %-10s %4d s  %s\n' "${names[i]}" "${states[i]}" "${seconds[i]}" "${notes[i]}"
    case ${states[i]} in
      passed) num_passed=$((num_passed + 1)) ;;
      failed | "timed out") num_failed=$((num_failed + 1)) ;;
    esac
  done
  printf '%d passed, %d failed, %d not run\n' "$num_passed" "$num_failed" \
    $((${#names[@]} - num_passed - num_failed))
  [ $num_failed = 0 ] || return 1
  [ $num_passed = ${#names[@]} ] || return 3
}

# Where only a few files come back: all of them in one, but for the summary.
pack_results() {
  local packed
  packed=$(mktemp "$work/results.XXXXXX") || return
  tar -czf "$packed" -C "$out" . && find "$out" -mindepth 1 -not -name summary.txt -delete &&
    mv "$packed" "$out/results.tar.gz"
}

# Installed copies come first: they hold the cubins. The checkout is for when install failed.
export PYTHONPATH="$site:$work/vllm-site${PYTHONPATH:+:$PYTHONPATH}:$root"
export VLLM_NVFP4_CACHE_DIR="$work/cache"
[ $dry_run = 1 ] || first_page
for step in "${wanted[@]}"; do
  before=${#names[@]}
  "step_$step"
  [ $dry_run = 1 ] || [ ${#names[@]} -gt "$before" ] ||
    record "$step" failed 0 "it left no outcome"
done
[ $dry_run = 0 ] || exit 0
{ summary; } | tee "$out/summary.txt"
status=${PIPESTATUS[0]}
[ -z "${OUT:-}" ] || pack_results
echo "results: $out"
exit "$status"
