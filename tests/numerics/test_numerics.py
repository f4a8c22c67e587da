# SPDX-License-Identifier: Apache-2.0
"""Codes, packing, scales and dequantisation, bit for bit against the tools that write files."""

import hashlib
import json
import lzma

import pytest
import torch
from compressed_tensors.compressors import MXFP4PackedCompressor, NVFP4PackedCompressor
from compressed_tensors.compressors.nvfp4.helpers import pack_fp4_to_uint8, unpack_fp4_from_uint8
from compressed_tensors.quantization import QuantizationScheme, preset_name_to_scheme
from compressed_tensors.quantization.utils import calculate_qparams, generate_gparam
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load, load_file

from vllm_nvfp4.numerics.codes import decode_e2m1, encode_e2m1, pack_codes, round_e2m1, unpack_codes
from vllm_nvfp4.numerics.formats import E2M1_VALUES, MXFP4, NVFP4
from vllm_nvfp4.numerics.quantize import (
    nvfp4_global_scale,
    quantize_fp8_per_row,
    quantize_mxfp4,
    quantize_nvfp4,
    to_e4m3,
)
from vllm_nvfp4.numerics.reference import reference_linear
from vllm_nvfp4.numerics.weight import BlockScaledWeight, decode_block_scale
from vllm_nvfp4.testing.checkpoints import FIXTURES, extract_fixture

VALUES = torch.tensor([*E2M1_VALUES, *(-v for v in E2M1_VALUES)])


@pytest.fixture(scope="module")
def modelopt():
    """What ModelOpt 0.47's NVFP4QTensor made of one weight."""
    return load(lzma.decompress((FIXTURES / "modelopt_numerics.safetensors.xz").read_bytes()))


