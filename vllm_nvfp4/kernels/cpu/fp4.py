# SPDX-License-Identifier: Apache-2.0
"""The four-bit CPU kernels: decode codes in registers and take dot products, lane = output row.

Only the look-up of a code's value and the BF16 dot product name an instruction of one processor.
"""

from __future__ import annotations

from dataclasses import dataclass

from vllm_nvfp4.kernels.cpu.emit import (
    BF16_PAIRS,
    E4M3_CORRECTION,
    F32,
    I16,
    I32,
    OUT_BYTES,
    GroupKernel,
    decode_e4m3,
    to_out,
)
from vllm_nvfp4.kernels.cpu.jit import Cpu
from vllm_nvfp4.kernels.cpu.layout import COLUMN_OF_NIBBLE, ROWS
from vllm_nvfp4.kernels.cpu.llvm_ir import IrWriter, Value
from vllm_nvfp4.numerics.formats import E2M1_VALUES

_SIGNED_VALUES = E2M1_VALUES + tuple(-v for v in E2M1_VALUES)
# A kernel asks for codes this many bytes ahead of where it reads.
_PREFETCH_BYTES = 2048


@dataclass(frozen=True)
class Fp4Spec:
    """One compiled kernel.

    kind:       "fused": decode, multiply and forget, for few tokens; "panel": decode sixteen rows
                once for many tokens (needs bf16_dot); "dequantize" and "gather": only decode
    scale_type: "e4m3" or "e8m0"
    block_size: columns that share a scale
    tokens:     rows of ``a`` that go through the weight together; a call needs at least so many
    out:        "bf16", "f16" or "f32": the type of y and of the bias
    bf16_dot:   a is bf16 and the products are the BF16 dot instruction's; else a is f32
    """

    kind: str
    scale_type: str
    block_size: int
    tokens: int
    out: str
    bf16_dot: bool

    @property
    def name(self) -> str:
        kind = "bf16" if self.bf16_dot else "f32"
        shape = f"{self.scale_type}_b{self.block_size}_{kind}_m{self.tokens}"
        return f"fp4_{self.kind}_{shape}_{self.out}"


def scale_correction(scale_type: str) -> float:
    """What :func:`decode_scales` leaves out of every scale."""
    return E4M3_CORRECTION if scale_type == "e4m3" else 1.0


def decode_scales(ir: IrWriter, pointer: Value, scale_type: str, lanes: int = ROWS) -> Value:
    """Scale bytes as f32, short of :func:`scale_correction`.

    e8m0 byte e is the exponent field of an f32, but 0 means 2^-127, an f32 subnormal.
    """
    raw = pointer.load(f"<{lanes} x i8>")
    if scale_type == "e4m3":
        return decode_e4m3(raw, lanes)
    words = f"<{lanes} x i32>"
    bits = raw.convert("zext", words) << 23
    smallest = ir.const(words, 1 << 22)
    return ir.call(words, f"llvm.umax.v{lanes}i32", bits, smallest).bitcast(f"<{lanes} x float>")


def lookup_f32(ir: IrWriter, cpu: Cpu, codes: Value) -> Value:
    """E2M1 values of the low four bits of sixteen 32-bit lanes."""
    if cpu.has_avx512:
        table = ir.const(F32, _SIGNED_VALUES)
        return ir.call(F32, "llvm.x86.avx512.permvar.sf.512", table, codes)
    sign = (codes & 8) << 28
    if cpu.has_avx2:
        table = ir.const("<8 x float>", E2M1_VALUES)
        halves = [
            ir.call("<8 x float>", "llvm.x86.avx2.permps", table, codes.shuffle(codes, lanes))
            for lanes in (range(8), range(8, 16))
        ]
        magnitude = halves[0].shuffle(halves[1], range(16)).bitcast(I32)
    else:
        # 0eem: twice the value is m where ee = 0, else (2 + m) << (ee - 1): small integers.
        exponent = (codes >> 1) & 3
        is_normal = exponent.compare("icmp ne", 0)
        digits = (codes & 1) | is_normal.select(ir.const(I32, 2), ir.const(I32, 0))
        shift = exponent - is_normal.convert("zext", I32)
        magnitude = ((digits << shift).convert("sitofp", F32) * 0.5).bitcast(I32)
    return (magnitude | sign).bitcast(F32)


def lookup_bf16(ir: IrWriter, codes: Value) -> Value:
    """E2M1 values of the low four bits of 32 16-bit lanes, as bf16.

    The instruction reads five bits of each lane: the table stands twice, so the fifth is ignored.
    """
    table = ir.const(F32, _SIGNED_VALUES).bitcast(I32) >> 16
    narrow = table.convert("trunc", "<16 x i16>")
    twice = narrow.shuffle(narrow, [*range(16), *range(16)])
    return ir.call(I16, "llvm.x86.avx512.permvar.hi.512", twice, codes).bitcast(BF16_PAIRS)


