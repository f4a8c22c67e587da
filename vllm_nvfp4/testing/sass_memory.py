# SPDX-License-Identifier: Apache-2.0
"""What a compiled kernel keeps on its way from memory: read from the machine code, not timed.

Two figures. While the main loop runs, enough weights have to be under way all the time, or DRAM
idles: Little's law. After it, the thread block that adds the splits waits for memory a number of
times, one after another.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass

from vllm_nvfp4.gpus import Gpu
from vllm_nvfp4.kernels.cuda.configs import GemmConfig
from vllm_nvfp4.testing.sass import Bound, Instruction, Machine

# From the request to the data while DRAM is busy, seconds, by architecture. An assumption, and a
# careful one: NVIDIA's CUB keeps 12 KiB in flight on each SM of a V100, 16 on an A100, 32 on an
# H100 and 48 on an H200 to saturate them (cub/device/dispatch/tuning/tuning_transform.cuh), which
# by Little's law is 1.1 us for the first two (900 GB/s, 80 SMs; 1555 GB/s, 108 SMs) and 1.3 to
# 1.35 us for the others. Ada's GDDR6 is taken for the former. An idle DRAM answers in a fraction
# of that.
LATENCY = {89: 1.1e-6, 90: 1.35e-6}

# How many splits the tail is counted for, and how many of their loads a round has to hold.
TAIL_SPLITS = 8
MIN_LOADS_OF_A_ROUND = 16
# Tokens that a thread adds at a time where it has as many: csrc/epilogue.cuh, add_splits.
_TOKENS_OF_A_ROUND = 4

_REGISTER = re.compile(r"\bR(\d+)\b")


def needed_in_flight(gpu: Gpu) -> float:
    """Bytes that each SM must have under way for DRAM to run at its full rate: its share of the
    bandwidth times the latency."""
    return gpu.dram_gbps * 1e9 / gpu.num_sms * LATENCY[gpu.arch]


# --- the main loop -------------------------------------------------------------------------------


@dataclass(frozen=True)
class Flight:
    """Bytes of weights on their way to one SM while the main loop runs.

    least: at the loop's emptiest instruction, all warps of the SM at once there
    most:  at its fullest: what a warp has under way that waits for its weights
    """

    least: int
    most: int


def flight(config: GemmConfig, machine: Machine, loop: tuple[int, int]) -> Flight:
    """The weights in flight in a main loop, ``config.blocks_per_sm`` blocks on the SM.

    Raises RuntimeError where the loop's loads are not those of the kernel's kind.
    """
    body = machine.inside(loop)
    if config.streams_weights:
        levels = loads_in_flight(body)
        warps = config.num_warps * config.blocks_per_sm
        return Flight(min(levels) * warps, max(levels) * warps)
    waits = [i.operands for i in body if i.opcode.startswith("DEPBAR")]
    commits = sum(i.opcode == "LDGDEPBAR" for i in body)
    found = re.fullmatch(r"SB0, 0x([0-9a-f]+)", waits[0]) if len(waits) == 1 else None
    if not found or commits != 1:
        raise RuntimeError(f"{config.symbol}: {commits} groups of copies, waits {waits} in a step")
    # The wait leaves some groups under way, one stage of weights each; the next is added after it.
    groups = int(found[1], 16)
    stage = config.block_n * config.block_k * config.fmt.bits_per_weight / 8 * config.blocks_per_sm
    return Flight(int(groups * stage), int((groups + 1) * stage))


def loads_in_flight(body: Sequence[Instruction]) -> list[int]:
    """Bytes that a warp's loads of weights have under way at each instruction of a loop.

    A load is under way from the instruction after it to the one that first names a register of its
    result, which waits for it, around the loop's end if need be. Conditional loads count in full.
    16 bytes a lane are codes, all different; less are block scales, which four lanes share.
    """
    levels = [0] * len(body)
    for place, load in enumerate(body):
        if not (load.opcode.startswith("LDG.") and ".CONSTANT" in load.opcode):
            continue
        size = 16 if ".128" in load.opcode else 8 if ".64" in load.opcode else 4
        wanted = _result(load)
        for step in range(1, len(body)):
            at = (place + step) % len(body)
            if wanted & _named(body[at]):
                break
            levels[at] += 32 * size if size == 16 else 32 * size // 4
    return levels


def _result(load: Instruction) -> set[int]:
    """The registers that a load writes."""
    found = _REGISTER.match(load.operands)
    if not found:
        return set()
    count = 4 if ".128" in load.opcode else 2 if ".64" in load.opcode else 1
    return set(range(int(found[1]), int(found[1]) + count))


def _named(instruction: Instruction) -> set[int]:
    """The registers that an instruction's operands name: of a wider one the first."""
    return {int(number) for number in _REGISTER.findall(instruction.operands)}


