# SPDX-License-Identifier: Apache-2.0
"""The forms in which a weight may be stored, told apart by the names, dtypes and shapes of its
tensors."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from math import prod
from typing import Protocol

from vllm_nvfp4.checkpoints import compressed_tensors, mlx, modelopt, mxfp4
from vllm_nvfp4.checkpoints.spec import (
    UNQUANTIZED,
    Dialect,
    LayerKind,
    LayerSpec,
    Role,
    TensorSpec,
)

FLOATS = ("BF16", "F16", "F32")
_CODES = ("weight_packed", "qweight", "weight")
# A scale of activations, which are 16 bits or get a scale of their own here.
_OF_ACTIVATIONS = ("input_scale", "input_global_scale", "input_scale_2", "output_scale")
# Of a quantised weight; beside a 16-bit one a tool forgot them.
_OF_WEIGHTS = ("weight_scale", "weight_scale_2", "weight_scale_inv", "weight_global_scale")
# Squares that share a scale, the usual first.
_TILES = (128, 64, 32, 16, 256, 512)

_MICROSCALED = (
    modelopt.ALGOS["NVFP4_AWQ"],
    modelopt.ALGOS["NVFP4"],
    modelopt.ALGOS["W4A16_NVFP4"],
    modelopt.ALGOS["MXFP4"],
    compressed_tensors.NVFP4_W4A16,
    compressed_tensors.MXFP4_W4A16,
)


class Stored(Protocol):
    """A tensor's header, or a tensor described like one."""

    @property
    def dtype(self) -> str: ...

    @property
    def shape(self) -> tuple[int, ...]: ...


def classify(
    name: str, tensors: Mapping[str, Stored], dialect: Dialect
) -> tuple[LayerSpec | None, LayerSpec]:
    """(how a module's weight is stored, how the configuration says it is).

    The first is None for a weight of fewer than 16 bits in no form that is known. Where the file
    and the configuration agree on the form, it is the configuration's own spec, with its group size
    and the bits of the activations.
    """
    if dialect.name == mxfp4.Mxfp4Dialect.name and mxfp4.is_stacked(tensors):
        return mxfp4.SPEC, mxfp4.SPEC
    said = dialect.layer_spec(name)
    return _stored(tensors, said), said


def _stored(tensors: Mapping[str, Stored], said: LayerSpec) -> LayerSpec | None:
    main = next((leaf for leaf in _CODES if leaf in tensors), None)
    if main is None:
        has_block_scales = any(leaf in tensors for leaf in ("weight_scale", "scales"))
        if said.is_quantized and has_block_scales:
            return said  # the check of its tensors names the one that is missing
        return _with_strays(_plain(said), tensors)
    if main == "weight" and tensors[main].dtype in FLOATS:
        return _with_strays(_plain(said), tensors)
    found = form_of(tensors)
    usable = (
        said if said.kind in (LayerKind.MICROSCALED, LayerKind.FP8, LayerKind.WIDENED) else None
    )
    if usable and (found is None or _is_same(usable, found)):
        names_weight = any(t.name == main for t in usable.tensors)
        return _with_strays(usable, tensors) if names_weight else None
    return None if found is None else _with_strays(found, tensors)


def _plain(said: LayerSpec) -> LayerSpec:
    return said if said.kind is LayerKind.ONLINE else UNQUANTIZED


def form_of(tensors: Mapping[str, Stored]) -> LayerSpec | None:
    """The form of a weight with fewer than 16 bits, or None for none that is known or whole."""
    weight = tensors.get("weight")
    if weight is not None and weight.dtype == "F8_E4M3":
        return _fp8_form(tensors)
    for spec in (*_MICROSCALED, mlx.AFFINE):
        needed = [t for t in spec.tensors if not t.optional or t.role is Role.PRE_SCALE]
        if all(t.name in tensors and tensors[t.name].dtype in t.dtypes for t in needed):
            break
    else:
        return None
    if spec.tensor(Role.GLOBAL_SCALE) is None and "weight_scale_2" in tensors:
        return None
    codes = spec.tensor(Role.CODES) or spec.tensor(Role.WEIGHT)
    scale = spec.tensor(Role.BLOCK_SCALE)
    if codes is None or scale is None:
        return None
    shape, scales = tensors[codes.name].shape, tensors[scale.name].shape
    if len(shape) < 2 or len(scales) != len(shape) or not scales[-1]:
        return None
    per_byte = 2 if spec.tensor(Role.CODES) else 1
    block, rest = divmod(per_byte * shape[-1], scales[-1])
    least = spec.fmt.block_size if spec.fmt else 1
    if rest or not block or block % least or (block != least and scale.dtypes == ("U8",)):
        return None
    has_input_scale = any(leaf in tensors for leaf in _OF_ACTIVATIONS)
    if spec is not modelopt.ALGOS["NVFP4_AWQ"]:
        is_modelopt = spec.tensor(Role.GLOBAL_SCALE) is not None
        if is_modelopt:
            spec = modelopt.ALGOS["NVFP4" if has_input_scale else "W4A16_NVFP4"]
    return replace(spec, scale_block=block)


