# SPDX-License-Identifier: Apache-2.0
"""What the machine code has on its way from memory: the reading of it, and the bounds."""

from __future__ import annotations

from dataclasses import dataclass, replace

import pytest

from vllm_nvfp4.gpus import find_gpu
from vllm_nvfp4.kernels.cuda.configs import GEMM_CONFIGS, GemmConfig
from vllm_nvfp4.kernels.cuda.moe_configs import MOE_CONFIGS
from vllm_nvfp4.kernels.cuda.nvrtc import compile_cubin
from vllm_nvfp4.testing import sass, sass_memory
from vllm_nvfp4.testing.host_gemm import flattened_source
from vllm_nvfp4.testing.sass import Bound, Machine

ADA = [gpu for gpu in map(find_gpu, ("RTX 4090", "L40S", "L4")) if gpu is not None]
HOPPER = [gpu for gpu in map(find_gpu, ("H100 80GB HBM3", "H200")) if gpu is not None]
STREAMED = next(c for c in GEMM_CONFIGS if c.streams_weights)

# Two tiles of codes and one of block scales a turn. The first tile is asked for again right after
# its use, the second and the scales only behind the barrier.
LOOP = """
        /*0100*/                   PRMT R1, R4, 0x3120, RZ ;
        /*0110*/              @!P0 LDG.E.128.CONSTANT R4, [R20.64] ;
        /*0120*/                   PRMT R2, R11, 0x3120, RZ ;
        /*0130*/                   LOP3.LUT R3, R12, 0x7f007f00, RZ, 0xc0, !PT ;
        /*0140*/                   BAR.SYNC.DEFER_BLOCKING 0x0 ;
        /*0150*/                   LDG.E.128.CONSTANT R8, [R22.64] ;
        /*0160*/                   LDG.E.64.CONSTANT R12, [R24.64] ;
        /*0170*/                   HMMA.16816.F32.BF16 R16, R0, R28, R16 ;
        /*0180*/                   BRA 0x100 ;
"""
# A semaphore, a second fence for its reset, two loads a turn that are waited for one by one, and
# one load after the loop.
TAIL = """
        /*0200*/                   STG.E.128 [R2.64], R4 ;
        /*0210*/                   BAR.SYNC.DEFER_BLOCKING 0x0 ;
        /*0220*/                   MEMBAR.ALL.GPU ;
        /*0230*/                   ERRBAR;
        /*0240*/                   ATOMG.E.ADD.S32.STRONG.GPU PT, R10, [R8.64], R23 ;
        /*0250*/              @!P6 MEMBAR.ALL.GPU ;
        /*0260*/              @!P6 STG.E.STRONG.GPU [R8.64], RZ ;
        /*0270*/                   BAR.RED.OR.DEFER_BLOCKING 0x0, P1 ;
        /*0280*/                   LDG.E.128 R28, [R8.64] ;
        /*0290*/                   FADD R23, R23, R29 ;
        /*02a0*/                   LDG.E.128 R28, [R8.64+0x100] ;
        /*02b0*/                   FADD R23, R23, R28 ;
        /*02c0*/              @!P2 BRA 0x280 ;
        /*02d0*/                   LDG.E R5, [R8.64] ;
        /*02e0*/                   FMUL R23, R5.reuse, R23 ;
        /*02f0*/                   STG.E.64 [R2.64], R12 ;
        /*0300*/                   EXIT ;
"""


def machine_of(*listings: str) -> Machine:
    return Machine("listing", 32, 0, 0, sass.read_listing("".join(listings)))


@dataclass(frozen=True)
class Edited:
    """A shipped kernel with faults planted in its source."""

    config: GemmConfig
    edits: tuple[tuple[str, str], ...]

    @property
    def symbol(self) -> str:
        return self.config.symbol

    @property
    def min_arch(self) -> int:
        return self.config.min_arch

    @property
    def source(self) -> str:
        text = flattened_source([self.config.stem], self.edits)
        return text + self.config.definition


def compiled(config: GemmConfig, *edits: tuple[str, str]) -> Machine:
    return sass.read_machine_code(compile_cubin(Edited(config, edits), 89))


def test_bytes_in_flight_of_a_listing() -> None:
    """Counted by hand. The first tile is asked for at 0x110 and waited for at 0x100 of the next
    turn, the second one between 0x150 and 0x120, the scales between 0x160 and 0x130."""
    machine = machine_of(LOOP)
    assert machine.loops == [(0x100, 0x180)]
    levels = sass_memory.loads_in_flight(machine.inside(machine.loops[0]))
    codes, scales = 512, 64
    assert levels == [
        codes + scales,  # 0x100 waits for the first tile
        codes + scales,
        codes + scales,  # 0x120 waits for the second
        codes,  # 0x130 waits for the scales
        codes,
        codes,
        2 * codes,
        2 * codes + scales,
        2 * codes + scales,
    ]
    warps = STREAMED.num_warps * STREAMED.blocks_per_sm
    found = sass_memory.flight(STREAMED, machine, machine.loops[0])
    assert found == sass_memory.Flight(codes * warps, (2 * codes + scales) * warps)


def test_a_load_behind_the_use_of_all_leaves_nothing_in_flight() -> None:
    """The listing with the first tile's load behind the barrier."""
    lines = LOOP.splitlines()
    lines[2], lines[5] = lines[5].replace("140", "110"), lines[2].replace("110", "140")
    machine = machine_of("\n".join(lines))
    assert min(sass_memory.loads_in_flight(machine.instructions)) == 0


