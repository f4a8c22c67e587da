# SPDX-License-Identifier: Apache-2.0
"""Pictures and sound for tiny multimodal models: their processors, made offline, and two requests.

A processor is made of transformers' classes, with a tokenizer of bytes that has the tokens for a
picture, and lies in the model's folder as the hub's does.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from vllm_nvfp4.testing.tiny_models import build_tokenizer

_HEIGHT, _WIDTH = 56, 84
_RATE = 16_000  # samples of sound in a second


@dataclass(frozen=True)
class Media:
    """What a model is shown beside its text.

    make:     transformers' module and a tokenizer -> the processor
    tokens:   the tokenizer's attribute -> the token and its number
    place:    tokens that stand for the picture in a prompt
    modality: vLLM's name of it
    """

    make: Callable[[Any, Any], Any]
    tokens: Mapping[str, tuple[str, int]]
    place: Sequence[int] = ()
    modality: str = "image"

    def write_processor(self, folder: Path, vocabulary: int) -> None:
        """Write processor and tokenizer into a model's folder."""
        import transformers

        tokenizer = build_tokenizer(vocabulary, self.tokens)
        self.make(transformers, tokenizer).save_pretrained(folder)

    def options(self) -> dict[str, Any]:
        """Keywords of ``LLM`` for an engine that takes it. PIL draws the pictures: the package
        index has no torchvision for CPUs."""
        from transformers.models.auto import image_processing_auto as auto

        names = auto.IMAGE_PROCESSOR_MAPPING_NAMES.values()
        by_pil = [n["torchvision"] for n in names if n and {"torchvision", "pil"} <= n.keys()]
        vars(auto)["DEFAULT_TO_PIL_BACKEND_IMAGE_PROCESSORS"] = by_pil
        others = dict.fromkeys(("image", "video", "audio"), 0)
        return {"skip_tokenizer_init": False, "limit_mm_per_prompt": others | {self.modality: 1}}

    def requests(self, prompt: list[int]) -> list[dict[str, Any]]:
        """Two, which differ in the picture, or the sound, alone."""
        if self.modality == "audio":
            return [
                {
                    "encoder_prompt": {"prompt": "", "multi_modal_data": {"audio": (wave, _RATE)}},
                    "decoder_prompt": {"prompt_token_ids": prompt},
                }
                for wave in map(_sine, (220, 1760))
            ]
        middle = len(prompt) // 2
        tokens = [*prompt[:middle], *self.place, *prompt[middle:]]
        return [
            {"prompt_token_ids": tokens, "multi_modal_data": {"image": picture}}
            for picture in map(_picture, range(2))
        ]


def _picture(seed: int) -> Any:
    from PIL import Image

    pixels = np.random.default_rng(seed).integers(0, 256, (_HEIGHT, _WIDTH, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def _sine(frequency: int) -> np.ndarray:
    """A second of it, [16000] float32."""
    return np.sin(2 * np.pi * frequency * np.arange(_RATE) / _RATE).astype(np.float32)


def _gemma3(transformers: Any, tokenizer: Any) -> Any:
    pictures = transformers.Gemma3ImageProcessorPil(size={"height": 56, "width": 56})
    return transformers.Gemma3Processor(pictures, tokenizer, image_seq_length=4)


def _gemma4(transformers: Any, tokenizer: Any) -> Any:
    # No picture has fewer tokens.
    pictures = transformers.Gemma4ImageProcessorPil(max_soft_tokens=70)
    sounds, videos = transformers.Gemma4AudioFeatureExtractor(), transformers.Gemma4VideoProcessor()
    return transformers.Gemma4Processor(sounds, pictures, tokenizer, videos, image_seq_length=70)


def _pixtral(transformers: Any, tokenizer: Any) -> Any:
    patch = {"height": 14, "width": 14}
    pictures = transformers.PixtralImageProcessorPil(size={"longest_edge": 56}, patch_size=patch)
    sizes = {"patch_size": 14, "spatial_merge_size": 2}
    return transformers.PixtralProcessor(pictures, tokenizer, **sizes)


def _qwen(transformers: Any, tokenizer: Any, family: str, patch_size: int) -> Any:
    pictures = transformers.Qwen2VLImageProcessorPil(
        size={"shortest_edge": 32 * 32, "longest_edge": 128 * 128}, patch_size=patch_size
    )
    of_video = "Qwen2VL" if family == "Qwen2_5_VL" else family
    videos = getattr(transformers, f"{of_video}VideoProcessor")(patch_size=patch_size)
    processor = getattr(transformers, f"{family}Processor")
    return processor(image_processor=pictures, tokenizer=tokenizer, video_processor=videos)


def _whisper(transformers: Any, tokenizer: Any) -> Any:
    # A second is all that the model hears.
    sounds = transformers.WhisperFeatureExtractor(feature_size=80, chunk_length=1)
    return transformers.WhisperProcessor(sounds, tokenizer)


_QWEN_TOKENS = {
    "image_token": ("<|image_pad|>", 300),
    "video_token": ("<|video_pad|>", 301),
    "vision_start_token": ("<|vision_start|>", 302),
    "vision_end_token": ("<|vision_end|>", 303),
}


def _of_qwen(family: str, patch_size: int) -> Media:
    make = partial(_qwen, family=family, patch_size=patch_size)
    return Media(make, _QWEN_TOKENS, (302, 300, 303))


_GEMMA_TOKENS = {"boi_token": ("<start_of_image>", 301), "eoi_token": ("<end_of_image>", 302)}
_QWEN3_VL = _of_qwen("Qwen3VL", 16)
MEDIA = {
    "qwen3.5": _QWEN3_VL,
    "qwen3.5-moe": _QWEN3_VL,
    "qwen3-vl": _QWEN3_VL,
    "qwen3-vl-moe": _QWEN3_VL,
    "qwen2.5-vl": _of_qwen("Qwen2_5_VL", 14),
    "gemma3-vision": Media(
        _gemma3,
        {
            **_GEMMA_TOKENS,
            "image_token": ("<image_soft_token>", 300),
            # vLLM joins those around a picture to the text's.
            **{f"newlines_{n}": ("\n" * n, 302 + n) for n in range(1, 5)},
        },
        (301,),
    ),
    "gemma4-vision": Media(
        _gemma4,
        {
            **_GEMMA_TOKENS,
            "image_token": ("<|image|>", 300),
            "video_token": ("<|video|>", 303),
            "audio_token": ("<|audio|>", 304),
            "boa_token": ("<|audio>", 305),
            "eoa_token": ("<audio|>", 306),
        },
        (300,),
    ),
    "mistral3": Media(
        _pixtral,
        {
            "image_token": ("[IMG]", 300),
            "image_break_token": ("[IMG_BREAK]", 301),
            "image_end_token": ("[IMG_END]", 302),
        },
        (300,),
    ),
    "whisper": Media(_whisper, {"start_token": ("<|startoftranscript|>", 300)}, modality="audio"),
}
