# SPDX-License-Identifier: Apache-2.0
"""One architecture served by the plugin, against stock vLLM on the same weights dequantised.

Which rows of which matrix an engine has quantised is found by their values, not by their names: a
dequantised row looks like one row of the file alone. So the twin that stock vLLM loads has the
file's own names and stacks, and a row that the plugin put in the wrong place shows.
"""

from __future__ import annotations

import contextlib
import io
import json
import shutil
import traceback
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from vllm_nvfp4.testing.agreement import (
    NO_PICTURES,
    Layers,
    ask_check,
    compare,
    held_by,
    quantised_matrices,
)
from vllm_nvfp4.testing.architecture import VOCAB_SIZE, Architecture
from vllm_nvfp4.testing.architectures import write_architecture
from vllm_nvfp4.testing.checkpoints import dequantized_state_dict
from vllm_nvfp4.testing.engine import engine
from vllm_nvfp4.testing.forced import FORCED
from vllm_nvfp4.testing.media import MEDIA, Media
from vllm_nvfp4.testing.twin import write_twin

PROMPT = [int(t) for t in torch.randperm(290, generator=torch.Generator().manual_seed(1))[:20] + 4]
# Sums of BF16 products, rounded, differ by this much between kernels; float32 by far less.
TOLERANCE = {"float32": 2e-4, "bfloat16": 0.06}
# A model that BF16 itself moves further than that: our distance from float32 may be 1.5 times that
# of vLLM's BF16, so that from one to the other is at most 1.5 + 1 times it.
_SHARE_OF_NOISE = 2.5
# Further than this it is no rounding: the two compute something else (of MLA on a CPU, vLLM and
# transformers do), and what is left to compare with is vLLM's own answer.
_MOST_NOISE = 0.3
FORCED_ENGINE: dict[str, Any] = {
    "logits_processors": ["vllm_nvfp4.testing.forced:ForceTokens"],
    "skip_tokenizer_init": True,
    "enable_prefix_caching": False,
    "limit_mm_per_prompt": NO_PICTURES,
    "additional_config": {"nvfp4": {"kv_cache": "keep"}},
}
_REASON_CHARS = 240
# Far above what rounding does, in BF16 too.
LEAST_CHANGE = 0.2
Look = Callable[[torch.nn.Module], None] | None


@dataclass(frozen=True)
class Forced:
    """Log-probabilities [rows, V] of the prompt after its first token, and of the tokens that
    follow whatever the model makes of them. shown: the same with one picture or sound and with
    another, of a model that takes them."""

    prefill: torch.Tensor
    decode: torch.Tensor
    shown: tuple[Forced, ...] = ()

    def deviation(self, other: Forced) -> float:
        """The largest difference of a log-probability."""
        pairs = ((self.prefill, other.prefill), (self.decode, other.decode))
        return max(float((a - b).abs().max()) for a, b in pairs)

    def moves(self, other: Forced) -> float:
        """The same of the tokens that follow alone."""
        return float((self.decode - other.decode).abs().max())


@dataclass(frozen=True)
class Measured:
    """deviation: largest difference of a log-probability; share: the part of the matrices'
    elements that was quantised; reference: "vLLM", or "transformers" and why; tolerance: what the
    deviation may be; shown: the deviation with pictures or sound, None where there were none"""

    deviation: float
    share: float
    reference: str
    tolerance: float
    shown: float | None = None


@dataclass(frozen=True)
class _Reference:
    answer: Forced
    name: str
    tolerance: float


