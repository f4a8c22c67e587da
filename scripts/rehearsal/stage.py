# SPDX-License-Identifier: Apache-2.0
"""What the walk pretends beside the stand-ins of the driver, all of it in one place.

Weights are loaded on the CPU and packed as on a GPU; a graph is compiled for tensors of a GPU that
have no memory.
"""

from __future__ import annotations

import contextlib
import importlib
import os
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import torch

from vllm_nvfp4.gpus import Gpu, find_gpu, short_name
from vllm_nvfp4.kernels import ops
from vllm_nvfp4.kernels.cuda.linear import unpack_weight

_SEQUENCES, _TOKENS = 4, 512


def engine_config(folder: Path, **options: Any) -> Any:
    """vLLM's whole configuration for a checkpoint, as ``vllm serve`` makes it."""
    from vllm.engine.arg_utils import EngineArgs

    defaults: dict[str, Any] = {
        "quantization": "nvfp4",
        "max_model_len": 128,
        "max_num_seqs": _SEQUENCES,
        "max_num_batched_tokens": _TOKENS,
    }
    return EngineArgs(model=str(folder), **(defaults | options)).create_engine_config()


def _kernels_of_a_gpu(device_type: str, layer: str = "linear") -> types.ModuleType:
    return importlib.import_module(f"vllm_nvfp4.kernels.cuda.{layer}")


@contextlib.contextmanager
def packed_as_on_a_gpu() -> Iterator[None]:
    """Within it, weights on the CPU are put into the order of the CUDA kernels."""
    with (
        mock.patch.object(ops, "backend", _kernels_of_a_gpu),
        mock.patch.object(ops, "warm_up"),
        mock.patch.object(ops, "warm_up_fp8"),
        mock.patch.object(ops, "multiply", _product),
    ):
        yield


def _product(a: torch.Tensor, packed: Any, bias: torch.Tensor | None, *_: Any) -> torch.Tensor:
    """Latent attention asks kv_b_proj for its weight by a product with the identity."""
    weight = unpack_weight(packed).dequantize(torch.float32)
    return torch.nn.functional.linear(a.float(), weight, bias).to(a.dtype)


@contextlib.contextmanager
def one_process() -> Iterator[None]:
    """Within it, vLLM looks at a model's class here: each time it would import itself elsewhere.
    What a model's configuration sets for its own process is gone after it: Kimi-Linear's has every
    model run uncompiled."""
    registry = importlib.import_module("vllm.model_executor.models.registry")
    run_here = mock.patch.object(registry, "_run_in_subprocess", lambda function: function())
    with run_here, mock.patch.dict(os.environ):
        yield


def load(config: Any) -> Any:
    """The model of a configuration, loaded on the CPU by the loader that a GPU's worker takes."""
    from vllm.config import set_current_vllm_config
    from vllm.distributed import (
        destroy_model_parallel,
        ensure_model_parallel_initialized,
        init_distributed_environment,
    )
    from vllm.model_executor.model_loader import get_model_loader

    config.load_config.device = "cpu"
    flashinfer = importlib.import_module("vllm.v1.attention.backends.flashinfer")
    with (
        set_current_vllm_config(config),
        packed_as_on_a_gpu(),
        # Some models make streams of their own, or ask where they are, as they are built.
        mock.patch.object(torch.cuda, "Stream", mock.MagicMock),
        mock.patch.object(config.device_config, "device", torch.device("cpu")),
        mock.patch.object(torch.cuda, "current_device", return_value=torch.device("cpu")),
        # FlashInfer's layers allocate a counter on the GPU.
        mock.patch.object(flashinfer, "_get_multi_ctas_kv_counter_buffer", create=True),
    ):
        if not torch.distributed.is_initialized():
            init_distributed_environment(1, 0, "tcp://127.0.0.1:0", 0, backend="gloo")
        destroy_model_parallel()  # of the model before: only mixtures of experts have all groups
        ensure_model_parallel_initialized(1, 1)
        loader = get_model_loader(config.load_config)
        return loader.load_model(vllm_config=config, model_config=config.model_config)


def _card() -> tuple[Gpu, Any]:
    """The card that the stand-in of NVML describes: its figures, and its properties as torch has
    them."""
    name = os.environ["STUB_NVML_NAME"]
    gpu = find_gpu(short_name(name))
    if gpu is None:
        raise ValueError(f"{name} is not among the cards of gpus.py")
    major, minor = map(int, os.environ["STUB_NVML_CAPABILITY"].split("."))
    properties = types.SimpleNamespace(
        name=name,
        total_memory=int(os.environ["STUB_NVML_GIB"]) << 30,
        multi_processor_count=gpu.num_sms,
        major=major,
        minor=minor,
        regs_per_multiprocessor=65536,
        max_threads_per_multi_processor=1536,
        max_threads_per_block=1024,
        warp_size=32,
        L2_cache_size=int(gpu.l2_mb * 2**20),
        shared_memory_per_block=49152,
        shared_memory_per_block_optin=101376,
    )
    return gpu, properties


