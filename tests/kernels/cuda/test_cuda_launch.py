# SPDX-License-Identifier: Apache-2.0
"""What a kernel is launched with: grid, block, shared memory, stream, every byte of its argument.

No driver runs here: ``stub_cuda_driver.c`` stands in for libcuda and records its calls.
"""

import ctypes
import subprocess
import sys
import threading

import pytest
import torch

from vllm_nvfp4.gpus import find_gpu
from vllm_nvfp4.kernels.cuda import configs, cubins, devices, dispatch, nvrtc
from vllm_nvfp4.kernels.cuda import linear as cuda
from vllm_nvfp4.kernels.cuda.configs import GemmParams, QuantizeParams
from vllm_nvfp4.kernels.cuda.devices import Device
from vllm_nvfp4.kernels.cuda.driver import Driver, DriverError
from vllm_nvfp4.kernels.layout import pack_weight
from vllm_nvfp4.numerics.quantize import quantize_mxfp4, quantize_nvfp4

ELF = b"\x7fELF rest of a cubin"
CONTEXT = 0xC0
STREAM = 0x57


class Launch(ctypes.Structure):
    _fields_ = (
        ("function", ctypes.c_uint64),
        ("stream", ctypes.c_uint64),
        ("grid", ctypes.c_uint32 * 3),
        ("block", ctypes.c_uint32 * 3),
        ("smem_bytes", ctypes.c_uint32),
        ("num_attributes", ctypes.c_uint32),
        ("num_param_bytes", ctypes.c_uint64),
        ("params", ctypes.c_uint8 * 512),
    )


@pytest.fixture(scope="module")
def library(tmp_path_factory, request):
    path = tmp_path_factory.mktemp("stub") / "libcuda_stub.so"
    source = request.config.rootpath / "tests/support/stub_cuda_driver.c"
    headers = [f"-I{folder}" for folder in nvrtc.toolkit_headers()]
    command = ["gcc", "-Wall", "-Werror", "-shared", "-fPIC", *headers, "-o", path, source]
    subprocess.run(command, check=True)
    return path


@pytest.fixture
def stub(library):
    stub = ctypes.CDLL(str(library))
    stub.stub_launch.restype = ctypes.POINTER(Launch)
    stub.stub_dynamic_smem.argtypes = [ctypes.c_uint64]
    stub.stub_dynamic_smem.restype = ctypes.c_int64
    stub.stub_set_context.argtypes = [ctypes.c_size_t]
    stub.stub_set_context(CONTEXT)
    stub.stub_fail_launches(0)
    stub.stub_set_version(13000)
    return stub


@pytest.fixture
def stub_driver(stub, library):
    return Driver(str(library))


@pytest.fixture
def device(stub_driver, monkeypatch):
    """An RTX 4090 with everything loaded, its semaphores in host memory."""
    monkeypatch.setattr(cubins, "prepare", lambda cs, arch: {c.symbol: ELF for c in cs})
    semaphores = stub_driver.zeros(devices.SEMAPHORE_BYTES)
    device = Device(find_gpu("RTX 4090"), stub_driver, semaphores)
    device.load(list(configs.ALL_CONFIGS))
    return device


def last_launch(stub):
    return stub.stub_launch(stub.stub_num_launches() - 1).contents


def argument(launch, params):
    assert launch.num_param_bytes == ctypes.sizeof(params)
    return params.from_buffer_copy(bytes(launch.params)[: launch.num_param_bytes])


# --- the driver ----------------------------------------------------------------------------------


def test_a_machine_without_a_driver():
    with pytest.raises(DriverError, match=r"no NVIDIA driver: libcuda_nowhere.*--gpus all"):
        Driver("libcuda_nowhere.so.1")


def test_a_driver_too_old_for_the_machine_code_says_so_before_anything_is_loaded(stub, library):
    stub.stub_set_version(12090)
    with pytest.raises(DriverError, match=r"found one for CUDA 12\.9; needed CUDA 13\.0.*580"):
        Driver(str(library))


def test_memory_of_the_drivers_own_holds_zeros(stub_driver):
    address = stub_driver.zeros(1000)
    assert stub_driver.read(address, 1000) == bytes(1000)
    ctypes.memset(address + 999, 1, 1)
    assert stub_driver.read(address, 1000)[999] == 1


def test_semaphores_that_a_launch_left_are_seen(device):
    assert device.used_semaphores() == 0
    ctypes.c_int32.from_address(device.semaphores(STREAM) + 8).value = 1
    assert device.used_semaphores() == 1


