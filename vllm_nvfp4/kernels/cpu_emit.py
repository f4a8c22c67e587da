# SPDX-License-Identifier: Apache-2.0
"""The CPU kernels as writers of LLVM IR: decode four-bit codes in registers and take dot products.

Values are ``<16 x float>``, lane = output row, on every machine: LLVM splits them where registers
are narrower. Only the look-up of a code's value and the BF16 dot product name an instruction of one
processor.
"""

from __future__ import annotations

from dataclasses import dataclass

from vllm_nvfp4.kernels.cpu_jit import Cpu
from vllm_nvfp4.kernels.llvm_ir import IrWriter, Value
from vllm_nvfp4.layout_cpu import COLUMN_OF_NIBBLE, ROWS
from vllm_nvfp4.numerics.formats import E2M1_VALUES

F32, I32, I16 = "<16 x float>", "<16 x i32>", "<32 x i16>"
BF16_PAIRS = "<32 x bfloat>"
_SIGNED_VALUES = E2M1_VALUES + tuple(-v for v in E2M1_VALUES)
# A kernel asks for codes this many bytes ahead of where it reads.
_PREFETCH_BYTES = 2048

# Words of the argument array.
ARGS = (
    "get_thread_num",
    "get_num_threads",
    "codes",
    "block_scale",
    "global_scale",
    "a",
    "a_scale",
    "a_scale_stride",  # bytes from one row's multiplier to the next; 0 where all share one
    "bias",  # null where there is none
    "y",
    "num_tokens",
    "num_rows",
    "num_cols",
)


@dataclass(frozen=True)
class LinearSpec:
    """One compiled kernel.

    scale_type: "e4m3" or "e8m0"
    block_size: columns that share a scale
    tokens:     rows of ``a`` that go through the weight together; a call needs at least so many
    out:        "bf16", "f16" or "f32": the type of y and of the bias
    bf16_dot:   a is bf16 and the products are the BF16 dot instruction's; else a is f32
    """

    scale_type: str
    block_size: int
    tokens: int
    out: str
    bf16_dot: bool

    @property
    def name(self) -> str:
        kind = "bf16" if self.bf16_dot else "f32"
        return f"fp4_{self.scale_type}_b{self.block_size}_{kind}_m{self.tokens}_{self.out}"


def scale_correction(scale_type: str) -> float:
    """What :func:`decode_scales` leaves out of every scale."""
    return 256.0 if scale_type == "e4m3" else 1.0


def decode_scales(ir: IrWriter, pointer: Value, scale_type: str) -> Value:
    """Sixteen scale bytes as f32; e4m3 comes out 2^-8 too small (:func:`scale_correction`).

    e4m3 s.eeee.mmm moved left by 7 is a binary16 with the same digits and a bias 8 larger, and
    binary16 subnormals are converted exactly and at full speed. e8m0 byte e is the exponent field
    of an f32, but 0 means 2^-127, which only an f32 subnormal can hold.
    """
    raw = pointer.load("<16 x i8>")
    if scale_type == "e4m3":
        half = (raw.convert("sext", "<16 x i16>") << 7) & 0xBF80
        return half.bitcast("<16 x half>").convert("fpext", F32)
    bits = raw.convert("zext", I32) << 23
    smallest = ir.const(I32, 1 << 22)
    return ir.call(I32, "llvm.umax.v16i32", bits, smallest).bitcast(F32)


def _lookup_f32(ir: IrWriter, cpu: Cpu, codes: Value) -> Value:
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


def _lookup_bf16(ir: IrWriter, codes: Value) -> Value:
    """E2M1 values of the low four bits of 32 16-bit lanes, as bf16.

    The instruction reads five bits of each lane: the table stands twice, so the fifth is ignored.
    """
    table = ir.const(F32, _SIGNED_VALUES).bitcast(I32) >> 16
    narrow = table.convert("trunc", "<16 x i16>")
    twice = narrow.shuffle(narrow, [*range(16), *range(16)])
    return ir.call(I16, "llvm.x86.avx512.permvar.hi.512", twice, codes).bitcast(BF16_PAIRS)


def to_out(ir: IrWriter, value: Value, out: str) -> Value:
    """f32 lanes rounded to nearest even in the output type; NaN stays NaN."""
    if out == "f32":
        return value
    if out == "f16":
        return value.convert("fptrunc", "<16 x half>")
    bits = value.bitcast(I32)
    rounded = (bits + ((bits >> 16) & 1) + 0x7FFF) >> 16
    is_nan = value.compare("fcmp uno", value)
    return is_nan.select(ir.const(I32, 0x7FC0), rounded).convert("trunc", "<16 x i16>")


def from_out(value: Value, out: str) -> Value:
    """Output-type lanes as f32."""
    if out == "f32":
        return value
    if out == "f16":
        return value.convert("fpext", F32)
    return (value.convert("zext", I32) << 16).bitcast(F32)


OUT_LANES = {"f32": F32, "f16": "<16 x half>", "bf16": "<16 x i16>"}
OUT_BYTES = {"f32": 4, "f16": 2, "bf16": 2}


