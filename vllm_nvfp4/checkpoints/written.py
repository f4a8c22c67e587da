# SPDX-License-Identifier: Apache-2.0
"""The layouts in which NVFP4 checkpoints are written here: tensor names, values, config.json.

ModelOpt, per quantised layer P of shape [N, K]:
    P.weight              uint8 [N, K/2], the low nibble holds even k
    P.weight_scale        float8_e4m3fn [N, K/16]; multiplies
    P.weight_scale_2      float32 []; multiplies, one value for all the shards of a fused layer
compressed-tensors:
    P.weight_packed       uint8 [N, K/2], the low nibble holds even k
    P.weight_scale        float8_e4m3fn [N, K/16]; multiplies
    P.weight_global_scale float32 [1]; divides, one value for all the shards of a fused layer
FP8 beside NVFP4, in ModelOpt's MIXED_PRECISION (FP8_PER_CHANNEL_PER_TOKEN) or compressed-tensors'
mixed-precision (float-quantized):
    P.weight              float8_e4m3fn [N, K]
    P.weight_scale        float32 [N, 1]; multiplies
FP-Quant, whose weights are rotated along K by a Hadamard matrix of size g, in blocks:
    P.qweight             uint8 [N, K/2], the low nibble holds even k
    P.scales              uint8 [N, K/16], the bits of float8_e4m3fn; multiplies
    P.weight_global_scale bfloat16 [1]; divides, one value for all the shards of a fused layer
    P.act_global_scale    bfloat16 [1]; divides, for engines that round the inputs to NVFP4 too
    P.forward_hadamard_matrix, P.backward_hadamard_matrix  bfloat16 [g, g]
All but FP-Quant are weights only (W4A16): they store no scale of the activations. Sources: NVIDIA
ModelOpt's Hugging Face export (W4A16_NVFP4), llm-compressor's NVFP4A16, fp_quant 0.3.2.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from vllm_nvfp4.checkpoints.model_class import BLOCK
from vllm_nvfp4.checkpoints.source import TensorInfo
from vllm_nvfp4.numerics.formats import NVFP4
from vllm_nvfp4.numerics.hadamard import hadamard, rotate_blocks
from vllm_nvfp4.numerics.quantize import nvfp4_scale_from_amax
from vllm_nvfp4.numerics.weight import BlockScaledWeight


@dataclass(frozen=True)
class StoredFormat:
    """name: of the dialect; codes, global_scale: tensor names after the layer's; is_divisor: the
    global scale divides and has shape [1], else it multiplies and is a scalar; config: of the names
    of what is left out; mixed_config: of the names of layers in NVFP4, in FP8 and left out"""

    name: str
    codes: str
    global_scale: str
    is_divisor: bool
    config: Callable[[Sequence[str]], dict[str, Any]]
    mixed_config: Callable[[Sequence[str], Sequence[str], Sequence[str]], dict[str, Any]]

    def entries(self, layer: str, shape: Sequence[int]) -> dict[str, TensorInfo]:
        """What is stored for a layer of shape [N, K], in order."""
        rows, cols = shape
        return {
            f"{layer}.{self.codes}": TensorInfo("U8", (rows, cols // 2)),
            f"{layer}.weight_scale": TensorInfo("F8_E4M3", (rows, cols // NVFP4.block_size)),
            f"{layer}.{self.global_scale}": TensorInfo("F32", (1,) if self.is_divisor else ()),
        }

    def representable(self, global_scale: torch.Tensor) -> torch.Tensor:
        """The multiplier that is read back for one near ``global_scale``."""
        return 1.0 / (1.0 / global_scale) if self.is_divisor else global_scale

    def tensors(
        self, layer: str, weight: BlockScaledWeight, input_amax: float | None = None
    ) -> dict[str, torch.Tensor]:
        """The tensors of :meth:`entries`. The weight's rows have one global scale. input_amax: the
        largest magnitude among the inputs, if known; only FP-Quant stores something of it."""
        scale = weight.global_scale[0]
        return {
            f"{layer}.{self.codes}": weight.codes,
            f"{layer}.weight_scale": weight.block_scale,
            f"{layer}.{self.global_scale}": (1.0 / scale)[None] if self.is_divisor else scale,
        }

    def dequantize(self, layer: str, load: Callable[[str], torch.Tensor]) -> torch.Tensor:
        """The stored layer as numbers, [N, K] float32. load: a tensor by name."""
        codes = load(f"{layer}.{self.codes}")
        scale = load(f"{layer}.{self.global_scale}").reshape(())
        scale = 1.0 / scale if self.is_divisor else scale
        block_scale = load(f"{layer}.weight_scale")
        return BlockScaledWeight(codes, block_scale, scale.expand(len(codes)), NVFP4).dequantize()


@dataclass(frozen=True)
class FpQuantFormat:
    """As :class:`StoredFormat`; weights come rotated. size: of the Hadamard matrix."""

    size: int
    name: str = "fp-quant"

    def entries(self, layer: str, shape: Sequence[int]) -> dict[str, TensorInfo]:
        rows, cols = shape
        rotation = TensorInfo("BF16", (self.size, self.size))
        return {
            f"{layer}.qweight": TensorInfo("U8", (rows, cols // 2)),
            f"{layer}.scales": TensorInfo("U8", (rows, cols // NVFP4.block_size)),
            f"{layer}.weight_global_scale": TensorInfo("BF16", (1,)),
            f"{layer}.act_global_scale": TensorInfo("BF16", (1,)),
            f"{layer}.forward_hadamard_matrix": rotation,
            f"{layer}.backward_hadamard_matrix": rotation,
        }

    def representable(self, global_scale: torch.Tensor) -> torch.Tensor:
        return 1.0 / (1.0 / global_scale).bfloat16().float()

    def tensors(
        self, layer: str, weight: BlockScaledWeight, input_amax: float | None = None
    ) -> dict[str, torch.Tensor]:
        rotation = hadamard(self.size).bfloat16()
        if not input_amax:
            raise ValueError(f"{layer}: input_amax is {input_amax}; FP-Quant needs it above 0")
        inputs = 1.0 / nvfp4_scale_from_amax(torch.tensor([input_amax]))
        return {
            f"{layer}.qweight": weight.codes,
            f"{layer}.scales": weight.block_scale.view(torch.uint8),
            f"{layer}.weight_global_scale": (1.0 / weight.global_scale[:1]).bfloat16(),
            f"{layer}.act_global_scale": inputs.bfloat16(),
            f"{layer}.forward_hadamard_matrix": rotation,
            f"{layer}.backward_hadamard_matrix": rotation,
        }

    def dequantize(self, layer: str, load: Callable[[str], torch.Tensor]) -> torch.Tensor:
        """The stored layer as numbers before the rotation, [N, K] float32."""
        codes = load(f"{layer}.qweight")
        scale = 1.0 / load(f"{layer}.weight_global_scale").float()
        block_scale = load(f"{layer}.scales").view(torch.float8_e4m3fn)
        weight = BlockScaledWeight(codes, block_scale, scale.expand(len(codes)), NVFP4)
        return rotate_blocks(weight.dequantize(), hadamard(self.size))

    def config(self, ignore: Sequence[str]) -> dict[str, Any]:
        return {
            "backward_dtype": "bf16",
            "forward_dtype": "nvfp4",
            "forward_method": "abs_max",
            "hadamard_group_size": self.size,
            "modules_to_not_convert": list(ignore),
            "pseudoquantization": False,
            "quant_method": "fp_quant",
            "store_master_weights": False,
            "transform_init": "hadamard",
        }


class Fp8Format:
    """FP8 with one scale for each row; the same three functions as :class:`StoredFormat`."""

    def entries(self, layer: str, shape: Sequence[int]) -> dict[str, TensorInfo]:
        """What is stored for a layer of shape [N, K], in order."""
        return {
            f"{layer}.weight": TensorInfo("F8_E4M3", tuple(shape)),
            f"{layer}.weight_scale": TensorInfo("F32", (shape[0], 1)),
        }

    def tensors(
        self, layer: str, codes: torch.Tensor, scale: torch.Tensor
    ) -> dict[str, torch.Tensor]:
        """The tensors of :meth:`entries`. codes: [N, K] e4m3; scale: [N, 1] float32."""
        return {f"{layer}.weight": codes, f"{layer}.weight_scale": scale}

    def dequantize(self, layer: str, load: Callable[[str], torch.Tensor]) -> torch.Tensor:
        """The stored layer as numbers, [N, K] float32. load: a tensor by name."""
        return load(f"{layer}.weight").float() * load(f"{layer}.weight_scale")


FP8 = Fp8Format()


def _modelopt_mixed_config(
    nvfp4: Sequence[str], fp8: Sequence[str], ignore: Sequence[str]
) -> dict[str, Any]:
    four = {"dynamic": False, "num_bits": 4, "type": "float", "group_size": NVFP4.block_size}
    eight = {"dynamic": False, "num_bits": 8, "type": "float"}
    inputs = {"dynamic": True, "num_bits": 8, "type": "float"}
    layers: dict[str, dict[str, Any]] = {
        name: {"quant_algo": "W4A16_NVFP4", "group_size": NVFP4.block_size} for name in nvfp4
    }
    layers |= {name: {"quant_algo": "FP8_PER_CHANNEL_PER_TOKEN"} for name in fp8}
    return {
        "config_groups": {
            "group_0": {"weights": four, "targets": list(nvfp4)},
            "group_1": {"weights": eight, "input_activations": inputs, "targets": list(fp8)},
        },
        "ignore": list(ignore),
        "quant_algo": "MIXED_PRECISION",
        "quantized_layers": layers,
        "producer": {"name": "vllm-nvfp4"},
        "quant_method": "modelopt",
    }


def _modelopt_config(ignore: Sequence[str]) -> dict[str, Any]:
    weights = {"dynamic": False, "num_bits": 4, "type": "float", "group_size": NVFP4.block_size}
    return {
        "config_groups": {"group_0": {"weights": weights, "targets": ["Linear"]}},
        "ignore": list(ignore),
        "quant_algo": "W4A16_NVFP4",
        "producer": {"name": "vllm-nvfp4"},
        "quant_method": "modelopt",
    }


def _compressed_tensors_config(ignore: Sequence[str]) -> dict[str, Any]:
    return _compressed_tensors({"group_0": _FOUR}, _FOUR["format"], ignore)


def _compressed_tensors_mixed_config(
    nvfp4: Sequence[str], fp8: Sequence[str], ignore: Sequence[str]
) -> dict[str, Any]:
    """A name goes before a class: what FP8's group does not name is NVFP4, an embedding and lm_head
    where NVFP4's does."""
    four = _FOUR | {"targets": ["Linear", *(n for n in nvfp4 if BLOCK.match(n) is None)]}
    eight = {
        "format": "float-quantized",
        "targets": list(fp8),
        "weights": _EIGHT | {"strategy": "channel", "dynamic": False},
        "input_activations": _EIGHT | {"strategy": "token", "dynamic": True},
    }
    groups = {"group_0": four} if nvfp4 or not fp8 else {}
    groups |= {"group_1": eight} if fp8 else {}
    return _compressed_tensors(groups, "mixed-precision", ignore)


_EIGHT = {"num_bits": 8, "type": "float", "symmetric": True}
_FOUR: dict[str, Any] = {
    "format": "nvfp4-pack-quantized",
    "targets": ["Linear"],
    "weights": {
        "dynamic": False,
        "group_size": NVFP4.block_size,
        "num_bits": 4,
        "scale_dtype": "torch.float8_e4m3fn",
        "strategy": "tensor_group",
        "symmetric": True,
        "type": "float",
    },
    "input_activations": None,
}


def _compressed_tensors(
    groups: dict[str, Any], layout: str, ignore: Sequence[str]
) -> dict[str, Any]:
    return {
        "config_groups": groups,
        "format": layout,
        "ignore": list(ignore),
        "quant_method": "compressed-tensors",
        "quantization_status": "compressed",
    }


FORMATS = {
    f.name: f
    for f in (
        StoredFormat(
            "modelopt", "weight", "weight_scale_2", False, _modelopt_config, _modelopt_mixed_config
        ),
        StoredFormat(
            "compressed-tensors",
            "weight_packed",
            "weight_global_scale",
            True,
            _compressed_tensors_config,
            _compressed_tensors_mixed_config,
        ),
    )
}
