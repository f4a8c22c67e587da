# SPDX-License-Identifier: Apache-2.0
"""What the CUDA kernels must get right on a real GPU: cases, and the check of each.

Used by tests/kernels/cuda/test_cuda_kernels.py, and by benchmarks/check_kernels.py where pytest is
missing or a tool such as compute-sanitizer wants little else in the process.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from vllm_nvfp4.kernels.cuda import cost, dispatch
from vllm_nvfp4.kernels.cuda import linear as cuda
from vllm_nvfp4.kernels.cuda.configs import GEMM_CONFIGS, GemmConfig
from vllm_nvfp4.kernels.cuda.devices import INT8_QUANTIZERS, Device, current_stream
from vllm_nvfp4.kernels.layout import PackedWeight
from vllm_nvfp4.numerics.codes import pack_codes
from vllm_nvfp4.numerics.formats import MXFP4, NVFP4
from vllm_nvfp4.numerics.quantize import quantize_mxfp4, quantize_nvfp4
from vllm_nvfp4.numerics.weight import BlockScaledWeight
from vllm_nvfp4.testing.metrics import Comparison, compare_linear

TORCH_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}

# (M, N, K): one tile and less, several tiles with remainders in every direction, K too short to
# split, K long enough to split, N below one packed tile.
SHAPES = (
    (1, 64, 64),
    (3, 200, 320),
    (8, 16, 1024),
    (17, 136, 4096),
    (77, 72, 416),
    (130, 264, 2080),
    (256, 4096, 128),
)
SMALL_SHAPES = ((1, 40, 96), (13, 136, 160))


def gaussian(shape: tuple[int, ...], generator: torch.Generator) -> torch.Tensor:
    return torch.randn(shape, generator=generator, device=generator.device)


def heavy_tailed(shape: tuple[int, ...], generator: torch.Generator) -> torch.Tensor:
    """Student's t with about 3 degrees of freedom."""
    squares = torch.stack([gaussian(shape, generator).square() for _ in range(3)])
    return gaussian(shape, generator) / squares.mean(0).sqrt().clamp(min=0.05)


def outlier_channels(shape: tuple[int, ...], generator: torch.Generator) -> torch.Tensor:
    """One channel in 64 is 40 times as large."""
    x = gaussian(shape, generator)
    x[..., ::64] *= 40
    return x


def positive(shape: tuple[int, ...], generator: torch.Generator) -> torch.Tensor:
    """Sums that only grow: an accumulator that truncates shows its bias here."""
    return gaussian(shape, generator).abs()


DATA: dict[str, Callable[[tuple[int, ...], torch.Generator], torch.Tensor]] = {
    "gaussian": gaussian,
    "heavy_tailed": heavy_tailed,
    "outlier_channels": outlier_channels,
    "positive": positive,
}


@dataclass(frozen=True)
class KernelCase:
    """One kernel on one product."""

    config: GemmConfig
    m: int
    n: int
    k: int
    data: str = "gaussian"
    has_bias: bool = True

    def __str__(self) -> str:
        bias = "-bias" if self.has_bias else ""
        return f"{self.config.symbol}-{self.m}x{self.n}x{self.k}-{self.data}{bias}"


def kernel_cases_of(
    config: GemmConfig, shapes: tuple[tuple[int, int, int], ...] = SHAPES
) -> list[KernelCase]:
    """A configuration on all shapes; kinds of data and the bias take turns."""
    data = list(DATA)
    first = GEMM_CONFIGS.index(config) if config in GEMM_CONFIGS else 0
    return [
        KernelCase(config, m, n, k, data[turn % len(data)], turn % 2 == 0)
        for turn, (m, n, k) in enumerate(shapes, start=first)
    ]


def make_operands(
    case: KernelCase, device: torch.device, seed: int = 0
) -> tuple[torch.Tensor, BlockScaledWeight, torch.Tensor | None]:
    """(a, weight, bias) of a case. The weight's rows have global scales of their own."""
    generator = torch.Generator(device).manual_seed(seed)
    make = DATA[case.data]
    dtype = TORCH_DTYPES[case.config.dtype]
    a = make((case.m, case.k), generator).to(dtype)
    dense = make((case.n, case.k), generator) * case.k**-0.5
    weight = quantize_nvfp4(dense) if case.config.fmt_name == "nvfp4" else quantize_mxfp4(dense)
    row_factor = torch.rand(case.n, generator=generator, device=device) + 0.5
    weight = BlockScaledWeight(
        weight.codes, weight.block_scale, weight.global_scale * row_factor, weight.fmt
    )
    bias = gaussian((case.n,), generator).to(dtype) if case.has_bias else None
    return a, weight, bias