def test_waits_of_a_listing() -> None:
    machine = machine_of(LOOP, TAIL)
    found = sass_memory.tail(machine, tokens=1, splits=8)
    # Eight splits one after another, and the load behind them.
    assert found == sass_memory.Tail(fences=2, atomics=1, rounds=9)
    assert found.waits == 12
    assert sass_memory.tail(machine, tokens=1, splits=3).rounds == 5
    (problem,) = sass_memory.tail_problems(STREAMED, found)
    assert "waits 12 times" in problem
    assert "at most 3" in problem
    assert sass_memory.tail_problems(STREAMED, sass_memory.Tail(1, 1, 1)) == []


@pytest.mark.parametrize(
    ("gone", "message"), [("ATOMG", "no atomic operation"), ("LDG.E.128 ", "no loop after")]
)
def test_a_kernel_without_a_tail_is_not_counted(gone: str, message: str) -> None:
    machine = machine_of(LOOP, "\n".join(i for i in TAIL.splitlines() if gone not in i))
    with pytest.raises(RuntimeError, match=message):
        sass_memory.tail(machine, tokens=1)


def test_littles_law() -> None:
    needs = {gpu.name: sass_memory.needed_in_flight(gpu) / 1024 for gpu in (*ADA, *HOPPER)}
    assert needs["GeForce RTX 4090"] == pytest.approx(1008 / 128 * 1100 / 1024)
    assert needs["L4"] < needs["L40S"] < needs["GeForce RTX 4090"] < 16 < needs["H100 80GB HBM3"]
    # What NVIDIA's CUB keeps in flight there.
    assert needs["H100 80GB HBM3"] == pytest.approx(32, rel=0.1)
    assert needs["H200"] == pytest.approx(48, rel=0.1)


def test_what_is_too_little_in_flight() -> None:
    def found(least: int, most: int, ratio: float = 5.0) -> str:
        bounds = [Bound(gpu.name, 0.5, ratio) for gpu in ADA]
        flight = sass_memory.Flight(least * 1024, most * 1024)
        return " ".join(sass_memory.flight_problems(STREAMED, flight, bounds, [*ADA, *HOPPER]))

    assert found(9, 48) == ""
    assert "RTX 4090: 8.0 KiB" in found(8, 48)
    assert "L4" not in found(8, 48)
    assert found(8, 48, ratio=0.9) == ""  # not DRAM's fault there
    assert "H200: 40.0 KiB" in found(9, 40)
    assert "H100" not in found(9, 40)
    assert found(0, 0).count("KiB of weights in flight") == 5


def test_a_stream_of_one_step_is_noticed() -> None:
    """Every tile's registers asked for again only after its use: the compiler unpacks a whole step
    before the barrier, and asks after it."""
    machine = compiled(STREAMED, ("kDepth == 1 ? 3 : 2;", "1;"))
    cost = sass.main_loop_cost(STREAMED, machine)
    bounds = [sass.bound(STREAMED, cost, gpu) for gpu in ADA]
    assert sass.problems(STREAMED, machine, cost, bounds) == []
    flight = sass_memory.flight(STREAMED, machine, machine.loops[-1])
    missed = sass_memory.flight_problems(STREAMED, flight, bounds, [*ADA, *HOPPER])
    assert "at its emptiest" in " ".join(missed)
    assert "H200" in missed[-1]


@pytest.mark.parametrize(
    ("text", "replacement", "message"),
    [
        ("constexpr int kLoads = 16;", "constexpr int kLoads = 1;", "8 rounds of loads"),
        ("ptx::st_relaxed_gpu(semaphore, 0)", "ptx::st_release_gpu(semaphore, 0)", "2 fences"),
    ],
)
def test_a_serial_tail_is_noticed(text: str, replacement: str, message: str) -> None:
    machine = compiled(STREAMED, (text, replacement))
    found = sass_memory.tail(machine, sass_memory.tokens_of_thread(STREAMED))
    assert message in " ".join(sass_memory.tail_problems(STREAMED, found))


def test_copies_in_flight_are_stages() -> None:
    """All but the stage that is waited for and the one to be filled."""
    config = next(c for c in GEMM_CONFIGS if (c.block_m, c.stages) == (32, 4))
    machine = compiled(config)
    stage = config.stage_bytes - config.block_m * (config.block_k * 2 + 32)
    found = sass_memory.flight(config, machine, machine.loops[-1])
    assert found == sass_memory.Flight(2 * stage, 3 * stage)
    assert sass_memory.tokens_of_thread(config) == 4
    assert sass_memory.tail(machine, tokens=4) == sass_memory.Tail(1, 1, 2)
    no_waits = tuple(i for i in machine.instructions if not i.opcode.startswith("DEPBAR"))
    with pytest.raises(RuntimeError, match="groups of copies"):
        sass_memory.flight(config, replace(machine, instructions=no_waits), machine.loops[-1])


def test_the_loops_of_experts_keep_as_much_in_flight() -> None:
    config = next(c for c in MOE_CONFIGS if c.family == "decode")
    machine = sass.read_machine_code(compile_cubin(config, 89))
    for tile, loop in zip(config.tiles, sass.moe_main_loops(config, machine), strict=True):
        found = sass_memory.flight(tile, machine, loop)
        step = tile.block_n * tile.block_k * tile.fmt.bits_per_weight / 8
        assert found.least >= step * config.blocks_per_sm
