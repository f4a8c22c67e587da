# SPDX-License-Identifier: Apache-2.0
"""plan: bytes against real tensors, the roofline by hand, the choice, errors, and no torch."""

from __future__ import annotations

import json
import shlex
import subprocess
import sys
from dataclasses import replace

import pytest
import torch

from vllm_nvfp4.checkpoints.detect import read_config
from vllm_nvfp4.checkpoints.headers import read_headers
from vllm_nvfp4.checkpoints.inventory import EMBEDDING, HEAD, LINEAR, OTHER
from vllm_nvfp4.checkpoints.validate import validate
from vllm_nvfp4.checkpoints.write import write_nvfp4
from vllm_nvfp4.cli.main import main
from vllm_nvfp4.gpus import PRICES, find_gpu
from vllm_nvfp4.kernels.layout import pack_weight
from vllm_nvfp4.numerics.quantize import quantize_mxfp4, quantize_nvfp4
from vllm_nvfp4.options import Options
from vllm_nvfp4.planning import model as planning
from vllm_nvfp4.planning import pictures
from vllm_nvfp4.planning.cards import find_card
from vllm_nvfp4.planning.find import built_in, find_shape
from vllm_nvfp4.planning.kv import nvfp4_obstacle
from vllm_nvfp4.planning.shapes import ROUTER, Latent
from vllm_nvfp4.testing.checkpoints import extract_fixture
from vllm_nvfp4.testing.tiny_models import build_model


def plan(capsys, *args):
    assert main(["plan", "--json", *args]) == 0
    return json.loads(capsys.readouterr().out)


# --- bytes --------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def smollm2(tmp_path_factory):
    """A layer of SmolLM2-135M's dimensions: a K that is no multiple of 128, tied embeddings."""
    from transformers import AutoModelForCausalLM, LlamaConfig

    config = LlamaConfig(
        hidden_size=576, intermediate_size=1536, num_hidden_layers=1, num_attention_heads=9,
        num_key_value_heads=3, vocab_size=49152, max_position_embeddings=8192,
        tie_word_embeddings=True,
    )  # fmt: skip
    folder = tmp_path_factory.mktemp("smollm2")
    model = AutoModelForCausalLM.from_config(config).to(torch.bfloat16)
    model.config.architectures = ["LlamaForCausalLM"]
    model.save_pretrained(folder)
    return folder


@pytest.mark.parametrize(
    ("scheme", "fmt"),
    [("FP8_DYNAMIC", "fp8"), ("W4A16", "int4"), ("MXFP4A16", "mxfp4"), (None, "bf16")],
)
def test_checkpoint_bytes_are_those_of_compressed_tensors(smollm2, scheme, fmt, tmp_path):
    shape = find_shape(str(smollm2))
    folder = smollm2
    if scheme:
        folder = tmp_path
        _compress(smollm2, folder, scheme, shape.int4_group)
    stored = sum(tensor.num_bytes for tensor in read_headers(folder).values())
    assert stored == sum(planning.checkpoint_parts(shape, fmt).values())


def _compress(source, folder, scheme, group):
    from compressed_tensors.compressors import ModelCompressor
    from compressed_tensors.quantization import (
        QuantizationConfig,
        apply_quantization_config,
        preset_name_to_scheme,
    )
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.bfloat16)
    chosen = preset_name_to_scheme(scheme, ["Linear"])
    if scheme == "W4A16":
        chosen.weights.group_size = group
    config = QuantizationConfig(config_groups={"all": chosen}, ignore=["lm_head"])
    apply_quantization_config(model, config)
    for module in model.modules():
        if hasattr(module, "weight_scale"):
            module.weight_scale.data.fill_(1)
    with torch.compiler.set_stance("force_eager"):  # it compiles a few lines, for seconds
        ModelCompressor(quantization_config=config).compress_model(model)
    model.save_pretrained(folder)


