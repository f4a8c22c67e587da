# SPDX-License-Identifier: Apache-2.0
"""``vllm-nvfp4 quantize MODEL -o OUT``: a 16-bit model becomes an NVFP4 checkpoint."""

from __future__ import annotations

import argparse
import os
import shutil
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vllm_nvfp4.cli._arguments import any_whole, number, whole
from vllm_nvfp4.cli._files import check_can_write, check_text
from vllm_nvfp4.cli._quantize_gguf import take_over
from vllm_nvfp4.cli._quantize_source import gguf_file, gguf_folder, source_folder
from vllm_nvfp4.cli._quantize_text import kept_lines, plan_memory, print_summary
from vllm_nvfp4.quantize.methods import CALIBRATED, DATA_FREE, follows_exact

if TYPE_CHECKING:
    from vllm_nvfp4.checkpoints.write import WriteReport
    from vllm_nvfp4.quantize.calibration import Calibration
    from vllm_nvfp4.serving.progress import Step

VARIANTS = ("exact", "int8")


def add_parser(subparsers: Any) -> None:
    parser = subparsers.add_parser(
        "quantize",
        help="make an NVFP4 checkpoint from a 16-bit model",
        description="Make an NVFP4 checkpoint from a 16-bit model, layer by layer. A run that was "
        "stopped continues where it was if it is started again with the same arguments.",
    )
    parser.add_argument(
        "model", metavar="MODEL", help="a folder, a downloaded hub name, or a .gguf file"
    )
    parser.add_argument("-o", "--output", metavar="OUT", required=True, help="folder to make")
    parser.add_argument(
        "--method",
        choices=(*DATA_FREE, *CALIBRATED),
        help="rtn: round to nearest; mse: best block scale by the weights alone (default); "
        "hessian: best block scale by the layer's inputs; gptq: codes and scales by the layer's "
        "inputs (default with --calibration); mr-gptq: the same on rotated weights, for engines "
        "that rotate each layer's inputs",
    )
    parser.add_argument(
        "--format",
        choices=("modelopt", "compressed-tensors"),
        help="dialect (default: modelopt; mr-gptq has FP-Quant's)",
    )
    parser.add_argument(
        "--calibration",
        metavar="FILE|builtin",
        help="text for hessian, gptq and --kv-cache (default: builtin)",
    )
    parser.add_argument(
        "--kv-cache",
        choices=("keep", "fp8"),
        default="keep",
        help="fp8: measure scales for an FP8 KV cache on the text and ask for it (default: keep)",
    )
    parser.add_argument(
        "--samples",
        type=whole(),
        default=16,
        metavar="N",
        help="sequences of calibration text (default: 16)",
    )
    parser.add_argument(
        "--sample-length",
        type=whole(),
        default=1024,
        metavar="N",
        help="tokens of each sequence (default: 1024)",
    )
    parser.add_argument(
        "--seed",
        type=any_whole,
        default=0,
        metavar="N",
        help="chooses the parts of the text (default: 0)",
    )
    parser.add_argument(
        "--activation",
        choices=("16", "8"),
        default="16",
        help="bits of the activations that hessian, gptq and mr-gptq choose weights for; with 8, "
        "the output on rounded inputs comes near to the source's on its own (default: 16)",
    )
    parser.add_argument(
        "--a8-variant",
        choices=VARIANTS,
        default="exact",
        help="with --activation 8: exact is FP8 with one scale per token, int8 INT8 with one per "
        "token and 64 columns, as the engine's option of this name (default: exact)",
    )
    parser.add_argument(
        "--towers",
        action="store_true",
        help="quantise the linear layers of vision and audio towers too",
    )
    parser.add_argument(
        "--ignore",
        action="append",
        default=[],
        metavar="PATTERN",
        help="keep layers of these names, e.g. '*.self_attn', or below them in 16 bits, and with "
        "a shard its whole fused layer, with an expert its block's; may be given more than once",
    )
    parser.add_argument(
        "--no-check",
        action="store_true",
        help="give OUT its name without asking vLLM whether it can be loaded",
    )
    budget = parser.add_mutually_exclusive_group()
    budget.add_argument(
        "--target-bits",
        type=number(above=True, what="bits per weight"),
        metavar="BITS",
        help="choose NVFP4, FP8 or 16 bits for each layer: the least KL with BITS per weight, on "
        "average over the decoder's linear layers and an lm_head with a weight of its own",
    )
    budget.add_argument(
        "--max-kl",
        type=number(what="nats"),
        metavar="NATS",
        help="the same, with the fewest bits whose KL, added up over the layers, is below NATS",
    )
    parser.add_argument(
        "--embedding",
        action="store_true",
        help="with either: choose a format for the token embedding too, which is lm_head's weight "
        "where the two are tied. This plugin serves it; other loaders want a 16-bit embedding",
    )
    parser.add_argument(
        "--report",
        metavar="FILE",
        help="with either: print each layer's KL and format, and plot them to FILE (.png or .svg)",
    )
    parser.add_argument(
        "--memory",
        type=number(above=True, what="GiB"),
        metavar="GIB",
        help="how much the run may take; where the moments of a layer's experts do not fit, some "
        "are computed twice, to the same bits (default: what the machine has available)",
    )
    parser.add_argument(
        "--device",
        choices=("cpu", "cuda"),
        default="cpu",
        help="where the work is done (default: cpu)",
    )


