# SPDX-License-Identifier: Apache-2.0
"""What each stored tensor is, by the type of the module that transformers' class keeps it in.

The class is built on the meta device from config.json, and its own conversions say which of its
parameters a stored tensor becomes. No list of layer names takes part.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from vllm_nvfp4.checkpoints.spec import CheckpointError

if TYPE_CHECKING:
    from vllm_nvfp4.checkpoints.source import TensorInfo

# A repeated block: the first number in a name, with what stands before it.
BLOCK = re.compile(r"^((?:[^.]+\.)*?[^.]+\.(\d+)\.)")
_NUMBERED = re.compile(
    r"^(?P<experts>.*\bexperts)\.(?P<expert>\d+)\.(?P<leaf>\w+)\.(?P<kind>weight|bias)$"
)
_EXPERT = re.compile(r"\.\d+\.")
# transformers' modules that vLLM builds without quantisation, or the linear layers of them that it
# does: a Mamba-1 mixer's projections, what an indexer of sparse attention fuses.
UNQUANTIZED: Mapping[str, frozenset[str] | None] = {
    "MambaMixer": None,
    "FalconMambaMixer": None,
    "JambaMambaMixer": None,
    "DeepseekV32Indexer": frozenset({"wk", "weights_proj"}),
    "GlmMoeDsaIndexer": frozenset({"wk", "weights_proj"}),
}


class Kind(Enum):
    """What a stored tensor of two or more dimensions is; the value is what a user reads."""

    LINEAR = "linear layers"
    STACK = "experts stacked in one tensor"
    ROUTER = "routers"
    HEAD = "lm_head"
    EMBEDDING = "embeddings"
    TOWER = "vision or audio towers"
    OUTSIDE = "linear layers outside the blocks"
    TRANSPOSED = "Conv1D layers"
    UNQUANTIZED = "layers that vLLM builds in 16 bits"
    UNKNOWN = "tensors that the model's class has no module for"
    OTHER = "convolutions and other parameters"


@dataclass(frozen=True)
class Place:
    """kind; module: the class's module that keeps the tensor, "" where it has none."""

    kind: Kind
    module: str = ""


@dataclass(frozen=True)
class ExpertPlace:
    """Where the matrix, or the bias, of one expert stands in a stack of the class.

    module, leaf: of the stacked parameter; expert: which; index: of the matrix among the ``count``
    that the stack keeps for an expert (gate and up); is_transposed: it is kept as [K, N];
    is_interleaved: row by row in turns
    """

    module: str
    leaf: str
    expert: int
    index: int
    count: int
    is_transposed: bool = False
    is_interleaved: bool = False

    def view(self, stack: torch.Tensor, rows: int) -> torch.Tensor:
        """The matrix in the stack, [N, K], or the bias, [N]; N = rows. What is written to it is in
        the stack."""
        one = stack[self.expert].mT if self.is_transposed else stack[self.expert]
        return one[self.rows(rows)]

    def rows(self, rows: int) -> slice:
        """Where ``rows`` of the matrix stand among the stack's."""
        if self.is_interleaved:
            return slice(self.index, None, self.count)
        return slice(self.index * rows, (self.index + 1) * rows)


