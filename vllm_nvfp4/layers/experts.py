# SPDX-License-Identifier: Apache-2.0
"""Routed experts: create what the checkpoint stores, stack it in kernel order, route and multiply.

An expert has two weights: w13, the gate rows (w1) before the up rows (w3), and w2, the down
projection. Each tensor of the checkpoint is one slot of a parameter "w13_<name>" or "w2_<name>".
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch
from vllm.logger import init_logger
from vllm.model_executor.layers.fused_moe import FusedMoEMethodBase
from vllm.model_executor.layers.fused_moe.config import FUSED_MOE_UNQUANTIZED_CONFIG

from vllm_nvfp4.checkpoints.census import Census
from vllm_nvfp4.checkpoints.convert import check_blocks, to_weight
from vllm_nvfp4.checkpoints.spec import (
    CheckpointError,
    Dialect,
    LayerKind,
    LayerSpec,
    Role,
    TensorSpec,
    describe,
)
from vllm_nvfp4.compat import versions
from vllm_nvfp4.kernels import moe_ops, ops, paths
from vllm_nvfp4.layers.experts_kernel import NvFp4Experts
from vllm_nvfp4.layers.parameters import ExpertCut, make_expert_parameter
from vllm_nvfp4.layers.weights import (
    EXPERT_NAMES,
    attach_experts,
    frozen,
    keep_offloaded,
    quantize_online,
    refuse_offload,
)
from vllm_nvfp4.numerics.activation import ExpertActivation
from vllm_nvfp4.numerics.quantize import largest_magnitude
from vllm_nvfp4.numerics.weight import BlockScaledWeight
from vllm_nvfp4.options import ACTIVATION_BITS, Options

logger = init_logger(f"vllm.{__name__}")

_LEAVE_OUT = (
    "Serve it without --quantization nvfp4; of a 16-bit checkpoint the option online_ignore can "
    "leave out the experts alone, by *.experts."
)


def expert_names(layer: Any, prefix: str, census: Census | None = None) -> list[list[str]]:
    """The checkpoint's names of the experts' linear layers: [w1, w2, w3] of each expert.

    Some classes (Kimi-Linear's) name them in their loading alone: a census that has none under the
    usual names, but vLLM's own ids of the shards, decides, and the layer is told.
    """
    if census is not None and census.find(expert_names(layer, prefix)[0][0]) is None:
        for role, leaf in (("gate", "w1"), ("down", "w2"), ("up", "w3")):
            if census.find(f"{prefix}.0.{leaf}") is not None:
                setattr(layer, f"ckpt_{role}_proj_name", leaf)
    leaves = [
        getattr(layer, f"ckpt_{role}_proj_name", f"{role}_proj") for role in ("gate", "down", "up")
    ]
    return [
        [f"{prefix}.{e}.{leaf}" for leaf in leaves if leaf]
        for e in range(layer.moe_config.num_logical_experts)
    ]


def experts_spec(dialect: Dialect, layer: Any, prefix: str) -> LayerSpec:
    """How the experts are stored. Raises CheckpointError where they differ among each other."""
    names = [name for expert in expert_names(layer, prefix) for name in expert]
    first = dialect.layer_spec(names[0])
    for name in names:
        if (spec := dialect.layer_spec(name)) != first:
            raise CheckpointError(
                "quantization config",
                name,
                describe(spec),
                f"{describe(first)}, as {names[0]}: the experts of a layer are one layer",
                "Quantise again with one format for all experts of a layer, or ignore them all.",
            )
    return first


def moe_method(options: Options, spec: LayerSpec, layer: Any, prefix: str) -> NvFp4MoEMethod:
    """The method for experts stored, or to be quantised, as ``spec`` says.

    Raises CheckpointError for what has no kernel here, where the files were out of reach: experts
    in FP8 or with a rotation; and for an unknown activation.
    """
    if spec.kind not in (LayerKind.MICROSCALED, LayerKind.ONLINE) or spec.hadamard_size:
        raise CheckpointError(
            prefix,
            "mixture-of-experts layer",
            describe(spec),
            "NVFP4 or MXFP4 experts without a rotation of the activations",
            _LEAVE_OUT,
        )
    if layer.moe_config.has_bias and spec.tensor(Role.BIAS) is None:
        bias = TensorSpec("bias", Role.BIAS, ("BF16", "F16", "F32"))
        spec = replace(spec, tensors=(*spec.tensors, bias))
    if spec.kind is LayerKind.ONLINE:
        return NvFp4OnlineMoEMethod(options, spec, layer, prefix)
    return NvFp4MoEMethod(options, spec, layer, prefix)


class NvFp4MoEMethod(FusedMoEMethodBase):
    """NVFP4 and MXFP4 experts from a checkpoint."""

    def __init__(self, options: Options, spec: LayerSpec, layer: Any, prefix: str) -> None:
        super().__init__(layer.moe_config)
        self.options, self.spec, self.prefix = options, spec, prefix
        # The name; constants that the layer sets for it are taken once it is complete.
        self.activation = ExpertActivation(self.moe.activation.value)
        # Of this rank's experts, as error messages are to name them.
        self._names = expert_names(layer, prefix)

    def create_weights(
        self,
        layer: Any,
        num_experts: int,
        hidden_size: int,
        intermediate_size_per_partition: int,
        params_dtype: torch.dtype,
        **extra_weight_attrs: Any,
    ) -> None:
        """Register two parameters for each tensor of the spec; each loads itself."""
        moe = self.moe
        check_blocks(f"{self.prefix} (w13)", self.spec, hidden_size)
        check_blocks(
            f"{self.prefix} (w2)", self.spec, intermediate_size_per_partition, moe.intermediate_size
        )
        layer.nvfp4_intermediate_size = intermediate_size_per_partition
        num_shards = 2 if self.activation.is_gated else 1
        cut = ExpertCut(layer, moe.tp_rank, num_experts)
        w13 = num_shards, intermediate_size_per_partition, hidden_size
        w2 = 1, hidden_size, intermediate_size_per_partition
        for tensor in self.spec.tensors:
            for stem, shape in (("w13", w13), ("w2", w2)):
                parameter = make_expert_parameter(
                    tensor, self.spec, shape, cut, params_dtype, self.prefix
                )
                layer.register_parameter(f"{stem}_{tensor.name}", parameter)

    def take_tensors(self, layer: Any, stem: str) -> dict[Role, torch.Tensor]:
        """Take the loaded tensors [E, ...] of one product off the layer; empty if taken before."""
        tensors = {}
        layer.nvfp4_stored = getattr(layer, "nvfp4_stored", {})
        for name, parameter in list(layer.named_parameters(recurse=False)):
            role = getattr(parameter, "nvfp4_role", None)
            if role and name.startswith(f"{stem}_"):
                self.check_filled(layer, stem, name.removeprefix(f"{stem}_"), parameter)
                tensors[role] = parameter.data
                layer.nvfp4_stored[stem, role] = name
                delattr(layer, name)
        return tensors

    def check_filled(self, layer: Any, stem: str, tensor: str, parameter: Any) -> None:
        """Raise CheckpointError for an expert of which the files held no such tensor."""
        expected: set[tuple[int, int]] = getattr(parameter, "nvfp4_expected", set())
        missing = sorted(expected - getattr(parameter, "nvfp4_loaded", set()))
        if missing:
            slot, shard = missing[0]
            raise CheckpointError(
                "checkpoint",
                f"{self.local_names(layer, stem)[slot]}: {tensor}",
                f"none for {'up' if shard else stem} and {len(missing) - 1} more of this layer",
                "one for each expert: it is not in the files under any name that the model loads",
                "Download the missing files, or quantise the model again.",
            )

    def process_weights_after_loading(self, layer: Any) -> None:
        declared = _activation_of(layer, self.moe.activation.value)
        in_halves = getattr(layer, "nvfp4_in_halves", False)
        for stem in ("w13", "w2"):
            if tensors := self.take_tensors(layer, stem):
                bias = tensors.pop(Role.BIAS, None)
                num_experts = max(len(tensor) for tensor in tensors.values())
                weights = self.weights(layer, stem, tensors)
                if stem == "w13" and declared.is_interleaved and not in_halves:
                    weights = map(uninterleave, weights)
                    bias = None if bias is None else torch.cat([bias[:, ::2], bias[:, 1::2]], 1)
                if bias is not None:
                    setattr(layer, f"{stem}_bias", frozen(bias))
                attach_experts(layer, stem, num_experts, weights)
        became = {(s, role): f"{s}_{n}" for s in ("w13", "w2") for role, n in EXPERT_NAMES.items()}
        keep_offloaded(layer, layer.nvfp4_stored, became)
        device = layer.w13_weight.device
        ops.check_activation(device, self.options.activation)
        bits = ACTIVATION_BITS[self.options.activation]
        self.activation = declared.uninterleaved()
        self.experts = NvFp4Experts(layer, self.activation, declared.is_interleaved, bits)
        # Where the weights are loaded again, adapters are on the experts of the first time.
        if self.moe_kernel is None and versions.runs_modular_kernel(device.type):
            self.moe_kernel = self.make_kernel(layer, self.experts)
        moe_ops.warm_up_experts(device, layer.nvfp4_format, bits)
        found = self.spec.algo or self.spec.kind.value
        kernel = paths.describe_experts_path(
            device.type, versions.device_arch(), bits, self.options.a8_variant,
            paths.gpu_figures(device.type),
        )  # fmt: skip
        layer.nvfp4_path = kernel
        logger.info_once("nvfp4: %s experts: %s", found, kernel)

    def make_kernel(self, layer: Any, experts: NvFp4Experts) -> Any:
        """vLLM's modular kernel: its way to move tokens between ranks, around these experts.

        Raises CheckpointError for a way that hands tokens over in another form than rows.
        """
        mover = versions.make_prepare_finalize(layer, experts.quant_config)
        if mover.activation_format != experts.activation_format():
            raise CheckpointError(
                self.prefix,
                "mixture-of-experts layer",
                f"--all2all-backend {self.moe.moe_parallel_config.all2all_backend}, which moves "
                "tokens in batches of each expert",
                "a backend that moves rows of tokens",
                "Choose --all2all-backend allgather_reducescatter.",
            )
        return versions.make_moe_kernel(mover, experts)

    def weights(
        self, layer: Any, stem: str, tensors: dict[Role, torch.Tensor]
    ) -> Iterator[BlockScaledWeight]:
        """Each local expert's weight; every shard keeps its own global scale, row by row."""
        names = self.local_names(layer, stem)
        for e, name in enumerate(names):
            one = {role: tensor[e] for role, tensor in tensors.items() if tensor.numel()}
            yield to_weight(self.spec, one, self.shard_rows(stem, one[Role.CODES]), name)

    def shard_rows(self, stem: str, weight: torch.Tensor) -> list[int]:
        num_shards = 2 if stem == "w13" and self.activation.is_gated else 1
        return [len(weight) // num_shards] * num_shards

    def local_names(self, layer: Any, stem: str) -> list[str]:
        """The checkpoint's name of each local expert's layer, in the order of their slots."""
        here = list(range(len(self._names)))
        if layer.expert_map is not None:
            slots = {int(slot): e for e, slot in enumerate(layer.expert_map) if slot >= 0}
            # Beyond the checkpoint's experts come copies of the first ones, to balance the load.
            here = [slots[slot] % len(self._names) for slot in sorted(slots)]
        return [self._names[e][1] if stem == "w2" else _gate_and_up(self._names[e]) for e in here]

    @property
    def supports_eplb(self) -> bool:
        """Every parameter has a row of its own for each expert, which vLLM can move."""
        return True

    def get_fused_moe_quant_config(self, layer: Any) -> Any:
        """That of 16-bit inputs: the experts find their weights in the layer."""
        return FUSED_MOE_UNQUANTIZED_CONFIG

    def apply(
        self,
        layer: Any,
        x: torch.Tensor,
        topk_weights: torch.Tensor,
        topk_ids: torch.Tensor,
        shared_experts: Any = None,
        shared_experts_input: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """The routed experts' part; vLLM's runner computes the shared experts and adds them."""
        is_weight_on_input = layer.apply_router_weight_on_input
        if self.moe_kernel is None:
            if is_weight_on_input:
                x = x * topk_weights.to(x.dtype)
            return self.experts.sums(
                x, topk_weights, topk_ids, layer.expert_map, is_weight_on_input
            )
        y: Any = self.moe_kernel.apply(
            hidden_states=x,
            w1=layer.w13_weight,
            w2=layer.w2_weight,
            topk_weights=topk_weights,
            topk_ids=topk_ids,
            activation=layer.activation,
            global_num_experts=layer.global_num_experts,
            expert_map=layer.expert_map,
            apply_router_weight_on_input=is_weight_on_input,
            shared_experts=shared_experts,
            shared_experts_input=shared_experts_input,
        )
        return y


class NvFp4OnlineMoEMethod(NvFp4MoEMethod):
    """16-bit experts that become NVFP4 or MXFP4 as soon as the layer's last one is loaded."""

    uses_meta_device = True

    def create_weights(self, layer: Any, *args: Any, **kwargs: Any) -> None:
        refuse_offload(self.prefix)
        with torch.device("meta"):
            super().create_weights(layer, *args, **kwargs)
        versions.initialize_online_processing(layer)

    def process_weights_after_loading(self, layer: Any) -> None:
        loaders = {stem: getattr(layer, f"{stem}_weight").weight_loader for stem in ("w13", "w2")}
        super().process_weights_after_loading(layer)
        for stem, loader in loaders.items():
            # Other ranks' experts may still come: they need a loader that turns them down.
            getattr(layer, f"{stem}_weight").weight_loader = loader

    def weights(
        self, layer: Any, stem: str, tensors: dict[Role, torch.Tensor]
    ) -> Iterator[BlockScaledWeight]:
        weights, method, fmt = (
            tensors[Role.WEIGHT],
            self.options.online_method,
            self.spec.fmt,
        )
        if fmt is None:
            raise ValueError(f"{self.prefix}: 16-bit experts without a format to quantise them to")
        rows = self.shard_rows(stem, weights[0])
        parts = [part for weight in weights for part in weight.split(rows)]
        amax = torch.stack([largest_magnitude(part) for part in parts]).view(-1, len(rows))
        if self.moe.tp_size > 1:
            versions.maximum_over_expert_ranks(amax, self.moe.tp_size)
        for e, weight in enumerate(weights):
            name = f"{self.prefix}.{stem} (expert {e} of this rank)"
            yield quantize_online(weight, rows, fmt, method, amax[e], name)


def uninterleave(w13: BlockScaledWeight) -> BlockScaledWeight:
    """Gate rows before up rows, of a weight in which they take turns."""
    rows = torch.arange(w13.num_rows, device=w13.codes.device)
    return w13.rows(torch.cat([rows[::2], rows[1::2]]))


def _gate_and_up(names: list[str]) -> str:
    """[w1, w2, w3] -> "....gate_proj+up_proj"; without a gate there is no w3."""
    return "+".join([names[0], *(name.rpartition(".")[2] for name in names[2:])])


def _activation_of(layer: Any, name: str) -> ExpertActivation:
    """With the constants that the model gives; gpt-oss's own activation has them built in."""
    limit, alpha, beta = (getattr(layer, f"swiglu_{c}", None) for c in ("limit", "alpha", "beta"))
    return ExpertActivation(
        name,
        math.inf if limit is None else float(limit),
        1.0 if alpha is None else float(alpha),
        0.0 if beta is None else float(beta),
    )
