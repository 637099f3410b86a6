"""Tensor names in Hugging Face's, Meta's and llama.cpp's files."""

from typing import Any, Literal, NamedTuple

Layout = Literal["hugging_face", "meta", "gguf"]

EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
FREQUENCIES = "rotary_emb.inv_freq"  # the end of a buffer's name in folders written by old transformers; never needed


class Row(NamedTuple):
    """A tensor's name in each layout, without ".weight" or ".bias", and the axis that Meta's shards split it along.

    An axis of None means that every shard has the whole tensor. The embedding's is 1 in Llama 1 and 2, 0 in Llama 3.
    """

    hugging_face: str
    meta: str
    gguf: str
    axis: int | None


GLOBAL = (
    Row("model.embed_tokens", "tok_embeddings", "token_embd", 1),
    Row("model.norm", "norm", "output_norm", None),
    Row("lm_head", "output", "output", 0),
)
LAYER = (
    Row("input_layernorm", "attention_norm", "attn_norm", None),
    Row("self_attn.q_proj", "attention.wq", "attn_q", 0),
    Row("self_attn.k_proj", "attention.wk", "attn_k", 0),
    Row("self_attn.v_proj", "attention.wv", "attn_v", 0),
    Row("self_attn.o_proj", "attention.wo", "attn_output", 1),
    Row("post_attention_layernorm", "ffn_norm", "ffn_norm", None),
    Row("mlp.gate_proj", "feed_forward.w1", "ffn_gate", 0),
    Row("mlp.up_proj", "feed_forward.w3", "ffn_up", 0),
    Row("mlp.down_proj", "feed_forward.w2", "ffn_down", 1),
)
LAYERS = Row("model.layers.", "layers.", "blk.", None)  # before the layer's number

# The projections whose rows are interleaved pairs in Meta's and llama.cpp's files but halves in Hugging Face's, and the
# configuration field with their number of heads.
ROTATED = {"q_proj": "num_attention_heads", "k_proj": "num_key_value_heads"}


def find(name: str, layout: Layout) -> tuple[Row, str, str] | None:
    """Look up a name: its row, the layer's number ("" outside the layers) and the suffix (".weight" or ".bias").

    Returns None for a name that is not in the table.
    """
    stem, dot, kind = name.rpartition(".")
    if kind not in ("weight", "bias"):
        return None
    number, prefix = "", getattr(LAYERS, layout)
    rows: tuple[Row, ...] = GLOBAL
    if stem.startswith(prefix):
        number, _, stem = stem.removeprefix(prefix).partition(".")
        rows = LAYER
        if not number.isdecimal():
            return None
    row = next((row for row in rows if getattr(row, layout) == stem), None)
    return None if row is None else (row, number, dot + kind)


def rename(name: str, source: Layout, target: Layout) -> str | None:
    """ "blk.3.attn_q.weight" -> "model.layers.3.self_attn.q_proj.weight"; None for a name that is not in the table."""
    found = find(name, source)
    if found is None:
        return None
    row, number, kind = found
    inside = getattr(row, target)
    return f"{getattr(LAYERS, target)}{number}.{inside}{kind}" if number else f"{inside}{kind}"


def rotated_heads(name: str, config: dict[str, Any]) -> int | None:
    """The number of heads whose rows are reordered in this tensor (Hugging Face's name); None for all but q and k."""
    field = ROTATED.get(name.split(".")[-2]) if name.count(".") > 1 else None
    return None if field is None else config[field]
