# SPDX-License-Identifier: Apache-2.0
"""Inside vLLM's worker: the logits of a prompt as the engine computed them, scored where they are.

vLLM returns prompt log-probabilities as Python objects, one for each token and each word of the
vocabulary: 50 million for a window of 1024 tokens. Here the engine's own ``compute_logits`` is
watched instead, on the same request, and what leaves the worker is three numbers per token.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

WORKER_EXTENSION = f"{__name__}.LogitsRecorder"
# Rows that are scored at once: bounds the float32 copies, [rows, V] each.
_ROWS = 128


class LogitsRecorder:
    """Methods that vLLM adds to its worker (``worker_extension_cls``), called by name."""

    def nvfp4_quality_watch(self) -> None:
        """Note every result of ``compute_logits`` from now on."""
        model = self.get_model()  # type: ignore[attr-defined]
        compute = model.compute_logits
        self._nvfp4_quality_logits: list[torch.Tensor] = []

        def watched(*args: Any, **options: Any) -> Any:
            logits = compute(*args, **options)
            # One row is the next token's. Under tensor parallelism one rank has all of them.
            if logits is not None and logits.shape[0] > 1:
                self._nvfp4_quality_logits.append(logits)
            return logits

        model.compute_logits = watched

    def nvfp4_quality_score(
        self, tokens: list[int], save: str | None, reference: str | None
    ) -> dict[str, list[float]] | None:
        """Scores of the window that was just run; see :func:`score`.

        tokens:    the window
        save:      file for its logits
        reference: file with another model's logits of the same window
        Returns None on a rank that has no logits.
        """
        found, self._nvfp4_quality_logits = self._nvfp4_quality_logits, []
        if not found:
            return None
        rows = len(tokens) - 1
        logits = torch.cat(found)[:rows] if len(found) > 1 else found[0][:rows]
        if logits.shape[0] < rows:
            raise RuntimeError(
                f"vLLM computed {logits.shape[0]} rows of logits for a prompt of {rows + 1} "
                f"tokens, {rows} were needed; report this with the version of vLLM"
            )
        if save is not None:
            torch.save(logits.cpu(), save)
        theirs = None
        if reference is not None:
            theirs = torch.load(reference, mmap=True, weights_only=True)
        return score(logits, torch.tensor(tokens[1:], device=logits.device), theirs)


def score(
    logits: torch.Tensor, targets: torch.Tensor, reference: torch.Tensor | None
) -> dict[str, list[float]]:
    """nll[t]  = -log p[t, targets[t]]
    kl[t]   = sum_v q[t, v] (log q[t, v] - log p[t, v])
    same[t] = argmax_v q[t, v] == argmax_v p[t, v]

    logits:    [T, V], p = softmax(logits) in float32
    targets:   [T] int64
    reference: [T, V], q = softmax(reference); without it only nll is given. May be on the CPU.
    Returns three lists of T numbers, in nats.
    """
    scores: dict[str, list[float]] = {"nll": []}
    if reference is not None:
        scores |= {"kl": [], "same": []}
    for start in range(0, logits.shape[0], _ROWS):
        mine = torch.log_softmax(logits[start : start + _ROWS].float(), -1)
        chosen = mine.gather(1, targets[start : start + _ROWS, None])[:, 0]
        scores["nll"] += (-chosen).tolist()
        if reference is None:
            continue
        part = reference[start : start + _ROWS].to(mine.device).float()
        theirs = torch.log_softmax(part, -1)
        difference = torch.where(theirs.isneginf(), 0.0, theirs - mine)
        scores["kl"] += (theirs.exp() * difference).sum(-1).tolist()
        scores["same"] += (theirs.argmax(-1) == mine.argmax(-1)).float().tolist()
    return scores


def window_file(folder: Path, index: int) -> str:
    """Where a window's logits are kept."""
    return str(folder / f"window-{index:05d}.pt")