@pytest.mark.parametrize("family", ["smollm2", "llama", "llama-bias", "qwen3", "gemma3"])
def test_checkpoint_bytes_are_those_that_inspect_adds_up(family, smollm2, tmp_path):
    source = smollm2
    if family != "smollm2":
        source = tmp_path / "bf16"
        build_model(family).save_pretrained(source)
    write_nvfp4(source, tmp_path / "nvfp4", method="rtn")
    for folder, fmt in ((source, "bf16"), (tmp_path / "nvfp4", "nvfp4")):
        shape = find_shape(str(folder))
        inventory = validate(folder, *read_config(folder))
        found = dict.fromkeys((LINEAR, HEAD, EMBEDDING, OTHER), 0)
        for layer in inventory.layers:
            found[layer.part] += layer.num_bytes
        planned = planning.checkpoint_parts(shape, fmt)
        assert sum(found.values()) == sum(planned.values())
        assert (found[HEAD], found[EMBEDDING]) == (planned[HEAD], planned[EMBEDDING])
        if family != "llama-bias":  # inspect counts a bias with its layer
            assert found == planned


@pytest.mark.parametrize("name", [n for n, e in built_in().items() if "published_bytes" in e])
def test_published_checkpoints_to_the_byte(name):
    """The total_size of each published model.safetensors.index.json."""
    shape = find_shape(name)
    parts = planning.checkpoint_parts(shape, planning.AS_STORED if shape.stored else "bf16")
    assert sum(parts.values()) == built_in()[name]["published_bytes"]
    assert built_in()[name]["source"]


@pytest.mark.parametrize(
    ("name", "published", "unit", "rel"),
    [
        # nvidia/Llama-3.1-8B-Instruct-FP4, model.safetensors with its header and the scales of
        # activations and KV cache: github.com/Mario85111/VRTX-Checker, test-vram.mjs.
        pytest.param("Llama-3.1-8B", 6_027_861_376, 1, 5e-5, id="nvidia-llama-3.1-8b"),
        # RedHatAI/Qwen3-30B-A3B-NVFP4, the folder: model card of ThakiCloud/Qwen3-30B-A3B-NVFP4-
        # GPTQ, which writes GB; by the BF16 model's 56.89 beside it, 61.06e9 bytes, they are GiB.
        pytest.param("Qwen3-30B-A3B", 16.88, 2**30, 5e-3, id="redhat-qwen3-30b-a3b"),
    ],
)
def test_published_nvfp4_checkpoints(name, published, unit, rel):
    planned = sum(planning.checkpoint_parts(find_shape(name), "nvfp4").values())
    assert planned < published * unit
    assert planned == pytest.approx(published * unit, rel=rel)


def test_what_gemma_3_leaves_out_is_as_transformers_fills_it_in(tmp_path):
    from transformers import Gemma3TextConfig

    given = {"model_type": "gemma3_text", "hidden_size": 2560, "intermediate_size": 10240,
             "num_hidden_layers": 34}  # fmt: skip
    outer = {"model_type": "gemma3", "text_config": given, "vision_config": {"hidden_size": 1152}}
    (tmp_path / "config.json").write_text(json.dumps(outer))
    shape, filled = find_shape(str(tmp_path)), Gemma3TextConfig(**given)
    for key in ("vocab_size", "num_attention_heads", "num_key_value_heads", "head_dim"):
        assert getattr(shape, key) == getattr(filled, key)
    assert shape.max_context == filled.max_position_embeddings
    assert set(shape.windows) == {0, filled.sliding_window}
    assert shape.has_vision


@pytest.mark.parametrize(("n", "k"), [(16, 64), (48, 96), (50, 160)])
def test_held_bytes_are_those_of_packed_tensors(n, k):
    weight = torch.randn(n, k)
    for fmt, quantized in (("nvfp4", quantize_nvfp4(weight)), ("mxfp4", quantize_mxfp4(weight))):
        packed = pack_weight(quantized)
        tensors = (packed.codes, packed.block_scale, packed.global_scale)
        assert planning.held_bytes(n, k, fmt) == sum(t.nbytes for t in tensors)


@pytest.mark.parametrize("name", list(built_in()))
def test_two_cards_hold_one_card_s_weights_and_the_repeated_parts(name):
    shape = find_shape(name)
    one, two = (planning.weights_of(shape, "nvfp4", cards=cards) for cards in (1, 2))
    repeated = 2 * (shape.num_other + shape.num_weights(ROUTER))
    missing = 2 * two.total - one.total - repeated
    # A layer cut by columns has its row scales on both cards; tiles are padded on each.
    assert 0 <= missing < 0.03 * one.total


