# SPDX-License-Identifier: Apache-2.0
"""A weight as the tensors of a form that checkpoints have, and what they are worth."""

import torch

from vllm_nvfp4.numerics.quantize import quantize_fp8_per_row, quantize_nvfp4
from vllm_nvfp4.testing.checkpoints import edit_json, edit_tensors

INPUT_SCALE = 0.01
_TILE = 32


def stored_as(form, weight):
    """(tensors by their names after the layer's, what they are worth, float32) of [N, K]."""
    weight = weight.float()
    if form == "bf16":
        return {"weight": weight.bfloat16()}, weight
    if form == "awq":
        pre_scale = 0.5 + torch.arange(weight.shape[1]) / weight.shape[1]
        tensors, value = stored_as("nvfp4", weight / pre_scale)
        return tensors | {"pre_quant_scale": pre_scale}, value * pre_scale
    return _in_8_bits(form, weight) if "8" in form else _in_4_bits(form, weight)


def _in_8_bits(form, weight):
    if form == "fp8row":
        codes, scale = quantize_fp8_per_row(weight)
        return {"weight": codes, "weight_scale": scale}, codes.float() * scale
    if form == "fp8":
        scale = weight.abs().max() / 448
        codes = (weight / scale).to(torch.float8_e4m3fn)
        scales = {"weight_scale": scale, "input_scale": torch.tensor(INPUT_SCALE)}
        return {"weight": codes, **scales}, codes.float() * scale
    if form == "fp8block":
        tiles = weight.unflatten(0, (-1, _TILE)).unflatten(2, (-1, _TILE)).abs().amax((1, 3)) / 448
        tiles = tiles.clamp(min=2.0**-100)
        full = tiles.repeat_interleave(_TILE, 0).repeat_interleave(_TILE, 1)
        codes = (weight / full).to(torch.float8_e4m3fn)
        return {"weight": codes, "weight_scale_inv": tiles}, codes.float() * full
    if form == "mxfp8":
        amax = weight.unflatten(1, (-1, 32)).abs().amax(2).clamp(min=2.0**-100)
        exponent = torch.floor(torch.log2(amax)).int() - 8
        full = torch.ldexp(torch.ones(()), exponent).repeat_interleave(32, 1)
        codes = (weight / full).clamp(-448, 448).to(torch.float8_e4m3fn)
        tensors = {"weight": codes, "weight_scale": (exponent + 127).to(torch.uint8)}
        return tensors, codes.float() * full
    raise ValueError(form)


def _in_4_bits(form, weight):
    quantized = quantize_nvfp4(weight, "rtn")
    codes, scales = quantized.codes, quantized.block_scale
    global_scale, value = quantized.global_scale[0].reshape(()), quantized.dequantize()
    if form in ("ct", "ct16"):
        divisor = (1 / global_scale.double()).float().reshape(1)
        names = ("weight_packed", "weight_scale", "weight_global_scale")
        tensors = dict(zip(names, (codes, scales, divisor), strict=True))
        if form == "ct":
            tensors["input_global_scale"] = torch.tensor([1 / INPUT_SCALE])
        return tensors, value
    tensors = {"weight": codes, "weight_scale": scales, "weight_scale_2": global_scale}
    if form == "nvfp4":
        tensors["input_scale"] = torch.tensor(INPUT_SCALE)
    elif form != "w4a16":
        raise ValueError(form)
    return tensors, value


def store(folder, decide, config, strays=()):
    """Write the model of a folder with each weight [N, K] in the form ``decide(its name)``."""

    def edit(tensors):
        for name in [n for n in tensors if n.endswith(".weight") and tensors[n].dim() == 2]:
            layer = name.removesuffix(".weight")
            stored, _ = stored_as(decide(layer), tensors.pop(name))
            tensors |= {f"{layer}.{leaf}": tensor for leaf, tensor in stored.items()}
        for name in strays:
            tensors[name] = torch.tensor(INPUT_SCALE)

    edit_json(folder / "config.json", lambda c: c.update(quantization_config=config))
    return edit_tensors(folder, edit)
