# SPDX-License-Identifier: Apache-2.0
"""The page of `bench` and `report`: its first sentence, its reproduce line, and its layout."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from vllm_nvfp4.bench import page
from vllm_nvfp4.bench.results import load
from vllm_nvfp4.bench.summary import first_sentence, reproduce_line
from vllm_nvfp4.cli.main import build_parser, main

ROOT = Path(__file__).resolve().parents[2]
RUN = ROOT / "benchmarks" / "results" / "smollm2_cpu"
BROWSER = next(filter(None, map(shutil.which, ("chromium", "google-chrome", "chrome"))), None)
# Sizes of what may and may not be wider than the window, and cells of more than one line.
MEASURE = """
<script>
window.addEventListener("load", () => {
  const wide = [...document.querySelectorAll("body *")].filter(e =>
    !e.closest(".wide") && !e.closest("figure") && e.scrollWidth > document.body.clientWidth + 1);
  const height = e => e.getClientRects().length && e.clientHeight;
  const broken = [...document.querySelectorAll("td:not(.long), th:not(.long)")].filter(e => {
    const range = document.createRange(); range.selectNodeContents(e);
    return new Set([...range.getClientRects()].map(r => Math.round(r.top))).size > 1;
  });
  const small = [...document.querySelectorAll("img")].filter(e => e.clientWidth < 600);
  document.body.innerHTML = "<pre id=found>" + JSON.stringify({
    page: document.documentElement.scrollWidth, window: window.innerWidth,
    wide: wide.map(e => e.tagName), broken: broken.map(e => e.textContent), small: small.length,
  }) + "</pre>";
});
</script>
"""


def test_the_first_sentence_says_the_result(tmp_path, capsys):
    run = load(RUN)
    text = first_sentence({"a": run})
    assert text.startswith("nvfp4 gives 56.1 tokens/s at batch 1 and 342 tokens/s at batch 32 on ")
    assert "Against bf16: 1.61 times the speed at batch 1 (1.37 to 1.78 by turn)" in text
    assert main(["report", str(RUN), "--out", str(tmp_path / "r.html")]) == 0
    assert capsys.readouterr().out.startswith(text)
    body = (tmp_path / "r.html").read_text().partition("</h1>")[2].strip()
    assert body.startswith(f'<p class="result">{text}</p>')
    both = first_sentence({"a": run, "b": run})
    assert both.startswith("2 runs; the most: 56.1 tokens/s at batch 1 (nvfp4 of a), 342 tokens/s")


def test_ratios_on_both_sides_of_one_are_no_result():
    run = load(RUN)
    for m in run.measurements:
        if m.variant != run.variants[0].name and m.kind == "batch" and m.size == 1 and m.turn == 0:
            m.vllm["output_throughput"] *= 100
    assert "at batch 1 the turns do not say which is faster" in first_sentence({"a": run})


def test_the_reproduce_line_is_taken_by_the_command():
    run = load(RUN)
    assert reproduce_line(run).startswith("vllm-nvfp4 bench ")
    run.machine["environment"] = "OMP_NUM_THREADS=1 VLLM_CPU_OMP_THREADS_BIND=nobind"
    words = reproduce_line(run).split()
    assert words[:3] == ["OMP_NUM_THREADS=1", "VLLM_CPU_OMP_THREADS_BIND=nobind", "vllm-nvfp4"]
    assert "--out" not in words
    parser, _ = build_parser(["bench"])
    args = parser.parse_args(words[3 : words.index("--")])
    assert args.batches == (1, 2, 4, 8, 16, 32)
    assert args.tokens == 64


@pytest.mark.skipif(BROWSER is None, reason="no browser (chromium) on PATH")
@pytest.mark.parametrize("width", [390, 1280])
@pytest.mark.parametrize("runs", [1, 2])
def test_layout(width, runs, tmp_path):
    """The page itself never scrolls sideways, no number breaks, and charts can be read."""
    found = {f"run {i}": load(RUN) for i in range(runs)}
    path = page.write(found, tmp_path / "page.html")
    # Chromium's window is at least 500 wide: a frame of its own has any width.
    inner = path.read_text().replace("</body>", MEASURE + "</body>")
    (tmp_path / "inner.html").write_text(inner)
    outer = tmp_path / "outer.html"
    outer.write_text(
        f"<iframe id=f src=inner.html style='width:{width}px;height:900px;border:0'></iframe>"
        "<script>setTimeout(() => document.body.append(f.contentDocument.body.innerText), 1500)"
        "</script>"
    )
    flags = ["--headless", "--no-sandbox", "--disable-gpu", "--allow-file-access-from-files",
             "--virtual-time-budget=8000", f"--user-data-dir={tmp_path / 'profile'}"]  # fmt: skip
    shown = subprocess.run(
        [BROWSER, *flags, "--dump-dom", outer.as_uri()], capture_output=True, text=True, timeout=300
    ).stdout
    [text] = re.findall(r"\{.*\}", shown.replace("&quot;", '"').rpartition("</script>")[2])
    measured = json.loads(text)
    assert measured["window"] == width
    assert measured["page"] <= width
    assert measured["broken"] == []
    assert measured["small"] == 0
    assert measured["wide"] == []