# --- the mission's claims -----------------------------------------------------------------------


def test_70b_in_nvfp4_does_not_fit_24_gb(capsys):
    shape = find_shape("Llama-3.1-70B")
    bits = shape.num_weights() + 2 * shape.vocab_size * shape.hidden_size
    assert bits * 4 / 8 == pytest.approx(35e9, rel=0.01)
    assert bits * 4.5 / 8 == pytest.approx(39.7e9, rel=0.01)
    found = plan(capsys, "Llama-3.1-70B", "--gpu", "RTX 4090")
    row = found["formats"][0]
    assert (row["setup"]["fmt"], row["cards"], row["recommended"]) == ("nvfp4", 2, True)
    assert planning.weights_of(shape, "nvfp4").total == pytest.approx(42.7e9, rel=0.01)
    assert row["longest_context"] >= 8192
    assert found["bf16_on_a100"]["cards"] == 2


@pytest.mark.parametrize(("name", "limit"), [("Qwen3-8B", 195), ("Gemma3-27B", 58)])
def test_what_one_short_sequence_can_reach_on_an_rtx_4090(name, limit, capsys):
    found = plan(capsys, name, "--gpu", "4090", "--context", "160")["recommended"]
    assert round(found["decode"]["tokens_per_s"]) == limit


# --- limits -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "args",
    [
        ["Qwen3-8B", "--concurrency", "4"],
        ["Gemma3-27B", "--concurrency", "64", "--gpu", "H200"],
        ["Qwen3-30B-A3B", "--gpu", "L40S", "--concurrency", "8"],
        ["Llama-3.1-70B", "--gpu", "L4", "--prompt", "5000"],
    ],
)
def test_every_limit_follows_from_the_printed_terms(args, capsys):
    for row in plan(capsys, *args)["formats"]:
        for step in (row["decode"], row["prefill"]):
            memory = (step["weight_bytes"] + step["kv_bytes"]) / (step["gbps"] * 1e9)
            arithmetic = step["linear_flops"] / step["linear_tflops"] / 1e12
            arithmetic += step["other_flops"] / step["other_tflops"] / 1e12
            limit = step["tokens"] / max(memory, arithmetic)
            assert step["tokens_per_s"] == pytest.approx(limit)
            assert (step["bound"] == "compute") == (arithmetic > memory)


def test_a_dense_limit_by_hand(capsys):
    row = plan(capsys, "Qwen3-8B", "--gpu", "RTX 4090", "--kv-bits", "16")["bf16_on_the_same_card"]
    layer = 4096 * (4096 + 2 * 1024) + 4096 * 4096 + 3 * 4096 * 12288
    norms = 36 * (2 * 4096 + 2 * 128) + 4096
    read = 2 * (36 * layer + 151936 * 4096 + norms) + 8192 * 36 * 2 * 8 * 128 * 2
    assert row["decode"]["tokens_per_s"] == pytest.approx(1008e9 / read)
    attention = 36 * 4 * 32 * 128 * 2048 * 2049 / 2
    flops = 2 * 2048 * 36 * layer + 2 * 151936 * 4096 + attention
    assert row["prefill"]["tokens_per_s"] == pytest.approx(2048 * 165.2e12 / flops)


@pytest.mark.parametrize(
    ("card", "tflops", "words"),
    [
        # An SM issues 128 lanes per clock; 4.2 / 128 + 0.167 of them for a weight and a token.
        ("4090", 2 * 128 * 128 * 2.52e-3 / (4.2 / 128 + 0.167), "W4A8 in INT8"),
        ("3090", 2 * 128 * 82 * 1.695e-3 / (4.2 / 128 + 0.167), "W4A8 in INT8"),
        ("L40S", 733.0, "W4A8 in FP8 per token"),
        ("A10", 125.0, "W4A16 for every batch size"),
        ("A100", 312.0, "W4A16 for every batch size"),
        ("H100", 989.4, "W4A16 for every batch size"),
    ],
)
def test_prefill_s_rate_is_that_of_the_activations_that_the_card_takes(card, tflops, words, capsys):
    result = plan(capsys, "Qwen3-8B", "--gpu", card)
    row = next(row for row in result["formats"] if row["setup"]["fmt"] == "nvfp4")
    assert row["prefill"]["linear_tflops"] == pytest.approx(tflops)
    assert words in result["four_bit_paths"]["4-bit linear layers"]
    assert main(["plan", "Qwen3-8B", "--gpu", card]) == 0
    assert "4-bit linear layers: CUDA kernel, W4A16" in capsys.readouterr().out


