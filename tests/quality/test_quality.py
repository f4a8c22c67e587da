# SPDX-License-Identifier: Apache-2.0
"""`vllm-nvfp4 quality`: its numbers against float64 arithmetic on transformers' logits."""

import json
import os
from pathlib import Path

import numpy as np
import pytest
import torch

from vllm_nvfp4.checkpoints.write import write_nvfp4
from vllm_nvfp4.cli.main import main
from vllm_nvfp4.compat.flags import FlagError
from vllm_nvfp4.quality.engine import Scores, check_room, engine_options, measure
from vllm_nvfp4.quality.recorder import score
from vllm_nvfp4.quality.report import as_json, table
from vllm_nvfp4.quality.statistics import BLOCK, Row, text_rows
from vllm_nvfp4.quality.text import prefix_tokens, read_text, read_windows
from vllm_nvfp4.serving.engine_log import engine_log
from vllm_nvfp4.testing.checkpoints import edit_json
from vllm_nvfp4.testing.engine import ENVIRONMENT, plain_model, reference_model
from vllm_nvfp4.testing.tiny_models import build_tokenizer, write_model

EXACT = {"dtype": "float32", "enforce_eager": True}
FLAGS = ["--", "--enforce-eager", "--dtype", "float32"]


@pytest.fixture(autouse=True)
def _environment(monkeypatch):
    for name, value in ENVIRONMENT.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("VLLM_NVFP4_KV_CACHE", "keep")


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    plain = write_model(folder / "plain", "llama")
    write_nvfp4(plain, folder / "nvfp4", method="rtn")
    return plain, folder / "nvfp4"


def float64_scores(logits, targets, reference):
    mine, theirs = (torch.log_softmax(x.double(), -1) for x in (logits, reference))
    nll = -mine.gather(1, targets[:, None])[:, 0]
    kl = (theirs.exp() * (theirs - mine)).sum(-1)
    return nll, kl, (theirs.argmax(-1) == mine.argmax(-1)).double()


def test_score_is_the_definition_across_its_pieces_and_at_impossible_words():
    generator = torch.Generator().manual_seed(0)
    mine, theirs = (torch.randn(300, 40, generator=generator) * 3 for _ in range(2))
    theirs[:, 7] = float("-inf")
    targets = torch.randint(0, 40, (300,), generator=generator)
    found = score(mine, targets, theirs)
    nll, kl, same = float64_scores(mine, targets, theirs.clamp(min=-1e9))
    assert torch.allclose(torch.tensor(found["nll"]).double(), nll, atol=1e-5)
    assert torch.allclose(torch.tensor(found["kl"]).double(), kl, atol=1e-5)
    assert torch.equal(torch.tensor(found["same"]).double(), same)
    assert score(mine, targets, None).keys() == {"nll"}


@pytest.mark.vllm
def test_engine_scores_are_those_of_transformers(models, tmp_path):
    plain, quantised = models
    windows = read_windows(plain, "builtin", 3, 65)
    first = measure(plain, windows, EXACT | {"quantization": None}, save=tmp_path)
    second = measure(quantised, windows, EXACT | {"quantization": "nvfp4"}, reference=tmp_path)
    assert first.kl is None
    a, b = plain_model(plain, torch.float32), reference_model(quantised, torch.float32)
    for i, window in enumerate(windows):
        tokens = torch.tensor([window])
        with torch.inference_mode():
            theirs, mine = a(tokens).logits[0, :-1], b(tokens).logits[0, :-1]
        base = float64_scores(theirs, tokens[0, 1:], theirs)[0]
        nll, kl, same = float64_scores(mine, tokens[0, 1:], theirs)
        for found, expected in ((first.nll, base), (second.nll, nll), (second.kl, kl)):
            assert np.abs(found[i] - expected.numpy()).max() < 2e-4
        assert (second.same[i] == same.numpy()).mean() > 0.95  # near ties may fall either way


@pytest.mark.vllm
def test_command_fails_beyond_the_limit_and_prints_json(models, capfd):
    plain, quantised = models
    command = ["quality", str(quantised), "--reference", str(plain), "--windows", "2"]
    command += ["--window-length", "64", "--json", "--max-ppl-increase"]
    assert main([*command, "-99", *FLAGS]) == 1
    printed = capfd.readouterr()
    report = json.loads(printed.out)
    assert report["tokens"] == 2 * 63
    rows = {row["metric"]: row for row in report["rows"]}
    ppl = rows["perplexity"]
    assert ppl["value"] - ppl["reference"] == pytest.approx(ppl["difference"])
    assert rows["KL, mean"]["value"] > 0
    assert "-99" in printed.err.splitlines()[-1]


@pytest.mark.vllm
def test_without_a_reference_the_perplexity_alone(models, capfd):
    _, quantised = models
    command = ["quality", str(quantised), "--windows", "1", "--window-length", "64"]
    assert main([*command, *FLAGS]) == 0
    printed = capfd.readouterr()
    lines = printed.out.splitlines()
    assert [line.split()[0] for line in lines[1:]] == ["perplexity"]
    # Of the engine the user reads the plugin's lines alone.
    assert printed.err.startswith("==> ")
    assert all(line.startswith(("==> ", "    ", "nvfp4: ")) for line in printed.err.splitlines())


