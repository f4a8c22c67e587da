# SPDX-License-Identifier: Apache-2.0
"""Kernels for x86-64 CPUs, compiled while a model loads."""