def test_an_nvfp4_kv_cache_has_scales_and_is_for_heads_of_128_and_more(capsys):
    found = {
        bits: plan(capsys, "Qwen3-8B", "--kv-bits", bits)["formats"][0]["kv_bytes"]
        for bits in ("4", "8", "16")
    }
    assert found["4"] * 16 == found["8"] * 9 == found["16"] * 4.5
    assert main(["plan", "Qwen3-8B", "--kv-bits", "4"]) == 0
    assert "--kv-cache-dtype nvfp4" in capsys.readouterr().out
    assert plan(capsys, "Qwen3-8B")["recommended"]["setup"]["kv_bits"] == 8  # the default


@pytest.mark.parametrize(
    ("change", "obstacle"),
    [
        ({"head_dim": 64}, "its attention heads have 64 elements, not one of 128, 256, 512"),
        ({"family": "gpt_oss"}, "it has attention sinks"),
        ({"latent": Latent(512, 64, 128, 128)}, "it has latent attention"),
        ({}, None),
    ],
)
def test_what_vllm_refuses_an_nvfp4_kv_cache_for(change, obstacle):
    assert nvfp4_obstacle(replace(find_shape("Qwen3-8B"), **change)) == obstacle


def test_a_window_bounds_what_is_read_and_one_token_reads_only_its_experts():
    gemma, moe, gpu = find_shape("Gemma3-27B"), find_shape("Qwen3-30B-A3B"), find_gpu("L40S")
    steps = [
        planning.decode(gemma, planning.weights_of(gemma, "nvfp4"), "nvfp4", 8, n, 1, gpu)
        for n in (8192, 8193)
    ]
    full_layers = sum(window == 0 for window in gemma.windows)
    assert steps[1].kv_bytes - steps[0].kv_bytes == full_layers * 2 * 16 * 128
    weights = planning.weights_of(moe, "nvfp4")
    one, many = (planning.decode(moe, weights, "nvfp4", 8, 1, b, gpu) for b in (1, 512))
    resident = weights.total - weights.embedding - weights.experts
    assert one.weight_bytes == pytest.approx(resident + weights.experts / 16)
    assert many.weight_bytes == pytest.approx(resident + weights.experts)


def test_cards_share_the_traffic_however_the_weights_are_counted():
    shape, gpu = find_shape("Llama-3.1-70B"), find_gpu("L40S")
    limits = [
        planning.decode(
            shape, planning.weights_of(shape, "bf16", cards=n), "bf16", 16, 1, 1, gpu, 4
        )
        for n in (1, 4)
    ]
    assert limits[0].gbps == 4 * gpu.dram_gbps
    # Norms are on every card: that is all the difference.
    assert limits[1].weight_bytes - limits[0].weight_bytes == 3 * 2 * shape.num_other


# --- cost ---------------------------------------------------------------------------------------


def test_cost_by_hand(capsys):
    rented = plan(capsys, "Qwen3-8B", "--price", "0.5")["recommended"]
    assert rented["cost"]["per_h"] == 0.5
    assert rented["cost"]["per_month"] == 365
    speed = rented["decode"]["tokens_per_s"]
    assert rented["dollars_per_million_tokens"] == pytest.approx(0.5 / 3600 / speed * 1e6)
    bought = plan(capsys, "Qwen3-8B", "--buy", "2000", "--electricity", "0.2")["recommended"]
    assert bought["cost"]["per_h"] == pytest.approx(2000 / (3 * 8766) + 0.45 * 0.2)
    table = plan(capsys, "Qwen3-8B")
    assert table["recommended"]["cost"]["per_h"] == PRICES["GeForce RTX 4090"].rent_per_h
    assert "2026" in table["recommended"]["cost"]["basis"]


