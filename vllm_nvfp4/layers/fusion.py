# SPDX-License-Identifier: Apache-2.0
"""In a compiled graph, 8-bit activations are quantised by the kernel that computes them.

``vllm_nvfp4::linear`` quantises its input itself: it reads what an RMSNorm or SiLU-and-multiply has
just written. Where a graph is compiled for batches that all get 8-bit activations, this pass splits
the op into numerics' rounding of activations, in torch's own operations, and
``vllm_nvfp4::linear_a8``, and ``fp8_linear`` likewise. Inductor then writes the quantisation into
the Triton kernel of whatever comes before it, or makes one of it alone.

vLLM compiles a graph once for each range of batch sizes. One more end of a range, at
``SPLIT_TOKENS``, separates those that dispatch may give 16 bits from those it gives 8.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from vllm_nvfp4.compat import versions
from vllm_nvfp4.kernels import ops, paths
from vllm_nvfp4.kernels.cuda.cost import has_fp8_mma
from vllm_nvfp4.kernels.cuda.dispatch import gains_from_8_bits
from vllm_nvfp4.numerics.quantize import quantize_fp8_per_row
from vllm_nvfp4.options import Options

if TYPE_CHECKING:  # Inductor takes a second to import, and only a compiler needs it
    from torch._inductor.pattern_matcher import Match

# Above the M from which any card of the table takes 8-bit activations on a model's layers, and
# below a prompt's worth of tokens.
SPLIT_TOKENS = 256


class QuantizeWhereComputed(versions.inductor_pass_class()):  # type: ignore[misc]
    """A pass over Inductor's post-grad graph, see above. Without state."""

    def __call__(self, graph: torch.fx.Graph) -> None:
        from torch._inductor.pattern_matcher import (
            CallFunctionVarArgs,
            PatternMatcherPass,
            register_graph_pattern,
        )

        patterns = PatternMatcherPass(pass_name="vllm_nvfp4")
        for op, is_8_bit, split in (
            (torch.ops.vllm_nvfp4.linear.default, _takes_8_bits, _split),
            (torch.ops.vllm_nvfp4.fp8_linear.default, _fp8_takes_8_bits, _split_fp8),
        ):
            pattern = CallFunctionVarArgs(op)
            register_graph_pattern(pattern, extra_check=is_8_bit, pass_dict=patterns)(split)
        patterns.apply(graph)

    def uuid(self) -> Any:
        from torch._inductor.custom_graph_pass import get_hash_for_files

        # Inductor's cache: what decides about the split is code and tables of this package.
        package = Path(__file__).resolve().parents[1]
        kernels = ("dispatch.py", "cost.py", "variants.py")
        files = [package / name for name in ("layers/fusion.py", "gpus.py", "numerics/quantize.py")]
        files += [package / "kernels" / "cuda" / name for name in kernels]
        return get_hash_for_files(tuple(map(str, files))).hex()


def install(vllm_config: Any, options: Options) -> None:
    """Add the pass to vLLM's compilation, and the range that it needs.

    A pass of the user's own in the same place of the configuration stays, and this one is left
    out: the products then quantise their input themselves.
    """
    if options.activation == "16":
        return
    compilation = vllm_config.compilation_config
    place = versions.post_grad_pass_key()
    if place in compilation.inductor_compile_config:
        return
    compilation.inductor_compile_config[place] = QuantizeWhereComputed()
    if options.activation == "auto" and _has_a_switch(options):
        versions.add_compile_range_end(compilation, SPLIT_TOKENS)


def _has_a_switch(options: Options) -> bool:
    """Whether the device at hand takes 16 bits for few tokens and 8 for many."""
    arch = versions.device_arch()
    if arch is None or (arch >= 100 and options.native_blackwell):
        return False
    if has_fp8_mma(arch):
        return True
    gpu = paths.gpu_figures("cuda")
    return gpu is not None and gains_from_8_bits(gpu, options.a8_variant)


def _takes_8_bits(match: Match) -> bool:
    """Whether every batch that this graph is compiled for gets 8-bit activations."""
    arguments: Any = match.output_node().args
    a, *_, num_rows, num_cols, fmt, bits = arguments
    device, tokens = a.meta["val"].device, _least_tokens(a)
    return ops.takes_8_bits(device, tokens, num_rows, num_cols, fmt, bits)


def _fp8_takes_8_bits(match: Match) -> bool:
    arguments: Any = match.output_node().args
    a, weight, _, _, bits = arguments
    n, k = weight.meta["val"].shape
    return ops.fp8_takes_8_bits(a.meta["val"].device, _least_tokens(a), n, k, bits)


def _least_tokens(a: Any) -> int:
    """The fewest rows that the graph's activations may have."""
    tokens = a.meta["val"].shape[0]
    if isinstance(tokens, int):
        return tokens
    # Ranges count the tokens of a batch, which are one symbol, not a multiple or a part of it.
    return versions.least_compiled_size() if tokens.node.expr.is_symbol else 1


def _split(match: Match, a: Any, codes: Any, block_scale: Any, global_scale: Any, bias: Any,
           num_rows: int, num_cols: int, fmt: str, activation_bits: int) -> None:  # fmt: skip
    """linear(a, w) -> linear_a8(quantize(a), w)"""
    dtype = a.meta["val"].dtype
    quantize = ops.activation_quantizer(a.meta["val"].device)

    def quantize_and_multiply(a: torch.Tensor, *weight: torch.Tensor) -> torch.Tensor:
        q, a_scale = quantize(a)
        codes, block_scale, global_scale, *biases = weight
        return torch.ops.vllm_nvfp4.linear_a8(
            q, a_scale, codes, block_scale, global_scale, biases[0] if biases else None,
            num_rows, num_cols, fmt, dtype,
        )  # fmt: skip

    operands = [a, codes, block_scale, global_scale, *([] if bias is None else [bias])]
    match.replace_by_example(quantize_and_multiply, operands)


def _split_fp8(
    match: Match, a: Any, weight: Any, row_scale: Any, bias: Any, activation_bits: int
) -> None:
    """fp8_linear(a, w) -> the library product of quantize_fp8_per_row(a) and w"""
    dtype = a.meta["val"].dtype

    def quantize_and_multiply(a: torch.Tensor, *operands: torch.Tensor) -> torch.Tensor:
        q, a_scale = quantize_fp8_per_row(a.reshape(-1, a.shape[-1]))
        weight, row_scale, *biases = operands
        bias = biases[0] if biases else None
        y = ops.multiply_fp8_a8(q, a_scale, weight, row_scale, bias, dtype)
        return y.view(*a.shape[:-1], weight.shape[0])

    operands = [a, weight, row_scale, *([] if bias is None else [bias])]
    match.replace_by_example(quantize_and_multiply, operands)
