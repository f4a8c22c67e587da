# SPDX-License-Identifier: Apache-2.0
"""Checkpoints in the compressed-tensors format, as llm-compressor writes them.

NVFP4: W[n, k] = E2M1(weight_packed[n, k]) * weight_scale[n, k // 16] / weight_global_scale
MXFP4: W[n, k] = E2M1(weight_packed[n, k]) * 2^(weight_scale[n, k // 32] - 127)
FP8:   W[n, k] = weight[n, k] * weight_scale (one, or one per row)

``config_groups`` gives each group of layers a scheme; a target is a layer's name, a regular
expression after ``re:`` or a module's class name. A name goes before a class. Source:
compressed-tensors 0.19, quantization/quant_config.py and utils/match.py, and vLLM's loader.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from vllm_nvfp4.checkpoints.fields import Patterns, as_count, as_table, as_text, as_texts
from vllm_nvfp4.checkpoints.spec import (
    UNQUANTIZED,
    CheckpointError,
    KvCacheSpec,
    LayerKind,
    LayerSpec,
    Role,
    TensorSpec,
)
from vllm_nvfp4.numerics.formats import MXFP4, NVFP4

WHERE = "config.json (quantization_config)"
SUPPORTED = (
    "nvfp4-pack-quantized (4-bit float, tensor_group of 16; activations NVFP4, FP8 or none)",
    "mxfp4-pack-quantized (4-bit float, group of 32; activations MXFP4, FP8 or none)",
    "float-quantized or naive-quantized (FP8 weights per tensor or per channel)",
    "mixed-precision (groups of these)",
)

_FLOATS = ("F32", "BF16", "F16")
_CODES = TensorSpec("weight_packed", Role.CODES, ("U8",))
_INPUT_DIVISOR = TensorSpec("input_global_scale", Role.INPUT_SCALE, _FLOATS, optional=True)
_INPUT_SCALE = TensorSpec("input_scale", Role.INPUT_SCALE, _FLOATS, optional=True)
_NVFP4_TENSORS = (
    _CODES,
    TensorSpec("weight_scale", Role.BLOCK_SCALE, ("F8_E4M3",)),
    TensorSpec("weight_global_scale", Role.GLOBAL_DIVISOR, _FLOATS),
    _INPUT_DIVISOR,
    _INPUT_SCALE,
)
_MXFP4_TENSORS = (_CODES, TensorSpec("weight_scale", Role.BLOCK_SCALE, ("U8",)), _INPUT_SCALE)


def _nvfp4(bits: int) -> LayerSpec:
    return LayerSpec(LayerKind.MICROSCALED, NVFP4, _NVFP4_TENSORS, bits, algo=f"NVFP4 W4A{bits}")


def _mxfp4(bits: int) -> LayerSpec:
    return LayerSpec(LayerKind.MICROSCALED, MXFP4, _MXFP4_TENSORS, bits, algo=f"MXFP4 W4A{bits}")


NVFP4_W4A16, MXFP4_W4A16 = _nvfp4(16), _mxfp4(16)
# What a format says by itself, where a configuration has no groups.
_BY_LAYOUT = {"nvfp4-pack-quantized": NVFP4_W4A16, "mxfp4-pack-quantized": MXFP4_W4A16}

# Every linear layer of a model counts as one of these classes when a target is a class name.
_LINEAR_CLASS = "Linear"


class UnknownScheme(CheckpointError):
    """A group of layers in a scheme that is not read here."""

    def __init__(self, key: str, scheme: str) -> None:
        self.scheme = scheme[:200]
        todo = "Quantise the model again with one of these."
        super().__init__(WHERE, key, scheme, "; ".join(SUPPORTED), todo)


@dataclass(frozen=True)
class _Target:
    pattern: str
    spec: LayerSpec


class CompressedTensorsDialect:
    """A compressed-tensors checkpoint. ``config``: ``quantization_config`` of config.json. Raises
    CheckpointError for a scheme, or an online transform, that is not supported."""

    name = "compressed-tensors"

    def __init__(self, config: Mapping[str, Any]) -> None:
        _refuse_online_transforms(config.get("transform_config"))
        if as_table(config.get("sparsity_config"), WHERE, "sparsity_config").get("targets"):
            raise CheckpointError(
                WHERE, "sparsity_config", "targets", "none", "Use a checkpoint without sparsity."
            )
        self._ignore = as_texts(config.get("ignore"), WHERE, "ignore")
        self._targets = _parse_groups(config)
        self._patterns = Patterns(WHERE)
        for entry in (*self._ignore, *(t.pattern for t in self._targets)):
            if entry.startswith("re:"):
                self._patterns.add(entry[3:])
        self.kv_cache = _kv_cache(config.get("kv_cache_scheme"))

    def has_microscaled_layers(self) -> bool:
        return any(target.spec.kind is LayerKind.MICROSCALED for target in self._targets)

    def layer_spec(self, name: str) -> LayerSpec:
        if self.excludes(name):
            return UNQUANTIZED
        for target in self._targets:
            if self._matches_name(name, target.pattern):
                return target.spec
        for target in self._targets:
            if self._matches_class(target.pattern):
                return target.spec
        return UNQUANTIZED

    def excludes(self, name: str) -> bool:
        # A list made before the model was nested in another names lm_head alone.
        return any(
            self._matches_name(name, entry) or ("." not in entry and name.endswith(f".{entry}"))
            for entry in self._ignore
        )

    def _matches_name(self, name: str, pattern: str) -> bool:
        if pattern.startswith("re:"):
            return self._patterns.matches(pattern[3:], name)
        return name == pattern

    def _matches_class(self, pattern: str) -> bool:
        if pattern.startswith("re:"):
            return self._patterns.matches(pattern[3:], _LINEAR_CLASS)
        return pattern.lower() in _LINEAR_CLASS.lower()

    def named_layers(self) -> tuple[str, ...]:
        return tuple(t.pattern for t in self._targets if _is_layer_path(t.pattern))

    def settle(self, shapes: Mapping[str, Sequence[int]]) -> None:
        """The configuration says it all."""

    def rename(self, mapper: Any) -> None:
        # A mapper knows weight paths; class names and regular expressions stay as they are.
        def renamed(entry: str) -> str | None:
            return next(iter(mapper.apply_list([entry])), None) if _is_layer_path(entry) else entry

        self._ignore = [new for entry in self._ignore if (new := renamed(entry)) is not None]
        self._targets = [
            _Target(new, t.spec) for t in self._targets if (new := renamed(t.pattern)) is not None
        ]


def _is_layer_path(entry: str) -> bool:
    return "." in entry and not entry.startswith("re:")


def _parse_groups(config: Mapping[str, Any]) -> list[_Target]:
    groups = config.get("config_groups")
    if groups is None and (spec := _BY_LAYOUT.get(str(config.get("format")))):
        return [_Target(_LINEAR_CLASS, spec)]
    if not isinstance(groups, Mapping) or not groups:
        raise CheckpointError(
            WHERE, "config_groups", repr(groups), "at least one group", "Save the checkpoint again."
        )
    # A target that two groups name belongs to the later one, in the earlier one's place.
    table: dict[str, LayerSpec] = {}
    refused: list[CheckpointError] = []
    for group_name, value in groups.items():
        key = f"config_groups.{group_name}"
        group = as_table(value, WHERE, key)
        targets = as_texts(group.get("targets"), WHERE, f"{key}.targets")
        if len(targets) == 1 and targets[0].endswith("Attention"):
            continue  # quantised attention: only its KV cache scales matter, and those are tensors
        try:
            spec = _group_spec(group, key, config.get("format"))
        except UnknownScheme as error:
            # Its layers may be ones that nobody asks for, as a draft's.
            refused.append(error)
            spec = LayerSpec(LayerKind.OTHER, algo=error.scheme)
        table.update(dict.fromkeys(targets, spec))
    if refused and all(spec.kind is LayerKind.OTHER for spec in table.values()):
        raise refused[0]
    return [_Target(pattern, spec) for pattern, spec in table.items()]


def _group_spec(group: Mapping[str, Any], key: str, top_format: object) -> LayerSpec:
    weights = as_table(group.get("weights"), WHERE, f"{key}.weights")
    inputs = as_table(group.get("input_activations"), WHERE, f"{key}.input_activations")
    if not weights:
        return UNQUANTIZED
    layout = group.get("format") or top_format
    if group.get("output_activations"):
        raise CheckpointError(
            WHERE, f"{key}.output_activations", "set", "null", "Quantise without it."
        )
    layout = as_text(layout, WHERE, f"{key}.format") or None
    bits = as_count(inputs.get("num_bits", 16), WHERE, f"{key}.input_activations.num_bits") or 0
    if inputs and inputs.get("type") == "int":
        bits = 0
    spec = _scheme_spec(weights, bits, layout)
    if spec is not None:
        return spec
    inputs_text = f"{bits}-bit activations" if bits else "integer activations"
    scheme = (
        f"{weights.get('num_bits')}-bit {weights.get('type')} weights, strategy "
        f"{weights.get('strategy')}, group size {weights.get('group_size')}, symmetric "
        f"{weights.get('symmetric', True)}, {inputs_text}, format {layout}"
    )
    raise UnknownScheme(key, scheme)


def _scheme_spec(weights: Mapping[str, Any], bits: int, layout: object) -> LayerSpec | None:
    """The spec of a group's weight scheme, or None for one that is not supported."""
    if not weights.get("symmetric", True) or weights.get("dynamic") or bits not in (4, 8, 16):
        return None
    scheme = (weights.get("num_bits"), weights.get("type"), weights.get("strategy"))
    group_size = weights.get("group_size")
    undecided = ("mixed-precision", None)  # the layout then follows from the scheme
    if (*scheme, group_size) == (4, "float", "tensor_group", 16):
        return _nvfp4(bits) if layout in ("nvfp4-pack-quantized", *undecided) else None
    if (*scheme, group_size) == (4, "float", "group", 32):
        return _mxfp4(bits) if layout in ("mxfp4-pack-quantized", *undecided) else None
    if scheme[:3] == (8, "float", "block"):
        return _FP8_TILES if layout in ("float-quantized", *undecided) else None
    if scheme[:2] == (8, "float") and scheme[2] in ("tensor", "channel") and bits >= 8:
        known = layout in ("float-quantized", "naive-quantized", *undecided)
        return _fp8_spec(scheme[2] == "channel", bits) if known else None
    return None


