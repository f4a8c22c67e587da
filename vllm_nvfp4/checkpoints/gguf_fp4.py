# SPDX-License-Identifier: Apache-2.0
"""A GGUF file with weights in NVFP4 or MXFP4 as a ModelOpt folder: codes and scales bit for bit.

    NVFP4  4 x E4M3 | 32 bytes of codes, for 64 elements of a row in groups of g = 16
    MXFP4  1 x E8M0 | 16 bytes of codes, for one group of g = 32
Byte j of a group holds element j in its low nibble and j + g/2 in the high one. Beside X.weight,
X.scale (float32, one value or one for each expert) multiplies, and X.input_scale is not used. All
other tensors become BF16, and experts one by one. transformers says what a tensor is called and
which of its rows llama.cpp has put elsewhere. Source: gguf 0.19, llama.cpp's conversion/.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vllm_nvfp4.checkpoints.gguf_config import model_config
from vllm_nvfp4.checkpoints.spec import CheckpointError

if TYPE_CHECKING:
    import numpy as np
    import torch
    from gguf import GGUFReader

# ggml's types -> (ModelOpt's algorithm, elements of a group, groups of a block)
FP4_TYPES = {39: ("MXFP4", 32, 1), 40: ("W4A16_NVFP4", 16, 4)}
SCALES = (".scale", ".input_scale")
_EXPERTS = re.compile(r"(blk\.\d+)\.ffn_(gate|up|down)_exps\.(weight|bias)")
_OF_STACK = {
    "gate_up_proj": ("gate_proj.weight", "up_proj.weight"),
    "gate_up_proj_bias": ("gate_proj.bias", "up_proj.bias"),
    "down_proj": ("down_proj.weight",),
    "down_proj_bias": ("down_proj.bias",),
}
_START_AGAIN = "Serve the safetensors that the file was made from."


@dataclass
class Converted:
    """tensors: of the folder; algos: the algorithm of each layer in FP4, by its name"""

    tensors: dict[str, torch.Tensor] = field(default_factory=dict)
    algos: dict[str, str] = field(default_factory=dict)


def write_fp4_folder(gguf: Path, file: Path, reader: GGUFReader, target: Path) -> Converted:
    """Write config, tokenizer and one safetensors file to the new folder ``target``; all of it is
    in memory. gguf: what the user names; file: all of it, which ``reader`` reads. Raises
    CheckpointError for a tensor without a place, and a place without one; the readers raise more,
    for what they do not know."""
    from safetensors.torch import save_file
    from transformers import AutoTokenizer

    places = _Places(gguf, file, reader)
    scales = {t.name: t.data for t in reader.tensors if t.name.endswith(SCALES)}
    found = Converted()
    for tensor in reader.tensors:
        if tensor.name not in scales:
            scale = scales.get(tensor.name.removesuffix(".weight") + SCALES[0])
            _convert(tensor, scale, places, found)
    places.check_whole(found.tensors)
    AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name).save_pretrained(target)
    model = places.model
    model.config.architectures = [type(model).__name__]
    model.config.save_pretrained(target)
    if model.generation_config is not None:
        model.generation_config.save_pretrained(target)
    path = target / "config.json"
    config = json.loads(path.read_text())
    config |= {"dtype": "bfloat16", "quantization_config": _quant_config(found)}
    path.write_text(json.dumps(config, indent=2) + "\n")
    save_file(found.tensors, str(target / "model.safetensors"), metadata={"format": "pt"})
    return found


def split_blocks(data: np.ndarray, kind: int) -> tuple[np.ndarray, np.ndarray]:
    """(codes uint8 [..., K/2], even k in the low nibble; scales uint8 [..., K/g]) of ggml's blocks,
    uint8 [..., bytes]. ggml takes the E4M3 bits 0x7F, NaN elsewhere, for zero."""
    import numpy as np

    _, group, count = FP4_TYPES[kind]
    rows = data.shape[:-1]
    blocks = data.reshape(*rows, -1, count * (1 + group // 2))
    scales = blocks[..., :count].reshape(*rows, -1)
    packed = blocks[..., count:].reshape(*rows, -1, group // 2)
    in_order = np.concatenate([packed & 15, packed >> 4], axis=-1)
    codes = in_order[..., 0::2] | in_order[..., 1::2] << 4
    if kind == 40:
        scales = np.where(scales & 0x7F == 0x7F, 0, scales & 0x7F).astype(np.uint8)
    return codes.reshape(*rows, -1), scales


class _Places:
    """Where transformers' model has the tensors of a GGUF file."""

    def __init__(self, gguf: Path, file: Path, reader: GGUFReader) -> None:
        import torch
        from transformers import AutoModelForCausalLM
        from transformers import modeling_gguf_pytorch_utils as legacy

        self.gguf = gguf
        parsed = legacy.load_gguf_checkpoint(str(file))
        with torch.device("meta"):
            config = model_config(reader, parsed["config"])
            self.model: Any = AutoModelForCausalLM.from_config(config)
        architecture = reader.fields["general.architecture"].contents()
        processor = legacy.TENSOR_PROCESSORS.get(architecture, legacy.TensorProcessor)
        self._processor = processor(config=parsed["config"])
        self._names = legacy.get_gguf_hf_weights_map(self.model, self._processor)

    def of(self, name: str, data: np.ndarray) -> Iterator[tuple[str, np.ndarray]]:
        """(name in the model, its rows in the model's order) of a tensor, each expert's by itself;
        nothing for what the model does without."""
        if match := _EXPERTS.fullmatch(name):
            # Every family has the name of this one, whatever it makes of the other two.
            stack = self._named(f"{match[1]}.ffn_down_exps.weight")
            if stack is None:
                raise self.refuse(name, "experts", "a model whose experts transformers finds")
            prefix = stack.removesuffix(".weight").rpartition(".")[0]
            for number, expert in enumerate(data):
                yield f"{prefix}.{number}.{match[2]}_proj.{match[3]}", expert
            return
        placed = self._processor.process(
            weights=data, name=name, tensor_key_mapping=self._names, parsed_parameters={}
        )
        if (known := self._named(placed.name)) is not None:
            yield known, placed.weights

    def _named(self, name: str) -> str | None:
        """The model's name of a tensor; llama.cpp writes .weight after parameters without it."""
        return self._names.get(name) or self._names.get(name.removesuffix(".weight"))

    def check_whole(self, tensors: Mapping[str, torch.Tensor]) -> None:
        """Raise CheckpointError for a parameter that no tensor is for."""
        tied = {"lm_head.weight"} if self.model.config.tie_word_embeddings else set()
        for name, _ in self.model.named_parameters():
            prefix, _, leaf = name.rpartition(".")
            parts = [f"{prefix}.0.{part}" for part in _OF_STACK.get(leaf, ())]
            if name not in tied and not all(n in tensors for n in parts or [name]):
                raise self.refuse(name, "no tensor", "one for each of the model's")

    def refuse(self, what: str, found: str, needed: str) -> CheckpointError:
        return CheckpointError(str(self.gguf), what, found, needed, _START_AGAIN)