def dot_bf16(ir: IrWriter, total: Value, weights: Value, pair_at: Value) -> Value:
    """total[n] + weights[2n] * a[0] + weights[2n+1] * a[1]; bf16 subnormals count as zero."""
    pair = pair_at.load("i32", align=2).splat(16).bitcast(BF16_PAIRS)
    return ir.call(F32, "llvm.x86.avx512bf16.dpbf16ps.512", total, weights, pair)


class _FusedKernel(GroupKernel):
    """total[m, n] = sum_k a[m, k] * code[n, k] * block_scale[n, k]"""

    def __init__(self, spec: Fp4Spec, cpu: Cpu) -> None:
        super().__init__(spec.name, spec.tokens, spec.out, scale_correction(spec.scale_type))
        self.spec, self.cpu = spec, cpu
        self.a_bytes = 2 if spec.bf16_dot else 4

    def dot_tile(self, group: Value, token: Value) -> list[Value]:
        """sum_k a[m, k] * code * scale for ``tokens`` tokens and the sixteen rows of a group."""
        ir, spec, k = self.ir, self.spec, self.arg["num_cols"]
        codes = self.arg["codes"].at(group * k * (ROWS // 2))
        blocks = k // spec.block_size
        scales = self.arg["block_scale"].at(group * blocks * ROWS)
        rows = self.token_rows(token)
        zero = ir.const(F32, 0.0)
        block_bytes = spec.block_size * ROWS // 2
        with ir.loop(ir.const("i64", 0), blocks, [zero] * spec.tokens) as block:
            block_codes = codes.at(block.index * block_bytes)
            for line in range(0, block_bytes, 64):
                ir.prefetch(block_codes.at(_PREFETCH_BYTES + line))
            column = block.index * (spec.block_size * self.a_bytes)
            dots = self._dot_block(block_codes, [row.at(column) for row in rows])
            scale = decode_scales(ir, scales.at(block.index * ROWS), spec.scale_type)
            block.next = [
                ir.fma(dot, scale, total) for dot, total in zip(dots, block.carried, strict=True)
            ]
        return block.carried

    def _dot_block(self, codes: Value, rows: list[Value]) -> list[Value]:
        """sum of a * code over one block, before its scale."""
        ir, spec = self.ir, self.spec
        # Two chains halve the wait for the previous product where there are registers for it.
        chains = 2 if spec.tokens <= 4 else 1
        sums = [[ir.const(F32, 0.0)] * chains for _ in rows]
        for word in range(spec.block_size // 8):
            chain = word % chains
            packed = codes.at(word * 64).load(I16 if spec.bf16_dot else I32)
            for step in range(4 if spec.bf16_dot else 8):
                if spec.bf16_dot:
                    value = lookup_bf16(ir, packed >> (4 * step))
                    column = 8 * word + 2 * step
                else:
                    value = lookup_f32(ir, self.cpu, packed >> (4 * step))
                    column = 8 * word + COLUMN_OF_NIBBLE[step]
                for m, row in enumerate(rows):
                    sums[m][chain] = self._multiply_add(row, column, value, sums[m][chain])
        return [s[0] + s[1] if chains == 2 else s[0] for s in sums]

    def _multiply_add(self, row: Value, column: int, value: Value, total: Value) -> Value:
        ir, pointer = self.ir, row.at(column * self.a_bytes)
        if not self.spec.bf16_dot:
            return ir.fma(pointer.load("float", align=4).splat(16), value, total)
        return dot_bf16(ir, total, value, pointer)


class _PanelKernel(GroupKernel):
    """The same totals for many tokens, by way of a decoded panel of the sixteen rows.

    The panel, [K/2, 16, 2] bf16 in this thread's part of ``scratch``, holds code * block_scale
    (short of the correction), which bf16 holds exactly: at most six significant bits. What remains
    for each token is one instruction for sixteen pairs.
    """

    def __init__(self, spec: Fp4Spec, cpu: Cpu) -> None:
        super().__init__(spec.name, spec.tokens, spec.out, scale_correction(spec.scale_type))
        self.spec, self.cpu = spec, cpu

    def begin_group(self, group: Value) -> None:
        ir, spec, k = self.ir, self.spec, self.arg["num_cols"]
        self.panel = self.arg["scratch"].at(self.thread * k * (ROWS * 2))
        codes = self.arg["codes"].at(group * k * (ROWS // 2))
        blocks = k // spec.block_size
        scales = self.arg["block_scale"].at(group * blocks * ROWS)
        with ir.loop(ir.const("i64", 0), blocks) as block:
            scale = decode_scales(ir, scales.at(block.index * ROWS), spec.scale_type)
            out = self.panel.at(block.index * (spec.block_size * ROWS * 2))
            for word in range(spec.block_size // 8):
                at = block.index * (spec.block_size * ROWS // 2) + 64 * word
                packed = codes.at(at).load(I32)
                values = [
                    (lookup_f32(ir, self.cpu, packed >> (4 * nibble)) * scale).bitcast(I32)
                    for nibble in range(8)
                ]
                for pair in range(4):  # nibble i of the low half is column 2i, i + 4 column 2i + 1
                    both = (values[pair + 4] & -65536) | (values[pair] >> 16)
                    ir.store(both, out.at((4 * word + pair) * 64))

    def dot_tile(self, group: Value, token: Value) -> list[Value]:
        ir, k = self.ir, self.arg["num_cols"]
        rows = self.token_rows(token)
        zeros = [ir.const(F32, 0.0)] * self.tokens
        unroll = 4  # K is a multiple of 16, so of four pairs
        with ir.loop(ir.const("i64", 0), k // (2 * unroll), zeros) as step:
            totals = step.carried
            for i in range(unroll):
                pair = step.index * unroll + i
                value = self.panel.at(pair * 64).load(BF16_PAIRS, align=2)
                totals = [
                    dot_bf16(ir, total, value, row.at(pair * 4))
                    for total, row in zip(totals, rows, strict=True)
                ]
            step.next = totals
        return step.carried


class _DequantizeKernel(GroupKernel):
    """y[k, n] = code[n, k] * block_scale[n, k], for a library's matrix product.

    y is transposed so that the sixteen rows of a group lie together; num_rows is its row length, a
    multiple of sixteen.
    """

    def __init__(self, spec: Fp4Spec, cpu: Cpu) -> None:
        super().__init__(spec.name, spec.tokens, spec.out, scale_correction(spec.scale_type))
        self.spec, self.cpu = spec, cpu

    def write(self) -> str:
        ir, arg, spec = self.ir, self.arg, self.spec
        k, out_bytes = arg["num_cols"], OUT_BYTES[spec.out]
        blocks = k // spec.block_size
        with self.groups() as group, ir.loop(ir.const("i64", 0), blocks) as block:
            scales = arg["block_scale"].at((group.index * blocks + block.index) * ROWS)
            scale = decode_scales(ir, scales, spec.scale_type) * self.correction
            codes = arg["codes"].at((group.index * k + block.index * spec.block_size) * (ROWS // 2))
            for word in range(spec.block_size // 8):
                packed = codes.at(64 * word).load(I32)
                for nibble, column in enumerate(COLUMN_OF_NIBBLE):
                    value = lookup_f32(ir, self.cpu, packed >> (4 * nibble)) * scale
                    row = block.index * spec.block_size + (8 * word + column)
                    place = (row * arg["num_rows"] + group.index * ROWS) * out_bytes
                    ir.store(to_out(ir, value, spec.out), arg["y"].at(place))
        return ir.text()


class _GatherKernel(GroupKernel):
    """y[i, k] = code[n, k] * block_scale[n, k] * global_scale[n], n = a[i]: an embedding's rows.

    Here ``a`` is int64 row numbers; they are dealt out to the threads.
    """

    def __init__(self, spec: Fp4Spec, cpu: Cpu) -> None:
        super().__init__(spec.name, spec.tokens, spec.out, scale_correction(spec.scale_type))
        self.spec, self.cpu = spec, cpu

    def write(self) -> str:
        ir, arg, spec = self.ir, self.arg, self.spec
        k, block_size = arg["num_cols"], spec.block_size
        blocks = k // block_size
        with self.tokens_of_thread() as token:
            row = arg["a"].at(token.index * 8).load("i64", align=8)
            group, lane = row // ROWS, row & (ROWS - 1)
            codes = arg["codes"].at(group * k * (ROWS // 2) + lane * 4)
            scales = arg["block_scale"].at(group * blocks * ROWS + lane)
            global_scale = arg["global_scale"].at(row * 4).load("float").splat(ROWS)
            target = arg["y"].at(token.index * k * OUT_BYTES[spec.out])
            with ir.loop(ir.const("i64", 0), blocks) as block:
                one = decode_scales(ir, scales.at(block.index * ROWS), spec.scale_type, lanes=1)
                scale = one.shuffle(one, [0] * ROWS) * self.correction
                for part in range(0, block_size, 16):
                    column = block.index * block_size + part
                    value = self._decode_16(codes.at(column * (ROWS // 2))) * scale * global_scale
                    ir.store(to_out(ir, value, spec.out), target.at(column * OUT_BYTES[spec.out]))
        return ir.text()

    def _decode_16(self, codes: Value) -> Value:
        """Sixteen columns of one row: two words, a row group's width apart."""
        ir = self.ir
        words = [codes.at(4 * ROWS * i).load("i32", align=4).splat(8) for i in range(2)]
        shifts = [4 * COLUMN_OF_NIBBLE.index(column) for column in range(8)] * 2
        both = words[0].shuffle(words[1], range(16))
        return lookup_f32(ir, self.cpu, both >> ir.const(I32, shifts))


_KERNELS = {
    "fused": _FusedKernel,
    "panel": _PanelKernel,
    "dequantize": _DequantizeKernel,
    "gather": _GatherKernel,
}


def write_fp4(spec: Fp4Spec, cpu: Cpu) -> str:
    """The IR of one kernel. Raises ValueError for a spec that ``cpu`` cannot run."""
    if spec.bf16_dot and not cpu.has_bf16_dot:
        raise ValueError(f"{spec.name}: {cpu.name or 'this processor'} has no BF16 dot product")
    return _KERNELS[spec.kind](spec, cpu).write()
