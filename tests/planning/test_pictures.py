# SPDX-License-Identifier: Apache-2.0
"""pictures: every number and name is in the file, nothing is cut off, bad data is refused."""

from __future__ import annotations

import builtins
import re
import sys
from pathlib import Path
from xml.etree import ElementTree

import pytest

from vllm_nvfp4.planning import pictures
from vllm_nvfp4.planning.pictures import MemoryBar, Series

_BARS = [
    MemoryBar("bf16", {"weights": 30e9, "KV cache": 2e9}, 23e9),
    MemoryBar("nvfp4", {"weights": 9e9, "KV cache": 2e9}, 23e9),
    MemoryBar("measured", {"weights": 8e9}),
]
_SERIES = [
    Series("measured", [1, 2, 4], [10, 19, 35], low=[9, 18, 30], high=[11, 20, 37]),
    Series("limit of the card", [1, 2, 4], [20, 40, 80], is_limit=True),
]


def _draw(path: Path) -> dict[str, Path]:
    return {
        "memory": pictures.memory_stack(path.with_stem("memory"), _BARS, "a title"),
        "speed": pictures.speed_against_batch(path.with_stem("speed"), _SERIES),
        "latency": pictures.latency_against_load(path.with_stem("latency"), _SERIES),
        "bars": pictures.bars(path.with_stem("bars"), {"1 x L4": 0.25, "2 x A100": 3}, "$/h"),
    }


def test_an_svg_holds_every_name_and_number_as_text(tmp_path):
    texts = {
        n: " ".join(ElementTree.parse(p).getroot().itertext())
        for n, p in _draw(tmp_path / "x.svg").items()
    }
    for word in ("a title", "weights", "9.0", "12.0", "too much", "fits", "nvfp4", "free"):
        assert word in texts["memory"]
    for word in ("measured", "limit of the card", "tokens/s", "batch"):
        assert word in texts["speed"]
    assert "requests/s" in texts["latency"]
    assert all(word in texts["bars"] for word in ("1 x L4", "0.25", "2 x A100", "$/h"))


def test_nothing_is_cut_at_the_edge_of_a_png(tmp_path):
    import numpy as np
    from PIL import Image

    for path in _draw(tmp_path / "x.png").values():
        pixels = np.asarray(Image.open(path).convert("L"))
        edge = np.concatenate([pixels[0], pixels[-1], pixels[:, 0], pixels[:, -1]])
        assert pixels.min() < 64
        assert edge.min() == 255, path.name


def test_the_same_numbers_give_the_same_file_and_no_pyplot(tmp_path):
    first, second = (_draw(tmp_path / n / "x.svg")["memory"].read_bytes() for n in ("a", "b"))
    assert first == second
    assert "matplotlib.pyplot" not in sys.modules


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda p: pictures.memory_stack(p, []), "at least one bar"),
        (lambda p: pictures.memory_stack(p, [MemoryBar("x", {"w": -1})]), "'x' has a negative"),
        (lambda p: pictures.lines(p, [Series("s", [1, 2], [1])], "x", "y"), "2 x and 1 y"),
        (lambda p: pictures.lines(p, [Series("s", [], [])], "x", "y"), "0 x and 0 y"),
        (lambda p: pictures.speed_against_batch(p, [Series("s", [1], [0])]), "values <= 0"),
        (lambda p: pictures.bars(p, {"a": -2}, "x"), "-2 is negative"),
    ],
)
def test_bad_data_is_refused_before_a_file_is_written(call, words, tmp_path):
    with pytest.raises(ValueError, match=re.escape(words)):
        call(tmp_path / "x.png")
    assert not list(tmp_path.iterdir())


def test_without_matplotlib_the_error_names_the_extra(tmp_path, monkeypatch):
    real = builtins.__import__

    def without(name, *args, **kwargs):
        if name.startswith("matplotlib"):
            raise ImportError(name)
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(ValueError, match="pip install 'matplotlib"):
        pictures.bars(tmp_path / "x.png", {"a": 1}, "x")