# --- the tail of split K -------------------------------------------------------------------------


@dataclass(frozen=True)
class Tail:
    """What the thread block that adds a tile's splits waits for, one after another.

    fences: until its own sums are visible to the others, and any fence after that
    atomics: on the semaphore
    rounds: of loads: those of a round are all under way before the first is waited for
    """

    fences: int
    atomics: int
    rounds: int

    @property
    def waits(self) -> int:
        return self.fences + self.atomics + self.rounds


def tokens_of_thread(config: GemmConfig) -> int:
    """How many tokens of a tile each thread of the epilogue handles (csrc/epilogue.cuh, Quad)."""
    return config.block_m * config.block_n // 4 // config.threads


def tail(machine: Machine, tokens: int, splits: int = TAIL_SPLITS) -> Tail:
    """The waits from the last store of a split's sums to the store of y.

    tokens: of each thread
    Raises RuntimeError where the code has no semaphore or no loop over the splits.
    """
    code = machine.instructions
    arrival = next((n for n, i in enumerate(code) if i.opcode.startswith("ATOMG")), None)
    if arrival is None:
        raise RuntimeError(f"{machine.symbol}: no atomic operation on a semaphore")
    first = max((n for n in range(arrival) if "BAR.SYNC" in code[n].opcode), default=0)
    rest = code[first:]
    loops = [
        loop
        for loop in machine.backward_branches
        if loop[0] > code[arrival].address and _splits_loads(machine.inside(loop))
    ]
    if not loops:
        raise RuntimeError(f"{machine.symbol}: no loop after the semaphore loads the splits' sums")
    loops.sort(key=lambda loop: loop[1] - loop[0])
    inner = machine.inside(loops[0])
    turns = math.ceil(splits * tokens / _splits_loads(inner))
    # What is waited for beside the splits, once for the tokens that are added together.
    after = [i for i in rest if i.address > code[arrival].address]
    others = _rounds(after) - _rounds(inner)
    passes = math.ceil(tokens / min(tokens, _TOKENS_OF_A_ROUND)) if len(loops) > 1 else 1
    return Tail(
        fences=sum(i.opcode.startswith("MEMBAR") for i in rest),
        atomics=sum(i.opcode.startswith("ATOMG") for i in rest),
        rounds=_rounds(inner) * turns + others * passes,
    )


def _splits_loads(body: Sequence[Instruction]) -> int:
    """16-byte loads that may not take the read-only path: those of other blocks' sums."""
    return sum(i.opcode.startswith("LDG.E.128") and "CONSTANT" not in i.opcode for i in body)


def _rounds(body: Sequence[Instruction]) -> int:
    """How often the code, run once from top to bottom, waits for a load. Whoever waits for one has
    waited for all before it."""
    rounds, pending = 0, set[int]()
    for instruction in body:
        if pending & _named(instruction):
            rounds, pending = rounds + 1, set()
        if instruction.opcode.startswith("LDG."):
            pending |= _result(instruction)
    return rounds


# --- the bounds ----------------------------------------------------------------------------------


def flight_problems(
    config: GemmConfig, found: Flight, bounds: Sequence[Bound], gpus: Sequence[Gpu]
) -> list[str]:
    """What a main loop keeps in flight too little of; empty where all is well.

    Where DRAM is what limits a tile, the loop's emptiest point has to be enough for it. A GPU
    without a bound (Hopper: its limits are not read from this code) has to find its need where a
    warp waits, if nothing but weights' latency limits the tile.
    """
    ratios = {b.gpu: b.dram_ratio for b in bounds}
    problems = []
    for gpu in gpus:
        need = needed_in_flight(gpu)
        if gpu.name in ratios:
            level, place = found.least, "at its emptiest"
            is_bound = ratios[gpu.name] >= 1
        else:
            level, place = found.most, "where it waits"
            is_bound = config.streams_weights
        if is_bound and level < need:
            problems.append(
                f"{gpu.name}: {level / 1024:.1f} KiB of weights in flight on an SM {place}, at "
                f"least {need / 1024:.1f}"
            )
    return problems


def tail_problems(config: GemmConfig, found: Tail) -> list[str]:
    """What the tail waits for too often; empty where all is well."""
    rounds = math.ceil(tokens_of_thread(config) * TAIL_SPLITS / MIN_LOADS_OF_A_ROUND)
    if found.waits <= 2 + rounds:
        return []
    return [
        f"the tail waits {found.waits} times for memory with {TAIL_SPLITS} splits ({found.fences} "
        f"fences, {found.atomics} atomics, {found.rounds} rounds of loads), at most {2 + rounds}"
    ]
