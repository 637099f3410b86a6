"""RMSNorm, the only normalisation in a LLaMA."""

import numpy as np
from jaxtyping import Float


def rms_norm(
    x: Float[np.ndarray, "*batch E"],
    weight: Float[np.ndarray, "E"],
    eps: float,
) -> Float[np.ndarray, "*batch E"]:
    """Scale every vector to unit root mean square, then by a learned gain.

        y = x / sqrt(mean(x²) + ε) · w                        (Zhang & Sennrich 2019, eq. 4)

    No mean is subtracted and no bias added: that separates it from LayerNorm. ε, which the paper leaves out, goes under
    the root; it has no default here because checkpoints disagree on it (1e-5 or 1e-6).
    """
    mean_square = np.mean(np.square(x), axis=-1, keepdims=True)  # (*batch, 1)
    return x / np.sqrt(mean_square + eps) * weight


def add_rms_norm(
    x: Float[np.ndarray, "*batch E"],
    residual: Float[np.ndarray, "*batch E"],
    weight: Float[np.ndarray, "E"],
    eps: float,
) -> tuple[Float[np.ndarray, "*batch E"], Float[np.ndarray, "*batch E"]]:
    """The end of one sub-layer and the start of the next: (rms_norm(residual + x), residual + x).

    The model here has no need of it. A kernel gains by doing both in one pass over memory, and this is what that pass
    must give.
    """
    residual = residual + x
    return rms_norm(residual, weight, eps), residual
