# SPDX-License-Identifier: Apache-2.0
"""Stacks of experts: known by one name, turned to N before K, and taken apart."""

import pytest
import torch

from vllm_nvfp4.checkpoints.census import Census
from vllm_nvfp4.checkpoints.detect import detect
from vllm_nvfp4.checkpoints.headers import TensorHeader
from vllm_nvfp4.checkpoints.spec import LayerKind
from vllm_nvfp4.checkpoints.stacks import Stack, parts_of
from vllm_nvfp4.numerics.formats import NVFP4

E, N, K = 3, 8, 64
LEAVES = ("gate_proj", "down_proj", "up_proj")
MODELOPT = {"quant_method": "modelopt", "quant_algo": "NVFP4"}
P = "model.layers.0.mlp.experts.gate_up_proj"
GRANITE = "model.layers.0.block_sparse_moe.input_linear"
# name -> (values, dtype in the file); every row of codes is unlike the others
CODES = torch.arange(E * N * K // 2).remainder(251).to(torch.uint8).view(E, N, K // 2)
SCALES = torch.arange(1, E * N * K // 16 + 1).view(E, N, K // 16).to(torch.float8_e4m3fn)
GLOBAL = torch.tensor([0.5, 0.25, 0.125])
LAYOUTS = {
    "bare": {P: CODES, f"{P}_weight_scale": SCALES, f"{P}_weight_scale_2": GLOBAL},
    "turned": {
        P: CODES.mT,
        f"{P}_weight_scale": SCALES.mT,
        f"{P}_weight_scale_2": GLOBAL,
        f"{P}_input_scale": torch.ones(E),
    },
    "one global scale": {
        f"{P}.weight": CODES,
        f"{P}.weight_scale": SCALES,
        f"{P}.weight_scale_2": torch.tensor(0.5),
    },
    "two dimensions": {
        f"{P}.weight": CODES.flatten(0, 1),
        f"{P}.weight_scale": SCALES.flatten(0, 1),
        f"{P}.weight_scale_2": torch.tensor([0.5]),
    },
    "beside": {
        f"{GRANITE}.weight": CODES,
        f"{GRANITE}.weight_scale": SCALES,
        f"{GRANITE}.weight_scale_2": GLOBAL[:, None],
    },
}
_NAMES = {torch.uint8: "U8", torch.float8_e4m3fn: "F8_E4M3", torch.float32: "F32"}


def census_of(tensors):
    headers = {n: TensorHeader("f", _NAMES[t.dtype], tuple(t.shape), 0, 1) for n, t in
               tensors.items()}  # fmt: skip
    return Census(headers, detect(MODELOPT))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_each_expert_gets_its_rows(layout):
    tensors = LAYOUTS[layout]
    census = census_of(tensors)
    prefix = (
        "model.layers.0.block_sparse_moe.experts" if layout == "beside" else P.rpartition(".")[0]
    )
    names = [f"{prefix}.{e}.{leaf}" for e in range(E) for leaf in LEAVES]
    spec = census.experts_spec(prefix, names)
    assert (spec.kind, spec.fmt) == (LayerKind.MICROSCALED, NVFP4)
    (module,) = census.stacks(prefix)
    stack = Stack(parts_of(module.name), E)
    found = {}
    for leaf in module.tensors:
        stored = census.stored_as[f"{module.name}.{leaf}"]
        tensor = tensors[stored.name]
        tensor = tensor.mT if stored.is_transposed else tensor
        found |= {(e, part, leaf): value for e, part, value in stack.split(tensor)}
    half = N // 2
    for e in range(E):
        for part, rows in (("gate", slice(0, half)), ("up", slice(half, N))):
            assert torch.equal(found[e, part, "weight"], CODES[e, rows])
            scale = found[e, part, "weight_scale"]
            assert torch.equal(scale.view(torch.uint8), SCALES[e, rows].view(torch.uint8))
            shared = layout in ("one global scale", "two dimensions")
            assert found[e, part, "weight_scale_2"] == (0.5 if shared else GLOBAL[e])
    assert not census.unasked()


@pytest.mark.parametrize(
    ("scale", "kind"),
    [((E, 1, N), LayerKind.FP8), ((E,), LayerKind.FP8), ((E, 1, 1), LayerKind.FP8)],
)
def test_a_stack_in_fp8(scale, kind):
    tensors = {P: torch.zeros(E, K, N).to(torch.float8_e4m3fn), f"{P}_scale": torch.ones(scale)}
    census = census_of(tensors)
    (module,) = census.stacks(P.rpartition(".")[0])
    assert module.spec.kind is kind
    assert set(module.tensors) == {"weight", "weight_scale"}
    assert census.stored_as[f"{P}.weight"].is_transposed == (len(scale) == 3 and scale[2] == N)


def test_rows_in_turns():
    rows = torch.arange(E * 4).view(E, 4, 1)
    found = {(e, p): v.flatten().tolist() for e, p, v in Stack(("gate", "up"), E, True).split(rows)}
    assert found[1, "gate"] == [4, 6]
    assert found[1, "up"] == [5, 7]


def test_what_is_no_stack_stays():
    """A dense layer of the same name, experts one by one, and stacks in 16 bits."""
    tensors = {
        "model.layers.0.mlp.gate_up_proj.weight": CODES[0],
        "model.layers.0.mlp.gate_up_proj.weight_scale": SCALES[0],
        "model.layers.1.mlp.experts.0.up_proj.weight": CODES[0],
        "model.layers.1.mlp.experts.0.up_proj.weight_scale": SCALES[0],
        "model.layers.2.mlp.experts.down_proj": torch.ones(E, N, K),
    }
    census = census_of(tensors)
    assert not census.stored_as
    assert not census.stacks("model.layers.2.mlp.experts")
