# SPDX-License-Identifier: Apache-2.0
"""What the compiled kernels cost on paper: registers, issue slots, and the bound on each Ada card.

    python benchmarks/sass_report.py            the table
    python benchmarks/sass_report.py --check    exit status 1 where a kernel misses a bound

Compiles every shipped GEMM kernel, dense and grouped, for sm_89 with the compiler that also makes
the wheel's cubins (NVRTC), and disassembles it. Every kernel that runs before sm_89 too is compiled
for sm_80 and sm_86 as well, and may spill nothing there. Needs no GPU and no CUDA toolkit.

Columns: slots, /mma and /w are instructions issued in the main loop, per MMA and (times 32
lanes) per weight of the tile; then, for each GPU, the share of issue slots that a loop bound by its
MMAs takes, and how many times faster than DRAM delivers them packed weights are processed.

"in flight" are KiB of weights on their way to an SM at the main loop's emptiest instruction and at
its fullest; the line below the head says what DRAM needs for its full rate. "tail" is how often
the thread block that adds 8 splits waits for memory, one time after another: fences, atomic
operations, rounds of loads.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Sequence

from vllm_nvfp4.gpus import Gpu, find_gpu
from vllm_nvfp4.kernels.cuda.configs import GEMM_CONFIGS, QUANTIZE_CONFIGS, GemmConfig
from vllm_nvfp4.kernels.cuda.moe_configs import (
    COMBINE_CONFIGS,
    MOE_CONFIGS,
    ROUTE_CONFIG,
    MoeConfig,
)
from vllm_nvfp4.kernels.cuda.nvrtc import compile_cubin
from vllm_nvfp4.testing import sass, sass_memory

ARCH = 89
_PREFIX, _NAME = f"sm{ARCH}_", 55
GPU_NAMES = ("RTX 4090", "L40S", "L4")
# Where W4A16 may run too: only what memory asks of it is read from this code.
OTHER_GPU_NAMES = ("H100 80GB HBM3", "H200")


def gpus(names: Sequence[str] = GPU_NAMES) -> list[Gpu]:
    found = [find_gpu(name) for name in names]
    return [gpu for gpu in found if gpu is not None]


def report(config: GemmConfig, cards: Sequence[Gpu]) -> tuple[str, list[str]]:
    """One row of the table, and what the kernel misses."""
    machine = sass.read_machine_code(compile_cubin(config, ARCH))
    cost = sass.main_loop_cost(config, machine)
    bounds = [sass.bound(config, cost, gpu) for gpu in cards]
    flight = sass_memory.flight(config, machine, machine.loops[-1])
    tail = sass_memory.tail(machine, sass_memory.tokens_of_thread(config))
    row = format_row(config.symbol, config, machine, cost, bounds, flight)
    row += f"{tail.fences:>4}+{tail.atomics}+{tail.rounds}"
    found = sass.problems(config, machine, cost, bounds) + sass.older_problems(config)
    found += sass_memory.flight_problems(config, flight, bounds, [*cards, *gpus(OTHER_GPU_NAMES)])
    return row, found + sass_memory.tail_problems(config, tail)


def format_row(
    name: str,
    config: GemmConfig,
    machine: sass.Machine,
    cost: sass.LoopCost,
    bounds: Sequence[sass.Bound],
    flight: sass_memory.Flight,
) -> str:
    weights = config.block_n * config.block_k / config.num_warps / 32
    row = f"{name.removeprefix(_PREFIX):<{_NAME}}{machine.registers:>5}{config.smem_bytes:>7}"
    row += f"{machine.stack + machine.local:>6}{cost.slots:>6.0f}{cost.slots / cost.mmas:>7.2f}"
    row += f"{cost.slots / weights:>6.2f}"
    row += "".join(f"{b.issue_load:>6.0%}{b.dram_ratio:>5.1f}x" for b in bounds)
    return row + f"{flight.least / 1024:>6.1f}{flight.most / 1024:>6.1f}"


def report_moe(config: MoeConfig, cards: Sequence[Gpu]) -> tuple[list[str], list[str]]:
    """A row for each tile of a grouped kernel, and what the kernel misses."""
    machine = sass.read_machine_code(compile_cubin(config, ARCH))
    costs = sass.moe_loop_costs(config, machine)
    loops = sass.moe_main_loops(config, machine)
    # What serves prompts is held to what Ada needs.
    others = gpus(OTHER_GPU_NAMES) if config.family == "decode" else []
    rows: list[str] = []
    found = sass.moe_problems(config, machine, costs, cards) + sass.older_problems(config)
    for tile, cost, loop in zip(config.tiles, costs, loops, strict=True):
        bounds = [sass.bound(tile, cost, gpu) for gpu in cards]
        flight = sass_memory.flight(tile, machine, loop)
        name = f"{config.symbol} m{tile.block_m}"
        rows.append(format_row(name, tile, machine, cost, bounds, flight))
        missed = sass_memory.flight_problems(tile, flight, bounds, [*cards, *others])
        found += [f"tile of {tile.block_m}: {problem}" for problem in missed]
    return rows, found


def needs(cards: Sequence[Gpu]) -> str:
    """What DRAM asks of the kernels, and where that is from."""
    each = (f"{gpu.name} {sass_memory.needed_in_flight(gpu) / 1024:.1f}" for gpu in cards)
    latencies = sorted({(gpu.arch, sass_memory.LATENCY[gpu.arch]) for gpu in cards})
    return (
        f"needed in flight, KiB: {', '.join(each)} (bandwidth * latency / SMs; latency assumed: "
        + ", ".join(f"{seconds * 1e6:.2f} us on sm_{arch}" for arch, seconds in latencies)
        + ")"
    )


def say_missed(problems: list[str]) -> int:
    """Print what a kernel misses; returns how much that is."""
    for problem in problems:
        print(f"    MISSED {problem}", flush=True)
    return len(problems)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="exit 1 where a bound is missed")
    parser.add_argument("--kernels", default="", help="regular expression on the symbols")
    options = parser.parse_args()
    cards = gpus()
    header = f"{f'kernel ({_PREFIX}...)':<{_NAME}}{'regs':>5}{'smem':>7}{'spill':>6}{'slots':>6}"
    header += f"{'/mma':>7}{'/w':>6}" + "".join(
        f"{gpu.name[-4:].lstrip():>6}{'DRAM':>6}" for gpu in cards
    )
    print(header + f"{'in flight':>12}{'tail':>8}")
    print(needs([*cards, *gpus(OTHER_GPU_NAMES)]))
    missed = 0
    for config in (*GEMM_CONFIGS, *MOE_CONFIGS):
        if not re.search(options.kernels, config.symbol):
            continue
        if isinstance(config, MoeConfig):
            rows, found = report_moe(config, cards)
        else:
            row, found = report(config, cards)
            rows = [row]
        print("\n".join(rows), flush=True)
        missed += say_missed(found)
    for small in (*QUANTIZE_CONFIGS, ROUTE_CONFIG, *COMBINE_CONFIGS):
        if re.search(options.kernels, small.symbol):
            found = sass.older_problems(small)
            print(f"{small.symbol}: {'spills' if found else 'no spills'} before sm_89")
            missed += say_missed(found)
    print(f"{missed} bounds missed" if missed else "all bounds met")
    return 1 if missed and options.check else 0


if __name__ == "__main__":
    sys.exit(main())
