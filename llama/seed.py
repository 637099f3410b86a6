"""`set_seed`, as in transformers."""

import random

import numpy as np
import torch


def set_seed(seed: int, deterministic: bool = False) -> None:
    """Seed the generators of `random`, NumPy and PyTorch on every device.

    Args:
        deterministic: restrict PyTorch to deterministic algorithms, which can be slower.

    Raises:
        ValueError: the seed is not between 0 and 2³² - 1, as NumPy requires.
    """
    np.random.seed(seed)  # noqa: NPY002  (the global generator that other code uses)
    random.seed(seed)
    torch.manual_seed(seed)
    if deterministic:
        torch.use_deterministic_algorithms(True)
