# SPDX-License-Identifier: Apache-2.0
"""A folder of ModelOpt's or gpt-oss's as a GGUF file, in llama.cpp's layout (conversion/)."""

import json

import gguf
import numpy as np
import torch
from safetensors.torch import load_file

TYPE = gguf.GGMLQuantizationType


def ggml_blocks(codes, scales, is_nvfp4):
    """uint8 [..., bytes] of codes [..., K/2] and scales [..., K/g], a loop over the elements."""
    group, count = (16, 4) if is_nvfp4 else (32, 1)
    codes, scales = codes.numpy(), scales.view(torch.uint8).numpy()
    values = np.stack([codes & 15, codes >> 4], -1).reshape(*codes.shape[:-1], -1, group)
    half = group // 2
    packed = np.stack([values[..., j] + 16 * values[..., j + half] for j in range(half)], -1)
    packed = packed.reshape(*codes.shape[:-1], -1, count * half)
    scales = scales.reshape(*packed.shape[:-1], count)
    return np.concatenate([scales, packed], -1).reshape(*codes.shape[:-1], -1)


def permuted(rows, heads):
    """The rows of Llama's q_proj and k_proj as llama.cpp turns them."""
    return rows.reshape(heads, 2, -1, *rows.shape[1:]).swapaxes(1, 2).reshape(rows.shape)


def write_gguf(folder, path, edit=lambda tensors: None, describe=lambda writer: None, split=0):
    """Write the model of a folder, Llama's, Qwen3-MoE's or gpt-oss's. edit: changes {name: (array,
    type)}; describe: adds entries; split: the most tensors of a part. Returns the first part."""
    config = json.loads((folder / "config.json").read_text())
    config["num_experts"] = config.get("num_experts", config.get("num_local_experts", 0))
    is_llama = config["model_type"] == "llama"
    arch = gguf.MODEL_ARCH[config["model_type"].upper().replace("3_MOE", "3MOE")]
    names = gguf.get_tensor_name_map(arch, config["num_hidden_layers"])
    heads = {"q_proj": "num_attention_heads", "k_proj": "num_key_value_heads"} if is_llama else {}
    stored = _stacked(load_file(folder / "model.safetensors"), config["num_experts"])
    stored = _gate_and_up(stored)
    tensors = {}
    for name in [n for n in stored if n.endswith((".weight", ".bias"))]:
        layer = name.removesuffix(".weight")
        data, kind = _data(stored, name)
        if key := heads.get(layer.rpartition(".")[2]):
            data = permuted(data, config[key])
        new = names.get_name(name, try_suffixes=(".weight", ".bias"))
        tensors[new] = data, kind
        for leaf, old in ((".scale", "weight_scale_2"), (".input_scale", "input_scale")):
            if (scale := stored.get(f"{layer}.{old}")) is not None:
                data = scale.float().numpy().reshape(-1)
                tensors[new.replace(".weight", leaf)] = data, TYPE.F32
    edit(tensors)
    writer = gguf.GGUFWriter(path, gguf.MODEL_ARCH_NAMES[arch], split_max_tensors=split)
    _describe(writer, config)
    describe(writer)
    for name, (data, kind) in tensors.items():
        writer.add_tensor(name, data, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return min(path.parent.glob(f"{path.stem}-00001-of-*"), default=path)


def _stacked(stored, num_experts):
    """The tensors of experts in one each."""
    for name in [n for n in stored if ".experts.0." in n]:
        names = [name.replace("experts.0.", f"experts.{e}.") for e in range(num_experts)]
        stored[name.replace("experts.0.", "experts.")] = torch.stack([stored.pop(n) for n in names])
    return stored


def _gate_and_up(stored):
    """gpt-oss's tensors under the names of others, gate and up each by itself."""
    leaves = {"blocks": "weight", "scales": "weight_scale", "bias": "bias"}
    for name in [n for n in stored if ".experts." in n and n.endswith((*leaves,))]:
        module, _, leaf = name.rpartition("_")
        data = stored.pop(name)
        data = data.flatten(2) if leaf == "blocks" else data
        parts = {"down_proj": data}
        if module.endswith("gate_up_proj"):
            parts = {"gate_proj": data[:, ::2], "up_proj": data[:, 1::2]}
        for part, rows in parts.items():
            stored[f"{module.rpartition('.')[0]}.{part}.{leaves[leaf]}"] = rows
    return {n + ".weight" * n.endswith("sinks"): t for n, t in stored.items()}


def _data(stored, name):
    """(what the file has of a weight, its type)."""
    weight, layer = stored[name], name.removesuffix(".weight")
    if weight.dtype == torch.uint8:
        is_nvfp4 = f"{layer}.weight_scale_2" in stored
        blocks = ggml_blocks(weight, stored[f"{layer}.weight_scale"], is_nvfp4)
        return blocks, TYPE.NVFP4 if is_nvfp4 else TYPE.MXFP4
    kind = TYPE.F32 if weight.dim() == 1 or name.endswith(".bias") else TYPE.BF16
    return gguf.quants.quantize(weight.float().numpy(), kind), kind


def _describe(writer, config):
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_key_length(config["head_dim"])
    writer.add_rope_dimension_count(config["head_dim"])
    rope = config.get("rope_parameters") or {}
    writer.add_rope_freq_base(rope.get("rope_theta", 10000.0))
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_vocab_size(config["vocab_size"])
    if config["model_type"] == "gpt_oss":
        writer.add_sliding_window(config["sliding_window"])
        writer.add_rope_scaling_type(gguf.RopeScalingType.YARN)
        writer.add_rope_scaling_factor(rope["factor"])
        writer.add_rope_scaling_orig_ctx_len(rope["original_max_position_embeddings"])
    if config["num_experts"]:
        inner = config.get("moe_intermediate_size", config["intermediate_size"])
        writer.add_expert_feed_forward_length(inner)
        writer.add_expert_count(config["num_experts"])
        writer.add_expert_used_count(config["num_experts_per_tok"])
    tokens = ["<pad>", "<s>", "</s>", "a", "b", "ab"]
    tokens += [f"<unused{i}>" for i in range(config["vocab_size"] - len(tokens))]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("default")
    writer.add_token_list(tokens)
    writer.add_token_merges(["a b"])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
