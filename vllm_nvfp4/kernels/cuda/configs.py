# SPDX-License-Identifier: Apache-2.0
"""The compiled kernels: every instantiation, its launch geometry, and the structs it is given.

One :class:`GemmConfig` is one translation unit with one ``extern "C"`` kernel. Python is the owner
of the list; the C++ side is templates (csrc/gemm_w4a16.cuh, csrc/gemm_w4a8.cuh) and checks the same
sizes with static_assert.
"""

from __future__ import annotations

import ctypes
import math
from dataclasses import dataclass, replace

from vllm_nvfp4.numerics.formats import FORMATS, BlockFormat

# A warp's MMA covers 16 weight rows; four MMAs of K = 16 make one packed tile (layout.py).
TILE_N = 16
TILE_K = 64

# Up to this many tokens the weights are streamed: then no two warps unpack the same ones, and
# shared memory would only cost instructions.
STREAMING_BLOCK_M = 16

# One block may use 99 KB of shared memory on sm_86, sm_89 and sm_120 (more elsewhere).
MAX_SMEM_BYTES = 99 * 1024

_ELEMENT_BYTES = {"bf16": 2, "fp16": 2}
# Activation rows in shared memory are padded by one access unit, so that the eight rows a warp
# reads at once fall into different banks: 32 bytes for 8-byte loads (half a warp reads 4 rows of
# 32 bytes), 16 bytes for ldmatrix (8 rows of 16 bytes).
_ROW_PAD_BYTES = {"gemm_w4a16": 32, "gemm_w4a8": 16, "gemm_w4i8": 16}
# Floats that pad a row of the epilogue's tile: rows 2t of a fragment then differ by 8 banks.
_EPILOGUE_PAD = 4
# Split-K: how many partial sums an output may have, the K steps below which a split does not pay,
# and what filling the pipeline and adding the partial sums cost, in units of one K step.
_MAX_SPLITS = 16
_MIN_STEPS_PER_SPLIT = 4
_SPLIT_OVERHEAD_STEPS = 2.0


def argument_fields(
    pointers: str, ints: str, floats: str = ""
) -> tuple[tuple[str, type[ctypes._SimpleCData]], ...]:
    """The fields of a kernel's one argument, in this order: names separated by spaces."""
    kinds = ((pointers, ctypes.c_void_p), (ints, ctypes.c_int32), (floats, ctypes.c_float))
    return tuple((name, kind) for names, kind in kinds for name in names.split())


class TranslationUnit:
    """What every configuration of a kernel has: the file that its text stands in.

    stem:       the .cuh file
    definition: the text but for its #include: several may stand in one file
    """

    stem: str

    @property
    def definition(self) -> str:
        raise NotImplementedError

    @property
    def source(self) -> str:
        """The translation unit."""
        return f'#include "{self.stem}.cuh"\n{self.definition}'


class GemmParams(ctypes.Structure):
    """The one argument of a GEMM kernel; mirrors ``GemmParams`` of csrc/gemm_params.cuh.

    a:            [M, K] activations; bf16 or fp16 (w4a16), e4m3 (w4a8), int8 (w4i8); rows 16-byte
                  aligned
    a_scale:      float32, multiplies: [M] (w4a8), [M, ceil(K / 64)] (w4i8); else 0
    codes, block_scale: the tensors of a :class:`~vllm_nvfp4.kernels.layout.PackedWeight`
    global_scale: [N] float32, multiplies
    bias:         [N] in y's dtype, or 0
    y:            [M, N] bf16 or fp16
    partials:     ``workspace_bytes`` of scratch memory, any content (0 for one split)
    semaphores:   ``semaphore_bytes`` of zeros; a launch leaves them zero
    a_stride, y_stride: elements from one token to the next; a_stride * element size is a
                  multiple of 16
    """

    _fields_ = argument_fields(
        "a a_scale codes block_scale global_scale bias y partials semaphores",
        "m n k a_stride y_stride num_splits",
    )


class QuantizeParams(ctypes.Structure):
    """The one argument of the activation quantiser; mirrors csrc/quantize_a8.cuh.

    a:       [M, K] bf16 or fp16, rows a_stride elements apart, 16-byte aligned
    q:       [M, K] e4m3 or int8, rows q_stride bytes apart, 16-byte aligned
    a_scale: float32, [M] or, for int8, [M, ceil(K / 64)]
    """

    _fields_ = argument_fields(
        "a q a_scale",
        "m k a_stride q_stride",
    )


