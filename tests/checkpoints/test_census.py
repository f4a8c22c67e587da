# SPDX-License-Identifier: Apache-2.0
"""The tensors decide how a layer is stored, whatever lists, patterns and names say."""

from dataclasses import replace

import pytest
from published import EXPERTS, PUBLISHED, STORED, K, N, experts, headers_of, modelopt
from vision_classes import model_class
from vllm.model_executor.models.utils import WeightsMapper

from vllm_nvfp4.checkpoints import detect
from vllm_nvfp4.checkpoints.census import Census
from vllm_nvfp4.checkpoints.forms import form_of
from vllm_nvfp4.checkpoints.headers import TensorHeader
from vllm_nvfp4.checkpoints.spec import CheckpointError, LayerKind
from vllm_nvfp4.config import NvFp4Config

KINDS = {
    "bf16": (LayerKind.UNQUANTIZED, None),
    "nvfp4": (LayerKind.MICROSCALED, "nvfp4"),
    "w4a16": (LayerKind.MICROSCALED, "nvfp4"),
    "ct": (LayerKind.MICROSCALED, "nvfp4"),
    "fp8": (LayerKind.FP8, None),
    "fp8row": (LayerKind.FP8, None),
    "fp8block": (LayerKind.WIDENED, None),
    "mxfp8": (LayerKind.WIDENED, None),
}
QKV = {"qkv_proj": ["q_proj", "k_proj", "v_proj"], "gate_up_proj": ["gate_proj", "up_proj"]}
LAYER = "model.layers.0.self_attn"


def kind_of(spec):
    return spec.kind, spec.fmt.name if spec.fmt else None


def needed_by(spec):
    """The names of the tensors that a layer cannot do without."""
    return {t.name for t in spec.tensors if not t.optional}


def header(dtype, *shape):
    return TensorHeader("model.safetensors", dtype, shape, 0, 0)


def census(stored, config=None, extra=None):
    return Census({**headers_of(stored), **(extra or {})}, detect(config or modelopt(["lm_head"])))


@pytest.mark.parametrize("case", PUBLISHED, ids=lambda case: case.name)
def test_published_checkpoints(case):
    """Each layer, by the file's name and by the one under which vLLM's model asks for it."""
    config = NvFp4Config(case.config)
    config.census = Census(case.headers(), config.dialect)
    for name, form in case.stored.items():
        spec = config.census.find(name).spec
        assert kind_of(spec) == KINDS[form], name
        assert needed_by(spec) <= STORED[form].keys(), name
    if case.model is None:
        return
    model = model_class(case.model)
    if mapper := getattr(model, "hf_to_vllm_mapper", None):
        config.apply_vllm_mapper(mapper.get_rename_mapper())
    config.packed_modules_mapping = {
        **QKV,
        **(getattr(model, "packed_modules_mapping", None) or {}),
    }
    for name, form in case.asked.items():
        if name.endswith(".experts"):
            leaves = ("gate_proj", "down_proj", "up_proj", "w1", "w2", "w3")
            names = [f"{name}.{e}.{leaf}" for e in range(EXPERTS) for leaf in leaves]
            spec = config.census.experts_spec(name, names)
        else:
            spec = config.layer_spec(name)
        assert kind_of(spec) == KINDS[form], name
        assert needed_by(spec) <= STORED[form].keys(), name


@pytest.mark.parametrize("form", STORED)
def test_each_form_by_its_tensors_alone(form):
    stored = headers_of({"a": form})
    tensors = {name.removeprefix("a."): h for name, h in stored.items()}
    if form == "bf16":
        assert form_of(tensors) is None
        return
    spec = form_of(tensors)
    assert kind_of(spec) == KINDS[form]
    needed = [t for t in spec.tensors if not t.optional]
    for tensor in needed:  # none of them may be missing, or of another dtype
        assert form_of({n: h for n, h in tensors.items() if n != tensor.name}) != spec
        other = tensors | {tensor.name: replace(tensors[tensor.name], dtype="I32")}
        assert form_of(other) != spec


@pytest.mark.parametrize("ignore", [["lm_head"], ["lm_head", "*self_attn*"]])
@pytest.mark.parametrize("form", ["bf16", "nvfp4", "ct", "fp8", "fp8row", "fp8block", "mxfp8"])
def test_a_list_that_says_otherwise_changes_nothing(form, ignore):
    found = census({f"{LAYER}.{n}_proj": form for n in "qkv"}, modelopt(ignore))
    assert kind_of(found.layer_spec(f"{LAYER}.qkv_proj", QKV)) == KINDS[form]


