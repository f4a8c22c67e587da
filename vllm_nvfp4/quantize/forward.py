# SPDX-License-Identifier: Apache-2.0
"""Run a model over the calibration text one decoder layer at a time, as transformers computes it.

In memory: the hidden states of all samples and the layers that the caller holds. The embedding is
there until the first layer's inputs are known.
"""

from __future__ import annotations

import copy
import gc
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from vllm_nvfp4.checkpoints.spec import CheckpointError

_NEEDED = "a decoder that transformers builds with one module for each stored layer"
_REMEDY = "Use --method mse, which needs no forward pass."
Load = Callable[[str], torch.Tensor]
# Stored only where lm_head does not share the embedding's weight.
HEAD_NAME = "lm_head.weight"


class _Recorder(torch.nn.Module):
    """Stands in for a decoder layer: notes what it is called with and returns its input."""

    def __init__(self, layer: torch.nn.Module) -> None:
        super().__init__()
        # Some models ask a layer which mask it wants.
        self.attention_type = getattr(layer, "attention_type", None)
        self.options: dict[str, Any] = {}

    def forward(self, hidden_states: torch.Tensor, *args: Any, **options: Any) -> torch.Tensor:
        if args:
            raise TypeError("the decoder passes a layer more than its input by position")
        self.options = options
        return hidden_states


