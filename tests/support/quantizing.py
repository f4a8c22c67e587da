# SPDX-License-Identifier: Apache-2.0
"""What the tests of quantisers share: models with a tokenizer, moments, runs that are stopped."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from families import write_family

from vllm_nvfp4.checkpoints import write
from vllm_nvfp4.quantize.calibrated import Calibrated
from vllm_nvfp4.testing.tiny_models import build_tokenizer


def write_with_tokenizer(folder: Path, family: str) -> None:
    write_family(folder, family)
    build_tokenizer().save_pretrained(folder)


def noted_moments(monkeypatch: pytest.MonkeyPatch) -> dict[str, torch.Tensor]:
    """Weight -> H that it was rounded for, filled as calibrated runs go on."""
    found: dict[str, torch.Tensor] = {}
    plain = Calibrated._round

    def record(self, names, target, hessian, *rest):
        found.update(dict.fromkeys(names, hessian))
        return plain(self, names, target, hessian, *rest)

    monkeypatch.setattr(Calibrated, "_round", record)
    return found


@contextmanager
def interrupted_at(monkeypatch: pytest.MonkeyPatch, prefix: str) -> Iterator[None]:
    """Ctrl-C when the layer of this prefix is about to be written."""
    whole = write._Job._write_unit

    def stopped(self, unit, writer):
        if unit.prefix == prefix:
            raise KeyboardInterrupt
        whole(self, unit, writer)

    with monkeypatch.context() as patch:
        patch.setattr(write._Job, "_write_unit", stopped)
        yield