def test_a_card_without_a_price_says_so(capsys):
    assert main(["plan", "Qwen3-8B", "--gpu", "A100 40GB"]) == 0
    assert "give --price or --buy" in capsys.readouterr().out


# --- the choice ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("args", "setup", "words"),
    [
        (["Qwen3-8B"], {"fmt": "nvfp4", "cards": 1, "kv_bits": 8, "attention": ""}, "plain NVFP4"),
        (["Qwen3-8B", "--accuracy", "high"], {"attention": "bf16", "cards": 1}, "16 bits"),
        (["Qwen3-8B", "--gpu", "A100"], {"kv_bits": 16}, "16-bit KV cache"),
        (["Qwen3-32B", "--context", "16000"], {"lm_head": "fp8", "cards": 1}, "leave no room"),
        (["Llama-3.1-70B"], {"cards": 2}, "fewer than 2 cards"),
    ],
)
def test_the_recommendation_fits_and_gives_its_reason(args, setup, words, capsys):
    found = plan(capsys, *args)
    chosen = found["recommended"]
    assert chosen["total_bytes"] <= chosen["budget_bytes"]
    assert {key: chosen["setup"][key] for key in setup} == setup
    assert words in found["reason"]


def test_a_quantised_checkpoint_is_planned_as_it_is(tmp_path, capsys):
    """Its quantization config alone decides: half of the layers in FP8, no weights at hand."""
    folder = extract_fixture("modelopt/mixed-llama", tmp_path)
    (folder / "model.safetensors").unlink()
    found = plan(capsys, str(folder), "--accuracy", "high", "--context", "128")
    row = found["formats"][0]
    assert row["setup"]["fmt"] == "checkpoint"
    assert row["recommended"]
    totals = {r["setup"]["fmt"]: r["weight_bytes"]["linear"] for r in found["formats"]}
    assert totals["nvfp4"] < totals["checkpoint"] < totals["bf16"]
    assert "as it is" in found["reason"]
    assert "additional-config" not in found["command"]


def test_nothing_is_recommended_where_nothing_fits(capsys):
    args = ["Llama-3.1-70B", "--gpu", "RTX 4070", "--context", "131072", "--concurrency", "64"]
    assert main(["plan", *args]) == 0
    assert "Recommended: nothing" in capsys.readouterr().out


@pytest.mark.vllm
@pytest.mark.parametrize(
    "args",
    [
        ["Qwen3-32B", "--context", "16000"],
        ["Gemma3-27B", "--accuracy", "high", "--gpu", "L4", "--concurrency", "3"],
        ["Qwen3-14B", "--gpu", "A100"],
        ["gpt-oss-20b", "--gpu", "L4"],
        ["Qwen3-30B-A3B", "--gpu", "RTX 4060 Ti", "--accuracy", "high", "--concurrency", "2"],
    ],
)
def test_the_printed_command_is_taken_by_vllm_s_own_parser(args, capsys):
    from vllm.entrypoints.cli.serve import ServeSubcommand
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    assert main(["plan", *args]) == 0
    text = capsys.readouterr().out
    # shlex leaves a line's end in the word, which a shell takes for a space.
    words = shlex.split(text[text.rindex("  vllm-nvfp4 serve") :].replace("\\\n", " "))
    assert words[:2] == ["vllm-nvfp4", "serve"]
    parser = FlexibleArgumentParser()
    server = ServeSubcommand()
    server.subparser_init(parser.add_subparsers(dest="subparser"))
    parsed = parser.parse_args([*words[1:], "--quantization", "nvfp4"])
    server.validate(parsed)
    found = plan(capsys, *args)
    setup = found["recommended"]["setup"]
    assert words == shlex.split(found["command"])
    of_nvfp4 = built_in()[args[0]].get("nvfp4", found["hub"])
    assert parsed.model_tag == (found["hub"] if setup["attention"] else of_nvfp4)
    assert parsed.max_model_len == found["context"]
    most = found["recommended"]["most_sequences"]
    assert parsed.max_num_seqs == max(found["concurrency"], min(most, 64), 2)
    assert parsed.tensor_parallel_size == setup["cards"]
    assert parsed.kv_cache_dtype == {8: "fp8", 16: "bfloat16"}[setup["kv_bits"]]
    options = Options.resolve(parsed.additional_config)
    assert (options.lm_head, options.embedding) == (setup["lm_head"], setup["embedding"])
    assert bool(options.online_ignore) == bool(setup["attention"])


