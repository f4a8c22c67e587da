# SPDX-License-Identifier: Apache-2.0
"""Quantise each linear layer for the inputs that it gets from the quantised layers before it.

Two streams of hidden states go through the decoder: one through the layers as they are quantised,
one through the layers of the source. GPTQ rounds towards what brings the first back to the second.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from vllm_nvfp4.checkpoints.source import FUSED, Source, Unit
from vllm_nvfp4.checkpoints.spec import CheckpointError
from vllm_nvfp4.numerics.quantize import nvfp4_global_scale, quantize_fp8_per_row
from vllm_nvfp4.numerics.weight import BlockScaledWeight
from vllm_nvfp4.quantize.calibration import Calibration
from vllm_nvfp4.quantize.forward import LayerwiseModel
from vllm_nvfp4.quantize.hessian import (
    quantize_fp8_gptq,
    quantize_gptq,
    quantize_hessian,
    shifted_target,
)

METHODS = ("hessian", "gptq")
# Layers whose output is added to the residual stream, and the module whose input is the stream
# that they add to; "" is the decoder layer itself.
_ADDS_TO = {"self_attn.o_proj": "", "mlp.down_proj": "post_attention_layernorm"}


@dataclass
class _Exact:
    """The source's own decoder layer, for each sample: inputs of modules, and its output."""

    inputs: list[dict[str, torch.Tensor]] = field(default_factory=list)
    output: list[torch.Tensor] = field(default_factory=list)


