# SPDX-License-Identifier: Apache-2.0
"""Where a compiled graph quantises activations, and for which batch sizes."""

import pickle
import re

import pytest
import torch
from torch._inductor.utils import run_and_get_code

from vllm_nvfp4.compat import versions
from vllm_nvfp4.gpus import GPUS, find_gpu
from vllm_nvfp4.kernels import ops, paths
from vllm_nvfp4.kernels.cpu import linear as cpu
from vllm_nvfp4.kernels.cuda import cost, devices, dispatch
from vllm_nvfp4.kernels.cuda import linear as cuda
from vllm_nvfp4.kernels.cuda.devices import Device
from vllm_nvfp4.layers import fusion
from vllm_nvfp4.numerics.quantize import quantize_fp8_per_row, quantize_mxfp4, quantize_nvfp4
from vllm_nvfp4.options import Options
from vllm_nvfp4.testing.metrics import compare, compare_linear
from vllm_nvfp4.testing.shapes import MODELS

pytestmark = pytest.mark.vllm

N, K = 96, 128


@pytest.fixture
def layer():
    torch.manual_seed(0)
    weight = quantize_nvfp4(torch.randn(N, K))
    packed = cpu.pack_weight(weight)
    return weight, packed, torch.randn(N)


def product(x, packed, bias, bits):
    return torch.ops.vllm_nvfp4.linear(
        x, packed.codes, packed.block_scale, packed.global_scale, bias,
        packed.num_rows, packed.num_cols, packed.fmt.name, bits,
    )  # fmt: skip


def compile_with_pass(function, *inputs, graph_pass=None):
    """(results, Inductor's source)"""
    torch._dynamo.reset()
    options = {"post_grad_custom_post_pass": graph_pass or fusion.QuantizeWhereComputed()}
    compiled = torch.compile(function, fullgraph=True, dynamic=True, options=options)
    with torch.compiler.config.patch(force_disable_caches=True):
        result, code = run_and_get_code(compiled, *inputs)
    return result, code[0]


def rms_norm(x, weight):
    return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6) * weight


def kernels_of(code):
    """The bodies of the kernels that Inductor wrote."""
    return re.findall(r"extern \"C\".*?'''", code, re.DOTALL)


@pytest.mark.parametrize("has_bias", [False, True])
def test_the_kernel_of_the_norm_quantises(layer, has_bias):
    weight, packed, bias = layer
    bias, gain = bias if has_bias else None, torch.rand(K)

    def block(x, residual):
        residual = x + residual
        return product(rms_norm(residual, gain), packed, bias, 8), residual

    inputs = torch.randn(7, K), torch.randn(7, K)
    (y, residual), code = compile_with_pass(block, *inputs)
    kernels = kernels_of(code)
    assert len(kernels) == 1, "the norm, the maximum and the rounding in one kernel"
    assert "Float8_e4m3fn*" in kernels[0]
    assert "sqrt" in kernels[0]
    assert "torch.ops.vllm_nvfp4.linear_a8.default" in code
    assert torch.equal(residual, sum(inputs))
    outcome = compare_linear(y, rms_norm(residual, gain), weight, bias, 8)
    assert outcome.is_match, outcome.report


def test_the_kernel_of_the_activation_function_quantises(layer):
    weight, packed, _ = layer

    def block(x):
        gate, up = x.chunk(2, dim=-1)
        return product(torch.nn.functional.silu(gate) * up, packed, None, 8)

    x = torch.randn(2, 3, 2 * K)  # three dimensions
    y, code = compile_with_pass(block, x)
    assert y.shape == (2, 3, N)
    assert [("Float8_e4m3fn*" in k, "exp" in k) for k in kernels_of(code)] == [(True, True)]
    gate, up = x.chunk(2, dim=-1)
    a = (torch.nn.functional.silu(gate) * up).view(-1, K)
    outcome = compare_linear(y.view(-1, N), a, weight, None, 8)
    assert outcome.is_match, outcome.report


def test_int8_is_quantised_in_the_graph_too():
    """By numerics' rule, written by Inductor: groups of 64 columns, the last one shorter."""
    cpu.use_variant("int8")
    weight = quantize_nvfp4(torch.randn(N, 144))
    packed, x = cpu.pack_weight(weight), torch.randn(7, 144)
    y, code = compile_with_pass(lambda x: product(x * 2, packed, None, 8), x)
    assert "torch.ops.vllm_nvfp4.linear_a8.default" in code
    assert "Float8" not in code
    assert torch.equal(y, product(x * 2, packed, None, 8))


