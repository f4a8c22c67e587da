# SPDX-License-Identifier: Apache-2.0
"""`--target-bits`, `--max-kl`, `--report`: the choice is exact, and vLLM serves the mixed file."""

from __future__ import annotations

import itertools
import json

import pytest
import torch
from quantizing import transformers_reading
from serving_cases import compare, write_with_vocabulary

from vllm_nvfp4.checkpoints.detect import read_config
from vllm_nvfp4.checkpoints.source import Source
from vllm_nvfp4.checkpoints.validate import validate
from vllm_nvfp4.checkpoints.work import work_folder
from vllm_nvfp4.cli.main import main
from vllm_nvfp4.numerics.quantize import nvfp4_global_scale, quantize_fp8_per_row, quantize_nvfp4
from vllm_nvfp4.planning.find import find_shape
from vllm_nvfp4.planning.model import AS_STORED, checkpoint_parts
from vllm_nvfp4.quantize import sensitivity
from vllm_nvfp4.quantize.changes import weight_changes
from vllm_nvfp4.quantize.hessian import quantize_fp8_gptq
from vllm_nvfp4.quantize.precision import BITS, Sensitivity, average_bits, choose_formats
from vllm_nvfp4.quantize.report import label
from vllm_nvfp4.testing.checkpoints import dequantized_state_dict, edit_json
from vllm_nvfp4.testing.engine import (
    ask_engine,
    ask_reference,
    engine,
    plain_model,
    reference_model,
)
from vllm_nvfp4.testing.tiny_models import write_model


