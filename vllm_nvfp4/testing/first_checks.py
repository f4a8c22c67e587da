# SPDX-License-Identifier: Apache-2.0
"""What a new GPU must show before its products are looked at: how its tensor cores take what the
PTX manual leaves open, and that torch computes there what it computes on the CPU, bit for bit."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch

from vllm_nvfp4.kernels.cuda import linear as cuda
from vllm_nvfp4.kernels.cuda.configs import GEMM_CONFIGS, GemmConfig
from vllm_nvfp4.kernels.layout import PackedWeight, pack_weight
from vllm_nvfp4.numerics.codes import pack_codes
from vllm_nvfp4.numerics.formats import FORMATS
from vllm_nvfp4.numerics.quantize import quantize_fp8_per_row, quantize_mxfp4, quantize_nvfp4
from vllm_nvfp4.numerics.weight import BlockScaledWeight
from vllm_nvfp4.testing.kernel_cases import TORCH_DTYPES, heavy_tailed, run_config
from vllm_nvfp4.testing.metrics import Comparison, compare_linear

_K = 64
_LEAST = 2.0**-9  # of E4M3, a subnormal; its normal numbers begin at 2^-6
_ONE = {"nvfp4": 0x38, "mxfp4": 127}


def subnormal_operands(
    config: GemmConfig, device: torch.device
) -> tuple[torch.Tensor, BlockScaledWeight]:
    """(a, weight) of a product whose every term is one multiplication of a subnormal FP8 number.

    The weights hold every E2M1 code: 0.5 enters the FP8 MMA as 2^-7. The first rows of a pick
    single weights out; the others are 1 to 7 times 2^-9 under a scale of 1, which a 448 that meets
    zeros holds there.
    """
    fmt = FORMATS[config.fmt_name]
    codes = torch.arange(16, dtype=torch.uint8)[:, None].repeat(1, _K)
    codes[:, 0] = 0
    scale = torch.full((16, _K // fmt.block_size), _ONE[fmt.name], dtype=torch.uint8)
    if fmt.scale_type == "e4m3":
        scale = scale.view(torch.float8_e4m3fn)
    weight = BlockScaledWeight(
        pack_codes(codes).to(device), scale.to(device), torch.ones(16, device=device), fmt
    )
    a = torch.zeros(16, _K)
    for m in range(8):
        a[m, 1 + 7 * m] = 1.0
    a[8:, 0] = 448.0
    for m in range(8, 16):
        a[m, 3 * m] = (m % 8) * _LEAST
    return a.to(TORCH_DTYPES[config.dtype]).to(device), weight


def check_subnormals(config: GemmConfig, device: torch.device) -> Comparison:
    """FP8 subnormals enter the MMA with their value, where a GPU that took them for zeros, or for
    normal numbers, would be far off."""
    a, weight = subnormal_operands(config, device)
    y = run_config(config, a, cuda.pack_weight(weight))
    return compare_linear(y, a, weight, None, 8, config.variant)


def check_quantizer(dtype: torch.dtype, device: torch.device) -> Comparison:
    """The kernel that quantises activations gives the reference's bits."""
    cuda.prepare(device, "nvfp4", (dtype,))
    num_wrong = 0
    for k in (16, 48, 2080, 12288):
        a = heavy_tailed((67, k), torch.Generator(device).manual_seed(k)).to(dtype)
        a[5] = 0
        a[6, 1:] = 0
        q, scale = cuda.quantize(a)
        expected, expected_scale = quantize_fp8_per_row(a.cpu())
        num_wrong += _differing(q, expected) + _differing(scale, expected_scale[:, 0])
    return _counted(num_wrong)


def check_numerics(device: torch.device) -> dict[str, Comparison]:
    """Everything that is computed with torch while weights load, and the references of the other
    checks: the same bits here and on the CPU."""
    weight = heavy_tailed((48, 320), torch.Generator().manual_seed(0))
    weight[3] = 0
    weight[4] *= 1e-6
    steps: dict[str, Callable[[torch.Tensor], Iterator[torch.Tensor]]] = {
        "nvfp4, rounded to nearest": lambda w: _parts(quantize_nvfp4(w)),
        "nvfp4, least error": lambda w: _parts(quantize_nvfp4(w, "mse")),
        "mxfp4": lambda w: _parts(quantize_mxfp4(w)),
        "fp8 by row": lambda w: iter(quantize_fp8_per_row(w)),
        "order of the kernels": lambda w: _packed(pack_weight(quantize_nvfp4(w))),
        "dequantised": lambda w: iter([quantize_nvfp4(w).dequantize()]),
    }
    found = {}
    for name, step in steps.items():
        pairs = zip(step(weight.to(device)), step(weight), strict=True)
        found[name] = _counted(sum(_differing(here, there) for here, there in pairs))
    return found


def first_configs(arch: int) -> list[GemmConfig]:
    """The kernels whose MMA takes FP8."""
    return [c for c in GEMM_CONFIGS if c.stem == "gemm_w4a8" and c.min_arch <= arch]


def _parts(weight: BlockScaledWeight) -> Iterator[torch.Tensor]:
    yield from (weight.codes, weight.block_scale, weight.global_scale)


def _packed(weight: PackedWeight) -> Iterator[torch.Tensor]:
    yield from (weight.codes, weight.block_scale, weight.global_scale)


def _differing(here: torch.Tensor, there: torch.Tensor) -> int:
    pair = [t.cpu().contiguous().view(torch.uint8) for t in (here, there)]
    return int((pair[0] != pair[1]).sum())


def _counted(num_wrong: int) -> Comparison:
    worst = float("inf") if num_wrong else 0.0
    return Comparison(0.0, worst, num_wrong, f"{num_wrong} bytes differ from the reference's")
