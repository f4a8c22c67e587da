# SPDX-License-Identifier: Apache-2.0
"""What the tests of quantisers share: models with a tokenizer, moments, runs that are stopped, what
transformers makes of a folder."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from families import FAMILIES, write_family

from vllm_nvfp4.checkpoints import write
from vllm_nvfp4.quantize.calibrated import Calibrated
from vllm_nvfp4.testing.architectures import ARCHITECTURES, write_architecture
from vllm_nvfp4.testing.engine import plain_model, reference_model
from vllm_nvfp4.testing.tiny_models import build_tokenizer


def write_with_tokenizer(folder: Path, family: str) -> None:
    if family in FAMILIES:
        write_family(folder, family)
    else:
        write_architecture(folder, ARCHITECTURES[family])
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


def transformers_reading(folder: Path, source: Path) -> tuple[set[str], bool]:
    """(Stored tensors that AutoModelForCausalLM has no place for, whether its logits are those of
    the dequantised weights) of a compressed-tensors folder; it computes weights in BF16."""
    from transformers import AutoModelForCausalLM

    theirs, report = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.bfloat16, output_loading_info=True
    )
    assert not any(v for k, v in report.items() if k != "unexpected_keys"), report
    tokens = torch.randint(4, 260, (2, 24), generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        found = theirs.eval()(tokens).logits.float()
        ours = reference_model(folder, torch.bfloat16)(tokens).logits.float()
        exact = plain_model(source, torch.bfloat16)(tokens).logits.float()
    distance = (found - ours).norm()
    is_near = distance < 0.02 * ours.norm() and (found - exact).norm() > 3 * distance
    return set(report["unexpected_keys"]), bool(is_near)
