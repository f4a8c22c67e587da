# SPDX-License-Identifier: Apache-2.0
"""A model is built and loaded without its data: what loads, what has no place, what is empty."""

import copy
import json
import os

import pytest
import torch
import vision_classes
from stored_forms import store

from vllm_nvfp4.checking import check
from vllm_nvfp4.checking.check import engine_arguments, examine
from vllm_nvfp4.checking.report import from_json
from vllm_nvfp4.checkpoints.modules import StoredModule
from vllm_nvfp4.cli import main
from vllm_nvfp4.compat import cpu_metadata
from vllm_nvfp4.serving import first_check, launch
from vllm_nvfp4.testing.architectures import ARCHITECTURES, write_architecture
from vllm_nvfp4.testing.checkpoints import edit_json, edit_tensors, extract_fixture, fixture_names
from vllm_nvfp4.testing.tiny_models import write_model

pytestmark = pytest.mark.vllm

EXPERTS = "moe_modelopt/nvfp4-qwen3"
LAYER = "model.layers.1"


@pytest.fixture(autouse=True, scope="module")
def _environment():
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HF_HUB_OFFLINE", "1")
        cpu_metadata.apply()
        yield


def report_on(folder, *flags):
    return examine(engine_arguments(str(folder), ["--enforce-eager", *flags]))


def edited(tmp_path, edit, name="modelopt/w4a16-llama"):
    return edit_tensors(extract_fixture(name, tmp_path), edit)


def of_part(report, part):
    return [layer for layer in report.layers if layer.part == part]


@pytest.mark.parametrize("name", [*fixture_names(), EXPERTS])
def test_what_other_tools_wrote_will_load(name, tmp_path):
    report = report_on(extract_fixture(name, tmp_path))
    assert report.is_right, [str(f) for f in (*report.errors, *report.dropped)]
    assert not report.left_out
    quantised = [layer for layer in report.layers if "16 bits" not in layer.form]
    assert sum(layer.count for layer in quantised) >= 3
    assert all("kernel" in layer.path or "vLLM" in layer.path for layer in quantised)


@pytest.mark.parametrize("family", ["llama-bias", "gemma3", "qwen2_moe", "gpt_oss"])
def test_16_bit_models_will_load(family, tmp_path):
    report = report_on(write_model(tmp_path, family))
    assert report.errors == () or family == "gpt_oss", report.errors
    assert report.dropped == ()


@pytest.mark.parametrize(
    ("name", "ranks"),
    [("jamba", 1), ("jamba", 2), ("granite4", 2), ("falcon-h1", 2), ("mamba2", 2)],
)
def test_every_projection_of_a_mamba_mixer_may_be_quantised(name, ranks, tmp_path):
    """vLLM builds Mamba-1's without quantisation, and Mamba-2 cuts its first one by itself."""
    kept = ("embed", "head", "norm", "router", "conv1d", "A_log")
    folder = write_architecture(tmp_path, ARCHITECTURES[name])
    config = {"quant_method": "modelopt", "quant_algo": "NVFP4"}
    store(folder, lambda layer: "bf16" if any(k in layer for k in kept) else "nvfp4", config)
    report = report_on(folder, "--tensor-parallel-size", str(ranks))
    assert report.is_right, [str(f) for f in (*report.errors, *report.dropped)]


@pytest.mark.parametrize("name", ["modelopt/w4a16-llama", EXPERTS])
def test_the_kernel_is_that_of_the_variant(name, tmp_path):
    options = '{"nvfp4": {"activation": "8", "a8_variant": "int8"}}'
    report = report_on(extract_fixture(name, tmp_path), "--additional-config", options)
    part = "experts" if name == EXPERTS else "linear"
    assert any("INT8 per token and 64 columns" in layer.path for layer in of_part(report, part))


