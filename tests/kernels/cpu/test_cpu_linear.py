# SPDX-License-Identifier: Apache-2.0
"""The CPU kernels against float64, at every instruction set this processor has.

Tolerance: a sum of K products in f32 errs by at most about K * 2^-24 of the sum of magnitudes, and
the result is rounded once to the output type (BF16 twice where torch's product makes it). What
falls below f32's normal range may be flushed to zero.
"""

from __future__ import annotations

import dataclasses
import os
import subprocess
import sys
import threading

import pytest
import torch

from vllm_nvfp4.kernels.cpu import dispatch as cpu_dispatch
from vllm_nvfp4.kernels.cpu import jit as cpu_jit
from vllm_nvfp4.kernels.cpu import linear as cpu
from vllm_nvfp4.kernels.cpu.rows import round_per_token
from vllm_nvfp4.numerics.codes import pack_codes
from vllm_nvfp4.numerics.formats import FORMATS, MXFP4, NVFP4, BlockFormat
from vllm_nvfp4.numerics.quantize import quantize_fp8_per_row, quantize_mxfp4, quantize_nvfp4
from vllm_nvfp4.numerics.reference import reference_linear
from vllm_nvfp4.numerics.weight import BlockScaledWeight
from vllm_nvfp4.options import Options

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
# Half a unit in the last place, relative; and the smallest normal number.
HALF_ULP = {torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11, torch.float32: 2.0**-24}
SMALLEST = {torch.bfloat16: 2.0**-126, torch.float16: 2.0**-14, torch.float32: 2.0**-126}


def available_isas() -> list[str]:
    names = []
    for name in cpu_jit.ISA_LEVELS:
        try:
            cpu_jit.detect_cpu(name)
        except ValueError:
            continue
        names.append(name)
    return names


TILES = "+tiles"


LEVELS = available_isas()


@pytest.fixture(params=[*LEVELS, *(f"{name}{TILES}" for name in {LEVELS[0]: 1, LEVELS[-1]: 1})])
def isa(request, monkeypatch):
    """An instruction set; with tiles, BF16 results of many tokens are torch's product, as on a
    processor with AMX (torch computes the same without one, more slowly)."""
    name, tiles, _ = request.param.partition(TILES)
    monkeypatch.setattr(cpu_dispatch, "has_fast_bf16_matmul", lambda: bool(tiles))
    cpu_dispatch.use_isa(name)
    yield name
    cpu_dispatch.use_isa(None)


def random_weight(n: int, k: int, fmt: BlockFormat, seed: int = 0) -> BlockScaledWeight:
    """Codes and scales as a quantised layer has them, and another multiplier for each row."""
    generator = torch.Generator().manual_seed(seed)
    dense = torch.randn(n, k, generator=generator) * 0.02
    weight = quantize_nvfp4(dense) if fmt is NVFP4 else quantize_mxfp4(dense)
    multiplier = weight.global_scale * torch.exp2(torch.randn(n, generator=generator))
    return BlockScaledWeight(weight.codes, weight.block_scale, multiplier, fmt)


def assert_close(y, a, dense, bias, reference) -> None:
    """dense: the weight in float64; reference: float64 [M, N], of which ``bias`` is a part."""
    is_product_rounded = (
        y.dtype == torch.bfloat16
        and cpu_dispatch.has_fast_bf16_matmul()
        and len(y) >= cpu_dispatch._MATMUL_TOKENS
    )
    magnitude = a.double().abs() @ dense.abs().T
    if bias is not None:
        magnitude = magnitude + bias.double().abs()
    k, dtype = dense.shape[1], y.dtype
    flush = k * 2.0**-126 * max(1.0, float(a.double().abs().max()) if a.numel() else 1.0)
    tolerance = (k + 8) * 2.0**-24 * magnitude
    tolerance += HALF_ULP[dtype] * (reference.abs() + tolerance)
    if is_product_rounded:
        product = reference if bias is None else reference - bias.double()
        tolerance += HALF_ULP[dtype] * 1.01 * product.abs()
    tolerance += SMALLEST[dtype] + flush
    excess = (y.double() - reference).abs() / tolerance
    worst = excess.argmax() if excess.numel() else None
    assert y.shape == reference.shape
    assert worst is None or excess.max() <= 1, (
        f"{excess.max():.3g} times the tolerance at {divmod(int(worst), y.shape[1])}: "
        f"{y.flatten()[worst]} instead of {reference.flatten()[worst]}"
    )


