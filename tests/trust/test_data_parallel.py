# SPDX-License-Identifier: Apache-2.0
"""Two data-parallel engines that share the experts of a model: each gives the tokens of one alone.

Each rank has prompts of its own, of different lengths and numbers. One engine at a time may hold
but one request, so that it runs on while the other, done, takes part with no tokens of its own.
"""

import json
import os
import socket
import subprocess
import sys

import pytest

from vllm_nvfp4.testing.checkpoints import extract_fixture, give_shards_their_own_scale
from vllm_nvfp4.testing.engine import ENVIRONMENT, ask_reference, reference_model

pytestmark = [pytest.mark.trust, pytest.mark.vllm]

PROMPTS = [[[3, 17, 200, 45, 99, 120, 7, 64, 250, 31, 12, 180], [5, 6, 7]], [[100, 20, 30, 40]]]
NUM_TOKENS = 8
RANK = """
import json, os, pathlib, sys, time
from vllm import LLM, SamplingParams

def main():
    folder, options, prompts, num_tokens = sys.argv[1], *map(json.loads, sys.argv[2:])
    llm = LLM(folder, **options)
    parameters = SamplingParams(temperature=0, max_tokens=num_tokens, ignore_eos=True)
    requests = [{"prompt_token_ids": prompt} for prompt in prompts]
    for output in llm.generate(requests, parameters, use_tqdm=False):
        print("TOKENS", json.dumps(list(output.outputs[0].token_ids)), flush=True)
    # A rank that ends takes the others with it.
    here = pathlib.Path(folder).parent
    (here / ("done" + os.environ["VLLM_DP_RANK"])).touch()
    while len(list(here.glob("done?"))) < 2:
        time.sleep(0.2)

if __name__ == "__main__":
    main()
"""


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@pytest.mark.parametrize(
    ("name", "is_expert_parallel"),
    [("moe_modelopt/nvfp4-qwen3", True), ("moe_compressed_tensors/mxfp4a16-qwen2", False)],
)
def test_two_data_parallel_ranks_give_the_tokens_of_one(name, is_expert_parallel, tmp_path):
    import torch

    folder = extract_fixture(name, tmp_path)
    if "mxfp4" not in name:
        give_shards_their_own_scale(folder)
    reference = reference_model(folder, torch.float32)
    script, port = tmp_path / "rank.py", str(free_port())
    script.write_text(RANK)
    options = {
        "dtype": "float32", "quantization": "nvfp4", "enforce_eager": True, "max_model_len": 128,
        "max_num_seqs": 1, "kv_cache_memory_bytes": 2**26,
        "additional_config": {"nvfp4": {"kv_cache": "keep"}},
        "enable_expert_parallel": is_expert_parallel,
    }  # fmt: skip
    ranks = []
    for rank, prompts in enumerate(PROMPTS):
        arguments = [str(folder), *map(json.dumps, (options, prompts, NUM_TOKENS))]
        variables = {
            "VLLM_DP_RANK": str(rank), "VLLM_DP_RANK_LOCAL": str(rank), "VLLM_DP_SIZE": "2",
            "VLLM_DP_MASTER_IP": "127.0.0.1", "VLLM_DP_MASTER_PORT": port, "OMP_NUM_THREADS": "1",
            "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        }  # fmt: skip
        with (tmp_path / f"rank{rank}.log").open("w") as log:
            ranks.append(
                subprocess.Popen(
                    [sys.executable, str(script), *arguments],
                    env=os.environ | ENVIRONMENT | variables, stdout=log, stderr=log,
                )
            )  # fmt: skip
    try:
        statuses = [process.wait(timeout=1500) for process in ranks]
    finally:
        for process in ranks:
            process.kill()
    logs = [(tmp_path / f"rank{rank}.log").read_text() for rank in range(len(PROMPTS))]
    assert statuses == [0, 0], "\n".join(log[-3000:] for log in logs)
    for log, prompts in zip(logs, PROMPTS, strict=True):
        found = [json.loads(line[7:]) for line in log.splitlines() if line.startswith("TOKENS")]
        assert found == [ask_reference(reference, p, NUM_TOKENS).tokens for p in prompts]
