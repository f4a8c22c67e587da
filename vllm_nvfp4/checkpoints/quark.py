# SPDX-License-Identifier: Apache-2.0
"""``quant_method: quark``: weights in FP4 or FP8, as AMD Quark's Hugging Face export has them.

NVFP4, per linear layer P of shape [N, K]:
    P.weight          uint8 [N, K/2], the low nibble holds even k
    P.weight_scale    float8_e4m3fn [N, K/16]; multiplies
    P.weight_scale_2  float32 []; multiplies
    P.input_scale_2   float32 [], of activations in NVFP4; not used
MXFP4: P.weight and P.weight_scale, uint8 [N, K/32], E8M0. FP8: P.weight, P.weight_scale [] or [N]
and, for static activations, P.input_scale. FP8 KV cache: k_proj.output_scale, v_proj.output_scale.
``exclude`` names layers in 16 bits, ``layer_quant_config`` those in another form. Source: amd-quark
0.13 (quantization/config, export/constants) and vLLM's reader (quark_nvfp4, quark_ocp_mx).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from fnmatch import fnmatchcase
from typing import Any

from vllm_nvfp4.checkpoints import modelopt
from vllm_nvfp4.checkpoints.fields import Patterns, as_table, as_texts
from vllm_nvfp4.checkpoints.spec import (
    UNQUANTIZED,
    CheckpointError,
    KvCacheSpec,
    LayerKind,
    LayerSpec,
    Role,
    TensorSpec,
)

_WHERE = "config.json (quantization_config)"
_FP8 = "fp8_e4m3"
_INPUT_SCALE = TensorSpec("input_scale_2", Role.INPUT_SCALE, ("F32", "BF16", "F16"), optional=True)
_NVFP4 = replace(
    modelopt.ALGOS["W4A16_NVFP4"],
    tensors=(*modelopt.ALGOS["W4A16_NVFP4"].tensors, _INPUT_SCALE),
)
_EXPORT_AGAIN = (
    "Export it from AMD Quark in NVFP4, MXFP4, FP8 or as BF16, or quantise the BF16 model with "
    "ModelOpt or llm-compressor."
)


class QuarkDialect:
    """An AMD Quark checkpoint in FP4 or FP8. ``config``: ``quantization_config`` of config.json.
    Raises CheckpointError where its weights are in another type, have block scales that no file
    shows to be other than E8M0, or want their activations rotated."""

    name = "quark"

    def __init__(self, config: Mapping[str, Any]) -> None:
        _refuse_rotations(config.get("algo_config"))
        key = "global_quant_config"
        everywhere = as_table(config.get(key), _WHERE, key)
        key = "layer_type_quant_config"
        of_types = as_table(config.get(key), _WHERE, key)
        self._default = _spec(as_table(of_types.get("Linear"), _WHERE, key) or everywhere)
        self._exclude = as_texts(config.get("exclude"), _WHERE, "exclude")
        self._patterns = Patterns(_WHERE)
        for entry in self._exclude:
            if entry.startswith("re:"):
                self._patterns.add(entry[3:])
        key = "layer_quant_config"
        table = as_table(config.get(key), _WHERE, key)
        self._layers = {
            name: _spec(as_table(entry, _WHERE, f"{key}.{name}")) for name, entry in table.items()
        }
        if self._default.kind is LayerKind.OTHER and not self.has_microscaled_layers():
            found = f"'quark' with weights in {self._default.algo}"
            needed = "weights in fp4 or fp8_e4m3"
            raise CheckpointError(_WHERE, "quant_method", found, needed, _EXPORT_AGAIN)
        self.kv_cache = _kv_cache(config, table)

    def has_microscaled_layers(self) -> bool:
        specs = (self._default, *self._layers.values())
        return any(spec.kind is LayerKind.MICROSCALED for spec in specs)

    def layer_spec(self, name: str) -> LayerSpec:
        if self.excludes(name):
            return UNQUANTIZED
        matches = (spec for entry, spec in self._layers.items() if fnmatchcase(name, entry))
        return next(matches, self._default)

    def excludes(self, name: str) -> bool:
        return any(
            self._patterns.matches(entry[3:], name)
            if entry.startswith("re:")
            else fnmatchcase(name, entry)
            for entry in self._exclude
        )

    def named_layers(self) -> tuple[str, ...]:
        return ()

    def settle(self, shapes: Mapping[str, Sequence[int]]) -> None:
        """The configuration says it all."""

    def rename(self, mapper: Any) -> None:
        patterns = [entry for entry in self._exclude if entry.startswith("re:")]
        names = [entry for entry in self._exclude if not entry.startswith("re:")]
        self._exclude = mapper.apply_list(names) + patterns
        self._layers = mapper.apply_dict(self._layers)


def _spec(config: Mapping[str, Any]) -> LayerSpec:
    """What a table of types says of a weight: of NVFP4 it has a list, block scales second."""
    steps = _steps(config.get("weight"))
    if not steps:
        return UNQUANTIZED if config else LayerSpec(LayerKind.OTHER, algo="None")
    first, dtype = steps[0], str(steps[0].get("dtype"))[:50]
    bits = _activation_bits(config)
    if dtype == "fp4":
        spec = _fp4_spec(steps)
        name = spec.fmt.name.upper() if spec.fmt else dtype
        return replace(spec, activation_bits=bits, algo=f"{name} W4A{bits}")
    if dtype == _FP8 and len(steps) == 1:
        scheme = first.get("qscheme")
        if scheme == "per_tensor":
            return replace(modelopt.ALGOS["FP8"], activation_bits=bits)
        if scheme == "per_channel":
            return replace(modelopt.ALGOS["FP8_PER_CHANNEL_PER_TOKEN"], activation_bits=bits)
    return LayerSpec(LayerKind.OTHER, algo=dtype)


def _steps(value: object) -> list[Mapping[str, Any]]:
    """The tables of a type: one, or a list where its scales are quantised in turn."""
    return [s for s in (value if isinstance(value, list) else [value]) if isinstance(s, Mapping)]


def _fp4_spec(steps: Sequence[Mapping[str, Any]]) -> LayerSpec:
    """By what the block scales are: E5M3 ones have the dtype and the shape of E8M0's."""
    size, scales = steps[0].get("group_size"), steps[0].get("scale_format")
    if len(steps) > 1:
        scales = steps[1].get("dtype")
        if size == 16 and scales == _FP8:
            return _NVFP4
    elif size == 32 and scales in (None, "e8m0"):
        return modelopt.ALGOS["MXFP4"]
    raise CheckpointError(
        _WHERE,
        "weight of fp4",
        f"blocks of {str(size)[:20]} with scales in {str(scales)[:20]}",
        "blocks of 16 with scales in fp8_e4m3 (NVFP4), or of 32 in e8m0 (MXFP4)",
        _EXPORT_AGAIN,
    )