@dataclass(frozen=True)
class GemmConfig(TranslationUnit):
    """One instantiation of a GEMM kernel.

    stem:       "gemm_w4a16", "gemm_w4a8" or "gemm_w4i8", the .cuh file
    dtype:      "bf16" or "fp16": of y and bias, and of a where the activations are 16 bits wide
    fmt_name:   "nvfp4" or "mxfp4"
    block_m:    tokens of a thread block's tile
    block_n:    weight rows of the tile
    block_k:    K step of the pipeline
    stages:     pipeline depth
    warps_m, warps_n, warps_k: how the warps divide the tile; warps_k > 1 splits a K step
    blocks_per_sm: the occupancy the registers must allow
    variant:    "exact"; for w4i8 "int8"; or for w4a8
                "f16_partials": sums of one to four blocks are rounded to f16, for twice the MMA
                rate on GeForce cards; opt-in, at most 5e-4 relative
                "folded": the weights are code * block scale rounded to e4m3, for MMAs of twice the
                depth and no scaling of their sums; nvfp4 only; opt-in, 2 to 4 % of a row
                "imma": the exact variant's schedule with integer MMA, for timing on GPUs without
                native FP8 mma.sync; its results mean nothing and it is not shipped
    streams_weights: the weights go from global memory straight to registers, not through the
                pipeline's shared memory
    """

    stem: str
    dtype: str
    fmt_name: str
    block_m: int
    block_n: int
    block_k: int
    stages: int
    warps_m: int
    warps_n: int
    warps_k: int
    blocks_per_sm: int
    variant: str = "exact"
    streams_weights: bool = False

    @property
    def fmt(self) -> BlockFormat:
        return FORMATS[self.fmt_name]

    @property
    def symbol(self) -> str:
        """The C name: sm89_<format>_<stem>_<dtype>_m<tokens>n<rows>k<step>s<stages>_w<m>x<n>x<k>"""
        variant = "_streamed" if self.streams_weights else ""
        variant += "" if self.variant in ("exact", "int8") else f"_{self.variant}"
        return (
            f"sm89_{self.fmt_name}_{self.stem}_{self.dtype}"
            f"_m{self.block_m}n{self.block_n}k{self.block_k}s{self.stages}"
            f"_w{self.warps_m}x{self.warps_n}x{self.warps_k}{variant}"
        )

    @property
    def source(self) -> str:
        """The translation unit."""
        define = "#define VNVFP4_IMMA_STAND_IN 1\n" if self.variant == "imma" else ""
        return define + super().source

    @property
    def definition(self) -> str:
        space, config = _NAMESPACE[self.stem], f"{self.symbol}_config"
        return (
            f"using {config} = {self.cpp_type};\n"
            f"static_assert(sizeof(GemmParams) == {ctypes.sizeof(GemmParams)},\n"
            '              "configs.py and gemm_params.cuh disagree about the parameters");\n'
            f"static_assert({space}::Smem<{config}>::kBytes == {self.smem_bytes},\n"
            f'              "configs.py and {self.stem}.cuh disagree about shared memory");\n'
            f'extern "C" __global__ void __launch_bounds__({self.threads}, {self.blocks_per_sm})\n'
            f"{self.symbol}(const __grid_constant__ GemmParams p) {{\n"
            f"  gemm::run<{space}::Gemm, {config}>(p);\n"
            "}\n"
        )

    @property
    def cpp_type(self) -> str:
        """The instantiation of gemm_params.cuh's GemmConfig."""
        partial = {"f16_partials": "kF16", "folded": "kFolded", "int8": "kS32"}.get(
            self.variant, "kF32"
        )
        weights = "kStreamed" if self.streams_weights else "kShared"
        return (
            f"GemmConfig<Dtype::{CPP_NAMES[self.dtype]}, Format::{CPP_NAMES[self.fmt_name]},"
            f" {self.block_m}, {self.block_n}, {self.block_k}, {self.stages},"
            f" {self.warps_m}, {self.warps_n}, {self.warps_k},"
            f" Partial::{partial}, Weights::{weights}>"
        )

    @property
    def num_warps(self) -> int:
        return self.warps_m * self.warps_n * self.warps_k

    @property
    def threads(self) -> int:
        return 32 * self.num_warps

    @property
    def min_arch(self) -> int:
        return 89 if self.stem == "gemm_w4a8" else 80

    @property
    def activation_bytes(self) -> int:
        """Bytes of one element of a."""
        return _ELEMENT_BYTES[self.dtype] if self.stem == "gemm_w4a16" else 1

    @property
    def stage_bytes(self) -> int:
        """Shared memory of one pipeline stage: codes, block scales, activations and, where a token
        has several, their scales."""
        weights = 0 if self.streams_weights else self.block_n * self.block_k
        codes, scales = weights // 2, weights // self.fmt.block_size
        row = self.block_k * self.activation_bytes + _ROW_PAD_BYTES[self.stem]
        # A scale of four bytes for each token, in sixteens, and packed tile.
        token_scales = -(-self.block_m // 16) * 64 * (self.block_k // TILE_K)
        token_scales *= self.stem == "gemm_w4i8"
        return codes + scales + self.block_m * row + token_scales

    @property
    def smem_bytes(self) -> int:
        """Dynamic shared memory: the pipeline, whose place the epilogue's tile takes after it."""
        tile = self.warps_k * self.block_m * (self.block_n + _EPILOGUE_PAD) * 4
        return max(self.stages * self.stage_bytes, tile)


CPP_NAMES = {"bf16": "kBf16", "fp16": "kFp16", "nvfp4": "kNvfp4", "mxfp4": "kMxfp4"}
_NAMESPACE = {"gemm_w4a16": "w4a16", "gemm_w4a8": "w4a8", "gemm_w4i8": "w4i8"}


@dataclass(frozen=True)
class QuantizeConfig(TranslationUnit):
    """An activation quantiser, one thread block per token: grid (M, 1, 1).

    stem: "quantize_a8": q = e4m3(a / a_scale), a_scale = amax(|a|) / 448 of a row; or
          "quantize_i8": numerics' quantize_int8_per_group
    smem_bytes: one float per warp, where the maximum is the whole row's
    """

    dtype: str
    threads: int = 256
    stem: str = "quantize_a8"
    smem_bytes: int = 32
    min_arch: int = 89

    @property
    def symbol(self) -> str:
        return f"sm89_{self.stem}_{self.dtype}"

    @property
    def definition(self) -> str:
        return (
            f"static_assert(sizeof(QuantizeParams) == {ctypes.sizeof(QuantizeParams)},\n"
            f'              "configs.py and {self.stem}.cuh disagree about the parameters");\n'
            f'extern "C" __global__ void __launch_bounds__({self.threads})\n'
            f"{self.symbol}(const __grid_constant__ QuantizeParams p) {{\n"
            f"  {self.stem}::run<Dtype::{CPP_NAMES[self.dtype]}, {self.threads}>(p);\n"
            "}\n"
        )


def _gemm_configs() -> tuple[GemmConfig, ...]:
    # (block_m, block_n, block_k, stages, warps_m, warps_n, warps_k, blocks_per_sm)
    w4a16 = [
        (8, 64, 256, 3, 1, 2, 2, 4),
        (8, 128, 256, 3, 1, 4, 2, 2),
        (16, 64, 256, 3, 1, 2, 2, 3),
        (16, 128, 256, 3, 1, 4, 2, 2),
        (32, 128, 128, 4, 1, 4, 2, 1),
        (64, 128, 128, 3, 1, 4, 2, 1),
        (128, 128, 64, 3, 2, 4, 1, 1),
    ]
    w4a8 = [
        (64, 128, 64, 4, 1, 4, 1, 2),
        (128, 128, 128, 3, 2, 4, 1, 1),
    ]
    # A warp has all tokens of its rows: unpacking and folding them is shared most widely.
    w4a8_folded = [(64, 128, 128, 4, 1, 8, 1, 1), (128, 128, 128, 3, 1, 8, 1, 1)]
    # Here too; and the more tokens, the fewer issue slots for each, which are the bound.
    w4i8 = [
        (64, 128, 128, 3, 1, 8, 1, 1),
        (128, 128, 128, 3, 1, 8, 1, 1),
        (192, 128, 64, 4, 1, 8, 1, 1),
    ]
    # MXFP4 keeps the sums of a block beside the accumulators: here a shorter step makes room.
    w4a16_mxfp4 = [t if t[:2] != (16, 128) else (16, 128, 128, 4, 1, 4, 2, 2) for t in w4a16]
    families = (
        ("gemm_w4a16", "nvfp4", "exact", w4a16),
        ("gemm_w4a16", "mxfp4", "exact", w4a16_mxfp4),
        ("gemm_w4a8", "nvfp4", "exact", w4a8),
        ("gemm_w4a8", "mxfp4", "exact", w4a8),
        ("gemm_w4a8", "nvfp4", "f16_partials", w4a8),
        ("gemm_w4a8", "mxfp4", "f16_partials", w4a8),
        ("gemm_w4a8", "nvfp4", "folded", w4a8_folded),
        ("gemm_w4i8", "nvfp4", "int8", w4i8),
        ("gemm_w4i8", "mxfp4", "int8", w4i8),
    )
    return tuple(
        GemmConfig(stem, dtype, fmt, *tile, variant, tile[0] <= STREAMING_BLOCK_M)
        for stem, fmt, variant, tiles in families
        for tile in tiles
        for dtype in ("bf16", "fp16")
    )


GEMM_CONFIGS = _gemm_configs()
QUANTIZE_CONFIGS = (
    QuantizeConfig("bf16"),
    QuantizeConfig("fp16"),
    QuantizeConfig("bf16", stem="quantize_i8", smem_bytes=0, min_arch=80),
    QuantizeConfig("fp16", stem="quantize_i8", smem_bytes=0, min_arch=80),
)
KernelConfig = GemmConfig | QuantizeConfig
ALL_CONFIGS: tuple[KernelConfig, ...] = GEMM_CONFIGS + QUANTIZE_CONFIGS


def imma_stand_in(config: GemmConfig) -> GemmConfig:
    """The W4A8 kernel with integer MMA in the place of FP8 MMA: same schedule, wrong numbers."""
    if (config.stem, config.variant) != ("gemm_w4a8", "exact"):
        raise ValueError(f"{config.symbol}: only gemm_w4a8's exact variant has a stand-in")
    return replace(config, variant="imma")


def num_tiles(config: GemmConfig, m: int, n: int) -> int:
    """Output tiles: ceil(M / block_m) * ceil(N / block_n)."""
    return math.ceil(m / config.block_m) * math.ceil(n / config.block_n)


def num_splits(config: GemmConfig, m: int, n: int, k: int, num_sms: int) -> int:
    """Into how many parts the K loop is cut, so that few thread blocks still fill the GPU.

    Minimises waves * (K steps of the longest part + overhead); of equals, the fewest parts.
    """
    tiles = num_tiles(config, m, n)
    steps = math.ceil(k / config.block_k)
    slots = num_sms * config.blocks_per_sm
    best, best_cost = 1, math.ceil(tiles / slots) * (steps + _SPLIT_OVERHEAD_STEPS)
    for splits in range(2, min(_MAX_SPLITS, steps // _MIN_STEPS_PER_SPLIT) + 1):
        waves = math.ceil(tiles * splits / slots)
        cost = waves * (math.ceil(steps / splits) + 2 * _SPLIT_OVERHEAD_STEPS)
        if cost < best_cost:
            best, best_cost = splits, cost
    return best


def grid(config: GemmConfig, m: int, n: int, k: int, num_sms: int) -> tuple[int, int, int]:
    """The launch grid: (output tiles, splits of K, 1). ``GemmParams.num_splits`` is its second."""
    return num_tiles(config, m, n), num_splits(config, m, n, k, num_sms), 1


def workspace_bytes(config: GemmConfig, m: int, n: int, k: int, num_sms: int) -> int:
    """Bytes of ``GemmParams.partials`` for the splits that :func:`num_splits` chooses."""
    return partials_bytes(config, m, n, num_splits(config, m, n, k, num_sms))


def partials_bytes(config: GemmConfig, m: int, n: int, splits: int) -> int:
    """Bytes of ``GemmParams.partials``: one float32 tile per output tile and split; 0 unsplit."""
    tiles = num_tiles(config, m, n)
    return 0 if splits == 1 else tiles * splits * config.block_m * config.block_n * 4


def semaphore_bytes(config: GemmConfig, m: int, n: int) -> int:
    """Bytes of ``GemmParams.semaphores``: one int32 per output tile."""
    return 4 * num_tiles(config, m, n)