class LayerwiseModel:
    """A causal language model of which one decoder layer at a time has its weights.

    folder:  the checkpoint (config.json)
    names:   all its tensors
    load:    a stored tensor by name
    samples: [num_samples, length] int64 tokens; every sample is a sequence of its own
    dtype:   in which layers are computed and hidden states kept
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
        remedy: str = _REMEDY,
    ) -> None:
        self._device, self._dtype, self._remedy = device, dtype, remedy
        self._load = load
        self._names = set(names)
        self._folder = folder
        try:
            config = _plain_config(folder)
            with torch.device("meta"):
                model = _from_config(config)
            decoder = model.get_decoder()
            self._layers = decoder.layers
            stem = next(n for n, m in model.named_modules() if m is decoder.layers)
            first = self._first_layer_only(config)
        except (ValueError, KeyError, AttributeError, StopIteration, ImportError, OSError) as error:
            raise self._unknown(str(error).split("\n")[0]) from error
        self._stem = stem
        self._options: list[dict[str, Any]] = []
        self.hidden = self._embed(first, config, samples)
        del first
        gc.collect()

    def _unknown(self, found: str) -> CheckpointError:
        return CheckpointError(
            str(self._folder), "architecture for calibration", found, _NEEDED, self._remedy
        )

    @property
    def num_layers(self) -> int:
        return len(self._layers)

    def prefix(self, index: int) -> str:
        """What the names of a decoder layer's tensors begin with, e.g. "model.layers.0."."""
        return f"{self._stem}.{index}."

    def module(self, index: int, weight: str) -> str:
        """The module of a stored weight, by its name in the decoder layer."""
        return weight.removeprefix(self.prefix(index)).removesuffix(".weight")

    @staticmethod
    def _first_layer_only(config: Any) -> torch.nn.Module:
        """The decoder with its first layer alone: its embedding and rotary tables are real."""
        short = copy.deepcopy(config)
        short.num_hidden_layers = 1
        return _from_config(short).get_decoder()

    def _embed(self, decoder: Any, config: Any, samples: torch.Tensor) -> list[torch.Tensor]:
        recorders = [_Recorder(layer) for layer in self._layers]
        decoder.layers = torch.nn.ModuleList(recorders)
        decoder.config = config
        decoder.norm = torch.nn.Identity()
        stem = self._stem.removesuffix("layers")
        state = {
            name: self._stored(stem + name) for name, _ in decoder.named_parameters(recurse=True)
        }
        decoder.load_state_dict(state, strict=False)
        decoder.float().eval().to(self._device)
        hidden = []
        # Not inference_mode: a backward pass may go through the rotary tables later.
        with torch.no_grad():
            for sample in samples:
                tokens = sample[None].to(self._device)
                try:
                    output = decoder(input_ids=tokens, use_cache=False)
                except (TypeError, AttributeError, KeyError) as error:
                    raise self._unknown(str(error)) from error
                hidden.append(output.last_hidden_state.cpu().to(self._dtype))
        self._options = [self._cast(recorder.options) for recorder in recorders]
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

    def _stored(self, name: str) -> torch.Tensor:
        if name not in self._names:
            raise self._unknown(f"no tensor {name}")
        return self._load(name).float()

    def layer(self, index: int, weights: Mapping[str, torch.Tensor]) -> torch.nn.Module:
        """The layer with its stored weights, and ``weights`` (by full name) in place of some."""
        layer = copy.deepcopy(self._layers[index]).to_empty(device=self._device)
        prefix = self.prefix(index)
        state = {}
        for name in layer.state_dict():
            full = prefix + name
            state[name] = weights[full] if full in weights else self._stored(full)
        buffers = {name for name, _ in layer.named_buffers()} - set(state)
        if buffers:
            raise self._unknown(f"{prefix}{min(buffers)}, which no checkpoint holds")
        layer.load_state_dict(state)
        return layer.to(self._dtype).requires_grad_(False).eval()

    def run(
        self, layer: torch.nn.Module, index: int, hidden: torch.Tensor, cache: Any = None
    ) -> torch.Tensor:
        """What the layer makes of samples, [num_samples, length, hidden size].

        cache: what the attention puts its keys and values into, if anything (``update``)
        """
        options = self._options[index]
        if cache is not None:
            options = options | {"past_key_values": cache, "use_cache": True}
        with torch.inference_mode():
            output = layer(hidden.to(self._device), **options)
        return (output[0] if isinstance(output, tuple) else output).cpu()

    def watch(
        self,
        layer: torch.nn.Module,
        index: int,
        hidden: torch.Tensor,
        hooks: Mapping[str, Callable[[torch.Tensor], None]],
    ) -> torch.Tensor:
        """:meth:`run`, in which each of some modules, by name in the layer, calls a function with
        its input before it computes."""

        def call(name: str) -> Callable[..., None]:
            return lambda module, args: hooks[name](args[0].detach())

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
            return lambda x: found.update({name: x})

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
            output = layer(hidden, **self._options[index])
        return found, output[0] if isinstance(output, tuple) else output

    @contextmanager
    def _hooked(
        self,
        layer: torch.nn.Module,
        index: int,
        register: str,
        hooks: Mapping[str, Callable[..., None]],
    ) -> Iterator[None]:
        """Hooks on modules, by name in the layer; all of them must be called meanwhile."""
        by_name = dict(layer.named_modules())
        missing = next((name for name in hooks if name not in by_name), None)
        if missing is not None:
            raise self._unknown(f"no module {self.prefix(index)}{missing}")
        reached = set()

        def call(name: str) -> Callable[..., None]:
            def hook(*args: Any) -> None:
                reached.add(name)
                hooks[name](*args)

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
        return f"{self._stem.removesuffix('layers')}embed_tokens.weight"

    def head(self) -> Head:
        """What makes logits of what comes out of the last layer."""
        short = copy.deepcopy(_plain_config(self._folder))
        short.num_hidden_layers = 1
        model = _from_config(short)
        norm, lm_head = model.get_decoder().norm, model.get_output_embeddings()
        stem = self._stem.removesuffix("layers")
        norm.load_state_dict({n: self._stored(f"{stem}norm.{n}") for n in norm.state_dict()})
        name = HEAD_NAME if HEAD_NAME in self._names else self.embedding_name
        lm_head.load_state_dict({"weight": self._stored(name)})
        for parameter in (*norm.parameters(), *lm_head.parameters()):
            parameter.requires_grad_(False)
        return Head(norm, lm_head, getattr(short, "final_logit_softcapping", None), name)


@dataclass(frozen=True)
class Head:
    """The final norm and lm_head, in float32. name: of lm_head's stored weight, which is the
    embedding's where the two are tied; cap: of the logits' magnitude, if they are capped."""

    norm: torch.nn.Module
    lm_head: torch.nn.Module
    cap: float | None
    name: str

    def __call__(self, hidden: torch.Tensor) -> torch.Tensor:
        """Hidden states [..., hidden size] to logits [..., vocabulary], float32."""
        found = self.lm_head(self.norm(hidden.float()))
        return torch.tanh(found / self.cap) * self.cap if self.cap else found

    def effect(self, hidden: torch.Tensor, change: torch.Tensor) -> torch.Tensor:
        """What a change of the weight, [vocabulary, hidden size], adds to the logits, to first
        order; float32, like them."""
        x = self.norm(hidden.float())
        found = (x.to(change.dtype) @ change.T).float()
        if self.cap:
            found *= 1 - torch.tanh(self.lm_head(x) / self.cap).square()
        return found


def _plain_config(folder: Path) -> Any:
    from transformers import AutoConfig

    return AutoConfig.from_pretrained(folder, local_files_only=True)


def _from_config(config: Any) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_config(config, attn_implementation="sdpa", dtype=torch.float32)
