# SPDX-License-Identifier: Apache-2.0
"""Activations rounded to E4M3, one scale per token, as numbers again: numerics' rule in vectors."""

from __future__ import annotations

from vllm_nvfp4.kernels.cpu.emit import (
    F32,
    I32,
    OUT_BYTES,
    OUT_LANES,
    GroupKernel,
    from_out,
    to_out,
)
from vllm_nvfp4.kernels.cpu.llvm_ir import IrWriter, Value
from vllm_nvfp4.numerics.formats import E4M3_MAX

_LANES = 16
_MAGNITUDE = 0x7FFFFFFF


def _round_to_e4m3(ir: IrWriter, x: Value) -> Value:
    """The e4m3 number nearest to x, ties to even, saturating; NaN stays NaN."""
    magnitude = (x.bitcast(I32) & _MAGNITUDE).bitcast(F32)
    limit = ir.const(F32, E4M3_MAX)
    magnitude = magnitude.compare("fcmp ogt", limit).select(limit, magnitude)
    bits = magnitude.bitcast(I32)
    # Three mantissa bits of an f32's 23 remain ...
    normal = (bits + ((bits >> 20) & 1) + 0x7FFFF) & -0x100000
    # ... or, below 2^-6, multiples of 2^-9: the spacing of f32 between 2^14 and 2^15.
    shift = ir.const(F32, 1.5 * 2.0**14)
    small = (magnitude + shift - shift).bitcast(I32)
    is_small = magnitude.compare("fcmp olt", ir.const(F32, 2.0**-6))
    is_nan = magnitude.compare("fcmp uno", magnitude)
    rounded = is_nan.select(bits, is_small.select(small, normal))
    sign = x.bitcast(I32) & -0x80000000
    return (rounded | sign).bitcast(F32)


class _RoundKernel(GroupKernel):
    """a_scale[m] = amax|a[m]| / 448 (1 for an all-zero row); y[m, k] = e4m3(a[m, k] / a_scale[m])

    K is a multiple of sixteen. Tokens are dealt out to the threads.
    """

    def __init__(self, name: str, source: str, out: str) -> None:
        super().__init__(name, 1, out, 1.0)
        self.source = source

    def write(self) -> str:
        ir, arg, k = self.ir, self.arg, self.arg["num_cols"]
        zero, steps = ir.const("i64", 0), k // _LANES
        with self.tokens_of_thread() as token:
            row = arg["a"].at(token.index * arg["a_stride"])
            target = arg["y"].at(token.index * k * OUT_BYTES[self.out])
            with ir.loop(zero, steps, [ir.const(I32, 0)]) as step:
                # As integers, magnitudes sort like the numbers, and NaN above all.
                bits = self._load(row, step.index).bitcast(I32) & _MAGNITUDE
                step.next = [ir.call(I32, "llvm.umax.v16i32", step.carried[0], bits)]
            amax = ir.call("i32", "llvm.vector.reduce.umax.v16i32", step.carried[0])
            scale = self._scale(amax.bitcast("float"))
            ir.store(scale, arg["a_scale"].at(token.index * 4), align=4)
            divisor = scale.splat(_LANES)
            with ir.loop(zero, steps) as step:
                quotient = self._load(row, step.index) / divisor
                value = to_out(ir, _round_to_e4m3(ir, quotient), self.out)
                ir.store(value, target.at(step.index * (_LANES * OUT_BYTES[self.out])))
        return ir.text()

    def _load(self, row: Value, step: Value) -> Value:
        at = row.at(step * (_LANES * OUT_BYTES[self.source]))
        return from_out(at.load(OUT_LANES[self.source]), self.source)

    def _scale(self, amax: Value) -> Value:
        is_positive = amax.compare("fcmp ogt", self.ir.const("float", 0.0))
        return is_positive.select(amax / E4M3_MAX, self.ir.const("float", 1.0))


def round_name(source: str, out: str) -> str:
    return f"round_e4m3_{source}_{out}"


def write_round(source: str, out: str) -> str:
    """The IR that rounds activations of type ``source`` and writes ``out``: "bf16" or "f32"."""
    return _RoundKernel(round_name(source, out), source, out).write()
