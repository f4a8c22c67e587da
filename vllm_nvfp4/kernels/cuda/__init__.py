# SPDX-License-Identifier: Apache-2.0
"""Kernels for NVIDIA GPUs: which there are, how they are built, chosen and launched."""