def _fp8_form(tensors: Mapping[str, Stored]) -> LayerSpec | None:
    shape = tensors["weight"].shape
    leaf = next((n for n in ("weight_scale", "weight_scale_inv") if n in tensors), None)
    if leaf is None or len(shape) not in (2, 3):
        return None
    scale = tensors[leaf]
    if len(shape) == 3:  # a stack: its first expert stands for all
        scale, shape = _of_one(scale, shape[0]), shape[1:]
    weight = TensorSpec("weight", Role.WEIGHT, ("F8_E4M3",))
    sizes = tuple(size for size in scale.shape if size != 1)
    if scale.dtype in ("U8", "F8_E8M0"):
        if scale.shape != (shape[0], shape[1] // 32) or shape[1] % 32:
            return None
        tensors_of = (weight, TensorSpec(leaf, Role.BLOCK_SCALE, (scale.dtype,)))
        return LayerSpec(LayerKind.WIDENED, tensors=tensors_of, algo="MXFP8", scale_block=32)
    if scale.dtype not in FLOATS:
        return None
    bits = 8 if "input_scale" in tensors else 16
    if prod(scale.shape) == 1:
        role, algo = Role.WEIGHT_SCALE, "FP8 per tensor"
    elif prod(scale.shape) == shape[0] and len(sizes) == 1 and scale.shape[:1] == shape[:1]:
        role, algo = Role.ROW_SCALE, "FP8 per row"
    elif tile := tile_size(shape, scale.shape):
        spec = TensorSpec(leaf, Role.TILE_SCALE, FLOATS)
        return LayerSpec(LayerKind.WIDENED, tensors=(weight, spec), algo=f"FP8 per {tile}x{tile}")
    else:
        return None
    return LayerSpec(
        LayerKind.FP8,
        tensors=(weight, TensorSpec(leaf, role, FLOATS)),
        activation_bits=bits,
        algo=algo,
    )


@dataclass(frozen=True)
class _One:
    dtype: str
    shape: tuple[int, ...]


def _of_one(scale: Stored, num_experts: int) -> _One:
    """The scale of one expert of a stack, which has values for gate and up at most where they are
    few."""
    is_few = prod(scale.shape) in (1, num_experts, 2 * num_experts)
    return _One(scale.dtype, (1,) if is_few else scale.shape[1:])


def tile_size(shape: tuple[int, ...], scales: tuple[int, ...]) -> int:
    """Side of the squares of a weight [N, K] that share one of the scales [N/b, K/b], both rounded
    up; 0 if there is none. A scale may be stored as [N/b, 1, K/b, 1]."""
    if len(scales) == 4 and scales[1] == scales[3] == 1:
        scales = (scales[0], scales[2])
    fits = (b for b in _TILES if tuple(-(-size // b) for size in shape) == scales)
    return next(fits, 0)


def _is_same(said: LayerSpec, found: LayerSpec) -> bool:
    """Whether two specs ask for the same tensors in the same roles."""

    def needed(spec: LayerSpec) -> set[tuple[str, Role]]:
        optional = {t for t in spec.tensors if t.optional and t.role is not Role.PRE_SCALE}
        return {(t.name, t.role) for t in spec.tensors if t not in optional}

    return (said.kind, said.fmt) == (found.kind, found.fmt) and needed(said) >= needed(found)


def _with_strays(spec: LayerSpec, tensors: Mapping[str, Stored]) -> LayerSpec:
    """The spec with what is stored beside the weight and of no use to it."""
    known = {t.name for t in spec.tensors}
    useless = _OF_ACTIVATIONS if spec.is_quantized else _OF_ACTIVATIONS + _OF_WEIGHTS
    strays = tuple(
        TensorSpec(leaf, Role.UNUSED, (tensors[leaf].dtype,), optional=True)
        for leaf in useless
        if leaf in tensors and leaf not in known
    )
    return replace(spec, tensors=spec.tensors + strays) if strays else spec
