# SPDX-License-Identifier: Apache-2.0
"""Cases that hypothesis draws and shrinks: a configuration with any values in any place, and a
safetensors header of any entries."""

from __future__ import annotations

import json
from typing import Any

from fuzz_files import Node, join_header
from fuzz_mutations import HUGE, NAMES
from hypothesis import strategies as st

WORDS = (
    "quant_method", "quant_algo", "modelopt", "compressed-tensors", "fp_quant", "mxfp4", "NVFP4",
    "NVFP4_AWQ", "MIXED_PRECISION", "FP8", "group_size", "config_groups", "group_0", "targets",
    "weights", "input_activations", "num_bits", "type", "float", "strategy", "tensor_group",
    "format", "nvfp4-pack-quantized", "symmetric", "ignore", "exclude_modules", "lm_head", "Linear",
    "re:.*mlp.*", "quantized_layers", "model.layers.0.mlp.up_proj", "forward_dtype", "nvfp4",
    "hadamard_group_size", "modules_to_not_convert", "kv_cache_scheme", "transform_config",
    "sparsity_config", "apply", "location", "producer", "quantization", "kv_cache_quant_algo",
)  # fmt: skip
_LEAVES = (
    st.none()
    | st.booleans()
    | st.integers(-2, 40)
    | st.sampled_from((HUGE, -HUGE, 2**64, 0.5, 1e308))
    | st.sampled_from((*WORDS, *NAMES))
    | st.text(max_size=8)
)
JSON = st.recursive(
    _LEAVES,
    lambda below: (
        st.lists(below, max_size=4)
        | st.dictionaries(st.sampled_from(WORDS) | st.text(max_size=4), below, max_size=5)
    ),
    max_leaves=12,
)
_COUNTS = st.integers(0, 70) | st.sampled_from((-1, HUGE, 2**63, 2**64, True, 4.0))
_ENTRY = st.fixed_dictionaries(
    {
        "dtype": st.sampled_from(("U8", "F8_E4M3", "F8_E8M0", "F4", "BF16", "F32", "BOOL", "X")),
        "shape": st.lists(_COUNTS, max_size=4) | JSON,
        "data_offsets": st.lists(_COUNTS, min_size=2, max_size=2) | JSON,
    }
)
_TENSOR_NAMES = st.sampled_from(
    [f"model.layers.0.mlp.up_proj.{leaf}" for leaf in ("weight", "weight_scale", "weight_scale_2")]
    + ["model.layers.0.mlp.experts.0.up_proj.weight", "lm_head.weight", *NAMES]
) | st.text(max_size=6)  # fmt: skip


def _as_node(value: Any) -> Node:
    return Node(json.dumps(value).encode("utf-8", "surrogatepass"))


@st.composite
def quantization_configs(draw: Any) -> dict[str, Node]:
    """A config.json whose quantisation is any table, under any of the keys it may have."""
    key = draw(st.sampled_from(("quantization_config", "compression_config", "text_config")))
    table = draw(st.dictionaries(st.sampled_from(WORDS) | st.text(max_size=4), JSON, max_size=8))
    if draw(st.booleans()):
        methods = ("modelopt", "compressed-tensors", "compressed_tensors", "fp_quant", "mxfp4")
        table["quant_method"] = draw(st.sampled_from(methods))
    if draw(st.booleans()):
        return {"hf_quant_config.json": _as_node(table), "config.json": _as_node({})}
    return {"config.json": _as_node({key: table, "num_hidden_layers": draw(JSON)})}


@st.composite
def headers(draw: Any) -> dict[str, Node]:
    """A safetensors file of drawn entries, some of them consistent with each other."""
    header: dict[str, Any] = draw(
        st.dictionaries(_TENSOR_NAMES | st.just("__metadata__"), _ENTRY | JSON, max_size=4)
    )
    size = draw(st.integers(0, 70))
    for name in draw(st.lists(_TENSOR_NAMES, max_size=3, unique=True)):
        length = draw(st.integers(0, 40))
        header[name] = {"dtype": "U8", "shape": [length], "data_offsets": [size, size + length]}
        size += length
    raw = json.dumps(header).encode("utf-8", "surrogatepass")
    return {"model.safetensors": Node(join_header(raw, bytes(size)))}
