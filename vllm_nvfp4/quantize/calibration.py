# SPDX-License-Identifier: Apache-2.0
"""The text that a calibrated method looks at, as samples of equal length."""

from __future__ import annotations

import hashlib
import lzma
from dataclasses import dataclass
from importlib import resources
from pathlib import Path

import torch

from vllm_nvfp4.checkpoints.spec import CheckpointError

BUILTIN = "builtin"


@dataclass(frozen=True)
class Calibration:
    """text:        ``builtin``, or the path of a UTF-8 text file
    num_samples: sequences that the model runs on
    length:      tokens in each
    seed:        which parts of the text they are
    """

    text: str = BUILTIN
    num_samples: int = 16
    length: int = 1024
    seed: int = 0

    def read(self) -> str:
        """The text. Raises OSError, or CheckpointError where it is not UTF-8."""
        if self.text == BUILTIN:
            packed = resources.files(__package__).joinpath("calibration.txt.xz").read_bytes()
            return lzma.decompress(packed).decode()
        try:
            return Path(self.text).expanduser().read_text("utf-8")
        except UnicodeDecodeError as error:
            raise CheckpointError(
                self.text, "calibration text", str(error), "plain UTF-8 text", "Convert the file."
            ) from error

    def identity(self) -> dict[str, object]:
        """What makes two calibrations the same."""
        digest = hashlib.sha256(self.read().encode()).hexdigest()
        return {
            "calibration": digest,
            "samples": self.num_samples,
            "sample_length": self.length,
            "seed": self.seed,
        }

    def samples(self, folder: Path) -> torch.Tensor:
        """[num_samples, length] int64: parts of the text that do not overlap, drawn by the seed.

        folder: where the tokenizer is. Raises CheckpointError where the text is too short.
        """
        from transformers import AutoTokenizer

        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
        tokens = tokenizer(self.read(), add_special_tokens=False, verbose=False).input_ids
        available = len(tokens) // self.length
        if available < self.num_samples:
            raise CheckpointError(
                self.text,
                "calibration text",
                f"{len(tokens)} tokens, {available} samples of {self.length}",
                f"{self.num_samples} samples, {self.num_samples * self.length} tokens",
                "Give a longer text, or fewer or shorter samples.",
            )
        generator = torch.Generator().manual_seed(self.seed)
        chosen = torch.randperm(available, generator=generator)[: self.num_samples].sort().values
        parts = torch.tensor(tokens[: available * self.length]).view(available, self.length)
        return parts[chosen]
