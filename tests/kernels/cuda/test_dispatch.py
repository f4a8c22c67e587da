# SPDX-License-Identifier: Apache-2.0
"""GPU figures and the choice of kernel: valid for every shape, monotone, on the roofline."""

import dataclasses
import itertools
import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vllm_nvfp4 import gpus
from vllm_nvfp4.gpus import GPUS, Gpu
from vllm_nvfp4.kernels.cuda import configs, cost, dispatch, variants
from vllm_nvfp4.testing.shapes import BENCH_M, MODELS

RTX4090, L40S, L4, A100, H200 = (
    gpus.find_gpu(n) for n in ("RTX 4090", "L40S", "L4", "A100-SXM4-80GB", "H200")
)
LAYERS = [
    (n, k) for model in MODELS.values() for n, k in model.linear_layers().values()
]  # every dense layer of every model the benchmarks know

shapes = st.tuples(
    st.integers(1, 20000),
    st.integers(1, 40000),
    st.integers(1, 900).map(lambda blocks: 32 * blocks),
)
known_gpus = st.sampled_from(GPUS)
formats = st.sampled_from(["nvfp4", "mxfp4"])
dtypes = st.sampled_from(["bf16", "fp16"])


# --- figures -------------------------------------------------------------------------------------


@pytest.mark.parametrize("gpu", GPUS, ids=lambda g: g.name)
def test_tensor_rates_follow_from_sms_and_clock(gpu):
    """A typing error in a row would break its rate: SMs * GHz * FLOP per clock, within 3 %."""
    is_geforce = gpu.name.startswith("GeForce")
    rates = (gpus.RATES_GEFORCE if is_geforce else gpus.RATES_PROFESSIONAL)[gpu.arch]
    if gpu.name == "L40":
        rates = gpus.RATES_L40[gpu.arch]
    listed = (gpu.bf16_tflops, gpu.fp8_f32_tflops, gpu.fp8_f16_tflops, gpu.int8_tops)
    for rate, figure in zip(rates, listed, strict=True):
        assert figure == pytest.approx(rate * gpu.num_sms * gpu.boost_ghz / 1e3, rel=0.03)
    assert gpu.source
    assert gpu.date


def test_names_are_unique_and_found():
    assert len({gpu.name for gpu in GPUS}) == len(GPUS)
    for gpu in GPUS:
        assert gpus.find_gpu(f"NVIDIA {gpu.name}") is gpu
    assert gpus.find_gpu("rtx 4090") is RTX4090
    assert gpus.find_gpu("NVIDIA GeForce RTX 4090 Laptop GPU") is not RTX4090
    assert gpus.find_gpu("RTX 4080") is not gpus.find_gpu("RTX 4080 SUPER")


@pytest.mark.parametrize("gpu", [RTX4090, L40S, H200, A100], ids=lambda g: g.name)
def test_an_unknown_card_is_estimated_from_its_parts(gpu):
    estimate = gpus.estimate_gpu(
        gpu.name.replace("RTX 4090", "RTX 4091"),
        gpu.arch,
        gpu.num_sms,
        gpu.boost_ghz,
        gpu.dram_gbps,
        gpu.memory_gb,
    )
    assert estimate.is_estimate
    assert estimate.bf16_tflops == pytest.approx(gpu.bf16_tflops, rel=0.03)
    assert estimate.fp8_f32_tflops == pytest.approx(gpu.fp8_f32_tflops, rel=0.03)


def test_an_unknown_architecture_takes_the_nearest_older_rates():
    assert gpus.estimate_gpu("RTX 9090", 95, 100, 2.0, 1000, 24).bf16_tflops == pytest.approx(
        4096 * 100 * 2.0 / 1e3
    )


# --- the switch between 16- and 8-bit activations ------------------------------------------------