class Calibrated:
    """A Quantizer (see vllm_nvfp4.checkpoints.write) that runs the model on a text.

    source: the 16-bit checkpoint; method: "hessian" or "gptq"
    Raises CheckpointError where transformers cannot run the model, or the text is too short.
    """

    def __init__(
        self, source: Source, method: str, calibration: Calibration, device: str = "cpu"
    ) -> None:
        self._method, self._device = method, device
        samples = calibration.samples(source.folder)
        self._model = LayerwiseModel(
            source.folder,
            source.tensors,
            lambda name: source.load(name, "cpu"),
            samples,
            device,
            forward_dtype(device),
        )
        self._hidden = self._model.hidden  # through the quantised layers
        self._exact_hidden = list(self._hidden)  # through the source's
        self._model.hidden = []
        self._index = 0
        self._layer = torch.nn.Module()  # the current one, quantised so far
        self._exact = _Exact()
        self._adds_to: dict[str, str] = {}

    def start(self, unit: Unit, quantized: set[str]) -> None:
        if not unit.prefix:
            return
        if unit.prefix != self._model.prefix(self._index):
            raise CheckpointError(
                unit.prefix,
                "decoder layer",
                f"{unit.prefix} where {self._model.prefix(self._index)} comes next",
                "the layers of one decoder, all there and in order",
                "Use --method mse, which needs no forward pass.",
            )
        self._layer = self._model.layer(self._index, {})
        if self._method == "gptq":
            asked = {input_module(n.removeprefix(unit.prefix)) for n in unit.names} & {
                n.removeprefix(unit.prefix).removesuffix(".weight") for n in quantized
            }
            self._run_exact(sorted(asked))

    def _run_exact(self, asked: list[str]) -> None:
        layer = self._layer  # nothing in it is quantised yet
        self._adds_to = self._residual_writers(layer)
        modules = {*asked, *(m for m in self._adds_to.values() if m)}
        self._exact = _Exact()
        for hidden in self._exact_hidden:
            inputs, output = self._model.inputs(layer, self._index, hidden, modules)
            self._exact.inputs.append({n: x.to(hidden.dtype).cpu() for n, x in inputs.items()})
            if output is not None:
                self._exact.output.append(output)

    def _residual_writers(self, layer: torch.nn.Module) -> dict[str, str]:
        """_ADDS_TO where the layer is built so: found by adding up, on the first sample."""
        modules = dict(layer.named_modules())
        if not {*_ADDS_TO, *_ADDS_TO.values()} <= set(modules):
            return {}
        outputs: dict[str, torch.Tensor] = {}

        def note(name: str) -> Callable[..., None]:
            return lambda module, args, output: outputs.update({name: output})

        handles = [modules[n].register_forward_hook(note(n)) for n in _ADDS_TO]
        hidden = self._exact_hidden[0]
        mid_name = _ADDS_TO["mlp.down_proj"]
        inputs, output = self._model.inputs(layer, self._index, hidden, [mid_name])
        for handle in handles:
            handle.remove()
        mid = inputs[mid_name].cpu()
        sums = (
            (hidden + outputs["self_attn.o_proj"].cpu(), mid),
            (mid + outputs["mlp.down_proj"].cpu(), output),
        )
        added = all(b is not None and torch.allclose(a, b, rtol=1e-2, atol=1e-2) for a, b in sums)
        return dict(_ADDS_TO) if added else {}

    def quantize(
        self,
        weights: Mapping[str, torch.Tensor],
        representable: Callable[[torch.Tensor], torch.Tensor],
    ) -> dict[str, BlockScaledWeight]:
        target, hessian, bounds = self._target(weights)
        largest = torch.stack([nvfp4_global_scale(t) for t in target.split(bounds)]).amax()
        choose = quantize_gptq if self._method == "gptq" else quantize_hessian
        whole = choose(target, hessian, representable(largest))
        parts = zip(
            whole.codes.split(bounds),
            whole.block_scale.split(bounds),
            whole.global_scale.split(bounds),
            strict=True,
        )
        found = {
            name: BlockScaledWeight(codes, block_scale, scale, whole.fmt)
            for name, (codes, block_scale, scale) in zip(weights, parts, strict=True)
        }
        self._put({name: weight.dequantize() for name, weight in found.items()})
        return found

    def quantize_fp8(
        self, weights: Mapping[str, torch.Tensor]
    ) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
        if self._method == "gptq":
            target, hessian, bounds = self._target(weights)
            codes, scale = quantize_fp8_gptq(target, hessian)
            parts = zip(codes.split(bounds), scale.split(bounds), strict=True)
            found = dict(zip(weights, parts, strict=True))
        else:
            found = {name: quantize_fp8_per_row(weight) for name, weight in weights.items()}
        self._put({name: codes.float() * scale for name, (codes, scale) in found.items()})
        return found

    def _target(
        self, weights: Mapping[str, torch.Tensor]
    ) -> tuple[torch.Tensor, torch.Tensor, list[int]]:
        """(What to come near, [N, K] float32; E[x x^T]; the rows of each shard.)

        Shards of a fused layer have the same inputs, and rows do not know of each other: one tall
        weight is quantised in fewer, larger steps than several.
        """
        name = next(iter(weights)).removeprefix(self._model.prefix(self._index))
        module = input_module(name)
        target = torch.cat([weight.float().to(self._device) for weight in weights.values()])
        hessian, input_shift, output_shift = self._moments(module, len(target))
        if input_shift is not None:
            target = shifted_target(target, hessian, input_shift, output_shift)
        return target, hessian, [len(weight) for weight in weights.values()]

    def _put(self, weights: Mapping[str, torch.Tensor]) -> None:
        prefix = self._model.prefix(self._index)
        for name, weight in weights.items():
            self._layer.get_parameter(name.removeprefix(prefix)).copy_(weight)

    def _moments(
        self, module: str, num_rows: int
    ) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None]:
        """(H, D, R) of :func:`shifted_target`, means over all tokens; without GPTQ H alone."""
        hessian = input_shift = output_shift = None
        stream = self._adds_to.get(module)
        asked = [module, *([stream] if stream else [])]
        count = 0
        for i, hidden in enumerate(self._hidden):
            inputs, _ = self._model.inputs(self._layer, self._index, hidden, asked, last=module)
            x = inputs[module].flatten(0, -2).float()
            hessian = _add(hessian, x.T @ x)
            count += len(x)
            if self._method != "gptq":
                continue
            exact = self._exact.inputs[i]
            shift = exact[module].to(x.device).flatten(0, -2).float() - x
            input_shift = _add(input_shift, shift.T @ x)
            if stream is not None:
                theirs = exact[stream] if stream else self._exact_hidden[i]
                mine = inputs[stream] if stream else hidden
                lacking = (theirs.float() - mine.cpu().float()).to(x.device).flatten(0, -2)
                output_shift = _add(output_shift, lacking.T @ x)
        if hessian is None:
            raise ValueError(f"{module}: no sample to calibrate on; at least one is needed")
        for moment in (hessian, input_shift, output_shift):
            if moment is not None:
                moment /= count
        return hessian, input_shift, output_shift

    def finish(self, unit: Unit, weights: Callable[[], dict[str, Any]]) -> None:
        if not unit.prefix:
            return
        index, self._index = self._index, self._index + 1
        # Nothing is asked of what the last layer gives.
        if self._index < self._model.num_layers:
            exact = self._exact.output
            if self._method == "gptq" and not exact:  # an earlier run quantised this layer
                source = self._model.layer(index, {})
                exact = [self._model.run(source, index, h) for h in self._exact_hidden]
            layer = self._model.layer(index, weights())
            self._hidden = [self._model.run(layer, index, h) for h in self._hidden]
            self._exact_hidden = exact
        self._exact = _Exact()


def forward_dtype(device: str) -> torch.dtype:
    """BF16, as models are served, where the device multiplies it faster than float32."""
    if device == "cpu" and not torch.cpu._is_avx512_bf16_supported():
        return torch.float32
    return torch.bfloat16


def _add(total: torch.Tensor | None, term: torch.Tensor) -> torch.Tensor:
    return term if total is None else total.add_(term)


def input_module(name: str) -> str:
    """The module of a fused layer's first shard: all its shards have the same input."""
    parent, _, leaf = name.removesuffix(".weight").rpartition(".")
    shards = next((shards for shards in FUSED if leaf in shards), (leaf,))
    return f"{parent}.{shards[0]}"
