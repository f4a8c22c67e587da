# SPDX-License-Identifier: Apache-2.0
"""`vllm-nvfp4 quantize`: bits, the order of the methods, resuming, and everything it refuses."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from gguf import GGUFWriter
from made_once import made_once
from quantizing import interrupted_at
from safetensors.torch import load_file

from vllm_nvfp4.checkpoints import write
from vllm_nvfp4.checkpoints.detect import read_config
from vllm_nvfp4.checkpoints.gguf import gguf_to_folder
from vllm_nvfp4.checkpoints.quantizer import DataFree
from vllm_nvfp4.checkpoints.source import Source
from vllm_nvfp4.checkpoints.spec import CheckpointError
from vllm_nvfp4.checkpoints.units import by_layer
from vllm_nvfp4.checkpoints.validate import validate
from vllm_nvfp4.checkpoints.work import work_folder, work_in
from vllm_nvfp4.checkpoints.write import WriteOptions, write_resumable
from vllm_nvfp4.checkpoints.written import FORMATS
from vllm_nvfp4.cli.main import main
from vllm_nvfp4.numerics.codes import decode_e2m1, unpack_codes
from vllm_nvfp4.numerics.formats import NVFP4
from vllm_nvfp4.numerics.quantize import (
    block_scale_candidates,
    nvfp4_global_scale,
    quantize_nvfp4,
    to_e4m3,
)
from vllm_nvfp4.numerics.weight import BlockScaledWeight
from vllm_nvfp4.quantize.calibrated import Calibrated
from vllm_nvfp4.quantize.calibration import Calibration
from vllm_nvfp4.quantize.forward import LayerwiseModel
from vllm_nvfp4.quantize.hessian import (
    output_error,
    quantize_gptq,
    quantize_hessian,
    shifted_target,
)
from vllm_nvfp4.quantize.memory import calibrated_bytes, data_free_bytes, sensitivity_bytes
from vllm_nvfp4.testing.checkpoints import dequantized_state_dict, edit_json, edit_tensors
from vllm_nvfp4.testing.engine import plain_model
from vllm_nvfp4.testing.tiny_models import write_model

METHODS = ("rtn", "mse", "hessian", "gptq")
CALIBRATED = ("hessian", "gptq", "mr-gptq")
SMALL = ["--samples", "4", "--sample-length", "48"]


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """models(family) -> the folder of a tiny model, made once."""
    return made_once(tmp_path_factory.mktemp("models"), write_model)


@pytest.fixture
def copied(models, tmp_path):
    """A tiny Llama of the test's own, to damage."""
    return Path(shutil.copytree(models("llama"), tmp_path / "copied"))


def quantize(source: Path, target: Path, method: str, *options: str) -> int:
    arguments = [*SMALL, *options] if method in CALIBRATED else [*options]
    return main(["quantize", str(source), "-o", str(target), "--method", method, *arguments])


def tensors_of(folder: Path) -> dict[str, torch.Tensor]:
    found: dict[str, torch.Tensor] = {}
    for path in sorted(folder.glob("*.safetensors")):
        found |= load_file(path)
    return found


