# SPDX-License-Identifier: Apache-2.0
"""What the CPU kernels share, as writers of LLVM IR: threads, tiles of tokens, rounding, the end.

Values are ``<16 x float>`` on every machine: LLVM splits them where registers are narrower.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager

from vllm_nvfp4.kernels.cpu.layout import ROWS
from vllm_nvfp4.kernels.cpu.llvm_ir import IrWriter, Loop, Value

F32, I32, I16 = "<16 x float>", "<16 x i32>", "<32 x i16>"
BF16_PAIRS = "<32 x bfloat>"
OUT_LANES = {"f32": F32, "f16": "<16 x half>", "bf16": "<16 x i16>"}
OUT_BYTES = {"f32": 4, "f16": 2, "bf16": 2}

# Words of the argument array of every kernel.
ARGS = (
    "get_thread_num",
    "get_num_threads",
    "codes",
    "block_scale",
    "global_scale",
    "a",
    "a_stride",  # bytes from one row of a to the next
    "a_scale",
    "a_scale_stride",  # bytes from one row's multiplier to the next; 0 where all share one
    "bias",  # null where there is none
    "y",
    "num_tokens",
    "num_rows",
    "num_cols",
    "scratch",  # of the kernels that ask for it
)
_WORDS = ("a_stride", "a_scale_stride", "num_tokens", "num_rows", "num_cols")


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


def decode_e4m3(raw: Value, lanes: int = ROWS) -> Value:
    """e4m3 bytes as f32, 2^-8 too small (``E4M3_CORRECTION`` puts it right).

    s.eeee.mmm moved left by 7 is a binary16 with the same digits and a bias 8 larger, and binary16
    subnormals are converted exactly and at full speed. NaN (0x7f, 0xff) comes out as +-480.
    """
    half = (raw.convert("sext", f"<{lanes} x i16>") << 7) & 0xBF80
    return half.bitcast(f"<{lanes} x half>").convert("fpext", f"<{lanes} x float>")


E4M3_CORRECTION = 256.0


class GroupKernel:
    """y[m, n] = a_scale[m] * global_scale[n] * correction * total[m, n] + bias[n]

    A kernel that makes ``total`` for sixteen rows n (a group) and ``tokens`` rows m at a time. A
    call needs M >= tokens. Groups are dealt out to the threads in even, contiguous runs.
    """

    def __init__(self, name: str, tokens: int, out: str, correction: float) -> None:
        self.tokens, self.out, self.correction = tokens, out, correction
        self.ir = IrWriter(name)
        self.arg = {
            word: self.ir.argument(i, "i64" if word in _WORDS else "ptr")
            for i, word in enumerate(ARGS)
        }
        thread = self.ir.call_pointer("i32", self.arg["get_thread_num"])
        self.thread = thread.convert("zext", "i64")

    def begin_group(self, group: Value) -> None:
        """Work that all tokens share."""

    def token_rows(self, token: Value) -> list[Value]:
        """Where the rows of a of ``tokens`` tokens from ``token`` on begin."""
        return [self.arg["a"].at((token + m) * self.arg["a_stride"]) for m in range(self.tokens)]

    def dot_tile(self, group: Value, token: Value) -> list[Value]:
        """The totals of ``tokens`` tokens from ``token`` on, lane = row of the group."""
        raise NotImplementedError

    @contextmanager
    def _share(self, count: Value) -> Iterator[Loop]:
        """The loop over this thread's run of ``range(count)``."""
        ir = self.ir
        threads = ir.call_pointer("i32", self.arg["get_num_threads"]).convert("zext", "i64")
        first, last = count * self.thread // threads, count * (self.thread + 1) // threads
        with ir.loop(first, last) as loop:
            yield loop

    def groups(self) -> AbstractContextManager[Loop]:
        """The loop over the groups of this thread."""
        return self._share((self.arg["num_rows"] + (ROWS - 1)) // ROWS)

    def tokens_of_thread(self) -> AbstractContextManager[Loop]:
        """The loop over the tokens of this thread, for kernels that share those out instead."""
        return self._share(self.arg["num_tokens"])

    def write(self) -> str:
        """The module's IR."""
        ir, tokens, num_tokens = self.ir, self.tokens, self.arg["num_tokens"]
        tiles = (num_tokens + (tokens - 1)) // tokens
        with self.groups() as group:
            self.begin_group(group.index)
            with ir.loop(ir.const("i64", 0), tiles) as tile:
                # The last tile is moved back to end at M: some tokens are done twice, alike.
                token = ir.call("i64", "llvm.umin.i64", tile.index * tokens, num_tokens - tokens)
                self._finish(group.index, token, self.dot_tile(group.index, token))
        return ir.text()

    def _finish(self, group: Value, token: Value, totals: list[Value]) -> None:
        """Multipliers, bias, rounding, store; rows past N are masked."""
        ir, arg, out = self.ir, self.arg, self.out
        row = group * ROWS
        left = (arg["num_rows"] - row).convert("trunc", "i32").splat(ROWS)
        mask = ir.const(I32, range(ROWS)).compare("icmp ult", left)
        global_scale = ir.masked_load(arg["global_scale"].at(row * 4), F32, mask, align=4)
        has_bias = arg["bias"].compare("icmp ne", Value(ir, "ptr", "null")).splat(ROWS)
        bias_at = arg["bias"].at(row * OUT_BYTES[out])
        bias = from_out(ir.masked_load(bias_at, OUT_LANES[out], mask & has_bias), out)
        for m, total in enumerate(totals):
            a_scale = arg["a_scale"].at((token + m) * arg["a_scale_stride"]).load("float")
            y = total * global_scale * a_scale.splat(ROWS) * self.correction + bias
            place = ((token + m) * arg["num_rows"] + row) * OUT_BYTES[out]
            ir.masked_store(to_out(ir, y, out), arg["y"].at(place), mask)
