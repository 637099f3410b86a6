"""Write small checkpoints in both formats for the tests."""

import json
from pathlib import Path

import gguf
import numpy as np
from safetensors.numpy import save_file

from llama import reference

FIELDS = {
    "model_type": "llama",
    "vocab_size": 12,
    "hidden_size": 64,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 32,
    "rms_norm_eps": 1e-5,
    "rope_theta": 500.0,
}


def random_params(fields=FIELDS, seed=0) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    shapes = reference.parameter_shapes(reference.Config.from_dict(fields))
    return {name: rng.normal(size=shape).astype(np.float32) for name, shape in shapes}


def write_folder(folder: Path, params: dict, fields=FIELDS, shards: int = 1) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(fields))
    if shards == 1:
        save_file(params, folder / "model.safetensors")
        return folder
    names, weight_map = list(params), {}
    for number in range(shards):
        file = f"model-{number + 1:05}-of-{shards:05}.safetensors"
        part = names[number::shards]
        save_file({name: params[name] for name in part}, folder / file)
        weight_map |= dict.fromkeys(part, file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return folder


GGUF_NAMES = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "model.layers": "blk",
}


def write_gguf(path: Path, params: dict, fields=FIELDS, quantisation=gguf.GGMLQuantizationType.F32, extra=None) -> Path:
    """Write it as llama.cpp's converter does: GGUF names, the rows of q and k in interleaved pairs."""
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(fields["num_hidden_layers"])
    writer.add_embedding_length(fields["hidden_size"])
    writer.add_feed_forward_length(fields["intermediate_size"])
    writer.add_head_count(fields["num_attention_heads"])
    writer.add_head_count_kv(fields["num_key_value_heads"])
    writer.add_context_length(fields["max_position_embeddings"])
    writer.add_layer_norm_rms_eps(fields["rms_norm_eps"])
    writer.add_rope_freq_base(fields["rope_theta"])
    for name, array in params.items():
        if "q_proj" in name or "k_proj" in name:
            heads = fields["num_attention_heads" if "q_proj" in name else "num_key_value_heads"]
            pairs = array.reshape(heads, 2, array.shape[0] // heads // 2, *array.shape[1:])
            array = pairs.swapaxes(1, 2).reshape(array.shape)
        for theirs, ours in GGUF_NAMES.items():
            name = name.replace(theirs, ours)
        kind = quantisation if array.ndim == 2 else gguf.GGMLQuantizationType.F32
        writer.add_tensor(name, gguf.quants.quantize(array, kind), raw_dtype=kind)
    if extra is not None:
        extra(writer)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def write_chat_model(path: Path) -> Path:
    """Write a model with random weights that emits bytes endlessly: 256 byte tokens, <|user|>, <|end|>."""
    from tokenizers import pre_tokenizers

    fields = FIELDS | {"vocab_size": 258, "max_position_embeddings": 100_000}

    def tokenizer(writer):
        writer.add_tokenizer_model("gpt2")
        writer.add_tokenizer_pre("gpt-2")
        writer.add_token_list([*sorted(pre_tokenizers.ByteLevel.alphabet()), "<|user|>", "<|end|>"])
        writer.add_token_types([1] * 256 + [3] * 2)
        writer.add_token_merges([])
        writer.add_chat_template("{% for m in messages %}<|user|>{{ m.role }}: {{ m.content }}{% endfor %}<|user|>")

    return write_gguf(path, random_params(fields), fields, extra=tokenizer)
