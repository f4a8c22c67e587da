# SPDX-License-Identifier: Apache-2.0
"""A model's configuration from a GGUF file, with what transformers leaves out as it reads one."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from gguf import GGUFReader

# Sizes that the configurations of several families have, by their keys in a file.
_SIZES = {
    "attention.key_length": "head_dim",
    "attention.sliding_window": "sliding_window",
    "expert_feed_forward_length": "moe_intermediate_size",
    "expert_shared_feed_forward_length": "shared_expert_intermediate_size",
}


def model_config(reader: GGUFReader, values: dict[str, Any]) -> Any:
    """The configuration of transformers' class. values: what transformers reads of the file; the
    scaling of rotary positions among it is left to ``add_rope_scaling``."""
    from transformers import CONFIG_MAPPING
    from transformers.modeling_gguf_pytorch_utils import GGUF_CONFIG_MAPPING

    kind = values["model_type"]
    plain = {key: value for key, value in values.items() if key != "rope_scaling"}
    config = CONFIG_MAPPING[kind].from_dict(plain)
    architecture = reader.fields["general.architecture"].contents()
    for key, attribute in _SIZES.items():
        field = reader.fields.get(f"{architecture}.{key}")
        size = None if field is None else field.contents()
        table: Any = GGUF_CONFIG_MAPPING.get(kind, {})
        if type(size) is int and attribute in config.to_dict() and key not in table:
            setattr(config, attribute, size)
    return config
