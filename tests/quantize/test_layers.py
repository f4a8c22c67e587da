# SPDX-License-Identifier: Apache-2.0
"""Which tensors of a checkpoint are quantised, in families that name and stack them differently."""

from __future__ import annotations

import ast
import importlib.util
import re
import shutil
from pathlib import Path

import pytest
import torch
from families import FAMILIES, write_family
from made_once import made_once
from quantizing import write_with_tokenizer
from safetensors.torch import load_file

from vllm_nvfp4.checkpoints.model_class import UNQUANTIZED
from vllm_nvfp4.checkpoints.source import Source
from vllm_nvfp4.checkpoints.spec import CheckpointError
from vllm_nvfp4.checkpoints.units import FUSED, by_layer
from vllm_nvfp4.cli.main import main
from vllm_nvfp4.quantize.forward import LayerwiseModel
from vllm_nvfp4.testing.architectures import ARCHITECTURES, write_architecture
from vllm_nvfp4.testing.checkpoints import dequantized_state_dict, edit_json, edit_tensors


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """models(family) -> the folder of a tiny model, made once."""
    return made_once(tmp_path_factory.mktemp("models"), write_family)


def folded(names) -> set[str]:
    return {re.sub(r"\d+", "#", name.removesuffix(".weight")) for name in names}


@pytest.mark.parametrize("family", FAMILIES)
def test_all_but_what_is_named_is_quantised(models, family):
    """A matrix is quantised unless this table says that it is none; nothing is lost on the way."""
    folder = models(family)
    source = Source(folder)
    stored = {n for n, info in source.tensors.items() if len(info.shape) >= 2}
    quantized, kept = source.quantizable()
    assert folded(k.name for k in kept) == set(FAMILIES[family].kept)
    stacks = stored - quantized - {k.name for k in kept}
    state = load_file(folder / "model.safetensors")
    parts = source.tensors.keys() - state.keys()
    assert bool(stacks) == bool(parts)
    assert sum(state[n].numel() for n in stacks) == sum(
        source.load(n, "cpu").numel() for n in parts
    )
    again, kept_again = source.quantizable()
    assert (again, kept_again) == (quantized, kept)


@pytest.mark.parametrize(
    ("family", "stack", "is_transposed"),
    [
        ("qwen3_vl_moe", "model.language_model.layers.1.mlp.experts", False),
        ("gemma4_moe", "model.layers.1.experts", False),
        ("llama4", "model.layers.1.feed_forward.experts", True),
        ("gpt_oss", "model.layers.1.mlp.experts", True),
    ],
)
def test_a_stack_is_taken_apart_in_its_own_order(models, family, stack, is_transposed):
    source = Source(models(family))
    source.quantizable()
    state = load_file(models(family) / "model.safetensors")
    both, down = state[f"{stack}.gate_up_proj"], state[f"{stack}.down_proj"]
    if is_transposed:
        both, down = both.mT, down.mT
    gate, up = both.chunk(2, 1) if family != "gpt_oss" else (both[:, ::2], both[:, 1::2])
    for leaf, expected in (("gate_proj", gate), ("up_proj", up), ("down_proj", down)):
        for expert in range(4):
            found = source.load(f"{stack}.{expert}.{leaf}.weight", "cpu")
            assert torch.equal(found, expected[expert]), (leaf, expert)