def test_where_both_agree_it_is_the_configuration_s_own_word():
    config = modelopt([], "W4A8_NVFP4_FP8", group_size=16)
    found = census({f"{LAYER}.o_proj": "nvfp4"}, config)
    assert found.find(f"{LAYER}.o_proj").spec.algo == "W4A8_NVFP4_FP8"


@pytest.mark.parametrize(
    ("file", "model"),
    [
        ("model.language_model.layers.3.mlp.up_proj", "language_model.model.layers.3.mlp.up_proj"),
        ("model.layers.46.self_attn.o_proj", "model.layers.46.mtp_block.self_attn.o_proj"),
        ("model.layers.46.shared_head.head", "model.layers.46.head"),
        ("lm_head", "language_model.lm_head"),
        ("layers.0.mlp.up_proj", "model.layers.0.mlp.up_proj"),
        ("model.layers.5.mamba.in_proj", "model.layers.5.mixer.in_proj"),
        ("model.decoder.layers.0.mlp.fc1", ".decoder.layers.0.layers.mlp.fc1"),
    ],
)
def test_a_layer_is_found_under_the_names_that_models_have_for_it(file, model):
    stored = {
        file: "fp8",
        "model.layers.4.mlp.up_proj": "nvfp4",
        "mtp.layers.3.mlp.up_proj": "bf16",
        "model.encoder.layers.0.mlp.fc1": "bf16",
    }
    assert census(stored).find(model).name == file


def test_experts_are_found_under_another_name_of_their_block():
    found = census(experts("model.layers.2.block_sparse_moe.experts", "nvfp4", ("w1", "w2")))
    name = "model.layers.2.mlp.experts.1.w2"
    assert found.find(name).name == "model.layers.2.block_sparse_moe.experts.1.w2"
    assert found.find("model.layers.1.mlp.experts.1.w2") is None
    assert found.find("mtp.layers.2.mlp.experts.1.w2") is None


def test_no_name_is_taken_for_another_layer_s():
    stored = {"model.layers.0.mlp.up_proj": "nvfp4", "lm_head": "bf16"}
    found = census(stored)
    for name in ("mtp.layers.0.mlp.up_proj", "visual.blocks.0.mlp.up_proj", "a.b.up_proj", "head"):
        assert found.find(name) is None, name


def test_one_of_two_blocks_is_not_guessed():
    layer = "model.layers.0"
    found = census({f"{layer}.mlp.up_proj": "fp8", f"{layer}.shared_mlp.up_proj": "fp8"})
    assert found.find(f"{layer}.feed_forward.up_proj") is None


def test_the_model_s_mapper_names_modules():
    found = census({"backbone.layers.1.mixer.in_proj": "fp8", "model.layers.2.x": "bf16"})
    found.rename(WeightsMapper(orig_to_new_prefix={"backbone.": "model."}))
    assert found.find("model.layers.1.mixer.in_proj").spec.kind is LayerKind.FP8
    assert found.find("backbone.layers.1.mixer.in_proj").spec.kind is LayerKind.FP8


@pytest.mark.parametrize("odd", ["bf16", "fp8", "fp8block"])
def test_shards_that_differ_are_widened(odd):
    stored = {f"{LAYER}.q_proj": "nvfp4", f"{LAYER}.k_proj": "nvfp4", f"{LAYER}.v_proj": odd}
    spec = census(stored).layer_spec(f"{LAYER}.qkv_proj", QKV)
    assert spec.kind is LayerKind.WIDENED
    assert {t.name for t in spec.tensors} == {*STORED["nvfp4"], *STORED[odd]}
    assert "v_proj" in spec.algo


def test_absent_shards_follow_those_that_are_there():
    stored = {f"{LAYER}.q_proj": "nvfp4", f"{LAYER}.k_proj": "nvfp4"}
    assert kind_of(census(stored).layer_spec(f"{LAYER}.qkv_proj", QKV)) == KINDS["nvfp4"]


def test_a_fused_layer_may_be_stored_whole():
    found = census({f"{LAYER}.qkv_proj": "bf16"}, modelopt(["lm_head"]))
    assert kind_of(found.layer_spec(f"{LAYER}.qkv_proj", QKV)) == KINDS["bf16"]


