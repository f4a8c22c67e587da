# SPDX-License-Identifier: Apache-2.0
"""What `check` and transformers' class tell of a model's layers is what an engine holds.

`make models` asks it of every architecture; here one is asked, and that a difference is found.
"""

import pytest

from vllm_nvfp4.testing.agreement import ask_check, compare, held_by
from vllm_nvfp4.testing.architectures import ARCHITECTURES, write_architecture
from vllm_nvfp4.testing.model_sweep import serve

pytestmark = pytest.mark.vllm


def test_an_engine_with_other_layers_is_found(tmp_path):
    folder = write_architecture(tmp_path, ARCHITECTURES["zamba2"])
    told = ask_check(folder, "float32", method="spawn")
    held, other = {}, {}
    serve(folder, "float32", look=lambda model: held.update(held_by(model)))
    compare(told, held)
    ignored = {"nvfp4": {"kv_cache": "keep", "online_ignore": ["*.o_proj"]}}
    look = lambda model: other.update(held_by(model))  # noqa: E731
    serve(folder, "float32", additional_config=ignored, look=look)
    with pytest.raises(ValueError, match=r"disagree about .*o_proj \(nvfp4 by .*, held 16 bits"):
        compare(told, other)
    with pytest.raises(ValueError, match="held nvfp4"):
        compare(dict.fromkeys(told, ("16 bits", "vLLM")), held)
    with pytest.raises(ValueError, match="by another path"):
        compare({n: (f, "another path") if f == "nvfp4" else (f, p) for n, (f, p) in told.items()},
                held)  # fmt: skip
