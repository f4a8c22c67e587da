# SPDX-License-Identifier: Apache-2.0
"""``vllm-nvfp4 serve MODEL [any vLLM flag]``: vLLM's own server with this project's defaults."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NoReturn

from vllm_nvfp4.bench.variants import plugin_options
from vllm_nvfp4.checkpoints import read_config
from vllm_nvfp4.checkpoints.validate import validate
from vllm_nvfp4.compat import cpu_metadata, kv_cache
from vllm_nvfp4.serving.host import command_line

_USAGE = """usage: vllm-nvfp4 serve MODEL [any flag of `vllm serve`]

vLLM's own OpenAI-compatible server, with these defaults where nothing else is given:
  --quantization nvfp4
  on a CPU:
    --kv-cache-memory-bytes  a quarter of the available memory
    --enforce-eager          where no C++ compiler can serve torch.compile

`vllm-nvfp4 serve --help=all` lists vLLM's flags.
"""


def add_parser(subparsers: Any) -> None:
    # No argument begins with NUL, so argparse takes all of them, flags included, as they are.
    parser = subparsers.add_parser(
        "serve",
        help="vLLM's server with this project's defaults",
        add_help=False,
        prefix_chars="\0",
    )
    parser.add_argument("vllm_args", nargs="*")


def run(args: argparse.Namespace) -> int:
    if not args.vllm_args or args.vllm_args[0] in ("-h", "--help"):
        print(_USAGE, end="")
    else:
        check_files(args.vllm_args)
        check_kv_cache(args.vllm_args)
        replace_this_process(args.vllm_args)
    return 0 if args.vllm_args else 2


def check_files(vllm_args: Sequence[str]) -> None:
    """Raise the CheckpointError of a local folder at once, before vLLM takes seconds to start.

    Only where the model is named first and this project's method is to serve it.
    """
    if (folder := _own_folder(vllm_args)) is not None:
        validate(folder, *read_config(folder))


def _own_folder(vllm_args: Sequence[str]) -> Path | None:
    folder = Path(vllm_args[0])
    other_method = any(
        arg.startswith(("-q", "--quantization")) and "nvfp4" not in f"{arg} {after}"
        for arg, after in zip(vllm_args, [*vllm_args[1:], ""], strict=True)
    )
    return folder if folder.is_dir() and not other_method else None


def check_kv_cache(vllm_args: Sequence[str]) -> None:
    """Raise the ValueError of a KV cache that this CPU cannot hold, where it is asked for by name.

    vLLM would raise it some seconds later, below a traceback. Only where the model is named first
    and this project's method is to serve it.
    """
    folder = _own_folder(vllm_args)
    if folder is None or not cpu_metadata.is_cpu_build():
        return
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--kv-cache-dtype", "--kv_cache_dtype", default="auto")
    dtype = parser.parse_known_args(list(vllm_args))[0].kv_cache_dtype
    where = f"--kv-cache-dtype {dtype}"
    if dtype == "auto" and plugin_options(vllm_args).kv_cache == "fp8":
        dtype, where = "fp8", "option kv_cache=fp8"
    if dtype == "auto":
        return
    config, _ = read_config(folder)
    size = kv_cache.head_size(SimpleNamespace(**(config.get("text_config") or config)))
    if obstacle := kv_cache.cpu_obstacle(dtype, size):
        raise kv_cache.refusal(where, obstacle)


def replace_this_process(vllm_args: Sequence[str]) -> NoReturn:
    """Become vLLM's server: signals reach it as if it had been started directly."""
    command, environ, notes = command_line(vllm_args)
    for note in notes:
        print(f"vllm-nvfp4: {note}", file=sys.stderr)
    sys.stderr.flush()
    os.execve(command[0], command, environ)