class ModelClass:
    """transformers' class of a checkpoint, without memory.

    Raises CheckpointError where transformers knows no class for config.json.
    """

    def __init__(self, folder: Path) -> None:
        self.model, self.config = _build(folder)
        self._modules = dict(self.model.named_modules(remove_duplicate=False))
        self._parameters = dict(self.model.named_parameters(remove_duplicate=False))
        self._expert_places: dict[str, ExpertPlace | None] = {}
        self._head = self._called("get_output_embeddings")
        self._language = self._language_model()
        # Where the experts of a block are -> how many.
        self.experts = {
            name: len(next(iter(stacks)))
            for name, module in self._modules.items()
            if (stacks := _stacks(module))
        }
        for name, module in self._modules.items():
            if isinstance(module, torch.nn.ModuleList) and name.endswith("experts"):
                self.experts[name] = len(module)

    def _called(self, method: str) -> torch.nn.Module | None:
        try:
            return getattr(self.model, method)()
        except (AttributeError, NotImplementedError, TypeError):
            return None

    def _language_model(self) -> str:
        """The name of the module beside which the towers stand, "" where there are none. An encoder
        of text is no tower, one of sound is."""
        reads_text = getattr(self.model, "main_input_name", "input_ids") == "input_ids"
        if reads_text and self.config.get_text_config() is self.config:
            return ""
        decoder = self._called("get_decoder")
        return next((n for n, m in self._modules.items() if n and m is decoder), "")

    @property
    def decoder(self) -> Any:
        """The module whose ``layers`` make up the language model. Raises AttributeError where there
        is none."""
        found = self.model.get_decoder()
        return found if hasattr(found, "layers") else found.model  # Llama-4 answers with lm_head's

    def place(self, name: str, info: TensorInfo) -> Place:
        """What a stored tensor of two or more dimensions is."""
        parameter = self.parameter(name)
        if parameter not in self._parameters:
            return self._by_peers(name, info)
        module = parameter.rpartition(".")[0]
        return Place(self._kind(module, parameter, info), module)

    def shape(self, parameter: str) -> tuple[int, ...] | None:
        """Of a parameter of the class; None for a buffer."""
        found = self._parameters.get(parameter)
        return None if found is None else tuple(found.shape)

    def expert(self, name: str) -> ExpertPlace | None:
        """Where a stored matrix or bias of one expert stands in the class; None for what is no
        such."""
        if name not in self._expert_places:
            self._expert_places[name] = self._find_expert(name)
        return self._expert_places[name]

    def _find_expert(self, name: str) -> ExpertPlace | None:
        match = _NUMBERED.match(name)
        if match is None:
            return None
        parameter, pattern = self._renamed(name)
        index, count = 0, 1
        is_bias = match["kind"] == "bias"
        end = "_bias" if is_bias else ""
        if pattern is not None:
            sources = self._converter(pattern).source_patterns
            index, count = sources.index(pattern), len(sources)
        elif match["leaf"] in ("gate_proj", "up_proj") and parameter not in self._parameters:
            # One of a stack that is stored whole, by the name that it is written under.
            stack = f"{self.stacked_in(match['experts'])}.gate_up_proj{end}"
            parameter, index, count = stack, int(match["leaf"] == "up_proj"), 2
            if stack not in self._parameters:
                parameter, index, count = stack.replace("gate_up", match["leaf"][:-5]), 0, 1
        elif parameter not in self._parameters:
            parameter = f"{self.stacked_in(match['experts'])}.{match['leaf']}{end}"
        module, _, leaf = parameter.rpartition(".")
        if module not in self.experts or parameter not in self._parameters:
            return None
        if self._parameters[parameter].dim() != (2 if is_bias else 3):
            return None
        return ExpertPlace(
            module,
            leaf,
            int(match["expert"]),
            index,
            count,
            not is_bias and self._is_transposed(module),
            count > 1 and not self.is_concatenated(module),
        )

    def stacked_in(self, experts: str) -> str:
        """The class's module of the experts that a file keeps under this name."""
        anchor = self._renamed(f"{experts}.gate_up_proj")[0].rpartition(".")[0]
        return anchor if anchor in self.experts else experts

    def _is_transposed(self, module: str) -> bool:
        found = self._modules[module]
        if hasattr(found, "is_transposed"):
            return found.is_transposed
        down = found.down_proj.shape
        up = found.gate_up_proj.shape if hasattr(found, "gate_up_proj") else found.up_proj.shape
        return not (down[1] == up[2] and down[2] in (up[1], up[1] // 2))

    @property
    def experts_per_token(self) -> int:
        """How many routed experts a token goes to, as the configuration says; 1 where it does
        not."""
        text = self.config.get_text_config()
        names = ("num_experts_per_tok", "top_k_experts", "moe_k", "moe_topk")
        found = next((v for n in names if isinstance(v := getattr(text, n, None), int)), 1)
        return max(1, found)

    def is_linear(self, module: str) -> bool:
        """Whether a module of the class is a linear layer."""
        return isinstance(self._modules.get(module), torch.nn.Linear)

    def is_concatenated(self, module: str) -> bool:
        """Whether stacked experts keep all of gate before all of up."""
        return getattr(self._modules.get(module), "is_concatenated", True)

    def _kind(self, module: str, parameter: str, info: TensorInfo) -> Kind:
        found = self._modules[module]
        if found is self._head:
            return Kind.HEAD
        if isinstance(found, torch.nn.Embedding):
            return Kind.EMBEDDING
        if self._language and not module.startswith(self._language + "."):
            return Kind.TOWER
        if module in self.experts and self._parameters[parameter].dim() == 3:
            return Kind.STACK if len(info.shape) == 3 else Kind.LINEAR
        if len(info.shape) != 2:
            return Kind.OTHER
        if _is_conv1d(found):
            return Kind.TRANSPOSED
        if self._is_router(module, info.shape):
            return Kind.ROUTER
        if not isinstance(found, torch.nn.Linear):
            return Kind.OTHER
        parent, _, leaf = module.rpartition(".")
        kind = type(self._modules[parent]).__name__
        if kind in UNQUANTIZED:
            leaves = UNQUANTIZED[kind]
            if leaves is None or leaf in leaves:
                return Kind.UNQUANTIZED
        block = BLOCK.match(module + ".")
        # A list of linear layers is no list of blocks.
        if block is None or block[1] == module + ".":
            return Kind.OUTSIDE
        return Kind.LINEAR

    def _is_router(self, module: str, shape: tuple[int, ...]) -> bool:
        """Whether it has an output for each expert that stands beside it, and no layer like itself
        beside it (a shared expert's gate and up projection may be as many rows)."""
        for experts, count in self.experts.items():
            beside = experts.rpartition(".")[0] + "."
            if shape[0] != count or not module.startswith(beside):
                continue
            if f"{module}.".startswith(experts + "."):
                continue
            parent = module.rpartition(".")[0]
            alike = [
                m
                for n, m in self._modules.items()
                if n.rpartition(".")[0] == parent
                and isinstance(m, torch.nn.Linear)
                and tuple(m.weight.shape) == tuple(shape)
            ]
            return len(alike) < 2
        return False

    def _by_peers(self, name: str, info: TensorInfo) -> Place:
        """A draft layer of its own, which transformers leaves out: what the layers of the model
        call the same is the same."""
        parameter = self.parameter(name)
        peer = self._peers.get(_tail(parameter))
        if peer is None or not BLOCK.match(parameter):
            return Place(Kind.UNKNOWN)
        kind = self._kind(peer.rpartition(".")[0], peer, info)
        return Place(kind, parameter.rpartition(".")[0])

    @cached_property
    def _peers(self) -> dict[str, str]:
        return {_tail(n): n for n, p in self._parameters.items() if BLOCK.match(n) and p.dim() > 1}

    @cached_property
    def _conversions(self) -> tuple[list[Any], list[Any]]:
        from transformers.conversion_mapping import get_model_conversion_mapping
        from transformers.core_model_loading import WeightConverter, WeightRenaming

        found = get_model_conversion_mapping(self.model)
        return (
            [c for c in found if isinstance(c, WeightRenaming)],
            [c for c in found if isinstance(c, WeightConverter)],
        )

    def parameter(self, name: str) -> str:
        """The class's name of what a stored tensor becomes, or a part of it."""
        if (expert := self.expert(name)) is not None:
            return f"{expert.module}.{expert.leaf}"
        return self._renamed(name)[0]

    def joined(self, name: str) -> tuple[int, int] | None:
        """(Which part of a parameter a stored tensor is, the dimension along which the class joins
        its parts); None where it is joined in no such way."""
        _, pattern = self._renamed(name)
        if pattern is None or len((converter := self._converter(pattern)).operations) != 1:
            return None
        operation = converter.operations[0]
        joins = type(operation).__name__ == "Concatenate"
        return (converter.source_patterns.index(pattern), operation.dim) if joins else None

    def _converter(self, pattern: str) -> Any:
        return next(c for c in self._conversions[1] if pattern in c.source_patterns)

    def _renamed(self, name: str) -> tuple[str, str | None]:
        """(The class's name by its own conversions, the pattern of the converter that took it.)"""
        from transformers.core_model_loading import rename_source_key

        prefix = self.model.base_model_prefix
        return rename_source_key(name, *self._conversions, prefix, self._parameters)


def _tail(name: str) -> str:
    """A name in its block, with the number of an expert left out."""
    return _EXPERT.sub(".", BLOCK.sub("", name))


def _stacks(module: torch.nn.Module) -> list[torch.Tensor]:
    """The parameters that hold a matrix for each expert."""
    if isinstance(module, torch.nn.Conv1d | torch.nn.ConvTranspose1d):
        return []  # [out channels, in channels, width]
    own: list[torch.Tensor] = [p for p in module.parameters(recurse=False) if p.dim() == 3]
    return own if len(own) >= 2 and len({len(p) for p in own}) == 1 else []


def _is_conv1d(module: torch.nn.Module) -> bool:
    from transformers.pytorch_utils import Conv1D

    return isinstance(module, Conv1D)


def build_class(config: Any) -> Any:
    """transformers' model of a configuration on the meta device; None where it has no class. Raises
    whatever a model's code raises."""
    import transformers
    from transformers import AutoModel, AutoModelForCausalLM

    with torch.device("meta"):
        for name in getattr(config, "architectures", None) or []:
            if (found := getattr(transformers, name, None)) is not None:
                return found(config).eval()
        for auto in (AutoModelForCausalLM, AutoModel):
            if type(config) in auto._model_mapping:
                return auto.from_config(config).eval()
    return None


def _build(folder: Path) -> tuple[Any, Any]:
    from transformers import AutoConfig

    reason = ""
    names: list[str] = []
    try:
        config = AutoConfig.from_pretrained(folder, local_files_only=True)
        names = getattr(config, "architectures", None) or []
        if (model := build_class(config)) is not None:
            return model, config
    except Exception as error:  # of any model's code
        names, reason = [], f": {type(error).__name__}: {str(error).splitlines()[0]}"
    raise CheckpointError(
        str(folder / "config.json"),
        "architectures",
        f"{', '.join(names) or 'no class that could be built'}{reason}",
        "a model that this version of transformers has a class for: its types say which tensors "
        "are linear layers",
        "Update transformers, or take a checkpoint in the format of one of its classes.",
    )
