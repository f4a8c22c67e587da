# SPDX-License-Identifier: Apache-2.0
"""How the weights of a checkpoint become codes: what the writer asks for, and by weights alone."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Protocol

import torch

from vllm_nvfp4.checkpoints.units import Unit
from vllm_nvfp4.numerics.formats import NVFP4
from vllm_nvfp4.numerics.quantize import nvfp4_global_scale, quantize_fp8_per_row, quantize_nvfp4
from vllm_nvfp4.numerics.weight import BlockScaledWeight

# Below torch's grain size: no step of a piece is worth a second thread to it.
_PIECE_ELEMENTS = 32_768


class Quantizer(Protocol):
    """How weights become codes. Called in the order of the units, and of the groups in them."""

    def start(
        self,
        unit: Unit,
        quantized: set[str],
        fp8: set[str],
        representable: Callable[[torch.Tensor], torch.Tensor],
    ) -> None:
        """The unit's weights come next. fp8: those of ``quantized`` that :meth:`quantize_fp8` is
        asked for; representable: what is read back for an NVFP4 global scale near its argument."""

    def quantize(self, weights: Mapping[str, torch.Tensor]) -> dict[str, BlockScaledWeight]:
        """The shards of one fused layer (or one layer), by name, with one representable global
        scale."""

    def input_amax(self, name: str) -> float | None:
        """The largest magnitude among the inputs of a weight just quantised, as the stored weight
        meets them; None where none was seen."""

    def quantize_fp8(
        self, weights: Mapping[str, torch.Tensor]
    ) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
        """The same shards in FP8: codes [N, K] e4m3 and a scale for each row, [N, 1] float32."""

    def finish(self, unit: Unit, weights: Callable[[], dict[str, torch.Tensor]]) -> None:
        """The unit is stored, now or by an earlier run; ``weights()`` dequantises what is there."""


class DataFree:
    """Quantise by the weights alone. method: see quantize_nvfp4."""

    def __init__(self, method: str = "mse") -> None:
        self._method = method

    def start(
        self,
        unit: Unit,
        quantized: set[str],
        fp8: set[str],
        representable: Callable[[torch.Tensor], torch.Tensor],
    ) -> None:
        self._representable = representable

    def quantize(self, weights: Mapping[str, torch.Tensor]) -> dict[str, BlockScaledWeight]:
        largest = torch.stack([nvfp4_global_scale(t) for t in weights.values()]).amax()
        shared = self._representable(largest)
        return {n: quantize_in_pieces(w, self._method, shared) for n, w in weights.items()}

    def quantize_fp8(
        self, weights: Mapping[str, torch.Tensor]
    ) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
        return {name: quantize_fp8_per_row(weight) for name, weight in weights.items()}

    def input_amax(self, name: str) -> float | None:
        return None

    def finish(self, unit: Unit, weights: Callable[[], dict[str, torch.Tensor]]) -> None:
        """Nothing follows."""


def quantize_in_pieces(
    tensor: torch.Tensor, method: str, shared: torch.Tensor
) -> BlockScaledWeight:
    """quantize_nvfp4, on a CPU in pieces of rows that stay in the cache, a thread for each core.

    torch's own threads would meet at a barrier after each of some two hundred small steps.
    """
    if tensor.device.type != "cpu":
        return quantize_nvfp4(tensor, method, shared)
    rows = max(1, _PIECE_ELEMENTS // tensor.shape[1])
    with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
        parts = list(
            pool.map(lambda part: quantize_nvfp4(part, method, shared), tensor.split(rows))
        )
    return BlockScaledWeight(
        torch.cat([p.codes for p in parts]),
        torch.cat([p.block_scale.view(torch.uint8) for p in parts]).view(torch.float8_e4m3fn),
        torch.cat([p.global_scale for p in parts]),
        NVFP4,
    )
