# SPDX-License-Identifier: Apache-2.0
"""plan against real vLLM: the bytes that a loaded model holds, and the KV cache it asks for."""

from __future__ import annotations

import os
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from vllm_nvfp4.checkpoints import read_config
from vllm_nvfp4.checkpoints.online import OnlineDialect
from vllm_nvfp4.checkpoints.online_layers import without_vllm
from vllm_nvfp4.checkpoints.validate import validate
from vllm_nvfp4.cli.inspect import held_bytes_of
from vllm_nvfp4.options import Options
from vllm_nvfp4.planning import kv
from vllm_nvfp4.planning.find import built_in, find_shape
from vllm_nvfp4.planning.model import AS_STORED, weights_of
from vllm_nvfp4.testing.checkpoints import extract_fixture, fixture_names, to_gpt_oss_mxfp4
from vllm_nvfp4.testing.engine import ENVIRONMENT
from vllm_nvfp4.testing.tiny_models import VOCAB_SIZE, build_model, write_model

pytestmark = pytest.mark.vllm
_CONTEXT = 128


@pytest.fixture(scope="module")
def load(tmp_path_factory):
    """load(folder, **engine arguments) -> (vLLM's config, the model), without an engine."""
    os.environ.update(ENVIRONMENT)
    import vllm_nvfp4

    vllm_nvfp4.register()
    from vllm.config import set_current_vllm_config
    from vllm.distributed import (
        cleanup_dist_env_and_memory,
        init_distributed_environment,
        initialize_model_parallel,
    )
    from vllm.distributed.parallel_state import destroy_model_parallel
    from vllm.engine.arg_utils import EngineArgs
    from vllm.model_executor.model_loader import get_model
    from vllm.v1.worker.cpu_model_runner import _set_torch_accelerator_to_noop

    _set_torch_accelerator_to_noop()
    store = tmp_path_factory.mktemp("store") / "group"

    def load_one(folder, **options):
        defaults = {"quantization": "nvfp4", "enforce_eager": True, "max_model_len": _CONTEXT,
                    "max_num_batched_tokens": 64, "max_num_seqs": 4,
                    "skip_tokenizer_init": True}  # fmt: skip
        config = EngineArgs(model=str(folder), **(defaults | options)).create_engine_config()
        with set_current_vllm_config(config):
            init_distributed_environment(1, 0, f"file://{store}", 0, "gloo")
            destroy_model_parallel()  # a mixture of experts needs other groups than a dense model
            initialize_model_parallel(1, 1)
            return config, get_model(vllm_config=config)

    yield load_one
    cleanup_dist_env_and_memory()


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("models")

    def folder_of(family):
        folder = root / family
        if not folder.exists():
            _write_latent(folder, family) if "latent" in family else write_model(folder, family)
        return folder

    return folder_of


def _write_latent(folder: Path, family: str) -> None:
    """A tiny model with latent attention, a dense layer, and one with experts."""
    from transformers import AutoModelForCausalLM, DeepseekV2Config

    config = DeepseekV2Config(
        vocab_size=VOCAB_SIZE, hidden_size=64, intermediate_size=128, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=4, max_position_embeddings=256,
        q_lora_rank=64 if family == "latent-q" else None, kv_lora_rank=64, qk_rope_head_dim=32,
        qk_nope_head_dim=32, v_head_dim=32, n_routed_experts=4, num_experts_per_tok=2,
        moe_intermediate_size=64, n_shared_experts=1, first_k_dense_replace=1,
        topk_method="greedy", tie_word_embeddings=False,
    )  # fmt: skip
    model = AutoModelForCausalLM.from_config(config).to(torch.bfloat16)
    model.config.architectures = ["DeepseekV2ForCausalLM"]
    model.save_pretrained(folder)


