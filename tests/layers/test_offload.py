# SPDX-License-Identifier: Apache-2.0
"""Parameters that vLLM offloads stay where it put them, under whatever name they have after the
load: vLLM's own code around it, on an emulated GPU that counts the bytes of each device."""

from __future__ import annotations

import gc
from types import SimpleNamespace

import pytest
import torch
from vllm.model_executor.model_loader import utils as loader_utils
from vllm.model_executor.model_loader.utils import device_loading_context
from vllm.model_executor.offloader.base import NoopOffloader, set_offloader
from vllm.model_executor.offloader.prefetch import _CpuParamOffloader
from vllm.model_executor.offloader.uva import UVAOffloader

from vllm_nvfp4.checkpoints.detect import detect
from vllm_nvfp4.checkpoints.online import online_spec
from vllm_nvfp4.checkpoints.spec import CheckpointError, LayerKind, LayerSpec, Role, TensorSpec
from vllm_nvfp4.kernels import ops
from vllm_nvfp4.layers import experts as experts_module
from vllm_nvfp4.layers.embedding import StoredEmbeddingMethod
from vllm_nvfp4.layers.experts import NvFp4MoEMethod
from vllm_nvfp4.layers.linear import (
    NvFp4Fp8LinearMethod,
    NvFp4LinearMethod,
    NvFp4OnlineLinearMethod,
)
from vllm_nvfp4.numerics.activation import ExpertActivation
from vllm_nvfp4.numerics.formats import NVFP4
from vllm_nvfp4.numerics.quantize import quantize_fp8_weight, quantize_nvfp4
from vllm_nvfp4.options import Options
from vllm_nvfp4.testing.emulated_gpu import emulated_gpu

DEVICE = torch.device("cuda", 0)
N, K, E = 64, 128, 3
MODELOPT = detect({"quant_method": "modelopt", "quant_algo": "NVFP4", "group_size": 16})
SPEC = MODELOPT.layer_spec("model.layers.0.mlp.down_proj")
FP8 = LayerSpec(
    LayerKind.FP8,
    tensors=(
        TensorSpec("weight", Role.WEIGHT, ("F8_E4M3",)),
        TensorSpec("weight_scale", Role.ROW_SCALE, ("F32",)),
    ),
    activation_bits=16,
)


@pytest.fixture
def gpu(monkeypatch):
    def view_of_host(tensor):
        return found.claim(tensor.view(tensor.shape), is_view_of_host=True)

    monkeypatch.setattr(loader_utils, "get_accelerator_view_from_cpu_tensor", view_of_host)
    for name in ("warm_up_fp8", "warm_up_gather"):
        monkeypatch.setattr(ops, name, lambda *args: None)  # no Triton without a driver
    set_offloader(UVAOffloader(1 << 30))
    try:
        with emulated_gpu() as found:
            yield found
    finally:
        set_offloader(NoopOffloader())


def register(layer, name, role, value):
    parameter = torch.nn.Parameter(value, requires_grad=False)
    parameter.nvfp4_role = role
    layer.register_parameter(name, parameter)


def values(weight):
    return {
        Role.CODES: weight.codes,
        Role.BLOCK_SCALE: weight.block_scale,
        Role.GLOBAL_SCALE: weight.global_scale[:1].clone(),
    }


def dense_layer():
    layer, weight = torch.nn.Module(), quantize_nvfp4(torch.randn(N, K))
    for tensor in SPEC.tensors:
        if tensor.role in values(weight):
            register(layer, tensor.name, tensor.role, values(weight)[tensor.role])
    layer.logical_widths, layer.nvfp4_dtype = [N], torch.bfloat16
    return layer


def fp8_layer():
    layer, (weight, scale) = torch.nn.Module(), quantize_fp8_weight(torch.randn(N, K))
    register(layer, "weight", Role.WEIGHT, weight)
    register(layer, "weight_scale", Role.ROW_SCALE, scale[:, None].contiguous())
    layer.logical_widths = [N]
    return layer


def expert_layer():
    layer = torch.nn.Module()
    for stem, n in (("w13", 2 * N), ("w2", N)):
        found = [values(quantize_nvfp4(torch.randn(n, K))) for _ in range(E)]
        for tensor in SPEC.tensors:
            if tensor.role in found[0]:
                bits = [f[tensor.role].contiguous().view(torch.uint8) for f in found]
                stacked = torch.stack(bits).view(found[0][tensor.role].dtype)
                if tensor.role is Role.GLOBAL_SCALE and stem == "w13":
                    stacked = stacked.repeat(1, 2)
                register(layer, f"{stem}_{tensor.name}", tensor.role, stacked)
    layer.expert_map, layer.nvfp4_intermediate_size = None, K
    return layer


