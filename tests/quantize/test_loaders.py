# SPDX-License-Identifier: Apache-2.0
"""What other loaders make of a folder: stock vLLM's configurations, transformers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from made_once import made_once
from quantizing import transformers_reading, write_with_tokenizer

from vllm_nvfp4.checking.check import engine_arguments, load_alone
from vllm_nvfp4.checkpoints.detect import read_config
from vllm_nvfp4.cli.main import main
from vllm_nvfp4.compat import cpu_metadata

# Prefixes of a wrapper, a pair of latent attention, gated delta nets, Mamba-2, stacks.
STOCK = ("qwen3", "qwen3_moe", "qwen3_vl_moe", "glm47_flash", "qwen3_next", "granite4")


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """models(family) -> the folder of a tiny model with a tokenizer, made once."""
    return made_once(tmp_path_factory.mktemp("models"), write_with_tokenizer)


def quantized(models, tmp_path: Path, family: str, dialect: str) -> Path:
    target = tmp_path / dialect
    arguments = ["quantize", str(models(family)), "-o", str(target), "--method", "rtn"]
    assert main([*arguments, "--format", dialect, "--no-check"]) == 0
    return target


def built(folder: Path) -> Any:
    """vLLM's model of a folder, loaded without its data."""
    return load_alone(engine_arguments(str(folder), ["--enforce-eager"])).model


@pytest.mark.vllm
@pytest.mark.parametrize("family", STOCK)
def test_stock_vllm_excludes_what_is_in_16_bits_and_nothing_else(models, tmp_path, family):
    """vLLM's own two configurations, asked about every linear layer and every experts module."""
    from vllm.model_executor.layers.linear import LinearBase
    from vllm.model_executor.layers.quantization.compressed_tensors import utils
    from vllm.model_executor.layers.quantization.compressed_tensors.compressed_tensors import (
        CompressedTensorsConfig,
    )
    from vllm.model_executor.layers.quantization.modelopt import ModelOptNvFp4Config

    from vllm_nvfp4.compat import versions

    cpu_metadata.apply()
    folder = quantized(models, tmp_path, family, "modelopt")
    model = built(folder)
    stock = ModelOptNvFp4Config.from_config(read_config(folder)[1])
    other = quantized(models, tmp_path, family, "compressed-tensors")
    compressed = CompressedTensorsConfig.from_config(read_config(other)[1])
    for config in (stock, compressed):
        config.packed_modules_mapping = getattr(model, "packed_modules_mapping", {})
        if (mapper := getattr(model, "hf_to_vllm_mapper", None)) is not None:
            config.apply_vllm_mapper(mapper)
    asked: dict[bool, list[str]] = {True: [], False: []}
    for name, module in model.named_modules():
        if not isinstance(module, LinearBase) and not versions.is_moe_layer(module):
            continue
        # What vLLM builds without a configuration asks none.
        prefix = getattr(module, "prefix", "") or getattr(module, "layer_name", "")
        if not prefix or getattr(module, "quant_config", None) is None:
            continue
        spec = getattr(module.quant_method, "spec", None)
        is_kept = spec is None or not spec.is_quantized
        asked[is_kept].append(prefix)
        assert stock.is_layer_excluded(prefix) == is_kept, (name, prefix)
        if isinstance(module, LinearBase):
            mapping = compressed.packed_modules_mapping
            ignored = utils.should_ignore_layer(prefix, compressed.ignore, mapping)
            assert ignored == is_kept, (name, prefix)
    assert asked[True] or family in ("qwen3", "glm47_flash", "granite4")
    assert len(asked[False]) >= 4


@pytest.mark.parametrize("family", ["qwen3", "qwen3_moe"])
def test_what_transformers_makes_of_a_folder_is_said(models, tmp_path, capfd, family):
    """With its own load, and the logits, as the judge."""
    arguments = ["quantize", str(models(family)), "--method", "rtn", "-o", str(tmp_path / "out")]
    assert main([*arguments, "--format", "compressed-tensors"]) == 0
    said = "".join(capfd.readouterr())
    left_out, is_near = transformers_reading(tmp_path / "out", models(family))
    assert ("checked: transformers" in said) == (is_near and not left_out)
    assert ("reads it wrongly" in said) == (not is_near)
    assert is_near or family == "qwen3_moe"