def held_by(model) -> int:
    """Bytes of a model's parameters, each once.

    vLLM repacks a linear layer that stays in 16 bits on the CPU and leaves an empty weight, and on
    some CPUs a float32 bias; both count as they were.
    """
    from vllm.model_executor.layers.linear import LinearBase, UnquantizedLinearMethod

    total, seen = 0, set()
    for name, parameter in model.named_parameters():
        module = model.get_submodule(name.rpartition(".")[0])
        is_16_bit = isinstance(getattr(module, "quant_method", None), UnquantizedLinearMethod)
        if parameter.numel() == 0 and isinstance(module, LinearBase):
            total += 2 * module.input_size * module.output_size
        elif parameter.data_ptr() not in seen:
            seen.add(parameter.data_ptr())
            total += 2 * parameter.numel() if is_16_bit else parameter.nbytes
    return total


def held_by_inspect(folder) -> int:
    """What ``inspect`` says that the same weights take on a GPU."""
    inventory = validate(folder, *read_config(folder))
    layers = inventory.layers
    if inventory.dialect == OnlineDialect.name:
        layers = without_vllm(folder, layers).settle(layers)
    options, tied = Options.resolve(), inventory.tied_embeddings
    return sum(held_bytes_of(layer, options, tied) for layer in layers)


def on_each_cpu(*values, if_any):
    """Parameters, of which those whose name holds one of these words run on the lesser CPU too."""
    return [
        pytest.param(
            *value, marks=[pytest.mark.cpu_path] if any(w in value[0] for w in if_any) else []
        )
        for value in values
    ]


_FAMILIES = ("llama", "llama-bias", "qwen3", "gemma3", "qwen3_moe", "mixtral", "latent", "latent-q")


@pytest.mark.parametrize(
    ("family", "fmt"),
    on_each_cpu(
        *((f, "nvfp4") for f in _FAMILIES), ("llama", "mxfp4"), ("qwen3_moe", "mxfp4"),
        # vLLM repacks what stays in 16 bits as the CPU wants it, and a bias.
        if_any=("bias", "mixtral", "latent"),
    ),
)  # fmt: skip
def test_weights_are_those_of_the_loaded_model(load, folders, family, fmt, monkeypatch):
    monkeypatch.setenv("VLLM_NVFP4_ONLINE_FORMAT", fmt)
    monkeypatch.setenv("VLLM_NVFP4_ONLINE_METHOD", "rtn")
    folder = folders(family)
    held = held_by(load(folder)[1])
    assert held == weights_of(find_shape(str(folder)), fmt).total
    if "latent" not in family:  # of two layers that are fused there, each is padded by itself
        assert held == held_by_inspect(folder)


def test_gpt_oss_as_stored(load, tmp_path):
    folder = to_gpt_oss_mxfp4(write_model(tmp_path / "gpt-oss", "gpt_oss"))
    held = held_by(load(folder)[1])
    assert held == weights_of(find_shape(str(folder)), AS_STORED).total
    # Its record is [E, 3 I, H]: a global scale for each of 3 I rows, where 2 I + H have one.
    assert held_by_inspect(folder) == held + 2 * 4 * 4 * (128 - 64)


@pytest.mark.parametrize("family", ["llama", "gemma3"])
@pytest.mark.parametrize(
    ("lm_head", "embedding", "attention"),
    [("fp8", "keep", ""), ("nvfp4", "nvfp4", ""), ("keep", "fp8", "bf16")],
)
def test_options_change_the_weights_as_planned(
    load, folders, family, lm_head, embedding, attention, monkeypatch
):
    monkeypatch.setenv("VLLM_NVFP4_ONLINE_METHOD", "rtn")
    options = {"lm_head": lm_head, "embedding": embedding}
    if attention:
        options["online_ignore"] = ["*.self_attn.*"]
    folder = folders(family)
    model = load(folder, additional_config={"nvfp4": options})[1]
    shape = find_shape(str(folder))
    planned = weights_of(shape, "nvfp4", lm_head, embedding, 1, attention)
    assert held_by(model) == planned.total


