"""The key/value cache: why each new token costs only one token's work."""

import numpy as np
from jaxtyping import Float


class KVCache:
    """Keys (already rotated) and values of every token so far, for every layer.

    Past tokens never change, because causality hides later tokens from them. So their keys and values are kept, and
    only the new token has to be computed.

    The arrays have spare capacity and double when full, so the past is copied rarely, not at every token. `forward`
    updates the cache it is given in place. `length` counts tokens; `len(cache)` counts layers, as in transformers.
    """

    def __init__(self, num_hidden_layers: int):
        self.length = 0  # tokens in every layer
        self._layers: list[tuple[np.ndarray, np.ndarray] | None] = [None] * num_hidden_layers

    def __len__(self) -> int:
        return len(self._layers)

    @property
    def batch_size(self) -> int | None:
        """The batch size, or None while the cache is empty."""
        return self._layers[0][0].shape[0] if self.length and self._layers[0] else None

    def append(
        self, layer: int, k: Float[np.ndarray, "B K T D"], v: Float[np.ndarray, "B K T D"]
    ) -> tuple[Float[np.ndarray, "B K S D"], Float[np.ndarray, "B K S D"]]:
        """Write T new tokens after the first `length` and return views of all S = length + T.

        `length` itself only changes in `advance`, once every layer is written, so a failed pass leaves no trace.
        """
        B, K, T, D = k.shape
        end = self.length + T
        held = self._layers[layer] if self.length else None  # at length 0 (cropped) the arrays are stale
        if held is None or held[0].shape[2] < end:
            room = max(2 * self.length, end, 64)  # 64: short texts never need to grow
            grown = [np.empty((B, K, room, D), k.dtype) for _ in range(2)]
            if held is not None:
                for new, old in zip(grown, held, strict=True):
                    new[:, :, : self.length] = old[:, :, : self.length]
            held = self._layers[layer] = (grown[0], grown[1])
        keys, values = held
        keys[:, :, self.length : end] = k
        values[:, :, self.length : end] = v
        return keys[:, :, :end], values[:, :, :end]

    def advance(self, tokens: int) -> None:
        """Count `tokens` more tokens as cached."""
        self.length += tokens

    def crop(self, length: int) -> None:
        """Discard all tokens from position `length` on. Raise ValueError if the cache is shorter than that."""
        if not 0 <= length <= self.length:
            raise ValueError(f"cannot crop a cache of {self.length} tokens to {length}")
        self.length = length
