# SPDX-License-Identifier: Apache-2.0
"""Which layers of a 16-bit checkpoint are quantised while it loads, told before it is loaded.

vLLM's own model knows best (checking/online.py asks it). Where there is no vLLM, transformers'
class stands for it, and where there is neither, patterns of names. The rule is one: online.py's.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from pathlib import Path
from typing import TYPE_CHECKING

from vllm_nvfp4.checkpoints.inventory import EMBEDDING, LINEAR, LayerRecord
from vllm_nvfp4.checkpoints.online import (
    LEFT_OUT,
    ROUTERS,
    TOWERS,
    is_ignored,
    is_in_stack,
    why_in_16_bits,
)
from vllm_nvfp4.checkpoints.spec import UNQUANTIZED, CheckpointError, LayerKind
from vllm_nvfp4.numerics.formats import FORMATS
from vllm_nvfp4.options import Options

if TYPE_CHECKING:
    from vllm_nvfp4.checkpoints.model_class import ModelClass

TABLES = "embeddings"
# The same, where vLLM's class asks no quantization config: whatever is stored is widened.
PLAIN_TABLES = "embeddings that vLLM builds without quantisation"
NO_LINEAR_LAYER = "no linear layers"
BY_VLLM = "vLLM's model"
BY_CLASS, BY_NAMES = "transformers' class", "names alone"
_EXPERT = re.compile(r"(\bexperts\.(?:[A-Za-z_]\w*\.)?)\d+(?=\.|$)")
# The last resort: what most models call encoders, their projectors, and routers.
_PATTERNS = {
    **dict.fromkeys(("*vision*", "*visual.*", "*audio_tower*", "*multi_modal_projector*"), TOWERS),
    **dict.fromkeys(("*mlp.gate", "*block_sparse_moe.gate", "*router*"), ROUTERS),
}


@dataclass(frozen=True)
class OnlineLayers:
    """What becomes of the matrices of a 16-bit checkpoint.

    source:    who says so, in a few words
    quantised: the layers that are quantised while they load, see :func:`layer_key`
    kept:      the others -> why they stay in 16 bits
    """

    source: str
    quantised: frozenset[str]
    kept: Mapping[str, str]

    def settle(self, records: Iterable[LayerRecord]) -> tuple[LayerRecord, ...]:
        """The records, those that stay in 16 bits as layers that are not quantised; tables of
        embeddings, for which there is an option, as such."""
        return tuple(map(self._settled, records))

    def _settled(self, record: LayerRecord) -> LayerRecord:
        key = layer_key(record.name)
        if record.spec.kind is not LayerKind.ONLINE or key in self.quantised:
            return record
        is_table = self.kept.get(key) in (TABLES, PLAIN_TABLES)
        part = EMBEDDING if is_table else record.part
        return replace(record, spec=UNQUANTIZED, part=part)


# A folder and its layers -> what becomes of them.
AskOnline = Callable[[Path, Sequence[LayerRecord]], OnlineLayers]


def layer_key(name: str) -> str:
    """A stored layer, or its weight, by one name for all experts of a block."""
    return _EXPERT.sub(r"\1*", name.removesuffix(".weight"))


def asked_about(records: Iterable[LayerRecord]) -> Iterator[LayerRecord]:
    """The records of which it has to be decided."""
    return (r for r in records if r.part == LINEAR and r.spec.kind is LayerKind.ONLINE)


def by_class(folder: Path, records: Sequence[LayerRecord]) -> OnlineLayers:
    """As the class of transformers says, by the types of its modules.

    Raises ImportError without transformers, CheckpointError where it has no class for the model.
    """
    from vllm_nvfp4.checkpoints.model_class import ModelClass

    return of_class(ModelClass(folder), records)


def of_class(model_class: ModelClass, records: Sequence[LayerRecord]) -> OnlineLayers:
    """The same, of a class that is at hand."""
    options = Options.resolve()
    return _told(BY_CLASS, records, lambda record: _why_by_class(model_class, record, options))


def by_names(folder: Path, records: Sequence[LayerRecord]) -> OnlineLayers:
    """As patterns of names and the layers' sizes say: a guess."""
    options = Options.resolve()
    return _told(BY_NAMES, records, lambda record: _why_by_name(record, options))


def without_vllm(folder: Path, records: Sequence[LayerRecord]) -> OnlineLayers:
    """:func:`by_class`; :func:`by_names`, with the reason in ``source``, where that cannot be."""
    try:
        return by_class(folder, records)
    except ImportError as error:
        reason: str = f"{error.name} is not installed"
    except CheckpointError as error:
        reason = str(error)
    found = by_names(folder, records)
    return replace(found, source=f"{found.source} ({reason})")


def _told(
    source: str, records: Sequence[LayerRecord], why: Callable[[LayerRecord], str | None]
) -> OnlineLayers:
    reasons = {layer_key(record.name): why(record) for record in asked_about(records)}
    kept = {name: reason for name, reason in reasons.items() if reason}
    return OnlineLayers(source, frozenset(reasons.keys() - kept.keys()), kept)


def _why_by_class(found: ModelClass, record: LayerRecord, options: Options) -> str | None:
    from vllm_nvfp4.checkpoints.model_class import Kind
    from vllm_nvfp4.checkpoints.source import TensorInfo

    name = f"{record.name}.weight"
    if found.shape(found.parameter(name)) is None:
        name = record.name  # of a stack that is a parameter of its block
    place = found.place(name, TensorInfo("BF16", record.shape))
    if place.kind is Kind.EMBEDDING:
        return TABLES
    if place.kind is Kind.TOWER:
        return TOWERS
    if place.kind in (Kind.OTHER, Kind.UNKNOWN, Kind.UNQUANTIZED):
        return NO_LINEAR_LAYER
    per_layer = getattr(found.config.get_text_config(), "hidden_size_per_layer_input", None)
    *_, n, k = record.shape
    why = why_in_16_bits(
        n,
        k,
        per_layer or 0,
        is_router=place.kind is Kind.ROUTER,
        is_in_stack=is_in_stack(record.name),
    )
    return why or _why_left_out(record, options)


def _why_by_name(record: LayerRecord, options: Options) -> str | None:
    for pattern, reason in _PATTERNS.items():
        if fnmatchcase(record.name, pattern):
            return reason
    *_, n, k = record.shape
    why = why_in_16_bits(n, k, is_router=False, is_in_stack=is_in_stack(record.name))
    return why or _why_left_out(record, options)


def _why_left_out(record: LayerRecord, options: Options) -> str | None:
    is_odd = record.shape[-1] % FORMATS[options.online_format].block_size
    return LEFT_OUT if is_odd or is_ignored([record.name], options.online_ignore) else None
