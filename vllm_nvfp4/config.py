# SPDX-License-Identifier: Apache-2.0
"""The quantization config: which layer of the model gets which method."""

from __future__ import annotations

import fnmatch
from pathlib import Path
from typing import Any

import torch
from vllm.config import get_current_vllm_config_or_none
from vllm.logger import init_logger
from vllm.model_executor.layers.linear import LinearBase, UnquantizedLinearMethod
from vllm.model_executor.layers.quantization.base_config import (
    QuantizationConfig,
    QuantizeMethodBase,
)
from vllm.model_executor.layers.vocab_parallel_embedding import (
    ParallelLMHead,
    VocabParallelEmbedding,
)

from vllm_nvfp4.checkpoints.detect import detect, read_config
from vllm_nvfp4.checkpoints.online import online_spec
from vllm_nvfp4.checkpoints.spec import Dialect, LayerKind, LayerSpec, fused_layer_spec
from vllm_nvfp4.checkpoints.validate import validate
from vllm_nvfp4.compat import versions
from vllm_nvfp4.compat.kv_cache import head_size
from vllm_nvfp4.kernels import ops
from vllm_nvfp4.layers import kv_cache
from vllm_nvfp4.layers.embedding import Vocabulary, embedding_method, lm_head_method
from vllm_nvfp4.layers.experts import experts_spec, moe_method
from vllm_nvfp4.layers.linear import linear_method
from vllm_nvfp4.numerics.formats import FORMATS
from vllm_nvfp4.options import METHOD_NAME, Options

logger = init_logger(f"vllm.{__name__}")


class NvFp4Config(QuantizationConfig):
    """Serve a checkpoint of any NVFP4 or MXFP4 dialect, or quantise a 16-bit one while it loads."""

    def __init__(self, quant_config: dict[str, Any] | None = None) -> None:
        super().__init__()
        self.dialect: Dialect = detect(quant_config)
        self.source_config = quant_config
        self.tied_embeddings = False
        self._vocabulary: Vocabulary | None = None
        self._options: Options | None = None
        self._head_size: int | None = None

    def get_name(self) -> Any:
        return METHOD_NAME

    def get_supported_act_dtypes(self) -> list[torch.dtype]:
        types = [torch.bfloat16, torch.float16]
        return types if versions.device_capability() else [*types, torch.float32]

    @classmethod
    def get_min_capability(cls) -> int:
        return 80

    @staticmethod
    def get_config_filenames() -> list[str]:
        return []

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> QuantizationConfig:
        if Options.resolve().native_blackwell and (native := _blackwell_config(config)):
            return native
        return cls(config)

    def maybe_update_config(
        self, model_name: str, hf_config: Any = None, revision: str | None = None
    ) -> None:
        """Read what the model's own configuration says, and check the files before loading.

        A model by its hub name has no files yet at this point: what its tensors hold is then
        checked layer by layer as they load.
        """
        text_config = getattr(hf_config, "text_config", None) or hf_config
        self.tied_embeddings = bool(getattr(text_config, "tie_word_embeddings", False))
        self._head_size = head_size(text_config)
        if (folder := Path(model_name)).is_dir():
            model_config, _ = read_config(folder)
            validate(folder, model_config, self.source_config, dialect=self.dialect)

    @property
    def options(self) -> Options:
        """The options of this engine; read once vLLM's own config is at hand."""
        if self._options is None:
            vllm_config = get_current_vllm_config_or_none()
            given: Any = vllm_config.additional_config if vllm_config else None
            self._options = Options.resolve(given)
            if versions.device_capability() is not None:
                ops.configure(self._options)
        return self._options

    @property
    def vocabulary(self) -> Vocabulary:
        """What embedding and lm_head share; made once the model's own configuration is read."""
        if self._vocabulary is None:
            self._vocabulary = Vocabulary(self.options, self.dialect, self.tied_embeddings)
        return self._vocabulary

    @property
    def kv_cache_scheme(self) -> dict[str, Any] | None:
        """vLLM's Attention turns an "auto" KV cache into FP8 where a config has this attribute."""
        is_declared = self.dialect.kv_cache.dtype is not None
        return kv_cache.default_scheme(self.options.kv_cache, self._head_size, is_declared)

    def apply_vllm_mapper(self, hf_to_vllm_mapper: Any) -> None:
        self.dialect.rename(hf_to_vllm_mapper)

    def get_quant_method(self, layer: torch.nn.Module, prefix: str) -> QuantizeMethodBase | None:
        if isinstance(layer, versions.attention_classes()):
            return kv_cache.kv_cache_method(self, self.dialect.kv_cache.dtype is not None)
        if isinstance(layer, ParallelLMHead):
            prefix = prefix or "lm_head"
            return lm_head_method(self.vocabulary, self.layer_spec(prefix), prefix)
        if isinstance(layer, VocabParallelEmbedding):
            return embedding_method(self.vocabulary, prefix or "embed_tokens")
        if versions.is_moe_layer(layer):
            return self._experts_method(layer, prefix)
        if not isinstance(layer, LinearBase):
            return None
        spec = self.layer_spec(prefix)
        if spec.kind is LayerKind.ONLINE:
            spec = online_spec(FORMATS[self.options.online_format])
        if spec.kind is LayerKind.UNQUANTIZED or self._stays_in_16_bits(
            spec, prefix, layer.input_size
        ):
            return UnquantizedLinearMethod()
        return linear_method(self.options, spec, prefix)

    def _experts_method(self, layer: Any, prefix: str) -> QuantizeMethodBase | None:
        spec = experts_spec(self.dialect, layer, prefix)
        if spec.kind is LayerKind.ONLINE:
            spec = online_spec(FORMATS[self.options.online_format])
        moe = layer.moe_config
        stays = self._stays_in_16_bits(spec, prefix, moe.hidden_dim, moe.intermediate_size)
        if spec.kind is LayerKind.UNQUANTIZED or stays:
            return None  # vLLM's own experts
        return moe_method(self.options, spec, layer, prefix)

    def layer_spec(self, prefix: str) -> LayerSpec:
        """How the layer, fused or not, is stored."""
        return fused_layer_spec(self.dialect, prefix, self.packed_modules_mapping)

    def _stays_in_16_bits(self, spec: LayerSpec, prefix: str, *input_sizes: int) -> bool:
        """Whether a 16-bit layer is left as it is: by the user's list, or by its shape."""
        if spec.kind is not LayerKind.ONLINE or spec.fmt is None:
            return False
        if any(fnmatch.fnmatch(prefix, pattern) for pattern in self.options.online_ignore):
            return True
        odd = [size for size in input_sizes if size % spec.fmt.block_size]
        if not odd:
            return False
        logger.warning(
            "nvfp4: %s stays in 16 bits: its input size %d is no multiple of %s's block of %d",
            prefix,
            odd[0],
            spec.fmt.name,
            spec.fmt.block_size,
        )
        return True


def _blackwell_config(config: dict[str, Any]) -> QuantizationConfig | None:
    """vLLM's own config where it and the GPU can do NVFP4 natively, else None."""
    capability = versions.device_capability()
    native = versions.native_config_class(config) if capability and capability >= (10, 0) else None
    if native is None:
        return None
    logger.info(
        "nvfp4: compute capability %s has FP4 tensor cores, so vLLM's own %s serves this "
        "checkpoint (option native_blackwell)",
        capability,
        native.__name__,
    )
    return native.from_config(config)
