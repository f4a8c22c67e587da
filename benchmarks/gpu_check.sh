#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# Everything that needs a CUDA GPU, in about fifteen minutes: kernel tests, compute-sanitizer,
# benchmarks, real vLLM serving with the plugin and without it, and vLLM's features beside it.
set -uo pipefail

usage() {
  cat <<'USAGE'
usage: benchmarks/gpu_check.sh [options]

  --quick          less of everything: about four minutes
  --steps A,B,...  only these, in this order. All: env,install,kernels,sanitizer,gemm,moe,
                   launch,tiles,checkpoint,serving,features
  --bundle DIR     unpack the offline vLLM of DIR (site.tar.xz, unpack.sh) and use it
  --out DIR        results; default $OUT, else benchmarks/results/<gpu>-<date>
  --work DIR       scratch (package, vLLM, checkpoint), kept; default /tmp/vllm-nvfp4-gpu-check
  --model NAME     shape of the served checkpoint; default Qwen3-8B
  --engine-arg A   a flag of `vllm serve`, e.g. attention_backend=TRITON_ATTN; repeatable
  --dry-run        print the commands and run none
  -h, --help       this text

PYTHON names the interpreter (default python3). It needs torch with CUDA, triton, cuda-core and
cuda-bindings, setuptools, and for the last two steps vLLM. Every step has a time limit of its own
and a log in the results folder; one that fails does not stop the next. Exit status: 0 all that ran
passed, 1 a step failed or ran out of time, 2 wrong usage, 3 nothing ran.
USAGE
}

ALL_STEPS=env,install,kernels,sanitizer,gemm,moe,launch,tiles,checkpoint,serving,features
root=$(cd "$(dirname "$0")/.." && pwd)
here=$root/benchmarks
python=${PYTHON:-python3}
out=${OUT:-}
work=${TMPDIR:-/tmp}/vllm-nvfp4-gpu-check
steps=$ALL_STEPS
model=Qwen3-8B
bundle=
quick=0
dry_run=0
engine_args=()

die() {
  echo "gpu_check: $1" >&2
  exit 2
}

while [ $# -gt 0 ]; do
  case $1 in
    --quick) quick=1 ;;
    --dry-run) dry_run=1 ;;
    -h | --help) usage && exit 0 ;;
    --steps | --bundle | --out | --work | --model | --engine-arg)
      [ $# -ge 2 ] || die "$1 needs a value"
      case $1 in
        --steps) steps=$2 ;;
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

IFS=, read -ra wanted <<<"$steps"
[ ${#wanted[@]} -gt 0 ] || die "--steps is empty"
for step in "${wanted[@]}"; do
  [[ ,$ALL_STEPS, == *,$step,* ]] || die "unknown step '$step'; known: $ALL_STEPS"
done
if [ -n "$bundle" ] && [ ! -f "$bundle/unpack.sh" ] && [ $dry_run = 0 ]; then
  die "--bundle $bundle: no unpack.sh in it"
fi
command -v "$python" >/dev/null || die "$python not found; set PYTHON"

# "89 geforce-rtx-4090", or nothing without a GPU.
gpu=$("$python" - <<'PY' 2>/dev/null
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
checkpoint=$work/$model-random
[ $dry_run = 1 ] || mkdir -p "$out" "$work"

names=() states=() seconds=() notes=()

record() { # name state seconds note
  names+=("$1") states+=("$2") seconds+=("$3") notes+=("$4")
  printf '[%s] %s%s\n' "$1" "$2" "${4:+: $4}"
}

# run NAME LIMIT COMMAND...: with a time limit, into NAME.log. Status 3 of the command: not run.
run() {
  local name=$1 limit=$2 log=$out/$1.log begin=$SECONDS status
  shift 2
  if [ $dry_run = 1 ]; then
    printf '[%s] timeout %s %s\n' "$name" "$limit" "$(printf '%q ' "$@")"
    return 0
  fi
  printf '[%s] at most %s s: %s\n' "$name" "$limit" "$(printf '%q ' "$@")"
  timeout -k 10 "$limit" "$@" >"$log" 2>&1
  status=$?
  case $status in
    0) record "$name" passed $((SECONDS - begin)) "" ;;
    3) record "$name" "not run" $((SECONDS - begin)) "$(tail -n 1 "$log")" ;;
    124 | 137) record "$name" "timed out" $((SECONDS - begin)) "limit $limit s; $log" ;;
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
  run env 60 "$python" "$here/report_environment.py"
  [ $dry_run = 1 ] || sed 's/^/    /' "$out/env.log"
}