def check_linear(a, weight, bias=None, activation_bits=16) -> torch.Tensor:
    y = cpu.linear(a, cpu.pack_weight(weight), bias, activation_bits)
    assert y.dtype == a.dtype
    rounded_bias = None if bias is None else bias.to(a.dtype)
    reference = reference_linear(a, weight, rounded_bias, activation_bits)
    seen = a
    if activation_bits == 8:
        q, scale = quantize_fp8_per_row(a)
        seen = q.double() * scale.double()
    assert_close(y, seen, weight.dequantize(torch.float64), rounded_bias, reference)
    return y


@pytest.mark.parametrize("fmt", [NVFP4, MXFP4], ids=lambda f: f.name)
@pytest.mark.parametrize(("n", "k"), [(1, 32), (7, 96), (17, 160), (576, 64), (48, 1536)])
def test_pack_is_inverted_bit_for_bit(fmt, n, k):
    weight = random_weight(n, k, fmt)
    packed = cpu.pack_weight(weight)
    again = cpu.unpack_weight(packed)
    assert torch.equal(again.codes, weight.codes)
    assert again.block_scale.dtype == weight.block_scale.dtype
    assert torch.equal(again.block_scale.view(torch.uint8), weight.block_scale.view(torch.uint8))
    assert torch.equal(again.global_scale, weight.global_scale)
    assert packed.codes.is_contiguous()
    assert packed.codes.data_ptr() != weight.codes.data_ptr()


def test_each_code_lands_where_the_layout_says():
    codes = torch.arange(16, dtype=torch.uint8).repeat(1, 2)
    scale = torch.ones(1, 2).to(torch.float8_e4m3fn)
    packed = cpu.pack_weight(BlockScaledWeight(pack_codes(codes), scale, torch.ones(1), NVFP4))
    # Row 0 of word 0: columns 0, 2, 4, 6, 1, 3, 5, 7 from the lowest nibble up.
    assert packed.codes[0, 0, 0].tolist() == [0x20, 0x64, 0x31, 0x75]
    assert packed.codes[0, 1, 0].tolist() == [0xA8, 0xEC, 0xB9, 0xFD]
    assert packed.codes[0, :, 1:].eq(0).all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("fmt", [NVFP4, MXFP4], ids=lambda f: f.name)
def test_every_code_with_every_scale(isa, fmt, dtype):
    """One row a scale, one column a code: each product on its own, exactly."""
    refused = {0x7F, 0xFF} if fmt is NVFP4 else {253, 254, 255}
    scales = torch.tensor([b for b in range(256) if b not in refused], dtype=torch.uint8)
    n, k = len(scales), fmt.block_size
    codes = (torch.arange(k, dtype=torch.uint8) % 16).repeat(n, 1)
    block_scale = scales[:, None]
    if fmt is NVFP4:
        block_scale = block_scale.view(torch.float8_e4m3fn)
    weight = BlockScaledWeight(pack_codes(codes), block_scale, torch.ones(n), fmt)
    packed = cpu.pack_weight(weight)
    dense = weight.dequantize(torch.float64)
    for m in (1, 5, 16):
        a = torch.eye(k)[:16].repeat(2, 1)[:m].to(dtype)
        y = cpu.linear(a, packed)
        exact = (a.double() @ dense.T).to(dtype)
        # An f32 subnormal (a scale of 2^-127, or its products) may count as zero.
        near_zero = exact.double().abs() < 2.0**-126
        assert torch.equal(torch.where(near_zero, 0, y), torch.where(near_zero, 0, exact))
        assert (y[near_zero].double().abs() <= 2.0**-126).all()


SHAPES = [(1, 32), (7, 96), (17, 160), (96, 576), (32, 1536)]


@pytest.mark.parametrize("activation_bits", [16, 8])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("fmt", [NVFP4, MXFP4], ids=lambda f: f.name)
def test_linear_matches_float64(isa, fmt, dtype, activation_bits):
    torch.manual_seed(1)
    for n, k in SHAPES:
        weight = random_weight(n, k, fmt)
        bias = torch.randn(n)
        for m in (0, 1, 2, 3, 9, 64):
            check_linear(torch.randn(m, k).to(dtype), weight, bias, activation_bits)


@pytest.mark.parametrize("k", [16, 48, 80])
def test_nvfp4_with_an_odd_number_of_blocks(isa, k):
    for m in (1, 4, 50):
        check_linear(torch.randn(m, k).bfloat16(), random_weight(33, k, NVFP4))


