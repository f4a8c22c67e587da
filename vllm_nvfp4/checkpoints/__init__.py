# SPDX-License-Identifier: Apache-2.0
"""One file per on-disk dialect, all yielding the types of :mod:`vllm_nvfp4.checkpoints.spec`."""

from vllm_nvfp4.checkpoints.detect import detect, read_config

__all__ = ["detect", "read_config"]