def fp8_layer(m, dtype=torch.bfloat16):
    torch.manual_seed(m)
    a, bias = torch.randn(m, K).to(dtype), torch.randn(N).to(dtype)
    weight, row_scale = quantize_fp8_per_row(torch.randn(N, K))
    q, a_scale = quantize_fp8_per_row(a)
    exact = (q.double() * a_scale.double()) @ (weight.double() * row_scale.double()).T
    return a, (weight, row_scale[:, 0].contiguous(), bias), exact + bias.double()


@pytest.mark.parametrize("m", [0, 1, 33])
def test_fp8_layers_with_8_bit_activations_are_the_exact_product_of_the_rounded(m):
    a, operands, exact = fp8_layer(m)
    y = torch.ops.vllm_nvfp4.fp8_linear(a.view(1, m, K), *operands, 8)
    assert y.shape == (1, m, N)
    outcome = compare(y[0], exact, 2.0**-8 * exact.abs() + 1e-3)
    assert outcome.is_match, outcome.report


def test_the_kernel_before_an_fp8_layer_quantises():
    a, operands, exact = fp8_layer(7, torch.float32)

    def block(a):
        return torch.ops.vllm_nvfp4.fp8_linear(a * 2, *operands, 8)

    y, code = compile_with_pass(block, a)
    assert len(kernels_of(code)) == 1
    assert "Float8_e4m3fn*" in kernels_of(code)[0]
    assert "_scaled_mm" in code
    assert "torch.ops.vllm_nvfp4.fp8_linear.default" not in code
    bias = operands[2].double()
    outcome = compare(y, 2 * (exact - bias) + bias, 1e-5 * exact.abs() + 1e-4)
    assert outcome.is_match, outcome.report


def test_fp8_layers_of_16_bits_stay_whole():
    a, operands, _ = fp8_layer(3)
    block = lambda a: torch.ops.vllm_nvfp4.fp8_linear(a * 2, *operands, 16)  # noqa: E731
    _, code = compile_with_pass(block, a)
    assert "torch.ops.vllm_nvfp4.fp8_linear.default" in code


def put_gpu(monkeypatch, name):
    """A GPU of this name at cuda:0, and weights of 4096 and 4104 rows on it, without memory."""
    device = Device(find_gpu(name), None, 0)
    monkeypatch.setattr(cuda, "prepare", lambda *_: device)
    monkeypatch.setitem(devices._devices, 0, device)
    monkeypatch.setattr(ops, "_refusals", {})
    with torch._subclasses.FakeTensorMode(allow_non_fake_inputs=True):
        return [
            torch.empty(rows, 4096, dtype=torch.float8_e4m3fn, device="cuda:0")
            for rows in (4096, 4104)
        ]


def test_how_fp8_layers_may_take_their_activations(monkeypatch):
    weight = torch.zeros(N, K).to(torch.float8_e4m3fn)
    assert ops.fp8_activation_bits(weight, torch.bfloat16, 8) == 16  # a CPU
    for gpu, bits in (("RTX 4090", 0), ("H200", 0), ("A100-SXM4-80GB", 16)):
        on_gpu, odd = put_gpu(monkeypatch, gpu)
        assert ops.fp8_activation_bits(on_gpu, torch.bfloat16, 0) == bits
        assert ops.fp8_activation_bits(on_gpu, torch.bfloat16, 8) == (bits or 8)
        assert ops.fp8_activation_bits(on_gpu, torch.bfloat16, 16) == 16
        assert ops.fp8_activation_bits(on_gpu, torch.float16, 0) == 16
        assert ops.fp8_activation_bits(odd, torch.bfloat16, 0) == 16


