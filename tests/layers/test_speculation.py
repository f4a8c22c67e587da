# SPDX-License-Identifier: Apache-2.0
"""Speculative decoding: the same tokens, and a draft that is the target is nearly always right."""

import re
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file
from serving_cases import KEEP_KV, NUM_TOKENS, PROMPT, layer_of
from stored_forms import store
from vllm import SamplingParams
from vllm.model_executor.layers.linear import LinearBase

from vllm_nvfp4.checkpoints.modelopt import ALGOS
from vllm_nvfp4.checkpoints.spec import UNQUANTIZED, CheckpointError
from vllm_nvfp4.layers.embedding import Vocabulary, lm_head_method
from vllm_nvfp4.options import Options
from vllm_nvfp4.testing.checkpoints import edit_json, edit_tensors, extract_fixture
from vllm_nvfp4.testing.drafts import make_predictable, write_eagle3
from vllm_nvfp4.testing.engine import engine
from vllm_nvfp4.testing.tiny_models import write_model

pytestmark = pytest.mark.vllm

AHEAD = 3


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    return {
        "stored": extract_fixture("modelopt/w4a16-llama", folder),
        "16 bits": write_model(folder / "dense", "llama"),
        "other": write_model(folder / "other", "llama", seed=7),
    }


PREDICTABLE = {
    "dtype": "float32",
    "additional_config": KEEP_KV,
    "disable_log_stats": False,
    "skip_tokenizer_init": True,
}


def greedy_tokens(llm):
    parameters = SamplingParams(
        temperature=0, max_tokens=NUM_TOKENS, ignore_eos=True, detokenize=False
    )
    request = {"prompt_token_ids": PROMPT}
    return list(llm.generate([request], parameters, use_tqdm=False)[0].outputs[0].token_ids)


def ask(folder, speculative=None, **options):
    """(greedy tokens, drafted tokens that were taken, drafted)."""
    with engine(folder, **PREDICTABLE | options, speculative_config=speculative) as llm:
        return greedy_tokens(llm), *counted(llm)


def counted(llm):
    counts = {m.name: getattr(m, "value", 0) for m in llm.get_metrics()}
    spec = "vllm:spec_decode_num"
    return [int(counts.get(f"{spec}_{n}_tokens", 0)) for n in ("accepted", "draft")]


@pytest.mark.parametrize("form", ["stored", "16 bits"])
def test_a_draft_that_is_the_target_is_taken(form, folders):
    """Both are read, or quantised while they load, to the same numbers; another draft is not."""
    target = folders[form]
    options = {"method": "draft_model", "quantization": "nvfp4", "num_speculative_tokens": AHEAD}
    alone, *_ = ask(target)
    tokens, taken, drafted = ask(target, options | {"model": str(target)})
    assert tokens == alone
    assert taken > 0.9 * drafted
    assert drafted >= NUM_TOKENS // (AHEAD + 1)
    if form == "stored":
        tokens, taken, drafted = ask(target, options | {"model": str(folders["other"])})
        assert tokens == alone
        assert taken < 0.5 * drafted


def renamed(tensors, stem, root):
    for name in [n for n in tensors if n != "lm_head.weight"]:
        tensors[root + name.replace("midlayer.", stem)] = tensors.pop(name)


def as_older(tensors, family):
    """An EAGLE-3 draft's tensors as EAGLE has them: its fc hands the embedding on."""
    left_out = r"^norm|\.input_" if family == "Llama" else "embed"
    for name in list(tensors):
        tensor = tensors.pop(name)
        if not re.search(f"{left_out}|hidden_norm|lm_head", name):
            cols = 128 if name == "fc.weight" else 64 if re.search("[qkv]_proj", name) else None
            tensors[name.replace("midlayer", "layers.0")] = tensor[..., :cols].contiguous()


@pytest.mark.parametrize(
    ("quantization", "root", "older"),
    [(None, "", ""), ("nvfp4", "", ""), (None, "model.", ""), (None, "model.", "Llama"),
     ("nvfp4", "", "Mistral"), (None, "", "Llama")],
)  # fmt: skip
def test_an_eagle_draft_beside_a_quantised_target(quantization, root, older, tmp_path):
    """In 16 bits, and quantised while it loads; under the names of a draft and of a whole model."""
    target = write_model(tmp_path / "target", "llama")
    edit_tensors(target, make_predictable)
    draft = write_eagle3(tmp_path / "draft", target, load_file(target / "model.safetensors"))
    speculative = {"method": "eagle3", "model": str(draft), "num_speculative_tokens": 1}
    speculative["quantization"] = quantization
    if older:
        speculative["method"] = "eagle"
        kind = {"architectures": [f"{older}ForCausalLM"], "model_type": older.lower()}
        edit_json(draft / "config.json", lambda config: config.update(kind))
        edit_tensors(draft, lambda tensors: as_older(tensors, older))
    edit_tensors(
        draft, lambda tensors: renamed(tensors, "layers.0." if root else "midlayer.", root)
    )
    alone, *_ = ask(target)
    tokens, taken, drafted = ask(target, speculative)
    assert tokens == alone
    assert taken == drafted >= NUM_TOKENS // 2
    if root:
        return
    edit_tensors(draft, shuffle_first_projection)
    tokens, taken, drafted = ask(target, speculative)
    assert tokens == alone
    assert taken <= drafted // 10


def names_of_draft(llm):
    """What became of each linear layer of the draft: by its last name, the method."""
    runner = llm.llm_engine.engine_core.engine_core.model_executor.driver_worker.worker.model_runner
    model = runner.drafter.model
    layers = {n: m for n, m in model.named_modules() if isinstance(m, LinearBase)}
    return {n.rpartition(".")[2]: type(m.quant_method).__name__ for n, m in layers.items()}


