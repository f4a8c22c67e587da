# SPDX-License-Identifier: Apache-2.0
"""Layers that a model builds under other names than they have in it.

Zamba2's shared blocks have no number, its mixers those of other layers, and two blocks one name;
its fused layers stand in its mapper of weights alone. Each layer is decided by its own place: an
engine that takes another's for it loads something else, or nothing.
"""

from dataclasses import replace

import pytest

from vllm_nvfp4.cli.main import main
from vllm_nvfp4.testing.architectures import ARCHITECTURES
from vllm_nvfp4.testing.model_sweep import Sweep, quantised_share, serve

pytestmark = pytest.mark.vllm

TINY = ARCHITECTURES["zamba2"]
TWO_BLOCKS = replace(
    TINY,
    keys={**TINY.keys, "num_hidden_layers": 8, "layers_block_type": ["mamba", "hybrid"] * 4,
          "num_mem_blocks": 2},
    rename=(r"layers\.([57])\.shared", lambda found: f"layers.{int(found[1]) - 4}.shared"),
)  # fmt: skip
# A layer whose number another's prefix has, one shard of a fused layer, and adapters.
KEPT = ("model.layers.4.*", "*.v_proj", "*q_adapter_list.0*", "*up_proj_adapter_list.1.1")


@pytest.fixture(scope="module")
def sweep(tmp_path_factory):
    return Sweep(TWO_BLOCKS, tmp_path_factory.mktemp("zamba2"), main)


@pytest.mark.parametrize("dialect", ["modelopt", "compressed-tensors"])
def test_each_layer_is_as_its_own_place_is_stored(dialect, sweep):
    folder = sweep.work / dialect
    ignored = [argument for pattern in KEPT for argument in ("--ignore", pattern)]
    arguments = ["quantize", str(sweep.plain), "-o", str(folder), "--method", "rtn", "--no-check"]
    assert main([*arguments, "--format", dialect, *ignored]) == 0
    found = sweep.measure(dialect)
    assert found.reference == "vLLM"
    assert found.share > 0.5
    assert found.deviation < found.tolerance


def test_the_shared_blocks_are_quantised_while_they_load(sweep):
    _, matrices = serve(sweep.plain, "float32")
    assert quantised_share(matrices, sweep.plain) > 0.9
