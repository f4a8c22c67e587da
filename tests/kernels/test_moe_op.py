# SPDX-License-Identifier: Apache-2.0
"""The op ``vllm_nvfp4::moe`` on the CPU against a float64 product of the dequantised experts."""

import math

import pytest
import torch
from torch.nn.functional import gelu, silu

import vllm_nvfp4.kernels.moe_ops  # noqa: F401 registers the op
from vllm_nvfp4.kernels.cpu.linear import pack_weight
from vllm_nvfp4.numerics.activation import SUPPORTED
from vllm_nvfp4.numerics.quantize import quantize_mxfp4, quantize_nvfp4
from vllm_nvfp4.numerics.weight import BlockScaledWeight

NUM_EXPERTS = 5
# Each type's rounding, three times over: w13's result, what the activation makes of it, and y. In
# float32 the sums over up to 160 terms count too.
TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 3 * 2**-8, torch.float16: 3 * 2**-11}


class Experts:
    """Random experts, packed for the op and dequantised in float64."""

    def __init__(self, hidden, inner, fmt="nvfp4", rows=2, num_experts=NUM_EXPERTS):
        generator = torch.Generator().manual_seed(hidden + inner)
        quantise = quantize_nvfp4 if fmt == "nvfp4" else quantize_mxfp4
        self.fmt, self.inner = fmt, inner
        self.packed, self.dense = [], []
        for n, k in ((rows * inner, hidden), (hidden, inner)):
            weights = []
            for _ in range(num_experts):
                w = quantise(torch.randn(n, k, generator=generator) * k**-0.5)
                if fmt == "nvfp4":  # rows of w1 and w3 with multipliers of their own
                    factor = torch.linspace(0.5, 1.5, n)
                    w = BlockScaledWeight(w.codes, w.block_scale, w.global_scale * factor, w.fmt)
                weights.append(w)
            packed = [pack_weight(w) for w in weights]
            names = ("codes", "block_scale", "global_scale")
            self.packed.append([torch.stack([getattr(p, name) for p in packed]) for name in names])
            self.dense.append([w.dequantize(torch.float64) for w in weights])

    def run(self, a, weights, ids, activation="silu", **options):
        swiglu = options.pop("swiglu", [math.inf, 1.0, 0.0])
        on_input, bits = options.pop("on_input", False), options.pop("bits", 16)
        expert_map = options.pop("expert_map", None)
        assert not options
        return torch.ops.vllm_nvfp4.moe(
            a, *self.packed, weights, ids, expert_map, self.inner, self.fmt, activation, swiglu,
            on_input, bits,
        )  # fmt: skip

    def expect(self, a, weights, ids, act, on_input=False):
        """Every choice of every token on its own, in float64; ids of -1 add nothing."""
        y = torch.zeros(a.shape[0], a.shape[1], dtype=torch.float64)
        for m, j in ((m, j) for m in range(len(ids)) for j in range(ids.shape[1])):
            e, factor = int(ids[m, j]), weights[m, j].double()
            if e >= 0:
                x = a[m].double() * (factor if on_input else 1)
                out = self.dense[1][e] @ act(self.dense[0][e] @ x)
                y[m] += out if on_input else out * factor
        return y


def tokens(num_tokens, hidden, dtype=torch.float32, choices=2):
    generator = torch.Generator().manual_seed(num_tokens)
    a = torch.randn(num_tokens, hidden, generator=generator).to(dtype)
    scores = torch.rand(num_tokens, NUM_EXPERTS, generator=generator)
    weights, ids = scores.topk(choices, dim=-1)
    return a, weights, ids.int()


def swiglu(h, limit=math.inf, alpha=1.0, beta=0.0):
    gate, up = h.chunk(2)
    gate, up = gate.clamp(max=limit), up.clamp(-limit, limit)
    return gate / (1 + (-alpha * gate).exp()) * (up + beta)


def gated(function):
    return lambda h: function(h.chunk(2)[0]) * h.chunk(2)[1]


def check(y, expected):
    error = ((y.double() - expected).norm() / expected.norm()).item()
    assert error < TOLERANCE[y.dtype], f"relative error {error}"


@pytest.mark.parametrize("dtype", list(TOLERANCE))
@pytest.mark.parametrize(
    ("hidden", "inner", "fmt"), [(48, 16, "nvfp4"), (80, 112, "nvfp4"), (96, 160, "mxfp4")]
)
@pytest.mark.parametrize("num_tokens", [1, 2, 7, 130])
def test_odd_sizes(num_tokens, hidden, inner, fmt, dtype):
    experts = Experts(hidden, inner, fmt)
    a, weights, ids = tokens(num_tokens, hidden, dtype)
    check(experts.run(a, weights, ids), experts.expect(a, weights, ids, swiglu))