def test_every_number_of_tokens(isa):
    """Tiles overlap where M is no multiple of them, and kernels change with M."""
    weight = random_weight(33, 96, NVFP4)
    a = torch.randn(70, 96).bfloat16()
    for m in range(1, 71):
        check_linear(a[:m], weight)


def test_rows_that_share_cache_sets(isa):
    """K of a multiple of 2048 bytes: rows are spread, and the spread is not part of the result."""
    for m in (5, 6, 50):
        check_linear(torch.randn(m, 2048).bfloat16(), random_weight(17, 2048, NVFP4))


@pytest.mark.parametrize("fmt", [NVFP4, MXFP4], ids=lambda f: f.name)
def test_levels_agree(fmt):
    """What one instruction set makes of a call, another makes within f32 rounding."""
    weight = random_weight(40, 288, fmt)
    packed = cpu.pack_weight(weight)
    a = torch.randn(5, 288).bfloat16().float()
    results = {}
    for name in available_isas():
        cpu_dispatch.use_isa(name)
        results[name] = cpu.linear(a, packed)
    cpu_dispatch.use_isa(None)
    dense = weight.dequantize(torch.float64)
    assert "generic" in results
    for y in results.values():
        assert_close(y, a, dense, None, results["generic"].double())


def test_decoded_tiles_smaller_than_n(isa, monkeypatch):
    monkeypatch.setattr(cpu_dispatch, "has_fast_bf16_matmul", lambda: True)
    monkeypatch.setattr(cpu, "_MATMUL_SCRATCH_BYTES", 64 * 96 * 2)
    a = torch.randn(64, 96).bfloat16()
    for activation_bits in (16, 8):
        for fmt in (NVFP4, MXFP4):
            weight, bias = random_weight(200, 96, fmt), torch.randn(200)
            check_linear(a, weight, bias, activation_bits)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_activation_rounding_is_the_specs(isa, dtype):
    rows = [
        torch.randn(20, 64) * 10 ** torch.randn(20, 1),
        torch.randn(20, 64) * torch.exp2(-torch.randint(0, 20, (20, 64)).float()),
        torch.zeros(1, 64),
        torch.full((1, 64), 1e-42),
        torch.linspace(-448, 448, 64)[None],
    ]
    a = torch.cat(rows).to(dtype)
    q, scale = round_per_token(a, torch.float32)
    expected_q, expected_scale = quantize_fp8_per_row(a)
    assert torch.equal(q, expected_q.float())
    assert torch.equal(scale, expected_scale[:, 0])


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("activation_bits", [16, 8])
def test_a_bad_token_spoils_only_itself(isa, bad, activation_bits):
    packed = cpu.pack_weight(random_weight(48, 96, NVFP4))
    for m in (3, 14, 60):
        a = torch.randn(m, 96).bfloat16()
        good = cpu.linear(a, packed, None, activation_bits)
        a[1, 5] = bad
        y = cpu.linear(a, packed, None, activation_bits)
        others = [i for i in range(m) if i != 1]
        assert torch.equal(y[others], good[others])
        assert not y[1].isfinite().all()


def test_activations_that_are_not_contiguous():
    packed = cpu.pack_weight(random_weight(48, 96, NVFP4))
    wide = torch.randn(6, 200).bfloat16()
    for a in (wide[:, 50:146], torch.randn(96, 6).bfloat16().T):
        assert torch.equal(cpu.linear(a, packed), cpu.linear(a.contiguous(), packed))


def test_bias_of_another_type_is_rounded_to_the_activations():
    weight, bias = random_weight(17, 64, NVFP4), torch.randn(17, dtype=torch.float64)
    check_linear(torch.randn(2, 64).bfloat16(), weight, bias)


def test_thread_count_does_not_change_the_result(isa):
    weight = random_weight(500, 576, NVFP4)
    packed, threads = cpu.pack_weight(weight), torch.get_num_threads()
    a = torch.randn(60, 576).bfloat16()
    results = []
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            results.append([cpu.linear(a[:m], packed) for m in (1, 60)])
    finally:
        torch.set_num_threads(threads)
    for other in results[1:]:
        assert all(torch.equal(x, y) for x, y in zip(results[0], other, strict=True))


