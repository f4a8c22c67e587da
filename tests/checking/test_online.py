# SPDX-License-Identifier: Apache-2.0
"""What check, inspect and plan say of a 16-bit checkpoint is what a real engine makes of it."""

import json

import pytest
from safetensors.torch import load_file

from vllm_nvfp4.checking.check import engine_arguments, examine
from vllm_nvfp4.checkpoints import read_config
from vllm_nvfp4.checkpoints.online_layers import (
    BY_CLASS,
    BY_NAMES,
    BY_VLLM,
    OnlineLayers,
    by_names,
    layer_key,
    without_vllm,
)
from vllm_nvfp4.checkpoints.spec import LayerKind
from vllm_nvfp4.checkpoints.validate import validate
from vllm_nvfp4.cli import _online, main
from vllm_nvfp4.planning.find import find_shape
from vllm_nvfp4.planning.shapes import ROUTER
from vllm_nvfp4.serving.first_check import in_a_copy
from vllm_nvfp4.testing.architecture import VOCAB_SIZE
from vllm_nvfp4.testing.architectures import ARCHITECTURES, write_architecture
from vllm_nvfp4.testing.media import MEDIA
from vllm_nvfp4.testing.model_sweep import serve, write_twin

pytestmark = pytest.mark.vllm

# Routers, shared experts' gates and a tower; inputs of each layer and tables for them; experts
# without a gate; turned stacks; a family whose plan is computed from config.json; a second table;
# an encoder of sound.
SAMPLE = ("qwen3.5-moe", "gemma3n", "nemotron-h-moe", "llama4", "deepseek-v2", "gpt2", "whisper")
# Without sound it has nothing to say.
HEARS = {"whisper": MEDIA["whisper"]}


@pytest.fixture(scope="module")
def reports(tmp_path_factory):
    """Architecture -> its folder and its report, each made in a process without an engine."""
    found = {}
    for name in SAMPLE:
        folder = write_architecture(tmp_path_factory.mktemp(name), ARCHITECTURES[name])
        flags = ["--enforce-eager", "--skip-tokenizer-init"]
        if name in HEARS:
            HEARS[name].write_processor(folder, VOCAB_SIZE)
            flags.pop()
        arguments = engine_arguments(str(folder), flags)
        found[name] = folder, in_a_copy(lambda arguments=arguments: examine(arguments))
    return found


def quantised_by_an_engine(plain, twin, name):
    """(the layers whose rows an engine holds quantised, known by their values; their elements)."""
    _, matrices = serve(plain, ARCHITECTURES[name].dtype, media=HEARS.get(name))
    assert write_twin(plain, matrices, twin) == 0
    before, after = (load_file(f / "model.safetensors") for f in (plain, twin))
    changed = {layer_key(n) for n, t in before.items() if not t.float().equal(after[n].float())}
    return changed, sum(m.numel() for m in matrices)


@pytest.mark.parametrize("name", SAMPLE)
def test_the_layers_of_an_engine(name, reports, tmp_path):
    plain, report = reports[name]
    inventory = validate(plain, *read_config(plain))
    of_class = without_vllm(plain, inventory.layers)
    assert of_class.source == BY_CLASS
    expected, elements = quantised_by_an_engine(plain, tmp_path / "twin", name)
    assert set(report.while_loading) == set(of_class.quantised) == expected
    of_vllm = OnlineLayers(BY_VLLM, frozenset(report.while_loading), report.kept)
    for layers in (of_vllm, of_class):
        online = {
            r.name for r in layers.settle(inventory.layers) if r.spec.kind == LayerKind.ONLINE
        }
        assert {layer_key(n) for n in online} == expected
        shape = find_shape(str(plain), ask_online=lambda *_, told=layers: told)
        planned = [x for x in shape.linears if x.kind != ROUTER and not x.is_kept]
        assert sum(x.num_weights for x in planned) == elements


@pytest.mark.own_process
def test_inspect_asks_vllm_then_the_class_then_names(tmp_path, monkeypatch, capsys):
    folder = write_architecture(tmp_path, ARCHITECTURES["gemma4"])

    def kept():
        assert main.main(["inspect", str(folder), "--json"]) == 0
        told = json.loads(capsys.readouterr().out)
        rows = {row["name"]: row["path"] for row in told["layers"]}
        return told["online_by"], rows["model.layers.{0-3}.per_layer_projection"]

    by_vllm = kept()
    assert by_vllm == (BY_VLLM, "vLLM, BF16")
    monkeypatch.setattr(_online, "is_vllm_here", lambda: False)
    assert kept() == (BY_CLASS, by_vllm[1])
    (folder / "config.json").write_text(
        (folder / "config.json").read_text().replace("gemma4_text", "a_model_of_no_class")
    )
    source, path = kept()
    assert source.startswith(f"{BY_NAMES} (")
    assert path.startswith("quantised to nvfp4")  # a guess


def test_names_know_routers_and_towers(tmp_path):
    folder = write_architecture(tmp_path, ARCHITECTURES["qwen3.5-moe"])
    layers = validate(folder, *read_config(folder)).layers
    told, known = by_names(folder, layers), without_vllm(folder, layers)
    assert told.quantised == known.quantised
