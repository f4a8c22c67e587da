# SPDX-License-Identifier: Apache-2.0
"""What is served and measured: the model through this plugin, and what ``--against`` names."""

from __future__ import annotations

import shlex
from dataclasses import dataclass
from pathlib import Path

from vllm_nvfp4.checkpoints import read_config
from vllm_nvfp4.checkpoints.detect import method_name
from vllm_nvfp4.checkpoints.inventory import LINEAR
from vllm_nvfp4.checkpoints.locate import find_folder
from vllm_nvfp4.checkpoints.validate import validate

# What --against takes, each with its meaning: shown by --help and by the error for anything else.
KINDS = {
    "stock": "the same checkpoint through vLLM without the plugin",
    "bf16": "16-bit weights through vLLM without the plugin",
    "fp8": "an FP8 checkpoint, or on a GPU a 16-bit one that vLLM quantises while it loads",
    "awq": "an AWQ checkpoint through vLLM without the plugin",
    "nvfp4": "the plugin again, with other flags",
}
_SYNTAX = "NAME[=MODEL] [FLAGS of vllm serve]"
# Methods of vLLM whose weights have 4 bits and a 16-bit scale per group.
_INT4_METHODS = ("awq", "gptq", "auto-round", "auto_round", "inc")
_PLUGIN_FORMATS = ("nvfp4", "mxfp4", "fp8")


@dataclass(frozen=True)
class Variant:
    """One server to measure.

    name:        as it appears in tables: what the user wrote
    folder:      its checkpoint
    flags:       of ``vllm serve``, for this variant alone
    with_plugin: whether vLLM may load the plugin
    """

    name: str
    folder: Path
    flags: tuple[str, ...]
    with_plugin: bool


def own(model: str) -> Variant:
    """MODEL through the plugin."""
    return Variant("nvfp4", find_folder(model), (), True)


def against(text: str, model: Path) -> Variant:
    """The variant that ``--against TEXT`` means beside ``model``.

    text: NAME[=MODEL] and flags of ``vllm serve`` for it alone, split as a shell would
    Raises ValueError for an unknown name, and where another checkpoint is needed.
    """
    try:
        words = shlex.split(text)
    except ValueError as error:
        raise ValueError(f"--against {text!r}: {error}; needs {_SYNTAX}") from error
    kind, _, other = (words or [""])[0].partition("=")
    if kind not in KINDS:
        raise ValueError(
            f"--against {text!r}: unknown; needs {_SYNTAX}, NAME one of {', '.join(KINDS)}"
        )
    folder = find_folder(other) if other else model
    flags = words[1:]
    quantization = read_config(folder)[1]
    method = method_name(quantization) if quantization else ""
    if kind == "bf16" and quantization:
        raise _needs(text, folder, method, "a 16-bit checkpoint", "bf16=MODEL")
    if kind == "awq" and not method.startswith("awq"):
        raise _needs(text, folder, method, "an AWQ checkpoint", "awq=MODEL")
    if kind == "fp8":
        if not quantization:
            flags = ["--quantization", "fp8", *flags]
        elif format_of(folder, "fp8") != "fp8":
            raise _needs(text, folder, method, "an FP8 or a 16-bit checkpoint", "fp8=MODEL")
    return Variant(text, folder, tuple(flags), kind == "nvfp4")


def _needs(text: str, folder: Path, method: str, needed: str, remedy: str) -> ValueError:
    found = f"quantised by {method}" if method else "not quantised"
    return ValueError(f"--against {text}: {folder} is {found}; needs {needed}: --against {remedy}")


def format_of(folder: Path, online: str) -> str:
    """Format of most linear weights: bf16, fp8, int4, mxfp4 or nvfp4.

    online: what becomes of a 16-bit checkpoint while it loads; "bf16" if nothing
    """
    config, quantization = read_config(folder)
    if not quantization:
        return online
    method = method_name(quantization)
    if method.startswith(_INT4_METHODS):
        return "int4"
    if method in ("fp8", "fbgemm_fp8"):
        return "fp8"
    sizes: dict[str, int] = {}
    for layer in validate(folder, config, quantization).layers:
        if layer.part == LINEAR:
            sizes[layer.format] = sizes.get(layer.format, 0) + layer.num_weights
    largest = max(sizes, key=lambda name: sizes[name], default="bf16")
    return largest if largest in _PLUGIN_FORMATS else "bf16"