def test_the_hub_s_transposed_stack_of_a_class_that_has_it_straight(models, tmp_path):
    """Qwen3-VL-MoE is published with [E, K, N]; transformers' class and its own files have
    [E, N, K]. The shapes decide."""
    from safetensors.torch import save_file

    folder = tmp_path / "model"
    folder.mkdir()
    state = load_file(models("qwen3_vl_moe") / "model.safetensors")
    turned = {n: t.mT.contiguous() if "mlp.experts" in n else t for n, t in state.items()}
    save_file(turned, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_bytes((models("qwen3_vl_moe") / "config.json").read_bytes())
    ours, theirs = Source(folder), Source(models("qwen3_vl_moe"))
    names = {n for n in ours.quantizable()[0] if ".experts." in n}
    assert names == {n for n in theirs.quantizable()[0] if ".experts." in n}
    for name in names:
        assert torch.equal(ours.load(name, "cpu"), theirs.load(name, "cpu")), name


@pytest.mark.parametrize("family", ["granite4", "qwen3_vl_moe", "deepseek_v3"])
def test_what_is_written_reads_back(models, tmp_path, family):
    """Each matrix near its source; the shards of a fused layer with one global scale."""
    target = tmp_path / "out"
    assert main(["quantize", str(models(family)), "-o", str(target), "--method", "rtn"]) == 0
    source = Source(models(family))
    quantized, _ = source.quantizable()
    after, stored = dequantized_state_dict(target), {}
    for path in target.glob("*.safetensors"):
        stored |= load_file(path)
    for name in quantized:
        weight = source.load(name, "cpu").float()
        assert (after[name].float() - weight).norm() < 0.15 * weight.norm(), name
    for unit in by_layer(source.tensors, quantized):
        for group in unit.groups:
            if group[0] in quantized:
                assert len({stored[f"{n}_scale_2"].item() for n in group}) == 1, group
    if family == "deepseek_v3":
        pair = [f"model.layers.1.self_attn.{n}.weight" for n in ("q_a_proj", "kv_a_proj_with_mqa")]
        groups = [g for unit in by_layer(source.tensors, quantized) for g in unit.groups]
        assert any(set(g) == set(pair) for g in groups)


def test_what_stays_is_said_with_its_share(models, tmp_path, capfd):
    arguments = ["quantize", str(models("jamba")), "-o", str(tmp_path / "out"), "--method", "rtn"]
    assert main(arguments) == 0
    said = "".join(capfd.readouterr())
    total = sum(t.nbytes for t in load_file(models("jamba") / "model.safetensors").values())
    state = load_file(models("jamba") / "model.safetensors")
    mamba = sum(t.nbytes for n, t in state.items() if re.search(r"mamba\.\w+_proj\.weight", n))
    assert f"layers that vLLM builds in 16 bits, {mamba / total:.1%} of the bytes" in said
    assert "warning: " in said


def test_no_warning_for_what_is_kept_by_default(models, tmp_path, capfd):
    arguments = ["quantize", str(models("qwen3")), "-o", str(tmp_path / "out"), "--method", "rtn"]
    assert main(arguments) == 0
    said = "".join(capfd.readouterr())
    assert "lm_head" in said
    assert "warning: " not in said


def test_towers_are_quantised_when_asked(models):
    quantized, kept = Source(models("qwen3_vl_moe")).quantizable(with_towers=True)
    assert "model.visual.blocks.0.attn.qkv.weight" in quantized
    assert {k.kind for k in kept if "visual" in k.name} == {
        "embeddings",
        "convolutions and other parameters",
    }


def test_a_model_without_a_class_is_refused(models, tmp_path, capsys):
    folder = tmp_path / "model"
    write_family(folder, "qwen3")
    edit_json(
        folder / "config.json",
        lambda c: c.update(architectures=["NobodysForCausalLM"], model_type="nobodys"),
    )
    assert main(["quantize", str(folder), "-o", str(tmp_path / "out")]) == 1
    error = capsys.readouterr().err
    assert "config.json: architectures" in error
    assert "Traceback" not in error
    assert not (tmp_path / "out").exists()


def test_conv1d_is_named_where_nothing_is_left(tmp_path):
    import transformers

    config = transformers.GPT2Config(vocab_size=64, n_embd=32, n_layer=1, n_head=2, n_positions=16)
    transformers.GPT2LMHeadModel(config).save_pretrained(tmp_path)
    edit_json(tmp_path / "config.json", lambda c: c.update(architectures=["GPT2LMHeadModel"]))
    with pytest.raises(CheckpointError, match="Conv1D"):
        Source(tmp_path).quantizable()


def test_an_extra_draft_layer_is_known_by_its_peers(models, tmp_path):
    """DeepSeek's and GLM's files hold a layer past the last one, of which transformers knows
    nothing: its linear layers are those of the others, and what is its own stays."""
    from safetensors.torch import save_file

    state = load_file(models("glm47_flash") / "model.safetensors")
    last = {
        n.replace("layers.1.", "layers.2."): t.clone() for n, t in state.items() if "layers.1." in n
    }
    extra = {"model.layers.2.eh_proj.weight": torch.zeros(64, 128, dtype=torch.bfloat16)}
    save_file(state | last | extra, tmp_path / "model.safetensors", metadata={"format": "pt"})
    (tmp_path / "config.json").write_bytes((models("glm47_flash") / "config.json").read_bytes())
    quantized, kept = Source(tmp_path).quantizable()
    ours = {n for n in quantized if ".layers.2." in n}
    assert {n.replace("layers.2.", "layers.1.") for n in ours} == {
        n for n in quantized if ".layers.1." in n
    }
    assert [k.name for k in kept if k.kind.startswith("tensors that")] == [*extra]


# --- the table of what vLLM fuses -----------------------------------------------------------------


def _literal(node: ast.AST):
    try:
        return ast.literal_eval(node)
    except ValueError:
        return None


def _fused_in(tree: ast.AST):
    """Leaves that a class of vLLM fuses: packed_modules_mapping, and what load_weights stacks."""
    for node in ast.walk(tree):
        if not isinstance(node, (ast.Assign, ast.AnnAssign)) or node.value is None:
            continue
        targets = node.targets if isinstance(node, ast.Assign) else [node.target]
        text = " ".join(ast.unparse(t) for t in targets)
        if "packed_modules_mapping" in text:
            for part in ast.walk(node.value):
                if isinstance(part, (ast.List, ast.Tuple)):
                    yield _literal(part) or ()
        elif (
            "params_mapping" in text
            and "indexer" not in text
            and isinstance(node.value, (ast.List, ast.Tuple))
        ):
            stacked: dict[str, list[str]] = {}
            for entry in map(_literal, node.value.elts):
                if isinstance(entry, tuple) and len(entry) == 3 and isinstance(entry[1], str):
                    stacked.setdefault(entry[0], []).append(entry[1])
            yield from stacked.values()


def test_the_fused_layers_are_all_that_vllm_has():
    root = Path(importlib.util.find_spec("vllm").origin).parent
    found: dict[tuple[str, ...], str] = {}
    for path in sorted((root / "model_executor" / "models").glob("*.py")):
        for names in _fused_in(ast.parse(path.read_text())):
            leaves = tuple(str(n).strip(".").rpartition(".")[2] for n in names)
            if len(set(leaves)) > 1:
                found[leaves] = path.name
    assert ("q_proj", "k_proj", "v_proj") in found
    table = [set(group) for group in FUSED]
    missing = {
        leaves: file
        for leaves, file in found.items()
        if not any(set(leaves) & group and set(leaves) <= group for group in table)
    }
    assert not missing
    unknown = {leaf for group in table for leaf in group} - {n for names in found for n in names}
    assert not unknown


def _built_plain(path: Path, name: str) -> set[str]:
    """Linear layers that a class of vLLM builds without a quantization config."""
    tree = ast.parse(path.read_text())
    (found,) = [n for n in ast.walk(tree) if isinstance(n, ast.ClassDef) and n.name == name]
    plain = set()
    for node in ast.walk(found):
        if not isinstance(node, ast.Assign) or not isinstance(node.value, ast.Call):
            continue
        if not ast.unparse(node.value.func).endswith("Linear"):
            continue
        given = {k.arg: ast.unparse(k.value) for k in node.value.keywords}
        if given.get("quant_config", "None") == "None":
            plain.add(ast.unparse(node.targets[0]).removeprefix("self."))
    return plain


def test_what_vllm_builds_without_quantisation_is_in_the_table():
    import transformers

    root = Path(importlib.util.find_spec("vllm").origin).parent / "model_executor"
    mamba = _built_plain(root / "layers" / "mamba" / "mamba_mixer.py", "MambaMixer")
    assert {"in_proj", "x_proj", "dt_proj", "out_proj"} <= mamba
    assert _built_plain(root / "layers" / "mamba" / "mamba_mixer2.py", "MambaMixer2") <= {"conv1d"}
    indexer = _built_plain(root / "models" / "deepseek_v2.py", "Indexer")
    leaves = {frozenset(v) for v in UNQUANTIZED.values() if v is not None}
    assert indexer == {"wk_weights_proj"}
    assert leaves == {frozenset({"wk", "weights_proj"})}
    classes = {
        name
        for path in Path(transformers.__file__).parent.glob("models/*/modeling_*.py")
        for name in re.findall(r"^class (\w+)\(", path.read_text(), re.MULTILINE)
    }
    assert UNQUANTIZED.keys() <= classes


@pytest.mark.parametrize("family", ["mixtral", "ernie4.5-moe", "granite-moe"])
def test_files_as_transformers_class_has_them_give_what_the_hubs_do(family, tmp_path):
    """Other names, experts one by one or stacked, routers, biases."""
    found = []
    for is_own in (False, True):
        folder = write_architecture(tmp_path / str(is_own), ARCHITECTURES[family], is_own=is_own)
        stored = load_file(folder / "model.safetensors").keys()
        assert (stored <= Source(folder).tensors.keys()) != is_own
        assert main(["quantize", str(folder), "-o", str(folder / "4"), "--method", "rtn"]) == 0
        files = (folder / "4").glob("*.safetensors")
        found.append({n: t.tolist() for file in files for n, t in load_file(file).items()})
    assert found[0] == found[1]


# --- whether vLLM can load it ---------------------------------------------------------------------


@pytest.mark.checks_written
@pytest.mark.parametrize("family", ["qwen3_moe", "glm47_flash", "qwen3_vl_moe", "whisper"])
def test_vllm_has_a_place_for_every_tensor(models, tmp_path, capfd, family):
    target = tmp_path / "out"
    assert main(["quantize", str(models(family)), "-o", str(target), "--method", "rtn"]) == 0
    assert "has a place for every tensor" in "".join(capfd.readouterr())


@pytest.mark.checks_written
def test_what_vllm_cannot_load_is_refused_before_a_weight_is_read(
    models, tmp_path, capfd, monkeypatch
):
    """A tensor that vLLM's class has no place for."""
    odd = "model.layers.0.mlp.odd_proj.weight"
    source = shutil.copytree(models("jamba"), tmp_path / "source")
    edit_tensors(source, lambda tensors: tensors.update({odd: torch.ones(64, 64)}))
    target = tmp_path / "out"
    arguments = ["quantize", str(source), "-o", str(target), "--method", "rtn"]
    with monkeypatch.context() as patch:
        patch.setattr(Source, "load", None)
        assert main(arguments) == 1
    error = capfd.readouterr().err
    assert odd.removesuffix(".weight") in error
    assert "found found" not in error
    assert "--no-check" in error
    assert f"{source}: " in error
    assert not [*tmp_path.glob("*out*")]
    assert main([*arguments, "--no-check"]) == 0
    assert target.is_dir()


@pytest.mark.parametrize(
    ("flags", "found"),
    [
        (["--towers", "--target-bits", "6"], "neither in a decoder layer nor lm_head"),
        (["--kv-cache", "fp8", "--samples", "9999"], "needed 9999 samples"),
    ],
)
def test_what_needs_no_layer_is_refused_before_one_runs(flags, found, tmp_path, capfd, monkeypatch):
    write_with_tokenizer(tmp_path / "model", "qwen3_vl_moe")
    monkeypatch.setattr(LayerwiseModel, "layer", None)
    monkeypatch.setattr(Source, "load_finite", None)
    arguments = ["quantize", str(tmp_path / "model"), "-o", str(tmp_path / "out")]
    assert main([*arguments, "--method", "rtn", *flags]) == 1
    assert found in capfd.readouterr().err
