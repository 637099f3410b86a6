"""Write small checkpoints in Meta's layout for the tests, with torch alone, by the formulas of Meta's own code.

The permutation and the sharding are deliberately implemented a second time here, to test the library against.
"""

import json
import shutil
from pathlib import Path

import numpy as np
import torch
from checkpoint_files import FIELDS

from llama import reference

INSIDE = {  # Hugging Face's name within a layer: Meta's name and the axis of sharding
    "self_attn.q_proj": ("attention.wq", 0),
    "self_attn.k_proj": ("attention.wk", 0),
    "self_attn.v_proj": ("attention.wv", 0),
    "self_attn.o_proj": ("attention.wo", 1),
    "mlp.gate_proj": ("feed_forward.w1", 0),
    "mlp.up_proj": ("feed_forward.w3", 0),
    "mlp.down_proj": ("feed_forward.w2", 1),
    "input_layernorm": ("attention_norm", None),
    "post_attention_layernorm": ("ffn_norm", None),
}


def pairs(weight: torch.Tensor, heads: int) -> torch.Tensor:
    """Permute rows from Hugging Face's halves to Meta's pairs: in each head, row i to 2i and row i + D/2 to 2i + 1."""
    rows, width = weight.shape
    return weight.view(heads, 2, rows // heads // 2, width).transpose(1, 2).reshape(rows, width)


def shard_tensors(params: dict, fields: dict, shards: int, embedding_axis: int) -> list[dict[str, torch.Tensor]]:
    """Return the tensors of each shard of a model given in Hugging Face's names and layout."""
    heads, kv_heads = fields["num_attention_heads"], fields.get("num_key_value_heads", fields["num_attention_heads"])
    out: list[dict[str, torch.Tensor]] = [{} for _ in range(shards)]
    for name, tensor in params.items():
        stem = name.removesuffix(".weight")
        if stem.startswith("model.layers."):
            _, _, number, inside = stem.split(".", 3)
            meta, axis = INSIDE[inside]
            meta = f"layers.{number}.{meta}"
        else:
            meta, axis = {"model.embed_tokens": ("tok_embeddings", embedding_axis), "model.norm": ("norm", None),
                          "lm_head": ("output", 0)}[stem]  # fmt: skip
        if stem.endswith("q_proj"):
            tensor = pairs(tensor, heads)
        if stem.endswith("k_proj"):
            tensor = pairs(tensor, kv_heads)
        if stem.endswith(("k_proj", "v_proj")) and kv_heads < shards:
            tensor = tensor.view(kv_heads, -1, tensor.shape[1]).repeat_interleave(shards // kv_heads, 0)
            tensor = tensor.flatten(0, 1)  # repeat each head for the shards that share it
        parts = [tensor] * shards if axis is None else tensor.chunk(shards, axis)
        for shard, part in zip(out, parts, strict=True):
            shard[f"{meta}.weight"] = part.clone()
    head_dim = len(params["model.layers.0.self_attn.q_proj.weight"]) // heads
    for shard in out:
        shard["rope.freqs"] = torch.arange(head_dim // 2, dtype=torch.float32)  # present in Llama 1 and 2 only
    return out


def params_json(fields: dict) -> dict:
    """Return params.json as in Llama 2; `multiple_of` makes the formula yield the intermediate size."""
    said = {
        "dim": fields["hidden_size"],
        "multiple_of": fields["intermediate_size"],
        "ffn_dim_multiplier": 0.1,
        "n_heads": fields["num_attention_heads"],
        "n_layers": fields["num_hidden_layers"],
        "norm_eps": fields["rms_norm_eps"],
        "vocab_size": -1,
    }
    if "num_key_value_heads" in fields:
        said["n_kv_heads"] = fields["num_key_value_heads"]
    if fields.get("rope_theta", 10000.0) != 10000.0:
        said["rope_theta"] = fields["rope_theta"]
    return said


def write_meta(
    folder: Path,
    params: dict,
    fields: dict = FIELDS,
    shards: int = 1,
    dtype: torch.dtype = torch.float16,
    embedding_axis: int = 1,
    said: dict | None = None,
    tokenizer: Path | None = None,
) -> Path:
    """Write consolidated.NN.pth and params.json.

    Args:
        params: arrays or tensors under Hugging Face's names; they are cast to `dtype`.
        embedding_axis: 1 as in Llama 1 and 2, 0 as in Llama 3.
        said: further entries of params.json; None removes one.
        tokenizer: a tokenizer.model to copy into the folder.
    """
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {n: (torch.tensor(t) if isinstance(t, np.ndarray) else t).to(dtype) for n, t in params.items()}
    for number, shard in enumerate(shard_tensors(tensors, fields, shards, embedding_axis)):
        torch.save(shard, folder / f"consolidated.{number:02}.pth")
    contents = params_json(fields) | (said or {})
    (folder / "params.json").write_text(json.dumps({key: v for key, v in contents.items() if v is not None}))
    if tokenizer is not None:
        shutil.copy(tokenizer, folder / "tokenizer.model")
    return folder


def write_hollow_meta(
    folder: Path, fields: dict, shards: int, dtype: torch.dtype, embedding_axis: int = 1, said: dict | None = None
) -> Path:
    """Write a checkpoint of any size as sparse files: as long as the real ones, with next to no disk usage."""
    folder.mkdir(parents=True, exist_ok=True)
    with torch.device("meta"):
        shapes = reference.parameter_shapes(reference.Config.from_dict(fields))
        whole = {name: torch.empty(shape, dtype=dtype) for name, shape in shapes}
        parts = shard_tensors(whole, fields, shards, embedding_axis)
    hole = folder / "hole"
    with open(hole, "wb") as file:
        file.truncate(max(t.nbytes for t in parts[0].values()))
    for number, shard in enumerate(parts):
        mapped = {n: torch.from_file(str(hole), True, t.numel(), dtype=t.dtype).view(t.shape) for n, t in shard.items()}
        with torch.serialization.skip_data():
            torch.save(mapped, folder / f"consolidated.{number:02}.pth")
    hole.unlink()
    contents = params_json(fields) | (said or {})
    (folder / "params.json").write_text(json.dumps({key: v for key, v in contents.items() if v is not None}))
    return folder
