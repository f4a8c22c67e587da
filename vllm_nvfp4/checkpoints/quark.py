# SPDX-License-Identifier: Apache-2.0
"""``quant_method: quark`` with weights in FP4, as AMD Quark's Hugging Face export has them.

NVFP4, per linear layer P of shape [N, K]:
    P.weight          uint8 [N, K/2], the low nibble holds even k
    P.weight_scale    float8_e4m3fn [N, K/16]; multiplies
    P.weight_scale_2  float32 or bfloat16 []; multiplies
    P.input_scale_2   of activations in NVFP4; not used
MXFP4: P.weight and P.weight_scale, uint8 [N, K/32]. Source: vLLM's reader (quark_nvfp4,
quark_ocp_mx). ``exclude`` names layers in 16 bits, ``layer_quant_config`` those in another form.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Any

from vllm_nvfp4.checkpoints import modelopt
from vllm_nvfp4.checkpoints.fields import as_table, as_texts
from vllm_nvfp4.checkpoints.spec import (
    UNQUANTIZED,
    CheckpointError,
    KvCacheSpec,
    LayerKind,
    LayerSpec,
)

_WHERE = "config.json (quantization_config)"


class QuarkDialect:
    """An AMD Quark checkpoint in FP4. ``config``: ``quantization_config`` of config.json. Raises
    CheckpointError where its weights are in another type."""

    name = "quark"
    kv_cache = KvCacheSpec()

    def __init__(self, config: Mapping[str, Any]) -> None:
        key = "global_quant_config"
        self._default = _spec(as_table(config.get(key), _WHERE, key))
        self._exclude = as_texts(config.get("exclude"), _WHERE, "exclude")
        key = "layer_quant_config"
        table = as_table(config.get(key), _WHERE, key)
        self._layers = {
            name: _spec(as_table(entry, _WHERE, f"{key}.{name}")) for name, entry in table.items()
        }
        if self._default.kind is LayerKind.OTHER and not self.has_microscaled_layers():
            raise CheckpointError(
                _WHERE,
                "quant_method",
                f"'quark' with weights in {self._default.algo}",
                "weights in fp4",
                "Export it from AMD Quark in NVFP4, MXFP4 or as BF16, or quantise the BF16 model "
                "with ModelOpt or llm-compressor.",
            )

    def has_microscaled_layers(self) -> bool:
        specs = (self._default, *self._layers.values())
        return any(spec.kind is LayerKind.MICROSCALED for spec in specs)

    def layer_spec(self, name: str) -> LayerSpec:
        if self.excludes(name):
            return UNQUANTIZED
        matches = (spec for entry, spec in self._layers.items() if fnmatchcase(name, entry))
        return next(matches, self._default)

    def excludes(self, name: str) -> bool:
        return any(fnmatchcase(name, entry) for entry in self._exclude)

    def named_layers(self) -> tuple[str, ...]:
        return ()

    def settle(self, shapes: Mapping[str, Sequence[int]]) -> None:
        """The configuration says it all."""

    def rename(self, mapper: Any) -> None:
        self._exclude = mapper.apply_list(self._exclude)
        self._layers = mapper.apply_dict(self._layers)


def _spec(config: Mapping[str, Any]) -> LayerSpec:
    """What a table of types says of a weight: of NVFP4 it has a list, block scales first."""
    weight = config.get("weight")
    steps = weight if isinstance(weight, list) else [weight]
    first: Any = steps[0] if steps and isinstance(steps[0], Mapping) else {}
    if weight is None and config:
        return UNQUANTIZED
    if first.get("dtype") == "fp4":
        return modelopt.ALGOS["W4A16_NVFP4" if first.get("group_size") == 16 else "MXFP4"]
    return LayerSpec(LayerKind.OTHER, algo=str(first.get("dtype"))[:50])
