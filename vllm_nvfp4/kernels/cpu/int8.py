# SPDX-License-Identifier: Apache-2.0
"""The four-bit CPU kernels with INT8 activations: sums of a block are integers, hence exact.

Twice an E2M1 value is an integer. Twelve more makes it unsigned, 0 to 24, which is what the byte
dot products want of one operand; twelve times the activations' sum takes it off again. So a table
of sixteen bytes decodes a code, and a block of NVFP4 takes four dot products.

For each group of 64 columns of a row, t = sum over its blocks, in their order, of
block_scale * integer (exact in f32: 4 by 15 bits) with one rounding for each addition; then
total = total + t * a_scale, two roundings. Every instruction set forms the same bits.
"""

from __future__ import annotations

from dataclasses import dataclass

from vllm_nvfp4.kernels.cpu.emit import F32, I32, OUT_BYTES, OUT_LANES, GroupKernel, from_out
from vllm_nvfp4.kernels.cpu.fp4 import decode_scales, scale_correction
from vllm_nvfp4.kernels.cpu.jit import Cpu
from vllm_nvfp4.kernels.cpu.layout import ROWS
from vllm_nvfp4.kernels.cpu.llvm_ir import IrWriter, Value, vector_type
from vllm_nvfp4.numerics.formats import E2M1_VALUES, INT8_GROUP, INT8_MAX, BlockFormat

_OFFSET = 12
_TABLE = [round(2 * v) + _OFFSET for v in (*E2M1_VALUES, *(-v for v in E2M1_VALUES))]
# Columns of eight in the order in which a word's low and then its high nibbles hold them
# (layout.py): four bytes of activations stand beside four bytes of codes.
_COLUMN_ORDER = (0, 4, 1, 5, 2, 6, 3, 7)
# The least positive normal f32, and what rounds a small f32 to an integer in its low bits.
_SMALLEST, _TO_INTEGER, _TO_INTEGER_BITS = 2.0**-126, 1.5 * 2.0**23, 0x4B400000


@dataclass(frozen=True)
class Int8Spec:
    """One compiled kernel.

    scale_type, block_size, tokens, out: as in ``fp4.Fp4Spec``
    """

    scale_type: str
    block_size: int
    tokens: int
    out: str

    @property
    def name(self) -> str:
        return f"int8_{self.scale_type}_b{self.block_size}_m{self.tokens}_{self.out}"


