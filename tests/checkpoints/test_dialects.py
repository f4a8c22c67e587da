# SPDX-License-Identifier: Apache-2.0
"""Each dialect: which layer is stored how, what is ignored, what is refused, and what comes out."""

import copy
import json
import re

import pytest
import torch
from safetensors.torch import load_file

from vllm_nvfp4.checkpoints import detect, read_config
from vllm_nvfp4.checkpoints.convert import check_blocks, fp8_to_rows, to_weight
from vllm_nvfp4.checkpoints.spec import (
    UNQUANTIZED,
    CheckpointError,
    LayerKind,
    Role,
    describe,
    fused_layer_spec,
)
from vllm_nvfp4.checkpoints.validate import PACKED_MODULES
from vllm_nvfp4.numerics.formats import MXFP4, NVFP4
from vllm_nvfp4.testing.checkpoints import (
    dequantized_state_dict,
    edit_json,
    extract_fixture,
    fixture_names,
    give_shards_their_own_scale,
    make_legacy,
)
from vllm_nvfp4.testing.tiny_models import build_model

Q = "model.layers.0.self_attn.q_proj"
DOWN = "model.layers.0.mlp.down_proj"
NVFP4_WEIGHTS = {
    "num_bits": 4,
    "type": "float",
    "strategy": "tensor_group",
    "group_size": 16,
    "symmetric": True,
    "dynamic": False,
}


def modelopt(algo, **entries):
    return {"quant_method": "modelopt", "quant_algo": algo, **entries}


def compressed(weights=None, targets=("Linear",), activations=None, **entries):
    group = {
        "targets": list(targets),
        "weights": weights or NVFP4_WEIGHTS,
        "input_activations": activations,
    }
    return {
        "quant_method": "compressed-tensors",
        "format": "nvfp4-pack-quantized",
        "config_groups": {"group_0": group},
        **entries,
    }


class Mapper:
    """Stands for vLLM's WeightsMapper: one prefix renamed, one dropped."""

    def apply_list(self, names):
        kept = [n for n in names if not n.startswith("gone.")]
        return [n.replace("model.", "language_model.model.", 1) for n in kept]

    def apply_dict(self, table):
        return {self.apply_list([n])[0]: v for n, v in table.items() if self.apply_list([n])}


# --- what the real tools wrote -----------------------------------------------------------------

EXPECTED = {
    "modelopt/nvfp4-kv8-llama": ("NVFP4", NVFP4, 4, "fp8"),
    "modelopt/nvfp4-qwen3": ("NVFP4", NVFP4, 4, None),
    "modelopt/w4a16-llama": ("W4A16_NVFP4", NVFP4, 16, None),
    "modelopt/w4a16-gemma3": ("W4A16_NVFP4", NVFP4, 16, None),
    "modelopt/awq-llama": ("NVFP4_AWQ", NVFP4, 4, None),
    "modelopt/w4a8-llama": ("W4A8_NVFP4_FP8", NVFP4, 8, None),
    "modelopt/mxfp4-llama": ("MXFP4", MXFP4, 4, None),
    "modelopt/mixed-llama": ("FP8", None, 8, None),
    "modelopt/fp8-channel-llama": ("FP8_PER_CHANNEL_PER_TOKEN", None, 8, None),
    "compressed_tensors/nvfp4a16-llama": ("NVFP4 W4A16", NVFP4, 16, None),
    "compressed_tensors/nvfp4a16-qwen3": ("NVFP4 W4A16", NVFP4, 16, None),
    "compressed_tensors/nvfp4-kv8-llama": ("NVFP4 W4A4", NVFP4, 4, "fp8"),
    "compressed_tensors/nvfp4-fp8-llama": ("NVFP4 W4A8", NVFP4, 8, None),
    "compressed_tensors/mixed-llama": ("FP8 W8A8 per channel", None, 8, None),
    "compressed_tensors/mxfp4-llama": ("MXFP4 W4A16", MXFP4, 16, None),
    "compressed_tensors/mxfp4-gemma3": ("MXFP4 W4A16", MXFP4, 16, None),
    "autoround/nvfp4-llama": ("NVFP4 W4A4", NVFP4, 4, None),
    "autoround/mxfp4-llama": ("MXFP4 W4A16", MXFP4, 16, None),
    "quark/nvfp4-kv8-llama": ("NVFP4 W4A4", NVFP4, 4, "fp8"),
    "fp_quant/nvfp4-llama": ("FP-Quant nvfp4", NVFP4, 4, None),
    "fp_quant/mxfp4-llama": ("FP-Quant mxfp4", MXFP4, 4, None),
}


