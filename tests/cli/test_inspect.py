# SPDX-License-Identifier: Apache-2.0
"""``vllm-nvfp4 inspect``: what it shows, and what it does not import."""

import argparse
import io
import json
import subprocess
import sys
from math import prod

import pytest
import torch

from vllm_nvfp4.checkpoints.locate import find_folder
from vllm_nvfp4.checkpoints.spec import CheckpointError
from vllm_nvfp4.cli import inspect as command
from vllm_nvfp4.kernels.layout import pack_weight
from vllm_nvfp4.numerics.formats import NVFP4
from vllm_nvfp4.numerics.weight import BlockScaledWeight
from vllm_nvfp4.planning.find import built_in, find_shape
from vllm_nvfp4.planning.model import AS_STORED, weights_of
from vllm_nvfp4.testing.checkpoints import extract_fixture, fixture_names
from vllm_nvfp4.testing.tiny_models import write_model


def run(*argv: str) -> int:
    parser = argparse.ArgumentParser()
    command.add_parser(parser.add_subparsers())
    return command.run(parser.parse_args(["inspect", *argv]))


def run_json(capsys, *argv):
    assert run(*argv, "--json") == 0
    return json.loads(capsys.readouterr().out)


@pytest.mark.parametrize("name", fixture_names())
def test_every_dialect_is_shown(tmp_path, capsys, name):
    folder = extract_fixture(name, tmp_path)
    assert run(str(folder)) == 0
    text = capsys.readouterr().out
    layers = json.loads((folder / "config.json").read_text())["num_hidden_layers"]
    assert f"model.layers.{'{0-1}' if layers == 2 else 0}.self_attn.q_proj" in text
    report = run_json(capsys, str(folder))
    written = {"compressed_tensors": "compressed-tensors", "autoround": "auto-round"}
    tool = name.partition("/")[0]
    assert report["dialect"] == written.get(tool, tool)
    total = report["totals"][-1]
    assert total["num_bytes"] == sum(row["num_bytes"] for row in report["layers"])
    assert f"{total['num_bytes']:,}" in text


def test_layers_alike_are_folded_and_all_shows_each(tmp_path, capsys):
    folder = str(extract_fixture("modelopt/mixed-llama", tmp_path))
    rows = {row["name"]: row for row in run_json(capsys, folder)["layers"]}
    up = rows["model.layers.{0-1}.mlp.up_proj"]
    assert (up["count"], up["format"], up["algo"], up["shape"]) == (2, "nvfp4", "NVFP4", [128, 64])
    # Layer 1's down_proj was left in BF16, so the two do not fold.
    assert rows["model.layers.0.mlp.down_proj"]["format"] == "nvfp4"
    assert rows["model.layers.1.mlp.down_proj"]["format"] == "BF16"
    every = run_json(capsys, folder, "--all")["layers"]
    assert len(every) == sum(row["count"] for row in rows.values())
    assert "model.layers.1.mlp.up_proj" in {row["name"] for row in every}


def test_totals_add_up_by_part_and_format(tmp_path, capsys):
    report = run_json(capsys, str(extract_fixture("modelopt/mixed-llama", tmp_path)))
    totals = {(row["name"], row["format"]): row for row in report["totals"]}
    assert totals[("linear layers", "fp8")]["count"] == 8
    assert totals[("linear layers", "nvfp4")]["count"] == 5
    assert totals[("linear layers", "nvfp4")]["bits_per_weight"] == pytest.approx(4.5, abs=0.02)
    assert totals[("lm_head", "BF16")]["bits_per_weight"] == 16
    weights = [row["num_weights"] for row in report["totals"]]
    assert sum(weights[:-1]) == weights[-1]


def test_paths_follow_the_options(tmp_path, capsys, monkeypatch):
    folder = str(write_model(tmp_path, "gemma3"))

    def paths():
        report = run_json(capsys, folder)
        assert report["tied_embeddings"] is True
        return {row["name"]: row["path"] for row in report["layers"]}

    assert paths()["model.layers.{0-1}.mlp.up_proj"].startswith("quantised to nvfp4 while loading")
    assert paths()["model.embed_tokens"] == "vLLM, BF16"
    monkeypatch.setenv("VLLM_NVFP4_LM_HEAD", "fp8")
    monkeypatch.setenv("VLLM_NVFP4_ONLINE_FORMAT", "mxfp4")
    monkeypatch.setenv("VLLM_NVFP4_ONLINE_IGNORE", "*down_proj")
    assert paths()["model.embed_tokens"] == "quantised to fp8 while loading"
    assert paths()["model.layers.{0-1}.mlp.up_proj"].startswith("quantised to mxfp4")
    assert paths()["model.layers.{0-1}.mlp.down_proj"] == "vLLM, BF16"


def test_rotation_is_shown(tmp_path, capsys):
    report = run_json(capsys, str(extract_fixture("fp_quant/mxfp4-llama", tmp_path)))
    assert any("rotated activations" in row["path"] for row in report["layers"])


