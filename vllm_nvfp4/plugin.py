# SPDX-License-Identifier: Apache-2.0
"""Registration with vLLM. The only file that patches it; every patch says why it must be one."""

from __future__ import annotations

import contextvars
import functools
from pathlib import Path
from typing import Any, Literal, get_args

from vllm_nvfp4.checkpoints.locate import find_folder
from vllm_nvfp4.checkpoints.spec import CheckpointError
from vllm_nvfp4.compat import batch_invariance, engine_death, positions, versions
from vllm_nvfp4.options import METHOD_NAME, METHOD_NAMES, Options

_registered = False

# What vLLM's online quantization made of the names before this plugin was there.
_replaced_shorthands: dict[str, Any] = {}

# Whether the model configuration being built belongs to an engine that asked for this method.
_asked = contextvars.ContextVar("vllm_nvfp4_asked", default=False)
# ``additional_config`` of the engine being configured.
_additional_config: contextvars.ContextVar[Any] = contextvars.ContextVar(
    "vllm_nvfp4_additional_config", default=None
)


def register() -> None:
    """Register the method under its two names, ``nvfp4`` and ``nvfp4_ada``. vLLM calls this in each
    of its processes, maybe repeatedly."""
    global _registered
    if _registered:
        return
    from vllm.logger import init_logger
    from vllm.model_executor.layers import quantization

    logger = init_logger(f"vllm.{__name__}")
    if warning := versions.version_warning():
        logger.warning("nvfp4: %s; please report what breaks", warning)
    for name in METHOD_NAMES:
        if name in quantization.QUANTIZATION_METHODS:
            logger.info("%s: vLLM has a method of this name; this plugin serves it instead", name)
            _remove_builtin_method(quantization, name)
        quantization.register_quantization_config(name)(_lazy_config_class(name))
    _patch_engine_args()
    _patch_kv_cache_dtype()
    _patch_legacy_modelopt()
    batch_invariance.install()
    _patch_cpu_routing()
    _patch_cpu_dispatch()
    _registered = True


def _lazy_config_class(name: str) -> type:
    """A config class that imports the real one, and with it vLLM's layers, only when it is used.

    vLLM asks the config classes of all methods about every quantised checkpoint, and a user who
    gave a name gets the model under that name.
    """
    from vllm.model_executor.layers.quantization.base_config import QuantizationConfig

    class LazyNvFp4Config(QuantizationConfig):
        def __new__(cls, *args: Any) -> Any:
            from vllm_nvfp4.config import NvFp4Config

            return NvFp4Config(*args)

        @classmethod
        def from_config(cls, config: dict[str, Any]) -> Any:
            from vllm_nvfp4.config import NvFp4Config

            return NvFp4Config.for_options(config, Options.resolve(_additional_config.get()))

        @staticmethod
        def get_config_filenames() -> list[str]:
            return []

        @classmethod
        def override_quantization_method(
            cls, hf_quant_cfg: dict[str, Any], user_quant: str | None, hf_config: Any = None
        ) -> Any:
            asked = user_quant == name or (
                user_quant is None and name == METHOD_NAME and _claims_without_flag(hf_quant_cfg)
            )
            return name if asked else None

    return LazyNvFp4Config


def _claims_without_flag(quant_config: dict[str, Any]) -> bool:
    """Whether the option ``auto`` is set and the checkpoint is of a dialect this plugin reads."""
    if not Options.resolve(_additional_config.get()).auto:
        return False
    from vllm_nvfp4.checkpoints.detect import detect

    try:
        return detect(quant_config).has_microscaled_layers()
    except CheckpointError:
        return False


def _remove_builtin_method(quantization: Any, name: str) -> None:
    """Take a built-in method out of vLLM's tables.

    vLLM refuses an override whose name is one of its own methods, and answers its shorthands for
    online quantization before it asks for a registered config.
    """
    from vllm.config import quantization as online

    names = tuple(n for n in get_args(quantization.QuantizationMethods) if n != name)
    quantization.QuantizationMethods = Literal[names]
    _replaced_shorthands[name] = getattr(online, "_ONLINE_SHORTHANDS", {}).pop(name, None)
    shorthands = getattr(online, "ONLINE_QUANT_SHORTHAND_NAMES", ())
    online.ONLINE_QUANT_SHORTHAND_NAMES = tuple(n for n in shorthands if n != name)


def _patch_engine_args() -> None:
    """Check the options before anything is loaded, and put all of them into vLLM's compile hash.

    Environment variables of a plugin are not in that hash, ``additional_config`` is, and there is
    no hook between the command line and the engine.
    """
    from pydantic import ValidationError
    from vllm.engine import arg_utils

    from vllm_nvfp4.layers import fusion

    engine_args: Any = arg_utils.EngineArgs
    create_engine_config = engine_args.create_engine_config
    create_model_config = engine_args.create_model_config

    @functools.wraps(create_engine_config)
    def create_engine_config_with_options(self: Any, *args: Any, **kwargs: Any) -> Any:
        _forget_shorthand(self)
        if self.quantization in METHOD_NAMES:
            Options.resolve(self.additional_config)
            if Path(self.model).is_file():  # a GGUF file: vLLM would read it as config.json
                find_folder(self.model)
        token = _additional_config.set(self.additional_config)
        try:
            config: Any = create_engine_config(self, *args, **kwargs)
        except ValidationError as error:
            raise _checkpoint_error(error) or error from None
        finally:
            _additional_config.reset(token)
        if getattr(config.model_config, "quantization", None) in METHOD_NAMES:
            options = Options.resolve(config.additional_config)
            config.additional_config[METHOD_NAME] = options.non_default()
            fusion.install(config, options)
            engine_death.install()
        return config

    @functools.wraps(create_model_config)
    def create_model_config_that_asked(self: Any) -> Any:
        _forget_shorthand(self)
        asked = self.quantization in METHOD_NAMES or (
            self.quantization is None and Options.resolve(self.additional_config).auto
        )
        token, outer = _asked.set(asked), _additional_config.set(self.additional_config)
        if asked:
            positions.install()
        try:
            model_config = create_model_config(self)
            if asked:
                _leave_out_prefix_caching(self, model_config)
            return model_config
        finally:
            _asked.reset(token)
            _additional_config.reset(outer)

    engine_args.create_engine_config = create_engine_config_with_options
    engine_args.create_model_config = create_model_config_that_asked