step_install() {
  if [ -n "$bundle" ]; then
    if [ -d "$work/vllm-site/vllm" ]; then
      record bundle passed 0 "unpacked before"
    else
      run bundle 180 bash "$bundle/unpack.sh" "$work/vllm-site"
    fi
  fi
  run install 300 env NVFP4_BUILD_CUBINS="${arch:-0}" "$python" -m pip install --no-deps \
    --no-build-isolation --no-index --disable-pip-version-check --upgrade --target "$site" "$root"
}

step_kernels() {
  needs_gpu kernels || return
  if "$python" -c 'import pytest' 2>/dev/null; then
    local only=()
    [ $quick = 0 ] || only=(-k 'not every_kind_of_data')
    run kernels 300 "$python" -m pytest -p no:cacheprovider -m gpu --maxfail 20 "${only[@]}" \
      "$root/tests/kernels/cuda/test_cuda_kernels.py" "$root/tests/kernels/cuda/test_cuda_moe.py"
  else
    echo "[kernels] no pytest here: check_kernels.py runs the same products"
    run kernels 300 "$python" "$here/check_kernels.py"
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
  local checks=(memcheck synccheck)
  [ $quick = 1 ] || checks+=(racecheck initcheck)
  for check in "${checks[@]}"; do
    run "sanitizer-$check" 120 "${tool:-compute-sanitizer}" --tool "$check" --error-exitcode 9 \
      "$python" "$here/check_kernels.py" --small --only "$([ "$check" = memcheck ] || echo bf16)"
  done
}

step_gemm() {
  needs_gpu gemm || return
  local extra=(--budget 150)
  [ $quick = 0 ] || extra=(--models Qwen3-8B --m 1,8,64,256,1024,4096 --budget 60)
  # FP8 mma.sync is emulated on Hopper: its twin with integer MMA shows the schedule's speed.
  [ "${arch:-0}" != 90 ] || extra+=(--stand-in)
  run gemm 300 "$python" "$here/bench_gemm.py" --out "$out/gemm.csv" "${extra[@]}"
}

step_moe() {
  needs_gpu moe || return
  local extra=(--budget 150)
  [ $quick = 0 ] || extra=(--models Qwen3-30B-A3B --m 1,8,64,1024 --budget 40)
  run moe 300 "$python" "$here/bench_moe.py" --out "$out/moe.csv" "${extra[@]}"
}

step_launch() {
  needs_gpu launch || return
  run launch 60 "$python" "$here/bench_launch.py" --out "$out/launch.csv" --limit 10
}

step_tiles() {
  needs_gpu tiles || return
  local extra=(--budget 90)
  [ $quick = 0 ] || extra=(--models Qwen3-8B --m 1,16,64 --budget 30)
  run tiles 150 "$python" "$here/bench_tiles.py" --out "$out/tiles.csv" "${extra[@]}"
}

step_checkpoint() {
  run checkpoint 240 "$python" "$here/make_random_checkpoint.py" --model "$model" \
    --out "$checkpoint" --keep
}

needs_vllm() { # name; true where it can be imported, or the commands are only printed
  [ $dry_run = 1 ] || "$python" -c 'import vllm' >/dev/null 2>&1 ||
    { not_run "$1" "vLLM cannot be imported (--bundle DIR brings one)" && return 1; }
}

step_serving() {
  needs_gpu serving || return
  needs_vllm serving || return
  if [ $dry_run = 0 ] && [ ! -f "$checkpoint/model.safetensors.index.json" ]; then
    not_run serving "no checkpoint at $checkpoint (the step checkpoint writes it)"
    return
  fi
  local extra=(--turns 2 --load-requests 32)
  [ $quick = 0 ] || extra=(--turns 1 --tokens 64 --load-requests 0)
  run serving 540 "$python" -m vllm_nvfp4.cli.main bench "$checkpoint" --batches 1,8,32,128 \
    --against "stock --linear-backend marlin" --out "$out/serving-$(date +%H%M%S)" "${extra[@]}" \
    -- ${engine_args[@]+"${engine_args[@]}"}
}

step_features() {
  needs_gpu features || return
  needs_vllm features || return
  local only=()
  [ $quick = 0 ] || only=(--only "Prefix caching" --only "Sleep and wake")
  run features 540 "$python" "$here/check_features.py" ${only[@]+"${only[@]}"}
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
  [ $num_passed -gt 0 ] || return 3
}

# Installed copies come first: they hold the cubins. The checkout is for when install failed.
export PYTHONPATH="$site:$work/vllm-site${PYTHONPATH:+:$PYTHONPATH}:$root"
export VLLM_NVFP4_CACHE_DIR="$work/cache"
for step in "${wanted[@]}"; do
  "step_$step"
done
[ $dry_run = 0 ] || exit 0
{ summary; } | tee "$out/summary.txt"
status=${PIPESTATUS[0]}
echo "results: $out"
exit "$status"
