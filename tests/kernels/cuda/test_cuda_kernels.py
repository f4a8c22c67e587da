# SPDX-License-Identifier: Apache-2.0
"""The CUDA kernels on a CUDA device, against float64. Run by benchmarks/gpu_check.sh (-m gpu)."""

import pytest
import torch

from vllm_nvfp4.kernels import ops
from vllm_nvfp4.kernels.cuda import cost, dispatch
from vllm_nvfp4.kernels.cuda import linear as cuda
from vllm_nvfp4.kernels.cuda.configs import GEMM_CONFIGS
from vllm_nvfp4.numerics.quantize import quantize_fp8_per_row, quantize_nvfp4
from vllm_nvfp4.testing import first_checks, kernel_cases
from vllm_nvfp4.testing.kernel_cases import DATA, KernelCase, check_case, kernel_cases_of
from vllm_nvfp4.testing.metrics import UNIT_ROUNDOFF, compare, compare_linear

pytestmark = pytest.mark.gpu

DEVICE = torch.device("cuda", 0)
DTYPES = [torch.bfloat16, torch.float16]
FORMATS = ["nvfp4", "mxfp4"]


def arch():
    major, minor = torch.cuda.get_device_capability(DEVICE)
    return major * 10 + minor


def supported_bits():
    return (16, 8) if arch() >= 89 else (16,)


@pytest.fixture(scope="module", params=FORMATS)
def layer(request):
    """(a weight of 264 x 2080, the same packed)"""
    weight = kernel_cases.random_weight(264, 2080, request.param, DEVICE)
    return weight, cuda.pack_weight(weight)


def activations(m, k, dtype, seed=1):
    generator = torch.Generator(DEVICE).manual_seed(seed)
    return torch.randn(m, k, generator=generator, device=DEVICE).to(dtype)


# --- first: what the rest rests on ---------------------------------------------------------------


@pytest.mark.parametrize(
    "config", [c for c in GEMM_CONFIGS if c.stem == "gemm_w4a8"], ids=lambda c: c.symbol
)
def test_fp8_subnormals_enter_the_mma_with_their_value(config):
    if config.min_arch > arch():
        return
    outcome = first_checks.check_subnormals(config, DEVICE)
    assert outcome.is_match, outcome.report


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_quantiser_is_bit_exact(dtype):
    if 8 not in supported_bits():
        return
    outcome = first_checks.check_quantizer(dtype, DEVICE)
    assert outcome.is_match, outcome.report


def test_what_torch_computes_while_weights_load_has_the_cpus_bits():
    outcomes = first_checks.check_numerics(DEVICE)
    assert not [name for name, outcome in outcomes.items() if not outcome.is_match]


# --- every kernel --------------------------------------------------------------------------------


@pytest.mark.parametrize("config", GEMM_CONFIGS, ids=lambda c: c.symbol)
def test_every_configuration_on_every_shape(config):
    cases = kernel_cases_of(config)
    assert len(cases) == len(kernel_cases.SHAPES)
    if config.min_arch > arch():
        with pytest.raises(RuntimeError, match="needs sm_89"):
            cuda.prepare(DEVICE, config.fmt_name).load([config])
        return
    for case in cases:
        outcome = check_case(case, DEVICE)
        assert outcome.is_match, f"{case}\n{outcome.report}"


@pytest.mark.parametrize("data", list(DATA))
@pytest.mark.parametrize("config", GEMM_CONFIGS, ids=lambda c: c.symbol)
def test_every_configuration_on_every_kind_of_data(config, data):
    if config.min_arch > arch():
        assert config not in dispatch.reachable(config.fmt_name, config.dtype, 16)
        return
    outcome = check_case(KernelCase(config, 48, 192, 4096, data), DEVICE)
    assert outcome.is_match, outcome.report
    # Beyond the element-wise bound: the whole is within output rounding, plus 1e-4 for FP8.
    unit = UNIT_ROUNDOFF[kernel_cases.TORCH_DTYPES[config.dtype]]
    limit = unit + (1e-4 if config.variant == "exact" else 1e-3)
    assert outcome.relative_error <= limit, outcome.report