def test_every_fixture_has_an_expectation():
    assert fixture_names() == sorted(EXPECTED)


@pytest.mark.parametrize("name", sorted(EXPECTED))
def test_files_are_recognised(tmp_path, name):
    folder = extract_fixture(name, tmp_path)
    _, quant_config = read_config(folder)
    dialect = detect(quant_config)
    spec = dialect.layer_spec(Q)
    assert (spec.algo, spec.fmt, spec.activation_bits, dialect.kv_cache.dtype) == EXPECTED[name]
    stored = {n.removeprefix(f"{Q}.") for n in load_file(folder / "model.safetensors") if Q in n}
    required = {t.name for t in spec.tensors if not t.optional}
    assert required <= stored <= {t.name for t in spec.tensors}
    assert dialect.layer_spec("lm_head") is UNQUANTIZED
    assert fused_layer_spec(dialect, "model.layers.0.self_attn.qkv_proj", PACKED_MODULES) == spec


@pytest.mark.parametrize("name", [n for n in sorted(EXPECTED) if n.startswith("modelopt/")])
def test_legacy_file_alone_says_the_same(tmp_path, name):
    folder = extract_fixture(name, tmp_path)
    _, new = read_config(folder)
    config, legacy = read_config(make_legacy(folder))
    assert "quantization_config" not in config
    assert set(legacy) == {"producer", "quantization"}
    for layer in (Q, DOWN, "lm_head", "model.layers.1.mlp.down_proj", "model.embed_tokens"):
        assert detect(legacy).layer_spec(layer) == detect(new).layer_spec(layer)
    assert detect(legacy).kv_cache == detect(new).kv_cache


# The tools' rounding of Gaussian weights to MXFP4, the coarsest, costs 0.12; a wrong nibble order,
# scale or multiplier costs 1 or more.
ERROR_BOUND = 0.125


@pytest.mark.parametrize("name", sorted(EXPECTED))
def test_dequantised_twin_is_the_model_that_was_quantised(tmp_path, name):
    folder = extract_fixture(name, tmp_path)
    twin = dequantized_state_dict(folder)
    model = build_model(name.rpartition("-")[2])
    layers = read_config(folder)[0]["num_hidden_layers"]
    model.model.layers = model.model.layers[:layers]
    reference = model.state_dict()
    assert set(twin) == set(reference) - ({"lm_head.weight"} if "gemma3" in name else set())
    if "awq" not in name:  # AWQ moves factors into the norms, so that single layers differ
        for layer in [n for n in twin if "_proj" in n]:
            error = (twin[layer].float() - reference[layer].float()).norm()
            assert error <= ERROR_BOUND * reference[layer].float().norm(), layer
    logits = {}
    ids = torch.arange(4, 36)[None]
    for key, state in (("original", reference), ("twin", twin)):
        model.float().load_state_dict({k: v.float() for k, v in state.items()}, strict=False)
        with torch.no_grad():
            logits[key] = model(ids).logits
    error = (logits["twin"] - logits["original"]).norm() / logits["original"].norm()
    assert 0.001 < error < 0.3


