# SPDX-License-Identifier: Apache-2.0
"""VLLM_BATCH_INVARIANT=1: what a token becomes does not depend on what else is in the batch."""

import random

import pytest
import torch
from serving_cases import KEEP_KV

from vllm_nvfp4.gpus import GPUS
from vllm_nvfp4.kernels.cpu import dispatch as cpu_dispatch
from vllm_nvfp4.kernels.cpu import linear as cpu
from vllm_nvfp4.kernels.cpu.jit import ISA_LEVELS
from vllm_nvfp4.kernels.cuda import devices, dispatch, triton
from vllm_nvfp4.numerics.quantize import quantize_fp8_per_row, quantize_mxfp4, quantize_nvfp4
from vllm_nvfp4.testing.checkpoints import extract_fixture
from vllm_nvfp4.testing.engine import engine

TOKENS = (*range(2, 18), 40, 47, 48, 64, 130)
LAYERS = ((4096, 4096), (1024, 4096), (4096, 14336), (28672, 4096))
DTYPES = (torch.bfloat16, torch.float16, torch.float32)


@pytest.fixture(autouse=True)
def _batch_invariant(monkeypatch):
    monkeypatch.setenv("VLLM_BATCH_INVARIANT", "1")


@pytest.fixture(params=ISA_LEVELS)
def isa(request):
    try:
        cpu_dispatch.use_isa(request.param)
    except ValueError as error:
        pytest.skip(str(error))
    yield request.param
    cpu_dispatch.use_isa(None)


def products():
    """{name: product of a [M, 4096]} of every weight that the CPU kernels take."""
    weight = torch.randn(40, 4096, generator=torch.Generator().manual_seed(0))
    found = {}
    for name, quantized in (
        ("nvfp4", quantize_nvfp4(weight, "rtn")),
        ("mxfp4", quantize_mxfp4(weight)),
    ):
        packed = cpu.pack_weight(quantized)
        for bits in (16, 8):
            found[f"{name} W4A{bits}"] = lambda a, p=packed, b=bits: cpu.linear(a, p, None, b)
    q, scale = quantize_fp8_per_row(weight)
    found["fp8"] = lambda a: cpu.fp8_linear(a, q, scale.squeeze(-1))
    return found


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_each_row_of_a_cpu_product_is_that_of_one_token(isa, dtype):
    a = torch.randn(max(TOKENS), 4096, generator=torch.Generator().manual_seed(1)).to(dtype)
    for name, product in products().items():
        alone = torch.cat([product(row[None]) for row in a])
        differ = [m for m in TOKENS if not torch.equal(product(a[:m]), alone[:m])]
        assert not differ, f"{name}: other bits with M = {differ}"


def test_without_the_variable_many_tokens_take_faster_kernels(monkeypatch):
    """Else the tests above would compare a kernel with itself."""
    monkeypatch.delenv("VLLM_BATCH_INVARIANT")
    a = torch.randn(64, 4096, generator=torch.Generator().manual_seed(1))
    product = products()["nvfp4 W4A16"]
    assert not torch.equal(product(a), torch.cat([product(row[None]) for row in a]))


@pytest.mark.parametrize("gpu", GPUS, ids=lambda gpu: gpu.name)
@pytest.mark.parametrize("activation", ["auto", "16", "8"])
def test_one_gpu_kernel_for_any_number_of_tokens(gpu, activation):
    if activation == "8" and gpu.arch < 89:
        return  # refused for any number of tokens, see test_dispatch.py
    for n, k in LAYERS:
        for fmt in ("nvfp4", "mxfp4"):
            choices = [
                dispatch.choose_invariant(gpu, m, n, k, fmt, "bf16", activation)
                for m in (1, 7, 64, 512, 8192)
            ]
            assert len({(c.config, c.num_splits, c.activation_bits) for c in choices}) == 1
            assert choices[0].num_splits == 1
            assert choices[0].activation_bits == (8 if activation == "8" else 16)


def test_a_device_asks_for_the_invariant_kernel(monkeypatch):
    gpu = next(gpu for gpu in GPUS if gpu.arch == 89)
    shape = (1, 1024, 8192, "nvfp4", "bf16", "auto")
    with_variable = devices.Device(gpu, None, None).choose(*shape)
    monkeypatch.setenv("VLLM_BATCH_INVARIANT", "0")
    without = devices.Device(gpu, None, None).choose(*shape)
    assert with_variable == dispatch.choose_invariant(gpu, *shape)
    assert without == dispatch.choose(gpu, *shape)
    assert with_variable != without


def test_the_fp8_product_has_one_tile(monkeypatch):
    asked = []
    monkeypatch.setattr(triton, "fp8_tile", lambda m: asked.append(m) or {})
    monkeypatch.setattr(triton.triton, "cdiv", lambda *_: pytest.fail("launch"))
    weight = torch.zeros(8, 16, dtype=torch.float8_e4m3fn)
    for m in (1, 200):
        with pytest.raises(KeyError):
            triton.fp8_linear(torch.zeros(m, 16), weight, torch.ones(8), None)
    assert asked == [dispatch.INVARIANT_TOKENS] * 2


def test_a_request_gets_the_same_bits_alone_and_among_64(tmp_path):
    from vllm import SamplingParams

    folder = extract_fixture("modelopt/w4a16-llama", tmp_path)
    draw = random.Random(0)
    prompts = [
        {"prompt_token_ids": [draw.randrange(3, 280) for _ in range(draw.randrange(4, 60))]}
        for _ in range(64)
    ]
    parameters = SamplingParams(temperature=0, max_tokens=16, ignore_eos=True, logprobs=0)
    options = {"dtype": "float32", "max_num_seqs": 64, "additional_config": KEEP_KV}
    with engine(folder, enable_prefix_caching=False, **options) as llm:
        together = llm.generate(prompts, parameters, use_tqdm=False)
        alone = [llm.generate([p], parameters, use_tqdm=False)[0] for p in prompts[::8]]
    for one, many in zip(alone, together[::8], strict=True):
        assert one.outputs[0].token_ids == many.outputs[0].token_ids
        assert one.outputs[0].logprobs == many.outputs[0].logprobs