@contextlib.contextmanager
def figures_of_the_card() -> Iterator[None]:
    """Within it, torch.cuda describes the card that NVML does, to what is compiled for it."""
    from torch._dynamo import device_interface
    from torch._inductor import config as inductor

    from vllm_nvfp4.kernels.cuda import devices

    gpu, properties = _card()
    answers: dict[str, Any] = {
        "get_device_properties": properties,
        "get_device_capability": (properties.major, properties.minor),
        "get_device_name": properties.name,
        "current_device": 0,
        "device_count": 1,
        "get_rng_state": torch.zeros(16, dtype=torch.uint8),
        "set_rng_state": None,
        "is_current_stream_capturing": False,
        "_exchange_device": 0,
        "_maybe_exchange_device": 0,
    }
    interface = device_interface.CudaInterface
    with contextlib.ExitStack() as stack:

        def answer(owner: Any, name: str, value: Any) -> None:
            def found(*_: Any) -> Any:
                return value

            stack.enter_context(mock.patch.object(owner, name, found))

        for name, value in answers.items():
            answer(torch.cuda, name, value)
        for name in ("get_device_properties", "current_device", "device_count"):
            answer(interface, name, answers[name])
        known = device_interface.caching_worker_device_properties
        stack.enter_context(mock.patch.dict(known, {"cuda": [properties]}))
        # Dynamo follows an accelerator's streams, and vLLM empties its allocator.
        for name, value in (("is_available", False), ("empty_cache", None),
                            ("max_memory_allocated", 0)):  # fmt: skip
            answer(torch.accelerator, name, value)
        stack.enter_context(inductor.patch(compile_threads=1))  # in this process, under this
        stack.enter_context(mock.patch.object(torch.Tensor, "pin_memory", lambda self, *_: self))
        # Inductor draws up its patterns of attention with tensors that have memory.
        for module, name in (("fuse_attention", "_sfdp_init"), ("pad_mm", "_pad_mm_init")):
            answer(importlib.import_module(f"torch._inductor.fx_passes.{module}"), name, None)
        device = devices.Device(gpu, None, 0)  # type: ignore[arg-type]
        stack.enter_context(mock.patch.dict(devices._devices, {0: device}))
        yield


@contextlib.contextmanager
def compiled_for_the_card() -> Iterator[list[str]]:
    """Within it, what Inductor writes becomes machine code, which is not run. Yields what it has
    written so far, a module for each graph."""
    from torch._inductor.codegen.wrapper import PythonWrapperCodegen
    from torch._inductor.graph import GraphLowering
    from torch._inductor.runtime.triton_heuristics import CachingAutotuner
    from torch._inductor.scheduler import Scheduler

    written: list[str] = []
    with (
        mock.patch.object(GraphLowering, "save_output_code", written.append),
        # These would run what is compiled: to choose among its variants, and to load it.
        mock.patch.object(Scheduler, "speedup_by_combo_kernel", return_value=True),
        mock.patch.object(PythonWrapperCodegen, "generate_and_run_autotune_block"),
        mock.patch.object(CachingAutotuner, "_make_launchers"),
        mock.patch.object(CachingAutotuner, "_dynamic_scale_rblock"),
    ):
        yield written


def run_without_memory(model: Any, config: Any, tokens: int) -> Any:
    """The model's forward pass on a GPU's tensors that have shapes alone, compiled as vLLM does."""
    from torch._subclasses import FakeTensorMode
    from vllm.config import set_current_vllm_config
    from vllm.forward_context import set_forward_context

    with (
        FakeTensorMode(allow_non_fake_inputs=True),
        set_current_vllm_config(config),
        set_forward_context(None, config, num_tokens=tokens),
    ):
        for module in model.modules():
            for table in (module._parameters, module._buffers):
                for name, tensor in table.items():
                    if tensor is not None:
                        there = torch.empty(tensor.shape, dtype=tensor.dtype, device="cuda:0")
                        is_parameter = isinstance(tensor, torch.nn.Parameter)
                        table[name] = (
                            torch.nn.Parameter(there, requires_grad=False)
                            if is_parameter
                            else there
                        )
        ids = torch.empty(tokens, dtype=torch.int64, device="cuda:0")
        return model(ids, torch.empty_like(ids))
