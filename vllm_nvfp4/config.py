# SPDX-License-Identifier: Apache-2.0
"""The quantization config: which layer of the model gets which method."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any

import torch
from vllm.config import get_current_vllm_config_or_none
from vllm.logger import init_logger
from vllm.model_executor.layers.linear import LinearBase
from vllm.model_executor.layers.quantization.base_config import (
    QuantizationConfig,
    QuantizeMethodBase,
)
from vllm.model_executor.layers.vocab_parallel_embedding import (
    ParallelLMHead,
    VocabParallelEmbedding,
)

from vllm_nvfp4.checkpoints.census import KV_OUTPUTS, OF_ATTENTION, PROJECTION_FIRST, Census
from vllm_nvfp4.checkpoints.class_names import class_names
from vllm_nvfp4.checkpoints.detect import detect
from vllm_nvfp4.checkpoints.mlx import MlxDialect, unfold
from vllm_nvfp4.checkpoints.model_census import take_census_of
from vllm_nvfp4.checkpoints.online import LEFT_OUT, OnlineDialect, is_ignored, online_spec
from vllm_nvfp4.checkpoints.spec import (
    UNQUANTIZED,
    CheckpointError,
    Dialect,
    LayerKind,
    LayerSpec,
    describe,
    embedding_spec,
    fold,
    fused_layer_spec,
)
from vllm_nvfp4.compat import building, model_weights, places, versions
from vllm_nvfp4.compat.kv_cache import head_size
from vllm_nvfp4.kernels import ops
from vllm_nvfp4.layers import kv_cache
from vllm_nvfp4.layers.cut import cut_biases
from vllm_nvfp4.layers.embedding import Vocabulary, embedding_method, lm_head_method
from vllm_nvfp4.layers.experts import expert_names, experts_spec, moe_method
from vllm_nvfp4.layers.experts_loading import ExpertLoading
from vllm_nvfp4.layers.experts_plain import plain_experts_method
from vllm_nvfp4.layers.keep import Kept, has_odd_size, keep_towers, plain_method, why_kept
from vllm_nvfp4.layers.linear import linear_method
from vllm_nvfp4.layers.plain import plain_linear_method
from vllm_nvfp4.layers.plain_places import widen_for
from vllm_nvfp4.numerics.formats import FORMATS
from vllm_nvfp4.options import METHOD_NAME, Options

logger = init_logger(f"vllm.{__name__}")


class NvFp4Config(QuantizationConfig):
    """Serve a checkpoint of any NVFP4 or MXFP4 dialect, or quantise a 16-bit one while it loads."""

    def __init__(self, quant_config: dict[str, Any] | None = None) -> None:
        super().__init__()
        self.dialect: Dialect = detect(quant_config)
        self.source_config = quant_config
        self.census: Census | None = None  # None: the configuration alone decides
        self.tied_embeddings = False
        # Part of the model, by its name -> {fused layer: its shards}
        self.fused_in: dict[str, Mapping[str, Sequence[str]]] = {}
        self._vocabulary: Vocabulary | None = None
        self._kept = Kept()
        # vLLM's is static, and asked of an instance: this one depends on the files.
        self.get_checkpoint_weight_mapper = self._weight_mapper  # type: ignore[method-assign]
        self._options: Options | None = None
        self._hf_config: Any = None
        self._expert_loading: ExpertLoading | None = None
        building.install(METHOD_NAME)

    def __getstate__(self) -> dict[str, Any]:
        """Without the layers of a model, which a copy of the config is for another one of."""
        return self.__dict__ | {"_expert_loading": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """In a worker's process, which gets the config of its parent."""
        self.__dict__.update(state)
        building.install(METHOD_NAME)

    def prepare_weights(
        self, weights: Iterable[tuple[str, Any]], model: torch.nn.Module
    ) -> Iterable[tuple[str, Any]]:
        """What the model's own loader is to load, of the files' tensors."""
        cut_biases(model)
        if self.census is not None:
            weights = widen_for(model, self.census, self.fused_at)(self.census.as_read(weights))
        if self._expert_loading is not None:
            weights = self._expert_loading.rest(weights, model)
        if self.census is None:
            return weights
        names = class_names(self.census.headers(), self._hf_config)
        if names is None:
            return weights
        logger.info_once(
            "nvfp4: the files have the names and stacks of transformers' class, and are turned "
            "into the hub's while loading"
        )
        return names.back(weights)

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
        return cls.for_options(config, Options.resolve())

    @classmethod
    def for_options(cls, config: dict[str, Any], options: Options) -> QuantizationConfig:
        """For a checkpoint's configuration: this config, or vLLM's own where the options and the
        GPU have it so."""
        if options.native_blackwell and (native := _blackwell_config(config)):
            return native
        return cls(config)

    def maybe_update_config(
        self, model_name: str, hf_config: Any = None, revision: str | None = None
    ) -> None:
        """Read what the model's own configuration says, and what its files hold, before loading."""
        self._hf_config = hf_config
        text_config = getattr(hf_config, "text_config", None) or hf_config
        self.tied_embeddings = bool(getattr(text_config, "tie_word_embeddings", False))
        self._head_size = head_size(text_config)
        self.census = take_census_of(model_name, revision, self.source_config, self.dialect)
        if isinstance(self.dialect, MlxDialect):
            unfold(hf_config)
        if self.census is not None:
            self.dialect = self.census.dialect
        elif isinstance(self.dialect, MlxDialect):  # only its sizes say what is in a word
            todo = "Download it first: hf download"
            raise CheckpointError(model_name, "headers", "none", "those of an MLX model", todo)

    @property
    def options(self) -> Options:
        """The options of this engine; read once vLLM's own config is at hand."""
        if self._options is None:
            vllm_config = get_current_vllm_config_or_none()
            given: Any = vllm_config.additional_config if vllm_config else None
            self._options = Options.resolve(given)
            on_cpu = versions.device_capability() is None
            ops.configure(self._options, "cpu" if on_cpu else "cuda")
            if on_cpu:
                versions.allow_amx()
        return self._options

    @property
    def vocabulary(self) -> Vocabulary:
        """What embedding and lm_head share; made once the model's own configuration is read."""
        if self._vocabulary is None:
            self._vocabulary = Vocabulary(self.options, self.embedding_spec, self.tied_embeddings)
        return self._vocabulary

    @property
    def kv_cache_scheme(self) -> dict[str, Any] | None:
        """vLLM's Attention turns an "auto" KV cache into FP8 where a config has this attribute. An
        encoder's keys are used once, as they are."""
        config = get_current_vllm_config_or_none()
        if versions.keeps_no_cache(config and config.model_config):
            return None
        is_declared = self.dialect.kv_cache.dtype is not None
        return kv_cache.default_scheme(self.options.kv_cache, self._head_size, is_declared)

    def fused_at(self, name: str) -> Mapping[str, Sequence[str]]:
        """Fused layer -> its shards, of the models that are built. A part of a model may fuse what
        the model has whole elsewhere, as GLM-4V's tower: what is around a layer goes before."""
        fused: dict[str, Sequence[str]] = {**model_weights.stacked(), **self.packed_modules_mapping}
        for part in sorted(p for p in self.fused_in if name.startswith(f"{p}.")):
            fused |= self.fused_in[part]
        return fused

    def build_again(self) -> None:
        """Forget the layers of a model that is about to be built again."""
        self._kept, self._vocabulary, self._expert_loading = Kept(), None, None
        if self.census is not None:
            self.census.forget_asked()

    def found(self, name: str) -> frozenset[str]:
        """The files' modules that a layer, fused or not, is made of."""
        return self.census.found(name, self.fused_at(name)) if self.census else frozenset()

    def apply_vllm_mapper(self, hf_to_vllm_mapper: Any) -> None:
        if places.has_built(self):
            return  # it is applied already
        self.dialect.rename(hf_to_vllm_mapper)
        if self.census is not None:
            self.census.rename(hf_to_vllm_mapper)

    def _weight_mapper(self) -> Any:
        """vLLM's own mapper of the files' names, with what the files here need."""
        self._tell_unasked()
        self._tell_strays()
        if self._kept.num_quantized:
            logger.info_once("nvfp4: %s", self._kept.line(self.options.online_format))
        mapper = QuantizationConfig.get_checkpoint_weight_mapper()
        if self.census is not None and (stray := self.census.stray):
            mapper |= versions.mapper_without(stray)
        if self.census is not None and self.census.has_projection_first:
            mapper |= versions.mapper_of(PROJECTION_FIRST, r"\1experts.\3.\2\4")
        if self.census is not None and self.census.has_kv_outputs:
            mapper |= versions.mapper_of(KV_OUTPUTS, OF_ATTENTION)
        return mapper

    def get_quant_method(self, layer: torch.nn.Module, prefix: str) -> QuantizeMethodBase | None:
        if isinstance(layer, versions.attention_classes()):
            has_scales = self.dialect.kv_cache.dtype is not None
            has_scales |= self.census is not None and self.census.has_kv_scales
            return kv_cache.kv_cache_method(self, has_scales)
        if isinstance(layer, VocabParallelEmbedding):  # lm_head's class too
            layer.nvfp4_is_asked = True  # type: ignore[assignment]
        if isinstance(layer, ParallelLMHead):
            prefix = prefix or "lm_head"
            return lm_head_method(self.vocabulary, self.lm_head_spec(prefix), prefix)
        if isinstance(layer, VocabParallelEmbedding):
            return embedding_method(self.vocabulary, prefix or "embed_tokens")
        if versions.is_moe_layer(layer):
            return self._experts_method(layer, prefix)
        if not isinstance(layer, LinearBase):
            return None
        prefix = places.name_of(self, layer, prefix)
        spec = self.layer_spec(prefix)
        if spec.kind is LayerKind.ONLINE and (why := self._why_kept(layer, prefix, spec)):
            return plain_method(why)
        if spec.kind is LayerKind.UNQUANTIZED:
            return plain_linear_method(spec)
        return linear_method(self.options, spec, prefix)

    def _why_kept(self, layer: Any, prefix: str, spec: LayerSpec) -> str | None:
        """Why a 16-bit layer stays so, or None; counted either way."""
        num_weights = layer.input_size * layer.output_size
        config = get_current_vllm_config_or_none()
        why = why_kept(layer, prefix, config.model_config if config else None)
        if why is None and self._stays_in_16_bits(spec, prefix, layer.input_size):
            why = LEFT_OUT
        self._count(num_weights, why)
        return why

    def _count(self, num_weights: int, why: str | None) -> None:
        if why is None:
            self._kept.note_quantized(num_weights)
        else:
            self._kept.note_kept(why, num_weights)

    @property
    def is_online(self) -> bool:
        """Whether the checkpoint is in 16 bits, and quantised while it loads."""
        return self.dialect.name == OnlineDialect.name

    def towers_are_marked(self, model: Any) -> None:
        """vLLM has marked encoders and connectors of the model that is being built."""
        if self.is_online:
            keep_towers(model, self._kept)

    def _experts_method(self, layer: Any, prefix: str) -> QuantizeMethodBase | None:
        experts = expert_names(layer, prefix, self.census)
        spec = self._stored_experts(layer, prefix, experts)
        moe = layer.moe_config
        stays = self._stays_in_16_bits(spec, prefix, moe.hidden_dim, moe.intermediate_size)
        if spec.kind is LayerKind.ONLINE:
            num_weights = 3 * moe.num_logical_experts * moe.hidden_dim * moe.intermediate_size
            self._count(num_weights, LEFT_OUT if stays else None)
        if spec.kind is LayerKind.UNQUANTIZED or stays:
            return plain_experts_method(layer)
        if self.census is not None:
            if self._expert_loading is None:
                self._expert_loading = ExpertLoading(self.census)
            if self._expert_loading.plan(layer, prefix, experts, spec):  # widened to 16 bits
                return plain_experts_method(layer)
        return moe_method(self.options, spec, layer, prefix)

    def _stored_experts(self, layer: Any, prefix: str, experts: list[list[str]]) -> LayerSpec:
        """As :meth:`layer_spec`, of a layer's experts. experts: names of their linear layers"""
        online = online_spec(FORMATS[self.options.online_format])
        if self.census is None:
            return online if self.is_online else experts_spec(self.dialect, layer, prefix)
        names = [name for expert in experts for name in expert]
        spec = self.census.experts_spec(prefix, names)
        if self.is_online:
            return spec if spec.is_quantized else online
        self._tell(prefix, spec, [self.dialect.layer_spec(names[0])])
        return spec

    def layer_spec(self, prefix: str) -> LayerSpec:
        """How the layer, fused or not, is stored: as the files show, or as the configuration says
        where there are none."""
        packed = self.fused_at(prefix)
        if self.census is None and not self.is_online:
            return _readable(fused_layer_spec(self.dialect, prefix, packed), prefix)
        spec = self.census.layer_spec(prefix, packed) if self.census else UNQUANTIZED
        if self.census is None or (self.is_online and not spec.is_quantized):
            return online_spec(FORMATS[self.options.online_format])
        self._tell(prefix, spec, self.census.said(prefix, packed))
        return _readable(spec, prefix)

    def lm_head_spec(self, prefix: str) -> LayerSpec:
        """As :meth:`layer_spec`, of lm_head, which no file holds that is tied to an embedding."""
        if self.census is not None and self.census.find(prefix) is None:
            return UNQUANTIZED
        if self.is_online:
            stored = self.census.layer_spec(prefix, {}) if self.census else UNQUANTIZED
            return UNQUANTIZED if stored.kind is LayerKind.ONLINE else stored
        return self.layer_spec(prefix)

    def embedding_spec(self, prefix: str) -> LayerSpec:
        """As :meth:`layer_spec`, of the token embedding."""
        if self.census is None:
            return embedding_spec(self.dialect, prefix)
        if self.census.find(prefix) is None:
            return UNQUANTIZED
        return _readable(self.census.layer_spec(prefix, {}), prefix)

    def _tell_unasked(self) -> None:
        """One line for what is quantised in the files and not in the model, which is built by now:
        draft layers without speculation, and layers of other pipeline ranks."""
        if self.census is not None and (left := self.census.unasked()):
            logger.info_once(
                "nvfp4: in the files, but used by no layer of this model: %s",
                _listed(left),
            )

    def _tell_strays(self) -> None:
        """One line for tensors that are dropped: scales beside weights without a use for them."""
        if self.census is not None and (strays := self.census.strays_by_kind()):
            logger.info_once(
                "nvfp4: in the files, of no use to their layers and passed over: %s",
                _listed(strays),
            )

    def _tell(self, prefix: str, spec: LayerSpec, said: Collection[LayerSpec]) -> None:
        """One line where files and configuration say different things about layers of a kind."""
        if not said or any((s.is_quantized, s.fmt) == (spec.is_quantized, spec.fmt) for s in said):
            return
        logger.warning_once(
            "nvfp4: %s: the configuration says %s, the files hold %s; the files decide",
            fold(prefix),
            " and ".join(sorted({describe(s) for s in said})),
            describe(spec),
        )

    def _stays_in_16_bits(self, spec: LayerSpec, prefix: str, *input_sizes: int) -> bool:
        """Whether a 16-bit layer is left as it is: by the user's list, or by its shape. The list
        names it as the model does, or all its parts as the files do."""
        if spec.kind is not LayerKind.ONLINE or spec.fmt is None:
            return False
        patterns = self.options.online_ignore
        if is_ignored([prefix], patterns) or (
            patterns and is_ignored(self.found(prefix), patterns)
        ):
            return True
        return has_odd_size(spec.fmt, prefix, input_sizes)


def _listed(counts: Mapping[str, int]) -> str:
    return ", ".join(f"{name} ({count})" for name, count in sorted(counts.items()))


def _readable(spec: LayerSpec, prefix: str) -> LayerSpec:
    """The spec. Raises CheckpointError for a form that is not read here."""
    if spec.kind is LayerKind.OTHER:
        raise CheckpointError(
            "quantization config",
            prefix,
            describe(spec),
            "a layer in NVFP4, MXFP4, FP8, MXFP8 or 16 bits, or files that show which it is",
            "Quantise the model again with this layer in one of these, or left as it is.",
        )
    return spec


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
