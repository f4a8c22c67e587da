# SPDX-License-Identifier: Apache-2.0
"""The FP8 CPU kernels: plain [N, K] e4m3 bytes, lane = column, a horizontal sum at a row's end."""

from __future__ import annotations

import struct
from dataclasses import dataclass

from vllm_nvfp4.kernels.cpu.emit import (
    BF16_PAIRS,
    E4M3_CORRECTION,
    F32,
    OUT_BYTES,
    GroupKernel,
    decode_e4m3,
    to_out,
)
from vllm_nvfp4.kernels.cpu.jit import Cpu
from vllm_nvfp4.kernels.cpu.layout import ROWS
from vllm_nvfp4.kernels.cpu.llvm_ir import IrWriter, Value

BYTES = "<64 x i8>"
STEP = 64  # columns of one round: a cache line of weights
PANEL_PADDING = 64  # bytes


@dataclass(frozen=True)
class Fp8Spec:
    """One compiled kernel.

    kind:     "fused": decode, multiply and forget; "panel": decode sixteen rows once for many
              tokens (needs bf16_dot); "dequantize": only decode
    tokens:   rows of ``a`` that go through the weight together; a call needs at least so many
    out:      "bf16", "f16" or "f32": the type of y and of the bias
    bf16_dot: a is bf16 and the products are the BF16 dot instruction's; else a is f32
    """

    kind: str
    tokens: int
    out: str
    bf16_dot: bool

    @property
    def name(self) -> str:
        kind = "bf16" if self.bf16_dot else "f32"
        return f"fp8_{self.kind}_{kind}_m{self.tokens}_{self.out}"


def _bf16_bits_of_e4m3() -> list[int]:
    """The bf16 pattern of each non-negative e4m3 code; exact, and NaN for 0x7f."""
    values = [
        mantissa * 2.0**-9 if exponent == 0 else (8 + mantissa) * 2.0 ** (exponent - 10)
        for exponent in range(16)
        for mantissa in range(8)
    ]
    return [struct.unpack("<I", struct.pack("<f", v))[0] >> 16 for v in values[:127]] + [0x7FC0]


def _decode_bf16(ir: IrWriter, raw: Value) -> list[Value]:
    """64 e4m3 bytes as two vectors of 32 bf16, in order.

    A byte's low seven bits look up either half of the bf16 in a table of 128; the halves are
    interleaved within each 128-bit lane, for which the bytes first change places by eights.
    """
    eights = [
        lane for q in range(4) for half in (8 * q, 32 + 8 * q) for lane in range(half, half + 8)
    ]
    raw = raw.shuffle(raw, eights)
    bits = _bf16_bits_of_e4m3()

    def lookup(table: list[int]) -> Value:
        halves = [ir.const(BYTES, table[:64]), ir.const(BYTES, table[64:])]
        return ir.call(BYTES, "llvm.x86.avx512.vpermi2var.qi.512", halves[0], raw, halves[1])

    low = lookup([b & 0xFF for b in bits])
    high = lookup([b >> 8 for b in bits]) | (raw & 0x80)
    parts = []
    for offset in (0, 8):
        lanes = [x for q in range(4) for j in range(8) for x in (16 * q + offset + j,) * 2]
        lanes = [x + 64 * (i % 2) for i, x in enumerate(lanes)]
        parts.append(low.shuffle(high, lanes).bitcast(BF16_PAIRS))
    return parts


def _decode_f32(ir: IrWriter, raw: Value) -> list[Value]:
    """64 e4m3 bytes as four vectors of 16 f32, short of ``E4M3_CORRECTION``."""
    return [decode_e4m3(raw.shuffle(raw, range(i, i + 16))) for i in range(0, STEP, 16)]


