# SPDX-License-Identifier: Apache-2.0
"""The benchmark scripts, as far as a machine without a GPU can tell: what they refuse, what they
compute from measurements, and the checkpoint they serve."""

import importlib
import json
import math
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from vllm_nvfp4.checkpoints.detect import detect
from vllm_nvfp4.checkpoints.headers import read_headers
from vllm_nvfp4.kernels.cuda.moe_dispatch import MoeShape
from vllm_nvfp4.testing.shapes import EXPERT_LAYERS, MODELS

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"


@pytest.fixture
def load(monkeypatch):
    """load(name) -> the module of a script."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    return importlib.import_module


@pytest.fixture
def script(load, monkeypatch):
    """run(name, *arguments) -> exit status, in this process."""

    def run(name, *arguments):
        monkeypatch.setattr(sys, "argv", [f"{name}.py", *map(str, arguments)])
        return load(name).main()

    return run


# --- without a GPU -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "arguments"),
    [
        ("bench_gemm", []),
        ("bench_moe", []),
        ("bench_launch", []),
        ("bench_tiles", []),
        ("check_kernels", ["--small"]),
    ],
)
def test_no_gpu_is_one_line_and_status_3(script, capsys, monkeypatch, name, arguments):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert script(name, *arguments) == 3
    err = capsys.readouterr().err
    assert err.count("\n") == 1
    assert "no CUDA GPU" in err


def test_the_launch_path_runs_on_a_driver_that_only_records(tmp_path):
    """In a process of its own: it makes CPU tensors those of a GPU."""
    command = [sys.executable, BENCHMARKS / "bench_launch.py", "--stub", "--count", "9"]
    done = subprocess.run(
        [*command, "--out", tmp_path / "launch.csv"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    lines = (tmp_path / "launch.csv").read_text().splitlines()
    rows = [line.rsplit(",", 1) for line in lines if not line.startswith(("#", '"#'))]
    assert rows[0] == ["call", "host_us"]
    assert len(rows) == 8
    assert all(float(us) > 0 for _, us in rows[1:])


@pytest.mark.parametrize(
    ("name", "arguments", "message"),
    [
        ("bench_gemm", ["--models", "GPT-2"], "unknown model GPT-2; known: Qwen3-8B"),
        ("bench_moe", ["--models", "Qwen3-8B"], "unknown model Qwen3-8B; known: Qwen3-30B-A3B"),
        ("bench_moe", ["--routings", "even"], "unknown routing even; known: uniform, skewed"),
        ("make_random_checkpoint", ["--out", "x", "--layers", "0"], "needs at least 1"),
        ("make_random_checkpoint", [], "--out"),
    ],
)
def test_wrong_usage(script, capsys, name, arguments, message):
    with pytest.raises(SystemExit, match="2"):
        script(name, *arguments)
    assert message in capsys.readouterr().err


# --- what is computed from measurements ----------------------------------------------------------


def test_speedups_and_geometric_means(load):
    gemm, frame = load("bench_gemm"), load("kernel_bench")

    def row(backend, m, us, match="yes"):
        return gemm.Row("m", "l", m, 64, 64, backend, "k", us, 0, 0, 0, 0, math.nan, 0, match)

    rows = gemm.with_speedups(
        [row("marlin", 1, 10.0), row("marlin", 8, 12.0), row("ours", 1, 5.0), row("ours", 8, 12.0),
         row("ours", 16, 1.0), gemm.failed_row("peer", ("m", "l", 0, 64, 64), ValueError("a\nb"))]
    )  # fmt: skip
    assert [r.x_marlin for r in rows[:4]] == [1.0, 1.0, 2.0, 1.0]
    assert math.isnan(rows[4].x_marlin)  # Marlin has no row at M = 16
    assert rows[5].kernel == "failed: a b"
    text = "\n".join(frame.geometric_means(rows, gemm.RANGES))
    assert "M<=64: 1.41x Marlin (least 1.00, 2)" in text
    assert "peer                 nothing to compare" in text
    assert frame.format_row(rows[0])[7] == "10"


def test_every_shape_is_measured_once(load):
    gemm = load("bench_gemm")
    found = gemm.layers_of(["Qwen3-8B", "Llama-3.1-8B"])
    assert [place[:2] for place in found[:4]] == [
        ("Qwen3-8B", "qkv_proj"), ("Qwen3-8B", "o_proj"), ("Qwen3-8B", "gate_up_proj"),
        ("Qwen3-8B", "down_proj"),
    ]  # fmt: skip
    assert [place[1] for place in found[4:]] == ["gate_up_proj", "down_proj"]  # qkv, o are Qwen's
    assert ("Qwen3-8B", "gate_up_proj", 24576, 4096) in found


def test_sampled_error_sees_a_wrong_row_and_the_quantised_activations(load):
    gemm = load("bench_gemm")
    from vllm_nvfp4.numerics.reference import reference_linear
    from vllm_nvfp4.testing.kernel_cases import random_weight

    weight = random_weight(96, 64, "nvfp4", torch.device("cpu"))
    a = torch.randn(5, 64).bfloat16()
    y = reference_linear(a, weight).bfloat16()
    assert gemm.sampled_error(y, a, weight) < 3e-3
    y8 = reference_linear(a, weight, activation_bits=8).bfloat16()
    assert gemm.sampled_error(y8, a, weight, 8) < 3e-3 < gemm.sampled_error(y8, a, weight)
    y[:, 7] = 0
    assert gemm.sampled_error(y, a, weight) > 3e-2


def test_quantised_activations_are_kept_for_the_same_tensor_alone(load):
    """Not for another of the same address: fewer tokens of it, or new ones in its memory."""
    from vllm_nvfp4.testing.kernel_cases import random_weight

    call = (
        load("gemm_backends")
        .BACKENDS["torch-fp8"]
        .prepare(random_weight(32, 64, "nvfp4", torch.device("cpu")), torch.bfloat16)
    )
    a = torch.randn(48, 64).bfloat16()
    whole = call(a)
    assert torch.equal(call(a[:16]), whole[:16])
    other = a.view_as(a)
    other.mul_(2)  # a power of two: only the scales change
    assert torch.equal(call(other), whole * 2)


def test_moe_routings_choose_an_expert_once_and_skewed_hits_fewer(load):
    moe = load("bench_moe")
    shape = EXPERT_LAYERS["Qwen3-30B-A3B"]
    hit = {}
    for routing in moe.ROUTINGS:
        a, weights, ids = moe.draw_tokens(64, shape, routing, torch.bfloat16, "cpu", 0)
        assert a.shape == (64, 2048)
        assert all(len(set(row)) == shape.num_choices for row in ids.tolist())
        assert torch.allclose(weights.sum(1), torch.ones(64))
        hit[routing] = torch.bincount(ids.flatten(), minlength=128).amax()
    assert hit["skewed"] > 2 * hit["uniform"]


def test_moe_error_is_that_of_the_layer(load):
    moe, backends = load("bench_moe"), load("moe_backends")
    from vllm_nvfp4.kernels.cpu import linear as cpu
    from vllm_nvfp4.kernels.cpu import moe as cpu_moe
    from vllm_nvfp4.testing.moe_cases import Experts

    layer = backends.Layer(MoeShape(4, 2, 64, 48), "nvfp4", torch.device("cpu"), 0)
    a, weights, ids = tokens = moe.draw_tokens(
        6, layer.shape, "uniform", torch.bfloat16, torch.device("cpu"), 0
    )
    stacks = [Experts(w, None).stacked_by(cpu.pack_weight) for w in (layer.w13, layer.w2)]
    y = cpu_moe.moe(a, *stacks, (weights, ids, None), backends.SILU, False, 16)
    assert moe.sampled_error(y, tokens, layer) < 6e-3
    y[:, 3] += 1
    assert moe.sampled_error(y, tokens, layer) > 6e-3


def test_humming_gets_the_layer_as_vllms_modelopt_method_has_it(load):
    """As much of it as there is without a GPU: the parameters before vLLM converts them."""
    backends = load("moe_backends")
    layer = backends.Layer(MoeShape(4, 2, 64, 48), "nvfp4", torch.device("cpu"), 0)
    place = backends.humming_layer(layer, torch.bfloat16)
    assert {name: tuple(p.shape) for name, p in place.named_parameters()} == {
        "w13_weight": (4, 96, 32), "w13_weight_scale": (4, 96, 4), "w13_weight_scale_2": (4, 2),
        "w2_weight": (4, 64, 24), "w2_weight_scale": (4, 64, 3), "w2_weight_scale_2": (4,),
    }  # fmt: skip
    assert place.moe_config.intermediate_size_per_partition == 48
    assert not place.moe_config.has_bias
    mxfp4 = backends.Layer(MoeShape(1, 1, 64, 32), "mxfp4", torch.device("cpu"), 0)
    with pytest.raises(RuntimeError, match="for NVFP4"):
        backends.humming_layer(mxfp4, torch.bfloat16)


def test_moe_speedups_are_against_the_same_routing(load):
    moe, frame = load("bench_moe"), load("kernel_bench")

    def row(backend, routing, us):
        return moe.Row("m", routing, 8, 4, backend, "k", us, 0, 0, 0, 0, math.nan, 0, "yes")

    rows = moe.with_speedups(
        [row("marlin", "uniform", 8.0), row("marlin", "skewed", 4.0), row("ours", "skewed", 2.0)]
    )
    assert [r.x_marlin for r in rows] == [1.0, 1.0, 2.0]
    assert "M<=64: 2.00x Marlin (least 2.00, 1)" in frame.geometric_means(rows, moe.RANGES)[1]


def test_tiles_report_what_the_choice_loses(load, capsys):
    tiles = load("bench_tiles")
    rows = [
        (1, 64, 128, 16, "kernel_a", 1, "12.000", True, False, "9.00"),
        (1, 64, 128, 16, "kernel_b", 4, "10.000", False, True, "9.50"),
    ]
    assert tiles.report(rows) == pytest.approx(1.2)
    assert "(1.20x): kernel_a/1 vs kernel_b/4" in capsys.readouterr().out


# --- the random checkpoint -----------------------------------------------------------------------


def test_the_random_checkpoint_is_a_whole_modelopt_checkpoint(script, load, tmp_path, capsys):
    assert script("make_random_checkpoint", "--model", "tiny", "--out", tmp_path) == 0
    headers = read_headers(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    dialect = detect(config["quantization_config"])
    make = load("make_random_checkpoint")
    for layer_idx in range(make.TINY.num_hidden_layers):
        for name, (n, k) in make.projections(make.TINY).items():
            layer = f"model.layers.{layer_idx}.{name}"
            spec = dialect.layer_spec(layer)
            assert spec.fmt.name == "nvfp4"
            for tensor in spec.tensors:
                assert headers[f"{layer}.{tensor.name}"].dtype in tensor.dtypes
            assert headers[f"{layer}.weight"].shape == (n, k // 2)
            assert headers[f"{layer}.weight_scale"].shape == (n, k // 16)
    index = json.loads((tmp_path / make.INDEX_NAME).read_text())
    assert set(index["weight_map"]) == set(headers)
    assert index["metadata"]["total_size"] == sum(h.num_bytes for h in headers.values())
    capsys.readouterr()
    assert script("make_random_checkpoint", "--model", "tiny", "--out", tmp_path, "--keep") == 0
    assert "there already" in capsys.readouterr().out


def test_the_projections_are_the_fused_layers_of_the_benchmarks(load):
    make = load("make_random_checkpoint")
    parts = make.projections(MODELS["Qwen3-8B"])
    fused = MODELS["Qwen3-8B"].linear_layers()
    qkv = [parts[f"self_attn.{p}_proj"] for p in "qkv"]
    assert (sum(n for n, _ in qkv), qkv[0][1]) == fused["qkv_proj"]
    assert parts["self_attn.o_proj"] == fused["o_proj"]
    assert parts["mlp.down_proj"] == fused["down_proj"]
    gate_up = parts["mlp.gate_proj"]
    assert (2 * gate_up[0], gate_up[1]) == fused["gate_up_proj"]


def test_weights_keep_activations_of_order_one(load):
    make = load("make_random_checkpoint")
    from vllm_nvfp4.numerics.formats import NVFP4
    from vllm_nvfp4.numerics.weight import BlockScaledWeight

    t = make.layer_tensors(make.TINY, 0)
    name = "model.layers.0.mlp.gate_proj."
    weight = BlockScaledWeight(
        t[name + "weight"], t[name + "weight_scale"], t[name + "weight_scale_2"].expand(256), NVFP4
    )
    y = torch.randn(64, 128) @ weight.dequantize().T
    assert 0.8 < y.std() < 1.25


def test_a_machine_runs_the_features_it_can(load):
    check_features = load("check_features")
    for num_gpus, missing in (
        (0, {"Ray", "Sleep and wake"}),
        (1, {"Tensor parallel", "Pipeline parallel", "Data parallel"}),
        (2, set()),
    ):
        features = check_features.FEATURES
        assert {f.name for f in features if check_features.obstacle(f, num_gpus)} == missing