def files_of(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


# --- what is written ------------------------------------------------------------------------------


def test_rtn_is_the_definition_bit_for_bit(models, tmp_path):
    source = models("llama")
    assert quantize(source, tmp_path / "out", "rtn") == 0
    before, after = tensors_of(source), tensors_of(tmp_path / "out")
    layers = [n.removesuffix("_scale_2") for n in after if n.endswith("weight_scale_2")]
    assert len(layers) == 14
    for name in layers:
        expected = quantize_nvfp4(before[name], "rtn", after[f"{name}_scale_2"])
        assert torch.equal(after[name], expected.codes)
        assert torch.equal(
            after[f"{name}_scale"].view(torch.uint8), expected.block_scale.view(torch.uint8)
        )
    attention = "model.layers.1.self_attn"
    shared = max(nvfp4_global_scale(before[f"{attention}.{n}_proj.weight"]) for n in "qkv")
    assert all(after[f"{attention}.{n}_proj.weight_scale_2"] == shared for n in "qkv")


@pytest.mark.parametrize("stored", FORMATS)
@pytest.mark.parametrize("method", METHODS)
def test_output_reads_back_through_its_dialect(models, tmp_path, method, stored):
    source, target = models("qwen3"), tmp_path / "out"
    assert quantize(source, target, method, "--format", stored) == 0
    validate(target, *read_config(target))
    index = json.loads((target / "model.safetensors.index.json").read_text())
    stored_tensors = tensors_of(target)
    assert set(index["weight_map"]) == set(stored_tensors)
    assert index["metadata"]["total_size"] == sum(t.nbytes for t in stored_tensors.values())
    before, after = tensors_of(source), dequantized_state_dict(target)
    assert before.keys() == after.keys()
    for name, weight in before.items():
        if "_proj" not in name:
            assert torch.equal(after[name], weight), name
            continue
        layer = name.removesuffix(".weight")
        mine = FORMATS[stored].dequantize(layer, stored_tensors.__getitem__)
        assert torch.equal(after[name], mine), name
        relative = (after[name] - weight).norm() / weight.float().norm()
        # GPTQ moves off the weight, towards the output; the text of these tests is very short.
        assert 0.01 < relative < (0.4 if method == "gptq" else 0.2), (name, relative)


@pytest.mark.parametrize("method", METHODS)
def test_compressed_tensors_own_decompressor_reads_it(models, tmp_path, method):
    from compressed_tensors.compressors import NVFP4PackedCompressor
    from compressed_tensors.quantization import QuantizationConfig

    target = tmp_path / "out"
    assert quantize(models("llama"), target, method, "--format", "compressed-tensors") == 0
    config = json.loads((target / "config.json").read_text())["quantization_config"]
    scheme = QuantizationConfig.model_validate(config).config_groups["group_0"]
    assert NVFP4PackedCompressor.can_compress(torch.nn.Linear, scheme)
    stored, ours = tensors_of(target), dequantized_state_dict(target)
    leaves = ("weight_packed", "weight_scale", "weight_global_scale")
    for name in [n for n in ours if "_proj" in n]:
        layer = name.removesuffix(".weight")
        state = {leaf: stored[f"{layer}.{leaf}"] for leaf in leaves}
        theirs = NVFP4PackedCompressor.decompress(state, scheme)["weight"]
        # It computes in BF16: scale, its quotient by the divisor, and the product each round.
        assert torch.allclose(theirs.float(), ours[name], rtol=3 * 2.0**-8, atol=0), name


def test_no_block_is_lost(models, tmp_path):
    """Every stored block scale is positive; NaN would not be."""
    assert quantize(models("llama"), tmp_path / "out", "gptq") == 0
    for name, tensor in tensors_of(tmp_path / "out").items():
        if name.endswith("weight_scale"):
            assert (tensor.float() > 0).all(), name


def test_tied_weights_stay_one_16_bit_tensor(models, tmp_path):
    source = models("gemma3")
    assert quantize(source, tmp_path / "out", "gptq") == 0
    before, after = tensors_of(source), tensors_of(tmp_path / "out")
    assert "lm_head.weight" not in after
    assert torch.equal(after["model.embed_tokens.weight"], before["model.embed_tokens.weight"])
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert {"lm_head", "model.embed_tokens"} <= set(config["quantization_config"]["ignore"])


def test_odd_layers_are_kept_with_one_line(copied, tmp_path, capsys):
    name = "model.layers.1.mlp.down_proj"
    odd = torch.zeros(64, 40, dtype=torch.bfloat16)
    edit_tensors(copied, lambda tensors: tensors.update({f"{name}.weight": odd}))
    assert quantize(copied, tmp_path / "out", "mse") == 0
    lines = [line for line in capsys.readouterr().out.splitlines() if "odd shapes" in line]
    share = 64 * 40 * 2 / sum(t.nbytes for t in tensors_of(copied).values())
    assert lines == [
        f"kept in 16 bits: odd shapes, {share:.1%} of the bytes (K is not a multiple of 16): {name}"
    ]
    assert torch.equal(tensors_of(tmp_path / "out")[f"{name}.weight"], odd)
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert name in config["quantization_config"]["ignore"]


def test_experts_are_whole_after_mse(models, tmp_path):
    assert quantize(models("qwen3_moe"), tmp_path / "out", "mse") == 0
    validate(tmp_path / "out", *read_config(tmp_path / "out"))


# --- the quality of what is written ---------------------------------------------------------------


def _moments(num_cols: int, seed: int = 0) -> torch.Tensor:
    """Second moments of inputs that are correlated, and of very unequal size, as real ones are."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(512, num_cols, generator=generator)
    x = x @ (torch.eye(num_cols) + 0.3 * torch.randn(num_cols, num_cols, generator=generator))
    x = x * torch.logspace(-1, 1, num_cols)[torch.randperm(num_cols, generator=generator)]
    return x.T @ x / len(x)


@pytest.mark.parametrize(("rows", "cols"), [(1, 16), (24, 48), (40, 144), (16, 272)])
def test_output_error_falls_with_each_method(rows, cols):
    weight = torch.randn(rows, cols, generator=torch.Generator().manual_seed(3))
    hessian, scale = _moments(cols), nvfp4_global_scale(weight)
    found = {
        "rtn": quantize_nvfp4(weight, "rtn", scale),
        "hessian": quantize_hessian(weight, hessian, scale),
        "columns": quantize_gptq(weight, hessian, scale, descent_rounds=0),
        "gptq": quantize_gptq(weight, hessian, scale),
        "more": quantize_gptq(weight, hessian, scale, descent_rounds=6),
    }
    errors = {name: output_error(weight, q, hessian) for name, q in found.items()}
    # Descent minimises the damped form: on this one it may lose a little of what it won.
    assert errors["hessian"] < errors["rtn"]
    assert errors["gptq"] < errors["hessian"]
    assert errors["gptq"] <= errors["columns"] * 1.01
    assert errors["more"] <= errors["gptq"] * 1.01


def _layer_moments(source: Source, layer: str) -> torch.Tensor:
    samples = Calibration(num_samples=8, length=64).samples(source.folder)
    model = LayerwiseModel(source.folder, source.tensors, lambda n: source.load(n, "cpu"), samples)
    module = layer.removeprefix(model.prefix(0))
    first = model.layer(0, {})
    inputs: list[torch.Tensor] = []
    for hidden in model.hidden:
        model.watch(first, 0, hidden, {module: inputs.append})
    x = torch.cat(inputs).flatten(0, -2)
    return x.T @ x / len(x)


def test_methods_are_in_order_on_a_model(models):
    source = Source(models("llama"))
    layer = "model.layers.0.mlp.down_proj"
    hessian = _layer_moments(source, layer)
    weight = source.load(f"{layer}.weight", "cpu").float()
    scale = nvfp4_global_scale(weight)
    errors = [
        output_error(weight, quantized, hessian)
        for quantized in (
            quantize_gptq(weight, hessian, scale),
            quantize_hessian(weight, hessian, scale),
            quantize_nvfp4(weight, "mse", scale),
            quantize_nvfp4(weight, "rtn", scale),
        )
    ]
    assert errors == sorted(errors)
    assert errors[0] < 0.8 * errors[1]


def test_target_is_the_nearest_weight_to_the_wanted_output():
    """Against least squares on the very inputs, the damping written as rows of its own."""
    generator = torch.Generator().manual_seed(9)
    weight = torch.randn(6, 32, generator=generator)
    x = torch.randn(200, 32, generator=generator)
    exact = x + 0.1 * torch.randn(200, 32, generator=generator)
    lacking = 0.1 * torch.randn(200, 6, generator=generator)
    hessian = x.T @ x / len(x)
    found = shifted_target(
        weight, hessian, (exact - x).T @ x / len(x), lacking.T @ x / len(x), damping=0.05
    )
    ridge = (0.05 * hessian.diagonal().mean() * len(x)).sqrt() * torch.eye(32)
    wanted = torch.cat([exact @ weight.T + lacking, ridge @ weight.T]).double()
    rows = torch.cat([x, ridge]).double()
    expected = torch.linalg.lstsq(rows, wanted).solution.T
    assert torch.allclose(found, expected.float(), atol=1e-4)
    assert torch.equal(shifted_target(weight, hessian, torch.zeros(32, 32)), weight)


def test_hessian_scale_is_the_best_of_all_candidates():
    """Against every candidate of every block, one by one, in float64."""
    weight = torch.randn(5, 32, generator=torch.Generator().manual_seed(5))
    hessian, scale = _moments(32), nvfp4_global_scale(weight)
    best = quantize_hessian(weight, hessian, scale).dequantize(torch.float64)
    rtn = quantize_nvfp4(weight, "rtn", scale)

    def error(values: torch.Tensor, block: slice) -> torch.Tensor:
        difference = values[:, block] - weight.double()[:, block]
        return ((difference @ hessian[block, block].double()) * difference).sum(1)

    for candidate in block_scale_candidates(rtn.block_scale):
        step = (candidate * scale)[..., None]
        codes = (weight.view(5, 2, 16) / step).clamp(-6, 6)
        grid = decode_e2m1(torch.arange(16, dtype=torch.uint8))
        nearest = grid[(codes[..., None] - grid).abs().argmin(-1)] * step
        for start in (0, 16):
            block = slice(start, start + 16)
            mine, other = error(best, block), error(nearest.flatten(1).double(), block)
            assert (mine <= other * (1 + 1e-5)).all()


def test_inputs_that_are_always_zero_do_no_harm():
    weight = torch.randn(8, 64, generator=torch.Generator().manual_seed(6))
    for hessian in (torch.zeros(64, 64), _dead(64)):
        quantized = quantize_gptq(weight, hessian, nvfp4_global_scale(weight))
        difference = quantized.dequantize() - weight
        assert difference.norm() / weight.norm() < 0.2


def _dead(num_cols: int) -> torch.Tensor:
    alive = (torch.arange(num_cols) % 3 > 0).float()
    return _moments(num_cols) * alive[:, None] * alive[None]


def test_candidates_go_round_every_scale():
    every = torch.arange(1, 0x7F, dtype=torch.uint8).view(torch.float8_e4m3fn)
    found = torch.stack(list(block_scale_candidates(every)))
    assert torch.equal(found[0], every.float())
    assert ((found > 0) & (found <= 448)).all()
    ordinary = slice(8 + 8, 0x7E - 8)  # bits: away from both ends
    four_over_six = to_e4m3(every.float() * 1.5).float()
    assert (found == four_over_six).any(0)[ordinary].all()


# --- the forward pass -----------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["llama", "llama-bias", "qwen3", "gemma3"])
def test_layer_by_layer_is_the_whole_model(models, family):
    """Hidden states and inputs against transformers' own forward, one layer's weights replaced."""
    source = Source(models(family))
    samples = torch.randint(4, 260, (3, 80), generator=torch.Generator().manual_seed(8))
    mine = LayerwiseModel(source.folder, source.tensors, lambda n: source.load(n, "cpu"), samples)
    whole = plain_model(source.folder, torch.float32)
    changed = "model.layers.0.self_attn.v_proj.weight"
    weights = {changed: source.load(changed, "cpu").float() * 0.5}
    with torch.no_grad():
        whole.get_parameter(changed).copy_(weights[changed])
    seen: list[torch.Tensor] = []
    name = "mlp.up_proj"
    module = whole.get_submodule(f"model.layers.1.{name}")
    module.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    with torch.inference_mode():
        output = whole(samples, output_hidden_states=True)
    first, second = mine.layer(0, weights), mine.layer(1, {})
    hidden = [mine.run(first, 0, h) for h in mine.hidden]
    assert torch.allclose(torch.cat(hidden), output.hidden_states[1], rtol=1e-4, atol=1e-4)
    hidden = torch.cat(hidden)  # samples by themselves, then all at once
    found: list[torch.Tensor] = []
    last = mine.watch(second, 1, hidden, {name: found.append})
    assert torch.allclose(found[0], seen[0], rtol=1e-3, atol=1e-3)
    assert torch.equal(last, mine.run(second, 1, hidden))
    with pytest.raises(CheckpointError, match=r"layers\.1\.mlp\.nonesuch"):
        mine.watch(second, 1, hidden, {"mlp.nonesuch": found.append})


def test_gptq_follows_the_unquantised_model(models, tmp_path):
    """The last hidden states come nearer to the source's than without its inputs as the aim."""
    source = Source(models("llama"))
    calibration = Calibration(num_samples=8, length=64)
    samples = calibration.samples(source.folder)
    errors = {}
    for method in ("hessian", "gptq"):
        target = tmp_path / method
        quantizer = Calibrated(source, method, calibration)
        write_resumable(source.folder, target, quantizer, WriteOptions())
        states = dequantized_state_dict(target)
        outputs = []
        for weights in ({}, states):
            model = LayerwiseModel(
                source.folder, source.tensors, lambda n: source.load(n, "cpu"), samples
            )
            hidden = model.hidden
            for i in range(model.num_layers):
                layer = model.layer(i, weights)
                hidden = [model.run(layer, i, h) for h in hidden]
            outputs.append(torch.cat(hidden))
        errors[method] = float((outputs[1] - outputs[0]).norm() / outputs[0].norm())
    assert errors["gptq"] < 0.9 * errors["hessian"]


@pytest.mark.parametrize(("family", "found"), [("llama", True), ("qwen3", True), ("gemma3", False)])
def test_what_adds_to_the_residual_stream_is_found_by_adding_up(models, family, found):
    """Gemma normalises what it adds, so that no layer's output is the sum's other part."""
    source = Source(models(family))
    quantized, _ = source.quantizable()
    calibrated = Calibrated(source, "gptq", Calibration(num_samples=1, length=16))
    calibrated.start(by_layer(source.tensors, quantized)[1], quantized, set(), lambda scale: scale)
    assert bool(calibrated._exact.adds_to) is found


# --- the same again, and going on -----------------------------------------------------------------


@pytest.mark.parametrize("method", [*METHODS, "mr-gptq"])
def test_a_run_repeats_to_the_bit(models, tmp_path, method):
    for name in ("first", "second"):
        assert quantize(models("llama"), tmp_path / name, method) == 0
    assert files_of(tmp_path / "first") == files_of(tmp_path / "second")


def test_memory_is_estimated_before_the_run_and_does_not_grow_with_layers(models):
    source = Source(models("llama"))
    quantized, _ = source.quantizable()
    units = by_layer(source.tensors, quantized)
    # The embedding is the largest tensor: its bytes, and 30 % for codes.
    assert data_free_bytes(source, units) == int(1.3 * 288 * 64 * 2)
    few, many = (calibrated_bytes(source, units, quantized, n, 2, True) for n in (100, 1100))
    assert many > few > data_free_bytes(source, units)
    assert calibrated_bytes(source, units[:2], quantized, 100, 2, True) == few
    # Of the source's own layers, `hessian` holds nothing: two hidden states and the inputs of the
    # four products: 64 and 128, attention and MLP alike.
    one = calibrated_bytes(source, units, quantized, 1100, 2, False)
    assert many - one == 1100 * 2 * (2 * 64 + 2 * (64 + 128))
    # lm_head rounded for the choice of its format, and every layer's inputs beside it.
    tables = source.vocabulary(with_embedding=True)
    plain = sensitivity_bytes(source, units, quantized, 100, 2)
    assert sensitivity_bytes(source, units, quantized.union(tables), 100, 2) > plain
    assert sensitivity_bytes(source, units, quantized, 1100, 2) - plain == 3 * 2 * 64 * 1000


def test_the_seed_chooses_the_text(models, tmp_path):
    for seed in ("0", "1"):
        assert quantize(models("llama"), tmp_path / seed, "gptq", "--seed", seed) == 0
    assert files_of(tmp_path / "0") != files_of(tmp_path / "1")
    folder = models("llama")
    samples = Calibration(num_samples=8, length=64, seed=1).samples(folder)
    assert samples.shape == (8, 64)
    assert len({tuple(sample.tolist()) for sample in samples}) == 8


@pytest.mark.parametrize("method", ["mse", "gptq", "mr-gptq"])
def test_an_interrupted_run_goes_on_to_the_same_bits(models, tmp_path, method, monkeypatch):
    source = models("llama")
    assert quantize(source, tmp_path / "whole", method) == 0
    target = tmp_path / "out"
    with interrupted_at(monkeypatch, "model.layers.1."):
        assert quantize(source, target, method) == 130
    assert not target.exists()
    finished = sorted((work_folder(target) / "checkpoint").glob("*.safetensors"))
    assert [path.name[:11] for path in finished] == ["model-00001", "model-00002"]
    times = {path.name: path.stat().st_mtime_ns for path in finished}
    assert quantize(source, target, method) == 0
    assert files_of(target) == files_of(tmp_path / "whole")
    assert all((target / name).stat().st_mtime_ns == times[name] for name in times)
    assert not work_folder(target).exists()


def _leave_unfinished(source: Path, target: Path) -> None:
    def stop(layer: str) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_resumable(source, target, DataFree("mse"), WriteOptions(progress=stop))


def test_other_arguments_do_not_go_on(copied, tmp_path):
    target = tmp_path / "out"
    _leave_unfinished(copied, target)
    other = WriteOptions(stored=FORMATS["compressed-tensors"])
    with pytest.raises(FileExistsError, match=r"differing: stored\); repeat that run's arguments"):
        write_resumable(copied, target, DataFree("mse"), other)
    edit_json(copied / "config.json", lambda config: config.update(note="longer by this"))
    with pytest.raises(FileExistsError, match="differing: source"):
        write_resumable(copied, target, DataFree("mse"), WriteOptions())
    assert not target.exists()


def test_two_runs_do_not_share_a_target(models, tmp_path):
    target = tmp_path / "out"
    with (
        work_in(target, {}),
        pytest.raises(FileExistsError, match=r"another run is writing .*out; wait for it"),
    ):
        write_resumable(models("llama"), target, DataFree("mse"), WriteOptions())


# --- what is refused ------------------------------------------------------------------------------


def test_a_quantised_source_is_refused(models, tmp_path, capsys):
    assert quantize(models("llama"), tmp_path / "once", "rtn") == 0
    assert quantize(tmp_path / "once", tmp_path / "twice", "gptq") == 1
    assert "found modelopt; needed an unquantised checkpoint" in capsys.readouterr().err
    assert {path.name for path in tmp_path.iterdir()} == {"once"}


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_are_refused(copied, tmp_path, capsys, value):
    name = "model.layers.1.self_attn.o_proj.weight"

    def damage(tensors: dict[str, torch.Tensor]) -> None:
        tensors[name][3, 5] = value

    edit_tensors(copied, damage)
    assert quantize(copied, tmp_path / "out", "rtn") == 1
    error = capsys.readouterr().err
    assert name in error
    assert "1 of 8192 weights are NaN or infinite" in error
    assert not (tmp_path / "out").exists()


def test_a_disk_that_is_too_small_is_refused_before_the_work(models, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(write.shutil, "disk_usage", lambda path: SimpleNamespace(free=10_000_000))
    assert quantize(models("llama"), tmp_path / "out", "rtn") == 1
    assert "0.01 GB free, 0.07 GB needed" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
    assert list((work_folder(tmp_path / "out") / "checkpoint").iterdir()) == []


def test_a_calibration_text_that_is_too_short_is_refused(models, tmp_path, capsys):
    text = tmp_path / "short.txt"
    text.write_text("word " * 30)
    assert quantize(models("llama"), tmp_path / "out", "gptq", "--calibration", str(text)) == 1
    assert "150 tokens, 3 samples of 48; needed 4 samples, 192 tokens" in capsys.readouterr().err
    text.write_bytes(b"\xff\xfe latin")
    assert quantize(models("llama"), tmp_path / "out", "gptq", "--calibration", str(text)) == 1
    assert "needs plain UTF-8 text" in capsys.readouterr().err
    missing = str(tmp_path / "missing.txt")
    assert quantize(models("llama"), tmp_path / "out", "gptq", "--calibration", missing) == 1
    assert "missing.txt" in capsys.readouterr().err
    assert {path.name for path in tmp_path.iterdir()} == {"short.txt"}


def test_inputs_that_are_not_finite_are_refused(copied, tmp_path, capsys):
    def damage(tensors: dict[str, torch.Tensor]) -> None:
        tensors["model.layers.0.input_layernorm.weight"][3] = float("inf")

    edit_tensors(copied, damage)
    assert quantize(copied, tmp_path / "out", "hessian") == 1
    error = capsys.readouterr().err
    assert "model.layers.0.self_attn." in error
    assert "inputs on the calibration text: found NaN or infinite numbers" in error
    assert not (tmp_path / "out").exists()


def test_an_unknown_architecture_is_refused(copied, tmp_path, capsys):
    """No class says which of its tensors are linear layers."""
    edit_json(copied / "config.json", lambda config: config.update(model_type="nonesuch"))
    for method in ("mse", "hessian"):
        assert quantize(copied, tmp_path / "out", method) == 1
        error = capsys.readouterr().err
        assert "config.json: architectures" in error
        assert "nonesuch" in error
    assert not (tmp_path / "out").exists()


def test_layers_of_another_decoder_are_refused(models, tmp_path):
    source = Source(models("llama"))
    quantized, _ = source.quantizable()
    units = by_layer(source.tensors, quantized)
    calibrated = Calibrated(source, "gptq", Calibration(num_samples=1, length=16))
    with pytest.raises(CheckpointError, match=r"model\.layers\.1\. where model\.layers\.0\. comes"):
        calibrated.start(units[2], quantized, set(), lambda scale: scale)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--method", "mse", "--calibration", "builtin"], "--method mse looks at no text"),
        (["--device", "cuda"], "torch sees no CUDA device; use --device cpu"),
        (["--method", "mr-gptq", "--format", "modelopt"], "drop --format, or use --method gptq"),
        (["--method", "mr-gptq", "--kv-cache", "fp8"], "FP-Quant's dialect has no scales"),
        (["--method", "mr-gptq", "--target-bits", "5"], "FP-Quant's dialect has one format"),
    ],
)
def test_options_that_do_not_go_together(models, tmp_path, capsys, monkeypatch, options, message):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert main(["quantize", str(models("llama")), "-o", str(tmp_path / "out"), *options]) == 1
    assert message in capsys.readouterr().err