class _LinearWriter:
    """y[m, n] = a_scale[m] * global_scale[n] * sum_k a[m, k] * code[n, k] * scale[n, k] + bias[n]"""

    def __init__(self, spec: LinearSpec, cpu: Cpu) -> None:
        self.spec, self.cpu = spec, cpu
        self.ir = ir = IrWriter(spec.name)
        pointers = ("codes", "block_scale", "global_scale", "a", "a_scale", "bias", "y")
        self.arg = {
            name: ir.argument(i, "ptr" if name in pointers or i < 2 else "i64")
            for i, name in enumerate(ARGS)
        }
        self.a_bytes = 2 if spec.bf16_dot else 4

    def write(self) -> str:
        """Row groups are dealt out to threads in even, contiguous runs."""
        ir, arg = self.ir, self.arg
        groups = (arg["num_rows"] + (ROWS - 1)) // ROWS
        thread = ir.call_pointer("i32", arg["get_thread_num"]).convert("zext", "i64")
        threads = ir.call_pointer("i32", arg["get_num_threads"]).convert("zext", "i64")
        first, last = groups * thread // threads, groups * (thread + 1) // threads
        zero = ir.const("i64", 0)
        tokens = self.spec.tokens
        tiles = (arg["num_tokens"] + (tokens - 1)) // tokens
        with ir.loop(first, last) as group, ir.loop(zero, tiles) as tile:
            # The last tile is moved back to end at M: some tokens are done twice, alike.
            wanted, limit = tile.index * tokens, arg["num_tokens"] - tokens
            token = ir.call("i64", "llvm.umin.i64", wanted, limit)
            self._finish(group.index, token, self._dot_tile(group.index, token))
        return ir.text()

    def _dot_tile(self, group: Value, token: Value) -> list[Value]:
        """sum_k a[m, k] * code * scale for ``tokens`` tokens and the sixteen rows of a group."""
        ir, spec, k = self.ir, self.spec, self.arg["num_cols"]
        codes = self.arg["codes"].at(group * k * (ROWS // 2))
        blocks = k // spec.block_size
        scales = self.arg["block_scale"].at(group * blocks * ROWS)
        row_bytes = k * self.a_bytes
        rows = [self.arg["a"].at((token + m) * row_bytes) for m in range(spec.tokens)]
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
                    value = _lookup_bf16(ir, packed >> (4 * step))
                    column = 8 * word + 2 * step
                else:
                    value = _lookup_f32(ir, self.cpu, packed >> (4 * step))
                    column = 8 * word + COLUMN_OF_NIBBLE[step]
                for m, row in enumerate(rows):
                    sums[m][chain] = self._multiply_add(row, column, value, sums[m][chain])
        return [s[0] + s[1] if chains == 2 else s[0] for s in sums]

    def _multiply_add(self, row: Value, column: int, value: Value, total: Value) -> Value:
        ir, pointer = self.ir, row.at(column * self.a_bytes)
        if not self.spec.bf16_dot:
            return ir.fma(pointer.load("float", align=4).splat(16), value, total)
        pair = pointer.load("i32", align=2).splat(16).bitcast(BF16_PAIRS)
        return ir.call(F32, "llvm.x86.avx512bf16.dpbf16ps.512", total, value, pair)

    def _finish(self, group: Value, token: Value, totals: list[Value]) -> None:
        """Multipliers, bias, rounding, store; rows past N are masked."""
        ir, spec, arg = self.ir, self.spec, self.arg
        out_lanes, out_bytes = OUT_LANES[spec.out], OUT_BYTES[spec.out]
        row = group * ROWS
        lane_numbers = ir.const(I32, range(16))
        left = (arg["num_rows"] - row).convert("trunc", "i32").splat(16)
        mask = lane_numbers.compare("icmp ult", left)
        global_scale = ir.masked_load(arg["global_scale"].at(row * 4), F32, mask, align=4)
        has_bias = arg["bias"].compare("icmp ne", Value(ir, "ptr", "null")).splat(16)
        bias_at = arg["bias"].at(row * out_bytes)
        bias = from_out(ir.masked_load(bias_at, out_lanes, mask & has_bias), spec.out)
        correction = scale_correction(spec.scale_type)
        for m, total in enumerate(totals):
            a_scale = arg["a_scale"].at((token + m) * arg["a_scale_stride"]).load("float")
            y = total * global_scale * a_scale.splat(16) * correction + bias
            place = ((token + m) * arg["num_rows"] + row) * out_bytes
            ir.masked_store(to_out(ir, y, spec.out), arg["y"].at(place), mask)


def write_linear(spec: LinearSpec, cpu: Cpu) -> str:
    """The IR of one kernel. Raises ValueError for a spec that ``cpu`` cannot run."""
    if spec.bf16_dot and not cpu.has_bf16_dot:
        raise ValueError(f"{spec.name}: {cpu.name or 'this processor'} has no BF16 dot product")
    return _LinearWriter(spec, cpu).write()
