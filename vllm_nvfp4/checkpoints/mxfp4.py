# SPDX-License-Identifier: Apache-2.0
"""``quant_method: mxfp4``, the format of gpt-oss: experts only, stacked over the expert dimension.

It stores ``experts.gate_up_proj_blocks`` uint8 [E, 2I, K/32, 16] and ``..._scales`` [E, 2I, K/32];
its linear layers are BF16. MXFP4 linear layers come in the compressed-tensors, FP-Quant and
ModelOpt dialects.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NoReturn

from vllm_nvfp4.checkpoints.spec import CheckpointError


def refuse_experts_only(config: Mapping[str, Any]) -> NoReturn:
    """Raise the CheckpointError for a gpt-oss style checkpoint. Its experts are not served yet."""
    raise CheckpointError(
        "config.json (quantization_config)",
        "quant_method",
        f"{config.get('quant_method')!r} (gpt-oss: MXFP4 experts, BF16 linear layers)",
        "NVFP4 or MXFP4 linear layers, and a tensor for each expert",
        "Experts stacked in one tensor are not supported yet; serve it with vLLM's own mxfp4 "
        "method, without --quantization nvfp4.",
    )
