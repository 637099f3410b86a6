"""Keys and values of the tokens seen so far, under transformers' names: `DynamicCache`, `StaticCache`."""

from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Any, Self

import torch

if TYPE_CHECKING:
    from .config import LlamaConfig

Pair = tuple[torch.Tensor, torch.Tensor]


class CacheLayer:
    """One layer's keys (after RoPE) and values: views (B, K, length, D) of buffers with spare capacity.

    Without gradients, new tokens are written into the buffers, which double when full, so the cost of appending does
    not grow with the past. Under autograd, whose saved tensors must not change, the past is concatenated. Nor are
    tensors overwritten that the caller may hold: those passed in, or read before a crop, are copied first. With a
    `max_length` there is one buffer, which is overwritten.
    """

    def __init__(self, max_length: int | None = None):
        self.max_length = max_length
        self.length = 0
        self._ours = False  # whether nobody else holds the entries from `length` on
        self._lent = False  # whether those before `length` have been handed out
        self._keys: torch.Tensor | None = None
        self._values: torch.Tensor | None = None

    @property
    def is_initialized(self) -> bool:
        return self._keys is not None

    @property
    def keys(self) -> torch.Tensor | None:
        self._lent = True
        return None if self._keys is None else self._keys[:, :, : self.length]

    @keys.setter
    def keys(self, keys: torch.Tensor) -> None:
        self._put(keys, self.values)

    @property
    def values(self) -> torch.Tensor | None:
        self._lent = True
        return None if self._values is None else self._values[:, :, : self.length]

    @values.setter
    def values(self, values: torch.Tensor) -> None:
        self._put(self.keys, values)

    def _put(self, keys: torch.Tensor | None, values: torch.Tensor | None) -> None:
        """Replace the contents by (B, K, length, D). Keys and values are set one at a time, so lengths may differ."""
        self._keys, self._values, self._ours = keys, values, False
        self.length = max(held.shape[2] for held in (keys, values) if held is not None)

    def append(self, k: torch.Tensor, v: torch.Tensor) -> Pair:
        """Append (B, K, T, D) keys and values; return all so far."""
        start, end = self.length, self.length + k.shape[2]
        if self.max_length is not None and end > self.max_length:
            raise ValueError(f"the cache has room for {self.max_length} tokens and {end} are needed; make it larger")
        if self._keys is None or self._values is None:
            if self.max_length is None:  # the first tokens are kept without a copy
                self._keys, self._values, self.length = k, v, end
                return k, v
            shape = (k.shape[0], k.shape[1], self.max_length, k.shape[3])
            self._keys, self._values = k.new_empty(shape), v.new_empty(shape)
        if start == 0 and (k.shape[0], k.dtype, k.device) != (len(self._keys), self._keys.dtype, self._keys.device):
            self._keys = self._values = None
            return self.append(k, v)
        if k.shape[0] != self._keys.shape[0]:
            raise ValueError(f"the cache holds {self._keys.shape[0]} rows, got {k.shape[0]}; reorder or reset it")
        if torch.is_grad_enabled():
            self._ours = False
            self._keys = torch.cat([self._keys[:, :, :start], k], dim=2)
            self._values = torch.cat([self._values[:, :, :start], v], dim=2)
        else:
            if end > self._keys.shape[2] or not (self._ours or self.max_length) or _is_frozen(self._keys):
                self._ours = True
                room = max(end, 2 * start)
                self._keys, self._values = (
                    torch.cat([old[:, :, :start], new, new.new_empty(*new.shape[:2], room - end, new.shape[3])], dim=2)
                    for old, new in ((self._keys, k), (self._values, v))
                )
            else:
                self._keys[:, :, start:end] = k
                self._values[:, :, start:end] = v
        self.length = end
        return self._keys[:, :, :end], self._values[:, :, :end]

    def crop(self, length: int) -> None:
        """Drop all tokens from index `length` on."""
        if length < self.length:
            self.length, self._ours, self._lent = length, self._ours and not self._lent, False

    def select(self, rows: torch.Tensor) -> None:
        """Select (and possibly repeat) rows of the batch."""
        if self._keys is not None and self._values is not None:
            rows = rows.to(self._keys.device)
            self._keys, self._values = self._keys.index_select(0, rows), self._values.index_select(0, rows)


def _is_frozen(x: torch.Tensor) -> bool:
    """Whether `x` is an inference tensor outside inference mode, where it must not be written to."""
    return not torch.compiler.is_compiling() and x.is_inference() and not torch.is_inference_mode_enabled()


class _OfLayers(list):
    """Every layer's keys or values, as in transformers 4.x's caches: setting an item updates the cache."""

    def __init__(self, layers: list[CacheLayer], name: str):
        super().__init__(getattr(layer, name) for layer in layers)
        self._layers, self._name = layers, name

    def __setitem__(self, index: Any, tensor: Any) -> None:
        setattr(self._layers[index], self._name, tensor)
        super().__setitem__(index, tensor)

    def append(self, tensor: Any) -> None:
        raise TypeError("layers are added to a cache by update(keys, values, layer_idx), not in its key_cache")


