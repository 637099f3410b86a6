"""A view of a checkpoint, cast to a dtype or with fewer key and value heads. Nothing is kept in memory."""

from collections.abc import Mapping
from functools import cached_property
from typing import Any

import ml_dtypes
import numpy as np
from tokenizers import Tokenizer

from ..reference.config import Config
from . import Checkpoint
from .names import EMBEDDING, HEAD
from .stored import Stored, dtype_of, release
from .write import same

DTYPES = {"float32": np.dtype(np.float32), "float16": np.dtype(np.float16), "bfloat16": np.dtype(ml_dtypes.bfloat16)}


class Changed:
    """A `Checkpoint` over another one, whose tensors are pooled and cast as they are read.

    A head equal to the embedding is left out if the configuration ties the two. A head that differs is kept, whatever
    the configuration says.

    Args:
        dtype: "float32", "float16" or "bfloat16"; None keeps each tensor's own.
        num_key_value_heads: pool to this many key and value heads, each the mean of a group of the source's, computed
            in float32 or wider and rounded once (Ainslie et al. 2023, section 2.1). The query heads keep their order,
            so each one uses the mean of the group that its own head is in.
        tie: leave out a head equal to the embedding even if the configuration does not tie the two.

    Raises:
        ValueError: the dtype is unknown, or the heads do not divide.
    """

    def __init__(
        self,
        source: Checkpoint,
        dtype: str | None = None,
        num_key_value_heads: int | None = None,
        tie: bool = False,
    ):
        if dtype is not None and dtype not in DTYPES:
            raise ValueError(f"dtype must be one of {', '.join(DTYPES)}, got {dtype!r}")
        self.source, self.path = source, source.path
        self.dtype = None if dtype is None else DTYPES[dtype]
        self.heads, self._tie = num_key_value_heads, tie
        if num_key_value_heads is not None:
            self._has = has = Config.from_dict(source.config).num_key_value_heads
            if not isinstance(num_key_value_heads, int) or num_key_value_heads < 1 or has % num_key_value_heads:
                raise ValueError(
                    f"num_key_value_heads ({num_key_value_heads}) must divide the {has} key and value heads "
                    f"of {source.path}: each new one is the mean of as many old ones"
                )

    @property
    def changes(self) -> bool:
        """Whether any value may differ from the source's."""
        return self.dtype is not None or self.heads is not None

    @cached_property
    def config(self) -> dict[str, Any]:
        """The source's configuration with the changes, and the matrices' dtype as transformers 4 and 5 read it."""
        config = {key: value for key, value in self.source.config.items() if key != "dtype"}
        matrices = [stored for stored in self.tensors.values() if len(stored.shape) == 2] or self.tensors.values()
        config["torch_dtype"] = dtype_of(matrices).name
        if HEAD in self.source.tensors:
            config["tie_word_embeddings"] = HEAD not in self.tensors
        return config if self.heads is None else config | {"num_key_value_heads": self.heads}

    @property
    def generation_config(self) -> dict[str, Any]:
        return self.source.generation_config

    @cached_property
    def tensors(self) -> Mapping[str, Stored]:
        tensors = {name: self._changed(name, stored) for name, stored in self.source.tensors.items()}
        tied = self._tie or self.source.config.get("tie_word_embeddings")
        if (
            tied
            and {HEAD, EMBEDDING} <= tensors.keys()
            and same(self.source.read(HEAD), self.source.read(EMBEDDING), lambda count: None)
        ):
            del tensors[HEAD]
        return tensors

    def _changed(self, name: str, stored: Stored) -> Stored:
        shape = stored.shape
        if self.heads is not None and _is_pooled(name):
            if shape[0] % self._has:
                raise ValueError(f"{self.path}: {name} has {shape[0]} rows, which do not divide into {self._has} heads")
            shape = (shape[0] // self._has * self.heads, *shape[1:])
        return Stored(stored.dtype if self.dtype is None else self.dtype, shape)

    def read(self, name: str) -> np.ndarray:
        array, wanted = self.source.read(name), self.tensors[name]
        if array.dtype == wanted.dtype and array.shape == wanted.shape:
            return array
        source = array
        if self.heads is not None and _is_pooled(name):
            groups = array.reshape(self.heads, self._has // self.heads, -1, *array.shape[1:])
            array = groups.mean(axis=1, dtype=np.promote_types(array.dtype, np.float32)).reshape(wanted.shape)
        with np.errstate(over="ignore"):
            result = array.astype(wanted.dtype, copy=False)
        if _largest(wanted.dtype) < _largest(source.dtype) and np.isfinite(array[np.isinf(result)]).any():
            wider = [name for name in reversed(DTYPES) if _largest(DTYPES[name]) > _largest(wanted.dtype)]
            way_out = f"choose --dtype {' or '.join(wider)}" if wider else "leave --dtype out"
            raise ValueError(f"{self.path}: {name} holds numbers too large for {wanted.dtype}; {way_out}")
        release(source)
        return result

    def tokenizer(self) -> tuple[Tokenizer, dict[str, Any]]:
        return self.source.tokenizer()


def _is_pooled(name: str) -> bool:
    return any(f".{projection}." in name for projection in ("k_proj", "v_proj"))


def _largest(dtype: np.dtype) -> float:
    return float(ml_dtypes.finfo(dtype).max)
