# SPDX-License-Identifier: Apache-2.0
"""Run a model over the calibration text one decoder layer at a time, as transformers computes it.

In memory: the hidden states of all samples and the layers that the caller holds. The embedding is
there until the first layer's inputs are known.
"""

from __future__ import annotations

import copy
import ctypes
import gc
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from vllm_nvfp4.checkpoints.model_class import BLOCK, ExpertPlace, ModelClass
from vllm_nvfp4.checkpoints.spec import CheckpointError
from vllm_nvfp4.quantize.first_layers import common_tables, first_layers, unstored
from vllm_nvfp4.quantize.head import Head
from vllm_nvfp4.quantize.methods import OTHER_METHOD
from vllm_nvfp4.quantize.row_counts import FewRowCounts

_NEEDED = "a decoder that transformers builds with one module for each stored layer"
Load = Callable[[str], torch.Tensor]
# Stored only where lm_head does not share the embedding's weight.
HEAD_NAME = "lm_head.weight"


class _Recorder(torch.nn.Module):
    """Stands in for a decoder layer: notes what it is called with and returns its input."""

    def __init__(self, layer: torch.nn.Module) -> None:
        super().__init__()
        # In a list, so that it is no part of this module. Some models ask a layer which mask it
        # wants, or of what kind it is.
        self._stands_for = [layer]
        self.calls: list[tuple[tuple[Any, ...], dict[str, Any]]] = []
        self.input: torch.Tensor | None = None

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(self._stands_for[0], name)

    def forward(self, hidden_states: torch.Tensor, *args: Any, **options: Any) -> torch.Tensor:
        self.calls.append((args, options))
        self.input = hidden_states
        return hidden_states


def _joined(parts: Sequence[Any]) -> Any:
    """What one call with all samples passes, of what a call for each passed: what is equal in all
    of them as it is, other tensors one after another."""
    first = parts[0]
    if isinstance(first, torch.Tensor):
        if all(p is first or torch.equal(p, first) for p in parts[1:]):
            return first
        return torch.cat(list(parts))
    if isinstance(first, (tuple, list)):
        return type(first)(_joined(part) for part in zip(*parts, strict=True))
    if isinstance(first, dict):
        return {name: _joined([part[name] for part in parts]) for name in first}
    return first


