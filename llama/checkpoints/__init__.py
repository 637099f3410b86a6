"""Reading models from disk into NumPy arrays, without torch; or into PyTorch's tensors for those who ask.

`open_checkpoint` decides what a path is. What it returns shows every format alike: Hugging Face's configuration keys,
Hugging Face's tensor names and layout, one tensor at a time.
"""

import os
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
from tokenizers import Tokenizer

from ..progress import progress
from .fetch import ALIASES, fetch
from .gguf import GGUFFile
from .huggingface import HuggingFaceFolder

if TYPE_CHECKING:
    import torch

__all__ = ["ALIASES", "Checkpoint", "fetch", "open_checkpoint", "read_tensors"]


class Checkpoint(Protocol):
    """A model on disk, whatever its format."""

    path: Path

    @property
    def config(self) -> dict[str, Any]:
        """The contents of config.json."""

    @property
    def generation_config(self) -> dict[str, Any]:
        """The contents of generation_config.json, {} where there is none."""

    @property
    def names(self) -> Iterable[str]:
        """The tensors' names, as in transformers' state dict."""

    def read(self, name: str) -> np.ndarray:
        """One tensor in its stored precision; bfloat16 and quantised ones, which NumPy cannot hold, as float32."""

    def read_torch(self, name: str) -> "torch.Tensor":
        """One tensor as PyTorch's; every format keeps its stored dtype that can."""

    def tokenizer(self) -> tuple[Tokenizer, dict[str, Any]]:
        """The tokenizer and the contents of tokenizer_config.json."""


def open_checkpoint(where: str | os.PathLike[str] | Checkpoint) -> Checkpoint:
    """The model at `where`: a folder in Hugging Face's layout, a `.gguf` file, or the alias "smollm2".

    A checkpoint that is open already is given back.

    Raises:
        FileNotFoundError: there is nothing of the kind.
    """
    if not isinstance(where, str | os.PathLike):
        return where
    if str(where) in ALIASES and not Path(where).exists():
        where = fetch(str(where))
    path = Path(where).expanduser()
    if path.is_dir():
        return HuggingFaceFolder(path)
    if path.is_file() and path.suffix.lower() == ".gguf":
        return GGUFFile(path)
    legal = f"a folder with config.json and safetensors, a .gguf file, or {' or '.join(map(repr, ALIASES))}"
    if path.exists():
        raise ValueError(f"{path} is not a model; give {legal}")
    raise FileNotFoundError(f"{path} does not exist; give {legal}")


def read_tensors(checkpoint: Checkpoint, names: list[str], dtype: type[np.floating]) -> dict[str, np.ndarray]:
    """The named tensors in `dtype`, behind a progress bar. Those already stored so are mapped, not copied."""
    return {name: checkpoint.read(name).astype(dtype, copy=False) for name in progress(names, "loading", "tensors")}
