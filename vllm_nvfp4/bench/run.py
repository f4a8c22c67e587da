# SPDX-License-Identifier: Apache-2.0
"""One run: servers in turns (A B, A B, ...), each measured by vLLM's benchmark, saved as it goes.

Batch table: ``batch`` requests at once, ``batch`` of them. Load: requests that arrive at random at
a mean rate. Prompts are random tokens, new ones in every measurement; prefix caching is off.
"""

from __future__ import annotations

import os
import re
import shlex
import time
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from vllm_nvfp4.bench import limits
from vllm_nvfp4.bench.client import Client, ClientError
from vllm_nvfp4.bench.meters import CpuMeter, GpuMeter, Watch
from vllm_nvfp4.bench.results import BATCH, RATE, Measurement, Results, VariantRecord
from vllm_nvfp4.bench.variants import Variant
from vllm_nvfp4.compat import cpu_metadata
from vllm_nvfp4.gpus import Gpu
from vllm_nvfp4.serving import host
from vllm_nvfp4.serving.arguments import read_flags
from vllm_nvfp4.serving.progress import step
from vllm_nvfp4.serving.server import Server, ServerError
from vllm_nvfp4.testing import machine

# Shares of the throughput without pause at which load is measured where no rates are given.
AUTO_SHARES = (0.25, 0.5, 0.75)
# What decides speed besides the flags, recorded where it is set.
_ENVIRONMENT = (
    "CUDA_VISIBLE_DEVICES", "OMP_NUM_THREADS", "VLLM_CPU_OMP_THREADS_BIND",
    "VLLM_CPU_KVCACHE_SPACE", "VLLM_BATCH_INVARIANT", "VLLM_NVFP4_ACTIVATION", "VLLM_NVFP4_LM_HEAD",
    "VLLM_NVFP4_EMBEDDING", "VLLM_NVFP4_KV_CACHE", "VLLM_NVFP4_ONLINE_FORMAT", "VLLM_NVFP4_CPU_ISA",
)  # fmt: skip
# Load average per core, before the run, above which a machine counts as busy.
_BUSY = 0.5
# Tokens of each request in the run that no one reads: kernels are compiled and caches filled.
_WARM_UP_TOKENS = 4
# What a worker says of its KV cache: set by a flag on a GPU, profiled on a GPU, on a CPU.
_KV_BYTES = (
    re.compile(r"reserved ([\d.]+) GiB memory for KV"),
    re.compile(r"Available KV cache memory: ([\d.]+) GiB"),
    re.compile(r"\(([\d.]+)/[\d.]+\) GiB for KV cache"),
)
# What kv_cache.py says where it makes the cache FP8; vLLM's metrics keep saying "auto" then.
_KV_IN_FP8 = "nvfp4: KV cache in FP8"
_KV_TOKENS = re.compile(r"KV cache size: ([\d,]+) tokens")
_LOADED = re.compile(r"Model loading took ([\d.]+) GiB")
_CACHE_DTYPE = re.compile(r'^vllm:cache_config_info\{.*?\bcache_dtype="([^"]*)"', re.MULTILINE)


@dataclass(frozen=True)
class Settings:
    """What to measure.

    batches, prompt_tokens, tokens: the batch table: requests at once, tokens in, tokens out
    rates:      requests/s; empty for AUTO_SHARES of what the server does at most
    load_*:     requests at each rate (0: no load is measured), tokens in, tokens out
    goodput:    objectives of vLLM's --goodput, "ttft:MS" and so on; a good request meets all
    turns:      starts of each server
    flags:      of ``vllm serve``, for every variant
    """

    model: str
    batches: tuple[int, ...]
    prompt_tokens: int
    tokens: int
    rates: tuple[float, ...]
    load_requests: int
    load_prompt_tokens: int
    load_tokens: int
    goodput: tuple[str, ...]
    turns: int
    seed: int
    flags: tuple[str, ...]

    @property
    def max_model_len(self) -> int:
        batch = self.prompt_tokens + self.tokens
        load = self.load_prompt_tokens + self.load_tokens if self.load_requests else 0
        # vLLM's random prompts may come back from the tokenizer a little longer.
        return max(batch, load) + 32


