# SPDX-License-Identifier: Apache-2.0
"""``vllm-nvfp4 bench`` and ``report``: what they refuse, what they compute, the page, NVML through
a stand-in library, and one whole run on the demo's model with Ctrl-C in its second half."""

from __future__ import annotations

import dataclasses
import json
import lzma
import os
import re
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from vllm_nvfp4.bench import limits, meters, page, results, variants
from vllm_nvfp4.bench.meters import CpuMeter, Reading, Watch
from vllm_nvfp4.bench.results import BATCH, RATE, Limit, Measurement, Results, VariantRecord
from vllm_nvfp4.cli.main import main
from vllm_nvfp4.serving.arguments import plugin_options
from vllm_nvfp4.serving.server import group_is_alive
from vllm_nvfp4.testing import smollm2
from vllm_nvfp4.testing.checkpoints import to_gpt_oss_mxfp4
from vllm_nvfp4.testing.tiny_models import write_model

pytestmark = pytest.mark.long

ROOT = Path(__file__).resolve().parents[2]
LIMIT = Limit(1, 256.0, "weights", 9e7, 1e7, 25.6, 2e8, None, 1e8, None)


def vllm_result(seconds: float, tokens: int = 128, ttft: float = 100.0) -> dict[str, float]:
    tpot = 1e3 * seconds / tokens
    return {
        "duration": seconds, "output_throughput": tokens / seconds, "total_output_tokens": tokens,
        "request_throughput": 1 / seconds, "request_goodput": 0.5 / seconds,
        "mean_tpot_ms": tpot, "median_tpot_ms": tpot, "p99_tpot_ms": 2 * tpot,
        "median_ttft_ms": ttft, "p99_ttft_ms": 3 * ttft,
    }  # fmt: skip


@pytest.fixture
def run() -> Results:
    """Two variants, three turns: nvfp4 takes 1, 2 and 4 s, the other 2, 6 and 4 s."""
    settings = {
        "model": "/models/m", "prompt_tokens": 32, "tokens": 128, "load_prompt_tokens": 256,
        "load_tokens": 128, "load_requests": 8, "goodput": ["ttft:2000"], "seed": 0,
    }  # fmt: skip
    parts = {"linear": 6e7, "lm_head": 0, "embedding": 5e7, "other": 1e5}
    records = [
        VariantRecord("nvfp4", "/models/m", "vllm serve", "nvfp4", {}, parts, 2.5e8, 1000, "auto",
                      load_s=[60.0] * 3, limits=[LIMIT]),
        VariantRecord("<b>bf16</b>", "/models/m", "vllm serve", no_limit="none known"),
    ]  # fmt: skip
    found = Results(
        {"cpu": "a CPU", "command": "bench"}, settings,
        {"label": "PSS", "total_bytes": 8_000_000_000}, records, is_complete=True,
    )  # fmt: skip
    for record, times in zip(records, ((1, 2, 4), (2, 6, 4)), strict=True):
        for turn, seconds in enumerate(times):
            for kind, size in ((BATCH, 1), (RATE, 2.0), (RATE, None)):
                ran = vllm_result(seconds, ttft=100 * seconds)
                found.measurements.append(
                    Measurement(record.name, turn, kind, size, ran, 10**9 + turn, 64.0, None)
                )
    return found


# --- what is computed ----------------------------------------------------------------------------


def test_batch_rows_are_medians_and_shares_of_the_roofline(run: Results):
    (row,) = results.batch_rows(run, run.variants[0])
    assert (row.seconds.median, row.seconds.low, row.seconds.high) == (2, 1, 4)
    assert row.tokens_per_s.median == 64
    assert row.decode is not None
    assert row.decode.median == pytest.approx(64)
    assert row.share == pytest.approx(64 / 256)
    assert row.memory.high == 10**9 + 2
    assert row.energy is not None
    assert row.energy.median == 0.5
    (other,) = results.batch_rows(run, run.variants[1])
    assert other.share is None
    (table,) = [t for t in page.run_tables(run) if "terms of the roofline" in t.title]
    # Where arithmetic sets no limit its columns are gone.
    assert table.rows == (("1", "0.0900", "0.0100", "25.6", "weights", "256"),)


def test_ratios_pair_the_turns_and_are_better_above_one(run: Results):
    other = run.variants[1].name
    speed = results.ratios(run, other, BATCH, "output_throughput")
    assert speed == {1: results.Spread(2.0, 1.0, 3.0)}
    assert results.ratios(run, other, BATCH, "median_ttft_ms") == speed
    run.measurements = [m for m in run.measurements if (m.variant, m.turn) != (other, 1)]
    assert results.ratios(run, other, BATCH, "output_throughput")[1].high == 2.0