def test_each_of_two_ranks_holds_half_of_the_linear_layers(tmp_path):
    folder = extract_fixture(EXPERTS, tmp_path)
    one, two = report_on(folder), report_on(folder, "--tensor-parallel-size", "2")
    cut = report_on(folder, "--tensor-parallel-size", "2", "--enable-expert-parallel")
    assert (one.devices, two.devices, cut.devices) == (1, 2, 2)
    assert one.is_right
    assert two.is_right
    assert cut.is_right
    for part in ("linear", "experts"):
        [whole], [half] = of_part(one, part)[:1], of_part(two, part)[:1]
        assert whole.held_bytes / 2 <= half.held_bytes < whole.held_bytes
    assert not cut.left_out
    [whole], [half] = of_part(one, "experts"), of_part(cut, "experts")
    assert half.held_bytes * 2 == whole.held_bytes


def without(*names):
    def edit(tensors):
        for name in [n for n in tensors if n.startswith(names)]:
            del tensors[name]

    return edit


MISSING = [
    ("model.norm.weight", "model.norm.weight"),
    (f"{LAYER}.mlp.down_proj.weight_scale_2", f"{LAYER}.mlp.down_proj"),
    (f"{LAYER}.self_attn.k_proj", f"{LAYER}.self_attn"),
    ("lm_head.weight", "lm_head"),
    (f"{LAYER}.input_layernorm", f"{LAYER}.input_layernorm"),
]


@pytest.mark.parametrize(("removed", "named"), MISSING)
def test_what_the_files_lack_is_named(removed, named, tmp_path):
    report = report_on(edited(tmp_path, without(removed)))
    assert any(named in str(error) for error in report.errors), report
    assert not report.will_load


def test_every_fault_is_named_not_the_first_alone(tmp_path):
    gone = ("model.norm.weight", f"{LAYER}.input_layernorm", "model.layers.0.post_attention")
    report = report_on(edited(tmp_path, without(*gone)))
    assert len(report.errors) == 3


def test_a_missing_expert_is_named(tmp_path):
    gone = f"{LAYER}.mlp.experts.2.up_proj"
    report = report_on(edited(tmp_path, without(gone), EXPERTS))
    assert not report.will_load
    assert any("experts" in str(error) for error in report.errors)


def test_tensors_without_a_place_are_named(tmp_path):
    def edit(tensors):
        tensors[f"{LAYER}.self_attn.q_proj.bias"] = torch.zeros(128)
        tensors["model.other.weight"] = torch.zeros(4, 4)

    report = report_on(edited(tmp_path, edit))
    found = [f.what for f in (*report.errors, *report.dropped)]
    assert f"{LAYER}.self_attn.q_proj.bias" in found
    assert "model.other.weight" in [*found, *report.left_out]


def test_a_shape_that_does_not_fit_is_named(tmp_path):
    def edit(tensors):
        tensors["model.norm.weight"] = torch.ones(63)

    report = report_on(edited(tmp_path, edit))
    assert [f.what for f in report.errors][:1] == ["model.norm.weight"]


@pytest.mark.parametrize("is_stored", [True, False])
@pytest.mark.parametrize("ranks", ["1", "2"])
def test_a_tensor_of_which_the_model_takes_a_part_is_named(is_stored, ranks, tmp_path):
    """vLLM cuts what a rank needs out of a tensor, and looks no further."""
    if is_stored:
        folder = extract_fixture("modelopt/w4a16-llama", tmp_path)
    else:
        folder = write_model(tmp_path, "llama")
    edit_json(folder / "config.json", lambda config: config.update(num_attention_heads=2))
    errors = report_on(folder, "--tensor-parallel-size", ranks).errors
    assert {e.what.rpartition("self_attn.")[2][:6] for e in errors} == {"q_proj", "o_proj"}
    assert all("of which the model takes" in e.message for e in errors)


