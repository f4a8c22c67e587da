# SPDX-License-Identifier: Apache-2.0
"""Whether vLLM, with this plugin, will load a model; from its configuration and headers alone.

report = check("folder")            # in a process of its own
report = examine(engine_args)       # in this one, which has vLLM
"""

from __future__ import annotations

import json
import os
import re
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

from vllm_nvfp4.checking.report import Finding, Report, from_json
from vllm_nvfp4.compat import cpu_metadata, lean
from vllm_nvfp4.compat.messages import message_of
from vllm_nvfp4.compat.quiet import log_errors_alone, shows_everything

_MARK = '{"schema"'  # how a report in JSON begins
_DOWNLOAD = "Download the missing files, or quantise the model again."
_CORRECT = "Correct config.json, or download the model again."
_AGAIN = "Quantise the model again, or download it again if others can load it."
_MODALITIES = ("image", "video", "audio")
_EXPERT = re.compile(r"(\bexperts\.(?:[A-Za-z_]\w*\.)?)\d+(?=\.)")


def check(model: Path | str, flags: Sequence[str] = ()) -> Report:
    """The report on a model, made in a process of its own.

    model: a folder, or a hub name
    flags: of `vllm serve`, such as --tensor-parallel-size 2
    Raises ValueError for a model that is nowhere, and for wrong flags.
    """
    environ = dict(os.environ)
    cpu_metadata.apply(environ)
    said, ended = lean.ask("vllm_nvfp4.checking.check", [str(model), *flags], environ, _MARK)
    if ended.returncode or said is None:
        lines = ended.stderr.strip().splitlines() or [f"exit status {ended.returncode}"]
        raise ValueError(lines[-1])
    return from_json(json.loads(said))


def examine(engine_args: Any) -> Report:
    """The report on what an engine with these arguments of vLLM's would load.

    No weight is read, no memory is taken and no kernel is built; the process must be one that
    starts no engine before or after.
    """
    from vllm_nvfp4.compat.meta_model import frame_of

    started = time.monotonic()
    try:
        config = engine_args.create_engine_config()
        with frame_of(config):
            found = _examine_models(config)
    except Exception as error:
        if shows_everything():
            raise
        finding = Finding(str(engine_args.model), message_of(error))
        return Report(
            str(engine_args.model), "", "", 1, (), (finding,), (), {}, time.monotonic() - started
        )
    return found(time.monotonic() - started)


def load_alone(engine_args: Any) -> Any:
    """The model that an engine with these arguments would load, as ``load_without_data`` has it."""
    from vllm_nvfp4.checking.load import load_without_data
    from vllm_nvfp4.compat.meta_model import frame_of

    config = engine_args.create_engine_config()
    with frame_of(config):
        return load_without_data(config, config.quant_config.census.headers())


def _examine_models(config: Any) -> Callable[[float], Report]:
    """Build and load the model, and the draft model of speculative decoding if there is one."""
    from vllm_nvfp4.checking.draft import draft_of, found_census
    from vllm_nvfp4.checking.layers import draft_groups, layer_groups
    from vllm_nvfp4.checking.load import load_without_data
    from vllm_nvfp4.checking.online import online_layers

    model_config, parallel = config.model_config, config.parallel_config
    census = found_census(getattr(config.quant_config, "census", None), model_config)
    loaded = load_without_data(config, census.headers())
    groups = tuple(layer_groups(loaded.model))
    errors, unused = list(_errors(loaded)), set(loaded.unused)
    found = [(unused, census)]
    if (draft := draft_of(config)) is not None:
        of_draft = _load_draft(draft, census)
        groups += tuple(draft_groups(of_draft.model))
        errors += _errors(of_draft)
        if draft.census is None:
            unused &= set(of_draft.unused)
        else:
            found.append((set(of_draft.unused), draft.census))
    dropped: list[Finding] = []
    left_out: dict[str, int] = {}
    for names, of_files in found:
        of_layers, of_others = _unused(names, of_files)
        dropped += of_layers
        left_out |= of_others
    devices = parallel.tensor_parallel_size * parallel.pipeline_parallel_size
    architecture = type(loaded.model).__name__
    online = online_layers(loaded, census.headers()) if config.quant_config.is_online else None
    return lambda seconds: Report(
        str(model_config.model),
        architecture,
        census.dialect.name,
        devices,
        groups,
        tuple(_folded(errors)),
        tuple(_folded(dropped)),
        left_out,
        seconds,
        tuple(sorted(online.quantised)) if online else (),
        online.kept if online else {},
        tuple(_notes(model_config)),
    )


def _notes(model_config: Any) -> Iterable[str]:
    """A model that takes pictures or sound loads without what prepares these, and its engine ends
    while it starts."""
    from transformers.utils import IMAGE_PROCESSOR_NAME, PROCESSOR_NAME

    limits = getattr(model_config, "multimodal_config", None)
    folder = Path(model_config.model)
    if limits is None or not folder.is_dir():
        return
    names = (IMAGE_PROCESSOR_NAME, PROCESSOR_NAME)
    is_limited = not all(limits.get_limit_per_prompt(m) for m in _MODALITIES)
    if not is_limited and not any((folder / name).is_file() for name in names):
        zero = json.dumps(dict.fromkeys(_MODALITIES, 0))
        yield (
            f"{folder}: found neither {' nor '.join(names)}, which an engine needs for pictures "
            "and sound. Copy them from the original model, or serve text alone: "
            f"--limit-mm-per-prompt '{zero}'"
        )