def test_group_size_that_config_json_leaves_out_comes_from_the_file(tmp_path):
    folder = extract_fixture("modelopt/w4a8-llama", tmp_path)
    _, quant_config = read_config(folder)
    assert "group_size" not in quant_config
    shapes = {n: list(t.shape) for n, t in load_file(folder / "model.safetensors").items()}
    dialect = detect(quant_config)
    dialect.settle(shapes)
    assert dialect.layer_spec(Q).scale_block == 32
    halved = {n: [s[0], 2 * s[1]] if n.endswith("weight_scale") else s for n, s in shapes.items()}
    dialect = detect(quant_config)
    dialect.settle(halved)
    assert dialect.layer_spec(Q).scale_block == 16


# --- ModelOpt ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("entry", "name", "excluded"),
    [
        ("lm_head", "lm_head", True),
        ("model.layers.0*", "model.layers.0.mlp.up_proj", True),
        ("model.layers.1*", "model.layers.11.mlp.up_proj", True),  # as fnmatch has it
        ("model.layers.1.*", "model.layers.11.mlp.up_proj", False),
        ("*self_attn*", Q, True),
        ("self_attn", Q, True),  # a plain entry excludes what contains it
        ("layers.1.mlp", "model.layers.0.mlp.up_proj", False),
        ("model.layers.?.mlp.up_proj", "model.layers.3.mlp.up_proj", True),
        ("model.vision*", "vision_tower.blocks.0.q_proj", True),  # always left out
        ("visual", "multi.visual.blocks.0", True),
    ],
)
def test_modelopt_exclusions(entry, name, excluded):
    dialect = detect(modelopt("NVFP4", ignore=[entry]))
    assert dialect.excludes(name) is excluded
    assert (dialect.layer_spec(name) is UNQUANTIZED) is excluded


def test_exclusions_and_targets_are_those_of_vllm():
    from vllm.model_executor.layers.quantization.compressed_tensors.utils import (
        find_matched_target,
        should_ignore_layer,
    )
    from vllm.model_executor.layers.quantization.modelopt import ModelOptNvFp4Config

    names = [
        Q,
        "model.layers.10.mlp.up_proj",
        "lm_head",
        "language_model.lm_head",
        "language_model.model.layers.1.self_attn.k_proj",
        "model.vision_tower.encoder.layers.0.self_attn.q_proj",
    ]
    entries = ["lm_head", "*lm_head*", Q, "model.layers.1*", "model.layers.1.*", "self_attn"]
    entries += ["*k_proj", "model.layers.[02]*", "re:.*lm_head", "re:model.*self_attn", "Linear"]
    module = torch.nn.Linear(1, 1)
    for entry in entries:
        config = ModelOptNvFp4Config(
            is_checkpoint_nvfp4_serialized=True, kv_cache_quant_algo=None, exclude_modules=[entry]
        )
        ours = detect(modelopt("NVFP4", ignore=[entry]))
        ignoring, targeting = (
            detect(compressed(ignore=[entry])),
            detect(compressed(targets=[entry])),
        )
        for name in names:
            theirs = config.is_layer_excluded(name) or "vision_tower" in name
            # vLLM's takes a regular expression for a name; public lists have them all the same.
            theirs |= entry.startswith("re:") and bool(re.match(entry[3:], name))
            assert ours.excludes(name) == theirs, (entry, name)
            # An entry without a dot names the layer in a nested model too, unlike vLLM's.
            is_nested = "." not in entry and name.endswith(f".{entry}")
            ignored = should_ignore_layer(name, [entry]) or is_nested
            assert ignoring.excludes(name) == ignored, (entry, name)
            matched = find_matched_target(name, module, [entry]) is not None
            assert (targeting.layer_spec(name) is not UNQUANTIZED) == matched, (entry, name)