@pytest.mark.parametrize(
    ("card", "words"),
    [
        ("4090", "W4A8 in INT8 per token and 64 columns (a8_variant=auto: 1.25 times FP8's rate"),
        ("L40S", "W4A8 in FP8 per token (a8_variant=auto: INT8 has 0.63 times its rate on paper)"),
        ("3090", "64 columns (a8_variant=auto: sm_86 has no FP8 tensor cores; 2.5 times BF16's"),
        (
            "A10",
            "W4A16 for every batch size (on sm_86 its INT8 gains less than 1.3 times on paper)",
        ),
        ("A100", "W4A16 for every batch size (on sm_80 its INT8 gains less than 1.3 times"),
        ("H100", "W4A16 for every batch size (sm_90 emulates FP8 mma.sync)"),
        ("5090", "vLLM's own kernels"),
    ],
)
def test_the_card_s_8_bits_are_those_of_dispatch(tmp_path, capsys, card, words):
    dense = extract_fixture("modelopt/nvfp4-qwen3", tmp_path / "dense")
    experts = extract_fixture("moe_modelopt/nvfp4-qwen3", tmp_path / "experts")
    for folder, kind in ((dense, "4-bit linear layers"), (experts, "4-bit experts")):
        report = run_json(capsys, str(folder), "--gpu", card)
        assert words in report["four_bit_paths"][kind].replace("tokens per expert", "batch size")
        assert run(str(folder), "--gpu", card) == 0
        assert f"{kind} on {report['gpu']}: " in capsys.readouterr().out
    widened = extract_fixture("modelopt/fp8-channel-llama", tmp_path / "fp8")
    assert run_json(capsys, str(widened), "--gpu", card)["four_bit_paths"] == {}


def test_an_option_by_name_is_what_the_card_line_tells(tmp_path, capsys, monkeypatch):
    folder = extract_fixture("modelopt/nvfp4-qwen3", tmp_path)
    monkeypatch.setenv("VLLM_NVFP4_A8_VARIANT", "folded")
    monkeypatch.setenv("VLLM_NVFP4_ACTIVATION", "8")
    [path] = run_json(capsys, str(folder))["four_bit_paths"].values()
    assert path == "CUDA kernel, W4A8 in FP8 per token, folded scales"


def test_names_fold_into_ranges():
    names = [f"model.layers.{i}.x" for i in (0, 1, 2, 5, 7, 8)]
    assert command._folded_name(names) == "model.layers.{0-2,5,7-8}.x"


