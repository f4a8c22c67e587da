# SPDX-License-Identifier: Apache-2.0
"""Pictures and sound for tiny multimodal models: their processors, made offline, and two requests.

A processor is made of transformers' classes, with a tokenizer of bytes that has the tokens for a
picture, and lies in the model's folder as the hub's does.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
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
    place: Sequence[int] = (300,)
    modality: str = "image"

    def write_processor(self, folder: Path, vocabulary: int) -> None:
        """Write processor and tokenizer into a model's folder."""
        import transformers

        _do_without_packages()
        tokenizer = build_tokenizer(vocabulary, self.tokens)
        self.make(transformers, tokenizer).save_pretrained(folder)

    def options(self) -> dict[str, Any]:
        """Keywords of ``LLM`` for an engine that takes it."""
        _do_without_packages()
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


def _do_without_packages() -> None:
    """PIL draws the pictures, whatever is asked for: the package index has no torchvision for CPUs.
    num2words puts into words how many pictures a video has."""
    from transformers.models.auto import image_processing_auto as auto
    from transformers.models.smolvlm import processing_smolvlm

    vars(auto)["_resolve_backend"] = lambda *asked: "pil"
    vars(processing_smolvlm)["num2words"] = str


def _picture(seed: int) -> Any:
    from PIL import Image

    pixels = np.random.default_rng(seed).integers(0, 256, (_HEIGHT, _WIDTH, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def _sine(frequency: int) -> np.ndarray:
    """A second of it, [16000] float32."""
    return np.sin(2 * np.pi * frequency * np.arange(_RATE) / _RATE).astype(np.float32)


def _made(
    family: str, pictures: str, sizes: Mapping[str, Any], videos: str = "", **keys: Any
) -> Callable[[Any, Any], Any]:
    """How a processor of a family is made: with its own keys, of PIL's processor of pictures, that
    of videos where the family has one, and a tokenizer."""

    def make(transformers: Any, tokenizer: Any) -> Any:
        parts = {"image_processor": getattr(transformers, f"{pictures}ImageProcessorPil")(**sizes)}
        if videos:
            parts["video_processor"] = getattr(transformers, f"{videos}VideoProcessor")()
        return getattr(transformers, f"{family}Processor")(tokenizer=tokenizer, **parts, **keys)

    return make


def _gemma4(transformers: Any, tokenizer: Any) -> Any:
    # No picture has fewer tokens.
    pictures = transformers.Gemma4ImageProcessorPil(max_soft_tokens=70)
    sounds, videos = transformers.Gemma4AudioFeatureExtractor(), transformers.Gemma4VideoProcessor()
    return transformers.Gemma4Processor(sounds, pictures, tokenizer, videos, image_seq_length=70)


def _whisper(transformers: Any, tokenizer: Any) -> Any:
    # A second is all that the model hears.
    sounds = transformers.WhisperFeatureExtractor(feature_size=80, chunk_length=1)
    return transformers.WhisperProcessor(sounds, tokenizer)


def _tokens(**named: str) -> dict[str, tuple[str, int]]:
    """Of a tokenizer, numbered from 300 on."""
    return {f"{name}_token": (token, 300 + i) for i, (name, token) in enumerate(named.items())}


_SQUARE = {"height": 56, "width": 56}
_SIZE = {"size": _SQUARE}
_CLIP = {"size": {"shortest_edge": 56}, "crop_size": _SQUARE}
_GRID = {"image_grid_pinpoints": [[56, 112]]}
_TILES = {"size": {"longest_edge": 112}, "max_image_size": {"longest_edge": 56}}
_AREA = {"size": {"shortest_edge": 32 * 32, "longest_edge": 128 * 128}}
_LLAVA: dict[str, Any] = {
    "patch_size": 14,
    "vision_feature_select_strategy": "default",
    "num_additional_image_tokens": 1,
}
_IMAGE = _tokens(image="<image>")
_IDEFICS = _tokens(
    image="<image>",
    fake_image="<fake_token_around_image>",
    global_image="<global-img>",
    end_of_utterance="<end_of_utterance>",
)
_GEMMA = {"boi": "<start_of_image>", "eoi": "<end_of_image>"}
_QWEN = _tokens(
    image="<|image_pad|>",
    video="<|video_pad|>",
    vision_start="<|vision_start|>",
    vision_end="<|vision_end|>",
)
_GLM = Media(
    _made("Glm4v", "Glm4v", _AREA, "Glm4v"),
    _tokens(
        image="<|image|>",
        video="<|video|>",
        image_start="<|begin_of_image|>",
        image_end="<|end_of_image|>",
        video_start="<|begin_of_video|>",
        video_end="<|end_of_video|>",
    ),
    (302, 300, 303),
)


def _of_qwen(family: str, videos: str, patch_size: int) -> Media:
    make = _made(family, "Qwen2VL", _AREA | {"patch_size": patch_size}, videos)
    return Media(make, _QWEN, (302, 300, 303))


def _of_pixtral(merged: int) -> Media:
    patch = {"height": 14, "width": 14}
    sizes = {"size": {"longest_edge": 56}, "patch_size": patch}
    keys: dict[str, Any] = {"patch_size": 14, "spatial_merge_size": merged}
    tokens = _tokens(image="[IMG]", image_break="[IMG_BREAK]", image_end="[IMG_END]")
    return Media(_made("Pixtral", "Pixtral", sizes, **keys), tokens)


_QWEN3_VL = _of_qwen("Qwen3VL", "Qwen3VL", 16)
MEDIA = {
    "qwen3.5": _QWEN3_VL,
    "qwen3.5-moe": _QWEN3_VL,
    "qwen3-vl": _QWEN3_VL,
    "qwen3-vl-moe": _QWEN3_VL,
    "qwen2.5-vl": _of_qwen("Qwen2_5_VL", "Qwen2VL", 14),
    "qwen2-vl": _of_qwen("Qwen2VL", "Qwen2VL", 14),
    "gemma3-vision": Media(
        _made("Gemma3", "Gemma3", _SIZE, image_seq_length=4),
        # vLLM joins the ends of lines around a picture to the text's.
        _tokens(
            image="<image_soft_token>", **_GEMMA, **{f"lines_{n}": "\n" * n for n in range(1, 5)}
        ),
        (301,),
    ),
    "gemma4-vision": Media(
        _gemma4,
        _tokens(
            image="<|image|>", **_GEMMA, video="<|video|>", audio="<|audio|>", boa="<|audio>",
            eoa="<audio|>",
        ),
    ),
    "glm4v": _GLM,
    "glm4v-moe": _GLM,
    "idefics3": Media(_made("Idefics3", "Idefics3", _TILES, image_seq_len=4), _IDEFICS),
    "smolvlm": Media(_made("SmolVLM", "SmolVLM", _TILES, "SmolVLM", image_seq_len=4), _IDEFICS),
    "internvl": Media(
        _made("InternVL", "GotOcr2", _SIZE | {"max_patches": 2}, "InternVL", image_seq_length=4),
        _tokens(
            context_image="<IMG_CONTEXT>", video="<video>", start_image="<img>", end_image="</img>"
        ),
    ),
    "llava": Media(_made("Llava", "CLIP", _CLIP, **_LLAVA), _IMAGE),
    "llava-next": Media(_made("LlavaNext", "LlavaNext", _CLIP | _GRID, **_LLAVA), _IMAGE),
    "llava-onevision": Media(
        _made(
            "LlavaOnevision", "LlavaOnevision", _SIZE | _GRID, "LlavaOnevision",
            num_image_tokens=16, vision_feature_select_strategy="full",
        ),
        _tokens(image="<image>", video="<video>"),
    ),
    "mistral3": _of_pixtral(2),
    "pixtral": _of_pixtral(1),
    "paligemma": Media(
        _made("PaliGemma", "Siglip", _SIZE | {"image_seq_length": 16}),
        # vLLM asks for the number of a line's end.
        _tokens(image="<image>", line="\n"),
    ),
    "whisper": Media(_whisper, _tokens(start="<|startoftranscript|>"), modality="audio"),
}  # fmt: skip
