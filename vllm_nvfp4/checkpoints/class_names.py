# SPDX-License-Identifier: Apache-2.0
"""16-bit experts stacked as transformers' class of a model keeps them, which engines' models do not
know: in files of tools that save a model's own state (AMD Quark).

transformers turns the hub's names and tensors into those of its classes as it loads them, and back
as it saves them. Here the tensors of such files are turned back, one by one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

from vllm_nvfp4.checkpoints.forms import FLOATS
from vllm_nvfp4.checkpoints.model_class import build_class

if TYPE_CHECKING:
    import torch

    from vllm_nvfp4.checkpoints.headers import TensorHeader
    from vllm_nvfp4.checkpoints.source import TensorInfo


class ClassNames:
    """From the names of a class to the hub's. model: transformers', as of build_class"""

    def __init__(self, model: Any) -> None:
        from transformers.conversion_mapping import get_model_conversion_mapping
        from transformers.core_model_loading import PrefixChange, WeightConverter

        self._model, self._own = model, model.state_dict()
        # Whether the hub's files have a prefix besides cannot be told from the class.
        found = get_model_conversion_mapping(model, add_legacy=False)
        found = [c for c in found if not isinstance(c, PrefixChange)]
        model._weight_conversions = found
        back: list[Any] = [c.reverse_transform() for c in reversed(found)]
        self._renamings = [c for c in back if not isinstance(c, WeightConverter)]
        self._converters = [c for c in back if isinstance(c, WeightConverter)]
        joining = [c for c in self._converters if len(c.source_patterns) > 1]
        self._of_many = {pattern for c in joining for pattern in c.source_patterns}
        # transformers loads these turned, and saves them as they are then.
        turning = [c for c in self._converters if hasattr(c.operations[0], "check_dims")]
        self._turned = {pattern for c in turning for pattern in c.source_patterns}

    def is_own(self, name: str, shape: tuple[int, ...]) -> bool:
        """Whether a tensor of the class has this name, and none of the hub's, or else this shape.
        A square one shows nothing; no layer's stacks are both square."""
        if (own := self._own.get(name)) is None:
            return False
        back, pattern = self._back(name)
        return back != name or (pattern in self._turned and own.shape == shape != own.mT.shape)

    def _back(self, name: str) -> tuple[str, str | None]:
        from transformers.core_model_loading import rename_source_key

        return rename_source_key(name, self._renamings, self._converters, reverse=True)

    def back(self, weights: Iterable[tuple[str, torch.Tensor]]) -> Iterator[tuple[str, Any]]:
        """The hub's tensors, those of experts one by one; as it is what the hub has in one with
        others."""
        from transformers.core_model_loading import revert_weight_conversion

        for name, tensor in weights:
            if (pattern := self._back(name)[1]) in self._turned:
                yield name, tensor.mT
            elif pattern in self._of_many:
                yield name, tensor
            else:
                yield from revert_weight_conversion(self._model, {name: tensor}).items()


def class_names(
    headers: Mapping[str, TensorHeader | TensorInfo],
    config: Any,
    build: Callable[[Any], Any] = build_class,
) -> ClassNames | None:
    """Of files with such stacks; None for all others. config: transformers', of the model"""
    stacks = [
        name
        for name, header in headers.items()
        if len(header.shape) == 3
        and header.dtype in FLOATS
        and name.rpartition(".")[0].endswith("experts")
    ]
    if not stacks or config is None:
        return None
    try:
        names = None if (model := build(config)) is None else ClassNames(model)
    except Exception:  # of any model's code, or of a transformers without such a mapping
        return None
    return names if names and any(names.is_own(n, headers[n].shape) for n in stacks) else None
