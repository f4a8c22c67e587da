# SPDX-License-Identifier: Apache-2.0
"""Whether all who tell what becomes of a model's layers say what an engine then holds.

`check` builds vLLM's class on the meta device, and tells by the methods that the layers got; of a
model in 16 bits, transformers' class tells by its own layers. An engine's layers are looked at for
the tensors that they hold, and for the path that they noted when these were made.
"""

from __future__ import annotations

import multiprocessing
import traceback
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

_16_BITS, _BY_VLLM = "16 bits", "vLLM"
_SHOWN = 3
# Engines that compare answers to text build no tower.
NO_PICTURES = {"image": 0, "video": 0, "audio": 0}

# Layer -> (format in memory, what runs it).
Layers = Mapping[str, tuple[str, str]]


def ask_check(
    folder: Path, dtype: str, is_encoder: bool = False, method: str = "fork", **options: Any
) -> Layers:
    """What `check` says, in a process of its own. Raises ValueError with what it ended with.

    method:  how the process begins; "spawn" where this one has started an engine
    options: of the engine, as its pictures
    """
    context: Any = multiprocessing.get_context(method)
    ours, theirs = context.Pipe(duplex=False)
    process = context.Process(target=_tell, args=(theirs, folder, dtype, is_encoder, options))
    process.start()
    theirs.close()
    try:
        said = ours.recv()
    except EOFError:
        said = "the process ended without an answer"
    process.join()
    if isinstance(said, str):
        raise ValueError(f"check: {said}")
    layers: Layers = said
    return layers


def _tell(pipe: Any, folder: Path, dtype: str, is_encoder: bool, options: Any) -> None:
    try:
        pipe.send(_told(folder, dtype, is_encoder, options))
    except Exception as error:
        traceback.print_exc()
        pipe.send(f"{type(error).__name__}: {error}")


def _told(folder: Path, dtype: str, is_encoder: bool, options: Any) -> dict[str, tuple[str, str]]:
    from vllm.engine.arg_utils import EngineArgs

    from vllm_nvfp4.checking.check import load_alone
    from vllm_nvfp4.checking.layers import layer_paths
    from vllm_nvfp4.checking.online import online_layers
    from vllm_nvfp4.checkpoints.detect import read_config
    from vllm_nvfp4.checkpoints.headers import read_headers
    from vllm_nvfp4.checkpoints.online_layers import by_class
    from vllm_nvfp4.checkpoints.validate import validate

    config, quant_config = read_config(folder)
    if quant_config is None:  # first: vLLM puts classes of its own into transformers' registers
        told_by_class = by_class(folder, validate(folder, config, None).layers).quantised
    given: dict[str, Any] = {"dtype": dtype, "skip_tokenizer_init": not is_encoder}
    given |= {"runner": "pooling"} if is_encoder else {"limit_mm_per_prompt": NO_PICTURES}
    loaded = load_alone(
        EngineArgs(str(folder), quantization="nvfp4", enforce_eager=True, **given | options)
    )
    if loaded.refused or loaded.empty:
        raise ValueError(f"it will not load: {loaded.refused or loaded.empty}")
    if quant_config is None:
        told = online_layers(loaded, read_headers(folder)).quantised
        if others := sorted(told ^ told_by_class):
            raise ValueError(f"transformers' class says otherwise of {_some(others)}")
    return {name: (fmt, path) for name, fmt, path in layer_paths(loaded.model)}


def held_by(model: Any) -> Iterator[tuple[str, tuple[str, str]]]:
    """The same of an engine's model, by the tensors in its layers."""
    for name, layer in model.named_modules():
        fmt, path = _16_BITS, getattr(layer, "nvfp4_path", _BY_VLLM)
        if "nvfp4_format" in layer.__dict__:
            fmt = layer.nvfp4_format
        elif getattr(layer, "row_scale", None) is not None:
            fmt = "fp8"
        yield name, (fmt, path)


def quantised_matrices(model: torch.nn.Module) -> Iterator[torch.Tensor]:
    """Each matrix [N, K] that the plugin holds in fewer than 16 bits, dequantised, float32."""
    from vllm_nvfp4.kernels import ops
    from vllm_nvfp4.kernels.layout import PackedWeight
    from vllm_nvfp4.layers.weights import experts_of, unpack_weight
    from vllm_nvfp4.numerics.formats import FORMATS

    layer: Any
    for layer in model.modules():
        if hasattr(layer, "nvfp4_shape"):
            yield unpack_weight(layer).dequantize()
        elif hasattr(layer, "row_scale"):
            yield layer.weight.float() * layer.row_scale.float()[:, None]
        elif hasattr(layer, "nvfp4_intermediate_size") and hasattr(layer, "w13_weight"):
            inner, hidden = layer.nvfp4_intermediate_size, layer.moe_config.hidden_dim
            fmt = FORMATS[layer.nvfp4_format]
            gated = 2 if layer.moe_config.is_act_and_mul else 1
            for stem, shape in (("w13", (gated * inner, hidden)), ("w2", (hidden, inner))):
                for codes, block_scale, global_scale in zip(*experts_of(layer, stem), strict=True):
                    packed = PackedWeight(codes, block_scale, global_scale, *shape, fmt)
                    yield ops.backend("cpu").unpack_weight(packed).dequantize()


def compare(told: Layers | ValueError, held: Layers) -> None:
    """Raise ValueError for layers of which the two say different things.

    told: an error is raised
    """
    if isinstance(told, ValueError):
        raise told
    wrong = [
        f"{name} ({' by '.join(told[name])}, held {' by '.join(held.get(name, ('nothing',)))})"
        for name in told
        if not _are_alike(told[name], held.get(name, ("", "")))
    ]
    wrong += [f"{n} (held {h[0]})" for n, h in held.items() if h[0] != _16_BITS and n not in told]
    if wrong:
        raise ValueError(f"check and the engine disagree about {_some(wrong)}")


def _are_alike(told: tuple[str, str], held: tuple[str, str]) -> bool:
    if told[0] == _16_BITS:
        return held[0] == _16_BITS
    # A table that is only looked up in notes no path.
    return told[0] == held[0] and held[1] in (told[1], _BY_VLLM)


def _some(names: list[str]) -> str:
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return ", ".join(names[:_SHOWN]) + more
