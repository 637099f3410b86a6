"""From a checkpoint on disk to `params` and `config`."""

import os
import warnings

import numpy as np

from .config import Config
from .model import Params, check_params, parameter_shapes


def load(where: str | os.PathLike[str], dtype: type[np.floating] = np.float32) -> tuple[Params, Config]:
    """Read a model: `params, config = load("smollm2")`.

    Args:
        where: a folder in Hugging Face's layout (config.json and safetensors, sharded or not), a `.gguf` file, or the
            alias "smollm2", which is fetched the first time.
        dtype: what the arrays are given in. A tensor that is stored so is mapped, not read: the file's pages come in
            as they are used, and nothing is held twice.

    Raises:
        ValueError, OSError: a file is missing, damaged or not a LLaMA; the message names it.
    """
    # The one import of ours, and a late one: the readers in `llama.checkpoints` build on this package.
    from llama.checkpoints import open_checkpoint, read_tensors

    checkpoint = open_checkpoint(where)
    try:
        config = Config.from_dict(checkpoint.config)
        names = set(checkpoint.names)
        wanted = []
        for name, _ in parameter_shapes(config):
            if name in names:
                wanted.append(name)
            elif not (name == "lm_head.weight" and "score.weight" in names):
                raise ValueError(f"the tensor {name} is missing")
        wanted += ["score.weight"] * ("score.weight" in names)
        unused = sorted(n for n in names.difference(wanted) if not n.endswith("rotary_emb.inv_freq"))
        if unused:
            warnings.warn(f"{where}: {len(unused)} tensors are not used, among them {unused[0]}", stacklevel=2)
        params = read_tensors(checkpoint, wanted, dtype)
        check_params(params, config)
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from error
    return params, config