@pytest.mark.parametrize(("n", "k"), [(6144, 4096), (24576, 4096), (4096, 12288), (57344, 8192)])
def test_the_switch_is_between_the_two_ridges_of_a_4090(n, k):
    assert 40 <= dispatch.activation_switch(RTX4090, n, k, "nvfp4") <= 92


@pytest.mark.parametrize("gpu", [L40S, L4], ids=lambda g: g.name)
def test_the_switch_is_later_where_16_bit_mma_runs_at_full_rate(gpu):
    assert 95 <= dispatch.activation_switch(gpu, 24576, 4096, "nvfp4") <= 150


@pytest.mark.parametrize("gpu", [A100, H200], ids=lambda g: g.name)
def test_never_8_bit_without_native_fp8_mma(gpu):
    assert dispatch.activation_switch(gpu, 24576, 4096, "nvfp4") == math.inf
    assert dispatch.choose(gpu, 4096, 24576, 4096, "nvfp4", "bf16").activation_bits == 16


def test_f16_partials_switch_no_later_on_geforce_and_not_earlier_elsewhere():
    """Twice the MMA rate on GeForce; on L40S the same rate and more instructions."""
    for n, k in LAYERS:
        exact, f16 = (
            [dispatch.activation_switch(gpu, n, k, "nvfp4", variant) for gpu in (RTX4090, L40S)]
            for variant in ("exact", "f16_partials")
        )
        assert f16[0] <= exact[0]
        assert f16[1] >= exact[1]
    assert dispatch.choose(
        RTX4090, 4096, 4096, 4096, "nvfp4", "bf16", "auto", "f16_partials"
    ).config.variant == "f16_partials"  # fmt: skip
    with pytest.raises(ValueError, match=r"'rounded'.*exact, int8, f16_partials, folded"):
        dispatch.reachable("nvfp4", "bf16", 8, "rounded")


def test_the_instruction_counts_are_those_of_the_machine_code():
    """Against sass_report's figures for sm_89, by hand: lane instructions per weight and tile."""
    counted = {(8, "nvfp4"): 3.6, (16, "nvfp4"): 3.85, (32, "nvfp4"): 4.7, (64, "nvfp4"): 5.6,
               (128, "nvfp4"): 11.1, (8, "mxfp4"): 4.0, (64, "mxfp4"): 7.6,
               (128, "mxfp4"): 15.2}  # fmt: skip
    for config in dispatch.reachable("nvfp4", "bf16", 16) + dispatch.reachable("mxfp4", "bf16", 16):
        if (config.block_m, config.fmt_name) in counted:
            unpack, token = cost.INSTRUCTIONS[config.stem, "exact", config.fmt_name]
            model = unpack * config.warps_m + token * config.block_m
            assert model == pytest.approx(counted[config.block_m, config.fmt_name], rel=0.07)
    counted = {(64, "nvfp4"): 14.9, (128, "nvfp4"): 25.6, (192, "nvfp4"): 36.3,
               (64, "mxfp4"): 10.6, (128, "mxfp4"): 16.7, (192, "mxfp4"): 23.1}  # fmt: skip
    for (block_m, fmt), count in counted.items():
        unpack, token = cost.INSTRUCTIONS["gemm_w4i8", "int8", fmt]
        assert unpack + token * block_m == pytest.approx(count, rel=0.07)


def test_auto_takes_the_faster_of_int8_and_exact_fp8():
    found = {g.name: dispatch.resolve_variant(g, "auto") for g in GPUS}
    assert {found[g.name] for g in GPUS if "GeForce" in g.name} == {"int8"}
    for name in ("L4", "L40S", "RTX 6000 Ada Generation", "H100 80GB HBM3", "H200", "B200"):
        assert found[name] == "exact"
    assert all(dispatch.resolve_variant(RTX4090, v) == v for v in variants.VARIANTS[1:])
    choice = dispatch.choose(RTX4090, 4096, 4096, 4096, "nvfp4", "bf16", "auto", "auto")
    assert choice.config.stem == "gemm_w4i8"
    assert choice.activation_bits == 8
    # No later than exact FP8, which is slower.
    for n, k in LAYERS:
        exact, finer = (dispatch.activation_switch(RTX4090, n, k, "nvfp4", v)
                        for v in ("exact", "auto"))  # fmt: skip
        assert finer <= exact