def run(args: argparse.Namespace) -> int:
    target = Path(args.output).expanduser().absolute()
    _check_paths(args, target)
    if (gguf := gguf_file(args.model)) is not None:
        from vllm_nvfp4.checkpoints.gguf import holds_fp4

        if holds_fp4(gguf):
            take_over(gguf, args, target)
            return 0
    # oneDNN keeps a compiled product for each shape, 1024 of them; an expert's number of tokens
    # comes once.
    os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "64")
    import torch

    from vllm_nvfp4.checkpoints.work import work_folder
    from vllm_nvfp4.quantize.calibration import Calibration

    method = args.method or ("gptq" if args.calibration else "mse")
    is_measured = args.kv_cache == "fp8"
    if args.calibration and method in DATA_FREE and not is_measured:
        raise ValueError(
            f"--method {method} looks at no text; drop --calibration, or use --method gptq"
        )
    if args.activation == "8" and method in DATA_FREE:
        raise ValueError(
            f"--activation 8 with --method {method}, which looks at no inputs; "
            "drop --activation, or use --method gptq"
        )
    if args.device == "cuda" and not torch.cuda.is_available():
        raise ValueError("--device cuda: torch sees no CUDA device; use --device cpu")
    _check_format(args, method)
    _check_precision(args)
    calibration = None
    if method in CALIBRATED or is_measured:
        calibration = Calibration(
            args.calibration or "builtin", args.samples, args.sample_length, args.seed
        )
    started = time.monotonic()
    try:
        report = _quantize(args, method, calibration, target)
    except KeyboardInterrupt:
        if work_folder(target).is_dir():
            print(f"\nstopped; the same command goes on ({work_folder(target)})", file=sys.stderr)
        raise
    print_summary(report, target, method, time.monotonic() - started)
    return 0


def _check_paths(args: argparse.Namespace, target: Path) -> None:
    """What can be wrong with files, before torch takes its seconds to be imported."""
    from vllm_nvfp4.checkpoints.locate import find_folder

    if gguf_file(args.model) is None:
        find_folder(args.model)
    if target.exists():
        raise FileExistsError(f"{target} exists; remove it or choose another folder")
    check_can_write("--output", target, is_folder=True)
    if args.calibration:
        check_text("--calibration", args.calibration)


def _check_format(args: argparse.Namespace, method: str) -> None:
    if method != "mr-gptq":
        args.format = args.format or "modelopt"
        return
    if args.format:
        raise ValueError(
            f"--format {args.format} with --method mr-gptq; rotated weights are stored in "
            "FP-Quant's dialect alone: drop --format, or use --method gptq"
        )
    if args.kv_cache != "keep":
        raise ValueError(
            f"--kv-cache {args.kv_cache} with --method mr-gptq; FP-Quant's dialect has no scales "
            "for the cache: drop --kv-cache, or use --method gptq"
        )
    args.format = "fp-quant"


def _check_precision(args: argparse.Namespace) -> None:
    from vllm_nvfp4.quantize.precision import choose_formats
    from vllm_nvfp4.quantize.report import check_plot

    if args.target_bits is None and args.max_kl is None:
        if args.report:
            raise ValueError("--report shows what --target-bits or --max-kl chooses; give one")
        if args.embedding:
            raise ValueError(
                "--embedding lets --target-bits or --max-kl choose the embedding's format; give one"
            )
        return
    choose_formats([], target_bits=args.target_bits, max_kl=args.max_kl)
    if args.format == "fp-quant":
        raise ValueError(
            "--target-bits or --max-kl with --method mr-gptq; FP-Quant's dialect has one format "
            "for all layers: use --method gptq"
        )
    if args.report:
        check_plot(Path(args.report).expanduser())


def _precision(
    args: argparse.Namespace,
    source: Any,
    method: str,
    calibration: Calibration | None,
    current: Step,
) -> Callable[[Path, set[str]], dict[str, str]] | None:
    """What WriteOptions.precision asks for; the measurement is kept for a run that goes on."""
    if args.target_bits is None and args.max_kl is None:
        return None

    def choose(work: Path, linear: set[str]) -> dict[str, str]:
        from vllm_nvfp4.quantize import report, sensitivity
        from vllm_nvfp4.quantize.precision import choose_formats

        kept = work / "sensitivity.json"
        if not kept.is_file():
            current.begin("Measuring the sensitivity of each layer")
            text = calibration.text if calibration else "builtin"
            measurement = sensitivity.Measurement.of_text(text, source.folder, method, args.seed)
            found = sensitivity.measure(source, linear, measurement, current.advance)
            sensitivity.save(kept, found)
        groups = sensitivity.load(kept)
        formats = choose_formats(groups, target_bits=args.target_bits, max_kl=args.max_kl)
        if args.report:
            current.say(report.table(groups, formats))
            report.plot(groups, formats, Path(args.report).expanduser())
        else:
            current.say(report.summary(groups, formats))
        return {n: f for g, f in zip(groups, formats, strict=True) for n in g.names}

    return choose


