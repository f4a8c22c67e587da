# SPDX-License-Identifier: Apache-2.0
"""vLLM's multimodal model classes, where torchvision is not installed."""

import importlib
import importlib.util
import sys
from pathlib import Path

STUBS = Path(__file__).parent / "stubs"


def model_class(path):
    """The class of "module:class"; see stubs/torchvision."""
    if importlib.util.find_spec("torchvision") is None:
        sys.path.append(str(STUBS))
    module, _, name = path.partition(":")
    return getattr(importlib.import_module(module), name)
