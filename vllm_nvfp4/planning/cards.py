# SPDX-License-Identifier: Apache-2.0
"""From a card as people write it to a row of gpus.py."""

from __future__ import annotations

import difflib
import re

from vllm_nvfp4.gpus import GPUS, Gpu

# Names that stand for a device whose own name is longer, in the form of :func:`_key`.
_ALIASES = {
    "rtx4060ti16gb": "GeForce RTX 4060 Ti",
    "a100": "A100-SXM4-80GB",
    "a10080gb": "A100-SXM4-80GB",
    "a10040gb": "A100-SXM4-40GB",
    "a100pcie": "A100 80GB PCIe",
    "h100": "H100 80GB HBM3",
    "h100sxm": "H100 80GB HBM3",
}


def find_card(text: str) -> Gpu:
    """The card that ``text`` names: "RTX4090", "4090", "rtx-4060 mobile", "RTX 5000 Ada", "L40".

    Raises ValueError with the nearest names for a card that is not known.
    """
    by_key = {_key(gpu.name): gpu for gpu in GPUS}
    by_key |= {key: by_key[_key(name)] for key, name in _ALIASES.items()}
    key = _key(text)
    found = by_key.get(key) or by_key.get(f"rtx{key}")
    if found is not None:
        return found
    near = difflib.get_close_matches(key, by_key, 3, 0.6)
    near += [k for k in difflib.get_close_matches(f"rtx{key}", by_key, 3, 0.6) if k not in near]
    names = list(dict.fromkeys(by_key[k].name for k in near))[:3]
    known = ", ".join(gpu.name for gpu in GPUS)
    hint = f"did you mean {' or '.join(names)}?" if names else f"cards: {known}."
    raise ValueError(f"--gpu {text}: unknown; {hint}")


def _key(text: str) -> str:
    """Letters and digits alone, without the words that people leave out."""
    words = re.findall(r"[a-z0-9]+", text.lower().replace("mobile", "laptop"))
    dropped = ("nvidia", "geforce", "generation", "gpu", "tesla", "quadro")
    return "".join(word for word in words if word not in dropped)
