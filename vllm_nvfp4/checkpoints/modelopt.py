# SPDX-License-Identifier: Apache-2.0
"""NVIDIA ModelOpt's checkpoints (``quant_method: modelopt``).

W[n, k] = E2M1(weight[n, k]) * weight_scale[n, k // 16] * weight_scale_2

Configured in config.json's ``quantization_config`` or, before ModelOpt 0.31, in a file of its own,
hf_quant_config.json: ``{"producer": ..., "quantization": {"quant_algo": ..., "exclude_modules":
...}}``. Source: modelopt 0.47, export/convert_hf_config.py and export/quant_utils.py; the ignore
rules are those of vLLM's own loader.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from fnmatch import fnmatchcase
from typing import Any

from vllm_nvfp4.checkpoints.fields import Patterns, as_texts
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

WHERE = "config.json (quantization_config) or hf_quant_config.json"

_FLOATS = ("F32", "BF16", "F16")
_NVFP4_TENSORS = (
    TensorSpec("weight", Role.CODES, ("U8",)),
    TensorSpec("weight_scale", Role.BLOCK_SCALE, ("F8_E4M3",)),
    TensorSpec("weight_scale_2", Role.GLOBAL_SCALE, _FLOATS),
)
_MXFP4_TENSORS = (
    TensorSpec("weight", Role.CODES, ("U8",)),
    TensorSpec("weight_scale", Role.BLOCK_SCALE, ("U8",)),
)
_INPUT_SCALE = (TensorSpec("input_scale", Role.INPUT_SCALE, _FLOATS, optional=True),)
_PRE_SCALE = (TensorSpec("pre_quant_scale", Role.PRE_SCALE, ("BF16", "F16", "F32"), optional=True),)
_FP8_WEIGHT = (TensorSpec("weight", Role.WEIGHT, ("F8_E4M3",)),)


def _nvfp4(algo: str, bits: int, *extra: TensorSpec, scale_block: int = 16) -> LayerSpec:
    return LayerSpec(
        LayerKind.MICROSCALED,
        NVFP4,
        _NVFP4_TENSORS + extra,
        bits,
        algo=algo,
        scale_block=scale_block,
    )


def _mxfp4(algo: str, bits: int) -> LayerSpec:
    return LayerSpec(LayerKind.MICROSCALED, MXFP4, _MXFP4_TENSORS + _INPUT_SCALE, bits, algo=algo)


ALGOS: dict[str, LayerSpec] = {
    "NVFP4": _nvfp4("NVFP4", 4, *_INPUT_SCALE),
    "W4A16_NVFP4": _nvfp4("W4A16_NVFP4", 16),
    "NVFP4_AWQ": _nvfp4("NVFP4_AWQ", 4, *_INPUT_SCALE, *_PRE_SCALE),
    # weight_scale_2 is amax / 448 here, so that code * block scale stays inside E4M3; and the
    # tool's own recipe shares a block scale among 32.
    "W4A8_NVFP4_FP8": _nvfp4("W4A8_NVFP4_FP8", 8, *_INPUT_SCALE, scale_block=32),
    "W4A8_MXFP4_FP8": _mxfp4("W4A8_MXFP4_FP8", 8),
    "MXFP4": _mxfp4("MXFP4", 4),
    "FP8": LayerSpec(
        LayerKind.FP8,
        tensors=(
            *_FP8_WEIGHT,
            TensorSpec("weight_scale", Role.WEIGHT_SCALE, _FLOATS),
            *_INPUT_SCALE,
        ),
        activation_bits=8,
        algo="FP8",
    ),
    "FP8_PER_CHANNEL_PER_TOKEN": LayerSpec(
        LayerKind.FP8,
        tensors=(*_FP8_WEIGHT, TensorSpec("weight_scale", Role.ROW_SCALE, _FLOATS)),
        activation_bits=8,
        algo="FP8_PER_CHANNEL_PER_TOKEN",
    ),
}
SUPPORTED = (*ALGOS, "MIXED_PRECISION")

# Of single layers beside NVFP4 ones: no kernel here multiplies these.
_WIDENED: dict[str, LayerSpec] = {
    "FP8_PB_WO": LayerSpec(
        LayerKind.WIDENED,
        tensors=(*_FP8_WEIGHT, TensorSpec("weight_scale", Role.TILE_SCALE, _FLOATS)),
        algo="FP8_PB_WO",
    ),
    "MXFP8": LayerSpec(
        LayerKind.WIDENED,
        tensors=(*_FP8_WEIGHT, TensorSpec("weight_scale", Role.BLOCK_SCALE, ("U8",))),
        algo="MXFP8",
        scale_block=32,
    ),
}

# Not in any exclude list before ModelOpt 0.39, and never quantised by it.
_ALWAYS_UNQUANTIZED = ("vision_tower", "vision_model", "vit_large_projector")


class ModelOptDialect:
    """A ModelOpt checkpoint. ``config``: ``quantization_config``, or hf_quant_config.json's whole
    contents. Raises CheckpointError for an algorithm or a group size that is not supported."""

    name = "modelopt"

    def __init__(self, config: Mapping[str, Any]) -> None:
        legacy = config.get("quantization")
        body: Mapping[str, Any] = legacy if isinstance(legacy, Mapping) else config
        self.algo = _algo_name(body.get("quant_algo"), "quant_algo")
        if self.algo == "NVFP4" and _is_weight_only(config.get("config_groups")):
            self.algo = "W4A16_NVFP4"
        self._excluded = as_texts(
            body.get("exclude_modules", body.get("ignore")), WHERE, "exclude_modules / ignore"
        )
        self._patterns = Patterns(WHERE)
        for entry in self._excluded:
            if entry.startswith("re:"):
                self._patterns.add(entry[3:])
        self._layers: dict[str, LayerSpec] = {}
        self._spec = UNQUANTIZED  # of a layer that _layers does not name
        group_size = body.get("group_size")
        if self.algo == "MIXED_PRECISION":
            self._layers = _layer_table(body.get("quantized_layers"))
            if not self._layers:
                self._spec = LayerSpec(LayerKind.OTHER, algo="MIXED_PRECISION without a table")
        else:
            self._spec = _with_group_size(self.algo, group_size, "group_size")
        self._is_settled = bool(group_size) or self._spec.fmt is None
        self.kv_cache = _kv_cache(body)

    def has_microscaled_layers(self) -> bool:
        specs = [self._spec, *self._layers.values()]
        return any(spec.kind is LayerKind.MICROSCALED for spec in specs)

    def layer_spec(self, name: str) -> LayerSpec:
        if self.excludes(name):
            return UNQUANTIZED
        for candidate in _name_candidates(name) if self._layers else ():
            while candidate:  # a layer, or a module that it is a part of
                if candidate in self._layers:
                    return self._layers[candidate]
                candidate = candidate.rpartition(".")[0]
        return self._spec

    def excludes(self, name: str) -> bool:
        if self.algo != "MIXED_PRECISION" and any(part in name for part in _ALWAYS_UNQUANTIZED):
            return True
        return any(self._names(entry, name) for entry in self._excluded)

    def _names(self, entry: str, name: str) -> bool:
        """A plain entry names every layer whose name contains it, a pattern what it matches."""
        if entry.startswith("re:"):
            return self._patterns.matches(entry[3:], name)
        return entry in name or fnmatchcase(name, entry)

    def named_layers(self) -> tuple[str, ...]:
        return tuple(self._layers)

    def settle(self, shapes: Mapping[str, Sequence[int]]) -> None:
        """config.json leaves the group size out for some algorithms; the first layer shows it."""
        if self._is_settled:
            return
        for name, scale in shapes.items():
            layer, _, leaf = name.rpartition(".")
            codes = shapes.get(f"{layer}.weight", ())
            if leaf != "weight_scale" or len(scale) != 2 or len(codes) != 2 or not scale[1]:
                continue
            if self.layer_spec(layer) != self._spec:
                continue
            size = 2 * codes[1] // scale[1]
            self._spec = _with_group_size(self.algo, size, f"{name}: group size")
            self._is_settled = True
            return

    def rename(self, mapper: Any) -> None:
        # "a.b*" means the tree rooted at a.b. A mapper only knows whole names, so the equivalent
        # pair "a.b" and "a.b.*" comes first, as in vLLM's loader; the entry itself stays beside it.
        patterns = [entry for entry in self._excluded if entry.startswith("re:")]
        entries: list[str] = []
        for entry in self._excluded:
            if entry.startswith("re:"):
                continue
            if len(entry) >= 2 and entry.endswith("*") and entry[-2] != ".":
                entries += [entry[:-1], entry[:-1] + ".*"]
            entries.append(entry)
        self._excluded = mapper.apply_list(entries) + patterns
        self._layers = mapper.apply_dict(self._layers)


def _algo_name(value: object, key: str) -> str:
    algo = str(value).upper() if value else ""
    if algo in SUPPORTED:
        return algo
    todo = "Quantise the model again with one of these."
    if algo == "NVFP4_SVD":
        todo = (
            "Its low-rank branch (svdquant_lora_a/b) is not supported; export NVFP4 or NVFP4_AWQ."
        )
    raise CheckpointError(WHERE, key, value, "one of " + ", ".join(SUPPORTED), todo)


def _is_weight_only(groups: object) -> bool:
    """ "NVFP4" with no input_activations in any group means 16-bit activations."""
    if not isinstance(groups, Mapping) or not groups:
        return False
    return all(
        isinstance(g, Mapping) and g.get("input_activations") is None for g in groups.values()
    )


def _with_group_size(algo: str, value: Any, key: str) -> LayerSpec:
    """The algorithm's spec with a group size of the configuration, where it gives one."""
    spec = ALGOS[algo]
    if not value or spec.fmt is None:
        return spec
    block = spec.fmt.block_size
    size = int(value) if str(value).isdecimal() else 0
    if size == block or (spec.fmt is NVFP4 and size > 0 and size % block == 0):
        return replace(spec, scale_block=size)
    needed = f"a multiple of {block}" if spec.fmt is NVFP4 else str(block)
    raise CheckpointError(
        WHERE, key, value, f"{needed} for {algo}", "Quantise the model again with it."
    )