def _activation_bits(config: Mapping[str, Any]) -> int:
    steps = _steps(config.get("input_tensors"))
    if not steps:
        return 16
    return 4 if steps[0].get("dtype") == "fp4" else 8


def _kv_cache(config: Mapping[str, Any], layers: Mapping[str, Any]) -> KvCacheSpec:
    """FP8 where the outputs of the layers that fill the cache are. They have a table of their own
    and, since vLLM looks for them there, stand among the layers too."""
    key = "kv_cache_quant_config"
    tables = dict(as_table(config.get(key), _WHERE, key))
    export = as_table(config.get("export"), _WHERE, "export")
    group = as_texts(export.get("kv_cache_group"), _WHERE, "export.kv_cache_group")
    tables |= {n: t for n, t in layers.items() if any(fnmatchcase(n, entry) for entry in group)}
    for entry in tables.values():
        steps = _steps(as_table(entry, _WHERE, key).get("output_tensors"))
        if steps and steps[0].get("dtype") == _FP8:
            return KvCacheSpec("fp8")
    return KvCacheSpec()


def _refuse_rotations(algorithms: object) -> None:
    """R1 and R2 are in the weights; of the others vLLM's model computes none. R3 turns queries and
    keys alike, so that a product without it is the same."""
    for algorithm in algorithms if isinstance(algorithms, list) else ():
        if isinstance(algorithm, Mapping) and algorithm.get("name") == "rotation":
            found = [key for key in ("r4", "online_r1_rotation") if algorithm.get(key)]
            if found:
                what = f"{' and '.join(found)}: activations that are rotated while the model runs"
                raise CheckpointError(_WHERE, "algo_config", what, "r1 and r2 alone", _EXPORT_AGAIN)
