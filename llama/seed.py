"""`set_seed`, transformers' way to begin a script."""

import random

import numpy as np
import torch


def set_seed(seed: int, deterministic: bool = False) -> None:
    """Seed the generators of `random`, NumPy and PyTorch on every device.

    Args:
        deterministic: let PyTorch take deterministic algorithms only, which can be slower.

    Raises:
        ValueError: a seed that NumPy does not take: it must be from 0 to 2³² - 1.
    """
    np.random.seed(seed)  # noqa: NPY002  (what others draw from)
    random.seed(seed)
    torch.manual_seed(seed)
    if deterministic:
        torch.use_deterministic_algorithms(True)