def test_attributes_and_figures_of_a_device(stub_driver):
    found = stub_driver.device_attributes(0)
    assert found["num_sms"] == 128
    assert devices.describe("NVIDIA GeForce RTX 4090", 24 << 30, found) == find_gpu("RTX 4090")
    unknown = devices.describe("NVIDIA GeForce RTX 4095", 24 << 30, found)
    assert unknown.is_estimate
    assert unknown.dram_gbps == pytest.approx(1008, rel=0.01)
    assert unknown.bf16_tflops == pytest.approx(165.2, rel=0.01)
    with pytest.raises(DriverError, match=r"cuDeviceGet failed.*\(101\): 3"):
        stub_driver.device_attributes(3)


def test_a_slice_of_a_known_gpu_keeps_its_own_sm_count(stub_driver):
    found = stub_driver.device_attributes(0) | {"num_sms": 32}
    assert devices.describe("NVIDIA GeForce RTX 4090", 24 << 30, found).num_sms == 32


def test_load_allows_dynamic_shared_memory(stub, stub_driver):
    function = stub_driver.load(ELF, "kernel", 128, 99 * 1024)
    assert stub.stub_dynamic_smem(function.handle) == 99 * 1024
    function = stub_driver.load(ELF, "kernel", 128, 0)
    assert stub.stub_dynamic_smem(function.handle) == -1  # not set


@pytest.mark.parametrize(
    ("image", "symbol", "smem_bytes", "message"),
    [
        (b"no cubin", "kernel", 0, "cuModuleLoadData failed"),
        (
            ELF,
            "missing",
            0,
            r"cuModuleGetFunction failed with CUDA_ERROR_NOT_FOUND \(500\): missing",
        ),
        (ELF, "kernel", 200_000, "cuFuncSetAttribute failed.*200000 B shared memory"),
    ],
)
def test_load_errors_name_the_call_and_the_kernel(stub_driver, image, symbol, smem_bytes, message):
    with pytest.raises(DriverError, match=message):
        stub_driver.load(image, symbol, 128, smem_bytes)


def test_load_without_a_context(stub, stub_driver):
    stub.stub_set_context(0)
    with pytest.raises(DriverError, match="no CUDA context is current"):
        stub_driver.load(ELF, "kernel", 128, 0)


def test_a_failed_launch_is_an_error(stub, device):
    stub.stub_fail_launches(719)
    weight = pack_weight(quantize_nvfp4(torch.randn(16, 64)))
    with pytest.raises(DriverError, match=r"cuLaunchKernelEx failed with CUDA_ERROR_LAUNCH_FAILED"):
        launch_linear(device, torch.randn(1, 64).bfloat16(), weight)


def test_a_thread_without_a_context_gets_the_devices(stub, device):
    """Worker threads that never touched the CUDA runtime have none."""
    weight = pack_weight(quantize_nvfp4(torch.randn(16, 64)))
    before = stub.stub_num_launches()
    thread = threading.Thread(
        target=launch_linear, args=(device, torch.randn(1, 64).bfloat16(), weight)
    )
    thread.start()
    thread.join()
    assert stub.stub_num_launches() == before + 1


# --- a product -----------------------------------------------------------------------------------


def launch_linear(device, a, packed, bias=None, activation="16", choice=None):
    m, n, k = a.shape[0], packed.num_rows, packed.num_cols
    dtype = devices.DTYPE_NAMES[a.dtype]
    choice = choice or device.choose(m, n, k, packed.fmt.name, dtype, activation)
    y = torch.empty(m, n, dtype=a.dtype)
    cuda.run(device, choice, a, packed, bias, y, STREAM)
    return choice, y


@pytest.mark.parametrize("config", configs.GEMM_CONFIGS, ids=lambda c: c.symbol)
def test_every_kernel_gets_its_own_geometry_and_operands(stub, device, config):
    quantize_weight = {"nvfp4": quantize_nvfp4, "mxfp4": quantize_mxfp4}[config.fmt_name]
    packed = pack_weight(quantize_weight(torch.randn(200, 1024)))
    dtype = torch.bfloat16 if config.dtype == "bf16" else torch.float16
    a, bias = torch.randn(77, 1024).to(dtype), torch.randn(200).to(dtype)
    choice = dispatch.launch_geometry(device.gpu, config, 77, 200, 1024)
    choice, y = launch_linear(device, a, packed, bias, choice=choice)

    launch = last_launch(stub)
    assert tuple(launch.grid) == choice.grid == configs.grid(config, 77, 200, 1024, 128)
    assert tuple(launch.block) == (config.threads, 1, 1)
    assert launch.smem_bytes == config.smem_bytes == stub.stub_dynamic_smem(launch.function)
    assert (launch.stream, launch.num_attributes) == (STREAM, 0)

    p = argument(launch, GemmParams)
    assert (p.m, p.n, p.k, p.num_splits) == (77, 200, 1024, choice.num_splits)
    assert (p.a_stride, p.y_stride) == (1024, 200)
    assert p.codes == packed.codes.data_ptr()
    assert p.block_scale == packed.block_scale.data_ptr()
    assert p.global_scale == packed.global_scale.data_ptr()
    assert (p.bias, p.y) == (bias.data_ptr(), y.data_ptr())
    assert (p.partials is None) == (choice.num_splits == 1)
    assert p.semaphores == device.semaphores(STREAM)
    if config.stem == "gemm_w4a16":
        assert (p.a, p.a_scale) == (a.data_ptr(), None)
    else:
        quantizer = stub.stub_launch(stub.stub_num_launches() - 2).contents
        q = argument(quantizer, QuantizeParams)
        assert tuple(quantizer.grid) == (77, 1, 1)
        assert quantizer.stream == STREAM
        assert (q.a, q.m, q.k, q.a_stride, q.q_stride) == (a.data_ptr(), 77, 1024, 1024, 1024)
        assert (q.q, q.a_scale) == (p.a, p.a_scale)
        assert p.a_scale is not None


