# SPDX-License-Identifier: Apache-2.0
"""The CUDA path of routed experts, executed: what ``cuda_moe`` launches runs on the emulated GPU.

All above the driver is the code that a GPU runs; only the launch itself goes to csrc/host/.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from vllm_nvfp4.gpus import find_gpu
from vllm_nvfp4.kernels import moe_ops
from vllm_nvfp4.kernels.cuda import moe as cuda_moe
from vllm_nvfp4.kernels.cuda import moe_configs
from vllm_nvfp4.kernels.cuda.configs import QUANTIZE_CONFIGS
from vllm_nvfp4.kernels.cuda.moe_configs import ALL_MOE_CONFIGS, MOE_CONFIGS
from vllm_nvfp4.kernels.cuda.moe_dispatch import MoeShape, choose_moe, choose_moe_bits
from vllm_nvfp4.numerics.activation import ExpertActivation
from vllm_nvfp4.testing import moe_checks
from vllm_nvfp4.testing.host_device import EmulatedDevice
from vllm_nvfp4.testing.metrics import Comparison, relative_error
from vllm_nvfp4.testing.moe_cases import Experts, compare_moe, random_experts, reference_moe, route
from vllm_nvfp4.testing.shapes import MODELS

SILU = ExpertActivation("silu")
GPUS = [gpu for gpu in map(find_gpu, ("RTX 4090", "L40S", "L4")) if gpu is not None]


def run(a, w13: Experts, w2: Experts, weights, ids, expert_map=None, bits="16", on_input=False,
        activation=SILU, variant="exact"):  # fmt: skip
    """(y, what was launched)"""
    first, second = w13.stack, w2.stack
    tensors = [a, weights, ids, expert_map, w13.bias, w2.bias]
    for stack in (first, second):
        tensors += [stack.codes, stack.block_scale, stack.global_scale]
    device = EmulatedDevice(*tensors)
    device.variant = variant
    with device:
        y = cuda_moe.run(
            device, 0, a, (first, second), (weights, ids, expert_map), activation, on_input, bits,
            (w13.bias, w2.bias),
        )  # fmt: skip
    return y, device.launches


def layer(
    num_experts: int, hidden: int, inner: int, fmt_name: str = "nvfp4", bias=None, rows: int = 2
) -> tuple[Experts, Experts]:
    return (
        random_experts(num_experts, rows * inner, hidden, fmt_name, bias=bias),
        random_experts(num_experts, hidden, inner, fmt_name, bias=bias, seed=1),
    )


def routed(num_tokens: int, num_choices: int, num_ids: int, hidden: int, dtype=torch.bfloat16):
    """(a, weights, ids) with some experts chosen more often than others."""
    generator = torch.Generator().manual_seed(num_tokens)
    a = torch.randn(num_tokens, hidden, generator=generator).to(dtype)
    scores = torch.rand(num_tokens, num_ids, generator=generator) * torch.linspace(1, 0.4, num_ids)
    weights, ids = scores.topk(num_choices, dim=-1)
    return a, weights, ids.int()


def test_where_the_result_may_lie() -> None:
    """Rows are written 16 bytes at a time."""
    w13, w2 = layer(2, 64, 32)
    a, weights, ids = routed(3, 1, 2, 64)
    memory = torch.empty(4 * 64 + 8, dtype=torch.bfloat16)

    def refusal(y: torch.Tensor) -> str:
        with pytest.raises(ValueError, match="moe: y ") as refused:
            cuda_moe.moe(a, w13.stack, w2.stack, (weights, ids, None), SILU, False, 16, y=y)
        return str(refused.value)

    assert "y begins 2 bytes beyond a multiple of 16" in refusal(memory[1 : 1 + 192].view(3, 64))
    assert "with strides [72, 1]; needs torch.bfloat16 [3, 64], contig" in refusal(
        memory[: 3 * 72].view(3, 72)[:, :64]
    )
    assert "torch.bfloat16 [2, 64]" in refusal(memory[:128].view(2, 64))


# --- the whole layer -----------------------------------------------------------------------------


@pytest.mark.parametrize("fmt_name", ["nvfp4", "mxfp4"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("num_tokens", [1, 9, 40])
def test_the_layer(num_tokens: int, dtype: torch.dtype, fmt_name: str) -> None:
    w13, w2 = layer(6, 96, 160, fmt_name, bias=dtype)
    a, weights, ids = routed(num_tokens, 3, 6, 96, dtype)
    y, launches = run(a, w13, w2, weights, ids)
    found = compare_moe(y, a, w13, w2, weights, ids, SILU)
    assert found.is_match, found.report
    family = "decode" if num_tokens <= 16 else "prefill"
    assert [symbol.count(family) for symbol, _ in launches] == [0, 1, 1, 0]


@pytest.mark.parametrize(("variant", "kernel"), [("exact", "w4a8"), ("int8", "w4i8")])
def test_the_layer_with_8_bit_activations(variant: str, kernel: str) -> None:
    """Each E4M3 rounding is off by 2^-4 at the most; test_moe_kernels.py is exact about each."""
    w13, w2 = layer(3, 96, 64)
    a, weights, ids = routed(30, 2, 3, 96)
    y, launches = run(a, w13, w2, weights, ids, bits="8", variant=variant)
    expected, _ = reference_moe(a, w13, w2, weights, ids, SILU)
    assert 1e-3 < relative_error(y, expected) < 2**-4
    assert [("quantize" in s, kernel in s) for s, _ in launches] == [
        (False, False), (True, False), (False, True), (True, False), (False, True), (False, False),
    ]  # fmt: skip


def test_remote_experts_add_nothing() -> None:
    w13, w2 = layer(3, 64, 48)
    a, weights, ids = routed(12, 3, 8, 64)
    for numbers in ([-1, 2, -1, 0, 1, -1, -1, -1], [-1] * 8):
        expert_map = torch.tensor(numbers, dtype=torch.int32)
        y, _ = run(a, w13, w2, weights, ids, expert_map)
        local = route(ids, expert_map, 3)
        found = compare_moe(y, a, w13, w2, weights, local, SILU)
        assert found.is_match, found.report
        assert not y[(local < 0).all(1)].any()


def test_one_expert_for_all_and_64_bit_ids() -> None:
    w13, w2 = layer(4, 64, 32)
    a, weights, _ = routed(70, 1, 4, 64)
    ids = torch.full((70, 1), 2)
    y, _ = run(a, w13, w2, weights, ids)
    found = compare_moe(y, a, w13, w2, weights, ids, SILU)
    assert found.is_match, found.report


def test_router_weight_on_the_input() -> None:
    w13, w2 = layer(4, 64, 32)
    a, weights, ids = routed(5, 1, 4, 64)
    y, _ = run(a, w13, w2, weights, ids, on_input=True)
    scaled = (a * weights).to(a.dtype)
    found = compare_moe(y, scaled, w13, w2, torch.ones_like(weights), ids, SILU)
    assert found.is_match, found.report


def test_rows_of_a_wider_matrix_and_no_gate() -> None:
    activation = ExpertActivation("relu2_no_mul")
    w13, w2 = layer(2, 64, 32, rows=1)
    wide, weights, ids = routed(6, 1, 2, 3 * 64)
    for a in (wide[:, 64:128], wide[:, 1:65], wide[:, ::3]):
        y, _ = run(a, w13, w2, weights, ids, activation=activation)
        found = compare_moe(y, a, w13, w2, weights, ids, activation)
        assert found.is_match, found.report


def test_the_cpu_and_cuda_paths_agree() -> None:
    """The op's two answers on one layer, biases and a clamped activation included."""
    from vllm_nvfp4.kernels.cpu.linear import pack_weight

    activation = ExpertActivation("silu", 2.0, 1.702, 1.0)
    w13, w2 = layer(4, 64, 48, bias=torch.bfloat16)
    a, weights, ids = routed(9, 2, 4, 64)
    y, _ = run(a, w13, w2, weights, ids, activation=activation)
    stacks = [
        [torch.stack([getattr(pack_weight(w), name) for w in experts.weights])
         for name in ("codes", "block_scale", "global_scale")]
        for experts in (w13, w2)
    ]  # fmt: skip
    expected = moe_ops.moe(
        a, *stacks, weights, ids, None, 48, "nvfp4", "silu", [2.0, 1.702, 1.0], False, 16,
        w13.bias, w2.bias,
    )  # fmt: skip
    assert relative_error(y, expected) < 3 * 2**-8
    found = compare_moe(y, a, w13, w2, weights, ids, activation)
    assert found.is_match, found.report


