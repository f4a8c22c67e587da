# SPDX-License-Identifier: Apache-2.0
"""The methods of `quantize`, and what each looks at. Imports nothing heavy."""

DATA_FREE = ("rtn", "mse")
CALIBRATED = ("hessian", "gptq", "mr-gptq")
# What an error of the calibrated ones advises.
OTHER_METHOD = "Use --method mse, which needs no forward pass."


def follows_exact(method: str) -> bool:
    """Whether a calibrated method looks at the unquantised model's inputs too."""
    return method in ("gptq", "mr-gptq")