def test_shards_with_and_without_an_input_scale_are_one_layer():
    stored = {f"{LAYER}.q_proj": "nvfp4", f"{LAYER}.k_proj": "w4a16", f"{LAYER}.v_proj": "w4a16"}
    for config in (modelopt([]), modelopt([], "W4A16_NVFP4")):
        spec = census(stored, config).layer_spec(f"{LAYER}.qkv_proj", QKV)
        assert kind_of(spec) == KINDS["nvfp4"]
        assert "input_scale" in {t.name for t in spec.tensors}


def test_scales_beside_a_16_bit_weight_are_strays():
    extra = {"lm_head.input_scale": header("F32"), "lm_head.weight_scale": header("F32")}
    found = census({"lm_head": "bf16"}, extra=extra)
    spec = found.layer_spec("lm_head", QKV)
    assert kind_of(spec) == KINDS["bf16"]
    assert {t.name for t in spec.tensors} == {"input_scale", "weight_scale"}
    assert set(found.stray) == set(extra)
    found.rename(WeightsMapper(orig_to_new_prefix={"lm_head.": "language_model.lm_head."}))
    assert "language_model.lm_head.input_scale" in found.stray


def test_dropped_tensors_are_named_in_one_line(monkeypatch):
    names = ["lm_head", *(f"model.layers.{i}.mlp.up_proj" for i in range(3))]
    config = NvFp4Config(modelopt([]))
    extra = {f"{name}.input_scale": header("F32") for name in names}
    config.census = census(dict.fromkeys(names, "bf16") | {"a.b": "nvfp4"}, extra=extra)
    config.census.layer_spec("a.b", QKV)
    said = []
    monkeypatch.setattr("vllm_nvfp4.config.logger.info_once", lambda *args: said.append(args))
    mapper = config.get_checkpoint_weight_mapper()
    [(text, listed)] = said
    assert "passed over" in text
    assert listed == "lm_head.input_scale (1), model.layers.*.mlp.up_proj.input_scale (3)"
    kept = ["lm_head.weight", "a.b.input_scale", "a.b.weight"]
    assert mapper.apply_list([*extra, *kept]) == kept


def test_weights_without_a_known_form_are_named():
    extra = {"a.weight": header("U8", N, K // 2), "b.weight": header("I8", N, K)}
    found = census({}, modelopt(["a", "b"]), extra)
    for name in ("a", "b"):
        with pytest.raises(CheckpointError, match=rf"model.safetensors: {name}: found weight .*8"):
            found.find(name).spec  # noqa: B018 (a property that raises)


def test_experts_that_differ_are_refused():
    stored = {f"m.experts.{e}.up_proj": "nvfp4" if e else "fp8" for e in range(EXPERTS)}
    with pytest.raises(CheckpointError, match=r"m\.experts\.1\.up_proj: found nvfp4.*needed fp8"):
        census(stored).experts_spec("m.experts", stored)


def test_experts_by_projection_are_found_by_expert():
    stored = {f"m.experts.{p}.{e}": "nvfp4" for p in ("up_proj", "w2") for e in range(EXPERTS)}
    found = census(stored)
    assert found.has_projection_first
    names = [f"m.experts.{e}.up_proj" for e in range(EXPERTS)]
    assert kind_of(found.experts_spec("m.experts", names)) == KINDS["nvfp4"]
    assert not census({"m.experts.0.up_proj": "nvfp4"}).has_projection_first


def test_what_no_layer_asked_for_is_named_once_for_a_stack():
    stored = {f"mtp.layers.{i}.up_proj": "fp8" for i in range(3)} | {"mtp.norm": "bf16"}
    stored |= experts("model.layers.1.mlp.experts", "nvfp4") | {f"{LAYER}.o_proj": "nvfp4"}
    found = census(stored)
    found.layer_spec(f"{LAYER}.o_proj", QKV)
    names = [n for n in stored if ".experts." in n]
    found.experts_spec("model.layers.1.mlp.experts", names)
    assert found.unasked() == {"mtp.layers.*.up_proj": 3}


def test_experts_in_one_tensor_are_as_the_tensor_is():
    extra = {"m.experts.gate_up_proj": header("BF16", EXPERTS, K, N)}
    names = [f"m.experts.{e}.up_proj" for e in range(EXPERTS)]
    assert kind_of(census({}, extra=extra).experts_spec("m.experts", names)) == KINDS["bf16"]
    extra = {"m.input_linear.weight": header("BF16", EXPERTS, N, K)}
    assert kind_of(census({}, extra=extra).experts_spec("m.experts", names)) == KINDS["bf16"]