def row_layout(num_cols: int, fmt: BlockFormat) -> tuple[int, int, int]:
    """(sums, scales, end): byte offsets in a row of quantised activations.

    A row is K bytes of q, eight columns at a time in ``_COLUMN_ORDER``; for each block, -12 times
    the sum of its q, int32; for each group its scale, f32.
    """
    sums = num_cols
    scales = sums + 4 * (num_cols // fmt.block_size)
    return sums, scales, scales + 4 * -(-num_cols // INT8_GROUP)


# --- quantise ------------------------------------------------------------------------------------


class _QuantizeKernel(GroupKernel):
    """numerics' quantize_int8_per_group, written as :func:`row_layout` says.

    source: "bf16", "f16" or "f32"; or "i8": q and its scales (at ``a_scale``, [M, groups]) are
    there already and only put into order. Tokens are dealt out to the threads; ``num_rows`` is
    the bytes from one row of the result to the next.
    """

    def __init__(self, name: str, source: str, block_size: int) -> None:
        super().__init__(name, 1, "f32", 1.0)
        self.source, self.block_size = source, block_size

    def write(self) -> str:
        ir, arg, k, block = self.ir, self.arg, self.arg["num_cols"], self.block_size
        zero, blocks = ir.const("i64", 0), self.arg["num_cols"] // block
        in_group = INT8_GROUP // block
        num_groups = (k + (INT8_GROUP - 1)) // INT8_GROUP
        with self.tokens_of_thread() as token:
            row = arg["a"].at(token.index * arg["a_stride"])
            target = arg["y"].at(token.index * arg["num_rows"])
            sums = target.at(k)
            scales = sums.at(blocks * 4)
            with ir.loop(zero, num_groups) as group:
                first = group.index * in_group
                last = ir.call("i64", "llvm.umin.i64", first + in_group, blocks)
                if self.source == "i8":
                    at = arg["a_scale"].at((token.index * num_groups + group.index) * 4)
                    scale = at.load("float", align=4)
                else:
                    scale = self._scale(row, first, last)
                ir.store(scale, scales.at(group.index * 4), align=4)
                with ir.loop(first, last) as here:
                    total = ir.const("i32", 0)
                    for part in range(0, block, 16):
                        column = here.index * block + part
                        q = self._quantize(row, column, scale)
                        total = total + ir.call("i32", "llvm.vector.reduce.add.v16i32", q)
                        order = [8 * half + i for half in range(2) for i in _COLUMN_ORDER]
                        bytes_ = q.convert("trunc", "<16 x i8>")
                        ir.store(bytes_.shuffle(bytes_, order), target.at(column))
                    ir.store(total * -_OFFSET, sums.at(here.index * 4), align=4)
        return ir.text()

    def _load(self, row: Value, column: Value) -> Value:
        at = row.at(column * OUT_BYTES[self.source])
        return from_out(at.load(OUT_LANES[self.source]), self.source)

    def _scale(self, row: Value, first: Value, last: Value) -> Value:
        """Of the blocks first .. last - 1."""
        ir = self.ir
        with ir.loop(first, last, [ir.const(I32, 0)]) as here:
            amax = here.carried[0]
            for part in range(0, self.block_size, 16):
                # As integers, magnitudes sort like the numbers, and NaN above all.
                x = self._load(row, here.index * self.block_size + part)
                amax = ir.call(I32, "llvm.umax.v16i32", amax, x.bitcast(I32) & 0x7FFFFFFF)
            here.next = [amax]
        amax = ir.call("i32", "llvm.vector.reduce.umax.v16i32", here.carried[0])
        scale = amax.bitcast("float") / INT8_MAX
        is_lost = scale.compare("fcmp olt", ir.const("float", _SMALLEST))
        return is_lost.select(ir.const("float", 1.0), scale)

    def _quantize(self, row: Value, column: Value, scale: Value) -> Value:
        """Sixteen q as <16 x i32>."""
        ir = self.ir
        if self.source == "i8":
            return row.at(column).load("<16 x i8>").convert("sext", I32)
        quotient = self._load(row, column) / scale.splat(16)
        is_nan = quotient.compare("fcmp uno", quotient)
        quotient = is_nan.select(ir.const(F32, 0.0), quotient)
        return (quotient + _TO_INTEGER).bitcast(I32) - _TO_INTEGER_BITS


def quantize_name(source: str, block_size: int) -> str:
    return f"quantize_int8_{source}_b{block_size}"


def write_quantize(source: str, block_size: int) -> str:
    """The IR of one quantiser."""
    return _QuantizeKernel(quantize_name(source, block_size), source, block_size).write()


# --- multiply ------------------------------------------------------------------------------------


class _Dot:
    """Tables and byte dot products, as the processor has them; ``lanes`` rows at a time."""

    def __init__(self, ir: IrWriter, cpu: Cpu) -> None:
        self.ir, self.cpu = ir, cpu
        self.lanes = 8 if cpu.has_avx2 and not cpu.has_avx512 else 16
        self.bytes_type = vector_type(4 * self.lanes, "i8")
        self.words_type = vector_type(self.lanes, "i32")

    def decode(self, packed: Value) -> list[Value]:
        """A word of codes of each row as two vectors of 2 * value + 12, bytes in words."""
        nibbles = (packed & 0x0F0F0F0F, (packed >> 4) & 0x0F0F0F0F)
        return [self._look_up(n.bitcast(self.bytes_type)) for n in nibbles]

    def _look_up(self, codes: Value) -> Value:
        ir = self.ir
        if self.cpu.has_avx512 or self.cpu.has_avx2:
            name = "avx512.pshuf.b.512" if self.cpu.has_avx512 else "avx2.pshuf.b"
            table = ir.const(self.bytes_type, _TABLE * (self.lanes // 4))
            return ir.call(self.bytes_type, f"llvm.x86.{name}", table, codes)
        total = ir.const(self.bytes_type, _TABLE[0])
        for code in range(1, 16):
            is_it = codes.compare("icmp eq", code)
            total = is_it.select(ir.const(self.bytes_type, _TABLE[code]), total)
        return total

    def block(self, total: Value, weights: list[Value], activations: list[Value]) -> Value:
        """total + the products of each row's four bytes, over all pairs.

        activations: one i32 of four q for each of the weights
        """
        cpu = self.cpu
        spread = [a.splat(self.lanes) for a in activations]
        if cpu.has_byte_dot:
            name = f"llvm.x86.avx512.vpdpbusd.{32 * self.lanes}"
            for w, a in zip(weights, spread, strict=True):
                total = self._byte_dot(name, total, w, a)
            return total
        if cpu.has_avx512 or cpu.has_avx2:
            return self._by_halves(total, weights, spread)
        for w, a in zip(weights, spread, strict=True):
            w = w.bitcast(self.words_type)
            for i in range(4):
                u, q = (w >> (8 * i)) & 0xFF, (a << (24 - 8 * i)).shift_right_signed(24)
                total = total + u * q
        return total

    def _byte_dot(self, name: str, total: Value, w: Value, a: Value) -> Value:
        return self.ir.call(self.words_type, name, total, w.bitcast(self.words_type), a)

    def _by_halves(self, total: Value, weights: list[Value], spread: list[Value]) -> Value:
        """By way of 16-bit sums of pairs: four of them stay within 4 * 2 * 24 * 127 = 24,384."""
        ir, is_wide = self.ir, self.cpu.has_avx512
        pairs_type = vector_type(2 * self.lanes, "i16")
        pairs_name = "avx512.pmaddubs.w.512" if is_wide else "avx2.pmadd.ub.sw"
        words_name = "avx512.pmaddw.d.512" if is_wide else "avx2.pmadd.wd"
        ones = ir.const(pairs_type, 1)
        for first in range(0, len(weights), 4):
            pairs = [
                ir.call(pairs_type, f"llvm.x86.{pairs_name}", w, a.bitcast(self.bytes_type))
                for w, a in zip(weights[first : first + 4], spread[first : first + 4], strict=True)
            ]
            both = pairs[0] + pairs[1] + (pairs[2] + pairs[3])
            total = total + ir.call(self.words_type, f"llvm.x86.{words_name}", both, ones)
        return total


class _Int8Kernel(GroupKernel):
    """total[m, n] = sum over groups g of a_scale[m, g] * t[m, n, g], see the module."""

    def __init__(self, spec: Int8Spec, cpu: Cpu) -> None:
        # Integers hold twice the value.
        correction = scale_correction(spec.scale_type) / 2
        super().__init__(spec.name, spec.tokens, spec.out, correction)
        self.spec, self.dot = spec, _Dot(self.ir, cpu)

    def dot_tile(self, group: Value, token: Value) -> list[Value]:
        lanes = self.dot.lanes
        parts = [
            self._dot_rows(group, self.token_rows(token), first) for first in range(0, ROWS, lanes)
        ]
        if len(parts) == 1:
            return parts[0]
        return [low.shuffle(high, range(ROWS)) for low, high in zip(*parts, strict=True)]

    def _dot_rows(self, group: Value, rows: list[Value], first: int) -> list[Value]:
        """Of the rows first .. first + lanes - 1 of the sixteen."""
        ir, spec, k = self.ir, self.spec, self.arg["num_cols"]
        blocks, in_group = k // spec.block_size, INT8_GROUP // spec.block_size
        self.codes = self.arg["codes"].at(group * k * (ROWS // 2) + 4 * first)
        self.scales = self.arg["block_scale"].at(group * blocks * ROWS + first)
        sums = [row.at(k) for row in rows]
        a_scales = [s.at(blocks * 4) for s in sums]
        zero, zeros = ir.const("i64", 0), [ir.const(self._floats, 0.0)] * spec.tokens
        whole = k // INT8_GROUP

        def add(totals: list[Value], parts: list[Value], at: Value) -> list[Value]:
            added = []
            for total, t, scales in zip(totals, parts, a_scales, strict=True):
                a_scale = scales.at(at * 4).load("float", align=4).splat(self.dot.lanes)
                added.append(total + t * a_scale)
            return added

        with ir.loop(zero, whole, zeros) as step:
            parts = zeros
            for i in range(in_group):
                parts = self._block(step.index * in_group + i, rows, sums, parts)
            step.next = add(step.carried, parts, step.index)
        # The last group, where K is not whole ones.
        left = ir.call("i64", "llvm.umin.i64", k - whole * INT8_GROUP, ir.const("i64", 1))
        with ir.loop(zero, left, step.carried) as tail:
            with ir.loop(whole * in_group, blocks, zeros) as block:
                block.next = self._block(block.index, rows, sums, block.carried)
            tail.next = add(tail.carried, block.carried, whole)
        return tail.carried

    @property
    def _floats(self) -> str:
        return vector_type(self.dot.lanes, "float")

    def _block(
        self, block: Value, rows: list[Value], sums: list[Value], parts: list[Value]
    ) -> list[Value]:
        ir, spec, dot = self.ir, self.spec, self.dot
        codes = self.codes.at(block * (spec.block_size * ROWS // 2))
        weights = [
            w
            for word in range(spec.block_size // 8)
            for w in dot.decode(codes.at(word * 4 * ROWS).load(dot.words_type))
        ]
        scale = decode_scales(ir, self.scales.at(block * ROWS), spec.scale_type, dot.lanes)
        added = []
        for row, own_sums, part in zip(rows, sums, parts, strict=True):
            q = row.at(block * spec.block_size)
            words = [q.at(4 * i).load("i32", align=4) for i in range(len(weights))]
            start = own_sums.at(block * 4).load("i32", align=4).splat(dot.lanes)
            total = dot.block(start, weights, words).convert("sitofp", self._floats)
            # The product is exact, so that it does not matter whether the addition is fused.
            added.append(ir.fma(total, scale, part))
        return added


def write_int8(spec: Int8Spec, cpu: Cpu) -> str:
    """The IR of one kernel."""
    return _Int8Kernel(spec, cpu).write()