ACTIVATIONS = {
    "silu": swiglu,
    "gelu": gated(gelu),
    "gelu_tanh": gated(lambda g: gelu(g, approximate="tanh")),
    "swigluoai": lambda h: swiglu(torch.cat([h[::2], h[1::2]]), 7.0, 1.702, 1.0),
    "swigluoai_uninterleave": swiglu,
    "silu_no_mul": silu,
    "gelu_no_mul": gelu,
    "gelu_tanh_no_mul": lambda h: gelu(h, approximate="tanh"),
    "relu2_no_mul": lambda h: h.clamp(min=0) ** 2,
}


def test_every_activation_is_tested():
    assert set(ACTIVATIONS) == set(SUPPORTED)


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_activations(name):
    experts = Experts(64, 48, rows=1 if name.endswith("_no_mul") else 2)
    a, weights, ids = tokens(6, 64)
    a = a * 6  # far enough for the clamps of swigluoai
    y = experts.run(a, weights, ids, name)
    check(y, experts.expect(a, weights, ids, ACTIVATIONS[name]))


@pytest.mark.parametrize("name", ["silu", "swigluoai_uninterleave"])
def test_constants_of_the_model(name):
    experts = Experts(64, 48)
    a, weights, ids = tokens(6, 64)
    y = experts.run(a, weights, ids, name, swiglu=[0.75, 1.3, 1.0])
    act = lambda h: swiglu(h, 0.75, 1.3, 1.0)  # noqa: E731
    check(y, experts.expect(a, weights, ids, act))


def test_router_weight_on_the_input():
    experts = Experts(64, 48)
    a, weights, ids = tokens(9, 64, choices=1)
    y = experts.run(a, weights, ids, on_input=True)
    check(y, experts.expect(a, weights, ids, swiglu, on_input=True))


def test_all_tokens_to_one_expert_and_none_to_the_others():
    experts = Experts(64, 48)
    a, weights, _ = tokens(33, 64, choices=1)
    ids = torch.full((33, 1), 3, dtype=torch.int64)
    check(experts.run(a, weights, ids), experts.expect(a, weights, ids, swiglu))


def test_experts_on_other_ranks_add_nothing():
    experts = Experts(64, 48)
    a, weights, ids = tokens(20, 64, choices=3)
    expert_map = torch.tensor([-1, 2, -1, 0, 4], dtype=torch.int32)
    y = experts.run(a, weights, ids, expert_map=expert_map)
    local = expert_map[ids.long()]
    assert (local == -1).all(dim=1).any() or (local == -1).any()
    check(y, experts.expect(a, weights, local, swiglu))
    none = torch.full((NUM_EXPERTS,), -1, dtype=torch.int32)
    assert not experts.run(a, weights, ids, expert_map=none).any()


def test_no_tokens():
    a, weights, ids = tokens(0, 64)
    assert Experts(64, 48).run(a, weights, ids).shape == (0, 64)


def test_a_token_does_not_depend_on_the_order_of_its_choices():
    experts = Experts(64, 48)
    a, weights, ids = tokens(12, 64, torch.bfloat16, choices=4)
    flipped = experts.run(a, weights.flip(1), ids.flip(1))
    assert torch.equal(experts.run(a, weights, ids), flipped)


def test_8_bit_activations():
    """E4M3 keeps 3 bits of mantissa: each of the two products is off by 2^-4 at the most."""
    experts = Experts(64, 48)
    a, weights, ids = tokens(16, 64)
    y, exact = experts.run(a, weights, ids, bits=8), experts.expect(a, weights, ids, swiglu)
    error = (y.double() - exact).norm() / exact.norm()
    assert 1e-3 < error < 2**-4


def test_schema_and_fake():
    experts = Experts(64, 48)
    a, weights, ids = tokens(4, 64)
    arguments = (a, *experts.packed, weights, ids, None, 48, "nvfp4", "silu", [7.0, 1.0, 0.0])
    torch.library.opcheck(torch.ops.vllm_nvfp4.moe.default, (*arguments, False, 16))


def test_what_does_not_fit_is_refused():
    experts = Experts(64, 48)
    a, weights, ids = tokens(4, 64)
    with pytest.raises(ValueError, match=r"w13 holds \d+ codes an expert; needed \d+"):
        experts.run(a[:, :32], weights, ids)
    with pytest.raises(ValueError, match="expert 5 was chosen of 5 experts"):
        experts.run(a, weights, torch.full_like(ids, 5))
    with pytest.raises(ValueError, match="found 'swish'; needed one of silu"):
        experts.run(a, weights, ids, "swish")