@pytest.mark.parametrize(
    "stem", ["self_attn.{}_proj", "self_attn.qkv_proj", "self_attn", "self_attn.attn"]
)
def test_scales_of_the_kv_cache_find_their_place_under_each_name(stem, tmp_path, monkeypatch):
    def edit(tensors):
        for name in [n for n in tensors if n.endswith(("k_scale", "v_scale"))]:
            layer, leaf = name.partition(".self_attn.")[0], name.rpartition(".")[2]
            tensors[f"{layer}.{stem.format(leaf[0])}.{leaf}"] = tensors.pop(name)

    # Nothing that is left over is excused.
    monkeypatch.setattr(StoredModule, "dispensable", frozenset())
    report = report_on(edited(tmp_path, edit, "modelopt/nvfp4-kv8-llama"))
    assert report.is_right, [str(f) for f in (*report.errors, *report.dropped)]
    assert not report.left_out
    assert sum(layer.count for layer in of_part(report, "linear") if "nvfp4" in layer.form) == 8


def test_a_model_of_pictures_without_its_processor_is_said(tmp_path):
    vision_classes.install()
    folder = write_architecture(tmp_path / "model", ARCHITECTURES["gemma3-vision"])
    report = report_on(folder)
    assert report.will_load
    assert "preprocessor_config.json" in report.notes[0]
    assert from_json(json.loads(json.dumps(report.to_json()))).notes == report.notes
    assert report_on(folder, "--limit-mm-per-prompt", '{"image": 0}').notes == ()
    (folder / "preprocessor_config.json").write_text("{}")
    assert report_on(folder).notes == ()


def test_the_command(tmp_path, capsys):
    folder = extract_fixture("modelopt/mixed-llama", tmp_path)
    assert main.main(["check", str(folder)]) == 0
    out = capsys.readouterr().out
    assert "It will load." in out
    assert "LlamaForCausalLM, dialect modelopt" in out
    edit_tensors(folder, without("model.norm.weight"))
    assert main.main(["check", str(folder), "--json", "--", "--tensor-parallel-size", "2"]) == 1
    printed = json.loads(capsys.readouterr().out)
    assert not printed["will_load"]
    assert printed["errors"][0]["what"] == "model.norm.weight"
    assert main.main(["check", str(tmp_path / "nothing")]) == 1
    assert "no such folder" in capsys.readouterr().err


def test_a_process_of_its_own_says_the_same(tmp_path, capsys):
    folder = extract_fixture("modelopt/w4a16-llama", tmp_path)
    assert check.main([str(folder), "--enforce-eager"]) == 0
    printed = capsys.readouterr().out.strip().splitlines()[-1]
    report = from_json(json.loads(printed))
    assert report.layers == report_on(folder).layers
    assert check.main([str(tmp_path / "none")]) == 0  # the report says that it will not load
    assert not json.loads(capsys.readouterr().out.strip().splitlines()[-1])["will_load"]


def test_a_server_starts_with_what_will_load_alone(tmp_path, capfd):
    folder = extract_fixture("modelopt/w4a16-llama", tmp_path)
    args = launch.read([str(folder), "--quantization", "nvfp4", "--enforce-eager"])
    first_check.run(args)
    assert "vllm-nvfp4" not in capfd.readouterr().err
    edit_tensors(folder, without("model.norm.weight", f"{LAYER}.input_layernorm"))
    with pytest.raises(ValueError, match=r"input_layernorm.*And 1 more"):
        first_check.run(args)


def test_a_check_that_dies_stops_no_server():
    def die():
        os._exit(3)

    assert "status 3" in first_check.in_a_copy(die)


def test_nothing_is_left_behind(tmp_path):
    from vllm.distributed import parallel_state

    before = copy.copy(vars(parallel_state))
    default = torch.get_default_dtype()
    report_on(extract_fixture("modelopt/w4a16-llama", tmp_path))
    assert torch.get_default_dtype() is default
    assert all(vars(parallel_state)[n] is v for n, v in before.items() if n.isupper())
