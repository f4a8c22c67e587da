# SPDX-License-Identifier: Apache-2.0
"""Token embedding and lm_head: as the checkpoint stores them, or quantised while they load."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from vllm.logger import init_logger
from vllm.model_executor.layers.quantization.base_config import QuantizeMethodBase

from vllm_nvfp4.checkpoints.convert import check_dense
from vllm_nvfp4.checkpoints.online import online_spec
from vllm_nvfp4.checkpoints.spec import (
    UNQUANTIZED,
    CheckpointError,
    LayerKind,
    LayerSpec,
    Role,
    describe,
)
from vllm_nvfp4.compat import versions
from vllm_nvfp4.kernels import ops
from vllm_nvfp4.layers.filling import check_filled
from vllm_nvfp4.layers.linear import (
    CheckpointLinearMethod,
    NvFp4Fp8LinearMethod,
    NvFp4LinearMethod,
    PlacedMethod,
    add_meta_weight,
)
from vllm_nvfp4.layers.plain import (
    WidenedEmbeddingMethod,
    add_places_for_strays,
    plain_embedding_method,
    remove_places_for_strays,
)
from vllm_nvfp4.layers.weights import (
    apply_weight,
    attach_fp8_weight,
    attach_weight,
    packed_weight,
    prepare_kernels,
    quantize_online,
)
from vllm_nvfp4.numerics.formats import NVFP4
from vllm_nvfp4.numerics.quantize import quantize_fp8_weight
from vllm_nvfp4.options import Options

logger = init_logger(f"vllm.{__name__}")

_STORED = (LayerKind.MICROSCALED, LayerKind.FP8, LayerKind.WIDENED)


@dataclass
class Vocabulary:
    """What the token embedding and lm_head of one model depend on.

    stored:    how the checkpoint stores the embedding that the model calls so
    are_tied:  whether they are one weight
    tied_spec: how that weight is stored, known once the embedding is made
    """

    options: Options
    stored: Callable[[str], LayerSpec]
    are_tied: bool
    tied_spec: LayerSpec = UNQUANTIZED

    @property
    def tied_format(self) -> str:
        """The one format of a weight that both share: the two options must agree."""
        asked = {self.options.lm_head, self.options.embedding} - {"keep"}
        if len(asked) > 1:
            raise ValueError(
                f"options lm_head={self.options.lm_head} and embedding={self.options.embedding}: "
                "this model's lm_head and embedding are one tensor (tie_word_embeddings); set only "
                "one of the two, or both to the same format."
            )
        return asked.pop() if asked else "keep"


def lm_head_method(both: Vocabulary, spec: LayerSpec, prefix: str) -> QuantizeMethodBase | None:
    """The method for lm_head: the checkpoint's own format first, then the option."""
    if both.are_tied and both.tied_spec.kind in _STORED:
        spec = both.tied_spec
    fmt = both.tied_format if both.are_tied else both.options.lm_head
    if spec.kind not in _STORED and fmt == "keep":
        return plain_embedding_method(spec)
    if spec.kind is not LayerKind.WIDENED:
        refuse_quantised_copy(prefix, describe(spec) if spec.kind in _STORED else fmt)
    if spec.kind in _STORED:
        return _stored_method(both.options, spec, prefix)
    return OnlineEmbeddingMethod(both, fmt, prefix, spec)


def refuse_quantised_copy(prefix: str, form: str) -> None:
    """Raise CheckpointError where a draft is to get a quantised copy of an lm_head that is itself
    quantised: vLLM makes one of 16 bits alone, and says so after all is loaded."""
    if asked := versions.draft_lm_head_quantization():
        raise CheckpointError(
            "speculative_config",
            "draft_lm_head_quantization",
            f"{asked}, beside a {prefix} in {form}",
            f"a {prefix} in 16 bits",
            "Leave it out: the draft shares the quantised one as it is.",
        )


def embedding_method(both: Vocabulary, prefix: str) -> QuantizeMethodBase | None:
    """The method for the token embedding, or None to keep it in 16 bits."""
    spec = both.stored(prefix)
    if spec.kind in _STORED:
        if both.are_tied:
            both.tied_spec = spec
        return _stored_method(both.options, spec, prefix)
    fmt = both.tied_format if both.are_tied else both.options.embedding
    if fmt == "keep":
        return plain_embedding_method(spec)
    return OnlineEmbeddingMethod(both, fmt, prefix, spec)


def _stored_method(options: Options, spec: LayerSpec, prefix: str) -> QuantizeMethodBase:
    if spec.kind is LayerKind.WIDENED:
        return WidenedEmbeddingMethod(spec, prefix)
    if spec.kind is LayerKind.FP8:
        # lm_head multiplies one token of each request: 8-bit activations would gain nothing.
        return StoredFp8EmbeddingMethod(options, replace(spec, activation_bits=16), prefix)
    return StoredEmbeddingMethod(options, spec, prefix)


