# SPDX-License-Identifier: Apache-2.0
"""Layers that are in 16 bits in memory: stored so, or in a form that no kernel here reads."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from vllm.logger import init_logger
from vllm.model_executor.layers.linear import (
    LinearMethodBase,
    UnquantizedLinearMethod,
    register_weight_loader_v2_supported_method,
)
from vllm.model_executor.layers.vocab_parallel_embedding import UnquantizedEmbeddingMethod

from vllm_nvfp4.checkpoints.convert import dequantize_layer
from vllm_nvfp4.checkpoints.dtypes import dtype_name
from vllm_nvfp4.checkpoints.forms import form_of
from vllm_nvfp4.checkpoints.spec import CheckpointError, LayerKind, LayerSpec, Role, describe
from vllm_nvfp4.compat import versions
from vllm_nvfp4.layers.cut import CutWeightParameter, FollowsCut, RowCut

logger = init_logger(f"vllm.{__name__}")


def plain_linear_method(spec: LayerSpec) -> LinearMethodBase:
    """vLLM's own method for a 16-bit layer, with a place for what a tool left beside it."""
    return PlainLinearMethod(spec) if spec.tensors else UnquantizedLinearMethod()


def plain_embedding_method(spec: LayerSpec) -> UnquantizedEmbeddingMethod | None:
    """The same for lm_head or the token embedding; None for vLLM's own."""
    return PlainEmbeddingMethod(spec) if spec.tensors else None


class _Plain:
    """A 16-bit layer of vLLM's, with parameters for stray tensors. They take nothing."""

    def __init__(self, spec: LayerSpec) -> None:
        super().__init__()
        self.spec = spec

    def create_weights(self, layer: Any, *args: Any, **kwargs: Any) -> None:
        super().create_weights(layer, *args, **kwargs)  # type: ignore[misc]
        add_places_for_strays(layer, self.spec)

    def process_weights_after_loading(self, layer: Any) -> None:
        remove_places_for_strays(layer)
        super().process_weights_after_loading(layer)  # type: ignore[misc]


@register_weight_loader_v2_supported_method
class PlainLinearMethod(_Plain, UnquantizedLinearMethod):
    """A linear layer, stored in 16 bits."""


class PlainEmbeddingMethod(_Plain, UnquantizedEmbeddingMethod):
    """lm_head or the token embedding, stored in 16 bits."""


def add_places_for_strays(layer: Any, spec: LayerSpec, stem: str = "") -> None:
    """Register a parameter for each tensor of the spec that is of no use to the layer."""
    for tensor in spec.tensors:
        if tensor.role is Role.UNUSED and not hasattr(layer, stem + tensor.name):
            layer.register_parameter(stem + tensor.name, _place(_take_nothing, RowCut()))


def _place(loader: Any, cut: RowCut) -> FollowsCut:
    """A parameter without memory, for what its loader makes of a tensor."""
    place = FollowsCut(data=torch.empty(0), weight_loader=loader)
    place.nvfp4_cut = cut
    place.nvfp4_stray = True  # type: ignore[attr-defined]
    return place


def remove_places_for_strays(layer: Any) -> None:
    for name, parameter in list(layer.named_parameters(recurse=False)):
        if getattr(parameter, "nvfp4_stray", False):
            delattr(layer, name)


def _take_nothing(*args: Any, **kwargs: Any) -> bool:
    return True


@dataclass(frozen=True)
class _Shape:
    """A loaded tensor as its header would describe it."""

    dtype: str
    shape: tuple[int, ...]