def test_calls_from_several_threads_at_once():
    weights = [random_weight(300, 288, NVFP4, seed) for seed in range(4)]
    packed = [cpu.pack_weight(w) for w in weights]
    a = torch.randn(50, 288).bfloat16()
    expected = [[cpu.linear(a[:m], p) for m in (1, 7, 50)] for p in packed]
    failures = []

    def work(i: int) -> None:
        for _ in range(20):
            for m, want in zip((1, 7, 50), expected[i], strict=True):
                if not torch.equal(cpu.linear(a[:m], packed[i]), want):
                    failures.append((i, m))

    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert not failures


def test_kernels_run_on_torchs_own_openmp():
    pool = cpu_jit.thread_pool()
    assert "OpenMP" in pool.name
    libraries = [p for p in cpu_jit._mapped_openmp_libraries() if "torch" in p]
    assert libraries, "torch has no OpenMP runtime of its own here"


def test_one_thread_where_there_is_no_openmp(monkeypatch):
    packed = cpu.pack_weight(random_weight(300, 288, NVFP4))
    a = torch.randn(50, 288).bfloat16()
    expected = cpu.linear(a, packed)
    warnings = []
    monkeypatch.setattr(cpu_jit, "_openmp_pool", lambda library, name: None)
    monkeypatch.setattr(cpu_jit.logger, "warning", warnings.append)
    cpu_jit.thread_pool.cache_clear()
    try:
        y = cpu.linear(a, packed)
    finally:
        monkeypatch.undo()
        cpu_jit.thread_pool.cache_clear()
    assert torch.equal(y, expected)
    assert len(warnings) == 1
    assert "one thread" in warnings[0]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_fp8_linear_matches_float64(isa, dtype):
    torch.manual_seed(2)
    for n, k in [(1, 16), (7, 48), (17, 83), (100, 576), (48, 2048)]:
        q, scale = quantize_fp8_per_row(torch.randn(n, k) * 0.02)
        scale, bias = scale[:, 0].contiguous(), torch.randn(n).to(dtype)
        dense = q.double() * scale.double()[:, None]
        for m in (0, 1, 2, 3, 5, 9, 13, 64):
            a = torch.randn(m, k).to(dtype)
            y = cpu.fp8_linear(a, q, scale, bias)
            reference = a.double() @ dense.T + bias.double()
            assert_close(y, a, dense, bias, reference)
            assert torch.equal(y, cpu.fp8_linear(a, q.view(torch.uint8), scale, bias))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_fp8_code(isa, dtype):
    bits = torch.tensor([b for b in range(256) if b & 0x7F != 0x7F], dtype=torch.uint8)
    weight = bits[:, None].repeat(1, 16).contiguous()
    expected = weight.view(torch.float8_e4m3fn).to(dtype)
    for m in (1, 16):
        y = cpu.fp8_linear(torch.eye(16)[:m].to(dtype), weight, torch.ones(len(bits)))
        assert torch.equal(y, expected.T[:m])


def test_decoded_fp8_tiles_smaller_than_n(isa, monkeypatch):
    monkeypatch.setattr(cpu_dispatch, "has_fast_bf16_matmul", lambda: True)
    monkeypatch.setattr(cpu, "_MATMUL_SCRATCH_BYTES", 32 * 83 * 2)
    q, scale = quantize_fp8_per_row(torch.randn(100, 83))
    a = torch.randn(64, 83).bfloat16()
    dense = q.double() * scale.double()
    y = cpu.fp8_linear(a, q, scale[:, 0].contiguous())
    assert_close(y, a, dense, None, a.double() @ dense.T)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("fmt", [NVFP4, MXFP4], ids=lambda f: f.name)
def test_gathered_rows_are_the_dequantised_ones(isa, fmt, dtype):
    weight = random_weight(100, 96, fmt)
    packed = cpu.pack_weight(weight)
    dense = weight.dequantize(dtype)
    for ids in (torch.randint(0, 100, (3, 50)), torch.arange(100, dtype=torch.int32)):
        assert torch.equal(cpu.gather_rows(packed, ids, dtype), dense[ids.long()])
    assert cpu.gather_rows(packed, torch.empty(0, dtype=torch.long), dtype).shape == (0, 96)


def test_gathered_fp8_rows():
    q, scale = quantize_fp8_per_row(torch.randn(30, 83))
    ids = torch.randint(0, 30, (4, 5))
    rows = cpu.gather_fp8_rows(q, scale[:, 0], ids, torch.float32)
    assert torch.equal(rows, (q.float() * scale)[ids])