class LayerwiseModel:
    """A causal language model of which one decoder layer at a time has its weights.

    folder:  the checkpoint (config.json)
    names:   all its tensors
    load:    a stored tensor by name
    samples: [num_samples, length] int64 tokens; every sample is a sequence of its own
    dtype:   in which layers are computed and hidden states kept
    model_class: of the folder, where there is one already
    ``hidden``: what goes into the first layer, [1, length, hidden size] for each sample.
    remedy:  what an error advises

    Raises CheckpointError where transformers does not know the architecture, or builds it from
    other modules than the checkpoint has.
    """

    def __init__(
        self,
        folder: Path,
        names: Iterable[str],
        load: Load,
        samples: torch.Tensor,
        device: str = "cpu",
        dtype: torch.dtype = torch.float32,
        remedy: str = OTHER_METHOD,
        model_class: ModelClass | None = None,
    ) -> None:
        self._device, self._dtype, self._remedy = device, dtype, remedy
        self._load = load
        self._names = set(names)
        self._folder = folder
        self._class = model_class or ModelClass(folder)
        # One expert after another: the other ways gather what all of them compute of all tokens.
        self._class.model.set_experts_implementation("eager")
        try:
            decoder = self._class.decoder
            self._layers = decoder.layers
            modules = self._class.model.named_modules()
            self._stem = next(n for n, m in modules if m is decoder.layers)
            self._stored_as = self._stored_names()
            self._prefixes = [self._find_prefix(i) for i in range(len(self._layers))]
            first = first_layers(decoder)
            self._tables = common_tables(first.layers)
        except (ValueError, KeyError, AttributeError, StopIteration, ImportError, OSError) as error:
            raise self._unknown(str(error).split("\n")[0]) from error
        self._calls: list[tuple[tuple[Any, ...], dict[str, Any]]] = []
        self.hidden = self._embed(first, decoder.config, samples)
        del first
        gc.collect()

    def _stored_names(self) -> dict[str, list[str]]:
        """The class's parameters (and buffers) -> the stored tensors that they are made of."""
        found: dict[str, list[str]] = defaultdict(list)
        for name in sorted(self._names):
            found[self._class.parameter(name)].append(name)
        return dict(found)

    def _find_prefix(self, index: int) -> str:
        """What the stored tensors of a decoder layer begin with."""
        start = f"{self._stem}.{index}."
        stored = next(names for p, names in self._stored_as.items() if p.startswith(start))
        match = BLOCK.match(stored[0])
        if match is None:
            raise ValueError(f"{stored[0]} of decoder layer {index} has no number")
        return match[1]

    def _unknown(self, found: str) -> CheckpointError:
        return CheckpointError(
            str(self._folder), "architecture for calibration", found, _NEEDED, self._remedy
        )

    @property
    def num_layers(self) -> int:
        return len(self._layers)

    @property
    def prefixes(self) -> tuple[str, ...]:
        """:meth:`prefix` of every layer."""
        return tuple(self._prefixes)

    def prefix(self, index: int) -> str:
        """What the names of a decoder layer's tensors begin with, e.g. "model.layers.0."."""
        return self._prefixes[index]

    def module(self, index: int, weight: str) -> str:
        """The module of a stored weight, by its name in the decoder layer."""
        parameter = self._class.parameter(weight)
        return parameter.removeprefix(f"{self._stem}.{index}.").rpartition(".")[0]

    def expert(self, index: int, weight: str) -> ExpertPlace | None:
        """Where a stored weight stands in a stack of experts; its module is named in the layer."""
        place = self._class.expert(weight)
        if place is None:
            return None
        module = place.module.removeprefix(f"{self._stem}.{index}.")
        return replace(place, module=module)

    def _embed(self, decoder: Any, config: Any, samples: torch.Tensor) -> list[torch.Tensor]:
        recorders = [_Recorder(layer) for layer in self._layers]
        decoder.layers = torch.nn.ModuleList(recorders)
        decoder.config = config
        stem = self._stem.removesuffix("layers")
        for name, parameter in decoder.named_parameters():
            self._fill(parameter.data, stem + name, {})
        decoder.float().eval().to(self._device)
        hidden = []
        # Not inference_mode: a backward pass may go through the rotary tables later.
        with torch.no_grad():
            for sample in samples:
                tokens = sample[None].to(self._device)
                try:
                    decoder(input_ids=tokens, use_cache=False)
                except (TypeError, AttributeError, KeyError) as error:
                    raise self._unknown(str(error)) from error
                # Not what comes out: that has been through the final norm.
                first = recorders[0].input
                if first is None:
                    raise self._unknown("a decoder that does not run its first layer")
                if first.dim() != 3:  # as Gemma-3n's, of which layers have four at once
                    raise self._unknown(f"hidden states of {first.dim()} dimensions")
                hidden.append(first.cpu().to(self._dtype))
        calls = [_joined(recorder.calls) for recorder in recorders]
        self._calls = [(self._cast(args), self._cast(options)) for args, options in calls]
        return hidden

    def _cast(self, value: Any) -> Any:
        """Rotary tables and masks in the layers' dtype."""
        if isinstance(value, torch.Tensor):
            return value.to(self._dtype) if value.is_floating_point() else value
        if isinstance(value, tuple):
            return tuple(self._cast(v) for v in value)
        if isinstance(value, dict):
            return {name: self._cast(v) for name, v in value.items()}
        return value

    def _fill(
        self, made: torch.Tensor, parameter: str, weights: Mapping[str, torch.Tensor]
    ) -> None:
        """Write a parameter of the class, of the stored tensors; ``weights`` (by their names) in
        place of some. One of them at a time is in memory beside it."""
        stored = self._stored_as.get(parameter)
        if stored is None:
            raise self._unknown(f"no tensor {parameter}")

        def load(name: str) -> torch.Tensor:
            return weights[name] if name in weights else self._load(name)

        places = {name: self._class.expert(name) for name in stored}
        if len(stored) == 1 and places[stored[0]] is None:
            value = load(stored[0])
            if value.shape != made.shape:
                raise self._unknown(f"{stored[0]} {list(value.shape)} for {list(made.shape)}")
            made.copy_(value)
            return
        # Convolutions, say. Of matrices that the class joins, each would be calibrated alone.
        parts = {part: name for name in stored if (part := self._class.joined(name)) is not None}
        if made.dim() != 2 and len(parts) == len(stored):
            value = torch.cat([load(parts[part]) for part in sorted(parts)], min(parts)[1])
            if value.shape == made.shape:
                made.copy_(value)
                return
        filled = 0
        for name, place in places.items():
            if place is None:
                raise self._unknown(f"{parameter} is made of {len(stored)} tensors")
            weight = load(name)
            place.view(made, len(weight)).copy_(weight)
            filled += weight.numel()
        if filled != made.numel():
            raise self._unknown(f"{parameter} of {made.numel()} numbers, {filled} stored")

    def _filled(
        self, module: torch.nn.Module, prefix: str, weights: Mapping[str, torch.Tensor]
    ) -> torch.nn.Module:
        """A module of the class with the stored tensors, of those that begin with ``prefix``."""
        state = module.state_dict()
        for name, buffer in unstored(module).items():
            table = self._tables.get(name)
            if table is None or table.shape != buffer.shape:
                raise self._unknown(f"{prefix}{name}, which no checkpoint holds")
            buffer.copy_(table)
        for name, tensor in state.items():
            self._fill(tensor, prefix + name, weights)
        return module.requires_grad_(False).eval()

    def layer(self, index: int, weights: Mapping[str, torch.Tensor]) -> torch.nn.Module:
        """The layer with its stored weights, and ``weights`` (by full name) in place of some."""
        _return_freed()
        layer = copy.deepcopy(self._layers[index]).to(self._dtype).to_empty(device=self._device)
        return self._filled(layer, f"{self._stem}.{index}.", weights)

    def run(
        self, layer: torch.nn.Module, index: int, hidden: torch.Tensor, cache: Any = None
    ) -> torch.Tensor:
        """What the layer makes of samples, [num_samples, length, hidden size].

        cache: what the attention puts its keys and values into, if anything (``update``)
        """
        args, options = self._calls[index]
        if cache is not None:
            options = options | {"past_key_values": cache, "use_cache": True}
        with torch.inference_mode(), FewRowCounts():
            output = layer(hidden.to(self._device), *args, **options)
        return (output[0] if isinstance(output, tuple) else output).cpu()

    def watch(
        self,
        layer: torch.nn.Module,
        index: int,
        hidden: torch.Tensor,
        hooks: Mapping[str, Callable[..., Any]],
    ) -> torch.Tensor:
        """:meth:`run`, in which each of some modules, by name in the layer, calls a function with
        its inputs before it computes; it takes what that returns, if anything, in their place."""

        def call(name: str) -> Callable[..., Any]:
            return lambda module, args: hooks[name](*(x.detach() for x in args))

        with self._hooked(layer, index, "register_forward_pre_hook", {n: call(n) for n in hooks}):
            return self.run(layer, index, hidden)

    def inputs(
        self,
        layer: torch.nn.Module,
        index: int,
        hidden: torch.Tensor,
        modules: Iterable[str],
    ) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
        """(What goes into each of the modules, by name in the layer; the layer's output.)"""
        found: dict[str, torch.Tensor] = {}

        def note(name: str) -> Callable[[torch.Tensor], None]:
            return lambda x, *rest: found.update({name: x})

        output = self.watch(layer, index, hidden, {name: note(name) for name in modules})
        return found, output

    def traced(
        self, layer: torch.nn.Module, index: int, hidden: torch.Tensor, modules: Iterable[str]
    ) -> tuple[dict[str, tuple[torch.Tensor, torch.Tensor]], torch.Tensor]:
        """({module: (its input, its output)}, the layer's output), to be differentiated.

        hidden: [num_samples, length, hidden size], samples of equal length; requires_grad
        """
        found: dict[str, tuple[torch.Tensor, torch.Tensor]] = {}

        def note(name: str) -> Callable[..., None]:
            return lambda module, args, made: found.update({name: (args[0].detach(), made)})

        hooks = {name: note(name) for name in modules}
        with self._hooked(layer, index, "register_forward_hook", hooks), torch.enable_grad():
            args, options = self._calls[index]
            output = layer(hidden, *args, **options)
        return found, output[0] if isinstance(output, tuple) else output

    @contextmanager
    def _hooked(
        self,
        layer: torch.nn.Module,
        index: int,
        register: str,
        hooks: Mapping[str, Callable[..., Any]],
    ) -> Iterator[None]:
        """Hooks on modules, by name in the layer; all of them must be called meanwhile."""
        by_name = dict(layer.named_modules())
        missing = next((name for name in hooks if name not in by_name), None)
        if missing is not None:
            raise self._unknown(f"no module {self.prefix(index)}{missing}")
        reached = set()

        def call(name: str) -> Callable[..., Any]:
            def hook(*args: Any) -> Any:
                reached.add(name)
                return hooks[name](*args)

            return hook

        handles = [getattr(by_name[name], register)(call(name)) for name in hooks]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()
        unseen = sorted(set(hooks) - reached)
        if unseen:
            raise self._unknown(
                f"{self.prefix(index)}{unseen[0]} is never reached by the calibration text"
            )

    @property
    def embedding_name(self) -> str:
        """The stored name of the token embedding."""
        decoder = self._class.decoder
        table = decoder.get_input_embeddings()
        leaf = next(n for n, m in decoder.named_modules() if m is table)
        parameter = f"{self._stem.removesuffix('layers')}{leaf}.weight"
        return self._stored_as.get(parameter, [parameter])[0]

    def head(self) -> Head:
        """What makes logits of what comes out of the last layer."""
        decoder = self._class.decoder
        norm, lm_head = decoder.norm, self._class.model.get_output_embeddings()
        norm, lm_head = (copy.deepcopy(m).float().to_empty(device="cpu") for m in (norm, lm_head))
        self._filled(norm, f"{self._stem.removesuffix('layers')}norm.", {})
        name = HEAD_NAME if HEAD_NAME in self._names else self.embedding_name
        lm_head.load_state_dict({"weight": self._load(name)})
        lm_head.requires_grad_(False)
        cap = getattr(decoder.config, "final_logit_softcapping", None)
        return Head(norm, lm_head, cap, name)


def forward_dtype(device: str) -> torch.dtype:
    """BF16, as models are served, where the device multiplies it faster than float32."""
    if device == "cpu" and not torch.cpu._is_avx512_bf16_supported():
        return torch.float32
    return torch.bfloat16


def _return_freed() -> None:
    """Give what was freed back to the machine. glibc keeps tensors of up to 32 MB for later, and
    without this a run grows with the number of layers."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)