def test_without_fp8_int8_is_taken_where_it_gains_much():
    """An A100's f32 units are half as many, an A40's BF16 MMA runs at its full rate."""
    rtx3090 = gpus.find_gpu("RTX 3090")
    a40 = gpus.estimate_gpu("NVIDIA A40", 86, 84, 1.74, 696, 48)
    assert dispatch.gains_from_8_bits(rtx3090, "auto")
    for card in (A100, a40):
        assert not dispatch.gains_from_8_bits(card, "auto")
        by_name = dispatch.choose(card, 64, 4096, 4096, "nvfp4", "bf16", "8", "auto")
        assert by_name.config.stem == "gemm_w4i8"
        unasked = dispatch.choose(card, 4096, 4096, 4096, "nvfp4", "bf16", "auto", "auto")
        assert unasked.activation_bits == 16
    assert not dispatch.gains_from_8_bits(rtx3090, "exact")
    switch = dispatch.activation_switch(rtx3090, 4096, 4096, "nvfp4", "auto")
    assert 16 < switch < 128
    bits = [
        dispatch.choose(rtx3090, m, 4096, 4096, "nvfp4", "fp16", "auto", "auto").activation_bits
        for m in (int(switch), int(switch) + 1)
    ]
    assert bits == [16, 8]


def test_8_bits_by_name():
    assert dispatch.choose(H200, 1, 4096, 4096, "nvfp4", "bf16", "8").activation_bits == 8
    assert dispatch.choose(RTX4090, 1, 4096, 4096, "nvfp4", "bf16", "8").activation_bits == 8
    assert dispatch.choose(RTX4090, 4096, 4096, 4096, "nvfp4", "bf16", "16").activation_bits == 16
    with pytest.raises(ValueError, match=r"A100.*sm_80.*no FP8 tensor cores"):
        dispatch.choose(A100, 1, 4096, 4096, "nvfp4", "bf16", "8")


@given(known_gpus, shapes, formats)
def test_once_8_bits_always_8_bits(gpu, shape, fmt):
    m, n, k = shape
    bits = [dispatch.choose_activation_bits(gpu, tokens, n, k, fmt) for tokens in (m, m + 1, 2 * m)]
    assert bits == sorted(bits, reverse=True)


@given(known_gpus, shapes, formats)
def test_the_switch_is_where_the_estimates_cross(gpu, shape, fmt):
    """Far below the switch 16 bits are faster on paper, far above it 8 bits are."""
    _, n, k = shape
    switch = dispatch.activation_switch(gpu, n, k, fmt)
    if switch == math.inf:
        return

    def roofline(m, tflops, extra):
        weight = n * k * (4 + 8 / (16 if fmt == "nvfp4" else 32)) / 8
        memory = weight / (gpu.dram_gbps * 900)
        return max(memory, 2 * m * n * k / (tflops * 8e5)) + extra

    quantize = lambda m: 1.5 + 3 * m * k / (gpu.dram_gbps * 900)  # noqa: E731
    for m, is_8_faster in ((switch * 0.8, False), (switch * 1.25, True)):
        faster = roofline(m, gpu.fp8_f32_tflops, quantize(m)) < roofline(m, gpu.bf16_tflops, 0)
        assert faster == is_8_faster


# --- the choice ----------------------------------------------------------------------------------