def _convert(tensor: Any, scale: Any, places: _Places, found: Converted) -> None:
    """Add one tensor of the file, with its scale, to what is found."""
    import numpy as np
    import torch
    from gguf import dequantize

    kind = int(tensor.tensor_type)
    scale = np.ones(1, np.float32) if scale is None else scale.astype(np.float32).reshape(-1)
    if kind not in FP4_TYPES:
        values = dequantize(tensor.data, tensor.tensor_type)
        if not (scale == 1).all():
            values = values * scale.reshape(-1, *[1] * (values.ndim - 1))
        for name, value in places.of(tensor.name, values):
            found.tensors[name] = torch.from_numpy(np.array(value)).bfloat16()
        return
    codes, block_scales = split_blocks(tensor.data, kind)
    placed = zip(places.of(tensor.name, codes), places.of(tensor.name, block_scales), strict=True)
    num_placed = 0
    for (name, own_codes), (_, own_scales) in placed:
        layer = name.removesuffix(".weight")
        if layer == name or len(own_codes) != codes.shape[-2]:
            raise places.refuse(tensor.name, "a weight that is transposed", "rows as they are")
        bits = torch.from_numpy(np.array(own_scales))
        found.algos[layer] = FP4_TYPES[kind][0]
        found.tensors[name] = torch.from_numpy(np.array(own_codes))
        found.tensors[f"{layer}.weight_scale"] = (
            bits.view(torch.float8_e4m3fn) if kind == 40 else bits
        )
        if kind == 40:
            own = scale[num_placed % len(scale)]
            found.tensors[f"{layer}.weight_scale_2"] = torch.tensor(float(own))
        elif not (scale == 1).all():
            raise places.refuse(tensor.name, "MXFP4 with a scale of its own", "none")
        num_placed += 1
    if not num_placed or len(scale) not in (1, num_placed):
        what = f"{num_placed} places, {len(scale)} scales"
        raise places.refuse(tensor.name, what, "a place, and one scale or one for each")


def _quant_config(found: Converted) -> dict[str, Any]:
    groups = {algo: group for algo, group, _ in FP4_TYPES.values()}
    plain = (n.removesuffix(".weight") for n, t in found.tensors.items() if t.dim() > 1)
    return {
        "quant_method": "modelopt",
        "quant_algo": "MIXED_PRECISION",
        "quantized_layers": {
            layer: {"quant_algo": algo, "group_size": groups[algo]}
            for layer, algo in found.algos.items()
        },
        "ignore": [n for n in plain if n not in found.algos and not n.endswith("weight_scale")],
    }