def test_json_has_every_option_and_every_card(capsys):
    found = plan(capsys, "Qwen3-8B")
    assert len(found["options"]) == 5 * 3 * 3 * 2
    assert {row["gpu"] for row in found["cards"]} >= set(PRICES)
    assert len(plan(capsys, "Gemma3-12B")["options"]) == 5 * 3 * 2  # one tensor for both


def test_pictures_are_written_where_asked(tmp_path, capsys):
    assert main(["plan", "Qwen3-8B", "--plot", str(tmp_path / "new")]) == 0
    names = {path.name for path in (tmp_path / "new").iterdir()}
    assert names == {"memory.png", "speed.png", "cost.png"}
    assert str(tmp_path / "new" / "cost.png") in capsys.readouterr().out


# --- wrong input --------------------------------------------------------------------------------


def status_of(args: list[str]) -> int | str | None:
    try:
        return main(args)
    except SystemExit as ended:
        return ended.code


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (["Qwen3-8B", "--gpu", "an abacus"], "cards:"),
        (["Qwen3-8B", "--gpu", "RTX 4990"], "did you mean GeForce RTX 4090"),
        (["Qwen3-8B", "--context", "99999999"], "takes 1 to 40960"),
        (["Qwen3-8B", "--prompt", "9000"], "1 to 8192"),
        (["Qwen3-8B", "--concurrency", "0"], "1 or more"),
        (["Qwen3-8B", "--price", "-1"], "0 or more"),
        (["Qwen3-8B", "--buy", "nan"], "0 or more"),
        (["Gemma3-12B", "--lm-head", "fp8", "--embedding", "nvfp4"], "set only one"),
        (["a.gguf"], "config.json"),
        (["nothing"], "Qwen3-8B"),
    ],
)
def test_wrong_input_says_what_is_accepted(args, words, capsys):
    assert status_of(["plan", *args]) in (1, 2)
    error = capsys.readouterr().err
    assert words in error
    assert error.count("\n") == 1


_AWQ = {**built_in()["Qwen3-8B"]["config"], "quantization_config": {"quant_method": "awq"}}


@pytest.mark.parametrize(
    ("config", "words"),
    [
        (None, "config.json"),
        ('{"model_type": "abacus"}', "found no class that could be built"),
        ('{"model_type": "llama", "hidden_size": -1}', "hidden_size=-1; needs a positive"),
        (json.dumps(_AWQ), "one of modelopt"),
    ],
)
def test_a_folder_that_cannot_be_planned_says_why(config, words, tmp_path, capsys):
    if config:
        (tmp_path / "config.json").write_text(config)
    assert main(["plan", str(tmp_path)]) == 1
    error = capsys.readouterr().err
    assert words in error
    assert error.count("\n") == 1


