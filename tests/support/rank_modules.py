# SPDX-License-Identifier: Apache-2.0
"""What a rank on a CPU imports, for the process that ranks are forked off (see forked_ranks)."""

import gc

import vllm.model_executor.models.llama
import vllm.v1.executor.multiproc_executor
import vllm.v1.worker.cpu_worker

import vllm_nvfp4.config
import vllm_nvfp4.layers.linear

__all__ = ["vllm", "vllm_nvfp4"]

# Each rank collects garbage several times, and would go through all of these.
gc.collect()
gc.freeze()