@pytest.mark.parametrize(
    ("refused", "wanted", "bits"),
    [
        (lambda m, bias: m <= 256, 8, 16),
        (lambda m, bias: m <= 16, 0, 0),  # the batch sizes of 8 bits are larger
        (lambda m, bias: m > 256, 0, 16),
        (lambda m, bias: bias is not None, 8, 16),
        (lambda m, bias: False, 8, 8),
    ],
)
def test_fp8_layers_that_the_library_refuses_keep_16_bits(refused, wanted, bits, monkeypatch):
    weight, _ = put_gpu(monkeypatch, "H100 80GB HBM3")
    sizes, said = [], []

    def product(q, a_scale, weight, row_scale, bias, dtype):
        sizes.append(len(q))
        if refused(len(q), bias):
            raise RuntimeError("CUBLAS_STATUS_NOT_SUPPORTED when calling\n cublasLtMatmul")
        return torch.empty(0)

    monkeypatch.setattr(ops, "multiply_fp8_a8", product)
    monkeypatch.setattr(ops.logger, "warning", lambda line, *values: said.append(line % values))
    assert ops.fp8_activation_bits(weight, torch.bfloat16, wanted) == bits
    lines = [line.partition(": torch._scaled_mm refuses ")[0] for line in said]
    assert lines == (["nvfp4: FP8 layers of [4096, 4096] run in W8A16"] if bits == 16 else [])
    tried = len(sizes)
    assert ops.fp8_activation_bits(weight, torch.bfloat16, wanted) == bits
    assert len(sizes) == tried  # once for each shape


def test_a_lack_of_memory_is_no_refusal(monkeypatch):
    weight, _ = put_gpu(monkeypatch, "H100 80GB HBM3")

    def product(*_):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(ops, "multiply_fp8_a8", product)
    with pytest.raises(torch.OutOfMemoryError):
        ops.fp8_activation_bits(weight, torch.bfloat16, 8)


def test_fp8_layers_switch_by_the_batch_size(monkeypatch):
    place = torch.device("cuda", 0)
    for gpu in ("RTX 4090", "L40S", "L4", "H200"):
        monkeypatch.setitem(devices._devices, 0, Device(find_gpu(gpu), None, 0))
        switch = dispatch.fp8_activation_switch(find_gpu(gpu), 4096, 4096)
        assert 16 < switch < 320
        assert not ops.fp8_takes_8_bits(place, int(switch), 4096, 4096, 0)
        assert ops.fp8_takes_8_bits(place, int(switch) + 1, 4096, 4096, 0)
        assert ops.fp8_takes_8_bits(place, 1, 4096, 4096, 8)
        assert not ops.fp8_takes_8_bits(place, 4096, 4096, 4096, 16)
    assert dispatch.fp8_activation_switch(find_gpu("A100-SXM4-80GB"), 4096, 4096) == float("inf")


@pytest.mark.parametrize(
    ("arch", "is_fp8", "bits", "path"),
    [
        (89, False, 0, "CUDA kernel, W4A16, or by the batch size W4A8 in FP8 per token"),
        (86, False, 0, "CUDA kernel, W4A16 for every batch size (sm_86 has no FP8 mma.sync)"),
        (90, False, 0, "CUDA kernel, W4A16 for every batch size (sm_90 emulates FP8 mma.sync)"),
        (90, False, 8, "CUDA kernel, W4A8 in FP8 per token (slow: sm_90 emulates FP8 mma.sync)"),
        (89, False, 8, "CUDA kernel, W4A8 in FP8 per token"),
        (89, True, 0, "Triton kernel, W8A16, or torch's library product, W8A8, by the batch size"),
        (86, True, 16, "Triton kernel, W8A16"),
        (None, True, 16, "CPU kernel, W8A16"),
    ],
)
def test_the_log_names_the_path_that_runs(arch, is_fp8, bits, path):
    device = "cpu" if arch is None else "cuda"
    assert paths.describe_path(device, arch, is_fp8, bits, "exact", None) == path


@pytest.mark.parametrize(
    ("card", "bits", "path"),
    [
        ("RTX 4090", 0, "CUDA kernel, W4A16, or by the batch size W4A8 in INT8 per token and 64"),
        ("RTX 4090", 8, "CUDA kernel, W4A8 in INT8 per token and 64 columns"),
        ("L40S", 0, "CUDA kernel, W4A16, or by the batch size W4A8 in FP8 per token"),
        ("RTX 3090", 0, "CUDA kernel, W4A16, or by the batch size W4A8 in INT8 per token and 64"),
        ("A100 80GB PCIe", 0, "CUDA kernel, W4A16 for every batch size (on sm_80 its INT8 gains"),
        ("A100 80GB PCIe", 8, "CUDA kernel, W4A8 in INT8 per token and 64 columns (slow: on sm_80"),
    ],
)
def test_the_log_says_which_8_bits_the_card_takes(card, bits, path):
    gpu = find_gpu(card)
    assert paths.describe_path("cuda", gpu.arch, False, bits, "auto", gpu).startswith(path)
    experts = paths.describe_experts_path("cuda", gpu.arch, bits, "auto", gpu)
    path = path.replace("batch size W4A8", "tokens per expert W4A8")
    assert experts.startswith(f"grouped {path}")