class Sweep:
    """One architecture by several roads.

    work:    a folder of its own, in which a model that is there already is kept
    command: runs the arguments of `vllm-nvfp4` and gives its exit status
    """

    def __init__(
        self, architecture: Architecture, work: Path, command: Callable[[list[str]], int]
    ) -> None:
        self.architecture, self.work, self.command = architecture, work, command
        self.plain = work / "bf16"
        media = MEDIA.get(architecture.name)
        if not (self.plain / "config.json").exists():
            shutil.rmtree(self.plain, ignore_errors=True)
            write_architecture(self.plain, architecture)
            if media:
                media.write_processor(self.plain, VOCAB_SIZE)
        self._serve: Callable[..., tuple[Forced, list[torch.Tensor]]] = (
            embed if architecture.kind == "encoder" else partial(serve, media=media)
        )
        self._references: list[tuple[list[torch.Tensor], _Reference]] = []
        self._told: dict[str, Layers | ValueError] = {}
        self._shows = media.options() if media else {}

    def class_name(self) -> str:
        """The model class that config.json asks for."""
        config = json.loads((self.plain / "config.json").read_text())
        return str(config["architectures"][0])

    def quantise(self, dialect: str, *options: str) -> None:
        """Write the model as `vllm-nvfp4 quantize` does; before any engine of this process, since
        vLLM puts classes of its own into transformers' registers. Raises ValueError.

        options: of the command; by default --method rtn
        """
        self.quantise_folder(self.plain, self.work / dialect, dialect, *options)

    def quantise_folder(self, source: Path, folder: Path, dialect: str, *options: str) -> Path:
        """The same of another folder than the model's; returns the new one."""
        shutil.rmtree(folder, ignore_errors=True)
        options = options or ("--method", "rtn")
        arguments = ["quantize", str(source), "-o", str(folder), *options]
        said = io.StringIO()
        with contextlib.redirect_stderr(said):
            # It is about to be served.
            status = self.command([*arguments, "--format", dialect, "--no-check"])
        if status:
            raise ValueError((said.getvalue().strip() or "no message").splitlines()[-1])
        return folder

    def ask_check(self, road: str) -> None:
        """Keep what `check` says of a road, for ``measure`` to compare with an engine; before any
        engine of this process."""
        is_encoder = self.architecture.kind == "encoder"
        try:
            found: Any = ask_check(
                self._folder(road), self.architecture.dtype, is_encoder, **self._shows
            )
        except ValueError as error:  # of no account where an engine ends with one too
            found = error
        self._told[road] = found

    def _folder(self, road: str) -> Path:
        return self.plain if road == "online" else self.work / road

    def stock_error(self, **options: Any) -> str:
        """Why stock vLLM does not serve the model in 16 bits, in one line; "" where it does.

        options: keywords of :func:`serve`
        """
        try:
            self._serve(self.plain, self.architecture.dtype, **(options | {"quantization": None}))
        except Exception as error:  # whatever stock vLLM cannot do on a CPU
            return one_line(error)
        return ""

    def measure(self, road: str, **options: Any) -> Measured:
        """road: "online", or a dialect that ``quantise`` has written; options: of :func:`serve`.

        Raises ValueError where another picture, or sound, is nothing to the model, and where the
        engine holds other layers than `check` told.
        """
        folder = self._folder(road)
        layers: dict[str, tuple[str, str]] = {}
        if road in self._told and not options:
            options["look"] = lambda model: layers.update(held_by(model))
        answer, held = self._serve(folder, self.architecture.dtype, **options)
        if layers:
            compare(self._told[road], layers)
        matrices = held if road == "online" else stored_matrices(folder, self.plain)
        expected = self._reference(matrices)
        share = quantised_share(matrices, self.plain)
        deviation = answer.deviation(expected.answer)
        if answer.shown and answer.shown[0].moves(answer.shown[1]) < LEAST_CHANGE:
            raise ValueError("another picture, or sound, changes nothing that follows it")
        shown = [a.deviation(b) for a, b in zip(answer.shown, expected.answer.shown, strict=False)]
        worst = max(shown, default=None)
        return Measured(deviation, share, expected.name, expected.tolerance, worst)

    def _reference(self, matrices: list[torch.Tensor]) -> _Reference:
        for known, reference in self._references:
            if _are_equal(known, matrices):
                return reference
        twin = self.work / "twin"
        shutil.rmtree(twin, ignore_errors=True)
        if lost := write_twin(self.plain, matrices, twin):
            raise ValueError(f"{lost} rows that the engine holds are none of the file's")
        dtype, auto = self.architecture.dtype, self.architecture.auto
        tolerance = TOLERANCE[dtype]
        try:
            answer, name = self._serve(twin, dtype, quantization=None)[0], "vLLM"
            if dtype != "float32":
                noise = answer.deviation(ask_transformers(twin, auto))
                is_rounding = noise <= _MOST_NOISE
                tolerance = _SHARE_OF_NOISE * (max(noise, tolerance) if is_rounding else tolerance)
                name = f"vLLM, itself {noise:.2g} from transformers in float32"
        except Exception as error:  # whatever stock vLLM cannot do on a CPU
            answer = ask_transformers(twin, auto)
            name = f"transformers; vLLM: {one_line(error)}"
        reference = _Reference(answer, name, tolerance)
        self._references.append((matrices, reference))
        return reference


def one_line(error: BaseException) -> str:
    """The error in one line, cut if long; one without a message, by the line that raised it."""
    text = " ".join(str(error).split())
    if not text:
        frames = traceback.extract_tb(error.__traceback__)
        text = f"{Path(frames[-1].filename).name}: {frames[-1].line}" if frames else "no message"
    return f"{type(error).__name__}: {text}"[:_REASON_CHARS]


def _are_equal(one: list[torch.Tensor], other: list[torch.Tensor]) -> bool:
    """Whether two lists have the same matrices, in any order, up to the rounding of a divisor."""
    a, b = (
        sorted((tuple(m.shape), round(float(m.double().sum()), 3)) for m in matrices)
        for matrices in (one, other)
    )
    return a == b


