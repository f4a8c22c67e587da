# SPDX-License-Identifier: Apache-2.0
"""Hooks that vLLM does not have: what a model is handed of the files goes through its quantization
config first, which also learns of the layers that a model fuses, and may have it built again.

vLLM's own hook, get_checkpoint_weight_mapper, renames; it cannot take a tensor apart, and models
with a loader of their own pass it by. Of fused layers vLLM tells a config packed_modules_mapping,
which models that say the same in their mapper of weights leave out (EAGLE-3's drafts, Zamba2).
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from vllm.logger import init_logger

from vllm_nvfp4.compat import draft_tables, places, versions

logger = init_logger(f"vllm.{__name__}")

_stacked: dict[str, tuple[str, ...]] = {}


def stacked() -> Mapping[str, Sequence[str]]:
    """Fused layer -> its shards, of the mappers of the models that were built; the last one's where
    two differ."""
    return _stacked


def install() -> None:
    """Have each model built from now on load ``quant_config.prepare_weights(weights, model)``."""
    from vllm.model_executor.model_loader import base_loader, utils
    from vllm.model_executor.models import utils as model_utils

    loader: Any = base_loader
    initialize = loader.initialize_model
    if hasattr(initialize, "nvfp4_prepares"):
        return

    @functools.wraps(initialize)
    def initialize_model(*args: Any, **kwargs: Any) -> Any:
        vllm_config = kwargs["vllm_config"] if "vllm_config" in kwargs else args[0]
        speculative = vllm_config.speculative_config
        if speculative is not None:
            draft_tables.install()  # a draft is built, and shares, after its target
        model_config = kwargs.get("model_config")
        model = _build(lambda: initialize(*args, **kwargs), vllm_config, model_config)
        model.nvfp4_is_draft = _is_draft(vllm_config, model_config)
        config = _config_of(model, vllm_config, model_config)
        prepare = getattr(config, "prepare_weights", None)
        if prepare is not None:
            _wrap(model, prepare)
        return model

    initialize_model.nvfp4_prepares = True  # type: ignore[attr-defined]
    loader.initialize_model = initialize_model
    find_class: Any = utils.get_model_architecture

    @functools.wraps(find_class)
    def get_model_architecture(*args: Any, **kwargs: Any) -> Any:
        found = find_class(*args, **kwargs)
        _stacked.update(places.fused_by(getattr(found[0], "hf_to_vllm_mapper", None)))
        return found

    utils.get_model_architecture = get_model_architecture
    auto: Any = model_utils.AutoWeightsLoader
    load_all = auto.load_weights

    @functools.wraps(load_all)
    def load_weights(self: Any, weights: Any, *, mapper: Any = None) -> Any:
        if getattr(self.module, "nvfp4_is_draft", False) and hasattr(self.module, "model"):
            weights = _placed(weights, self.module, mapper)
        return load_all(self, weights, mapper=mapper)

    auto.load_weights = load_weights


def _build(initialize: Callable[[], Any], vllm_config: Any, model_config: Any) -> Any:
    """The model, each of whose layers was decided by the name that it has in it."""
    others = versions.noted_layers(vllm_config)
    with places.building() as build:
        model = initialize()
    for _, mapper in places.mappers_of(model):
        for leaf, shards in places.fused_by(mapper).items():
            _stacked.setdefault(leaf, shards)  # what the model itself says goes before
    if (again := places.settle(build, model, _is_draft(vllm_config, model_config))) is None:
        return model
    logger.info_once(
        "nvfp4: %s has other layers than it asked for while it was built: it is built again by the "
        "names that they have in it",
        type(model).__name__,
    )
    del model, build
    versions.forget_layers(vllm_config, others)
    for config in again.known:
        config.build_again()
    with places.building(again):
        return initialize()


def _is_draft(vllm_config: Any, model_config: Any) -> bool:
    return model_config is not None and model_config is not vllm_config.model_config


def _placed(weights: Iterable[tuple[str, Any]], model: Any, mapper: Any) -> Any:
    """A draft's weights by names that it has: some of vLLM's loaders put "model." before each."""
    inner, own = ({n.partition(".")[0] for n in m.state_dict()} for m in (model.model, model))
    for name, tensor in weights:
        known = next(iter(mapper.apply_list([name])), "") if mapper else name
        first, second = [*known.split("."), ""][:2]
        if first == "model" and second not in inner and second in own:
            name = name.removeprefix("model.")
        elif first in inner and first not in own:
            name = f"model.{name}"
        yield name, tensor


def _config_of(model: Any, vllm_config: Any, model_config: Any) -> Any:
    """The quantization config that knows a model's layers and files: the engine's; of a draft, the
    one that it has made for itself, or the engine's where it is in the target's files."""
    engine = vllm_config.quant_config
    if not _is_draft(vllm_config, model_config):
        return engine
    made = (getattr(part, "quant_config", None) for part in (model, *model.children()))
    own = next((c for c in made if c is not None and c is not engine), None)
    return own or (engine if model_config.model == vllm_config.model_config.model else None)


def _wrap(model: Any, prepare: Any) -> None:
    load = model.load_weights

    @functools.wraps(load)
    def load_weights(weights: Iterable[Any], *args: Any, **kwargs: Any) -> Any:
        return load(prepare(weights, model), *args, **kwargs)

    model.load_weights = load_weights