def test_default_dtype_does_not_leak_in():
    """vLLM builds and runs a model under another default type."""
    weight = random_weight(48, 96, NVFP4)
    a = torch.randn(60, 96).bfloat16()
    packed = cpu.pack_weight(weight)
    expected = [cpu.linear(a, packed, None, bits) for bits in (16, 8)]
    torch.set_default_dtype(torch.bfloat16)
    try:
        again = [cpu.linear(a, cpu.pack_weight(weight), None, bits) for bits in (16, 8)]
    finally:
        torch.set_default_dtype(torch.float32)
    assert all(torch.equal(x, y) for x, y in zip(expected, again, strict=True))


def test_warm_up_compiles_all_that_calls_need(isa, monkeypatch):
    cpu_dispatch.compile_kernel.cache_clear()
    weight = random_weight(33, 96, NVFP4)
    packed = cpu.pack_weight(weight)
    q, scale = quantize_fp8_per_row(torch.randn(33, 96))
    cpu.warm_up(NVFP4, torch.bfloat16, 16)
    cpu.warm_up(NVFP4, torch.bfloat16, 8)
    cpu.warm_up_fp8(torch.bfloat16)

    def refuse(name, ir_text, target):
        raise AssertionError(f"{name} compiled after warm_up")

    monkeypatch.setattr(cpu_dispatch, "compile_function", refuse)
    cpu.gather_rows(packed, torch.tensor([1]), torch.bfloat16)
    cpu.gather_fp8_rows(q, scale[:, 0].contiguous(), torch.tensor([1]), torch.bfloat16)
    for m in range(1, 70):
        a = torch.randn(m, 96).bfloat16()
        cpu.linear(a, packed)
        cpu.linear(a, packed, None, 8)
        cpu.fp8_linear(a, q, scale[:, 0].contiguous())


def test_bad_calls_are_refused():
    weight = random_weight(17, 64, NVFP4)
    packed = cpu.pack_weight(weight)
    a = torch.randn(2, 64).bfloat16()
    with pytest.raises(ValueError, match=r"needs \[M, 64\]"):
        cpu.linear(a[:, :32], packed)
    with pytest.raises(ValueError, match="bias"):
        cpu.linear(a, packed, torch.randn(16))
    with pytest.raises(ValueError, match="activation_bits"):
        cpu.linear(a, packed, None, 4)
    with pytest.raises(ValueError, match=r"ids run 0\.\.17"):
        cpu.gather_rows(packed, torch.tensor([0, 17]), torch.bfloat16)
    with pytest.raises(ValueError, match="row_scale"):
        cpu.fp8_linear(a, torch.zeros(3, 64, dtype=torch.uint8), torch.ones(2))
    scale = weight.block_scale.clone()
    scale.view(torch.uint8)[3, 2] = 0x7F
    with pytest.raises(ValueError, match="row 3, block 2 is NaN"):
        cpu.pack_weight(BlockScaledWeight(weight.codes, scale, weight.global_scale, NVFP4))
    with pytest.raises(ValueError, match="choose from"):
        cpu_jit.detect_cpu("sse9")


def test_the_option_names_every_level():
    names = {f.name: f.metadata["choices"] for f in dataclasses.fields(Options)}
    assert names["cpu_isa"] == ("auto", *cpu_jit.ISA_LEVELS)


def test_every_format_has_a_cpu_test():
    assert set(FORMATS) == {"nvfp4", "mxfp4"}


PRELOAD_SCRIPT = """
import torch
from vllm_nvfp4.kernels.cpu import linear as cpu, jit as cpu_jit
from vllm_nvfp4.numerics.quantize import quantize_nvfp4
from vllm_nvfp4.numerics.reference import reference_linear
torch.manual_seed(0)
weight = quantize_nvfp4(torch.randn(300, 288))
a = torch.randn(3, 288)
torch.set_num_threads(2)
error = (cpu.linear(a, cpu.pack_weight(weight)) - reference_linear(a, weight)).abs().max()
assert error < 1e-3, error
print(cpu_jit.thread_pool().name)
"""


def test_with_torchs_openmp_preloaded_as_vllm_does():
    library = next(p for p in cpu_jit._mapped_openmp_libraries() if "torch" in p)
    result = subprocess.run(
        [sys.executable, "-c", PRELOAD_SCRIPT],
        env={**os.environ, "LD_PRELOAD": library},
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    assert "global scope" in result.stdout
