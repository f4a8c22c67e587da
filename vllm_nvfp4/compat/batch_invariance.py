# SPDX-License-Identifier: Apache-2.0
"""vLLM's batch-invariant mode on a CPU."""

from __future__ import annotations

from vllm_nvfp4.compat import versions


def install() -> None:
    """Let ``VLLM_BATCH_INVARIANT=1`` run on a CPU.

    There vLLM registers its Triton reductions for CPU tensors, and the first mean ends with a
    TypeError: Triton has no CPU backend. torch's own take each row by itself on a CPU, and so do
    the products of this plugin and vLLM's attention (tests/layers/test_batch_invariance.py).
    """
    from vllm.platforms import current_platform

    if not current_platform.is_cpu() or (module := versions.batch_invariant_module()) is None:
        return
    module.enable_batch_invariant_mode = lambda: None
