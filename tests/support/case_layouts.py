# SPDX-License-Identifier: Apache-2.0
"""What tools do to a checkpoint's tensors: leave some out, leave some over, stack experts."""

from __future__ import annotations

import re

import torch
from stored_forms import INPUT_SCALE, stored_as

Tensors = dict[str, torch.Tensor]


def drop(pattern: str, tensors: Tensors) -> None:
    for name in [n for n in tensors if re.search(pattern, n)]:
        del tensors[name]


def stray(pattern: str, tensors: Tensors) -> None:
    """A scale of activations beside each layer."""
    for name in [n for n in tensors if re.search(pattern, n)]:
        tensors[name.removesuffix("weight") + "input_scale"] = torch.tensor(INPUT_SCALE)


def add_kv_scales(tensors: Tensors) -> None:
    for name in [n for n in tensors if re.search(r"self_attn\.[kv]_proj\.weight$", n)]:
        if "vision" not in name:
            leaf = "k_scale" if ".k_proj" in name else "v_scale"
            tensors[name.replace("weight", leaf)] = torch.tensor(0.05)


def spread(pattern: str, tensors: Tensors) -> None:
    """Stacks [E, K, N], gate and up side by side, as one tensor [N, K] of each expert.

    pattern: of an expert's name, such as "{expert}.{projection}"
    """
    for name in [n for n in tensors if n.endswith(("experts.gate_up_proj", "experts.down_proj"))]:
        root, _, leaf = name.rpartition(".")
        for number, expert in enumerate(tensors.pop(name)):
            parts = {"down_proj": expert.T}
            if leaf == "gate_up_proj":
                gate, up = expert.T.chunk(2)
                parts = {"gate_proj": gate, "up_proj": up}
            for projection, weight in parts.items():
                place = pattern.format(expert=number, projection=projection)
                tensors[f"{root}.{place}.weight"] = weight.contiguous()


def stack_rows(tensors: Tensors) -> list[torch.Tensor]:
    """compressed-tensors: the rows of all experts of a layer in one matrix, with one divisor.
    Returns what they are worth."""
    values = []
    roots = {n.partition(".experts.")[0] + ".experts" for n in tensors if ".experts." in n}
    for root in roots:
        number = len({n.split(".experts.")[1].split(".")[0] for n in tensors if root in n})
        for leaf, parts in {
            "gate_up_proj": ("gate_proj", "up_proj"),
            "down_proj": ("down_proj",),
        }.items():
            names = [f"{root}.{e}.{p}" for e in range(number) for p in parts]
            rows = torch.cat([tensors.pop(f"{n}.weight") for n in names])
            stored, value = stored_as("ct", rows)
            values.append(value)
            tensors |= {f"{root}.{leaf}.{k}": v for k, v in stored.items()}
    return values


def as_modelopt_stacks(tensors: Tensors) -> list[torch.Tensor]:
    """Llama-4 as ModelOpt writes it: codes [E, K/2, N], scales beside them. Returns what they are
    worth."""
    values = []
    for name in [n for n in tensors if n.endswith(("experts.gate_up_proj", "experts.down_proj"))]:
        both = [stored_as("nvfp4", e.T) for e in tensors.pop(name)]
        experts = [stored for stored, _ in both]
        values += [value for _, value in both]
        tensors[name] = torch.stack([e["weight"].T for e in experts])
        scales = torch.stack([e["weight_scale"].view(torch.uint8).T for e in experts])
        tensors[f"{name}_weight_scale"] = scales.view(torch.float8_e4m3fn)
        for leaf in ("weight_scale_2", "input_scale"):
            tensors[f"{name}_{leaf}"] = torch.stack([e[leaf] for e in experts])
    return values