def random_weight(rows: int, cols: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn((rows, cols), generator=generator)
    return (weight * torch.logspace(-3, 3, rows)[:, None]).to(torch.bfloat16)


def test_every_code_decodes_to_its_value_in_every_type():
    codes = torch.arange(16, dtype=torch.uint8)
    for dtype in (torch.float64, torch.float32, torch.bfloat16, torch.float16):
        assert torch.equal(decode_e2m1(codes, dtype).double(), VALUES.double())
    assert torch.equal(encode_e2m1(VALUES), codes)
    assert torch.signbit(decode_e2m1(torch.tensor([8], dtype=torch.uint8)))


def test_ties_go_to_even_and_large_values_saturate():
    ties = torch.tensor([0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0, 6.5, 1e30, torch.inf])
    expected = torch.tensor([0, 2, 2, 4, 4, 6, 6, 7, 7, 7], dtype=torch.uint8)
    assert torch.equal(encode_e2m1(ties), expected)
    assert torch.equal(encode_e2m1(-ties), expected | 8)


def test_rounding_is_to_the_nearest_value_everywhere():
    x = torch.linspace(-7, 7, 20001, dtype=torch.float64).float()
    got = decode_e2m1(encode_e2m1(x)).double()
    nearest = (x.double()[:, None] - VALUES.double()).abs().amin(-1)
    assert torch.equal((got - x.double()).abs(), nearest)


def test_low_nibble_is_the_even_element():
    packed = pack_codes(torch.tensor([[1, 2, 15, 0]], dtype=torch.uint8))
    assert packed.tolist() == [[0x21, 0x0F]]
    with pytest.raises(ValueError, match="even"):
        pack_codes(torch.zeros((2, 3), dtype=torch.uint8))


@given(st.integers(1, 9), st.integers(1, 40), st.integers(0, 2**31))
@settings(max_examples=30, deadline=None)
def test_unpack_inverts_pack(rows, pairs, seed):
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(0, 16, (rows, 2 * pairs), generator=generator, dtype=torch.uint8)
    assert torch.equal(unpack_codes(pack_codes(codes)), codes)


def test_pack_and_unpack_are_those_of_compressed_tensors():
    codes = torch.randint(0, 16, (48, 96), dtype=torch.uint8)
    values = decode_e2m1(codes)
    assert torch.equal(pack_codes(codes), pack_fp4_to_uint8(values))
    theirs = unpack_fp4_from_uint8(pack_codes(codes), 48, 96, torch.float32)
    assert torch.equal(theirs, values)
    assert torch.equal(torch.signbit(theirs), torch.signbit(values))  # -0.0 stays -0.0


def scheme(name: str) -> QuantizationScheme:
    return preset_name_to_scheme(name, ["Linear"])


def test_nvfp4_encodes_as_compressed_tensors_does_with_the_same_scales():
    weight = random_weight(32, 128).float()
    ours = quantize_nvfp4(weight)
    divisor = (1 / ours.global_scale[:1].double()).float()
    theirs = NVFP4PackedCompressor.compress(
        {
            "weight": weight,
            "weight_scale": ours.block_scale.float(),
            "weight_global_scale": divisor,
        },
        scheme("NVFP4A16"),
    )
    assert torch.equal(theirs["weight_scale"].view(torch.uint8), ours.block_scale.view(torch.uint8))
    # Their encoder divides by scale / divisor, ours by scale * multiplier: one rounding apart, so
    # that codes may differ only where an element lies on a tie to within that rounding.
    differ = unpack_codes(theirs["weight_packed"]) != unpack_codes(ours.codes)
    step = ours.block_scale.double().repeat_interleave(16, 1) * ours.global_scale.double()[:, None]
    ratio = (weight.double() / step).abs()
    ties = torch.tensor([0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0], dtype=torch.float64)
    distance = ((ratio[..., None] - ties).abs() / ties).amin(-1)
    assert distance[differ].le(2**-22).all()


def test_nvfp4_scales_are_those_of_compressed_tensors():
    # Of one order of magnitude: a scale that rounds to 0 becomes 1/8 there and 2^-9 here, as in
    # ModelOpt.
    weight = random_weight(1, 1024, seed=3).float().view(16, 64)
    args = scheme("NVFP4A16").weights
    divisor = generate_gparam(weight.amin().reshape(1), weight.amax().reshape(1))
    blocks = weight.view(16, -1, 16)
    theirs, _ = calculate_qparams(blocks.amin(-1), blocks.amax(-1), args, global_scale=divisor)
    ours = quantize_nvfp4(weight, global_scale=(1 / divisor.double()).float())
    # 2688 / amax against 1 / (amax / 2688): two roundings.
    product = divisor.double() * nvfp4_global_scale(weight).double()
    assert (product - 1).abs() <= 2 * 2**-24
    # Their scale is rounded once to f32 as amax * divisor / 6, ours as amax / (6 * multiplier).
    got, wanted = ours.block_scale.float(), theirs.to(torch.float8_e4m3fn).float()
    assert torch.equal(got, wanted)


@pytest.mark.parametrize(
    ("name", "compressor", "preset"),
    [
        ("compressed_tensors/nvfp4a16-llama", NVFP4PackedCompressor, "NVFP4A16"),
        ("compressed_tensors/mxfp4-llama", MXFP4PackedCompressor, "MXFP4"),
    ],
)
def test_files_of_llmcompressor_dequantise_as_compressed_tensors_does(
    tmp_path, name, compressor, preset
):
    tensors = load_file(extract_fixture(name, tmp_path) / "model.safetensors")
    fmt = NVFP4 if "nvfp4" in name else MXFP4
    layers = [n.removesuffix(".weight_packed") for n in tensors if n.endswith(".weight_packed")]
    assert len(layers) == 14
    for layer in layers:
        state = {
            key: tensors[f"{layer}.{key}"]
            for key in ("weight_packed", "weight_scale", "weight_global_scale")
            if f"{layer}.{key}" in tensors
        }
        theirs = compressor.decompress(state, scheme(preset))["weight"]
        codes = state["weight_packed"]
        divisor = state.get("weight_global_scale", torch.ones(1))
        # Repeat their arithmetic on our decoded parts: the scale over the divisor, then the code.
        block_scale = decode_block_scale(state["weight_scale"], fmt).to(torch.bfloat16)
        step = (block_scale / divisor).repeat_interleave(fmt.block_size, 1)
        ours = decode_e2m1(unpack_codes(codes), theirs.dtype) * step
        assert torch.equal(ours.to(theirs.dtype), theirs)
        # And the exact value differs from theirs by their roundings alone (BF16: 2^-9 each).
        exact = BlockScaledWeight(
            codes, state["weight_scale"], (1 / divisor).expand(len(codes)), fmt
        ).dequantize(torch.float64)
        assert ((theirs.double() - exact).abs() <= 3 * 2**-9 * exact.abs()).all()


def test_encoder_is_modelopts(modelopt):
    theirs = modelopt["codes"]
    ours = quantize_nvfp4(modelopt["weight"])
    assert torch.equal(ours.global_scale[:1], modelopt["global_scale"])
    assert torch.equal(
        ours.block_scale.view(torch.uint8), modelopt["block_scale"].view(torch.uint8)
    )
    # ModelOpt drops the sign of an exact zero; values are equal everywhere.
    assert torch.equal(decode_e2m1(unpack_codes(ours.codes)), decode_e2m1(unpack_codes(theirs)))
    assert torch.equal(encode_e2m1(modelopt["ties"]), modelopt["tie_codes"])


def test_dequantisation_is_modelopts(modelopt):
    ours = modelopt_arithmetic(modelopt["codes"], modelopt["block_scale"], modelopt["global_scale"])
    assert torch.equal(ours, modelopt["dequantized"])


def modelopt_arithmetic(codes, block_scale, global_scale):
    """ModelOpt's order of float32 operations, on our decoded parts."""
    step = decode_block_scale(block_scale, NVFP4) * global_scale
    value = decode_e2m1(unpack_codes(codes)) + 0.0  # ModelOpt's table has +0 for code 8
    return value * step.repeat_interleave(value.shape[1] // step.shape[1], 1)


@pytest.mark.parametrize(
    "name", ["nvfp4-kv8-llama", "nvfp4-qwen3", "w4a16-gemma3", "awq-llama", "w4a8-llama"]
)
def test_files_of_modelopt_dequantise_as_modelopt_does(tmp_path, name):
    folder = extract_fixture(f"modelopt/{name}", tmp_path)
    hashes = json.loads((folder / "dequantized.json").read_text())
    tensors = load_file(folder / "model.safetensors")
    layers = json.loads((folder / "config.json").read_text())["num_hidden_layers"]
    assert len(hashes) == 7 * layers
    for layer, wanted in hashes.items():
        parts = [tensors[f"{layer}.{k}"] for k in ("weight", "weight_scale", "weight_scale_2")]
        value = modelopt_arithmetic(*parts).contiguous()
        assert hashlib.sha256(value.numpy().tobytes()).hexdigest() == wanted, layer


def test_block_scales_decode_over_all_bytes():
    every = torch.arange(256, dtype=torch.uint8)
    e4m3 = decode_block_scale(every, NVFP4)
    assert torch.equal(
        e4m3, every.view(torch.float8_e4m3fn).float().where(~e4m3.isnan(), e4m3)
    ) or (e4m3.isnan().nonzero().flatten().tolist() == [127, 255])
    e8m0 = decode_block_scale(every, MXFP4, torch.float64)
    assert e8m0[:255].equal(torch.tensor([2.0 ** (e - 127) for e in range(255)]).double())
    assert e8m0[255].isnan()


@pytest.mark.parametrize("method", ["rtn", "mse"])
def test_quantise_keeps_zero_blocks_and_bounds_the_error(method):
    weight = random_weight(8, 64).float()
    weight[2, 16:32] = 0
    got = quantize_nvfp4(weight, method)
    value = got.dequantize()
    assert (value[2, 16:32] == 0).all()
    assert (got.block_scale.float() > 0).all()
    step = got.block_scale.float().repeat_interleave(16, 1) * got.global_scale[:, None]
    inside = (weight / step).abs() <= 6
    assert ((value - weight).abs() <= step * 1.0001)[inside].all()


def test_mse_never_does_worse_than_rtn_on_any_block():
    weight = random_weight(16, 128).float()

    def error(method):
        value = quantize_nvfp4(weight, method).dequantize(torch.float64)
        return (value - weight.double()).square().view(-1, 16).sum(-1)

    assert (error("mse") <= error("rtn") * (1 + 1e-6)).all()
    assert error("mse").sum() < error("rtn").sum()


def test_all_zero_weight_stays_zero():
    zero = torch.zeros((4, 32))
    assert quantize_nvfp4(zero).dequantize().eq(0).all()
    assert quantize_mxfp4(zero).dequantize().eq(0).all()


@pytest.mark.parametrize("exponent", [-120, -20, 0, 20, 120])
def test_mxfp4_takes_the_scale_of_the_specification(exponent):
    weight = torch.full((1, 32), 2.0**exponent * 1.9, dtype=torch.float32)
    got = quantize_mxfp4(weight)
    assert int(got.block_scale) == exponent - 2 + 127
    # 1.9 * 4 = 7.6 saturates at 6: the scale of the specification clips, it does not round up.
    assert torch.equal(got.dequantize(), torch.full((1, 32), 2.0**exponent * 1.5))


def test_refuses_a_k_that_blocks_do_not_fit():
    with pytest.raises(ValueError, match="multiple of 16"):
        quantize_nvfp4(torch.zeros((2, 24)))
    with pytest.raises(ValueError, match="multiple of 32"):
        quantize_mxfp4(torch.zeros((2, 48)))


def test_fp8_rounding_saturates_and_scales_by_row():
    assert to_e4m3(torch.tensor([500.0, -1e9])).float().tolist() == [448.0, -448.0]
    q, scale = quantize_fp8_per_row(torch.tensor([[1.0, -2.0], [0.0, 0.0]]))
    assert scale.flatten().tolist() == [pytest.approx(2 / 448), 1.0]
    assert torch.equal(q.float() * scale, torch.tensor([[1.0, -2.0], [0.0, 0.0]]))


def test_reference_product_is_exact():
    weight = quantize_nvfp4(random_weight(8, 32).float())
    a = torch.randn(3, 32, dtype=torch.float64)
    bias = torch.randn(8)
    got = reference_linear(a, weight, bias)
    wanted = torch.einsum("mk,nk->mn", a, weight.dequantize(torch.float64)) + bias.double()
    assert torch.allclose(got, wanted, rtol=1e-14, atol=0)


def test_round_is_decode_of_encode():
    bits = torch.arange(-32768, 32768, dtype=torch.int32).to(torch.int16)
    x = bits.view(torch.bfloat16).float()
    x = x[x.isfinite()]
    for tie in torch.tensor([0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0]):
        below, above = torch.nextafter(tie, tie - 1), torch.nextafter(tie, tie + 1)
        x = torch.cat([x, torch.stack([below, tie, above, -below, -tie, -above])])
    assert torch.equal(round_e2m1(x), decode_e2m1(encode_e2m1(x)))
