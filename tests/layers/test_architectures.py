# SPDX-License-Identifier: Apache-2.0
"""One architecture of each kind that no other test serves, quantised while it loads.

`make models` runs them all, stored ones too. Dense models and mixtures of experts are served by
test_serving and test_experts, experts in stacks by test_stacked_experts.
"""

import pytest

from vllm_nvfp4.cli.main import main
from vllm_nvfp4.testing.architecture import VOCAB_SIZE
from vllm_nvfp4.testing.architectures import ARCHITECTURES, write_architecture
from vllm_nvfp4.testing.media import MEDIA
from vllm_nvfp4.testing.model_sweep import (
    LEAST_CHANGE,
    TOLERANCE,
    Sweep,
    ask_transformers,
    quantised_share,
    serve,
    write_twin,
)

pytestmark = pytest.mark.vllm

# MLA; Mamba-2 and experts without a gate; gated delta nets, of a multimodal model; experts that
# the hub has in turned stacks, of another; sliding windows and tied tables; an encoder of sound.
SAMPLE = {
    "glm4-moe-lite": 0.7,
    "nemotron-h-moe": 0.8,
    "qwen3.5": 0.6,
    "qwen3-vl-moe": 0.6,
    "gemma4": 0.8,
    "whisper": 0.4,
}
# Without a second engine: vLLM and transformers agree on them in float32.
AS_TRANSFORMERS = ("nemotron-h-moe", "qwen3-vl-moe", "gemma4")
# Twice what two kernels in BF16 differ by here.
BF16 = 0.2


def test_embeddings_of_an_encoder_are_those_of_the_dequantised_weights(tmp_path):
    """With every option as it is by default: an encoder has no KV cache to hold in FP8."""
    found = Sweep(ARCHITECTURES["bert"], tmp_path, main).measure("online")
    assert found.reference == "vLLM"
    assert found.share > 0.7
    assert found.deviation < 1e-5


@pytest.mark.parametrize("name", SAMPLE)
def test_log_probabilities_are_those_of_the_dequantised_weights(name, tmp_path):
    architecture = ARCHITECTURES[name]
    media = None if name in AS_TRANSFORMERS else MEDIA.get(name)
    plain = write_architecture(tmp_path / "plain", architecture)
    if media:
        media.write_processor(plain, VOCAB_SIZE)
    answer, matrices = serve(plain, architecture.dtype, media=media)
    assert quantised_share(matrices, plain) > SAMPLE[name]
    assert write_twin(plain, matrices, tmp_path / "twin") == 0
    if name in AS_TRANSFORMERS:
        expected = ask_transformers(tmp_path / "twin", architecture.auto)
    else:
        expected, _ = serve(tmp_path / "twin", architecture.dtype, media=media, quantization=None)
    limit = BF16 if architecture.dtype == "bfloat16" else TOLERANCE["float32"]
    for one, other in zip((answer, *answer.shown), (expected, *expected.shown), strict=True):
        assert one.deviation(other) < limit
    if media:  # another picture, or sound, is another answer
        one, other = answer.shown
        assert one.moves(other) > LEAST_CHANGE