PLAIN, ONLINE = "UnquantizedLinearMethod", "NvFp4OnlineLinearMethod"
CT_SAYS_ALL = {
    "quant_method": "compressed-tensors", "format": "nvfp4-pack-quantized", "ignore": ["lm_head"],
    "config_groups": {"group_0": {"targets": ["Linear"], "weights": {
        "num_bits": 4, "type": "float", "strategy": "tensor_group", "group_size": 16,
        "symmetric": True}}},
}  # fmt: skip
# The form of each layer; what serves the layers. No list of the configuration names one.
OWN = {
    "q_proj": "nvfp4", "k_proj": "nvfp4", "v_proj": "nvfp4", "o_proj": "bf16", "gate_proj": "fp8",
    "up_proj": "bf16",
}  # fmt: skip
SERVED = {
    "qkv_proj": "NvFp4LinearMethod", "o_proj": PLAIN, "gate_up_proj": "WidenedLinearMethod",
    "down_proj": "NvFp4LinearMethod", "fc": "NvFp4LinearMethod",
}  # fmt: skip


@pytest.mark.parametrize(
    ("form", "stem"),
    [("stored", "midlayer."), ("stored", "layers.0."), ("stored", "model.layers.0."),
     ("16 bits", "model.layers.0.")],
)  # fmt: skip
def test_an_eagle_3_draft_with_a_configuration_of_its_own(form, stem, tmp_path):
    """vLLM counts its layers on from the target's, and its files call them otherwise."""
    target = write_model(tmp_path / "target", "llama")
    edit_tensors(target, make_predictable)
    draft = write_eagle3(tmp_path / "draft", target, load_file(target / "model.safetensors"))
    root = "model." if stem.startswith("model.") else ""
    edit_tensors(draft, lambda tensors: renamed(tensors, stem.removeprefix(root), root))
    ignored = [f"{stem}self_attn.*", "*.down_proj"]
    served = {"qkv_proj": PLAIN, "o_proj": PLAIN, "gate_up_proj": ONLINE, "down_proj": PLAIN}
    served["fc"] = PLAIN  # outside of the stacks
    if form == "stored":
        kept = ("embed", "head", "norm")

        def form_of(layer):
            leaf = layer.rpartition(".")[2]
            return "bf16" if any(k in layer for k in kept) else OWN.get(leaf, "ct")

        store(draft, form_of, CT_SAYS_ALL)
        ignored, served = [], SERVED
    speculative = {"method": "eagle3", "model": str(draft), "num_speculative_tokens": 1}
    speculative["quantization"] = "nvfp4"
    options = {"nvfp4": {"kv_cache": "keep", "online_ignore": ignored}}
    alone, *_ = ask(target, additional_config=options)
    with engine(
        target, **PREDICTABLE | {"additional_config": options}, speculative_config=speculative
    ) as llm:
        assert names_of_draft(llm) == served
        tokens = greedy_tokens(llm)
        taken, drafted = counted(llm)
    assert tokens == alone
    assert taken == drafted >= NUM_TOKENS // 2


@pytest.mark.parametrize("has_own", [True, False])
def test_a_draft_beside_quantised_tables(has_own, tmp_path):
    """vLLM asks the tables whether they are alike, or how wide they are."""
    target = write_model(tmp_path / "target", "llama")
    edit_tensors(target, make_predictable)
    draft = write_eagle3(tmp_path / "draft", target, load_file(target / "model.safetensors"))
    if not has_own:
        edit_tensors(draft, lambda tensors: tensors.pop("embed_tokens.weight"))
    speculative = {"method": "eagle3", "model": str(draft), "num_speculative_tokens": 1}
    tables = {"nvfp4": {"kv_cache": "keep", "embedding": "nvfp4", "lm_head": "fp8"}}
    alone, *_ = ask(target, additional_config=tables)
    tokens, taken, drafted = ask(target, speculative, additional_config=tables)
    assert tokens == alone
    assert taken == drafted >= NUM_TOKENS // 2


def test_either_runner_of_vllm_finds_tables_that_are_alike(tmp_path):
    """The second one, for GPUs, asks by a function of its own."""
    draft = torch.nn.Module()
    draft.has_own_lm_head = True
    heads = []
    for seed in (0, 0, 7):
        target = write_model(tmp_path / str(len(heads)), "llama", seed=seed)
        tables = {"nvfp4": {"kv_cache": "keep", "lm_head": "nvfp4"}}
        with engine(target, **PREDICTABLE | {"additional_config": tables}) as llm:
            heads.append(layer_of(llm, "lm_head"))
    from vllm.v1.worker.gpu.spec_decode.eagle.utils import _should_share

    one, same, other = heads
    assert _should_share(draft, "has_own_lm_head", same, one)
    assert not _should_share(draft, "has_own_lm_head", other, one)
    assert not hasattr(one, "weight")


def test_no_quantised_copy_of_a_quantised_head():
    """vLLM 0.33 makes one for the draft, of 16 bits alone."""
    from vllm.config import VllmConfig, set_current_vllm_config

    config = VllmConfig()
    config.speculative_config = SimpleNamespace(draft_lm_head_quantization="fp8")
    both = Vocabulary(Options(), lambda prefix: UNQUANTIZED, are_tied=False)
    stored = ALGOS["NVFP4"]
    with set_current_vllm_config(config):
        assert lm_head_method(both, UNQUANTIZED, "lm_head") is None
        with pytest.raises(CheckpointError, match=r"fp8, beside a lm_head in nvfp4.*Leave it out"):
            lm_head_method(both, stored, "lm_head")


def shuffle_first_projection(tensors):
    tensors["fc.weight"] = tensors["fc.weight"].roll(7, 0)
