# SPDX-License-Identifier: Apache-2.0
"""plan and inspect of models of any family, from headers, here and on a hub."""

from __future__ import annotations

import http.server
import json
import re
import threading
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from vllm_nvfp4.checkpoints import detect, hub, read_config
from vllm_nvfp4.checkpoints.model_census import take_census_of
from vllm_nvfp4.checkpoints.spec import CheckpointError
from vllm_nvfp4.checkpoints.write import write_nvfp4
from vllm_nvfp4.cli import _online
from vllm_nvfp4.cli.main import main
from vllm_nvfp4.planning import kv, vllm_kv
from vllm_nvfp4.planning.find import find_shape
from vllm_nvfp4.planning.headers import shape_from_headers
from vllm_nvfp4.planning.model import AS_STORED, weights_of
from vllm_nvfp4.planning.shapes import Kept
from vllm_nvfp4.testing import architecture
from vllm_nvfp4.testing.architectures import ARCHITECTURES, write_architecture
from vllm_nvfp4.testing.checkpoints import edit_tensors, extract_fixture
from vllm_nvfp4.testing.tiny_models import VOCAB_SIZE, build_model

FAMILIES = ("llama", "llama-bias", "qwen3", "gemma3", "qwen3_moe", "mixtral")


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("models")

    def folder_of(family: str) -> Path:
        folder = root / family
        if not folder.exists():
            model = build_hybrid() if family == "hybrid" else build_model(family)
            model.save_pretrained(folder)
        return folder

    return folder_of


@pytest.fixture(autouse=True)
def no_vllm(request, monkeypatch):
    """vLLM is asked in the tests that are about that."""
    if not request.node.get_closest_marker("vllm"):
        monkeypatch.setattr(vllm_kv, "is_vllm_here", lambda: False)


def build_hybrid():
    """Gated delta nets and attention in turns, as Qwen3.5 and Qwen3.6 have them."""
    from transformers import AutoModelForCausalLM, Qwen3NextConfig

    config = Qwen3NextConfig(
        vocab_size=VOCAB_SIZE, hidden_size=64, intermediate_size=128, num_hidden_layers=4,
        num_attention_heads=4, num_key_value_heads=2, head_dim=32, max_position_embeddings=256,
        linear_num_key_heads=2, linear_num_value_heads=4, linear_key_head_dim=16,
        linear_value_head_dim=32, linear_conv_kernel_dim=4, num_experts=4, num_experts_per_tok=2,
        moe_intermediate_size=64, shared_expert_intermediate_size=64,
        layer_types=["linear_attention"] * 3 + ["full_attention"],
    )  # fmt: skip
    return AutoModelForCausalLM.from_config(config).to(torch.bfloat16)


def from_headers(folder: Path):
    return shape_from_headers(folder, *read_config(folder), str(folder))


@pytest.mark.parametrize("family", FAMILIES)
def test_headers_tell_what_the_configuration_of_a_known_family_tells(folders, family):
    known, found = find_shape(str(folders(family))), from_headers(folders(family))
    assert weights_of(found, "bf16").total == weights_of(known, "bf16").total
    assert weights_of(found, "nvfp4").experts == pytest.approx(
        weights_of(known, "nvfp4").experts, rel=0.02
    )
    assert found.num_active_weights == known.num_active_weights
    for context in (16, 200):
        assert kv.sequence_bytes(found, context, 8, 64) == kv.sequence_bytes(known, context, 8, 64)
    assert found.tie_word_embeddings == known.tie_word_embeddings


@pytest.mark.parametrize("family", ["llama", "qwen3_moe"])
def test_a_quantised_checkpoint_keeps_its_formats(folders, family, tmp_path):
    write_nvfp4(folders(family), tmp_path / "out", method="rtn")
    known, found = find_shape(str(tmp_path / "out")), from_headers(tmp_path / "out")
    sizes = [weights_of(shape, AS_STORED).total for shape in (found, known)]
    # Shards of a fused layer are padded one by one here.
    assert sizes[0] == pytest.approx(sizes[1], rel=0.02)
    assert {x.stored for x in found.stored} >= {"nvfp4"}