def test_modelopt_nvfp4_without_activations_is_w4a16():
    groups = {"group_0": {"input_activations": None, "targets": ["Linear"]}}
    assert detect(modelopt("nvfp4", config_groups=groups)).layer_spec(Q).algo == "W4A16_NVFP4"
    groups["group_1"] = {"input_activations": {"num_bits": 4}}
    assert detect(modelopt("NVFP4", config_groups=groups)).layer_spec(Q).algo == "NVFP4"


def mixed():
    layers = {
        f"{Q[:-6]}q_proj": {"quant_algo": "FP8"},
        f"{Q[:-6]}k_proj": {"quant_algo": "FP8"},
        f"{Q[:-6]}v_proj": {"quant_algo": "NVFP4", "group_size": 16},
        "model.language_model.layers.0.mlp.down_proj": {"quant_algo": "w4a16_nvfp4"},
    }
    return modelopt("MIXED_PRECISION", quantized_layers=layers, ignore=["lm_head"])


def test_modelopt_mixed_precision_takes_each_layer_by_name():
    dialect = detect(mixed())
    assert dialect.layer_spec(Q).kind is LayerKind.FP8
    assert dialect.layer_spec(f"{Q[:-6]}v_proj").fmt is NVFP4
    assert dialect.layer_spec("language_model.model.layers.0.mlp.down_proj").fmt is NVFP4
    assert dialect.layer_spec(f"{Q[:-6]}o_proj") is UNQUANTIZED
    assert len(dialect.named_layers()) == 4
    fused = fused_layer_spec(dialect, f"{Q[:-6]}qkv_proj", PACKED_MODULES)
    assert fused.kind is LayerKind.WIDENED
    assert {"q_proj fp8 (FP8)", "v_proj nvfp4 (NVFP4)"} <= set(fused.algo.split(", "))


def test_rename_keeps_what_is_excluded_and_named():
    config = modelopt("NVFP4", ignore=["model.layers.0*", "gone.*", "lm_head"])
    dialect = detect(config)
    dialect.rename(Mapper())
    assert dialect.excludes("language_model.model.layers.0.mlp.up_proj")
    assert not dialect.excludes("language_model.model.layers.1.mlp.up_proj")
    dialect = detect(mixed())
    dialect.rename(Mapper())
    assert dialect.layer_spec("language_model." + Q).kind is LayerKind.FP8
    dialect = detect(compressed(ignore=[Q, "lm_head", r"re:.*o_proj"]))
    dialect.rename(Mapper())
    assert dialect.excludes("language_model." + Q)
    assert dialect.excludes("lm_head")
    assert dialect.excludes("language_model.model.layers.0.self_attn.o_proj")
    assert dialect.layer_spec("language_model." + DOWN).fmt is NVFP4


# --- compressed-tensors ------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("target", "name", "matches"),
    [
        ("Linear", Q, True),
        ("linear", Q, True),
        (Q, Q, True),
        (Q, DOWN, False),
        (r"re:.*self_attn\.q_proj$", Q, True),
        (r"re:self_attn", Q, False),  # anchored at the start
        (r"re:model\.layers\.\d+\.mlp", DOWN, True),
        ("Conv2d", Q, False),
    ],
)
def test_compressed_tensors_targets(target, name, matches):
    spec = detect(compressed(targets=[target])).layer_spec(name)
    assert (spec.kind is LayerKind.MICROSCALED) is matches


def test_targets_and_ignores_match_as_in_compressed_tensors():
    from compressed_tensors.utils.match import match_name

    names = [Q, DOWN, "lm_head", "model.layers.10.mlp.up_proj", "visual.blocks.0.attn.qkv"]
    entries = [
        "lm_head",
        Q,
        r"re:.*mlp\..*",
        r"re:model\.layers\.1\.",
        "re:visual",
        r"re:.*lm_head",
    ]
    for entry in entries:
        dialect = detect(compressed(ignore=[entry]))
        for name in names:
            assert dialect.excludes(name) == match_name(name, entry), (entry, name)


