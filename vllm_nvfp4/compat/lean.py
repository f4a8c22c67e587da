# SPDX-License-Identifier: Apache-2.0
"""Half of vLLM's import, for a process that asks about a model's layers and serves nothing.

vLLM and transformers import what they can do without where it is installed, which takes as long as
all the rest. They are told that it is not.
"""

from __future__ import annotations

import sys
from typing import Any

# Asked for in a `try`, or by find_spec: for traces, for other executors, and for assisted decoding.
_OPTIONAL = ("opentelemetry", "pandas", "pyarrow", "ray", "scipy", "sklearn")


def leave_out() -> None:
    """Import none of the optional packages from now on. To be called before vLLM is imported."""
    for name in _OPTIONAL:
        sys.modules.setdefault(name, None)  # type: ignore[arg-type]


def is_missed(said: str) -> bool:
    """Whether an error may be for want of an optional package."""
    return any(name in said for name in _OPTIONAL)


def look_here() -> None:
    """Have vLLM look at a model's class in this process, not in one that imports vLLM again, as it
    does before it starts a GPU."""
    from vllm.model_executor.models import registry

    vars(registry)["_run_in_subprocess"] = _here


def _here(function: Any) -> Any:
    return function()