def expert_method(monkeypatch):
    method = object.__new__(NvFp4MoEMethod)
    method.spec, method.options, method.prefix = SPEC, Options(), "experts"
    method.activation = ExpertActivation("silu")
    method.moe = SimpleNamespace(activation=SimpleNamespace(value="silu"), tp_size=1)
    method._names = [[f"{e}.gate", f"{e}.down", f"{e}.up"] for e in range(E)]
    method.moe_kernel = object()
    monkeypatch.setattr(experts_module, "NvFp4Experts", lambda *args: None)
    return method


KINDS = {
    "dense": (dense_layer, lambda m: NvFp4LinearMethod(Options(), SPEC, "dense")),
    "fp8": (fp8_layer, lambda m: NvFp4Fp8LinearMethod(Options(), FP8, "fp8")),
    "embedding": (dense_layer, lambda m: StoredEmbeddingMethod(Options(), SPEC, "embedding")),
    "experts": (expert_layer, expert_method),
}


def load(layer, method, offload):
    """Offload a layer's parameters and process it as vLLM's loader does."""
    for parameter in layer.parameters():
        offload(parameter)
    with device_loading_context(layer, DEVICE):
        method.process_weights_after_loading(layer)
    gc.collect()


def on_host(parameter):
    parameter.data = parameter.data.cpu()


def as_view(parameter):
    parameter.data = loader_utils.get_accelerator_view_from_cpu_tensor(parameter.data.clone())
    parameter._vllm_is_uva_offloaded = True


def size_of(layer):
    return sum(p.numel() * p.element_size() for p in layer.parameters())


@pytest.mark.parametrize("offload", [on_host, as_view])
@pytest.mark.parametrize("kind", KINDS)
def test_what_was_offloaded_stays_so(gpu, monkeypatch, kind, offload):
    make, method = KINDS[kind]
    layer = make()
    before = size_of(layer)
    load(layer, method(monkeypatch), offload)
    assert size_of(layer) >= before - 64  # nothing was lost but a scalar or two
    assert gpu.live_bytes == 0
    for name, parameter in layer.named_parameters(remove_duplicate=False):
        assert parameter.is_cuda == (offload is as_view), name


@pytest.mark.parametrize("kind", KINDS)
def test_what_was_not_offloaded_is_on_the_gpu(gpu, monkeypatch, kind):
    make, method = KINDS[kind]
    layer = make()

    def put(parameter):
        parameter.data = parameter.data.cuda()

    load(layer, method(monkeypatch), put)
    assert gpu.live_bytes == size_of(layer)
    assert all(p.is_cuda for p in layer.parameters())


@pytest.mark.parametrize("kind", KINDS)
def test_without_offloading_there_are_no_second_names(gpu, monkeypatch, kind):
    set_offloader(NoopOffloader())
    make, method = KINDS[kind]
    layer = make()
    with device_loading_context(layer, DEVICE):
        method(monkeypatch).process_weights_after_loading(layer)
    names = [name for name, _ in layer.named_parameters(remove_duplicate=False)]
    assert len(names) == len(list(layer.parameters()))


def test_what_is_saved_names_each_parameter_once(gpu, monkeypatch):
    layer = dense_layer()
    load(layer, NvFp4LinearMethod(Options(), SPEC, "dense"), on_host)
    names = {"weight_packed", "weight_block_scale", "weight_global_scale"}
    assert set(layer.state_dict()) == names
    stored = {t.name for t in SPEC.tensors if t.role in values(quantize_nvfp4(torch.randn(16, 16)))}
    assert {name for name, _ in layer.named_parameters(remove_duplicate=False)} == names | stored


def test_the_prefetching_offloader_finds_what_became_of_a_parameter(gpu, monkeypatch):
    layer = dense_layer()
    for parameter in layer.parameters():
        parameter.data = parameter.data.cuda()
    del parameter  # one of those that the load replaces
    stored = [name for name, _ in layer.named_parameters()]
    offloaders = [_CpuParamOffloader(layer, name) for name in stored]
    assert gpu.live_bytes == 0
    with device_loading_context(layer, DEVICE):
        NvFp4LinearMethod(Options(), SPEC, "dense").process_weights_after_loading(layer)
    for offloader in offloaders:
        offloader.sync_cpu_storage()
    gc.collect()
    assert not any(offloader._param_deleted for offloader in offloaders)
    assert gpu.live_bytes == 0
    codes = offloaders[stored.index("weight")]
    buffer = torch.zeros(codes._cpu_storage.shape, dtype=torch.uint8, device=DEVICE)
    codes.assign_static_buffer(buffer)
    assert layer.weight_packed.data_ptr() == buffer.data_ptr()


def test_a_layer_that_is_quantised_while_it_loads_is_refused(gpu):
    method = NvFp4OnlineLinearMethod(Options(), online_spec(NVFP4), "model.layers.0.mlp.up_proj")
    with pytest.raises(CheckpointError, match=r"up_proj.*--cpu-offload-gb.*vllm-nvfp4 quantize"):
        method.create_weights(torch.nn.Module(), K, [N], K, N, torch.bfloat16)
