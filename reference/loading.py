"""From a checkpoint on disk to `params` and `config`."""

import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np

from .config import Config
from .model import Params, check_params, parameter_shapes

if TYPE_CHECKING:
    from llama.checkpoints import Checkpoint


def load(
    where: "str | os.PathLike[str] | Checkpoint", dtype: type[np.floating] = np.float32, **hub_options: Any
) -> tuple[Params, Config]:
    """Load a model: `params, config = load("smollm2")`.

    Args:
        where: a folder in Hugging Face's layout (config.json and safetensors or .bin, sharded or not) or in Meta's
            (params.json and consolidated.*.pth); a `.gguf` file; a Hugging Face id or the alias "smollm2", downloaded
            on first use; or a checkpoint opened by `llama.checkpoints`.
        dtype: float32 or float64, the dtype of the arrays. Tensors stored in that dtype are memory-mapped: pages are
            read as they are used, and nothing is held twice.
        hub_options: `revision`, `token` and whatever else `llama.checkpoints.find` accepts.

    Raises:
        ValueError, OSError: a file is missing, damaged or not a LLaMA; the message names it.
    """
    # The only import from outside this package, and deferred because `llama.checkpoints` imports this package.
    from llama.checkpoints import open_checkpoint, read_tensors

    if np.dtype(dtype) not in (np.float32, np.float64):
        raise ValueError(f"dtype must be float32 or float64, which the reference computes in; got {np.dtype(dtype)}")
    checkpoint = open_checkpoint(where, wanted="parameters", **hub_options)
    data, names = checkpoint.config, set(checkpoint.tensors)
    with _naming(checkpoint.path):
        config = Config.from_dict(data)
        if config.tie_word_embeddings and "lm_head.weight" in names:
            config = _untied_if_they_differ(checkpoint, config)
            names -= {"lm_head.weight"} if config.tie_word_embeddings else set()
        wanted = list(_tensors_to_read(config, names))
    unused = sorted(name for name in names.difference(wanted) if not name.endswith("rotary_emb.inv_freq"))
    if unused:
        warnings.warn(f"{checkpoint.path}: {len(unused)} tensors are not used, among them {unused[0]}", stacklevel=2)
    params = read_tensors(checkpoint, wanted, dtype)
    with _naming(checkpoint.path):
        check_params(params, config)
    return params, config


def _untied_if_they_differ(checkpoint: "Checkpoint", config: Config) -> Config:
    """Untie a head whose weights in the file differ from the embedding's, as transformers 5 does; else keep the tie."""
    if np.array_equal(checkpoint.read("lm_head.weight"), checkpoint.read("model.embed_tokens.weight")):
        return config
    warnings.warn(f"{checkpoint.path}: lm_head.weight differs from the embedding, so they are not tied", stacklevel=3)
    return replace(config, tie_word_embeddings=False)


def _tensors_to_read(config: Config, names: set[str]) -> Iterator[str]:
    """Yield the tensors of a language model, or of a classifier, which has a `score` and needs no `lm_head`."""
    classifier = "score.weight" in names
    for name, _ in parameter_shapes(config, classifier):
        if name not in names:
            raise ValueError(f"the tensor {name} is missing")
        yield name
    if classifier:
        yield "score.weight"


@contextmanager
def _naming(path: os.PathLike[str]) -> Iterator[None]:
    """Prefix a ValueError with the file's path and append how to fix it."""
    try:
        yield
    except ValueError as error:
        raise ValueError(f"{path}: {error}. Correct its configuration, or download the model again.") from error
