# SPDX-License-Identifier: Apache-2.0
"""What vLLM's layers become: one file for each kind of layer."""