def _layer_table(value: object) -> dict[str, LayerSpec]:
    if not value and (value is None or isinstance(value, Mapping)):
        return {}  # the tensors of a layer show what it is
    if not isinstance(value, Mapping):
        raise CheckpointError(
            WHERE,
            "quantized_layers",
            repr(value),
            "a table from layer name to {quant_algo, group_size} for MIXED_PRECISION",
            "Export the checkpoint again, or restore its hf_quant_config.json.",
        )
    table = {}
    for layer, entry in value.items():
        key = f"quantized_layers[{layer}]"
        if not isinstance(entry, Mapping):
            raise CheckpointError(WHERE, key, repr(entry), "a table with quant_algo", "Correct it.")
        algo = str(entry.get("quant_algo") or "").upper()
        if algo in ("UNQUANTIZED", "NONE"):
            table[layer] = UNQUANTIZED
            continue
        if algo in _WIDENED:
            table[layer] = _WIDENED[algo]
            continue
        if algo not in SUPPORTED:
            # Its tensors may be of a form that is known, and the layer of a part that is not asked
            # for, as a draft's.
            table[layer] = LayerSpec(LayerKind.OTHER, algo=str(entry.get("quant_algo"))[:80])
            continue
        if algo == "MIXED_PRECISION":
            raise CheckpointError(
                WHERE, key, algo, "one of " + ", ".join(ALGOS), "Correct the file."
            )
        table[layer] = _with_group_size(algo, entry.get("group_size"), f"{key}.group_size")
    if all(spec.kind is LayerKind.OTHER for spec in table.values()):
        layer, spec = next(iter(table.items()))
        _algo_name(spec.algo, f"quantized_layers[{layer}].quant_algo")
    return table


def _name_candidates(name: str) -> tuple[str, ...]:
    """The names under which ``quantized_layers`` may list a layer: as it is, or with the parts of
    a multimodal model's prefix in the other of the two orders in use."""
    candidates = [name]
    if name.endswith(".lm_head"):
        candidates.append("lm_head")
    for a, b in (
        ("language_model.model.", "model.language_model."),
        ("model.language_model.", "language_model.model."),
    ):
        if name.startswith(a):
            candidates.append(b + name.removeprefix(a))
    return tuple(candidates)


def _kv_cache(body: Mapping[str, Any]) -> KvCacheSpec:
    scheme = body.get("kv_cache_scheme")
    is_fp8 = str(body.get("kv_cache_quant_algo")).upper() == "FP8" or (
        isinstance(scheme, Mapping)
        and scheme.get("type") == "float"
        and scheme.get("num_bits") == 8
    )
    return KvCacheSpec("fp8") if is_fp8 else KvCacheSpec()