def test_a_name_goes_before_a_class_and_a_later_group_before_an_earlier():
    config = compressed()
    fp8 = {"num_bits": 8, "type": "float", "strategy": "tensor", "symmetric": True}
    config["config_groups"]["group_1"] = {"targets": [DOWN], "weights": fp8}
    config["format"] = "mixed-precision"
    dialect = detect(config)
    assert dialect.layer_spec(DOWN).kind is LayerKind.FP8
    assert dialect.layer_spec(Q).fmt is NVFP4
    assert dialect.named_layers() == (DOWN,)
    config["config_groups"]["group_1"]["targets"] = ["Linear"]
    assert detect(config).layer_spec(Q).kind is LayerKind.FP8


def test_attention_groups_only_carry_cache_scales():
    config = compressed()
    config["config_groups"]["kv"] = {"targets": ["LlamaAttention"], "weights": None}
    config["kv_cache_scheme"] = {"num_bits": 8, "type": "float"}
    dialect = detect(config)
    assert dialect.kv_cache.dtype == "fp8"
    assert dialect.layer_spec(Q).fmt is NVFP4


@pytest.mark.parametrize("location", ["input", "output", "q_attn", "k_cache"])
def test_online_transforms_are_refused(location):
    apply = [{"targets": ["Linear"], "location": location}]
    transform = {"config_groups": {"R4": {"type": "hadamard", "apply": apply}}}
    with pytest.raises(CheckpointError, match=f"R4.*hadamard transform at '{location}'"):
        detect(compressed(transform_config=transform))


def test_transforms_inside_the_weights_are_nothing_to_do():
    apply = [{"location": "weight_input"}, {"location": "weight_output"}]
    transform = {"config_groups": {"R1": {"type": "hadamard", "apply": apply}}}
    assert detect(compressed(transform_config=transform)).layer_spec(Q).fmt is NVFP4
    assert detect(compressed(transform_config={})).layer_spec(Q).fmt is NVFP4


@pytest.mark.parametrize(
    "change",
    [
        {"group_size": 32},
        {"strategy": "group"},
        {"num_bits": 8, "strategy": "block"},
        {"type": "int", "strategy": "group", "group_size": 128},
        {"symmetric": False},
        {"dynamic": True},
    ],
)
def test_other_schemes_are_refused_with_the_list_of_what_works(change):
    with pytest.raises(
        CheckpointError, match=r"nvfp4-pack-quantized.*mxfp4-pack-quantized.*float-q"
    ):
        detect(compressed({**NVFP4_WEIGHTS, **change}))


# --- FP-Quant, online, and what is refused -----------------------------------------------------


def fp_quant(**entries):
    return {
        "quant_method": "fp_quant",
        "forward_dtype": "nvfp4",
        "hadamard_group_size": 32,
        "modules_to_not_convert": ["lm_head", "o_proj"],
        **entries,
    }


def test_fp_quant_ignores_by_the_end_of_the_name():
    dialect = detect(fp_quant())
    assert dialect.layer_spec(Q).hadamard_size == 32
    assert dialect.layer_spec("model.layers.0.self_attn.o_proj") is UNQUANTIZED
    assert dialect.layer_spec("model.lm_head") is UNQUANTIZED


def test_online_asks_for_no_names_but_lm_head():
    dialect = detect(None)
    assert dialect.layer_spec(Q).kind is LayerKind.ONLINE
    assert dialect.layer_spec("model.vision_tower.x.q_proj").kind is LayerKind.ONLINE
    assert dialect.layer_spec("model.lm_head") is UNQUANTIZED