def panel_bytes(num_cols: int) -> int:
    """Scratch for each thread of a "panel" kernel."""
    return ROWS * (-(-num_cols // STEP) * STEP * 2 + PANEL_PADDING)


class _Fp8Kernel(GroupKernel):
    """total[m, n] = sum_k a[m, k] * e4m3(w[n, k]), rows_at_once rows by ``tokens`` tokens."""

    def __init__(self, spec: Fp8Spec, cpu: Cpu) -> None:
        correction = 1.0 if spec.bf16_dot else E4M3_CORRECTION
        super().__init__(spec.name, spec.tokens, spec.out, correction)
        self.spec = spec
        # A panel in the cache is shared by four rows at a time. From memory one row at a time is
        # read: the hardware prefetches a single stream twice as fast as several short ones.
        self.rows_at_once = 4 if spec.kind == "panel" else 1
        self.a_bytes = 2 if spec.bf16_dot else 4
        self.lanes = 32 if spec.bf16_dot else 16
        # Sums that do not wait for each other.
        self.chains = STEP // self.lanes if spec.kind == "fused" and cpu.has_avx512 else 1
        self.a_type = "<32 x i16>" if spec.bf16_dot else F32

    def decode(self, raw: Value) -> list[Value]:
        return _decode_bf16(self.ir, raw) if self.spec.bf16_dot else _decode_f32(self.ir, raw)

    def row_at(self, row: Value) -> Value:
        """Where a row of weights begins; rows past N are the last one over, and dropped later."""
        last = self.arg["num_rows"] - 1
        return self.arg["codes"].at(
            self.ir.call("i64", "llvm.umin.i64", row, last) * self.arg["num_cols"]
        )

    def mask(self, column: Value, lanes: int, offset: int = 0) -> Value:
        """Lanes whose column, ``column + offset + lane``, is below K."""
        left = (self.arg["num_cols"] - column).convert("trunc", "i32").splat(lanes)
        numbers = self.ir.const(f"<{lanes} x i32>", range(offset, offset + lanes))
        return numbers.compare("icmp slt", left)

    def load_weights(self, row: Value, column: Value, is_tail: bool) -> list[Value]:
        at = row.at(column)
        if is_tail:
            return self.decode(self.ir.masked_load(at, BYTES, self.mask(column, STEP)))
        return self.decode(at.load(BYTES))

    def load_tokens(self, token: Value, column: Value, is_tail: bool) -> list[Value]:
        parts = []
        for offset in range(0, STEP, self.lanes):
            at = token.at((column + offset) * self.a_bytes)
            if is_tail:
                mask = self.mask(column, self.lanes, offset)
                parts.append(self.ir.masked_load(at, self.a_type, mask, align=self.a_bytes))
            else:
                parts.append(at.load(self.a_type, align=self.a_bytes))
        return [p.bitcast(BF16_PAIRS) for p in parts] if self.spec.bf16_dot else parts

    def rows_of(self, group: Value, first: Value) -> list[Value]:
        """Where the weights of ``rows_at_once`` rows from ``first`` of the group on begin."""
        return [self.row_at(group * ROWS + (first + i)) for i in range(self.rows_at_once)]

    def dot_tile(self, group: Value, token: Value) -> list[Value]:
        tokens = self.token_rows(token)
        ir, zero = self.ir, self.ir.const(F32, 0.0)
        steps = ir.const("i64", ROWS // self.rows_at_once)
        with ir.loop(ir.const("i64", 0), steps, [zero] * self.tokens) as step:
            first = step.index * self.rows_at_once
            sums = list(step.carried)
            for m, row_sums in enumerate(self._dot_rows(self.rows_of(group, first), tokens)):
                for i, row_sum in enumerate(row_sums):
                    sums[m] = ir.set_lane(sums[m], first + i, row_sum)
            step.next = sums
        return step.carried

    def _dot_rows(self, rows: list[Value], tokens: list[Value]) -> list[list[Value]]:
        """[m][row] scalars."""
        ir = self.ir
        steps = self.arg["num_cols"] // STEP
        zeros = [ir.const(F32, 0.0)] * (len(rows) * len(tokens) * self.chains)
        with ir.loop(ir.const("i64", 0), steps, zeros) as step:
            step.next = self._step(rows, tokens, step.index * STEP, step.carried)
        # The columns that do not fill a step; none of them if K is a multiple of it.
        totals = self._step(rows, tokens, steps * STEP, step.carried, is_tail=True)
        pairs = len(rows) * len(tokens)
        while len(totals) > pairs:  # the chains, halved until one is left
            half = len(totals) // 2
            totals = [x + y for x, y in zip(totals[:half], totals[half:], strict=True)]
        lanes = [ir.sum_lanes(total) for total in totals]
        return [lanes[m * len(rows) : (m + 1) * len(rows)] for m in range(len(tokens))]

    def _step(
        self,
        rows: list[Value],
        tokens: list[Value],
        column: Value,
        totals: list[Value],
        is_tail: bool = False,
    ) -> list[Value]:
        weights = [self.load_weights(row, column, is_tail) for row in rows]
        for part in range(STEP // self.lanes):
            values = [self.load_tokens(token, column, is_tail)[part] for token in tokens]
            pairs = [(value, weight[part]) for value in values for weight in weights]
            first = part % self.chains * len(pairs)
            chain = totals[first : first + len(pairs)]
            chain = [self._multiply_add(*p, t) for p, t in zip(pairs, chain, strict=True)]
            totals = [*totals[:first], *chain, *totals[first + len(pairs) :]]
        return totals

    def _multiply_add(self, value: Value, weight: Value, total: Value) -> Value:
        if not self.spec.bf16_dot:
            return self.ir.fma(value, weight, total)
        return self.ir.call(F32, "llvm.x86.avx512bf16.dpbf16ps.512", total, weight, value)


class _PanelKernel(_Fp8Kernel):
    """The same totals for many tokens, from sixteen rows decoded once.

    The panel, [16, K rounded up to STEP] bf16, lies in this thread's part of ``scratch``; a line of
    padding keeps its rows out of each other's cache sets.
    """

    def begin_group(self, group: Value) -> None:
        ir, k = self.ir, self.arg["num_cols"]
        self.panel_row = (k + (STEP - 1)) // STEP * (STEP * 2) + PANEL_PADDING
        self.panel = self.arg["scratch"].at(self.thread * self.panel_row * ROWS)
        zero = ir.const("i64", 0)
        with ir.loop(zero, ir.const("i64", ROWS)) as row:
            source = self.row_at(group * ROWS + row.index)
            target = self.panel.at(row.index * self.panel_row)
            with ir.loop(zero, k // STEP) as step:
                self._store(target, step.index * STEP, source, is_tail=False)
            whole = k // STEP * STEP
            with ir.loop(zero, ir.call("i64", "llvm.umin.i64", k - whole, ir.const("i64", 1))):
                self._store(target, whole, source, is_tail=True)

    def _store(self, target: Value, column: Value, source: Value, is_tail: bool) -> None:
        parts = super().load_weights(source, column, is_tail)
        for i, part in enumerate(parts):
            self.ir.store(part, target.at((column + i * self.lanes) * 2))

    def rows_of(self, group: Value, first: Value) -> list[Value]:
        return [self.panel.at(self.panel_row * (first + i)) for i in range(self.rows_at_once)]

    def load_weights(self, row: Value, column: Value, is_tail: bool) -> list[Value]:
        if not is_tail:
            at = row.at(column * 2)
            return [at.at(i * 64).load(BF16_PAIRS, align=2) for i in range(2)]
        # The panel has a last, partly filled step only where K needs one.
        parts = [self.mask(column, self.lanes, i * self.lanes) for i in range(2)]
        at = row.at(column * 2)
        loads = [
            self.ir.masked_load(at.at(i * 64), "<32 x i16>", mask) for i, mask in enumerate(parts)
        ]
        return [x.bitcast(BF16_PAIRS) for x in loads]


class _DequantizeKernel(_Fp8Kernel):
    """y[n, k] = e4m3(w[n, k]), for a library's matrix product."""

    def write(self) -> str:
        ir, k, out = self.ir, self.arg["num_cols"], self.spec.out
        zero, steps = ir.const("i64", 0), self.arg["num_cols"] // 16
        with self.groups() as group, ir.loop(zero, ir.const("i64", ROWS)) as lane:
            row = ir.call(
                "i64", "llvm.umin.i64", group.index * ROWS + lane.index, self.arg["num_rows"] - 1
            )
            source = self.arg["codes"].at(row * k)
            target = self.arg["y"].at(row * k * OUT_BYTES[out])
            with ir.loop(zero, steps) as step:
                value = decode_e4m3(source.at(step.index * 16).load("<16 x i8>"))
                value = to_out(ir, value * self.correction, out)
                ir.store(value, target.at(step.index * (16 * OUT_BYTES[out])))
            column = steps * 16
            mask = self.mask(column, 16)
            value = decode_e4m3(ir.masked_load(source.at(column), "<16 x i8>", mask))
            value = to_out(ir, value * self.correction, out)
            ir.masked_store(value, target.at(column * OUT_BYTES[out]), mask)
        return ir.text()


_KERNELS = {"fused": _Fp8Kernel, "panel": _PanelKernel, "dequantize": _DequantizeKernel}


def write_fp8(spec: Fp8Spec, cpu: Cpu) -> str:
    """The IR of one kernel. Raises ValueError for a spec that ``cpu`` cannot run."""
    if spec.bf16_dot and not (cpu.has_bf16_dot and cpu.has_byte_tables):
        raise ValueError(
            f"{spec.name}: {cpu.name or 'this processor'} has no BF16 dot product or no byte tables"
        )
    return _KERNELS[spec.kind](spec, cpu).write()
