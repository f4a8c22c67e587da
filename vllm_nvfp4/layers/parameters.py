# SPDX-License-Identifier: Apache-2.0
"""vLLM parameters for the tensors of a layer: each knows how its tensor is cut over the ranks."""

from __future__ import annotations

import weakref
from collections.abc import Iterable
from typing import Any, NamedTuple

import torch
from vllm.model_executor.parameter import ChannelQuantScaleParameter

from vllm_nvfp4.checkpoints.dtypes import TORCH_DTYPES
from vllm_nvfp4.checkpoints.spec import CheckpointError, LayerSpec, Role, TensorSpec
from vllm_nvfp4.compat import versions
from vllm_nvfp4.layers.cut import CutWeightParameter, FollowsCut, RowCut, WholeScaleParameter


class ShardVectorParameter(FollowsCut):
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


class UnusedParameter(FollowsCut):
    """Takes a tensor that the tool stores and that has no use here, and keeps nothing of it."""

    def _drop(self, *args: Any, **kwargs: Any) -> None:
        pass

    load_column_parallel_weight = load_row_parallel_weight = _drop
    load_merged_column_weight = load_qkv_weight = _drop


class RowScaleParameter(FollowsCut, ChannelQuantScaleParameter):
    """[N, 1]: one scale per output row. A file may hold [N] (ModelOpt) or [N, 1]."""

    def load_column_parallel_weight(self, loaded_weight: torch.Tensor) -> None:
        super().load_column_parallel_weight(loaded_weight.reshape(-1, 1))

    def load_row_parallel_weight(self, loaded_weight: torch.Tensor) -> None:
        super().load_row_parallel_weight(loaded_weight.reshape(-1, 1))

    def load_merged_column_weight(self, loaded_weight: torch.Tensor, **kwargs: Any) -> None:
        super().load_merged_column_weight(loaded_weight.reshape(-1, 1), **kwargs)

    def load_qkv_weight(self, loaded_weight: torch.Tensor, **kwargs: Any) -> None:
        super().load_qkv_weight(loaded_weight.reshape(-1, 1), **kwargs)


_HAVE_ROWS = (Role.CODES, Role.BLOCK_SCALE, Role.WEIGHT, Role.ROW_SCALE)


class LinearCut(NamedTuple):
    """Which part of a linear layer a rank holds.

    shape:      [N, K] of it
    num_shards: of a fused layer
    loader:     vLLM's
    rows:       what a model puts in its place
    """

    shape: tuple[int, int]
    num_shards: int
    loader: Any
    rows: RowCut


def make_parameter(tensor: TensorSpec, spec: LayerSpec, cut: LinearCut) -> FollowsCut:
    """The vLLM parameter that loads a tensor of this role."""
    loader = cut.rows.loads(cut.loader, tensor.role in _HAVE_ROWS)
    parameter = _parameter(tensor, spec, cut, loader)
    parameter.nvfp4_cut = cut.rows
    return parameter