def look_up(layer: Any, ids: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Rows of a quantised embedding by token, [*ids.shape, hidden size] in ``dtype``."""
    if not hasattr(layer, "weight_packed"):
        return torch.ops.vllm_nvfp4.gather_fp8_rows(ids, layer.weight, layer.row_scale, dtype)
    return torch.ops.vllm_nvfp4.gather_rows(
        ids,
        layer.weight_packed,
        layer.weight_block_scale,
        layer.weight_global_scale,
        *layer.nvfp4_shape,
        layer.nvfp4_format,
        dtype,
    )


def weight_owner(layer: Any) -> Any:
    """The layer itself; of a tied lm_head, the embedding."""
    return getattr(layer, "nvfp4_tied_to", [layer])[0]


class _VocabularyMethod:
    """What a weight [vocabulary, hidden size] needs beside a linear layer's product: it serves as
    embedding (a gather of rows), as lm_head, or as both when tied."""

    def tie_weights(self, layer: Any, embed_tokens: Any) -> Any:
        """Make lm_head use the embedding's one copy."""
        for name in list(layer._parameters):
            if name != "bias":
                delattr(layer, name)
        # In a list, so that torch does not take the embedding for a child of lm_head.
        layer.nvfp4_tied_to = [embed_tokens]
        return layer

    def stand_in(self, layer: Any) -> torch.Tensor:
        """[1, hidden size]: equal for tables that are, and for no others; see
        compat.draft_tables."""
        digest = hashlib.sha256()
        owner = weight_owner(layer)
        for name, parameter in sorted(owner.named_parameters(recurse=False)):
            data = parameter.detach().reshape(-1).view(torch.uint8).cpu()
            digest.update(f"{name} {list(parameter.shape)}".encode())
            digest.update(memoryview(data.numpy()))
        generator = torch.Generator().manual_seed(int.from_bytes(digest.digest()[:8], "big") >> 1)
        noise = torch.randn(1, layer.embedding_dim, generator=generator)
        return noise.to(next(owner.parameters(recurse=False)).device)

    def embedding(self, layer: Any, input_: torch.Tensor) -> torch.Tensor:
        return look_up(layer, input_, layer.nvfp4_dtype)


class _StoredVocabularyMethod(_VocabularyMethod, CheckpointLinearMethod):
    """Parameters as a linear layer's, loaded by vLLM's loader for rows of a vocabulary."""

    def add_parameters(
        self, layer: Any, shape: tuple[int, int], dtype: torch.dtype, attrs: dict[str, Any]
    ) -> None:
        load: Any = attrs["weight_loader"]

        # Its first argument has the name by which vLLM, reloading, puts another tensor there.
        def load_rows(param: Any, loaded: torch.Tensor) -> None:
            # vLLM's takes a scalar and a scale for each row in the parameter's shape alone, and
            # fills the rows that pad the vocabulary with 0.
            if param.nvfp4_role is not Role.UNUSED:
                rows = loaded.shape or (1,)
                load(param, loaded.reshape(rows[0], *param.shape[1:]))
            if param.nvfp4_role is Role.ROW_SCALE:
                param.data[layer.num_org_embeddings_per_partition :] = 1

        super().add_parameters(layer, shape, dtype, {**attrs, "weight_loader": load_rows})
        layer.nvfp4_dtype = dtype


class StoredEmbeddingMethod(_StoredVocabularyMethod, NvFp4LinearMethod):
    """lm_head or embedding in NVFP4 or MXFP4, from a checkpoint."""

    def process_weights_after_loading(self, layer: Any) -> None:
        super().process_weights_after_loading(layer)
        if weight_owner(layer) is layer:  # a tied lm_head has no weight of its own
            ops.warm_up_gather(packed_weight(layer), layer.nvfp4_dtype)

    def apply(self, layer: Any, x: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        return super().apply(weight_owner(layer), x, bias)


class StoredFp8EmbeddingMethod(_StoredVocabularyMethod, NvFp4Fp8LinearMethod):
    """lm_head or embedding in FP8, from a checkpoint."""

    def apply(self, layer: Any, x: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        return super().apply(weight_owner(layer), x, bias)


class OnlineEmbeddingMethod(_VocabularyMethod, PlacedMethod):
    """A 16-bit [vocabulary, hidden size] weight that becomes FP8 or NVFP4 once it is loaded."""

    uses_meta_device = True

    def __init__(
        self, both: Vocabulary, fmt: str, prefix: str, stored: LayerSpec = UNQUANTIZED
    ) -> None:
        spec = online_spec(NVFP4) if fmt == NVFP4.name else UNQUANTIZED
        super().__init__(both.options, spec, prefix)
        self.fmt, self.are_tied, self.stored = fmt, both.are_tied, stored

    def add_parameters(
        self, layer: Any, shape: tuple[int, int], dtype: torch.dtype, attrs: dict[str, Any]
    ) -> None:
        add_meta_weight(layer, shape, dtype, attrs)
        layer.nvfp4_dtype = dtype
        add_places_for_strays(layer, self.stored)

    def process_weights_after_loading(self, layer: Any) -> None:
        remove_places_for_strays(layer)
        weight: Any = getattr(layer, "weight", None)
        if getattr(weight, "nvfp4_role", None) is not Role.WEIGHT:
            return
        check_filled(layer, self.prefix)
        del layer.weight
        if self.fmt == NVFP4.name:
            method = self.options.online_method
            quantized = quantize_online(
                weight.data, [len(weight)], NVFP4, method, layer=self.prefix
            )
            attach_weight(layer, quantized)
            prepare_kernels(layer, self.options.activation)
            ops.warm_up_gather(packed_weight(layer), layer.nvfp4_dtype)
        else:
            check_dense(weight.data, f"{self.prefix}.weight")
            attach_fp8_weight(layer, *quantize_fp8_weight(weight.data))
        logger.info_once(
            "nvfp4: %s: 16-bit %s, quantised to %s while loading",
            self.prefix,
            "shared by embedding and lm_head" if self.are_tied else "layer",
            self.fmt,
        )

    def apply(self, layer: Any, x: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        source = weight_owner(layer)
        if self.fmt == NVFP4.name:
            return apply_weight(source, x, bias, self.options.activation)
        return torch.ops.vllm_nvfp4.fp8_linear(x, source.weight, source.row_scale, bias, 16)