class Bench:
    """The state of a run. ``results`` is complete at every moment, and saved after every step."""

    def __init__(
        self,
        settings: Settings,
        variants: Sequence[Variant],
        meter: CpuMeter | GpuMeter,
        out: Path,
    ) -> None:
        self.settings, self.variants, self.meter, self.out = settings, variants, meter, out
        # Servers on a CPU take a share of the memory that is free when they start: compared ones
        # need the same.
        this = host.Host.this()
        self._kv_bytes = host.kv_cache_bytes(this) if this.is_cpu and len(variants) > 1 else None
        self._num_jobs = 0
        self._weighed: dict[str, limits.Weighed] = {}
        head = machine.provenance() | meter.describe() | {"cpu": machine.cpu_model()}
        if set_names := [name for name in _ENVIRONMENT if os.environ.get(name)]:
            head["environment"] = " ".join(f"{name}={os.environ[name]}" for name in set_names)
        self.results = Results(
            head | machine.versions(),
            asdict(settings),
            {"label": meter.memory_label, "total_bytes": meter.total_bytes},
            [self._record(variant) for variant in variants],
        )
        self._device: Gpu | None = None

    def _record(self, variant: Variant) -> VariantRecord:
        record = VariantRecord(
            variant.name, str(variant.folder), shlex.join(["vllm", "serve", *self._args(variant)])
        )
        try:
            args = self._args(variant)
            cards = _num_cards(args)
            weighed = self._weighed[variant.name] = limits.weigh(variant, args, cards)
            record.weight_format, record.weights = weighed.fmt, asdict(weighed.weights)
            for part in ("linear", "lm_head", "embedding", "other"):
                record.weight_parts[part] = cards * getattr(weighed.weights, part)
        except ValueError as error:
            record.no_limit = str(error)
        return record

    def _args(self, variant: Variant) -> list[str]:
        """What follows ``vllm serve``; the user's own flags come last and win."""
        settings = self.settings
        given = read_flags([*settings.flags, *variant.flags]).keys()
        defaults = {
            "--max-model-len": str(settings.max_model_len),
            "--max-num-seqs": str(max(64, *settings.batches)),
            "--seed": str(settings.seed),
        }
        if self._kv_bytes and not given & host.KV_FLAGS and not os.environ.get(host.KV_VARIABLE):
            defaults["--kv-cache-memory-bytes"] = str(self._kv_bytes)
        args = [str(variant.folder), "--no-enable-prefix-caching"]
        for flag, value in defaults.items():
            args += [flag, value] if flag not in given else []
        return [*args, *settings.flags, *variant.flags]

    @property
    def num_planned(self) -> int:
        """Measurements of a whole run."""
        rates = len(self.settings.rates) or len(AUTO_SHARES) + 1
        per_turn = len(self.settings.batches) + (rates if self.settings.load_requests else 0)
        return per_turn * self.settings.turns * len(self.variants)

    def check_memory(self) -> None:
        """Raise ValueError for weights that cannot fit, before a server takes minutes to fail."""
        total = self.meter.total_bytes
        for variant, record in zip(self.variants, self.results.variants, strict=True):
            size = sum(record.weight_parts.values()) or _stored_bytes(variant.folder)
            if size > total:
                raise ValueError(
                    f"{variant.name}: {variant.folder} has {size / 1e9:.1f} GB of weights, "
                    f"this machine {total / 1e9:.1f} GB for them; needs a smaller model, a format "
                    "with fewer bits, or more GPUs (CUDA_VISIBLE_DEVICES, --tensor-parallel-size)"
                )

    def run(self, say: Callable[[str], None]) -> None:
        """Measure everything. ``say`` gets a line per measurement.

        Raises ServerError or ClientError where MODEL itself fails; a variant of --against that
        fails is recorded as failed, said, and left out from then on.
        """
        environ = dict(os.environ)
        cpu_metadata.apply(environ)
        self._note_load(say)
        with Client(self.out / "client.log", environ) as client:
            self._find_device(client)
            for turn in range(self.settings.turns):
                for variant, record in zip(self.variants, self.results.variants, strict=True):
                    if record.failed:
                        continue
                    say(f"{variant.name}, start {turn + 1} of {self.settings.turns}")
                    try:
                        self._turn(client, variant, record, turn, say)
                    except (ServerError, ClientError) as error:
                        if variant is self.variants[0]:
                            raise
                        record.failed = str(error)
                        say(f"{variant.name} failed: {error}")
                    self.results.save(self.out)
        self.results.is_complete = True
        self.results.save(self.out)

    def _note_load(self, say: Callable[[str], None]) -> None:
        """Record, and on a CPU say, how busy others keep the machine."""
        load, cores = os.getloadavg()[0], machine.num_cores()
        self.results.machine["load average before"] = f"{load:.1f} on {cores} cores"
        if isinstance(self.meter, CpuMeter) and load > _BUSY * cores:
            say(f"busy machine, load {load:.1f} on {cores} cores: trust ratios more than seconds")

    def _find_device(self, client: Client) -> None:
        """The device of the roofline: the card's data sheet, or this machine's measured memory."""
        if isinstance(self.meter, GpuMeter):
            try:
                self._device = limits.gpu_as_device(self.meter.gpu_name)
                self.results.machine["roofline"] = f"{self._device.source}"
            except ValueError as error:
                for record in self.results.variants:
                    record.no_limit = record.no_limit or str(error)
            return
        with step("Measuring the memory's bandwidth"):
            gbps = client.memory_bandwidth()
        self._device = limits.cpu_as_device(machine.cpu_model(), gbps)
        self.results.machine["memory bandwidth GB/s"] = f"{gbps:.1f}"
        self.results.machine["roofline"] = self._device.source

    def _turn(
        self,
        client: Client,
        variant: Variant,
        record: VariantRecord,
        turn: int,
        say: Callable[[str], None],
    ) -> None:
        environ = dict(os.environ)
        if len(self.variants) > 1:
            # Weights are compared: the KV cache is held alike unless the user says otherwise.
            environ.setdefault("VLLM_NVFP4_KV_CACHE", "keep")
        number = self.variants.index(variant)
        log = self.out / f"server-{number}-{turn + 1}.log"
        begin = time.monotonic()
        with Server(self._args(variant), log, environ, variant.with_plugin) as server:
            server.wait_ready()
            record.load_s.append(time.monotonic() - begin)
            record.command = shlex.join(["vllm", *server.command[3:]])
            self._learn(server, record)
            with Watch(self.meter, server.processes) as watch:
                for kind, size, flags in self._jobs(client, server, variant):
                    measured = self._measure(client, watch, flags)
                    measurement = Measurement(variant.name, turn, kind, size, *measured)
                    self.results.measurements.append(measurement)
                    self.results.save(self.out)
                    say(_line(measurement))

    def _learn(self, server: Server, record: VariantRecord) -> None:
        """What the server says of itself: KV cache, memory of the weights; then the roofline."""
        log = server.log.read_text(errors="replace")
        sizes = next(filter(None, (pattern.findall(log) for pattern in _KV_BYTES)), [])
        record.kv_bytes = sum(map(float, sizes)) * 2**30 or None
        if tokens := _KV_TOKENS.search(log):
            record.kv_tokens = int(tokens[1].replace(",", ""))
        with urllib.request.urlopen(f"{server.url}/metrics", timeout=30) as response:
            dtype = _CACHE_DTYPE.search(response.read().decode())
        record.kv_dtype = dtype[1] if dtype else ""
        if record.kv_dtype == "auto" and _KV_IN_FP8 in log:
            record.kv_dtype = "fp8"
        if loaded := _LOADED.findall(log):
            # Measured: the parts keep their proportions.
            scale = sum(map(float, loaded)) * 2**30 / (sum(record.weight_parts.values()) or 1)
            record.weight_parts = {k: v * scale for k, v in record.weight_parts.items()}
        weighed = self._weighed.get(record.name)
        if self._device and weighed:
            settings = self.settings
            context = settings.prompt_tokens + settings.tokens // 2
            record.limits = limits.decode_limits(
                weighed, record.kv_dtype, self._device, settings.batches, context
            )

    def _jobs(
        self, client: Client, server: Server, variant: Variant
    ) -> Iterator[tuple[str, float | None, list[str]]]:
        """(kind, size, flags of ``vllm bench serve``) of each measurement of a turn."""
        settings = self.settings

        def flags(requests: int, tokens_in: int, tokens_out: int, *more: str) -> list[str]:
            self._num_jobs += 1
            common = ["--base-url", server.url, "--model", str(variant.folder)]
            common += ["--dataset-name", "random", "--ignore-eos", "--temperature", "0"]
            common += ["--disable-tqdm", "--percentile-metrics", "ttft,tpot"]
            common += ["--metric-percentiles", "90,99"]
            common += [
                "--seed",
                str(settings.seed + self._num_jobs),
                "--num-prompts",
                str(requests),
            ]
            common += ["--random-input-len", str(tokens_in), "--random-output-len", str(tokens_out)]
            return [*common, *more]

        for batch in settings.batches:
            at_once = ("--max-concurrency", str(batch))
            client.serve(flags(batch, settings.prompt_tokens, _WARM_UP_TOKENS, *at_once))
            yield BATCH, batch, flags(batch, settings.prompt_tokens, settings.tokens, *at_once)
        for rate in self._rates(variant):
            load = (settings.load_requests, settings.load_prompt_tokens, settings.load_tokens)
            limit = ("--request-rate", "inf" if rate is None else f"{rate:g}")
            objectives = ("--goodput", *settings.goodput) if settings.goodput else ()
            yield RATE, rate, flags(*load, *limit, *objectives)

    def _rates(self, variant: Variant) -> Iterator[float | None]:
        """The rates asked for; or without pause first, then shares of what that gave MODEL."""
        if not self.settings.load_requests:
            return
        if self.settings.rates:
            yield from self.settings.rates
            return
        yield None
        first = next(m for m in self.results.measurements if (m.kind, m.size) == (RATE, None))
        for share in AUTO_SHARES:
            yield float(f"{share * first.vllm['request_throughput']:.3g}")

    def _measure(
        self, client: Client, watch: Watch, flags: list[str]
    ) -> tuple[dict[str, Any], int, float | None, float | None]:
        result, ended = client.serve(flags)
        window = watch.window(ended - result["duration"], ended)
        return result, window.memory_bytes, window.energy_j, window.sm_mhz


def _num_cards(command: Sequence[str]) -> int:
    """The tensor-parallel size of a server's command line."""
    text = " ".join(command)
    found = re.search(r"(?:--tensor-parallel-size|-tp)[ =](\d+)", text)
    return int(found[1]) if found else 1


def _stored_bytes(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.glob("*.safetensors"))


def _line(m: Measurement) -> str:
    what = f"batch {m.size:g}" if m.kind == BATCH and m.size else f"{m.size or 'all':}"
    if m.kind == RATE:
        what = "no pause" if m.size is None else f"{m.size:g} requests/s"
    return (
        f"    {what:16} {m.vllm['duration']:7.1f} s  {m.vllm['output_throughput']:8.1f} tok/s  "
        f"first token {m.vllm['median_ttft_ms']:.0f} ms, then {m.vllm['median_tpot_ms']:.1f} ms"
    )