def test_a_model_that_needs_transformers_says_so_where_it_is_not():
    code = (
        "import sys; sys.modules['torch'] = None; from vllm_nvfp4.cli.main import main;"
        "sys.exit(main(['plan', 'Qwen3.6-27B']))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 1
    assert "torch is not installed. It comes with vLLM: pip install '.[cuda]'" in done.stderr
    assert "Traceback" not in done.stderr


def test_plan_imports_no_torch():
    code = (
        "import sys; from vllm_nvfp4.cli.main import main; main(['plan', 'Qwen3-8B', '--json']);"
        "sys.exit('torch' in sys.modules or 'vllm' in sys.modules or 'numpy' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True).returncode == 0


# --- the table ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "args",
    [
        ["Qwen3-8B", "--details", "--all-cards"],
        ["Llama-3.1-70B", "--gpu", "4070", "--concurrency", "3", "--details"],
        ["Qwen3-32B", "--context", "16000", "--accuracy", "high"],
        ["Gemma3-27B", "--gpu", "RTX 4090 Laptop GPU", "--all-cards"],
        ["Llama-3.1-70B", "--gpu", "RTX 4070", "--context", "128k", "--concurrency", "64"],
    ],
    ids=" ".join,
)
def test_it_prints_for_80_columns(args, capsys):
    assert main(["plan", *args]) == 0
    text = capsys.readouterr().out
    assert [line for line in text.splitlines() if len(line) > 80] == []
    assert "not measured" in " ".join(text.split())
    assert ("max(" in text) == ("--details" in args)


@pytest.mark.parametrize(
    "args", [["Qwen3-8B"], ["Llama-3.1-70B"], ["Qwen3-32B", "--context", "16k"]]
)
def test_the_recommendation_is_the_first_row_and_all_rows_are_of_the_same_cards(args, capsys):
    found = plan(capsys, *args)
    first, *others = found["formats"]
    assert first["recommended"]
    assert not any(row["recommended"] for row in others)
    assert first == found["recommended"]
    assert {(row["gpu"], row["cards"]) for row in found["formats"]} == {
        (first["gpu"], first["cards"])
    }
    assert {row["setup"]["kv_bits"] for row in found["formats"]} == {first["setup"]["kv_bits"]}
    same = found["bf16_on_the_same_card"]
    assert (same["gpu"], same["setup"]["fmt"]) == (first["gpu"], "bf16")
    assert main(["plan", *args]) == 0
    table = [x for x in capsys.readouterr().out.splitlines() if x.startswith(("> recom", ">"))]
    assert table[0].split()[0] == ">" + first["label"].split()[0]


def test_what_does_not_fit_and_what_cannot_be_split_says_so(tmp_path, capsys):
    assert main(["plan", "Llama-3.1-70B"]) == 0
    assert "bf16                70.56   0.67  72.47  does not fit; needs 8 cards" in (
        capsys.readouterr().out
    )
    config = built_in()["Llama-3.1-70B"]["config"] | {"intermediate_size": 28672 + 64}
    (tmp_path / "config.json").write_text(json.dumps(config))
    found = plan(capsys, str(tmp_path))
    int4 = next(row for row in found["formats"] if row["setup"]["fmt"] == "int4")
    assert int4["obstacle"] == "cannot be split over 2 cards"
    assert int4["dollars_per_million_tokens"] is None


def test_a_tight_fit_warns(capsys):
    assert main(["plan", "Llama-3.1-70B"]) == 0
    assert "Warning: only 0.3% of the memory is spare" in " ".join(capsys.readouterr().out.split())
    found = plan(capsys, "Llama-3.1-70B")
    assert found["warning"]
    assert found["recommended"]["spare"] < 0.03
    assert plan(capsys, "Qwen3-8B")["warning"] is None


@pytest.mark.parametrize(
    ("text", "name"),
    [
        ("RTX4090", "GeForce RTX 4090"),
        ("4090", "GeForce RTX 4090"),
        ("nvidia geforce rtx 4090", "GeForce RTX 4090"),
        ("RTX 4060", "GeForce RTX 4060"),
        ("4070ti super", "GeForce RTX 4070 Ti SUPER"),
        ("rtx-4080-laptop", "GeForce RTX 4080 Laptop GPU"),
        ("4060 mobile", "GeForce RTX 4060 Laptop GPU"),
        ("L40", "L40"),
        ("l40s", "L40S"),
        ("RTX 4000 Ada", "RTX 4000 Ada Generation"),
        ("RTX5000 Ada", "RTX 5000 Ada Generation"),
        ("RTX 6000 Ada", "RTX 6000 Ada Generation"),
        ("4060 Ti 16 GB", "GeForce RTX 4060 Ti"),
        ("A100 40GB", "A100-SXM4-40GB"),
        ("H100", "H100 80GB HBM3"),
    ],
)
def test_cards_as_people_write_them(text, name):
    assert find_card(text).name == name


def test_every_axis_says_that_nothing_was_measured(tmp_path, capsys, monkeypatch):
    labels = []
    save = pictures._save

    def keep(path, draw, title, size):
        def and_read(axes):
            draw(axes)
            labels.append((axes.get_xlabel(), axes.get_ylabel()))

        return save(path, and_read, title, size)

    monkeypatch.setattr(pictures, "_save", keep)
    assert main(["plan", "Qwen3-8B", "--plot", str(tmp_path)]) == 0
    assert len(labels) == 3
    for pair in labels:
        assert "measured" in " ".join(pair).replace("not\nmeasured", "measured")