@pytest.mark.parametrize("config", GEMM_CONFIGS, ids=lambda c: c.symbol)
def test_every_block_scale_is_finite_and_right(config):
    if config.min_arch > arch():
        return
    dtype = kernel_cases.TORCH_DTYPES[config.dtype]
    weight = kernel_cases.extreme_weight(config.fmt_name, 64, DEVICE)
    a = torch.eye(64, device=DEVICE)[:24].to(dtype)  # picks single weights out
    y = kernel_cases.run_config(config, a, cuda.pack_weight(weight))
    bits = cost.activation_bits_of(config)
    outcome = compare_linear(y, a, weight, None, bits, config.variant)
    assert outcome.is_match, outcome.report


@pytest.mark.parametrize("m", [0, 1, 5, 300])
@pytest.mark.parametrize("dtype", DTYPES)
def test_the_product_of_quantised_activations_is_the_8_bit_product(layer, dtype, m):
    if 8 not in supported_bits():
        return
    _, packed = layer
    a, bias = activations(m, 2080, dtype), activations(1, 264, dtype)[0]
    q, a_scale = quantize_fp8_per_row(a)
    y = torch.ops.vllm_nvfp4.linear_a8(
        q, a_scale, packed.codes, packed.block_scale, packed.global_scale, bias,
        packed.num_rows, packed.num_cols, packed.fmt.name, dtype,
    )  # fmt: skip
    assert torch.equal(y, call_op(a, packed, 8, bias))


@pytest.mark.parametrize("m", [0, 1, 5, 64, 300])
@pytest.mark.parametrize("dtype", DTYPES)
def test_the_op(layer, dtype, m):
    weight, packed = layer
    a = activations(m, 2080, dtype)
    for bits in (*supported_bits(), 0):
        y = call_op(a, packed, bits)
        assert y.shape == (m, 264)
        chosen = bits or dispatch.choose_activation_bits(
            cuda.prepare(DEVICE, "nvfp4").gpu, m, 264, 2080, packed.fmt.name
        )
        outcome = compare_linear(y, a, weight, None, chosen)
        assert outcome.is_match, outcome.report


def call_op(a, packed, bits, bias=None):
    return ops.linear(
        a, packed.codes, packed.block_scale, packed.global_scale, bias,
        packed.num_rows, packed.num_cols, packed.fmt.name, bits,
    )  # fmt: skip


@pytest.mark.parametrize("view", ["every_other_row", "columns", "shifted", "transposed", "3d"])
def test_activations_that_are_not_contiguous(layer, view):
    weight, packed = layer
    wide = activations(14, 2 * 2080, torch.bfloat16)
    a = {
        "every_other_row": lambda: activations(14, 2080, torch.bfloat16)[::2],
        "columns": lambda: wide[:, 2080:],
        "shifted": lambda: wide[:, 1:2081],
        "transposed": lambda: activations(2080, 14, torch.bfloat16).t(),
        "3d": lambda: activations(14, 2080, torch.bfloat16).view(2, 7, 2080),
    }[view]()
    for bits in supported_bits():
        y = call_op(a, packed, bits)
        flat = a.reshape(-1, 2080)
        outcome = compare_linear(y.view(-1, 264), flat, weight, None, bits)
        assert outcome.is_match, outcome.report


@pytest.mark.parametrize("m", [1, 16, 100])
def test_cuda_graph(layer, m):
    """Captured on its own stream, replayed on new input, next to eager launches."""
    weight, packed = layer
    a = activations(m, 2080, torch.bfloat16)
    for bits in supported_bits():
        call_op(a, packed, bits)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            y = call_op(a, packed, bits)
        for seed in (2, 3):
            a.copy_(activations(m, 2080, torch.bfloat16, seed))
            graph.replay()
            eager = call_op(a, packed, bits)
            assert torch.equal(y, eager)
            outcome = compare_linear(y, a, weight, None, bits)
            assert outcome.is_match, outcome.report


def test_torch_compile(layer):
    weight, packed = layer
    bias = activations(1, 264, torch.bfloat16)[0]

    @torch.compile(fullgraph=True, dynamic=True)
    def block(a):
        y = torch.ops.vllm_nvfp4.linear(
            a * 2, packed.codes, packed.block_scale, packed.global_scale, bias,
            packed.num_rows, packed.num_cols, packed.fmt.name, 16,
        )  # fmt: skip
        return y + 1

    for m in (3, 40):
        a = activations(m, 2080, torch.bfloat16)
        outcome = compare_linear(block(a) - 1, a * 2, weight, bias)
        assert outcome.relative_error < 1e-2, outcome.report