def serve(
    folder: Path,
    dtype: str,
    adapter: Path | None = None,
    media: Media | None = None,
    look: Look = None,
    **options: Any,
) -> tuple[Forced, list[torch.Tensor]]:
    """(what an engine makes of PROMPT and FORCED, the matrices [N, K] that it holds quantised).

    adapter: of LoRA, for the request
    media:   two pictures or sounds are asked about too, each with PROMPT
    look:    is shown the engine's model
    options: keywords of ``LLM``; quantization=None for stock vLLM. Of several ranks, and with an
             adapter, no matrices are returned.
    """
    shows = media.options() if media else {}
    with engine(folder, **(FORCED_ENGINE | shows | {"dtype": dtype} | options)) as llm:
        requests = media.requests(PROMPT) if media else []
        shown = [ask_forced(llm, adapter, request) for request in requests]
        # A model that transcribes has no answer to text alone.
        alone = shown[0] if media and media.modality == "audio" else ask_forced(llm, adapter)
        for found in (alone, *shown):
            if found.prefill.isnan().any() or found.decode.isnan().any():
                raise RuntimeError("log-probabilities that are not numbers")
        answer = replace(alone, shown=tuple(shown))
        if adapter is not None or options.get("tensor_parallel_size", 1) > 1:
            return answer, []
        return answer, _held_by(llm, look)


def _held_by(llm: Any, look: Look) -> list[torch.Tensor]:
    """The matrices of :func:`quantised_matrices` in an engine of this process."""
    executor = llm.llm_engine.engine_core.engine_core.model_executor
    model = executor.driver_worker.worker.model_runner.model
    if look is not None:
        look(model)
    return list(quantised_matrices(model))


def embed(
    folder: Path, dtype: str, look: Look = None, **options: Any
) -> tuple[Forced, list[torch.Tensor]]:
    """As :func:`serve`, of a model that gives embeddings: [1, H] of PROMPT and of FORCED, in place
    of log-probabilities."""
    defaults: dict[str, Any] = {"dtype": dtype, "runner": "pooling", "max_logprobs": 20}
    with engine(folder, **(defaults | options)) as llm:
        requests = [{"prompt_token_ids": tokens} for tokens in (PROMPT, FORCED)]
        outputs = llm.embed(requests, use_tqdm=False)
        one, other = (torch.tensor([output.outputs.embedding]) for output in outputs)
        if one.isnan().any() or other.isnan().any():
            raise RuntimeError("embeddings that are not numbers")
        return Forced(one, other), _held_by(llm, look)


def ask_forced(llm: Any, adapter: Path | None = None, request: Any = None) -> Forced:
    """What an engine with the options FORCED_ENGINE makes of a request, PROMPT without one, and of
    FORCED."""
    from vllm import SamplingParams
    from vllm.lora.request import LoRARequest

    parameters = SamplingParams(
        temperature=0, max_tokens=len(FORCED), ignore_eos=True, logprobs=-1, prompt_logprobs=-1,
        detokenize=False,
    )  # fmt: skip
    lora = None if adapter is None else LoRARequest("adapter", 1, str(adapter))
    requests = [request or {"prompt_token_ids": PROMPT}]
    output = llm.generate(requests, parameters, use_tqdm=False, lora_request=lora)[0]
    if list(output.outputs[0].token_ids) != FORCED:
        raise ValueError(f"decoded {output.outputs[0].token_ids}, not the tokens that were forced")

    def table(rows: Iterable[Mapping[int, Any]]) -> torch.Tensor:
        return torch.tensor([[row[t].logprob for t in range(VOCAB_SIZE)] for row in rows])

    return Forced(table(output.prompt_logprobs[1:]), table(output.outputs[0].logprobs))


def ask_transformers(folder: Path, auto: str) -> Forced:
    """What transformers' model of a folder makes of PROMPT and FORCED, in float32."""
    import transformers

    factory = getattr(transformers, auto)
    model = factory.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager")
    with torch.inference_mode():
        logits = model.eval()(torch.tensor([PROMPT + FORCED])).logits[0, :-1].float()
    logprobs = torch.log_softmax(logits, dim=-1)
    return Forced(logprobs[: len(PROMPT) - 1], logprobs[len(PROMPT) - 1 :])


def stored_matrices(folder: Path, original: Path) -> list[torch.Tensor]:
    """The matrices of a quantised folder that are not as in the original, dequantised."""
    from safetensors import safe_open

    with safe_open(original / "model.safetensors", "pt") as file:
        same = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    found = []
    for name, value in dequantized_state_dict(folder).items():
        if value.dim() < 2 or not value.is_floating_point():
            continue
        before = same.get(name)
        is_kept = before is not None and before.dtype == value.dtype
        if not is_kept:
            found.append(value.float().reshape(-1, value.shape[-1]))
    return found


def quantised_share(matrices: Iterable[torch.Tensor], folder: Path) -> float:
    """The part of the file's matrix elements that the matrices are."""
    from safetensors import safe_open

    with safe_open(folder / "model.safetensors", "pt") as file:
        shapes = [file.get_slice(n).get_shape() for n in file.keys()]  # noqa: SIM118
    total = sum(torch.Size(s).numel() for s in shapes if len(s) > 1)
    return sum(m.numel() for m in matrices) / total