def test_an_existing_target_is_left_alone(models, tmp_path, capsys):
    (tmp_path / "out").mkdir()
    assert quantize(models("llama"), tmp_path / "out", "rtn") == 1
    assert "remove it or choose another folder" in capsys.readouterr().err
    assert list((tmp_path / "out").iterdir()) == []


def test_a_damaged_gguf_is_refused(tmp_path, capsys):
    (tmp_path / "model.gguf").write_bytes(b"GGUF" + bytes(20))
    assert quantize(tmp_path / "model.gguf", tmp_path / "out", "rtn") == 1
    assert "needed a whole GGUF file" in capsys.readouterr().err
    with pytest.raises(CheckpointError, match="a whole GGUF file"):
        gguf_to_folder(tmp_path / "model.gguf", tmp_path / "folder")
    assert {path.name for path in tmp_path.iterdir()} == {"model.gguf"}


# --- the pieces -----------------------------------------------------------------------------------


def test_units_follow_the_numbers_of_the_layers():
    names = [f"model.layers.{i}.mlp.{n}_proj.weight" for i in (10, 9, 0) for n in ("up", "gate")]
    names += ["lm_head.weight", "model.norm.weight", "vision.layers.3.norm.weight"]
    units = by_layer(names, {n for n in names if "_proj" in n})
    assert [unit.prefix for unit in units] == [
        "",
        "model.layers.0.",
        "model.layers.9.",
        "model.layers.10.",
    ]
    assert units[0].names == ["lm_head.weight", "model.norm.weight", "vision.layers.3.norm.weight"]
    assert units[1].groups == (tuple(names[4:6]),)