class _Widening:
    """Collects the stored tensors of each shard, and loads the 16-bit weight that they mean.

    The value of a shard is loaded by vLLM's own loader of 16-bit weights, which cuts it for this
    rank.
    """

    def __init__(self, spec: LayerSpec, prefix: str) -> None:
        super().__init__()
        self.spec, self.prefix = spec, prefix
        # The arguments that vLLM gives beside a tensor (a shard's name) -> its tensors by name.
        self._loaded: dict[tuple[Any, ...], dict[str, torch.Tensor]] = defaultdict(dict)

    def create_weights(self, layer: Any, *args: Any, **kwargs: Any) -> None:
        self._load_dense, self._cut = kwargs["weight_loader"], RowCut(layer)
        kwargs["weight_loader"] = self._collector("weight")
        super().create_weights(layer, *args, **kwargs)  # type: ignore[misc]
        for tensor in self.spec.tensors:
            if tensor.name == "weight":
                continue
            layer.register_parameter(tensor.name, _place(self._collector(tensor.name), self._cut))

    def collected(self) -> Iterator[torch.Tensor]:
        """What was loaded and waits for the rest of the layer."""
        for tensors in self._loaded.values():
            yield from tensors.values()

    def _collector(self, name: str) -> Any:
        def collect(param: Any, loaded: torch.Tensor, *shard: Any) -> None:
            if getattr(param.weight_loader, "__name__", "") == versions.ONLINE_LOADER:
                # Reloading, vLLM first counts whether there is anything to load.
                param.data.reshape(-1)[:1].copy_(loaded.reshape(-1)[: param.numel()][:1])
                return
            self._loaded[tuple(s for s in shard if s is not None)][name] = loaded.clone()

        collect.nvfp4_is_own = True  # type: ignore[attr-defined]
        return collect

    def process_weights_after_loading(self, layer: Any) -> None:
        remove_places_for_strays(layer)
        for shard, tensors in self._loaded.items():
            value = widen(tensors, f"{self.prefix}{list(shard) if shard else ''}")
            value = value.to(layer.weight.dtype)
            if self._cut.loader is not None:
                self._cut.loader(layer.weight, value)
            else:
                self._load_dense(layer.weight, value, *shard)
        self._loaded.clear()
        super().process_weights_after_loading(layer)  # type: ignore[misc]
        logger.info_once(
            "nvfp4: %s: no kernel for this form: widened to 16 bits while loading", self.spec.algo
        )


@register_weight_loader_v2_supported_method
class WidenedLinearMethod(_Widening, UnquantizedLinearMethod):
    """A linear layer in a form without a kernel, or a fused one of several forms."""

    def create_weights(self, layer: Any, *args: Any, **kwargs: Any) -> None:
        super().create_weights(layer, *args, **kwargs)
        loader = layer.weight.weight_loader
        weight = CutWeightParameter(
            data=layer.weight.data, input_dim=1, output_dim=0, weight_loader=loader
        )
        weight.nvfp4_cut = self._cut
        layer.register_parameter("weight", weight)


class WidenedEmbeddingMethod(_Widening, UnquantizedEmbeddingMethod):
    """lm_head or the token embedding in a form without a kernel."""


def beside_value(spec: LayerSpec) -> frozenset[str]:
    """Names of stored tensors that the weight in 16 bits does not depend on."""
    return spec.names(Role.UNUSED, Role.INPUT_SCALE) | {"bias"}


class Parts:
    """What a file stores of one module, kept until all is there that its value depends on."""

    def __init__(self, spec: LayerSpec, names: Iterable[str]) -> None:
        self._useless = beside_value(spec)
        self._needed = frozenset(names) - self._useless
        self._found: dict[str, torch.Tensor] = {}

    def take(self, name: str, tensor: torch.Tensor) -> dict[str, torch.Tensor] | None:
        """Keep a tensor; all of them by name, once they are there."""
        if name in self._useless:
            return None
        self._found[name] = tensor
        if not self._found.keys() >= self._needed:
            return None
        found, self._found = self._found, {}
        return found


def value_of(spec: LayerSpec, tensors: Mapping[str, torch.Tensor], layer: str) -> torch.Tensor:
    """The weight [N, K] that stored tensors mean, float32; of tensors without data, one of its
    shape that is made of them all."""
    main = max(tensors.values(), key=torch.Tensor.numel)
    if not main.is_meta:
        return dequantize_layer(spec, tensors, layer)
    width = 2 if spec.kind is LayerKind.MICROSCALED else 1
    value = main.float().repeat(1, width)
    return value + sum(t.float().sum() for t in tensors.values())


def widen(tensors: Mapping[str, torch.Tensor], layer: str) -> torch.Tensor:
    """The weight [N, K] that stored tensors mean, float32, or as it is where it is in 16 bits.

    Raises CheckpointError for tensors that are no weight in a form that is known.
    """
    weight = tensors.get("weight")
    if weight is not None and weight.is_floating_point() and weight.element_size() > 1:
        return weight
    shapes = {n: _Shape(dtype_name(t.dtype), tuple(t.shape)) for n, t in tensors.items()}
    spec = form_of(shapes)
    if spec is None:
        raise CheckpointError(
            "checkpoint",
            layer,
            ", ".join(f"{n} {s.dtype} {list(s.shape)}" for n, s in sorted(shapes.items())),
            "a weight in 16 bits, NVFP4, MXFP4, FP8 or MXFP8, with its scales",
            "Quantise the model again with this layer in one of these, or left as it is.",
        )
    return dequantize_layer(spec, tensors, f"{layer} ({describe(spec)})")
