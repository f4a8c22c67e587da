# SPDX-License-Identifier: Apache-2.0
"""vLLM's multimodal model classes, where torchvision is not installed."""

import importlib
import importlib.util
import os
import sys
from pathlib import Path

STUBS = Path(__file__).parent / "stubs"


def install():
    """Let them be imported, in vLLM's own processes too; see stubs/torchvision."""
    if importlib.util.find_spec("torchvision") is None:
        sys.path.append(str(STUBS))
        paths = [os.environ.get("PYTHONPATH", ""), str(STUBS)]
        os.environ["PYTHONPATH"] = os.pathsep.join(p for p in paths if p)


def model_class(path):
    """The class of "module:class"."""
    module, _, name = path.partition(":")
    return getattr(importlib.import_module(module), name)
