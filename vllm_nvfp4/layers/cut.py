# SPDX-License-Identifier: Apache-2.0
"""Which rows of a layer a rank loads, where a model cuts them by a loader of its own.

Mamba-2 with one group cuts in_proj over tensor-parallel ranks in another way than its layer does:
every rank has the group's B and C. It says so by putting a loader in place of the layer's, on the
parameters whose names it knows, whatever they hold. Such a loader copies rows. So it counts for
each tensor of the layer with one row an output, under any name, the bias too, and for none of the
others: one scale of all the weight stays one scale.
"""

from __future__ import annotations

import functools
import weakref
from typing import Any

import torch
from vllm.model_executor.layers.linear import LinearBase, UnquantizedLinearMethod
from vllm.model_executor.parameter import (
    BasevLLMParameter,
    ModelWeightParameter,
    PerTensorScaleParameter,
)

from vllm_nvfp4.compat import versions
from vllm_nvfp4.layers.filling import counted, cut_bias


def cut_biases(model: torch.nn.Module) -> None:
    """The same of all layers that vLLM's own method for 16 bits has, whose parameters tell
    nothing."""
    for layer in model.modules():
        method = getattr(layer, "quant_method", None)
        if isinstance(layer, LinearBase) and isinstance(method, UnquantizedLinearMethod):
            loader = getattr(getattr(layer, "weight", None), "weight_loader", None)
            if versions.rows_of_parts(loader) is not None:
                cut_bias(layer, loader)


class RowCut:
    """The cut that all parameters of one layer share.

    loader: (parameter, tensor of the file) -> None, the model's; None while it is the layer's
    """

    def __init__(self, layer: Any = None) -> None:
        self.loader: Any = None
        # Not the layer itself: vLLM keeps loaders for reloading, in a table with weak keys.
        self._layer: Any = None if layer is None else weakref.ref(layer)

    def take(self, loader: Any) -> None:
        """Let the model's loader count."""
        self.loader = loader
        if self._layer is not None:
            cut_bias(self._layer(), loader)

    def loads(self, loader: Any, has_rows: bool) -> Any:
        """The layer's loader for one of its tensors, which follows the model's if there is one.

        has_rows: whether the tensor has one row for each output of the layer
        """
        if loader is None:
            return None

        @functools.wraps(loader)
        def load(param: Any, loaded_weight: Any, *args: Any, **kwargs: Any) -> Any:
            if has_rows and self.loader is not None:
                return self.loader(param, loaded_weight)
            return loader(param, loaded_weight, *args, **kwargs)

        load.nvfp4_is_own = True  # type: ignore[attr-defined]
        return counted(load)


class FollowsCut(BasevLLMParameter):
    """A parameter of a linear layer. A loader that a model puts on it is the layer's row cut."""

    nvfp4_cut: RowCut | None = None

    def _find_loader(self) -> Any:
        if self._weight_loader is None:
            raise AttributeError("weight_loader")
        return self._weight_loader

    def _put_loader(self, loader: Any) -> None:
        is_waiting = getattr(loader, "__name__", "") == versions.ONLINE_LOADER
        if self.nvfp4_cut is None or is_waiting or hasattr(loader, "nvfp4_is_own"):
            self._weight_loader = loader
        else:
            self.nvfp4_cut.take(loader)

    def _delete_loader(self) -> None:
        self._weight_loader: Any = None

    weight_loader = property(_find_loader, _put_loader, _delete_loader)


class CutWeightParameter(FollowsCut, ModelWeightParameter):
    """[N, K] or a part of each K, as vLLM's own."""


class WholeScaleParameter(FollowsCut, PerTensorScaleParameter):
    """[num_shards], as vLLM's own."""
