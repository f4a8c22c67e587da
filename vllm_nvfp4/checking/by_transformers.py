# SPDX-License-Identifier: Apache-2.0
"""What the installed transformers makes of a compressed-tensors folder."""

from __future__ import annotations

import copy
import re
from collections import defaultdict
from pathlib import Path
from typing import Any

import torch

from vllm_nvfp4.checkpoints.source import Source
from vllm_nvfp4.checkpoints.written import FORMATS

_STORED = FORMATS["compressed-tensors"]
_EXPERT = re.compile(r"\.(\d+)\.\w+\.\w+$")
# Experts whose weights are compared: a stack of two is a stack.
_COMPARED = 2
_TOLERANCE = 0.02


def misreading(folder: Path) -> str:
    """What transformers would compute wrongly with this folder; "" where nothing is found.

    Asked are its own class of the model, quantizer and conversions, on the meta device: of each
    kind of stack that it makes of experts, how large the weights of the first two come out (names
    tell nothing: 5.24 has a place for global scales, and leaves them out). Raises what they raise.
    """
    import transformers
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key
    from transformers.quantizers.auto import AutoHfQuantizer

    config = transformers.AutoConfig.from_pretrained(folder, local_files_only=True)
    quantizer = AutoHfQuantizer.from_config(config.quantization_config, pre_quantized=True)
    quantizer.validate_environment()
    with torch.device("meta"):
        model = getattr(transformers, config.architectures[0])(config)
        quantizer.preprocess_model(model=model)
    conversions = get_model_conversion_mapping(model, None, quantizer)
    renamings = [c for c in conversions if isinstance(c, WeightRenaming)]
    converters = [c for c in conversions if isinstance(c, WeightConverter)]
    places, source = model.state_dict(), Source(folder)
    stacks: dict[str, list[tuple[str, str]]] = defaultdict(list)
    for name in sorted(source.tensors):
        place, pattern = rename_source_key(
            name, renamings, converters, model.base_model_prefix, places
        )
        expert = _EXPERT.search(name)
        if pattern is not None and expert and int(expert[1]) < _COMPARED:
            stacks[place].append((name, pattern))
    seen = set()
    for place, parts in stacks.items():
        kind = frozenset(pattern for _, pattern in parts)
        if kind not in seen and any(name.endswith(f".{_STORED.codes}") for name, _ in parts):
            seen.add(kind)
            converter = copy.deepcopy(next(c for c in converters if kind & {*c.source_patterns}))
            share = _size(converter, place, parts, source, model, quantizer)
            if abs(share - 1) > _TOLERANCE:
                return f"the weights of {place} come out {share:.3g} times as large as stored"
    return ""


def _size(
    converter: Any,
    place: str,
    parts: list[tuple[str, str]],
    source: Source,
    model: Any,
    quantizer: Any,
) -> float:
    """The norm of what a conversion of transformers makes of stored parts, over theirs."""
    theirs = ours = 0.0
    for name, pattern in parts:
        converter.add_tensor(place, name, pattern, source.load(name, "cpu"))
        if name.endswith(f".{_STORED.codes}"):
            layer = name.removesuffix(f".{_STORED.codes}")
            weight = _STORED.dequantize(layer, lambda n: source.load(n, "cpu"))
            ours += float(weight.double().square().sum())
    made = converter.convert(place, model=model, config=model.config, hf_quantizer=quantizer)
    for value in made.values():
        for tensor in value if isinstance(value, list) else [value]:
            theirs += float(tensor.double().square().sum())
    return float((theirs / max(ours, 1e-30)) ** 0.5)