@pytest.mark.parametrize(
    ("config", "words"),
    [
        (modelopt("W4A8_AWQ"), "quant_algo: found W4A8_AWQ; needed one of NVFP4, W4A16_NVFP4"),
        (modelopt(None), "quant_algo: found None; needed one of"),
        (modelopt("NVFP4_SVD"), "low-rank branch"),
        (modelopt("NVFP4", group_size=24), "group_size: found 24; needed a multiple of 16"),
        (modelopt("MXFP4", group_size=16), "group_size: found 16; needed 32"),
        (modelopt("NVFP4", ignore="lm_head"), "a list of layer names"),
        (modelopt("MIXED_PRECISION", quantized_layers=[Q]), "quantized_layers"),
        (modelopt("MIXED_PRECISION", quantized_layers={Q: {"quant_algo": "INT4"}}), "INT4"),
        (modelopt("MIXED_PRECISION", quantized_layers={Q: "NVFP4"}), "a table with quant_algo"),
        (compressed(config_groups={}), "config_groups"),
        (compressed(sparsity_config={"targets": ["Linear"]}), "without sparsity"),
        (fp_quant(forward_dtype="mxfp8"), "forward_dtype: found mxfp8; needed one of nvfp4, mxfp4"),
        (fp_quant(pseudoquantization=True), "pseudoquantization"),
        (fp_quant(store_master_weights=True), "store_master_weights"),
        (fp_quant(hadamard_group_size=48), "a power of two"),
        ({"quant_method": "quark", "x": 1}, "AMD Quark"),
        ({"quant_method": "gguf"}, "BF16 model"),
        ({"quant_method": "awq"}, "one of modelopt, compressed-tensors, fp_quant"),
        ({"bits": 4}, "quant_method: found none"),
    ],
)
def test_what_is_not_supported_is_named(config, words):
    with pytest.raises(CheckpointError, match=words):
        detect(config)


def test_read_config_finds_every_place(tmp_path):
    folder = extract_fixture("compressed_tensors/nvfp4a16-llama", tmp_path)
    _, quant_config = read_config(folder)

    def move(key, inner):
        def edit(config):
            value = config.pop("quantization_config")
            (config.setdefault("text_config", {}) if inner else config)[key] = value

        return edit

    original = (folder / "config.json").read_text()
    for key, inner in (("compression_config", False), ("quantization_config", True)):
        (folder / "config.json").write_text(original)
        edit_json(folder / "config.json", move(key, inner))
        assert read_config(folder)[1] == quant_config
    (folder / "config.json").write_text("{not json")
    with pytest.raises(
        CheckpointError, match=r"config.json: contents: found .*needed a JSON object"
    ):
        read_config(folder)
    (folder / "config.json").write_text(json.dumps([1]))
    with pytest.raises(CheckpointError, match="found list"):
        read_config(folder)
    (folder / "config.json").unlink()
    with pytest.raises(CheckpointError, match="found nothing"):
        read_config(folder)


# --- conversion --------------------------------------------------------------------------------