def test_output_through_a_pipe_is_not_cut(tmp_path):
    folder = extract_fixture("modelopt/nvfp4-kv8-llama", tmp_path)
    code = (
        "import argparse, sys\n"
        "from vllm_nvfp4.cli import inspect\n"
        "p = argparse.ArgumentParser(); inspect.add_parser(p.add_subparsers())\n"
        f"status = inspect.run(p.parse_args(['inspect', {str(folder)!r}]))\n"
        "assert not {'torch', 'vllm', 'transformers', 'numpy'} & set(sys.modules)\n"
        "sys.exit(status)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert "model.layers.{0-1}.post_attention_layernorm" in done.stdout
    assert "…" not in done.stdout


def test_a_bad_checkpoint_is_an_error(tmp_path):
    folder = extract_fixture("modelopt/nvfp4-kv8-llama", tmp_path)
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(CheckpointError, match="truncated"):
        run(str(folder))


def test_a_model_is_a_folder_or_in_the_hub_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(CheckpointError, match="hf download owner/name"):
        find_folder("owner/name")
    snapshot = tmp_path / "models--owner--name" / "snapshots" / "abc"
    snapshot.mkdir(parents=True)
    refs = snapshot.parents[1] / "refs"
    refs.mkdir()
    (refs / "main").write_text("abc\n")
    assert find_folder("owner/name") == snapshot
    assert find_folder("owner/name", "abc") == snapshot
    assert find_folder(str(snapshot)) == snapshot
    with pytest.raises(CheckpointError, match="a file"):
        find_folder(str(refs / "main"))
    for way_out in ("../../../elsewhere", "/etc", "a\nb", ""):
        (refs / "main").write_text(way_out)
        with pytest.raises(CheckpointError, match="a branch, a tag or a commit"):
            find_folder("owner/name")
        with pytest.raises(CheckpointError, match="a branch, a tag or a commit"):
            find_folder("owner/name", way_out)
    monkeypatch.delenv("HF_HUB_CACHE")
    monkeypatch.setenv("HF_HOME", str(tmp_path / "home"))
    with pytest.raises(CheckpointError, match="no such folder"):
        find_folder("owner/name")


def write_headers(folder, model, num_layers):
    """A ModelOpt NVFP4 checkpoint of a mixture of experts, of holes in the place of weights."""
    config = built_in()[model]["config"] | {"num_hidden_layers": num_layers}
    config["quantization_config"] = {
        "quant_method": "modelopt", "quant_algo": "W4A16_NVFP4", "group_size": 16,
        "ignore": ["lm_head", "*mlp.gate"],
    }  # fmt: skip
    hidden, inner, head = (config[k] for k in ("hidden_size", "moe_intermediate_size", "head_dim"))
    q, kv = (config[f"num_{k}_heads"] * head for k in ("attention", "key_value"))
    tensors = {}

    def plain(name, *shape):
        tensors[f"{name}.weight"] = ("BF16", shape)

    def nvfp4(name, n, k):
        tensors[f"{name}.weight"] = ("U8", (n, k // 2))
        tensors[f"{name}.weight_scale"] = ("F8_E4M3", (n, k // 16))
        tensors[f"{name}.weight_scale_2"] = ("F32", ())

    plain("model.embed_tokens", config["vocab_size"], hidden)
    plain("lm_head", config["vocab_size"], hidden)
    plain("model.norm", hidden)
    for i in range(num_layers):
        layer = f"model.layers.{i}"
        for name, n, k in (
            ("q", q, hidden),
            ("k", kv, hidden),
            ("v", kv, hidden),
            ("o", hidden, q),
        ):
            nvfp4(f"{layer}.self_attn.{name}_proj", n, k)
        for name in ("self_attn.q_norm", "self_attn.k_norm"):
            plain(f"{layer}.{name}", head)
        for name in ("input_layernorm", "post_attention_layernorm"):
            plain(f"{layer}.{name}", hidden)
        plain(f"{layer}.mlp.gate", config["num_experts"], hidden)
        for e in range(config["num_experts"]):
            for name, n, k in (
                ("gate", inner, hidden),
                ("up", inner, hidden),
                ("down", hidden, inner),
            ):
                nvfp4(f"{layer}.mlp.experts.{e}.{name}_proj", n, k)
    header, end = {}, 0
    for name, (dtype, shape) in tensors.items():
        size = prod(shape) * {"BF16": 2, "U8": 1, "F8_E4M3": 1, "F32": 4}[dtype]
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [end, end + size]}
        end += size
    text = json.dumps(header).encode()
    with (folder / "model.safetensors").open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + end)
    (folder / "config.json").write_text(json.dumps(config))
    return config


def test_bytes_of_qwen3_30b_a3b_are_those_of_the_kernels_layout(tmp_path, capsys):
    """Its experts as ``pack_weight`` makes them for the grouped kernel, the whole as planned."""
    config = write_headers(tmp_path, "Qwen3-30B-A3B", num_layers=2)
    report = run_json(capsys, str(tmp_path))
    experts = [row for row in report["layers"] if ".experts." in row["name"]]
    packed = 0
    for n, k in ((2 * config["moe_intermediate_size"], config["hidden_size"]),
                 (config["hidden_size"], config["moe_intermediate_size"])):  # fmt: skip
        codes = torch.zeros(n, k // 2, dtype=torch.uint8)
        scale = torch.ones(n, k // 16).to(torch.float8_e4m3fn)
        one = pack_weight(BlockScaledWeight(codes, scale, torch.ones(n), NVFP4))
        packed += one.codes.nbytes + one.block_scale.nbytes + one.global_scale.nbytes
    assert sum(row["held_bytes"] for row in experts) == 2 * config["num_experts"] * packed
    assert {row["path"] for row in experts} == {"nvfp4 grouped kernel, W4A16 or W4A8 by batch size"}
    planned = weights_of(find_shape(str(tmp_path)), AS_STORED).total
    assert report["totals"][-1]["held_bytes"] == planned


def test_a_bias_does_not_hide_that_a_layer_is_quantised(tmp_path, capsys):
    rows = run_json(capsys, str(write_model(tmp_path, "llama-bias")))["layers"]
    up = next(row for row in rows if row["name"].endswith("up_proj"))
    assert up["path"].startswith("quantised to nvfp4 while loading")
    assert up["held_bytes"] < up["num_bytes"]


def test_routers_stay_as_they_are(tmp_path, capsys):
    for family, name in (("mixtral", "block_sparse_moe.gate"), ("qwen3_moe", "mlp.gate")):
        rows = run_json(capsys, str(write_model(tmp_path / family, family)))["layers"]
        assert [row["path"] for row in rows if row["name"].endswith(name)] == ["vLLM, BF16"]


class Terminal(io.StringIO):
    def isatty(self):
        return True


@pytest.mark.parametrize("name", ["modelopt/mixed-llama", "fp_quant/mxfp4-llama"])
def test_a_terminal_of_80_columns_gets_paragraphs(tmp_path, monkeypatch, name):
    folder = extract_fixture(name, tmp_path)
    out = Terminal()
    monkeypatch.setattr(sys, "stdout", out)
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.setenv("TERM", "xterm")
    assert run(str(folder)) == 0
    lines = out.getvalue().splitlines()
    assert [x for x in lines if len(x) > 80 and str(tmp_path) not in x] == []
    assert "model.layers.{0-1}.self_attn.q_proj" in lines
    assert "bits per weight" in out.getvalue()
    assert any(line.startswith("all ") for line in lines)
    assert "4-bit linear layers on GeForce RTX 4090: CUDA kernel" in " ".join(lines)