def test_an_engine_that_ends_leaves_its_log(capfd):
    with engine_log("quality") as log:
        os.write(2, b"from a library\n")
        print("WARNING nvfp4: the slower path, since x")
        print("WARNING nvfp4: the slower path, since x")
        print("the user's line", file=log.out)
        words = log.keep()
    path = Path(words.removeprefix(" (log: ").removesuffix(")"))
    assert "from a library" in path.read_text()
    path.unlink()
    out, err = capfd.readouterr()
    assert (out, err) == ("", "the user's line\nnvfp4: the slower path, since x\n")
    with engine_log("quality") as log:
        pass
    assert not log.path.exists()


@pytest.mark.parametrize("block", [BLOCK, 4 * BLOCK])
def test_standard_error_is_that_of_independent_blocks(block):
    generator = np.random.default_rng(0)
    # Constant within a block: the worst case of dependence, and its error is known.
    blocks = generator.normal(2.0, 0.5, (40, 4 * BLOCK // block))
    nll = blocks.repeat(block, axis=1)
    row = text_rows(Scores(nll), None, block=block)[0]
    expected = np.exp(nll.mean()) * blocks.std(ddof=1) / np.sqrt(blocks.size)
    assert row.standard_error == pytest.approx(expected, rel=0.1)


def test_what_the_text_has_in_common_cancels_in_the_difference():
    generator = np.random.default_rng(0)
    nll = generator.normal(2.0, 1.0, (8, 300))
    kl = np.abs(generator.normal(0, 1, nll.shape))
    rows = {r.metric: r for r in text_rows(Scores(nll + 0.1, kl, kl < 2.0), Scores(nll))}
    ratio = rows["perplexity, %"]
    assert ratio.difference == pytest.approx(100 * np.expm1(0.1))
    assert ratio.standard_error == pytest.approx(0, abs=1e-9)
    tail = rows["KL, 99th percentile"]
    assert tail.value == pytest.approx(np.quantile(kl, 0.99, method="inverted_cdf"))
    assert rows["top-1 agreement"].value == pytest.approx((kl < 2.0).mean())


def test_table_and_json_say_nothing_where_there_is_nothing():
    rows = [Row("perplexity", None, float("inf"), None, 0.5)]
    assert table(rows).splitlines()[1].split() == ["perplexity", "-", "inf", "-", "0.5000"]
    assert json.dumps(as_json(rows, {}), allow_nan=False)


def test_windows_follow_each_other_and_begin_as_the_tokenizer_begins(models, tmp_path):
    plain, _ = models
    windows = read_windows(plain, "builtin", 2, 50)
    text = build_tokenizer()(read_text("builtin"), add_special_tokens=False).input_ids
    assert windows[0] + windows[1] == text[:100]
    tokenizer = build_tokenizer()
    from tokenizers.processors import TemplateProcessing

    tokenizer._tokenizer.post_processor = TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", 1)]
    )
    assert prefix_tokens(tokenizer) == [1]
    tokenizer.save_pretrained(tmp_path)
    (tmp_path / "config.json").write_text("{}")
    assert read_windows(tmp_path, "builtin", 2, 51) == [[1, *text[:50]], [1, *text[50:100]]]


def refused(arguments, capsys):
    assert main(["quality", *map(str, arguments)]) == 1
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("vllm-nvfp4 quality: ")
    return error


def test_missing_folders_and_short_texts_are_named(models, tmp_path, capsys):
    _, quantised = models
    assert "no such folder" in refused([tmp_path / "none"], capsys)
    assert "no such folder" in refused([quantised, "--reference", tmp_path / "none"], capsys)
    short = tmp_path / "short.txt"
    short.write_text("Too short.")
    sizes = ["--window-length", "64"]
    error = refused([quantised, "--text", short, *sizes], capsys)
    assert "10 tokens" in error
    assert "64 tokens" in error
    short.write_bytes(b"\xff\xfe")
    assert "UTF-8" in refused([quantised, "--text", short, *sizes], capsys)
    assert "no such file" in refused([quantised, "--text", tmp_path / "no.txt", *sizes], capsys)
    assert "255 or less" in refused([quantised], capsys)
    assert "--reference" in refused([quantised, "--max-ppl-increase", "1"], capsys)


def test_reference_of_another_vocabulary_or_tokenizer_is_refused(models, tmp_path, capsys):
    _, quantised = models
    other = write_model(tmp_path / "other", "llama")
    sizes = ["--window-length", "64", "--reference", other]

    def swap(tokenizer):
        vocab = tokenizer["model"]["vocab"]
        vocab["e"], vocab["f"] = vocab["f"], vocab["e"]

    edit_json(other / "tokenizer.json", swap)
    error = refused([quantised, *sizes], capsys)
    assert "tokenizer" in error
    edit_json(other / "config.json", lambda c: c.update(vocab_size=300))
    error = refused([quantised, *sizes], capsys)
    assert "300 tokens" in error
    assert "288" in error


def test_logits_that_do_not_fit_are_refused_before_anything_is_loaded(models, tmp_path):
    plain, _ = models
    with pytest.raises(OSError, match="GB needed"):
        check_room(plain, tmp_path, [range(1 << 40)])


def test_engine_flags_are_those_of_vllm_serve():
    flags = ["--kv-cache-dtype", "fp8", "--enforce-eager", "--tensor-parallel-size", "2"]
    expected = {"kv_cache_dtype": "fp8", "enforce_eager": True, "tensor_parallel_size": 2}
    assert engine_options(flags) == expected
    with pytest.raises(FlagError, match="no flag --no-such-flag"):
        engine_options(["--no-such-flag"])
