"""A checkpoint in Meta's layout: the contents of each consolidated.NN.pth, and of params.json."""

from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ..reference.config import Config
from ..reference.rope import interleave
from .meta import LENGTHS, LLAMA3_VOCABULARY, intermediate_size
from .names import EMBEDDING, FREQUENCIES, HEAD, find, rename, rotated_heads
from .stored import Stored, release

if TYPE_CHECKING:
    from . import Checkpoint

# (multiple_of, ffn_dim_multiplier) of Meta's published models
FEED_FORWARDS = ((256, None), (1024, 1.3), (256, 1.5), (256, 1.0), (1024, 1.0), (4096, 1.3), (4096, 1.2), (4096, 1.0))


class MetaShard:
    """Shard `number` of `count`: slices of the checkpoint's tensors under Meta's names, read one by one.

    The rows of q and k are interleaved pairs. With fewer key and value heads than shards, several shards share a head.

    Args:
        embedding_axis: the axis that the embedding is split along. By default its width as in Llama 1 and 2, or the
            vocabulary as in Llama 3 and for a tied head, so that the two are equal in each shard.

    Raises:
        ValueError: Meta's layout cannot store a tensor, or a tensor cannot be split evenly.
    """

    def __init__(self, checkpoint: "Checkpoint", number: int, count: int, embedding_axis: int | None = None):
        self.checkpoint, self.number, self.count = checkpoint, number, count
        config = Config.from_dict(checkpoint.config)
        self._heads = {n: getattr(config, n) for n in ("num_attention_heads", "num_key_value_heads")}
        if embedding_axis is None:
            whole = config.vocab_size > LLAMA3_VOCABULARY or config.tie_word_embeddings
            embedding_axis = 0 if whole else 1
        self._embedding_axis = embedding_axis

    @cached_property
    def _sources(self) -> dict[str, str]:
        """The checkpoint's names by Meta's. A tied head is written out, as Meta does."""
        sources = {}
        for name in self.checkpoint.tensors:
            renamed = rename(name, "hugging_face", "meta")
            if name.endswith(FREQUENCIES):
                continue
            if renamed is None or name.endswith(".bias"):
                raise ValueError(f"{self.checkpoint.path}: {name} cannot be stored in Meta's layout")
            sources[renamed] = name
        if HEAD not in self.checkpoint.tensors:
            sources["output.weight"] = EMBEDDING
        return sources

    @cached_property
    def tensors(self) -> Mapping[str, Stored]:
        tensors = {}
        for name, source in self._sources.items():
            dtype, shape = self.checkpoint.tensors[source]
            axis, start, stop = self._part(name, shape)
            tensors[name] = Stored(dtype, (*shape[:axis], stop - start, *shape[axis + 1 :]))
        return tensors

    def _part(self, name: str, shape: tuple[int, ...]) -> tuple[int, int, int]:
        """The axis a tensor is split along, and where this shard's slice starts and stops."""
        found = find(name, "meta")
        assert found is not None  # `_sources` only has names from the table
        row, _, _ = found
        axis = self._embedding_axis if row.meta == "tok_embeddings" else row.axis
        if axis is None:
            return 0, 0, shape[0]
        number, count, units = self.number, self.count, shape[axis]
        if row.meta in ("attention.wq", "attention.wo"):
            units = self._heads["num_attention_heads"]
        elif row.meta in ("attention.wk", "attention.wv"):
            units = self._heads["num_key_value_heads"]
            if count % units == 0:  # no more heads than shards
                number, count = number * units // count, units
        if units % count:
            raise ValueError(
                f"num_shards ({self.count}) must divide the heads, the widths and the vocabulary: "
                f"{name} of shape {shape} has {units} heads or rows to split"
            )
        length = shape[axis] // count
        return axis, number * length, (number + 1) * length

    def read(self, name: str) -> np.ndarray:
        source = self._sources[name]
        array = self.checkpoint.read(source)
        axis, start, stop = self._part(name, array.shape)
        part = array[start:stop] if axis == 0 else array[:, start:stop]
        heads = rotated_heads(source, self._heads)
        if heads is None:
            return part
        # a head is never split, so each part can be reordered on its own
        paired = interleave(part, heads * len(part) // len(array))
        release(part)
        return paired


def params_json(config: Mapping[str, Any], path: Path) -> dict[str, Any]:
    """The contents of params.json for a model with this configuration.

    Raises:
        ValueError: Meta's code does not support the model; the message names the field.
    """
    said = Config.from_dict(dict(config))
    rope = said.rope_parameters
    as_meta = {
        "hidden_act": (said.hidden_act, "silu"),
        "head_dim": (said.head_dim * said.num_attention_heads, said.hidden_size),
        "attention_bias": (said.attention_bias, False),
        "mlp_bias": (said.mlp_bias, False),
        "rope_type": (rope["rope_type"], "default", "llama3"),
        "low_freq_factor": (rope.get("low_freq_factor", 1.0), 1.0),
        "original_max_position_embeddings": (rope.get("original_max_position_embeddings", 8192), 8192),
    }
    for field, (is_so, *legal) in as_meta.items():
        if is_so not in legal:
            what = "head_dim · num_attention_heads" if field == "head_dim" else field
            can_be = " or ".join(map(repr, legal))
            raise ValueError(f"{path}: {what} is {is_so!r}, but in Meta's layout it can only be {can_be}")
    out: dict[str, Any] = {
        "dim": said.hidden_size,
        "n_layers": said.num_hidden_layers,
        "n_heads": said.num_attention_heads,
        "vocab_size": said.vocab_size,
        "norm_eps": said.rms_norm_eps,
        **_feed_forward(said.hidden_size, said.intermediate_size),
    }
    # The code of each LLaMA version rejects the keys of later ones, so defaults are left out.
    first = said.max_position_embeddings <= LENGTHS["1"]  # n_kv_heads tells the float16 files of Llama 2 from LLaMA 1's
    if said.num_key_value_heads != said.num_attention_heads or not first:
        out["n_kv_heads"] = said.num_key_value_heads
    if rope["rope_theta"] != 10000 or said.vocab_size > LLAMA3_VOCABULARY:
        out["rope_theta"] = rope["rope_theta"]
    if rope["rope_type"] == "llama3":
        out["use_scaled_rope"] = True
        if (rope["factor"], rope["high_freq_factor"]) != (8, 4) or said.tie_word_embeddings:
            out |= {"rope_scaling_factor": rope["factor"], "rope_high_freq_factor": rope["high_freq_factor"]}
    return out


def _feed_forward(dim: int, width: int) -> dict[str, Any]:
    """`multiple_of` and `ffn_dim_multiplier` that yield this width, if possible a published model's."""
    for multiple_of, multiplier in FEED_FORWARDS:
        if intermediate_size(dim, multiple_of, multiplier) == width:
            said = {"multiple_of": multiple_of}
            return said if multiplier is None else said | {"ffn_dim_multiplier": multiplier}
    # otherwise aim at the middle of the interval that is rounded up to the width
    multiple_of = width & -width
    return {"multiple_of": multiple_of, "ffn_dim_multiplier": (width - multiple_of // 2 + 0.25) / int(8 * dim / 3)}