# No kernel here multiplies weights that share a scale by squares.
_FP8_TILES = LayerSpec(
    LayerKind.WIDENED,
    tensors=(
        TensorSpec("weight", Role.WEIGHT, ("F8_E4M3",)),
        TensorSpec("weight_scale", Role.TILE_SCALE, _FLOATS),
        _INPUT_SCALE,
    ),
    algo="FP8 by squares",
)


def _fp8_spec(per_row: bool, activation_bits: int) -> LayerSpec:
    role = Role.ROW_SCALE if per_row else Role.WEIGHT_SCALE
    return LayerSpec(
        LayerKind.FP8,
        tensors=(
            TensorSpec("weight", Role.WEIGHT, ("F8_E4M3",)),
            TensorSpec("weight_scale", role, _FLOATS),
            _INPUT_SCALE,
        ),
        activation_bits=activation_bits,
        algo=f"FP8 W8A{activation_bits} per {'channel' if per_row else 'tensor'}",
    )


def _refuse_online_transforms(config: object) -> None:
    """Transforms at a weight are already in the stored weights; any other place would have to be
    computed while the model runs."""
    if not isinstance(config, Mapping):
        return
    groups = as_table(config.get("config_groups"), WHERE, "transform_config.config_groups")
    for group_name, value in groups.items():
        key = f"transform_config.config_groups.{group_name}"
        group = as_table(value, WHERE, key)
        entries = group.get("apply") or []
        if not isinstance(entries, list):
            entries = [entries]
        for entry in entries:
            if as_table(entry, WHERE, f"{key}.apply").get("location") not in (
                "weight_input",
                "weight_output",
            ):
                raise CheckpointError(
                    WHERE,
                    key,
                    f"a {group.get('type')} transform at {entry.get('location')!r}",
                    "none, or only at weight_input and weight_output",
                    "Quantise the model again without online transforms (for SpinQuant: only R1 "
                    "and R2).",
                )


def _kv_cache(scheme: object) -> KvCacheSpec:
    if isinstance(scheme, Mapping) and (scheme.get("type"), scheme.get("num_bits")) == ("float", 8):
        return KvCacheSpec("fp8")
    return KvCacheSpec()
