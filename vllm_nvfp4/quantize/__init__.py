# SPDX-License-Identifier: Apache-2.0
"""Make NVFP4 checkpoints from 16-bit ones: without data, or calibrated on a text."""
