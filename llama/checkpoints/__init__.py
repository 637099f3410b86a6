"""Read models from disk into NumPy arrays, without torch.

`open_checkpoint` detects the format. Whatever it is, the checkpoint it returns uses Hugging Face's configuration keys,
tensor names and layout, and reads one tensor at a time.
"""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from tokenizers import Tokenizer

from ..progress import progress
from .fetch import ALIASES, fetch
from .gguf import GGUFFile
from .huggingface import WEIGHT_FILES, HuggingFaceFolder, is_hugging_face
from .meta import MetaFolder, is_meta
from .stored import Stored
from .where import PLACES, find

__all__ = ["ALIASES", "Checkpoint", "Stored", "fetch", "find", "open_checkpoint", "read_tensors"]

FLOATS = ("float64", "float32", "float16", "bfloat16")


class Checkpoint(Protocol):
    """A model on disk, whatever its format."""

    path: Path

    @property
    def config(self) -> dict[str, Any]:
        """The contents of config.json."""

    @property
    def generation_config(self) -> dict[str, Any]:
        """The contents of generation_config.json, or {} if there is none."""

    @property
    def tensors(self) -> Mapping[str, Stored]:
        """The dtype and shape of each tensor, by its name in transformers' state dict. Reads no weights."""

    def read(self, name: str) -> np.ndarray:
        """One tensor in its stored dtype, memory-mapped if it needs no conversion; quantised ones as float32."""

    def tokenizer(self) -> tuple[Tokenizer, dict[str, Any]]:
        """The tokenizer and the contents of tokenizer_config.json."""


def open_checkpoint(where: str | os.PathLike[str] | Checkpoint, **hub_options: Any) -> Checkpoint:
    """Open the model at `where`: a folder in Hugging Face's or Meta's layout, a `.gguf` file, or a `.safetensors` file
    with its config.json next to it. `find` resolves `where` and takes the `hub_options`.

    A checkpoint that is already open is returned unchanged. A folder in both layouts is read as Hugging Face's.

    Raises:
        ValueError: it is not a model. FileNotFoundError: it does not exist. OSError: the download failed.
    """
    if not isinstance(where, str | os.PathLike):
        return where
    path = find(where, **hub_options)
    if path.is_dir():
        return MetaFolder(path) if is_meta(path) and not is_hugging_face(path) else HuggingFaceFolder(path)
    if path.is_file() and path.suffix.lower() == ".gguf":
        return GGUFFile(path)
    if path.suffix == ".safetensors":
        return HuggingFaceFolder(path.parent, None if WEIGHT_FILES.fullmatch(path.name) else path.name)
    if path.suffix in (".pth", ".bin", ".json"):
        raise ValueError(f"{path} is part of a model; give its folder, {path.absolute().parent}")
    raise ValueError(f"{path} is not a model; give {PLACES}")


def read_tensors(checkpoint: Checkpoint, names: list[str], dtype: type[np.floating]) -> dict[str, np.ndarray]:
    """Read the named tensors as read-only arrays of `dtype`, with a progress bar; those stored in it are not copied."""
    tensors = {}
    for name in progress(names, "loading", "tensors"):
        array = checkpoint.read(name)
        if array.dtype.name not in FLOATS:
            raise ValueError(f"{checkpoint.path}: {name} is stored as {array.dtype}; supported: {', '.join(FLOATS)}")
        tensors[name] = array.astype(dtype, copy=False).view()
        tensors[name].flags.writeable = False
    return tensors
