# SPDX-License-Identifier: Apache-2.0
"""What starts vLLM's server and waits for it, for commands, benchmarks and scripts."""
