# SPDX-License-Identifier: Apache-2.0
"""A ``vllm serve`` command line, read and checked before vLLM is imported.

vLLM's own parser takes seconds to import and has the last word (see launch.py). Here is what can
be said at once: the model, the port, the files and the plugin's options.
"""

from __future__ import annotations

import argparse
import json
import os
import socket
from collections.abc import Mapping, Sequence
from itertools import zip_longest
from pathlib import Path
from types import SimpleNamespace

from vllm_nvfp4.checkpoints.detect import read_config
from vllm_nvfp4.checkpoints.hub import require_model
from vllm_nvfp4.checkpoints.validate import validate
from vllm_nvfp4.compat import cpu_metadata, kv_cache
from vllm_nvfp4.compat.flags import check_names
from vllm_nvfp4.options import METHOD_NAME, METHOD_NAMES, Options

_SHORT = {"-q": "--quantization", "-tp": "--tensor-parallel-size", "-O": "--optimization-level"}
_PORT = 8000
# Flags of `vllm serve` whose value is a file that has to be there.
_FILES = (
    "--ssl-keyfile",
    "--ssl-certfile",
    "--ssl-ca-certs",
    "--log-config-file",
    "--middleware-config",
)


def read_flags(args: Sequence[str]) -> dict[str, str]:
    """{flag: value} of a command line and of the YAML file that its --config names.

    The command line wins. Flags are spelt long and with dashes; one without a value has "".
    Raises ValueError for a --config file that is missing or no table.
    """
    found: dict[str, str] = {}
    for arg, after in zip_longest(args, args[1:], fillvalue=""):
        if not arg.startswith("-"):
            continue
        name, equals, value = arg.partition("=")
        name = _SHORT.get(name, name.replace("_", "-"))
        found[name] = value if equals or after.startswith("-") else after
    if "--config" in found:
        found = _flags_of_config(Path(found["--config"]).expanduser()) | found
    return found


def _flags_of_config(path: Path) -> dict[str, str]:
    import yaml

    if not path.is_file():
        raise ValueError(f"--config {path}: no such file")
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        reason = " ".join(str(error).split())
        raise ValueError(f"--config {path}: not YAML: {reason}") from error
    if not isinstance(content, dict):
        raise ValueError(
            f"--config {path}: found {type(content).__name__}; needed `flag: value` lines"
        )
    return {
        "--" + str(key).replace("_", "-"): value if isinstance(value, str) else json.dumps(value)
        for key, value in content.items()
    }


def model_of(args: Sequence[str], flags: Mapping[str, str]) -> str | None:
    """The model that a command line names, where that can be read without vLLM's parser.

    None for a model behind other flags: which of them take a value is vLLM's to know.
    """
    if args and not args[0].startswith("-"):
        return args[0]
    return flags.get("--model")


def check(
    args: Sequence[str], environ: Mapping[str, str] | None = None, with_port: bool = True
) -> None:
    """Raise ValueError or OSError for what ``vllm serve ARGS`` would fail with, before it starts.

    args:      what follows `vllm serve`
    with_port: False where the port is chosen for it
    Takes no longer than a look at the files, but ten seconds where a hub has to be asked.
    """
    environ = os.environ if environ is None else environ
    flags = read_flags(args)
    check_names(args)
    by_plugin = flags.get("--quantization", METHOD_NAME) in METHOD_NAMES
    options = Options()
    if by_plugin:
        # What a --config file says stands in ``flags`` alone.
        from_file = [f"{k}={v}" for k, v in flags.items() if k.startswith("--additional-config")]
        options = plugin_options([*from_file, *args])
    for flag in _FILES:
        if (path := flags.get(flag)) and not Path(path).expanduser().is_file():
            raise ValueError(f"{flag} {path}: no such file")
    if with_port and not flags.keys() & {"--uds", "--headless"}:
        check_port(flags.get("--host", ""), flags.get("--port"))
    if model := model_of(args, flags):
        folder = check_model(model, flags.get("--revision") or "main", by_plugin, environ)
        if folder is not None and by_plugin:
            _check_kv_cache(folder, flags.get("--kv-cache-dtype", "auto"), options)


def check_model(
    model: str, revision: str, by_plugin: bool, environ: Mapping[str, str] | None = None
) -> Path | None:
    """The model's folder, if it is here; CheckpointError if it is nowhere or cannot be served.

    by_plugin: whether this project's method is to serve it; only then are the layers looked at
    """
    folder = require_model(model, revision, os.environ if environ is None else environ)
    if folder is not None and by_plugin:
        validate(folder, *read_config(folder))
    return folder


def plugin_options(flags: Sequence[str]) -> Options:
    """The plugin's options of a server with these flags, read as the server will.

    ``--additional-config`` is taken as JSON and in vLLM's dotted form,
    ``--additional-config.nvfp4.lm_head fp8``.
    """
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--additional-config", default="{}")
    for name in Options.__dataclass_fields__:
        parser.add_argument(f"--additional-config.nvfp4.{name}", dest=name, default=None)
    known, _ = parser.parse_known_args(list(flags))
    values = dict(vars(known))
    text = values.pop("additional_config")
    try:
        config = json.loads(text)
    except ValueError as error:
        raise ValueError(
            f"--additional-config {text}: not JSON ({error}); needs JSON such as "
            '\'{"nvfp4": {"lm_head": "fp8"}}\', in quotes'
        ) from None
    if not isinstance(config, dict):
        raise ValueError(f"--additional-config {text}: needs a JSON object")
    Options.resolve(config)
    dotted = {name: value for name, value in values.items() if value is not None}
    return Options.resolve({"nvfp4": config.get("nvfp4", {}) | dotted})


def _check_kv_cache(folder: Path, dtype: str, options: Options) -> None:
    """Raise the ValueError of a KV cache that this CPU cannot hold, where it is asked for by name.

    vLLM would raise it some seconds later.
    """
    if not cpu_metadata.is_cpu_build():
        return
    where = f"--kv-cache-dtype {dtype}"
    if dtype == "auto" and options.kv_cache == "fp8":
        dtype, where = "fp8", "option kv_cache=fp8"
    if dtype == "auto":
        return
    config, _ = read_config(folder)
    size = kv_cache.head_size(SimpleNamespace(**(config.get("text_config") or config)))
    if obstacle := kv_cache.cpu_obstacle(dtype, size):
        raise kv_cache.refusal(where, obstacle)


def check_port(host: str, port: str | None) -> None:
    """Raise ValueError for a port that is none, or OSError for one that cannot be had.

    host: the address to listen on; empty for all
    port: as given; None for vLLM's own
    """
    number = int(port) if port and port.isdecimal() else _PORT if port is None else -1
    if not 0 <= number <= 65535:
        raise ValueError(f"--port {port}: needs a whole number, 1 to 65535")
    named = f"port {number}, vLLM's default," if port is None else f"--port {number}"
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as probe:
        # As vLLM's own socket: a port that a server has just left can be had.
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, number))
        except PermissionError:
            raise OSError(f"{named} is for root alone; choose one from 1024 on: --port") from None
        except socket.gaierror as error:
            raise OSError(f"--host {host}: {error.strerror}") from None
        except OSError as error:
            where = f" on {host}" if host else ""
            raise OSError(
                f"{named} cannot be used{where}: {error.strerror}; choose another with --port"
            ) from None
