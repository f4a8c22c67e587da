# SPDX-License-Identifier: Apache-2.0
"""The Triton kernels under Triton's interpreter: every byte, odd shapes, the packed layout."""

import os
import subprocess
import sys

import pytest

# The interpreter replaces triton.jit when triton is imported, so the cases (functions below) run in
# one process of their own, which prints a line for each. It has no bf16 dot: products are in fp16.
CASES = ("fp8_weights_are_exact", "fp8_odd_shapes", "rows_of_nvfp4", "rows_of_mxfp4")


@pytest.fixture(scope="module")
def outcomes(request):
    root = str(request.config.rootpath)
    done = subprocess.run(
        [sys.executable, str(request.path)],
        env=os.environ | {"TRITON_INTERPRET": "1", "PYTHONPATH": root},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return dict(line.split(": ", 1) for line in done.stdout.splitlines())


@pytest.mark.parametrize("case", CASES)
def test_under_the_interpreter(case, outcomes):
    assert outcomes[case] == "ok"


# --- for a GPU, without one ----------------------------------------------------------------------

INTEGERS = ("n", "k", "a_stride", "w_stride", "y_stride")


@pytest.mark.parametrize("m", [1, 32, 64, 200])
def test_the_product_compiles_for_ada_within_its_shared_memory(m, monkeypatch, tmp_path):
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource, compile

    from vllm_nvfp4.kernels.cuda import triton as kernels
    from vllm_nvfp4.kernels.cuda.configs import MAX_SMEM_BYTES

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    tile = kernels.fp8_tile(m)
    options = {name: tile.pop(name) for name in ("num_warps", "num_stages")}
    pointers = {"a_ptr": "bf16", "w_ptr": "u8", "scale_ptr": "fp32", "bias_ptr": "bf16"}
    signature = {name: f"*{kind}" for name, kind in (pointers | {"y_ptr": "bf16"}).items()}
    signature |= dict.fromkeys(("m", *INTEGERS), "i32")
    constants = {"HAS_BIAS": True} | tile
    signature |= dict.fromkeys(constants, "constexpr")
    # Tensors and strides that are multiples of 16, as a model's are.
    aligned = {
        (i,): [["tt.divisibility", 16]]
        for i, name in enumerate(signature)
        if name.endswith("_ptr") or name in INTEGERS
    }
    source = ASTSource(kernels._fp8_linear_kernel, signature, constants, aligned)
    compiled = compile(source, target=GPUTarget("cuda", 89, 32), options=options)
    assert compiled.asm["cubin"].startswith(b"\x7fELF")
    assert compiled.metadata.shared <= MAX_SMEM_BYTES
    assert "mma.sync" in compiled.asm["ptx"]


# --- under the interpreter -----------------------------------------------------------------------


def fp8_weights_are_exact():
    import torch

    from vllm_nvfp4.kernels.cuda.triton import fp8_linear

    every_byte = torch.arange(256, dtype=torch.uint8)
    every_byte[[0x7F, 0xFF]] = 0  # NaN
    weight = torch.zeros(256, 16, dtype=torch.uint8)
    weight[:, 3] = every_byte
    a = torch.zeros(1, 16, dtype=torch.float16)
    a[0, 3] = 1
    y = fp8_linear(a, weight.view(torch.float8_e4m3fn), torch.ones(256), None)
    assert torch.equal(y[0], every_byte.view(torch.float8_e4m3fn).half())


def fp8_odd_shapes():
    import torch

    from vllm_nvfp4.kernels.cuda.triton import fp8_linear
    from vllm_nvfp4.testing.metrics import UNIT_ROUNDOFF, compare

    torch.manual_seed(0)
    for m, n, k in ((1, 40, 48), (3, 130, 200), (17, 33, 129)):
        a = torch.randn(m, 2 * k, dtype=torch.float16)[:, :k]
        weight = torch.randn(n, k).to(torch.float8_e4m3fn)
        row_scale, bias = torch.rand(n) + 0.1, torch.randn(n).half()
        y = fp8_linear(a, weight, row_scale, bias)
        w = weight.double() * row_scale.double()[:, None]
        reference = a.double() @ w.T + bias.double()
        loss = a.double().abs() @ w.abs().T * 2.0**-20
        tolerance = UNIT_ROUNDOFF[a.dtype] * reference.abs() + loss
        outcome = compare(y, reference, tolerance)
        assert outcome.is_match, outcome.report
    assert fp8_linear(a[:0], weight, row_scale, bias).shape == (0, n)


def _rows_of(weight):
    import torch

    from vllm_nvfp4.kernels.cuda.triton import gather_rows
    from vllm_nvfp4.kernels.layout import pack_weight

    ids = torch.tensor([0, 5, 36, 8, 15, 16, 5, 31])
    y = gather_rows(pack_weight(weight), ids, torch.float32)
    expected = weight.dequantize(torch.float64)[ids]
    assert torch.equal(y, expected.float()), (y - expected).abs().max()
    assert gather_rows(pack_weight(weight), ids[:0], torch.bfloat16).shape == (0, y.shape[1])


def rows_of_nvfp4():
    import torch

    from vllm_nvfp4.numerics.quantize import quantize_nvfp4

    torch.manual_seed(0)
    _rows_of(quantize_nvfp4(torch.randn(37, 1104)))


def rows_of_mxfp4():
    import torch

    from vllm_nvfp4.numerics.quantize import quantize_mxfp4

    torch.manual_seed(0)
    weight = torch.randn(37, 1120)
    weight[8, :32] = 0  # its scale is byte 0
    _rows_of(quantize_mxfp4(weight))


if __name__ == "__main__":
    for case in CASES:
        try:
            globals()[case]()
            print(f"{case}: ok")
        except Exception as error:
            print(f"{case}: {error!r}")
