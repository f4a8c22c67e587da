# SPDX-License-Identifier: Apache-2.0
"""From a layer's stored tensors to the one in-memory form, with the checks that need the values.

A bad block scale poisons sixteen weights without a trace in the output's shape or type, so every
scale is looked at once, at load, on the device that holds it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch

from vllm_nvfp4.checkpoints.forms import tile_size
from vllm_nvfp4.checkpoints.spec import CheckpointError, LayerKind, LayerSpec, Role
from vllm_nvfp4.numerics.formats import MXFP4, BlockFormat
from vllm_nvfp4.numerics.hadamard import rotate_blocks
from vllm_nvfp4.numerics.weight import BlockScaledWeight

_REBUILD = "The file is damaged or was written wrongly: download or quantise it again."


def to_weight(
    spec: LayerSpec,
    tensors: Mapping[Role, torch.Tensor],
    shard_rows: Sequence[int],
    layer: str = "layer",
) -> BlockScaledWeight:
    """The layer as BlockScaledWeight; see there for the equation.

    spec:       a MICROSCALED layer's
    tensors:    CODES [N, K/2] uint8; BLOCK_SCALE [N, K/spec.scale_block], float8_e4m3fn or uint8;
                and, where the spec has it, GLOBAL_SCALE or GLOBAL_DIVISOR, one value per shard in
                any shape, float32
    shard_rows: rows of each shard of a fused layer, in order; they add up to N
    layer:      name for messages

    Each row keeps its own shard's multiplier. A divisor's reciprocal is formed once, in float64.
    Raises CheckpointError for a wrong shape, for a NaN, infinite or negative block scale, for a
    global scale that is not positive and finite, and for a NaN or an infinity among what
    activations are multiplied by (PRE_SCALE, HADAMARD). A zero block scale is a legal all-zero
    block.
    """
    if spec.fmt is None:
        raise ValueError(f"{layer}: to_weight needs a microscaled layer, got {spec.kind}")
    codes, block_scale = tensors[Role.CODES], tensors[Role.BLOCK_SCALE]
    num_rows, num_cols = codes.shape[0], codes.shape[1] * 2
    check_blocks(layer, spec, num_cols)
    needed = (num_rows, num_cols // spec.scale_block)
    if tuple(block_scale.shape) != needed:
        raise CheckpointError(
            layer, _name(spec, Role.BLOCK_SCALE), list(block_scale.shape), list(needed), _REBUILD
        )
    check_block_scale(block_scale, spec.fmt, f"{layer}.{_name(spec, Role.BLOCK_SCALE)}")
    for role in (Role.PRE_SCALE, Role.HADAMARD):
        if (values := tensors.get(role)) is not None:
            name = f"{layer}.{_name(spec, role)}"
            _refuse(~values.isfinite(), values, name, "finite values")
    block_scale = block_scale.view(torch.uint8)
    if spec.fmt.scale_type == "e4m3":
        block_scale = torch.where(block_scale == 0x80, 0, block_scale)  # kernels take no sign
    block_scale = block_scale.repeat_interleave(spec.scale_block // spec.fmt.block_size, dim=1)
    if spec.fmt.scale_type == "e4m3":
        block_scale = block_scale.view(torch.float8_e4m3fn)
    return BlockScaledWeight(
        codes.contiguous(),
        block_scale.contiguous(),
        _row_multiplier(spec, tensors, shard_rows, layer).to(codes.device),
        spec.fmt,
    )


def fp8_to_rows(
    spec: LayerSpec,
    tensors: Mapping[Role, torch.Tensor],
    shard_rows: Sequence[int],
    layer: str = "layer",
) -> tuple[torch.Tensor, torch.Tensor]:
    """W[n, k] = weight[n, k] * row_scale[n] of an FP8 layer.

    tensors: WEIGHT [N, K] float8_e4m3fn, and WEIGHT_SCALE with one value per shard or ROW_SCALE
             with one per row
    Returns (weight [N, K] float8_e4m3fn, row_scale [N] float32). Raises CheckpointError for a NaN
    weight and for a scale that is not positive and finite.
    """
    weight = tensors[Role.WEIGHT]
    is_nan = (weight.view(torch.uint8) & 0x7F) == 0x7F
    _refuse(is_nan, weight, f"{layer}.{_name(spec, Role.WEIGHT)}", "finite weights")
    role = Role.ROW_SCALE if spec.tensor(Role.ROW_SCALE) else Role.WEIGHT_SCALE
    scale = _positive(tensors[role], f"{layer}.{_name(spec, role)}")
    if role is Role.WEIGHT_SCALE:
        scale = _per_row(scale, shard_rows, f"{layer}.{_name(spec, role)}")
    if len(scale) != len(weight):
        raise CheckpointError(
            layer, _name(spec, role), f"{len(scale)} values", f"{len(weight)}, one a row", _REBUILD
        )
    return weight, scale.to(weight.device)


def check_blocks(
    layer: str, spec: LayerSpec, num_cols: int, num_cols_total: int | None = None
) -> None:
    """Raise CheckpointError unless blocks fit the columns of a layer, or of one rank's part of it.

    num_cols_total: columns of the whole layer, where ``num_cols`` are one tensor-parallel rank's
    """
    block = max(spec.scale_block, spec.hadamard_size, 1)
    if num_cols % block == 0:
        return
    what = "rotation" if spec.hadamard_size == block else f"block of {spec.algo}"
    needed = f"a multiple of {block}, the {what}"
    if num_cols_total is None or num_cols_total == num_cols:
        todo = "Quantise the model again with this layer left as it is (ignore list)."
        raise CheckpointError("checkpoint", f"{layer}: K", num_cols, needed, todo)
    ranks = num_cols_total // max(num_cols, 1)
    raise CheckpointError(
        "tensor parallelism",
        f"{layer}: K per rank",
        f"{num_cols} ({num_cols_total} over {ranks} ranks)",
        needed,
        f"Choose a --tensor-parallel-size that divides {num_cols_total // block}.",
    )


def check_block_scale(block_scale: torch.Tensor, fmt: BlockFormat, name: str) -> None:
    """Raise CheckpointError for NaN, infinite or negative block scales, judged by their bits.

    E4M3: 0x7F and 0xFF are NaN, the sign bit with anything but zero is negative. E8M0: 255 is NaN.
    """
    bits = block_scale.view(torch.uint8)
    if fmt.scale_type == "e4m3":
        magnitude = bits & 0x7F
        is_bad = (magnitude == 0x7F) | (bits > 0x80)  # 0x80 is -0.0: legal
        _refuse(is_bad, block_scale, name, "block scales that are finite and not negative")
    else:
        _refuse(bits == 0xFF, block_scale, name, "E8M0 block scales below 255 (NaN)")


def check_dense(weight: torch.Tensor, name: str) -> None:
    """Raise CheckpointError for a NaN or an infinity in a 16- or 32-bit weight."""
    if weight.numel() and not all(bool(end.isfinite()) for end in weight.aminmax()):
        _refuse(~weight.isfinite(), weight, name, "finite weights")


def _row_multiplier(
    spec: LayerSpec,
    tensors: Mapping[Role, torch.Tensor],
    shard_rows: Sequence[int],
    layer: str,
) -> torch.Tensor:
    for role in (Role.GLOBAL_SCALE, Role.GLOBAL_DIVISOR):
        if spec.tensor(role) is None:
            continue
        name = f"{layer}.{_name(spec, role)}"
        scale = _positive(tensors[role], name)
        if role is Role.GLOBAL_DIVISOR:
            scale = _positive(scale.double().reciprocal().float(), f"1 / {name}")
        return _per_row(scale, shard_rows, name)
    return torch.ones(sum(shard_rows), dtype=torch.float32)


def _per_row(scale: torch.Tensor, shard_rows: Sequence[int], name: str) -> torch.Tensor:
    """One value per shard -> one per row; a single value serves all shards."""
    if len(scale) not in (1, len(shard_rows)):
        raise CheckpointError(
            "checkpoint", name, f"{len(scale)} values", f"{len(shard_rows)}, one a shard", _REBUILD
        )
    rows = torch.tensor(list(shard_rows), device=scale.device)
    return scale.expand(len(shard_rows)).repeat_interleave(rows).contiguous()


def _positive(scale: torch.Tensor, name: str) -> torch.Tensor:
    scale = scale.detach().float().flatten()
    _refuse(~(scale.isfinite() & (scale > 0)), scale, name, "positive finite scales")
    return scale


def _refuse(is_bad: torch.Tensor, values: torch.Tensor, name: str, needed: str) -> None:
    count = int(is_bad.sum())
    if not count:
        return
    index = [int(i) for i in is_bad.nonzero()[0]]
    value = values[tuple(index)]
    shown = int(value) if value.dtype == torch.uint8 else float(value)
    found = f"{count} bad of {is_bad.numel()}, first {shown} at {index}"
    raise CheckpointError("checkpoint", name, found, needed, _REBUILD)


def _name(spec: LayerSpec, role: Role) -> str:
    tensor = spec.tensor(role)
    return tensor.name if tensor else role.value


def dequantize_layer(
    spec: LayerSpec, tensors: Mapping[str, torch.Tensor], layer: str = "layer"
) -> torch.Tensor:
    """One layer's weight, [N, K] float32, from its stored tensors by name.

    What its inputs go through is folded in: an AWQ scale s gives W diag(s), and FP-Quant's rotation
    H gives W H^T, since (x H) W^T = x (W H^T)^T.
    """
    roles = {t.role: tensors[t.name] for t in spec.tensors if t.name in tensors}
    if spec.kind is LayerKind.FP8:
        weight, row_scale = fp8_to_rows(spec, roles, [len(roles[Role.WEIGHT])], layer)
        return (weight.double() * row_scale.double()[:, None]).float()
    if spec.kind is LayerKind.WIDENED:
        return _widened(spec, roles, layer)
    value = to_weight(spec, roles, [len(roles[Role.CODES])], layer).dequantize()
    if Role.PRE_SCALE in roles:
        value = value * roles[Role.PRE_SCALE].float()
    if Role.HADAMARD in roles:
        value = rotate_blocks(value, roles[Role.HADAMARD].float().T)
    return value


def _widened(spec: LayerSpec, tensors: Mapping[Role, torch.Tensor], layer: str) -> torch.Tensor:
    """W[n, k] = weight[n, k] * scale, one for a square or, in MXFP8, for 32 of a row; of integers,
    for a group of a row, which has an offset too, that is added."""
    weight = tensors[Role.WEIGHT]
    if (offset := tensors.get(Role.OFFSET)) is not None:
        return _from_integers(spec, weight, tensors[Role.BLOCK_SCALE], offset, layer)
    is_nan = (weight.view(torch.uint8) & 0x7F) == 0x7F
    _refuse(is_nan, weight, f"{layer}.{_name(spec, Role.WEIGHT)}", "finite weights")
    num_rows, num_cols = weight.shape
    if (exponent := tensors.get(Role.BLOCK_SCALE)) is not None:
        name = f"{layer}.{_name(spec, Role.BLOCK_SCALE)}"
        check_block_scale(exponent, MXFP4, name)
        exponent = exponent.view(torch.uint8).int() - 127
        scale = torch.ldexp(torch.ones((), dtype=torch.float32), exponent)
        return weight.float() * scale.repeat_interleave(MXFP4.block_size, 1)
    tiles = tensors[Role.TILE_SCALE]
    name = f"{layer}.{_name(spec, Role.TILE_SCALE)}"
    side = tile_size(tuple(weight.shape), tuple(tiles.shape))
    if not side:
        needed = f"one value for each square of {num_rows} x {num_cols}"
        raise CheckpointError("checkpoint", name, list(tiles.shape), needed, _REBUILD)
    rows, cols = -(-num_rows // side), -(-num_cols // side)
    scale = _positive(tiles, name).view(rows, cols)
    scale = scale.repeat_interleave(side, 0)[:num_rows].repeat_interleave(side, 1)[:, :num_cols]
    return weight.float() * scale


def _from_integers(
    spec: LayerSpec, weight: torch.Tensor, scale: torch.Tensor, offset: torch.Tensor, layer: str
) -> torch.Tensor:
    for role, values in ((Role.BLOCK_SCALE, scale), (Role.OFFSET, offset)):
        _refuse(~values.isfinite(), values, f"{layer}.{_name(spec, role)}", "finite values")
    groups = weight.float().unflatten(-1, (scale.shape[-1], -1))
    return (groups * scale.float()[..., None] + offset.float()[..., None]).flatten(-2)
