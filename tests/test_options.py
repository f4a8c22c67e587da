# SPDX-License-Identifier: Apache-2.0
"""Options: where they come from, which wins, and what is refused."""

import json

import pytest

from vllm_nvfp4.options import ENV_PREFIX, Options, markdown_table


@pytest.fixture(autouse=True)
def _no_options_in_the_environment(monkeypatch):
    import os

    for name in os.environ:
        if name.startswith(ENV_PREFIX):
            monkeypatch.delenv(name)


def test_additional_config_wins_over_the_environment(monkeypatch):
    monkeypatch.setenv("VLLM_NVFP4_LM_HEAD", "fp8")
    monkeypatch.setenv("VLLM_NVFP4_ACTIVATION", "8")
    options = Options.resolve({"nvfp4": {"lm_head": "nvfp4"}})
    assert (options.lm_head, options.activation) == ("nvfp4", "8")
    # Also where it asks for the default.
    assert Options.resolve({"nvfp4": {"lm_head": "keep"}}).lm_head == "keep"


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"lmhead": "fp8"}, r"unknown option 'lmhead'. Options are: a8_variant, activation, auto"),
        ({"lm_head": "fp9"}, r"lm_head is 'fp9'; needs one of keep, fp8, nvfp4"),
        ({"native_blackwell": "maybe"}, r"native_blackwell is 'maybe'; needs true or false"),
        ({"online_ignore": 3}, r"online_ignore is 3; needs a list of patterns"),
        ({"cache_dir": ""}, r"cache_dir is ''; needs a non-empty string"),
        ("fp8", r'"nvfp4" is "fp8"; needs an object of options'),
    ],
)
def test_wrong_option_is_refused_with_what_exists(given, message):
    with pytest.raises(ValueError, match=message):
        Options.resolve({"nvfp4": given})


def test_unknown_environment_variable_is_refused(monkeypatch):
    monkeypatch.setenv("VLLM_NVFP4_LMHEAD", "fp8")
    words = "VLLM_NVFP4_LMHEAD: unknown environment variable.*VLLM_NVFP4_LM_HEAD"
    with pytest.raises(ValueError, match=words):
        Options.resolve()


def test_non_default_options_survive_json():
    options = Options.resolve({"nvfp4": {"online_ignore": "a.*, b", "activation": 8}})
    again = Options.resolve({"nvfp4": json.loads(json.dumps(options.non_default()))})
    assert again == options
    assert options.non_default() == {"activation": "8", "online_ignore": ["a.*", "b"]}


def test_table_names_every_option_once():
    table = markdown_table()
    for name in Options.__dataclass_fields__:
        assert table.count(f"| `{name}` |") == 1