def _leave_out_prefix_caching(engine_args: Any, model_config: Any) -> None:
    """Where tokens are drafted for a model with recurrent states, vLLM caches the states of
    prefixes by Triton kernels, which a CPU does not have: the first token would end the engine."""
    from vllm.logger import init_logger
    from vllm.platforms import current_platform

    is_default = getattr(engine_args, "enable_prefix_caching", False) is None
    is_drafting = getattr(engine_args, "speculative_config", None) is not None
    if is_default and is_drafting and model_config.is_hybrid and current_platform.is_cpu():
        engine_args.enable_prefix_caching = False
        init_logger(f"vllm.{__name__}").info(
            "nvfp4: no prefix caching: on a CPU vLLM has none for recurrent states with speculation"
        )


def _forget_shorthand(engine_args: Any) -> None:
    """Take back what vLLM made of a name that was its own: in a process that has no plugins yet,
    its arguments are resolved just before it loads them."""
    shorthand = _replaced_shorthands.get(engine_args.quantization)
    if shorthand is not None and engine_args.quantization_config == shorthand:
        engine_args.quantization_config = None


def _patch_kv_cache_dtype() -> None:
    """Settle on a KV cache that the device can hold before vLLM derives anything from its type.

    vLLM resolves ``--kv-cache-dtype auto`` to what a ModelOpt checkpoint declares before it asks a
    quantization config for anything, and its attention finds out too late that it cannot.
    """
    from vllm.engine import arg_utils

    arguments: Any = arg_utils
    resolve = arguments.resolve_kv_cache_dtype_string

    @functools.wraps(resolve)
    def resolve_for_the_device(kv_cache_dtype: str, model_config: Any) -> str:
        resolved = resolve(kv_cache_dtype, model_config)
        if getattr(model_config, "quantization", None) not in METHOD_NAMES:
            return resolved
        from vllm_nvfp4.layers import kv_cache

        option = Options.resolve(_additional_config.get()).kv_cache
        return kv_cache.settle_dtype(kv_cache_dtype, resolved, option, model_config)

    arguments.resolve_kv_cache_dtype_string = resolve_for_the_device


def _checkpoint_error(error: Any) -> CheckpointError | None:
    """The CheckpointError that pydantic wrapped into a page of its own words, if there is one."""
    causes = (detail.get("ctx", {}).get("error") for detail in error.errors())
    return next((cause for cause in causes if isinstance(cause, CheckpointError)), None)


def _patch_legacy_modelopt() -> None:
    """Let ``hf_quant_config.json`` name any algorithm.

    vLLM raises on MIXED_PRECISION, W4A16_NVFP4 and others in this old form before any quantization
    config is asked. The new form, flat and with ``quant_method``, passes.
    """
    from vllm.transformers_utils import model_arch_config_convertor

    convertor: Any = model_arch_config_convertor.ModelArchConfigConvertorBase
    normalize = convertor._normalize_quantization_config

    @functools.wraps(normalize)
    def normalize_legacy(self: Any, config: Any) -> Any:
        quant_config = getattr(config, "quantization_config", None)
        if _asked.get() and isinstance(quant_config, dict):
            _flatten_legacy_modelopt(quant_config)
        return normalize(self, config)

    convertor._normalize_quantization_config = normalize_legacy


def _patch_cpu_routing() -> None:
    """Choose experts in torch where vLLM's CPU build asks CUDA kernels to do it."""
    if not versions.lacks_cpu_routing():
        return
    from vllm import _custom_ops

    from vllm_nvfp4.compat import cpu_routing

    _custom_ops.topk_softmax = cpu_routing.topk_softmax
    _custom_ops.topk_sigmoid = cpu_routing.topk_sigmoid


def _patch_cpu_dispatch() -> None:
    """Let mixtures of experts run data-parallel, without a gate and routed by a sigmoid on a CPU;
    the modules of compat say why they do not."""
    from vllm.platforms import current_platform

    if current_platform.is_cpu():
        from vllm_nvfp4.compat import cpu_dispatch, cpu_experts, cpu_routing

        cpu_dispatch.install()
        cpu_routing.install_sigmoid()
        cpu_experts.install(METHOD_NAMES)


def _flatten_legacy_modelopt(quant_config: dict[str, Any]) -> None:
    """{"producer": ..., "quantization": {...}} -> {"producer": ..., "quant_method", ...}, in place.

    In place because vLLM reads the same dict again in its workers, outside this context.
    """
    producer = quant_config.get("producer")
    is_modelopt = isinstance(producer, dict) and producer.get("name") == "modelopt"
    if is_modelopt and isinstance(quant_config.get("quantization"), dict):
        quant_config.update(quant_config.pop("quantization"))
        quant_config["quant_method"] = "modelopt"
