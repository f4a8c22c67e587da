# SPDX-License-Identifier: Apache-2.0
"""Registration with a real vLLM: opt-in, idempotent, lazy, and what it does for each device."""

import subprocess
import sys
import textwrap
from types import SimpleNamespace
from typing import get_args

import pytest
import torch

from vllm_nvfp4.checkpoints.detect import detect
from vllm_nvfp4.checkpoints.spec import CheckpointError
from vllm_nvfp4.options import Options
from vllm_nvfp4.testing.checkpoints import edit_json, extract_fixture, make_legacy
from vllm_nvfp4.testing.tiny_models import write_model

pytestmark = pytest.mark.vllm


def run_python(code, **environment):
    """Run code in a fresh interpreter; its standard output."""
    import os

    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)],
        capture_output=True,
        text=True,
        env=os.environ | environment,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def test_importing_the_package_imports_neither_torch_nor_vllm():
    output = run_python(
        """
        import sys, vllm_nvfp4
        print([m for m in ("torch", "vllm", "triton", "cuda", "llvmlite") if m in sys.modules])
        """
    )
    assert output.strip() == "[]"


def test_registering_twice_patches_once_and_imports_no_layers():
    output = run_python(
        """
        import sys
        from vllm.engine.arg_utils import EngineArgs
        import vllm_nvfp4
        vllm_nvfp4.register()
        first = EngineArgs.create_engine_config
        vllm_nvfp4.register()
        print("RESULT", EngineArgs.create_engine_config is first,
              "vllm_nvfp4.config" in sys.modules, "vllm_nvfp4.layers.linear" in sys.modules)
        """
    )
    assert "RESULT True False False" in output


@pytest.mark.skipif(not torch.cpu._is_amx_tile_supported(), reason="this CPU has no AMX")
def test_the_tile_registers_are_asked_for_before_vllms_attention_uses_them():
    """Else a model whose products are all this plugin's dies in its first token, by SIGILL."""
    output = run_python(
        """
        import ctypes
        from vllm_nvfp4.config import NvFp4Config
        NvFp4Config().options
        allowed = ctypes.c_uint64()
        arch_prctl, get_xcomp_perm = 158, 0x1022
        assert ctypes.CDLL(None).syscall(arch_prctl, get_xcomp_perm, ctypes.byref(allowed)) == 0
        print("RESULT", bool(allowed.value >> 18 & 1))
        """
    )
    assert "RESULT True" in output


def test_builtin_method_of_the_same_name_gives_way():
    output = run_python(
        """
        from typing import Literal, get_args
        from vllm.model_executor.layers import quantization as q
        from vllm.config import quantization as online
        q.QuantizationMethods = Literal[(*get_args(q.QuantizationMethods), "nvfp4")]
        q.QUANTIZATION_METHODS.append("nvfp4")
        online._ONLINE_SHORTHANDS["nvfp4"] = None
        import vllm_nvfp4
        vllm_nvfp4.register()
        config = q.get_quantization_config("nvfp4")
        print("RESULT", config.__name__, "nvfp4" in get_args(q.QuantizationMethods),
              "nvfp4" in online._ONLINE_SHORTHANDS)
        """
    )
    assert "RESULT LazyNvFp4Config False False" in output


def test_a_vllm_with_methods_of_these_names_serves_every_checkpoint_by_this_one(tmp_path):
    """As vLLM's own online quantization would be called: a method, and a shorthand for it."""
    folders = [
        extract_fixture("modelopt/w4a16-llama", tmp_path),
        extract_fixture("compressed_tensors/nvfp4a16-llama", tmp_path),
        write_model(tmp_path / "bf16", "llama"),
    ]
    code = f"""
        from typing import Literal, get_args
        from vllm.config import quantization as online
        from vllm.engine.arg_utils import EngineArgs
        from vllm.model_executor.layers import quantization as q
        names = ("nvfp4", "nvfp4_ada")
        q.QuantizationMethods = Literal[(*get_args(q.QuantizationMethods), *names)]
        for name in names:
            q.QUANTIZATION_METHODS.append(name)
            online._ONLINE_SHORTHANDS[name] = online._ONLINE_SHORTHANDS["nvfp4_per_token"]
        online.ONLINE_QUANT_SHORTHAND_NAMES += names
        for name in names:
            for folder in {[str(folder) for folder in folders]}:
                args = EngineArgs(folder, quantization=name, max_model_len=64, enforce_eager=True)
                config = args.create_engine_config()
                print("RESULT", config.model_config.quantization == name,
                      type(config.quant_config).__name__, args.quantization_config)
        """
    lines = [line for line in run_python(code).splitlines() if line.startswith("RESULT")]
    assert lines == ["RESULT True NvFp4Config None"] * 6


@pytest.mark.parametrize("given", ["nvfp4", "nvfp4_ada"])
def test_the_method_keeps_the_name_that_it_was_asked_by(registered, given, tmp_path):
    folder = extract_fixture("modelopt/w4a16-llama", tmp_path)

    def args(lm_head):
        options = {"nvfp4": {"lm_head": lm_head}}
        return engine_args(folder, quantization=given, additional_config=options)

    config = args("fp8").create_engine_config()
    assert config.model_config.quantization == given
    assert config.additional_config["nvfp4"] == {"lm_head": "fp8"}
    with pytest.raises(ValueError, match="lm_head is 'x'"):
        args("x").create_engine_config()


@pytest.fixture(scope="module")
def registered():
    import vllm_nvfp4

    vllm_nvfp4.register()
    from vllm.model_executor.layers import quantization

    return quantization.get_quantization_config("nvfp4")


def engine_args(folder, **options):
    from vllm.engine.arg_utils import EngineArgs

    return EngineArgs(model=str(folder), enforce_eager=True, max_model_len=64, **options)


def test_nothing_changes_for_a_model_that_did_not_ask(registered, tmp_path):
    folder = extract_fixture("modelopt/w4a16-llama", tmp_path)
    config = engine_args(folder).create_model_config()
    assert config.quantization == "modelopt_fp4" or config.quantization == "modelopt"


def test_auto_takes_an_nvfp4_checkpoint_without_the_flag(registered, tmp_path, monkeypatch):
    monkeypatch.setenv("VLLM_NVFP4_AUTO", "1")
    folder = extract_fixture("compressed_tensors/nvfp4a16-llama", tmp_path)
    assert engine_args(folder).create_model_config().quantization == "nvfp4"


def test_options_of_the_command_line_decide_what_is_decided_early(
    registered, tmp_path, monkeypatch
):
    """Before vLLM's own configuration is there to be read."""
    from vllm_nvfp4.compat import versions

    folder = extract_fixture("modelopt/nvfp4-kv8-llama", tmp_path)
    args = engine_args(folder, additional_config={"nvfp4": {"auto": True}})
    assert args.create_model_config().quantization == "nvfp4"
    monkeypatch.setattr(versions, "device_capability", lambda: (10, 0))
    kept = {"nvfp4": {"native_blackwell": False, "kv_cache": "keep"}}
    args = engine_args(
        folder, quantization="nvfp4", additional_config=kept, kv_cache_dtype="bfloat16"
    )
    assert type(args.create_engine_config().quant_config).__name__ == "NvFp4Config"


def test_auto_leaves_a_foreign_checkpoint_alone(registered, monkeypatch):
    monkeypatch.setenv("VLLM_NVFP4_AUTO", "1")
    for foreign in ({"quant_method": "awq"}, {"quant_method": "fp8"}):
        assert registered.override_quantization_method(foreign, None) is None
    assert registered.override_quantization_method({"quant_method": "awq"}, "awq") is None


def test_environment_options_reach_the_compile_hash(registered, tmp_path, monkeypatch):
    folder = extract_fixture("modelopt/w4a16-llama", tmp_path)
    plain = engine_args(folder, quantization="nvfp4").create_engine_config()
    monkeypatch.setenv("VLLM_NVFP4_LM_HEAD", "fp8")
    changed = engine_args(folder, quantization="nvfp4").create_engine_config()
    assert changed.additional_config["nvfp4"] == {"lm_head": "fp8"}
    assert plain.compute_hash() != changed.compute_hash()


def test_wrong_option_is_refused_before_anything_is_read(registered, tmp_path):
    args = engine_args(
        tmp_path / "nothing-here",
        quantization="nvfp4",
        additional_config={"nvfp4": {"lm_head": "int3"}},
    )
    with pytest.raises(ValueError, match="lm_head is 'int3'; needs one of keep, fp8, nvfp4"):
        args.create_engine_config()


def test_legacy_algorithms_pass_with_the_flag_alone(registered, tmp_path):
    folder = make_legacy(extract_fixture("modelopt/mixed-llama", tmp_path))
    assert engine_args(folder, quantization="nvfp4").create_model_config().quantization == "nvfp4"
    with pytest.raises(ValueError, match="Unknown ModelOpt quant algo"):
        engine_args(folder).create_model_config()


@pytest.mark.parametrize(
    ("name", "native"),
    [
        ("modelopt/nvfp4-kv8-llama", "ModelOptNvFp4Config"),
        ("compressed_tensors/nvfp4-kv8-llama", "CompressedTensorsConfig"),
        ("modelopt/w4a16-llama", "NvFp4Config"),
        ("compressed_tensors/nvfp4a16-llama", "NvFp4Config"),
        ("fp_quant/nvfp4-llama", "NvFp4Config"),
    ],
)
def test_blackwell_gets_vllms_own_kernels(registered, name, native, tmp_path, monkeypatch):
    from vllm_nvfp4.compat import versions

    monkeypatch.setattr(versions, "device_capability", lambda: (10, 0))
    folder = extract_fixture(name, tmp_path)
    args = engine_args(folder, quantization="nvfp4")
    config = args.create_model_config().hf_config.quantization_config
    assert type(registered.from_config(config)).__name__ == native
    monkeypatch.setenv("VLLM_NVFP4_NATIVE_BLACKWELL", "0")
    assert type(registered.from_config(config)).__name__ == "NvFp4Config"
    monkeypatch.delenv("VLLM_NVFP4_NATIVE_BLACKWELL")
    monkeypatch.setattr(versions, "device_capability", lambda: (8, 9))
    assert type(registered.from_config(config)).__name__ == "NvFp4Config"


def test_16_bit_layer_of_odd_width_stays_as_it_is():
    from vllm_nvfp4.checkpoints.online import online_spec
    from vllm_nvfp4.config import NvFp4Config
    from vllm_nvfp4.numerics.formats import MXFP4, NVFP4
    from vllm_nvfp4.options import Options

    config = NvFp4Config()
    config._options = Options(online_ignore=("*.router",))
    for width, fmt, name, expected in (
        (48, NVFP4, "layer.0.up", False),
        (48, MXFP4, "layer.0.up", True),
        (40, NVFP4, "layer.0.up", True),
        (48, NVFP4, "layer.0.router", True),
    ):
        assert config._stays_in_16_bits(online_spec(fmt), name, width) is expected


def test_what_experts_cannot_do_is_refused(registered):
    from vllm_nvfp4.config import NvFp4Config

    class RoutedExperts(torch.nn.Module):
        moe_config = SimpleNamespace(
            num_logical_experts=2,
            hidden_dim=64,
            intermediate_size=64,
            has_bias=False,
            is_act_and_mul=True,
            moe_parallel_config=SimpleNamespace(enable_eplb=False),
        )

    name, parts = "model.layers.0.mlp.experts", ("gate", "up", "down")
    # Without the files there is nothing to widen: vLLM's method would take the codes for weights.
    table = {f"{name}.{e}.{p}_proj": {"quant_algo": "FP8"} for e in range(2) for p in parts}
    config = NvFp4Config(
        {"quant_method": "modelopt", "quant_algo": "MIXED_PRECISION", "quantized_layers": table}
    )
    config._options = Options()
    with pytest.raises(CheckpointError, match=rf"{name}.*found fp8.*needed NVFP4 or MXFP4 experts"):
        config.get_quant_method(RoutedExperts(), name)
    config = NvFp4Config()
    config._options = Options(online_ignore=("*.experts",))
    assert config.get_quant_method(RoutedExperts(), name) is None
    # An inner size of 40 has no whole blocks: such experts stay in 16 bits.
    config._options = Options()
    RoutedExperts.moe_config.intermediate_size = 40
    assert config.get_quant_method(RoutedExperts(), name) is None


def test_tied_options_must_agree():
    from vllm_nvfp4.layers.embedding import Vocabulary

    dialect = detect(None)
    assert Vocabulary(Options(lm_head="fp8"), dialect, are_tied=True).tied_format == "fp8"
    both = Vocabulary(Options(lm_head="fp8", embedding="nvfp4"), dialect, are_tied=True)
    with pytest.raises(ValueError, match="are one tensor"):
        _ = both.tied_format


def test_a_truncated_file_ends_with_one_plain_error(registered, tmp_path):
    folder = extract_fixture("modelopt/w4a16-llama", tmp_path)
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1000])
    with pytest.raises(CheckpointError, match=r"^model.safetensors: .*: the file is truncated"):
        engine_args(folder, quantization="nvfp4").create_engine_config()


def test_a_damaged_checkpoint_ends_before_loading(registered, tmp_path):
    folder = extract_fixture("modelopt/w4a16-llama", tmp_path)
    edit_json(folder / "config.json", lambda c: c["quantization_config"].update(quant_algo="NVFP5"))
    with pytest.raises(ValueError, match=r"NVFP5"):
        engine_args(folder, quantization="nvfp4").create_engine_config()


def test_register_is_in_the_table_of_methods(registered):
    from vllm.model_executor.layers import quantization

    assert "nvfp4" in quantization.QUANTIZATION_METHODS
    assert "nvfp4" not in get_args(quantization.QuantizationMethods)


@pytest.mark.parametrize(
    ("given", "drafts", "hybrid", "becomes"),
    [
        (None, {"method": "mtp"}, True, False),
        (True, {"method": "mtp"}, True, True),  # the user's word counts
        (None, None, True, None),
        (None, {"method": "mtp"}, False, None),
    ],
)
def test_no_prefix_caching_of_states_where_tokens_are_drafted(given, drafts, hybrid, becomes):
    from vllm_nvfp4 import plugin

    arguments = SimpleNamespace(enable_prefix_caching=given, speculative_config=drafts)
    plugin._leave_out_prefix_caching(arguments, SimpleNamespace(is_hybrid=hybrid))
    assert arguments.enable_prefix_caching is becomes