def random_groups(num: int, seed: int) -> list[Sensitivity]:
    generator = torch.Generator().manual_seed(seed)
    groups = []
    for i in range(num):
        size = 48 * int(torch.randint(1, 9, (1,), generator=generator))
        kl = float(torch.rand(1, generator=generator)) ** 3
        kls = {"nvfp4": kl, "fp8": kl * float(torch.rand(1, generator=generator)) / 10, "bf16": 0.0}
        groups.append(Sensitivity((f"layer{i}.weight",), size, size // 48, kls))
    return groups


def total_kl(groups, formats) -> float:
    return sum(g.kl[f] for g, f in zip(groups, formats, strict=True))


@pytest.mark.parametrize("seed", range(4))
def test_choice_is_the_best_of_all(seed):
    groups = random_groups(6, seed)
    every = list(itertools.product(BITS, repeat=len(groups)))
    for target in (4.5, 4.7, 5.5, 7.3, 12.0, 16.0, 20.0):
        found = choose_formats(groups, target_bits=target)
        assert average_bits(groups, found) <= target
        fitting = [f for f in every if average_bits(groups, f) <= target + 1e-9]
        assert total_kl(groups, found) == pytest.approx(min(total_kl(groups, f) for f in fitting))
    for limit in (0.0, 0.01, 0.1, 1.0, 10.0):
        found = choose_formats(groups, max_kl=limit)
        assert total_kl(groups, found) <= limit
        fitting = [f for f in every if total_kl(groups, f) <= limit]
        assert average_bits(groups, found) == min(average_bits(groups, f) for f in fitting)


def test_sizes_without_a_common_divisor_stay_within_the_budget():
    sizes = enumerate(random_groups(40, 9))
    groups = [Sensitivity((f"{i}",), 10_000_019 + 2 * i, 4096, g.kl) for i, g in sizes]
    found = choose_formats(groups, target_bits=5.5)
    assert 5.45 < average_bits(groups, found) <= 5.5


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    return write_model(tmp_path_factory.mktemp("models") / "llama", "llama")


@pytest.mark.parametrize(("family", "method"), [("llama", "mse"), ("gemma3", "gptq")])
def test_sensitivity_is_the_kl_of_the_whole_model(family, method, tmp_path):
    """Against transformers' model with one layer's weights replaced, tied or not."""
    source = Source(write_model(tmp_path / family, family))
    linear, _ = source.quantizable()
    vocabulary = source.vocabulary(with_embedding=True)
    assert len(vocabulary) == (1 if family == "gemma3" else 2)
    quantized = linear.union(vocabulary)
    samples, others = torch.randint(
        4, 260, (2, 2, 24), generator=torch.Generator().manual_seed(1)
    ).unbind()
    # So many draws that they leave 5 % of chance; KL's third order is another few percent.
    measurement = sensitivity.Measurement(samples, others, method, draws=400, dtype=torch.float32)
    found = sensitivity.measure(source, quantized, measurement)
    assert sorted(n for g in found for n in g.names) == sorted(quantized)
    layerwise = inputs_of_layers(source, others)
    model = plain_model(source.folder, torch.float32)
    with torch.inference_mode():
        exact = torch.log_softmax(model(samples).logits, -1)
        ends = [g for g in found if not {*g.names}.isdisjoint(linear)]
        tables = [g for g in found if {*g.names} <= {*vocabulary}]
        assert len(tables) == len(vocabulary)
        for group in (ends[0], ends[-1], *tables):  # q/k/v fused, and down_proj
            if group in tables:
                name = group.names[0]
                changes = {name: sensitivity._vocabulary_change(source, name, measurement)}
            else:
                moment = layerwise(group.names[0]) if method == "gptq" else None
                changes = weight_changes(source, group.names, method, moment)
            for name in ("nvfp4", "fp8"):
                kept = {n: model.get_parameter(n).clone() for n in group.names}
                for n, change in changes.items():
                    model.get_parameter(n).add_(change[name])
                mine = torch.log_softmax(model(samples).logits, -1)
                expected = (exact.exp() * (exact - mine)).sum(-1).double().mean()
                assert group.kl[name] == pytest.approx(float(expected), rel=0.2)
                for n, weight in kept.items():
                    model.get_parameter(n).copy_(weight)


@pytest.mark.parametrize("method", ["mse", "gptq"])
def test_sensitivity_of_experts_is_the_kl_of_the_whole_model(method, tmp_path):
    """All experts of the last layer in NVFP4, nothing else; one group, which FP8 is none of."""
    source = Source(write_model(tmp_path / "moe", "qwen3_moe"))
    quantized, _ = source.quantizable()
    generator = torch.Generator().manual_seed(1)
    samples, others = torch.randint(4, 260, (42, 24), generator=generator).split((2, 40))
    measurement = sensitivity.Measurement(samples, others, method, draws=400, dtype=torch.float32)
    found = sensitivity.measure(source, quantized, measurement)
    assert sorted(n for g in found for n in g.names) == sorted(quantized)
    experts = [g for g in found if "fp8" not in g.kl]
    assert [len(g.names) for g in experts] == [12, 12]
    assert label(experts[1]) == "model.layers.1.mlp.experts"
    model = plain_model(source.folder, torch.float32)
    with torch.inference_mode():
        exact = torch.log_softmax(model(samples).logits, -1)
        module = model.get_submodule("model.layers.1.mlp.experts")
        for name in experts[1].names:
            place = source.model_class.expert(name)
            weight = source.load(name, "cpu").float()
            pair = [n for n in experts[1].names if f".{place.expert}." in n]
            pair = [n for n in pair if ("down" in n) == ("down" in name)]
            shared = max(nvfp4_global_scale(source.load(n, "cpu").float()) for n in pair)
            # By gptq they differ, and cost less.
            changed = quantize_nvfp4(weight, "mse", shared).dequantize()
            place.view(module.get_parameter(place.leaf), len(weight)).copy_(changed)
        mine = torch.log_softmax(model(samples).logits, -1)
        expected = float((exact.exp() * (exact - mine)).sum(-1).double().mean())
    if method == "mse":
        assert experts[1].kl["nvfp4"] == pytest.approx(expected, rel=0.2)
    else:
        assert 0 < experts[1].kl["nvfp4"] < expected


def test_the_experts_of_a_layer_get_one_format(tmp_path):
    """Of which FP8 is none, and vLLM has a place for every tensor of the mixed file."""
    folder = write_model(tmp_path / "moe", "qwen3_moe")
    target = tmp_path / "out"
    arguments = ["quantize", str(folder), "-o", str(target), "--method", "mse"]
    assert main([*arguments, "--target-bits", "8.5"]) == 0
    _, config = read_config(target)
    layers = config["quantized_layers"]
    experts = {n: layers[n]["quant_algo"] for n in layers if ".experts." in n}
    assert set(experts.values()) == {"W4A16_NVFP4"}
    by_layer = {n.partition(".mlp.")[0] for n in experts}
    assert len(experts) == 12 * len(by_layer)
    for layer in {"model.layers.0", "model.layers.1"} - by_layer:
        assert all(f"{layer}.mlp.experts.{e}.up_proj" in config["ignore"] for e in range(4))


def test_fp8_by_gptq_changes_the_output_less_than_the_nearest_codes():
    generator = torch.Generator().manual_seed(2)
    weight = torch.randn(40, 96, generator=generator)
    mixing = torch.randn(96, 96, generator=generator)
    inputs = torch.randn(300, 96, generator=generator) @ mixing
    moment = inputs.T @ inputs / len(inputs)
    codes, scale = quantize_fp8_gptq(weight, moment)
    nearest, same_scale = quantize_fp8_per_row(weight)
    assert codes.dtype == torch.float8_e4m3fn
    assert torch.equal(scale, same_scale)

    def error(codes: torch.Tensor) -> float:
        difference = (weight - codes.float() * scale).double()
        return float(((difference @ moment.double()) * difference).sum())

    assert error(codes) < 0.7 * error(nearest)
    # Inputs that are always 0 leave nothing to choose by.
    silent, _ = quantize_fp8_gptq(weight, torch.zeros(96, 96))
    assert torch.equal(silent.float(), nearest.float())


def inputs_of_layers(source, samples):
    """E[x x^T] of what goes into a linear layer of transformers' own model, by weight name."""
    model = plain_model(source.folder, torch.float32)

    def moment(name: str) -> torch.Tensor:
        found = []
        module = model.get_submodule(name.removesuffix(".weight"))
        handle = module.register_forward_pre_hook(lambda m, args: found.append(args[0]))
        with torch.inference_mode():
            model(samples)
        handle.remove()
        rows = torch.cat(found).flatten(0, -2)
        return rows.T @ rows / len(rows)

    return moment


def quantize(source, target, *options: str) -> int:
    return main(["quantize", str(source), "-o", str(target), *options])


@pytest.mark.vllm
@pytest.mark.parametrize(
    ("method", "dialect"),
    [("rtn", "modelopt"), ("gptq", "modelopt"), ("rtn", "compressed-tensors")],
)
def test_a_mixed_checkpoint_is_served(llama, tmp_path, capsys, method, dialect):
    target, plot = tmp_path / "out", tmp_path / "plot.svg"
    options = ["--method", method, "--target-bits", "7", "--report", str(plot)]
    options += ["--format", dialect]
    if method == "gptq":
        options += ["--samples", "4", "--sample-length", "48"]
    assert quantize(llama, target, *options) == 0
    text = capsys.readouterr().out
    assert "model.layers.1.mlp.gate_proj+up_proj" in text
    assert "<svg" in plot.read_text()
    config = json.loads((target / "config.json").read_text())["quantization_config"]
    inventory = validate(target, *read_config(target))
    assert {layer.format for layer in inventory.layers} == {"nvfp4", "fp8", "BF16"}
    if dialect == "modelopt":
        assert config["quant_algo"] == "MIXED_PRECISION"
        algos = {entry["quant_algo"] for entry in config["quantized_layers"].values()}
        assert algos == {"W4A16_NVFP4", "FP8_PER_CHANNEL_PER_TOKEN"}
    else:
        assert config["format"] == "mixed-precision"
    assert dequantized_state_dict(target).keys() == Source(llama).tensors.keys()
    prompt = [5, 17, 40, 3, 99]
    reference = ask_reference(reference_model(target, torch.float32), prompt, 4)
    options = {"dtype": "float32", "additional_config": {"nvfp4": {"kv_cache": "keep"}}}
    with engine(target, **options) as llm:
        answer = ask_engine(llm, prompt, 4)
    assert answer.tokens == reference.tokens
    assert torch.allclose(answer.logprobs, reference.logprobs, atol=0.05)
    if dialect == "compressed-tensors":
        # transformers rounds them too
        group = lambda c: c["quantization_config"]["config_groups"]["group_1"]  # noqa: E731
        edit_json(target / "config.json", lambda c: group(c).pop("input_activations"))
        assert transformers_reading(target, llama) == (set(), True)


@pytest.mark.vllm
@pytest.mark.parametrize("family", ["llama", "gemma3"])
@pytest.mark.parametrize(("head", "embedding"), [("nvfp4", "fp8"), ("fp8", "nvfp4")])
def test_lm_head_and_embedding_of_a_checkpoint_are_served(family, head, embedding, tmp_path):
    """gemma3 has one weight for both, whose format ``embedding`` is."""
    target = tmp_path / "out"
    source = write_model(tmp_path / "model", family)
    report = write_with_vocabulary(source, target, head, embedding)
    inventory = validate(target, *read_config(target))
    stored = {layer.name: layer.format for layer in inventory.layers if layer.part != "linear"}
    expected = {"model.embed_tokens": embedding} | ({} if family == "gemma3" else {"lm_head": head})
    assert {n: f for n, f in stored.items() if f in ("nvfp4", "fp8")} == expected
    assert {*expected} <= {*report.quantized}
    parts = checkpoint_parts(find_shape(str(target)), AS_STORED)
    for part, name in (("embedding", "model.embed_tokens"), ("lm_head", "lm_head")):
        layer = next((x for x in inventory.layers if x.name == name), None)
        # Of an FP8 row, 2 or 4 bytes of scale.
        assert parts[part] == pytest.approx(layer.num_bytes if layer else 0, rel=0.04)
    compare(target, atol=1e-4)


@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_the_embedding_is_in_the_budget_on_demand(family, tmp_path):
    source = write_model(tmp_path / "model", family)
    options = ["--calibration", "builtin", "--samples", "4", "--sample-length", "48"]
    assert quantize(source, tmp_path / "a", *options, "--target-bits", "4.5") == 0
    assert quantize(source, tmp_path / "b", *options, "--target-bits", "4.5", "--embedding") == 0
    found = []
    for name in ("a", "b"):
        config, quantization = read_config(tmp_path / name)
        found.append({*quantization["quantized_layers"]} & {"lm_head", "model.embed_tokens"})
        validate(tmp_path / name, config, quantization)
    head = set() if family == "gemma3" else {"lm_head"}
    assert found == [head, head | {"model.embed_tokens"}]
    # The layers' codes make up for the embedding's.
    layer = "model.layers.0.mlp.down_proj.weight"
    codes = [Source(tmp_path / name).load(layer, "cpu") for name in ("a", "b")]
    assert not torch.equal(*codes)


def test_layers_in_16_bits_are_left_alone(llama, tmp_path):
    assert quantize(llama, tmp_path / "out", "--method", "rtn", "--max-kl", "0") == 0
    before = Source(llama)
    after = Source(tmp_path / "out")
    assert before.tensors == after.tensors
    assert quantize(llama, tmp_path / "four", "--method", "rtn", "--max-kl", "1e9") == 0
    config = json.loads((tmp_path / "four" / "config.json").read_text())["quantization_config"]
    assert {e["quant_algo"] for e in config["quantized_layers"].values()} == {"W4A16_NVFP4"}


def test_a_run_that_goes_on_does_not_measure_again(llama, tmp_path, monkeypatch):
    target = tmp_path / "out"
    options = ["--method", "rtn", "--target-bits", "6", "--no-check"]
    from vllm_nvfp4.checkpoints import write

    def stop(self, report):
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(write._Job, "complete", stop)
        assert quantize(llama, target, *options) == 130
    assert (work_folder(target) / "sensitivity.json").is_file()

    def measure(*arguments):
        raise AssertionError("measured again")

    monkeypatch.setattr(sensitivity, "measure", measure)
    assert quantize(llama, target, *options) == 0
    assert target.is_dir()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--target-bits", "4"], "NVFP4 alone takes 4.5"),
        (["--max-kl", "-1"], "needs nats, 0 or more"),
        (["--report", "x.png"], "--target-bits or --max-kl"),
        (["--embedding"], "--target-bits or --max-kl"),
        (["--target-bits", "5", "--report", "x.pdf"], "ends in .png or .svg"),
        (["--target-bits", "5", "--report", "/nonesuch/x.png"], "no folder /nonesuch"),
        (["--target-bits", "5", "--method", "mr-gptq"], "use --method gptq"),
    ],
)
def test_what_cannot_be_is_refused_before_the_work(llama, tmp_path, capsys, options, message):
    try:
        status = quantize(llama, tmp_path / "out", *options)
    except SystemExit as ended:
        status = ended.code
    assert status in (1, 2)
    assert message in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []
