# SPDX-License-Identifier: Apache-2.0
"""``vllm-nvfp4 check MODEL``: whether vLLM will load a model, and with which kernels.

vLLM builds the model and loads it on the meta device: no GPU is used and no weight is read.
"""

from __future__ import annotations

import argparse
import json
from typing import Any

TAKES_AFTER_DASHES = True


def add_parser(subparsers: Any) -> None:
    parser = subparsers.add_parser(
        "check",
        help="whether a model will load, before it is served",
        usage="vllm-nvfp4 check MODEL [--json] [-- any flag of `vllm serve`]",
        description="Build the model as vLLM will and load it without its data: the kernel that "
        "each kind of layer gets and the bytes on each device, or every tensor without a place and "
        "every parameter without a tensor. No GPU, no weights. What follows -- is vLLM's, such as "
        "--tensor-parallel-size 2. The exit status is 1 if it will not load as it is stored.",
    )
    parser.add_argument("model", metavar="MODEL", help="a folder, or a hub name")
    parser.add_argument("--json", action="store_true", help="print one JSON object")


def run(args: argparse.Namespace) -> int:
    from vllm_nvfp4.checking.check import engine_arguments, examine
    from vllm_nvfp4.compat import cpu_metadata
    from vllm_nvfp4.compat.quiet import log_errors_alone
    from vllm_nvfp4.serving import arguments

    log_errors_alone()
    cpu_metadata.apply()
    arguments.check([args.model, *args.after_dashes], with_port=False)
    report = examine(engine_arguments(args.model, args.after_dashes))
    if args.json:
        print(json.dumps(report.to_json(), indent=2))
    else:
        print("\n".join(report.lines()))
    return 0 if report.is_right else 1