def _parameter(tensor: TensorSpec, spec: LayerSpec, cut: LinearCut, loader: Any) -> FollowsCut:
    (n, k), num_shards = cut.shape, cut.num_shards
    dtype = TORCH_DTYPES[tensor.dtypes[0]]
    if tensor.role in (Role.CODES, Role.BLOCK_SCALE, Role.WEIGHT):
        divisor = {
            Role.CODES: 2,
            Role.BLOCK_SCALE: spec.scale_block,
            Role.WEIGHT: 1,
        }
        data = torch.empty(n, k // divisor[tensor.role], dtype=dtype)
        if tensor.role is Role.BLOCK_SCALE:
            data.view(torch.uint8).fill_(255)  # NaN in E4M3 and E8M0: unloaded scales show
        return CutWeightParameter(data=data, input_dim=1, output_dim=0, weight_loader=loader)
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
    return WholeScaleParameter(data=data, weight_loader=loader)


class ExpertCut(NamedTuple):
    """Which part of the experts a rank holds.

    layer:       vLLM's layer, which knows the slot of an expert on this rank
    tp_rank:     position among the ranks that share each expert
    num_experts: on this rank
    """

    layer: Any
    tp_rank: int
    num_experts: int


def make_expert_parameter(
    tensor: TensorSpec,
    spec: LayerSpec,
    shape: tuple[int, int, int],
    cut: ExpertCut,
    params_dtype: torch.dtype,
    prefix: str,
) -> torch.nn.Parameter:
    """[E, shards * N, ...] for a tensor of each expert's w13, or [E, N, ...] of its w2.

    shape: (shards, N of one shard, K) on this rank. Scalars become [E, shards]. A tensor without
    use here becomes empty, and its loader keeps nothing.
    """
    shards, n, k = shape
    divisor = {Role.CODES: 2, Role.BLOCK_SCALE: spec.scale_block, Role.WEIGHT: 1}
    if tensor.role in divisor:
        dtype = params_dtype if tensor.role is Role.WEIGHT else TORCH_DTYPES[tensor.dtypes[0]]
        size = (cut.num_experts, shards * n, k // divisor[tensor.role])
        data = torch.empty(size, dtype=dtype)
        if tensor.role is Role.BLOCK_SCALE:
            data.view(torch.uint8).fill_(255)  # NaN in E4M3 and E8M0: unloaded scales show
    elif tensor.role in (Role.GLOBAL_SCALE, Role.GLOBAL_DIVISOR):
        data = torch.full((cut.num_experts, shards), torch.nan, dtype=torch.float32)
    elif tensor.role is Role.BIAS:
        data = torch.full((cut.num_experts, shards * n), torch.nan, dtype=params_dtype)
    else:
        data = torch.empty(0)
    parameter: Any = torch.nn.Parameter(data, requires_grad=False)
    parameter.nvfp4_role = tensor.role
    is_needed = not tensor.optional and tensor.role is not Role.UNUSED
    if is_needed and versions.loads_through_parameters():
        parameter.nvfp4_expected = {(e, s) for e in range(cut.num_experts) for s in range(shards)}
    parameter.weight_loader = _expert_loader(tensor, cut, shards, prefix)
    return parameter


def _expert_loader(tensor: TensorSpec, cut: ExpertCut, shards: int, prefix: str) -> Any:
    """vLLM calls it for each expert's tensor. True where this rank holds the expert."""
    # Not the layer itself: vLLM keeps loaders for reloading, in a table with weak keys.
    find_layer: Any = weakref.ref(cut.layer)

    def load_expert(
        param: Any,
        loaded_weight: torch.Tensor,
        weight_name: str,
        shard_id: str | None,
        expert_id: int | None,
        return_success: bool = False,
    ) -> bool | None:
        if shard_id is None or expert_id is None:
            # gpt-oss: vLLM's model cuts this rank's part out of the stack of all experts.
            _store_stack(param, loaded_weight, f"{prefix}.{tensor.name}")
            _note(param, getattr(param, "nvfp4_expected", ()))
            return True if return_success else None
        slot = find_layer()._map_global_expert_id_to_local_expert_id(expert_id)
        is_here = slot != -1
        shard = 1 if shard_id == "w3" else 0
        if is_here and loaded_weight.dim() == 3 and param.dim() == 3:
            # Llama-4's model hands over all the experts of this rank, from expert_id on.
            for i, one in enumerate(loaded_weight, slot):
                _store_expert(param.data[i], one, shard_id, shard, shards, cut.tp_rank)
                _note(param, [(i, shard)])
            return True if return_success else None
        if is_here and param.numel():
            store = _store_bias if tensor.role is Role.BIAS else _store_expert
            store(param.data[slot], loaded_weight, shard_id, shard, shards, cut.tp_rank)
            _note(param, [(slot, shard)])
        return is_here if return_success else None

    return load_expert


def _note(param: Any, parts: Iterable[tuple[int, int]]) -> None:
    """Remember which (slot, shard) were stored; on the meta device nothing is."""
    if not param.is_meta:
        param.__dict__.setdefault("nvfp4_loaded", set()).update(parts)


def _store_stack(param: Any, loaded: torch.Tensor, name: str) -> None:
    if loaded.shape != param.shape:
        raise CheckpointError(
            "checkpoint",
            name,
            f"{list(loaded.shape)} for this rank",
            f"{list(param.shape)}: every rank holds as many blocks of 32",
            "Choose a --tensor-parallel-size that divides the blocks of the intermediate size.",
        )
    param.data.copy_(loaded)


def _store_bias(
    data: torch.Tensor,
    loaded: torch.Tensor,
    shard_id: str,
    shard: int,
    shards: int,
    tp_rank: int,
) -> None:
    """Store this rank's part of a bias. That of w2 is added once, by the first rank."""
    size = len(data) // shards
    if shard_id == "w2":
        data.copy_(loaded if tp_rank == 0 else torch.zeros_like(loaded))
    else:
        part = loaded.narrow(0, tp_rank * size, size)
        data[shard * size : (shard + 1) * size].copy_(part)


def _store_expert(
    data: torch.Tensor,
    loaded: torch.Tensor,
    shard_id: str,
    shard: int,
    shards: int,
    tp_rank: int,
) -> None:
    """Store this rank's part of one tensor. data: of the expert, all shards."""
    if data.dim() == 1:
        data[shard : shard + 1].copy_(loaded.reshape(1))
        return
    size = len(data) // shards
    data = data[shard * size : (shard + 1) * size]
    dim = 1 if shard_id == "w2" else 0  # the intermediate size is what ranks share
    data.copy_(loaded.narrow(dim, tp_rank * data.shape[dim], data.shape[dim]))
