# SPDX-License-Identifier: Apache-2.0
"""What the source's own decoder layer sees and gives, for a method that rounds towards it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field

import torch

from vllm_nvfp4.quantize.forward import LayerwiseModel

# Layers whose output is added to the residual stream, and the module whose input is the stream
# that they add to; "" is the decoder layer itself.
_ADDS_TO = {"self_attn.o_proj": "", "mlp.down_proj": "post_attention_layernorm"}


@dataclass(frozen=True)
class ExactLayer:
    """inputs: of modules, by name in the layer; output: the layer's; adds_to: modules whose output
    is added to the residual stream -> the module whose input that is, "" for the layer itself."""

    inputs: Mapping[str, torch.Tensor] = field(default_factory=dict)
    output: torch.Tensor | None = None
    adds_to: Mapping[str, str] = field(default_factory=dict)


def run_exact(
    model: LayerwiseModel,
    layer: torch.nn.Module,
    index: int,
    hidden: torch.Tensor,
    asked: Iterable[str],
) -> ExactLayer:
    """Run a layer of which nothing is quantised yet. asked: modules whose inputs are wanted."""
    inputs: dict[str, torch.Tensor] = {}
    outputs: dict[str, torch.Tensor] = {}
    modules = dict(layer.named_modules())
    writers = [n for n, stream in _ADDS_TO.items() if {n, stream} <= modules.keys()]

    def note_output(name: str) -> Callable[..., None]:
        return lambda module, args, output: outputs.update({name: output[:1].cpu()})

    def note_input(name: str) -> Callable[..., None]:
        return lambda x, *rest: inputs.update({name: x.to(hidden.dtype).cpu()})

    handles = [modules[n].register_forward_hook(note_output(n)) for n in writers]
    streams = [n for n in _ADDS_TO.values() if n in modules and n]
    hooks = {name: note_input(name) for name in sorted({*asked, *streams})}
    try:
        output = model.watch(layer, index, hidden, hooks)
    finally:
        for handle in handles:
            handle.remove()
    adds_to = {
        n: _ADDS_TO[n] for n in writers if _adds(n, outputs[n], inputs, hidden[:1], output[:1])
    }
    return ExactLayer(inputs, output, adds_to)


def _adds(
    writer: str,
    written: torch.Tensor,
    inputs: Mapping[str, torch.Tensor],
    hidden: torch.Tensor,
    output: torch.Tensor,
) -> bool:
    """_ADDS_TO holds where the layer is built so: found by adding up, on the first sample."""
    stream = _ADDS_TO[writer]
    before = inputs[stream][:1] if stream else hidden
    streams = [n for n in _ADDS_TO.values() if n and n in inputs]
    after = output if stream or not streams else inputs[streams[0]][:1]
    return torch.allclose(before + written, after, rtol=1e-2, atol=1e-2)
