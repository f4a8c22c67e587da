# SPDX-License-Identifier: Apache-2.0
"""Read the machine code of a compiled GEMM kernel: resources, main loop, issue slots, bounds.

Triton's wheel carries cuobjdump and nvdisasm, so that neither a GPU nor a CUDA toolkit is needed.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import tempfile
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from pathlib import Path

from vllm_nvfp4.gpus import Gpu, find_gpu
from vllm_nvfp4.kernels.cuda.configs import MAX_SMEM_BYTES, GemmConfig
from vllm_nvfp4.kernels.cuda.moe_configs import MoeConfig
from vllm_nvfp4.kernels.cuda.nvrtc import KernelSource, compile_cubin

# What kernels that do without FP8 run on besides sm_89; held to the registers alone.
OLDER_ARCHS = (80, 86)
# An SM has four schedulers, each of which issues one warp instruction per clock.
_SCHEDULERS = 4
_REGISTERS_PER_SM = 65536
# Shared memory of an sm_89 SM, and what the driver keeps of it for each block.
_SMEM_PER_SM = 100 * 1024
_SMEM_PER_BLOCK_RESERVED = 1024

# What the kernels have to reach on paper.
MIN_DECODE_DRAM_RATIO = 2.5
MAX_W4A8_ISSUE_LOAD = 0.5
# Of INT8 activations, for many tokens: times the bound of FP8 with f32 accumulators on an RTX 4090,
# and of BF16 on an RTX 3090.
MIN_INT8_OVER_FP8 = 1.25
MIN_INT8_OVER_BF16 = 2.3
MANY_TOKENS = 128
DECODE_BLOCK_M = 16

_LINE = re.compile(
    r"^\s*/\*([0-9a-f]{4,})\*/\s+(?:(@!?U?P\d+|@!?U?PT)\s+)?([A-Z][\w.]*)\s*(.*?)\s*;"
)
_RESOURCES = re.compile(r"Function (\S+?):\s*REG:(\d+) STACK:(\d+) SHARED:(\d+) LOCAL:(\d+)")
# A loop that streams weights works on several K steps (csrc/weight_stream.cuh).
_MOST_STEPS = 4
_MMA_OPCODES = ("HMMA", "QMMA", "IMMA")


@dataclass(frozen=True)
class Instruction:
    """One line of SASS: its address in bytes, the opcode with its modifiers, the operands."""

    address: int
    opcode: str
    operands: str

    @property
    def is_mma(self) -> bool:
        return self.opcode.startswith(_MMA_OPCODES)


@dataclass(frozen=True)
class Machine:
    """A kernel's machine code.

    registers: per thread
    stack, local: bytes of local memory per thread; anything but 0 is a spill or an indexed array
    """

    symbol: str
    registers: int
    stack: int
    local: int
    instructions: tuple[Instruction, ...]

    @cached_property
    def backward_branches(self) -> list[tuple[int, int]]:
        """(target, branch): the addresses between which code is repeated."""
        found = set()
        for i in self.instructions:
            if not i.opcode.startswith("BRA"):
                continue
            target = re.search(r"0x([0-9a-f]+)", i.operands)
            if target and int(target[1], 16) < i.address:
                found.add((int(target[1], 16), i.address))
        return sorted(found)

    @cached_property
    def loops(self) -> list[tuple[int, int]]:
        """(first, last) address of every loop that holds an MMA, the innermost first."""
        branches = self.backward_branches
        with_mma = [loop for loop in branches if any(i.is_mma for i in self.inside(loop))]
        return sorted(with_mma, key=lambda loop: loop[1] - loop[0])

    def inside(self, loop: tuple[int, int]) -> list[Instruction]:
        return [i for i in self.instructions if loop[0] <= i.address <= loop[1]]

    def count(self, prefix: str) -> int:
        """Instructions whose opcode starts with ``prefix``."""
        return sum(i.opcode.startswith(prefix) for i in self.instructions)


def read_machine_code(cubin: bytes) -> Machine:
    """Disassemble a cubin that holds one kernel.

    Raises RuntimeError where cuobjdump is missing, fails or finds no kernel.
    """
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.cubin"
        path.write_bytes(cubin)
        usage = _cuobjdump("-res-usage", path)
        text = _cuobjdump("-sass", path)
    found = _RESOURCES.search(usage)
    code = read_listing(text)
    if not found or not code:
        raise RuntimeError(f"cuobjdump found no kernel in a cubin of {len(cubin)} bytes")
    return Machine(found[1], int(found[2]), int(found[3]), int(found[5]), code)


def read_listing(text: str) -> tuple[Instruction, ...]:
    """The instructions of a disassembly, in their order."""
    lines = (_LINE.match(line) for line in text.splitlines())
    return tuple(Instruction(int(m[1], 16), m[3], m[4]) for m in lines if m)


def _cuobjdump(option: str, path: Path) -> str:
    run = subprocess.run(
        [_find_cuobjdump(), option, str(path)], capture_output=True, text=True, check=False
    )
    if run.returncode:
        raise RuntimeError(f"cuobjdump {option} failed: {run.stderr.strip()}")
    return run.stdout


@lru_cache(maxsize=1)
def _find_cuobjdump() -> str:
    try:
        import triton

        bundled = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
        if os.access(bundled, os.X_OK):
            return str(bundled)
    except ImportError:
        pass
    found = shutil.which("cuobjdump")
    if found is None:
        raise RuntimeError("cuobjdump not found: pip install triton, or put a CUDA toolkit on PATH")
    return found


@dataclass(frozen=True)
class LoopCost:
    """What one warp issues in one K step of the main loop.

    slots: instructions, the MMAs among them, inner loops unrolled; of a loop of several steps the
           mean
    mmas:  MMAs
    mma_k: their K
    """

    slots: float
    mmas: int
    mma_k: int


def mma_k_of(config: GemmConfig) -> int:
    """The K of one MMA: 32 of FP8 where the blocks are, or where none is scaled by itself."""
    is_wide = config.fmt_name == "mxfp4" or config.variant == "folded"
    return 32 if config.stem != "gemm_w4a16" and is_wide else 16


def mmas_of_step(config: GemmConfig) -> int:
    """MMAs of one warp in one K step of a tile."""
    warp_m, warp_n = config.block_m // config.warps_m, config.block_n // config.warps_n
    return (warp_m // 8) * (warp_n // 16) * (config.block_k // config.warps_k // mma_k_of(config))


def moe_main_loops(config: MoeConfig, machine: Machine) -> list[tuple[int, int]]:
    """The main loop of each tile of a grouped kernel, in the order of its tiles.

    A tile's loop is known by its MMAs and its loads of weights from global memory. Raises
    RuntimeError where the loops are not those that the tiles need.
    """
    *steps, _ = machine.loops  # the last one holds all: it walks the schedule
    found = {}
    for loop in steps:
        inside = machine.inside(loop)
        num_loads = sum(i.opcode.startswith("LDG.") for i in inside)
        found[sum(i.is_mma for i in inside), num_loads] = loop
    loops = []
    for tile in config.tiles:
        tiles_of_warp = tile.block_k // 64 // tile.warps_k * (tile.block_n // tile.warps_n // 16)
        mmas, loads = mmas_of_step(tile), 2 * tiles_of_warp if tile.streams_weights else 0
        most = _MOST_STEPS if tile.streams_weights else 1
        fitting = [
            found[key] for n in range(1, most + 1) if (key := (n * mmas, n * loads)) in found
        ]
        if len(fitting) != 1:
            raise RuntimeError(
                f"{config.symbol}: {len(fitting)} loops whose steps have {mmas} MMAs and {loads} "
                f"loads, as the tile of {tile.block_m} needs; found {sorted(found)}"
            )
        loops += fitting
    return loops


def moe_loop_costs(config: MoeConfig, machine: Machine) -> list[LoopCost]:
    """One K step of each tile of a grouped kernel, in the order of its tiles."""
    loops = moe_main_loops(config, machine)
    return [
        _mean_step(tile, machine.inside(loop))
        for tile, loop in zip(config.tiles, loops, strict=True)
    ]


def _mean_step(config: GemmConfig, loop: Sequence[Instruction]) -> LoopCost:
    """One K step of a loop that holds a whole number of them."""
    needed = mmas_of_step(config)
    steps = sum(i.is_mma for i in loop) // needed
    return LoopCost(len(loop) / steps, needed, mma_k_of(config))


def moe_problems(
    config: MoeConfig, machine: Machine, costs: Sequence[LoopCost], gpus: Sequence[Gpu]
) -> list[str]:
    """What a grouped kernel compiled for sm_89 misses: every tile is held to what it would be held
    to as a kernel of its own."""
    found = []
    for tile, cost in zip(config.tiles, costs, strict=True):
        bounds = [bound(tile, cost, gpu) for gpu in gpus]
        missed = problems(tile, machine, cost, bounds)
        found += [f"tile of {tile.block_m}: {problem}" for problem in missed]
    smem = (config.smem_bytes + _SMEM_PER_BLOCK_RESERVED) * config.blocks_per_sm
    if smem > _SMEM_PER_SM:
        found.append(f"{config.blocks_per_sm} blocks need {smem} bytes of shared memory")
    return found


def main_loop_cost(config: GemmConfig, machine: Machine) -> LoopCost:
    """Count the instructions of one K step: the loop with the barrier, inner loops as often as
    they run. Conditional code in it counts in full.

    Raises RuntimeError where the code does not hold the number of MMAs that the tile needs.
    """
    needed = mmas_of_step(config)
    if not machine.loops:
        raise RuntimeError(f"{config.symbol}: no loop holds an MMA")
    outer = machine.inside(machine.loops[-1])
    inner = machine.inside(machine.loops[0])
    mmas = sum(i.is_mma for i in inner)
    if len(machine.loops) == 1:
        most = _MOST_STEPS if config.streams_weights else 1
        is_right = mmas % needed == 0 and mmas // needed <= most
    else:
        is_right = len(machine.loops) == 2 and needed % mmas == 0
    if not is_right:
        raise RuntimeError(
            f"{config.symbol}: {len(machine.loops)} loops with MMAs, {mmas} in the innermost; a K "
            f"step needs {needed}"
        )
    if len(machine.loops) == 1:
        return _mean_step(config, outer)
    return LoopCost(len(outer) + (needed // mmas - 1) * len(inner), needed, mma_k_of(config))


@dataclass(frozen=True)
class Bound:
    """What a kernel can reach on a GPU if nothing but issue slots and tensor cores limit it.

    issue_load: issue slots per MMA / clocks per MMA of one scheduler; above 1 it is issue-bound
    dram_ratio: packed weights per second / the DRAM's rate of delivering them
    """

    gpu: str
    issue_load: float
    dram_ratio: float


def bound(config: GemmConfig, cost: LoopCost, gpu: Gpu) -> Bound:
    """From instructions to rates. One MMA is 16 rows x 8 tokens x mma_k columns."""
    if config.stem == "gemm_w4a16":
        tflops = gpu.bf16_tflops
    elif config.stem == "gemm_w4i8":
        tflops = gpu.int8_tops
    else:
        tflops = gpu.fp8_f16_tflops if config.variant == "f16_partials" else gpu.fp8_f32_tflops
    clocks = gpu.num_sms * gpu.boost_ghz * 1e9
    flops_per_clock = tflops * 1e12 / clocks / _SCHEDULERS
    mma_clocks = 2 * 16 * 8 * cost.mma_k / flops_per_clock
    load = cost.slots / cost.mmas / mma_clocks
    # The weights of a step are unpacked by each of the warps along the tokens.
    step_weights = config.block_n * config.block_k / config.num_warps
    step_clocks = cost.mmas * max(mma_clocks, cost.slots / cost.mmas)
    weights_per_second = step_weights / step_clocks * _SCHEDULERS * clocks
    dram_weights = gpu.dram_gbps * 1e9 / (config.fmt.bits_per_weight / 8)
    return Bound(gpu.name, load, weights_per_second / dram_weights)


def problems(
    config: GemmConfig, machine: Machine, cost: LoopCost, bounds: Sequence[Bound]
) -> list[str]:
    """What a kernel compiled for sm_89 misses; empty where all is well."""
    found = []
    if machine.stack or machine.local:
        found.append(f"local memory: {machine.stack} bytes of stack, {machine.local} of spills")
    if config.smem_bytes > MAX_SMEM_BYTES:
        found.append(f"{config.smem_bytes} bytes of shared memory, at most {MAX_SMEM_BYTES}")
    warps = config.num_warps * config.blocks_per_sm
    registers = -(-machine.registers // 8) * 8 * 32 * warps
    smem = (config.smem_bytes + _SMEM_PER_BLOCK_RESERVED) * config.blocks_per_sm
    if registers > _REGISTERS_PER_SM or smem > _SMEM_PER_SM:
        found.append(
            f"{config.blocks_per_sm} blocks do not fit an SM: {registers} registers, {smem} bytes "
            f"of shared memory"
        )
    opcode = "HMMA.16816.F32"
    if config.stem == "gemm_w4a8":
        kind = "F16" if config.variant == "f16_partials" else "F32"
        opcode = f"QMMA.168{cost.mma_k}.{kind}.E4M3"
    if config.stem == "gemm_w4i8":
        opcode = f"IMMA.168{cost.mma_k}.S8.S8"
    strangers = Counter(i.opcode for i in machine.instructions if i.is_mma)
    if any(not name.startswith(opcode) for name in strangers):
        found.append(f"MMAs other than {opcode}: {dict(strangers)}")
    copies = Counter(i.opcode for i in machine.instructions if i.opcode.startswith("LDGSTS"))
    if config.streams_weights and not machine.count("LDG.E.128"):
        found.append("no 16-byte loads of weights")
    if config.stem == "gemm_w4i8":
        copies.pop("LDGSTS.E", None)  # the tokens' scales, four bytes each
    if not copies or any(not name.endswith(".128") for name in copies):
        found.append(f"copies to shared memory other than 16 bytes: {dict(copies)}")
    if config.stem == "gemm_w4i8":
        found += int8_problems(config, cost)
    if config.stem == "gemm_w4a8" and config.variant == "exact" and config.block_m >= 64:
        found += [
            f"{b.gpu}: {b.issue_load:.0%} of the issue slots, at most {MAX_W4A8_ISSUE_LOAD:.0%}"
            for b in bounds
            if "4090" in b.gpu and b.issue_load > MAX_W4A8_ISSUE_LOAD
        ]
    elif config.block_m <= DECODE_BLOCK_M:
        found += [
            f"{b.gpu}: {b.dram_ratio:.2f} x DRAM's rate of weights, at least "
            f"{MIN_DECODE_DRAM_RATIO}"
            for b in bounds
            if b.dram_ratio < MIN_DECODE_DRAM_RATIO
        ]
    return found


def older_problems(config: KernelSource) -> list[str]:
    """What a kernel that has GPUs before sm_89 to run on misses there: registers."""
    found = []
    for arch in OLDER_ARCHS:
        if arch < config.min_arch:
            continue
        machine = read_machine_code(compile_cubin(config, arch))
        if machine.stack or machine.local:
            found.append(f"sm_{arch}: {machine.stack + machine.local} bytes of local memory")
    return found


def tops(config: GemmConfig, cost: LoopCost, gpu: Gpu) -> float:
    """What the main loop reaches if nothing but issue slots and tensor cores limit it, 10^12/s."""
    load = bound(config, cost, gpu).issue_load
    return gpu.int8_tops / max(load, 1.0)


def int8_problems(config: GemmConfig, cost: LoopCost) -> list[str]:
    """Where a kernel of INT8 activations for many tokens is not worth its place on paper."""
    if config.block_m < MANY_TOKENS:
        return []
    ada, ampere = find_gpu("RTX 4090"), find_gpu("RTX 3090")
    if ada is None or ampere is None:
        raise RuntimeError("gpus.py has lost the cards that bound the INT8 kernels")
    ratios = (
        (ada, tops(config, cost, ada) / ada.fp8_f32_tflops, "FP8", MIN_INT8_OVER_FP8),
        (ampere, tops(config, cost, ampere) / ampere.bf16_tflops, "BF16", MIN_INT8_OVER_BF16),
    )
    return [
        f"{gpu.name}: {ratio:.2f} x {other}'s bound, at least {least}"
        for gpu, ratio, other, least in ratios
        if ratio < least
    ]
