# SPDX-License-Identifier: Apache-2.0
"""The layers of a model on the meta device: their form, what will run them, and their bytes."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from typing import Any, NamedTuple

from vllm.model_executor.layers.linear import LinearBase
from vllm.model_executor.layers.vocab_parallel_embedding import (
    ParallelLMHead,
    VocabParallelEmbedding,
)

from vllm_nvfp4.checking.report import LayerGroup
from vllm_nvfp4.checkpoints.spec import LayerKind, describe
from vllm_nvfp4.compat import versions
from vllm_nvfp4.kernels import paths
from vllm_nvfp4.options import ACTIVATION_BITS
from vllm_nvfp4.planning.families import extra_bytes
from vllm_nvfp4.planning.model import held_bytes

_16_BITS = "16 bits"
_BY_VLLM = "vLLM"


def layer_groups(model: Any) -> Iterator[LayerGroup]:
    """The layers, those alike in one group, the largest first."""
    counts: Counter[tuple[str, str, str]] = Counter()
    sizes: Counter[tuple[str, str, str]] = Counter()
    seen: set[int] = set()
    absorbed = {
        id(module.kv_b_proj)
        for module in model.modules()
        if isinstance(module, versions.attention_classes()) and hasattr(module, "kv_b_proj")
    }
    for module in model.modules():
        part = _part(module)
        form, path, size = _16_BITS, _BY_VLLM, None
        if part != "other" and (found := _ours(module, part == "experts")):
            form, _, path, size = found
        new = [p for p in module.parameters(recurse=False) if id(p) not in seen]
        seen |= {id(p) for p in new}
        if size is None:
            size = sum(p.numel() * p.element_size() for p in new)
        if part == "other" and not size:
            continue
        if id(module) in absorbed:  # a second copy in 16 bits, cut per head, for decoding
            n, k = _shape(module)
            size += 2 * n * k
        counts[part, form, path] += 1
        sizes[part, form, path] += size
    for key, count in sorted(counts.items(), key=lambda item: -sizes[item[0]]):
        yield LayerGroup(*key, count, sizes[key])


def layer_paths(model: Any) -> Iterator[tuple[str, str, str]]:
    """(name, format in memory, what runs it) of each layer."""
    for name, module in model.named_modules():
        part = _part(module)
        if part != "other":
            found = _ours(module, part == "experts")
            yield (name, found.fmt, found.path) if found else (name, _16_BITS, _BY_VLLM)


def draft_groups(model: Any) -> Iterator[LayerGroup]:
    """The same of a draft model, which takes its embedding and lm_head from the target."""
    for group in layer_groups(model):
        if group.part not in ("embedding", "lm_head"):
            yield replace(group, part=f"draft {group.part}")


def vocabulary_names(model: Any) -> Iterator[str]:
    """The names of a model's embeddings and lm_heads."""
    for name, module in model.named_modules():
        if isinstance(module, VocabParallelEmbedding):
            yield name


def _part(module: Any) -> str:
    if isinstance(module, ParallelLMHead):
        return "lm_head"
    if isinstance(module, VocabParallelEmbedding):
        return "embedding"
    if versions.is_moe_layer(module):
        return "experts"
    return "linear" if isinstance(module, LinearBase) else "other"


class _Ours(NamedTuple):
    """Of a layer with a method of this plugin's.

    form: as stored; fmt: in memory; size: bytes, None for those of its parameters
    """

    form: str
    fmt: str
    path: str
    size: int | None


def _ours(module: Any, are_experts: bool) -> _Ours | None:
    """None for a layer with another method."""
    method: Any = getattr(module, "quant_method", None)
    spec = getattr(method, "spec", None)
    if spec is None:
        return None
    fmt = getattr(method, "fmt", None) or (spec.fmt.name if spec.fmt else "fp8")
    if hasattr(module, "nvfp4_tied_to"):
        return _Ours(describe(spec), _16_BITS, "the embedding's weight", 0)
    arch = versions.device_arch()
    device = "cpu" if arch is None else "cuda"
    if spec.kind is LayerKind.WIDENED:
        path = f"{_BY_VLLM}, widened to 16 bits while loading"
        return _Ours(describe(spec), _16_BITS, path, None)
    is_stored = spec.kind in (LayerKind.MICROSCALED, LayerKind.FP8)
    if not is_stored and not getattr(method, "uses_meta_device", False):
        return None  # vLLM's own method, with places for strays
    form = describe(spec) if is_stored else f"{_16_BITS}, to {fmt} while loading"
    bits = ACTIVATION_BITS[method.options.activation]
    figures = method.options.a8_variant, paths.gpu_figures(device)
    if are_experts:
        path = paths.describe_experts_path(device, arch, bits, *figures)
        return _Ours(form, fmt, path, _experts_bytes(module, fmt))
    is_fp8 = fmt == "fp8"
    bits = 16 if is_fp8 and spec.activation_bits == 16 else bits
    n, k = _shape(module)
    size = held_bytes(n, k, fmt) + extra_bytes(spec, k)
    if (bias := getattr(module, "bias", None)) is not None:
        size += bias.numel() * bias.element_size()
    path = paths.describe_path(device, arch, is_fp8, bits, *figures)
    return _Ours(form, fmt, path, size)


def _shape(module: Any) -> tuple[int, int]:
    """[N, K] of the weight on this rank."""
    if isinstance(module, VocabParallelEmbedding):
        return module.num_embeddings_per_partition, module.embedding_dim
    n = getattr(module, "output_size_per_partition", module.output_size)
    return n, getattr(module, "input_size_per_partition", module.input_size)


def _experts_bytes(module: Any, fmt: str) -> int:
    """Of the experts on this rank, from the parameters that load them."""
    hidden, inner = module.moe_config.hidden_dim, module.nvfp4_intermediate_size
    rows = inner * (2 if module.quant_method.activation.is_gated else 1)
    num_experts = module.moe_config.num_local_experts
    size = num_experts * (held_bytes(rows, hidden, fmt) + held_bytes(hidden, inner, fmt))
    for stem in ("w13", "w2"):
        if (bias := getattr(module, f"{stem}_bias", None)) is not None:
            size += bias.numel() * bias.element_size()
    return size
