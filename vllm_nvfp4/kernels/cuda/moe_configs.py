# SPDX-License-Identifier: Apache-2.0
"""The compiled kernels of routed experts: instantiations, launch geometry, and their arguments.

A :class:`MoeConfig` holds one tile of the dense kernels for each size that the schedule may ask
for; the GPU itself chooses among them, expert by expert (csrc/moe.cuh, csrc/moe_route.cuh).
"""

from __future__ import annotations

import ctypes
import math
from dataclasses import dataclass

from vllm_nvfp4.kernels.cuda.configs import (
    CPP_NAMES,
    STREAMING_BLOCK_M,
    GemmConfig,
    TranslationUnit,
    argument_fields,
)

# Tokens of a tile; each expert takes whole ones of the largest and then one that fits the rest.
TILE_SIZES = (8, 16, 32, 64)
# Up to this many tokens no expert has more, as a token chooses an expert once; where one names an
# expert twice, the schedule cuts what is beyond the largest tile into tiles of their own.
DECODE_TOKENS = 16
# The routing kernel counts in shared memory.
MAX_EXPERTS = 1024

# What a kernel applies to the gate, or to the only half: csrc/moe_params.cuh's Function.
FUNCTIONS = ("linear", "silu", "gelu", "gelu_tanh", "relu2")

_SCHEDULE_HEADER = _SCHEDULE_ENTRY = 4


class MoeParams(ctypes.Structure):
    """The one argument of the grouped product; csrc/moe_params.cuh says what each is."""

    _fields_ = argument_fields(
        "a a_scale codes block_scale global_scale bias y schedule choices",
        "n k a_stride y_stride choices_per_row is_gated function",
        "limit alpha beta",
    )


class RouteParams(ctypes.Structure):
    """The one argument of the routing kernel; csrc/moe_params.cuh says what each is."""

    _fields_ = argument_fields(
        "ids expert_map schedule sorted",
        "num_choices num_experts num_ids largest_tile",
    )


class CombineParams(ctypes.Structure):
    """The one argument of the combining kernel; csrc/moe_params.cuh says what each is."""

    _fields_ = argument_fields(
        "x weights ids expert_map y",
        "num_tokens num_choices hidden_size num_experts num_ids",
    )


@dataclass(frozen=True)
class MoeConfig(TranslationUnit):
    """One instantiation of the grouped product.

    stem:   "moe_w4a16", "moe_w4a8" or "moe_w4i8", the .cuh file
    family: "decode", for at most DECODE_TOKENS tokens, or "prefill"
    tiles:  the dense kernels' tiles, one for each size that the family's schedules may hold
    blocks_per_sm: the occupancy the registers must allow; also thread blocks that are launched
    """

    stem: str
    family: str
    tiles: tuple[GemmConfig, ...]
    blocks_per_sm: int

    @property
    def dtype(self) -> str:
        return self.tiles[0].dtype

    @property
    def fmt_name(self) -> str:
        return self.tiles[0].fmt_name

    @property
    def block_n(self) -> int:
        return self.tiles[0].block_n

    @property
    def largest_tile(self) -> int:
        """The most tokens that an entry of its schedules may have."""
        return self.tiles[-1].block_m

    @property
    def symbol(self) -> str:
        """The C name: sm89_<format>_<stem>_<dtype>_<family>"""
        return f"sm89_{self.fmt_name}_{self.stem}_{self.dtype}_{self.family}"

    @property
    def definition(self) -> str:
        names = [f"{self.symbol}_m{tile.block_m}" for tile in self.tiles]
        text = "".join(
            f"using {name} = {tile.cpp_type};\n"
            f"static_assert({self.stem}::Smem<{name}>::kBytes == {tile.smem_bytes},\n"
            f'              "moe_configs.py and {self.stem}.cuh disagree about shared memory");\n'
            for name, tile in zip(names, self.tiles, strict=True)
        )
        return (
            f"{text}static_assert(sizeof(MoeParams) == {ctypes.sizeof(MoeParams)},\n"
            '              "moe_configs.py and moe_params.cuh disagree about the parameters");\n'
            f'extern "C" __global__ void __launch_bounds__({self.threads}, {self.blocks_per_sm})\n'
            f"{self.symbol}(const __grid_constant__ MoeParams p) {{\n"
            f"  moe::run<{self.stem}::Gemm, {', '.join(names)}>(p);\n"
            "}\n"
        )

    @property
    def threads(self) -> int:
        return self.tiles[0].threads

    @property
    def smem_bytes(self) -> int:
        return max(tile.smem_bytes for tile in self.tiles)

    @property
    def min_arch(self) -> int:
        return self.tiles[0].min_arch


