# SPDX-License-Identifier: Apache-2.0
"""Round a weight to NVFP4 so that the layer's output, not the weight, changes least.

With inputs x of second moment H = E[x x^T], the output's squared error is, summed over the rows
w of the weight and their quantised q,

    error = sum_n (w_n - q_n)^T H (w_n - q_n)

Where the layers below are quantised already, x differs from the x' of the unquantised model. Then
the output to come near is w x' + r, r what the residual stream lacks by now, and w is replaced by
the weight that comes nearest to it from x (:func:`shifted_target`).

Sources: GPTQ (Frantar et al., arXiv 2210.17323) for the column by column rounding, GPTAQ (Li et
al., arXiv 2504.02692) for the target from the unquantised inputs; the descent after it is
coordinate descent on the same quadratic form.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from vllm_nvfp4.numerics.codes import encode_e2m1, pack_codes, round_e2m1
from vllm_nvfp4.numerics.formats import NVFP4
from vllm_nvfp4.numerics.quantize import (
    block_scale_candidates,
    block_scale_rtn,
    quantize_fp8_per_row,
    to_e4m3,
)
from vllm_nvfp4.numerics.weight import BlockScaledWeight

BLOCK = NVFP4.block_size
# Columns that are rounded before the rest of the weight hears of their errors, in one product.
_PANEL = 128
# Added to the diagonal of H, as a share of its mean: what makes H invertible.
DAMPING = 0.01
# The same for the target: it is a regression on the calibration text, and has to hold beyond it.
TARGET_DAMPING = 0.05
# Rounds of descent after GPTQ. Each lowers the error, the third by less than a tenth of the first.
DESCENT_ROUNDS = 2


def output_error(
    weight: torch.Tensor, quantized: BlockScaledWeight, hessian: torch.Tensor
) -> float:
    """sum_n (w_n - q_n)^T H (w_n - q_n) in float64. weight: [N, K]; hessian: [K, K]."""
    difference = weight.double() - quantized.dequantize(torch.float64)
    return float(((difference @ hessian.double()) * difference).sum())


def shifted_target(
    weight: torch.Tensor,
    hessian: torch.Tensor,
    input_shift: torch.Tensor,
    output_shift: torch.Tensor | None = None,
    damping: float = TARGET_DAMPING,
) -> torch.Tensor:
    """w* = w + (w D + R) (H + c I)^-1, which minimises E |w x' + r - w* x|^2 + c |w* - w|^2

    weight:       [N, K] float32
    hessian:      H = E[x x^T], [K, K] float32
    input_shift:  D = E[(x' - x) x^T], [K, K] float32
    output_shift: R = E[r x^T], [N, K] float32; absent counts as 0
    damping:      c as a share of the mean of H's diagonal
    """
    damped = hessian.clone()
    diagonal = damped.diagonal()
    mean = diagonal.mean()
    diagonal += damping * mean if mean > 0 else 1.0
    wanted = weight @ input_shift
    if output_shift is not None:
        wanted += output_shift
    return weight + torch.cholesky_solve(wanted.T, torch.linalg.cholesky(damped)).T


def quantize_hessian(
    weight: torch.Tensor, hessian: torch.Tensor, global_scale: torch.Tensor
) -> BlockScaledWeight:
    """Nearest codes, and for each block the scale with the least output error of that block alone:
    e^T H_bb e, H_bb the block's 16 x 16 part of H.

    weight: [N, K] float; hessian: [K, K] float32; global_scale: scalar float32
    """
    columns = weight.float().T.contiguous()
    scale, value = _sweep_all(columns, hessian, global_scale)
    return _pack(value, scale, global_scale)


def quantize_gptq(
    weight: torch.Tensor,
    hessian: torch.Tensor,
    global_scale: torch.Tensor,
    damping: float = DAMPING,
    descent_rounds: int = DESCENT_ROUNDS,
) -> BlockScaledWeight:
    """GPTQ on the scales of :func:`quantize_hessian`, columns in the order of falling H_kk, then
    rounds of descent over blocks (scale and codes) and over single codes.

    The order is undone before packing: the checkpoint needs no permutation when it is served.

    weight: [N, K] float; hessian: [K, K] float32; global_scale: scalar float32
    """
    columns = weight.float().T.contiguous()
    hessian = hessian.clone()
    diagonal = hessian.diagonal()
    mean = diagonal.mean()
    # Inputs that were never other than 0 tell nothing: any positive weight will do for them.
    diagonal[diagonal == 0] = mean if mean > 0 else 1.0
    scale, start = _sweep_all(columns, hessian, global_scale)
    diagonal += damping * diagonal.mean()
    value = _gptq_columns(columns, hessian, scale)
    # Column by column rounding may, on a tiny weight, end above where it began.
    value = _better_rows(columns, hessian, value, start)
    residual = hessian @ (columns - value)
    for _ in range(descent_rounds):
        _descend_blocks(hessian, residual, value, scale, global_scale)
        _descend_codes(hessian, residual, value, scale)
    return _pack(value, scale, global_scale)


def quantize_fp8_gptq(
    weight: torch.Tensor, hessian: torch.Tensor, damping: float = DAMPING
) -> tuple[torch.Tensor, torch.Tensor]:
    """GPTQ to E4M3 with one scale for a row, the row's absolute maximum over 448.

    weight: [N, K] float; hessian: [K, K] float32. Returns codes [N, K] e4m3 and scale [N, 1] f32.
    """
    codes, scale = quantize_fp8_per_row(weight)
    columns = weight.float().T.contiguous()
    hessian = hessian.clone()
    diagonal = hessian.diagonal()
    mean = diagonal.mean()
    diagonal[diagonal == 0] = mean if mean > 0 else 1.0
    diagonal += damping * diagonal.mean()
    start = (codes.float() * scale).T
    step = scale.T.expand(len(columns) // BLOCK, -1)
    value = _gptq_columns(columns, hessian, step, lambda x: to_e4m3(x).float())
    value = _better_rows(columns, hessian, value, start)
    return to_e4m3(value.T / scale), scale


def _sweep_all(
    columns: torch.Tensor, hessian: torch.Tensor, global_scale: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """For every block: (step [K/16, N], value [K, N]); columns: [K, N]. A step is a block scale
    times the global scale."""
    scales, values = [], []
    for start in range(0, len(columns), BLOCK):
        part = slice(start, start + BLOCK)
        scale, value, _ = _sweep_block(columns[part], hessian[part, part], global_scale)
        scales.append(scale)
        values.append(value)
    return torch.stack(scales), torch.cat(values)


def _sweep_block(
    target: torch.Tensor, hessian: torch.Tensor, global_scale: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The step, among the candidates, whose nearest codes v have the least
    error = (v - t)^T H_bb (v - t), for each row.

    target: [16, N]; hessian: [16, 16]. Returns step [N], value [16, N], error [N].
    """
    base = block_scale_rtn(target.T, global_scale)
    best_error = torch.full_like(target[0], torch.inf)
    best_step = torch.zeros_like(best_error)
    best_value = torch.zeros_like(target)
    for scale in block_scale_candidates(base):
        step = scale * global_scale
        value = round_e2m1(target / step).mul_(step)
        error = value - target
        error = (hessian @ error).mul_(error).sum(0)
        better = error < best_error
        best_error = torch.where(better, error, best_error)
        best_step = torch.where(better, step, best_step)
        best_value = torch.where(better, value, best_value)
    return best_step, best_value, best_error


def _gptq_columns(
    columns: torch.Tensor,
    hessian: torch.Tensor,
    step: torch.Tensor,
    nearest: Callable[[torch.Tensor], torch.Tensor] = round_e2m1,
) -> torch.Tensor:
    """Round column by column; what each loses is made up for by the columns not yet rounded.

    columns: [K, N]; step: [K/16, N]; nearest: to a number of the format. Returns values, [K, N].
    """
    order = hessian.diagonal().argsort(descending=True, stable=True)
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(hessian[order][:, order]))
    upper = torch.linalg.cholesky(inverse, upper=True)
    left = columns[order]
    steps = step[order // BLOCK]
    value = torch.empty_like(left)
    for start in range(0, len(left), _PANEL):
        end = min(start + _PANEL, len(left))
        panel = left[start:end]
        errors = torch.empty_like(panel)
        for i in range(end - start):
            k = start + i
            value[k] = nearest(panel[i] / steps[k]) * steps[k]
            errors[i] = (panel[i] - value[k]) / upper[k, k]
            panel[i + 1 :] -= torch.outer(upper[k, k + 1 : end], errors[i])
        left[end:] -= upper[start:end, end:].T @ errors
    result = torch.empty_like(value)
    result[order] = value
    return result


def _better_rows(
    columns: torch.Tensor, hessian: torch.Tensor, value: torch.Tensor, other: torch.Tensor
) -> torch.Tensor:
    def error(v: torch.Tensor) -> torch.Tensor:
        difference = columns - v
        return (hessian @ difference).mul_(difference).sum(0)

    return torch.where(error(value) <= error(other), value, other)


def _descend_blocks(
    hessian: torch.Tensor,
    residual: torch.Tensor,
    value: torch.Tensor,
    step: torch.Tensor,
    global_scale: torch.Tensor,
) -> None:
    """Give each block, all others fixed, another scale and its codes where that lowers the error.

    With r = H (w - q), a block's best real values are t = q_b + H_bb^-1 r_b, and its error is
    (v - t)^T H_bb (v - t) plus a constant: the problem of :func:`_sweep_block`. In place.
    """
    for start in range(0, len(value), BLOCK):
        part = slice(start, start + BLOCK)
        local = hessian[part, part]
        target = value[part] + torch.linalg.solve(local, residual[part])
        found_step, found, error = _sweep_block(target, local, global_scale)
        current = value[part] - target
        better = error < (local @ current).mul_(current).sum(0) * (1 - 1e-6)
        change = torch.where(better, found - value[part], 0.0)
        step[start // BLOCK] = torch.where(better, found_step, step[start // BLOCK])
        value[part] += change
        # The sum above rounds; a value has to be a code times its step exactly.
        value[part] = torch.where(better, found, value[part])
        residual -= hessian[:, part] @ change


def _descend_codes(
    hessian: torch.Tensor, residual: torch.Tensor, value: torch.Tensor, step: torch.Tensor
) -> None:
    """Give each code, all others fixed, its best: the nearest to q_k + r_k / H_kk. In place."""
    for start in range(0, len(value), _PANEL):
        end = min(start + _PANEL, len(value))
        local = hessian[start:end, start:end]
        part = residual[start:end].clone()
        changes = torch.empty_like(part)
        for i in range(end - start):
            k = start + i
            steps = step[k // BLOCK]
            best = round_e2m1((value[k] + part[i] / local[i, i]) / steps) * steps
            changes[i] = best - value[k]
            value[k] = best
            part[i + 1 :] -= torch.outer(local[i + 1 :, i], changes[i])
        residual -= hessian[:, start:end] @ changes


def _pack(value: torch.Tensor, step: torch.Tensor, global_scale: torch.Tensor) -> BlockScaledWeight:
    """value: [K, N]; step: [K/16, N], each an e4m3 number times the global scale."""
    scale = (step.T / global_scale).to(torch.float8_e4m3fn)
    blocks = value.T.reshape(len(scale), -1, BLOCK) / step.T[..., None]
    num_rows = len(scale)
    return BlockScaledWeight(
        pack_codes(encode_e2m1(blocks).flatten(1)),
        scale.contiguous(),
        global_scale.float().expand(num_rows).contiguous(),
        NVFP4,
    )
