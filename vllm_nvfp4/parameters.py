# SPDX-License-Identifier: Apache-2.0
"""vLLM parameters for the tensors of a layer: each knows how its tensor is cut over the ranks."""

from __future__ import annotations

from typing import Any

import torch
from vllm.model_executor.parameter import (
    BasevLLMParameter,
    ChannelQuantScaleParameter,
    ModelWeightParameter,
    PerTensorScaleParameter,
)

from vllm_nvfp4.checkpoints.spec import LayerSpec, Role, TensorSpec


class ShardVectorParameter(BasevLLMParameter):
    """[num_shards, ...]: one vector or matrix for each shard of a fused layer.

    Loads the tensors of which vLLM's own parameter classes have no kind: a vector along K
    (``input_dim=0``: cut under row parallelism) or a small matrix that every rank holds whole.
    """

    def __init__(self, input_dim: int | None = None, **kwargs: Any) -> None:
        self._cut_dim = input_dim
        super().__init__(**kwargs)

    def _store(self, index: int | slice, loaded_weight: torch.Tensor) -> None:
        self.data[index].copy_(loaded_weight)

    def load_column_parallel_weight(self, loaded_weight: torch.Tensor) -> None:
        self._store(slice(None), loaded_weight)

    def load_row_parallel_weight(self, loaded_weight: torch.Tensor) -> None:
        if self._cut_dim is not None:
            size = self.data.shape[1 + self._cut_dim]
            loaded_weight = loaded_weight.narrow(self._cut_dim, self.tp_rank * size, size)
        self._store(slice(None), loaded_weight)

    def load_merged_column_weight(self, loaded_weight: torch.Tensor, **kwargs: Any) -> None:
        self._store(kwargs["shard_id"], loaded_weight)

    def load_qkv_weight(self, loaded_weight: torch.Tensor, **kwargs: Any) -> None:
        self._store(self._shard_id_as_int(kwargs["shard_id"]), loaded_weight)


class UnusedParameter(BasevLLMParameter):
    """Takes a tensor that the tool stores and that has no use here, and keeps nothing of it."""

    def _drop(self, *args: Any, **kwargs: Any) -> None:
        pass

    load_column_parallel_weight = load_row_parallel_weight = _drop
    load_merged_column_weight = load_qkv_weight = _drop


class RowScaleParameter(ChannelQuantScaleParameter):
    """[N, 1]: one scale per output row. A file may hold [N] (ModelOpt) or [N, 1]."""

    def load_column_parallel_weight(self, loaded_weight: torch.Tensor) -> None:
        super().load_column_parallel_weight(loaded_weight.reshape(-1, 1))

    def load_row_parallel_weight(self, loaded_weight: torch.Tensor) -> None:
        super().load_row_parallel_weight(loaded_weight.reshape(-1, 1))

    def load_merged_column_weight(self, loaded_weight: torch.Tensor, **kwargs: Any) -> None:
        super().load_merged_column_weight(loaded_weight.reshape(-1, 1), **kwargs)

    def load_qkv_weight(self, loaded_weight: torch.Tensor, **kwargs: Any) -> None:
        super().load_qkv_weight(loaded_weight.reshape(-1, 1), **kwargs)


_TORCH_DTYPES = {
    "U8": torch.uint8,
    "F8_E4M3": torch.float8_e4m3fn,
    "BF16": torch.bfloat16,
    "F16": torch.float16,
    "F32": torch.float32,
}


def make_parameter(
    tensor: TensorSpec, spec: LayerSpec, shape: tuple[int, int], num_shards: int, loader: Any
) -> BasevLLMParameter:
    """The vLLM parameter that loads a tensor of this role. shape: [N, K] on this rank."""
    n, k = shape
    dtype = _TORCH_DTYPES[tensor.dtypes[0]]
    if tensor.role in (Role.CODES, Role.BLOCK_SCALE, Role.WEIGHT):
        divisor = {
            Role.CODES: 2,
            Role.BLOCK_SCALE: spec.scale_block,
            Role.WEIGHT: 1,
        }
        data = torch.empty(n, k // divisor[tensor.role], dtype=dtype)
        if tensor.role is Role.BLOCK_SCALE:
            data.view(torch.uint8).fill_(255)  # NaN in E4M3 and E8M0: unloaded scales show
        return ModelWeightParameter(data=data, input_dim=1, output_dim=0, weight_loader=loader)
    if tensor.role is Role.ROW_SCALE:
        data = torch.full((n, 1), torch.nan, dtype=torch.float32)
        return RowScaleParameter(data=data, output_dim=0, weight_loader=loader)
    if tensor.role is Role.UNUSED:
        return UnusedParameter(data=torch.empty(0), weight_loader=loader)
    if tensor.role is Role.PRE_SCALE:
        data = torch.ones(num_shards, k, dtype=torch.float32)
        return ShardVectorParameter(data=data, input_dim=0, weight_loader=loader)
    if tensor.role is Role.HADAMARD:
        size = spec.hadamard_size
        data = torch.full((num_shards, size, size), torch.nan, dtype=torch.float32)
        return ShardVectorParameter(data=data, weight_loader=loader)
    data = torch.full((num_shards,), torch.nan, dtype=torch.float32)
    return PerTensorScaleParameter(data=data, weight_loader=loader)
