# SPDX-License-Identifier: Apache-2.0
"""Whether vLLM will load a model: its class is built and loaded without memory and without data."""