def test_rows_with_a_stride_are_read_in_place(stub, device):
    packed = pack_weight(quantize_nvfp4(torch.randn(16, 64)))
    wide = torch.randn(4, 128).bfloat16()
    launch_linear(device, wide[:, :64], packed)
    p = argument(last_launch(stub), GemmParams)
    assert (p.a, p.a_stride) == (wide.data_ptr(), 128)


@pytest.mark.parametrize("view", ["transposed", "shifted", "odd_stride", "contiguous_but_shifted"])
def test_rows_that_cannot_be_read_in_16_bytes_are_copied(stub, device, view):
    packed = pack_weight(quantize_nvfp4(torch.randn(16, 64)))
    a = {
        "transposed": torch.randn(64, 4).bfloat16().t(),
        "shifted": torch.randn(4, 72).bfloat16()[:, 1:65],
        "odd_stride": torch.randn(4, 67).bfloat16()[:, :64],
        "contiguous_but_shifted": torch.randn(257).bfloat16()[1:].view(4, 64),
    }[view]
    launch_linear(device, a, packed)
    p = argument(last_launch(stub), GemmParams)
    assert p.a != a.data_ptr()
    assert p.a % 16 == 0
    assert p.a_stride == 64


def test_quantised_activations_go_straight_to_the_kernel(stub, device):
    packed = pack_weight(quantize_nvfp4(torch.randn(200, 1024)))
    q = torch.randn(77, 2048).to(torch.float8_e4m3fn)[:, :1024]
    a_scale, y = torch.rand(77, 1), torch.empty(77, 200, dtype=torch.bfloat16)
    choice = device.choose(77, 200, 1024, "nvfp4", "bf16", "8")
    before = stub.stub_num_launches()
    cuda.run_a8(device, choice, q, a_scale, packed, None, y, STREAM)
    assert stub.stub_num_launches() == before + 1
    p = argument(last_launch(stub), GemmParams)
    assert (p.a, p.a_stride, p.a_scale) == (q.data_ptr(), 2048, a_scale.data_ptr())
    assert (p.m, p.y, p.num_splits) == (77, y.data_ptr(), choice.num_splits)
    shifted = torch.zeros(77 * 1024 + 1, dtype=torch.float8_e4m3fn)[1:].view(77, 1024)
    cuda.run_a8(device, choice, shifted, a_scale, packed, None, y, STREAM)
    p = argument(last_launch(stub), GemmParams)
    assert p.a % 16 == 0
    assert p.a_stride == 1024


def test_quantised_activations_that_do_not_fit():
    packed = pack_weight(quantize_nvfp4(torch.randn(16, 64)))
    q, a_scale = torch.zeros(2, 64).to(torch.float8_e4m3fn), torch.ones(2)
    for arguments, message in (
        ((q.float(), a_scale, packed, None, torch.half), "q is torch.float32"),
        ((q, a_scale[:1], packed, None, torch.half), r"needs float8_e4m3fn and float32 \[2\]"),
        ((q, a_scale, packed, None, torch.float32), "linear_a8: a is torch.float32"),
        ((q[:, :32], a_scale, packed, None, torch.half), r"a is \[2, 32\]; needs \[M, 64\]"),
        ((q, a_scale, packed, torch.zeros(16), torch.half), "linear_a8: bias is torch.float32"),
    ):
        with pytest.raises(ValueError, match=message):
            cuda.linear_a8(*arguments)