def test_16_bits_stay_whole(layer):
    _, packed, _ = layer
    _, code = compile_with_pass(lambda x: product(x * 2, packed, None, 16), torch.randn(3, K))
    assert "torch.ops.vllm_nvfp4.linear.default" in code
    assert "linear_a8" not in code
    assert "Float8" not in code


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("fmt", ["nvfp4", "mxfp4"])
@pytest.mark.parametrize("m", [0, 1, 5, 61])
def test_the_product_of_quantised_activations_is_the_8_bit_product(m, fmt, dtype):
    torch.manual_seed(m)
    weight = {"nvfp4": quantize_nvfp4, "mxfp4": quantize_mxfp4}[fmt](torch.randn(40, 160))
    packed = cpu.pack_weight(weight)
    a, bias = torch.randn(m, 160).to(dtype), torch.randn(40).to(dtype)
    q, a_scale = quantize_fp8_per_row(a)
    y = torch.ops.vllm_nvfp4.linear_a8(
        q, a_scale, packed.codes, packed.block_scale, packed.global_scale, bias, 40, 160, fmt, dtype
    )
    assert torch.equal(y, product(a, packed, bias, 8))


def test_the_op_is_registered_right(layer):
    _, packed, bias = layer
    q, a_scale = quantize_fp8_per_row(torch.randn(5, K))
    tensors = q, a_scale, packed.codes, packed.block_scale, packed.global_scale, bias
    arguments = *tensors, N, K, "nvfp4", torch.float32
    # Not the schema: torch compares no FP8 tensors.
    checks = ["test_faketensor", "test_aot_dispatch_dynamic"]
    torch.library.opcheck(torch.ops.vllm_nvfp4.linear_a8.default, arguments, test_utils=checks)


@pytest.mark.parametrize(
    ("q", "a_scale", "message"),
    [
        (torch.zeros(2, K), torch.ones(2), "float32"),
        (torch.zeros(2, 64).to(torch.float8_e4m3fn), torch.ones(2), r"needs \[M, 128\]"),
        (torch.zeros(2, K).to(torch.float8_e4m3fn), torch.ones(3), r"a_scale \[3\]"),
    ],
)
def test_refused(layer, q, a_scale, message):
    with pytest.raises(ValueError, match=rf"linear_a8: .*{message}"):
        cpu.linear_a8(q, a_scale, layer[1], None, torch.float32)


# --- batch sizes ---------------------------------------------------------------------------------


@pytest.mark.parametrize(("start", "end"), [(1, 256), (257, 8192)])
def test_the_least_batch_of_the_compiled_range_decides(layer, start, end, monkeypatch):
    from vllm.compilation.passes.inductor_pass import pass_context
    from vllm.config.utils import Range

    _, packed, _ = layer
    asked = []

    def takes_8_bits(device, num_tokens, *rest):
        asked.append((device.type, num_tokens, *rest))
        return num_tokens > 100

    monkeypatch.setattr(ops, "takes_8_bits", takes_8_bits)

    def block(x):
        part = x.view(-1, 4, K)[:, 1]
        return product(x * 2, packed, None, 16), product(part, packed, None, 16)

    with pass_context(Range(start, end)):
        _, code = compile_with_pass(block, torch.randn(12, K))
    # The second one's tokens are a part of the batch: its least size is not known.
    assert sorted(asked) == [("cpu", m, N, K, "nvfp4", 16) for m in sorted((start, 1))]
    assert ("linear_a8" in code) == (start > 100)