@pytest.mark.parametrize(
    "name",
    on_each_cpu(
        *((name,) for name in fixture_names()),
        ("moe_modelopt/nvfp4-qwen3",), ("moe_compressed_tensors/nvfp4a16-qwen3",),
        if_any=("kv8", "mixed", "moe_modelopt"),
    ),
)  # fmt: skip
def test_weights_of_a_quantised_checkpoint(load, name, tmp_path):
    folder = extract_fixture(name, tmp_path)
    shape = find_shape(str(folder))
    held = held_by(load(folder)[1])
    assert held == weights_of(shape, AS_STORED).total
    # Scales of the KV cache are stored as tensors and held as attributes.
    assert 0 <= held_by_inspect(folder) - held <= 8


def kv_of(config, specs) -> int:
    """Bytes of one sequence of max_model_len tokens, by vLLM's own code."""
    from vllm.v1.core.kv_cache_utils import (
        _max_memory_usage_bytes_from_groups,
        get_kv_cache_groups,
    )

    # Which of the layouts it is does not change sizes; the engine would choose one.
    config.cache_config.kv_cache_layout = "LBNHC"
    return _max_memory_usage_bytes_from_groups(config, get_kv_cache_groups(config, specs))


@pytest.mark.parametrize("family", ["llama", "gemma3", "latent"])
@pytest.mark.parametrize(("dtype", "bits"), [("fp8", 8), ("bfloat16", 16)])
def test_kv_bytes_of_a_loaded_model(load, folders, family, dtype, bits):
    from vllm.config import set_current_vllm_config
    from vllm.model_executor.layers.attention_layer_base import AttentionLayerBase

    config, _ = load(folders(family), kv_cache_dtype=dtype, quantization=None)
    with set_current_vllm_config(config):
        specs = {
            name: layer.get_kv_cache_spec(config)
            for name, layer in config.compilation_config.static_forward_context.items()
            if isinstance(layer, AttentionLayerBase)
        }
    specs = {name: spec for name, spec in specs.items() if spec is not None}
    block = next(iter(specs.values())).block_size
    planned = kv.sequence_bytes(
        find_shape(str(folders(family))), _CONTEXT, bits, config.max_in_flight_tokens, 1, block
    )
    assert kv_of(config, specs) == planned


@pytest.fixture(scope="module")
def any_config(load, folders):
    config, _ = load(folders("llama"))
    config.scheduler_config.disable_hybrid_kv_cache_manager = False
    return config


@pytest.mark.parametrize("name", list(built_in()))
@pytest.mark.parametrize("context", [1000, 32768])
def test_kv_bytes_of_the_built_in_models(any_config, name, context):
    """vLLM's groups and blocks for each model's windows, from its own specs on two cards."""
    from vllm.v1.kv_cache_interface import FullAttentionSpec, SlidingWindowSpec

    shape = find_shape(name)
    any_config.model_config = SimpleNamespace(max_model_len=context)
    common = {"block_size": kv.BLOCK_SIZE, "num_kv_heads": shape.num_key_value_heads // 2,
              "head_size": shape.head_dim, "dtype": torch.float8_e4m3fn}  # fmt: skip
    specs = {
        f"layer.{i}": SlidingWindowSpec(sliding_window=w, **common)
        if w
        else FullAttentionSpec(**common)
        for i, w in enumerate(shape.windows)
    }
    planned = kv.sequence_bytes(shape, context, 8, any_config.max_in_flight_tokens, cards=2)
    assert kv_of(any_config, specs) == planned


def test_transformers_agrees_that_nothing_else_has_weights(folders):
    """A model that plan knows has no tensor that plan does not count."""
    for family in ("llama", "qwen3_moe", "gemma3"):
        count = sum(p.numel() for p in build_model(family).parameters())
        shape = find_shape(str(folders(family)))
        tables = (1 if shape.tie_word_embeddings else 2) * shape.vocab_size * shape.hidden_size
        assert count == shape.num_weights() + tables + shape.num_other
