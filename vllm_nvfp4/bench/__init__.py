# SPDX-License-Identifier: Apache-2.0
"""Speed, latency, memory and energy of a served model, measured by vLLM's own benchmark."""
