# SPDX-License-Identifier: Apache-2.0
"""Six architectures of `make models`, one for each kind of layer, against stock vLLM."""

import pytest
import vision_classes

from vllm_nvfp4.testing.architectures import ARCHITECTURES
from vllm_nvfp4.testing.model_sweep import TOLERANCE, Sweep

KINDS = {
    "gpt-oss": "online",  # stacked experts with biases, rows in turns
    "llama4": "online",  # stacked experts, the router's weight on their input, a vision tower
    "nemotron-h-moe": "online",  # Mamba-2, experts without a gate
    "qwen3.5": "compressed-tensors",  # gated delta nets
    "glm4-moe-lite": "modelopt",  # multi-head latent attention
    "gemma4-moe": "modelopt",  # head sizes that differ
}


@pytest.mark.vllm
@pytest.mark.parametrize("name", KINDS)
def test_the_log_probabilities_of_stock_vllm(name, tmp_path):
    vision_classes.install()
    architecture = ARCHITECTURES[name]
    found = Sweep(architecture, tmp_path).measure(KINDS[name])
    assert found.deviation < TOLERANCE[architecture.dtype]
    assert found.share > 0.2
