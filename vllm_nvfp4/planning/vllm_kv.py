# SPDX-License-Identifier: Apache-2.0
"""What each layer of a model keeps of a sequence, as vLLM's own model says it.

Each attention or state layer of a model without weights names its specification of the KV cache.
That takes vLLM's import, so it is done in a process of its own:

    python -m vllm_nvfp4.planning.vllm_kv FOLDER

prints a JSON list of Kept (shapes.py). FOLDER needs no more than config.json.
"""

from __future__ import annotations

import importlib.util
import json
import math
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from vllm_nvfp4.compat import lean
from vllm_nvfp4.planning.shapes import Kept

SECONDS = 300.0
_MARK = "vllm-nvfp4 kept: "


def is_vllm_here() -> bool:
    return importlib.util.find_spec("vllm") is not None


def ask_vllm(config: Mapping[str, Any]) -> tuple[Kept, ...]:
    """What the layers of a model keep, by config.json; empty where vLLM does not tell.

    Without a vLLM in this environment it is not asked. The weights' format does not matter and is
    left out.
    """
    if not is_vllm_here():
        return ()
    plain = {k: v for k, v in config.items() if k not in ("quantization_config", "auto_map")}
    with tempfile.TemporaryDirectory(prefix="vllm-nvfp4-config-") as name:
        (Path(name) / "config.json").write_text(json.dumps(plain))
        environ = os.environ | {"HF_HUB_OFFLINE": "1", "VLLM_LOGGING_LEVEL": "ERROR"}
        try:
            said, _ = lean.ask("vllm_nvfp4.planning.vllm_kv", [name], environ, _MARK, SECONDS)
        except subprocess.TimeoutExpired:
            return ()
    if said is None:
        return ()
    return tuple(Kept(**entry) for entry in json.loads(said.removeprefix(_MARK)))


def kept_by(folder: Path) -> list[Kept]:
    """What the layers of vLLM's model of a folder keep, in its order."""
    from vllm.engine.arg_utils import EngineArgs
    from vllm.model_executor.layers.attention_layer_base import AttentionLayerBase

    from vllm_nvfp4.compat.meta_model import build_model, frame_of

    args = EngineArgs(
        model=str(folder), skip_tokenizer_init=True, enforce_eager=True, dtype="bfloat16",
        kv_cache_dtype="bfloat16", max_model_len=64, language_model_only=True,
    )  # fmt: skip
    config = args.create_engine_config()
    with frame_of(config):
        build_model(config)
        layers = config.compilation_config.static_forward_context.values()
        specs = [x.get_kv_cache_spec(config) for x in layers if isinstance(x, AttentionLayerBase)]
    return [kept_of(spec) for spec in specs if spec is not None]


def kept_of(spec: Any) -> Kept:
    """One of vLLM's KVCacheSpec. A page of keys is a block of tokens, that of a state one sequence;
    the latter is taken without its padding."""
    from vllm.v1.kv_cache_interface import MambaSpec

    if isinstance(spec, MambaSpec):
        sizes = zip(spec.shapes, spec.dtypes, strict=True)
        return Kept(0, 0, sum(math.prod(shape) * dtype.itemsize for shape, dtype in sizes))
    window = getattr(spec, "sliding_window", None) or getattr(spec, "attention_chunk_size", None)
    return Kept(window or 0, spec.page_size_bytes // spec.block_size, 0)


def main(argv: Sequence[str]) -> int:
    """Print what the layers of argv's model keep, as one line of JSON."""

    def find(folder: str) -> str:
        lean.look_here()
        return _MARK + json.dumps([asdict(kept) for kept in kept_by(Path(folder))])

    return lean.answer(argv, find)


if __name__ == "__main__":
    lean.end(main(sys.argv[1:]))
