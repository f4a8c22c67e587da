# SPDX-License-Identifier: Apache-2.0
"""The FP8 CPU kernel: plain [N, K] e4m3 bytes against f32 activations, lane = column."""

from __future__ import annotations

from dataclasses import dataclass

from vllm_nvfp4.kernels.cpu_emit import E4M3_CORRECTION, F32, I32, GroupKernel, decode_e4m3
from vllm_nvfp4.kernels.cpu_jit import Cpu
from vllm_nvfp4.kernels.llvm_ir import Value
from vllm_nvfp4.layout_cpu import ROWS

_LANES = 16


@dataclass(frozen=True)
class Fp8Spec:
    """One compiled kernel. tokens: as in LinearSpec; out: "bf16", "f16" or "f32"."""

    tokens: int
    out: str

    @property
    def name(self) -> str:
        return f"fp8_f32_m{self.tokens}_{self.out}"


class _Fp8Kernel(GroupKernel):
    """total[m, n] = sum_k a[m, k] * e4m3(w[n, k])"""

    def __init__(self, spec: Fp8Spec, cpu: Cpu) -> None:
        super().__init__(spec.name, spec.tokens, spec.out, E4M3_CORRECTION)
        # Accumulators that fit the registers: AVX-512 has 32 of 16 lanes, others 16 of 8 or fewer.
        self.rows_at_once = max(1, (16 if cpu.has_avx512 else 4) // spec.tokens)

    def dot_tile(self, group: Value, token: Value) -> list[Value]:
        ir, k = self.ir, self.arg["num_cols"]
        tokens = [self.arg["a"].at((token + m) * k * 4) for m in range(self.tokens)]
        last_row = self.arg["num_rows"] - 1
        sums: list[list[Value]] = [[] for _ in tokens]
        for first in range(0, ROWS, self.rows_at_once):
            # Rows past N repeat the last one; the end of the kernel drops them.
            wanted = [group * ROWS + row for row in range(first, first + self.rows_at_once)]
            rows = [
                self.arg["codes"].at(ir.call("i64", "llvm.umin.i64", row, last_row) * k)
                for row in wanted
            ]
            for m, row_sums in enumerate(self._dot_rows(rows, tokens)):
                sums[m] += row_sums
        return [ir.gather_scalars(row_sums) for row_sums in sums]

    def _dot_rows(self, rows: list[Value], tokens: list[Value]) -> list[list[Value]]:
        """[m][row] scalars."""
        ir, k = self.ir, self.arg["num_cols"]
        steps = k // _LANES
        zeros = [ir.const(F32, 0.0)] * (len(rows) * len(tokens))
        with ir.loop(ir.const("i64", 0), steps, zeros) as step:
            column = step.index * _LANES
            weights = [decode_e4m3(row.at(column).load("<16 x i8>")) for row in rows]
            values = [token.at(column * 4).load(F32, align=4) for token in tokens]
            step.next = self._multiply_add(weights, values, step.carried)
        # The columns that do not fill a vector.
        column = steps * _LANES
        left = (k - column).convert("trunc", "i32").splat(_LANES)
        mask = ir.const(I32, range(_LANES)).compare("icmp ult", left)
        weights = [decode_e4m3(ir.masked_load(row.at(column), "<16 x i8>", mask)) for row in rows]
        values = [ir.masked_load(t.at(column * 4), F32, mask, align=4) for t in tokens]
        totals = self._multiply_add(weights, values, step.carried)
        lanes = [ir.sum_lanes(total) for total in totals]
        return [lanes[m * len(rows) : (m + 1) * len(rows)] for m in range(len(tokens))]

    def _multiply_add(
        self, weights: list[Value], values: list[Value], totals: list[Value]
    ) -> list[Value]:
        pairs = [(value, weight) for value in values for weight in weights]
        return [self.ir.fma(v, w, t) for (v, w), t in zip(pairs, totals, strict=True)]


def write_fp8_linear(spec: Fp8Spec, cpu: Cpu) -> str:
    """The IR of one kernel."""
    return _Fp8Kernel(spec, cpu).write()