def test_a_hybrid_s_state_and_cache(folders, capsys):
    folder = folders("hybrid")
    shape = find_shape(str(folder))
    assert shape.windows == (0,)
    state = 4 * 16 * 32 * 4
    window = 3 * (2 * 2 * 16 + 4 * 32) * 2
    assert shape.state_bytes == 3 * (state + window)
    one, two = (kv.sequence_bytes(shape, context, 16, 64) for context in (16, 32))
    assert two - one == 16 * 2 * 2 * 32 * 2
    assert one == 16 * 2 * 2 * 32 * 2 + shape.state_bytes
    assert shape.num_experts_per_tok == 2
    stored = sum(p.numel() for p in build_hybrid().parameters())
    assert weights_of(shape, "bf16").total == pytest.approx(2 * stored, rel=0.02)
    assert main(["plan", str(folder), "--context", "128"]) == 0
    assert "Recommended: 1 x" in capsys.readouterr().out


def build_mamba():
    """Mamba-2, a feed-forward layer and attention, with the names of Nemotron-H."""
    from transformers import AutoModelForCausalLM, NemotronHConfig

    config = NemotronHConfig(
        vocab_size=VOCAB_SIZE, hidden_size=64, intermediate_size=128, num_attention_heads=4,
        num_key_value_heads=2, head_dim=32, max_position_embeddings=256, mamba_num_heads=4,
        mamba_head_dim=16, ssm_state_size=16, n_groups=1, conv_kernel=4,
        layers_block_type=["mamba", "moe", "mamba", "attention"], n_routed_experts=4,
        num_experts_per_tok=2, moe_intermediate_size=64, moe_shared_expert_intermediate_size=64,
    )  # fmt: skip
    return AutoModelForCausalLM.from_config(config).to(torch.bfloat16)


def test_a_state_space_model_whose_embedding_has_another_name(tmp_path):
    model = build_mamba()
    model.save_pretrained(tmp_path)
    shape = find_shape(str(tmp_path))
    assert shape.windows == (0,)
    assert shape.state_bytes == 2 * (4 * 4 * 16 * 16 + 2 * 3 * (4 * 16 + 2 * 16))
    stored = sum(p.numel() for p in model.parameters())
    padding = 2 * 2 * (-VOCAB_SIZE % 64) * 64  # of the vocabulary, embedding and lm_head
    assert weights_of(shape, "bf16").total == pytest.approx(2 * stored + padding, rel=1e-3)


def test_a_model_that_transcribes_is_planned_by_its_decoder(tmp_path):
    """Its table of positions stands before that of tokens."""
    shape = find_shape(str(write_architecture(tmp_path, ARCHITECTURES["whisper"])))
    sizes = (shape.vocab_size, shape.hidden_size, shape.max_context, shape.num_attention_heads)
    assert sizes == (architecture.VOCAB_SIZE, 128, 128, 4)


def test_layers_with_other_heads_are_counted_each_as_it_is(tmp_path):
    from transformers import AutoModelForCausalLM, Gemma4TextConfig

    config = Gemma4TextConfig(
        vocab_size=VOCAB_SIZE, hidden_size=64, intermediate_size=128, num_hidden_layers=4,
        num_attention_heads=4, num_key_value_heads=2, head_dim=32, max_position_embeddings=256,
        hidden_size_per_layer_input=0, sliding_window=32,
        layer_types=["sliding_attention"] * 3 + ["full_attention"],
    )  # fmt: skip
    AutoModelForCausalLM.from_config(config).to(torch.bfloat16).save_pretrained(tmp_path)
    stored = json.loads((tmp_path / "config.json").read_text())
    stored.pop("per_layer_config", None)
    stored |= {"global_head_dim": 64, "num_global_key_value_heads": 2}
    (tmp_path / "config.json").write_text(json.dumps(stored))
    shape = find_shape(str(tmp_path))
    assert shape.windows == (32, 32, 32, 0)
    assert (shape.num_key_value_heads, shape.head_dim) == (2, 64)
    assert not shape.notes
    # 2 heads of 32 in the windows, 2 of 64 in the layer without; keys and values, 2 bytes each.
    assert [kept.token_bytes for kept in shape.kept] == [256, 256, 256, 512]


@pytest.mark.parametrize(
    ("name", "weights"),
    [("Qwen3.6-27B", 26.9e9), ("Qwen3.6-35B-A3B", 34.66e9), ("Gemma-4-31B", 30.7e9),
     ("Nemotron-3-Nano-30B-A3B", 31.58e9)],
)  # fmt: skip
def test_a_model_by_its_configuration_alone(name, weights):
    """The language model has as many weights as its model card says."""
    shape = find_shape(name)
    tables = (1 if shape.tie_word_embeddings else 2) * shape.vocab_size * shape.hidden_size
    assert shape.num_weights() + tables + shape.num_other == pytest.approx(weights, rel=2e-3)
    assert sum(x.num_weights for x in shape.stored) == shape.num_weights()
    assert shape.hub
    assert shape.nvfp4


