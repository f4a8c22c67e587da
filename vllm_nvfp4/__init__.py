# SPDX-License-Identifier: Apache-2.0
"""Serve NVFP4 and MXFP4 models with vLLM on NVIDIA Ada GPUs.

Importing this package imports neither vLLM, nor torch, nor CUDA: vLLM calls :func:`register`
in every one of its processes, also in those that never touch a model.
"""

from vllm_nvfp4._version import __version__

__all__ = ["__version__", "register"]


def register() -> None:
    """Register the method ``nvfp4`` with vLLM (entry point group ``vllm.general_plugins``)."""
    from vllm_nvfp4.plugin import register as register_plugin

    register_plugin()