def random_weight(
    n: int, k: int, fmt_name: str, device: torch.device, seed: int = 0
) -> BlockScaledWeight:
    """A weight of random codes and scales, made in place: no dense copy, for full-size layers."""
    fmt = NVFP4 if fmt_name == "nvfp4" else MXFP4
    generator = torch.Generator(device).manual_seed(seed)
    codes = torch.randint(
        0, 256, (n, k // 2), dtype=torch.uint8, device=device, generator=generator
    )
    low, high = (0x28, 0x40) if fmt_name == "nvfp4" else (120, 128)  # 0.25 to 2, 2^-7 to 1
    shape = (n, k // fmt.block_size)
    scale = torch.randint(low, high, shape, dtype=torch.uint8, device=device, generator=generator)
    if fmt_name == "nvfp4":
        scale = scale.view(torch.float8_e4m3fn)
    global_scale = torch.full((n,), 0.5 * k**-0.5, device=device)
    return BlockScaledWeight(codes, scale, global_scale, fmt)


def extreme_weight(fmt_name: str, k: int, device: torch.device) -> BlockScaledWeight:
    """One row for each finite non-negative block scale, every code in it; global scale 1.

    fp16 holds 6 * 448, but not what a kernel might pass through on the way there.
    """
    fmt = NVFP4 if fmt_name == "nvfp4" else MXFP4
    # E8M0 spans 2^-127 to 2^127: only scales that leave the product inside float32 mean anything.
    bits = torch.arange(0, 0x7F) if fmt_name == "nvfp4" else torch.arange(127 - 60, 127 + 60)
    scale = bits.to(torch.uint8)[:, None].repeat(1, k // fmt.block_size).to(device)
    codes = torch.arange(k, dtype=torch.uint8) % 16
    codes = pack_codes(codes.repeat(len(bits), 1)).to(device)
    if fmt_name == "nvfp4":
        scale = scale.view(torch.float8_e4m3fn)
    return BlockScaledWeight(codes, scale, torch.ones(len(bits), device=device), fmt)


def prepared(config: GemmConfig, device: torch.device) -> Device:
    """The device with one kernel loaded, and what quantises its activations: ``prepare`` loads
    the variant of the 8-bit kernel that is in force alone."""
    loaded = cuda.prepare(device, config.fmt_name, (TORCH_DTYPES[config.dtype],))
    with torch.cuda.device(device):
        loaded.load([config])
        if config.stem == "gemm_w4i8":
            loaded.load([INT8_QUANTIZERS[config.dtype]])
    return loaded


def run_config(
    config: GemmConfig,
    a: torch.Tensor,
    packed: PackedWeight,
    bias: torch.Tensor | None = None,
) -> torch.Tensor:
    """The product by one given kernel, whatever dispatch would choose; loads it."""
    device = prepared(config, a.device)
    m, n, k = a.shape[0], packed.num_rows, packed.num_cols
    choice = dispatch.launch_geometry(device.gpu, config, m, n, k)
    y = a.new_full((m, n), torch.nan)  # an element that is never written stays NaN
    cuda.run(device, choice, a, packed, bias, y, current_stream(a.device.index))
    return y


def check_case(case: KernelCase, device: torch.device) -> Comparison:
    """Run a case twice and compare with the float64 product; the second run must be bit-equal, and
    every semaphore zero after it."""
    a, weight, bias = make_operands(case, device)
    packed = cuda.pack_weight(weight)
    y = run_config(case.config, a, packed, bias)
    again = run_config(case.config, a, packed, bias)
    bits = cost.activation_bits_of(case.config)
    outcome = compare_linear(y, a, weight, bias, bits, case.config.variant)
    if not torch.equal(y.view(torch.int16), again.view(torch.int16)):
        outcome = _worse(outcome, f"two runs differ in {int((y != again).sum())} elements")
    if used := prepared(case.config, device).used_semaphores():
        outcome = _worse(outcome, f"{used} bytes of the semaphores are not zero after a launch")
    return outcome


def _worse(outcome: Comparison, reason: str) -> Comparison:
    return Comparison(
        outcome.relative_error, outcome.worst, outcome.num_wrong + 1, f"{reason}\n{outcome.report}"
    )