def test_rates_are_in_order_and_without_pause_last(run: Results):
    rows = results.rate_rows(run, "nvfp4")
    assert [row.rate for row in rows] == [2.0, None]
    assert rows[0].goodput is not None
    assert rows[0].goodput.median == 0.25
    assert rows[0].ttft_p99.median == 600


def test_what_is_saved_is_read_back(run: Results, tmp_path: Path):
    run.save(tmp_path)
    assert dataclasses.asdict(results.load(tmp_path)) == dataclasses.asdict(run)
    assert [path.name for path in tmp_path.iterdir()] == ["bench.json"]


class Clock:
    """A meter whose energy is 100 J for each second that passes; time passes when it is told to."""

    memory_label, total_bytes = "none", 1

    def __init__(self):
        self.now = 0.0

    def monotonic(self):
        return self.now

    def read(self, pids):
        return Reading(len(pids), 100 * self.now, 1000.0)

    def describe(self):
        return {}


def test_energy_of_a_window_is_that_of_its_seconds(monkeypatch: pytest.MonkeyPatch):
    clock = Clock()
    monkeypatch.setattr(meters, "time", clock)
    with Watch(clock, lambda: [1, 2], period=3600) as watch:
        for clock.now in (1.0, 2.5, 4.0):
            window = watch.window(0.25, 3.0)
    assert window.energy_j == pytest.approx(275)
    assert (window.memory_bytes, window.sm_mhz) == (2, 1000.0)


def test_a_watch_reads_without_being_asked():
    seen = threading.Event()

    def processes():
        if len(calls) > 3:
            seen.set()
        calls.append(1)
        return calls

    calls: list[int] = []
    with Watch(Clock(), processes, period=0.001):
        assert seen.wait(60)


def test_cpu_memory_counts_every_process_and_forgives_one_that_ended(tmp_path: Path):
    (tmp_path / "meminfo").write_text("MemTotal: 4 kB\n")
    for pid, size in ((1, 10), (2, 20)):
        (tmp_path / str(pid)).mkdir()
        (tmp_path / str(pid) / "smaps_rollup").write_text(f"Rss: 99 kB\nPss: {size} kB\n")
    meter = CpuMeter(tmp_path)
    assert meter.read([1, 2, 3]).memory_bytes == 30 * 1024
    assert meter.total_bytes == 4096


def test_nvml_memory_energy_and_clocks(tmp_path: Path, request: pytest.FixtureRequest):
    library = tmp_path / "libnvidia-ml.so.1"
    source = request.config.rootpath / "tests/support/stub_nvml.c"
    subprocess.run(["gcc", "-shared", "-fPIC", "-w", "-o", library, source], check=True)
    code = """
import dataclasses, json
from vllm_nvfp4.bench.meters import find_meter
meter = find_meter(is_cpu=False)
readings = [dataclasses.asdict(meter.read([])) for _ in range(2)]
print(json.dumps([meter.describe(), readings, meter.total_bytes]))
"""
    environ = os.environ | {"LD_LIBRARY_PATH": str(tmp_path)}
    environ.pop("CUDA_VISIBLE_DEVICES", None)
    done = subprocess.run(
        [sys.executable, "-c", code], env=environ, capture_output=True, text=True, check=True
    )
    described, readings, total = json.loads(done.stdout)
    assert described["gpu"] == "NVIDIA GeForce RTX 4090"
    assert described["compute capability"] == "8.9"
    assert described["SM clock MHz at most"] == "3105"
    assert described["power limit W"] == "not reported"
    assert total == 2 * 24 << 30
    # The idle GPU's energy is not the server's.
    assert readings[-1] == {"memory_bytes": 1 << 30, "energy_j": 5.0, "sm_mhz": 2520}


# --- the page ------------------------------------------------------------------------------------


def test_the_page_opens_without_a_network_and_shows_every_run(run: Results, tmp_path: Path):
    path = page.write({"a": run, "b": run}, tmp_path / "new" / "report.html")
    text = path.read_text()
    assert len(re.findall(r'<img src="data:image/png;base64,[^"]+" alt="[^"]+"', text)) == 4
    assert not re.findall(r'(?:src|href)\s*=\s*(?!"data:)|url\(|@import|<script', text)
    assert "<b>bf16</b>" not in text
    assert "&lt;b&gt;bf16&lt;/b&gt;" in text
    assert "2.00x (1.00-3.00)" in text
    assert "Side by side" in text


