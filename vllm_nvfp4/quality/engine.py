# SPDX-License-Identifier: Apache-2.0
"""A vLLM engine in this process, and the scores of a text's windows from it."""

from __future__ import annotations

import argparse
import contextlib
import gc
import os
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from vllm_nvfp4.checkpoints import detect, read_config
from vllm_nvfp4.checkpoints.spec import CheckpointError
from vllm_nvfp4.compat.flags import raise_flag_errors
from vllm_nvfp4.options import METHOD_NAME
from vllm_nvfp4.quality.recorder import WORKER_EXTENSION, window_file
from vllm_nvfp4.quality.text import vocabulary_size

# Enough for one window of any model whose weights fit beside it.
_KV_CACHE_BYTES = 1 << 30
# float32 log-softmax of the same logits, here and in vLLM.
_SAME_LOGPROB = 1e-3


@dataclass(frozen=True)
class Scores:
    """Per token, in nats; see :func:`vllm_nvfp4.quality.recorder.score`.

    nll:  [num_windows, length - 1] float64
    kl:   the same, from the reference to the model; None where there was no reference
    same: the same, 1.0 where both find the same token the most likely
    """

    nll: np.ndarray
    kl: np.ndarray | None = None
    same: np.ndarray | None = None


@contextlib.contextmanager
def running(folder: Path | str, **options: Any) -> Iterator[Any]:
    """vLLM's ``LLM`` on a checkpoint; everything it holds is released at the end."""
    # One process: no start-up of an engine process per model, and errors come as they are raised.
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    from vllm import LLM
    from vllm.distributed import cleanup_dist_env_and_memory

    llm: Any = None
    try:
        llm = LLM(str(folder), **options)
        yield llm
    finally:
        # An exception's traceback keeps the engine alive: end it now, not when that is collected.
        if llm is not None:
            llm.llm_engine.engine_core.shutdown()
        del llm
        cleanup_dist_env_and_memory()
        gc.collect()


def engine_options(args: Sequence[str]) -> dict[str, Any]:
    """What a `vllm serve` command line says about the engine, as keywords of ``LLM``.

    Raises FlagError for an unknown flag.
    """
    from vllm.engine.arg_utils import EngineArgs
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    raise_flag_errors()
    parser = EngineArgs.add_cli_args(
        FlexibleArgumentParser(prog="vllm-nvfp4 quality MODEL --", add_help=False)
    )
    for action in parser._actions:
        action.default = argparse.SUPPRESS
    return vars(parser.parse_args(list(args)))


def method_of(folder: Path) -> str | None:
    """How a reference is served: as it is stored, by this plugin only where it is in FP4."""
    _, quant_config = read_config(folder)
    if quant_config is None:
        return None
    try:
        return METHOD_NAME if detect(quant_config).has_microscaled_layers() else None
    except CheckpointError:
        return None


def check_room(folder: Path, target: Path, windows: Sequence[Sequence[int]]) -> None:
    """Raise OSError unless the windows' logits fit on the disk, at four bytes each."""
    needed = sum(len(w) - 1 for w in windows) * vocabulary_size(folder) * 4
    free = shutil.disk_usage(target).free
    if free < needed:
        raise OSError(
            f"{target}: {free / 1e9:.1f} GB free, up to {needed / 1e9:.1f} GB needed for the "
            "reference's logits; set TMPDIR to a larger disk or use fewer --windows"
        )


def measure(
    folder: Path,
    windows: Sequence[list[int]],
    options: Mapping[str, Any],
    *,
    save: Path | None = None,
    reference: Path | None = None,
    progress: Callable[[str], None] = lambda detail: None,
) -> Scores:
    """Serve ``folder`` and score each token of each window but the first.

    options:   keywords of ``LLM``, over this function's own
    save:      folder for the logits
    reference: folder in which an earlier call saved another model's
    progress:  called with what is being done
    """
    length = len(windows[0])
    defaults: dict[str, Any] = {
        "max_model_len": length + 1,
        # One window at a time, and whole: its logits come in one piece and in order.
        "max_num_seqs": 1,
        "max_num_batched_tokens": max(2048, length + 1),
        "enable_prefix_caching": False,
        "kv_cache_memory_bytes": _KV_CACHE_BYTES,
        "worker_extension_cls": WORKER_EXTENSION,
        "seed": 0,
    }
    progress("loading the model")
    found: dict[str, list[list[float]]] = {}
    with running(folder, **(defaults | dict(options))) as llm:
        llm.collective_rpc("nvfp4_quality_watch")
        for index, window in enumerate(windows):
            progress(f"window {index + 1} of {len(windows)}")
            for name, values in _score(llm, index, window, save, reference).items():
                found.setdefault(name, []).append(values)
    return Scores(**{name: np.array(rows) for name, rows in found.items()})


def _score(
    llm: Any, index: int, window: list[int], save: Path | None, reference: Path | None
) -> dict[str, list[float]]:
    from vllm import SamplingParams

    parameters = SamplingParams(
        temperature=0, max_tokens=1, ignore_eos=True, prompt_logprobs=0, detokenize=False
    )
    output = llm.generate([{"prompt_token_ids": window}], parameters, use_tqdm=False)[0]
    files = [window_file(f, index) if f is not None else None for f in (save, reference)]
    answers = llm.collective_rpc("nvfp4_quality_score", args=(window, *files))
    scores = next((a for a in answers if a is not None), None)
    if scores is None:
        raise RuntimeError("vLLM computed no logits for a prompt; report this with its version")
    returned = [
        row[token].logprob
        for row, token in zip(output.prompt_logprobs[1:], window[1:], strict=True)
    ]
    worst = max(abs(a + b) for a, b in zip(returned, scores["nll"], strict=True))
    if not worst <= _SAME_LOGPROB and np.isfinite(scores["nll"]).all():
        raise RuntimeError(
            f"window {index}: log-probabilities are {worst:.3g} nats from those that vLLM "
            "returned; report this with the version of vLLM"
        )
    return scores
