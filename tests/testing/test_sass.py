# SPDX-License-Identifier: Apache-2.0
"""The machine code for sm_89: no spills, the MMAs and loads that were meant, the bounds."""

from __future__ import annotations

from dataclasses import replace

import pytest

from vllm_nvfp4.gpus import find_gpu
from vllm_nvfp4.kernels.cuda.configs import GEMM_CONFIGS, GemmConfig, imma_stand_in
from vllm_nvfp4.kernels.cuda.moe_configs import (
    ALL_MOE_CONFIGS,
    MOE_CONFIGS,
    AnyMoeConfig,
    MoeConfig,
)
from vllm_nvfp4.kernels.cuda.nvrtc import compile_cubin
from vllm_nvfp4.testing import sass

pytestmark = pytest.mark.long

CARDS = [gpu for gpu in map(find_gpu, ("RTX 4090", "L40S", "L4")) if gpu is not None]


@pytest.mark.parametrize("config", GEMM_CONFIGS, ids=lambda c: c.symbol)
def test_every_kernel_meets_its_bounds(config: GemmConfig) -> None:
    machine = sass.read_machine_code(compile_cubin(config, 89))
    cost = sass.main_loop_cost(config, machine)
    bounds = [sass.bound(config, cost, gpu) for gpu in CARDS]
    assert len(bounds) == 3
    assert machine.symbol == config.symbol
    assert sass.problems(config, machine, cost, bounds) == []


@pytest.mark.parametrize("config", MOE_CONFIGS, ids=lambda c: c.symbol)
def test_every_grouped_kernel_meets_the_bounds_of_its_tiles(config: MoeConfig) -> None:
    machine = sass.read_machine_code(compile_cubin(config, 89))
    costs = sass.moe_loop_costs(config, machine)
    assert len(costs) == len(config.tiles)
    assert sass.moe_problems(config, machine, costs, CARDS) == []


@pytest.mark.parametrize("stem", ["gemm_w4i8", "moe_w4i8"])
def test_int8_kernels_spill_nothing_before_sm_89(stem: str, monkeypatch) -> None:
    """The ones with the most registers; sass_report.py --check compiles them all."""
    monkeypatch.setattr(sass, "OLDER_ARCHS", (86,))
    configs = [c for c in (*GEMM_CONFIGS, *MOE_CONFIGS) if c.stem == stem and c.dtype == "bf16"]
    largest = max(configs, key=lambda c: (c.fmt_name == "nvfp4", c.smem_bytes))
    assert sass.older_problems(largest) == []
    [problem] = sass.older_problems(replace(largest, blocks_per_sm=3))
    assert "sm_86" in problem


@pytest.mark.parametrize("config", ALL_MOE_CONFIGS[-3:], ids=lambda c: c.symbol)
def test_the_small_kernels_of_experts_spill_nothing(config: AnyMoeConfig) -> None:
    machine = sass.read_machine_code(compile_cubin(config, 89))
    assert (machine.symbol, machine.stack, machine.local) == (config.symbol, 0, 0)


def test_the_bounds_of_grouped_kernels_are_not_empty_words() -> None:
    config = MOE_CONFIGS[0]
    machine = sass.read_machine_code(compile_cubin(config, 89))
    costs = sass.moe_loop_costs(config, machine)
    slow = [replace(cost, slots=4 * cost.slots) for cost in costs]
    assert "tile of 8: " in " ".join(sass.moe_problems(config, machine, slow, CARDS))
    crowded = replace(config, blocks_per_sm=9)
    assert "9 blocks need" in " ".join(sass.moe_problems(crowded, machine, costs, CARDS))
    spilled = sass.moe_problems(config, replace(machine, local=8), costs, CARDS)
    assert "local memory" in " ".join(spilled)
    other = next(c for c in MOE_CONFIGS if c.family == "prefill")
    with pytest.raises(RuntimeError, match="0 loops whose steps have 16 MMAs and 0 loads"):
        sass.moe_loop_costs(other, machine)


def test_the_bounds_are_not_empty_words() -> None:
    """Each check fails for a kernel that breaks it."""
    config = next(c for c in GEMM_CONFIGS if c.stem == "gemm_w4a8")
    machine = sass.read_machine_code(compile_cubin(config, 89))
    cost = sass.main_loop_cost(config, machine)
    bounds = [sass.bound(config, cost, gpu) for gpu in CARDS]

    def found(**changes: int) -> str:
        return " ".join(sass.problems(config, replace(machine, **changes), cost, bounds))

    assert "local memory" in found(stack=8)
    assert "do not fit an SM" in found(registers=config.blocks_per_sm * 256)
    slow = sass.bound(config, replace(cost, slots=cost.slots * 2), CARDS[0])
    assert "of the issue slots" in " ".join(sass.problems(config, machine, cost, [slow]))
    no_copies = tuple(i for i in machine.instructions if not i.opcode.startswith("LDGSTS"))
    without = replace(machine, instructions=no_copies)
    assert "copies to shared memory" in " ".join(sass.problems(config, without, cost, bounds))
    integer = sass.read_machine_code(compile_cubin(imma_stand_in(config), 89))
    assert "MMAs other than QMMA" in " ".join(sass.problems(config, integer, cost, bounds))
    decode = next(c for c in GEMM_CONFIGS if c.block_m == 8)
    starved = sass.Bound("L4", 1.0, 2.4)
    assert "DRAM's rate" in " ".join(sass.problems(decode, machine, cost, [starved]))


def test_the_stand_in_keeps_the_schedule() -> None:
    """Integer MMA in the place of FP8: as many instructions to within 5 %, no QMMA."""
    config = next(c for c in GEMM_CONFIGS if c.stem == "gemm_w4a8" and c.fmt_name == "nvfp4")
    real = sass.read_machine_code(compile_cubin(config, 89))
    integer = sass.read_machine_code(compile_cubin(imma_stand_in(config), 89))
    assert integer.count("QMMA") == 0
    assert integer.count("IMMA.16816") == real.count("QMMA.16816")
    slots = sass.main_loop_cost(config, integer).slots / sass.main_loop_cost(config, real).slots
    assert 0.95 < slots < 1.05