def test_streams_do_not_share_semaphores(layer):
    """Two streams at once, both splitting K: each result must be its own."""
    _, packed = layer
    inputs = [activations(8, 2080, torch.bfloat16, seed) for seed in range(2)]
    expected = [call_op(a, packed, 16) for a in inputs]
    streams = [torch.cuda.Stream() for _ in inputs]
    torch.cuda.synchronize()
    results = [[] for _ in inputs]
    for _ in range(200):
        for stream, a, out in zip(streams, inputs, results, strict=True):
            with torch.cuda.stream(stream):
                out.append(call_op(a, packed, 16))
    torch.cuda.synchronize()
    for out, right in zip(results, expected, strict=True):
        assert all(torch.equal(y, right) for y in out)


def test_packing_on_the_device_is_the_cpus_and_reverses(layer):
    weight, packed = layer
    on_cpu = cuda.pack_weight(type(weight)(*(to_cpu(t) for t in vars(weight).values())))
    assert torch.equal(packed.codes.cpu(), on_cpu.codes)
    assert torch.equal(packed.block_scale.cpu(), on_cpu.block_scale)
    back = cuda.unpack_weight(packed)
    assert torch.equal(back.codes, weight.codes)
    assert torch.equal(back.block_scale.view(torch.uint8), weight.block_scale.view(torch.uint8))


def to_cpu(value):
    return value.cpu() if isinstance(value, torch.Tensor) else value


@pytest.mark.parametrize("dtype", DTYPES)
def test_rows_of_an_embedding(layer, dtype):
    weight, packed = layer
    ids = torch.tensor([0, 263, 17, 8, 17, 100], device=DEVICE)
    rows = cuda.gather_rows(packed, ids, dtype)
    assert torch.equal(rows, weight.dequantize(torch.float32)[ids].to(dtype))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("m", [1, 16, 33, 200])
def test_fp8_weights(dtype, m):
    weight = torch.randn(1000, 520, device=DEVICE).to(torch.float8_e4m3fn)
    row_scale = torch.rand(1000, device=DEVICE) + 0.1
    a, bias = activations(m, 520, dtype), activations(1, 1000, dtype)[0]
    y = cuda.fp8_linear(a, weight, row_scale, bias)
    w = weight.double() * row_scale.double()[:, None]
    reference = a.double() @ w.T + bias.double()
    loss = a.double().abs() @ w.abs().T * 2.0**-16
    outcome = compare(y, reference, UNIT_ROUNDOFF[dtype] * reference.abs() + loss)
    assert outcome.is_match, outcome.report


@pytest.mark.parametrize("m", [1, 33, 700])
def test_fp8_weights_with_fp8_activations(m):
    weight = torch.randn(1008, 528, device=DEVICE).to(torch.float8_e4m3fn)
    if ops.fp8_activation_bits(weight, torch.bfloat16, 8) == 16:
        assert arch() < 89
        return
    row_scale = torch.rand(1008, device=DEVICE) + 0.1
    a, bias = activations(m, 528, torch.bfloat16), activations(1, 1008, torch.bfloat16)[0]
    y = ops.fp8_linear(a, weight, row_scale, bias, 8)
    q, a_scale = quantize_fp8_per_row(a)
    w = weight.double() * row_scale.double()[:, None]
    quantized = q.double() * a_scale.double()
    reference = quantized @ w.T + bias.double()
    # The library accumulates in the FP8 tensor cores, 13 fractional bits on Ada.
    loss = quantized.abs() @ w.abs().T * 2.0**-9
    outcome = compare(y, reference, 2.0**-8 * reference.abs() + loss)
    assert outcome.is_match, outcome.report


def test_a_launch_on_a_device_without_kernels_says_so():
    weight = quantize_nvfp4(torch.randn(64, 64))
    packed = cuda.pack_weight(weight)
    moved = type(packed)(*(v.cuda() if isinstance(v, torch.Tensor) else v
                           for v in vars(packed).values()))  # fmt: skip
    from vllm_nvfp4.kernels.cuda import devices

    loaded = devices._devices.pop(0, None)
    try:
        with pytest.raises(RuntimeError, match=r"no kernels are loaded on cuda:0.*prepare"):
            cuda.linear(activations(1, 64, torch.bfloat16), moved, None, 16)
    finally:
        if loaded is not None:
            devices._devices[0] = loaded