@pytest.mark.parametrize("config", MOE_CONFIGS[::2], ids=lambda c: c.symbol)
def test_the_check_for_a_gpu_passes_here(config) -> None:
    """What gpu_check.sh runs, on the emulated GPU."""
    for case in moe_checks.moe_cases_of(config, moe_checks.SMALL_SHAPES):
        layer = moe_checks.make_layer(case, torch.device("cpu"))
        a, w13, w2 = layer.a, layer.w13, layer.w2
        outcomes: list[Comparison] = []
        device = EmulatedDevice(a, w13.bias, w2.bias, *layer.routing)
        with device:
            moe_checks.run_layer(device, 0, config, layer, outcomes)
        assert len(outcomes) == 2 + 2 * len(w13.weights)
        assert all(outcome.is_match for outcome in outcomes), [o.report for o in outcomes]


# --- what is refused -----------------------------------------------------------------------------


def test_what_does_not_fit_is_refused() -> None:
    w13, w2 = layer(3, 64, 48)
    a, weights, ids = routed(5, 2, 3, 64)

    def check(a=a, w13=w13.stack, w2=w2.stack, ids=ids, on_input=False, bits=16, bias=None):
        cuda_moe._check(a, w13, w2, (weights, ids, None), SILU, on_input, bits, (bias, None))

    check()
    for message, wrong in (
        ("a is torch.float32; the CUDA kernels take", {"a": a.float()}),
        (r"a is \[5, 32\]; needs \[M, 64\]", {"a": a[:, :32]}),
        (r"topk_ids is \[4, 2\] and topk_weights \[5, 2\]", {"ids": ids[:4]}),
        ("on the input with 2 choices a token; needs 1", {"on_input": True}),
        ("activation_bits is 4; needs 16, 8 or 0", {"bits": 4}),
        ("w13 holds 3 experts and w2 2", {"w2": random_experts(2, 64, 48, "nvfp4").stack}),
        ("w13 holds 6144 codes an expert", {"w13": replace(w13.stack, num_rows=128)}),
        ("w13 has 72 rows an expert; needs a multiple of 32",
         {"w13": random_experts(3, 72, 64, "nvfp4").stack}),
        (r"w13's bias is torch.float32 \[3, 96\]", {"bias": torch.zeros(3, 96)}),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=message):
            check(**wrong)