def _load_draft(draft: Any, target: Any) -> Any:
    """The load of a draft model, whose tables are the target's where its files have none."""
    from vllm_nvfp4.checking.layers import vocabulary_names
    from vllm_nvfp4.checking.load import load_without_data

    headers = (draft.census or target).headers()
    loaded = load_without_data(draft.config, headers, draft.model_config)
    shared = set(vocabulary_names(loaded.model))
    loaded.empty = {n: v for n, v in loaded.empty.items() if n.rpartition(".")[0] not in shared}
    return loaded


def _errors(loaded: Any) -> Iterable[Finding]:
    for name, message in loaded.refused.items():
        yield Finding(name or "load", message)
    for name, (filled, size) in loaded.empty.items():
        found = f"found {filled} of {size} elements in the files; needed all of them"
        yield Finding(name, f"{found}. {_DOWNLOAD}")
    for name, (read, size) in loaded.cut.items():
        found = f"found {size} elements in the files, of which the model takes {read}"
        yield Finding(name, f"{found}; needed sizes in config.json that take them all. {_CORRECT}")


def _unused(names: Iterable[str], census: Any) -> tuple[list[Finding], dict[str, int]]:
    """(tensors that a loaded layer is left without, layers of which nothing was loaded)."""
    known = {stored.name: name for name, stored in census.stored_as.items()}
    unused = {known.get(new, new) for name in names for new in census.names_of(name)}
    dropped: list[Finding] = []
    left_out: Counter[str] = Counter()
    here = {
        _EXPERT.sub(r"\1*", name)
        for name, module in census.modules.items()
        if any(f"{name}.{leaf}" not in unused for leaf in module.tensors)
    }
    for name, module in census.modules.items():
        tensors = {f"{name}.{leaf}" if name else leaf: leaf for leaf in module.tensors}
        missed = {tensor: leaf for tensor, leaf in tensors.items() if tensor in unused}
        if not missed:
            continue
        if len(missed) == len(tensors):
            if _EXPERT.sub(r"\1*", name) != name and _EXPERT.sub(r"\1*", name) in here:
                continue  # on other ranks
            left_out[re.sub(r"\.\d+(?=\.|$)", ".*", name or next(iter(missed)))] += 1
            continue
        for tensor, leaf in missed.items():
            if leaf not in module.dispensable:
                found = "no parameter that it is loaded into, beside others of its layer that have"
                dropped.append(Finding(tensor, f"found {found}; needed one. {_AGAIN}"))
    return dropped, dict(left_out)


def _folded(findings: Sequence[Finding]) -> Iterable[Finding]:
    """One finding for what is the same of many experts."""
    counts: Counter[tuple[str, str]] = Counter()
    first: dict[tuple[str, str], Finding] = {}
    for finding in findings:
        key = _EXPERT.sub(r"\1*", finding.what), _EXPERT.sub(r"\1*", finding.message)
        counts[key] += 1
        first.setdefault(key, finding)
    for key, finding in first.items():
        more = f" And {counts[key] - 1} more of these experts." if counts[key] > 1 else ""
        yield Finding(finding.what, finding.message + more)


def engine_arguments(model: str, flags: Sequence[str]) -> Any:
    """vLLM's arguments for a model and flags of `vllm serve`; this plugin's method unless they name
    another. Raises ValueError for wrong flags."""
    from vllm.engine.arg_utils import EngineArgs
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    from vllm_nvfp4.compat.flags import raise_flag_errors
    from vllm_nvfp4.options import METHOD_NAME

    raise_flag_errors()
    switched: dict[str, Any] = {flag.removeprefix("--").replace("-", "_"): True for flag in flags}
    kinds = {field.name: field.type for field in fields(EngineArgs)}
    if all(flag.startswith("--") for flag in flags) and all(
        kinds.get(name) in (bool, "bool") for name in switched
    ):  # the parser of all flags takes a second to make
        return EngineArgs(model=model, quantization=METHOD_NAME, **switched)
    parser = EngineArgs.add_cli_args(FlexibleArgumentParser(prog="vllm-nvfp4 check"))
    args = parser.parse_args(["--model", model, "--quantization", METHOD_NAME, *flags])
    return EngineArgs.from_cli_args(args)


def main(argv: Sequence[str]) -> int:
    """Print the report on argv's model as one line of JSON; 1 with one line of error."""

    def find(model: str, *flags: str) -> str:
        arguments = engine_arguments(model, flags)
        lean.look_here()
        return json.dumps(examine(arguments).to_json())

    log_errors_alone()
    return lean.answer(argv, find)


if __name__ == "__main__":
    lean.end(main(sys.argv[1:]))