def test_report_shows_unfinished_and_failed_runs(run: Results, tmp_path: Path, capsys):
    run.is_complete, run.variants[1].failed = False, "it has no kernel"
    run.save(tmp_path / "one" / "x")
    run.save(tmp_path / "two" / "x")
    folders = [str(tmp_path / name / "x") for name in ("one", "two")]
    assert main(["report", *folders, "--out", str(tmp_path / "r.html")]) == 0
    text = (tmp_path / "r.html").read_text()
    assert text.count("the run was not finished") == 2
    assert text.count("could not be measured: it has no kernel") == 2
    assert "Tokens per second by batch" in capsys.readouterr().out


# --- what is refused -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "no bench.json there; needs a folder that `vllm-nvfp4 bench` wrote"),
        ("{", "not JSON"),
        ("[]", "schema None; this version reads schema 1"),
        ('{"schema": 2}', "schema 2; this version reads schema 1"),
        ('{"schema": 1}', "damaged ('variants')"),
    ],
)
def test_report_refuses(tmp_path: Path, capsys, content: str | None, message: str):
    if content is not None:
        (tmp_path / "bench.json").write_text(content)
    assert main(["report", str(tmp_path)]) == 1
    err = capsys.readouterr().err
    assert message in err
    assert err.count("\n") == 1


def test_a_packed_result_is_read_and_refused_alike(tmp_path: Path, capsys):
    (tmp_path / "bench.json.xz").write_bytes(lzma.compress(b'{"schema": 2}'))
    assert main(["report", str(tmp_path)]) == 1
    assert "bench.json.xz: schema 2; this version reads" in capsys.readouterr().err
    (tmp_path / "bench.json.xz").write_bytes(b"{}")
    assert main(["report", str(tmp_path)]) == 1
    assert "bench.json.xz: not JSON" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--batches", "0,1"], "found '0'; needs a whole number, 1 or more"),
        (["--rates", "-1"], "found '-1'; needs requests per second, above 0"),
        (["--goodput", "speed:1"], "needs NAME:MS with NAME of ttft, tpot, e2el"),
        (["--turns", "x"], "found 'x'; needs a whole number"),
    ],
)
def test_bench_refuses_at_once(capsys, args: list[str], message: str):
    with pytest.raises(SystemExit, match="2"):
        main(["bench", "anything", *args])
    assert message in capsys.readouterr().err


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("tiny"), "llama")


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--against", "gguf"], "NAME one of stock, bf16, fp8, awq, nvfp4"),
        (["--against", ""], "unknown; needs NAME[=MODEL]"),
        (["--against", "stock 'x"], "No closing quotation; needs NAME[=MODEL]"),
        (["--against", "awq"], "is not quantised; needs an AWQ checkpoint: --against awq=MODEL"),
        (["--against", "bf16=/nowhere"], "no such folder"),
        (["--against", "stock", "--against", "stock"], "measured already"),
        (["--out", str(ROOT)], "exists already; needs a new or an empty folder"),
    ],
)
def test_bench_refuses_before_a_server_starts(tiny: Path, tmp_path, capsys, args, message):
    # A case's own --out comes last and wins.
    assert main(["bench", str(tiny), "--out", str(tmp_path / "out"), *args]) == 1
    err = capsys.readouterr().err
    assert message in err
    assert err.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_a_model_beyond_the_memory_is_refused(tiny: Path, tmp_path, capsys, monkeypatch):
    init = CpuMeter.__init__

    def small(self, *args):
        init(self, *args)
        self.total_bytes = 10_000

    monkeypatch.setattr(CpuMeter, "__init__", small)
    assert main(["bench", str(tiny), "--out", str(tmp_path / "out")]) == 1
    assert "GB of weights, this machine 0.0 GB for them" in capsys.readouterr().err


def test_quantised_checkpoints_are_no_bf16(tmp_path: Path, tiny: Path):
    config = json.loads((tiny / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "awq", "bits": 4}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="is quantised by awq; needs a 16-bit checkpoint"):
        variants.against("bf16", tmp_path)
    awq = variants.against(f"awq={tmp_path} --dtype half", tiny)
    assert (awq.folder, awq.flags, awq.with_plugin) == (tmp_path, ("--dtype", "half"), False)
    assert variants.format_of(awq.folder, "bf16") == "int4"
    assert variants.against("fp8", tiny).flags == ("--quantization", "fp8")