class Cache:
    """The models' KV cache. One object serves as transformers' `Cache` and as its legacy tuple of pairs:

    `cache[layer]` is (keys, values), each (B, num_key_value_heads, length, head_dim), and iterating yields every pair.
    """

    max_cache_len: int | None = None
    is_compileable = False  # if True, transformers' generate would compile the model

    def __init__(self) -> None:
        self.layers: list[CacheLayer] = []

    def update(self, key_states: torch.Tensor, value_states: torch.Tensor, layer_idx: int,
               cache_kwargs: dict[str, Any] | None = None) -> Pair:  # fmt: skip
        """Append (B, K, T, D) keys and values to a layer; return all of them."""
        while len(self.layers) <= layer_idx:
            self.layers.append(CacheLayer(self.max_cache_len))
        return self.layers[layer_idx].append(key_states, value_states)

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """The number of tokens held."""
        return self.layers[layer_idx].length if layer_idx < len(self.layers) else 0

    def get_max_cache_shape(self, layer_idx: int = 0) -> int | None:
        """The maximum number of tokens, None if unlimited."""
        return self.max_cache_len

    get_max_length = get_max_cache_shape

    @property
    def seen_tokens(self) -> int:
        return self.get_seq_length()

    @property
    def key_cache(self) -> list[torch.Tensor | None]:
        return _OfLayers(self.layers, "keys")

    @property
    def value_cache(self) -> list[torch.Tensor | None]:
        return _OfLayers(self.layers, "values")

    def __len__(self) -> int:
        return len(self.layers)

    def __bool__(self) -> bool:
        return True  # an empty cache is a cache

    def __getitem__(self, layer_idx: int) -> Pair:
        layer = self.layers[layer_idx]
        if layer.keys is None or layer.values is None:
            raise KeyError(f"layer {layer_idx} of the cache holds nothing yet")
        return layer.keys, layer.values

    def __iter__(self) -> Iterator[Pair]:
        return (self[index] for index in range(len(self)))

    def to_legacy_cache(self) -> tuple[Pair, ...]:
        """transformers 4's form: a tuple over layers of (keys, values)."""
        return tuple(self)

    def crop(self, max_length: int) -> None:
        """Drop all tokens from index `max_length` on; negative values count from the end."""
        length = self.get_seq_length()
        keep = max_length if max_length >= 0 else max(length + max_length, 0)
        for layer in self.layers:
            layer.crop(keep)

    def reset(self) -> None:
        """Drop all tokens, but keep the buffers."""
        self.crop(0)

    def reorder_cache(self, beam_idx: torch.Tensor) -> None:
        """Reorder the rows: row i becomes the former row beam_idx[i]."""
        for layer in self.layers:
            layer.select(beam_idx)

    batch_select_indices = reorder_cache

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat every row `repeats` times, copies adjacent."""
        for layer in self.layers:
            if layer._keys is not None:
                layer.select(torch.arange(len(layer._keys)).repeat_interleave(repeats))


class DynamicCache(Cache):
    """A cache that grows with the text.

    Args:
        ddp_cache_data: initial (keys, values) per layer; the tensors are not copied.
        config: accepted for compatibility with transformers, and ignored.
    """

    def __init__(self, ddp_cache_data: Iterable[Pair] | None = None, config: "LlamaConfig | None" = None):
        super().__init__()
        if hasattr(ddp_cache_data, "hidden_size"):  # 4.x took no data, 5.x's examples pass a configuration first
            ddp_cache_data = None
        for index, (keys, values) in enumerate(ddp_cache_data or ()):
            self.update(keys, values, index)

    @classmethod
    def from_legacy_cache(cls, past_key_values: Iterable[Pair] | None = None) -> Self:
        """A cache from a tuple over layers of (keys, values)."""
        return cls(past_key_values)

    def batch_split(self, full_batch_size: int, split_size: int) -> list[Self]:
        """Split into caches of `split_size` rows each, in order."""
        starts = range(0, full_batch_size, split_size)
        return [type(self)([(k[i : i + split_size], v[i : i + split_size]) for k, v in self]) for i in starts]


class StaticCache(Cache):
    """A cache of fixed capacity, allocated once. More than `max_cache_len` tokens are an error.

    transformers' returns all `max_cache_len` entries and masks the empty ones; ours returns only the tokens it holds,
    so attention weights are as wide as the text.

    The buffers are allocated when the first tokens arrive, with their batch size, dtype and device.

    Args:
        config: the model's.
        max_cache_len: the maximum number of tokens.
        batch_size, max_batch_size, device, dtype: accepted for compatibility, and ignored; the tokens determine them.
    """

    def __init__(self, config: "LlamaConfig", max_cache_len: int | None = None, batch_size: int | None = None,
                 device: "torch.device | str | None" = None, dtype: torch.dtype | None = None,
                 max_batch_size: int | None = None):  # fmt: skip
        super().__init__()
        if max_cache_len is None or max_cache_len < 1:
            raise ValueError(f"max_cache_len must be a positive number of tokens, got {max_cache_len}")
        self.max_cache_len = max_cache_len
        self.layers = [CacheLayer(max_cache_len) for _ in range(config.num_hidden_layers)]


def as_cache(past_key_values: Any) -> Any:
    """`past_key_values` as a cache: ours or transformers' as it is, a tuple of pairs as a `DynamicCache`."""
    layers = getattr(past_key_values, "layers", ())
    if not isinstance(past_key_values, Cache) and any(hasattr(layer, "max_cache_len") for layer in layers):
        raise ValueError("transformers' StaticCache also returns its empty entries; use llama.StaticCache")
    if hasattr(past_key_values, "update") and hasattr(past_key_values, "get_seq_length"):
        return past_key_values
    if isinstance(past_key_values, tuple | list):
        return DynamicCache(past_key_values)
    raise ValueError(f"past_key_values must be a Cache or a tuple of pairs, got {type(past_key_values).__name__}")