@settings(max_examples=300)
@given(known_gpus, shapes, formats, dtypes, st.sampled_from(dispatch.ACTIVATIONS))
def test_every_shape_gets_a_kernel_that_takes_it(gpu, shape, fmt, dtype, activation):
    if activation == "8" and gpu.arch < 89:
        activation = "auto"
    m, n, k = shape
    choice = dispatch.choose(gpu, m, n, k, fmt, dtype, activation)
    config = choice.config
    assert (config.fmt_name, config.dtype, config.variant) == (fmt, dtype, "exact")
    assert config in dispatch.reachable(fmt, dtype, choice.activation_bits)
    assert config.min_arch <= gpu.arch
    assert config.smem_bytes <= configs.MAX_SMEM_BYTES
    tiles, splits, depth = choice.grid
    assert tiles == math.ceil(m / config.block_m) * math.ceil(n / config.block_n)
    assert 1 <= splits == choice.num_splits <= math.ceil(k / config.block_k)
    assert splits < 65536
    assert depth == 1
    assert splits == 1 or tiles <= dispatch.MAX_SPLIT_TILES
    needed = 0 if splits == 1 else tiles * splits * config.block_m * config.block_n * 4
    assert choice.workspace_bytes == needed


@given(known_gpus, shapes, formats)
def test_the_choice_is_the_best_of_what_is_reachable(gpu, shape, fmt):
    m, n, k = shape
    choice = dispatch.choose(gpu, m, n, k, fmt, "bf16")
    times = [
        cost.estimate_us(gpu, config, m, n, k)
        for config in dispatch.reachable(fmt, "bf16", choice.activation_bits)
    ]
    assert choice.estimated_us == min(times)


@settings(max_examples=50)
@given(st.sampled_from([g for g in GPUS if g.arch == 89]), st.sampled_from(LAYERS), formats)
def test_more_tokens_never_take_much_less_time(gpu, layer, fmt):
    """The model's time may step down by one tile shape at a switch, no more."""
    times = [dispatch.choose(gpu, m, *layer, fmt, "bf16").estimated_us for m in BENCH_M]
    for fewer, more in itertools.pairwise(times):
        assert more >= 0.95 * fewer


def test_decode_takes_a_tile_of_few_tokens_and_prefill_a_large_one():
    for gpu in (RTX4090, L40S, H200):
        assert dispatch.choose(gpu, 1, 24576, 4096, "nvfp4", "bf16").config.block_m == 8
        assert dispatch.choose(gpu, 4096, 24576, 4096, "nvfp4", "bf16").config.block_m >= 64


def test_decode_of_a_large_layer_is_estimated_near_the_memory_bound():
    for gpu in (RTX4090, L40S):
        n, k = 57344, 8192
        bound = n * k * 4.5 / 8 / (gpu.dram_gbps * 1e3)
        estimate = dispatch.choose(gpu, 1, n, k, "nvfp4", "bf16").estimated_us
        assert bound <= estimate <= 1.35 * bound


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((1, 64, 24, "nvfp4", "bf16"), "K=24.*multiple of 16"),
        ((1, 64, 48, "mxfp4", "bf16"), "K=48.*multiple of 32"),
        ((1, 64, 0, "nvfp4", "bf16"), "K=0"),
        ((-1, 64, 64, "nvfp4", "bf16"), "M=-1"),
        ((1, 0, 64, "nvfp4", "bf16"), "N=0"),
        ((1, 64, 64, "int4", "bf16"), "'int4'.*nvfp4, mxfp4"),
        ((1, 64, 64, "nvfp4", "float64"), "'float64'.*bf16 or fp16"),
        ((1, 64, 64, "nvfp4", "bf16", "4"), "'4'.*auto, 16, 8"),
    ],
)
def test_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        dispatch.choose(RTX4090, *arguments)


def test_a_slice_of_a_gpu_splits_for_its_own_sms():
    """Multi-instance GPUs and power-capped cards have fewer SMs than the table says."""
    small = dataclasses.replace(H200, num_sms=16)
    assert isinstance(small, Gpu)
    whole = dispatch.choose(H200, 1, 1024, 8192, "nvfp4", "bf16").num_splits
    assert dispatch.choose(small, 1, 1024, 8192, "nvfp4", "bf16").num_splits < whole
