# SPDX-License-Identifier: Apache-2.0
"""Round a weight to NVFP4 or MXFP4, and activations to FP8 or INT8. Torch only, on any device."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch.nn.functional import pad

from vllm_nvfp4.numerics.codes import encode_e2m1, pack_codes, round_e2m1
from vllm_nvfp4.numerics.formats import (
    E2M1_MAX,
    E4M3_MAX,
    E4M3_MIN_SUBNORMAL,
    E8M0_BIAS,
    INT8_GROUP,
    INT8_MAX,
    MXFP4,
    NVFP4,
    BlockFormat,
)
from vllm_nvfp4.numerics.weight import BlockScaledWeight, decode_block_scale


def to_e4m3(x: torch.Tensor) -> torch.Tensor:
    """Round to float8_e4m3fn, saturating at +-448 (torch's cast alone may give NaN beyond it)."""
    return x.clamp(-E4M3_MAX, E4M3_MAX).to(torch.float8_e4m3fn)


def _divide(x: torch.Tensor, by: float) -> torch.Tensor:
    """x / by, rounded once on every device: CUDA computes tensor / number as x * (1 / number)."""
    return x / x.new_full((), by)


def nvfp4_global_scale(weight: torch.Tensor) -> torch.Tensor:
    """global_scale = amax(|w|) / (6 * 448), so that the largest block scale is 448. A scalar, f32.

    An all-zero weight gets 1. Source: NVIDIA ModelOpt's ``weight_scale_2``.
    """
    return nvfp4_scale_from_amax(largest_magnitude(weight))


def largest_magnitude(x: torch.Tensor) -> torch.Tensor:
    """amax(|x|) without a copy of x. x: floating point; a scalar, float32."""
    low, high = x.aminmax()
    return torch.maximum(-low, high).float()


def nvfp4_scale_from_amax(amax: torch.Tensor) -> torch.Tensor:
    """amax / (6 * 448), and 1 where amax is 0; amax: any shape, float32."""
    return torch.where(amax > 0, _divide(amax, E2M1_MAX * E4M3_MAX), torch.ones_like(amax))


def block_scale_rtn(blocks: torch.Tensor, global_scale: torch.Tensor) -> torch.Tensor:
    """e4m3 scale = amax(block) / (6 * global_scale), never 0; 1 for a block of zeros.

    blocks: [..., 16] f32. Returns float8_e4m3fn, one per block.
    """
    scale = blocks.abs().amax(-1) / (E2M1_MAX * global_scale)
    # A block that is not all zero must not get scale 0: it would be lost entirely.
    nonzero = scale.clamp(min=E4M3_MIN_SUBNORMAL)
    return to_e4m3(torch.where(scale > 0, nonzero, torch.ones_like(scale)))


# Candidates around the scale of the absolute maximum, in steps of E4M3's own grid (8 to an octave):
# from 0.68 of it (the block's largest elements are clipped) to 1.7 times. 1.5 times, which maps
# the largest element to 4 instead of 6 ("four over six"), is among them.
_CANDIDATE_OFFSETS = (0, -1, 1, 2, 3, 4, -2, -3, 5, 6, -4)
_E4M3_MAX_BITS = 0x7E


def block_scale_candidates(rtn: torch.Tensor) -> torch.Tensor:
    """The block scales to try instead of ``rtn``, ``rtn`` itself first: [candidates, *] float32.

    rtn: float8_e4m3fn, positive, any shape
    """
    offsets = torch.tensor(_CANDIDATE_OFFSETS, dtype=torch.int16, device=rtn.device)
    bits = rtn.view(torch.uint8) + offsets.view(-1, *[1] * rtn.dim())
    return bits.clamp_(1, _E4M3_MAX_BITS).to(torch.uint8).view(torch.float8_e4m3fn).float()


# On a CPU rows are swept in pieces of this many elements: the intermediates stay in the cache, and
# torch does not split an operation that small over threads, which costs more than the operation.
_SWEEP_ELEMENTS = 1 << 14


def _block_scale_mse(blocks: torch.Tensor, global_scale: torch.Tensor) -> torch.Tensor:
    """The e4m3 scale, among the candidates, with the least squared error."""
    if blocks.device.type != "cpu":
        return _sweep(blocks, global_scale)
    rows = max(1, _SWEEP_ELEMENTS // (blocks.shape[1] * blocks.shape[2]))
    return torch.cat([_sweep(piece, global_scale) for piece in blocks.split(rows)])


def _sweep(blocks: torch.Tensor, global_scale: torch.Tensor) -> torch.Tensor:
    rtn = block_scale_rtn(blocks, global_scale)
    best_scale = rtn.float()
    best_error = torch.full_like(best_scale, torch.inf)
    for scale in block_scale_candidates(rtn):
        step = scale[..., None] * global_scale
        error = round_e2m1(blocks / step).mul_(step).sub_(blocks).square_().sum(-1)
        better = error < best_error
        best_error = torch.where(better, error, best_error)
        best_scale = torch.where(better, scale, best_scale)
    return best_scale.to(torch.float8_e4m3fn)


# A weight is quantised in pieces of this many elements (of one row at the least): what is needed
# besides the weight and the result is then the same for every layer, below 24 bytes for each.
CHUNK_ELEMENTS = 1 << 22


def row_chunks(num_rows: int, num_cols: int, multiple: int = 1) -> Iterator[slice]:
    """The rows of a matrix in pieces of about ``CHUNK_ELEMENTS``, each a multiple of rows."""
    step = max(CHUNK_ELEMENTS // (num_cols * multiple), 1) * multiple
    for first in range(0, num_rows, step):
        yield slice(first, min(first + step, num_rows))


def quantize_nvfp4(
    weight: torch.Tensor, method: str = "rtn", global_scale: torch.Tensor | None = None
) -> BlockScaledWeight:
    """Quantise a weight to NVFP4.

    weight:       [N, K] floating point, K a multiple of 16
    method:       "rtn" (block scale from the absolute maximum) or "mse" (a sweep of block scales,
                  four-over-six included)
    global_scale: scalar f32; default :func:`nvfp4_global_scale`
    """
    _check_blocks(weight, NVFP4)
    if global_scale is None:
        global_scale = nvfp4_global_scale(weight)
    return quantize_nvfp4_shards([weight], method, global_scale.reshape(1))


def quantize_nvfp4_shards(
    shards: Sequence[torch.Tensor], method: str, global_scales: torch.Tensor
) -> BlockScaledWeight:
    """:func:`quantize_nvfp4` of each shard of a fused layer, as one weight.

    shards: [N_i, K] each; global_scales: [shards] f32
    """
    num_rows, num_cols = sum(map(len, shards)), shards[0].shape[1]
    device = shards[0].device
    codes = torch.empty(num_rows, num_cols // 2, dtype=torch.uint8, device=device)
    scales = torch.empty(
        num_rows, num_cols // NVFP4.block_size, dtype=torch.float8_e4m3fn, device=device
    )
    rows_of_scales = torch.empty(num_rows, dtype=torch.float32, device=device)
    choose = {"rtn": block_scale_rtn, "mse": _block_scale_mse}[method]
    first = 0
    for shard, global_scale in zip(shards, global_scales, strict=True):
        for rows in row_chunks(*shard.shape):
            here = slice(first + rows.start, first + rows.stop)
            blocks = _blocks(shard[rows], NVFP4)
            block_scale = choose(blocks, global_scale)
            scales[here] = block_scale
            step = block_scale.float()[..., None] * global_scale
            codes[here] = pack_codes(encode_e2m1(blocks / step).flatten(1))
        rows_of_scales[first : first + len(shard)] = global_scale
        first += len(shard)
    return BlockScaledWeight(codes, scales, rows_of_scales, NVFP4)


def quantize_mxfp4(weight: torch.Tensor) -> BlockScaledWeight:
    """Quantise a weight [N, K] to MXFP4: scale = 2^(floor(log2 amax) - 2).

    Source: OCP Microscaling Formats v1.0, section 6.3 (emax of E2M1 is 2). An all-zero block gets
    2^-127.
    """
    _check_blocks(weight, MXFP4)
    num_rows, num_cols = weight.shape
    size, device = MXFP4.block_size, weight.device
    codes = torch.empty(num_rows, num_cols // 2, dtype=torch.uint8, device=device)
    scales = torch.empty(num_rows, num_cols // size, dtype=torch.uint8, device=device)
    for rows in row_chunks(num_rows, num_cols):
        blocks = _blocks(weight[rows], MXFP4)
        amax = blocks.abs().amax(-1)
        # frexp: amax = mantissa * 2^exponent with mantissa in [0.5, 1): floor(log2) = exponent - 1.
        _, exponent = torch.frexp(amax)
        biased = torch.where(amax > 0, exponent - 1 - 2 + E8M0_BIAS, 0).clamp(0, 254)
        scales[rows] = biased.to(torch.uint8)
        step = decode_block_scale(scales[rows], MXFP4)[..., None]
        codes[rows] = pack_codes(encode_e2m1(blocks / step).flatten(1))
    ones = torch.ones(num_rows, dtype=torch.float32, device=device)
    return BlockScaledWeight(codes, scales, ones, MXFP4)


def quantize_fp8_weight(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """:func:`quantize_fp8_per_row` of a weight [N, K], in pieces. Returns [N, K] and [N]."""
    q = torch.empty(weight.shape, dtype=torch.float8_e4m3fn, device=weight.device)
    scale = torch.empty(len(weight), dtype=torch.float32, device=weight.device)
    for rows in row_chunks(*weight.shape):
        q[rows], found = quantize_fp8_per_row(weight[rows])
        scale[rows] = found.squeeze(-1)
    return q, scale


def quantize_fp8_per_row(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """q = e4m3(x / scale), scale[m] = amax(|x[m]|) / 448 (1 for an all-zero row).

    x: [..., K] floating point. Returns q: [..., K] float8_e4m3fn, scale: [..., 1] float32.
    """
    x = x.float()
    amax = x.abs().amax(-1, keepdim=True)
    scale = torch.where(amax > 0, _divide(amax, E4M3_MAX), torch.ones_like(amax))
    return to_e4m3(x / scale), scale


def quantize_int8_per_group(
    x: torch.Tensor, group_size: int = INT8_GROUP
) -> tuple[torch.Tensor, torch.Tensor]:
    """q[m, k] = x[m, k] / scale[m, g] to the nearest integer, ties to even; g = k // group_size,
    scale[m, g] = amax(|x[m]| over the group) / 127

    Where amax / 127 is below float32's normal numbers, so for a group of zeros, scale is 1 and q
    is 0. A NaN or an infinity makes its group's scale NaN or infinite and its own q 0: a product
    with them is NaN.

    x: [..., K] floating point; the last group may be shorter.
    Returns q [..., K] int8 in -127..127 and scale [..., ceil(K / group_size)] float32.

    |x - q * scale| <= amax * (1 / 254 + 2^-23): half a step, and two roundings of the quotient.
    """
    columns = x.shape[-1]
    groups = pad(x.float(), (0, -columns % group_size)).unflatten(-1, (-1, group_size))
    scale = _divide(groups.abs().amax(-1, keepdim=True), INT8_MAX)
    is_lost = scale < torch.finfo(torch.float32).smallest_normal
    scale = torch.where(is_lost, torch.ones_like(scale), scale)
    q = (groups / scale).round().nan_to_num(nan=0.0).to(torch.int8)
    return q.flatten(-2)[..., :columns].contiguous(), scale.squeeze(-1)


def _check_blocks(weight: torch.Tensor, fmt: BlockFormat) -> None:
    if weight.dim() != 2 or weight.shape[1] % fmt.block_size:
        raise ValueError(
            f"{fmt.name}: a weight of shape {list(weight.shape)} cannot be cut into blocks of "
            f"{fmt.block_size}; it needs two dimensions and K a multiple of {fmt.block_size}"
        )


def _blocks(weight: torch.Tensor, fmt: BlockFormat) -> torch.Tensor:
    return weight.float().view(weight.shape[0], -1, fmt.block_size)