@dataclass(frozen=True)
class RouteConfig(TranslationUnit):
    """The routing kernel: one thread block for each local expert.

    mark_words: words of 32 choices that it marks in one go; it reads twice what is beyond them
    """

    threads: int = 256
    mark_words: int = 4096
    stem: str = "moe_route"
    min_arch: int = 80

    @property
    def smem_bytes(self) -> int:
        """A counter for each expert and for each warp, and the marks."""
        return 4 * (MAX_EXPERTS + self.threads // 32 + self.mark_words)

    @property
    def symbol(self) -> str:
        return f"sm89_{self.stem}"

    @property
    def definition(self) -> str:
        return (
            f"static_assert(sizeof(RouteParams) == {ctypes.sizeof(RouteParams)},\n"
            '              "moe_configs.py and moe_params.cuh disagree about the parameters");\n'
            f'extern "C" __global__ void __launch_bounds__({self.threads})\n'
            f"{self.symbol}(const __grid_constant__ RouteParams p) {{\n"
            f"  moe_route::run<{self.threads}, {self.mark_words}>(p);\n"
            "}\n"
        )


@dataclass(frozen=True)
class CombineConfig(TranslationUnit):
    """The weighted sum of each token's choices: grid (M, ceil(H / COLUMNS), 1)."""

    dtype: str
    threads: int = 128
    stem: str = "moe_combine"
    smem_bytes: int = 0
    min_arch: int = 80

    @property
    def columns(self) -> int:
        """Of one thread block."""
        return 8 * self.threads

    @property
    def symbol(self) -> str:
        return f"sm89_{self.stem}_{self.dtype}"

    @property
    def definition(self) -> str:
        return (
            f"static_assert(sizeof(CombineParams) == {ctypes.sizeof(CombineParams)},\n"
            '              "moe_configs.py and moe_params.cuh disagree about the parameters");\n'
            f'extern "C" __global__ void __launch_bounds__({self.threads})\n'
            f"{self.symbol}(const __grid_constant__ CombineParams p) {{\n"
            f"  moe_combine::run<Dtype::{CPP_NAMES[self.dtype]}, {self.threads}>(p);\n"
            "}\n"
        )


# (block_m, block_n, block_k, stages, warps_m, warps_n, warps_k) of each tile, and blocks on an SM.
# With few tokens narrow tiles spread an expert over more SMs; with many, two blocks of eight warps.
_Tile = tuple[int, int, int, int, int, int, int]
_Shape = tuple[tuple[_Tile, ...], int]
_DECODE: _Shape = (((8, 64, 256, 3, 1, 2, 2), (16, 64, 256, 3, 1, 2, 2)), 3)
_PREFILL: _Shape = (
    (
        (8, 128, 256, 3, 1, 4, 2),
        (16, 128, 128, 4, 1, 4, 2),
        (32, 128, 64, 4, 1, 8, 1),
        (64, 128, 64, 3, 1, 8, 1),
    ),
    2,
)
# MXFP4 keeps the sums of a block beside the accumulators: a second block would spill registers.
_PREFILL_MXFP4: _Shape = (
    (
        (8, 128, 256, 3, 1, 4, 2),
        (16, 128, 128, 4, 1, 4, 2),
        (32, 128, 128, 4, 1, 4, 2),
        (64, 128, 128, 3, 1, 4, 2),
    ),
    1,
)
_PREFILL_A8: _Shape = (tuple((m, 128, 64, 4, 1, 4, 1) for m in TILE_SIZES), 2)
_PREFILL_I8: _Shape = (tuple((m, 128, 64, 4, 1, 8, 1) for m in TILE_SIZES), 1)
_FAMILIES = (
    ("moe_w4a16", "decode", "nvfp4", _DECODE),
    ("moe_w4a16", "decode", "mxfp4", _DECODE),
    ("moe_w4a16", "prefill", "nvfp4", _PREFILL),
    ("moe_w4a16", "prefill", "mxfp4", _PREFILL_MXFP4),
    ("moe_w4a8", "prefill", "nvfp4", _PREFILL_A8),
    ("moe_w4a8", "prefill", "mxfp4", _PREFILL_A8),
    ("moe_w4i8", "prefill", "nvfp4", _PREFILL_I8),
    ("moe_w4i8", "prefill", "mxfp4", _PREFILL_I8),
)


def _config(
    stem: str, family: str, fmt_name: str, dtype: str, tiles: tuple[_Tile, ...], blocks: int
) -> MoeConfig:
    dense = stem.replace("moe", "gemm")
    return MoeConfig(
        stem,
        family,
        tuple(
            GemmConfig(
                dense,
                dtype,
                fmt_name,
                *tile,
                blocks,
                variant="int8" if dense == "gemm_w4i8" else "exact",
                streams_weights=dense == "gemm_w4a16" and tile[0] <= STREAMING_BLOCK_M,
            )
            for tile in tiles
        ),
        blocks,
    )


MOE_CONFIGS = tuple(
    _config(stem, family, fmt_name, dtype, *shape)
    for stem, family, fmt_name, shape in _FAMILIES
    for dtype in ("bf16", "fp16")
)
ROUTE_CONFIG = RouteConfig()
COMBINE_CONFIGS = (CombineConfig("bf16"), CombineConfig("fp16"))
AnyMoeConfig = MoeConfig | RouteConfig | CombineConfig
ALL_MOE_CONFIGS: tuple[AnyMoeConfig, ...] = (*MOE_CONFIGS, ROUTE_CONFIG, *COMBINE_CONFIGS)


def max_entries(num_choices: int, num_experts: int, largest_tile: int = TILE_SIZES[-1]) -> int:
    """The most tiles that a schedule of so many choices can hold: one for each expert that was
    chosen, and as many as the largest size fits into the choices."""
    return min(num_choices, num_experts) + num_choices // largest_tile


def schedule_bytes(num_choices: int, num_experts: int, largest_tile: int = TILE_SIZES[-1]) -> int:
    """Bytes of ``MoeParams.schedule``."""
    entries = max_entries(num_choices, num_experts, largest_tile)
    return 4 * (_SCHEDULE_HEADER + _SCHEDULE_ENTRY * entries)


def moe_grid(
    config: MoeConfig, num_choices: int, num_experts: int, num_columns: int, is_gated: bool,
    num_sms: int,
) -> tuple[int, int, int]:  # fmt: skip
    """Thread blocks that stay on the GPU: as many as fit, or as there can be tiles.

    num_columns: of y
    """
    columns = config.block_n // 2 if is_gated else config.block_n
    tiles = max_entries(num_choices, num_experts) * math.ceil(num_columns / columns)
    return min(tiles, num_sms * config.blocks_per_sm), 1, 1
