# SPDX-License-Identifier: Apache-2.0
"""Load on a real server: many clients at once, some of which hang up, and what is left after it."""

from __future__ import annotations

import asyncio
import http.client
import io
import json
import os
import random
import re
import signal
import time
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median

import aiohttp
import psutil
from serving_cases import KEEP_KV

from vllm_nvfp4.serving.server import Server

MODEL = "tiny"
# float32, so that a request gives the same tokens in every batch.
FLAGS = [
    *("--served-model-name", MODEL, "--skip-tokenizer-init", "--enforce-eager"),
    *("--dtype", "float32", "--additional-config", json.dumps(KEEP_KV)),
    *("--max-model-len", "256", "--max-num-seqs", "64", "--kv-cache-memory-bytes", str(2**26)),
    "--disable-uvicorn-access-log",
]


def server(folder: Path, log: Path) -> Server:
    return Server([str(folder), *FLAGS], log)


def mixed_requests(number: int = 24) -> list[dict]:
    """Bodies with 1 to 150 tokens of prompt and 1 to 64 of answer."""
    chance = random.Random(0)
    return [
        {
            "model": MODEL,
            "prompt": [chance.randrange(3, 280) for _ in range(chance.randint(1, 150))],
            "max_tokens": chance.choice([1, 2, 8, 16, 32, 64]),
            "temperature": 0,
            "ignore_eos": True,
            "detokenize": False,
            "return_token_ids": True,
        }
        for _ in range(number)
    ]


@dataclass
class Load:
    """What the clients saw. rss: (seconds, bytes of all the server's processes)."""

    answers: int = 0
    cancelled: int = 0
    wrong: int = 0
    errors: list[str] = field(default_factory=list)
    rss: list[tuple[float, int]] = field(default_factory=list)

    def growth(self) -> float:
        """Relative growth of the memory from the second to the last fifth of the time."""
        end = self.rss[-1][0]
        fifths = [[b for t, b in self.rss if i * end / 5 <= t <= (i + 1) * end / 5] for i in (1, 4)]
        early, late = map(median, fifths)
        return late / early - 1


async def _ask(session: aiohttp.ClientSession, url: str, body: dict) -> list[int]:
    async with session.post(f"{url}/v1/completions", json=body) as response:
        text = await response.text()
        if response.status != 200:
            raise ValueError(f"status {response.status}: {text[:200]}")
        return json.loads(text)["choices"][0]["token_ids"]


def put_load(url: str, pid: int, clients: int, seconds: float) -> Load:
    """``clients`` requests in flight for the given time; every tenth client hangs up midway.

    Answers are compared with what each request got when it was alone.
    """
    return asyncio.run(_put_load(url, pid, clients, seconds))


async def _put_load(url: str, pid: int, clients: int, seconds: float) -> Load:
    load = Load()
    bodies = mixed_requests()
    # A connection each: one that is kept may be closed by the server just as it is used again.
    connector = aiohttp.TCPConnector(limit=0, force_close=True)
    timeout = aiohttp.ClientTimeout(total=600)
    async with aiohttp.ClientSession(connector=connector, timeout=timeout) as session:
        alone = [await _ask(session, url, body) for body in bodies]
        start = time.monotonic()

        async def client(number: int) -> None:
            chance = random.Random(number)
            while time.monotonic() - start < seconds:
                case = chance.randrange(len(bodies))
                request = asyncio.create_task(_ask(session, url, bodies[case]))
                patience = chance.uniform(0, 1) if chance.random() < 0.1 else None
                try:
                    tokens = await asyncio.wait_for(request, patience)
                    load.answers += 1
                    load.wrong += tokens != alone[case]
                except TimeoutError:
                    load.cancelled += 1
                except (aiohttp.ClientError, ValueError) as error:
                    load.errors.append(repr(error))

        async def watch() -> None:
            while True:
                load.rss.append((time.monotonic() - start, resident_bytes(pid)))
                await asyncio.sleep(seconds / 100)

        watching = asyncio.create_task(watch())
        await asyncio.gather(*map(client, range(clients)))
        watching.cancel()
    return load


def processes(pid: int) -> list[psutil.Process]:
    """The server and all that it started."""
    root = psutil.Process(pid)
    return [root, *root.children(recursive=True)]


def resident_bytes(pid: int) -> int:
    """Of all processes together; what they share counts in each."""
    return sum(process.memory_info().rss for process in processes(pid))


def kill_midway(folder: Path, log: Path, target: str) -> tuple[int, str, str]:
    """End one of a server's processes while it answers: exit status, its log, the client's error.

    target: the process's name in vLLM's log, "EngineCore" or "Worker". Process titles do not tell:
    some kernels keep the command line that a process was started with.
    """
    body = mixed_requests()[0] | {"prompt": [5, 6, 7], "max_tokens": 250}
    with server(folder, log) as running:
        running.wait_ready(io.StringIO())
        process = running._process
        victim = re.search(rf"\({target} pid=(\d+)\)", log.read_text())
        if victim is None:
            raise ValueError(f"{log}: no line of a process called {target}")
        with ThreadPoolExecutor(1) as pool:
            asking = pool.submit(_ask_until_an_error, running.url, body)
            while not gauge(running.url, "vllm:request_success_total"):
                time.sleep(0.2)
            os.kill(int(victim[1]), signal.SIGKILL)
            error = asking.result(120)
        status = process.wait(120)
    return status, log.read_text(), error


def _ask_until_an_error(url: str, body: dict) -> str:
    request = urllib.request.Request(
        f"{url}/v1/completions", json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    while True:
        try:
            urllib.request.urlopen(request, timeout=100).read()
        except (OSError, http.client.HTTPException) as error:
            return repr(error)


def gauge(url: str, name: str) -> float:
    """The sum of one of vLLM's metrics."""
    text = urllib.request.urlopen(f"{url}/metrics").read().decode()
    values = re.findall(rf"^{re.escape(name)}{{.*}} (\S+)$", text, re.MULTILINE)
    if not values:
        raise ValueError(f"{name} is not among the server's metrics")
    return sum(map(float, values))


def wait_until_idle(url: str, seconds: float = 60) -> dict[str, float]:
    """The gauges that are not back at zero when the time is over; an empty dict is the aim."""
    names = ("vllm:num_requests_running", "vllm:num_requests_waiting", "vllm:kv_cache_usage_perc")
    deadline = time.monotonic() + seconds
    while True:
        left = {name: value for name in names if (value := gauge(url, name))}
        if not left or time.monotonic() > deadline:
            return left
        time.sleep(0.2)
