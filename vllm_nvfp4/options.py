# SPDX-License-Identifier: Apache-2.0
"""Every option: its name, default, accepted values and meaning. docs/options.md is made of it.

Options come through vLLM's ``--additional-config '{"nvfp4": {...}}'`` or, second, through
environment variables ``VLLM_NVFP4_<NAME>``. The plugin merges both into ``additional_config``
before vLLM hashes it, so that two option sets never share a compiled graph.
"""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

METHOD_NAME = "nvfp4"
# vLLM may come to have a method "nvfp4" of its own; the second name will always be this one's.
METHOD_NAMES = (METHOD_NAME, "nvfp4_ada")
ENV_PREFIX = "VLLM_NVFP4_"
# The option ``activation`` as the kernels take it: 0 is "by the batch size".
ACTIVATION_BITS = {"auto": 0, "16": 16, "8": 8}


def is_batch_invariant() -> bool:
    """Whether vLLM was asked for results that do not depend on what else is in the batch.

    vLLM's own variable, read as vLLM reads it. A product then sums in one order for any number of
    tokens: one kernel for each weight, none of those that only many tokens pay for.
    """
    return os.environ.get("VLLM_BATCH_INVARIANT", "0").strip() not in ("", "0")


def _option(default: Any, choices: tuple[Any, ...] | None, meaning: str) -> Any:
    metadata = {"choices": choices, "meaning": meaning}
    if isinstance(default, tuple):
        return field(default_factory=lambda: default, metadata=metadata)
    return field(default=default, metadata=metadata)


@dataclass(frozen=True)
class Options:
    """The plugin's options. Build with :meth:`from_mapping` or :meth:`resolve`."""

    activation: str = _option(
        "auto",
        ("auto", "16", "8"),
        "Activation bits of the NVFP4/MXFP4 products. `16`: weights are widened to BF16/FP16 "
        "(exact). `8`: activations are rounded to 8 bits, as `a8_variant` says. `auto`: by the "
        "batch size, where the roofline of the GPU says; without FP8 tensor cores only where 8 "
        "bits are at least 1.3 times as fast on paper. FP8 layers of a mixed checkpoint follow it "
        "on a GPU if they were made for 8-bit activations.",
    )
    a8_variant: str = _option(
        "auto",
        ("auto", "exact", "int8", "f16_partials", "folded"),
        "Of 8-bit activations. `exact`: FP8 with one scale per token. `int8`: INT8 with one scale "
        "per token and 64 columns, which is finer and needs no FP8 tensor cores. `auto`: the "
        "faster of these two on the device. `f16_partials` rounds the sums of blocks to FP16 "
        "(5e-4) and runs at GeForce's double rate. `folded` rounds each NVFP4 weight times its "
        "block scale to FP8 (2 to 4 % of a row) and halves the instructions: for L40S, L4 and "
        "RTX 6000 Ada. MXFP4 stays exact under `folded`, and experts under both.",
    )
    lm_head: str = _option(
        "keep",
        ("keep", "fp8", "nvfp4"),
        "Quantise a 16-bit `lm_head` while it loads. With tied embeddings it is the one copy "
        "that both use.",
    )
    embedding: str = _option(
        "keep",
        ("keep", "fp8", "nvfp4"),
        "Quantise a 16-bit token embedding while it loads.",
    )
    kv_cache: str = _option(
        "auto",
        ("auto", "fp8", "keep"),
        "KV cache when `--kv-cache-dtype` is `auto`. `auto`: FP8 where the attention backends of "
        "the device can; `fp8`: always, an error on a CPU that cannot; `keep`: FP8 where the "
        "checkpoint asks for it and the device can, else the model's own type.",
    )
    online_method: str = _option(
        "mse",
        ("mse", "rtn"),
        "How a 16-bit checkpoint is quantised while it loads: `mse` sweeps block scales for the "
        "least squared error, `rtn` takes the absolute maximum.",
    )
    online_format: str = _option(
        "nvfp4", ("nvfp4", "mxfp4"), "Format that a 16-bit checkpoint is quantised to."
    )
    online_ignore: tuple[str, ...] = _option(
        (),
        None,
        "Layers to leave in 16 bits when a checkpoint is quantised while it loads: glob patterns "
        "on the layer's name, a list or comma-separated.",
    )
    native_blackwell: bool = _option(
        True,
        (True, False),
        "On GPUs with FP4 tensor cores, hand NVFP4 checkpoints to vLLM's own kernels.",
    )
    auto: bool = _option(
        False,
        (True, False),
        "Take NVFP4 and MXFP4 checkpoints without `--quantization nvfp4`. Only as the environment "
        "variable `VLLM_NVFP4_AUTO=1`: vLLM asks before it reads `--additional-config`.",
    )
    cpu_isa: str = _option(
        "auto",
        ("auto", "avx512_bf16", "avx512", "avx2", "generic"),
        "Instruction set of the CPU kernels, to compare or to rule one out. Only as the "
        "environment variable.",
    )
    cache_dir: str = _option(
        "~/.cache/vllm_nvfp4", None, "Where kernels compiled on this machine are kept."
    )

    @classmethod
    def from_mapping(cls, values: Mapping[str, Any], source: str) -> Options:
        """Check and convert ``values``; ``source`` names them in the error.

        An empty source stands for the environment: the error then names each value's variable.
        """
        fields = {f.name: f for f in dataclasses.fields(cls)}
        checked = {}
        for name, value in values.items():
            if name not in fields:
                known = ", ".join(sorted(fields))
                raise ValueError(f"{source}: unknown option {name!r}. Options are: {known}.")
            checked[name] = _convert(fields[name], value, _named(name, source))
        return cls(**checked)

    @classmethod
    def resolve(cls, additional_config: Mapping[str, Any] | None = None) -> Options:
        """The options in force: environment variables, overridden by ``additional_config``."""
        values = _from_environment()
        given = (additional_config or {}).get(METHOD_NAME, {})
        if not isinstance(given, Mapping):
            raise ValueError(
                '--additional-config: "nvfp4" is '
                f"{json.dumps(given)}; needs an object of options, such as "
                '{"nvfp4": {"lm_head": "fp8"}}.'
            )
        from_config = cls.from_mapping(given, "--additional-config nvfp4")
        merged = {name: getattr(values, name) for name in _names_in_environment()}
        merged |= {name: getattr(from_config, name) for name in given}
        return cls(**merged)

    def non_default(self) -> dict[str, Any]:
        """What differs from the defaults, in a form that ``json.dumps`` takes."""
        return {
            f.name: list(value) if isinstance(value, tuple) else value
            for f in dataclasses.fields(self)
            if (value := getattr(self, f.name)) != getattr(_DEFAULTS, f.name)
        }


