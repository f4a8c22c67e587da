# SPDX-License-Identifier: Apache-2.0
"""Whether a model that is not on this machine can be had from its hub, answered within seconds."""

from __future__ import annotations

import os
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from vllm_nvfp4.checkpoints.locate import find_folder, is_path
from vllm_nvfp4.checkpoints.spec import CheckpointError

# A hub that has not answered by then would keep vLLM waiting through minutes of retries.
HUB_SECONDS = 8.0
_OFFLINE = ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE")
_YES = ("1", "on", "yes", "true")


def require_model(model: str, revision: str, environ: Mapping[str, str]) -> Path | None:
    """The folder of a model that is here; None for one that vLLM can fetch.

    model: a folder, a hub name, or an address that a loader of vLLM's reads (s3://...)
    Raises CheckpointError for a path that does not exist, for a name that the hub does not have,
    and for a hub that does not answer.
    """
    if "://" in model:
        return None
    if is_path(model) or environ.get("VLLM_USE_MODELSCOPE", "").lower() in _YES:
        return find_folder(model, revision) if is_path(model) else None
    try:
        folder = find_folder(model, revision)
    except CheckpointError:
        ask_hub(model, revision, environ)
        return None
    # A download that was stopped: vLLM fetches the rest.
    is_whole = (folder / "config.json").exists() and any(folder.glob("*.safetensors"))
    return folder if is_whole else None


def ask_hub(model: str, revision: str, environ: Mapping[str, str] | None = None) -> None:
    """Raise CheckpointError for a model that the hub has not, or a hub that is out of reach."""
    environ = os.environ if environ is None else environ
    named = f"{model}" + (f", revision {revision}" if revision != "main" else "")
    for variable in _OFFLINE:
        if environ.get(variable, "").lower() in _YES:
            raise CheckpointError(
                named, "model", "nothing in the Hugging Face cache", "the model, or the hub",
                f"{variable}={environ[variable]} forbids a download: unset it, or copy the model "
                "here and name its folder.",
            )  # fmt: skip
    problem = _answer_of_hub(model, revision)
    if problem:
        found, todo = problem
        raise CheckpointError(
            named, "model", f"no such folder, nothing in the Hugging Face cache, and {found}",
            "a folder, or the name of a model on the hub", todo,
        )  # fmt: skip


def _answer_of_hub(model: str, revision: str) -> tuple[str, str] | None:
    """What is wrong and what to do, or None where the hub has the model."""
    answer: list[Any] = []

    def ask() -> None:
        try:
            from huggingface_hub import HfApi

            HfApi().model_info(model, revision=revision, timeout=HUB_SECONDS)
            answer.append(None)
        except Exception as error:  # each version of the client raises its own transport's errors
            answer.append(error)

    thread = threading.Thread(target=ask, daemon=True)
    thread.start()
    # The client's timeout does not count the look-up of the name.
    thread.join(HUB_SECONDS)
    hub = _endpoint()
    if not answer:
        return f"{hub} did not answer in {HUB_SECONDS:.0f} s", _no_network(model)
    error = answer[0]
    if error is None:
        return None
    kind = type(error).__name__
    if isinstance(error, ImportError):
        return None
    if kind == "HFValidationError":
        return "it is no name of a model", "Check the path; a hub name is owner/name."
    if kind == "RevisionNotFoundError":
        return f"{hub} has no revision {revision} of it", "Check --revision."
    if kind in ("RepositoryNotFoundError", "GatedRepoError"):
        return (
            f"{hub} has no model of this name that is open to you",
            "Check the name; for a private or gated model set HF_TOKEN, or log in: hf auth login",
        )
    first = (str(error).strip() or kind).splitlines()[0]
    return f"{hub} cannot be reached ({first})", _no_network(model)


def hub_address() -> str:
    """The hub's address, without a slash at its end."""
    return os.environ.get("HF_ENDPOINT", "").rstrip("/") or "https://huggingface.co"


def hub_headers() -> dict[str, str]:
    """Headers of a request to the hub, with the user's token where there is one."""
    try:
        from huggingface_hub.utils import build_hf_headers
    except ImportError:
        return {}
    return build_hf_headers(library_name="vllm-nvfp4")


def _endpoint() -> str:
    """The hub's address for a message, and the variable that it came from."""
    given = os.environ.get("HF_ENDPOINT")
    return f"{given} (HF_ENDPOINT)" if given else "huggingface.co"


def _no_network(model: str) -> str:
    return (
        "Check the network and HTTPS_PROXY, name a mirror in HF_ENDPOINT, or download it elsewhere "
        f"(hf download {model} --local-dir FOLDER) and name that folder."
    )