def test_rows_of_fp8_weights():
    weight = torch.randn(20, 48).to(torch.float8_e4m3fn)
    row_scale, ids = torch.rand(20), torch.tensor([[3, 19], [0, 3]])
    rows = cuda.gather_fp8_rows(weight, row_scale, ids, torch.bfloat16)
    assert torch.equal(rows, (weight.float() * row_scale[:, None])[ids].bfloat16())


def test_activation_is_checked_while_weights_load(device, monkeypatch):
    monkeypatch.setattr(cuda, "prepare", lambda place, fmt: device)
    cuda.check_activation(torch.device("cuda", 0), "8")
    device.gpu = find_gpu("A100-SXM4-80GB")
    with pytest.raises(
        ValueError,
        match=r"activation=8, a8_variant=exact: A100.*no FP8 tensor cores.*a8_variant=auto or int8",
    ):
        cuda.check_activation(torch.device("cuda", 0), "8")


def test_streams_have_semaphores_of_their_own(device):
    addresses = [device.semaphores(stream) for stream in range(64)]
    assert len(set(addresses)) == 64
    step = dispatch.MAX_SPLIT_TILES * 4
    assert all(
        b - a == step for a, b in zip(sorted(addresses), sorted(addresses)[1:], strict=False)
    )
    assert [device.semaphores(stream) for stream in range(64)] == addresses
    assert device.semaphores(64) in addresses


def test_a_launch_never_loads(stub_driver, monkeypatch):
    monkeypatch.setattr(cubins, "prepare", lambda cs, arch: {c.symbol: ELF for c in cs})
    device = Device(find_gpu("RTX 4090"), stub_driver, 0)
    device.load(devices.wanted_kernels(89, "nvfp4", (torch.bfloat16,)))
    packed = pack_weight(quantize_nvfp4(torch.randn(16, 64)))
    launch_linear(device, torch.randn(1, 64).bfloat16(), packed)
    launch_linear(device, torch.randn(1, 64).bfloat16(), packed, activation="8")
    with pytest.raises(RuntimeError, match=r"sm89_nvfp4_gemm_w4a16_fp16.*not loaded.*prepare\("):
        launch_linear(device, torch.randn(1, 64).half(), packed)


def test_what_is_prepared_covers_every_choice():
    for arch, gpu in ((80, "A100-SXM4-80GB"), (89, "RTX 4090"), (90, "H200")):
        wanted = devices.wanted_kernels(arch, "mxfp4", (torch.float16,))
        for m in (1, 7, 16, 33, 64, 100, 500, 5000):
            for activation in ("auto", "16") + (("8",) if arch >= 89 else ()):
                choice = dispatch.choose(find_gpu(gpu), m, 4096, 4096, "mxfp4", "fp16", activation)
                assert choice.config in wanted
        assert all(config.min_arch <= arch for config in wanted)


def test_the_packed_layout_is_the_structs():
    for params in (GemmParams, QuantizeParams):
        layout = cuda.params_layout(params)
        values = [
            2**63 - 7 * i if kind is ctypes.c_void_p else 1000 + i
            for i, (_, kind) in enumerate(params._fields_)
        ]
        assert layout.pack(*values) == bytes(params(*values))


# --- refusals, and what an import does -----------------------------------------------------------


@pytest.mark.parametrize(
    ("a", "bias", "bits", "message"),
    [
        (torch.zeros(1, 64), None, 16, "float32; the CUDA kernels take bfloat16 or float16"),
        (torch.zeros(1, 32).half(), None, 16, r"\[1, 32\]; needs \[M, 64\]"),
        (torch.zeros(64).half(), None, 16, r"\[64\]; needs \[M, 64\]"),
        (torch.zeros(1, 64).half(), None, 4, "activation_bits is 4; needs 16, 8 or 0"),
        (torch.zeros(1, 64).half(), torch.zeros(16), 16, r"bias is torch.float32 \[16\]; needs"),
        (torch.zeros(1, 64).half(), torch.zeros(8).half(), 16, r"bias.*\[8\]; needs.*\[16\]"),
        (torch.zeros(1, 64).half(), torch.zeros(32).half()[::2], 16, "bias is strided"),
    ],
)
def test_refused(a, bias, bits, message):
    packed = pack_weight(quantize_nvfp4(torch.randn(16, 64)))
    with pytest.raises(ValueError, match=message):
        cuda.linear(a, packed, bias, bits)


def test_importing_loads_no_driver(request):
    script = (
        "import sys, vllm_nvfp4.kernels.cuda.linear, torch\n"
        "assert not torch.cuda.is_initialized()\n"
        "from vllm_nvfp4.kernels.cuda.driver import driver\n"
        "assert driver.cache_info().currsize == 0\n"
        "assert 'cuda.core' not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", script], check=True, cwd=request.config.rootpath)