@pytest.mark.parametrize("stored", FORMATS.values(), ids=lambda f: f.name)
def test_stored_scale_reads_back_as_it_was_used(stored):
    for value in torch.rand(200, generator=torch.Generator().manual_seed(2)):
        scale = stored.representable(value * 0.01)
        codes = torch.full((2, 8), 0x22, dtype=torch.uint8)
        block_scale = torch.ones(2, 1).to(torch.float8_e4m3fn)
        weight = BlockScaledWeight(codes, block_scale, scale.expand(2), NVFP4)
        read = stored.dequantize("x", stored.tensors("x", weight).__getitem__)
        assert torch.equal(read, weight.dequantize())
        assert (decode_e2m1(unpack_codes(codes)) == 1).all()


def test_builtin_text_is_enough_for_the_defaults():
    text = Calibration().read()
    assert len(text.encode()) < 150_000
    assert text.isascii()
    # Word pieces of English text are 4 to 5 characters each.
    assert len(text) / 5 > Calibration().num_samples * Calibration().length


def test_gguf_goes_through_the_same_command(models, tmp_path, monkeypatch):
    calls = []

    def convert(gguf: Path, target: Path) -> None:
        calls.append(gguf)
        shutil.copytree(models("llama"), target)

    from vllm_nvfp4.checkpoints import gguf as module

    monkeypatch.setattr(module, "gguf_to_folder", convert)
    path = tmp_path / "model.gguf"
    writer = GGUFWriter(path, "llama")
    writer.add_block_count(1)
    writer.add_tensor("token_embd.weight", np.ones((64, 32), np.float16))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    assert quantize(path, tmp_path / "out", "rtn") == 0
    assert quantize(models("llama"), tmp_path / "plain", "rtn") == 0
    assert tensors_of(tmp_path / "out").keys() == tensors_of(tmp_path / "plain").keys()
    assert calls == [path]
    assert {p.name for p in tmp_path.iterdir()} == {"model.gguf", "out", "plain"}
    assert files_of(tmp_path / "out").keys() == files_of(tmp_path / "plain").keys()