# --- which kernel --------------------------------------------------------------------------------

QWEN3 = MODELS["Qwen3-30B-A3B"]
SHAPE = MoeShape(128, 8, QWEN3.hidden_size, QWEN3.intermediate_size)


@pytest.mark.parametrize("gpu", GPUS, ids=lambda gpu: gpu.name)
def test_bits_are_monotone_and_follow_the_tokens_of_an_expert(gpu) -> None:
    bits = [choose_moe_bits(gpu, m, SHAPE, "nvfp4") for m in range(0, 20000, 16)]
    assert bits == sorted(bits, reverse=True)
    assert bits[0] == 16
    first = bits.index(8) * 16
    # Twice the experts: twice the tokens.
    twice = replace(SHAPE, num_experts=256)
    assert choose_moe_bits(gpu, int(first * 1.5), twice, "nvfp4") == 16
    assert choose_moe_bits(gpu, 2 * first + 32, twice, "nvfp4") == 8


def test_every_kernel_is_chosen_for_something() -> None:
    chosen = {
        choose_moe(gpu, m, SHAPE, fmt, dtype, activation, variant)
        for gpu in GPUS
        for variant in ("exact", "int8")
        for m in (1, 16, 17, 4096)
        for fmt in ("nvfp4", "mxfp4")
        for dtype in ("bf16", "fp16")
        for activation in ("16", "8", "auto")
    }
    assert chosen == set(MOE_CONFIGS)


def test_a_gpu_without_fp8_refuses_it_and_has_int8() -> None:
    rtx3090 = find_gpu("RTX 3090")
    with pytest.raises(ValueError, match="has no FP8 tensor cores"):
        choose_moe(rtx3090, 64, SHAPE, "nvfp4", "bf16", "8")
    int8 = choose_moe(rtx3090, 64, SHAPE, "nvfp4", "bf16", "8", "auto")
    assert (int8.stem, int8.min_arch) == ("moe_w4i8", 80)
    with pytest.raises(ValueError, match="there is no kernel"):
        choose_moe(GPUS[0], 64, SHAPE, "int4", "bf16", "16")


def test_the_grid_never_exceeds_the_tiles_nor_the_gpu() -> None:
    for config in MOE_CONFIGS:
        for num_choices, num_experts, columns in ((1, 1, 64), (8, 128, 768), (40000, 128, 768)):
            (x, y, z) = moe_configs.moe_grid(config, num_choices, num_experts, columns, True, 128)
            assert 1 <= x <= 128 * config.blocks_per_sm
            assert (y, z) == (1, 1)


def test_a_load_prepares_what_a_launch_may_use() -> None:
    wanted = cuda_moe.wanted_kernels(89, "nvfp4", (torch.bfloat16,))
    names = {config.symbol for config in wanted}
    for m in (1, 17, 100000):
        for activation in ("16", "8"):
            config = choose_moe(GPUS[0], m, SHAPE, "nvfp4", "bf16", activation)
            assert config.symbol in names
    assert not any("w4a8" in c.symbol for c in cuda_moe.wanted_kernels(86, "nvfp4", (torch.half,)))
    for arch in (86, 89):
        wanted = cuda_moe.wanted_kernels(arch, "nvfp4", (torch.half,), "int8")
        assert {c.stem for c in wanted} == {"moe_route", "moe_combine", "moe_w4a16", "moe_w4i8"}


def test_names_are_unique_and_blocks_fit() -> None:
    everything = [*ALL_MOE_CONFIGS, *QUANTIZE_CONFIGS]
    assert len({c.symbol for c in everything}) == len(everything)
    for config in ALL_MOE_CONFIGS:
        assert config.smem_bytes <= 99 * 1024
        assert config.symbol in config.source
