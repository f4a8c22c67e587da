# SPDX-License-Identifier: Apache-2.0
"""Stored quantised, built without quantisation: what vLLM's model has a plain 16-bit weight for.

Some layers ask no quantization config (the first projection of DeepSeek's and GLM's draft layers,
all of Mamba-1's, the embedding of a draft), and their models' loaders know no scales. So the stored
tensors are taken out of the stream, and the 16-bit weight that they mean is handed on in their
place, under the name that a file in 16 bits would have for it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from vllm.logger import init_logger
from vllm.model_executor.layers.linear import LinearBase, UnquantizedLinearMethod
from vllm.model_executor.layers.vocab_parallel_embedding import (
    UnquantizedEmbeddingMethod,
    VocabParallelEmbedding,
)

from vllm_nvfp4.checkpoints.census import Census
from vllm_nvfp4.checkpoints.modules import StoredModule
from vllm_nvfp4.checkpoints.spec import describe, fold, shard_names
from vllm_nvfp4.layers.plain import Parts, value_of

logger = init_logger(f"vllm.{__name__}")

_LAYERS = (torch.nn.Linear, torch.nn.Embedding, LinearBase, VocabParallelEmbedding)
_PLAIN = (type(None), UnquantizedLinearMethod, UnquantizedEmbeddingMethod)


class _Place:
    """A stored module with a plain place in the model. dtype: of the weight there"""

    def __init__(self, module: StoredModule, dtype: torch.dtype) -> None:
        self.module, self.dtype = module, dtype
        self._parts = Parts(module.spec, module.tensors)

    def take(self, leaf: str, tensor: torch.Tensor) -> torch.Tensor | None:
        """Keep a stored tensor; the weight, once all tensors are there that it depends on."""
        if (found := self._parts.take(leaf, tensor)) is None:
            return None
        spec = self.module.spec
        return value_of(spec, found, f"{self.module.name} ({describe(spec)})").to(self.dtype)


def widen_for(
    model: torch.nn.Module, census: Census, fused_at: Callable[[str], Mapping[str, Sequence[str]]]
) -> Any:
    """What turns a stream of (name, tensor) of the files into what this model is to load.

    fused_at: a layer's name -> {fused layer: its shards, as the files name them}
    """
    places = {
        place.module.name: place
        for name, module in model.named_modules()
        if _is_plain(module)
        for place in _places(getattr(module, "prefix", "") or name, module, census, fused_at)
    }
    # A router that the model's own loader renames, which knows weights in 16 bits alone.
    for stored in census.unasked_integers():
        places[stored.name] = _Place(stored, torch.get_default_dtype())
    if not places:
        return lambda weights: weights
    for name, count in sorted(Counter(map(fold, places)).items()):
        logger.info_once(
            "nvfp4: %s (%d): vLLM builds it without quantisation: widened to 16 bits while loading",
            name,
            count,
        )
    return lambda weights: _widened(weights, places)


def _is_plain(module: Any) -> bool:
    """Whether the module is a layer with a 16-bit matrix, which no method of ours made."""
    weight = getattr(module, "weight", None)
    return (
        isinstance(module, _LAYERS)
        and type(getattr(module, "quant_method", None)) in _PLAIN
        and isinstance(weight, torch.nn.Parameter)
        and weight.dim() == 2
        and weight.is_floating_point()
        and weight.element_size() > 1
    )


def _places(
    name: str, layer: Any, census: Census, fused_at: Callable[[str], Mapping[str, Sequence[str]]]
) -> Iterator[_Place]:
    """The quantised modules of the files that are this layer, or its shards."""
    for stored_name in dict.fromkeys((name, *shard_names(name, fused_at(name)))):
        module = census.find(stored_name)
        if module is None or census.is_stack(module):
            continue
        if module.stored is None or module.stored.is_quantized:
            census.ask(stored_name)
            yield _Place(module, layer.weight.dtype)


def _widened(
    weights: Iterable[tuple[str, Any]], places: Mapping[str, _Place]
) -> Iterator[tuple[str, Any]]:
    for name, tensor in weights:
        module, _, leaf = name.rpartition(".")
        place = places.get(module)
        if place is None or leaf == "bias":
            yield name, tensor
        elif (weight := place.take(leaf, tensor)) is not None:
            yield f"{module}.weight", weight