@pytest.mark.parametrize("family", ["qwen3_moe", "hybrid"])
def test_a_folder_without_weights_is_planned_as_with_them(folders, family, tmp_path):
    (tmp_path / "config.json").write_text((folders(family) / "config.json").read_text())
    found, known = find_shape(str(tmp_path)), from_headers(folders(family))
    for fmt in ("bf16", "nvfp4"):
        alone, whole = (weights_of(shape, fmt) for shape in (found, known))
        assert alone.total == pytest.approx(whole.total, rel=0.02)
        assert alone.experts == pytest.approx(whole.experts, rel=0.02)
    assert (found.windows, found.state_bytes) == (known.windows, known.state_bytes)


@pytest.mark.vllm
def test_the_state_is_what_vllm_asks_for(folders):
    from vllm.model_executor.layers.mamba.mamba_utils import MambaStateShapeCalculator

    conv, state = MambaStateShapeCalculator.gated_delta_net_state_shape(1, 2, 4, 16, 32, 4, 0)
    asked = 2 * torch.Size(conv).numel() + 4 * torch.Size(state).numel()
    assert find_shape(str(folders("hybrid"))).state_bytes == 3 * asked


# --- what vLLM's own model says ------------------------------------------------------------------


@pytest.mark.vllm
@pytest.mark.own_process
def test_vllms_own_specification_is_asked_for(folders, capsys, monkeypatch):
    """Gated delta nets: the state's bytes in vLLM's own types, by `plan` itself."""
    answers, ask = [], vllm_kv.ask_vllm
    monkeypatch.setattr(
        vllm_kv, "ask_vllm", lambda config: answers.append(ask(config)) or answers[0]
    )
    folder = folders("hybrid")
    assert main(["plan", str(folder), "--context", "128", "--json"]) == 0
    shown = json.loads(capsys.readouterr().out)
    (kept,) = answers
    states = [layer for layer in kept if layer.state_bytes]
    assert [bool(layer.token_bytes) for layer in kept].count(True) == 1
    assert len(states) == 3
    # The convolution's window in BF16, the state in float32 or BF16 as vLLM has it.
    window, elements = 3 * (2 * 2 * 16 + 4 * 32) * 2, 4 * 16 * 32
    assert {s.state_bytes for s in states} <= {window + 2 * elements, window + 4 * elements}
    shape = replace(find_shape(str(folder)), kept=kept)
    row = shown["recommended"]
    assert row["kv_bytes"] == kv.sequence_bytes(shape, 128, 8, 2048 * kv.STEPS_IN_FLIGHT)
    assert shown["notes"] == list(shape.notes)


def test_equal_layers_take_what_the_windows_say(folders):
    """Described by vLLM or by config.json: the same bytes, with one and two cards."""
    for family in ("llama", "gemma3"):
        shape = find_shape(str(folders(family)))
        token = kv.token_bytes(shape, 16)
        told = replace(shape, kept=tuple(Kept(w, token, 0) for w in shape.windows))
        for context, bits, cards in ((16, 8, 1), (200, 16, 2), (256, 8, 2)):
            asked = (context, bits, 64, cards)
            assert kv.sequence_bytes(told, *asked) == kv.sequence_bytes(shape, *asked)
            one = (context, bits, cards)
            assert kv.read_bytes(told, *one) == kv.read_bytes(shape, *one)
            assert kv.written_bytes(told, *one) == kv.written_bytes(shape, *one)