def test_among_vllms_own_passes(layer):
    """On CUDA vLLM's pass manager runs it, before vLLM's own RMSNorm becomes torch operations."""
    import vllm.ir.ops
    from vllm.compilation.passes.inductor_pass import pass_context
    from vllm.compilation.passes.pass_manager import PostGradPassManager
    from vllm.config import VllmConfig, set_current_vllm_config
    from vllm.config.utils import Range

    weight, packed, _ = layer
    config, gain = VllmConfig(), torch.rand(K)
    fusion.install(config, Options.resolve({"nvfp4": {"activation": "8"}}))
    manager = PostGradPassManager()
    manager.configure(config)
    manager.add(config.compilation_config.inductor_compile_config[versions.post_grad_pass_key()])
    # The manager's last pass rewrites ops that only vLLM's CUDA build has; ours finds nothing left.
    manager.fix_functionalization = fusion.QuantizeWhereComputed()

    def block(x):
        return product(vllm.ir.ops.rms_norm(x, gain, 1e-6), packed, None, 8)

    x = torch.randn(7, K)
    with pass_context(Range(1, 8192)), set_current_vllm_config(config):
        y, code = compile_with_pass(block, x, graph_pass=manager)
        assert manager.uuid()  # the key of vLLM's cache of compiled graphs
    assert ["Float8_e4m3fn*" in kernel and "sqrt" in kernel for kernel in kernels_of(code)] == [
        True
    ]
    outcome = compare_linear(y, rms_norm(x, gain), weight, None, 8)
    assert outcome.is_match, outcome.report


def test_a_graph_for_all_batch_sizes_is_one_for_a_single_token(layer):
    assert versions.least_compiled_size() == 1


@pytest.mark.parametrize("gpu", [g for g in GPUS if cost.has_fp8_mma(g.arch)],
                         ids=lambda g: g.name)  # fmt: skip
def test_every_layer_of_every_model_is_8_bits_wide_above_the_split(gpu, monkeypatch):
    monkeypatch.setitem(devices._devices, 0, Device(gpu, None, 0))
    place, tokens = torch.device("cuda", 0), fusion.SPLIT_TOKENS + 1
    for model in MODELS.values():
        for n, k in model.linear_layers().values():
            for fmt in ("nvfp4", "mxfp4"):
                assert cuda.takes_8_bits(place, tokens, n, k, fmt)
                assert not cuda.takes_8_bits(place, 16, n, k, fmt)


def test_no_batch_is_8_bits_wide_on_hopper(monkeypatch):
    monkeypatch.setitem(devices._devices, 0, Device(find_gpu("H200"), None, 0))
    assert not ops.takes_8_bits(torch.device("cuda", 0), 1 << 20, 4096, 4096, "nvfp4", 0)
    assert ops.takes_8_bits(torch.device("cuda", 0), 1, 4096, 4096, "nvfp4", 8)


# --- vLLM's configuration ------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("capability", "options", "ends"),
    [
        ((8, 9), {}, [256, 8192]),
        ((8, 9), {"activation": "8"}, [8192]),
        ((8, 9), {"activation": "16"}, [8192]),
        ((8, 6), {}, [8192]),
        ((9, 0), {}, [8192]),
        ((12, 0), {}, [8192]),
        ((12, 0), {"native_blackwell": False}, [256, 8192]),
        (None, {}, [8192]),
    ],
)
def test_the_range_and_the_pass_in_vllms_configuration(capability, options, ends, monkeypatch):
    from vllm.config import VllmConfig

    monkeypatch.setattr(versions, "device_capability", lambda: capability)
    config = VllmConfig()
    config.compilation_config.compile_ranges_endpoints = [8192]
    fusion.install(config, Options.resolve({"nvfp4": options}))
    assert config.compilation_config.compile_ranges_endpoints == ends
    found = config.compilation_config.inductor_compile_config.get(versions.post_grad_pass_key())
    assert (found is not None) == (options.get("activation") != "16")
    if found is not None:
        assert pickle.loads(pickle.dumps(found)).uuid() == found.uuid()
        assert config.compute_hash() == config.compute_hash()


def test_a_pass_of_the_users_own_stays():
    from vllm.config import VllmConfig

    config = VllmConfig()
    own = fusion.QuantizeWhereComputed()
    config.compilation_config.inductor_compile_config[versions.post_grad_pass_key()] = own
    fusion.install(config, Options())
    place = config.compilation_config.inductor_compile_config
    assert place[versions.post_grad_pass_key()] is own
