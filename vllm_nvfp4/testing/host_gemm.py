# SPDX-License-Identifier: Apache-2.0
"""The GEMM kernels and the quantiser on the emulated GPU (csrc/host/), launched as on a GPU."""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path

import torch

from vllm_nvfp4.kernels.cuda import configs
from vllm_nvfp4.kernels.cuda.configs import GemmConfig, GemmParams, QuantizeConfig, QuantizeParams
from vllm_nvfp4.kernels.cuda.moe_configs import AnyMoeConfig
from vllm_nvfp4.kernels.layout import PackedWeight
from vllm_nvfp4.numerics.formats import INT8_GROUP
from vllm_nvfp4.testing.host_kernel import HostMachine, HostModule, build, csrc_dir

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}


class SemaphoreError(RuntimeError):
    """A launch left a semaphore other than zero: the next one would go wrong."""


def build_host(
    kernels: Sequence[configs.KernelConfig | AnyMoeConfig], edits: Sequence[tuple[str, str]] = ()
) -> HostModule:
    """Compile several kernels into one module.

    edits: (text, replacement) pairs, applied to the flattened source: faults to plant. Raises
           ValueError where a text does not occur exactly once.
    """
    stems = sorted({config.stem for config in kernels})
    source = "".join(f'#include "{stem}.cuh"\n' for stem in stems)
    if edits:
        source = flattened_source(stems, edits)
    source += "".join(config.definition for config in kernels)
    return build(source, {config.symbol: config.symbol for config in kernels})


def flattened_source(stems: Sequence[str], edits: Sequence[tuple[str, str]]) -> str:
    """The text of .cuh files with all that they include, edited; see :func:`build_host`."""
    source = "".join(f'#include "{stem}.cuh"\n' for stem in stems)
    source = _flatten(source, csrc_dir(), set())
    for text, replacement in edits:
        if source.count(text) != 1:
            raise ValueError(
                f"the text to edit occurs {source.count(text)} times, not once: {text}"
            )
        source = source.replace(text, replacement)
    return source


def _flatten(source: str, folder: Path, seen: set[str]) -> str:
    """The text with the .cuh files it includes in their places, each once."""

    def insert(match: re.Match[str]) -> str:
        name = match[1]
        if name in seen:
            return ""
        seen.add(name)
        text = (folder / name).read_text().replace("#pragma once\n", "")
        return _flatten(text, folder, seen)

    return re.sub(r'^#include "(\w+\.cuh)"$', insert, source, flags=re.MULTILINE)


def run_gemm(
    module: HostModule,
    config: GemmConfig,
    a: torch.Tensor,
    packed: PackedWeight,
    *,
    a_scale: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    splits: int = 1,
    machine: HostMachine | None = None,
    partials: torch.Tensor | None = None,
) -> torch.Tensor:
    """y[M, N] of one launch with the K loop cut into ``splits`` parts.

    a:        [M, K] bf16 or fp16 (w4a16), float8_e4m3fn (w4a8), int8 (w4i8); contiguous
    a_scale:  float32, [M] (w4a8) or [M, ceil(K / 64)] (w4i8)
    partials: [splits, tiles, block_m, block_n] float32, to see the sums that the splits leave
    Raises HostKernelError where the kernel misbehaves, SemaphoreError where it leaves a semaphore
    other than zero.
    """
    m, n = a.shape[0], packed.num_rows
    tiles = configs.num_tiles(config, m, n)
    # NaN everywhere: what a kernel should have written and did not shows in the comparison.
    y = torch.full((m, n), torch.nan, dtype=DTYPES[config.dtype])
    if partials is None:
        partials = torch.full((splits, tiles, config.block_m, config.block_n), torch.nan)
    buffers = {
        "a": a,
        "codes": packed.codes,
        "block_scale": packed.block_scale,
        "global_scale": packed.global_scale,
        "y": y,
        "partials": partials,
        "semaphores": torch.zeros(tiles, dtype=torch.int32),
    }
    if a_scale is not None:
        buffers["a_scale"] = a_scale
    if bias is not None:
        buffers["bias"] = bias
    params = GemmParams(
        **{name: tensor.data_ptr() for name, tensor in buffers.items()},
        m=m,
        n=n,
        k=packed.num_cols,
        a_stride=a.stride(0),
        y_stride=n,
        num_splits=splits,
    )
    module.launch(
        config.symbol,
        params,
        grid=(tiles, splits, 1),
        block=(config.threads, 1, 1),
        smem_bytes=config.smem_bytes,
        buffers=buffers,
        outputs={"y", "partials", "semaphores"},
        machine=machine,
    )
    if buffers["semaphores"].any():
        raise SemaphoreError(f"{config.symbol}: semaphores left at {buffers['semaphores']}")
    return y


def run_quantize(
    module: HostModule,
    config: QuantizeConfig,
    a: torch.Tensor,
    machine: HostMachine | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """(q, a_scale) of one launch of an activation quantiser: [M, K] float8_e4m3fn and [M] float32,
    or int8 and [M, ceil(K / 64)]."""
    m, k = a.shape
    is_int8 = config.stem == "quantize_i8"
    q = torch.full((m, k), 0x7F, dtype=torch.uint8)
    a_scale = torch.full((m, -(-k // INT8_GROUP)) if is_int8 else (m,), torch.nan)
    params = QuantizeParams(
        a=a.data_ptr(),
        q=q.data_ptr(),
        a_scale=a_scale.data_ptr(),
        m=m,
        k=k,
        a_stride=a.stride(0),
        q_stride=k,
    )
    module.launch(
        config.symbol,
        params,
        grid=(m, 1, 1),
        block=(config.threads, 1, 1),
        smem_bytes=config.smem_bytes,
        buffers={"a": a, "q": q, "a_scale": a_scale},
        outputs={"q", "a_scale"},
        machine=machine,
    )
    return q.view(torch.int8 if is_int8 else torch.float8_e4m3fn), a_scale


def shipped(config: configs.KernelConfig) -> HostModule:
    """The module that holds ``config`` and its family: compiled at its first use."""
    if isinstance(config, QuantizeConfig):
        return _family(config.stem, "")
    return _family(config.stem, config.fmt_name)


@lru_cache
def _family(stem: str, fmt_name: str) -> HostModule:
    kernels = [c for c in configs.ALL_CONFIGS if c.stem == stem]
    return build_host([c for c in kernels if getattr(c, "fmt_name", "") == fmt_name])