def test_layers_that_keep_less_of_a_token_have_more_tokens_in_a_block(folders):
    """Three layers with a window and half the heads, one with all: pages of one size."""
    shape = find_shape(str(folders("llama")))
    token = kv.token_bytes(shape, 16)
    told = replace(shape, kept=(*[Kept(32, token // 2, 0)] * 3, Kept(0, token, 0)))
    # Groups of one layer: 100 / 16 blocks, and for each window 95 / 32 and one more.
    assert kv.sequence_bytes(told, 100, 16, 64) == (7 + 3 * (3 + 1)) * 16 * token
    assert kv.written_bytes(told, 100, 8) == 100 * (3 * token // 2 + token) // 2


def test_a_state_takes_a_page_that_keys_fill_with_more_tokens(folders):
    shape = find_shape(str(folders("llama")))
    token = kv.token_bytes(shape, 16)
    told = replace(shape, kept=(Kept(0, 0, 100 * token), Kept(0, token, 0)))
    # 112 tokens are the first multiple of 16 with as many bytes: one page of keys, one of state.
    assert kv.sequence_bytes(told, 100, 16, 64) == 2 * 112 * token
    assert kv.read_bytes(told, 100, 16) == 100 * token + 2 * 100 * token


# --- a hub ---------------------------------------------------------------------------------------


class HubHandler(http.server.BaseHTTPRequestHandler):
    """Serves /owner/name/resolve/main/FILE, with ranges, and /api/models/owner/name."""

    folder: Path
    sent: list[int]

    def do_GET(self):
        if self.path.startswith("/api/models/owner/name"):
            return self._reply(200, json.dumps({"id": "owner/name", "siblings": []}).encode())
        path = self.folder / self.path.rpartition("/")[2]
        if "/owner/name/resolve/main/" not in self.path or not path.is_file():
            return self._reply(404, b"")
        content = path.read_bytes()
        if span := self.headers.get("Range"):
            first, last = map(int, span.removeprefix("bytes=").split("-"))
            return self._reply(206, content[first : last + 1])
        return self._reply(200, content)

    def _reply(self, status: int, content: bytes):
        self.send_response(status)
        self.send_header("Content-Length", str(len(content)))
        self.send_header("Content-Type", "application/json")
        self.end_headers()
        self.wfile.write(content)
        self.sent.append(len(content))

    def log_message(self, *args):
        pass


@pytest.fixture
def served(folders, monkeypatch, tmp_path):
    """serve(folder) makes it owner/name of a hub; returns the sizes of the answers."""
    sent: list[int] = []
    servers = []

    def serve(folder: Path) -> list[int]:
        handler = type("Handler", (HubHandler,), {"folder": folder, "sent": sent})
        server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
        threading.Thread(target=server.serve_forever, daemon=True).start()
        servers.append(server)
        address = f"http://127.0.0.1:{server.server_port}"
        monkeypatch.setenv("HF_ENDPOINT", address)
        for variable in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE"):  # an engine's test sets them
            monkeypatch.delenv(variable, raising=False)
        # The client reads the variable when it is imported.
        import huggingface_hub.constants as constants

        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "ENDPOINT", address)
        monkeypatch.setenv("HF_HOME", str(tmp_path / "hub"))
        return sent

    yield serve
    for server in servers:
        server.shutdown()


@pytest.mark.parametrize("family", ["llama", "hybrid"])
def test_a_hub_name_is_planned_and_inspected_from_its_headers(
    folders, served, capsys, monkeypatch, family
):
    folder = folders(family)
    sent = served(folder)
    for command in (["plan", "--json", "--context", "128"], ["inspect", "--json"]):
        if (family, command[0]) != ("hybrid", "plan"):  # vLLM is asked there alone: it takes long
            monkeypatch.setattr(_online, "is_vllm_here", lambda: False)
        assert main([*command, str(folder)]) == 0
        here = json.loads(capsys.readouterr().out)
        assert main([*command, "owner/name"]) == 0
        there = json.loads(capsys.readouterr().out)
        for name in ("model", "hub", "folder", "command"):
            here.pop(name, None), there.pop(name, None)
        assert here == there
    size = (folder / "model.safetensors").stat().st_size
    assert sum(sent) < 0.4 * 2 * size


def test_what_a_hub_does_not_have(folders, served, capsys):
    served(folders("llama"))
    assert main(["plan", "owner/other"]) == 1
    error = capsys.readouterr().err
    assert "owner/other" in error
    assert error.count("\n") == 1
    assert hub.hub_address().startswith("http://127.0.0.1")


def test_an_engine_decides_by_the_headers_of_a_hub_name(served, tmp_path):
    folder = extract_fixture("modelopt/mixed-llama", tmp_path / "model")
    sent = served(folder)
    _, config = read_config(folder)
    here, there = (
        take_census_of(name, None, config, detect(config)) for name in (str(folder), "owner/name")
    )
    stored = {name: module.stored for name, module in here.modules.items()}
    assert stored == {name: module.stored for name, module in there.modules.items()}
    assert here.headers() == there.headers()
    assert sum(sent) < (folder / "model.safetensors").stat().st_size / 2
    # Nor does it take less than a folder would.
    scale = next(name for name in here.headers() if name.endswith("weight_scale_2"))
    edit_tensors(folder, lambda tensors: tensors.pop(scale))
    with pytest.raises(CheckpointError, match=re.escape(scale)):
        take_census_of("owner/name", None, config, detect(config))
    assert take_census_of("owner/other", None, config, detect(config)) is None
