# SPDX-License-Identifier: Apache-2.0
"""What each layer's format costs: KL of the final logits with that layer alone quantised.

To second order in the change e[t] = x[t] (W' - W)^T of the layer's output, and for all layers from
one backward pass:

    KL(source || quantised) = 1/2 E[(sum_t g[t] . e[t])^2] / tokens,

g[t] the gradient, by that output, of the log-probability of tokens drawn from the source's own
predictions, one after each position of a sample; the mean is over samples and draws. The sum's
terms of different drawn tokens are uncorrelated, so that its square has the mean of KL's Hessian,
the Fisher information. Work grows with the number of layers, not with its square.

lm_head's output are the logits, and the embedding's the first layer's input; a weight that is both
has one change, whose two effects add up.
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from vllm_nvfp4.checkpoints.model_class import ExpertPlace
from vllm_nvfp4.checkpoints.quantizer import quantize_in_pieces
from vllm_nvfp4.checkpoints.source import Source
from vllm_nvfp4.checkpoints.spec import CheckpointError
from vllm_nvfp4.checkpoints.units import Unit, by_layer
from vllm_nvfp4.numerics.quantize import nvfp4_global_scale, quantize_fp8_per_row
from vllm_nvfp4.quantize.calibration import Calibration
from vllm_nvfp4.quantize.changes import Changes, layer_changes
from vllm_nvfp4.quantize.expert_sensitivity import expert_effects
from vllm_nvfp4.quantize.forward import HEAD_NAME, LayerwiseModel, forward_dtype
from vllm_nvfp4.quantize.head import Head
from vllm_nvfp4.quantize.methods import CALIBRATED
from vllm_nvfp4.quantize.precision import Sensitivity

# Short samples, so that a few thousand tokens give enough of them for a mean of squares.
LENGTH = 128
NUM_SAMPLES = 16
# Backward passes over each sample, with other tokens drawn.
_DRAWS = 3
# Samples that go through a layer together.
_CHUNK = 8


def num_samples(is_calibrated: bool) -> int:
    """How many go through the model: with a calibrated method, two others for each."""
    return NUM_SAMPLES * (3 if is_calibrated else 1)


@dataclass(frozen=True)
class Measurement:
    """samples: [num_samples, length] int64, of which KL is the mean
    others:  [num_others, length] int64, whose inputs the calibrated methods quantise for
    method:  NVFP4's, and FP8's where that is "gptq"
    draws, seed: of the tokens
    dtype:   of the layers; differences are computed as such, and not rounded away
    """

    samples: torch.Tensor
    others: torch.Tensor
    method: str
    draws: int = _DRAWS
    seed: int = 0
    dtype: torch.dtype | None = None

    @classmethod
    def of_text(cls, text: str, folder: Path, method: str, seed: int) -> Measurement:
        """Samples of a text, and two others for each where the method asks for any.

        text:   ``builtin`` or a path; folder: where the tokenizer is
        Raises CheckpointError where the text is too short.
        """
        count = num_samples(method in CALIBRATED)
        samples = Calibration(text, count, LENGTH, seed).samples(folder)
        if method not in CALIBRATED:
            return cls(samples, samples[:0], method, seed=seed)
        others = torch.cat([samples[1::3], samples[2::3]])
        return cls(samples[::3], others, method, seed=seed)


def measure(
    source: Source,
    quantized: set[str],
    measurement: Measurement,
    progress: Callable[[float, str], None] | None = None,
) -> list[Sensitivity]:
    """KL(source || source with one fused layer quantised), mean over the samples' tokens.

    quantized: the weights to choose a format for: of decoder layers, lm_head, the embedding
    progress:  called with the share of the layers that are done, and the next one's name
    In memory are one decoder layer and what goes into every layer; before the layers' turn,
    lm_head and its changes. Raises CheckpointError where transformers cannot run the model, or a
    weight is none of these.
    """
    model, vocabulary, inputs = _forward(source, measurement, quantized)
    head = model.head()
    own = _vocabulary_change(source, head.name, measurement) if head.name in quantized else {}
    gradients, of_head = _head_gradients(head, inputs.pop()[0], measurement, own)
    sums_of = {head.name: of_head}
    del head, own
    units = {unit.prefix: unit for unit in by_layer(source.tensors, quantized)}
    count = measurement.samples.numel() * measurement.draws
    found: list[list[Sensitivity]] = []
    for i in reversed(range(model.num_layers)):
        samples, others = inputs.pop()
        prefix = model.prefix(i)
        groups = [g for g in units.get(prefix, Unit("", ())).groups if g[0] in quantized]
        if progress is not None and groups:
            progress(1 - (i + 1) / model.num_layers, prefix.removesuffix("."))
        layer = model.layer(i, {})
        experts, groups = _experts_apart(model, i, groups)
        modules = {n: model.module(i, n) for g in groups for n in g}
        changes = layer_changes(source, model, layer, i, groups, others, measurement.method)
        effects = {}
        for names, places in experts.items():
            modules[names[0]] = places[names[0]].module
            effects[names[0]] = expert_effects(
                source, model, layer, i, places, samples, others, measurement.method
            )
        sums, gradients = _backward(model, layer, i, samples, gradients, modules, changes, effects)
        found.append([_sensitivity(source, g, _divergences(sums, g, count)) for g in groups])
        found[-1] += [
            _sensitivity(source, names, _divergences(sums, names[:1], count)) for names in experts
        ]
    for name in vocabulary:
        sums_of.setdefault(name, {})
        if name == model.embedding_name:
            of_embedding = _embedding_effects(source, name, measurement, gradients)
            for fmt, effect in of_embedding.items():
                sums_of[name][fmt] = effect + sums_of[name].get(fmt, 0)
        found.append([_sensitivity(source, (name,), _divergences(sums_of, (name,), count))])
    return [group for of_layer in reversed(found) for group in of_layer]


def _experts_apart(
    model: LayerwiseModel, index: int, groups: Sequence[tuple[str, ...]]
) -> tuple[dict[tuple[str, ...], dict[str, ExpertPlace]], list[tuple[str, ...]]]:
    """({The weights of all experts of one module: where each stands}, the other fused layers.)"""
    stacks: dict[str, dict[str, ExpertPlace]] = {}
    rest = []
    for group in groups:
        if (place := model.expert(index, group[0])) is None:
            rest.append(group)
            continue
        for name in group:
            stacks.setdefault(place.module, {})[name] = model.expert(index, name) or place
    return {tuple(places): places for places in stacks.values()}, rest


def _sensitivity(source: Source, group: tuple[str, ...], kl: dict[str, float]) -> Sensitivity:
    shapes = [source.tensors[name].shape for name in group]
    num_weights, num_rows = sum(n * k for n, k in shapes), sum(n for n, _ in shapes)
    return Sensitivity(group, num_weights, num_rows, {**kl, "bf16": 0.0})


def _forward(
    source: Source, measurement: Measurement, quantized: set[str]
) -> tuple[LayerwiseModel, list[str], list[tuple[list[torch.Tensor], list[torch.Tensor]]]]:
    """(The model; what :func:`_check_vocabulary` gives; what goes into each layer, and comes out of
    the last: chunks of the samples and of the others, [num_samples, length, hidden size])."""
    model = LayerwiseModel(
        source.folder,
        source.tensors,
        lambda name: source.load(name, "cpu"),
        torch.cat([measurement.samples, measurement.others]),
        dtype=measurement.dtype or forward_dtype("cpu"),
        model_class=source.model_class,
    )
    vocabulary = _check_vocabulary(model, source, quantized)
    hidden, model.hidden = model.hidden, []
    count = len(measurement.samples)
    parts = hidden[:count], hidden[count:]
    own, others = ([torch.cat(p[i : i + _CHUNK]) for i in range(0, len(p), _CHUNK)] for p in parts)
    inputs = [(own, others)]
    for i in range(model.num_layers):
        layer = model.layer(i, {})
        own, others = ([model.run(layer, i, h) for h in part] for part in inputs[-1])
        inputs.append((own, others))
    return model, vocabulary, inputs


def _check_vocabulary(model: LayerwiseModel, source: Source, quantized: set[str]) -> list[str]:
    """Those of the weights that are in no decoder layer: lm_head, embedding, in this order."""
    prefixes = tuple(model.prefix(i) for i in range(model.num_layers))
    rest = {name for name in quantized if not name.startswith(prefixes)}
    known = [name for name in (HEAD_NAME, model.embedding_name) if name in rest]
    if unknown := sorted(rest - set(known)):
        raise CheckpointError(
            str(source.folder),
            unknown[0],
            "a weight that is neither in a decoder layer nor lm_head or embedding",
            f"layers under {prefixes[0]}, {HEAD_NAME} or {model.embedding_name}",
            "Leave --target-bits and --max-kl out for this model.",
        )
    return known


def _vocabulary_change(
    source: Source, name: str, measurement: Measurement
) -> dict[str, torch.Tensor]:
    """W' - W of lm_head or the embedding in each format, [vocabulary, hidden size], as it is
    written: rounded by the weights alone."""
    weight = source.load_finite(name, "cpu")
    method = measurement.method if measurement.method == "rtn" else "mse"
    four = quantize_in_pieces(weight, method, nvfp4_global_scale(weight)).dequantize()
    codes, scale = quantize_fp8_per_row(weight)
    dtype = measurement.dtype or forward_dtype("cpu")
    exact = weight.float()
    return {
        "nvfp4": (four - exact).to(dtype),
        "fp8": (codes.float() * scale - exact).to(dtype),
    }


def _embedding_effects(
    source: Source,
    name: str,
    measurement: Measurement,
    gradients: Sequence[Sequence[torch.Tensor]],
) -> dict[str, torch.Tensor]:
    """sum_t g . e of the embedding in each format, as :func:`_backward` gives them.

    name: of its weight; gradients: by what goes into the first layer, of each chunk and draw
    """

    def embed(change: torch.Tensor | None) -> torch.Tensor:
        def load(asked: str) -> torch.Tensor:
            stored = source.load(asked, "cpu")
            return stored if change is None or asked != name else stored.float() + change.float()

        model = LayerwiseModel(
            source.folder, source.tensors, load, samples, model_class=source.model_class
        )
        return torch.cat(model.hidden)

    samples = measurement.samples
    exact = embed(None)
    found = {}
    for fmt, change in _vocabulary_change(source, name, measurement).items():
        effects = (embed(change) - exact).split([len(chunk[0]) for chunk in gradients])
        found[fmt] = torch.cat(
            [
                (gradient * effect).flatten(1).sum(1, dtype=torch.float64)
                for chunk, effect in zip(gradients, effects, strict=True)
                for gradient in chunk
            ]
        )
    return found


def _head_gradients(
    head: Head,
    hidden: Sequence[torch.Tensor],
    measurement: Measurement,
    changes: dict[str, torch.Tensor],
) -> tuple[list[list[torch.Tensor]], dict[str, torch.Tensor]]:
    """(For each chunk and draw: d log p(drawn tokens) / d hidden, like the chunk;
    sum_t g . e of lm_head in each format of ``changes``, as :func:`_backward` gives them)."""
    generator = torch.Generator().manual_seed(measurement.seed)
    found = []
    effects: dict[str, list[torch.Tensor]] = {fmt: [] for fmt in changes}
    for chunk in hidden:
        draws: list[list[torch.Tensor]] = [[] for _ in range(measurement.draws)]
        products: dict[str, list[torch.Tensor]] = {fmt: [] for fmt in changes}
        for sample in chunk:
            state = sample.detach().clone().float().requires_grad_()
            logits = torch.log_softmax(head(state), -1)
            likely = logits.detach().exp()
            drawn = torch.multinomial(
                likely, measurement.draws, replacement=True, generator=generator
            )
            for fmt, change in changes.items():
                effect = head.effect(state.detach(), change)
                mean = (likely * effect).sum(dtype=torch.float64)
                products[fmt].append(effect.gather(1, drawn).sum(0, dtype=torch.float64) - mean)
            for d, draw in enumerate(draws):
                chosen = logits.gather(1, drawn[:, d, None]).sum()
                last = d + 1 == measurement.draws
                (gradient,) = torch.autograd.grad(chosen, state, retain_graph=not last)
                draw.append(gradient.to(chunk.dtype))
        found.append([torch.stack(draw) for draw in draws])
        for fmt, of_chunk in products.items():
            effects[fmt].append(torch.stack(of_chunk, 1).flatten())  # draw by draw
    return found, {fmt: torch.cat(parts) for fmt, parts in effects.items()}


def _backward(
    model: LayerwiseModel,
    layer: torch.nn.Module,
    index: int,
    hidden: Sequence[torch.Tensor],
    gradients: Sequence[Sequence[torch.Tensor]],
    modules: dict[str, str],
    changes: Changes,
    effects_of_experts: dict[str, list[torch.Tensor]],
) -> tuple[dict[str, dict[str, torch.Tensor]], list[list[torch.Tensor]]]:
    """(sum_t g . e of each weight and format, over all chunks and draws [num_samples * draws];
    the gradients by the layer's input, like ``gradients``)."""
    sums: dict[str, dict[str, list[torch.Tensor]]] = {name: defaultdict(list) for name in modules}
    passed = []
    for c, (chunk, outer) in enumerate(zip(hidden, gradients, strict=True)):
        state = chunk.detach().clone().requires_grad_()
        traced, output = model.traced(layer, index, state, modules.values())
        names = list(modules)
        outputs = [traced[modules[name]][1] for name in names]
        effects = {
            name: {
                fmt: traced[modules[name]][0] @ change.to(chunk.dtype).T
                for fmt, change in changes[name].items()
            }
            for name in changes
        }
        effects |= {name: {"nvfp4": made[c]} for name, made in effects_of_experts.items()}
        inner = []
        for d, gradient in enumerate(outer):
            last = d + 1 == len(outer)
            into, *by_output = torch.autograd.grad(
                output, [state, *outputs], gradient, retain_graph=not last
            )
            inner.append(into)
            for name, by in zip(names, by_output, strict=True):
                for fmt, effect in effects[name].items():
                    # An experts module has all tokens in one dimension.
                    product = (by * effect).view(len(chunk), -1).sum(1, dtype=torch.float64)
                    sums[name][fmt].append(product)
        passed.append(inner)
    whole = {n: {fmt: torch.cat(parts) for fmt, parts in of.items()} for n, of in sums.items()}
    return whole, passed


def _divergences(
    sums: dict[str, dict[str, torch.Tensor]], group: Sequence[str], count: int
) -> dict[str, float]:
    """KL of the group in each format: its shards' changes add up before they are squared."""
    return {
        fmt: float(torch.stack([sums[name][fmt] for name in group]).sum(0).square().sum())
        / (2 * count)
        for fmt in sums[group[0]]
    }


def save(path: Path, groups: Sequence[Sensitivity]) -> None:
    """Write what :func:`load` reads; the file is there whole or not at all."""
    part = path.with_suffix(".part")
    part.write_text(json.dumps([asdict(group) for group in groups], indent=2) + "\n")
    part.replace(path)


def load(path: Path) -> list[Sensitivity]:
    """What :func:`save` wrote."""
    entries = json.loads(path.read_text())
    return [Sensitivity(tuple(e.pop("names")), **e) for e in entries]
