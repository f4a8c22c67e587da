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

import math
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import torch

from vllm_nvfp4.numerics.codes import encode_e2m1, pack_codes, round_e2m1_
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
# On a CPU, rows of the weight that one thread quantises at a time, at most.
_PART_ROWS = 768
# Rows for which all scales of a block are tried at once: few enough to stay in a core's cache.
_SWEEP_ROWS = 384
# Added to the diagonal of H, as a share of its mean: more than makes H invertible. What 16,000
# tokens say of the inputs' rare directions does not hold for other text, and rounding leans on it.
DAMPING = 0.1
# The same for the target, a regression on the calibration text. With 0.05, SmolLM2-135M had a KL of
# 0.009 on that text and of 0.080 on other articles; with 2, and the above, 0.066 there.
TARGET_DAMPING = 2.0
# Rounds of descent after GPTQ. Each lowers the error, the third by less than a tenth of the first.
DESCENT_ROUNDS = 1


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

    def choose(columns: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return _sweep_all(columns, hessian, global_scale)

    return _by_rows(choose, weight, global_scale)


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
    undamped, hessian = _invertible(hessian, damping)
    order, upper = _inverse_factor(hessian)
    blocks = hessian.unflatten(0, (-1, BLOCK)).unflatten(2, (-1, BLOCK)).diagonal(dim1=0, dim2=2)
    local_inverse = torch.linalg.inv(blocks.permute(2, 0, 1))

    def choose(columns: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        step, start = _sweep_all(columns, undamped, global_scale)
        value = _gptq_columns(columns, order, upper, step)
        value, residual = _better_rows(columns, hessian, value, start)
        for _ in range(descent_rounds):
            _descend_blocks(hessian, local_inverse, residual, value, step, global_scale)
            _descend_codes(hessian, residual, value, step)
        return step, value

    return _by_rows(choose, weight, global_scale)


def quantize_fp8_gptq(
    weight: torch.Tensor, hessian: torch.Tensor, damping: float = DAMPING
) -> tuple[torch.Tensor, torch.Tensor]:
    """GPTQ to E4M3 with one scale for a row, the row's absolute maximum over 448.

    weight: [N, K] float; hessian: [K, K] float32. Returns codes [N, K] e4m3 and scale [N, 1] f32.
    """
    codes, scale = quantize_fp8_per_row(weight)
    columns = weight.float().T.contiguous()
    _, hessian = _invertible(hessian, damping)
    start = (codes.float() * scale).T
    step = scale.T.expand(len(columns) // BLOCK, -1)
    value = _gptq_columns(
        columns,
        *_inverse_factor(hessian),
        step,
        lambda x, scratch: x.copy_(to_e4m3(x)),
    )
    value, _ = _better_rows(columns, hessian, value, start)
    return to_e4m3(value.T / scale), scale


def _invertible(hessian: torch.Tensor, damping: float) -> tuple[torch.Tensor, torch.Tensor]:
    """(H with a positive diagonal, the same with its mean times ``damping`` added to it)."""
    undamped = hessian.clone()
    diagonal = undamped.diagonal()
    mean = diagonal.mean()
    # Inputs that were never other than 0 tell nothing: any positive weight will do for them.
    diagonal[diagonal == 0] = mean if mean > 0 else 1.0
    damped = undamped.clone()
    damped.diagonal().add_(damping * diagonal.mean())
    return undamped, damped


def _inverse_factor(hessian: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(Columns in the order of falling H_kk, [K]; the upper Cholesky factor of H^-1 in it)."""
    order = hessian.diagonal().argsort(descending=True, stable=True)
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(hessian[order][:, order]))
    return order, torch.linalg.cholesky(inverse, upper=True)


def _by_rows(
    choose: Callable[[torch.Tensor], tuple[torch.Tensor, torch.Tensor]],
    weight: torch.Tensor,
    global_scale: torch.Tensor,
) -> BlockScaledWeight:
    """``choose`` on the weight's columns, [K, N], in parts of N: rows do not know of each other.

    On a CPU a thread for each core, with no threads of its own: most steps are small. The parts
    do not depend on the number of cores, and so the result does not.
    """
    num_rows = len(weight)
    if weight.device.type != "cpu":
        return _pack(*choose(weight.float().T.contiguous()), global_scale)
    num_parts = min(num_rows, 2 * -(-num_rows // (2 * _PART_ROWS)))
    parts = [part.float().T.contiguous() for part in weight.tensor_split(num_parts)]
    num_threads = torch.get_num_threads()
    with ThreadPoolExecutor(num_threads, initializer=torch.set_num_threads, initargs=(1,)) as pool:
        found = list(pool.map(choose, parts))
    torch.set_num_threads(num_threads)  # what torch gives to threads that start from now on
    step, value = (torch.cat(part, 1) for part in zip(*found, strict=True))
    return _pack(value, step, global_scale)


def _sweep_all(
    columns: torch.Tensor, hessian: torch.Tensor, global_scale: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """For every block: (step [K/16, N], value [K, N]); columns: [K, N]. A step is a block scale
    times the global scale."""
    scratch = _Scratch(columns.device)
    steps, values = [], []
    for start in range(0, len(columns), BLOCK):
        part = slice(start, start + BLOCK)
        step, value, _ = _sweep_block(columns[part], hessian[part, part], global_scale, scratch)
        steps.append(step)
        values.append(value)
    return torch.stack(steps), torch.cat(values)


def _sweep_block(
    target: torch.Tensor, hessian: torch.Tensor, global_scale: torch.Tensor, scratch: _Scratch
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The step, among the candidates, whose nearest codes v have the least
    error = (v - t)^T H_bb (v - t), for each row.

    target: [16, N]; hessian: [16, 16]. Returns step [N], value [16, N], error [N].
    """
    found = []
    for part in target.split(_SWEEP_ROWS, dim=1):
        # [candidates, n]; everything else is [16, candidates, n]
        step = block_scale_candidates(block_scale_rtn(part.T, global_scale)) * global_scale
        value, error, product = scratch.like(BLOCK, *step.shape)
        torch.div(part[:, None], step, out=value)
        round_e2m1_(value, error).mul_(step)
        torch.sub(value, part[:, None], out=error)
        torch.mm(hessian, error.flatten(1), out=product.flatten(1))
        best, index = product.mul_(error).sum(0).min(0)
        chosen = value.gather(1, index.expand(BLOCK, 1, -1))[:, 0]
        found.append((step.gather(0, index[None])[0], chosen, best))
    steps, values, errors = zip(*found, strict=True)
    return torch.cat(steps), torch.cat(values, 1), torch.cat(errors)


class _Scratch:
    """Memory that the sweep of one block after the other is computed in."""

    def __init__(self, device: torch.device) -> None:
        self._memory = torch.empty(3, 0, device=device)

    def like(self, *shape: int) -> tuple[torch.Tensor, ...]:
        """Three tensors of a shape, float32; those of the last call are overwritten."""
        size = math.prod(shape)
        if self._memory.shape[1] < size:
            self._memory = self._memory.new_empty(3, size)
        return tuple(part[:size].view(shape) for part in self._memory)


def _gptq_columns(
    columns: torch.Tensor,
    order: torch.Tensor,
    upper: torch.Tensor,
    step: torch.Tensor,
    round_: Callable[[torch.Tensor, torch.Tensor], torch.Tensor] = round_e2m1_,
) -> torch.Tensor:
    """Round column by column; what each loses is made up for by the columns not yet rounded.

    columns: [K, N]; order, upper: of :func:`_inverse_factor`; step: [K/16, N]; round_: in place to
    a number of the format, with memory for it. Returns the values, [K, N].
    """
    left = columns[order]
    steps = step[order // BLOCK]
    value = torch.empty_like(left)
    for start in range(0, len(left), _PANEL):
        end = min(start + _PANEL, len(left))
        panel = left[start:end]
        errors = torch.empty_like(panel)
        for i in range(end - start):
            k = start + i
            torch.div(panel[i], steps[k], out=value[k])
            round_(value[k], errors[i]).mul_(steps[k])
            torch.sub(panel[i], value[k], out=errors[i]).div_(upper[k, k])
            panel[i + 1 :].addr_(upper[k, k + 1 : end], errors[i], alpha=-1)
        left[end:].addmm_(upper[start:end, end:].T, errors, alpha=-1)
    result = torch.empty_like(value)
    result[order] = value
    return result


def _better_rows(
    columns: torch.Tensor, hessian: torch.Tensor, value: torch.Tensor, other: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """(value or other, row by row, H times what it lacks): column by column rounding may, on a tiny
    weight, end above where it began."""
    lacking = [columns - v for v in (value, other)]
    residual = [hessian @ x for x in lacking]
    error = [(r * x).sum(0) for r, x in zip(residual, lacking, strict=True)]
    better = error[0] <= error[1]
    return torch.where(better, value, other), torch.where(better, residual[0], residual[1])


def _descend_blocks(
    hessian: torch.Tensor,
    local_inverse: torch.Tensor,
    residual: torch.Tensor,
    value: torch.Tensor,
    step: torch.Tensor,
    global_scale: torch.Tensor,
) -> None:
    """Give each block, all others fixed, another scale and its codes where that lowers the error.

    With r = H (w - q), a block's best real values are t = q_b + H_bb^-1 r_b, and its error is
    (v - t)^T H_bb (v - t) plus a constant: the problem of :func:`_sweep_block`. In place.

    local_inverse: [K/16, 16, 16], the H_bb^-1
    """
    scratch = _Scratch(value.device)
    for start in range(0, len(value), _PANEL):
        end = min(start + _PANEL, len(value))
        part = residual[start:end].clone()
        changes = torch.empty_like(part)
        for first in range(start, end, BLOCK):
            block, last = first // BLOCK, first + BLOCK
            here = slice(first - start, last - start)
            local = hessian[first:last, first:last]
            lacking = local_inverse[block] @ part[here]  # t - q_b
            old = value[first:last]
            new_step, new, error = _sweep_block(old + lacking, local, global_scale, scratch)
            better = error < (local @ lacking).mul_(lacking).sum(0) * (1 - 1e-6)
            new = torch.where(better, new, old)
            change = torch.sub(new, old, out=changes[here])
            step[block] = torch.where(better, new_step, step[block])
            value[first:last] = new
            part[last - start :].addmm_(hessian[last:end, first:last], change, alpha=-1)
        residual.addmm_(hessian[:, start:end], changes, alpha=-1)


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
            best = part[i].div(local[i, i]).add_(value[k]).div_(steps)
            round_e2m1_(best, changes[i]).mul_(steps)
            torch.sub(best, value[k], out=changes[i])
            value[k] = best
            part[i + 1 :].addr_(local[i + 1 :, i], changes[i], alpha=-1)
        residual.addmm_(hessian[:, start:end], changes, alpha=-1)


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