def _named(name: str, source: str) -> str:
    """An option as the user wrote it."""
    return f"{source}: {name}" if source else ENV_PREFIX + name.upper()


def _convert(option: dataclasses.Field, value: Any, named: str) -> Any:
    choices = option.metadata["choices"]
    if isinstance(getattr(_DEFAULTS, option.name), tuple):
        items = value.split(",") if isinstance(value, str) else value
        if not isinstance(items, list | tuple) or not all(isinstance(i, str) for i in items):
            raise ValueError(f"{named} is {value!r}; needs a list of patterns.")
        return tuple(item.strip() for item in items if item.strip())
    if choices is None:
        if not isinstance(value, str) or not value:
            raise ValueError(f"{named} is {value!r}; needs a non-empty string.")
        return value
    if choices == (True, False):
        words = {"1": True, "true": True, "0": False, "false": False}
        converted = words.get(str(value).lower())
        if converted is None:
            raise ValueError(f"{named} is {value!r}; needs true or false.")
        return converted
    if str(value) not in choices:
        raise ValueError(f"{named} is {value!r}; needs one of {', '.join(choices)}.")
    return str(value)


def _names_in_environment() -> list[str]:
    return [
        f.name for f in dataclasses.fields(Options) if ENV_PREFIX + f.name.upper() in os.environ
    ]


def _from_environment() -> Options:
    known = {ENV_PREFIX + f.name.upper(): f.name for f in dataclasses.fields(Options)}
    for variable in os.environ:
        if variable.startswith(ENV_PREFIX) and variable not in known:
            raise ValueError(
                f"{variable}: unknown environment variable. The variables are: "
                f"{', '.join(sorted(known))}."
            )
    values = {known[v]: os.environ[v] for v in known if v in os.environ}
    return Options.from_mapping(values, "")


_DEFAULTS = Options()


def markdown_table() -> str:
    """The options as a Markdown table, for docs/options.md."""
    rows = [
        "| option | environment variable | default | values | meaning |",
        "| --- | --- | --- | --- | --- |",
    ]
    for f in dataclasses.fields(Options):
        default = getattr(_DEFAULTS, f.name)
        choices = f.metadata["choices"]
        shown = json.dumps(list(default) if isinstance(default, tuple) else default)
        accepted = ", ".join(f"`{str(c).lower()}`" for c in choices) if choices else "text"
        rows.append(
            f"| `{f.name}` | `{ENV_PREFIX}{f.name.upper()}` | `{shown}` | {accepted} | "
            f"{f.metadata['meaning']} |"
        )
    return "\n".join(rows) + "\n"
