# SPDX-License-Identifier: Apache-2.0
"""Activations and weights at the edges of their formats, shared by the tests of every kernel."""

from __future__ import annotations

from collections.abc import Callable

import torch
from gemm_cases import configs_of

from vllm_nvfp4.kernels import layout
from vllm_nvfp4.kernels.cuda.configs import QUANTIZE_CONFIGS, GemmConfig
from vllm_nvfp4.numerics.formats import BlockFormat
from vllm_nvfp4.numerics.weight import BlockScaledWeight
from vllm_nvfp4.testing.host_gemm import run_gemm, run_quantize, shipped

GEMMS = [*configs_of("gemm_w4a16"), *configs_of("gemm_w4a8")]
VICTIM = 1


def _at(*values: float) -> Callable[[torch.Tensor], torch.Tensor]:
    """The row with these values in places that different lanes and steps read."""

    def edit(row: torch.Tensor) -> torch.Tensor:
        row = row.clone()
        for i, value in enumerate(values):
            row[(5 + 37 * i) % len(row)] = value
        return row

    return edit


_INF = float("inf")
# name -> what becomes of a token's row
STRESS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "outlier": _at(1e4),
    "outliers": _at(1e4, -1e4, 1e4),
    "large": lambda row: (row.float() * 1e4).clamp(-6e4, 6e4).to(row.dtype),
    "zeros": torch.zeros_like,
    "minus zeros": lambda row: -torch.zeros_like(row),
    "subnormals": lambda row: torch.full_like(row, torch.finfo(row.dtype).smallest_normal / 4),
    "nan": _at(float("nan")),
    "inf": _at(_INF),
    "minus inf": _at(-_INF),
    "both infs": _at(_INF, -_INF),
    "all": lambda row: _at(float("nan"), _INF, -_INF, 1e4, 0.0, 1e-30)(row),
}


def is_finite_stress(name: str) -> bool:
    return bool(STRESS[name](torch.ones(64)).isfinite().all())


def legal_scales(fmt: BlockFormat) -> list[int]:
    """The bytes of all block scales that a checkpoint may hold: no NaN and no sign."""
    return list(range(0x7F if fmt.scale_type == "e4m3" else 0xFF))


def every_pair(fmt: BlockFormat, scales: list[int]) -> BlockScaledWeight:
    """Row n has the scale byte scales[n]; its code bytes are all 256, so K is 512."""
    codes = torch.arange(256, dtype=torch.uint8).repeat(len(scales), 1)
    scale = torch.tensor(scales, dtype=torch.uint8)[:, None].repeat(1, 512 // fmt.block_size)
    if fmt.scale_type == "e4m3":
        scale = scale.view(torch.float8_e4m3fn)
    return BlockScaledWeight(codes, scale, torch.ones(len(scales)), fmt)


def stressed(a: torch.Tensor, name: str) -> torch.Tensor:
    a = a.clone()
    a[VICTIM] = STRESS[name](a[VICTIM])
    return a


def assert_others_untouched(y: torch.Tensor, clean: torch.Tensor, name: str) -> None:
    others = [m for m in range(len(y)) if m != VICTIM]
    assert torch.equal(y[others], clean[others]), f"{name}: touches another token"
    if not is_finite_stress(name):
        assert not y[VICTIM].isfinite().any(), f"{name}: its own result looks sound"
    if name.endswith("zeros"):
        assert (y[VICTIM] == 0).all()


def assert_others_untouched_by_experts(y: torch.Tensor, clean: torch.Tensor, name: str) -> None:
    """SiLU takes minus infinity to zero: only what is NaN has to stay NaN."""
    others = [m for m in range(len(y)) if m != VICTIM]
    assert torch.equal(y[others], clean[others]), f"{name}: touches another token"
    if "nan" in name or name == "all":
        assert y[VICTIM].isnan().all()
    if name.endswith("zeros"):
        assert (y[VICTIM] == 0).all()


def run_host(config: GemmConfig, a: torch.Tensor, packed: layout.PackedWeight) -> torch.Tensor:
    """The product as it is launched: with 8-bit activations after the quantiser."""
    if config.stem == "gemm_w4a16":
        return run_gemm(shipped(config), config, a, packed)
    quantize = next(c for c in QUANTIZE_CONFIGS if c.dtype == config.dtype)
    q, a_scale = run_quantize(shipped(quantize), quantize, a)
    return run_gemm(shipped(config), config, q, packed, a_scale=a_scale)