def test_options_are_read_from_both_forms_of_the_flag():
    flags = ["--additional-config", '{"nvfp4": {"lm_head": "fp8"}}', "--dtype", "half"]
    assert plugin_options(flags).lm_head == "fp8"
    dotted = plugin_options(["--additional-config.nvfp4.embedding", "nvfp4"])
    assert dotted.embedding == "nvfp4"
    with pytest.raises(ValueError, match="lm_head is 'int3'; needs one of"):
        plugin_options(["--additional-config.nvfp4.lm_head", "int3"])


@pytest.mark.parametrize("family", ["llama", "qwen3_moe", "gpt_oss"])
def test_every_limit_follows_from_what_is_stored(tmp_path: Path, family: str):
    """Of a mixture of experts only those that the tokens need are read; by hand, from the JSON."""
    folder = write_model(tmp_path, family)
    if family == "gpt_oss":
        to_gpt_oss_mxfp4(folder)
    weighed = limits.weigh(variants.own(str(folder)), (), 1)
    assert weighed.planned == ("checkpoint" if family == "gpt_oss" else "nvfp4")
    config = json.loads((folder / "config.json").read_text())
    experts = config.get("num_experts") or config.get("num_local_experts") or 1
    idle = 1 - config.get("num_experts_per_tok", experts) / experts
    parts = dataclasses.asdict(weighed.weights)
    for device in (limits.cpu_as_device("a CPU", 20.0), limits.gpu_as_device("NVIDIA L4")):
        for found in limits.decode_limits(weighed, "fp8", device, (1, 4, 64), 96):
            one = json.loads(json.dumps(dataclasses.asdict(found), allow_nan=False))
            read = parts["linear"] + (parts["lm_head"] or parts["embedding"]) + parts["other"]
            read -= parts["experts"] * idle ** one["batch"]
            assert one["weight_bytes"] == pytest.approx(read, abs=1)
            seconds = (one["weight_bytes"] + one["kv_bytes"]) / one["gbps"] / 1e9
            flops = [(one[f"{k}_flops"], one[f"{k}_tflops"]) for k in ("linear", "other")]
            compute = sum(flop / rate / 1e12 for flop, rate in flops if rate)
            assert (compute == 0) == (device.name == "a CPU")
            limit = one["batch"] / max(seconds, compute)
            assert one["tokens_per_s"] == pytest.approx(limit)


# --- a whole run ---------------------------------------------------------------------------------


@pytest.mark.vllm
def test_a_real_server_is_measured_and_ctrl_c_keeps_the_results(tmp_path: Path, monkeypatch):
    monkeypatch.setenv("VLLM_NVFP4_ONLINE_METHOD", "rtn")  # half of the default's loading time
    cache = ROOT / ".cache" / "models"
    cache.mkdir(parents=True, exist_ok=True)
    model, out = smollm2.bf16_folder(cache), tmp_path / "out"
    command = [sys.executable, "-m", "vllm_nvfp4.cli.main", "bench", str(model), "--out", str(out)]
    command += ["--batches", "1,2", "--tokens", "16", "--turns", "2", "--rates", "4"]
    command += ["--load-requests", "4", "--load-prompt", "32", "--load-tokens", "8"]
    command += ["--", "--enforce-eager", "--kv-cache-memory-bytes", str(2**28)]
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        start_new_session=True,
        # A shell's background job, as this run may be, ignores it, and so would what it starts.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )  # fmt: skip
    assert process.stdout is not None
    lines = []
    for line in process.stdout:
        lines.append(line)
        if "start 2 of 2" in line:
            os.kill(process.pid, signal.SIGINT)
    text = "".join(lines)
    assert process.wait(120) == 130, text
    assert "interrupted: 3 of 6 measurements are kept" in text
    assert not group_is_alive(process.pid)

    found = results.load(out)
    assert not found.is_complete
    assert [(m.kind, m.size) for m in found.measurements] == [(BATCH, 1), (BATCH, 2), (RATE, 4.0)]
    tokens = [m.vllm["total_output_tokens"] for m in found.measurements]
    assert tokens == [16, 32, 32]
    (record,) = found.variants
    assert record.weight_format == "nvfp4"
    assert record.kv_bytes == 2**28
    held = sum(record.weight_parts.values()) + record.kv_bytes
    assert all(m.memory_bytes > held / 2 for m in found.measurements)
    assert [limit.batch for limit in record.limits] == [1, 2]
    assert float(found.machine["memory bandwidth GB/s"]) > 0
    assert re.fullmatch(r"[\d.]+ on \d+ cores", found.machine["load average before"])
    assert "the run was not finished" in (out / page.PAGE_NAME).read_text()