def _quantize(
    args: argparse.Namespace, method: str, calibration: Calibration | None, target: Path
) -> WriteReport:
    from vllm_nvfp4.checkpoints.quantizer import DataFree
    from vllm_nvfp4.checkpoints.source import Source
    from vllm_nvfp4.checkpoints.write import WriteOptions, rehearse, write_resumable
    from vllm_nvfp4.checkpoints.written import FORMATS, FpQuantFormat
    from vllm_nvfp4.cli import _quantize_check
    from vllm_nvfp4.cli._quantize_progress import TITLE, Progress
    from vllm_nvfp4.quantize.calibrated import Calibrated, rotation_size
    from vllm_nvfp4.serving.progress import step

    folder = source_folder(args.model, target)
    source = Source(folder)
    source.config()
    is_measured = args.target_bits is not None or args.max_kl is not None
    arguments: dict[str, Any] = {"method": method, "device": args.device}
    if args.kv_cache != "keep":
        arguments["kv_cache"] = args.kv_cache
    if args.activation == "8":
        arguments["a8_variant"] = args.a8_variant
    if calibration is not None:
        arguments |= calibration.identity()
    if is_measured:
        arguments |= {"target_bits": args.target_bits, "max_kl": args.max_kl, "seed": args.seed}
    vocabulary = source.vocabulary(args.embedding) if is_measured else []
    linear, kept = source.quantizable(args.ignore, args.towers)

    with step(TITLE, sys.stderr) as current:
        if vocabulary and not args.no_check:
            current.begin("Asking vLLM's class of the model")
            vocabulary, kept = _quantize_check.without_plain(source, vocabulary, kept, current.say)
        chosen = linear.union(vocabulary)
        precision = _precision(args, source, method, calibration, current)
        rotation = rotation_size(source, linear) if method == "mr-gptq" else 0
        stored = FpQuantFormat(rotation) if rotation else FORMATS[args.format]
        if not args.no_check:
            current.begin("Checking that vLLM can load it")
            look = partial(_quantize_check.check_written, say=current.say, shown=folder)
            rehearse(source, target, linear, WriteOptions(stored), look)
            current.begin(TITLE)
        quantizer: Any = DataFree(method)
        if calibration is not None and method in CALIBRATED:
            variant = args.a8_variant if args.activation == "8" else ""
            quantizer = Calibrated(source, method, calibration, args.device, rotation, variant)
        elif calibration is not None:
            calibration.samples(folder)  # raises what --kv-cache would at the end
        used = calibration if method in CALIBRATED else None
        for line in kept_lines(source, kept, set(vocabulary), args.ignore):
            current.say(line)
        prefixes = quantizer.prefixes if isinstance(quantizer, Calibrated) else None
        num_tokens = calibration.num_samples * calibration.length if calibration else 0
        progress = Progress(current, source, chosen, method, prefixes, num_tokens)
        limit = None if args.memory is None else args.memory * 2**30
        line, moment_bytes = plan_memory(
            source, chosen, used, args.device, is_measured, follows_exact(method), limit
        )
        current.say(line)
        if isinstance(quantizer, Calibrated):
            quantizer.progress, quantizer.moment_bytes = progress.begun, moment_bytes
        options = WriteOptions(
            stored=stored,
            ignore=args.ignore,
            towers=args.towers,
            device=args.device,
            arguments=arguments,
            progress=progress.begun,
            skipped=progress.skipped,
            precision=precision,
            vocabulary=vocabulary,
            finish=_finish(args, calibration, current),
        )
        report = write_resumable(folder, target, quantizer, options)
        if isinstance(quantizer, Calibrated) and (line := quantizer.few_tokens()):
            current.say(line)
    if folder == gguf_folder(target):
        shutil.rmtree(folder)
        folder.with_suffix(".txt").unlink(missing_ok=True)
    return report


def _finish(
    args: argparse.Namespace, calibration: Calibration | None, current: Step
) -> Callable[[Path], None]:
    """What is done with the written folder before it gets its name."""
    from vllm_nvfp4.cli import _quantize_check
    from vllm_nvfp4.quantize.kv_scales import add_kv_scales

    def finish(folder: Path) -> None:
        if args.kv_cache != "keep" and calibration is not None:
            add_kv_scales(folder, args.format, calibration, args.device)
        is_other = args.kv_cache != "keep" or args.target_bits or args.max_kl is not None
        if is_other and not args.no_check:
            current.begin("Checking that vLLM can load it")
            _quantize_check.check_written(folder, current.say)
        if args.format == "compressed-tensors" and not args.no_check:
            current.say(_quantize_check.transformers_line(folder))

    return finish
