"""RMSNorm, the only normalisation in LLaMA."""

import numpy as np
from jaxtyping import Float


def rms_norm(
    x: Float[np.ndarray, "*batch E"],
    weight: Float[np.ndarray, "E"],
    eps: float,
) -> Float[np.ndarray, "*batch E"]:
    """Scale every vector to unit root mean square, then by a learned gain.

        y = x / sqrt(mean(x²) + ε) · w                        (Zhang & Sennrich 2019, eq. 4)

    Unlike LayerNorm, it subtracts no mean and adds no bias. ε, which the paper omits, goes under the root; it has no
    default here because checkpoints differ (1e-5 or 1e-6).
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

    The model here does not use it; it specifies a kernel, which saves a pass over memory by doing both at once.
    """
    residual = residual + x
    return rms_norm(residual, weight, eps), residual
