# SPDX-License-Identifier: Apache-2.0
"""The pieces of scripts/rehearse.py: stand-ins for the driver, and the walk inside an environment
with vLLM for CUDA."""