def nvfp4_layer(rows=8, cols=32):
    spec = detect(modelopt("NVFP4")).layer_spec(Q)
    generator = torch.Generator().manual_seed(0)
    tensors = {
        Role.CODES: torch.randint(
            0, 256, (rows, cols // 2), generator=generator, dtype=torch.uint8
        ),
        Role.BLOCK_SCALE: torch.rand((rows, cols // 16), generator=generator).to(
            torch.float8_e4m3fn
        ),
        Role.GLOBAL_SCALE: torch.tensor([0.5, 3.0]),
    }
    return spec, tensors


def test_each_shard_keeps_its_own_multiplier():
    spec, tensors = nvfp4_layer()
    weight = to_weight(spec, tensors, [6, 2])
    assert weight.global_scale.tolist() == [0.5] * 6 + [3.0] * 2
    one = to_weight(spec, tensors | {Role.GLOBAL_SCALE: torch.tensor(0.5)}, [8])
    assert torch.equal(one.dequantize()[:6], weight.dequantize()[:6])


def test_a_divisor_is_inverted_once_and_in_double():
    spec = detect(compressed()).layer_spec(Q)
    _, tensors = nvfp4_layer()
    divisors = torch.tensor([3.0, 2687.9])
    tensors[Role.GLOBAL_DIVISOR] = divisors
    weight = to_weight(spec, tensors, [1, 7])
    wanted = [float(torch.tensor(1 / float(d), dtype=torch.float32)) for d in divisors.double()]
    assert weight.global_scale[:2].tolist() == wanted


def test_different_global_scales_in_a_fused_layer_come_out_exactly(tmp_path):
    for i, name in enumerate(("modelopt/nvfp4-kv8-llama", "compressed_tensors/nvfp4a16-llama")):
        folder = extract_fixture(name, tmp_path / str(i))
        before = dequantized_state_dict(folder)
        after = dequantized_state_dict(give_shards_their_own_scale(folder))
        for layer, value in before.items():
            factor = 2 if ".k_proj." in layer else 4 if ".up_proj." in layer else 1
            assert torch.equal(after[layer], value * factor), layer


def test_a_shared_block_scale_is_repeated():
    spec = detect(modelopt("W4A8_NVFP4_FP8", group_size=32)).layer_spec(Q)
    _, tensors = nvfp4_layer(cols=64)
    tensors[Role.BLOCK_SCALE] = tensors[Role.BLOCK_SCALE][:, :2].contiguous()
    got = to_weight(spec, tensors, [6, 2])
    assert got.block_scale.shape == (8, 4)
    assert torch.equal(got.block_scale[:, 0].float(), got.block_scale[:, 1].float())
    assert torch.equal(got.block_scale[:, ::2].float(), tensors[Role.BLOCK_SCALE].float())


@pytest.mark.parametrize("byte", [0x7F, 0xFF, 0x81, 0xFE])
def test_bad_e4m3_block_scales_are_refused(byte):
    spec, tensors = nvfp4_layer()
    tensors[Role.BLOCK_SCALE].view(torch.uint8)[5, 1] = byte
    with pytest.raises(
        CheckpointError, match=r"m\.q\.weight_scale: found 1 bad of 16, first .* at \[5, 1\]"
    ):
        to_weight(spec, tensors, [6, 2], "m.q")


@pytest.mark.parametrize("byte", [0x00, 0x80, 0x01, 0x7E])
def test_zero_and_every_finite_positive_e4m3_block_scale_is_legal(byte):
    spec, tensors = nvfp4_layer()
    tensors[Role.BLOCK_SCALE].view(torch.uint8)[5, 1] = byte
    value = to_weight(spec, tensors, [6, 2]).dequantize()
    assert value.isfinite().all()
    if byte in (0x00, 0x80):
        assert (value[5, 16:] == 0).all()


def test_bad_e8m0_block_scales_are_refused():
    spec = detect(modelopt("MXFP4")).layer_spec(Q)
    codes = torch.zeros((4, 32), dtype=torch.uint8)
    scale = torch.full((4, 2), 254, dtype=torch.uint8)
    to_weight(spec, {Role.CODES: codes, Role.BLOCK_SCALE: scale}, [4])
    scale[3, 1] = 255
    with pytest.raises(CheckpointError, match=r"1 bad of 8, first 255 at \[3, 1\]"):
        to_weight(spec, {Role.CODES: codes, Role.BLOCK_SCALE: scale}, [4])


@pytest.mark.parametrize("value", [0.0, -1.0, float("nan"), float("inf")])
def test_bad_global_scales_are_refused(value):
    spec, tensors = nvfp4_layer()
    tensors[Role.GLOBAL_SCALE] = torch.tensor([1.0, value])
    with pytest.raises(CheckpointError, match=r"weight_scale_2: found 1 bad of 2, first .* \[1\]"):
        to_weight(spec, tensors, [6, 2], "m.q")


def test_a_divisor_without_a_reciprocal_is_refused():
    spec = detect(compressed()).layer_spec(Q)
    _, tensors = nvfp4_layer()
    tensors[Role.GLOBAL_DIVISOR] = torch.tensor([1e-45, 1.0])
    with pytest.raises(CheckpointError, match=r"1 / m\.q\.weight_global_scale"):
        to_weight(spec, tensors, [6, 2], "m.q")


def test_wrong_shapes_are_refused():
    spec, tensors = nvfp4_layer()
    with pytest.raises(CheckpointError, match=r"weight_scale: found \[8, 1\]; needed \[8, 2\]"):
        to_weight(
            spec, tensors | {Role.BLOCK_SCALE: tensors[Role.BLOCK_SCALE][:, :1]}, [6, 2], "m.q"
        )
    with pytest.raises(CheckpointError, match="2 values; needed 3"):
        to_weight(spec, tensors, [2, 2, 4])
    with pytest.raises(CheckpointError, match="K: found 24; needed a multiple of 16"):
        to_weight(spec, tensors | {Role.CODES: tensors[Role.CODES][:, :12]}, [6, 2])


def test_a_tensor_parallel_cut_through_a_block_is_refused():
    spec, _ = nvfp4_layer()
    check_blocks("m.down", spec, 48, 96)
    with pytest.raises(CheckpointError, match=r"24 \(96 over 4 ranks\).*divides 6"):
        check_blocks("m.down", spec, 24, 96)
    rotated = detect(fp_quant(hadamard_group_size=128)).layer_spec(Q)
    with pytest.raises(CheckpointError, match="a multiple of 128, the rotation"):
        check_blocks("m.down", rotated, 64, 256)


def test_fp8_scales_become_one_per_row():
    tensor_spec = detect(modelopt("FP8")).layer_spec(Q)
    row_spec = detect(modelopt("FP8_PER_CHANNEL_PER_TOKEN")).layer_spec(Q)
    weight = torch.ones((4, 8)).to(torch.float8_e4m3fn)
    got = fp8_to_rows(
        tensor_spec, {Role.WEIGHT: weight, Role.WEIGHT_SCALE: torch.tensor([2.0, 3.0])}, [3, 1]
    )
    assert got[1].tolist() == [2.0, 2.0, 2.0, 3.0]
    rows = torch.tensor([[1.0], [2.0], [3.0], [4.0]])
    got = fp8_to_rows(row_spec, {Role.WEIGHT: weight, Role.ROW_SCALE: rows}, [3, 1])
    assert got[1].tolist() == [1.0, 2.0, 3.0, 4.0]
    with pytest.raises(CheckpointError, match="3 values; needed 4, one a row"):
        fp8_to_rows(row_spec, {Role.WEIGHT: weight, Role.ROW_SCALE: rows[:3]}, [3, 1])
    bad = copy.deepcopy(weight)
    bad.view(torch.uint8)[2, 5] = 0x7F
    with pytest.raises(CheckpointError, match=r"weight: found 1 bad of 32, first nan at \[2, 5\]"):
        fp8_to_rows(row_spec, {Role.WEIGHT: bad, Role.ROW_SCALE: rows}, [3, 1])


def test_dialects_know_whether_they_hold_microscaled_layers():
    assert detect(modelopt("NVFP4")).has_microscaled_layers()
    assert detect(mixed()).has_microscaled_layers()
    assert detect(compressed()).has_microscaled_layers()
    assert detect(fp_quant()).has_microscaled_layers()
    assert not detect(modelopt("FP8")).has_microscaled_layers()
    fp8 = {"num_bits": 8, "type": "float", "strategy": "channel"}
    assert not detect(compressed(fp8, format="float-quantized")).has_microscaled_layers()
    assert not detect(None).has_microscaled_layers()


def test_descriptions_name_format_and_algorithm():
    assert describe(detect(modelopt("NVFP4")).layer_spec(Q)) == "nvfp4 (NVFP4)"
    assert describe(UNQUANTIZED) == "not quantised"
